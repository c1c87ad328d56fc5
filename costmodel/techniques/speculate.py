"""Speculate: a draft proposes tokens, the target verifies them in one step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np

from costmodel.base import Quantity
from costmodel.blocks import Run, Widths, gemm
from costmodel.catalogue import load_model
from costmodel.deployment import Parallelism, check_parallelism
from costmodel.errors import Unsupported
from costmodel.memo import remember
from costmodel.models import ModelSpec
from costmodel.query import (
    KVEntry,
    Overhead,
    Query,
    Segment,
    Stage,
    cache_entries,
    decoder_segments,
    encoder_segments,
)
from costmodel.speculation import Draft, Origin

Part = TypeVar("Part", Segment, KVEntry)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Speculate:
    """Speculative decoding with another model, with the target's first layers, or with a head on the target.

    Parameters
    ----------
    name : str
    draft : str, ModelSpec or None
        A model, or what `load_model` takes. It is deployed as the target, on as many devices as its heads allow.
    layers : int or None
        The target's own first layers, which keep no weights and no cache of their own; verification runs all layers.
    head_layers : int or None
        Layers of a head that is trained on the target's states (EAGLE, arXiv:2401.15077): the target's last kind of
        layer, behind one product that joins state and embedding.
    tokens : float or ndarray
        Tokens that a round proposes one behind another.
    acceptance : float or ndarray
        Chance that a proposed token is accepted if those before it were.
    accepted : float, ndarray or None
        Measured mean of accepted tokens a round, in place of the acceptance; the target's own token is not in it.
    draft_visual_keep : float or ndarray
        Share of the target's visual tokens that the draft sees.
    nodes : float, ndarray or None
        Of a tree, the rows that the target verifies.
    depth : float, ndarray or None
        Passes of the draft in a round: the levels of a tree, or fewer than the tokens where a pass proposes several.
    parallel : bool
        Whether the draft has devices of its own and goes on while the target verifies.
    shares_encoder : bool
        Whether the draft takes the target's visual tokens instead of encoding the pictures by itself.

    Notes
    -----
    No draft, or none of its tokens, is neutral. The first pass of a round also sees the token of the target, which the
    draft has no cache of yet; that second row is left out. A recurrent target would have to keep its state of every
    token until it is accepted: that memory is left out as well.

    References
    ----------
    .. [1] Y. Leviathan et al., "Fast inference from transformers via speculative decoding", ICML 2023.
    .. [2] Y. Ji et al., "SpecVLM", EMNLP 2025 (arXiv:2508.16201): drafts that see a tenth of the visual tokens.
    """

    name: str = "speculate"
    draft: str | ModelSpec | None = None
    layers: int | None = None
    head_layers: int | None = None
    tokens: Quantity = 10.0
    acceptance: Quantity = 0.8
    accepted: Quantity | None = None
    draft_visual_keep: Quantity = 1.0
    nodes: Quantity | None = None
    depth: Quantity | None = None
    parallel: bool = False
    shares_encoder: bool = True

    def __post_init__(self) -> None:
        """Refuse what no round can be."""
        if sum(choice is not None for choice in (self.draft, self.layers, self.head_layers)) > 1:
            raise ValueError("Speculate takes one of draft, layers and head_layers; leave the others out")
        if self.nodes is not None and self.depth is None:
            raise ValueError(f"Speculate.nodes={self.nodes!r} is of a tree; give its depth too")
        _check_between("tokens", self.tokens, 0.0, np.inf)
        _check_between("acceptance", self.acceptance, 0.0, 1.0)
        _check_between("draft_visual_keep", self.draft_visual_keep, 0.0, 1.0)
        for name in ("nodes", "depth", "layers", "head_layers"):
            if getattr(self, name) is not None:
                _check_between(name, getattr(self, name), 1.0, np.inf)
        if self.accepted is not None and not (
            np.all(np.greater_equal(self.accepted, 0.0)) and np.all(np.less_equal(self.accepted, self._levels))
        ):
            raise ValueError(f"Speculate.accepted={self.accepted!r} must lie between 0 and the tokens of a round")

    @property
    def slot(self) -> str:
        """The place it takes."""
        return "draft"

    @property
    def stages(self) -> str:
        """Which state it edits."""
        return "draft"

    @property
    def needs_attention_map(self) -> Literal["none"]:
        """Which attention scores it must see."""
        return "none"

    @property
    def needs(self) -> frozenset[str]:
        """What it needs from model and request."""
        return frozenset()

    @property
    def _levels(self) -> Quantity:
        return self.tokens if self.nodes is None or self.depth is None else self.depth

    def apply(self, query: Query) -> Query:
        """Return the query with a draft."""
        origin = self._origin
        if origin is None or _is_zero(self._levels):
            return query
        passes = self._levels if self.depth is None else self.depth
        proposed, verified = (self.tokens, self.tokens + 1.0) if self.nodes is None else (self.nodes, self.nodes)
        rows = _at_least_one(proposed / _at_least_one(passes))
        draft = Draft(
            query=replace(
                query, **{"overheads": (), **self._seen(query), **self._own(query, rows)}, draft=None, step_rows=rows
            ),
            levels=self._levels,
            passes=passes,
            acceptance=self.acceptance,
            accepted=self.accepted,
            origin=origin,
            parallel=self.parallel,
            own_encoder=origin == "model" and not self.shares_encoder,
        )
        return replace(query, draft=draft, step_rows=verified)

    @property
    def _origin(self) -> Origin | None:
        if self.draft is not None:
            return "model"
        if self.layers is not None:
            return "layers"
        return None if self.head_layers is None else "head"

    def _seen(self, query: Query) -> dict[str, Any]:
        """Return the part of a request that the draft sees."""
        keep = self.draft_visual_keep
        if isinstance(keep, float | int) and keep == 1:
            return {}
        media = query.media
        if not _is_zero(media.block_pairs) or not _is_zero(media.cross_tokens):
            media = replace(media, block_pairs=media.block_pairs * keep**2, cross_tokens=media.cross_tokens * keep)
        return {"visual_tokens": query.visual_tokens * keep, "media": media}

    def _own(self, query: Query, rows: Quantity) -> dict[str, Any]:
        """Return what the draft is made of."""
        if self.draft is not None:
            return self._other_model(query, self.draft)
        if self.layers is not None:
            return self._first_layers(query, self.layers)
        assert self.head_layers is not None  # noqa: S101 - one of them was given
        return self._head(query, self.head_layers, rows)

    def _other_model(self, query: Query, source: str | ModelSpec) -> dict[str, Any]:
        model = load_model(source) if isinstance(source, str) else source
        has_media = not _is_zero(query.media.items)
        if has_media and not self.shares_encoder and model.family != query.model.family:
            raise Unsupported(
                f"{model.name} cuts pictures otherwise than {query.model.name}; use a draft of family "
                f"{query.model.family}, or shares_encoder=True"
            )
        return {
            "model": model,
            "encoder": () if self.shares_encoder else encoder_segments(model, query.engine),
            "decoder": decoder_segments(model, has_media=has_media),
            "kv": cache_entries(model, query.precision.kv_bits, has_media=has_media),
            "parallelism": remember(
                model.cache, ("draft", query.parallelism), lambda: _deployed(model, query.parallelism)
            ),
        }

    def _first_layers(self, query: Query, n_layers: int) -> dict[str, Any]:
        if n_layers >= query.model.decoder.n_layers:
            limit = f"fewer than the {query.model.decoder.n_layers} layers of {query.model.name}"
            raise ValueError(f"Speculate.layers={n_layers!r} must be {limit}; use less")
        decoder, kv = remember(
            query.model.cache,
            ("first", n_layers, query.decoder, query.kv),
            lambda: (_first(query.decoder, n_layers), _first(query.kv, n_layers)),
        )
        return {"encoder": (), "decoder": decoder, "kv": kv}

    def _head(self, query: Query, n_layers: int, rows: Quantity) -> dict[str, Any]:
        model, bits = query.model, query.precision.kv_bits
        decoder, kv = remember(model.cache, ("head", n_layers, bits), lambda: _head_layers(model, n_layers, bits))
        turn, batch = query.turns[0], query.replica_batch
        prompt = query.prompt_tokens - turn.visual_share * query.visual_tokens * (1.0 - self.draft_visual_keep)
        joins = (_join(query, "prefill", batch * prompt), _join(query, "decode", batch * rows))
        return {"encoder": (), "decoder": decoder, "kv": kv, "overheads": joins}


def _head_layers(model: ModelSpec, n_layers: int, kv_bits: float) -> tuple[tuple[Segment, ...], tuple[KVEntry, ...]]:
    """Return layers of the target's last kind, and their cache."""
    entry = cache_entries(model, kv_bits, has_media=True)[-1]
    return (Segment(n_layers, model.decoder.runs[-1].layer),), (replace(entry, n_layers=n_layers),)


