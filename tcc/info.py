"""`tcc.inspect`: what tcc sees in a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from tcc.capture import Captured, capture
from tcc.errors import CallError
from tcc.passes.macs import count
from tcc.passes.pipeline import StepKind
from tcc.passes.sites import Analysis, Site, analyse
from tcc.plan import CachePlan, ModelKey
from tcc.program import Program, Variant, build_program
from tcc.program.memory import Memory
from tcc.tables import TextTable

__all__ = ["ModelInfo", "inspect"]

_UNWATCHED = (
    "no noise level found among the inputs: steps are counted, not watched; name it: tcc.compile(..., noise_level=...)"
)


@dataclass(frozen=True, repr=False)
class ModelInfo:
    """A captured and analysed model.

    Attributes:
        captured: its graph.
        analysis: its stream, blocks, sites, token axis and grid.
    """

    captured: Captured
    analysis: Analysis
    _variants: dict[StepKind, Variant] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __repr__(self) -> str:
        """One line; `table()` says more."""
        macs = self.analysis.macs / self.batch / 1e9
        return (
            f"<ModelInfo: {len(self.blocks)} blocks, {len(self.sites)} sites, {self.num_tokens} tokens, "
            f"batch {self.batch}, {macs:.3g} GMACs for each sample>"
        )

    @property
    def blocks(self) -> tuple[str, ...]:
        """Block names, in order."""
        return self.analysis.blocks

    @property
    def sites(self) -> dict[str, Site]:
        """Every site by name, in graph order."""
        return self.analysis.sites

    @property
    def grid(self) -> tuple[int, ...]:
        """The grid of the image tokens, (h, w) or (t, h, w); () where none was found."""
        return self.analysis.grid

    @property
    def image_tokens(self) -> tuple[int, int]:
        """Positions of the image tokens in the stream, from and up to but not including; policies keep all others."""
        return self.analysis.image_tokens

    @property
    def num_tokens(self) -> int:
        """The tokens of the stream, image tokens and others."""
        return self.analysis.num_tokens

    @property
    def batch(self) -> int:
        """The batch that the model was captured with (guidance branches counted)."""
        return self.analysis.batch

    @property
    def macs(self) -> int:
        """MACs of one step, for one image and one guidance branch."""
        return self.analysis.macs // self.batch

    @property
    def key(self) -> ModelKey:
        """What ties a plan to this model."""
        inputs = tuple((spec.name, spec.shape) for spec in self.captured.inputs)
        return ModelKey(self.captured.hash, inputs, self.num_tokens)

    def count(self, plan: CachePlan) -> CachePlan:
        """`plan`, tied to this model and with its MACs and slot bytes counted on the rewritten graphs.

        Raises:
            PlanError: the plan does not fit the model.
        """
        return replace(plan, model=self.key, cost=self.program(plan).cost(self.analysis))

    def memory(self, plan: CachePlan, max_slot_bytes: int | None = None) -> Memory:
        """The slots of `plan`: what a session allocates, and when each is needed. `plan.memory(info)` is the same.

        Raises:
            PlanError: the plan does not fit the model, or the budget that `tcc.compile` is to be given.
        """
        return self.program(plan, max_slot_bytes=max_slot_bytes).memory

    def program(
        self, plan: CachePlan, *, progress: Callable[[str], None] | None = None, max_slot_bytes: int | None = None
    ) -> Program:
        """The rewritten graphs of `plan`: those of counted, of compiled and of other plans are made, and checked, once.

        Raises:
            PlanError: the plan does not fit the model, or the budget that `tcc.compile` is to be given.
        """
        return build_program(
            self.captured, self.analysis, plan, progress=progress, known=self._variants, max_slot_bytes=max_slot_bytes
        )

    def layer_macs(self, plan: CachePlan) -> int:
        """MACs of the whole run per image and guidance branch, without the products inside attention.

        The convention of counters that watch layers, and of the tables that were made with them (Learning-to-Cache);
        everywhere else tcc counts all products.
        """
        program = self.program(plan)
        macs = [count(variant.gm.graph.nodes, products=False) for variant in program.variants]
        return sum(macs[binding.variant] for binding in program.bindings) // self.batch

    def table(self) -> TextTable:
        """The sites as a table: shape, MACs per image, slot bytes, prunable or why not."""
        grid = " x ".join(map(str, self.grid)) or "not found"
        if self.image_tokens != (0, self.num_tokens):
            grid += f" from token {self.image_tokens[0]} on"
        table = TextTable(
            title=f"{len(self.blocks)} blocks, {self.num_tokens} tokens (grid {grid}), batch {self.batch}, "
            f"{self.macs / 1e9:.4g} GMAC per image and step",
            caption=None if self.captured.noise_level is not None else _UNWATCHED,
        )
        for column, justify in (("site", "left"), ("shape", "left"), ("MMAC", "right"), ("slot KiB", "right")):
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        table.add_column("tokens prunable")
        for site in self.sites.values():
            shape = " x ".join(map(str, site.shape)) + (" (K and V)" if site.kind == "kv" else "")
            macs = f"{site.macs / self.batch / 1e6:.3f}" if site.macs else ""
            prunable = "yes" if site.prunable else f"no: {site.reason}"
            table.add_row(site.name, shape, macs, f"{site.bytes / 1024:.1f}", prunable)
        return table

    def rows(self) -> list[dict[str, Any]]:
        """The table's content for programs."""
        return [
            {
                "site": site.name,
                "kind": site.kind,
                "shape": list(site.shape),
                "macs": site.macs // self.batch,
                "bytes": site.bytes,
                "prunable": site.prunable,
                "reason": site.reason,
            }
            for site in self.sites.values()
        ]


def inspect(model: nn.Module | ExportedProgram, *args: Any, **kwargs: Any) -> ModelInfo:
    """Capture and analyse `model` called with `args` and `kwargs`.

    Raises:
        CallError: it is no model.
        CaptureError: `torch.export` refuses it.
        AnalysisError: the graph has no recognisable residual stream.
    """
    if not isinstance(model, (nn.Module, ExportedProgram)):
        raise CallError(f"model={model!r:.60} is no model: give an nn.Module, or an ExportedProgram of one")
    captured = capture(model, args, kwargs)
    return ModelInfo(captured, analyse(captured.gm.graph))
