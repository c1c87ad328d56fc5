"""From one query of all requests to the columns that workers read; see `simulator.prompting`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from costmodel.base import Array, Quantity
from costmodel.evaluate import kernels_of
from costmodel.layers import CrossAttentionSpec
from costmodel.memory import bytes_per_token, entry_bytes_per_token
from costmodel.query import KVEntry, Query
from costmodel.recurrent import RecurrentSpec
from costmodel.state import grouped
from simulator.prompt import Item, Prompt, Prompts, Shares, places
from simulator.prompting import SECOND_UNIT_S, Columns
from simulator.request import Ints

TWICE: Final = 2.0
"""Requests from whose time together, less that of one, the time of one more follows."""


@dataclass(frozen=True, slots=True)
class Added:
    """What techniques add to every step of decoding: once where any sequence has it, beside what each has [s].

    Parameters
    ----------
    once_s, beside_once_s : float
        Behind the step, and beside it.
    """

    once_s: float = 0.0
    beside_once_s: float = 0.0


def prompts_of(columns: Columns, *, all_differ: bool) -> Prompts:
    """Return the columns of a run.

    Parameters
    ----------
    columns : Columns
    all_differ : bool
        Whether prompts without pictures can be unlike plain ones too.
    """
    query, media = columns.query, columns.query.media
    visual = columns.item_tokens("visual_tokens", query.visual_tokens, least=1.0)
    spans = visual + columns.item_tokens("marker_tokens", media.marker_tokens)
    cross = columns.item_tokens("cross_tokens", media.cross_tokens)
    start, tokens = places(columns.requests, spans)
    items = _items(columns, start, start + spans, visual, cross)
    beside, kept = _held(columns, tokens)
    return Prompts(
        prompts=_prompts(columns, tokens, items, all_differ=all_differ),
        own_keys=_own_keys(columns, tokens),
        item_spans=spans,
        item_embeds=np.where(visual > 0, visual, cross),
        beside_tokens=beside.tolist(),
        kept_tokens=np.minimum(kept, beside).tolist(),
    )


def _items(columns: Columns, start: Ints, end: Ints, visual: Ints, cross: Ints) -> list[Item]:
    blocks = np.array([float(cost.block_pairs) for cost in columns.costs] or [0.0])[columns.kinds]
    before = np.maximum(columns.column(columns.before.block_pairs), 1.0)
    ratio = columns.column(columns.query.media.block_pairs) / before
    blocks = blocks * ratio[columns.requests.item_request]
    rows = zip(start.tolist(), end.tolist(), visual.tolist(), cross.tolist(), blocks.tolist(), strict=True)
    return [Item(*row) for row in rows]


def _prompts(columns: Columns, tokens: Ints, items: list[Item], *, all_differ: bool) -> list[Prompt | None]:
    """Return every prompt that is not plain."""
    shares = _shares(columns)
    kernels = kernels_of(columns.query, columns.model.hardware)
    late, beside = (
        columns.column(columns.added_s("prefill", kernels, hidden=hidden)).tolist() for hidden in (False, True)
    )
    offsets = columns.requests.item_offsets.tolist()
    found: list[Prompt | None] = []
    for i, length in enumerate(tokens.tolist()):
        own = tuple(items[offsets[i] : offsets[i + 1]])
        differs = all_differ or own
        found.append(Prompt(length, own, shares(i), late[i], beside[i]) if differs else None)
    return found


def _shares(columns: Columns) -> Callable[[int], tuple[Shares, ...]]:
    """Return what gives the shares of every segment, by request: one and the same where requests do not differ."""
    segments = grouped(columns.query.decoder)
    values = [(s.visual_keep, s.text_keep, s.density, s.injected) for s in segments]
    if not any(isinstance(value, np.ndarray) for row in values for value in row):
        same: tuple[Shares, ...] = tuple(tuple(map(float, row)) for row in values)  # type: ignore[misc]
        return lambda _: same
    lists = [[columns.column(value).tolist() for value in row] for row in values]
    return lambda i: tuple((row[0][i], row[1][i], row[2][i], row[3][i]) for row in lists)


# The cache


def _own_keys(columns: Columns, tokens: Ints) -> list[tuple[int, ...]] | None:
    """Return the keys of every request beside its context by read rule; None where there are none."""
    entries = grouped(columns.query.kv)
    rules = [_own(columns, entry, tokens) for entry in entries]
    rules += list(_seconds(columns))
    if not any(column.any() for column in rules):
        return None
    return list(zip(*(column.tolist() for column in rules), strict=True))


def _own(columns: Columns, entry: KVEntry, tokens: Ints) -> Ints:
    if isinstance(entry.mixer, RecurrentSpec):
        return np.zeros_like(tokens)
    kept = np.rint(columns.kept(entry)).astype(np.int64)
    if entry.grows:
        return kept - tokens
    most = np.int64(min(entry.mixer.window, float(np.iinfo(np.int64).max >> 1)))
    return np.minimum(kept, most)


def has_seconds(query: Query) -> bool:
    """Return whether techniques add seconds to steps of decoding."""
    return any(overhead.stage == "decode" for overhead in query.overheads)


def _seconds(columns: Columns) -> tuple[Ints, ...]:
    """Return what techniques add to a step for every sequence, behind it and beside it [units of seconds]."""
    if not has_seconds(columns.query):
        return ()
    return tuple(_units(columns, hidden=hidden) for hidden in (False, True))


def _units(columns: Columns, *, hidden: bool) -> Ints:
    kernels = kernels_of(columns.query, columns.model.hardware)
    alone = columns.added_s("decode", kernels, hidden=hidden)
    once = columns.at_example(_once_s(columns, alone, hidden=hidden))
    own = columns.column(alone)
    units = np.rint((own - once) / SECOND_UNIT_S).astype(np.int64)
    return np.where(own > 0, np.where(units == 0, 1, units), 0)


def _once_s(columns: Columns, alone: Quantity, *, hidden: bool) -> Quantity:
    """Return the part of a request's own seconds that two requests share: starts of kernels [s]."""
    kernels = kernels_of(columns.query, columns.model.hardware)
    both = columns.added_s("decode", kernels, hidden=hidden, query=columns.of_two)
    return np.maximum(TWICE * np.asarray(alone) - both, 0.0)


