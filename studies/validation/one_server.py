"""Workers behind one API server, and data-parallel ranks that step together, as services of the simulator.

Until pull request 30739 (December 2025) the ranks of `vllm serve --data-parallel-size N` met in an all-reduce in every
step, of models without experts too: all wait for the one that encodes and prefills. Such a group is one worker here,
whose step is that of its busiest rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from costmodel.base import Array
from costmodel.models import MediaCost
from simulator.prompt import Chunk, Prompts
from simulator.request import Ints, Media, Requests
from simulator.service import Service


class OneServer:
    """The service of workers whose requests go through one process, one after another.

    What a request costs the host (`request_s`: HTTP, tokens, its answer) is work of that process, beside its pictures.

    Parameters
    ----------
    rank : Service
        One worker.
    n_images : int
        Pictures of every request.
    """

    def __init__(self, rank: Service, n_images: int) -> None:
        if n_images < 1:
            raise ValueError(f"n_images={n_images} must be at least 1; requests of text pass no queue of pictures")
        self.rank, self.n_images = rank, n_images
        self.rules = rank.rules
        self.capacity = rank.capacity
        self.shares_prefixes = rank.shares_prefixes
        self.kv_layers = rank.kv_layers
        self.request_s = 0.0
        self.preprocess_workers = 1

    def prompts(self, requests: Requests, costs: Sequence[MediaCost], kinds: Ints) -> Prompts | None:
        """Return what a rank makes of requests."""
        return self.rank.prompts(requests, costs, kinds)

    def embedding_bytes(self, cost: MediaCost) -> float:
        """Return what an encoded item takes [bytes]."""
        return self.rank.embedding_bytes(cost)

    def pixel_bytes(self, cost: MediaCost) -> float:
        """Return what a preprocessed item takes [bytes]."""
        return self.rank.pixel_bytes(cost)

    def kv_bytes(self, tokens: int, items: Sequence[MediaCost] = ()) -> float:
        """Return what tokens take in the caches of all layers [bytes]."""
        return self.rank.kv_bytes(tokens, items)

    def media(self, item: Media, n_images: int) -> MediaCost:
        """Return what an item is to the model."""
        return self.rank.media(item, n_images)

    def preprocess_s(self, item: Media, cost: MediaCost) -> float:
        """Return the time of the server for a picture and its part of the request [s]."""
        return self.rank.preprocess_s(item, cost) + self.rank.request_s / self.n_images

    def encode_s(self, items: Sequence[MediaCost]) -> float:
        """Return the time of the encoder for the pictures of a step [s]."""
        return self.rank.encode_s(items)

    def step_s(self, chunks: Sequence[Chunk], finishing: int, decoding: int, keys: Sequence[float]) -> float:
        """Return the time of a step [s]."""
        return self.rank.step_s(chunks, finishing, decoding, keys)

    def decode_steps_s(self, decoding: int, keys: Sequence[float], growth: Sequence[float], k: int) -> Array:
        """Return the times of the next k steps of decoding alone [s]."""
        return self.rank.decode_steps_s(decoding, keys, growth, k)


class Lockstep(OneServer):
    """The service of ranks that step together, as one worker with the room of all.

    Sequences are spread evenly. Prompts of a step go to the rank with the fewest tokens so far, the longest first,
    their pictures with them.

    Parameters
    ----------
    rank, n_images
        As in `OneServer`.
    ranks : int
        Ranks.
    """

    def __init__(self, rank: Service, n_images: int, ranks: int) -> None:
        super().__init__(rank, n_images)
        self.ranks = ranks
        one = rank.capacity
        self.capacity = replace(
            one,
            kv_blocks=one.kv_blocks * ranks,
            chunk_tokens=one.chunk_tokens * ranks,
            max_sequences=one.max_sequences * ranks,
            encoder_tokens=one.encoder_tokens * ranks,
        )

    def encode_s(self, items: Sequence[MediaCost]) -> float:
        """Return the time of the busiest rank's encoder [s]."""
        n_requests = -(-len(items) // self.n_images)
        return self.rank.encode_s(items[: -(-n_requests // self.ranks) * self.n_images])

    def step_s(self, chunks: Sequence[Chunk], finishing: int, decoding: int, keys: Sequence[float]) -> float:
        """Return the time of the busiest rank [s]; each of its prompts is taken to end in the step if any does."""
        mine = -(-decoding // self.ranks)
        dealt = self._busiest(chunks)
        return self.rank.step_s(dealt, min(finishing, len(dealt)), mine, self._part(decoding, keys))

    def decode_steps_s(self, decoding: int, keys: Sequence[float], growth: Sequence[float], k: int) -> Array:
        """Return the times of the next k steps of decoding alone [s]."""
        mine = -(-decoding // self.ranks)
        return self.rank.decode_steps_s(mine, self._part(decoding, keys), self._part(decoding, growth), k)

    def _part(self, decoding: int, keys: Sequence[float]) -> list[float]:
        """Return the keys of the rank with most sequences."""
        share = -(-decoding // self.ranks) / decoding if decoding else 0.0
        return [share * some for some in keys]

    def _busiest(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Deal chunks out; return those of the rank with most tokens."""
        dealt: list[list[Chunk]] = [[] for _ in range(self.ranks)]
        loads = [0] * self.ranks
        for chunk in sorted(chunks, key=lambda chunk: -chunk[1]):
            rank = loads.index(min(loads))
            dealt[rank].append(chunk)
            loads[rank] += chunk[1]
        return dealt[loads.index(max(loads))]
