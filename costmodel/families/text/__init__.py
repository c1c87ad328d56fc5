"""Language models: one file a kind of decoder, used by the families of vision-language models and on their own.

A file defines `TEXT_CONFIGS`: for each `model_type` a class that derives from `Foreign` and has
`decoder(source, tied=…) -> DecoderSpec`. `load_text_configs` finds the files by themselves. Missing keys take the value
that the `transformers` 5.23 class of the same `model_type` gives them, which is what the published files rely on.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Protocol

from costmodel.errors import unknown
from costmodel.families.files import Json, parse
from costmodel.models import DecoderSpec


class TextConfig(Protocol):
    """A checked text config."""

    def decoder(self, source: str, *, tied: bool | None = None) -> DecoderSpec:
        """Return the language model; `tied` is what an outer config says of its head."""


@functools.cache
def load_text_configs() -> Mapping[str, type[TextConfig]]:
    """Return the config class of every known `model_type`."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {
        model_type: config for module in modules for model_type, config in getattr(module, "TEXT_CONFIGS", {}).items()
    }


def read_decoder(config: Json, source: str, *, tied: bool | None = None) -> DecoderSpec:
    """Return the language model of a text config.

    Parameters
    ----------
    config : mapping
        The text part of a config.json.
    source : str
        What to call the file in messages.
    tied : bool, optional
        What the outer config says of the head; None leaves it to the text config.

    Raises
    ------
    LookupError
        If the `model_type` is not one of the decoders known here.
    """
    known = load_text_configs()
    model_type = config.get("model_type")
    if model_type is None:
        raise ValueError(f"{source}: the text config has no model_type; add one, known: {', '.join(sorted(known))}")
    if not isinstance(model_type, str) or model_type not in known:
        raise unknown(f"language model type (in {source})", model_type, known)
    parsed: TextConfig = parse(known[model_type], config, source)  # type: ignore[type-var]
    return parsed.decoder(source, tied=tied)
