"""What Inductor keeps for reuse: no more than there is room for under the true peak."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tcc.inductor_reuse import peak_in_place
from tcc.runtime import _inductor
from tcc.timing import allocations


def buffer(size: int, start: int, end: int) -> SimpleNamespace:
    """Made at step `start`, last read at `end` (-1: an output)."""
    return SimpleNamespace(size_alloc=size, size_free=size, start_step=start, end_step=end)


def test_a_loop_writes_over_what_ends_there() -> None:
    """A product makes 4, a loop maps it, a product reads that: only the loop's two values are one."""
    buffers = [buffer(1, 0, 3), buffer(4, 1, 2), buffer(4, 2, 3), buffer(1, 3, -1)]

    assert peak_in_place(buffers, [False, False, True, False]) == 1 + 4 + 1
    assert peak_in_place(buffers, [False, False, False, False]) == 1 + 4 + 4


def test_a_loop_writes_over_no_other_size_and_over_none_that_is_read_later() -> None:
    """Nor over what it made itself, where nobody reads that."""
    loops = [True, True, True]

    assert peak_in_place([buffer(4, 0, 1), buffer(3, 1, -1)], loops) == 4 + 3
    assert peak_in_place([buffer(4, 0, 2), buffer(4, 1, -1)], loops) == 4 + 4
    assert peak_in_place([buffer(4, 1, 1), buffer(2, 0, -1)], loops) == 4 + 2


@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # Inductor's own imports
def test_no_wide_value_is_kept_for_the_next_one() -> None:
    """Two MLPs of width 4, one of width 2 between them: Inductor alone keeps the first wide value, and takes 8."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=generator)
    ups = [torch.randn(32, 32 * wide, generator=generator) / 6 for wide in (4, 2, 4)]
    downs = [torch.randn(up.shape[1], 32, generator=generator) / 12 for up in ups]

    def step(x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor]:
        for up, down in zip(weights[:3], weights[3:], strict=True):
            x = x + torch.nn.functional.gelu(x @ up) @ down
        return (x,)

    inputs = [x, *ups, *downs]
    run = _inductor(make_fx(step)(*inputs), inputs, {})
    torch.testing.assert_close(run(*inputs)[0], step(*inputs)[0])
    assert allocations(lambda: run(*inputs)).peak == 6 * x.nbytes