def added_once(columns: Columns) -> Added:
    """Return what techniques add to a step once, the same in every run."""
    if not has_seconds(columns.query):
        return Added()
    kernels = kernels_of(columns.query, columns.model.hardware)
    found = [
        columns.at_example(_once_s(columns, columns.added_s("decode", kernels, hidden=hidden), hidden=hidden))
        for hidden in (False, True)
    ]
    return Added(*found)


def _held(columns: Columns, tokens: Ints) -> tuple[Ints, Ints]:
    """Return tokens' worth of cache beside the context, while a prompt is computed and afterwards.

    What a device holds of one entry counts by its bytes over those of a token in all caches that grow.
    """
    structure = columns.model.structure
    tp, token_bytes = structure.parallelism.tp, bytes_per_token(structure)
    none = np.zeros_like(tokens)
    if not token_bytes:
        return none, none
    share = token_bytes / sum(
        entry_bytes_per_token(entry, tp) for entry in structure.kv if entry.grows and entry.placement == "gpu"
    )
    all_bytes: Array = np.zeros(len(tokens))
    whatever: Array = np.zeros(len(tokens))
    for entry in grouped(columns.query.kv):
        here = 1.0 if entry.placement == "gpu" else entry.read_share
        held = columns.kept(entry) * (entry_bytes_per_token(entry, tp) * share) * here
        all_bytes = all_bytes + held
        if isinstance(entry.mixer, RecurrentSpec | CrossAttentionSpec):
            whatever = whatever + held
    beside = np.ceil(whatever / token_bytes).astype(np.int64)
    return beside, np.ceil(all_bytes / token_bytes - SLACK).astype(np.int64) - tokens


SLACK: Final = 1e-6
"""Tokens that are rounding."""
