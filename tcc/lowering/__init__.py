"""From the variants of a program to compiled code."""

from tcc.lowering.lowering import MODES, Backend, Compiled, Known, find_backend, lower

__all__ = ["MODES", "Backend", "Compiled", "Known", "find_backend", "lower"]
