"""The cache plan, as data: actions, token sets and scores, files, pictures, and the rules that a plan keeps."""

from tcc.plan.actions import COMPUTE, Action, Attention, Compute, Hold, Reuse, Skip, TopK, Update
from tcc.plan.facts import Cost, ModelKey, Schedule
from tcc.plan.plan import CachePlan

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
