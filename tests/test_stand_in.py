"""What code that takes a compiled model for its model does besides calling it."""

from __future__ import annotations

import copy
import functools
import pickle
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tcc
from tcc.errors import CallError, PlanError
from tests.running import CLOSE, call, compiled
from tests.tiny_models import Case, Tokens, _blocks, case, fill, noise, relative_error


class Times:
    """Something that is called and is no module, as attention processors are."""

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, x: Tensor) -> Tensor:
        """The product."""
        return x * self.by


class Scaled(nn.Module):
    """Blocks after a buffer, a function and an attribute that the forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale, self.act, self.process = Tokens(_blocks()), 2.0, torch.tanh, Times(1.5)
        self.remark, self.inner.cached = "", []
        self.register_buffer("shift", torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks."""
        out: Tensor = self.inner(self.process(self.act(x * self.scale + self.shift)))
        return out


def scaled(plan: Any = None) -> tuple[nn.Module, tcc.CompiledModel, Tensor]:
    """The model, the compiled one, and an input."""
    model = fill(Scaled(), std=0.2)
    policy = functools.partial(tcc.plans.fora, num_steps=3, interval=2)
    return model, tcc.compile(model, plan or policy, backend="eager"), noise(2, 12, 16)


def test_weights_are_listed_and_saved_as_the_models() -> None:
    """Optimizers, savers and counters see the model's own tensors, by the model's names."""
    model, fast, _ = scaled()
    assert [*map(id, fast.parameters())] == [*map(id, model.parameters())]
    assert dict(fast.named_buffers()).keys() == dict(model.named_buffers()).keys() == {"shift"}
    assert fast.state_dict().keys() == model.state_dict().keys()
    assert set(fast.modules()) == set(model.modules())
    outer = nn.ModuleDict({"transformer": fast})
    assert outer.state_dict().keys() == {f"transformer.{name}" for name in model.state_dict()}
    fast.requires_grad_(False)
    assert not any(weight.requires_grad for weight in model.parameters())


def test_weights_are_loaded_into_the_model() -> None:
    """Before and after the first call: the compiled steps read the model's own tensors."""
    model, fast, x = scaled()
    other = fill(Scaled(), seed=1, std=0.2)
    first = fast(x)
    fast.load_state_dict(other.state_dict())
    fast.reset()
    with torch.no_grad():
        assert torch.equal(fast(x), other(x))
        assert torch.equal(model(x), other(x))
    assert relative_error(first, other(x).detach()) > 100 * CLOSE


def test_attributes_are_set_on_the_model_until_it_is_compiled() -> None:
    """After it, the value that they have may be set again, and no other; attributes of its own are the stand-in's."""
    model, fast, x = scaled()
    fast.scale = 3.0
    assert model.scale == fast.scale == 3.0
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))
    fast.scale = model.scale
    with pytest.raises(CallError, match=r"attribute 'scale' cannot be set after it was compiled, .* tcc.compile anew"):
        fast.scale = 4.0
    fast.note = "mine"
    assert fast.note == "mine"
    assert not hasattr(model, "note")


def test_it_is_in_eval_mode() -> None:
    """`eval()` reaches a model that nobody has put there; `train()` is refused."""
    model, fast, x = scaled()
    model.train()
    assert fast.eval() is fast
    assert not model.training
    fast(x)
    with pytest.raises(CallError, match="a compiled model runs in eval mode: train the original model"):
        fast.train()


def test_a_deep_copy_has_weights_of_its_own() -> None:
    """It is compiled anew at its first call, so that what is done to one is not seen by the other."""
    model, fast, x = scaled()
    first = fast(x)
    twin = copy.deepcopy(fast)
    assert isinstance(twin, tcc.CompiledModel)
    assert twin.info is None
    assert torch.equal(twin(x), first)
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    twin.reset()
    fast.reset()
    assert torch.equal(fast(x), first)
    assert not torch.equal(twin(x), first)
    assert not torch.equal(next(twin.parameters()), next(model.parameters()))


def hooked(model: Any) -> None:
    """A hook that changes the output."""
    model.inner.register_forward_hook(lambda module, args, out: out + 1)


def patched(model: Any) -> None:
    """A forward of the instance's own, as caches and offloaders put there."""
    model.inner.forward = lambda x: x


