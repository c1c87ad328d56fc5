"""Retrieval from the cache: everything is kept, on the device or its host, and a part of it is read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final, Literal

import numpy as np

from costmodel.base import Quantity
from costmodel.blocks import host_copy
from costmodel.errors import Unsupported
from costmodel.operators import Kind, Operator
from costmodel.query import KVEntry, Overhead, Query, Stage
from costmodel.techniques.kv_common import (
    Held,
    Prompt,
    as_number,
    cache_groups,
    check_choice,
    check_count,
    check_share,
    is_cache,
    is_one,
    seeing_prefix,
    state_bytes,
    times,
    weighted_mean,
)
from costmodel.units import UNBOUNDED

FRAME_TOKENS: Final = 196.0
"""Tokens of a chunk where none are named: a frame of LLaVA-OneVision, which ReKV retrieves one by one."""
SCORE_BYTES: Final = 4
"""One score of a chunk, kept at 32 bits [bytes]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVRetrieve:
    """Keep all visual keys and values, and let steps read those of the chunks that matter for a question.

    Parameters
    ----------
    read : float or ndarray
        Share of the visual tokens that is read.
    tokens : float, ndarray or None
        The same in tokens, in place of `read`.
    window : float or ndarray
        Most recent visual tokens, read on top of them.
    placement : {"gpu", "host"}
        Where the rest is kept. From the host, chunks come over the link layer by layer, r 2 L d_kv B bytes; on the
        device they are gathered, once a turn, into a copy that steps read.
    chunk_tokens : float or ndarray
        Tokens that are chosen together, and scored by the mean of their keys.
    scorer : {"mean_key", "external"}
        What scores chunks: queries against mean keys in every layer, or a model of its own.
    each : {"turn", "step"}
        How often it chooses: for every question, or for every token.
    overlap : bool
        Whether copies run beside the layers before.
    retriever_flops, retriever_bytes : float or ndarray
        Work of an external scorer each time [FLOP], and its weights on the device [bytes].
    during_prefill : bool
        Whether the cache leaves the device while prefill runs (its window is short); otherwise it is held till the end.
    spare_evicted : bool
        Whether entries that an eviction has cut are left alone: retrieval for the other heads.

    Notes
    -----
    Text and generated tokens are always read. Layers with a window of their own are local already and left alone.
    """

    read: Quantity = 1.0
    tokens: Quantity | None = None
    window: Quantity = 0.0
    placement: Literal["gpu", "host"] = "gpu"
    chunk_tokens: Quantity = FRAME_TOKENS
    scorer: Literal["mean_key", "external"] = "mean_key"
    each: Literal["turn", "step"] = "turn"
    overlap: bool = True
    retriever_flops: Quantity = 0.0
    retriever_bytes: Quantity = 0.0
    during_prefill: bool = False
    spare_evicted: bool = False
    name: str = "kv_retrieve"

    def __post_init__(self) -> None:
        """Refuse what cannot be read."""
        check_share("KVRetrieve", "read", self.read, zero=True)
        for name in ("tokens", "window", "retriever_flops", "retriever_bytes"):
            check_count("KVRetrieve", name, getattr(self, name))
        check_count("KVRetrieve", "chunk_tokens", self.chunk_tokens, least=1)
        check_choice("KVRetrieve", "placement", self.placement, ("gpu", "host"))
        check_choice("KVRetrieve", "scorer", self.scorer, ("mean_key", "external"))
        check_choice("KVRetrieve", "each", self.each, ("turn", "step"))
        if self.tokens is not None and not is_one(self.read):
            raise ValueError(f"KVRetrieve.tokens={self.tokens} and read={self.read} say the same; give one of them")
        if self.scorer != "external" and (np.any(self.retriever_flops) or np.any(self.retriever_bytes)):
            raise ValueError('KVRetrieve.retriever_flops and retriever_bytes need scorer="external"; set it')

    @property
    def slot(self) -> str:
        """The place it takes."""
        return "kv read"

    @property
    def needs_attention_map(self) -> Literal["none", "rows", "full"]:
        """Which attention scores it must see."""
        return "none"

    @property
    def needs(self) -> frozenset[str]:
        """What it needs of model and request."""
        return frozenset({"query"})

    @property
    def stages(self) -> str:
        """The part of the query that it edits."""
        return "kv"

    def apply(self, query: Query) -> Query:
        """Return the query whose steps read a part of the cache, and what finding and fetching it costs."""
        if self.placement == "gpu" and is_one(self.read) and self.tokens is None:
            return query
        prompt = Prompt.of(query)
        kept: list[KVEntry] = []
        prefix: list[tuple[float, Quantity]] = []
        costs = _Costs()
        chosen = False
        for entry in cache_groups(query):
            if not self._chooses_in(entry, prompt):
                kept.append(entry)
                prefix.append((entry.n_layers, 1.0))
                continue
            chosen = True
            share = self._share(entry, prompt)
            kept += self._parts(entry, share, prompt)
            visual = prompt.visual_fraction
            prefix.append((entry.n_layers, 1.0 - visual + visual * share))
            own = self._costs(entry, share, prompt, query)
            costs.add(own.times(as_number(share < 1.0)) if _may_read_all(share, self.placement) else own)
        if not chosen:
            raise Unsupported(
                "KVRetrieve finds no layer that keeps all visual tokens; apply it to pictures, before a stream's window"
            )
        return replace(
            query,
            kv=tuple(kept),
            decoder=seeing_prefix(query, weighted_mean(prefix)),
            overheads=query.overheads + self._overheads(query, costs),
        )

    def _chooses_in(self, entry: KVEntry, prompt: Prompt) -> bool:
        seen = np.any(prompt.visual) if entry.mixer.label != "cross" else np.any(prompt.cross)
        local = entry.mixer.window < UNBOUNDED or (self.spare_evicted and entry.evicted)
        return is_cache(entry) and bool(seen) and not local

    def _share(self, entry: KVEntry, prompt: Prompt) -> Quantity:
        """Return the share of an entry's visual tokens that is read."""
        visual = np.maximum(prompt.seen_in(entry)[0], 1.0)
        chosen = self.read if self.tokens is None else self.tokens / visual
        return np.minimum(chosen + self.window / visual, 1.0)

    def _parts(self, entry: KVEntry, share: Quantity, prompt: Prompt) -> list[KVEntry]:
        """Return what is read, and the archive of what is not: on the host a whole one, beside copies of its parts."""
        visual, on_host = prompt.visual_fraction, self.placement == "host"
        archived = 1.0 if on_host else 1.0 - share
        waits = on_host and not self.during_prefill
        near = replace(
            entry,
            visual_share=entry.visual_share * share,
            cross_share=entry.cross_share * share,
            prefix_share=entry.prefix_share * (1.0 - visual + visual * share),
            visual_evicted=entry.visual_evicted + (entry.visual_share * (1.0 - share) if waits else 0.0),
        )
        archive = replace(
            entry,
            visual_share=entry.visual_share * archived,
            text_share=0.0,
            cross_share=entry.cross_share * archived,
            fixed_tokens=0.0,
            read_share=0.0,
            prefix_share=entry.prefix_share * visual * archived,
            placement=self.placement,
            grows=False,
            visual_evicted=0.0,
            text_evicted=0.0,
        )
        return [near, archive]

    def _costs(self, entry: KVEntry, share: Quantity, prompt: Prompt, query: Query) -> _Costs:
        """Return what an entry's layers cost: mean keys, scores, and the way of what is read."""
        costs, turn, alone = _Costs(), query.turns[0], len(query.turns) == 1
        tokens = prompt.seen_in(entry)[0]
        held = Held.of(query, entry.mixer, entry.n_layers, bytes_each=entry.bytes_each, tokens=tokens)
        if self.scorer == "mean_key":
            key_bytes = held.cached_width / 2 * state_bytes(query)
            chunks = held.batch * tokens / self.chunk_tokens
            if alone:
                read = held.batch * tokens * (held.token_bytes / 2) + chunks * key_bytes
                costs.once.append(
                    Operator("retrieve.means", Kind.ELEMENTWISE, held.n_layers, kv_bytes=read, launches=1.0)
                )
            rows = turn.text_tokens if self.each == "turn" else 1.0
            costs.each += _mean_key_scores(held, chunks, rows, key_bytes)
            costs.peak_bytes = costs.peak_bytes + chunks * key_bytes * held.n_layers
        moved = held.batch * share * tokens * held.token_bytes
        if self.placement == "host":
            costs.copies.append(host_copy("retrieve.fetch", moved, messages=1.0, repeats=held.n_layers))
            if alone:
                whole = held.batch * tokens * held.token_bytes
                costs.away.append(host_copy("retrieve.store", whole, messages=1.0, repeats=held.n_layers))
        elif self.each == "turn":
            copy = Operator("retrieve.gather", Kind.ELEMENTWISE, held.n_layers, kv_bytes=2.0 * moved, launches=2.0)
            costs.each.append(copy)
            costs.peak_bytes = costs.peak_bytes + moved * held.n_layers
        return costs

    def _overheads(self, query: Query, costs: _Costs) -> tuple[Overhead, ...]:
        if self.scorer == "external":
            work = Operator(
                "retrieve.external",
                Kind.GEMM,
                flops=query.replica_batch * self.retriever_flops,
                weight_bytes=self.retriever_bytes,
                launches=1.0,
            )
            costs.each.append(work)
            costs.peak_bytes = costs.peak_bytes + self.retriever_bytes
        stage: Stage = "prefill" if self.each == "turn" else "decode"
        found = [
            Overhead("prefill", tuple(costs.once)),
            Overhead("prefill", tuple(costs.away), hidden=self.overlap),
            Overhead(stage, tuple(costs.each), costs.peak_bytes, each_turn=True),
            Overhead(stage, tuple(costs.copies), hidden=self.overlap, each_turn=True),
        ]
        return tuple(overhead for overhead in found if overhead.operators)