def _is_zero(value: Quantity) -> bool:
    return not value.any() if isinstance(value, np.ndarray) else value == 0


def _at_least_one(value: Quantity) -> Quantity:
    return np.maximum(value, 1.0) if isinstance(value, np.ndarray) else max(value, 1.0)


def _join(query: Query, stage: Stage, rows: Quantity) -> Overhead:
    """Return the product that maps an embedding and the target's state to the width of a head."""
    precision, tp, width = query.precision, query.parallelism.tp, query.model.decoder.width
    run = Run(1.0, Widths(precision.weight_bits, precision.activation_bits, precision.kv_bits, tp))
    return Overhead(stage, (gemm(f"{stage}.join", rows, d_in=2 * width, d_out=width / tp, run=run),))


def _deployed(model: ModelSpec, target: Parallelism) -> Parallelism:
    """Return how a draft is deployed beside a target: shared as widely as its heads and layers allow."""
    tp = math.gcd(target.tp, *(run.layer.mixer.heads for run in model.decoder.runs))
    ep = {target.tp: tp, target.tp * target.dp: tp * target.dp}.get(target.ep, 1) if model.routing else 1
    deployed = Parallelism(tp, min(target.pp, model.decoder.n_layers), target.dp, ep, encoder_tp=1)
    check_parallelism(model, deployed)
    return deployed


def _first(parts: tuple[Part, ...], n_layers: int) -> tuple[Part, ...]:
    """Return the parts that the first layers are made of."""

    def taken() -> Iterator[Part]:
        left = n_layers
        for part in parts:
            if left <= 0:
                return
            yield part if part.n_layers <= left else replace(part, n_layers=left)
            left -= part.n_layers

    return tuple(taken())


def _check_between(name: str, value: Quantity, low: float, high: float) -> None:
    if not (np.all(np.greater_equal(value, low)) and np.all(np.less_equal(value, high))):
        rule = f"lie in [{low:g}, {high:g}]" if high < np.inf else f"be {low:g} or more"
        raise ValueError(f"Speculate.{name}={value!r} must {rule}")
