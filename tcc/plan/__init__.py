"""The cache plan, as data: actions, token sets and scores, files, pictures, and the rules that a plan keeps."""

from tcc.plan.plan import (
    COMPUTE,
    Action,
    Attention,
    CachePlan,
    Compute,
    Cost,
    Hold,
    ModelKey,
    Reuse,
    Schedule,
    Skip,
    TopK,
    Update,
)

__all__ = [
    "COMPUTE",
    "Action",
    "Attention",
    "CachePlan",
    "Compute",
    "Cost",
    "Hold",
    "ModelKey",
    "Reuse",
    "Schedule",
    "Skip",
    "TopK",
    "Update",
]
