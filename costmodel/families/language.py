"""Language models alone: every decoder of `costmodel.families.text` that no vision-language family reads.

A picture given to such a model is refused, and so is a file that has a vision part under the name of a decoder.
"""

from __future__ import annotations

from costmodel.errors import Unsupported
from costmodel.families import vision_model_types
from costmodel.families.files import ModelFiles, ModelParts
from costmodel.families.text import load_text_configs, read_decoder

MODEL_TYPES = tuple(sorted(set(load_text_configs()) - vision_model_types()))
"""A flat file of some vision-language models has the `model_type` of its decoder; those belong to their family."""

VISION_KEYS = (
    "vision_config",
    "vision_tower",
    "mm_vision_tower",
    "visual",
    "vit_config",
    "img_processor",
    "image_encoder",
    "embd_layer",
)
"""Keys under which the vision part stands in a config.json, of `transformers` and of original repositories."""


def read(files: ModelFiles) -> ModelParts:
    """Return the one part of a language model from its files."""
    seen = [key for key in VISION_KEYS if files.config.get(key)]
    if seen:
        name = files.config.get("model_type")
        way_out = "use the model_type of its family, or remove the key to price text alone"
        raise Unsupported(f"{files.source}: {seen[0]} is a vision part, which no {name!r} has; {way_out}")
    return ModelParts(read_decoder(files.config, files.source))
