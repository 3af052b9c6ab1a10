"""From a plan to the variants of its steps: kinds of steps, which stores are live, what slots take."""

from tcc.program.program import Binding, Program, SlotSpec, Variant, build_program

__all__ = ["Binding", "Program", "SlotSpec", "Variant", "build_program"]
