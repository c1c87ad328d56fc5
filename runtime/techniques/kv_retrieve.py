"""Retrieval: all visual keys and values stay, on the device or its host, and steps read the chunks that matter.

References
----------
.. [1] S. Di et al., "ReKV", ICLR 2025 (arXiv:2503.00540): chunks scored by the question against their mean keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from costmodel.errors import Unsupported
from costmodel.techniques.kv_retrieve import KVRetrieve
from runtime.attention import attend_behind
from runtime.techniques.plan import refuse

Pair = tuple[Tensor, Tensor]


def mean_keys(keys: Tensor, chunk: int) -> Tensor:
    """Return the mean key of every chunk of tokens, shape (kv_heads, chunks, head_dim); the last may be shorter."""
    return torch.stack([part.float().mean(1) for part in torch.split(keys[0], chunk, 1)], 1)


def chunk_scores(q: Tensor, means: Tensor) -> Tensor:
    """Return how much queries, shape (1, heads, rows, head_dim), ask for every chunk, over all heads and rows."""
    group = q.shape[1] // means.shape[0]
    queries = torch.unflatten(q[0], 0, (-1, group)).flatten(1, 2)
    return (queries.to(means.dtype) @ means.transpose(-1, -2)).sum((0, 1))


def chosen_places(scores: Tensor, n_visual: int, *, chunk: int, count: int, window: int) -> Tensor:
    """Return the places of visual tokens that are read: the last ones, and the best chunks until there are enough."""
    recent = torch.arange(n_visual - window, n_visual)
    order = scores.argsort(descending=True, stable=True).cpu()
    ranked = torch.cat([torch.arange(i * chunk, min((i + 1) * chunk, n_visual)) for i in order.tolist()])
    older = ranked[ranked < n_visual - window][: count - window]
    return torch.cat((older, recent)).sort().values


class RetrievingStore:
    """Text and new tokens on the device, all visual ones in an archive, and copies of those that are read.

    On the device, what is read for a whole turn leaves the archive, so that nothing is held twice.
    """

    def __init__(self, parameters: KVRetrieve, q: Tensor, pair: Pair, visual: Tensor) -> None:
        keys, values = pair
        self.parameters, self.visual = parameters, visual
        n_visual = int(visual.sum())
        share = parameters.read if parameters.tokens is None else parameters.tokens / max(n_visual, 1)
        self.window = min(int(parameters.window), n_visual)
        self.count = round(min(float(share) + self.window / max(n_visual, 1), 1.0) * n_visual)
        self.text = keys[:, :, ~visual].clone(), values[:, :, ~visual].clone()
        self.tail = keys[:, :, :0].clone(), values[:, :, :0].clone()
        whole = keys[:, :, visual], values[:, :, visual]
        self.means = mean_keys(whole[0], int(parameters.chunk_tokens))
        place = torch.device("cpu") if parameters.placement == "host" else keys.device
        self.archive: Pair = whole[0].to(place, copy=True), whole[1].to(place, copy=True)
        self.places = torch.arange(0)
        self.near: Pair = self.tail
        if parameters.each == "turn":
            self._fetch(q[:, :, ~visual])
            if parameters.placement == "gpu":
                rest = torch.ones(n_visual, dtype=torch.bool)
                rest[self.places] = False
                self.archive = self.archive[0][:, :, rest].clone(), self.archive[1][:, :, rest].clone()

    def _fetch(self, q: Tensor) -> None:
        """Choose by these queries, and copy what was chosen to the device."""
        scores = chunk_scores(q, self.means)
        chunk, n_visual = int(self.parameters.chunk_tokens), int(self.visual.sum())
        self.places = chosen_places(scores, n_visual, chunk=chunk, count=self.count, window=self.window)
        k, v = (part[:, :, self.places.to(part.device)] for part in self.archive)
        self.near = k.to(self.text[0].device), v.to(self.text[0].device)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add new tokens."""
        self.tail = torch.cat((self.tail[0], k), 2), torch.cat((self.tail[1], v), 2)

    def drop(self, count: int) -> None:
        """Forget the last tokens."""
        if count:
            self.tail = self.tail[0][:, :, :-count].clone(), self.tail[1][:, :, :-count].clone()

    def settle(self) -> None:
        """Forget what one step read, where the next chooses anew on the device."""
        if self.parameters.each == "step" and self.parameters.placement == "gpu":
            self.near = self.near[0][:, :, :0].clone(), self.near[1][:, :, :0].clone()

    def read(self) -> Pair:
        """Return keys and values of what is read, in the order of the prompt."""
        seen = self.visual.nonzero()[:, 0][self.places.to(self.visual.device)]
        order = torch.cat((seen, (~self.visual).nonzero()[:, 0])).argsort()
        k, v = (
            torch.cat((torch.cat((near, text), 2)[:, :, order], tail), 2)
            for near, text, tail in zip(self.near, self.text, self.tail, strict=True)
        )
        return k, v

    def attend(self, q: Tensor, *, scale: float | None) -> Tensor:
        """Return the attention of the last tokens over what is read for them."""
        if self.parameters.each == "step":
            self._fetch(q)
        return attend_behind(q, *self.read(), scale=scale)

    @property
    def tensors(self) -> Sequence[Tensor]:
        """What the device holds."""
        here = self.archive if self.parameters.placement == "gpu" else ()
        return *self.text, *self.tail, *self.near, *here

    @property
    def host_bytes(self) -> int:
        """What the host holds [bytes]."""
        return sum(part.nbytes for part in self.archive) if self.parameters.placement == "host" else 0


class Retriever:
    """Makes stores that retrieve.

    Parameters
    ----------
    parameters : KVRetrieve
    """

    def __init__(self, parameters: KVRetrieve) -> None:
        refuse(parameters, neutral={"scorer": "mean_key", "spare_evicted": False})
        if parameters.chunk_tokens != int(parameters.chunk_tokens):
            raise Unsupported(f"KVRetrieve.chunk_tokens={parameters.chunk_tokens!r} does not run; give a whole number")
        self.parameters = parameters

    def store(self, q: Tensor, k: Tensor, v: Tensor, visual: Tensor) -> RetrievingStore:
        """Return the store of a prompt, whose text asks."""
        return RetrievingStore(self.parameters, q, (k, v), visual)
