"""What `tcc.compile` is given: what is wrong with it is said at once, and not at the first call."""

from __future__ import annotations

import inspect
from typing import Any, get_args

import torch
from torch import nn
from torch.export import ExportedProgram

from tcc.driver.prepare import OnShapeChange, Options
from tcc.driver.stand_in import StandIn
from tcc.errors import CallError, PlanError
from tcc.lowering import MODES, find_backend
from tcc.plan import CachePlan
from tcc.plan.plan import check_slot_dtype

__all__ = ["check_arguments", "check_plan", "numbers"]


def check_arguments(model: Any, plan: Any, options: Options, example_inputs: Any) -> None:
    """Check the arguments of `tcc.compile`.

    Raises:
        CallError, PlanError: names the argument and what it may be.
    """
    if isinstance(model, StandIn):
        raise CallError("the model is compiled already: model.with_plan(plan) runs another plan and shares its code")
    if not isinstance(model, (nn.Module, ExportedProgram)):
        raise CallError(f"model={model!r} is no model: give an nn.Module, or an ExportedProgram of one")
    check_plan(plan)
    if example_inputs is not None and [type(part) for part in example_inputs] != [tuple, dict]:
        raise CallError("example_inputs is a pair (args, kwargs), a tuple and a dict: write ((x, t, y), {})")
    _check_options(options)


def check_plan(policy: Any) -> None:
    """A plan, or a policy, which needs nothing but the model's info.

    Raises:
        PlanError: it is neither.
    """
    if isinstance(policy, CachePlan):
        return
    if not callable(policy):
        raise PlanError(f"plan={policy!r} is neither a plan nor a policy: read a file with tcc.CachePlan.load(path)")
    try:
        inspect.signature(policy).bind(None)
    except (TypeError, ValueError) as error:
        name = getattr(getattr(policy, "func", policy), "__name__", "policy")
        raise PlanError(
            f"the policy '{name}' cannot be called with the model's info alone: {error}. Give its options before: "
            f"functools.partial({name}, num_steps=50)"
        ) from error


def _check_options(options: Options) -> None:
    if options.on_shape_change not in get_args(OnShapeChange):
        raise CallError(f"on_shape_change={options.on_shape_change!r}: use 'error' or 'recapture'")
    if options.mode not in MODES:
        raise CallError(f"mode={options.mode!r}: use 'default', or 'reduce-overhead' for CUDA graphs")
    whole = (isinstance(count, int) for count in (options.max_shapes, options.calls_per_step))
    if not all(whole) or options.max_shapes < 1 or options.calls_per_step < 1:
        raise CallError(
            f"max_shapes={options.max_shapes}, calls_per_step={options.calls_per_step}: both are whole numbers of 1 or "
            "more"
        )
    limit = options.max_slot_bytes
    if limit is not None and (not isinstance(limit, int) or limit < 0):
        raise CallError(f"max_slot_bytes={limit!r}: give a whole number of bytes, such as 20 * 2**20")
    check_slot_dtype(options.slot_dtype)
    if not isinstance(options.regional, bool):
        raise CallError(f"regional={options.regional!r}: use True or False")
    if options.regional and (options.options or {}).get("freezing"):
        raise CallError(
            "regional=True makes one code for blocks of different weights, and freezing packs the weights into the "
            "code: leave out one of the two"
        )
    if options.backend != "inductor":
        find_backend(options.backend)
        if options.options:
            raise CallError(f"options={options.options!r} are Inductor's, and backend={options.backend!r} takes none")


def numbers(timesteps: object) -> torch.Tensor:
    """Timesteps as a tensor.

    Raises:
        CallError: they are no numbers.
    """
    try:
        return torch.as_tensor(timesteps)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CallError(f"timesteps={timesteps!r}: give a tensor or a list of numbers, one per step") from error
