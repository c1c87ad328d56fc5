"""What each kind of kernel is fitted with: its curve, its families, its sizes, and how a shape becomes a time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

from numpy.typing import NDArray

from costmodel.base import Array
from costmodel.efficiency import (
    AttentionCurve,
    Chip,
    CpuGemmCurve,
    Curve,
    CustomCurve,
    DecodeCurve,
    ElementwiseCurve,
    GemmCurve,
    MoeCurve,
    NcclCurve,
    Tiling,
    attention_s,
    cpu_gemm_s,
    custom_all_reduce_s,
    decode_attention_s,
    elementwise_s,
    gemm_s,
    moe_s,
    nccl_s,
)
from costmodel.efficiency.collective import switch_reduces
from costmodel.efficiency.elementwise import CORE_BYTES_PER_CYCLE
from costmodel.efficiency.fitted import ON_CPU
from costmodel.hardware import HardwareProfile
from runtime.routing import routing_of
from runtime.tables import Samples

Work: TypeAlias = Mapping[str, NDArray[Any]]
Predict: TypeAlias = Callable[[Any], Array]
"""Times of measured shapes under a curve [s]."""

GEMM_RESIDENT: Final = 0.19
"""Share of the L2 that one of the benchmark's (up to five) copies of the weights may fill and stay."""
BITS: Final = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8}
"""Number formats that a curve of products can be of."""
OUTPUT_BYTES: Final = 2.0
"""Fewest bytes of a value that a product writes."""
TWICE: Final = ("all_reduce", "custom_all_reduce", "send_recv")
"""Collectives that carry the message twice the share of the ring: of two ranks, that is all of it."""
ALL_REDUCES: Final = ("all_reduce", "custom_all_reduce")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one kind of kernel is fitted.

    Parameters
    ----------
    curve : type
        Its parameters.
    group : str
        Group of the split.
    family : tuple of str
        Columns that make a family.
    size : str
        Column by which errors and bands are kept apart.
    edges, labels : tuple
        Ends of the ranges of sizes, and their names.
    prepare : callable
        Returns, for rows, a device and an option, the function from a curve to times.
    fixed : callable
        Returns the parameters that rows of a variant on a device do not show.
    priors : callable
        Returns where a variant's parameters are expected elsewhere than by default.
    among_devices : mapping
        Fixed parameters that several devices together show, and where they are then expected.
    options : tuple
        Ways in which a library may cut the work; the one that fits the train rows best is kept.
    """

    curve: type[Curve]
    group: str
    family: tuple[str, ...]
    size: str
    edges: tuple[float, ...]
    labels: tuple[str, ...]
    prepare: Callable[[Samples, HardwareProfile, Any], Predict]
    fixed: Callable[[Samples, HardwareProfile], Mapping[str, float]] = field(default=lambda _samples, _hardware: {})
    priors: Callable[[Samples], Mapping[str, float]] = field(default=lambda _samples: {})
    among_devices: Mapping[str, float] = field(default_factory=dict)
    options: tuple[Any, ...] = (None,)


def _gemm(samples: Samples, hardware: HardwareProfile, _: object) -> Predict:
    bits = BITS[samples.variant.partition(".")[0]]
    chip, work = Chip.of(hardware, bits), samples.work
    return lambda curve: gemm_s(
        work["m"],
        d_in=work["k"],
        d_out=work["n"],
        chip=chip,
        curve=curve,
        bytes_per_value=bits / 8,
        output_bytes=max(OUTPUT_BYTES, bits / 8),
        resident_share=GEMM_RESIDENT,
    )


def _cpu_gemm(samples: Samples, hardware: HardwareProfile, _: object) -> Predict:
    bits = _bits(samples)
    chip, work = Chip.of(hardware, bits), samples.work
    return lambda curve: cpu_gemm_s(
        work["m"],
        d_in=work["k"],
        d_out=work["n"],
        chip=chip,
        curve=curve,
        bytes_per_value=bits / 8,
        turns=work["turns"],
    )


STEP: Final = 1.4
"""A product of more rows that takes this many times as long as one of a single row makes a second pass."""


def _cpu_gemm_fixed(samples: Samples, _: HardwareProfile) -> Mapping[str, float]:
    """Return the rows of one pass, which are whole: the most that take about as long as one row of the same weight."""
    columns = [samples.work[name].tolist() for name in ("n", "k", "turns", "m")]
    times = {tuple(key): time for *key, time in zip(*columns, samples.measured_s.tolist(), strict=True)}
    ratios: dict[int, list[float]] = {}
    for (*weight, m), time in times.items():
        one_s = times.get((*weight, 1))
        if one_s is not None:
            ratios.setdefault(m, []).append(time / one_s)
    served = 1
    for m in sorted(ratios):
        if statistics.median(ratios[m]) > STEP:
            break
        served = m
    return {"pass_rows": float(served)} if len(ratios) > 1 else {}


def _bits(samples: Samples) -> int:
    """Return the width that a variant begins with; without one it is that of tables, 16."""
    return BITS.get(samples.variant.partition(".")[0], BITS["bf16"])


def _is_quantised(samples: Samples) -> bool:
    return BITS[samples.variant.partition(".")[0]] < BITS["bf16"]


def _gemm_fixed(samples: Samples, _: HardwareProfile) -> Mapping[str, float]:
    return {} if _is_quantised(samples) else {"quantise_passes": 0.0}


def _gemm_priors(samples: Samples) -> Mapping[str, float]:
    return {"quantise_passes": 1.0, "start_cycles": 15000.0} if _is_quantised(samples) else {}


def _attention(samples: Samples, hardware: HardwareProfile, tiling: Tiling) -> Predict:
    chip, work = Chip.of(hardware, _bits(samples)), samples.work
    return lambda curve: attention_s(
        work["s"],
        batch=work["b"],
        heads=work["heads"],
        kv_heads=work["kv_heads"],
        head_dim=work["head_dim"],
        causal=samples.kind == "prefill_attention",
        chip=chip,
        curve=curve,
        tiling=tiling,
        resident_share=1.0,
    )


def _decode(samples: Samples, hardware: HardwareProfile, _: object) -> Predict:
    chip, work = Chip.of(hardware, _bits(samples)), samples.work
    return lambda curve: decode_attention_s(
        work["context"],
        batch=work["b"],
        heads=work["heads"],
        kv_heads=work["kv_heads"],
        head_dim=work["head_dim"],
        chip=chip,
        curve=curve,
        kv_bytes_per_value=_bits(samples) / 8,
        resident=True,
    )


def _moe_fixed(_samples: Samples, _hardware: HardwareProfile) -> Mapping[str, float]:
    return {"ramp_elements": 180.0}  # only its ratio to the compute share shows


def _moe(samples: Samples, hardware: HardwareProfile, _: object) -> Predict:
    bits = BITS[samples.variant.partition(".")[0]]
    chip, work, routing = Chip.of(hardware, bits), samples.work, routing_of(samples.work)
    return lambda curve: moe_s(
        routing,
        hidden=work["hidden"],
        inter=work["inter"] / work["tp"],
        local_experts=work["experts"] / work["ep"],
        matrices=work["matrices"],
        chip=chip,
        curve=curve,
        bytes_per_value=bits / 8,
        resident=True,
    )


def _nccl(samples: Samples, hardware: HardwareProfile, _: object) -> Predict:
    work, rounds = samples.work, 2.0 if samples.variant in TWICE else 1.0
    link = hardware.link(int(work["ranks"].max()))
    return lambda curve: nccl_s(
        work["message_bytes"],
        ranks=work["ranks"],
        rounds=rounds,
        link_bytes_per_s=link.bandwidth_bytes_per_s,
        curve=curve,
        switch_reduces=_reduces(samples, hardware),
    )


def _reduces(samples: Samples, hardware: HardwareProfile) -> bool:
    link = hardware.link(int(samples.work["ranks"].max()))
    return switch_reduces(hardware, link) and samples.variant in ALL_REDUCES


def _nccl_fixed(samples: Samples, hardware: HardwareProfile) -> Mapping[str, float]:
    return {} if _reduces(samples, hardware) else {"switch_start_s": 70e-6, "switch_fraction": 0.66}


def _custom(samples: Samples, hardware: HardwareProfile, ring: NcclCurve) -> Predict:
    work = samples.work
    link = hardware.link(int(work["ranks"].max()))
    ring_s = _nccl(samples, hardware, None)(ring)
    return lambda curve: custom_all_reduce_s(
        work["message_bytes"],
        ranks=work["ranks"],
        link_bytes_per_s=link.bandwidth_bytes_per_s,
        curve=curve,
        ring_s=ring_s,
        most_ranks=2 if link.topology == "host" else link.devices,
    )


def _elementwise(samples: Samples, hardware: HardwareProfile, _: object) -> Predict:
    chip = Chip.of(hardware)
    return lambda curve: elementwise_s(samples.work["traffic_bytes"], chip=chip, curve=curve, resident=True)


BYTES_EDGES: Final = (32e3, 1e6, 16e6)
BYTES_LABELS: Final = ("to 32 KB", "32 KB-1 MB", "1-16 MB", "above 16 MB")
ROWS_EDGES: Final = (8, 128, 2048)
ROWS_LABELS: Final = ("1-8", "9-128", "129-2048", "above 2048")
LENGTH_EDGES: Final = (64, 512, 2048)
LENGTH_LABELS: Final = ("1-64", "65-512", "513-2048", "above 2048")
HEADS: Final = ("heads", "kv_heads", "head_dim")
RECIPES: Final[Mapping[str, Recipe]] = {
    "gemm": Recipe(GemmCurve, "gemm", ("n", "k"), "m", ROWS_EDGES, ROWS_LABELS, _gemm, _gemm_fixed, _gemm_priors),
    "cpu_gemm": Recipe(CpuGemmCurve, "gemm", ("n", "k"), "m", ROWS_EDGES, ROWS_LABELS, _cpu_gemm, _cpu_gemm_fixed),
    "prefill_attention": Recipe(
        AttentionCurve,
        "attention",
        HEADS,
        "s",
        LENGTH_EDGES,
        LENGTH_LABELS,
        _attention,
        options=(
            Tiling((64, 128)),
            Tiling((64,), packed=True),
            Tiling((128,), packed=True),
            Tiling((16, 64, 128), packed=True),
        ),
    ),
    "encoder_attention": Recipe(
        AttentionCurve,
        "attention",
        HEADS,
        "s",
        LENGTH_EDGES,
        LENGTH_LABELS,
        _attention,
        lambda _samples, _hardware: {"compute_256_fraction": 0.68},
        options=(Tiling((64, 128)), Tiling((128,)), Tiling((64, 128), pad=32), Tiling((128,), pad=32)),
    ),
    "decode_attention": Recipe(
        DecodeCurve,
        "attention",
        HEADS,
        "context",
        (128, 2048, 16384),
        ("1-128", "129-2K", "2K-16K", "above 16K"),
        _decode,
    ),
    "moe_gemm": Recipe(
        MoeCurve, "moe", ("experts", "top_k", "hidden", "inter"), "tokens", ROWS_EDGES, ROWS_LABELS, _moe, _moe_fixed
    ),
    "collective": Recipe(
        NcclCurve, "collective", ("ranks", "algorithm"), "message_bytes", BYTES_EDGES, BYTES_LABELS, _nccl, _nccl_fixed
    ),
    "custom_all_reduce": Recipe(
        CustomCurve, "collective", ("ranks", "algorithm"), "message_bytes", BYTES_EDGES, BYTES_LABELS, _custom
    ),
    "elementwise": Recipe(
        ElementwiseCurve,
        "elementwise",
        ("operator", "width"),
        "traffic_bytes",
        BYTES_EDGES,
        BYTES_LABELS,
        _elementwise,
        lambda _samples, _hardware: {"core_bytes_per_cycle": CORE_BYTES_PER_CYCLE},
        among_devices={"core_bytes_per_cycle": 8.0},
    ),
}


RING: Final = "collective.all_reduce"
"""The fit that a custom all-reduce leaves long messages to."""


def recipe_of(samples: Samples, fitted: Mapping[str, Curve]) -> Recipe:
    """Return how samples are fitted, given the curves that were fitted before by name."""
    if samples.kind == "gemm" and samples.variant.endswith(ON_CPU):
        return RECIPES["cpu_gemm"]
    if samples.variant.partition(".")[0] != "custom_all_reduce":
        return RECIPES[samples.kind]
    return replace(RECIPES["custom_all_reduce"], options=(fitted.get(RING, NcclCurve()),))
