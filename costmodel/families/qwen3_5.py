"""Qwen3.5 (and 3.6, which shares its classes): the tower and the pictures of Qwen3-VL without DeepStack.

The language model is a hybrid of linear and full attention, dense or with experts; see `text.qwen3_5`.
"""

from __future__ import annotations

from costmodel.families.files import ModelFiles, ModelParts, parse
from costmodel.families.native import check_width
from costmodel.families.qwen3_vl import Qwen3Vision, read_media, read_text

MODEL_TYPES = ("qwen3_5", "qwen3_5_moe")
TEXT_TYPES = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
"""The `model_type` of a text config that names none."""


class Qwen35Vision(Qwen3Vision):
    """`Qwen3_5VisionConfig`: whatever a file says of DeepStack, there is none."""

    deepstack_visual_indexes: tuple[int, ...] = ()


def read(files: ModelFiles) -> ModelParts:
    """Return the parts of a Qwen3.5 model from its files."""
    vision = parse(Qwen35Vision, files.config.get("vision_config"), f"{files.source}: vision_config")
    decoder = read_text(files, TEXT_TYPES)
    check_width(vision.out_hidden_size, decoder, files.source)
    return ModelParts(decoder, vision.encoder(), vision.adapter(0), read_media(files, vision))
