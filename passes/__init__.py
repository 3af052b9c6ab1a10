"""Analyses of a captured graph, and the passes that rewrite it for one kind of step.

`README.md` in this folder tells how the parts fit together and how to write a pass. The names below are the ones that
code outside tcc may rely on: those for writing a pass, those for reading a graph, and those for teaching tcc a custom
operator.
"""

from tcc.passes import shape_rules as _shape_rules  # noqa: F401 - registers its rules, as does the next
from tcc.passes import token_rules as _token_rules  # noqa: F401
from tcc.passes.base import Pass, PassRecord, run_passes, verify
from tcc.passes.entries import Entry
from tcc.passes.graph import emit, graph_text
from tcc.passes.pipeline import StepKind, variant_passes
from tcc.passes.sites import Analysis, Site, analyse
from tcc.passes.token_axis import Narrowing, NotTokenLocal, narrowing, rule
from tcc.passes.tokens import Axis, gather_tokens, scatter_tokens

__all__ = [
    "Analysis",
    "Axis",
    "Entry",
    "Narrowing",
    "NotTokenLocal",
    "Pass",
    "PassRecord",
    "Site",
    "StepKind",
    "analyse",
    "emit",
    "gather_tokens",
    "graph_text",
    "narrowing",
    "rule",
    "run_passes",
    "scatter_tokens",
    "variant_passes",
    "verify",
]
