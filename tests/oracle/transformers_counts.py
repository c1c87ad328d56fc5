"""Parameters, KV bytes and FLOPs that `transformers` itself spends on any model whose `model_type` it knows.

The real model runs on the meta device in bfloat16 with eager attention, experts as batched products, under
`FlopCounterMode`; no weight, image or GPU is needed. One multiply-add is two FLOPs; softmax, norms, activations and
look-ups are not counted, attention is the full query x key rectangle (the masked half too). Scaled-dot-product
attention on meta decomposes into the same products and gives the same numbers; eager dispatches fewer operations.

Pictures run here for LLaVA-1.5, Qwen2.5-VL and InternVL; `tests/families` runs those of the others. Only index tensors
are real: `grid_thw` and the window boundaries of Qwen2.5-VL, which its code reads as Python integers. Its rotary
positions are computed by its own function and moved to meta, where the activations are.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.vision_utils import get_vision_position_ids

DTYPE = torch.bfloat16
Grid = tuple[int, int, int]
Vision = int | Grid  # tiles of the encoder's own size, or (temporal, height, width) of patches
COMPONENTS = {
    "vision_model": "vision",
    "model.vision_model": "vision",
    "model.vision_tower": "vision",
    "model.visual": "vision",
    "model.visual.merger": "adapter",
    "model.visual.downsample": "adapter",
    "model.visual.deepstack_merger_list": "adapter",
    "model.multi_modal_projector": "adapter",
    "model.image_newline": "adapter",
    "model.connector": "adapter",
    "qformer": "adapter",
    "query_tokens": "adapter",
    "language_projection": "adapter",
    "model.embed_tokens_extend.image_embed": "adapter",
    "model.embed_tokens_extend.image_embed.img_processor": "vision",
    "model.embed_tokens_extend.audio_embed": "other",
}
"""Component of the modules and parameters at a path; the longest path decides, all others are the language model's."""
DECODERS = {"internlm2": "llama", "phi3_v": "phi3", "llava_qwen": "qwen2", "minicpmv": "qwen2"}
"""What the decoder of a model that `transformers` does not have is there, by `model_type`."""


def is_known(config: Mapping[str, Any]) -> bool:
    """Return whether `transformers` has a class for a config.json."""
    return config["model_type"] in CONFIG_MAPPING


