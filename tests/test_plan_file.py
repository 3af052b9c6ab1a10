"""A plan's file: what is saved comes back, and what was cut, altered or foreign is refused."""

from __future__ import annotations

import json
import pathlib
import pickle
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import tcc
from tcc.errors import PlanError
from tcc.plan import Action, CachePlan, Compute, Cost, Hold, ModelKey, Reuse, Skip, TopK, Update
from tcc.plan import file as plan_file
from tcc.plan.scores import Attended, Fixed, Norm, Probe, Score, Stale
from tcc.tensors_file import save_tensors
from tests.tiny_models import case

SITE = "blocks.0.delta"
ACTIONS: dict[tuple[int, str], Action] = {
    **{(step, SITE): Compute() for step in range(3)},
    (3, SITE): Reuse(),
    (4, SITE): Reuse(2, (3.0, -3.0, 1.0 / 3.0)),
    (5, SITE): Skip(),
    (0, "blocks.1.mlp.out"): Compute(),
    (1, "blocks.1.mlp.out"): Update("some", "kept"),
    (2, "blocks.1.mlp.out"): Update("all", "current"),
    (3, "blocks.1.mlp.out"): Update("some", "cached"),
    (4, "blocks.1.mlp.out"): Update(TopK("norm", 3), "current"),
    (5, "blocks.1.mlp.out"): Update("some", store=False),
    (0, "out.stream"): Compute(),
    (1, "out.stream"): Hold(),
    (0, "blocks.0.attn.delta@text"): Compute(),
    (1, "blocks.0.attn.delta@text"): Reuse(),
}
TOKENS = {"some": torch.tensor([0, 3, 15]), "all": torch.arange(16)}
TABLES = {
    "fixed": torch.randn(2, 16, generator=torch.Generator().manual_seed(0)),
    "in": torch.ones(32, 4, dtype=torch.bfloat16),
    "row": torch.arange(4.0),
    "bias": torch.zeros(16, dtype=torch.float64),
}
SCORES = {
    "norm": Score(((1.0, Norm("blocks.1.mlp.out")), (0.1 + 0.2, Stale("blocks.1.mlp.out"))), cell=2, bonus=0.6),
    "rest": Score(
        (
            (1.0, Fixed("fixed")),
            (-2.0, Attended("blocks.0.attn")),
            (1e-7, Probe("out.stream", "in", "row", "row", "bias")),
        ),
        cell=4,
        per_cell=True,
        shared=True,
    ),
}


def full_plan() -> CachePlan:
    """A plan with every kind of action, and everything else that a file keeps."""
    return CachePlan(
        num_steps=6,
        actions=ACTIONS,
        tokens=TOKENS,
        model=ModelKey("ab" * 32, (("x", (2, 4, 8, 8)), ("t", (2,))), 16),
        policy={"name": "by hand", "keep": 0.5, "blocks": [0, 1], "note": "größer"},
        cost=Cost(1000, (1000, 500, 500, 250, 250, 0), 4096),
        scores=SCORES,
        tables=TABLES,
    )


def saved(tmp_path: pathlib.Path, plan: CachePlan) -> str:
    """The path of the plan's file."""
    path = str(tmp_path / "plan.safetensors")
    plan.save(path)
    return path


def assert_same(one: CachePlan, other: CachePlan) -> None:
    """Equal in every field."""
    assert (one.num_steps, one.actions, one.model, one.cost) == (
        other.num_steps,
        other.actions,
        other.model,
        other.cost,
    )
    assert list(one.actions) == list(other.actions)
    assert dict(one.policy) == dict(other.policy)
    assert list(one.tokens) == list(other.tokens)
    assert all(torch.equal(one.tokens[name], kept) for name, kept in other.tokens.items())
    assert (dict(one.scores), list(one.tables)) == (dict(other.scores), list(other.tables))
    assert all(torch.equal(one.tables[name], table) for name, table in other.tables.items())
    assert all(one.tables[name].dtype == table.dtype for name, table in other.tables.items())


def test_everything_comes_back(tmp_path: pathlib.Path) -> None:
    """Every action with its numbers, token sets, model key, policy and cost."""
    assert_same(CachePlan.load(saved(tmp_path, full_plan())), full_plan())


