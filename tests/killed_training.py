"""The training of a small router, which as a script kills its own process.

python killed_training.py STATE MOMENT
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import tcc
from tcc.models import DiT
from tcc.train.calls import noise_with_labels
from tcc.train.loop import Report, Settings, train
from tcc.train.objective import Objective
from tcc.train.student import Student
from tcc.train.trajectories import Trajectories
from tcc.train.weights import Budget, RouterWeights, choices_of_pairs

#: In which iteration the process ends.
LAST = 4
STEPS = 4


class Mortal(RouterWeights):
    """Ends the process in the middle of an iteration: the optimiser has changed the logits, and nothing is saved."""

    left: int = -1

    def settle(self) -> None:
        """Clamp, and perhaps end."""
        super().settle()
        self.left -= 1
        if not self.left:
            die()


def die() -> None:
    """As by `kill -9`: no handler and no `finally` runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def train_router(state: Path, iterations: int, moment: str = "never") -> tuple[RouterWeights, Report]:
    """Train, keeping the state after every iteration.

    Args:
        state: the file of the state.
        iterations: how many.
        moment: when to die in iteration `LAST`: after the `update` of the logits, while `saving`, or never.
    """
    learner = student()
    choices = choices_of_pairs(STEPS, learner.sites)
    calls = noise_with_labels(learner.info, num_classes=4)
    recipe = Trajectories(Objective(learner, Budget(price=1e-3)), calls, choices, STEPS)
    weights = Mortal(STEPS, learner.sites, choices)
    if moment == "update":
        weights.left = LAST
    if moment == "saving":
        _die_at_save(LAST)
    return weights, train(weights, recipe, Settings(iterations, lr=0.1, save_every=0.0), state=state)


@functools.cache
def student() -> Student:
    """A model of one block that mixes both of its branches."""
    model = DiT(input_size=8, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=4).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # as it is made, its gates are closed
            parameter.normal_(0.0, 0.2, generator=draw)
    info = tcc.inspect(model, torch.zeros(2, 1, 8, 8), torch.zeros(2).long(), torch.zeros(2).long())
    return Student(info, [name for name, site in info.sites.items() if site.kind == "out"])


def _die_at_save(count: int) -> None:
    """End when the state is written for the `count`-th time, before it replaces the one before."""
    replace, saves = os.replace, iter(range(1, count + 1))

    def replaced(*names: Any) -> None:
        if next(saves) == count:
            die()
        replace(*names)

    mock.patch("os.replace", replaced).start()


if __name__ == "__main__":
    train_router(Path(sys.argv[1]), 2 * LAST, sys.argv[2])