def parse(config: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the `transformers` configuration of a config.json, its defaults filled in."""
    return CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))


def build(config: Mapping[str, Any]) -> PreTrainedModel:
    """Return the real model on the meta device.

    Parameters
    ----------
    config : mapping
        Content of a Hugging Face config.json.

    Returns
    -------
    PreTrainedModel
        In bfloat16, eager attention, evaluation mode.
    """
    sees = config["model_type"] in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(parse(config), attn_implementation="eager", dtype=DTYPE)
    if any(_is_routed(name) for name, _ in model.named_parameters()):
        model.set_experts_implementation("batched_mm")
    return model.eval()


def decoder_alone(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the decoder in that of a model without a class, under the name that it has here."""
    nested = [config[key] for key in ("llm_config", "language_config", "text_config") if key in config]
    text = nested[0] if nested else {key: value for key, value in config.items() if not key.endswith("_config")}
    model_type = DECODERS.get(text["model_type"], text["model_type"])
    biases = {"attention_bias": text["bias"]} if "bias" in text else {}
    return {**text, **biases, "model_type": model_type, "tie_word_embeddings": text.get("tie_word_embeddings", False)}


def parameters(model: PreTrainedModel) -> dict[str, int]:
    """Return parameters by component, tied weights once, and those that one token uses.

    `vision` is the encoder without the part that maps into the language model, `adapter` that part, `language` the
    layers, embeddings and head.
    """
    sums = dict.fromkeys(("total", "vision", "adapter", "language", "active", "other"), 0.0)
    for name, parameter in model.named_parameters():
        paths = [path for path in COMPONENTS if name == path or name.startswith(f"{path}.")]
        component = COMPONENTS[max(paths, key=len)] if paths else "language"
        numbers = parameter.numel()
        for key, share in (("total", 1.0), (component, 1.0), ("active", _used_share(model, name, parameter))):
            sums[key] += numbers * share
    return {component: int(number) for component, number in sums.items() if component != "other"}


def language(model: PreTrainedModel, n_tokens: int) -> dict[str, float]:
    """Return bytes that a token leaves in the cache, and FLOPs of so many embeddings and of one token behind them."""
    prefill, cache = _run(model, n_tokens)
    kept = _kv_bytes(cache) / n_tokens
    return {"kv_bytes_per_token": kept, "prefill": prefill, "decode_step": _run(model, 1, cache)[0]}


def kv_bytes_per_token(model: PreTrainedModel) -> float:
    """Return the bytes that one token adds to the real cache object, bfloat16."""
    return language(model, 2)["kv_bytes_per_token"]


def prefill_flops(model: PreTrainedModel, n_tokens: int) -> int:
    """Return FLOPs of the language model on `n_tokens` embeddings, with the head at the last position only."""
    return _run(model, n_tokens)[0]


def decode_step_flops(model: PreTrainedModel, n_cached: int) -> int:
    """Return FLOPs of one new token after `n_cached` tokens: it attends to `n_cached` + 1 keys."""
    return _run(model, 1, _run(model, n_cached)[1])[0]


def encode_flops(model: PreTrainedModel, image: Vision) -> int:
    """Return FLOPs of the vision encoder, without the adapter.

    Parameters
    ----------
    model : PreTrainedModel
        From `build`.
    image : int or tuple of int
        Tiles of the encoder's own size, or (temporal, height, width) of patches.
    """
    every, adapter = _vision_flops(model, image)
    return every - adapter


def adapt_flops(model: PreTrainedModel, image: Vision) -> int:
    """Return FLOPs of the projector or merger for an image given as in `encode_flops`."""
    return _vision_flops(model, image)[1]


def _is_routed(name: str) -> bool:
    return "experts" in name.split(".")


def _used_share(model: PreTrainedModel, name: str, parameter: torch.Tensor) -> float:
    """Return the share of a parameter that one token uses: of stacked experts, those that it is sent to."""
    if not _is_routed(name):
        return 1.0
    return model.config.get_text_config().num_experts_per_tok / parameter.shape[0]


@torch.no_grad()
def _run(model: PreTrainedModel, n_tokens: int, cache: Any = None) -> tuple[int, Any]:
    """Return the FLOPs of so many embeddings behind a cache, and the cache afterwards."""
    hidden = model.config.get_text_config().hidden_size
    embeddings = torch.empty(1, n_tokens, hidden, device="meta", dtype=DTYPE)
    causal = model if hasattr(model, "lm_head") else model.language_model
    with FlopCounterMode(display=False) as counter:
        output = causal(inputs_embeds=embeddings, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return counter.get_total_flops(), output.past_key_values


def _kv_bytes(cache: Any) -> int:
    """Return the bytes of all keys and values; a recurrence keeps none, and cross-attention none without pictures."""
    kept = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in kept)


def _is_qwen(model: PreTrainedModel) -> bool:
    return model.config.model_type == "qwen2_5_vl"


@lru_cache(maxsize=32)
def _vision_flops(model: PreTrainedModel, image: Vision) -> tuple[int, int]:
    """Return FLOPs of the real `get_image_features`, and of the adapter inside it."""
    inputs = _vision_inputs(model, image)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model.get_image_features(**inputs)
    name = "merger" if _is_qwen(model) else type(model.model.multi_modal_projector).__name__
    counts = counter.get_flop_counts()
    (adapter,) = [ops for path, ops in counts.items() if path.rpartition(".")[2] == name]
    return counter.get_total_flops(), sum(adapter.values())


def _vision_inputs(model: PreTrainedModel, image: Vision) -> dict[str, torch.Tensor]:
    vision = model.config.vision_config
    if isinstance(image, int):
        height, width = vision.image_size if isinstance(vision.image_size, list | tuple) else 2 * (vision.image_size,)
        return {"pixel_values": torch.empty(image, vision.num_channels, height, width, device="meta", dtype=DTYPE)}
    grid = torch.tensor([image])
    pixels_per_patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "pixel_values": torch.empty(int(grid.prod()), pixels_per_patch, device="meta", dtype=DTYPE),
        "image_grid_thw": grid,
        "position_ids": get_vision_position_ids(grid, vision.spatial_merge_size).to("meta"),
    }