REPLACED: dict[str, Callable[[Any], None]] = {
    "a buffer": lambda model: setattr(model, "shift", torch.zeros(16)),
    "a weight": lambda model: setattr(model.inner, "head", nn.Linear(16, 16)),
    "a function": lambda model: setattr(model, "act", torch.sin),
    "a hook": hooked,
    "a forward": patched,
    "a processor": lambda model: setattr(model, "process", Times(4.0)),
}


@pytest.mark.parametrize("what", REPLACED)
def test_what_is_replaced_after_compilation_is_refused_at_the_next_image(what: str) -> None:
    """The compiled steps would not see it; the image in progress goes on."""
    model, fast, x = scaled()
    fast(x)
    REPLACED[what](model)
    fast(x)
    fast.reset()
    with pytest.raises(CallError, match=r"weights, buffers or functions of the model were replaced after it was comp"):
        fast(x)


def test_a_processor_that_is_set_anew_is_the_same() -> None:
    """Pipelines with perturbed attention set their own before every image, and the model's after it."""
    model, fast, x = scaled()
    first = fast(x)
    model.process = Times(1.5)
    fast.reset()
    assert torch.equal(fast(x), first)


@pytest.mark.parametrize("start", [-1, 2.5, 3])
def test_a_start_that_no_plan_has_is_refused_before_the_first_call(start: Any) -> None:
    """As far as it can be known."""
    which = case("dit")
    message = {-1: r"start_step=-1: the plan has steps 0\.\.", 2.5: "start_step=2.5: a step is a whole number"}
    known = tcc.compile(which.model, tcc.plans.full(which.info, num_steps=3), backend="eager")
    with pytest.raises(PlanError, match=message.get(start, r"start_step=3: the plan has steps 0\.\.2")):
        known.reset(start_step=start)
    unknown = tcc.compile(which.model, functools.partial(tcc.plans.full, num_steps=3), backend="eager")
    if start != 3:
        with pytest.raises(PlanError, match=message[start]):
            unknown.reset(start_step=start)
    else:
        unknown.reset(start_step=start)
        with pytest.raises(PlanError, match=r"start_step=3: the plan has steps 0\.\.2"):
            call(unknown, which, 3)


def test_the_shapes_not_used_for_longest_are_dropped_with_a_warning() -> None:
    """Two are kept: the third drops the one that was used before the last; what is kept is not captured again."""
    made: list[int] = []

    def policy(info: tcc.ModelInfo) -> tcc.CachePlan:
        made.append(info.batch)
        return tcc.plans.fora(info, num_steps=1, interval=2)

    model = fill(Scaled(), std=0.2)
    fast = tcc.compile(model, policy, backend="eager", on_shape_change="recapture", max_shapes=2)
    for batch in (1, 2, 1):
        fast(noise(batch, 12, 16))
    with pytest.warns(UserWarning, match=r"more than max_shapes=2 sets .*\(x \[2, 12, 16\]\) is dropped, and will be"):
        fast(noise(3, 12, 16))
    fast(noise(1, 12, 16))
    assert made == [1, 2, 3]
    with pytest.warns(UserWarning, match=r"\(x \[3, 12, 16\]\) is dropped"), torch.no_grad():
        assert torch.equal(fast(noise(2, 12, 16)), model(noise(2, 12, 16)))
    assert made == [1, 2, 3, 2]
    with pytest.raises(CallError, match="max_shapes=0, calls_per_step=1: both are whole numbers of 1 or more"):
        tcc.compile(model, policy, max_shapes=0)
    with pytest.raises(CallError, match=r"max_slot_bytes='20MiB': give a whole number of bytes, such as 20 \* 2\*\*20"):
        tcc.compile(model, policy, max_slot_bytes="20MiB")  # type: ignore[arg-type]
    for timesteps in ("soon", iter([900, 100])):
        with pytest.raises(CallError, match=r"timesteps=.*: give a tensor or a list of numbers, one per step"):
            tcc.compile(model, policy, timesteps=timesteps)  # type: ignore[arg-type]


def test_another_dtype_is_refused_with_the_remedy() -> None:
    """The input to cast, and the dtype."""
    which: Case = case("dit")
    model = compiled(which, tcc.plans.full(which.info, num_steps=2))
    x, t, y = which.args
    with pytest.raises(CallError, match=r"Cast it \(x.to\(torch.float32\)\), or call tcc.compile anew"):
        model(x.double(), t, y)


