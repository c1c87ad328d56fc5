"""LLaVA-1.5: a CLIP tower at a fixed resolution, two linear layers, a Llama. Also Pixtral, whose files name this class.

With CLIP every image is resized and cropped to one square, so its size does not matter. The language model reads the
layer before the last (`vision_feature_layer`), so an engine need not run the last one; `transformers` does. With the
tower of Pixtral images keep their resolution, see `costmodel.families.mistral3`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

from costmodel.adapters import AdapterSpec, projector
from costmodel.base import Foreign
from costmodel.errors import unknown
from costmodel.families.files import ModelFiles, ModelParts, parse
from costmodel.families.mistral3 import PixtralVision, picture_rule
from costmodel.families.pictures import StillsOnly, tiles_cost
from costmodel.families.text import read_decoder
from costmodel.families.vits import ClipVision, used_layers
from costmodel.models import MediaCost, MediaRule

MODEL_TYPES = ("llava",)


CLIP_LARGE_336: dict[str, object] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
"""The tower of a config that names none."""


class Llava(Foreign):
    """`LlavaConfig`."""

    vision_config: dict[str, object] = CLIP_LARGE_336
    text_config: dict[str, object]
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    multimodal_projector_bias: bool = True
    tie_word_embeddings: bool = False


@dataclass(frozen=True, slots=True)
class FixedSquare(StillsOnly):
    """Every image becomes one square of the same size."""

    family: ClassVar[str] = "LLaVA-1.5"
    side: int
    patch: int
    keeps_class_token: bool

    def image(self, width: int, height: int, *, n_images: int = 1) -> MediaCost:
        """Return what an image of any size [pixels] is to the model."""
        del width, height, n_images
        return self.unit()

    def unit(self) -> MediaCost:
        """Return one square."""
        tokens = (self.side // self.patch) ** 2 + self.keeps_class_token
        return tiles_cost(1, side=self.side, patch=self.patch, visual_tokens=tokens, class_token=True)


def read(files: ModelFiles) -> ModelParts:
    """Return the parts of a LLaVA-1.5 or Pixtral model from its files."""
    config = parse(Llava, files.config, files.source)
    tower = str(config.vision_config.get("model_type", "clip_vision_model"))
    if tower not in TOWERS:
        raise unknown(f"vision model type (in {files.source}: vision_config)", tower, TOWERS)
    vision, media = TOWERS[tower](config, files)
    tied = config.tie_word_embeddings or bool(config.text_config.get("tie_word_embeddings", False))
    decoder = read_decoder(config.text_config, f"{files.source}: text_config", tied=tied)
    widths = (vision.hidden_size, decoder.width, decoder.width)
    key = f"{files.source}: vision_feature_layer"
    used = used_layers(config.vision_feature_layer, vision.num_hidden_layers, key)
    return ModelParts(
        decoder=decoder,
        vision=vision.encoder(used),
        adapter=AdapterSpec(projector(widths, bias=config.multimodal_projector_bias)),
        media=media,
    )


Tower = ClipVision | PixtralVision


def _clip(config: Llava, files: ModelFiles) -> tuple[Tower, MediaRule]:
    vision = parse(ClipVision, config.vision_config, f"{files.source}: vision_config")
    keeps_class_token = config.vision_feature_select_strategy == "full"
    return vision, FixedSquare(vision.image_size, vision.patch_size, keeps_class_token)


def _pixtral(config: Llava, files: ModelFiles) -> tuple[Tower, MediaRule]:
    if config.vision_feature_select_strategy != "full":
        rule = "drops the first patch of a tower without a class token; use 'full'"
        raise ValueError(f"{files.source}: vision_feature_select_strategy='default' {rule}")
    vision = parse(PixtralVision, config.vision_config, f"{files.source}: vision_config")
    return vision, picture_rule(files, vision, merge=1)


TOWERS: Final[dict[str, Callable[[Llava, ModelFiles], tuple[Tower, MediaRule]]]] = {
    "clip_vision_model": _clip,
    "pixtral": _pixtral,
}
"""How the tower and the rule of its pictures are read, by the tower's `model_type`."""
