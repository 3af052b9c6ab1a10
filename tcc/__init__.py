"""tcc: a token-caching compiler for diffusion transformers."""

from tcc import errors, export, plans
from tcc.driver import CompiledModel, compile
from tcc.export import load
from tcc.info import ModelInfo, inspect
from tcc.plan import CachePlan, Compute, Hold, Reuse, Schedule, Skip, TopK, Update
from tcc.reference import Reference

__all__ = [
    "CachePlan",
    "CompiledModel",
    "Compute",
    "Hold",
    "ModelInfo",
    "Reference",
    "Reuse",
    "Schedule",
    "Skip",
    "TopK",
    "Update",
    "compile",
    "errors",
    "export",
    "inspect",
    "load",
    "plans",
]

__version__ = "0.1.0"
