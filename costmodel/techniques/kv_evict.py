"""Eviction from the cache: after prefill only some tokens are kept, read and carried on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np

from costmodel.base import Array, Quantity
from costmodel.errors import Unsupported
from costmodel.layers import AttentionSpec
from costmodel.memo import remember
from costmodel.mixers import cached_width_on_device
from costmodel.operators import Operator
from costmodel.query import KVEntry, Overhead, Query
from costmodel.techniques.kv_common import (
    Held,
    Prompt,
    cache_groups,
    check_choice,
    check_count,
    check_scalar,
    check_share,
    is_cache,
    is_one,
    key_heads,
    most,
    seeing_prefix,
    weighted_mean,
)
from costmodel.techniques.kv_scoring import compact, map_scores, merge, norm_scores, row_scores

SCORES: Final = ("none", "rows", "map", "key_norm")
PLACES: Final = ("token", "layer", "head")
OBSERVED_ROWS: Final = 32.0
"""Queries at the end of the prompt that score the others (SparseMM and SnapKV: a window of 32)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVEvict:
    """Keep a budget of the prompt's keys and values.

    Prefill is not faster: it runs whole, and scoring makes it longer. Its peak memory is that of the whole cache,
    unless each layer evicts as it goes. Generated tokens are added as before.

    Parameters
    ----------
    keep : float or ndarray
        Budget as a share of the prompt, the mean over layers and heads.
    tokens : float, ndarray or None
        Budget in tokens a layer and head, in place of `keep`.
    by : {"token", "layer", "head"}
        What budgets differ by.
    layers, heads : tuple of float
        Budget of each layer, or key head of a layer, as a multiple of `keep` (of mean one, if `keep` is to be the
        mean); a list of another length is stretched. None is above the whole prompt.
    head_share : float
        Share of every layer's key heads that are evicted from; the others keep everything, in an entry of their own.
    window : float or ndarray
        Most recent tokens, kept whole on top of the budget.
    text_keep : float, ndarray or None
        Budget of tokens that are not visual, where it differs.
    visual_only : bool
        Whether visual tokens alone are evicted.
    score : {"none", "rows", "map", "key_norm"}
        What chooses: nothing that costs, attention rows of an observation window, column sums of the whole map, or
        similarity and norms of what is cached.
    score_rows : float or ndarray
        Rows of the observation window.
    merges : bool
        Whether evicted tokens are merged into kept ones by similarity.
    ragged : bool
        Whether kernels read heads of different lengths; otherwise each is padded to the longest head.
    during_prefill : bool
        Whether a layer evicts before the next one runs, so that no more than one layer's full cache is held.
    masked : bool
        Whether tokens are only masked, which saves nothing.

    Notes
    -----
    A step's attention is linear in its keys, so layers of one kind are one entry at the mean of their budgets. Under
    tensor parallelism heads are dealt out in order, and the device with most tokens sets time and memory.
    """

    keep: Quantity = 1.0
    tokens: Quantity | None = None
    by: Literal["token", "layer", "head"] = "token"
    layers: tuple[float, ...] = ()
    heads: tuple[float, ...] = ()
    head_share: float = 1.0
    window: Quantity = 0.0
    text_keep: Quantity | None = None
    visual_only: bool = False
    score: Literal["none", "rows", "map", "key_norm"] = "none"
    score_rows: Quantity = OBSERVED_ROWS
    merges: bool = False
    ragged: bool = True
    during_prefill: bool = False
    masked: bool = False
    name: str = "kv_evict"

    def __post_init__(self) -> None:
        """Refuse what no cache can do."""
        for field in ("keep", "text_keep"):
            check_share("KVEvict", field, getattr(self, field), zero=True)
        check_share("KVEvict", "head_share", self.head_share)
        check_scalar("KVEvict", "head_share", self.head_share)
        for field in ("tokens", "window"):
            check_count("KVEvict", field, getattr(self, field))
        check_count("KVEvict", "score_rows", self.score_rows, least=1)
        check_choice("KVEvict", "score", self.score, SCORES)
        check_choice("KVEvict", "by", self.by, PLACES)
        for field, place in (("layers", "layer"), ("heads", "head")):
            given = tuple(getattr(self, field))
            object.__setattr__(self, field, given)
            if given and self.by != place:
                raise ValueError(f"KVEvict.{field}={given[:3]}… needs by={place!r}, not {self.by!r}; set by={place!r}")
            for value in given:
                check_count("KVEvict", field, value)
        if self.tokens is not None and not is_one(self.keep):
            raise ValueError(f"KVEvict.tokens={self.tokens} and keep={self.keep} are two budgets; give one of them")
        if self.visual_only and self.text_keep is not None:
            raise ValueError(f"KVEvict.text_keep={self.text_keep} contradicts visual_only; leave one of them out")

    @property
    def slot(self) -> str:
        """The place it takes."""
        return "kv tokens"

    @property
    def needs_attention_map(self) -> Literal["none", "rows", "full"]:
        """Which attention scores it must see."""
        found: dict[str, Literal["rows", "full"]] = {"rows": "rows", "map": "full"}
        return found.get(self.score, "none")

    @property
    def needs(self) -> frozenset[str]:
        """What it needs of model and request."""
        return frozenset()

    @property
    def stages(self) -> str:
        """The part of the query that it edits."""
        return "kv"

    @property
    def _is_neutral(self) -> bool:
        uniform = is_one(self.keep) and is_one(self.text_keep) and self.tokens is None
        return uniform and not (self.layers or self.heads or self.merges or self.score != "none")

    def apply(self, query: Query) -> Query:
        """Return the query with less in its cache, and what choosing costs."""
        if self._is_neutral:
            return query
        prompt = Prompt.of(query)
        kept: list[KVEntry] = []
        operators: list[Operator] = []
        peaks: list[Quantity] = [0.0]
        prefix: list[tuple[float, Quantity]] = []
        first = 0
        for entry in query.kv if self.layers else cache_groups(query):
            last = first + entry.n_layers
            if not is_cache(entry):
                kept.append(entry)
            else:
                spared, cut = self._split(entry, query)
                after, share = self._cut(cut, prompt, query, (first, last))
                kept += [*spared, cut if self.masked else after]
                prefix += [(e.n_layers * key_heads(e.mixer), 1.0) for e in spared]
                prefix.append((cut.n_layers * key_heads(cut.mixer), 1.0 if self.masked else share))
                work, peak = self._work(cut, after, prompt, query)
                operators += work
                peaks.append(peak)
            first = last
        added = (Overhead("prefill", tuple(operators), most(peaks)),) if operators else ()
        decoder = seeing_prefix(query, weighted_mean(prefix))
        return replace(query, kv=tuple(kept), decoder=decoder, overheads=query.overheads + added)

    def _split(self, entry: KVEntry, query: Query) -> tuple[tuple[KVEntry, ...], KVEntry]:
        """Return the part of an entry whose heads keep everything, and the part that is evicted from."""
        mixer, tp = entry.mixer, query.parallelism.tp
        if self.head_share == 1:
            return (), entry
        if not isinstance(mixer, AttentionSpec):
            raise Unsupported(f"KVEvict.head_share needs heads with keys of their own, not {mixer.label} attention")
        chosen = round(self.head_share * mixer.kv_heads)
        others = mixer.kv_heads - chosen
        if chosen % tp or others % tp or not chosen or not others:
            raise ValueError(
                f"KVEvict.head_share={self.head_share} takes {chosen} of {mixer.kv_heads} key heads, and {tp} devices "
                "must each get the same number of both kinds; use another share or fewer devices"
            )
        group = mixer.heads // mixer.kv_heads
        parts = (replace(mixer, heads=n * group, kv_heads=n) for n in (others, chosen))
        spared, cut = (replace(entry, mixer=part) for part in parts)
        return (spared,), cut

    def _cut(self, entry: KVEntry, prompt: Prompt, query: Query, layers: tuple[int, int]) -> tuple[KVEntry, Quantity]:
        """Return an entry after eviction, and the share of the prompt that it kept."""
        visual, other = prompt.seen_in(entry)
        base = visual if self.visual_only else visual + other
        profile = self._profile(entry, query, layers)
        seen = self._share(self.keep, base, profile)
        if self.visual_only:
            said: Quantity = 1.0
        else:
            said = seen if self.text_keep is None else self._share(self.text_keep, base, profile)
        evicted = 0.0 if self.during_prefill else 1.0
        share = (visual * seen + other * said) / np.maximum(visual + other, 1.0)
        after = replace(
            entry,
            visual_share=entry.visual_share * seen,
            text_share=entry.text_share * said,
            cross_share=entry.cross_share * seen,
            fixed_tokens=entry.fixed_tokens * said,
            prefix_share=entry.prefix_share * share,
            visual_evicted=entry.visual_evicted + entry.visual_share * (1.0 - seen) * evicted,
            text_evicted=entry.text_evicted + entry.text_share * (1.0 - said) * evicted,
            evicted=True,
        )
        return after, share

    def _share(self, keep: Quantity, tokens: Quantity, profile: Array | None) -> Quantity:
        """Return the share that is kept of so many tokens: the mean over budgets, none of which exceeds them."""
        tokens = np.maximum(tokens, 1.0)
        budget = keep if self.tokens is None else self.tokens / tokens
        window = self.window / tokens
        if profile is None:
            return np.minimum(budget + window, 1.0)
        window = np.reshape(window, (*np.shape(window), *(1,) * profile.ndim))
        each = np.minimum(np.multiply.outer(budget, profile) + window, 1.0)
        if self.layers:
            return _plain(each.mean(axis=-1))
        return _plain(each.max(axis=-1) if not self.ragged else each.mean(axis=-1).max(axis=-1))

    def _profile(self, entry: KVEntry, query: Query, layers: tuple[int, int]) -> Array | None:
        """Return the multiples of the budget: one a layer of the entry, or by device and its heads."""
        first, last = layers
        cache, n_layers, tp = query.model.cache, query.model.decoder.n_layers, query.parallelism.tp
        if self.layers:
            if sum(e.n_layers for e in query.kv) != n_layers:
                raise Unsupported("KVEvict.layers needs one cache entry a layer; evict before heads or modalities part")
            key = ("layer budgets", self.layers, n_layers)
            return remember(cache, key, lambda: _stretched(self.layers, n_layers))[first:last]
        if not self.heads:
            return None
        n_heads = key_heads(entry.mixer)
        return remember(
            cache, ("head budgets", self.heads, n_heads, tp, self.ragged), lambda: self._by_device(n_heads, tp)
        )

    def _by_device(self, n_heads: int, n_devices: int) -> Array:
        """Return the multiples of the budget of a layer's heads, where they are read at their own length by device."""
        each = _stretched(self.heads, n_heads)
        if not self.ragged:
            return each
        return _stretched(tuple(each), math.lcm(n_heads, n_devices)).reshape(n_devices, -1)

    def _work(self, before: KVEntry, after: KVEntry, prompt: Prompt, query: Query) -> tuple[list[Operator], Quantity]:
        """Return what choosing among the tokens of an entry costs, and its peak [bytes]."""
        if self.score == "none" and not self.merges and self.masked:
            return [], 0.0
        visual, other = prompt.seen_in(before)
        seen, said = prompt.seen_in(after)
        tokens, kept = visual + other, seen + said
        held = Held.of(query, before.mixer, before.n_layers, bytes_each=before.bytes_each, tokens=tokens)
        operators, peak = self._scores(held, query)
        if self.merges:
            merging, merge_peak = merge(held, kept, np.maximum(tokens - kept, 0.0))
            operators, peak = operators + merging, np.maximum(peak, merge_peak)
        if self.masked:
            return operators, peak
        one_layer = held.at_once * (tokens - kept) * (cached_width_on_device(before.mixer, query.parallelism.tp))
        peak = peak + one_layer * before.bytes_each * self.during_prefill
        return operators + compact(held, np.minimum(kept, held.tokens)), peak

    def _scores(self, held: Held, query: Query) -> tuple[list[Operator], Quantity]:
        if self.score == "rows":
            return row_scores(held, np.minimum(self.score_rows, held.tokens))
        if self.score == "map":
            return map_scores(held, full_square=query.engine.counts_full_square)
        return norm_scores(held) if self.score == "key_norm" else ([], 0.0)


def _stretched(values: tuple[float, ...], length: int) -> Array:
    """Return a list at another length: each place takes the value that stands where it does."""
    return np.array(values)[np.arange(length) * len(values) // length]


def _plain(value: Any) -> Quantity:  # noqa: ANN401 - what numpy gives back
    return value if np.ndim(value) else float(value)
