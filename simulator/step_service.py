"""The cost model as a service: a plan's step model, its tables read through memory, and the engine's defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from costmodel import (
    Image,
    Unsupported,
    Video,
    load_hardware,
)
from costmodel.base import Array
from costmodel.layers import CrossAttentionSpec
from costmodel.media import n_frames
from costmodel.memory import kept_bytes
from costmodel.models import MediaCost, MediaRule
from costmodel.query import KVEntry, Query
from costmodel.recurrent import RecurrentSpec
from costmodel.step import StepModel
from costmodel.units import CHANNELS, PIXEL_BYTES, UNBOUNDED
from simulator.capacity import asking_of, capacity_of
from simulator.columns import Added, added_once, has_seconds, prompts_of
from simulator.dealing import busiest
from simulator.item_times import ItemTimes, totals
from simulator.prompt import Chunk, Prompts
from simulator.prompting import SECONDS, Asking, Columns, beside_example, example_query
from simulator.request import Ints, Media, Requests, requests_of
from simulator.service import NO_CAP, Capacity, ReadRule
from simulator.serving_plan import ServingPlan
from simulator.step_table import MOST_REMEMBERED
from simulator.step_times import StepTimes
from simulator.topology import Pool

SHARE_STEPS: Final = 2.0**20
"""Shares are rounded to this fraction: then sums of keys are exact, and leaps are steps bit by bit."""


class StepService:
    """Times of the workers of a pool; see `simulator.service.Service`.

    Parameters
    ----------
    model : StepModel
        Steps of one worker.
    capacity : Capacity
        What it has room for.
    asking : Asking, optional
        How requests become queries, where there are techniques.
    """

    def __init__(self, model: StepModel, capacity: Capacity, asking: Asking | None = None) -> None:
        self.model = model
        self.capacity = capacity
        query = model.query
        self.asking = asking or Asking(query.model, query.engine, query.precision, query.parallelism)
        self.ranks = query.parallelism.dp
        self.times = StepTimes(model, self.ranks)
        self.request_s = model.request_host_s
        self.preprocess_workers = query.engine.preprocessing.workers
        self.n_caches = len(model.read_classes)
        self.cross = tuple(i for i, e in enumerate(model.structure.kv) if isinstance(e.mixer, CrossAttentionSpec))
        self.without_pictures = self._text_times() if self.cross else self.times
        self.has_seconds = has_seconds(query)
        seconds = (SECONDS, SECONDS) if self.has_seconds else ()
        self.rules = (*(_rule(entry) for entry in model.structure.kv), *seconds)
        self.added = self._added()
        self.items = ItemTimes(self.asking, model.hardware)
        self.shares_prefixes = not self.cross and _keeps_everything(query)
        self._is_plain = not (self.cross or self.asking.techniques)
        self._encoded: dict[tuple[int, ...], tuple[float, Sequence[MediaCost]]] = {}
        self._embedding_bytes: dict[int, tuple[float, MediaCost]] = {}

    @staticmethod
    def of(plan: ServingPlan) -> StepService:
        """Return the service of a plan's first pool; see `of_pool`."""
        return StepService.of_pool(plan, plan.pools[0])

    @staticmethod
    def of_pool(plan: ServingPlan, pool: Pool) -> StepService:
        """Return the service of one pool of a plan: its device holds the parts of the model that its stages need.

        Raises
        ------
        Unsupported
            If techniques of the plan make of a request what these sums cannot say.
        DoesNotFit
            If weights do not fit, or leave no room for a cache where the pool runs the language model.
        """
        asking, device = asking_of(plan, pool), load_hardware(pool.hardware)
        if pool.pp > 1 and asking.model.media and "encode" in pool.stages:
            rule = "would encode on the devices of its first stage alone, which its batches do not share out"
            raise Unsupported(f"pp={pool.pp} of pool {pool.name!r} {rule}; encode in a pool of its own, or use tp")
        model = StepModel.of_query(example_query(asking), device) if asking.techniques else asking.plain_steps(device)
        return StepService(model, capacity_of(plan, pool), asking)

    def _text_times(self) -> StepTimes:
        """Return the steps in which no sequence has a picture: layers of cross-attention do not run."""
        asking = self.asking
        return StepTimes(asking.plain_steps(self.model.hardware, pictures=False), self.ranks)

    def _added(self) -> Added:
        if not self.has_seconds:
            return Added()
        none = np.zeros(0, dtype=np.int64)
        nobody = requests_of(np.zeros(0), none, none)
        return added_once(Columns.of(self.asking, self.model, nobody, (), none))

    # Requests

    def prompts(self, requests: Requests, costs: Sequence[MediaCost], kinds: Ints) -> Prompts | None:
        """Return what it makes of requests; None where a token is a token."""
        model = self.model
        two_way = model.query.model.decoder.bidirectional_media and len(requests.item_kind)
        states = any(isinstance(entry.mixer, RecurrentSpec) for entry in model.structure.kv)
        if not (self.asking.techniques or self.cross or two_way or states):
            return None
        columns = Columns.of(self.asking, model, requests, costs, kinds)
        return prompts_of(columns, all_differ=bool(self.asking.techniques))

    # Steps

    def step_s(self, chunks: Sequence[Chunk], finishing: int, decoding: int, keys: Sequence[float]) -> float:
        """Return the time of a step."""
        if self._is_plain:
            if not chunks:
                return self.times.decode_s(decoding, keys)
            return self.times.chunks_s(chunks, finishing, decoding, keys)
        caches = keys[: self.n_caches] if self.has_seconds else keys
        times, seen = self.times, chunks
        if self.cross and not self._sees(chunks, caches):
            times, caches, seen = self.without_pictures, self._seen(caches), [(a, b, None) for a, b, _ in chunks]
        if not chunks:
            time_s = times.decode_s(decoding, caches)
        else:
            time_s = self._with_late(times.chunks_s(seen, finishing, decoding, caches), chunks)
        if not self.has_seconds:
            return time_s
        behind_s, beside_s = self._seconds(keys)
        return max(time_s + behind_s, beside_s)

    def decode_steps_s(self, decoding: int, keys: Sequence[float], growth: Sequence[float], k: int) -> Array:
        """Return the times of the next k steps of decoding alone."""
        if self._is_plain:
            return self.times.decode_steps_s(decoding, keys, growth, k)
        n = self.n_caches
        caches, more = (keys[:n], growth[:n]) if self.has_seconds else (keys, growth)
        times = self.times
        if self.cross and not self._sees((), caches):
            times, caches, more = self.without_pictures, self._seen(caches), self._seen(more)
        found = times.decode_steps_s(decoding, caches, more, k)
        if not self.has_seconds:
            return found
        behind_s, beside_s = self._seconds(keys)
        return np.maximum(found + behind_s, beside_s)

    def _sees(self, chunks: Sequence[Chunk], keys: Sequence[float]) -> bool:
        """Return whether any sequence of a step has a picture that cross-attention sees."""
        return any(keys[i] for i in self.cross) or any(prompt and prompt.has_cross for _, _, prompt in chunks)

    def _seen(self, keys: Sequence[float]) -> list[float]:
        """Return the keys of caches that are not of cross-attention."""
        return [key for i, key in enumerate(keys) if i not in self.cross]

    def _with_late(self, time_s: float, chunks: Sequence[Chunk]) -> float:
        """Return the time of a step with what techniques add where prompts end in it."""
        late_s = beside_s = 0.0
        for start, tokens, prompt in chunks:
            if prompt is not None and start < prompt.tokens <= start + tokens:
                late_s += prompt.late_s
                beside_s += prompt.beside_s
        waits_s = beside_s - (time_s + late_s + self.request_s) if beside_s else 0.0
        return time_s + late_s + max(waits_s, 0.0)

    def _seconds(self, keys: Sequence[float]) -> tuple[float, float]:
        """Return what techniques add to a step, behind it and beside it [s]."""
        behind_s, beside_s = keys[-2:]
        return (
            behind_s + self.added.once_s if behind_s else 0.0,
            beside_s + self.added.beside_once_s if beside_s else 0.0,
        )

    # Pictures

    def media(self, item: Media, n_images: int) -> MediaCost:
        """Return what an item is to the model."""
        rule = self._rule
        if isinstance(item, Image):
            cost = rule.image(item.width, item.height, n_images=n_images)
        else:
            frames = n_frames(rule, item)
            cost = rule.video(frames, item.width, item.height)
        cost = (cost.executed or cost) if self.model.query.engine.executes_everything else cost
        if self.asking.techniques and isinstance(item, Video):  # some choose among frames
            return replace(cost, frames=frames, frame_pixels=frames * item.width * item.height)
        return cost

    @property
    def _rule(self) -> MediaRule:
        rule = self.model.query.model.media
        if rule is None:
            raise Unsupported(f"{self.model.query.model.name} has no vision part; use text traffic or another model")
        return rule

    def encode_s(self, items: Sequence[MediaCost]) -> float:
        """Return the time of one forward pass of the encoder and the adapter."""
        key = tuple(sorted(map(id, items)))
        found = self._encoded.get(key)
        if found is None:
            if len(self._encoded) >= MOST_REMEMBERED:
                self._encoded.clear()
            own = busiest(items, self.ranks, [float(item.rows) for item in items])
            time_s = self.items.encode_s(own) if self.asking.techniques else self.model.encode_s(totals(own))
            found = self._encoded[key] = time_s, items  # kept, so that ids stay theirs
        return found[0]

    def preprocess_s(self, item: Media, cost: MediaCost) -> float:
        """Return the time of one CPU worker for an item."""
        del cost
        images, videos = ((), (item,)) if isinstance(item, Video) else ((item,), ())
        media = self.model.media(images, videos)
        return self.items.preprocess_s(media) if self.asking.techniques else self.model.preprocess_s(media)

    # What moves between pools

    @property
    def kv_layers(self) -> int:
        """Layers that hand over their part of the cache one by one."""
        return self.model.structure.n_layers("decode")

    def kv_bytes(self, tokens: int, items: Sequence[MediaCost] = ()) -> float:
        """Return the cache of a sequence of so many tokens, pictures included, on all devices together [bytes]."""
        query = beside_example(self.asking, items, tokens)
        other, media, tp = query.media.marker_tokens + query.turns[0].text_tokens, query.media, query.parallelism.tp
        held = ((e, e.kept_prompt(query.visual_tokens, other, media.cross_tokens)) for e in query.kv)
        both = sum((tp * kept_bytes(entry, kept, tp) for entry, kept in held), start=np.zeros(2))
        return float(np.broadcast_to(both, (2,))[0])

    def embedding_bytes(self, cost: MediaCost) -> float:
        """Return what leaves the encoder for an item: with DeepStack several vectors a token [bytes]."""
        found = self._embedding_bytes.get(id(cost))
        if found is None:
            if len(self._embedding_bytes) >= MOST_REMEMBERED:
                self._embedding_bytes.clear()
            found = self._embedding_bytes[id(cost)] = self._embeddings(cost), cost  # kept, so that its id stays its own
        return found[0]

    def _embeddings(self, cost: MediaCost) -> float:
        spec, query = self.model.query.model, self.items.query(cost)
        outputs = 1 if spec.adapter is None else spec.adapter.outputs
        vectors = float(query.visual_tokens) * outputs + float(query.media.cross_tokens)
        return vectors * spec.decoder.width * self.model.structure.encoder_widths.state_bytes

    def pixel_bytes(self, cost: MediaCost) -> float:
        """Return the pixels of an item as they leave the CPU [bytes]."""
        return float(self.items.query(cost).media.resized_pixels) * CHANNELS * PIXEL_BYTES


def _rule(entry: KVEntry) -> ReadRule:
    """Return how steps read a cache entry."""
    share = round(float(entry.read_share) * SHARE_STEPS) / SHARE_STEPS
    window = entry.mixer.window
    if isinstance(entry.mixer, RecurrentSpec):
        return ReadRule(share=0.0, fixed=share * float(np.minimum(entry.fixed_tokens, window)), grows=False)
    return ReadRule(share, NO_CAP if window >= UNBOUNDED else int(window), grows=entry.grows)


def _keeps_everything(query: Query) -> bool:
    """Return whether every token of a prompt is cached, whatever stands behind it."""
    segments = [(s.visual_keep, s.text_keep, 1.0 - s.injected) for s in query.decoder]
    entries = [(e.visual_share, e.text_share) for e in query.kv if e.grows]
    whole = all(np.all(np.equal(value, 1.0)) for row in (*segments, *entries) for value in row)
    unchanged = np.all(np.equal(query.visual_tokens, query.media.visual_tokens))
    return bool(whole and unchanged)
