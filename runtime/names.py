"""Names of weights: what each of ours is made of in a Hugging Face checkpoint.

Both layouts load: that of `transformers` 5 modules and that of the published files, which differ in prefixes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

RENAMED: Final = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(language_model|vision_tower|multi_modal_projector|visual)\.", r"model.\1."),
    (r"^model\.(?!language_model\.|visual\.|vision_tower\.|multi_modal_projector\.)", "model.language_model."),
    (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
)
"""From any layout to that of the modules."""


def canonical(name: str) -> str:
    """Return the name that a tensor of a checkpoint has in the modules of `transformers` 5."""
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


@dataclass(frozen=True, slots=True)
class Source:
    """What a weight is made of: tensors that are put behind each other, in canonical names.

    Parameters
    ----------
    names : tuple of str
        One tensor, or several whose rows follow each other.
    experts : tuple of str
        The same where a checkpoint holds each expert by itself, `{e}` being its number; else none.
    transposed : bool
        Whether the tensor lies the other way round.
    """

    names: tuple[str, ...]
    experts: tuple[str, ...] = ()
    transposed: bool = False


CLIP: Final = {
    "patch_embedding": ("embeddings.patch_embedding",),
    "class_token": ("embeddings.class_embedding",),
    "positions": ("embeddings.position_embedding.weight",),
    "pre_norm": ("pre_layrnorm",),  # the published files spell it so
    "post_norm": ("post_layernorm",),
    "layers": ("encoder.layers",),
    "norm1": ("layer_norm1",),
    "norm2": ("layer_norm2",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.out_proj",),
    "mlp.up": ("mlp.fc1",),
    "mlp.down": ("mlp.fc2",),
}
"""Of CLIP and SigLIP."""
INTERN_VIT: Final = {
    "patch_embedding": ("embeddings.patch_embeddings.projection",),
    "class_token": ("embeddings.cls_token",),
    "positions": ("embeddings.position_embeddings",),
    "post_norm": ("layernorm",),
    "layers": ("encoder.layer",),
    "norm1": ("layernorm_before",),
    "norm2": ("layernorm_after",),
    "scale1": ("lambda_1",),
    "scale2": ("lambda_2",),
    "attention.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attention.q_norm": ("attention.q_norm",),
    "attention.k_norm": ("attention.k_norm",),
    "attention.out": ("attention.projection_layer",),
    "mlp.up": ("mlp.fc1",),
    "mlp.down": ("mlp.fc2",),
}
QWEN_VIT: Final = {
    "patch_embedding": ("patch_embed.proj",),
    "positions": ("pos_embed.weight",),
    "layers": ("blocks",),
    "norm1": ("norm1",),
    "norm2": ("norm2",),
    "attention.qkv": ("attn.qkv",),
    "attention.out": ("attn.proj",),
}
QWEN2_VIT: Final = {**QWEN_VIT, "mlp.up": ("mlp.fc1",), "mlp.down": ("mlp.fc2",)}
QWEN25_VIT: Final = {**QWEN_VIT, "mlp.up": ("mlp.gate_proj", "mlp.up_proj"), "mlp.down": ("mlp.down_proj",)}
QWEN3_VIT: Final = {**QWEN_VIT, "mlp.up": ("mlp.linear_fc1",), "mlp.down": ("mlp.linear_fc2",)}
PROJECTOR: Final = {
    "projector.norm": ("layer_norm",),
    "projector.linear1": ("linear_1",),
    "projector.linear2": ("linear_2",),
}
POOLING: Final = {"projector.norm": ("mm_soft_emb_norm",), "projector.linear1.weight": ("mm_input_projection_weight",)}
MERGER: Final = {
    "projector.norm": ("merger.ln_q",),
    "projector.linear1": ("merger.mlp.0",),
    "projector.linear2": ("merger.mlp.2",),
}
DEEP_MERGER: Final = {
    "projector.norm": ("merger.norm",),
    "projector.linear1": ("merger.linear_fc1",),
    "projector.linear2": ("merger.linear_fc2",),
    "deep": ("deepstack_merger_list",),
    "norm": ("norm",),
    "linear1": ("linear_fc1",),
    "linear2": ("linear_fc2",),
}
LANGUAGE: Final = {
    "embedding": ("embed_tokens",),
    "norm": ("norm",),
    "layers": ("layers",),
    "norm1": ("input_layernorm",),
    "norm2": ("post_attention_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.q_norm": ("self_attn.q_norm",),
    "attention.k_norm": ("self_attn.k_norm",),
    "attention.out": ("self_attn.o_proj",),
    "mlp.router": ("mlp.gate",),
}
GATED: Final = {"mlp.up": ("mlp.gate_proj", "mlp.up_proj"), "mlp.down": ("mlp.down_proj",)}
EXPERTS: Final = {
    "up": Source(("mlp.experts.gate_up_proj",), ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight")),
    "down": Source(("mlp.experts.down_proj",), ("mlp.experts.{e}.down_proj.weight",)),
}
FOUR_NORMS: Final = {
    "behind1": ("post_attention_layernorm",),
    "norm2": ("pre_feedforward_layernorm",),
    "behind2": ("post_feedforward_layernorm",),
}

Table = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Tables:
    """Names of a family: prefix and table of each part."""

    vision: tuple[str, Table]
    adapter: tuple[str, Table]
    language: Table


TOWER, VISUAL, PROJECTOR_AT = "model.vision_tower", "model.visual", "model.multi_modal_projector"
TABLES: Final[Mapping[str, Tables]] = {
    "llava": Tables((TOWER, CLIP), (PROJECTOR_AT, PROJECTOR), LANGUAGE),
    "internvl": Tables((TOWER, INTERN_VIT), (PROJECTOR_AT, PROJECTOR), LANGUAGE),
    "gemma3": Tables((TOWER, CLIP), (PROJECTOR_AT, POOLING), {**LANGUAGE, **FOUR_NORMS}),
    "qwen2_vl": Tables((VISUAL, QWEN2_VIT), (VISUAL, MERGER), LANGUAGE),
    "qwen2_5_vl": Tables((VISUAL, QWEN25_VIT), (VISUAL, MERGER), LANGUAGE),
    "qwen3_vl": Tables((VISUAL, QWEN3_VIT), (VISUAL, DEEP_MERGER), LANGUAGE),
}


def source(family: str, name: str) -> Source:
    """Return what one of our weights is made of.

    Parameters
    ----------
    family : str
    name : str
        Of a parameter of `Lvlm`, such as `decoder.layers.0.attention.qkv.weight`.
    """
    tables = TABLES[family]
    part, _, rest = name.partition(".")
    if rest == "lm_head.weight":
        return Source((rest,))
    if part == "decoder":
        return _language(tables.language, rest)
    prefix, table = tables.vision if part == "vision" else tables.adapter
    names = tuple(f"{prefix}.{found}" for found in _translated(table, rest))
    return Source(names, transposed=rest == "projector.linear1.weight" and table is POOLING)


def _language(table: Table, rest: str) -> Source:
    expert = re.fullmatch(r"layers\.(\d+)\.mlp\.(up|down)", rest)
    if expert:
        found, prefix = EXPERTS[expert[2]], f"model.language_model.layers.{expert[1]}."
        return Source(tuple(prefix + n for n in found.names), tuple(prefix + n for n in found.experts))
    return Source(tuple(f"model.language_model.{found}" for found in _translated({**GATED, **table}, rest)))


def _translated(table: Table, rest: str) -> list[str]:
    """Return the names of a weight below the prefix of its part, of a layer or outside the layers."""
    layer = re.fullmatch(r"(layers|deep)\.(\d+)\.(.+)", rest)
    lead, inner = (f"{table[layer[1]][0]}.{layer[2]}.", layer[3]) if layer else ("", rest)
    if inner in table:
        return [lead + found for found in table[inner]]
    stem, _, kind = inner.rpartition(".")
    return [f"{lead}{found}.{kind}" for found in table[stem]]
