"""DeepSeek-VL2: square tiles of the best candidate resolution and a global view, SigLIP, pairs of patches merged.

The 27x27 patches of a tile are padded to 28x28 and merged 2x2 before two linear layers, so a tile is 14x14 embeddings.
A learned vector ends every row, another stands between the global view and the tiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field

from costmodel.adapters import AdapterSpec, projector
from costmodel.base import Foreign
from costmodel.families.files import Count, Layers, ModelFiles, ModelParts, parse
from costmodel.families.pictures import StillsOnly, tiles_cost
from costmodel.families.text import read_decoder
from costmodel.families.vits import SiglipVision
from costmodel.models import MediaCost

MODEL_TYPES = ("deepseek_vl_v2",)
MOST_TILED_IMAGES = 2  # the processor of the repository tiles only when a conversation has no more pictures
SEPARATORS = 1  # `view_seperator` between the global view and the tiles


class VisionPart(Foreign):
    """The vision part of the original `config.json`: timm's names for a SigLIP tower."""

    image_size: Count = 384
    patch_size: Count = 16
    width: Count = 1024
    layers: Layers = 24
    heads: Count = 16
    mlp_ratio: float = Field(default=4.0, gt=0, le=64)
    class_token: Literal[False] = False
    global_pool: Literal["map"] = "map"

    def siglip(self) -> SiglipVision:
        """Return the tower; its pooling head is in the checkpoint."""
        return SiglipVision(
            hidden_size=self.width,
            intermediate_size=int(self.width * self.mlp_ratio),
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            image_size=self.image_size,
            patch_size=self.patch_size,
        )


class ProjectorPart(Foreign):
    """The projector part of the original `config.json`."""

    projector_type: Literal["downsample_mlp_gelu"] = "downsample_mlp_gelu"
    input_dim: Count = 1152
    n_embed: Count = 2048
    depth: Layers = 2
    mlp_ratio: Count = 1
    downsample_ratio: Count = 2
    token_pooling: Literal[False] = False

    def adapter(self) -> AdapterSpec:
        """Return the linear layers over merged patches, and the two learned vectors."""
        hidden = self.n_embed * self.mlp_ratio
        between = [hidden] * max(1, self.depth - 1)
        widths = (self.input_dim * self.downsample_ratio**2, *between, self.n_embed)
        return AdapterSpec(projector(widths), extra_parameters=2 * self.n_embed)


class DeepseekVl2(Foreign):
    """The original `config.json`."""

    vision_config: dict[str, Any]
    projector_config: dict[str, Any]
    language_config: dict[str, Any]
    candidate_resolutions: tuple[tuple[Count, Count], ...] = Field(default=((384, 384),), min_length=1)
    tile_tag: Literal["2D"] = "2D"


class Processor(Foreign):
    """The part of the processor's file that sets sizes."""

    candidate_resolutions: tuple[tuple[Count, Count], ...] | None = None


@dataclass(frozen=True, slots=True)
class GlobalAndTiles(StillsOnly):
    """A global view, and the tiles of the candidate that keeps most pixels.

    Parameters
    ----------
    side, patch : int
        Sides of a tile and of a patch [pixels].
    merge : int
        Patches merged along a side.
    candidates : tuple of (int, int)
        Widths and heights that a picture may be tiled at [pixels].
    """

    family: ClassVar[str] = "DeepSeek-VL2"
    side: int
    patch: int
    merge: int
    candidates: tuple[tuple[int, int], ...]

    def image(self, width: int, height: int, *, n_images: int = 1) -> MediaCost:
        """Return what an image of this size [pixels] is to the model; one of many is a single tile."""
        if n_images > MOST_TILED_IMAGES:
            return self._cost(1, 1)
        best_width, best_height = self._best(width, height)
        return self._cost(best_width // self.side, best_height // self.side)

    def unit(self) -> MediaCost:
        """Return one view with the vectors that end its rows."""
        return self._pieces(1, self._merged * (self._merged + 1))

    @property
    def _merged(self) -> int:
        """Merged patches along a side of a tile, the last ones padded."""
        return math.ceil(self.side // self.patch / self.merge)

    def _best(self, width: int, height: int) -> tuple[int, int]:
        """Return the candidate that keeps most of the picture's pixels, then wastes fewest."""
        best, most, least_waste = self.candidates[0], 0, math.inf
        for candidate in self.candidates:
            scale = min(candidate[0] / width, candidate[1] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            waste = candidate[0] * candidate[1] - kept
            if (kept, -waste) > (most, -least_waste):
                best, most, least_waste = candidate, kept, waste
        return best

    def _cost(self, columns: int, rows: int) -> MediaCost:
        side = self._merged
        view, tiles = side * (side + 1), rows * side * (columns * side + 1)
        return self._pieces(1 + columns * rows, view + SEPARATORS + tiles)

    def _pieces(self, pieces: int, tokens: int) -> MediaCost:
        adapted = pieces * self._merged**2
        return tiles_cost(pieces, side=self.side, patch=self.patch, visual_tokens=tokens, adapter_tokens=adapted)


def read(files: ModelFiles) -> ModelParts:
    """Return the parts of a DeepSeek-VL2 model from its files."""
    config = parse(DeepseekVl2, files.config, files.source)
    # the projector first: DeepSeek-OCR has this model_type too, and is told apart by it
    joint = parse(ProjectorPart, config.projector_config, f"{files.source}: projector_config")
    vision = parse(VisionPart, config.vision_config, f"{files.source}: vision_config")
    decoder = read_decoder(config.language_config, f"{files.source}: language_config")
    for name, ours, theirs in (("input_dim", joint.input_dim, vision.width), ("n_embed", joint.n_embed, decoder.width)):
        if ours != theirs:
            raise ValueError(f"{files.source}: projector_config.{name}={ours} must be {theirs}, the tower's width")
    processor = parse(Processor, files.image, "processor_config.json")
    candidates = processor.candidate_resolutions or config.candidate_resolutions
    if any(length % vision.image_size for candidate in candidates for length in candidate):
        raise ValueError(f"{files.source}: candidate_resolutions must be multiples of the tile, {vision.image_size}")
    media = GlobalAndTiles(vision.image_size, vision.patch_size, joint.downsample_ratio, candidates)
    return ModelParts(decoder, vision.siglip().encoder(), joint.adapter(), media)
