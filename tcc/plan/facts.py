"""What a plan says of itself: the model it is for, its schedule, its cost."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Cost", "ModelKey", "Schedule"]


@dataclass(frozen=True)
class ModelKey:
    """The model a plan was made for.

    Attributes:
        graph_hash: content hash of the captured graph.
        inputs: name and shape of every tensor input, in order.
        num_tokens: the tokens of the stream.
    """

    graph_hash: str
    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    num_tokens: int


@dataclass(frozen=True)
class Schedule:
    """The kind of every step: `I` where all sites are computed, `P` where some are not."""

    letters: str

    def __str__(self) -> str:
        return self.letters

    @property
    def i_steps(self) -> tuple[int, ...]:
        """The steps that compute everything."""
        return tuple(i for i, letter in enumerate(self.letters) if letter == "I")


@dataclass(frozen=True)
class Cost:
    """What a plan costs on the model it was made for.

    Attributes:
        full_macs: MACs of one uncached step, for one image and one guidance branch.
        step_macs: MACs of every step of the plan, likewise.
        slot_bytes: the bytes of all slots, for the captured batch.
    """

    full_macs: int
    step_macs: tuple[int, ...]
    slot_bytes: int
