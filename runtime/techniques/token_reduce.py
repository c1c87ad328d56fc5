"""Fewer visual tokens, really taken out: behind the encoder, in front of the language model, inside it.

VisionZip keeps those that receive most attention in the encoder and merges the others into a few; DivPrune keeps the
set whose nearest neighbours lie farthest apart; FastV and PyramidDrop rank by the last token's attention inside the
language model. Positions stay those of the whole prompt.

References
----------
.. [1] S. Yang et al., "VisionZip", CVPR 2025 (arXiv:2412.04467).
.. [2] S. R. Alvar et al., "DivPrune", CVPR 2025 (arXiv:2503.02175).
.. [3] L. Chen et al., "An image is worth 1/2 tokens after layer 2", ECCV 2024 (arXiv:2403.06764).
.. [4] L. Xing et al., "PyramidDrop", CVPR 2025 (arXiv:2410.17247).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from costmodel.errors import Unsupported
from costmodel.splitting import layer_number
from costmodel.techniques.token_reduce import TokenReduce
from runtime.attention import attention_rows
from runtime.techniques.plan import refuse
from runtime.vision import Features

CONTEXTUAL: Final = 10 / 64
"""Share of the kept tokens that others are merged into: 10 of 64 (VisionZip on LLaVA-1.5)."""
PLAIN: Final = {"masked": False, "reprunes": False, "text_keep": 1.0, "score_groups": 1.0}


def n_kept(keep: float, tokens: int) -> int:
    """Return how many of some tokens a share keeps."""
    return round(keep * tokens)


def most(scores: Tensor, count: int) -> Tensor:
    """Return the places of the highest scores in rising order; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def spread(tokens: int, count: int, device: torch.device) -> Tensor:
    """Return so many places, evenly spaced."""
    return (torch.arange(count, device=device) * tokens) // max(count, 1)


def max_min(x: Tensor, count: int) -> Tensor:
    """Return the places of a greedy choice whose nearest members are far apart, in rising order.

    The first is the one whose nearest neighbour lies farthest; each next one lies farthest from those before it.
    Distances are one less cosine.
    """
    normed = functional.normalize(x.float(), dim=-1)
    distances = 1.0 - normed @ normed.T
    if count >= len(x):
        return torch.arange(len(x), device=x.device)
    nearest = distances.clone().fill_diagonal_(torch.inf).min(-1).values
    chosen: list[int] = []
    for _ in range(count):
        chosen.append(int(nearest.argmax()))
        nearest = distances[chosen[-1]].clone() if len(chosen) == 1 else torch.minimum(nearest, distances[chosen[-1]])
        nearest[chosen] = -torch.inf
    return torch.tensor(sorted(chosen), device=x.device)


