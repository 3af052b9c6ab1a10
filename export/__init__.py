"""Compiled programs written to disk, to run without the model's Python code; see the README beside this file."""

from tcc.export.bundle import Written, bundle
from tcc.export.manifest import Manifest
from tcc.export.runner import Runner, load

__all__ = ["Manifest", "Runner", "Written", "bundle", "load"]
