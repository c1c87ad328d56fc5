"""Speculative decoding: a draft proposes, one pass of the target verifies, what was rejected is rolled back.

Greedy and lossless: the tokens are those of the target by itself, whatever the draft says. Relaxed verification lets a
share of the rejected tokens pass, and is not. Over a narrow cache a group of tokens may be packed up to a round later
than without a draft, so that there the tokens may differ within the error of the packing.

References
----------
.. [1] Y. Leviathan et al., "Fast inference from transformers via speculative decoding", ICML 2023.
.. [2] Y. Ji et al., "SpecVLM", EMNLP 2025 (arXiv:2508.16201): drafts that see a part of the visual tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from costmodel.errors import Unsupported
from costmodel.techniques.relaxed_verify import RelaxedVerify
from costmodel.techniques.speculate import Speculate
from runtime.techniques.plan import refuse
from runtime.techniques.token_reduce import spread

if TYPE_CHECKING:
    from runtime.techniques.session import Session

NEUTRAL = {"head_layers": None, "nodes": None, "depth": None, "parallel": False}


class Drafter(Protocol):
    """What proposes tokens, with a cache of its own or a part of the target's."""

    def pass_over(self, tokens: Tensor) -> Tensor:
        """Run new tokens and return the logits of what follows the last one."""

    def forget(self, count: int) -> None:
        """Forget the last tokens, which were rejected."""


@dataclass(slots=True)
class ModelDrafter:
    """Another model on the same prompt."""

    session: Session

    def pass_over(self, tokens: Tensor) -> Tensor:
        """Run new tokens."""
        return self.session.step(tokens)[-1]

    def forget(self, count: int) -> None:
        """Forget the last tokens."""
        self.session.drop(count)


@dataclass(slots=True)
class LayersDrafter:
    """The target's own first layers, which write to the target's cache and leave nothing there behind a round."""

    session: Session
    layers: int

    def pass_over(self, tokens: Tensor) -> Tensor:
        """Run new tokens through the first layers alone."""
        return self.session.step(tokens, layers=self.layers)[-1]

    def forget(self, count: int) -> None:
        """Forget the last tokens."""
        self.session.drop(count, layers=self.layers)


class Speculator:
    """Rounds of a draft and a target.

    Parameters
    ----------
    parameters : Speculate
    relaxed : RelaxedVerify or None
    drafter : Drafter
    seed : int
        Of relaxed verification.
    """

    def __init__(self, parameters: Speculate, relaxed: RelaxedVerify | None, drafter: Drafter, *, seed: int) -> None:
        self.tokens = int(parameters.tokens)
        self.probability = float(relaxed.probability) if relaxed else 0.0
        self.drafter = drafter
        self.generator = torch.Generator().manual_seed(seed)
        self.unseen: list[int] = []
        self.accepted: list[int] = []

    def round(self, target: Session, last: int) -> list[int]:
        """Return the tokens of one round: those accepted, and the target's own next one.

        Parameters
        ----------
        last : int
            The newest token, which the target has not run yet.
        """
        proposed = self._propose(target, last)
        device = target.model.device
        choices = target.step(torch.tensor([last, *proposed], device=device)).argmax(-1).tolist()
        count = 0
        while count < len(proposed) and (proposed[count] == choices[count] or self._lets_pass()):
            count += 1
        target.drop(len(proposed) - count)
        target.settle()
        self.accepted.append(count)
        self._roll_back(count, proposed)
        return [*proposed[:count], choices[count]]

    def _lets_pass(self) -> bool:
        return bool(self.probability) and float(torch.rand((), generator=self.generator)) < self.probability

    def _propose(self, target: Session, last: int) -> list[int]:
        """Return tokens of the draft, one pass behind another."""
        proposed: list[int] = []
        ahead = [*self.unseen, last]
        for _ in range(self.tokens):
            logits = self.drafter.pass_over(torch.tensor(ahead, device=target.model.device))
            ahead = [int(logits.argmax())]
            proposed += ahead
        if isinstance(self.drafter, LayersDrafter):  # verification runs all layers and writes anew
            self.drafter.forget(self.tokens)
        return proposed

    def _roll_back(self, count: int, proposed: list[int]) -> None:
        """Leave in the draft's own cache what was accepted; it never saw its last proposal."""
        if isinstance(self.drafter, LayersDrafter):
            return
        self.drafter.forget(max(len(proposed) - 1 - count, 0))
        self.unseen = proposed[-1:] if count == len(proposed) else []


def proposes(parameters: Speculate) -> bool:
    """Return whether there is a draft that proposes tokens, and refuse drafts that do not run."""
    refuse(parameters, neutral=NEUTRAL)
    if parameters.tokens != int(parameters.tokens):
        raise Unsupported(f"Speculate.tokens={parameters.tokens!r} does not run; give a whole number")
    return bool(parameters.tokens) and (parameters.draft is not None or parameters.layers is not None)


def seen_by_draft(parameters: Speculate, n_visual: int) -> Tensor:
    """Return which of the target's visual tokens the draft sees: a share, evenly spaced."""
    return spread(n_visual, round(float(parameters.draft_visual_keep) * n_visual), torch.device("cpu"))
