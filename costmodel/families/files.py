"""The files of a model folder, and the checks that every family makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError

from costmodel.adapters import AdapterSpec
from costmodel.base import Foreign
from costmodel.errors import Unsupported, one_line
from costmodel.models import DecoderSpec, MediaRule, VisionEncoderSpec

Json = Mapping[str, Any]
Count = Annotated[int, Field(gt=0, le=10**7, strict=True)]
"""A size in a config: a whole number that a real model can have."""
Layers = Annotated[int, Field(gt=0, le=1000, strict=True)]
"""A number of layers."""
Window = Annotated[int, Field(gt=1, le=10**7, strict=True)]
"""A sliding window [tokens]: a token and at least one before it."""
Area = Annotated[int, Field(gt=0, le=10**10, strict=True)]
"""An area [pixels]."""
TileCount = Annotated[int, Field(gt=0, le=1000, strict=True)]
"""A number of tiles."""
ConfigModel = TypeVar("ConfigModel", bound=Foreign)

UNMODELLED = {
    "quantization_config": "remove the key and give --weight-bits and --activation-bits instead",
    "compression_config": "remove the key and give --weight-bits and --activation-bits instead",
    "vision_lora": "merge the adapter into the weights first",
    "speech_lora": "merge the adapter into the weights first",
    "audio_config": "audio is not modelled; remove the key to price text and pictures alone",
    "num_experts": "this family is dense; the config asks for experts",
    "num_local_experts": "this family is dense; the config asks for experts",
    "n_routed_experts": "this family is dense; the config asks for experts",
    "kv_lora_rank": "latent attention is not modelled for this family",
}
"""Keys that change the cost, with the way out; a class that models some of them names them in `models`."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A `config.json` and the processor files that lie beside it.

    Parameters
    ----------
    config : mapping
        `config.json`.
    image, video : mapping
        `preprocessor_config.json` (or the image part of `processor_config.json`) and `video_preprocessor_config.json`.
    source : str
        What to call the file in messages.
    """

    config: Json
    image: Json = field(default_factory=dict)
    video: Json = field(default_factory=dict)
    source: str = "config.json"


@dataclass(frozen=True, slots=True)
class ModelParts:
    """What a family reads from the files."""

    decoder: DecoderSpec
    vision: VisionEncoderSpec | None = None
    adapter: AdapterSpec | None = None
    media: MediaRule | None = None
    notes: tuple[str, ...] = ()
    other_parameters: int = 0


def parse(model: type[ConfigModel], values: object, source: str) -> ConfigModel:
    """Return a part of a foreign file, checked, or raise one clear line.

    Raises
    ------
    ValueError
        If a key has a value that no such model can have.
    Unsupported
        If a key changes the cost and is not modelled.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{source}: expected an object with keys, found {type(values).__name__}")  # noqa: TRY004
    for key, way_out in UNMODELLED.items():
        if values.get(key) and key not in getattr(model, "models", frozenset()):
            raise Unsupported(f"{source}: {key} is not modelled; {way_out}")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise one_line(error, source) from None


def text_part(config: Json, model_type: str) -> tuple[dict[str, Any], bool]:
    """Return the language model's keys, nested or flat in the file, and whether its head is tied, as either level says.

    Parameters
    ----------
    model_type : str
        That of a nested part that names none.
    """
    nested = config.get("text_config")
    text = {"model_type": model_type, **nested} if isinstance(nested, dict) else dict(config)
    return text, any(bool(level.get("tie_word_embeddings", False)) for level in (config, text))


def divide(whole: int, part: int, names: str, source: str) -> int:
    """Return whole / part, which must be exact."""
    if whole % part:
        raise ValueError(f"{source}: {names}: {whole} must be a multiple of {part}")
    return whole // part