def test_a_file_from_before_scores_is_read(tmp_path: pathlib.Path) -> None:
    """Older files say nothing of scores and tables: there are none."""
    plan = CachePlan(num_steps=1, actions={(0, SITE): Compute()}, tokens={"some": torch.tensor([1])})
    path = saved(tmp_path, plan)
    with safe_open(path, framework="pt") as file:
        meta, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    body = json.loads(meta["plan"])
    del body["scores"], body["tables"]
    meta["plan"] = json.dumps(body)
    meta["sha256"] = plan_file._digest(meta["plan"], tensors)
    save_file(tensors, path, metadata=meta)
    assert_same(CachePlan.load(path), plan)


def test_a_plan_with_nothing_in_it_comes_back(tmp_path: pathlib.Path) -> None:
    """No actions, no tokens, no model, no cost."""
    plan = CachePlan(num_steps=1, actions={})
    assert_same(CachePlan.load(saved(tmp_path, plan)), plan)


@pytest.mark.parametrize("policy", [tcc.plans.full, tcc.plans.fora, tcc.plans.tprr], ids=lambda f: f.__name__)
def test_the_plans_of_policies_come_back(tmp_path: pathlib.Path, policy: Any) -> None:
    """And run: what was loaded gives the same outputs."""
    which = case("dit")
    plan = policy(which.info, num_steps=4)
    loaded = CachePlan.load(saved(tmp_path, plan))
    assert_same(loaded, plan)
    runs = [tcc.Reference(which.model, p, which.info) for p in (plan, loaded)]
    for step in range(4):
        args, _ = which.inputs(step)
        assert torch.equal(runs[0](*args), runs[1](*args))


def test_token_sets_that_are_views_are_saved_by_value(tmp_path: pathlib.Path) -> None:
    """A strided slice of a tensor is no reason to fail."""
    tokens = {"even": torch.arange(16)[::2], "even too": torch.arange(16)[::2]}
    plan = CachePlan(num_steps=2, actions={(0, SITE): Compute(), (1, SITE): Update("even")}, tokens=tokens)
    assert_same(CachePlan.load(saved(tmp_path, plan)), plan)


def test_a_file_cut_anywhere_is_refused(tmp_path: pathlib.Path) -> None:
    """Shorter files, from the empty one to the one that lacks its last byte."""
    path = pathlib.Path(saved(tmp_path, full_plan()))
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 3), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(PlanError):
            CachePlan.load(str(path))


def test_a_file_with_more_behind_it_is_refused(tmp_path: pathlib.Path) -> None:
    """Nothing may follow the tensors."""
    path = pathlib.Path(saved(tmp_path, full_plan()))
    path.write_bytes(path.read_bytes() + b"\0" * 8)
    with pytest.raises(PlanError, match="truncated, altered or not a plan"):
        CachePlan.load(str(path))


def test_a_flipped_bit_anywhere_is_refused(tmp_path: pathlib.Path) -> None:
    """One bit of every third byte: in the header's length, its text, or the tensors."""
    path = pathlib.Path(saved(tmp_path, full_plan()))
    whole = path.read_bytes()
    for position in range(0, len(whole), 3):
        altered = bytearray(whole)
        altered[position] ^= 1 << position % 8
        path.write_bytes(altered)
        with pytest.raises(PlanError):
            CachePlan.load(str(path))


def test_another_safetensors_file_is_refused(tmp_path: pathlib.Path) -> None:
    """Weights are no plan, and the message says what was found."""
    path = str(tmp_path / "weights.safetensors")
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(PlanError, match=r"not a plan of format tcc-plan-1 \(found None\): make it anew"):
        CachePlan.load(path)
    save_file({"w": torch.zeros(2)}, path, metadata={"format": "pt"})
    with pytest.raises(PlanError, match=r"found 'pt'"):
        CachePlan.load(path)


def test_a_missing_file_is_refused(tmp_path: pathlib.Path) -> None:
    """The message names the path."""
    with pytest.raises(PlanError, match=r"none.safetensors: there is no such file: make a plan with `tcc plan"):
        CachePlan.load(str(tmp_path / "none.safetensors"))
    with pytest.raises(PlanError, match="cannot be read as a plan"):
        CachePlan.load(str(tmp_path))


