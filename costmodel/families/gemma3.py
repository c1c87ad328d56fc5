"""Gemma 3: a SigLIP tower at one fixed size, its patches pooled to 256 tokens, a decoder with sliding windows.

The tokens of a picture see each other in both directions. Pan and scan, which adds crops of long pictures, is off in
the released processor files and not modelled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from pydantic import Field

from costmodel.adapters import AdapterSpec, ElementwiseStep, LinearStep
from costmodel.base import Foreign
from costmodel.errors import Unsupported
from costmodel.families.files import Count, ModelFiles, ModelParts, parse
from costmodel.families.pictures import StillsOnly
from costmodel.families.text import read_decoder
from costmodel.families.vits import SiglipVision
from costmodel.models import MediaCost

MODEL_TYPES = ("gemma3",)
WRAPPER_TOKENS = 4  # "\n\n", <start_of_image>, <end_of_image>, "\n\n" (Gemma3Processor.full_image_sequence)


CLASS_DEFAULTS: dict[str, Any] = {}
"""A part that a file leaves out."""


class Gemma3(Foreign):
    """`Gemma3Config`."""

    vision_config: dict[str, Any] = CLASS_DEFAULTS
    text_config: dict[str, Any] = CLASS_DEFAULTS
    mm_tokens_per_image: Count = 256
    tie_word_embeddings: bool = True


class FixedSize(Foreign):
    """The parts of `preprocessor_config.json` that set the size."""

    size: dict[str, Any] = Field(default_factory=dict)
    do_pan_and_scan: bool | None = None


@dataclass(frozen=True, slots=True)
class PooledSquare(StillsOnly):
    """Every image becomes one square of the same size, whose patches are pooled.

    Parameters
    ----------
    side : int
        Side of the square [pixels].
    patches, tokens : int
        Patches of the square, and tokens after pooling.
    """

    family: ClassVar[str] = "Gemma 3"
    side: int
    patches: int
    tokens: int

    def image(self, width: int, height: int, *, n_images: int = 1) -> MediaCost:
        """Return what an image of any size [pixels] is to the model."""
        del width, height, n_images
        return replace(self.unit(), marker_tokens=WRAPPER_TOKENS)

    def unit(self) -> MediaCost:
        """Return one square."""
        return MediaCost(
            patches=self.patches,
            rows=self.patches,
            pairs=self.patches**2,
            window_pairs=self.patches**2,
            visual_tokens=self.tokens,
            marker_tokens=0,
            largest_rows=self.patches,
            resized_pixels=self.side**2,
            block_pairs=self.tokens * (self.tokens - 1) // 2,
        )


def read(files: ModelFiles) -> ModelParts:
    """Return the parts of a Gemma 3 model from its files."""
    config = parse(Gemma3, files.config, files.source)
    vision = parse(SiglipVision, config.vision_config, f"{files.source}: vision_config")
    text = {"model_type": "gemma3_text", **config.text_config}
    decoder = read_decoder(text, f"{files.source}: text_config", tied=config.tie_word_embeddings)
    media = _media(files, config, vision)
    return ModelParts(
        decoder=replace(decoder, bidirectional_media=True),
        vision=vision.encoder(),
        adapter=_adapter(vision.hidden_size, decoder.width, media),
        media=media,
    )


def _adapter(width: int, text_width: int, media: PooledSquare) -> AdapterSpec:
    """Return the projector: mean of square groups of patches, a norm, one matrix."""
    pooled = width * (1 + media.tokens / media.patches)
    return AdapterSpec(
        (
            ElementwiseStep("pool", pooled, per_token=0.0, per_patch=1.0),
            ElementwiseStep("norm", 2 * width, parameters=width),
            LinearStep("linear1", width, text_width, bias=False),
        )
    )


def _media(files: ModelFiles, config: Gemma3, vision: SiglipVision) -> PooledSquare:
    """Return the rule of pictures: groups are as large as fit when the pooled grid has the wanted side."""
    fixed = parse(FixedSize, files.image, "preprocessor_config.json")
    if fixed.do_pan_and_scan:
        raise Unsupported("preprocessor_config.json: do_pan_and_scan is not modelled; remove the key")
    side = fixed.size.get("height", vision.image_size)
    if side != vision.image_size:
        rule = f"must be vision_config.image_size {vision.image_size}, to which the tower's positions are bound"
        raise ValueError(f"preprocessor_config.json: size.height={side!r} {rule}")
    patches, tokens = vision.image_size // vision.patch_size, math.isqrt(config.mm_tokens_per_image)
    if not 1 <= tokens <= patches:
        rule = f"must not exceed the {patches**2} patches of a picture"
        raise ValueError(f"{files.source}: mm_tokens_per_image={config.mm_tokens_per_image} {rule}")
    group = patches // tokens
    return PooledSquare(vision.image_size, patches**2, (patches // group) ** 2)
