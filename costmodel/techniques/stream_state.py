"""State of a stream: what is kept of an endless video, and the prefill that comes again with every chunk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from costmodel.base import Quantity
from costmodel.blocks import weight_bytes_each
from costmodel.engine import EngineProfile
from costmodel.errors import Unsupported
from costmodel.layers import CrossAttentionSpec, MixerSpec
from costmodel.memo import remember
from costmodel.models import DecoderSpec
from costmodel.operators import Kind, Operator
from costmodel.query import KVEntry, Overhead, Query, Segment, causal_pairs
from costmodel.recurrent import RecurrentSpec
from costmodel.techniques.kv_common import Held, Prompt, check_count, check_scalar, is_cache, state_bytes, times
from costmodel.techniques.kv_scoring import norm_scores

WINDOWS = ("sink_tokens", "text_window", "visual_window_tokens", "budget_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamState:
    """Digest a video chunk by chunk against a state that does not grow.

    The state is sink + windows + budget; each chunk of c tokens is one pass whose queries see it and the chunk itself:
    c f_lin + 2 c (w + c) d. The time to the first token is then that of the whole video so far; `costmodel.streaming`
    says what a viewer sees: frames a second, and the latency of a chunk and of a token.

    Parameters
    ----------
    sink_tokens : float
        First tokens, kept for ever.
    text_window, visual_window_tokens : float
        Most recent text and visual tokens.
    budget_tokens : float
        Compressed memory of what came before the windows; every chunk chooses anew what stays, by norms of the cache.
    chunk_tokens : float
        Tokens of one pass; 0 is the engine's.
    recompute : bool
        Whether the state is computed again for every chunk and every token, instead of being kept.

    Notes
    -----
    Windows are structure and are not swept. Entries that no step reads, or that are on the host, are archives and keep
    everything: retrieve from the cache before its window is set.
    """

    sink_tokens: float = 0.0
    text_window: float = 0.0
    visual_window_tokens: float = 0.0
    budget_tokens: float = 0.0
    chunk_tokens: float = 0.0
    recompute: bool = False
    name: str = "stream_state"

    def __post_init__(self) -> None:
        """Refuse windows that no stream has."""
        for field in (*WINDOWS, "chunk_tokens"):
            check_scalar("StreamState", field, getattr(self, field))
            check_count("StreamState", field, getattr(self, field))
        if self.recompute and not self.state_tokens:
            raise ValueError("StreamState.recompute=True needs a state to compute again; give a window")

    @property
    def slot(self) -> str:
        """The place it takes."""
        return "stream"

    @property
    def needs_attention_map(self) -> Literal["none", "rows", "full"]:
        """Which attention scores it must see."""
        return "none"

    @property
    def needs(self) -> frozenset[str]:
        """What it needs of model and request."""
        return frozenset()

    @property
    def stages(self) -> str:
        """The part of the query that it edits."""
        return "kv"

    @property
    def state_tokens(self) -> float:
        """Tokens of the state between chunks."""
        return self.sink_tokens + self.text_window + self.visual_window_tokens + self.budget_tokens

    def apply(self, query: Query) -> Query:
        """Return the query with bounded caches, chunked prefill, and what the state costs each chunk."""
        if not (self.state_tokens or self.chunk_tokens):
            return query
        if any(isinstance(entry.mixer, CrossAttentionSpec) for entry in query.kv):
            raise Unsupported(f"{query.model.name} keeps pictures in cross-attention, for which no stream is modelled")
        engine = self._engine(query)
        if not self.state_tokens:
            return replace(query, engine=engine)
        chunk = engine.prefill_chunk_tokens
        prompt = Prompt.of(query)
        total = prompt.visual + prompt.other
        chunks = np.ceil(total / chunk)
        each, step = self._work(query, np.minimum(total, chunk), chunks)
        added = tuple(Overhead(s, tuple(work)) for s, work in (("prefill", each), ("decode", step)) if work)  # type: ignore[arg-type]
        return replace(
            query,
            engine=engine,
            kv=tuple(self._bounded(entry) for entry in query.kv),
            decoder=tuple(_windowed(segment, self.state_tokens + chunk) for segment in query.decoder),
            overheads=query.overheads + added,
        )

    def _engine(self, query: Query) -> EngineProfile:
        """Return the engine with passes of a chunk."""
        engine, chunk = query.engine, self.chunk_tokens
        if not chunk or chunk >= engine.prefill_chunk_tokens:
            return engine
        update = {"prefill_chunk_tokens": chunk, "encoder_chunk_tokens": min(chunk, engine.encoder_chunk_tokens)}
        key = ("streaming engine", id(engine), chunk)
        made: tuple[EngineProfile, EngineProfile] = remember(
            query.model.cache, key, lambda: (engine.model_copy(update=update), engine)
        )
        return made[0]

    def _bounded(self, entry: KVEntry) -> KVEntry:
        """Return an entry with its part of the state; the next token is beside it."""
        if not is_cache(entry) or entry.placement != "gpu":
            return entry
        text, visual = self.sink_tokens + self.text_window, self.visual_window_tokens + self.budget_tokens
        part = text * (not _none(entry.text_share)) + visual * (not _none(entry.visual_share))
        return replace(entry, mixer=_cut(entry.mixer, part + 1.0))

    def _work(self, query: Query, rows: Quantity, chunks: Quantity) -> tuple[list[Operator], list[Operator]]:
        """Return what all chunks, and every step, cost beside their own tokens."""
        state = self.state_tokens
        if self.recompute:
            return _recomputed(query, state, chunks), _recomputed(query, state, 1.0)
        each: list[Operator] = []
        for entry in query.kv:
            if not is_cache(entry) or entry.placement != "gpu":
                continue
            mixer, n_layers = entry.mixer, entry.n_layers
            held = Held.of(query, mixer, n_layers, bytes_each=entry.bytes_each, tokens=state + rows)
            if self.budget_tokens:
                each += [times(operator, chunks) for operator in norm_scores(held)[0]]
            each.append(_moved_positions(held, chunks, rows))
        return each, []


def _none(share: Quantity) -> bool:
    return not isinstance(share, np.ndarray) and share == 0


def _cut(mixer: MixerSpec, window: float) -> MixerSpec:
    return replace(mixer, window=min(mixer.window, window))


def _windowed(segment: Segment, window: float) -> Segment:
    """Return a segment whose queries see the state and their own chunk."""
    layer = segment.layer
    if isinstance(layer.mixer, RecurrentSpec) or layer.mixer.window <= window:
        return segment
    return replace(segment, layer=replace(layer, mixer=_cut(layer.mixer, window)))


def _moved_positions(held: Held, chunks: Quantity, rows: Quantity) -> Operator:
    """Return the rotation of the kept keys to their new positions: read and written once a chunk."""
    keys = held.batch * (held.tokens - rows) * (held.token_bytes / 2)
    moved = chunks * 2.0 * keys
    return Operator("state.positions", Kind.ELEMENTWISE, held.n_layers, kv_bytes=moved, launches=1.0 * chunks)


def _recomputed(query: Query, tokens: float, times: Quantity) -> list[Operator]:
    """Return a prefill of the whole state, so many times."""
    decoder, tp, batch = query.model.decoder, query.parallelism.tp, query.replica_batch
    key = ("layer parameters", id(decoder))
    parameters: float = remember(query.model.cache, key, lambda: _layer_parameters(decoder)) / tp
    pairs = batch * causal_pairs(tokens)
    weights = Operator(
        "state.products",
        Kind.GEMM,
        flops=times * batch * tokens * (2.0 * parameters),
        weight_bytes=times * (parameters * weight_bytes_each(query.precision.weight_bits)),
        activation_bytes=times * batch * tokens * (2.0 * decoder.n_layers * decoder.width * state_bytes(query)),
        launches=times * (4.0 * decoder.n_layers),
        bits=query.precision.activation_bits,
    )
    attention = [
        Operator(
            "state.attention",
            Kind.PREFILL_ATTENTION,
            segment.n_layers,
            flops=times * pairs * (4.0 * segment.layer.mixer.q_width / tp),
            launches=1.0 * times,
        )
        for segment in query.decoder
        if not isinstance(segment.layer.mixer, RecurrentSpec)
    ]
    return [weights, *attention]


def _layer_parameters(decoder: DecoderSpec) -> float:
    return float(sum(run.active_parameters for run in decoder.runs))