class Trap:
    """Pickled, it writes a file where it is read."""

    def __reduce__(self) -> Any:
        return open, ("trapped", "w")


def test_a_pickle_is_refused_and_not_run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in a file is executed."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "plan.pt"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(PlanError):
        CachePlan.load(str(path))
    assert not (tmp_path / "trapped").exists()


def forge(path: str, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> None:
    """Rewrite a plan's file with other contents and a checksum that fits them."""
    with safe_open(path, framework="pt") as file:
        body = json.loads(file.metadata()["plan"])
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    text = json.dumps(body | changes)
    found |= tensors or {}
    digest = plan_file._digest(text, found)
    save_file(found, path, metadata={"format": plan_file.FORMAT, "plan": text, "sha256": digest})


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "no steps": ({"num_steps": 0}, "num_steps=0: expected a whole number, 1 or more"),
    "steps as text": ({"num_steps": "six"}, "num_steps='six': expected a whole number"),
    "steps as a fraction": ({"num_steps": 6.5}, "num_steps=6.5: expected a whole number"),
    "unknown action": ({"kinds": [{"kind": "guess"}]}, "the plan's table is malformed"),
    "action with more fields": ({"kinds": [{"kind": "hold", "for": 3}]}, "the plan's table is malformed"),
    "kinds missing": ({"kinds": []}, "the plan's table is malformed"),
    "rows too short": ({"actions": [[0, SITE]]}, "the plan's table is malformed"),
    "rows as a number": ({"actions": 7}, "the plan's table is malformed"),
    "a set without a tensor": ({"tokens": ["some", "all", "more"]}, "the plan's table is malformed"),
    "a set that is used and lost": ({"tokens": ["all"]}, "unknown token set 'some'"),
    "half a model key": ({"model": {"graph_hash": "ab"}}, "the plan's table is malformed"),
    "half a cost": ({"cost": {"full_macs": 1}}, "the plan's table is malformed"),
    "tokens without a name": (
        {"kinds": [{"kind": "update", "tokens": 5}], "actions": [[1, SITE, 0]]},
        "give the name of a token set",
    ),
    "a policy as a number": ({"policy": 5}, "the plan's table is malformed"),
    "read before write": ({"actions": [[0, SITE, 1]]}, "reads 1 stored value"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_forged_table_is_refused(tmp_path: pathlib.Path, kind: str) -> None:
    """A checksum that fits does not make a plan: the table is checked like one made by hand."""
    changes, message = MALFORMED[kind]
    path = saved(tmp_path, full_plan())
    forge(path)
    assert_same(CachePlan.load(path), full_plan())
    forge(path, **changes)
    with pytest.raises(PlanError, match=message):
        CachePlan.load(path)


@pytest.mark.parametrize(
    "kept",
    [torch.tensor([0.0, 1.0]), torch.tensor([3, 1]), torch.zeros(0, dtype=torch.int64), torch.zeros(2, 2).bfloat16()],
    ids=["floats", "unsorted", "empty", "bfloat16"],
)
def test_forged_token_sets_are_refused(tmp_path: pathlib.Path, kept: torch.Tensor) -> None:
    """Token sets are checked too, whatever their type."""
    path = saved(tmp_path, full_plan())
    forge(path, {"tokens.0": kept})
    with pytest.raises(PlanError, match="token set 'some': "):
        CachePlan.load(path)


def rewrite(path: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the file's header and write it back with its new length."""
    file = pathlib.Path(path)
    whole = file.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8:end])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + whole[end:])


