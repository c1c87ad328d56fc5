"""Which worker a request or a picture goes to: pure decisions on what is seen of the workers."""

from __future__ import annotations

from array import array
from bisect import bisect
from dataclasses import dataclass, field
from typing import Final, Protocol

from costmodel.errors import unknown
from simulator.loads import Loads
from simulator.request import NONE, RequestView

WORD: Final = (1 << 64) - 1
POINTS: Final = 64
"""Points of each worker on the ring of consistent hashing."""
PREFIX_SHARE: Final = 0.5
"""Share of a prompt that must be cached at a worker to go there (SGLang's `cache_threshold`)."""
BALANCE: Final = 1.5
"""A worker with more than this many times the tokens of the least loaded one is passed over (SGLang's router)."""


class Router(Protocol):
    """How a pool spreads its work."""

    def route(self, view: RequestView, loads: Loads) -> int:
        """Return the slot of an open worker; the same for the same view and loads."""


def mixed(value: int) -> int:
    """Return a number that looks random (SplitMix64 of G. Steele et al., OOPSLA 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & WORD
    return value ^ (value >> 31)


def tokens(view: RequestView, loads: Loads) -> array[float]:
    """Return what workers have by slot: tokens of prompts for a request, embeddings for a picture."""
    return loads.tokens if view.content == NONE else loads.image_tokens


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """Workers in turn."""

    def route(self, view: RequestView, loads: Loads) -> int:
        """Return the slot of a worker."""
        return loads.open[view.index % len(loads.open)]


@dataclass(frozen=True, slots=True)
class LeastRequests:
    """The worker with the fewest requests, the first of equals."""

    def route(self, view: RequestView, loads: Loads) -> int:
        """Return the slot of a worker."""
        del view
        return loads.least(loads.requests)


@dataclass(frozen=True, slots=True)
class LeastTokens:
    """The worker with the fewest prompt tokens, pictures included, or embeddings; the first of equals."""

    def route(self, view: RequestView, loads: Loads) -> int:
        """Return the slot of a worker."""
        return loads.least(tokens(view, loads))


@dataclass(frozen=True, slots=True)
class LeastImageTokens:
    """The worker with the fewest pending embeddings, the first of equals (ModServe's image instances)."""

    def route(self, view: RequestView, loads: Loads) -> int:
        """Return the slot of a worker."""
        del view
        return loads.least(loads.image_tokens)


@dataclass(frozen=True, slots=True)
class Random:
    """Any worker, drawn by hashing the request (the proxy of vLLM's disaggregated encoder, pull request 25233)."""

    def route(self, view: RequestView, loads: Loads) -> int:
        """Return the slot of a worker."""
        return loads.open[mixed(view.index) % len(loads.open)]


@dataclass(frozen=True, slots=True)
class PowerOfTwo:
    """The one with fewer tokens of two that are drawn by hashing the request."""

    def route(self, view: RequestView, loads: Loads) -> int:
        """Return the slot of a worker."""
        slots, word = loads.open, mixed(view.index)
        one, two = slots[word % len(slots)], slots[(word >> 32) % len(slots)]
        return min(
            (loads.tokens[one] + loads.image_tokens[one], one), (loads.tokens[two] + loads.image_tokens[two], two)
        )[1]


@dataclass(frozen=True, slots=True)
class PrefixAware:
    """The worker that has most of the prompt cached, unless it is much busier than the others; then the least loaded.

    What is known of caches is where the request went whose prompt this one starts like.
    """

    def route(self, view: RequestView, loads: Loads) -> int:
        """Return the slot of a worker."""
        least = loads.least(tokens(view, loads))
        holder = view.prefix_slot
        if holder == NONE or holder not in loads.open or view.prefix_tokens < PREFIX_SHARE * view.prompt_tokens:
            return least
        too_busy = loads.tokens[holder] > BALANCE * (loads.tokens[least] + view.prompt_tokens)
        return least if too_busy else holder


@dataclass(slots=True)
class Affinity:
    """Consistent hashing of what a picture shows, so that equal pictures meet the same encoder cache.

    A worker that comes or goes moves only its own share of pictures. Requests without pictures hash by themselves.
    """

    _ring: list[tuple[int, int]] = field(default_factory=list)
    _of: tuple[int, ...] = ()

    def route(self, view: RequestView, loads: Loads) -> int:
        """Return the slot of a worker."""
        slots = tuple(loads.open)
        if slots != self._of:  # the ring is a function of the open workers, kept because most calls agree
            self._ring = sorted((mixed(mixed(slot) + point), slot) for slot in slots for point in range(POINTS))
            self._of = slots
        key = mixed(view.content if view.content != NONE else view.index)
        return self._ring[bisect(self._ring, (key, -1)) % len(self._ring)][1]


ROUTERS: Final[dict[str, type[Router]]] = {
    "round-robin": RoundRobin,
    "least-requests": LeastRequests,
    "least-tokens": LeastTokens,
    "least-image-tokens": LeastImageTokens,
    "random": Random,
    "power-of-two": PowerOfTwo,
    "prefix-aware": PrefixAware,
    "affinity": Affinity,
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
    return ROUTERS[name]()
