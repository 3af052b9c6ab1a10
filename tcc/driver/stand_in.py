"""A module that takes the place of another one in code that does not know of it, such as diffusers' pipelines."""

from __future__ import annotations

import itertools
import warnings
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
    `_is_fixed` is false; after it, what would change the model is refused. `parameters()`, `state_dict()`, `modules()`
    and the like are the model's.
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

    def train(self, mode: bool = True) -> StandIn:
        """Nothing: the model is in eval mode, or is put there while nothing was made of it.

        Raises:
            CallError: `mode` is true.
        """
        if mode:
            raise CallError("a compiled model runs in eval mode: train the original model, and compile it afterwards")
        model = self._model[0]
        if isinstance(model, nn.Module) and model.training:
            model.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> StandIn:
        """`nn.Module.requires_grad_` of the model; it is still the stand-in that comes back."""
        model = self._model[0]
        if isinstance(model, nn.Module):
            model.requires_grad_(requires_grad)
        return self

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, with a warning: the steps are compiled already, and torch.compile would look into tcc itself."""
        warnings.warn("the model is compiled by tcc; compile() has nothing to do", stacklevel=2)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What pickle asks for.

        Raises:
            CallError: always.
        """
        raise CallError(
            "a compiled model cannot be pickled: save the plan (model.plan.save) and the weights and compile where "
            "they are needed, or write a bundle with tcc.export.bundle and read it with tcc.load"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        """Set the model's attribute where it has one of that name and the stand-in does not.

        Raises:
            CallError: something was made of the model, which does not see another value.
        """
        model = self.__dict__.get("_model", [None])[0]
        own = name in self.__dict__ or hasattr(type(self), name) or not hasattr(model, name)
        if own:
            super().__setattr__(name, value)
        elif not self._is_fixed:
            setattr(model, name, value)
        elif getattr(model, name) is not value:
            raise CallError(
                f"the model's attribute '{name}' cannot be set after it was compiled, since the compiled steps would "
                "not see it: set it before the first call, or on the original model and call tcc.compile anew"
            )

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


def _of_model(name: str) -> property:
    """The model's method of that name; the stand-in's own, which finds nothing, where the model has none."""

    def get(self: StandIn) -> Any:
        model = self._model[0]
        return getattr(model if isinstance(model, nn.Module) else super(StandIn, self), name)

    return property(get, doc=f"`nn.Module.{name}` of the model.")


for _name in (
    *("parameters", "named_parameters", "buffers", "named_buffers", "modules", "named_modules", "children"),
    *("named_children", "state_dict", "load_state_dict", "get_parameter", "get_buffer"),
    "get_submodule",
):
    setattr(StandIn, _name, _of_model(_name))
