"""Why `torch.export` could not capture a model."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["explain"]

#: Files whose lines are no part of the model.
_OWN = ("tcc/capture/captured.py", "tcc/capture/explain.py")
#: In the kind or the text of an error: a value that no number stands for, or one that leaves torch.
_VALUE_SIGNS = (
    *("DataDependent", "data-dependent", "data dependent", "DynamicOutputShape"),
    *("SymInt", "SymFloat", "SymBool", ".item()", ".numpy()", "__format__"),
)


def explain(model: nn.Module, error: Exception) -> str:
    """What `torch.export` said, where in the model's code, and what to do."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    what = lines[0].rstrip(".") if lines else type(error).__name__
    place = _source_of(error)
    return f"torch.export could not capture {type(model).__name__}: {what}{place}. " + (
        "The forward must not branch on tensor values (`if x.sum() > 0`, `.item()`, `.tolist()`): make such values "
        "plain Python arguments, or compute both sides and choose with torch.where"
        if _reads_values(error)
        else _hint(model)
        or "See whether the call runs without tcc: if model(*args, **kwargs) fails alike, its inputs are wrong; if "
        "not, torch.export cannot follow its code"
    )


def _hint(model: nn.Module) -> str:
    """What is known to stand in the way of `torch.export`, in the model's state; "" if nothing is."""
    if any(weight.is_inference() for weight in model.parameters()) and not torch.is_inference_mode_enabled():
        return "Its weights were made under torch.inference_mode(): call it there too, or make the model outside of it"
    wrapped = next((name for name, module in model.named_modules() if "forward" in vars(module)), None)
    if wrapped is not None:
        where = f"its part '{wrapped}'" if wrapped else "the model"
        return (
            f"Something has replaced the forward of {where}, as offloading, casting layer by layer and other caches "
            "do: switch it off before tcc.compile"
        )
    return ""


def _reads_values(error: Exception) -> bool:
    """Whether the forward needed the value of a tensor, of which only shape and dtype are known while it is traced."""
    return any(sign in f"{type(error).__name__} {error}" for sign in _VALUE_SIGNS)


def _source_of(error: BaseException) -> str:
    """The innermost line outside torch that the error passed through."""
    place, trace = "", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "/torch/" not in name and not name.endswith(_OWN) and not name.startswith("<"):
            place = f" (at {name}:{trace.tb_lineno})"
        trace = trace.tb_next
    return place
