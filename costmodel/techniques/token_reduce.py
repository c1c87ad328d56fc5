"""Fewer visual tokens: in the encoder, behind it, in front of the language model, or from a layer of it on."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, Literal, TypeAlias

import numpy as np

from costmodel.base import Quantity
from costmodel.errors import Unsupported
from costmodel.memo import remember
from costmodel.query import KVEntry, Query, Segment
from costmodel.splitting import layer_number, split_at
from costmodel.techniques import scoring
from costmodel.techniques.checks import anything, check_choice, check_least, check_share, is_one
from costmodel.techniques.choosing import Chooser, Cut
from costmodel.techniques.scoring import Score

Place = Literal["encoder_layer", "encoder_out", "pre_llm", "layer"]
SLOTS: Final[dict[str, str]] = {
    "encoder_layer": "encoder tokens",
    "encoder_out": "encoder output tokens",
    "pre_llm": "visual tokens",
    "layer": "decoder tokens",
}


@dataclass(frozen=True, slots=True)
class TokenReduce:
    """Keeps a share of the visual tokens from some place on.

    Parameters
    ----------
    at : {"pre_llm", "encoder_layer", "encoder_out", "layer"}
        Inside the encoder (the only place that makes encoding cheaper), behind it, behind the adapter, or inside the
        language model, where rows and cache both follow the schedule, layer by layer.
    layer : int or float, optional
        Layers in front of the place, counted from the end where negative; a number between 0 and 1 is a share of the
        depth. For the two places inside a tower.
    keep : float or ndarray
        Share that stays of the tokens that arrive.
    schedule : tuple of (int or float, float or ndarray)
        In place of `layer` and `keep`: layers and the shares of the tokens that entered the tower, falling.
    score : str
        How tokens are chosen; see `costmodel.techniques.scoring`.
    score_rows : float or ndarray, optional
        Rows of attention that are read, one if not given; with "cosine" the pivots, all tokens if not given.
    score_groups : float or ndarray
        Parts of the visual tokens that are compared among themselves alone.
    text_keep : float or ndarray
        Share that stays of the other tokens, from the first place inside the language model on.
    merges : bool
        Whether dropped tokens are merged into kept ones.
    masked : bool
        Whether tokens are masked, not dropped: the method is paid and nothing is saved.
    reprunes : bool
        Whether every decode step chooses anew: the cache keeps all tokens, and steps pay for the score.

    Examples
    --------
    FastV: half of the visual tokens behind two layers, by the attention of the last token.

    >>> TokenReduce(at="layer", layer=2, keep=0.5, score="llm_rows").slot
    'decoder tokens'
    """

    at: Place = "pre_llm"
    layer: float | None = None
    keep: Quantity = 1.0
    schedule: tuple[tuple[float, Quantity], ...] = ()
    score: Score = "none"
    score_rows: Quantity | None = None
    score_groups: Quantity = 1.0
    text_keep: Quantity = 1.0
    merges: bool = False
    masked: bool = False
    reprunes: bool = False
    name: str = "TokenReduce"

    def __post_init__(self) -> None:
        """Refuse what cannot be, or would be ignored."""
        check_choice(self.name, "at", self.at, SLOTS)
        check_choice(self.name, "score", self.score, scoring.SCORES)
        check_share(self.name, "keep", self.keep)
        check_share(self.name, "text_keep", self.text_keep)
        check_least(self.name, "score_rows", self.score_rows, 1, "leave it out for the method's own")
        check_least(self.name, "score_groups", self.score_groups, 1, "one group is all tokens")
        inside = self.at in ("layer", "encoder_layer")
        if inside != (self.layer is not None or bool(self.schedule)):
            rule = "needs layer or schedule" if inside else "takes neither layer nor schedule"
            raise ValueError(f"{self.name}.at={self.at!r} {rule}; at='layer' and 'encoder_layer' are inside a tower")
        if self.schedule:
            self._check_schedule()
        if self.at != "layer" and (self.reprunes or not is_one(self.text_keep)):
            raise ValueError(f"{self.name}.at={self.at!r} takes no text_keep and no reprunes; use at='layer'")
        if self.at != "layer" and self.score in scoring.BY_DECODER:
            raise ValueError(f"{self.name}.score={self.score!r} is known inside the language model; use at='layer'")

    def _check_schedule(self) -> None:
        if self.layer is not None or not is_one(self.keep):
            raise ValueError(f"{self.name}.schedule replaces layer and keep; give one or the other")
        before: Quantity = 1.0
        for _, keep in self.schedule:
            check_share(self.name, "schedule", keep, zero=True)
            if np.any(np.asarray(keep) > before):
                raise ValueError(f"{self.name}.schedule={keep!r} must not rise; a token that was dropped stays away")
            before = keep

    @property
    def slot(self) -> str:
        """The place it takes: two that reduce at one place exclude each other."""
        return SLOTS[self.at]

    @property
    def needs_attention_map(self) -> Literal["none", "rows", "full"]:
        """Which attention scores it must see."""
        if self.score in ("encoder_row", "llm_rows"):
            return "rows"
        return "full" if self.score in ("encoder_map", "llm_map") else "none"

    @property
    def needs(self) -> frozenset[str]:
        """What it needs of the model and the request."""
        if self.score in scoring.BY_ENCODER:
            return frozenset({"vit_attention"})
        return frozenset({"query"}) if self.score in scoring.BY_DECODER else frozenset()

    @property
    def stages(self) -> str:
        """Which state it edits."""
        return "layers" if self.at == "layer" else "visual_tokens"

    def apply(self, query: Query) -> Query:
        """Return the query with fewer tokens, and with what choosing them costs."""
        if not anything(query.media.items) or (self._keeps_all and is_one(self.text_keep)):
            return query
        if self.at == "layer":
            return self._in_decoder(query)
        return self._in_encoder(query) if self.at == "encoder_layer" else self._outside(query, ((0, self.keep),))

    @property
    def _chooser(self) -> Chooser:
        return Chooser(self.score, self.score_rows, self.score_groups, self.merges)

    @property
    def _keeps_all(self) -> bool:
        return is_one(self.keep) and all(is_one(keep) for _, keep in self.schedule)

    def _cuts(self, n_layers: int, tower: str) -> tuple[Cut, ...]:
        """Return the places where tokens go, in order, without those where none does."""
        if not self.schedule:
            return ((layer_number(f"{self.name}.layer", self.layer or 0, n_layers, tower), self.keep),)
        cuts = [(layer_number(f"{self.name}.schedule", at, n_layers, tower), keep) for at, keep in self.schedule]
        if any(first >= second for (first, _), (second, _) in pairwise(cuts)):
            raise ValueError(f"{self.name}.schedule names layers {[at for at, _ in cuts]}; they must rise")
        if not is_one(self.text_keep):
            return tuple(cuts)
        kept = (1.0, *(keep for _, keep in cuts))
        return tuple(cut for cut, before in zip(cuts, kept, strict=False) if _differ(cut[1], before))

    # Inside the language model

    def _in_decoder(self, query: Query) -> Query:
        if not anything(query.visual_tokens):
            rule = "prunes visual tokens of the language model, and here pictures reach cross-attention alone"
            raise Unsupported(f"{self.name} {rule}; use at='encoder_out' or 'pre_llm' on {query.model.name}")
        n_layers = sum(segment.n_layers for segment in query.decoder)
        if n_layers != sum(entry.n_layers for entry in query.kv):
            raise ValueError(f"{self.name} must come before techniques that split the cache by heads; put it first")
        cuts = self._cuts(n_layers, f"decoder of {query.model.name}")
        added = self._chooser.in_decoder(query, cuts, self.text_keep, each_step=self.reprunes)
        overheads = (*query.overheads, *added)
        if self.masked:
            return replace(query, overheads=overheads)
        decoder, kv = _remembered(query, cuts, self.text_keep, cached=not self.reprunes)
        return replace(query, decoder=decoder, kv=kv, overheads=overheads)

    # Outside it

    def _in_encoder(self, query: Query) -> Query:
        vision = query.model.vision
        n_layers = sum(segment.n_layers for segment in query.encoder)
        cuts = self._cuts(n_layers, f"encoder of {query.model.name}")
        changed = self._outside(query, cuts)
        if self.masked or vision is None:
            return changed
        return replace(changed, encoder=_thinned(query, cuts))

    def _outside(self, query: Query, cuts: tuple[Cut, ...]) -> Query:
        """Return the query with fewer tokens in front of the language model."""
        added = self._chooser.outside(query, cuts, behind_adapter=self.at == "pre_llm")
        overheads, keep = (*query.overheads, *added), cuts[-1][1]
        if self.masked:
            return replace(query, overheads=overheads)
        factors = {"cross_tokens": keep, "block_pairs": keep * keep}
        if self.at != "pre_llm":
            factors |= {"adapter_keep": keep, "adapter_patch_keep": keep}
        media = query.media.scaled(**factors)
        return replace(query, media=media, visual_tokens=query.visual_tokens * keep, overheads=overheads)


def _differ(keep: Quantity, before: Quantity) -> bool:
    """Return whether tokens go here, in a sweep anywhere."""
    return bool(np.any(np.less(keep, before)))


Layers: TypeAlias = tuple[tuple[Segment, ...], tuple[KVEntry, ...]]


def _remembered(query: Query, cuts: tuple[Cut, ...], text_keep: Quantity, *, cached: bool) -> Layers:
    """Return the thinned layers and caches, from the model's cache where nothing is swept."""
    key: Hashable = ("token_reduce", query.decoder, query.kv, cuts, text_keep, cached)
    if any(isinstance(value, np.ndarray) for value in (text_keep, *(keep for _, keep in cuts))):
        return _layers(query, cuts, text_keep, cached=cached)
    return remember(query.model.cache, key, lambda: _layers(query, cuts, text_keep, cached=cached))


