"""`lvlm models`: the known models, or one of them with its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from costmodel import load_model, model_names
from costmodel.adapters import LinearStep
from costmodel.layers import AttentionSpec, CrossAttentionSpec, LayerRun, MoeSpec
from costmodel.models import ModelSpec
from studies.options import FOR_PEOPLE, Format
from studies.output import Answer, emit
from studies.tables import GB, MISSING, number, sections, table

WIDTH, HEIGHT = 1920, 1080
PARTS = ("vision", "adapter", "language", "total")


def models(name: str | None = None, /, *, form: Format = FOR_PEOPLE) -> None:
    """List the known models, or show one with its numbers and where they come from.

    Parameters
    ----------
    name : str
        A model, a config.json, a folder that holds one, or a hub id.
    """
    if name is None:
        found = [load_model(known) for known in model_names()]
        rows = [_row(model) for model in found]
        emit(Answer("models", {}, {"models": rows}, lambda: rows, lambda to: _show_list(to, found)), form)
        return
    model = load_model(name)
    numbers = _numbers(model)
    values = {"models": [{**_row(model), "source": model.source, "numbers": numbers}]}
    emit(Answer("models", {"name": name}, values, lambda: numbers, lambda to: _show(to, model)), form)


def _image_tokens(model: ModelSpec) -> int | None:
    return model.media.image(WIDTH, HEIGHT).visual_tokens if model.media else None


def _row(model: ModelSpec) -> dict[str, Any]:
    parameters = model.parameters()
    return {
        "name": model.name,
        "family": model.family,
        **{f"{part}_parameters": parameters[part] for part in (*PARTS, "active")},
        "kv_bytes_per_token": model.decoder.kv_bytes_per_token(),
        "visual_tokens_1920x1080": _image_tokens(model),
    }


def _show_list(to: Console, found: list[ModelSpec]) -> None:
    rows = []
    for model in found:
        parameters, tokens = model.parameters(), _image_tokens(model)
        billions = [number(parameters[part] * GB) for part in PARTS]
        kv = f"{model.decoder.kv_bytes_per_token():,.0f}"
        rows.append((model.name, model.family, *billions, kv, MISSING if tokens is None else f"{tokens:,}"))
    columns = ("name", "family", *PARTS, "KV B/token", f"tokens {HEIGHT}p")
    legend = (
        f"Parameters in billions; bytes of keys and values at 16 bits; tokens of an image of {WIDTH}x{HEIGHT}."
        " Every number of one: lvlm models NAME"
    )
    sections(to, table(columns, rows, left=2), legend)


def _numbers(model: ModelSpec) -> list[dict[str, Any]]:
    """Return the numbers of a model; all come from its files, as they are or added up."""
    decoder, vision = model.decoder, model.vision
    read: dict[str, float] = {
        "decoder.n_layers": decoder.n_layers,
        "decoder.width": decoder.width,
        "decoder.vocabulary": decoder.vocabulary,
        **_layer_numbers("decoder", decoder.runs),
    }
    if vision is not None:
        read |= {
            "vision.n_layers": sum(run.n_layers for run in vision.runs),
            "vision.n_layers_unused": sum(run.n_layers for run in vision.unused_runs),
            "vision.width": vision.width,
            **_layer_numbers("vision", vision.runs),
        }
    if model.adapter is not None:
        linear = [step for step in model.adapter.steps if isinstance(step, LinearStep)]
        read |= {f"adapter.{step.name}.{side}": getattr(step, side) for step in linear for side in ("d_in", "d_out")}
    derived = {f"parameters.{part}": count for part, count in model.parameters().items()}
    derived["kv_bytes_per_token"] = int(decoder.kv_bytes_per_token())
    tokens = _image_tokens(model)
    if tokens is not None:
        derived[f"visual_tokens_{WIDTH}x{HEIGHT}"] = tokens
    kinds: dict[str, Mapping[str, float]] = {"read": read, "derived": derived}
    return [
        {"key": key, "value": value, "kind": kind, "source": model.source}
        for kind, numbers in kinds.items()
        for key, value in numbers.items()
    ]


def _layer_numbers(tower: str, runs: tuple[LayerRun, ...]) -> dict[str, float]:
    layer = runs[0].layer
    mixer, ffn = layer.mixer, layer.ffn
    numbers: dict[str, float] = {f"{tower}.heads": mixer.heads, f"{tower}.ffn_hidden": ffn.hidden}
    if isinstance(mixer, AttentionSpec | CrossAttentionSpec):
        numbers |= {f"{tower}.kv_heads": mixer.kv_heads, f"{tower}.head_dim": mixer.head_dim}
    mixtures = [run.layer.ffn for run in runs if isinstance(run.layer.ffn, MoeSpec)]
    if mixtures:
        numbers |= {f"{tower}.experts": mixtures[0].experts, f"{tower}.top_k": mixtures[0].top_k}
    return numbers


def _show(to: Console, model: ModelSpec) -> None:
    head = f"{model.name}: family {model.family}, configuration from {model.source}"
    rows = [(row["key"], f"{row['value']:,}", row["kind"]) for row in _numbers(model)]
    legend = "read: a key of the configuration, or its default in transformers; derived: added up from them."
    sections(to, head, table(("number", "value", "kind"), rows), legend)
