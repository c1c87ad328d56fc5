"""Predictions of published requests: the value of a quantity, and its band."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from costmodel import Parallelism, Precision, Prediction, Workload, load_engine, predict
from costmodel.bands import band_s
from costmodel.engine import EngineProfile
from costmodel.errors import unknown
from studies.validation.published_files import SOURCES, EndToEnd, model_of, source_of

STAGES: Final[Mapping[str, tuple[str, ...]]] = {
    "preprocess_s": ("preprocess",),
    "encode_s": ("encode", "adapt"),
    "prefill_s": ("prefill",),
    "language_s": ("prefill", "decode"),
    "device_ttft_s": ("encode", "adapt", "prefill"),
    "device_total_s": ("encode", "adapt", "prefill", "decode"),
}
"""Quantities that are the time of stages; what serving systems call encoding has the projector in it."""
WHATS: Final = (*STAGES, "ttft_s", "tpot_s", "total_s", "encode_share", "peak_memory_bytes")


def engine_of(source: str) -> EngineProfile:
    """Return the engine that stands for the software of a source, with what is known of its clock and its host.

    Raises
    ------
    LookupError
        If there is none of this name.
    """
    name, settings = source_of(source).engine, source_of(source).settings
    try:
        engine = load_engine(name)
    except LookupError as error:
        raise LookupError(f"{SOURCES}: sources.{source}.engine: {error}") from None
    if settings is None:
        return engine
    changes: dict[str, Any] = {}
    if settings.kernels_alone:
        changes = {"layer_host_s": {}, "step_host_s": 0.0, "request_host_s": 0.0, "sequence_host_s": 0.0}
    if settings.request_host_s is not None:
        changes["request_host_s"] = settings.request_host_s
    return engine.model_copy(update=changes)


def hardware_of(hardware: str, source: str) -> str:
    """Return the name of a device with the host of a source, where that is known."""
    settings = source_of(source).settings
    if settings is None or settings.host_speed is None:
        return hardware
    return f"{hardware}:host_speed={settings.host_speed!r}"


def is_calibration(figure: EndToEnd) -> bool:
    """Return whether a setting of its source was derived from a figure, so that it is not scored."""
    settings = source_of(figure.source).settings
    return settings is not None and figure.name in settings.calibration


def predict_figure(figure: EndToEnd) -> Prediction:
    """Predict the request of a published figure."""
    visual = figure.visual_tokens
    workload = Workload(
        images=figure.pictures(),
        text_tokens=float(figure.text_tokens),
        output_tokens=float(figure.output_tokens),
        visual_tokens=None if visual is None else float(visual),
    )
    return predict(
        model_of(figure.model),
        hardware_of(figure.hardware, figure.source),
        workload,
        batch=float(figure.batch),
        precision=Precision(weight_bits=figure.weight_bits),
        parallelism=Parallelism(tp=figure.tp),
        engine=engine_of(figure.source),
    )


def value(prediction: Prediction, what: str) -> float:
    """Return a quantity of a prediction.

    Parameters
    ----------
    prediction : Prediction
        One point.
    what : str
        One of `WHATS`.

    Raises
    ------
    LookupError
        If it is another.
    """
    stages = prediction.stages
    if what in STAGES:
        return sum(stages[name].time_s for name in STAGES[what])
    if what == "ttft_s":
        return float(prediction.ttft_s)
    if what == "tpot_s":
        return float(prediction.tpot_s)
    if what == "total_s":
        return float(prediction.total_s)
    if what == "encode_share":
        return value(prediction, "encode_s") / value(prediction, "device_ttft_s")
    if what == "peak_memory_bytes":
        return float(prediction.memory.peak_bytes)
    raise unknown("quantity", what, WHATS)


def band(prediction: Prediction, what: str) -> tuple[float, float] | None:
    """Return the band of a quantity [s]; None for what is no time, and for an engine that states no errors."""
    if what in ("ttft_s", "tpot_s"):
        bands = prediction.error_band
        return None if bands is None else bands[what]
    if what not in STAGES:
        return None
    chosen = [prediction.stages[name] for name in STAGES[what]]
    return band_s(value(prediction, what), chosen, prediction.query.engine)
