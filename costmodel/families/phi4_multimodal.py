"""Phi-4-multimodal: crops of 448 pixels up to 36 and one of the whole picture, SigLIP, average pooling, a Phi-3.

A picture is padded to whole crops; rows and columns of patches that are all padding are dropped behind the tower, which
runs over all of them. 2x2 patches are averaged; a learned separator ends every row of tokens and one stands between the
crops and the whole picture; all of them go through the projector. The language model reads the layer before the last.

Only text and pictures are priced: the audio tower counts as weights alone, and no count has the two LoRA adapters of
the release, whose keys are refused. Reads the `transformers` layout (`phi4_multimodal`) and the flat part that the
original (`phi4mm`) shares with it. Of several pictures, `transformers` fills those with fewer crops up to the one with
most; here each pays for its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from costmodel.adapters import AdapterSpec, ElementwiseStep, projector
from costmodel.base import Foreign
from costmodel.families.files import Count, Layers, ModelFiles, ModelParts, TileCount, parse
from costmodel.families.pictures import StillsOnly, nearest_grid, patches_along, tiles_cost
from costmodel.families.text.phi3 import Phi3Text
from costmodel.families.vits import SiglipVision, used_layers
from costmodel.models import MediaCost

MODEL_TYPES = ("phi4_multimodal", "phi4mm")
POOL = 2  # patches averaged along a side, fixed in the model's class
MAX_CROPS = 36  # `dynamic_hd` of the image processor
UNSAID: dict[str, Any] = {}
"""A part that the file leaves out: every key has the default of its class."""
AUDIO_PARAMETERS = 466_432_256  # of the released model, counted on the transformers class
MIN_SIDE = 10  # the processor refuses pictures that become narrower [pixels]


class Phi4Vision(SiglipVision):
    """`Phi4MultimodalVisionConfig`: SigLIP with its pooling head, whose result is not read."""

    model_type: Literal["phi4_multimodal_vision"] = "phi4_multimodal_vision"  # type: ignore[assignment]
    hidden_size: Count = 1152
    intermediate_size: Count = 4304
    num_hidden_layers: Layers = 27
    num_attention_heads: Count = 16
    image_size: Count = 448
    patch_size: Count = 14
    crop_size: Count = 448
    feature_layer: int = -2
    vision_use_head: Literal[True] = True


class Phi4Text(Phi3Text):
    """`Phi4MultimodalConfig`."""

    models: ClassVar[frozenset[str]] = frozenset({"audio_config"})

    vocab_size: Count = 200064
    num_key_value_heads: Count | None = 8
    max_position_embeddings: Count = 131072
    vision_config: dict[str, Any] | None = UNSAID


class CropLimit(Foreign):
    """The part of `preprocessor_config.json` that sets the number of crops."""

    dynamic_hd: TileCount = MAX_CROPS


@dataclass(frozen=True, slots=True)
class PaddedCrops(StillsOnly):
    """A picture cut into crops after padding, and once as a whole.

    Parameters
    ----------
    side, patch : int
        Sides of a crop and of a patch [pixels].
    most : int
        Crops at most, the whole picture not counted.
    """

    family: ClassVar[str] = "Phi-4-multimodal"
    side: int
    patch: int
    most: int

    @property
    def _per_side(self) -> int:
        return self.side // self.patch

    @property
    def _tokens_per_side(self) -> int:
        return math.ceil(self._per_side / POOL)

    def image(self, width: int, height: int, *, n_images: int = 1) -> MediaCost:
        """Return what an image of this size [pixels] is to the model."""
        del n_images
        columns, rows = self._grid(width, height)
        wide, high = columns * self.side / width, rows * self.side / height
        resized = (columns * self.side, int(height * wide)) if wide < high else (int(width * high), rows * self.side)
        if min(resized) < MIN_SIDE:
            rule = f"becomes {resized[0]}x{resized[1]}, which must be {MIN_SIDE} pixels or more a side; crop it"
            raise ValueError(f"image {width}x{height} {rule}")
        kept_columns = self._tokens(columns, columns * self.side - resized[0])
        kept_rows = self._tokens(rows, rows * self.side - resized[1])
        whole = self._tokens_per_side
        return self._cost(columns * rows + 1, kept_rows * (kept_columns + 1) + 1 + whole * (whole + 1))

    def unit(self) -> MediaCost:
        """Return one crop."""
        return self._cost(1, self._tokens_per_side * (self._tokens_per_side + 1))

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """Return the columns and rows of crops: enough to cover the picture, or the nearest grid within the limit."""
        columns, rows = math.ceil(width / self.side), math.ceil(height / self.side)
        if columns * rows > self.most:
            return nearest_grid(width, height, side=self.side, most=self.most)
        return columns, rows

    def _tokens(self, crops: int, padding: int) -> int:
        """Return the tokens along a side of so many crops, without the patches that are all padding [pixels]."""
        whole, rest = divmod(crops * self._per_side - padding // self.patch, self._per_side)
        return whole * self._tokens_per_side + math.ceil(rest / POOL)

    def _cost(self, crops: int, tokens: int) -> MediaCost:
        return tiles_cost(crops, side=self.side, patch=self.patch, visual_tokens=tokens)


def read(files: ModelFiles) -> ModelParts:
    """Return the parts of a Phi-4-multimodal model from its files."""
    text = parse(Phi4Text, files.config, files.source)
    vision = parse(Phi4Vision, text.vision_config or {}, f"{files.source}: vision_config")
    if vision.crop_size != vision.image_size:
        rule = f"must equal image_size {vision.image_size}"
        raise ValueError(f"{files.source}: vision_config.crop_size={vision.crop_size} {rule}")
    patches_along(vision.image_size, vision.patch_size, f"{files.source}: vision_config")
    decoder = text.decoder(files.source)
    pooling = ElementwiseStep("pooling", vision.hidden_size * (1 + 1 / POOL**2), per_token=0.0, per_patch=1.0)
    steps = projector((vision.hidden_size, decoder.width, decoder.width))
    layer = used_layers(vision.feature_layer, vision.num_hidden_layers, f"{files.source}: vision_config.feature_layer")
    return ModelParts(
        decoder=decoder,
        vision=vision.encoder(layer),
        adapter=AdapterSpec((pooling, *steps), extra_parameters=2 * vision.hidden_size),  # two separators
        media=PaddedCrops(
            vision.image_size, vision.patch_size, parse(CropLimit, files.image, "preprocessor_config.json").dynamic_hd
        ),
        other_parameters=AUDIO_PARAMETERS,
        notes=("the audio tower counts as weights of the released size, and is never run",),
    )
