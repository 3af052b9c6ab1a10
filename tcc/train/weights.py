"""What decides how much of every site is computed, while it is being learned; and what computing costs."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tcc.errors import TrainError
from tcc.info import ModelInfo
from tcc.learned import Importance, Learned, Router
from tcc.plan import CachePlan, Compute
from tcc.plans.checks import check_number
from tcc.train.predictors import Predictor

__all__ = [
    "Budget",
    "Choices",
    "RouterWeights",
    "TokenWeights",
    "Weights",
    "check_choices",
    "choices_of",
    "choices_of_pairs",
]

#: By step, the sites at which there is something to decide. All other steps compute everything.
Choices = Mapping[int, tuple[str, ...]]


def choices_of(plan: CachePlan) -> dict[int, tuple[str, ...]]:
    """Where `plan` does not compute: its P-steps and the sites that it updates, reuses or skips at them."""
    found: dict[int, tuple[str, ...]] = {}
    for step in range(plan.num_steps):
        kept = tuple(name for name, action in plan.at(step).items() if not isinstance(action, Compute))
        found |= {step: kept} if kept else {}
    return found


def choices_of_pairs(num_steps: int, sites: Sequence[str]) -> dict[int, tuple[str, ...]]:
    """Learning-to-Cache's table: counted from the image, odd steps compute, and the even ones after them decide."""
    return {step: tuple(sites) for step in range(1, num_steps) if (num_steps - 1 - step) % 2 == 0}


def check_choices(choices: Choices, num_steps: int) -> None:
    """Refuse P-steps that a run of so many steps cannot have.

    Raises:
        TrainError: no step is one, the first is one, or one is not in the run, or has nothing to decide.
    """
    for step in (step for step in choices if not isinstance(step, int)):
        raise TrainError(f"the schedule has a P-step {step!r}: steps are whole numbers")
    if not choices:
        raise TrainError(
            "there is nothing to learn: every step of the schedule computes all; take more steps, or longer intervals"
        )
    if min(choices) <= 0:
        raise TrainError("step 0 of the schedule reuses values, and nothing is stored yet: make it an I-step")
    if max(choices) >= num_steps:
        raise TrainError(f"the schedule has a P-step {max(choices)}, and the run has {num_steps} steps")
    for step in (step for step, chosen in choices.items() if not chosen):
        raise TrainError(f"P-step {step} of the schedule has no sites to decide about: name some, or leave it out")


def _check_sites(choices: Choices, sites: Container[str], whose: str) -> None:
    for step, chosen in choices.items():
        for site in (site for site in chosen if site not in sites):
            raise TrainError(f"P-step {step} decides about site '{site}', which is none of {whose}")


