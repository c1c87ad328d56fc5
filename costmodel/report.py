"""Predictions and counts under the names of the JSON interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from costmodel.stage_cost import StageCost

if TYPE_CHECKING:
    from costmodel.predict import Prediction


def prediction_dict(prediction: Prediction) -> dict[str, Any]:
    """Return a prediction of one point."""
    return {
        "tokens": prediction.tokens,
        "parameters": prediction.query.model.parameters(),
        "ttft_s": prediction.ttft_s,
        "tpot_s": prediction.tpot_s,
        "total_s": prediction.total_s,
        "throughput_tokens_per_s": prediction.throughput_tokens_per_s,
        "throughput_tokens_per_s_per_gpu": prediction.throughput_tokens_per_s / prediction.n_devices,
        "energy_j": prediction.energy_j,
        "co2_g": prediction.co2_g,
        "cost_usd": prediction.cost_usd,
        "fits": prediction.fits,
        "max_batch": prediction.max_batch,
        "memory": _memory(prediction),
        "stages": {name: stage_dict(name, stage) for name, stage in prediction.stages.items()},
        "quality": prediction.quality,
        "error_band": _band(prediction),
        "provenance": prediction.provenance,
    }


def _memory(prediction: Prediction) -> dict[str, float]:
    memory = prediction.memory
    return {
        "weights_bytes": memory.weights_bytes,
        "vision_weights_bytes": memory.vision_weights_bytes,
        "language_weights_bytes": memory.language_weights_bytes,
        "draft_weights_bytes": memory.draft_weights_bytes,
        "kv_bytes": memory.kv_bytes,
        "activation_bytes": memory.activation_bytes,
        "encode_activation_bytes": memory.encode_activation_bytes,
        "prefill_activation_bytes": memory.prefill_activation_bytes,
        "reserve_bytes": memory.reserve_bytes,
        "peak_bytes": memory.peak_bytes,
        "usable_bytes": memory.usable_bytes,
        "capacity_bytes": memory.capacity_bytes,
        "kv_blocks": memory.kv_blocks,
        "kv_block_bytes": memory.block_bytes,
    }


def _band(prediction: Prediction) -> dict[str, list[float] | None]:
    band = prediction.error_band
    return {name: list(band[name]) if band else None for name in ("ttft_s", "tpot_s")}


def stage_dict(name: str, stage: StageCost) -> dict[str, Any]:
    """Return a stage."""
    values: dict[str, Any] = {
        "time_s": stage.time_s,
        "flops": stage.flops,
        "bytes": stage.bytes,
        "intensity_flops_per_byte": stage.intensity_flops_per_byte,
        "bound": stage.bound,
    }
    if name == "decode":
        first, middle, last = stage.step_time_s
        values["step_time_s"] = {"first": first, "middle": middle, "last": last}
    return values
