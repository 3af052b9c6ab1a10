"""Recordings that stand in for CUDA graphs where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Runs the operators of a call again, on the same memory, without its Python code."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._given: set[int] = set()
        self.own: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and note it down; the schedule's tables, in float64, stay on the host and may be read."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype != torch.float64:
            raise RuntimeError("a value is read while a graph is captured")
        self._given |= {place(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)} - self.own.keys()
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and place(x) not in self._given:
                self.own.setdefault(place(x), x)
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Run all of it again; every result goes where it was."""
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def spoil(self) -> None:
        """Something else was written to the memory that the recording allocated."""
        for x in self.own.values():
            if x.is_floating_point():
                torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).fill_(torch.nan)  # type: ignore[call-overload]


def place(tensor: Tensor) -> int:
    """Where a tensor's memory is."""
    return tensor.untyped_storage().data_ptr()


class Tapes:
    """Records like `tcc.runtime.cuda_graphs.Graphs`: recordings share memory, and overwrite what others left."""

    def __init__(self) -> None:
        self.made: list[Tape] = []

    def __call__(self, call: Callable[[], Sequence[Any]], warm_ups: int) -> tuple[Callable[[], None], Sequence[Any]]:
        """Record `call`, after so many calls."""
        for _ in range(warm_ups):
            call()
        with Tape() as tape:
            outputs = call()
        self.made.append(tape)

        def replay() -> None:
            with torch.no_grad():
                for other in self.made:
                    other.spoil()
                tape.replay()

        return replay, outputs
