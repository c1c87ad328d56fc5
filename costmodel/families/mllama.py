"""Llama 3.2 Vision: square tiles on a small canvas, a ViT that attends over all of them, a decoder that attends to it.

The language model sees one token an image; what the encoder makes is read by its cross-attention layers alone, whose
keys and values are computed once a request. Requests without pictures skip these layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from costmodel.adapters import AdapterSpec, projector
from costmodel.base import Foreign
from costmodel.families.files import Count, Layers, ModelFiles, ModelParts, divide, parse
from costmodel.families.pictures import StillsOnly, patches_along
from costmodel.families.text import read_decoder
from costmodel.layers import AttentionSpec, LayerRun, LayerSpec, MlpSpec, norm_parameters
from costmodel.models import MediaCost, VisionEncoderSpec

MODEL_TYPES = ("mllama",)
ROW_MULTIPLE = 8  # rows of a tile are padded to a multiple of it (MllamaVisionModel, and the original code)
IMAGE_TOKENS = 1  # <|image|>
GATES = 2  # a global layer: one behind attention, one behind the feed-forward block
RATIOS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]


CLASS_DEFAULTS: dict[str, Any] = {}
"""A part that a file leaves out."""


class MllamaVision(Foreign):
    """`MllamaVisionConfig`."""

    hidden_size: Count = 1280
    intermediate_size: Count = 5120
    num_hidden_layers: Layers = 32
    num_global_layers: Layers = 8
    attention_heads: Count = 16
    num_channels: Count = 3
    image_size: Count = 448
    patch_size: Count = 14
    vision_output_dim: Count = 7680
    max_num_tiles: Count = 4
    intermediate_layers_indices: tuple[int, ...] | None = (3, 7, 15, 23, 30)
    supported_aspect_ratios: list[list[Count]] | None = RATIOS

    def tile_rows(self) -> int:
        """Return the patches of a tile and its class token."""
        return patches_along(self.image_size, self.patch_size, "vision_config") ** 2 + 1

    def layer(self, *, gated: bool) -> LayerSpec:
        """Return one layer of the local or of the global, gated encoder."""
        heads = self.attention_heads
        head_dim = divide(self.hidden_size, heads, "hidden_size by attention_heads", "vision_config")
        mixer = AttentionSpec(heads, heads, head_dim, causal=False, rotary=False)
        ffn = MlpSpec(self.intermediate_size, gated=False, bias=True)
        return LayerSpec(self.hidden_size, mixer, ffn, "layer", extra_parameters=GATES * gated)

    def encoder(self) -> VisionEncoderSpec:
        """Return both encoders, one behind the other."""
        return VisionEncoderSpec(
            width=self.hidden_size,
            runs=(
                LayerRun(self.num_hidden_layers, self.layer(gated=False)),
                LayerRun(self.num_global_layers, self.layer(gated=True)),
            ),
            patch_width=self.num_channels * self.patch_size**2,
            positions=self.tile_rows(),
            class_token=True,
            extra_parameters=2 * norm_parameters("layer", self.hidden_size) + self._position_parameters(),
        )

    def output_width(self, source: str) -> int:
        """Return the width of what leaves the encoders: the last states beside those of some local layers."""
        indexes = self.intermediate_layers_indices
        n_kept = len(MllamaVision.model_fields["intermediate_layers_indices"].default if indexes is None else indexes)
        width = self.hidden_size * (1 + n_kept)
        if width != self.vision_output_dim:
            rule = f"must be hidden_size for the last and each of {n_kept} kept layers, {width}"
            raise ValueError(f"{source}: vision_config.vision_output_dim={self.vision_output_dim} {rule}")
        return width

    def _position_parameters(self) -> int:
        """Return what tells tiles apart: embeddings by aspect ratio before, inside and behind, and a gate for each."""
        n_ratios = len(RATIOS if self.supported_aspect_ratios is None else self.supported_aspect_ratios)
        tiles = (n_ratios + 1) * self.max_num_tiles * self.hidden_size
        return tiles * (self.tile_rows() + 2) + 3


@dataclass(frozen=True, slots=True)
class TiledCanvas(StillsOnly):
    """The smallest canvas of tiles on which an image need not shrink, or the one on which it shrinks least.

    Parameters
    ----------
    side, patch : int
        Sides of a tile and of a patch [pixels].
    max_tiles : int
        Tiles of the largest canvas.
    """

    family: ClassVar[str] = "Llama 3.2 Vision"
    side: int
    patch: int
    max_tiles: int

    def image(self, width: int, height: int, *, n_images: int = 1) -> MediaCost:
        """Return what an image of this size [pixels] is to the model.

        An engine needs the tiles of the canvas; `transformers` (and vLLM's encoder) runs `max_tiles` for every image.
        """
        del n_images
        tiles = self.n_tiles(width, height)
        return self._cost(tiles, IMAGE_TOKENS, executed=self._cost(self.max_tiles, IMAGE_TOKENS))

    def unit(self) -> MediaCost:
        """Return a canvas of all tiles, which nearly every image takes."""
        return self._cost(self.max_tiles, 0)

    def n_tiles(self, width: int, height: int) -> int:
        """Return the tiles of the canvas for an image of this size [pixels].

        References
        ----------
        .. [1] `get_optimal_tiled_canvas` of the Mllama image processor, transformers 5.23.
        """
        sides = range(1, self.max_tiles + 1)
        scales = [
            (min(rows * self.side / height, columns * self.side / width), columns * rows)
            for columns in sides
            for rows in sides
            if columns * rows <= self.max_tiles
        ]
        enlarging = [scale for scale, _ in scales if scale >= 1]
        best = min(enlarging) if enlarging else max(scale for scale, _ in scales)
        return min(tiles for scale, tiles in scales if scale == best)

    def _cost(self, tiles: int, markers: int, executed: MediaCost | None = None) -> MediaCost:
        patches = (self.side // self.patch) ** 2
        outputs = patches + 1
        rows = tiles * -(-outputs // ROW_MULTIPLE) * ROW_MULTIPLE
        return MediaCost(
            patches=tiles * patches,
            rows=rows,
            pairs=rows * rows,
            window_pairs=rows * rows,
            visual_tokens=0,
            marker_tokens=markers,
            largest_rows=rows,
            resized_pixels=tiles * self.side**2,
            cross_tokens=tiles * outputs,
            adapter_tokens=tiles * outputs,
            executed=executed,
        )


class Mllama(Foreign):
    """The parts of `MllamaConfig`."""

    vision_config: dict[str, Any] = CLASS_DEFAULTS
    text_config: dict[str, Any] = CLASS_DEFAULTS


class CanvasLimits(Foreign):
    """The parts of `preprocessor_config.json` that set the tiles."""

    max_image_tiles: Count | None = None
    size: dict[str, Any] = Field(default_factory=dict)


def read(files: ModelFiles) -> ModelParts:
    """Return the parts of a Llama 3.2 Vision model from its files."""
    config = parse(Mllama, files.config, files.source)
    vision = parse(MllamaVision, config.vision_config, f"{files.source}: vision_config")
    text = {"model_type": "mllama_text_model", **config.text_config}
    decoder = read_decoder(text, f"{files.source}: text_config")
    adapter = AdapterSpec(projector((vision.output_width(files.source), decoder.width)))
    return ModelParts(decoder, vision.encoder(), adapter, _media(files, vision))


def _media(files: ModelFiles, vision: MllamaVision) -> TiledCanvas:
    limits = parse(CanvasLimits, files.image, "preprocessor_config.json")
    side = limits.size.get("height", vision.image_size)
    if side != vision.image_size:
        rule = f"must be vision_config.image_size {vision.image_size}, to which the tower's positions are bound"
        raise ValueError(f"preprocessor_config.json: size.height={side!r} {rule}")
    return TiledCanvas(vision.image_size, vision.patch_size, limits.max_image_tiles or vision.max_num_tiles)