@dataclass(slots=True)
class _Costs:
    """What is gathered entry by entry: operators once a request, copies to the host, each time, from it; memory."""

    once: list[Operator] = field(default_factory=list)
    away: list[Operator] = field(default_factory=list)
    each: list[Operator] = field(default_factory=list)
    copies: list[Operator] = field(default_factory=list)
    peak_bytes: Quantity = 0.0

    def times(self, factor: Quantity) -> _Costs:
        """Return them multiplied."""
        once, away, each, copies = (
            [times(operator, factor) for operator in operators]
            for operators in (self.once, self.away, self.each, self.copies)
        )
        return _Costs(once, away, each, copies, self.peak_bytes * factor)

    def add(self, other: _Costs) -> None:
        """Add those of other layers."""
        self.once += other.once
        self.away += other.away
        self.each += other.each
        self.copies += other.copies
        self.peak_bytes = self.peak_bytes + other.peak_bytes


def _may_read_all(share: Quantity, placement: str) -> bool:
    """Return whether a sweep may hold points that read everything, where a single such point changes nothing."""
    return isinstance(share, np.ndarray) and placement == "gpu"


def _mean_key_scores(held: Held, chunks: Quantity, rows: Quantity, key_bytes: float) -> list[Operator]:
    """Return the scores of queries against the chunks' mean keys, and the choice among them."""
    product = Operator(
        "retrieve.scores",
        Kind.GEMM,
        held.n_layers,
        flops=rows * chunks * (2.0 * held.query_width),
        kv_bytes=chunks * key_bytes,
        activation_bytes=held.batch * rows * held.query_width * SCORE_BYTES / 2,
        launches=1.0,
    )
    ranked = rows * chunks * (held.heads * SCORE_BYTES * 2)
    return [product, Operator("retrieve.rank", Kind.ELEMENTWISE, held.n_layers, activation_bytes=ranked, launches=1.0)]
