"""Capturing: one functional graph, or an error that says where and what to do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tcc
from tcc.capture import capture
from tcc.errors import CallError, CaptureError
from tcc.models.dit import DiT
from tests.tiny_models import Block, Case, Tokens, case, dit, noise

aten = torch.ops.aten
SIZES = {"input_size": 8, "patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 2}


def captured(model: nn.Module, *args: object, **kwargs: object) -> tcc.capture.Captured:
    """The captured model, in eval mode."""
    return capture(model.eval(), args, kwargs)


@pytest.mark.parametrize("name", ["dit", "hf_dit", "hf_pixart", "separate", "flat"])
def test_the_graph_is_the_model(name: str) -> None:
    """It computes the same bits, from the tensor inputs alone, in their order."""
    which = case(name)
    found = which.info.captured
    with torch.no_grad():
        outputs = found.gm(*found.flatten(which.args, which.kwargs))
        expected = which.model(*which.args, **which.kwargs)
    result = found.unflatten(list(outputs))
    assert type(result) is type(expected)
    leaves = torch.utils._pytree.tree_leaves
    assert all(torch.equal(a, b) for a, b in zip(leaves(result), leaves(expected), strict=True))


def test_operators_stay_whole() -> None:
    """What users and backends know as one operator is one node."""
    targets = {str(n.target) for n in case("hf_pixart").info.captured.gm.graph.nodes if n.op == "call_function"}
    assert {"aten.linear.default", "aten.layer_norm.default", "aten.scaled_dot_product_attention.default"} <= targets
    assert not {t for t in targets if "mm" in t or "assert" in t or "dropout" in t}


def test_weights_are_shared_with_the_model() -> None:
    """The graph holds the model's own tensors."""
    which = case("dit")
    own = {p.data_ptr() for p in which.model.parameters()}
    weights = list(which.info.captured.gm.parameters())
    assert len(weights) == len(list(which.model.parameters()))
    assert {w.data_ptr() for w in weights} == own


def test_the_hash_is_that_of_the_graph() -> None:
    """Equal for two captures of one architecture, whatever the weights; other for another shape or depth."""
    one = case("dit").info.captured.hash
    assert one == tcc.inspect(dit().model, *dit().args).captured.hash
    assert len({one, dit(batch=1).info.captured.hash, dit(depth=1).info.captured.hash}) == 3


def test_the_hash_does_not_depend_on_the_device() -> None:
    """A plan that was made without weights, or on another machine, is a plan for the model."""
    with torch.device("meta"):
        model = DiT(**{"in_channels": 4, "num_classes": 10, **SIZES}).eval()
        t, y = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        on_meta = tcc.inspect(model, torch.empty(2, 4, 8, 8), t, y)
    assert on_meta.captured.inputs[0].device.type == "meta"
    assert on_meta.key == case("dit").info.key


def test_one_tensor_for_two_inputs_is_captured_as_two() -> None:
    """The graph reads each input where it belongs, though they were the same object at capture."""
    which = case("dit")
    same = torch.tensor([1, 2])
    found = captured(which.model, which.args[0], same, same)
    with torch.no_grad():
        assert torch.equal(found.gm(*which.args)[0], which.model(*which.args))


def test_inputs_are_named_and_described() -> None:
    """Tensor inputs in call order; the others are constants of the capture."""
    found = case("hf_dit").info.captured
    assert [(i.name, i.shape, i.dtype) for i in found.inputs] == [
        ("hidden_states", (2, 4, 8, 8), torch.float32),
        ("timestep", (2,), torch.int64),
        ("class_labels", (2,), torch.int64),
    ]
    assert True in found.constants.values()  # return_dict


class Writes(nn.Module):
    """Works in place on its own values, as rotary embeddings often do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Tokens([Block(16), Block(16)])

    def forward(self, x: Tensor) -> Tensor:
        """Negate half of a copy."""
        y = x.clone()
        y[..., ::2] = -y[..., 1::2]
        out: Tensor = self.inner(y)
        return out


def test_writes_in_place_become_functional() -> None:
    """No operator of the graph changes its inputs, and the result is the model's."""
    model, x = Writes().eval(), noise(2, 12, 16)
    found = captured(model, x)
    assert not any(n.target._schema.is_mutable for n in found.gm.graph.nodes if hasattr(n.target, "_schema"))
    with torch.no_grad():
        assert torch.equal(found.gm(x)[0], model(x))


class Counts(nn.Module):
    """Changes a buffer at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Tokens([Block(16), Block(16)])
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Count."""
        self.calls.add_(1)
        out: Tensor = self.inner(x) + self.calls
        return out


def test_a_model_that_changes_its_state_is_refused() -> None:
    """Steps would not be repeatable; the message names the buffer."""
    with pytest.raises(CaptureError, match=r"the model writes to calls while it runs, .*return the new value instead"):
        captured(Counts(), noise(2, 12, 16))


