"""Weights of a model: from the safetensors of a Hugging Face folder, or random ones.

A model is built without memory first, so that what does not fit, or does not match, is refused before anything is
taken or written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from costmodel.errors import shown
from runtime.device import memory_guarded, require
from runtime.model import Lvlm
from runtime.modules import RmsNorm
from runtime.names import Source, canonical, source
from runtime.settings import Blueprint

INDEX: Final = "model.safetensors.index.json"
READABLE: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""Number formats of safetensors files that can be converted without scales."""
NOT_RUN: Final = re.compile(
    r"lm_head\.weight|model\.language_model\.norm\.weight_scale|.*\.(inv_freq|position_ids)"
    r"|model\.vision_tower\.(post_layernorm|head|encoder\.layers?\.\d+|embeddings\.mask_token).*"
)
"""Tensors that a checkpoint may hold and the model does not run: a tied head, layers behind the one that is read."""
STD: Final = 0.02
"""Standard deviation of random matrices: `initializer_range` of the configs."""
LAYER_SCALE: Final = 0.1  # `layer_scale_init_value` of InternVL


@dataclass(frozen=True, slots=True)
class Tensors:
    """Where the tensors of a checkpoint are: file and own name by canonical name."""

    files: Mapping[str, tuple[Path, str]]
    folder: Path