def test_settings_that_matter_may_not_change() -> None:
    """A plain attribute that the forward reads, set on the original model, would not be seen; others may change."""
    model, fast, x = scaled()
    before = fast(x)
    fast.reset()
    model.new = 5.0  # nothing has read it
    model.remark, model.inner.cached = "seen", [1, 2]
    with pytest.warns(UserWarning, match=r"'remark', 'inner.cached' of the model changed .* still computes the same"):
        assert torch.equal(fast(x), before)
    fast.reset()
    model.scale = 3.0
    with pytest.raises(CallError, match=r"computes something else since 'scale' changed, .* call tcc.compile anew"):
        fast(x)
    model.scale = 2.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is what it was
        assert torch.equal(fast(x), before)


class Set(nn.Module):
    """Its scale is the product of what it reads in several places."""

    of_class = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.tensor, self.helper = Tokens(_blocks()), torch.tensor(1.5), types.SimpleNamespace(scale=0.5)
        self.listed, self.many = [torch.tensor(2.0)], [1.0] * 100

    def forward(self, x: Tensor) -> Tensor:
        """Scale, and run the blocks."""
        out: Tensor = self.inner(x * self.tensor * self.of_class * self.helper.scale * self.listed[0] * self.many[70])
        return out


@pytest.mark.parametrize("name", ["of_class", "tensor", "helper", "listed", "many"])
def test_settings_count_wherever_they_are(name: str) -> None:
    """On the class, in an object or a collection; tensors too."""
    model = fill(Set(), std=0.2)
    fast = tcc.compile(model, tcc.CachePlan(1, {}), backend="eager")
    x = noise(2, 12, 16)
    assert torch.equal(fast(x), fast(x))
    changes: dict[str, Callable[[], object]] = {
        "of_class": lambda: setattr(model, "of_class", 3.0),
        "tensor": lambda: setattr(model, "tensor", torch.tensor(3.0)),
        "helper": lambda: setattr(model.helper, "scale", 3.0),
        "listed": lambda: model.listed.__setitem__(0, torch.tensor(3.0)),
        "many": lambda: model.many.__setitem__(70, 3.0),
    }
    changes[name]()
    with pytest.raises(CallError, match=rf"computes something else since '{name}\S*' changed"):
        fast(x)


class Adapted(nn.Module):
    """One of two maps, by name, as adapters are chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.active = Tokens(_blocks()), ["a"]
        self.maps = nn.ModuleDict({name: nn.Linear(16, 16) for name in "ab"})

    def forward(self, x: Tensor) -> Tensor:
        """Map, and run the blocks."""
        out: Tensor = self.inner(self.maps[self.active[0]](x))
        return out


def test_another_adapter_of_the_same_form_is_another_model() -> None:
    """The graph is the same, and its weights are not."""
    model = fill(Adapted(), std=0.2)
    fast = tcc.compile(model, tcc.CachePlan(1, {}), backend="eager")
    x = noise(2, 12, 16)
    fast(x)
    model.active = ["b"]
    with pytest.raises(CallError, match=r"computes something else since 'active' changed"):
        fast(x)


def test_habits_of_callers() -> None:
    """Code that freezes, compiles, copies, prints or pickles its model does no harm, or is told."""
    model, fast, x = scaled()
    assert repr(fast) == "CompiledModel(a policy, which makes its plan at the first call)"
    before = fast(x)
    assert type(fast.requires_grad_(False)) is tcc.CompiledModel
    assert not any(weight.requires_grad for weight in model.parameters())
    with pytest.warns(UserWarning, match="is compiled by tcc; compile\\(\\) has nothing to do"):
        fast.compile()
    assert torch.equal(copy.copy(fast)(x), before)
    assert repr(fast) == f"CompiledModel({fast.plan!r})"
    assert repr(fast.plan).startswith("<CachePlan fora: 3 steps IPI, ")
    assert repr(fast.session) == "<Session: step 1 of 3 is next>"
    assert repr(fast.info).startswith("<ModelInfo: 2 blocks, ")
    with pytest.raises(CallError, match="cannot be pickled: save the plan"):
        pickle.dumps(fast)
    bare = tcc.compile(fill(Tokens(_blocks())), tcc.CachePlan(1, {}), backend="eager")
    with pytest.raises(CallError, match=r"cannot be exported by torch\.export: tcc\.export\.bundle"):
        torch.export.export(bare, (x,))


def test_torch_compile_leaves_a_compiled_model_alone() -> None:
    """It does not look into it."""
    _, fast, x = scaled()
    before = [fast(x) for _ in range(3)]
    again = torch.compile(fast, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(torch.equal(again(x), expected) for expected in before)
