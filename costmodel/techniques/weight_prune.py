"""Fewer weights in the language model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

from costmodel.errors import Unsupported, shown
from costmodel.layers import FfnSpec, LayerRun, LayerSpec, MlpSpec, MoeSpec
from costmodel.memo import remember
from costmodel.models import ModelSpec
from costmodel.query import Query, Segment

Part = TypeVar("Part", Segment, LayerRun)


@dataclass(frozen=True, slots=True)
class WeightPrune:
    """Removes a share of the weights in the layers of the language model.

    Structured pruning takes whole channels out of the feed-forward blocks, of every layer alike, until that share of
    all its weights is gone: what is left is a smaller dense model with the same heads and cache. Unstructured pruning
    leaves zeros that dense kernels store, read and multiply: it saves nothing, and this says so by changing nothing.

    Parameters
    ----------
    sparsity : float
        Share of the weights that goes.
    structured : bool
        Whether whole channels go.
    """

    sparsity: float = 0.0
    structured: bool = True
    name: str = "WeightPrune"

    def __post_init__(self) -> None:
        """Refuse what is no share; layers cannot be swept."""
        if np.ndim(self.sparsity) or not 0 <= self.sparsity < 1:
            raise ValueError(f"{self.name}.sparsity={shown(self.sparsity)} must lie in [0, 1); give one number")

    @property
    def slot(self) -> str:
        """The place it takes."""
        return "weights sparsity"

    @property
    def needs_attention_map(self) -> Literal["none", "rows", "full"]:
        """It needs no attention of the model."""
        return "none"

    @property
    def needs(self) -> frozenset[str]:
        """It needs nothing of model or request."""
        return frozenset()

    @property
    def stages(self) -> str:
        """Which state it edits."""
        return "weights"

    def apply(self, query: Query) -> Query:
        """Return the query of a model with fewer channels."""
        if not self.sparsity or not self.structured:
            return query
        key = ("weight_prune", self.sparsity)
        model = remember(query.model.cache, key, lambda: self._pruned(query.model))
        decoder = remember(model.cache, (*key, query.decoder), lambda: self._over(query.decoder, model.name))
        return replace(query, model=model, decoder=decoder)

    def _pruned(self, model: ModelSpec) -> ModelSpec:
        """Return the model of thinner layers."""
        decoder = replace(model.decoder, runs=self._over(model.decoder.runs, model.name))
        return replace(model, decoder=decoder, cache={})

    def _over(self, parts: tuple[Part, ...], owner: str) -> tuple[Part, ...]:
        return tuple(replace(part, layer=self._thinner(part.layer, owner)) for part in parts)

    def _thinner(self, layer: LayerSpec, owner: str) -> LayerSpec:
        most = layer.ffn.parameters(layer.width) / layer.parameters
        if self.sparsity >= most:
            rule = f"leaves no feed-forward block: {most:.2f} of a layer of {owner} are its"
            raise ValueError(f"{self.name}.sparsity={self.sparsity!r} {rule}; use less")
        return replace(layer, ffn=_narrower(layer.ffn, 1.0 - self.sparsity / most, owner))


def _narrower(ffn: FfnSpec, keep: float, owner: str) -> FfnSpec:
    if isinstance(ffn, MlpSpec):
        return replace(ffn, hidden=max(1, round(ffn.hidden * keep)))
    if isinstance(ffn, MoeSpec):
        return replace(ffn, hidden=max(1, round(ffn.hidden * keep)), shared_hidden=round(ffn.shared_hidden * keep))
    raise Unsupported(f"WeightPrune knows no channels of {owner}, which is a trace; use a model with a config.json")
