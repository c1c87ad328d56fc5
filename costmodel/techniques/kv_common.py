"""What techniques on attention and the cache share: tokens of a request, views of cache entries, checks of fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from costmodel.base import Quantity
from costmodel.blocks import Widths
from costmodel.errors import Unsupported, shown
from costmodel.layers import AttentionSpec, CrossAttentionSpec, LatentAttentionSpec, MixerSpec
from costmodel.memo import remember
from costmodel.mixers import cached_width_on_device
from costmodel.operators import COLUMNS, Operator
from costmodel.query import KVEntry, Query, Segment
from costmodel.recurrent import RecurrentSpec
from costmodel.state import grouped
from costmodel.traces import TracedMixerSpec
from costmodel.units import TINY, UNBOUNDED

FEW_ENTRIES: Final = 2
"""Entries of a cache that are not worth grouping."""


def check_share(owner: str, field: str, value: Quantity | None, *, zero: bool = False) -> None:
    """Refuse what is no share of one."""
    if value is None:
        return
    low = np.min(value) >= 0 if zero else np.min(value) > 0
    if not (low and np.max(value) <= 1):
        bounds = "[0, 1]" if zero else "(0, 1]"
        raise ValueError(f"{owner}.{field}={shown(value)} must lie in {bounds}; 1 is all")


def check_count(owner: str, field: str, value: Quantity | None, *, least: float = 0.0) -> None:
    """Refuse numbers that are too small, infinite or none."""
    if value is not None and not (np.min(value) >= least and np.max(value) <= UNBOUNDED):
        raise ValueError(f"{owner}.{field}={shown(value)} must be a number of {least:g} or more; 1e18 is no bound")


def check_scalar(owner: str, field: str, value: Quantity) -> None:
    """Refuse arrays where a value decides which operators there are."""
    if np.ndim(value):
        raise ValueError(f"{owner}.{field} is structure and is not swept; give one number and predict each point")


def check_choice(owner: str, field: str, value: str, known: Sequence[str]) -> None:
    """Refuse words that are not known."""
    if value not in known:
        raise ValueError(f"{owner}.{field}={shown(value)} is unknown; use one of {', '.join(known)}")


def is_one(value: Quantity | None) -> bool:
    """Return whether a share is the plain number one (or not given), which changes nothing."""
    return value is None or (not isinstance(value, np.ndarray) and value == 1)


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """Tokens that all turns of one request bring.

    Parameters
    ----------
    visual, other, cross : float or ndarray
        Visual and other tokens of the prompt, and tokens that only cross-attention sees.
    """

    visual: Quantity
    other: Quantity
    cross: Quantity

    @staticmethod
    def of(query: Query) -> Prompt:
        """Return the tokens of a query; a prefix before its first turn counts as text."""
        first, later = query.turns[0], query.turns[1:]
        shown_, text = first.visual_share, first.text_tokens + first.prefix_tokens
        for turn in later:
            shown_, text = shown_ + turn.visual_share, text + turn.text_tokens
        media = query.media
        return Prompt(query.visual_tokens * shown_, media.marker_tokens * shown_ + text, media.cross_tokens * shown_)

    @property
    def visual_fraction(self) -> Quantity:
        """Share of the prompt that is visual."""
        return self.visual / np.maximum(self.visual + self.other, 1.0)

    def seen_in(self, entry: KVEntry) -> tuple[Quantity, Quantity]:
        """Return the visual and the other tokens that an entry keeps, before its window cuts them."""
        seen = entry.visual_share * self.visual + entry.cross_share * self.cross
        return seen, entry.text_share * self.other + entry.fixed_tokens


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """One layer's cache on one device, as scorers see it.

    Parameters
    ----------
    n_layers : int
        Layers like it.
    heads, key_heads, query_width, cached_width : float
        Query heads, key heads, the width of all queries, and the numbers that one token leaves, on one device.
    head_width, bytes_each : float
        Width of one head, and one cached number [bytes].
    tokens : float or ndarray
        Tokens of one request.
    batch, at_once : float or ndarray
        Requests, and those whose prefill is under way at once.
    """

    n_layers: int
    heads: float
    key_heads: float
    query_width: float
    cached_width: float
    head_width: float
    bytes_each: float
    tokens: Quantity
    batch: Quantity
    at_once: Quantity

    @staticmethod
    def of(query: Query, mixer: MixerSpec, n_layers: int, *, bytes_each: float, tokens: Quantity) -> Held:
        """Return the view of the layers of a mixer."""
        if isinstance(mixer, TracedMixerSpec):
            raise Unsupported("a traced model does not name the heads of a layer, and nothing can score its keys")
        tp = query.parallelism.tp
        wide = mixer.q_width if not isinstance(mixer, RecurrentSpec) else mixer.mixed_width
        return Held(
            n_layers=n_layers,
            heads=mixer.heads / tp,
            key_heads=max(key_heads(mixer) / tp, 1.0),
            query_width=wide / tp,
            cached_width=cached_width_on_device(mixer, tp),
            head_width=head_width(mixer),
            bytes_each=bytes_each,
            tokens=np.minimum(tokens, mixer.window),
            batch=query.replica_batch,
            at_once=requests_at_once(query, tokens),
        )

    @property
    def token_bytes(self) -> float:
        """One token in one layer [bytes]."""
        return self.cached_width * self.bytes_each


def requests_at_once(query: Query, tokens: Quantity) -> Quantity:
    """Return how many requests of the batch one pass of prefill works on: at least one."""
    most = np.maximum(query.engine.prefill_chunk_tokens / np.maximum(tokens, 1.0), 1.0)
    return np.minimum(query.replica_batch, most)


def state_bytes(query: Query) -> float:
    """Return the bytes of one number of keys or values as prefill computes them [bytes]."""
    return Widths(activation_bits=query.precision.activation_bits).state_bytes


def key_heads(mixer: MixerSpec) -> int:
    """Return the heads of keys that a token leaves in the cache; a latent is one for all."""
    return mixer.kv_heads if isinstance(mixer, AttentionSpec | CrossAttentionSpec) else 1


def head_width(mixer: MixerSpec) -> float:
    """Return the numbers that a transform along one head mixes."""
    if isinstance(mixer, AttentionSpec | CrossAttentionSpec):
        return float(mixer.head_dim)
    return float(mixer.kv_rank) if isinstance(mixer, LatentAttentionSpec) else 1.0


def cache_groups(query: Query) -> tuple[KVEntry, ...]:
    """Return the cache entries with equal ones put together, which changes no cost."""
    if len(query.kv) <= FEW_ENTRIES:
        return query.kv
    return remember(query.model.cache, ("cache groups", query.kv), lambda: grouped(query.kv))


def is_cache(entry: KVEntry) -> bool:
    """Return whether an entry holds a token for each one of the prompt, and is read."""
    return entry.is_read and not isinstance(entry.mixer, RecurrentSpec)


def split_modalities(entry: KVEntry, visual_fraction: Quantity) -> tuple[KVEntry, KVEntry]:
    """Return an entry as two that add up to it: its visual tokens, and the rest with what is generated."""
    prefix = entry.prefix_share
    visual = replace(
        entry,
        text_share=0.0,
        fixed_tokens=0.0,
        text_evicted=0.0,
        prefix_share=prefix * visual_fraction,
        grows=False,
    )
    rest = replace(
        entry,
        visual_share=0.0,
        cross_share=0.0,
        visual_evicted=0.0,
        prefix_share=prefix * (1.0 - visual_fraction),
    )
    return visual, rest


def seeing_prefix(query: Query, share: Quantity) -> tuple[Segment, ...]:
    """Return the decoder where later turns attend to this share of what is kept of earlier ones."""
    if is_one(share):
        return query.decoder
    return tuple(replace(segment, prefix_share=segment.prefix_share * share) for segment in query.decoder)


def weighted_mean(shares: Sequence[tuple[float, Quantity]]) -> Quantity:
    """Return the mean of shares by their weights."""
    total: Quantity = sum((weight * share for weight, share in shares), start=0.0)
    return total / max(sum(weight for weight, _ in shares), TINY)


def times(operator: Operator, factor: Quantity) -> Operator:
    """Return an operator with its work and its kernel starts multiplied."""
    columns = dict(zip(COLUMNS, operator.columns, strict=True))
    return replace(operator, **{name: value * factor for name, value in columns.items()})  # type: ignore[arg-type]


def as_number(condition: Any) -> Quantity:  # noqa: ANN401 - a truth, or an array of them
    """Return 1 where a condition holds and 0 elsewhere."""
    number: Quantity = condition * 1.0
    return number


def most(values: Sequence[Quantity]) -> Quantity:
    """Return the largest of some numbers or arrays."""
    largest: Quantity = 0.0
    for value in values:
        largest = np.maximum(largest, value)
    return largest
