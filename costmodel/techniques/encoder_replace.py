"""Another vision encoder: convolutions whose work follows the pixels, and which make fewer tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

from costmodel.base import Quantity
from costmodel.errors import shown
from costmodel.layers import LayerRun, LayerSpec
from costmodel.media import MediaTotals
from costmodel.memo import remember
from costmodel.models import ModelSpec, VisionEncoderSpec
from costmodel.query import Query, encoder_segments
from costmodel.techniques.checks import anything
from costmodel.traces import TracedFfnSpec, TracedMixerSpec, TracedProduct

CHANNELS: Final = 3
DEFAULT_STRIDE: Final = 32
"""Side of a cell of the last feature map of a usual convolutional network (ResNet, ConvNeXt, FastViT) [pixels]."""


@dataclass(frozen=True, slots=True)
class EncoderReplace:
    """Puts a convolutional encoder in place of the model's.

    It is priced as one product that reads its weights once a pass, at the rates of products, and has no attention of a
    vision transformer: methods that read it become invalid.

    Parameters
    ----------
    flops_per_pixel : float
        Its work, which follows the pixels [FLOP]; 0 leaves the encoder of the model.
    parameters : float
        Its parameters.
    tokens_side_stride : float
        Pixels along a side of what one visual token stands for: (side / stride)^2 tokens a picture. 0 keeps the tokens
        of the model.
    side : float
        Side of the square into which every picture is resized [pixels]; 0 keeps the pixels of the model.

    Notes
    -----
    None of these can be swept: they make another model.
    """

    flops_per_pixel: float = 0.0
    parameters: float = 0.0
    tokens_side_stride: float = 0.0
    side: float = 0.0
    name: str = "EncoderReplace"

    def __post_init__(self) -> None:
        """Refuse what is no number, or no encoder."""
        for field in ("flops_per_pixel", "parameters", "tokens_side_stride", "side"):
            value = getattr(self, field)
            if np.ndim(value) or not 0 <= value < math.inf:
                raise ValueError(f"{self.name}.{field}={shown(value)} must be one number from 0; leave it out for none")
        if bool(self.flops_per_pixel) != bool(self.parameters):
            raise ValueError(f"{self.name} needs flops_per_pixel and parameters together; give both or none")
        if not self.flops_per_pixel and (self.tokens_side_stride or self.side):
            raise ValueError(f"{self.name} needs flops_per_pixel and parameters; fewer tokens alone are AdapterReduce")

    @property
    def slot(self) -> str:
        """The place it takes."""
        return "encoder"

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
        return "encoder"

    def apply(self, query: Query) -> Query:
        """Return the query with the other encoder."""
        if not self.flops_per_pixel or query.model.vision is None:
            return query
        key = ("encoder_replace", self.flops_per_pixel, self.parameters, self.tokens_side_stride)
        model = remember(query.model.cache, key, lambda: self._model(query.model))
        if not anything(query.media.items):
            return replace(query, model=model, encoder=encoder_segments(model, query.engine))
        media, keep = self._media(query)
        return replace(
            query,
            model=model,
            media=media,
            encoder=encoder_segments(model, query.engine),
            visual_tokens=query.visual_tokens * keep,
        )

    @property
    def _cell(self) -> float:
        """Side of what one row of the encoder stands for [pixels]."""
        return self.tokens_side_stride or DEFAULT_STRIDE

    def _model(self, model: ModelSpec) -> ModelSpec:
        """Return the model with the new encoder: one product of its weights over the cells of its last map."""
        side = max(1, round(math.sqrt(self.parameters)))
        ratio = self.flops_per_pixel * self._cell**2 / (2.0 * side * side)
        ffn = TracedFfnSpec((TracedProduct("all", side, side, ratio),), round(self.parameters))
        run = LayerRun(1, LayerSpec(1, TracedMixerSpec(()), ffn, "rms", n_norms=0))
        # Widths of one: the stem and all else belong to the product, and the pixels are copied all the same.
        vision = VisionEncoderSpec(1, (run,), patch_width=round(CHANNELS * self._cell**2))
        return replace(model, vision=vision, cache={})

    def _media(self, query: Query) -> tuple[MediaTotals, Quantity]:
        """Return the totals with new cells for patches, and the new visual tokens over the old."""
        old = query.media
        pixels = old.pictures * self.side**2 if self.side else old.resized_pixels
        cells = pixels / self._cell**2
        seen = np.maximum(query.visual_tokens + old.cross_tokens, 1.0)
        keep = cells / seen if self.tokens_side_stride else 1.0
        per_cell = cells / np.maximum(old.patches, 1.0)
        per_pixel = pixels / np.maximum(old.resized_pixels, 1.0)
        factors = dict.fromkeys(("adapter_tokens", "visual_tokens", "cross_tokens"), keep)
        scaled = old.scaled(block_pairs=keep * keep, resized_pixels=per_pixel, patches=per_cell, **factors)
        largest = np.minimum(old.largest_rows * per_cell, cells)
        return replace(scaled, rows=cells, pairs=0.0 * cells, window_pairs=0.0 * cells, largest_rows=largest), keep