@dataclass(slots=True, eq=False)
class EncoderWatch:
    """Sees how much attention every row of the encoder's last layer receives.

    Parameters
    ----------
    whole : bool
        Whether the layer runs with its map; otherwise the class token's row is computed once more.
    has_class : bool
        Whether the first row of every item is a class token.
    """

    whole: bool
    has_class: bool
    seen: list[Tensor] = field(default_factory=list)

    def attend(self, n_segments: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the output of so many equal segments, each over itself."""
        q, k, v = (part.reshape(n_segments, -1, *part.shape[1:]).transpose(1, 2) for part in (q, k, v))
        scores = (q if self.whole else q[:, :, :1]) @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        shares = scores.float().softmax(-1)
        rows = shares[:, :, :1] if self.has_class else shares
        self.seen.append(rows.mean((1, 2)).flatten())
        mixed = shares.to(v.dtype) @ v if self.whole else functional.scaled_dot_product_attention(q, k, v)
        return mixed.transpose(1, 2).flatten(0, 1)

    def received(self) -> Tensor:
        """Return the attention that every row received."""
        return torch.cat(self.seen)


class OutsideReducer:
    """Reduces tokens behind the encoder or behind the adapter.

    Parameters
    ----------
    parameters : TokenReduce
    merge : int
        Patches along a side of a token; behind the encoder they stay together.
    """

    def __init__(self, parameters: TokenReduce, *, merge: int, has_class: bool) -> None:
        refuse(parameters, neutral=PLAIN)
        scores = (
            ("none", "max_min", "encoder_map", "encoder_row")
            if parameters.at == "encoder_out"
            else (
                "none",
                "max_min",
            )
        )
        if parameters.score not in scores:
            raise Unsupported(f"TokenReduce.score={parameters.score!r} at {parameters.at!r} does not run; use {scores}")
        if parameters.score == "encoder_row" and not has_class:
            raise Unsupported("TokenReduce.score='encoder_row' needs a class token; use 'encoder_map'")
        if parameters.merges and parameters.score not in ("encoder_map", "encoder_row"):
            raise Unsupported("TokenReduce.merges runs with the encoder's attention alone; leave it out")
        self.parameters, self.block = parameters, merge**2
        watches = parameters.score in ("encoder_map", "encoder_row")
        self.watch = EncoderWatch(parameters.score == "encoder_map", has_class) if watches else None

    def choose(self, x: Tensor, received: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the places that stay of the tokens of one item, and the tokens at them.

        Parameters
        ----------
        x : Tensor, shape (tokens, patches of a token, width)
        received : Tensor or None, shape (tokens,)
        """
        count = n_kept(float(self.parameters.keep), len(x))
        if count >= len(x):
            return torch.arange(len(x), device=x.device), x
        if received is None:
            picks = max_min(x.flatten(1), count) if self.parameters.score == "max_min" else None
            places = spread(len(x), count, x.device) if picks is None else picks
            return places, x[places]
        if not self.parameters.merges:
            places = most(received, count)
            return places, x[places]
        return merged(x, received, count)

    def behind_encoder(self, features: Features) -> tuple[Features, Tensor]:
        """Return the features that stay, item by item, and the places of their tokens among all."""
        block, start = self.block, 0
        kept, places, deep = [], [], []
        for t, h, w in features.grids:
            end = start + t * h * w
            x = torch.unflatten(features.last[start:end], 0, (-1, block))
            received = features.received
            score = None if received is None else torch.unflatten(received[start:end], 0, (-1, block)).mean(-1)
            chosen, rows = self.choose(x, score)
            kept.append(rows.flatten(0, 1))
            places.append(chosen + start // block)
            deep.append(
                [torch.unflatten(part[start:end], 0, (-1, block))[chosen].flatten(0, 1) for part in features.deep]
            )
            start = end
        parts = tuple(torch.cat(part) for part in zip(*deep, strict=True))
        return replace(features, last=torch.cat(kept), deep=parts, received=None), torch.cat(places)


def merged(x: Tensor, received: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the places and tokens of VisionZip: dominant ones as they are, contextual ones with what joins them.

    Contextual tokens are evenly spaced among those that are not dominant; every other one joins the most similar.
    """
    n_contextual = max(round(CONTEXTUAL * count), 1)
    dominant = most(received, count - n_contextual)
    rest_mask = torch.ones(len(x), dtype=torch.bool, device=x.device)
    rest_mask[dominant] = False
    rest = rest_mask.nonzero()[:, 0]
    targets = rest[spread(len(rest), n_contextual, x.device)]
    rest_mask[targets] = False
    joining = rest_mask.nonzero()[:, 0]
    normed = functional.normalize(x.flatten(1).float(), dim=-1)
    nearest = (normed[joining] @ normed[targets].T).argmax(-1)
    sums = x[targets].float().index_add(0, nearest, x[joining].float())
    members = torch.ones(n_contextual, device=x.device).index_add(0, nearest, torch.ones(len(joining), device=x.device))
    places = torch.cat((dominant, targets))
    tokens = torch.cat((x[dominant], (sums / members[:, None, None]).to(x.dtype)))
    order = places.argsort()
    return places[order], tokens[order]


class LayerReducer:
    """Takes visual tokens out of the prompt in front of some layers, by attention in the layer before.

    Parameters
    ----------
    parameters : TokenReduce
    n_layers : int
        Of the language model.
    visual : Tensor of bool, shape (tokens,)
        Which tokens of the prompt are visual.
    """

    def __init__(self, parameters: TokenReduce, n_layers: int, visual: Tensor) -> None:
        refuse(parameters, neutral=PLAIN | {"merges": False})
        if parameters.score not in ("none", "llm_rows", "llm_map"):
            raise Unsupported(
                f"TokenReduce.score={parameters.score!r} at 'layer' does not run; use llm_rows or llm_map"
            )
        schedule = parameters.schedule or ((parameters.layer or 0, parameters.keep),)
        self.parameters = parameters
        self.keeps = {layer_number("TokenReduce.layer", at, n_layers, "decoder"): keep for at, keep in schedule}
        self.n_visual = int(visual.sum())
        self.visual = visual
        self.scores: Tensor | None = None

    def goes(self, layer: int) -> bool:
        """Return whether tokens leave in front of a layer."""
        return layer in self.keeps and n_kept(float(self.keeps[layer]), self.n_visual) < int(self.visual.sum())

    def wants_map(self, layer: int) -> bool:
        """Return whether a layer must run with its map."""
        return self.parameters.score == "llm_map" and self.goes(layer + 1)

    def see(self, layer: int, q: Tensor, k: Tensor, shares: Tensor | None, *, scale: float | None) -> None:
        """Note how tokens are attended to in the layer before a cut: in its map, or in rows computed once more."""
        if not self.goes(layer + 1) or self.parameters.score == "none":
            return
        if shares is not None and self.parameters.score == "llm_map":
            self.scores = shares[0, :, -1].float().mean(0)
            return
        rows = int(self.parameters.score_rows or 1)
        self.scores = attention_rows(q, k, rows, scale=scale)[0].mean((0, 1))

    def thin(self, layer: int) -> Tensor | None:
        """Return the tokens that go on into a layer; None where all do."""
        if not self.goes(layer):
            return None
        places = self.visual.nonzero()[:, 0]
        count = n_kept(float(self.keeps[layer]), self.n_visual)
        if self.parameters.score == "none" or self.scores is None:
            chosen = spread(len(places), count, places.device)
        else:
            chosen = most(self.scores[places], count)
        stays = ~self.visual
        stays[places[chosen]] = True
        self.visual, self.scores = self.visual[stays], None
        return stays.nonzero()[:, 0]
