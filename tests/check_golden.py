"""Every count of a catalogue model beside that of the golden file, with the rules by which the two differ by design.

The file holds what `transformers` executes. The `torch` convention equals it; what the `kernel` convention must be is
computed from its parts: only the layers and tiles that are read, the triangle of causal attention or the band of a
sliding window, and latents that are absorbed instead of expanded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from costmodel import Image, Video, Workload, load_model
from costmodel.counts import Counts, count
from costmodel.models import ModelSpec
from costmodel.query import causal_pairs

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "transformers_counts.json").read_text(encoding="utf-8"))
GOLDEN_MODELS = [name for name in GOLDEN if name != "source"]
Comparison = tuple[str, float, float]  # what, ours, theirs

TEMPLATE_MARKERS = {"kimi-vl-a3b": 4}
"""Tokens around a picture that the chat template writes and the file's `llm_tokens` leave out; see its notes."""
FOUR_TILES = Image(1120, 1120)
"""The image that stands in the file's prompts of a model with cross-attention: as many tiles as it takes."""
CACHED = 4096
"""Prompt of the file's `total_bytes_at_4096` [tokens]."""


def differences(name: str, *parts: str) -> list[str]:
    """Return a line for every count that differs, in these parts or in all."""
    compared = [row for part in parts or PARTS for row in PARTS[part](name, GOLDEN[name])]
    return [f"{what}: ours {ours:,} golden {theirs:,}" for what, ours, theirs in compared if ours != theirs]


def pairs() -> list[tuple[str, str]]:
    """Return every model and part of which the file says something."""
    return [
        (name, part) for name in GOLDEN_MODELS for part in PARTS if any(True for _ in PARTS[part](name, GOLDEN[name]))
    ]


def prompt(model: ModelSpec, tokens: int) -> Workload:
    """Return a prompt of so many tokens; where layers attend to pictures, one of them is an image of all tiles."""
    if model.decoder.cross_kv_bytes_per_token():
        return Workload(images=[FOUR_TILES], text_tokens=tokens - 1)
    return Workload(text_tokens=tokens)


def picture(size: str) -> Workload:
    """Return a workload of one image of `WIDTHxHEIGHT`."""
    return Workload(images=[Image(*map(int, size.split("x")))])


def both(name: str, workload: Workload) -> tuple[Counts, Counts]:
    """Return what is executed and what is needed."""
    return count(name, workload, convention="torch"), count(name, workload, convention="kernel")


def parameters(name: str, golden: Any) -> Iterator[Comparison]:
    ours = load_model(name).parameters()
    for part, number in golden["parameters"].items():
        yield f"parameters.{part}", ours[part], number


def cache(name: str, golden: Any) -> Iterator[Comparison]:
    file = golden["kv_cache"]
    yield "bytes per token", load_model(name).decoder.kv_bytes_per_token(), file["bytes_per_token_bf16"]
    if "sliding" in file:
        kept = count(name, Workload(text_tokens=CACHED)).kv_bytes
        yield f"bytes of {CACHED} tokens", kept, file["sliding"][f"total_bytes_at_{CACHED}"]
    if "cross_kv_bytes_per_image_4tiles" in file:
        each = count(name, Workload(images=[FOUR_TILES])).kv_bytes_per_image
        yield "bytes of an image", each, file["cross_kv_bytes_per_image_4tiles"]


def images(name: str, golden: Any) -> Iterator[Comparison]:
    for size, row in golden["image_tokens"].items():
        executed, needed = (counts.tokens for counts in both(name, picture(size)))
        visual = row.get("feature_tokens", 0)  # none where they reach cross-attention alone
        yield f"{size} visual", needed["visual"], visual
        in_prompt = row.get("llm_tokens_with_image_id", row["llm_tokens"])
        markers = row.get("wrapper_tokens", in_prompt - visual) + TEMPLATE_MARKERS.get(name, 0)
        yield f"{size} markers", needed["markers"], markers
        yield f"{size} cross", needed["cross"], row.get("cross_tokens_valid", 0)
        yield f"{size} cross, executed", executed["cross"], row.get("cross_tokens_computed", 0)
        if "vit_patches" in row:
            yield f"{size} patches", needed["patches"], row["vit_patches"]


