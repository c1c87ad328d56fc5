"""The stages of the `transformers` implementation of the same config, with random weights, as actions to be timed.

Its own image features are encoder and adapter in one call: hooks around the adapter tell the two apart. A decode step
runs on its own growing cache, as its `generate` does, and is cut back to the same context before each sample.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from costmodel.catalogue import load_model_files
from costmodel.errors import Unsupported, first_line
from runtime.device import memory_guarded, require, synchronize
from runtime.generate import batched, joined
from runtime.model import Lvlm, Pixels
from runtime.requests import Request
from runtime.settings import Blueprint
from runtime.staged import StageCase
from runtime.timing import clock

TRANSFORMERS: Final = "transformers"
ADAPTERS: Final = ("multi_modal_projector", "visual.merger")


def check_installed() -> None:
    """Refuse to measure `transformers` where it is not installed.

    Raises
    ------
    ModuleNotFoundError
    """
    if find_spec("transformers") is None:
        raise ModuleNotFoundError(
            "measuring transformers needs it: pip install transformers, or leave it out of --what"
        )


def load_reference(blueprint: Blueprint, device: torch.device, dtype: torch.dtype) -> Any:  # noqa: ANN401 - untyped
    """Return the `transformers` model of a config with random weights.

    Raises
    ------
    ModuleNotFoundError
        If `transformers` is not installed.
    Unsupported
        If it has no class for the config.
    """
    check_installed()
    from transformers import AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = load_model_files().get(blueprint.spec.name)
    config = json.loads(known or Path(blueprint.spec.source).read_text(encoding="utf-8"))
    what = f"weights of {blueprint.spec.name} in transformers"
    require(what, blueprint.spec.parameters()["total"] * dtype.itemsize, device)
    try:
        parsed = CONFIG_MAPPING[config["model_type"]].from_dict(config)
        with memory_guarded(what, device), torch.device(device):
            model = AutoModelForImageTextToText.from_config(parsed, dtype=dtype, attn_implementation="sdpa")
    except (KeyError, ValueError) as error:
        raise Unsupported(f"{blueprint.spec.name}: transformers cannot build it: {first_line(error)}") from None
    return model.eval().requires_grad_(requires_grad=False)


def reference_cases(
    model: Any,  # noqa: ANN401
    ours: Lvlm,
    blueprint: Blueprint,
    request: Request,
    name: str,
) -> Iterator[tuple[StageCase, Adapted | None]]:
    """Yield the stages of a request on the `transformers` model; beside image features, the clock of its adapter."""
    shape, prompts = request.shape(name), request.prompts(blueprint)
    pixels = joined([prompt.pixels for prompt in prompts if prompt.pixels])
    if pixels is not None:
        inputs = _pictures(pixels, ours)
        adapted = Adapted(model, ours.device)

        def see() -> None:
            model.model.get_image_features(**inputs)
            adapted.next_call()

        yield StageCase("encode", shape, see, TRANSFORMERS), adapted
        adapted.remove()
    batch = batched(ours, prompts)
    tokens = batch.tokens.shape[1]
    embeddings = torch.randn(request.batch, tokens, ours.spec.decoder.width, device=ours.device).to(ours.dtype)

    def prefill() -> Any:  # noqa: ANN401
        return model(inputs_embeds=embeddings, use_cache=True, logits_to_keep=1)

    yield StageCase("prefill", shape, prefill, TRANSFORMERS), None
    cache = prefill().past_key_values
    before = [dict(vars(layer)) for layer in cache.layers]
    token = torch.zeros(request.batch, 1, dtype=torch.long, device=ours.device)
    position = torch.full((request.batch, 1), tokens, device=ours.device)

    def step() -> None:
        model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for layer, values in zip(cache.layers, before, strict=True):
            vars(layer).update(values)  # a step puts new tensors in the place of the old ones

    yield StageCase("decode_step", {**shape, "context": tokens + 1}, step, TRANSFORMERS), None


def _pictures(pixels: Pixels, ours: Lvlm) -> dict[str, Tensor]:
    """Return pictures as the `transformers` model takes them."""
    patches = pixels.patches.to(ours.device, ours.dtype)
    if not ours.settings.tile:
        return {"pixel_values": patches, "image_grid_thw": torch.tensor(pixels.grids, device=ours.device)}
    tile, channels = ours.settings.tile, 3
    side = round((patches.shape[1] / channels) ** 0.5)
    blocks = patches.reshape(-1, tile, tile, channels, side, side).permute(0, 3, 1, 4, 2, 5)
    whole = blocks.reshape(-1, channels, tile * side, tile * side)
    rest = _image_side(ours) - whole.shape[-1]  # pixels that fill no patch
    return {"pixel_values": torch.nn.functional.pad(whole, (0, rest, 0, rest))}


def _image_side(ours: Lvlm) -> int:
    unit = ours.spec.media.unit() if ours.spec.media else None
    return round(unit.resized_pixels**0.5) if unit else 0


class Adapted:
    """Clocks the adapter inside calls of the model: `calls_s` holds what it took in each."""

    def __init__(self, model: Any, device: torch.device) -> None:  # noqa: ANN401
        self.device, self.calls_s, self.started_s, self.sum_s = device, list[float](), 0.0, 0.0
        self.clock = clock(device)
        parts = [module for name, module in model.model.named_modules() if _is_adapter(name)]
        self.hooks = [part.register_forward_pre_hook(self._start) for part in parts]
        self.hooks += [part.register_forward_hook(self._end) for part in parts]

    def _start(self, *_: object) -> None:
        synchronize(self.device)
        self.started_s = self.clock()

    def _end(self, *_: object) -> None:
        synchronize(self.device)
        self.sum_s += self.clock() - self.started_s

    def next_call(self) -> None:
        """Note what the adapter took since the last call."""
        self.calls_s.append(self.sum_s)
        self.sum_s = 0.0

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self.hooks:
            hook.remove()


def _is_adapter(name: str) -> bool:
    return name in ADAPTERS or name.rpartition(".")[0] == "visual.deepstack_merger_list"
