"""A module that takes the place of another one in code that does not know of it, such as diffusers' pipelines."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from tcc.errors import CallError

__all__ = ["StandIn"]


class StandIn(nn.Module):
    """Stands in for a model: it has the model's attributes and class, and none of its weights.

    Attributes that it does not have itself (`config`, `dtype`, `save_pretrained`, ...) are the model's, and so is the
    class that `isinstance` and a pipeline's saved index see. `to()`, `half()` and the like reach the model as long as
    `_is_fixed` is false. `parameters()` and `state_dict()` find nothing: the weights are the model's alone.
    """

    def __init__(self, model: nn.Module | ExportedProgram) -> None:
        super().__init__()
        self._model = [model]  # in a list: the weights are not registered, saved or moved a second time
        self.training = False
        if isinstance(model, nn.Module):
            self.__module__ = type(model).__module__

    @property
    def _is_fixed(self) -> bool:
        """Whether something was made for the device and the dtypes that the weights have now."""
        return isinstance(self._model[0], ExportedProgram)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> StandIn:
        """Move or cast the model: what `to()`, `cuda()`, `half()` and pipelines do it by."""
        model = self._model[0]
        if isinstance(model, nn.Module) and not self._is_fixed:
            model._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        for device, dtype in {(w.device, w.dtype) for w in _weights(model)}:
            new = fn(torch.empty(0, device=device, dtype=dtype))
            if (new.device, new.dtype) != (device, dtype):
                raise CallError(
                    f"the model is compiled for {dtype} on {device} and cannot become {new.dtype} on {new.device}: "
                    "move and cast it (or the pipeline) before the first call, or compile it anew"
                )
        return self

    def _get_name(self) -> str:
        return type(self).__name__

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        model = self.__dict__.get("_model", [None])[0]
        return type(model) if isinstance(model, nn.Module) else type(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_model"][0], name)


def _weights(model: nn.Module | ExportedProgram) -> list[torch.Tensor]:
    return list(itertools.chain(model.parameters(), model.buffers()))
