"""Eviction behind prefill: each head keeps a budget of the prompt, and the rest is freed.

References
----------
.. [1] Z. Wan et al., "LOOK-M", EMNLP 2024 (arXiv:2406.18139): column sums of the map; what goes is merged.
.. [2] J. Wang et al., "SparseMM", ICCV 2025 (arXiv:2506.05344): budgets by head, scores of a window of last queries.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from costmodel.errors import Unsupported
from costmodel.techniques.kv_evict import KVEvict
from runtime.attention import attention_rows
from runtime.techniques.plan import refuse
from runtime.techniques.stores import PlainStore, RaggedStore, Store
from runtime.techniques.token_reduce import most


class Evictor:
    """Chooses what each head of each layer keeps of the prompt.

    Parameters
    ----------
    parameters : KVEvict
    n_layers : int
        Of the language model.
    """

    def __init__(self, parameters: KVEvict, n_layers: int) -> None:
        refuse(parameters, neutral={"head_share": 1.0, "masked": False})
        self.parameters, self.n_layers = parameters, n_layers

    def wants_map(self) -> bool:
        """Return whether every layer must run with its map."""
        return self.parameters.score == "map"

    def budgets(self, layer: int, kv_heads: int, tokens: int) -> list[int]:
        """Return how many of so many tokens each head of a layer keeps."""
        budget = self.parameters.keep if self.parameters.tokens is None else self.parameters.tokens / max(tokens, 1)
        layers, heads = self.parameters.layers, self.parameters.heads
        profile = [1.0] * kv_heads
        if layers:
            profile = [layers[layer * len(layers) // self.n_layers]] * kv_heads
        elif heads:
            profile = [heads[head * len(heads) // kv_heads] for head in range(kv_heads)]
        window = self.parameters.window / max(tokens, 1)
        kept = [round(float(min(budget * each + window, 1.0)) * tokens) for each in profile]
        return kept if self.parameters.ragged else [max(kept)] * kv_heads

    def scores(self, q: Tensor, k: Tensor, v: Tensor, shares: Tensor | None, *, scale: float | None) -> Tensor:
        """Return what every token is worth to each key head, shape (kv_heads, tokens)."""
        heads, tokens = k.shape[1], k.shape[2]
        if self.parameters.score == "none":  # nothing is looked at: the last ones stay
            return torch.arange(tokens, device=k.device).float().expand(heads, -1)
        if self.parameters.score == "key_norm":
            norms: Tensor = torch.linalg.vector_norm(v[0].float(), dim=-1)
            return norms
        if self.parameters.score == "map":
            if shares is None:
                raise Unsupported("KVEvict.score='map' needs a layer that runs with its map; use 'rows'")
            worth = shares[0].float().sum(1)
        else:
            rows = min(int(self.parameters.score_rows), tokens)
            worth = attention_rows(q, k, rows, scale=scale)[0].sum(1)
        return torch.unflatten(worth, 0, (heads, -1)).sum(1)

    def kept(self, layer: int, scores: Tensor, visual: Tensor) -> list[Tensor]:
        """Return the places that each head keeps, in rising order."""
        heads, tokens = scores.shape
        window = min(int(self.parameters.window), tokens)
        worth = scores.clone()
        worth[:, tokens - window :] = torch.inf
        if not self.parameters.visual_only and self.parameters.text_keep is None:
            return [most(worth[h], n) for h, n in enumerate(self.budgets(layer, heads, tokens))]
        return [self._by_modality(layer, worth[h], visual, heads, h) for h in range(heads)]

    def _by_modality(self, layer: int, worth: Tensor, visual: Tensor, heads: int, head: int) -> Tensor:
        seen, said = visual.nonzero()[:, 0], (~visual).nonzero()[:, 0]
        base = len(seen) if self.parameters.visual_only else len(visual)
        share = self.budgets(layer, heads, base)[head] / max(base, 1)
        text = 1.0
        if self.parameters.text_keep is not None:
            text = float(min(self.parameters.text_keep + self.parameters.window / max(base, 1), 1.0))
        parts = (seen[most(worth[seen], round(share * len(seen)))], said[most(worth[said], round(text * len(said)))])
        return torch.cat(parts).sort().values

    def store(
        self,
        layer: int,
        parts: tuple[Tensor, Tensor, Tensor],
        shares: Tensor | None,
        *,
        visual: Tensor,
        scale: float | None,
    ) -> Store:
        """Return the store of what is kept of a prompt; nothing else is referred to any more."""
        q, k, v = parts
        places = self.kept(layer, self.scores(q, k, v, shares, scale=scale), visual)
        heads = [self._head(k[:, [h]], v[:, [h]], chosen) for h, chosen in enumerate(places)]
        if len({len(chosen) for chosen in places}) == 1:
            return PlainStore(*(torch.cat(parts, 1) for parts in zip(*heads, strict=True)))
        return RaggedStore([PlainStore(*pair) for pair in heads])

    def _head(self, k: Tensor, v: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of one head, with those that go merged into the most similar ones that stay."""
        kept = k[:, :, places], v[:, :, places]
        if not self.parameters.merges or len(places) in (0, k.shape[2]):
            return kept
        goes = torch.ones(k.shape[2], dtype=torch.bool, device=k.device)
        goes[places] = False
        evicted = goes.nonzero()[:, 0]
        normed = functional.normalize(k[0, 0].float(), dim=-1)
        nearest = (normed[evicted] @ normed[places].T).argmax(-1)
        members = torch.ones(len(places), device=k.device)
        members.index_add_(0, nearest, torch.ones(len(evicted), device=k.device))
        merged = (
            (part[0, 0, places].float().index_add(0, nearest, part[0, 0, evicted].float()) / members[:, None])
            for part in (k, v)
        )
        keys, values = (part.to(k.dtype)[None, None] for part in merged)
        return keys, values
