"""Measurement lines made up for the tests: one, and a run whose times are those of known curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from costmodel.efficiency import (
    AttentionCurve,
    Chip,
    DecodeCurve,
    ElementwiseCurve,
    GemmCurve,
    Tiling,
    attention_s,
    decode_attention_s,
    elementwise_s,
    gemm_s,
)
from costmodel.hardware import HardwareProfile
from runtime.measurement import Measurement
from runtime.recipes import GEMM_RESIDENT

H100_SAYS = {"clock_hz": 1.83e9, "core_count": 132, "l2_bytes": 52428800, "memory_bytes": 85520809984, "tdp_w": 700}
"""What a run on an H100 states of it."""
GEMM = GemmCurve(start_cycles=7000, bandwidth_fraction=0.7)
PREFILL, DECODE = AttentionCurve(start_cycles=20000), DecodeCurve(start_cycles=15000)
ELEMENTWISE = ElementwiseCurve(start_cycles=8000)


def line(kind: str, shape: Mapping[str, Any], **changes: Any) -> Measurement:
    """Return a line of one millisecond."""
    values = {
        "schema_version": 1,
        "kind": kind,
        "implementation": "torch",
        "shape": shape,
        "precision": "bf16",
        "samples_s": (1e-3,),
        "device": "NVIDIA H100 80GB HBM3",
        "driver": "570.1",
        "versions": {"torch": "2.9"},
        "taken_at": "2026-11-26T12:00:00+00:00",
    }
    return Measurement.model_validate({**values, **changes})


def synthetic_run(hardware: HardwareProfile, *, noise: float, seed: int = 0, **changes: Any) -> list[Measurement]:
    """Return lines of kernels whose times are those of the curves above, with noise that a log-normal gives them."""
    rng = np.random.default_rng(seed)

    def samples(seconds: Any) -> tuple[float, ...]:
        return tuple((float(seconds) * np.exp(rng.normal(0.0, noise, 5))).tolist())

    return [line(kind, shape, samples_s=samples(time), **changes) for kind, shape, time in _kernels(Chip.of(hardware))]


def _kernels(chip: Chip) -> Iterator[tuple[str, dict[str, Any], Any]]:
    rng = np.random.default_rng(1)
    for _ in range(300):
        m, n, k = (int(np.ceil(2 ** rng.uniform(low, 14))) for low in (0, 6, 6))
        time = gemm_s(m, d_in=k, d_out=n, chip=chip, curve=GEMM, resident_share=GEMM_RESIDENT)
        yield "gemm", {"m": m, "n": n, "k": k}, time
    tiling = Tiling((64, 128))
    for heads, kv_heads, head_dim in ((8, 8, 64), (16, 4, 128), (32, 8, 128), (28, 4, 128), (12, 2, 128), (64, 8, 64)):
        shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        for s in (64, 256, 1024, 4096, 16384):
            for b in (1, 4, 16):
                time = attention_s(
                    s, batch=b, **shape, causal=True, chip=chip, curve=PREFILL, tiling=tiling, resident_share=1.0
                )
                yield "prefill_attention", {"b": b, "s": s, **shape}, time
                time = decode_attention_s(s, batch=b, **shape, chip=chip, curve=DECODE, resident=True)
                yield "decode_attention", {"b": b, "context": s, **shape}, time
    for width in (512, 1024, 2048, 3072, 4096, 5120, 8192):
        for rows in (1, 64, 1024, 8192, 65536):
            shape = {"operator": "norm", "rows": rows, "width": width}
            yield "elementwise", shape, elementwise_s(rows * width * 4, chip=chip, curve=ELEMENTWISE, resident=True)
