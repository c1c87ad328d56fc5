"""Aya Vision: a SigLIP tower on tiles chosen by aspect ratio, pixel shuffle, a gated projector, a Cohere decoder.

Tiles are cut as InternVL cuts them. Each stands behind a tag, the whole image behind another, and one token opens and
one closes an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from costmodel.adapters import AdapterSpec, ElementwiseStep, LinearStep
from costmodel.base import Foreign
from costmodel.families.anyres import feature_layers
from costmodel.families.files import Count, ModelFiles, ModelParts, divide, parse
from costmodel.families.pictures import StillsOnly, nearest_grid, tiles_cost
from costmodel.families.text import read_decoder
from costmodel.families.vits import SiglipVision
from costmodel.layers import norm_parameters
from costmodel.models import MediaCost

MODEL_TYPES = ("aya_vision",)

DECODER: dict[str, object] = {"model_type": "cohere2"}
"""The language model of a config that names none."""
WRAPPER_TOKENS = 3  # <|START_OF_IMG|>, TILE_GLOBAL and <|END_OF_IMG|> (AyaVisionProcessor)


class AyaVision(Foreign):
    """`AyaVisionConfig`."""

    vision_config: dict[str, object]
    text_config: dict[str, object] | None = DECODER
    vision_feature_layer: int = -1
    vision_feature_select_strategy: Literal["full"] = "full"
    downsample_factor: Count = 2
    alignment_intermediate_size: Count | None = None
    tie_word_embeddings: bool = True


class TileLimits(Foreign):
    """The parts of `preprocessor_config.json` that set the number of tiles; the processor always cuts."""

    min_patches: Count = 1
    max_patches: Count = 12


@dataclass(frozen=True, slots=True)
class TaggedTiles(StillsOnly):
    """Tiles of the grid whose aspect ratio is nearest, and the whole image beside more than one.

    Parameters
    ----------
    side, patch : int
        Sides of a tile and of a patch [pixels].
    tokens_per_tile : int
        Visual tokens after pixel shuffle.
    min_tiles, max_tiles : int
        Limits of the grid.
    """

    family: ClassVar[str] = "Aya Vision"
    side: int
    patch: int
    tokens_per_tile: int
    min_tiles: int = 1
    max_tiles: int = 12

    def image(self, width: int, height: int, *, n_images: int = 1) -> MediaCost:
        """Return what an image of this size [pixels] is to the model."""
        del n_images
        columns, rows = nearest_grid(width, height, side=self.side, least=self.min_tiles, most=self.max_tiles)
        cut = columns * rows if columns * rows > 1 else 0
        return self._cost(cut + 1, WRAPPER_TOKENS + cut)

    def unit(self) -> MediaCost:
        """Return one tile."""
        return self._cost(1, 0)

    def _cost(self, tiles: int, markers: int) -> MediaCost:
        return tiles_cost(
            tiles,
            side=self.side,
            patch=self.patch,
            visual_tokens=tiles * self.tokens_per_tile,
            marker_tokens=markers,
        )


def read(files: ModelFiles) -> ModelParts:
    """Return the parts of an Aya Vision model from its files."""
    config = parse(AyaVision, files.config, files.source)
    source = f"{files.source}: vision_config"
    vision = parse(SiglipVision, config.vision_config, source)
    text = {**DECODER, **(config.text_config or {})}
    decoder = read_decoder(text, f"{files.source}: text_config", tied=config.tie_word_embeddings)
    (used,) = feature_layers(config.vision_feature_layer, vision.num_hidden_layers, files.source)
    limits = parse(TileLimits, files.image, "preprocessor_config.json")
    names = "patches along a side by downsample_factor"
    per_side = divide(vision.image_size // vision.patch_size, config.downsample_factor, names, source)
    media = TaggedTiles(vision.image_size, vision.patch_size, per_side**2, limits.min_patches, limits.max_patches)
    return ModelParts(decoder, vision.encoder(used), _adapter(config, vision, decoder.width, files.source), media)


def _adapter(config: AyaVision, vision: SiglipVision, width: int, source: str) -> AdapterSpec:
    """Return the projector: a norm over merged patches, a linear layer whose halves gate each other, another one."""
    merged = vision.hidden_size * config.downsample_factor**2
    hidden = config.alignment_intermediate_size or width
    gated = divide(hidden, 2, "alignment_intermediate_size by the halves of the gate", source)
    steps = (
        ElementwiseStep("norm", 2 * merged, parameters=norm_parameters("layer", merged)),
        LinearStep("linear1", merged, hidden, split="columns"),
        ElementwiseStep("activation", hidden + gated),
        LinearStep("linear2", gated, width, split="rows"),
    )
    return AdapterSpec(steps)
