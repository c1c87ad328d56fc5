"""Other ways in which pictures reach a language model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

from costmodel.base import Quantity
from costmodel.blocks import Run, gemm
from costmodel.errors import Unsupported
from costmodel.layers import AttentionSpec
from costmodel.memo import remember
from costmodel.mixers import cache_write, kv_width_on_device
from costmodel.operators import Operator
from costmodel.query import Overhead, Query, Segment
from costmodel.stages import Structure
from costmodel.techniques.checks import anything, check_choice

KINDS: Final = ("none", "cross_inject")


@dataclass(frozen=True, slots=True)
class ArchVariant:
    """Runs text alone through the language model, and shows every layer keys and values of the pictures (HiMix).

    Visual tokens are rows of no layer: no queries, no feed-forward block. Every layer still projects them to keys and
    values, which the cache keeps and every step reads.

    Parameters
    ----------
    kind : {"cross_inject", "none"}
        "none" leaves the model as it is.

    Notes
    -----
    The projections are priced as an overhead of prefill.
    """

    kind: Literal["cross_inject", "none"] = "none"
    name: str = "ArchVariant"

    def __post_init__(self) -> None:
        """Refuse other kinds."""
        check_choice(self.name, "kind", self.kind, KINDS)

    @property
    def slot(self) -> str:
        """The place it takes."""
        return "architecture"

    @property
    def needs_attention_map(self) -> Literal["none", "rows", "full"]:
        """It needs no attention of the model."""
        return "none"

    @property
    def needs(self) -> frozenset[str]:
        """It needs nothing of model or request."""
        return frozenset()

    @property
    def stages(self) -> str:
        """Which state it edits."""
        return "layers"

    def apply(self, query: Query) -> Query:
        """Return the query whose pictures are keys and values alone."""
        if self.kind == "none" or not anything(query.visual_tokens):
            return query
        if not all(isinstance(segment.layer.mixer, AttentionSpec) for segment in query.decoder):
            raise Unsupported(f"{self.name}.kind='cross_inject' is modelled for grouped-query attention alone")
        decoder = remember(query.model.cache, ("cross_inject", query.decoder), lambda: _injected(query.decoder))
        media = query.media.scaled(block_pairs=0.0)
        return replace(query, media=media, decoder=decoder, overheads=(*query.overheads, _projections(query)))


def _injected(decoder: tuple[Segment, ...]) -> tuple[Segment, ...]:
    return tuple(replace(s, visual_keep=0.0, injected=s.injected + s.visual_keep) for s in decoder)


def _projections(query: Query) -> Overhead:
    """Return the keys and values of visual tokens in every layer, and their way into the cache."""
    widths, operators = Structure.of(query).linear_widths, list[Operator]()
    for segment in query.decoder:
        mixer, run = segment.layer.mixer, Run(1.0, widths, segment.n_layers)
        assert isinstance(mixer, AttentionSpec)  # noqa: S101 - the caller asked
        rows: Quantity = query.visual_tokens * segment.visual_keep * query.replica_batch
        cached = 2 * kv_width_on_device(mixer, widths.tp)
        product = gemm("cross_inject.keys", rows, d_in=segment.layer.width, d_out=cached, run=run)
        written = cache_write("cross_inject.cache", rows, rotated=cached / 2 * mixer.rotary, cached=cached, run=run)
        operators += [product, written]
    return Overhead("prefill", tuple(operators), with_pictures=True)