def _in_plan(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        assert old in header["__metadata__"]["plan"]
        header["__metadata__"]["plan"] = header["__metadata__"]["plan"].replace(old, new)

    return change


CHECKSUM, UNREADABLE = "does not match its checksum", "truncated, altered or not a plan"
HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "steps": (_in_plan('"num_steps": 6', '"num_steps": 7'), CHECKSUM),
    "site": (_in_plan("blocks.0", "blocks.1"), CHECKSUM),
    "no table": (lambda h: h["__metadata__"].pop("plan"), CHECKSUM),
    "no checksum": (lambda h: h["__metadata__"].pop("sha256"), CHECKSUM),
    "no metadata": (lambda h: h.pop("__metadata__"), r"not a plan of format tcc-plan-1 \(found None\)"),
    "format": (lambda h: h["__metadata__"].update(format="tcc-plan-9"), r"\(found 'tcc-plan-9'\): make it anew"),
    "floats": (lambda h: h["tokens.0"].update(dtype="F64"), CHECKSUM),
    "unsigned": (lambda h: h["tokens.0"].update(dtype="U64"), CHECKSUM),
    "a type numpy lacks": (lambda h: h["tokens.0"].update(dtype="BF16", shape=[12]), CHECKSUM),
    "a type of one byte": (lambda h: h["tokens.0"].update(dtype="F8_E4M3", shape=[24]), CHECKSUM),
    "shape": (lambda h: h["tokens.0"].update(shape=[1, 3]), CHECKSUM),
    "renamed set": (lambda h: h.update({"tokens.9": h.pop("tokens.0")}), CHECKSUM),
    "size": (lambda h: h["tokens.0"].update(shape=[2]), UNREADABLE),
    "offsets": (lambda h: h["tokens.0"].update(data_offsets=[0, 8000]), UNREADABLE),
    "unknown type": (lambda h: h["tokens.0"].update(dtype="I65"), UNREADABLE),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_an_altered_header_of_the_right_length_is_refused(tmp_path: pathlib.Path, kind: str) -> None:
    """A header edited with care, so that the file is sound safetensors, is still not the plan."""
    change, message = HEADERS[kind]
    path = saved(tmp_path, full_plan())
    rewrite(path, lambda header: None)
    assert_same(CachePlan.load(path), full_plan())  # rewriting alone does no harm
    rewrite(path, change)
    with pytest.raises(PlanError, match=message):
        CachePlan.load(path)


@pytest.mark.parametrize("text", ["{", "[]", "null", "[" * 100_000, '{"num_steps": ' + "9" * 5000 + "}"])
def test_a_table_that_is_no_table_is_refused(tmp_path: pathlib.Path, text: str) -> None:
    """Whatever stands where the table should be, and however deep."""
    path = saved(tmp_path, CachePlan(num_steps=1, actions={}))
    tensors = {"format": torch.zeros(0, dtype=torch.int64)}
    meta = {"format": plan_file.FORMAT, "plan": text, "sha256": plan_file._digest(text, tensors)}
    save_file(tensors, path, metadata=meta)
    with pytest.raises(PlanError, match="the plan's table is malformed"):
        CachePlan.load(path)


def test_a_plan_that_cannot_be_written(tmp_path: pathlib.Path) -> None:
    """A folder that is not there, and a policy with a tensor in it."""
    with pytest.raises(PlanError, match="plan: the plan cannot be written"):
        full_plan().save(str(tmp_path / "no folder" / "plan"))
    with pytest.raises(PlanError, match="plan: the plan's policy holds more than numbers, strings, lists and dicts"):
        CachePlan(num_steps=1, actions={}, policy={"scores": torch.zeros(2)}).save(str(tmp_path / "plan"))


def test_files_are_readable_as_others_are(tmp_path: pathlib.Path) -> None:
    """A server often runs as another user than the one who made the plan."""
    plan = CachePlan(2, {(1, SITE): Reuse()})
    plan.save(tmp_path / "plan.safetensors")
    (tmp_path / "other").touch()
    assert (tmp_path / "plan.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_the_same_plan_is_the_same_file(tmp_path: pathlib.Path) -> None:
    """Byte by byte, whatever order the header's texts are written in; eight keys would come in order once in 40,320."""
    texts = {f"key {n}": "tüv\n\x1f\\" * n for n in range(8)}
    for number, given in enumerate((texts, dict(reversed(texts.items())))):
        save_tensors({"a": torch.arange(3)}, tmp_path / f"{number}.safetensors", given)
    first, second = ((tmp_path / f"{number}.safetensors").read_bytes() for number in range(2))
    assert first == second
    with safe_open(tmp_path / "0.safetensors", framework="pt") as file:
        assert file.metadata() == texts
        assert file.get_tensor("a").tolist() == [0, 1, 2]
    keys = [key for key in json.loads(first[8 : 8 + int.from_bytes(first[:8], "little")])["__metadata__"]]
    assert keys == sorted(texts)
