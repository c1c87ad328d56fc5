"""Requests as columns, what a policy may see of one, and the life that a request has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from costmodel import Image, Video
from costmodel.base import Array
from costmodel.errors import unknown

Ints: TypeAlias = NDArray[np.int64]
Media: TypeAlias = Image | Video
NONE: Final = -1
"""In a column of indices: no such request."""


class State(IntEnum):
    """Where a request is in its life."""

    EXPECTED = 0
    PREPROCESSING = 1
    WAITING = 2
    RUNNING = 3
    FINISHED = 4
    REJECTED = 5
    ENCODING = 6
    MOVING = 7
    CANCELLED = 8
    FAILED = 9


ENDS: Final = (State.FINISHED, State.REJECTED, State.CANCELLED, State.FAILED)
_LOST: Final = (State.EXPECTED, State.CANCELLED, State.FAILED)
"""What may happen to a request anywhere: it starts anew on another worker, its client leaves, or it fails."""
LIFE: Final = {
    State.EXPECTED: (State.PREPROCESSING, State.ENCODING, State.WAITING, State.REJECTED, State.CANCELLED, State.FAILED),
    State.PREPROCESSING: (State.ENCODING, State.WAITING, *_LOST),
    State.ENCODING: (State.WAITING, *_LOST),
    State.WAITING: (State.RUNNING, State.ENCODING, *_LOST),
    State.RUNNING: (State.WAITING, State.MOVING, State.FINISHED, *_LOST),
    State.MOVING: (State.RUNNING, *_LOST),
    State.FINISHED: (),
    State.REJECTED: (),
    State.CANCELLED: (),
    State.FAILED: (),
}
"""What may follow on each state; from running back to waiting leads preemption."""


@dataclass(frozen=True, slots=True, eq=False)
class Requests:
    """Requests of any number as columns, in order of arrival.

    Parameters
    ----------
    arrival_s : ndarray
        When each arrives, or how long after the end of `after` [s].
    text_tokens, output_tokens, max_output_tokens : ndarray of int
        Text of the prompt, tokens of the answer, and the most that the client asked for, which policies may see.
    item_offsets : ndarray of int, shape (n + 1,)
        The images and videos of request `i` are `item_offsets[i]` up to `item_offsets[i + 1]`.
    item_kind : ndarray of int
        Index into `media` for each of them.
    item_content : ndarray of int
        What it shows: items of equal content share cached encodings.
    item_text_before : ndarray of int
        Text tokens of the prompt in front of it.
    media : tuple of Image or Video
        The different sizes.
    parent : ndarray of int
        An earlier request whose prompt and answer this prompt starts like, or -1.
    shared_text_tokens, shared_items : ndarray of int
        How far: text (and answer) tokens, and items.
    after : ndarray of int
        An earlier request that must have ended before this one comes, or -1.
    priority : ndarray of int
        0 is served first, larger numbers later.
    patience_s : ndarray
        How long after its arrival the client gives up if the answer has not ended; infinite if it never does [s].
    concurrency : int
        Users of a closed loop; 0 is an open one. A user takes the next conversation, a request that comes after no
        other and those that follow on it, when the last request of the one before has ended.
    name : str
        What the traffic is called.
    notes : tuple of str
        What its reader left out or took for granted, with how often, in words.
    """

    arrival_s: Array
    text_tokens: Ints
    output_tokens: Ints
    max_output_tokens: Ints
    item_offsets: Ints
    item_kind: Ints
    item_content: Ints
    item_text_before: Ints
    media: tuple[Media, ...]
    parent: Ints
    shared_text_tokens: Ints
    shared_items: Ints
    after: Ints
    priority: Ints
    patience_s: Array
    concurrency: int = 0
    name: str = "requests"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse columns that no traffic has."""
        n = len(self.arrival_s)
        for name in _BY_REQUEST:
            if len(getattr(self, name)) != n:
                raise ValueError(f"Requests.{name} has {len(getattr(self, name))} rows and arrival_s {n}; give equals")
        if n and (not np.isfinite(self.arrival_s).all() or self.arrival_s.min() < 0):
            raise ValueError("Requests.arrival_s must be finite and not negative; shift the times")
        self._check_values(n)
        self._check_items(n)

    def _check_values(self, n: int) -> None:
        free = self.arrival_s[self.after < 0]
        if (np.diff(free) < 0).any():
            raise ValueError("Requests.arrival_s must not decrease; sort the requests")
        for name in ("text_tokens", "output_tokens"):
            if n and getattr(self, name).min() < 1:
                raise ValueError(f"Requests.{name} must be at least 1; drop or raise the empty ones")
        if (self.max_output_tokens < self.output_tokens).any():
            raise ValueError("Requests.max_output_tokens must be output_tokens or more; raise it")
        index = np.arange(n)
        for name in ("parent", "after"):
            if (getattr(self, name) >= index).any() or (n and getattr(self, name).min() < NONE):
                raise ValueError(f"Requests.{name} must name an earlier request or be -1; reorder the requests")
        if self.concurrency < 0:
            raise ValueError(f"Requests.concurrency={self.concurrency} must be 0 (open) or more")
        if n and self.priority.min() < 0:
            raise ValueError("Requests.priority must be 0 (first) or more; shift the numbers")
        if not (self.patience_s > 0).all():  # not a number is refused too
            raise ValueError("Requests.patience_s must be positive; a client that never gives up has an infinite one")

    def _check_items(self, n: int) -> None:
        offsets, items = self.item_offsets, len(self.item_kind)
        if len(offsets) != n + 1 or offsets[0] != 0 or offsets[-1] != items or (np.diff(offsets) < 0).any():
            raise ValueError("Requests.item_offsets must rise from 0 to the number of items, one more than requests")
        if items and not (self.item_kind.min() >= 0 and self.item_kind.max() < len(self.media)):
            raise ValueError("Requests.item_kind must index media; add the sizes")
        owner, before = self.item_request, self.item_text_before
        backwards = (np.diff(before) < 0) & (np.diff(owner) == 0)
        if items and (backwards.any() or before.min() < 0 or (before > self.text_tokens[owner]).any()):
            raise ValueError("Requests.item_text_before must rise within a request, from 0 to its text_tokens at most")

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def n_items(self) -> Ints:
        """Items of each request."""
        return np.diff(self.item_offsets)

    @property
    def item_request(self) -> Ints:
        """The request of each item."""
        return np.repeat(np.arange(len(self)), self.n_items)


