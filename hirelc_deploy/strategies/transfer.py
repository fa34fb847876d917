"""In: policies that have learned on one problem. Out: others that begin there, if it foretells what is measured here.

What moves is what all decisions of a problem share: the networks from features to preferences. The free number of each
option and the inputs that only tell blocks apart belong to one model, and begin anew.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hirelc_deploy.strategies.agent import Agent
from hirelc_deploy.strategies.low_level import OptionPolicy
from hirelc_deploy.strategies.problem import Choices
from hirelc_deploy.strategies.surrogate import TRUSTED_CORRELATION, rank_correlation

FRESH = 10
"""Plans that are measured here before what was learned elsewhere is believed or refused."""

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """Whether policies were taken over.

    Attributes:
        taken: They were.
        says: Why, or why not, as a sentence.
        correlation: Spearman's, of the losses that the policies imply with the measured ones, where they fit at all.
    """

    taken: bool
    says: str
    correlation: float | None


def shared_weights(agents: Sequence[Agent]) -> dict[str, Tensor]:
    """Return what of these agents has a meaning elsewhere, by name."""
    found: dict[str, Tensor] = {}
    for index, agent in enumerate(agents):
        for name, tensor in agent.low.shared.state_dict().items():
            found[f"{index}.low.{name}"] = tensor.clone()
        for name, tensor in agent.high.shared.state_dict().items():
            kept = agent.high.general if name == "0.weight" else slice(None)
            found[f"{index}.high.{name}"] = tensor[..., kept].clone().contiguous()
    return found


def take_over(agents: Sequence[Agent], weights: Weights, choices: Choices, losses: NDArray[np.float64]) -> Verdict:
    """Let the agents begin at these weights, where those rank (n, decisions) plans as their (n,) losses do."""
    wanted = {name: tuple(tensor.shape) for name, tensor in shared_weights(agents).items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if wanted != given:
        name = next(name for name in sorted(wanted | given) if wanted.get(name) != given.get(name))
        says = f"{name} has shape {given.get(name)}, here it must be {wanted.get(name)}; the search goes on without it"
        return Verdict(False, f"what was learned elsewhere does not fit: {says}.", None)
    implied = np.mean([_implied_loss(agent.low, index, weights, choices) for index, agent in enumerate(agents)], axis=0)
    correlation = rank_correlation(implied, losses)
    judged = f"it ranks {len(losses)} plans measured here with correlation {correlation:.2f}"
    if correlation < TRUSTED_CORRELATION:
        says = f"{judged}, below {TRUSTED_CORRELATION:g}; the search goes on without it"
        return Verdict(False, f"what was learned elsewhere is refused: {says}.", correlation)
    with torch.no_grad():
        for index, agent in enumerate(agents):
            _load(agent.low, index, weights)
            for name, tensor in agent.high.shared.state_dict().items():
                given_tensor = weights[f"{index}.high.{name}"]
                if name == "0.weight":
                    tensor.zero_()
                    tensor[:, agent.high.general] = given_tensor
                else:
                    tensor.copy_(given_tensor)
    return Verdict(True, f"what was learned elsewhere is taken over: {judged}.", correlation)


def _load(policy: OptionPolicy, index: int, weights: Weights) -> None:
    state = {name: weights[f"{index}.low.{name}"] for name in policy.shared.state_dict()}
    policy.shared.load_state_dict(state)


def _implied_loss(policy: OptionPolicy, index: int, weights: Weights, choices: Choices) -> NDArray[np.float64]:
    """Return (n,) losses, in temperatures, at which the policy with these weights would prefer what it prefers."""
    moved = copy.deepcopy(policy)
    _load(moved, index, weights)
    with torch.no_grad():
        decisions = choices.shape[1]
        octaves = torch.zeros(1, decisions, dtype=torch.float64)
        worth = moved.priced(moved.residual(octaves), torch.zeros(1, decisions, dtype=torch.float64))[0].numpy()
    return np.asarray(-worth[np.arange(decisions), choices].sum(axis=1))
