"""Models by name, file or folder."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from costmodel.errors import Unsupported, first_line, unknown
from costmodel.families import load_families
from costmodel.families.files import Json, ModelFiles
from costmodel.models import ModelSpec
from costmodel.packaged import packaged_texts

MAX_AREA = 10**10
"""Largest area that a limit may name [pixels]."""
MAX_CONFIG_BYTES = 16_000_000
"""Larger files are no config.json."""


@functools.cache
def load_model_files() -> Mapping[str, str]:
    """Return the text of every config of the catalogue by name."""
    return packaged_texts("costmodel", "model_configs", suffix=".json")


def model_names() -> list[str]:
    """Return the names of the models in the catalogue."""
    return list(load_model_files())


def load_model(name: str | Path) -> ModelSpec:
    """Return a model.

    Parameters
    ----------
    name : str or Path
        A name of the catalogue, a `config.json`, a folder that holds one (its processor files are read too), or a hub
        id such as `Qwen/Qwen2.5-VL-7B-Instruct` when huggingface_hub is installed and can reach it.

    Raises
    ------
    LookupError
        If nothing of this name is known, or the file's `model_type` is not.
    ValueError
        If a file is broken or a value in it cannot be.
    Unsupported
        If the file asks for something that is not modelled.

    Examples
    --------
    >>> load_model("llava-1.5-7b").parameters()["total"]
    7063427072
    """
    text = str(name)
    if text in load_model_files():
        return _load_known(text)
    path = Path(text)
    if _is_folder(path) or path.suffix == ".json":
        return _read(_files_at(path), path.stem if path.suffix else path.name)
    if _is_hub_id(text):
        return _read(_files_at(_hub_folder(text)), text)
    raise unknown("model (no name, file or folder)", text, load_model_files())


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that no file system takes
        return False


def with_pixel_limits(model: ModelSpec, least: int, most: int) -> ModelSpec:
    """Return the model with other limits of an image's (and a frame's) area [pixels].

    Raises
    ------
    Unsupported
        If the model's family resizes to fixed sizes.
    ValueError
        If the limits are not positive, or the wrong way round.
    """
    if not 0 < least <= most <= MAX_AREA:
        raise ValueError(f"pixels={least}:{most} must be two areas in pixels, the smaller first, such as 100352:602112")
    limited = getattr(model.media, "with_pixel_limits", None)
    if limited is None:
        raise Unsupported(f"{model.name} resizes pictures to fixed sizes and has no pixel limits; leave --pixels out")
    return replace(model, media=limited(least, most), cache={})


@functools.cache
def _load_known(name: str) -> ModelSpec:
    source = f"costmodel/model_configs/{name}.json"
    return _read(ModelFiles(json.loads(load_model_files()[name]), source=source), name)


def _read(files: ModelFiles, name: str) -> ModelSpec:
    model_type = files.config.get("model_type")
    if model_type is None:
        raise ValueError(f"{files.source}: no model_type; a Hugging Face config.json has one")
    families = load_families()
    if not isinstance(model_type, str) or model_type not in families:
        raise unknown(f"model type (in {files.source})", model_type, families)
    module = families[model_type]
    try:
        parts = module.read(files)
    except RecursionError:
        raise ValueError(f"{files.source}: nested too deeply") from None
    family = module.__name__.rpartition(".")[2]
    return ModelSpec(
        name,
        family,
        parts.decoder,
        parts.vision,
        parts.adapter,
        parts.media,
        source=files.source,
        notes=parts.notes,
        other_parameters=parts.other_parameters,
    )


def _files_at(path: Path) -> ModelFiles:
    config = path / "config.json" if path.is_dir() else path
    if not config.is_file():
        raise ValueError(f"no file {str(config)!r}; give a config.json, a folder that holds one, or a known name")
    folder = config.parent
    processor = _optional(folder / "processor_config.json")
    image = _optional(folder / "preprocessor_config.json") or _part(processor, "image_processor")
    video = _optional(folder / "video_preprocessor_config.json") or _part(processor, "video_processor")
    return ModelFiles(_object(config), image, video, source=str(config))


def _part(values: Json, key: str) -> Json:
    part = values.get(key)
    return part if isinstance(part, dict) else {}


def _optional(path: Path) -> Json:
    return _object(path) if path.is_file() else {}


def _object(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"{str(path)!r} is {path.stat().st_size} bytes; a config.json is not")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no JSON file that can be read: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} holds {type(values).__name__}, not an object with keys")  # noqa: TRY004
    return values


def _is_hub_id(text: str) -> bool:
    owner, slash, name = text.partition("/")
    return bool(slash and owner and name) and "/" not in name and not text.startswith((".", "~"))


def _hub_folder(hub_id: str) -> Path:
    """Download the config files of a hub repository and return their folder."""
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise ValueError(
            f"{hub_id!r} looks like a hub id; install huggingface_hub to fetch it, or download its config.json"
        ) from None
    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*config.json"]))
    except Exception as error:  # noqa: BLE001 - the hub raises many kinds, all mean the same here
        raise ValueError(f"cannot fetch {hub_id!r} from the hub: {first_line(error)}") from None
