"""Models as they are built: settings read from a family's config.json.

A key that is left out takes the value that the `transformers` 5.23 class of the same `model_type` gives it; one that
changes the result and is not known is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from costmodel.catalogue import load_model, load_model_files
from costmodel.errors import Unsupported, shown, unknown
from costmodel.models import ModelSpec
from runtime.rotations import read_rotation
from runtime.settings import (
    ACTIVATIONS,
    Activation,
    AdapterSettings,
    Blueprint,
    DecoderSettings,
    PictureSettings,
    Settings,
    VisionSettings,
)

Json = Mapping[str, Any]
AXIAL_THETA: Final = 10_000.0  # `default_theta` of the vision configs of Qwen-VL
WITHOUT_EFFECT: Final = (None, False, 0, 0.0, 1.0)
"""Values that switch a key off."""
CHANGES_RESULTS: Final = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "use_bidirectional_attention",
    "partial_rotary_factor",
    "attention_multiplier",
    "logit_scale",
)
"""Keys of a text config that change what is computed and that no family here uses."""
CLIP_PICTURES: Final = PictureSettings((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""`preprocessor_config.json` of CLIP, which LLaVA-1.5 and Qwen2.5-VL share."""
IMAGENET_PICTURES: Final = PictureSettings((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""`preprocessor_config.json` of InternVL3."""
HALF_PICTURES: Final = PictureSettings((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""`preprocessor_config.json` of Qwen3-VL and, with bilinear resampling, of Gemma 3."""


def load_blueprint(name: str | Path) -> Blueprint:
    """Return a model of the catalogue, of a config.json or of a folder, as it can be built.

    Raises
    ------
    LookupError
        If nothing of this name is known.
    Unsupported
        If its family, or something that its config asks for, is not implemented in PyTorch here.
    """
    spec = load_model(name)
    if spec.family not in FAMILIES:
        raise unknown(f"family of {spec.name} with a runtime", spec.family, FAMILIES)
    known = load_model_files().get(str(name))
    path = None if known else Path(spec.source)
    config = json.loads(known or Path(spec.source).read_text(encoding="utf-8"))
    settings = FAMILIES[spec.family](spec, config)
    folder = path.parent if path else None
    if folder and (folder / "preprocessor_config.json").is_file():
        values = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        settings = replace(settings, pictures=_pictures(values, settings.pictures))
    return Blueprint(spec, settings, folder)


def _pictures(values: Json, default: PictureSettings) -> PictureSettings:
    mean, std = values.get("image_mean", default.mean), values.get("image_std", default.std)
    return replace(default, mean=tuple(mean), std=tuple(std))


def activation(values: Json, default: Activation, key: str = "hidden_act") -> Activation:
    """Return the activation that a part of a config names."""
    name = values.get(key, default)
    if name not in ACTIVATIONS:
        raise Unsupported(f"{key}={shown(name)} is not implemented; known: {', '.join(ACTIVATIONS)}")
    return name  # type: ignore[no-any-return]


TEXT_EPS: Final = {"qwen2_vl": 1e-5, "qwen2_vl_text": 1e-5, "qwen2_5_vl": 1e-5, "qwen2_5_vl_text": 1e-5}
DEFAULT_EPS: Final = 1e-6
"""`rms_norm_eps` of the `transformers` classes."""
TEXT_THETA: Final = {
    "qwen2_vl": 1e6,
    "qwen2_vl_text": 1e6,
    "qwen2_5_vl": 1e6,
    "qwen2_5_vl_text": 1e6,
    "qwen3_vl_text": 5e5,
    "qwen3_vl_moe_text": 5e5,
    "gemma3_text": 1e6,
}
DEFAULT_THETA: Final = 1e4
GEMMA_LOCAL_THETA: Final = 1e4
"""`default_theta` of the `transformers` classes."""
HEAD_NORMS: Final = ("qwen3", "qwen3_moe", "qwen3_vl_text", "qwen3_vl_moe_text", "gemma3_text")
"""Language models with a norm over every query and key head."""
PLAIN_TEXTS: Final = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
"""Language models that the families of projectors may hold."""


SECTIONS: Final = {
    "qwen2_vl": (16, 24, 24),
    "qwen2_vl_text": (16, 24, 24),
    "qwen2_5_vl": (16, 24, 24),
    "qwen2_5_vl_text": (16, 24, 24),
    "qwen3_vl_text": (24, 20, 20),
    "qwen3_vl_moe_text": (24, 20, 20),
}
"""Frequencies that read time, row and column where the file does not say."""
INTERLEAVED: Final = ("qwen3_vl_text", "qwen3_vl_moe_text")


def text_settings(text: Json, model_type: str, *, head_dim: int) -> DecoderSettings:
    """Return the settings of a Llama-like language model.

    Parameters
    ----------
    text : mapping
        Its part of the config.
    model_type : str
        What it is, where it does not say.
    head_dim : int
        Width of a head.
    """
    kind = str(text.get("model_type", model_type))
    for key in CHANGES_RESULTS:
        if text.get(key) not in WITHOUT_EFFECT:
            raise Unsupported(f"{kind}: {key}={shown(text[key])} is not implemented in the runtime; remove the key")
    theta, sections = TEXT_THETA.get(kind, DEFAULT_THETA), SECTIONS.get(kind, ())
    rotation = read_rotation(text, head_dim=head_dim, theta=theta, sections=sections)
    if kind in INTERLEAVED:
        rotation = replace(rotation, interleaved=True)
    return DecoderSettings(
        activation=activation(text, "silu"),
        norm_eps=float(text.get("rms_norm_eps", TEXT_EPS.get(kind, DEFAULT_EPS))),
        rotation=rotation,
        sliding_rotation=rotation,
        qk_norm="head" if kind in HEAD_NORMS else "none",
        normalises_experts=kind != "qwen3_moe" or bool(text.get("norm_topk_prob", False)),
    )


def _head_dim(spec: ModelSpec) -> int:
    return int(spec.decoder.runs[0].layer.mixer.head_dim)  # type: ignore[union-attr]


def _text(config: Json) -> Json:
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def _token(config: Json, default: int) -> int:
    found = config.get("image_token_id", config.get("image_token_index"))
    return default if found is None else int(found)


def _tile(spec: ModelSpec) -> int:
    unit = spec.media.unit() if spec.media else None
    return round(unit.patches**0.5) if unit else 0


def _plain_text(config: Json, spec: ModelSpec, default: str) -> DecoderSettings:
    text = _text(config)
    kind = str(text.get("model_type", default))
    if kind not in PLAIN_TEXTS:
        raise unknown("language model with a runtime", kind, PLAIN_TEXTS)
    return text_settings(text, default, head_dim=_head_dim(spec))


def _llava(spec: ModelSpec, config: Json) -> Settings:
    vision = config.get("vision_config") or {}
    if vision.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise Unsupported(f"{spec.name}: the tower {vision['model_type']} has no runtime; clip_vision_model has")
    return Settings(
        image_token=_token(config, 32000),
        decoder=_plain_text(config, spec, "llama"),
        vision=VisionSettings(
            activation=activation(vision, "quick_gelu"),
            norm_eps=float(vision.get("layer_norm_eps", 1e-5)),
            pre_norm=True,
            drops_class_token=config.get("vision_feature_select_strategy", "default") == "default",
        ),
        adapter=AdapterSettings("projector", activation(config, "gelu", "projector_hidden_act"), 1e-5),
        pictures=CLIP_PICTURES,
        tile=_tile(spec),
    )


def _qwen2_vl(spec: ModelSpec, config: Json) -> Settings:
    vision = config["vision_config"]
    return Settings(
        image_token=_token(config, 151655),
        decoder=text_settings(_text(config), "qwen2_vl_text", head_dim=_head_dim(spec)),
        vision=VisionSettings(
            activation=activation(vision, "quick_gelu"),
            norm_eps=1e-6,
            positions="none",
            axial_theta=_axial(vision),
        ),
        adapter=AdapterSettings("merger", "gelu", 1e-6, int(vision.get("spatial_merge_size", 2)), "layer"),
        pictures=CLIP_PICTURES,
    )


def _qwen2_5_vl(spec: ModelSpec, config: Json) -> Settings:
    found = _qwen2_vl(spec, config)
    vision = replace(found.vision, activation=activation(config["vision_config"], "silu"))
    decoder = text_settings(_text(config), "qwen2_5_vl_text", head_dim=_head_dim(spec))
    return replace(found, vision=vision, decoder=decoder, adapter=replace(found.adapter, norm="rms"))


def _qwen3_vl(spec: ModelSpec, config: Json) -> Settings:
    vision = config["vision_config"]
    decoder = text_settings(_text(config), f"{config['model_type']}_text", head_dim=_head_dim(spec))
    deep = vision.get("deepstack_visual_indexes", (8, 16, 24))
    return Settings(
        image_token=_token(config, 151655),
        decoder=decoder,
        vision=VisionSettings(
            activation=activation(vision, "gelu_pytorch_tanh"),
            norm_eps=1e-6,
            positions="interpolated",
            axial_theta=_axial(vision),
            deep_layers=tuple(int(index) for index in deep),
        ),
        adapter=AdapterSettings("merger", "gelu", 1e-6, int(vision.get("spatial_merge_size", 2)), "layer"),
        pictures=HALF_PICTURES,
    )


def _axial(vision: Json) -> float:
    values = vision.get("rope_parameters") or {}
    kind = values.get("rope_type", "axial")
    if kind != "axial":
        raise Unsupported(f"vision_config.rope_parameters.rope_type={shown(kind)} is not implemented; axial is")
    return float(values.get("rope_theta", AXIAL_THETA))


def _internvl(spec: ModelSpec, config: Json) -> Settings:
    if config.get("model_type") != "internvl":
        raise Unsupported(f"{spec.name}: the original layout has no runtime; convert it to the transformers layout")
    vision = config["vision_config"]
    return Settings(
        image_token=_token(config, 151667),
        decoder=_plain_text(config, spec, "qwen2"),
        vision=VisionSettings(
            activation=activation(vision, "gelu"),
            norm_eps=float(vision.get("layer_norm_eps", 1e-6)),
            qk_norm="width" if vision.get("use_qk_norm", False) else "none",
            positions="learned" if vision.get("use_absolute_position_embeddings", True) else "none",
            post_norm=not vision.get("use_mean_pooling", True) and config.get("vision_feature_layer", -1) == -1,
            layer_scale=True,
            drops_class_token=config.get("vision_feature_select_strategy", "default") == "default",
        ),
        adapter=AdapterSettings(
            kind="projector",
            activation=activation(config, "gelu", "projector_hidden_act"),
            norm_eps=1e-5,  # of PyTorch's LayerNorm
            merge=round(1 / float(config.get("downsample_ratio", 0.5))),
            norm="layer",
        ),
        pictures=IMAGENET_PICTURES,
        tile=_tile(spec),
    )


def _gemma3(spec: ModelSpec, config: Json) -> Settings:
    text, vision = _text(config), config.get("vision_config") or {}
    head_dim, eps = _head_dim(spec), float(vision.get("layer_norm_eps", 1e-6))
    plain = text_settings(_gemma_rotation(text, "full_attention"), "gemma3_text", head_dim=head_dim)
    local = {**_gemma_rotation(text, "sliding_attention"), "rope_scaling": None}
    theta = float(text.get("rope_local_base_freq", GEMMA_LOCAL_THETA))
    decoder = replace(
        plain,
        activation=activation(text, "gelu_pytorch_tanh", "hidden_activation"),
        norm_offset=1.0,
        sliding_rotation=read_rotation({**local, "rope_theta": theta}, head_dim=head_dim, theta=theta),
        query_scale=float(text.get("query_pre_attn_scalar", 256)) ** -0.5,
        embedding_scale=spec.decoder.width**0.5,
    )
    unit = spec.media.unit() if spec.media else None
    group = round((unit.patches / unit.visual_tokens) ** 0.5) if unit else 1
    return Settings(
        image_token=_token(config, 262144),
        decoder=decoder,
        vision=VisionSettings(activation=activation(vision, "gelu_pytorch_tanh"), norm_eps=eps, post_norm=True),
        adapter=AdapterSettings("pool", "gelu", eps, group, "rms"),
        pictures=replace(HALF_PICTURES, resampling="bilinear"),
        tile=_tile(spec),
    )


def _gemma_rotation(text: Json, kind: str) -> Json:
    """Return the text config with the rotation of one kind of layer; files of transformers 5 hold one for each."""
    values = dict(text)
    by_kind = values.pop("rope_parameters", None) or {}
    return {**values, "rope_parameters": by_kind[kind]} if kind in by_kind else values


FAMILIES: Final[Mapping[str, Callable[[ModelSpec, Json], Settings]]] = {
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "gemma3": _gemma3,
}
"""Families of `costmodel.families` that can be built, with the readers of their settings."""
