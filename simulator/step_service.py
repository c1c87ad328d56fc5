"""The cost model as a service: a plan's step model, its tables read through memory, and the engine's defaults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from costmodel import DoesNotFit, Image, Parallelism, Precision, Unsupported, Video, Workload, build_query
from costmodel.base import Array
from costmodel.layers import CrossAttentionSpec
from costmodel.media import MediaTotals, n_frames
from costmodel.memory import Part, kept_bytes, memory
from costmodel.models import MediaCost, MediaRule
from costmodel.recurrent import RecurrentSpec
from costmodel.step import ReadClass, StepModel
from costmodel.units import CHANNELS, PIXEL_BYTES, UNBOUNDED
from simulator.request import Media
from simulator.service import NO_CAP, Capacity, Chunk, ReadRule
from simulator.serving_plan import ServingPlan
from simulator.step_table import MOST_REMEMBERED, StepTable, work_of
from simulator.topology import Pool

LARGE_DEVICE_BYTES: Final = 70 * 2**30
"""vLLM raises its defaults from here on, except for the A100 (`EngineArgs`, get_batch_defaults)."""
LARGE_SEQUENCES, SMALL_SEQUENCES = 1024, 256
SMALL_CHUNK_TOKENS = 2048
LARGE_CHUNK_TOKENS = 8192
"""Defaults of an API server of vLLM: sequences and tokens of a step."""
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

    Notes
    -----
    The host's time a request (`request_host_s`: tokenising, hand-overs) is no part of a step here: other processes
    spend it while the worker goes on. It delays the request; see `request_s`.
    """

    def __init__(self, model: StepModel, capacity: Capacity) -> None:
        self.model = model
        self.capacity = capacity
        self.rules = tuple(_rule(model, read_class) for read_class in model.read_classes)
        self.request_s = model.request_host_s
        self.preprocess_workers = model.query.engine.preprocessing.workers
        self._windows = [_window(model, segment) for segment in range(model.n_segments)]
        self._encoded: dict[tuple[int, ...], tuple[float, Sequence[MediaCost]]] = {}
        self.table = StepTable(model)
        self._one_line = len(model.read_classes) == 1 and not model.without_line

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
            If the plan has techniques, or the model caches what these sums cannot say.
        DoesNotFit
            If weights do not fit, or leave no room for a cache where the pool runs the language model.
        """
        if plan.techniques:
            raise Unsupported(f"technique {plan.techniques[0].name!r} is not simulated yet; leave techniques out")
        model = StepModel.of(
            plan.model,
            pool.hardware,
            engine=pool.engine,
            precision=Precision(plan.weight_bits, plan.activation_bits, plan.kv_bits),
            parallelism=Parallelism(pool.tp, pool.pp, pool.dp, pool.ep, pool.encoder_tp, pool.encoder_dp),
        )
        return StepService(model, _capacity(model, pool))

    # Steps

    def step_s(self, chunks: Sequence[Chunk], finishing: int, decoding: int, keys: Sequence[float]) -> float:
        """Return the time of a step."""
        model = self.model
        if not chunks:
            return model.decode_step_s(decoding, keys)
        works = [work_of(chunks, window) for window in self._windows]
        sequences = finishing + decoding
        device_s = self.table.chunks_s(works, sequences, decoding, keys)
        return max(device_s, model.floors_s[0]) + model.step_host_s + sequences * model.sequence_host_s

    def decode_steps_s(self, decoding: int, keys: Sequence[float], growth: Sequence[float], k: int) -> Array:
        """Return the times of the next k steps of decoding alone."""
        model = self.model
        if not self._one_line:
            return model.decode_steps_s(decoding, keys, growth, k)
        rest, (line,) = model.lines(decoding, keys)  # the same without copies, for the most common models
        contexts = np.arange(float(k))
        contexts *= growth[0]
        contexts += keys[0]
        contexts /= decoding
        times = line.read_many(contexts)  # type: ignore[union-attr]
        times += rest
        if model.floors_s[1]:
            np.maximum(times, model.floors_s[1], out=times)
        times += model.step_host_s + decoding * model.sequence_host_s
        return times

    # Pictures

    def media(self, item: Media, n_images: int) -> MediaCost:
        """Return what an item is to the model."""
        rule = self._rule
        if isinstance(item, Image):
            cost = rule.image(item.width, item.height, n_images=n_images)
        else:
            cost = rule.video(n_frames(rule, item), item.width, item.height)
        return (cost.executed or cost) if self.model.query.engine.executes_everything else cost

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
            found = self._encoded[key] = self.model.encode_s(_totals(items)), items  # kept, so that ids stay theirs
        return found[0]

    def preprocess_s(self, item: Media, cost: MediaCost) -> float:
        """Return the time of one CPU worker for an item."""
        del cost
        images, videos = ((), (item,)) if isinstance(item, Video) else ((item,), ())
        return self.model.preprocess_s(self.model.media(images, videos))

    # What moves between pools

    @property
    def kv_layers(self) -> int:
        """Layers that hand over their part of the cache one by one."""
        return self.model.structure.n_layers("decode")

    def kv_bytes(self, tokens: int, items: Sequence[MediaCost] = ()) -> float:
        """Return the cache of a sequence of so many tokens, pictures included, on all devices together [bytes]."""
        visual = float(sum(item.visual_tokens for item in items))
        cross = float(sum(item.cross_tokens for item in items))
        held = ((entry, entry.kept_prompt(visual, tokens - visual, cross)) for entry in self.model.structure.kv)
        tp = self.model.query.parallelism.tp
        return float(sum(tp * kept_bytes(entry, kept, tp) for entry, kept in held))

    def embedding_bytes(self, cost: MediaCost) -> float:
        """Return what leaves the encoder for an item: with DeepStack several vectors a token [bytes]."""
        spec = self.model.query.model
        outputs = 1 if spec.adapter is None else spec.adapter.outputs
        vectors = cost.visual_tokens * outputs + cost.cross_tokens
        return vectors * spec.decoder.width * self.model.structure.encoder_widths.state_bytes

    def pixel_bytes(self, cost: MediaCost) -> float:
        """Return the pixels of an item as they leave the CPU [bytes]."""
        return float(cost.resized_pixels * CHANNELS * PIXEL_BYTES)


def _rule(model: StepModel, read: ReadClass) -> ReadRule:
    """Return a read class as a rule of the context alone.

    Raises
    ------
    Unsupported
        If what is read depends on more.
    """
    whole = read.visual_share == read.text_share == 1 and read.grows
    state = read.visual_share == read.text_share == 0 and not read.grows and not read.cross_share
    if not (whole or state) or (whole and read.fixed_tokens):
        name = model.query.model.name
        raise Unsupported(
            f"{name} with caches that keep part of a prompt, or are read by cross-attention, is not simulated"
        )
    share = round(read.read_share * SHARE_STEPS) / SHARE_STEPS
    if state:
        return ReadRule(share=0.0, fixed=share * min(read.fixed_tokens, read.cap))
    return ReadRule(share, NO_CAP if read.cap >= UNBOUNDED else int(read.cap))


def _window(model: StepModel, segment: int) -> float | None:
    """Return the window of a segment's attention; None for a recurrence.

    Raises
    ------
    Unsupported
        If its layers see other tokens than the first ones do, or attend to pictures across.
    """
    spec = model.structure.decoder[segment].layer.mixer
    if isinstance(spec, CrossAttentionSpec):
        raise Unsupported(f"{model.query.model.name} reads pictures by cross-attention, which is not simulated yet")
    if isinstance(spec, RecurrentSpec):
        return None
    return float(spec.window)


def parts_of(pool: Pool) -> tuple[Part, ...]:
    """Return the parts of a model that the devices of a pool hold."""
    language = {"prefill", "decode"} & set(pool.stages)
    held: dict[Part, bool] = {"vision": "encode" in pool.stages, "language": bool(language)}
    return tuple(part for part, is_held in held.items() if is_held)


def _capacity(model: StepModel, pool: Pool) -> Capacity:
    """Return what a worker has room for, with the engine's defaults for the device."""
    device, engine = model.hardware, model.query.engine
    large = device.memory_bytes >= LARGE_DEVICE_BYTES and not device.name.startswith("a100")
    chunk = min(engine.prefill_chunk_tokens, LARGE_CHUNK_TOKENS if large else SMALL_CHUNK_TOKENS)
    budget = pool.token_budget or int(chunk)
    query = build_query(
        model.query.model,
        Workload(text_tokens=float(budget)),
        engine,
        precision=model.query.precision,
        parallelism=model.query.parallelism,
    )
    parts = parts_of(pool)
    held = memory(query, device, parts=parts)
    if not held.kv_blocks and ("language" in parts or not held.fits):
        what = f"{model.query.model.name} with a prompt of {budget} tokens on {device.name}"
        raise DoesNotFit(what, required_bytes=held.peak_bytes, available_bytes=held.usable_bytes)
    return Capacity(
        kv_blocks=held.kv_blocks,
        block_tokens=int(engine.kv_block_tokens) if engine.kv_block_tokens > 1 else 16,
        chunk_tokens=int(chunk),
        max_sequences=LARGE_SEQUENCES if large else SMALL_SEQUENCES,
        encoder_tokens=int(chunk),
    )


_SUMMED: Final = (
    "patches",
    "rows",
    "pairs",
    "window_pairs",
    "visual_tokens",
    "marker_tokens",
    "resized_pixels",
    "cross_tokens",
    "block_pairs",
)


def _totals(items: Sequence[MediaCost]) -> MediaTotals:
    """Return what items are to the encoder together."""
    sums = {name: float(sum([getattr(item, name) for item in items])) for name in _SUMMED}
    made = (item.visual_tokens if item.adapter_tokens is None else item.adapter_tokens for item in items)
    return MediaTotals(
        items=float(len(items)),
        largest_rows=float(max(item.largest_rows for item in items)),
        adapter_tokens=float(sum(made)),
        item_rows=tuple(float(item.rows) for item in items),
        **sums,  # type: ignore[arg-type]
    )
