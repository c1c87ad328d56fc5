"""What maps encoder outputs into the language model: projectors, mergers, pooling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from costmodel.adapters import AdapterSpec, LinearStep
from runtime.modules import ACTIVATIONS, RmsNorm, make_norm
from runtime.settings import AdapterSettings, Settings
from runtime.vision import Features


@dataclass(frozen=True, slots=True, eq=False)
class Visual:
    """Embeddings of all visual tokens, and what is added to them behind the first layers (DeepStack)."""

    embeddings: Tensor
    deep: tuple[Tensor, ...] = ()


class Projector(nn.Module):
    """A norm if there is one, then two matrices with an activation between them.

    The norm runs over merged patches, or over each patch before it is merged.
    """

    def __init__(self, first: LinearStep, second: LinearStep, norm: nn.Module, activation: str) -> None:
        super().__init__()
        self.norm = norm
        self.linear1 = nn.Linear(first.d_in, first.d_out, bias=first.bias)
        self.linear2 = nn.Linear(second.d_in, second.d_out, bias=second.bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Return one embedding for each row of merged patches, or for so many patches as one merges."""
        return self.linear2(self.activation(self.linear1(self.norm(x).reshape(-1, self.linear1.in_features))))  # type: ignore[no-any-return]


class Pooling(nn.Module):
    """Mean over square groups of patches, a norm, one matrix."""

    def __init__(self, linear: LinearStep, settings: AdapterSettings, offset: float) -> None:
        super().__init__()
        self.norm = RmsNorm(linear.d_in, settings.norm_eps, offset=offset)
        self.linear1 = nn.Linear(linear.d_in, linear.d_out, bias=linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return one embedding for each pooled patch."""
        return self.linear1(self.norm(x))  # type: ignore[no-any-return]


class Adapter(nn.Module):
    """The adapter of a model, with one projector more for every deep layer."""

    def __init__(self, spec: AdapterSpec, settings: Settings, patch_width: int) -> None:
        super().__init__()
        self.settings, self.tile = settings.adapter, settings.tile
        steps = {step.name: step for step in spec.steps if isinstance(step, LinearStep)}
        kind, eps = settings.adapter.kind, settings.adapter.norm_eps
        merged = steps["linear1"].d_in
        if kind == "pool":
            self.projector: nn.Module = Pooling(steps["linear1"], settings.adapter, settings.decoder.norm_offset)
        else:
            self.projector = self._projector(steps, "", patch_width if kind == "merger" else merged)
        n_deep = spec.outputs - 1
        self.deep = nn.ModuleList(self._projector(steps, "deepstack_", merged) for _ in range(n_deep))
        self.eps = eps

    def _projector(self, steps: dict[str, LinearStep], prefix: str, normed: int) -> Projector:
        kind, eps = self.settings.norm, self.settings.norm_eps
        norm = nn.Identity() if kind == "none" else make_norm(kind, normed, eps)
        return Projector(steps[f"{prefix}linear1"], steps[f"{prefix}linear2"], norm, self.settings.activation)

    def forward(self, features: Features) -> Visual:
        """Return the embeddings of all items, one behind the other."""
        merged = self.settings.merge**2
        deep = [
            projector(part.reshape(-1, merged * part.shape[-1]))
            for projector, part in zip(self.deep, features.deep, strict=True)
        ]
        return Visual(self.projector(self._grouped(features.last)), tuple(cast("list[Tensor]", deep)))

    def _grouped(self, x: Tensor) -> Tensor:
        """Return patches as the projector takes them: shuffled or pooled by tile, or as they lie."""
        merge = self.settings.merge
        if self.settings.kind == "pool":
            tiles = x.reshape(-1, self.tile, self.tile, x.shape[-1]).permute(0, 3, 1, 2)
            return functional.avg_pool2d(tiles, merge).permute(0, 2, 3, 1).flatten(0, 2)
        if self.settings.kind == "projector" and merge > 1:
            side = self.tile // merge
            blocks = x.reshape(-1, side, merge, side, merge, x.shape[-1]).permute(0, 1, 3, 2, 4, 5)
            return torch.reshape(blocks, (-1, merge**2 * x.shape[-1]))
        return x
