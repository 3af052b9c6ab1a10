"""The errors that tcc raises; each message says what happened, where, and what to do."""

from __future__ import annotations

__all__ = [
    "AnalysisError",
    "BundleError",
    "CallError",
    "CaptureError",
    "CompileError",
    "ExportError",
    "ModelError",
    "PassError",
    "PlanError",
    "ShapeError",
    "TccError",
    "TrainError",
    "VerificationError",
]


class TccError(Exception):
    """Base of every error that tcc raises on purpose."""


class ModelError(TccError, ValueError):
    """The weights or the configuration given for a model do not describe that model."""


class CaptureError(TccError, RuntimeError):
    """`torch.export` refused the model; always raised `from` the cause."""


class AnalysisError(TccError, RuntimeError):
    """The captured graph has no recognisable residual stream, or a value in it could not be followed."""


class PlanError(TccError, ValueError):
    """The plan contradicts itself, does not belong to the model, or could not be read from its file."""


class CompileError(TccError, RuntimeError):
    """A backend could not compile a variant; names the variant and its steps, and is raised `from` the cause."""


class CallError(TccError, RuntimeError):
    """A compiled model was called out of step order, or with another shape, dtype or device."""


class ShapeError(CallError):
    """A compiled model was called with other shapes than it was captured with: resolution, prompt length or batch."""


class PassError(TccError, RuntimeError):
    """A pass failed; names the pass, the node and the user's source line."""


class VerificationError(TccError, RuntimeError):
    """A graph broke a rule after a pass; names the rule and shows the neighbourhood of the node."""


class TrainError(TccError, RuntimeError):
    """Training cannot start or go on: no images, a loss that is no number, or a state of another run."""


class ExportError(TccError, RuntimeError):
    """A program cannot be exported to a target, or the target's library is missing; says what to install."""


class BundleError(TccError, ValueError):
    """A bundle is incomplete, altered, malformed, or of an unknown version; names the file or the field."""