_BY_REQUEST: Final = (
    "text_tokens",
    "output_tokens",
    "max_output_tokens",
    "parent",
    "shared_text_tokens",
    "shared_items",
    "after",
    "priority",
    "patience_s",
)


def requests_of(
    arrival_s: Array,
    text_tokens: NDArray[np.int64],
    output_tokens: NDArray[np.int64],
    *,
    items: Items | None = None,
    concurrency: int = 0,
    name: str = "requests",
    links: Mapping[str, NDArray[Any]] | None = None,
    notes: Sequence[str] = (),
) -> Requests:
    """Return requests from the columns that they need; the others take their neutral values.

    Parameters
    ----------
    arrival_s, text_tokens, output_tokens, items, concurrency, name, notes
        As in `Requests`.
    links : mapping, optional
        Of parent, shared_text_tokens, shared_items, after, priority, patience_s and max_output_tokens, those that are
        not neutral.
    """
    n = len(arrival_s)
    none, zero = np.full(n, NONE), np.zeros(n, dtype=np.int64)
    neutral = {"parent": none, "shared_text_tokens": zero, "shared_items": zero, "after": none, "priority": zero}
    given: dict[str, NDArray[Any]] = {
        "max_output_tokens": output_tokens,
        "patience_s": np.full(n, np.inf),
        **(links or {}),
    }
    for key in given:
        if key not in neutral and key not in ("max_output_tokens", "patience_s"):
            raise unknown("column of requests", key, [*neutral, "max_output_tokens", "patience_s"])
    held = items or Items.empty(n)
    return Requests(
        arrival_s=np.asarray(arrival_s, dtype=float),
        text_tokens=_whole(text_tokens),
        output_tokens=_whole(output_tokens),
        max_output_tokens=_whole(given["max_output_tokens"]),
        item_offsets=_whole(held.offsets),
        item_kind=_whole(held.kind),
        item_content=_whole(held.content),
        item_text_before=_whole(held.text_before),
        media=held.media,
        patience_s=np.ascontiguousarray(given["patience_s"], dtype=float),
        concurrency=concurrency,
        name=name,
        notes=tuple(notes),
        **{key: _whole(given.get(key, default)) for key, default in neutral.items()},
    )


def _whole(values: NDArray[np.int64]) -> Ints:
    return np.ascontiguousarray(values, dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Items:
    """Images and videos of all requests; fields as the `item_` columns of `Requests`."""

    offsets: Ints
    kind: Ints
    content: Ints
    text_before: Ints
    media: tuple[Media, ...]

    @staticmethod
    def empty(n: int) -> Items:
        """Return no items for so many requests."""
        none = np.zeros(0, dtype=np.int64)
        return Items(np.zeros(n + 1, dtype=np.int64), none, none, none, ())

    @staticmethod
    def same(n: int, each: int, media: Media) -> Items:
        """Return as many items of one size for each request, all different, in front of the text."""
        total = n * each
        zero = np.zeros(total, dtype=np.int64)
        return Items(np.arange(n + 1) * each, zero, np.arange(total), zero, (media,))


class RequestView(NamedTuple):
    """What a policy may see of a request, or of one of its pictures: never how long its answer will be.

    Parameters
    ----------
    index : int
        Its number; of a picture, that among all pictures.
    arrival_s : float
        When it came [s].
    prompt_tokens, max_output_tokens : int
        Its prompt, and the most that it may answer.
    n_items, image_tokens : int
        Images and videos, and their embeddings.
    priority : int
        0 goes first.
    content : int
        What a picture shows; -1 for a request.
    prefix_slot, prefix_tokens : int
        Worker of this pool that has the start of its prompt, or -1, and how much of it.
    """

    index: int  # type: ignore[assignment]  # a tuple has a method of this name
    arrival_s: float
    prompt_tokens: int
    max_output_tokens: int
    n_items: int
    image_tokens: int = 0
    priority: int = 0
    content: int = NONE
    prefix_slot: int = NONE
    prefix_tokens: int = 0
