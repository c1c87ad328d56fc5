"""What requests bring: columns of tokens and pictures, drawn at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from costmodel import Image
from costmodel.base import Array
from simulator.request import Ints, Items, Media

Generator = np.random.Generator


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """Requests without their times.

    Parameters
    ----------
    text, output : ndarray of int
        Tokens of the prompt's text, and of the answer.
    items : Items or None
    links : mapping
        Columns parent, shared_text_tokens, shared_items, after; see `simulator.request.Requests`.
    think_s : ndarray or None
        For requests that follow others, how long after their end they come [s].
    """

    text: Ints
    output: Ints
    items: Items | None = None
    links: Mapping[str, Ints] = field(default_factory=dict)
    think_s: Array | None = None


Draw = Callable[[int, Generator], Drawn]


def exponential_tokens(mean: float, n: int, rng: Generator) -> Ints:
    """Return token counts around a mean, at least one each."""
    return np.maximum(1, np.rint(rng.exponential(mean, n))).astype(np.int64)


def from_quantiles(points: Sequence[tuple[float, float]], n: int, rng: Generator) -> Array:
    """Return values whose quantiles are these (share, value), straight on a log scale between them.

    Beyond the first and the last point the distribution stops at their values.
    """
    shares, values = np.array(points).T
    drawn: Array = np.exp(np.interp(rng.random(n), shares, np.log(values)))
    return drawn


def whole(values: Array) -> Ints:
    """Return values as counts, at least one each."""
    return np.maximum(1, np.rint(values)).astype(np.int64)


def fixed(text: int, output: int, media: Sequence[Media]) -> Draw:
    """Return a draw in which every request brings the same, pictures before the text and all different."""

    def draw(n: int, rng: Generator) -> Drawn:
        del rng
        kinds = tuple(dict.fromkeys(media))
        kind = np.tile(np.array([kinds.index(item) for item in media], dtype=np.int64), n)
        zero = np.zeros(n * len(media), dtype=np.int64)
        items = Items(np.arange(n + 1) * len(media), kind, np.arange(n * len(media)), zero, kinds)
        return Drawn(np.full(n, text), np.full(n, output), items)

    return draw


def pictures(counts: Ints, kind: Ints, sizes: Sequence[Media], content: Ints | None = None) -> Items:
    """Return so many pictures for each request, in front of its text."""
    total = int(counts.sum())
    offsets = np.concatenate([[0], np.cumsum(counts)])
    shown = np.arange(total) if content is None else content
    return Items(offsets, kind, shown, np.zeros(total, dtype=np.int64), tuple(sizes))


def pictures_of_tokens(tokens: Ints, side: int = 28, longest: float = 2.0) -> tuple[Ints, list[Image]]:
    """Return pictures of as nearly so many tokens as a rectangle can have, and which of them each is.

    Parameters
    ----------
    tokens : ndarray of int
        Of each picture.
    side : int
        Pixels of a token's side: 28 in Qwen2-VL and Qwen2.5-VL.
    longest : float
        Most by which a picture is longer than high.
    """
    different, kind = np.unique(tokens, return_inverse=True)
    sizes = [_rectangle(int(count), longest) for count in different]
    return kind.astype(np.int64), [Image(wide * side, high * side) for wide, high in sizes]


def _rectangle(count: int, longest: float) -> tuple[int, int]:
    """Return the sides of a rectangle of about so many squares, the squarest of the nearest."""
    high = np.arange(1, int(count**0.5) + 1)
    wide = np.maximum(high, np.rint(count / high).astype(np.int64))
    fits = wide <= np.maximum(longest * high, high + 1)
    miss = np.where(fits, np.abs(wide * high - count), np.inf)
    best = len(miss) - 1 - int(np.argmin(miss[::-1]))  # of equals, the highest
    return int(wide[best]), int(high[best])