class ChangesItsInput(nn.Module):
    """Writes into what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        """Double in place."""
        return x.mul_(2).exp()


def test_a_model_that_changes_its_input_is_refused() -> None:
    """The caller's tensor would change under the sampler."""
    with pytest.raises(CaptureError, match="the model writes to x while it runs"):
        captured(ChangesItsInput(), noise(2, 3))


class ReadsStrides(nn.Module):
    """Overlapping windows of what lies in memory, of an input or of a computed value."""

    def __init__(self, computed: bool) -> None:
        super().__init__()
        self.computed = computed

    def forward(self, x: Tensor) -> Tensor:
        """Double, and cut."""
        return (x * 2 if self.computed else x).as_strided((3, 2), (1, 1)) + 1


def test_strides_of_computed_values_are_refused() -> None:
    """A slot or a scatter in their place may lie otherwise; an input lies as at capture."""
    with pytest.raises(CaptureError, match=r"computed value by strides .*test_capture.py.*: reused .* with reshape"):
        captured(ReadsStrides(computed=True), noise(2, 3))
    assert captured(ReadsStrides(computed=False), noise(2, 3)).inputs[0].shape == (2, 3)


def test_a_branch_on_data_is_refused_with_line_and_remedy() -> None:
    """The message names the model, the user's line, and what to do; the cause is torch's."""
    which = case("branching")
    message = r"torch.export could not capture Branching: .*\(at .*tiny_models.py:\d+\)\. .*choose with torch.where"
    with pytest.raises(CaptureError, match=message) as caught:
        tcc.inspect(which.model, *which.args)
    assert caught.value.__cause__ is not None
    line = int(str(caught.value).split("tiny_models.py:")[1].split(")")[0])
    with open(str(caught.value).split("(at ")[1].split(":")[0]) as source:
        assert "if x.sum() > 0:" in source.read().splitlines()[line - 1]


class Chosen(nn.Module):
    """A model that changes the rows of a mask, however many, and chooses between two functions by a value."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.pick, self.inner = nn.Linear(width, width), Tokens([Block(width), Block(width)])

    def forward(self, x: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
        """Halve the chosen rows, add what all come to, then scale by the sign of the sum."""
        rows = rows.clone()
        rows[mask] *= 0.5
        x = x + self.pick(rows)
        x = torch.cond(x.sum() > 0, lambda v: v * 2, lambda v: -v, (x,))
        out: Tensor = self.inner(x)
        return out


def test_sizes_and_branches_may_depend_on_the_data() -> None:
    """The graph goes on beside a value whose size nobody knows, and holds both sides of a `torch.cond`."""
    torch.manual_seed(0)
    model, x = Chosen().eval(), noise(2, 12, 16)
    masks = [(torch.arange(12) < count).expand(2, -1) for count in (3, 0, 12)]
    actions = {(1, "inner.blocks.0.delta"): tcc.Update("some"), (2, "inner.blocks.1.delta"): tcc.Reuse()}
    plan = tcc.CachePlan(num_steps=3, actions=actions, tokens={"some": torch.tensor([1, 4])})
    compiled, reference = tcc.compile(model, plan, backend="eager"), tcc.Reference(model, plan)
    uncached = tcc.compile(model, tcc.CachePlan(num_steps=1, actions={}), backend="eager")
    for sign, mask in zip((1, -1, 1), masks, strict=True):
        with torch.no_grad():
            inputs = (sign * x, noise(2, 12, 16, seed=8), mask)
            assert torch.equal(uncached(*inputs), model(*inputs))
            torch.testing.assert_close(compiled(*inputs), reference(*inputs))
    macs = [variant.macs for variant in compiled.program.variants]
    assert max(macs) == macs[0] == compiled.info.analysis.macs


def test_the_hash_is_that_of_inner_functions_too() -> None:
    """Two models that differ inside a `torch.cond` alone are two models to a plan."""

    class Other(Chosen):
        def forward(self, x: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
            rows = rows.clone()
            rows[mask] *= 0.5
            x = x + self.pick(rows)
            x = torch.cond(x.sum() > 0, lambda v: v * 3, lambda v: -v, (x,))
            out: Tensor = self.inner(x)
            return out

    inputs = (noise(2, 12, 16), noise(2, 12, 16), torch.ones(2, 12, dtype=torch.bool))
    assert captured(Chosen(), *inputs).hash != captured(Other(), *inputs).hash
    assert captured(Chosen(), *inputs).hash == captured(Chosen(), *inputs).hash


def test_a_model_in_training_mode_is_refused() -> None:
    """Dropout would be captured."""
    which = dit()
    with pytest.raises(CaptureError, match=r"the model is in training mode .*call model.eval\(\) first"):
        tcc.inspect(which.model.train(), *which.args)


def test_a_call_that_does_not_fit_the_forward_is_refused() -> None:
    """Before torch.export is asked."""
    which = case("dit")
    with pytest.raises(CallError, match="the call does not fit the model's forward: missing a required argument: 't'"):
        tcc.inspect(which.model, which.args[0])


def test_an_error_of_the_model_itself_is_shown() -> None:
    """A shape that the model cannot take is the model's error, with the user's line."""
    which = case("separate")
    with pytest.raises(CaptureError, match=r"could not capture Tokens: .*tiny_models.py"):
        tcc.inspect(which.model, noise(2, 12, 17))


class Reads(nn.Module):
    """Needs the value of a tensor, in one of several ways."""

    def __init__(self, how: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        """Look at it."""
        self.how(x)
        return x


READS: dict[str, Callable[[Tensor], object]] = {
    "branch": lambda x: 1 if x.sum() > 0 else 2,
    "item": lambda x: range(int(x.sum().item())),
    "list": lambda x: set(x.tolist()),
    "numpy": lambda x: x.numpy(),
    "text": lambda x: f"{x.sum():.2f}",
    "equal": lambda x: 1 if torch.equal(x, x + 1) else 2,
}


@pytest.mark.parametrize("how", READS)
def test_what_reads_values_is_told_so(how: str) -> None:
    """And not advised to look at the call, which is right."""
    with pytest.raises(CaptureError, match="must not branch on tensor values"):
        captured(Reads(READS[how]), noise(3))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (4, 8, 8)])
def test_a_wrong_call_is_not_taken_for_a_branch(shape: tuple[int, ...]) -> None:
    """Other channels and another rank: the advice is to try the call by itself."""
    which = case("dit")
    with pytest.raises(
        CaptureError, match=r"if model\(\*args, \*\*kwargs\) fails alike, its inputs are wrong"
    ) as caught:
        tcc.inspect(which.model, noise(*shape), *which.args[1:])
    assert "branch" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_captured(dtype: torch.dtype) -> None:
    """The graph computes in the model's dtype."""
    model, x = Tokens([Block(16), Block(16)]).eval().to(dtype), noise(2, 12, 16).to(dtype)
    which = Case(model, (x,), {})
    with torch.no_grad():
        assert torch.equal(which.info.captured.gm(x)[0], model(x))
    assert which.info.captured.inputs[0].dtype == dtype


