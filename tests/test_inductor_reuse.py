"""What Inductor keeps for reuse: no more than there is room for under the true peak."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tcc.lowering.inductor import start_compiling
from tcc.lowering.inductor_reuse import memory_in_use
from tcc.timing import allocations


def buffer(size: int, start: int, end: int) -> SimpleNamespace:
    """Made at step `start`, last read at `end` (-1: an output)."""
    return SimpleNamespace(size_alloc=size, size_free=size, start_step=start, end_step=end)


def test_a_loop_writes_over_what_ends_there() -> None:
    """A product makes 4, a loop maps it, a product reads that: only the loop's two values are one."""
    buffers = [buffer(1, 0, 3), buffer(4, 1, 2), buffer(4, 2, 3), buffer(1, 3, -1)]

    assert memory_in_use(buffers, [False, False, True, False], grouped=False) == [1, 5, 5, 6]
    assert memory_in_use(buffers, [False] * 4, grouped=False) == [1, 5, 9, 6]


@pytest.mark.parametrize("grouped", [True, False])
def test_a_loop_writes_over_no_other_size_and_over_none_that_is_read_later(grouped: bool) -> None:
    """Nor over what it made itself, where nobody reads that."""

    def most(buffers: list[SimpleNamespace]) -> int:
        return max(memory_in_use(buffers, [True, True, True], grouped=grouped))

    assert most([buffer(4, 0, 1), buffer(3, 1, -1)]) == 4 + 3
    assert most([buffer(4, 0, 2), buffer(4, 1, -1)]) == 4 + 4
    assert most([buffer(4, 1, 1), buffer(2, 0, -1)]) == 4 + 2


def test_loops_that_follow_each_other_free_when_the_last_one_is_done() -> None:
    """Two values of other sizes, each read by the next loop alone: all three are there at once, until the product."""
    buffers = [buffer(4, 0, 1), buffer(3, 1, 2), buffer(2, 2, 3), buffer(1, 3, -1)]
    loops = [True, True, True, False]

    assert memory_in_use(buffers, loops, grouped=False) == [4, 7, 5, 3]
    assert memory_in_use(buffers, loops, grouped=True) == [9, 9, 9, 3]


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
    run = start_compiling(make_fx(step)(*inputs), inputs, {})()
    torch.testing.assert_close(run(*inputs)[0], step(*inputs)[0])
    assert allocations(lambda: run(*inputs)).peak == 6 * x.nbytes


@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # Inductor's own imports
def test_no_wide_value_is_kept_while_loops_hold_all_that_they_make() -> None:
    """Two MLPs of width 8, and softmaxes between them, which are one function: nothing but 3 beside the wide value."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 32), (32, 256), (256, 32), (27, 32), (32, 256), (256, 32)]
    inputs = [torch.randn(*shape, generator=generator) / shape[0] ** 0.5 for shape in shapes]

    def step(x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor]:
        before = part = torch.nn.functional.gelu(x @ weights[0]) @ weights[1]
        for width in (31, 30, 29, 28, 27):
            part = part[:, :width].softmax(0)
        after = before + part @ weights[2]
        return (torch.tanh(torch.nn.functional.gelu(after @ weights[3]) @ weights[4]) * after * before,)

    run = start_compiling(make_fx(step)(*inputs), inputs, {})()
    torch.testing.assert_close(run(*inputs)[0], step(*inputs)[0])
    assert allocations(lambda: run(*inputs)).peak == 11 * inputs[0].nbytes
