"""How long things take, as the simulator asks: a protocol, and a linear service for theory and tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from costmodel.base import Array
from costmodel.models import MediaCost
from costmodel.units import CHANNELS, PIXEL_BYTES
from simulator.prompt import Chunk, Prompts
from simulator.request import Ints, Media, Requests

NO_CAP: Final = 1 << 60
"""Keys that no sequence has: the window of attention without one."""


@dataclass(frozen=True, slots=True)
class ReadRule:
    """Keys that decode attention reads of a sequence with context c: fixed + share * min(c + own, cap).

    What a sequence has of its `own` is known when it joins (`simulator.prompt.Prompts.own_keys`): less than none where
    part of its prompt was evicted. Where the cache does not grow, the context does not count, and `own` is within the
    cap; so stand keys of cross-attention, and seconds that techniques add to a step.

    Parameters
    ----------
    share : float
        Share that is read; a multiple of a power of two, so that sums of it are exact in any order.
    cap : int
        Window [tokens].
    fixed : float
        Read whatever the context: the state of a recurrence.
    grows : bool
        Whether the context counts.
    """

    share: float = 1.0
    cap: int = NO_CAP
    fixed: float = 0.0
    grows: bool = True


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a worker has room for.

    Parameters
    ----------
    kv_blocks, block_tokens : int
        Blocks of the cache, and tokens in each.
    chunk_tokens : int
        Default budget of a step [tokens].
    max_sequences : int
        Default of the most sequences that run at once.
    encoder_tokens : int
        Default of the encoder's budget in a step, and of its cache [tokens].
    """

    kv_blocks: int
    block_tokens: int
    chunk_tokens: int
    max_sequences: int
    encoder_tokens: int


class Service(Protocol):
    """Times of one worker [s]; a step is given by sums and by its few chunks."""

    @property
    def rules(self) -> tuple[ReadRule, ...]:
        """What decode reads, one rule a kind of attention."""

    @property
    def capacity(self) -> Capacity:
        """What a worker has room for."""

    @property
    def request_s(self) -> float:
        """Time of the host that every request takes before it is queued, while workers go on."""

    @property
    def preprocess_workers(self) -> int:
        """CPU workers that preprocess."""

    def media(self, item: Media, n_images: int) -> MediaCost:
        """Return what an item is to the model, among so many images of its request."""

    @property
    def shares_prefixes(self) -> bool:
        """Whether prompts that start alike can share what is cached: not where it depends on the rest of them."""

    def prompts(self, requests: Requests, costs: Sequence[MediaCost], kinds: Ints) -> Prompts | None:
        """Return what it makes of requests; None where a token is a token.

        `kinds` says which of the costs each item has.
        """

    def step_s(self, chunks: Sequence[Chunk], finishing: int, decoding: int, keys: Sequence[float]) -> float:
        """Return the time of a step: its chunks, prompts that end in it, decoding sequences and the keys they read."""

    def decode_steps_s(self, decoding: int, keys: Sequence[float], growth: Sequence[float], k: int) -> Array:
        """Return the times of the next k steps of decoding alone, each equal to `step_s` bit by bit."""

    def encode_s(self, items: Sequence[MediaCost]) -> float:
        """Return the time of one forward pass of the encoder."""

    def preprocess_s(self, item: Media, cost: MediaCost) -> float:
        """Return the time of one CPU worker for an item."""

    @property
    def kv_layers(self) -> int:
        """Layers that hand over their part of the cache one by one."""

    def kv_bytes(self, tokens: int, items: Sequence[MediaCost] = ()) -> float:
        """Return the cache of a sequence of so many tokens, pictures included, on all devices together [bytes]."""

    def embedding_bytes(self, cost: MediaCost) -> float:
        """Return what leaves the encoder for an item [bytes]."""

    def pixel_bytes(self, cost: MediaCost) -> float:
        """Return the pixels of an item as they leave the CPU [bytes]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearService:
    """Times that are linear in the work: for theory, tests and first guesses.

    Parameters
    ----------
    step_base_s, token_s, sequence_s, key_s : float
        A step, a prefill token, a decoding sequence, a key that it reads [s].
    patch_s : float
        A patch in the encoder [s].
    pixel_s : float
        A pixel on a CPU worker [s].
    visual_tokens_per_pixel : float
        How pictures become tokens; a patch is a token.
    embedding_token_bytes, kv_token_bytes : float
        A visual token as it leaves the encoder, and a token in the cache of all layers [bytes].
    rules, capacity, request_s, preprocess_workers, kv_layers, shares_prefixes
        As in `Service`.
    """

    step_base_s: float = 0.0
    token_s: float = 0.0
    sequence_s: float = 0.0
    key_s: float = 0.0
    patch_s: float = 0.0
    pixel_s: float = 0.0
    visual_tokens_per_pixel: float = 1 / 784
    embedding_token_bytes: float = 0.0
    kv_token_bytes: float = 0.0
    kv_layers: int = 1
    rules: tuple[ReadRule, ...] = (ReadRule(),)
    capacity: Capacity = Capacity(
        kv_blocks=1 << 20, block_tokens=16, chunk_tokens=8192, max_sequences=1024, encoder_tokens=8192
    )
    request_s: float = 0.0
    preprocess_workers: int = 1
    shares_prefixes: bool = True

    def prompts(self, requests: Requests, costs: Sequence[MediaCost], kinds: Ints) -> Prompts | None:
        """Return None: a token is a token."""
        del requests, costs, kinds
        return None

    def media(self, item: Media, n_images: int) -> MediaCost:
        """Return what an item is to the model."""
        del n_images
        tokens = max(1, round(item.width * item.height * self.visual_tokens_per_pixel))
        return MediaCost(tokens, tokens, tokens * tokens, 0, tokens, 0, tokens, item.width * item.height)

    def step_s(self, chunks: Sequence[Chunk], finishing: int, decoding: int, keys: Sequence[float]) -> float:
        """Return the time of a step."""
        del finishing
        time_s = (self.step_base_s + decoding * self.sequence_s) + sum(keys) * self.key_s
        for _, tokens, _ in chunks:
            time_s += tokens * self.token_s
        return time_s

    def decode_steps_s(self, decoding: int, keys: Sequence[float], growth: Sequence[float], k: int) -> Array:
        """Return the times of the next k steps of decoding alone."""
        totals = sum(keys) + np.arange(k, dtype=np.float64) * sum(growth)
        times: Array = (self.step_base_s + decoding * self.sequence_s) + totals * self.key_s
        return times

    def encode_s(self, items: Sequence[MediaCost]) -> float:
        """Return the time of one forward pass of the encoder."""
        return sum(item.patches for item in items) * self.patch_s

    def preprocess_s(self, item: Media, cost: MediaCost) -> float:
        """Return the time of one CPU worker for an item."""
        del cost
        return item.width * item.height * self.pixel_s

    def kv_bytes(self, tokens: int, items: Sequence[MediaCost] = ()) -> float:
        """Return the cache of a sequence of so many tokens."""
        del items
        return tokens * self.kv_token_bytes

    def embedding_bytes(self, cost: MediaCost) -> float:
        """Return what leaves the encoder for an item."""
        return cost.visual_tokens * self.embedding_token_bytes

    def pixel_bytes(self, cost: MediaCost) -> float:
        """Return the pixels of an item as they leave the CPU."""
        return float(cost.resized_pixels * CHANNELS * PIXEL_BYTES)