class Decorated(nn.Module):
    """A forward in a wrapper that reads keyword arguments by name, as diffusers' scales of adapters are read."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def _inner(self, x: Tensor, scale: float | None = None, more: dict[str, Tensor] | None = None) -> Tensor:
        out: Tensor = self.inner(x if more is None else x + more["a"] - more["b"])
        return out

    @functools.wraps(_inner)
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Scale, if asked."""
        return self._inner(*args, **kwargs) * (kwargs.get("scale") or 1)


def test_a_model_is_captured_in_its_callers_words() -> None:
    """What is given by name stays named; later calls may be written in any way."""
    model, x = Decorated().eval(), torch.ones(2, 4)
    found = capture(model, (), {"scale": 0.5, "x": x})
    with torch.no_grad():
        expected = model(x, scale=0.5)
        assert torch.equal(found.gm(*found.flatten((x,), {"scale": 0.5}))[0], expected)
        assert torch.equal(found.gm(*found.flatten((x, 0.5, None), {}))[0], expected)
    with pytest.raises(CallError, match=r"argument 'scale' is None but was 0.5 at capture"):
        found.flatten((x,), {})


def test_the_order_of_names_means_nothing() -> None:
    """Of keyword arguments, and in dictionaries."""
    model, x, more = Decorated().eval(), torch.ones(2, 4), {"a": torch.ones(4), "b": torch.zeros(4)}
    found = capture(model, (x,), {"more": {"b": more["b"], "a": more["a"]}, "scale": 2.0})
    with torch.no_grad():
        result = found.gm(*found.flatten((), {"scale": 2.0, "more": more, "x": x}))[0]
        assert torch.equal(result, model(x, scale=2.0, more=more))


def test_autocast_is_that_of_the_capture() -> None:
    """Its casts are in the graph; a call with another one is refused."""
    which, low = case("dit"), torch.autocast("cpu", torch.bfloat16)
    found = capture(which.model, which.args, which.kwargs)
    with (
        low,
        pytest.raises(CallError, match=r"autocast to torch\.bfloat16, and the model was captured with autocast off"),
    ):
        found.flatten(which.args, which.kwargs)
    with low:
        found = capture(which.model, which.args, which.kwargs)
        assert found.flatten(which.args, which.kwargs)
    with pytest.raises(CallError, match=r"autocast off, and the model was captured with autocast to torch\.bfloat16"):
        found.flatten(which.args, which.kwargs)


def test_what_stands_in_the_way_is_named() -> None:
    """A forward that something has replaced, as offloading does, and weights of inference mode."""
    model = Decorated().eval()
    model.inner.forward = lambda x: [][0]  # type: ignore[method-assign, assignment]
    with pytest.raises(CaptureError, match=r"replaced the forward of its part 'inner', .* switch it off before tcc"):
        capture(model, (torch.ones(2, 4),), {})
    with torch.inference_mode():
        model = Decorated().eval()
    with pytest.raises(CaptureError, match=r"made under torch\.inference_mode\(\): call it there too"):
        capture(model, (torch.ones(2, 4),), {})
