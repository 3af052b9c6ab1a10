"""Running compiled steps: sessions and slots, the contexts of an image, CUDA graphs."""

from tcc.runtime.session import Executable, Runner, Session

__all__ = ["Executable", "Runner", "Session"]
