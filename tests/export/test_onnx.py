"""ONNX bundles: equal to the compiled model, one copy of the weights, graphs that TensorRT can take, no copies."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tcc
from tcc.errors import BundleError, CallError, ExportError
from tcc.export import Runner, bundle, load
from tcc.export import onnx as onnx_export
from tcc.export.inputs import describe, random_inputs
from tcc.export.manifest import next_of
from tcc.export.onnx_operators import OPERATORS
from tcc.export.verify import verify
from tcc.export.weights import collect
from tcc.plan import Action, CachePlan, Compute, Hold
from tcc.program import build_program
from tests.export.bundles import STEPS, allowed_bytes, bundle_bytes, chosen, flat_inputs, mixed, session
from tests.export.mutations import rewrite
from tests.running import CLOSE
from tests.tiny_models import Case, case, dit, relative_error, tensor_of, uvit

onnx = pytest.importorskip("onnx", reason="needs the ONNX packages: pip install 'tcc[onnx]'")

MODELS = ("dit", "uvit", "hf_pixart")
#: Of the operators that graphs may have, those that TensorRT 10.15's parser lists for real numbers alone
#: (onnx-tensorrt, docs/operators.md).
REAL = {
    "Clip", "Conv", "Cos", "CumSum", "Einsum", "Erf", "Exp", "Gemm", "LayerNormalization", "Log", "MatMul",
    "Reciprocal", "Sigmoid", "Sin", "Softmax", "Sqrt", "Tanh",
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_bundle_computes_what_the_compiled_model_computes(name: str, written: Any) -> None:
    """At every step of two runs, to the rounding of re-ordered sums."""
    which, runner = case(name), load(written(name).folder)
    compiled = session(which)
    for _ in range(2):
        errors = list(verify(runner, compiled, functools.partial(flat_inputs, which)))
        assert [error.step for error in errors] == list(range(STEPS))
        assert max(error.relative for error in errors) < CLOSE


def test_long_skips_that_are_held(tmp_path: Path) -> None:
    """As in DeepCache and Faster Diffusion: what a U-ViT's skips carry is kept; what only made it is not computed."""
    which = case("uvit")
    skips = [site.name for site in which.info.sites.values() if site.kind == "skip"]
    assert skips
    sites = [*skips, f"{skips[0].removesuffix('.skip')}.stream"]
    actions: dict[tuple[int, str], Action] = {
        (step, site): Hold() if step % 2 else Compute() for step in range(4) for site in sites
    }
    plan = which.info.count(CachePlan(num_steps=4, actions=actions))
    written = bundle(which.model, plan, (which.args, which.kwargs), tmp_path / "held")
    first, second = written.manifest.graphs
    assert second.macs < 0.7 * first.macs
    assert {f"slot:{site}" for site in skips} & {spec.name for spec in written.manifest.slots}
    compiled = session(which, lambda info: plan)
    errors = list(verify(load(written.folder, device="cpu"), compiled, functools.partial(flat_inputs, which)))
    assert len(errors) == 4
    assert max(error.relative for error in errors) < CLOSE


def test_blocks_that_keep_fewer_and_fewer_tokens(tmp_path: Path) -> None:
    """Their slot is told at I-steps which tokens come next: those of no other step will do."""
    which = case("dit")
    options: dict[str, Any] = {"keep": 0.5, "keep_last": 0.25, "rotate": True, "attention": "kept", "level": "block"}
    policy = functools.partial(tcc.plans.tprr, num_steps=4, **options)
    written = bundle(which.model, policy, (which.args, which.kwargs), tmp_path / "made")
    assert [spec.name for spec in written.manifest.slots] == ["slot:blocks.0.delta+1"]
    errors = list(verify(load(written.folder), session(which, policy), functools.partial(flat_inputs, which)))
    assert max(error.relative for error in errors) < CLOSE
    rewrite(written.folder, lambda d: d["steps"][0].update(tensors=d["steps"][2]["tensors"]))
    with pytest.raises(
        BundleError, match=r"step 0 gives graph 0 other token sets, coefficients or tables than the plan"
    ):
        load(written.folder)


