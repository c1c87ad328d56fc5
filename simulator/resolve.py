"""What a model makes of requests, worked out before the run: tokens, places of items, times that are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from costmodel.base import Array
from costmodel.models import MediaCost
from simulator.kv_cache import Node
from simulator.prefix import leaves_of
from simulator.prompt import Prompt, places
from simulator.request import Ints, Requests
from simulator.service import Service


@dataclass(frozen=True, slots=True, eq=False)
class Resolved:
    """Columns that the workers read.

    Parameters
    ----------
    requests : Requests
    prompt_tokens, output_tokens : list of int
        By request, pictures included.
    first_item, last_item_end : list of int
        By request, its first item, and the prompt tokens up to the end of its last one; `first_item` has one more.
    item_start, item_end, item_embeds, item_content : list of int
        By item, its place in the prompt [tokens], the embeddings that the encoder makes and what it shows.
    item_cost : list of MediaCost
        By item.
    item_request : list of int
        By item, whose it is.
    preprocess_s : ndarray
        By request, the work of a CPU worker [s].
    item_preprocess_s : list of float
        By item [s].
    shared_tokens : ndarray of int
        Leading tokens that each prompt shares with the prompt and answer of its parent.
    block_tokens : int
        Tokens of a block of the KV cache.
    most_tokens : list of int
        By request, the most tokens' worth of cache that it may come to hold.
    prompts : sequence of Prompt or None
        By request, what is not alike in its tokens; see `simulator.prompt`.
    own_keys : list of tuple of int, or None
        By request, keys beside its context, one a read rule; None where there are none.
    beside_tokens, kept_tokens : list of int, or None
        By request, tokens' worth of cache beside its context, before its prompt is computed and afterwards.
    """

    requests: Requests
    prompt_tokens: list[int]
    output_tokens: list[int]
    first_item: list[int]
    last_item_end: list[int]
    item_start: list[int]
    item_end: list[int]
    item_embeds: list[int]
    item_content: list[int]
    item_cost: list[MediaCost]
    item_request: list[int]
    preprocess_s: Array
    item_preprocess_s: list[float]
    shared_tokens: Ints
    block_tokens: int
    most_tokens: list[int]
    prompts: Sequence[Prompt | None]
    own_keys: list[tuple[int, ...]] | None = None
    beside_tokens: list[int] | None = None
    kept_tokens: list[int] | None = None

    def has_items(self, request: int) -> bool:
        """Return whether a request has pictures."""
        return self.first_item[request + 1] > self.first_item[request]

    def prefill_blocks(self, request: int, tokens: int) -> int:
        """Return the blocks of a request while its prompt is computed, of which so many tokens are."""
        beside = self.beside_tokens[request] if self.beside_tokens and tokens else 0
        return -(-(tokens + beside) // self.block_tokens)

    def blocks(self, request: int, tokens: int) -> int:
        """Return the blocks of a request that decodes, with so many tokens computed."""
        kept = self.kept_tokens[request] if self.kept_tokens else 0
        return -(-(tokens + kept) // self.block_tokens)

    def leaves(self) -> dict[int, Node]:
        """Return the ends of the prefixes that requests share, for one cache; see `simulator.prefix`."""
        if not self.shared_tokens.any():  # as nearly always; every worker asks
            return {}
        prompt = np.array(self.prompt_tokens, dtype=np.int64)
        return leaves_of(self.requests, prompt, self.shared_tokens, self.block_tokens)


def resolve(requests: Requests, service: Service) -> Resolved:
    """Return what the model makes of requests."""
    kinds, costs = _kinds(requests, service)
    found = service.prompts(requests, costs, kinds)
    if found is None:
        spans = np.array([cost.visual_tokens + cost.marker_tokens for cost in costs], dtype=np.int64)[kinds]
        embeds = np.array([cost.visual_tokens or cost.cross_tokens for cost in costs], dtype=np.int64)[kinds]
    else:
        spans, embeds = found.item_spans, found.item_embeds
    busy = [service.preprocess_s(item, cost) for item, cost in zip(_sizes(requests, service), costs, strict=True)]
    item_preprocess_s = np.array(busy, dtype=float)[kinds]
    owner, offsets = requests.item_request, requests.item_offsets
    start, prompt = places(requests, spans)
    last_end = np.zeros(len(requests), dtype=np.int64)
    has = requests.n_items > 0
    last_end[has] = (start + spans)[offsets[1:][has] - 1]
    beside = np.zeros(len(requests), dtype=np.int64) if found is None else np.array(found.beside_tokens)
    per_request = np.bincount(owner, weights=item_preprocess_s, minlength=len(requests))
    return Resolved(
        requests=requests,
        prompt_tokens=prompt.tolist(),
        output_tokens=requests.output_tokens.tolist(),
        first_item=offsets.tolist(),
        last_item_end=last_end.tolist(),
        item_start=start.tolist(),
        item_end=(start + spans).tolist(),
        item_embeds=embeds.tolist(),
        item_content=requests.item_content.tolist(),
        item_cost=[costs[kind] for kind in kinds.tolist()],
        item_request=owner.tolist(),
        preprocess_s=per_request.astype(float),
        item_preprocess_s=item_preprocess_s.tolist(),
        shared_tokens=_shared_tokens(requests, np.concatenate([[0], np.cumsum(spans)])),
        block_tokens=service.capacity.block_tokens,
        most_tokens=(prompt + beside + requests.max_output_tokens).tolist(),
        prompts=[None] * len(requests) if found is None else found.prompts,
        own_keys=None if found is None else found.own_keys,
        beside_tokens=None if found is None or not beside.any() else found.beside_tokens,
        kept_tokens=None if found is None or not (beside.any() or any(found.kept_tokens)) else found.kept_tokens,
    )


def _distinct(requests: Requests) -> tuple[Ints, Ints, Ints]:
    """Return the different pairs of size and images in the request, and which of them each item is."""
    crowd = requests.n_items[requests.item_request]
    pairs, index = np.unique(np.stack([requests.item_kind, crowd]), axis=1, return_inverse=True)
    return pairs[0], pairs[1], index.reshape(-1)


def _kinds(requests: Requests, service: Service) -> tuple[Ints, list[MediaCost]]:
    sizes, crowds, index = _distinct(requests)
    pairs = zip(sizes.tolist(), crowds.tolist(), strict=True)
    return index, [service.media(requests.media[size], crowd) for size, crowd in pairs]


def _sizes(requests: Requests, service: Service) -> list:  # type: ignore[type-arg]
    del service
    return [requests.media[size] for size in _distinct(requests)[0].tolist()]


def _shared_tokens(requests: Requests, before: Ints) -> Ints:
    """Return how many leading tokens each prompt shares with the prompt and answer of its parent."""
    parent = np.maximum(requests.parent, 0)
    first = requests.item_offsets[:-1][parent]
    reach = np.minimum(first + requests.shared_items, len(before) - 1)
    tokens = requests.shared_text_tokens + before[reach] - before[first]
    return np.where(requests.parent >= 0, tokens, 0)
