"""The pass interface, and the runner that checks the graph after each pass."""

from __future__ import annotations

import abc
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from tcc.errors import PassError, TccError, VerificationError
from tcc.passes import dump
from tcc.passes.changes import Calls, calls_of, changed, differs
from tcc.passes.fake_values import evaluate, fake_mode_of
from tcc.passes.graph import UNKNOWN, graph_text, size, source_line

__all__ = ["Pass", "PassRecord", "run_passes", "verify"]

logger = logging.getLogger(__name__)


class Pass(abc.ABC):
    """One rewrite of a graph module. Subclasses are frozen dataclasses whose fields are the options.

    A pass only edits nodes. The runner removes dead code, recompiles, verifies, times and dumps.
    """

    #: True where the outputs stay equal up to the rounding of re-ordered sums; False for token caching itself.
    exact: ClassVar[bool] = True

    @abc.abstractmethod
    def run(self, gm: fx.GraphModule) -> int:
        """Edit `gm.graph` in place and return the number of edits (0: the graph is unchanged)."""

    @property
    def name(self) -> str:
        """The name shown in dumps and errors."""
        return type(self).__name__


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: its name, its edits, the node counts around it, and its seconds."""

    name: str
    edits: int
    nodes_before: int
    nodes_after: int
    seconds: float


def run_passes(
    gm: fx.GraphModule, passes: Sequence[Pass], *, label: str = "graph", check: bool = True, verified: bool = False
) -> list[PassRecord]:
    """Run `passes` in order on `gm`, in place.

    Args:
        gm: a functional graph module whose nodes carry fake values in `meta["val"]`.
        passes: the ordered list.
        label: names this graph in dumps and errors.
        check: check the graph after each pass, and compute anew the fake values of what the pass has changed.
        verified: whether `gm` has been verified, or is a copy of what has; if not, the first check is of all values.

    Returns:
        One record per pass.

    Raises:
        PassError: a pass raised; the message names the pass, the passes before it, and the node if known.
        VerificationError: the graph broke a rule after a pass.
    """
    records: list[PassRecord] = []
    _drop_dead(gm)  # before the first pass, so that it is not blamed for dead code that came with the graph
    dump.write(label, 0, "captured", gm.graph)
    calls = calls_of(gm.graph) if check else {}
    for number, item in enumerate(passes, start=1):
        before, start = len(gm.graph.nodes), time.perf_counter()
        edits = _run_one(gm, item, [r.name for r in records])
        _drop_dead(gm)
        if check:
            _check_count(item, edits, calls, gm.graph)
            if edits or not verified:
                verify(gm, f"{label}: {item.name}", changed(calls, gm.graph) if verified else None)
                calls, verified = calls_of(gm.graph), True
        records.append(PassRecord(item.name, edits, before, len(gm.graph.nodes), time.perf_counter() - start))
        dump.write(label, number, item.name, gm.graph)
        logger.debug("%s: %s made %d edits", label, item.name, edits)
    gm.recompile()  # once: passes and checks read the graph, and writing its code costs as much as a pass
    return records


def _run_one(gm: fx.GraphModule, item: Pass, ran_before: list[str]) -> int:
    try:
        return item.run(gm)
    except TccError:
        raise
    except Exception as error:
        before = ", ".join(ran_before) or "none"
        raise PassError(
            f"{item.name} failed (passes before it: {before}): {type(error).__name__}: {error}. "
            "This is a defect of the pass: set TCC_DUMP=<folder> to keep the graphs, and report it."
        ) from error


def _drop_dead(gm: fx.GraphModule) -> None:
    for node in reversed(gm.graph.nodes):
        if not node.users and not _has_effect(node):
            gm.graph.erase_node(node)


def _has_effect(node: fx.Node) -> bool:
    """Whether the node stays without users. FX also keeps attention, because it may draw dropout; ours draws none."""
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output") or (schema is not None and schema.is_mutable)


def _check_count(item: Pass, edits: int, before: Calls, graph: fx.Graph) -> None:
    """Compare the count with what changed."""
    if (edits > 0) != differs(graph, before):
        did = "did not change" if edits else "changed"
        raise PassError(f"{item.name} reported {edits} edits but {did} the graph: run() must return the true count")


def verify(gm: fx.GraphModule, where: str, nodes: Iterable[fx.Node] | None = None) -> None:
    """Check `gm`: FX lint, and that every node's value equals one computed anew (shape, dtype, device).

    Args:
        gm: the graph module.
        where: what has just happened to it, for the message.
        nodes: whose values to compute anew, where all others have been found right before; all if None.

    Raises:
        VerificationError: names the rule, the node, its source line, and the lines around it.
    """
    try:
        gm.graph.lint()
    except RuntimeError as error:
        raise VerificationError(f"{where}: the graph is not well formed: {str(error).splitlines()[0]}") from error
    mode = fake_mode_of(gm.graph)
    for node in gm.graph.nodes if nodes is None else nodes:
        if node.op in ("call_function", "call_method"):
            _check_value(node, mode, where)


def _check_value(node: fx.Node, mode: FakeTensorMode, where: str) -> None:
    if "val" not in node.meta:
        raise VerificationError(_report(node, where, "every node carries a value", "this one has none"))
    try:
        new = evaluate(node, mode)
    except Exception as error:
        raise VerificationError(_report(node, where, "every call is valid for its inputs", str(error))) from error
    kept = node.meta["val"]
    if isinstance(kept, torch.Tensor) and not _agree(kept, new):
        what = f"recorded {_facts(kept)}, computed {_facts(new)}"
        raise VerificationError(_report(node, where, "recorded values agree with the inputs", what))


def _agree(kept: torch.Tensor, new: Any) -> bool:
    """Whether both are alike; a size that depends on the data may be any."""
    if not isinstance(new, torch.Tensor) or kept.dim() != new.dim() or _facts(kept)[1:] != _facts(new)[1:]:
        return False
    return all(a == b or UNKNOWN in (a, b) for a, b in zip(_facts(kept)[0], _facts(new)[0], strict=True))


def _facts(val: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
    return tuple(map(size, val.shape)), val.dtype, val.device


def _report(node: fx.Node, where: str, rule: str, what: str, around: int = 5) -> str:
    lines = graph_text(node.graph).splitlines()
    at = list(node.graph.nodes).index(node)
    near = "\n".join(
        ("> " if i == at else "  ") + lines[i] for i in range(max(0, at - around), min(len(lines), at + around + 1))
    )
    return f"after {where}, rule '{rule}' is broken at node '{node.name}': {what}\n  {source_line(node)}\n{near}"