def _digest(*parts: object) -> str:
    """Tells these choices from others."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Budget:
    """What computing costs in the loss; without a price the best weights are all 1, which caches nothing.

    Attributes:
        price: lambda, the price of computing one site at one step: `price * sum over sites of the mean weight`
            (Learning-to-Cache section 3.3; the L1 norm of TokenCache's revision is this times the tokens).
        target: a mean weight to reach at every step, or None.
        strength: the factor of `(mean weight - target)^2`.

    Raises:
        PlanError: the price or the strength is negative or not finite, or the target is not in 0..1.
    """

    price: float = 0.0
    target: float | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        check_number("Budget: price", self.price, 0)
        check_number("Budget: strength", self.strength, 0)
        if self.target is not None:
            check_number("Budget: target", self.target, 0, 1, "a mean weight")

    def cost(self, weights: Mapping[str, Tensor]) -> Tensor:
        """What the weights of one step cost, a number.

        Args:
            weights: `[1 or B, 1 or S]`, by site.
        """
        means = torch.stack([weight.mean() for weight in weights.values()])
        cost = self.price * means.sum()
        return cost if self.target is None else cost + self.strength * (means.mean() - self.target).square()


class Weights(nn.Module, ABC):
    """How much of every site is computed at a step; parameters are what is learned.

    Attributes:
        reads: the `stream` site whose value the weights depend on, or None.
        choices: where there is something to decide.
    """

    reads: str | None = None
    choices: Choices

    @abstractmethod
    def forward(self, step: int, stream: Tensor | None) -> dict[str, Tensor]:
        """The weights at `step`.

        Args:
            step: in execution order; one at which there is something to decide.
            stream: `[B, S, D]`, the value of `reads`, or None.

        Returns:
            `[1 or B, 1 or S]` in 0..1 by site, for the sites at which there is something to decide.
        """

    def describe(self) -> dict[str, object]:
        """What the result depends on beside the parameters' shapes: a state is gone on from where it is the same."""
        return {}

    def settle(self) -> None:
        """Bring the parameters back into their range, after a step of the optimiser."""

    @abstractmethod
    def learned(self) -> Learned:
        """What a plan is made from."""

    @abstractmethod
    def known(self) -> Tensor:
        """The weights as they are, `[n]`: for a summary."""

    @abstractmethod
    def unlearned(self) -> list[int]:
        """The steps at which there is something to decide, and the weights are still what they were at first."""


class RouterWeights(Weights):
    """One logit per step and site (Learning-to-Cache, Ma et al. 2024).

    Each step has a parameter of its own: a step that an iteration leaves out has no gradient, and the optimiser does
    not move it, as in the paper's code. That code clamps logits for DiT only; here they always are. What else differs
    from the paper's training: `Pairs`.

    Args:
        num_steps: denoising steps of a run.
        sites: the sites, in order.
        choices: where there is something to decide.
        seed: seed of the initial logits, N(0, 1).
        limit: logits are clamped to [-limit, limit] after each step of the optimiser.

    Raises:
        TrainError: a run of so many steps cannot have these choices, or one is of a site that is not among the sites.
    """

    def __init__(
        self, num_steps: int, sites: Sequence[str], choices: Choices, *, seed: int = 0, limit: float = 5.0
    ) -> None:
        super().__init__()
        check_choices(choices, num_steps)
        _check_sites(choices, sites, "the router's sites")
        self.num_steps, self.sites, self.choices, self.limit = num_steps, tuple(sites), dict(choices), limit
        draw = torch.Generator().manual_seed(seed)
        self.logits = nn.ParameterDict(
            {str(step): nn.Parameter(torch.randn(len(chosen), generator=draw)) for step, chosen in choices.items()}
        )
        self._drawn = {step: row.detach().clone() for step, row in self.logits.items()}

    def forward(self, step: int, stream: Tensor | None = None) -> dict[str, Tensor]:
        """`[1, 1]` by site."""
        scores = self.logits[str(step)].sigmoid()
        return {site: score.view(1, 1) for site, score in zip(self.choices[step], scores, strict=True)}

    def describe(self) -> dict[str, object]:
        """See `Weights`."""
        return {"choices' digest": _digest(self.choices, self.sites), "limit": self.limit}

    def settle(self) -> None:
        """Clamp the logits."""
        with torch.no_grad():
            for row in self.logits.values():
                row.clamp_(-self.limit, self.limit)

    def learned(self) -> Router:
        """The scores; sites at which there is nothing to decide have score 1."""
        scores = torch.full((self.num_steps, len(self.sites)), torch.nan)
        for step, chosen in self.choices.items():
            scores[step] = 1.0
            scores[step, [self.sites.index(site) for site in chosen]] = self.logits[str(step)].detach().sigmoid().cpu()
        return Router(scores, self.sites)

    def known(self) -> Tensor:
        """All scores that are learned."""
        return torch.cat([row.detach().sigmoid() for row in self.logits.values()])

    def unlearned(self) -> list[int]:
        """See `Weights`: the scores of these steps are random."""
        return [int(step) for step, row in self.logits.items() if torch.equal(row.detach().cpu(), self._drawn[step])]


class TokenWeights(Weights):
    """The importances of a predictor (TokenCache, Lou et al. 2024): one weight per token for all sites of a block.

    Args:
        predictor: maps a step, and for some the stream that enters block 0, to `[1 or B, blocks, S]` in 0..1.
        info: the model.
        choices: where there is something to decide.

    Raises:
        TrainError: a run of so many steps cannot have these choices, or one is of a site that the model lacks.
    """

    def __init__(self, predictor: Predictor, info: ModelInfo, choices: Choices) -> None:
        super().__init__()
        check_choices(choices, predictor.sizes.steps)
        _check_sites(choices, info.sites, "the model's")
        self.predictor, self.choices = predictor, dict(choices)
        self.blocks = {site: info.sites[site].block for chosen in choices.values() for site in chosen}
        self.reads = f"{info.blocks[0]}.stream" if predictor.form == "stream" else None
        self.seen: dict[int, Tensor] = {}

    def forward(self, step: int, stream: Tensor | None = None) -> dict[str, Tensor]:
        """`[1 or B, S]` by site."""
        importance = self.predictor(step, stream)
        self.seen[step] = importance.detach()
        return {site: importance[:, self.blocks[site]] for site in self.choices[step]}

    def describe(self) -> dict[str, object]:
        """See `Weights`."""
        digest = _digest(self.choices)
        return {"predictor": self.predictor.form, "held mean": self.predictor.held, "choices' digest": digest}

    def learned(self) -> Learned:
        """Importances, or probes where they depend on the stream.

        A step at which nothing was to be decided, or nothing was learned, has what the nearest one learned: a plan may
        have other I-steps. Of two as near, the later one: what a plan of single evaluations does at a step, one for a
        solver with two of them does at the next (`tcc.plans.shifted`).
        """
        missing = self.unlearned()
        taught = [step for step in self.choices if step not in missing] or list(self.choices)
        steps = [min(taught, key=lambda at: (abs(at - step), -at)) for step in range(self.predictor.sizes.steps)]
        found = self.predictor.learned()
        if isinstance(found, Importance):
            return Importance(found.scores[steps])
        return replace(found, weight=found.weight[steps], bias=found.bias[steps], mean=found.mean[steps])

    def known(self) -> Tensor:
        """The importance of every token in the blocks and at the steps where there is something to decide.

        Where it depends on the stream, those that were given last, or the means.
        """
        means = self.predictor.importance().scores
        rows = []
        for step, chosen in self.choices.items():
            importance = self.seen.get(step) if self.reads else None
            importance = means[step : step + 1] if importance is None else importance.cpu()
            rows.append(importance[:, sorted({self.blocks[site] for site in chosen})].flatten())
        return torch.cat(rows)

    def unlearned(self) -> list[int]:
        """See `Weights`: these steps rank all tokens alike."""
        return [step for step in self.choices if self.predictor.flat(step)]
