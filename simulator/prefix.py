"""Prompts that start alike, as a tree of runs of blocks."""

from __future__ import annotations

import numpy as np

from simulator.kv_cache import Node
from simulator.request import NONE, Ints, Requests


def leaves_of(requests: Requests, prompt: Ints, shared_tokens: Ints, block_tokens: int) -> dict[int, Node]:
    """Return, by request that shares a prefix, the last node of its sequence.

    Parameters
    ----------
    prompt : ndarray of int
        Prompt tokens by request.
    shared_tokens : ndarray of int
        Leading tokens that it shares with the prompt and answer of its parent.
    block_tokens : int
        Only whole blocks are shared.

    Notes
    -----
    First each request learns whose blocks it really starts with: where it shares no more than what its parent itself
    shares, that is the parent's own ancestor. Then every sequence is cut where others branch off.
    """
    whole = (prompt + requests.output_tokens - 1) // block_tokens
    ends = whole.tolist()
    parents = requests.parent.tolist()
    starts = np.minimum(shared_tokens // block_tokens, whole).tolist()
    cuts: dict[int, set[int]] = {}
    owner: dict[int, int] = {}
    for request in np.flatnonzero(requests.parent >= 0).tolist():
        parent, start = parents[request], min(starts[request], ends[parents[request]])
        while parent != NONE and start <= (starts[parent] if parent in owner else 0):
            parent = owner.get(parent, NONE)
        starts[request] = start if parent != NONE else 0
        owner[request] = parent
        if parent != NONE:
            cuts.setdefault(parent, set()).add(start)
    tracked = sorted({*owner, *cuts})
    return _build(tracked, owner, starts, ends, cuts)


def _build(
    tracked: list[int], owner: dict[int, int], starts: list[int], ends: list[int], cuts: dict[int, set[int]]
) -> dict[int, Node]:
    """Return the last node of each sequence, parents first."""
    leaves: dict[int, Node] = {}
    ending: dict[tuple[int, int], Node] = {}  # (request, block) where others branch off -> the node that ends there
    for request in tracked:
        origin = owner.get(request, NONE)
        start = starts[request] if origin != NONE else 0
        node = ending[origin, start] if origin != NONE else None
        for cut in sorted({*cuts.get(request, ()), max(ends[request], start)}):
            if cut > start:
                node = Node(start, cut, node)
                start = cut
            if cut in cuts.get(request, ()) and node is not None:
                ending[request, cut] = node
        if node is not None:
            leaves[request] = node
    return leaves