def _layers(query: Query, cuts: tuple[Cut, ...], text_keep: Quantity, *, cached: bool) -> Layers:
    where, visual = [at for at, _ in cuts], (1.0, *(keep for _, keep in cuts))
    text = (1.0, *(text_keep for _ in cuts))
    decoder = tuple(
        replace(
            part,
            visual_keep=part.visual_keep * visual[i],
            text_keep=part.text_keep * text[i],
            injected=part.injected * visual[i],
        )
        if i
        else part
        for i, part in split_at(query.decoder, where)
    )
    if not cached:
        return decoder, query.kv
    kv = tuple(
        replace(part, visual_share=part.visual_share * visual[i], text_share=part.text_share * text[i]) if i else part
        for i, part in split_at(query.kv, where)
    )
    return decoder, kv


def _thinned(query: Query, cuts: tuple[Cut, ...]) -> tuple[Segment, ...]:
    where, kept = [at for at, _ in cuts], (1.0, *(keep for _, keep in cuts))

    def make() -> tuple[Segment, ...]:
        pieces = split_at(query.encoder, where)
        return tuple(replace(part, visual_keep=part.visual_keep * kept[i]) if i else part for i, part in pieces)

    if any(isinstance(keep, np.ndarray) for keep in kept):
        return make()
    return remember(query.model.cache, ("token_reduce", query.encoder, cuts), make)