@pytest.mark.compiles
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # importing Inductor
def test_a_bundle_computes_what_inductor_computes(small: Path) -> None:
    """At every step of two runs: all other tests compare with the rewritten graph, run without a backend."""
    which, runner = case("separate"), load(small, device="cpu")
    model = tcc.compile(which.model, runner.plan, example_inputs=(which.args, which.kwargs), backend="inductor")
    captured = which.info.captured
    inputs = random_inputs(describe(captured), captured.flatten(which.args, which.kwargs), runner.num_steps)
    for _ in range(2):
        errors = list(verify(runner, lambda *tensors: model.session._run(list(tensors)), inputs))
        assert len(errors) == runner.num_steps
        assert 0 < max(error.relative for error in errors) < CLOSE


@pytest.mark.parametrize("name", MODELS)
def test_all_graphs_share_one_file_of_weights(name: str, written: Any) -> None:
    """No graph has a weight in it, and the whole bundle is within its bound."""
    manifest = written(name).manifest
    assert bundle_bytes(written(name).folder) <= allowed_bytes(case(name).model, manifest)
    for graph in manifest.graphs:
        path = written(name).folder / graph.file
        assert manifest.files[graph.file].bytes < 2**21
        proto = onnx.load(path, load_external_data=False)
        outside = [t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        places = {entry.value for t in outside for entry in t.external_data if entry.key == "location"}
        assert places == {"weights.safetensors"}
        assert {t.name for t in outside} == set(graph.weights)
        onnx.checker.check_model(str(path))


@pytest.mark.parametrize("make", [dit, uvit])
def test_the_weights_file_has_each_weight_once(make: Callable[..., Case], tmp_path: Path) -> None:
    """At most 1.05 times the weights, the same for one variant or four; the rest is the table of names and offsets."""
    which = make(hidden_size=64)
    program = build_program(which.info.captured, which.info.analysis, mixed(which.info), check=False)
    weights = sum(tensor.nbytes for tensor in (*which.model.parameters(), *which.model.buffers()))
    assert len(program.variants) == 4
    for count in range(1, 5):
        collect(program.variants[:count]).save(tmp_path / "weights.safetensors")
        assert (tmp_path / "weights.safetensors").stat().st_size <= 1.05 * weights


@pytest.mark.parametrize("name", [*MODELS, "chosen"])
def test_graphs_hold_what_tensorrt_takes(name: str, written: Any) -> None:
    """Operators that its parser lists, of one opset; no control flow, no shape that depends on data."""
    for graph in written(name).manifest.graphs:
        proto = onnx.load(written(name).folder / graph.file, load_external_data=False)
        assert [(o.domain, o.version) for o in proto.opset_import] == [("", 22)]
        assert {node.op_type for node in proto.graph.node} <= OPERATORS
        full = onnx.shape_inference.infer_shapes(proto).graph
        types = {
            value.name: value.type.tensor_type.elem_type for value in (*full.value_info, *full.input, *full.output)
        }
        types |= {tensor.name: tensor.data_type for tensor in full.initializer}
        assert {types[n.input[0]] for n in full.node if n.op_type in REAL} == {onnx.TensorProto.FLOAT}
        for value in (*proto.graph.input, *proto.graph.output):
            assert all(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim)
        assert b"/site-packages/" not in proto.SerializeToString()  # nothing of the machine that made it


def test_names_are_those_of_the_model(written: Any) -> None:
    """Inputs, slots and weights have the names that people know."""
    manifest = written("dit").manifest
    assert [spec.name for spec in manifest.inputs] == ["x", "t", "y"]
    assert "slot:blocks.0.attn.delta" in {spec.name for spec in manifest.slots}
    first, second = (onnx.load(written("dit").folder / g.file, load_external_data=False) for g in manifest.graphs[:2])
    assert {"x", "kept_0", "slot:blocks.0.attn.delta"} <= {value.name for value in second.graph.input}
    assert "next:blocks.0.attn.delta" in {value.name for value in first.graph.output}
    assert "blocks.0.attn.qkv.weight" in {tensor.name for tensor in first.graph.initializer}


def test_tokens_chosen_in_the_graph(written: Any) -> None:
    """Scores of every sort and a top-k of each sample: the tokens that the compiled model keeps, at every step."""
    which, made = case("dit"), written("chosen")
    assert {step.graph for step in made.manifest.steps} != {0}
    assert sorted({spec.name.partition(".")[0] for spec in made.manifest.tensors} - {"none"}) == ["table"]
    runner, compiled = load(made.folder, device="cpu"), session(which, chosen)
    errors = list(verify(runner, compiled, functools.partial(flat_inputs, which)))
    assert max(error.relative for error in errors) < CLOSE


def test_onnx_runtime_copies_nothing(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its outputs are the very buffers that were bound, for the model's and the slots'; its inputs the caller's.

    A graph of its optimiser has no copying node, so that what it reads is what was bound.
    """
    which, runner = case("dit"), load(written("dit").folder, device="cpu")
    bound: dict[str, dict[str, int]] = {}
    for engine in {id(engine): engine for engine, _ in runner._steps}.values():
        monkeypatch.setattr(engine, "_session", Recorded(engine._session, bound))
    slots = runner._slots
    for step in range(2 * STEPS):
        before = {name: tensor.data_ptr() for name, tensor in slots.current.items()}
        inputs = flat_inputs(which, step)
        bound.clear()
        output = runner(*inputs)
        graph = runner.manifest.graphs[runner.manifest.steps[step % STEPS].graph]
        expected = dict(zip("xty", (tensor.data_ptr() for tensor in inputs), strict=True))
        expected |= {name: before[name] for name in graph.inputs if name in before}
        assert {name: bound["inputs"][name] for name in expected} == expected
        assert bound["outputs"] == {"output": output.data_ptr()} | {
            next_of(name): slots.current[name].data_ptr() for name in graph.stores
        }
        assert not set(bound["outputs"].values()) & set(before.values())
    assert runner.copied_bytes == 0


class Recorded:
    """A session of ONNX Runtime that notes what was bound, and after a run where its own outputs lie."""

    def __init__(self, session: Any, found: dict[str, dict[str, int]]) -> None:
        self._session, self._found = session, found

    def io_binding(self) -> Any:
        binding, given = self._session.io_binding(), self._found.setdefault("inputs", {})

        class Binding:
            inner = binding
            bind_output = staticmethod(binding.bind_output)

            @staticmethod
            def bind_input(name: str, *args: Any) -> None:
                given[name] = args[-1]
                binding.bind_input(name, *args)

        return Binding

    def run_with_iobinding(self, binding: Any) -> None:
        self._session.run_with_iobinding(binding.inner)
        names = [value.name for value in self._session.get_outputs()]
        values = zip(names, binding.inner.get_outputs(), strict=True)
        self._found["outputs"] = {name: value.data_ptr() for name, value in values}


def test_no_step_copies(written: Any) -> None:
    """The runner reads the caller's tensors and writes its slots; only a tensor that is not contiguous is copied."""
    which, runner = case("dit"), load(written("dit").folder, device="cpu")
    buffers = {tensor.data_ptr() for tensor in runner._slots.current.values()}
    for step in range(2 * STEPS):
        runner(*flat_inputs(which, step))
    assert runner.copied_bytes == 0
    now = {tensor.data_ptr() for tensor in (*runner._slots.current.values(), *runner._slots._spare.values())}
    assert buffers <= now
    assert len(now) <= 2 * len(buffers)
    x, t, y = flat_inputs(which, 0)
    runner.reset()
    runner(x.transpose(2, 3).contiguous().transpose(2, 3), t, y)
    assert runner.copied_bytes == x.nbytes


def test_sessions_have_slots_of_their_own(written: Any) -> None:
    """Two runs at the same time do not disturb each other."""
    which = case("dit")
    alone = load(written("dit").folder)
    expected = [alone(*flat_inputs(which, step)) for step in range(STEPS)]
    first, second = alone, alone.new_session()
    for step in range(STEPS):
        found = first(*flat_inputs(which, step))
        second(*flat_inputs(which, step + 60))
        assert torch.equal(found, expected[step])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """Weights, slots and inputs have the model's dtype; what the CPU can run differs by rounding."""
    which = dit()
    half = Case(which.model.to(dtype), (which.args[0].to(dtype), *which.args[1:]), {})
    made = bundle(half.model, mixed, (half.args, {}), tmp_path / "half").manifest
    assert {spec.torch_dtype for spec in (*made.slots, *made.outputs)} == {dtype}
    for graph in made.graphs:
        onnx.checker.check_model(str(tmp_path / "half" / graph.file), full_check=True)
    if dtype == torch.float16:  # ONNX Runtime has no bfloat16 on CPUs; it computes some float16 operators in float32
        runner, compiled = load(tmp_path / "half"), session(half)
        for step in range(STEPS):
            tensors = [x.half() if x.is_floating_point() else x for x in flat_inputs(case("dit"), step)]
            assert relative_error(runner(*tensors).float(), tensor_of(compiled(*tensors)).float()) < 5e-3


def test_a_call_is_checked(written: Any) -> None:
    """Missing, unknown and misshapen tensors, and steps out of order, are refused; nothing changes then."""
    runner: Runner = load(written("dit").folder)
    x, t, y = flat_inputs(case("dit"), 0)
    with pytest.raises(CallError, match=r"called with 2 tensors and \[\]; the bundle takes x, t, y"):
        runner(x, t)
    with pytest.raises(CallError, match=r"called with 3 tensors and \['y'\]"):
        runner(x, t, y, y=y)
    with pytest.raises(CallError, match=r"input 'x' is float32 \[2, 4, 4, 4\] on cpu, expected float32 \[2, 4, 8, 8\]"):
        runner(x[:, :, :4, :4], t, y)
    with pytest.raises(CallError, match=r"input 't' is float32 \[2\] on cpu, expected int64"):
        runner(x, t=t.float(), y=y)
    with pytest.raises(CallError, match=r"input 'y' is None, expected int64 \[2\] on cpu"):
        runner(x, t, None)
    for label in (-1, 11):
        with pytest.raises(
            CallError, match=rf"input 'y' holds {label}, and the model looks it up in a table of 11: give 0 to 10"
        ):
            runner(x, t, torch.tensor([3, label]))
    with pytest.raises(CallError, match=r"step 3 was called but the next step is 0 of 6"):
        runner.run_step(3, x, t, y)
    assert runner.step == 0
    assert torch.equal(runner.run_step(0, x, t=t, y=y), load(written("dit").folder)(x, t, y))


def test_the_plan_comes_with_the_bundle(written: Any) -> None:
    """The plan is the one that was exported."""
    assert load(written("dit").folder).plan.summary() == mixed(case("dit").info).summary()


def test_what_cannot_be_exported_is_refused(tmp_path: Path, model: tcc.CompiledModel) -> None:
    """An unknown target, a folder in use, a missing plan, a model without a call, and one with two plans."""
    which = case("dit")
    (tmp_path / "file").write_text("mine")
    example = (which.args, which.kwargs)
    with pytest.raises(ExportError, match=r"target='tflite': use one of onnx, aoti"):
        bundle(which.model, mixed, example, tmp_path / "new", target="tflite")
    with pytest.raises(ExportError, match=r"exists: name a new folder"):
        bundle(which.model, mixed, example, tmp_path)
    with pytest.raises(ExportError, match=r"needs a plan and example_inputs"):
        bundle(which.model, None, None, tmp_path / "new")
    with pytest.raises(ExportError, match=r"a compiled model has its own plan and inputs"):
        bundle(model, mixed, example, tmp_path / "new")
    with pytest.raises(ExportError, match=r"nothing is compiled yet"):
        bundle(tcc.compile(which.model, mixed), None, None, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_graphs_with_functions_of_their_own_are_refused() -> None:
    """`flex_attention` gets two: no tensors, which is all that a bundle holds."""
    inner, graph = torch.fx.symbolic_trace(nn.ReLU()), torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.higher_order.flex_attention, (x, x, x, graph.get_attr("score"))))
    variant = SimpleNamespace(gm=torch.fx.GraphModule({"score": inner}, graph))
    with pytest.raises(
        ExportError, match=r"hands flex_attention a function of its own, and bundles hold tensors alone"
    ):
        collect([variant])  # type: ignore[list-item]


def test_what_has_no_onnx_form_is_named_with_its_cause() -> None:
    """Complex numbers: the node, and what the exporter lacks."""
    gm = torch.export.export(nn.Identity(), (torch.ones(2, 2),)).module(check_guards=False)
    with gm.graph.inserting_before(gm.graph.output_node()):
        turned = gm.graph.call_function(
            torch.ops.aten.view_as_complex.default, (gm.graph.find_nodes(op="placeholder")[0],)
        )
        gm.graph.output_node().args = ((gm.graph.call_function(torch.ops.aten.unsqueeze.default, (turned, 0)),),)
    gm.recompile()
    with pytest.raises(ExportError, match=r"no ONNX form: Error when translating node .*unsqueeze.*complex"):
        onnx_export._converted(gm, (torch.ones(2, 2),), ["x"], ["y"])