def videos(name: str, golden: Any) -> Iterator[Comparison]:
    for shape, row in (golden["video_tokens"] or {}).items():
        n_frames, width, height = map(int, shape.split("x"))
        clip = Video(width, height, seconds=float(n_frames), fps=1.0, frames=n_frames)
        tokens = count(name, Workload(videos=[clip])).tokens
        visual = next(row[key] for key in ("hf_processor_tokens", "feature_tokens", "llm_tokens") if key in row)
        yield f"{shape} visual", tokens["visual"], visual
        if "llm_tokens_plus_frame_text" in row:
            yield f"{shape} with markers", tokens["visual"] + tokens["markers"], row["llm_tokens_plus_frame_text"]


def vision(name: str, golden: Any) -> Iterator[Comparison]:
    for size, row in golden["vision_flops"].items():
        executed, needed = (counts.flops for counts in both(name, picture(size)))
        yield f"{size} encode, executed", executed["encode"], row["vision"]["total"]
        yield f"{size} adapt, executed", executed["adapt"], row["projector"]["total"]
        encode, adapt = needed_vision(row, golden["image_tokens"][size])
        yield f"{size} encode, needed", needed["encode"], encode
        yield f"{size} adapt, needed", needed["adapt"], adapt


def needed_vision(row: Any, tokens: Any) -> tuple[float, float]:
    """Return the needed FLOPs of encoder and adapter: the layers that are read, and tiles that are no padding."""
    encoder, adapter = row["vision"], row["projector"]["total"]
    linear, attention, conv = encoder["linear"], encoder["attn_core"], encoder["conv"]
    if "tiles_computed" in row:  # every tile of the canvas attends to all others; the padding inside a tile stays
        share = tokens["tiles"] / row["tiles_computed"]
        linear, attention, conv, adapter = linear * share, attention * share**2, conv * share, adapter * share
    layers = row.get("layers", 1)
    return (linear + attention) * row.get("layers_needed", layers) / layers + conv, adapter


def prefill(name: str, golden: Any) -> Iterator[Comparison]:
    for label, row in golden["prefill_flops"].items():
        n_tokens, layers = int(label.removesuffix("_text_only")), row["layers"]
        if label.endswith("_text_only"):
            head = golden["prefill_flops"][str(n_tokens)]["lm_head_last_position"]
            executed = count(name, Workload(text_tokens=n_tokens), convention="torch").flops["prefill"]
            yield f"{label} executed", executed, layers["total"] + head
            continue
        head = row["lm_head_last_position"]
        executed, needed = (counts.flops["prefill"] for counts in both(name, prompt(load_model(name), n_tokens)))
        yield f"{label} executed", executed, layers["total"] + head
        attention = needed_attention(golden, row, n_tokens)
        yield f"{label} needed", needed, layers["linear"] + layers["experts"] + attention + head


def needed_attention(golden: Any, row: Any, n_tokens: int) -> float:
    """Return the FLOPs of attention that a prompt needs: triangles, bands of sliding windows, pictures as a whole."""
    triangle, text = row["attn_core_causal_half"], golden["prefill_flops"].get("1024_text_only")
    if text:  # the file halves the rectangles of cross-attention too
        square = text["layers"]["attn_core"] * n_tokens**2 / 1024**2
        return square * (n_tokens + 1) / (2 * n_tokens) + row["layers"]["attn_core"] - square
    sliding = golden["kv_cache"].get("sliding")
    if not sliding or sliding["sliding_layer_tokens_kept"] >= CACHED:  # the window is longer than the prompts
        return triangle
    window = sliding["sliding_layer_tokens_kept"] + 1  # the next query sees itself too
    each = triangle / (sliding["full_layers"] + sliding["sliding_layers"])
    band = causal_pairs(n_tokens, window=window) / causal_pairs(n_tokens)
    return each * (sliding["full_layers"] + sliding["sliding_layers"] * band)


def decode(name: str, golden: Any) -> Iterator[Comparison]:
    for label, row in golden["decode_flops"].items():
        executed, needed = (counts.flops["decode_step"] for counts in both(name, prompt(load_model(name), int(label))))
        yield f"{label} executed", executed, row["total"]
        yield f"{label} needed", needed, row.get("total_absorbed", row["total"])


PARTS: dict[str, Callable[[str, Any], Iterator[Comparison]]] = {
    function.__name__: function for function in (parameters, cache, images, videos, vision, prefill, decode)
}
