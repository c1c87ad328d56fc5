"""Parameters, KV bytes and FLOPs that `transformers` itself spends on LLaVA-1.5, Qwen2.5-VL and InternVL.

The real model runs on the meta device in bfloat16 with eager attention, under `FlopCounterMode`; no weight, image or
GPU is needed. One multiply-add is two FLOPs; softmax, norms, activations and look-ups are not counted, attention is
the full query x key rectangle (the masked half too). Scaled-dot-product attention on meta decomposes into the same
products and gives the same numbers; eager dispatches fewer operations.

Only index tensors are real: `grid_thw` and the window boundaries of Qwen2.5-VL, which its code reads as Python
integers. Its rotary positions are computed by its own function and moved to meta, where the activations are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.vision_utils import get_vision_position_ids

DTYPE = torch.bfloat16
Grid = tuple[int, int, int]
Vision = int | Grid  # tiles of the encoder's own size, or (temporal, height, width) of patches
OpCounts = Mapping[Any, int]  # FLOPs by ATen operator
KINDS = {"mm": "linear", "addmm": "linear", "bmm": "attn_core", "baddbmm": "attn_core", "convolution": "conv"}


@dataclass(frozen=True)
class Flops:
    """FLOPs of one pass.

    Attributes
    ----------
    linear : int
        Dense products of the layers, without the head.
    attn_core : int
        Queries times keys and weights times values.
    conv : int
        Patch embedding.
    head : int
        Output head at the last position.
    rope_bmm : int
        Rotary frequencies times positions where a release runs that as a product (5.23 does not); not in `total`.
    """

    linear: int = 0
    attn_core: int = 0
    conv: int = 0
    head: int = 0
    rope_bmm: int = 0

    @property
    def total(self) -> int:
        """All FLOPs but `rope_bmm`."""
        return self.linear + self.attn_core + self.conv + self.head

    def __sub__(self, other: Flops) -> Flops:
        return Flops(*(getattr(self, name) - getattr(other, name) for name in self.__dataclass_fields__))


def parse(config: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the `transformers` configuration of a config.json, its defaults filled in."""
    return CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))


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
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(parse(config), attn_implementation="eager", dtype=DTYPE)
    return model.eval()


def parameters(model: PreTrainedModel) -> dict[str, int]:
    """Return parameters in total and by component, tied weights once.

    `vision` is the encoder without the part that maps into the language model, `adapter` that part, `language` the
    rest: layers, embeddings and head.
    """
    total, adapter = model.num_parameters(), _size(_adapter(model))
    vision = _size(_encoder(model)) - (adapter if _is_qwen(model) else 0)
    return {"total": total, "vision": vision, "adapter": adapter, "language": total - vision - adapter}


def kv_bytes_per_token(model: PreTrainedModel) -> int:
    """Return the bytes that one token adds to the real cache object, bfloat16."""
    n_tokens = 2
    layers = _forward(model, n_tokens).past_key_values.layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) // n_tokens


def encode_flops(model: PreTrainedModel, image: Vision) -> Flops:
    """Return FLOPs of the vision encoder, without the adapter.

    Parameters
    ----------
    model : PreTrainedModel
        From `build`.
    image : int or tuple of int
        Number of tiles (LLaVA, InternVL), or patches as (temporal, height, width) (Qwen2.5-VL): what
        `transformers_tokens.image_input` and `video_input` return.
    """
    every, adapter = _vision_flops(model, image)
    return every - adapter


def adapt_flops(model: PreTrainedModel, image: Vision) -> Flops:
    """Return FLOPs of the projector or merger for an image given as in `encode_flops`."""
    return _vision_flops(model, image)[1]


def prefill_flops(model: PreTrainedModel, n_tokens: int) -> Flops:
    """Return FLOPs of the language model on `n_tokens` embeddings, with the head at the last position only."""
    return _language_flops(model, n_tokens, cache=None)


def decode_step_flops(model: PreTrainedModel, n_cached: int) -> Flops:
    """Return FLOPs of one new token after `n_cached` tokens: it attends to `n_cached` + 1 keys."""
    return _language_flops(model, 1, cache=_forward(model, n_cached).past_key_values)


def _is_qwen(model: PreTrainedModel) -> bool:
    return model.config.model_type == "qwen2_5_vl"


def _encoder(model: PreTrainedModel) -> torch.nn.Module:
    return model.model.visual if _is_qwen(model) else model.model.vision_tower


def _adapter(model: PreTrainedModel) -> torch.nn.Module:
    return model.model.visual.merger if _is_qwen(model) else model.model.multi_modal_projector


def _size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def _forward(model: PreTrainedModel, n_tokens: int, cache: Any = None) -> Any:
    """Run the whole causal model on embeddings; its output holds the cache."""
    hidden = model.config.get_text_config().hidden_size
    embeddings = torch.empty(1, n_tokens, hidden, device="meta", dtype=DTYPE)
    return model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True, logits_to_keep=1)


def _language_flops(model: PreTrainedModel, n_tokens: int, *, cache: Any) -> Flops:
    with FlopCounterMode(display=False) as counter:
        _forward(model, n_tokens, cache)
    counts = counter.get_flop_counts()
    (head_ops,) = _under(counts, "lm_head").values()
    head = sum(head_ops.values())
    every = _flops(counts["Global"], counts)
    return Flops(every.linear - head, every.attn_core, every.conv, head, every.rope_bmm)


@lru_cache(maxsize=32)
def _vision_flops(model: PreTrainedModel, image: Vision) -> tuple[Flops, Flops]:
    """Return FLOPs of the real `get_image_features`, and of the adapter inside it."""
    inputs = _vision_inputs(model, image)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model.get_image_features(**inputs)
    counts = counter.get_flop_counts()
    (adapter,) = _under(counts, "merger" if _is_qwen(model) else type(_adapter(model)).__name__).values()
    return _flops(counts["Global"], counts), _flops(adapter, {})


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


def _under(counts: Mapping[str, OpCounts], name: str) -> dict[str, OpCounts]:
    """Return the counts of modules whose path ends in `name`."""
    return {path: ops for path, ops in counts.items() if path.rpartition(".")[2] == name}


def _flops(ops: OpCounts, modules: Mapping[str, OpCounts]) -> Flops:
    """Sort operators by kind; an operator that has none is an error, not a silent zero."""
    sums = dict.fromkeys(("linear", "attn_core", "conv"), 0)
    for op, flops in ops.items():
        sums[KINDS[op.__name__]] += flops
    rotary = [path for path in modules if path.rpartition(".")[2].startswith("rotary")]
    rope = sum(sum(modules[path].values()) for path in rotary)
    return Flops(**{**sums, "attn_core": sums["attn_core"] - rope}, rope_bmm=rope)