def load(blueprint: Blueprint, device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> Lvlm:
    """Return a model with the weights of its folder, or random ones where it has none.

    Parameters
    ----------
    blueprint : Blueprint
    device : torch.device
    dtype : torch.dtype
    seed : int
        Of random weights.

    Raises
    ------
    ValueError
        If shards or tensors are missing, of another shape, or of a format that cannot be read.
    DoesNotFit
        If the weights exceed the free memory.
    """
    with torch.device("meta"):
        model = Lvlm(blueprint).to(dtype).eval().requires_grad_(requires_grad=False)
    tensors = _tensors(blueprint.folder) if blueprint.folder else None
    if tensors is not None:
        _check(model, tensors, blueprint)
    what = f"weights of {blueprint.spec.name}"
    require(what, sum(parameter.nbytes for parameter in model.parameters()), device)
    with memory_guarded(what, device), torch.no_grad():
        model.to_empty(device=device)
        if tensors is None:
            randomise(model, seed)
        else:
            _read(model, tensors, blueprint)
    return model


def has_weights(blueprint: Blueprint) -> bool:
    """Return whether a model has weights to be read."""
    return blueprint.folder is not None and _tensors(blueprint.folder) is not None


def randomise(model: Lvlm, seed: int) -> None:
    """Fill a model with random weights of the usual size: norms and scales at their first values, biases zero."""
    generator = torch.Generator(model.device).manual_seed(seed)
    for module in model.modules():
        offset = module.offset if isinstance(module, RmsNorm) else 0.0
        is_norm = isinstance(module, RmsNorm | nn.LayerNorm)
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                parameter.zero_()
            elif is_norm:
                parameter.fill_(1.0 - offset)
            elif name in ("scale1", "scale2"):
                parameter.fill_(LAYER_SCALE)
            else:
                parameter.normal_(0.0, STD, generator=generator)


def _tensors(folder: Path) -> Tensors | None:
    """Return where a folder's tensors are; None if it holds no weights at all.

    Raises
    ------
    ValueError
        If its index names files that are not there, or holds weights in another form alone.
    """
    index = folder / INDEX
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        try:
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            expected = sorted(set(named.values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{str(index)!r} is no index of safetensors; download it again") from None
        missing = [name for name in expected if not (folder / name).is_file()]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"{str(folder)!r} lacks the shard {missing[0]!r}{more}; download the whole model")
        files = [folder / name for name in expected]
    elif not files:
        others = sorted(path.name for pattern in ("*.bin", "*.gguf", "*.pt") for path in folder.glob(pattern))
        if others:
            raise ValueError(f"{str(folder)!r} holds {others[0]!r} and no *.safetensors; convert the weights")
        return None
    return Tensors({canonical(name): (path, name) for path in files for name in _keys(path)}, folder)


def _keys(path: Path) -> list[str]:
    with _opened(path) as file:
        return list(file.keys())


def _opened(path: Path) -> Any:  # noqa: ANN401 - safetensors is untyped
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError:
        raise ModuleNotFoundError("reading weights needs safetensors: pip install 'lvlm-sim[runtime]'") from None
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(path)!r} is no whole safetensors file: {error}; download it again") from None


def _check(model: Lvlm, tensors: Tensors, blueprint: Blueprint) -> None:
    """Refuse a checkpoint whose tensors are not those of the model, before memory is taken."""
    used: set[str] = set()
    with ExitStack() as stack:
        opened = {path: stack.enter_context(_opened(path)) for path in {path for path, _ in tensors.files.values()}}
        for name, parameter in model.named_parameters():
            wanted = _names(source(blueprint.spec.family, name), tensors, len(parameter))
            shapes = [_shape(key, tensors, opened) for key in wanted]
            used.update(wanted)
            if not _fits(shapes, tuple(parameter.shape)):
                rule = f"make no weight of shape {tuple(parameter.shape)}; the config is of another model"
                raise ValueError(f"{wanted[0]}: shapes={shown(shapes)} {rule}")
    left = sorted(key for key in tensors.files if key not in used and not NOT_RUN.fullmatch(key))
    if left:
        rule = "belongs to no part that the config describes; is it of another model?"
        raise ValueError(f"{str(tensors.folder)!r}: tensor {left[0]!r} (of {len(left)} such) {rule}")


def _shape(key: str, tensors: Tensors, opened: Mapping[Path, Any]) -> tuple[int, ...]:
    """Return the shape of a tensor that must be there, in a format that can be read."""
    if key not in tensors.files:
        raise ValueError(f"{str(tensors.folder)!r} lacks the tensor {key!r}; download the whole model")
    path, own = tensors.files[key]
    piece = opened[path].get_slice(own)
    if piece.get_dtype() not in READABLE:
        rule = f"must be one of {', '.join(READABLE)}"
        raise ValueError(f"{key}: dtype={piece.get_dtype()!r} {rule}; convert the weights")
    return tuple(piece.get_shape())


def _names(made_of: Source, tensors: Tensors, n_experts: int) -> list[str]:
    """Return the tensors of a checkpoint that a weight is made of; experts may lie together or apart."""
    if made_of.experts and made_of.names[0] not in tensors.files and made_of.experts[0].format(e=0) in tensors.files:
        return [name.format(e=expert) for expert in range(n_experts) for name in made_of.experts]
    return list(made_of.names)


def _fits(shapes: list[tuple[int, ...]], wanted: tuple[int, ...]) -> bool:
    """Return whether tensors of these shapes, behind each other, are a weight of the wanted shape."""
    size = sum(torch.Size(shape).numel() for shape in shapes)
    if size != torch.Size(wanted).numel():
        return False
    if len(shapes) > 1:
        return all(shape[1:] == wanted[len(wanted) - len(shape) + 1 :] for shape in shapes)
    shape = shapes[0]
    squeezed = shape[len(shape) - len(wanted) :] if set(shape[: len(shape) - len(wanted)]) <= {1} else shape
    flat = (shape[0], size // shape[0]) if shape else shape
    swapped = (*shape[:-2], *shape[-2:][::-1])
    return wanted in (shape, squeezed, flat, swapped)


def _read(model: Lvlm, tensors: Tensors, blueprint: Blueprint) -> None:
    """Copy the tensors of a checked checkpoint into the model."""
    with ExitStack() as stack:
        opened = {path: stack.enter_context(_opened(path)) for path in {path for path, _ in tensors.files.values()}}
        for name, parameter in model.named_parameters():
            made_of = source(blueprint.spec.family, name)
            names = _names(made_of, tensors, len(parameter))
            pieces = [opened[tensors.files[key][0]].get_tensor(tensors.files[key][1]) for key in names]
            parameter.copy_(_assembled(pieces, parameter, transposed=made_of.transposed))


def _assembled(pieces: Iterable[Tensor], wanted: Tensor, *, transposed: bool) -> Tensor:
    """Return one weight of the wanted shape."""
    whole = torch.cat(list(pieces))
    is_stack = len(wanted.shape) > 2 and whole.shape != wanted.shape  # noqa: PLR2004 - experts
    if is_stack and whole.ndim == wanted.ndim:
        transposed = True  # published experts lie the other way round
    return (whole.mT if transposed else whole).reshape(wanted.shape)
