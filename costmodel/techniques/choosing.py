"""What reducing tokens costs by the place where it happens: scores, merges, the gather, all places of a schedule."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from costmodel.base import Quantity
from costmodel.errors import Unsupported
from costmodel.memo import remember
from costmodel.query import Overhead, Query, Stage
from costmodel.sums import busiest_share, encoder_passes
from costmodel.techniques import scoring
from costmodel.techniques.scoring import Heads, Score, Selection

Cut: TypeAlias = tuple[int, Quantity]
"""Layers in front of a place, and the share of the tokens that stays behind it."""


@dataclass(frozen=True, slots=True)
class Chooser:
    """How tokens are chosen; the fields are those of `TokenReduce`."""

    score: Score
    score_rows: Quantity | None
    score_groups: Quantity
    merges: bool

    def in_decoder(
        self, query: Query, cuts: Sequence[Cut], text_keep: Quantity, *, each_step: bool
    ) -> tuple[Overhead, ...]:
        """Return what choosing costs inside the language model, each time among what the places before it left.

        Parameters
        ----------
        cuts : sequence of (int, float or ndarray)
            The places.
        text_keep : float or ndarray
            Share of the other tokens that stays.
        each_step : bool
            Whether every decode step chooses again.
        """
        visual = query.visual_tokens * (query.decoder[0].visual_keep + query.decoder[0].injected)
        other = query.media.marker_tokens + query.turns[0].text_tokens
        active = _active(query, cuts, text_keep)
        width, n_rounds = float(query.model.decoder.width), sum(active, start=0.0)
        chosen = Selection(_rounds(visual, cuts, active), query.replica_batch, width, self.score_groups, n_rounds)
        contexts = [
            visual + other * takes_place for (visual, _), takes_place in zip(chosen.rounds, active, strict=True)
        ]
        found = [self._decoder_score(query, chosen, contexts), scoring.gather("prefill", chosen)]
        if self.merges:
            found.append(scoring.merge("prefill", chosen))
        return (*_by_stage(found), *((_step(query, chosen, contexts),) if each_step else ()))

    def outside(self, query: Query, cuts: Sequence[Cut], *, behind_adapter: bool) -> tuple[Overhead, ...]:
        """Return what choosing costs in the encoder, behind it, or behind the adapter."""
        vision, media = query.model.vision, query.media
        requests = query.replica_batch * busiest_share(query)
        if behind_adapter or vision is None:
            seen, stage, width = query.visual_tokens + media.cross_tokens, STAGE_BEHIND, query.model.decoder.width
            groups = self.score_groups
        else:
            seen, stage, width = media.rows * media.adapter_patch_keep, STAGE_INSIDE, vision.width
            tiles = media.rows**2 / np.maximum(media.pairs, 1.0)  # as many equal tiles have these pairs
            groups = self.score_groups * np.maximum(tiles, 1.0)
        active = _active(query, cuts)
        n_rounds = sum(active, start=0.0)
        chosen = Selection(_rounds(seen, cuts, active), requests, float(width), groups, n_rounds)
        reads_encoder = self.score in scoring.BY_ENCODER
        found = [self._encoder_score(query, n_rounds) if reads_encoder else self._scored(stage, chosen)]
        found.append(scoring.gather(stage, chosen))
        if self.merges:
            found.append(scoring.merge(stage, chosen))
        return _by_stage(found)

    def _scored(self, stage: Stage, chosen: Selection) -> Overhead:
        if self.score == "cosine":
            return scoring.cosine(stage, chosen, self.score_rows)
        return scoring.BY_NAME[self.score](stage, chosen)

    def _decoder_score(self, query: Query, chosen: Selection, contexts: list[Quantity]) -> Overhead:
        if self.score in scoring.BY_ENCODER:
            return self._encoder_score(query, chosen.n_rounds)
        if self.score not in scoring.BY_DECODER:
            return self._scored("prefill", chosen)
        heads, rounds, requests = _decoder_heads(query), chosen.n_rounds, chosen.requests
        if self.score == "llm_rows":
            rows, tokens = 1.0 if self.score_rows is None else self.score_rows, sum(contexts, start=0.0) * requests
            return scoring.attention_rows("prefill", heads, rows=rows, tokens=tokens, rounds=rounds)
        pairs, longest = sum((n * n for n in contexts), start=0.0) * requests, functools.reduce(np.maximum, contexts)
        most = np.minimum(longest * requests, query.engine.prefill_chunk_tokens) * longest
        square = query.engine.counts_full_square
        return scoring.attention_map("prefill", heads, pairs=pairs, peak_pairs=most, square=square, rounds=rounds)

    def _encoder_score(self, query: Query, n_rounds: Quantity) -> Overhead:
        """Return the reading of the attention of one encoder layer: some rows of every tile, or its whole map."""
        active = np.minimum(n_rounds, 1.0)  # read once, whatever is done with it
        pictures = query.replica_batch * busiest_share(query) * active
        heads = _encoder_heads(query)
        if self.score == "encoder_row":
            rows = 1.0 if self.score_rows is None else self.score_rows
            return scoring.attention_rows("encode", heads, rows=rows, tokens=query.media.rows * pictures, rounds=active)
        pairs = query.media.pairs * pictures
        peak = pairs / np.maximum(encoder_passes(query, query.turns[0]), 1.0)
        return scoring.attention_map("encode", heads, pairs=pairs, peak_pairs=peak, square=True, rounds=active)


STAGE_INSIDE: Stage = "encode"
STAGE_BEHIND: Stage = "adapt"


def _rounds(tokens: Quantity, cuts: Sequence[Cut], active: Sequence[Quantity]) -> tuple[tuple[Quantity, Quantity], ...]:
    kept = (1.0, *(keep for _, keep in cuts))
    arriving = [tokens * takes_place for takes_place in active]
    return tuple((n * before, n * after) for n, (before, after) in zip(arriving, pairwise(kept), strict=True))


def _by_stage(found: Sequence[Overhead]) -> tuple[Overhead, ...]:
    """Return overheads of which the first, a score, may belong to a stage before that of the rest."""
    if found[0].stage == found[-1].stage:
        return scoring.together(tuple(found))
    return (found[0], *scoring.together(tuple(found[1:])))


def _step(query: Query, chosen: Selection, contexts: list[Quantity]) -> Overhead:
    """Return what a decode step pays to choose again: a row of attention over all tokens."""
    heads, tokens, rounds = _decoder_heads(query), sum(contexts, start=0.0) * chosen.requests, chosen.n_rounds
    step = scoring.attention_rows("decode", heads, rows=1.0, tokens=tokens, rounds=rounds, name="score.step_rows")
    return replace(step, with_pictures=False)


def _active(query: Query, cuts: Sequence[Cut], text_keep: Quantity = 1.0) -> list[Quantity]:
    """Return one for every place where tokens go, in a sweep point by point: else it would pay for nothing."""
    kept, items = (1.0, *(keep for _, keep in cuts)), query.media.items
    if not any(isinstance(value, np.ndarray) for value in (*kept, items, text_keep)):
        first = float(kept[1] < 1.0 or text_keep < 1.0)
        return [first, *(float(after < before) for before, after in pairwise(kept[1:]))]
    pictures = np.asarray(items) > 0
    falls = [np.less(after, before) for before, after in pairwise(kept)]
    falls[0] = falls[0] | np.less(text_keep, 1.0)
    found = [np.asarray(fall & pictures, dtype=float) for fall in falls]
    return [values if values.shape else float(values) for values in found]


def _encoder_heads(query: Query) -> Heads:
    """Return the attention of the encoder's last layer."""
    owner = f"the encoder of {query.model.name}"
    if not query.encoder:
        raise Unsupported(f"{owner} has no layer whose attention could be read; use another score")

    def find() -> Heads:
        return Heads.of(query.encoder[-1].layer.mixer, query.parallelism.encoder, owner)

    return remember(query.model.cache, ("read heads", query.encoder, query.parallelism.encoder), find)


def _decoder_heads(query: Query) -> Heads:
    """Return the first attention of the language model whose rows can be read; recurrences have none."""

    def find() -> Heads:
        mixers = [segment.layer.mixer for segment in query.decoder]
        shown = next((mixer for mixer in mixers if isinstance(mixer, scoring.READABLE)), mixers[0])
        return Heads.of(shown, query.parallelism.tp, f"the language model of {query.model.name}")

    return remember(query.model.cache, ("read heads", query.decoder, query.parallelism.tp), find)
