"""The vision encoder: patches, positions, layers that attend over slices or inside windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from costmodel.errors import Unsupported
from costmodel.layers import AttentionSpec, LayerSpec
from costmodel.models import VisionEncoderSpec
from runtime.grids import Grid, Indices, Runs, layout, stretched
from runtime.modules import RmsNorm, make_ffn, make_norm, rotate, turns
from runtime.settings import VisionSettings


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """Encoder outputs of all items: of the last layer, and of the deep layers in order.

    `received` is the attention of the last layer that each patch receives, where it was asked for: from the class
    token, or in the mean over its item where there is none.
    """

    last: Tensor
    deep: tuple[Tensor, ...]
    grids: tuple[Grid, ...]
    received: Tensor | None = None


class Watch(Protocol):
    """What computes the attention of a layer and sees its map."""

    def attend(self, n_segments: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the output of so many equal segments, each over itself."""

    def received(self) -> Tensor:
        """Return the attention that every row received."""


class VisionAttention(nn.Module):
    """Attention of every segment over itself."""

    def __init__(self, width: int, spec: AttentionSpec, settings: VisionSettings) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, spec.q_width + 2 * spec.kv_width, bias=spec.qkv_bias)
        self.out = nn.Linear(spec.q_width, width, bias=spec.out_bias)
        self.spec, self.widths = spec, (spec.q_width, spec.kv_width, spec.kv_width)
        normed = settings.qk_norm == "width"
        self.q_norm = RmsNorm(spec.q_width, settings.norm_eps) if normed else nn.Identity()
        self.k_norm = RmsNorm(spec.kv_width, settings.norm_eps) if normed else nn.Identity()

    def forward(self, x: Tensor, runs: Runs, turn: tuple[Tensor, Tensor] | None, watch: Watch | None = None) -> Tensor:
        """Return the output of every row; `runs` say how rows are cut into segments."""
        attend = _attend if watch is None else watch.attend
        q, k, v = self.qkv(x).split(self.widths, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.spec.head_dim)) for part in (self.q_norm(q), self.k_norm(k), v))
        if turn is not None:
            q, k = (rotate(part.float(), *turn).to(part.dtype) for part in (q, k))
        sizes = [n * length for n, length in runs]
        pieces = zip(runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
        return self.out(torch.cat([attend(n, *parts) for (n, _), *parts in pieces]).flatten(-2))  # type: ignore[no-any-return]


def _attend(n_segments: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the output of so many equal segments that lie behind each other, each over itself."""
    q, k, v = (part.reshape(n_segments, -1, *part.shape[1:]).transpose(1, 2) for part in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


class VisionLayer(nn.Module):
    """One layer: norm, attention, norm, feed-forward block, each half added to its input."""

    def __init__(self, spec: LayerSpec, settings: VisionSettings) -> None:
        super().__init__()
        if not isinstance(spec.mixer, AttentionSpec):
            raise Unsupported("a vision layer without plain attention has no runtime")
        width = spec.width
        self.windowed = spec.mixer.grouping == "window"
        self.norm1 = make_norm(spec.norm, width, settings.norm_eps)
        self.attention = VisionAttention(width, spec.mixer, settings)
        self.norm2 = make_norm(spec.norm, width, settings.norm_eps)
        self.mlp = make_ffn(width, spec.ffn, settings.activation)
        self.scale1 = nn.Parameter(torch.empty(width)) if settings.layer_scale else None
        self.scale2 = nn.Parameter(torch.empty(width)) if settings.layer_scale else None

    def forward(self, x: Tensor, runs: Runs, turn: tuple[Tensor, Tensor] | None, watch: Watch | None = None) -> Tensor:
        """Return the layer's output for every row."""
        mixed = self.attention(self.norm1(x), runs, turn, watch)
        x = x + (mixed if self.scale1 is None else mixed * self.scale1)
        fed = self.mlp(self.norm2(x))
        return x + (fed if self.scale2 is None else fed * self.scale2)  # type: ignore[no-any-return]


class VisionEncoder(nn.Module):
    """A vision transformer over the patches of many items at once.

    Parameters
    ----------
    spec : VisionEncoderSpec
        Its sizes; layers behind the one that is read are not built.
    settings : VisionSettings
    merge : int
        Side of the blocks in whose order patches lie [patches]; 1 for tiles, whose patches lie row by row.
    window : int
        Side of a window [blocks].
    """

    def __init__(self, spec: VisionEncoderSpec, settings: VisionSettings, *, merge: int, window: int) -> None:
        super().__init__()
        self.settings, self.merge, self.window = settings, merge, window
        width, eps = spec.width, settings.norm_eps
        self.patch_embedding = nn.Linear(spec.patch_width, width, bias=spec.patch_bias)
        self.class_token = nn.Parameter(torch.empty(width)) if spec.class_token else None
        self.positions = nn.Parameter(torch.empty(spec.positions, width)) if spec.positions else None
        self.pre_norm = make_norm("layer", width, eps) if settings.pre_norm else nn.Identity()
        layers = [run.layer for run in spec.runs for _ in range(run.n_layers)]
        self.layers = nn.ModuleList(VisionLayer(layer, settings) for layer in layers)
        self.post_norm = make_norm("layer", width, eps) if settings.post_norm else nn.Identity()
        mixer = layers[0].mixer
        self.head_dim = mixer.head_dim if isinstance(mixer, AttentionSpec) else 0

    def forward(self, patches: Tensor, grids: Sequence[Grid], watch: Watch | None = None) -> Features:
        """Return the features of all patches.

        Parameters
        ----------
        patches : Tensor, shape (patches, patch_width)
            Of all items, one behind the other.
        grids : sequence of (int, int, int)
            Slices, rows and columns of every item.
        watch : Watch, optional
            Attends in place of the last layer's own attention.
        """
        extra = int(self.class_token is not None)
        places = layout(grids, merge=self.merge, window=self.window, extra=extra)
        x = self.patch_embedding(patches)
        if self.settings.positions == "interpolated" and self.positions is not None:
            indices, weights = stretched(places, grids, round(len(self.positions) ** 0.5))
            near = self.positions[torch.as_tensor(indices, device=x.device)]
            x = x + (near * torch.as_tensor(weights, device=x.device, dtype=x.dtype)[..., None]).sum(1)
        elif self.positions is not None or extra:
            x = self._tiles(x, len(grids))
        x = self.pre_norm(x)
        turn = self._turn(places.rows, places.columns, x.device) if self.settings.axial_theta else None
        order = None if places.order is None else torch.as_tensor(places.order, device=x.device)
        if order is not None:
            x, turn = x[order], (turn[0][order], turn[1][order]) if turn else None
        deep = []
        for index, layer in enumerate(self.layers):
            runs = places.windows if layer.windowed else places.slices
            x = layer(x, runs, turn, watch if index == len(self.layers) - 1 else None)
            if index in self.settings.deep_layers:
                deep.append(x)
        outputs = [self._patches(part, order, len(grids)) for part in (self.post_norm(x), *deep)]
        received = None if watch is None else self._patches(watch.received()[:, None], order, len(grids))[:, 0]
        return Features(outputs[0], tuple(outputs[1:]), tuple(grids), received)

    def _tiles(self, x: Tensor, n_tiles: int) -> Tensor:
        """Return the rows of equal tiles with their class tokens in front and the learned positions added."""
        tiles = x.reshape(n_tiles, -1, x.shape[-1])
        if self.class_token is not None:
            tiles = torch.cat((self.class_token.expand(n_tiles, 1, -1), tiles), dim=1)
        if self.positions is not None:
            if tiles.shape[1] != len(self.positions):
                rule = f"must be the {len(self.positions)} that positions were learned for"
                raise ValueError(f"rows of a tile={tiles.shape[1]} {rule}; resize pictures with preprocess")
            tiles = tiles + self.positions
        return tiles.flatten(0, 1)

    def _patches(self, x: Tensor, order: Tensor | None, n_tiles: int) -> Tensor:
        """Return rows in the order in which patches came, without class tokens that nobody reads."""
        if order is not None:
            x = torch.empty_like(x).index_copy_(0, order, x)
        if self.class_token is not None and self.settings.drops_class_token:
            x = x.reshape(n_tiles, -1, x.shape[-1])[:, 1:].flatten(0, 1)
        return x

    def _turn(self, rows: Indices, columns: Indices, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of every patch, for all heads: the first half of the angles by row, then by column."""
        half = self.head_dim // 2
        inverse = 1.0 / self.settings.axial_theta ** (torch.arange(0, half, 2, device=device).float() / half)
        places = torch.as_tensor(np.stack((rows, columns), axis=-1), device=device)
        cos, sin = turns((places[..., None].float() * inverse).flatten(-2))
        return cos[:, None], sin[:, None]
