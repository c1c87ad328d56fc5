"""What a measured stage takes as `costmodel.predict` has it, for the request that a line's shape describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from costmodel import Image, Parallelism, Precision, Prediction, Workload, predict
from costmodel.bands import band_s
from costmodel.engine import EngineProfile
from costmodel.errors import Unsupported, shown
from costmodel.hardware import HardwareProfile
from costmodel.models import ModelSpec
from runtime.measurement import SIZES, Measurement, is_count

STAGES: Final = {"preprocess": "preprocess", "encode": "encode", "adapt": "adapt", "prefill": "prefill"}
DECODE: Final = "decode_step"
RESIZE: Final = "resize_normalise_patch"
"""The part of preprocessing that makes pixel values of a decoded picture."""
DEGREES: Final = ("tp", "pp", "dp", "ep")
WIDTHS: Final = ("weight_bits", "activation_bits", "kv_bits")
PAIR: Final = 2


@dataclass(frozen=True, slots=True)
class StageTime:
    """Predicted time of a stage and its band [s]."""

    time_s: float
    band_s: tuple[float, float] | None


def part_s(line: Measurement, engine: EngineProfile) -> StageTime:
    """Return the time of a part of preprocessing on one core [s].

    Raises
    ------
    Unsupported
        If the engine states no rate of it.
    """
    part, rates = str(line.shape["part"]), engine.preprocessing
    codec = str(line.shape.get("codec", "jpeg"))
    known_s = {RESIZE: rates.resize_s_per_pixel, "decode": rates.decode_s_per_pixel.get(codec)}
    each_s = known_s.get(part)
    if not each_s:
        what = f"part {part!r}" + (f" of codec {codec!r}" if part == "decode" else "")
        raise Unsupported(f"engine {engine.name} states no rate of preprocessing {what}")
    pixels = line.number("pixels") if "pixels" in line.shape else line.number("width") * line.number("height")
    time_s = pixels * each_s
    known = rates.low is not None and rates.high is not None
    return StageTime(time_s, (time_s * (1 + rates.low), time_s * (1 + rates.high)) if known else None)  # type: ignore[operator]


def stage_s(
    line: Measurement, model: str | ModelSpec | None, hardware: HardwareProfile, engine: EngineProfile
) -> StageTime:
    """Return the time of a stage of the request that a line describes [s].

    Parameters
    ----------
    line : Measurement
        Of a stage.
    model : str, ModelSpec or None
        Where the line names none.
    hardware : HardwareProfile
    engine : EngineProfile

    Raises
    ------
    ValueError
        If the shape describes no request.
    LookupError
        If nobody knows the model.
    """
    found = request(line, model, hardware, engine)
    name = STAGES.get(line.kind, "decode")
    stage = found.stages[name]
    if not stage.time_s:
        raise Unsupported(f"{line.kind} of {found.query.model.name} takes no time for this request")
    return StageTime(stage.time_s, band_s(stage.time_s, [stage], engine))


def request(
    line: Measurement, model: str | ModelSpec | None, hardware: HardwareProfile, engine: EngineProfile
) -> Prediction:
    """Return the prediction of the request that a line describes; of a decode step, a request with that one step."""
    shape = line.shape
    named = shape.get("model", model)
    if not isinstance(named, str | ModelSpec):
        message = f'shape of {line.kind} names no model; add "model" to it, or give one with --model'
        raise ValueError(message)  # noqa: TRY004 - bad input, not a slip of ours
    options: dict[str, Any] = {
        "batch": line.number("batch") if "batch" in shape else 1,
        "precision": _precision(line),
        "parallelism": Parallelism(**{key: int(line.number(key)) for key in DEGREES if key in shape}),
        "engine": engine,
    }
    media = _media(shape)
    steps = int(engine.first_token_in_prefill) + 1 if line.kind == DECODE else 1
    text_tokens = line.number("text_tokens") if "text_tokens" in shape else 1
    if line.kind == DECODE and "context" in shape:
        around = predict(named, hardware, Workload(**media, text_tokens=1, output_tokens=1), **options).tokens["prompt"]
        text_tokens = line.number("context") - around
        if text_tokens < 1:
            raise ValueError(
                f"shape of {line.kind} has context={shape['context']}, and its pictures alone take {around}"
            )
    return predict(named, hardware, Workload(**media, text_tokens=text_tokens, output_tokens=steps), **options)


def _precision(line: Measurement) -> Precision:
    if line.precision not in SIZES and not all(key in line.shape for key in WIDTHS):
        raise Unsupported(f"precision {line.precision!r} has no known width; give {', '.join(WIDTHS)} in the shape")
    bits = SIZES.get(line.precision, 2) * 8
    return Precision(*(int(line.number(key)) if key in line.shape else bits for key in WIDTHS))


def _media(shape: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pictures of a request: sizes, or a number of visual tokens."""
    if "images" in shape:
        sizes = shape["images"]
        pairs = isinstance(sizes, Sequence) and all(isinstance(x, tuple) and len(x) == PAIR for x in sizes)
        if not pairs or not all(is_count(side) for size in sizes for side in size):
            raise ValueError(f"shape has images={shown(sizes)}, which must be [[width, height], …] in whole pixels")
        return {"images": [Image(int(width), int(height)) for width, height in sizes]}
    tokens = shape.get("visual_tokens")
    if tokens is not None and not (tokens == 0 or is_count(tokens)):
        raise ValueError(f"shape has visual_tokens={shown(tokens)}, which must be a whole number")
    return {} if tokens is None else {"visual_tokens": tokens}
