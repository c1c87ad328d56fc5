"""What a prompt is to the layers where its tokens are not all alike: pruned, only seen across, or seeing both ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from costmodel.query import causal_pairs
from simulator.request import Ints, Requests

Shares: TypeAlias = tuple[float, float, float, float]
"""Of a segment of layers: visual and other tokens that are rows, pairs computed, visual tokens that are keys alone."""
Seen: TypeAlias = tuple[float, float, float]
"""Visual tokens, tokens that only cross-attention sees, and pairs against the order, up to a place in a prompt."""
Work: TypeAlias = tuple[float, float, float]
"""Rows, pairs and keys of a step's chunks in one segment."""
WHOLE: Final[Shares] = (1.0, 1.0, 1.0, 0.0)
"""Shares of layers that see everything."""


@dataclass(frozen=True, slots=True)
class Layers:
    """How the layers of a segment see a prompt.

    Parameters
    ----------
    kind : {"window", "recurrent", "cross"}
        Attention over the tokens before, a recurrence, or attention to pictures across.
    window : float
        Tokens that attention sees.
    two_way : float
        Whether (1 or 0) the tokens of a picture see those behind them too.
    full_square : bool
        Whether pairs that are masked are computed all the same.
    chunk : float
        Tokens to whose multiple a recurrence is padded.
    """

    kind: str
    window: float
    two_way: float = 0.0
    full_square: bool = False
    chunk: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """A picture in a prompt.

    Parameters
    ----------
    start, end : int
        Its place [tokens].
    visual, cross : float
        Its tokens in the language model, and those that only cross-attention sees.
    blocks : float
        Query-key pairs of its tokens beyond the causal ones.
    """

    start: int
    end: int
    visual: float
    cross: float
    blocks: float


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A prompt whose tokens are not all alike.

    Parameters
    ----------
    tokens : int
        All of them.
    items : tuple of Item
        Its pictures, in order.
    shares : tuple of tuple of float
        By segment of layers.
    late_s, beside_s : float
        What techniques add to the step that computes its last token: behind it, and beside it [s].
    """

    tokens: int
    items: tuple[Item, ...]
    shares: tuple[Shares, ...]
    late_s: float = 0.0
    beside_s: float = 0.0

    @property
    def has_cross(self) -> bool:
        """Whether cross-attention sees anything of it."""
        return any(item.cross for item in self.items)

    def seen(self, place: int) -> Seen:
        """Return what of its pictures stands in front of a place; one that has begun is seen across whole."""
        visual = cross = blocks = 0.0
        for item in self.items:
            if item.start >= place:
                break
            part = min(place - item.start, item.end - item.start) / (item.end - item.start)
            visual += item.visual * part
            cross += item.cross
            blocks += item.blocks * part
        return visual, cross, blocks

    def work(self, start: int, tokens: int, segment: int, layers: Layers, seen: tuple[Seen, Seen]) -> Work:
        """Return what some of its tokens, behind `start` others, bring to a segment of layers.

        The sums of `costmodel.sums` for a turn whose prefix are the tokens before.
        """
        visual_keep, text_keep, density, injected = self.shares[segment]
        (before, crossed, _), (after, cross, _) = seen
        visual = after - before
        rows = visual * visual_keep + (tokens - visual) * text_keep
        if layers.kind == "cross":
            return rows, rows * cross * density, cross - crossed
        if layers.kind == "recurrent":
            return rows, -(-rows // layers.chunk) * layers.chunk, 1.0
        prefix = before * visual_keep + (start - before) * text_keep + after * injected
        if layers.full_square:
            pairs = rows * (rows + prefix)
        else:
            blocks = (seen[1][2] - seen[0][2]) * layers.two_way * visual_keep**2
            pairs = float(causal_pairs(rows, prefix=prefix, window=layers.window)) + blocks
        return rows, pairs * density, rows + min(prefix, layers.window)


Chunk: TypeAlias = tuple[int, int, Prompt | None]
"""A piece of a prompt that one step computes: tokens before it, its own, and the prompt where they are not alike."""


def work_of(chunks: Sequence[Chunk], layers: Layers) -> Work:
    """Return what the chunks of a step bring to a segment, where all tokens are alike."""
    if layers.kind != "window":
        tokens = float(sum([chunk[1] for chunk in chunks]))
        return (tokens, tokens, float(len(chunks))) if layers.kind == "recurrent" else (tokens, 0.0, 0.0)
    rows, pairs, keys, window = 0, 0.0, 0.0, layers.window
    for start, tokens, _ in chunks:
        rows += tokens
        if start + tokens <= window:
            pairs += tokens * start + tokens * (tokens + 1) / 2
            keys += start + tokens
        else:
            rising = min(max(window - start, 0.0), tokens)
            pairs += rising * start + rising * (rising + 1) / 2 + (tokens - rising) * window
            keys += tokens + min(start, window)
    return float(rows), pairs, keys


def works_of(chunks: Sequence[Chunk], segments: Sequence[Layers]) -> list[Work]:
    """Return what the chunks of a step bring to every segment."""
    alike = [chunk for chunk in chunks if chunk[2] is None]
    works = [work_of(alike, layers) for layers in segments]
    for start, tokens, prompt in chunks:
        if prompt is None:
            continue
        seen = prompt.seen(start), prompt.seen(start + tokens)
        for i, layers in enumerate(segments):
            rows, pairs, keys = works[i]
            own = prompt.work(start, tokens, i, layers, seen)
            works[i] = rows + own[0], pairs + own[1], keys + own[2]
    return works


def places(requests: Requests, spans: Ints) -> tuple[Ints, Ints]:
    """Return where each item starts if it takes so many tokens, and how long every prompt is [tokens]."""
    owner, offsets = requests.item_request, requests.item_offsets
    before = np.concatenate([[0], np.cumsum(spans)])
    start = requests.item_text_before + before[:-1] - before[offsets[owner]]
    return start, requests.text_tokens + before[offsets[1:]] - before[offsets[:-1]]


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """What a service makes of all requests, worked out before the run.

    Parameters
    ----------
    prompts : list of Prompt or None
        By request; None where all its tokens are alike.
    own_keys : list of tuple of int, or None
        By request, what each read rule has of it beside its context; see `simulator.service.ReadRule`.
    item_spans, item_embeds : ndarray of int
        By item, the tokens that it takes in the prompt, and the embeddings that the encoder hands over.
    beside_tokens : list of int
        By request, tokens' worth of cache that it holds whatever its length: states, and keys of pictures.
    kept_tokens : list of int
        The same once its prompt is computed, less what is evicted then: negative where that is more.
    """

    prompts: list[Prompt | None]
    own_keys: list[tuple[int, ...]] | None
    item_spans: Ints
    item_embeds: Ints
    beside_tokens: list[int]
    kept_tokens: list[int]
