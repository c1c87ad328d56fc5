"""Phi-3-vision and Phi-3.5-vision: a picture enlarged to a grid of 336-pixel crops, CLIP, a Phi-3.

A picture is scaled to the widest grid of at most `num_crops` crops that its aspect ratio allows and padded to whole
crops; one more crop shows all of it. Of each crop, 2x2 patches are merged; a learned separator ends every row of tokens
and one stands between the grid and the whole picture; all of them go through the projector. The language model reads
the layer before the last. The original code fills a picture up to `num_crops` + 1 crops with black ones and encodes
them as well (convention `torch`); an engine need not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from costmodel.adapters import AdapterSpec, projector
from costmodel.base import Foreign
from costmodel.families.files import ModelFiles, ModelParts, TileCount, divide, parse
from costmodel.families.pictures import StillsOnly, patches_along, tiles_cost
from costmodel.families.text.phi3 import Phi3Text
from costmodel.families.vits import ClipVision, used_layers
from costmodel.models import MediaCost

MODEL_TYPES = ("phi3_v",)
MERGE = 2  # patches merged along a side, fixed in image_embedding_phi3_v.py of the repository
NUM_CROPS = 4  # preprocessor_config.json of Phi-3.5-vision; Phi-3-vision has 16
CLIP_LARGE_336: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
"""The tower that the repository's code builds; its config.json names it without sizes."""


class ImageProcessorPart(Foreign):
    """`img_processor` of the config.json."""

    name: Literal["clip_vision_model"] = "clip_vision_model"
    model_name: Literal["openai/clip-vit-large-patch14-336"] = "openai/clip-vit-large-patch14-336"
    layer_idx: int = -2


class EmbeddingPart(Foreign):
    """`embd_layer` of the config.json."""

    projection_cls: Literal["mlp"] = "mlp"
    use_hd_transform: Literal[True] = True
    with_learnable_separator: Literal[True] = True


class Phi3V(Foreign):
    """The multimodal keys of `config.json`; the language model's lie beside them."""

    img_processor: dict[str, Any]
    embd_layer: dict[str, Any]
    vision_config: dict[str, Any] = CLIP_LARGE_336


class CropLimit(Foreign):
    """The part of `preprocessor_config.json` that sets the number of crops."""

    num_crops: TileCount = NUM_CROPS


@dataclass(frozen=True, slots=True)
class Crops(StillsOnly):
    """A picture enlarged to a grid of crops, and once as a whole.

    Parameters
    ----------
    side, patch : int
        Sides of a crop and of a patch [pixels].
    per_side : int
        Tokens along a side of a crop.
    most : int
        Crops of the grid at most.
    """

    family: ClassVar[str] = "Phi-3-vision"
    side: int
    patch: int
    per_side: int
    most: int

    def image(self, width: int, height: int, *, n_images: int = 1) -> MediaCost:
        """Return what an image of this size [pixels] is to the model."""
        del n_images
        columns, rows = self._grid(width, height)
        newlines = (rows + 1) * self.per_side
        tokens = (columns * rows + 1) * self.per_side**2 + newlines + 1
        padded = self._cost(self.most + 1, tokens)
        return self._cost(columns * rows + 1, tokens, executed=padded)

    def unit(self) -> MediaCost:
        """Return one crop."""
        return self._cost(1, self.per_side * (self.per_side + 1))

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """Return the columns and rows of crops: as many along the longer side as the limit allows."""
        ratio = max(width, height) / min(width, height)
        along = 1
        while (along + 1) * math.ceil((along + 1) / ratio) <= self.most:
            along += 1
        shorter = int(along * self.side / ratio)
        if not shorter:
            rule = f"must not be longer than {along * self.side} times its other side"
            raise ValueError(f"image {width}x{height} {rule}; crop it")
        across = math.ceil(shorter / self.side)
        return (along, across) if width >= height else (across, along)

    def _cost(self, crops: int, tokens: int, *, executed: MediaCost | None = None) -> MediaCost:
        return tiles_cost(
            crops, side=self.side, patch=self.patch, visual_tokens=tokens, class_token=True, executed=executed
        )


def read(files: ModelFiles) -> ModelParts:
    """Return the parts of a Phi-3-vision model from its files."""
    config = parse(Phi3V, files.config, files.source)
    vision = parse(ClipVision, config.vision_config, f"{files.source}: vision_config")
    processor = parse(ImageProcessorPart, config.img_processor, f"{files.source}: img_processor")
    parse(EmbeddingPart, config.embd_layer, f"{files.source}: embd_layer")
    decoder = parse(Phi3Text, files.config, files.source).decoder(files.source)
    merged, width = vision.hidden_size * MERGE**2, decoder.width
    patches = patches_along(vision.image_size, vision.patch_size, f"{files.source}: vision_config")
    per_side = divide(patches, MERGE, "patches along a side by 2", "vision_config")
    layer = used_layers(processor.layer_idx, vision.num_hidden_layers, f"{files.source}: img_processor.layer_idx")
    most = parse(CropLimit, files.image, "preprocessor_config.json").num_crops
    return ModelParts(
        decoder=decoder,
        vision=vision.encoder(layer),
        adapter=AdapterSpec(projector((merged, width, width)), extra_parameters=2 * merged),  # two separators
        media=Crops(vision.image_size, vision.patch_size, per_side, most),
    )
