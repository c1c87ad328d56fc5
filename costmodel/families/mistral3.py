"""Mistral 3: a Pixtral tower at native resolution, patches merged by a matrix, two linear layers, a Mistral.

Pictures are never enlarged. Each row of tokens ends in a token of its own, the last row in another. The tower and the
rule of its pictures also serve Pixtral itself, whose files call it a LLaVA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from costmodel.adapters import AdapterSpec, ElementwiseStep, LinearStep, projector
from costmodel.base import Foreign
from costmodel.families.files import Count, Layers, ModelFiles, ModelParts, divide, parse
from costmodel.families.pictures import StillsOnly
from costmodel.families.text import read_decoder
from costmodel.families.vits import used_layers
from costmodel.layers import AttentionSpec, LayerRun, LayerSpec, MlpSpec, norm_parameters
from costmodel.models import MediaCost, VisionEncoderSpec

MODEL_TYPES = ("mistral3",)
MISTRAL_SMALL: dict[str, object] = {
    "model_type": "mistral",
    "head_dim": 128,
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "sliding_window": None,
    "vocab_size": 131072,
}
"""The decoder of a config that names none."""
TOWER_OF_14: dict[str, object] = {"patch_size": 14, "image_size": 1540}
"""The tower of a config that names none."""


class PixtralVision(Foreign):
    """`PixtralVisionConfig`."""

    model_type: Literal["pixtral"] = "pixtral"
    hidden_size: Count = 1024
    intermediate_size: Count = 4096
    num_hidden_layers: Layers = 24
    num_attention_heads: Count = 16
    num_channels: Count = 3
    image_size: Count = 1024
    patch_size: Count = 16

    def layer(self) -> LayerSpec:
        """Return one layer, built like a Llama's; `head_dim` of a file is not read by `transformers` either."""
        heads = self.num_attention_heads
        head_dim = divide(self.hidden_size, heads, "hidden_size by heads", "vision_config")
        mixer = AttentionSpec(heads, heads, head_dim, causal=False)
        return LayerSpec(self.hidden_size, mixer, MlpSpec(self.intermediate_size, gated=True, bias=False), "rms")

    def encoder(self, n_used: int) -> VisionEncoderSpec:
        """Return the tower when the output of layer `n_used` is read."""
        layer, unused = self.layer(), self.num_hidden_layers - n_used
        return VisionEncoderSpec(
            width=self.hidden_size,
            runs=(LayerRun(n_used, layer),),
            unused_runs=(LayerRun(unused, layer),) if unused else (),
            patch_width=self.num_channels * self.patch_size**2,
            extra_parameters=norm_parameters("rms", self.hidden_size),
        )


@dataclass(frozen=True, slots=True)
class NeverEnlarged(StillsOnly):
    """A longest side, and sides rounded up to whole merged patches.

    Parameters
    ----------
    patch, merge : int
        Patch side [pixels], patches merged along a side.
    longest : int
        Longest side of the resized picture before rounding [pixels].
    """

    family: ClassVar[str] = "The Pixtral tower"
    patch: int
    merge: int
    longest: int

    def image(self, width: int, height: int, *, n_images: int = 1) -> MediaCost:
        """Return what an image of this size [pixels] is to the model.

        `transformers` puts all images of a request into one row and masks the pairs between them: for images of one
        size these are the pairs of one image as often as there are images.
        """
        columns, rows = self._grid(width, height)
        cost = self._cost(columns * rows, rows)
        all_pairs = replace(cost, pairs=n_images * cost.pairs, window_pairs=n_images * cost.window_pairs)
        return replace(cost, executed=all_pairs) if n_images > 1 else cost

    def unit(self) -> MediaCost:
        """Return one token's patches, in a picture over all of which the encoder attends."""
        return replace(self._cost(1, 0), pairs=0, window_pairs=0)

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """Return the tokens along each side.

        References
        ----------
        .. [1] `get_resize_output_image_size` of the Pixtral image processor, transformers 5.23.
        """
        ratio, side = max(height / self.longest, width / self.longest), self.patch * self.merge
        small = (math.floor(width / ratio), math.floor(height / ratio)) if ratio > 1 else (width, height)
        if not min(small):
            rule = f"must not vanish at a longest side of {self.longest} pixels; crop it first"
            raise ValueError(f"image {width}x{height} {rule}")
        return math.ceil(small[0] / side), math.ceil(small[1] / side)

    def _cost(self, tokens: int, markers: int) -> MediaCost:
        patches = tokens * self.merge**2
        return MediaCost(
            patches=patches,
            rows=patches,
            pairs=patches**2,
            window_pairs=patches**2,
            visual_tokens=tokens,
            marker_tokens=markers,  # [IMG_BREAK] behind each row, behind the last one [IMG_END]
            largest_rows=patches,
            resized_pixels=patches * self.patch**2,
        )


class LongestEdge(Foreign):
    """The part of `preprocessor_config.json` that sets the size."""

    size: dict[str, Any] = Field(default_factory=dict)


def picture_rule(files: ModelFiles, vision: PixtralVision, merge: int) -> NeverEnlarged:
    """Return the rule of pictures; a processor file may change the longest side."""
    size = parse(LongestEdge, files.image, "preprocessor_config.json").size
    longest = size.get("longest_edge") or size.get("height") or vision.image_size
    if not isinstance(longest, int) or longest < 1 or size.get("width", size.get("height")) != size.get("height"):
        raise ValueError(f"preprocessor_config.json: size={size} must hold a longest_edge in pixels")
    return NeverEnlarged(vision.patch_size, merge, longest)


class Mistral3(Foreign):
    """`Mistral3Config`."""

    vision_config: dict[str, Any] = TOWER_OF_14
    text_config: dict[str, Any] = MISTRAL_SMALL
    vision_feature_layer: int = -1
    multimodal_projector_bias: bool = False
    spatial_merge_size: Count = 2


def read(files: ModelFiles) -> ModelParts:
    """Return the parts of a Mistral 3 model from its files."""
    config = parse(Mistral3, files.config, files.source)
    vision = parse(PixtralVision, config.vision_config, f"{files.source}: vision_config")
    text = {"model_type": "mistral", **config.text_config}
    # the class ties the head by default, yet released files say nothing of it and their checkpoints hold one
    tied = bool(files.config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    decoder = read_decoder(text, f"{files.source}: text_config", tied=tied)
    key = f"{files.source}: vision_feature_layer"
    used = used_layers(config.vision_feature_layer, vision.num_hidden_layers, key)
    return ModelParts(
        decoder=decoder,
        vision=vision.encoder(used),
        adapter=_adapter(config, vision.hidden_size, decoder.width),
        media=picture_rule(files, vision, config.spatial_merge_size),
    )


def _adapter(config: Mistral3, width: int, text_width: int) -> AdapterSpec:
    """Return the projector: a norm over each patch, the matrix that merges patches, two linear layers."""
    norm = ElementwiseStep("norm", 2 * width, parameters=width, per_token=0.0, per_patch=1.0)
    merge = LinearStep("merge", width * config.spatial_merge_size**2, width, bias=False)
    linear = projector((width, text_width, text_width), bias=config.multimodal_projector_bias)
    return AdapterSpec((norm, merge, *linear))
