"""Which worker a request goes to: pure decisions on the loads of the workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from costmodel.errors import unknown
from simulator.request import RequestView


class Load(Protocol):
    """What a router sees of a worker."""

    @property
    def waiting(self) -> int:
        """Requests that have not started."""

    @property
    def running(self) -> int:
        """Requests that run."""

    @property
    def tokens(self) -> int:
        """Prompt tokens of all of them."""


class Router(Protocol):
    """How a pool spreads its requests."""

    def route(self, request: RequestView, loads: Sequence[Load]) -> int:
        """Return the index of a worker; the same for the same request and loads."""


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """Workers in turn."""

    def route(self, request: RequestView, loads: Sequence[Load]) -> int:
        """Return the index of a worker."""
        return request.index % len(loads)


@dataclass(frozen=True, slots=True)
class LeastRequests:
    """The worker with the fewest requests, the first of equals."""

    def route(self, request: RequestView, loads: Sequence[Load]) -> int:
        """Return the index of a worker."""
        del request
        return min(range(len(loads)), key=lambda i: (loads[i].waiting + loads[i].running, i))


@dataclass(frozen=True, slots=True)
class LeastTokens:
    """The worker with the fewest prompt tokens, pictures included, the first of equals."""

    def route(self, request: RequestView, loads: Sequence[Load]) -> int:
        """Return the index of a worker."""
        del request
        return min(range(len(loads)), key=lambda i: (loads[i].tokens, i))


ROUTERS: Final[dict[str, Router]] = {
    "round-robin": RoundRobin(),
    "least-requests": LeastRequests(),
    "least-tokens": LeastTokens(),
}


def router(name: str) -> Router:
    """Return a router by name.

    Raises
    ------
    LookupError
        If there is none of this name.
    """
    if name not in ROUTERS:
        raise unknown("router", name, ROUTERS)
    return ROUTERS[name]
