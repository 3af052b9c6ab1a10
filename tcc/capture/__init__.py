"""From a model and a call to one functional graph."""

from tcc.capture.captured import Captured, InputSpec, capture

__all__ = ["Captured", "InputSpec", "capture"]
