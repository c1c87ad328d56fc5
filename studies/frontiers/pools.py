"""Stages of one workload on pools of devices: times, batches, bytes that go from pool to pool, and the price.

Nothing queues. A pool is as large as its load, so a device costs what it works; a decoding pool works in batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from costmodel import Precision, Prediction, Video, Workload, load_model, predict
from costmodel.economics import cost_usd
from costmodel.hardware import HardwareProfile
from costmodel.techniques import Technique
from studies.frontiers.common import Numbers

MODEL: Final = "qwen2.5-vl-7b"
ENGINE: Final = "vllm"
VIDEO: Final = Video(1280, 720, 64.0, 24.0, frames=64)
TEXT_TOKENS: Final = 64
OUTPUT_TOKENS: Final = 256
"""The workload, assumed."""
EMBEDDING_BYTES: Final = 2.0
BATCHES: Final = 2.0 ** np.arange(0, 9)
TPOT_S: Final = 0.03
"""Target of a token, assumed [s]."""


@dataclass(frozen=True, slots=True, eq=False)
class Stages:
    """A set of techniques on one device at one width of numbers.

    Parameters
    ----------
    device : HardwareProfile
    one : Prediction
        One request.
    tpot_s : ndarray
        Time of a token at each of `BATCHES` [s].
    """

    device: HardwareProfile
    one: Prediction
    tpot_s: np.ndarray[Any, Any]

    @staticmethod
    def of(device: HardwareProfile, techniques: Sequence[Technique], precision: Precision) -> Stages:
        """Return the stages of the workload."""

        def predicted(batch: Any) -> Prediction:  # noqa: ANN401 - a number or an array
            work = Workload(videos=[VIDEO], text_tokens=TEXT_TOKENS, output_tokens=OUTPUT_TOKENS)
            how = {"techniques": techniques, "precision": precision, "engine": ENGINE, "batch": batch}
            return predict(load_model(MODEL), device, work, **how)

        return Stages(device, predicted(1.0), np.asarray(predicted(BATCHES).tpot_s))

    def seconds(self, *names: str) -> float:
        """Return the time of stages for one request [s]."""
        return sum(self.one.stages[name].time_s for name in names)

    def batch(self, *, alone: bool) -> int:
        """Return the largest batch that fits and meets the target of a token; 0 where none does.

        Parameters
        ----------
        alone : bool
            Whether the device only decodes, and so holds the language model and caches alone.
        """
        held = self.one.memory
        if alone:
            free = held.usable_bytes - held.reserve_bytes - held.language_weights_bytes
            most = max(0.0, free / held.kv_bytes)
        else:
            most = float(self.one.max_batch)
        able = (most >= BATCHES) & (self.tpot_s <= TPOT_S)
        return int(BATCHES[able].max()) if able.any() else 0

    def token_s(self, batch: int) -> float:
        """Return the time of a token of a batch [s]."""
        return float(self.tpot_s[int(math.log2(batch))])

    @property
    def embedding_bytes(self) -> float:
        """What the encoder sends: every visual token that leaves it [bytes]."""
        query = self.one.query
        return float(query.visual_tokens) * query.model.decoder.width * EMBEDDING_BYTES

    @property
    def prompt_kv_bytes(self) -> float:
        """What prefill sends: the prompt's part of the cache of a request, after eviction [bytes]."""
        return self.one.memory.kv_bytes - OUTPUT_TOKENS * self.one.query.model.decoder.kv_bytes_per_token()


def usd(device: HardwareProfile, seconds: float) -> float:
    """Return the price of a device's time; devices without one are not asked."""
    price = cost_usd(device, device_seconds=seconds)
    assert price is not None  # noqa: S101 - DEVICES have prices
    return price


def apart(e: Stages, p: Stages, d: Stages, link: float) -> Numbers | None:
    """Return a request whose stages run on three pools; None where decoding meets no target.

    A transfer holds its sender and its receiver, of a decoding batch one request's share.
    """
    batch = d.batch(alone=True)
    if not batch:
        return None
    embeddings_s, cache_s = e.embedding_bytes / link, p.prompt_kv_bytes / link
    encode_s, prefill_s = e.seconds("encode", "adapt"), p.seconds("prefill")
    decode_s = (OUTPUT_TOKENS - 1) * d.token_s(batch)
    costs = {
        "encode": usd(e.device, encode_s),
        "prefill": usd(p.device, prefill_s),
        "decode": usd(d.device, decode_s / batch),
        "transfer": usd(e.device, embeddings_s)
        + usd(p.device, embeddings_s + cache_s)
        + usd(d.device, cache_s / batch),
    }
    return {
        "ttft_s": encode_s + embeddings_s + prefill_s,
        "second_token_s": cache_s + d.token_s(batch),
        "tpot_s": d.token_s(batch),
        "batch": batch,
        "usd": sum(costs.values()),
        "costs": costs,
        "embeddings_gb": e.embedding_bytes / 1e9,
        "cache_gb": p.prompt_kv_bytes / 1e9,
        "transfer_s": embeddings_s + cache_s,
    }


def together(s: Stages) -> Numbers | None:
    """Return a request whose stages all run on one kind of device, with one copy of the weights."""
    batch = s.batch(alone=False)
    if not batch:
        return None
    stages = ("encode", "adapt", "prefill")
    decode_s = (OUTPUT_TOKENS - 1) * s.token_s(batch)
    first = s.seconds(*stages)
    return {
        "ttft_s": first,
        "second_token_s": s.token_s(batch),
        "tpot_s": s.token_s(batch),
        "batch": batch,
        "usd": usd(s.device, first + decode_s / batch),
    }
