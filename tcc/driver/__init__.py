"""`tcc.compile`: what it checks, what it makes for the shapes of a call, and the compiled model."""

from tcc.driver.driver import CompiledModel, compile

__all__ = ["CompiledModel", "compile"]
