"""Batch policies: what a worker does in its next step, decided by pure functions on read-only views."""

from __future__ import annotations

import importlib
import pkgutil
from typing import NamedTuple, Protocol

from costmodel.errors import unknown


class Decision(NamedTuple):
    """What the next step may hold.

    Parameters
    ----------
    mixed : bool
        Whether decoding sequences and prefill chunks run together; otherwise decoding waits while there is a chunk.
    admits : bool
        Whether waiting requests may start.
    in_order : bool
        Whether tokens of the budget go out in order of admission; otherwise decoding sequences get theirs first.
    """

    mixed: bool = True
    admits: bool = True
    in_order: bool = False


class View(Protocol):
    """What a policy sees of a worker: counts of requests by what they do."""

    @property
    def waiting(self) -> int:
        """Requests that have not started, or were preempted."""

    @property
    def prefilling(self) -> int:
        """Running requests whose prompt is not yet computed."""

    @property
    def decoding(self) -> int:
        """Running requests that generate."""


class BatchPolicy(Protocol):
    """How a worker forms its batches."""

    @property
    def token_budget(self) -> int | None:
        """Tokens of a step; None is the engine's default."""

    def decide(self, view: View) -> Decision:
        """Return what the next step may hold; the same for the same view."""


def policy_names() -> list[str]:
    """Return the names of the batch policies: the modules of this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def batch_policy(name: str) -> BatchPolicy:
    """Return a batch policy with its defaults.

    Raises
    ------
    LookupError
        If there is none of this name.
    """
    if name not in policy_names():
        raise unknown("batch policy", name, policy_names())
    policy: BatchPolicy = importlib.import_module(f"simulator.batching.{name}").Policy()
    return policy
