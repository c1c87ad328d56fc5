"""The rule for devices without measured kernels: which shared curve holds, what moves with the device, and its band.

What moves with what:

================================  ==================================================================================
constants in clock cycles         with the clock: starts, thread blocks, merges of splits
thread blocks                     in rounds of the core count
shares of a peak or of bandwidth  with the datasheet rate of the precision, or of device memory
FLOP per byte                     with the 16-bit peak: the feed of the cores keeps its ratio to the matrix units
residency                         with the size of the L2; served models have none
seconds of collectives            with the class of the link alone: a switch or direct links, or the host
generation                        chooses the family of kernels, and nothing else
================================  ==================================================================================

Two figures of a device, a large product and a stream of weights, set the two shares that no datasheet gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from costmodel.efficiency.common import Chip
from costmodel.efficiency.gemm import GemmCurve, gemm_s
from costmodel.errors import Unsupported, unknown
from costmodel.hardware import HardwareProfile

ATTENTION: Final = {
    "hopper": ("fa3", "flash", "fa2", "flashinfer", "triton"),
    "ampere": ("fa2", "flash", "flashinfer", "triton"),
}
ATTENTION_ELSEWHERE: Final = ("fa2", "flashinfer", "flash", "triton")
"""Kernels in the order in which a library takes them: the third FlashAttention is built for Hopper alone."""
EXPERTS: Final = {
    ("hopper", "bf16"): ("triton", "cutlass_hopper", "cutlass"),
    ("hopper", "fp8"): ("cutlass_hopper", "cutlass", "triton"),
    ("blackwell", "bf16"): ("cutlass", "triton"),
    ("blackwell", "fp8"): ("cutlass", "triton"),
}
EXPERTS_ELSEWHERE: Final = ("triton", "cutlass")
"""What vLLM took on the measured device of a generation, and what it took on most."""

MEASURED: Final = frozenset({"ampere", "ada", "hopper", "blackwell"})
STACKED_BANDWIDTH: Final = 3e12
"""Blackwell devices above it are the data-centre ones, with other matrix units than the measured workstation [byte/s].
"""
FOREIGN_WIDENING: Final = 2.0
"""How much wider the band is on a logarithmic scale where no device of its kind was measured: assumed, the least whole
number with which the bands of products hold 80 % of the rows of the one other maker's device that was measured (MI210,
LLMCompass); see `studies/validation/transfer.md`."""

MOST_FRACTION: Final = 8.0
LEAST_FRACTION: Final = 0.01
"""Ends of what a share of a peak is looked for in; the asymptote may be above one."""
HALVINGS: Final = 40
SWEEPS: Final = 4
"""Each share moves the other's figure a little, so they are set in turn."""


def link_class(hardware: HardwareProfile, ranks: int) -> Literal["switch", "host"]:
    """Return through what so many devices talk: the host, or a switch or links of their own.

    Raises
    ------
    Unsupported
        If no link of the node joins that many.
    """
    return "host" if hardware.link(ranks).topology == "host" else "switch"


def shared_variant(
    kind: str, hardware: HardwareProfile, names: Sequence[str], *, prefix: str = "", ranks: int = 2
) -> str:
    """Return which of a library's shared curves holds for a device.

    Parameters
    ----------
    kind : str
        Kind of kernel, such as prefill_attention.
    hardware : HardwareProfile
        A device without fits of its own.
    names : sequence of str
        Variants that the library's shared file has of this kind.
    prefix : str
        What the kernel is asked for, a dot behind it or not: a precision (bf16) of products and experts, mha or gqa of
        decode attention, the algorithm of a collective, the operator of data movement; prefill and encoder attention
        need none.
    ranks : int
        Devices of a collective.

    Raises
    ------
    LookupError
        If the library has none.
    Unsupported
        If the device is no GPU: the constants hold for many small cores that thread blocks are dealt out to.

    Examples
    --------
    >>> from costmodel.hardware import load_hardware
    >>> shared_variant("decode_attention", load_hardware("h200-sxm-141gb"), ["gqa.fa2", "gqa.fa3"], prefix="gqa")
    'gqa.fa3'
    """
    if hardware.kind != "gpu":
        raise Unsupported(
            f"{hardware.name} is of kind {hardware.kind}, and shared curves hold for GPUs; use engine='roofline'"
        )
    asked = prefix.rstrip(".")
    for kernel in _kernels(kind, hardware, asked, ranks):
        name = ".".join(part for part in (asked, kernel) if part)
        if name in names:
            return name
    raise unknown(f"shared {kind} curve for {hardware.name}", prefix or kind, names)


def _kernels(kind: str, hardware: HardwareProfile, prefix: str, ranks: int) -> tuple[str, ...]:
    """Return the endings of names to look for, the first one found being taken."""
    if kind.endswith("attention"):
        return ATTENTION.get(hardware.generation, ATTENTION_ELSEWHERE)
    if kind == "moe_gemm":
        return EXPERTS.get((hardware.generation, prefix), EXPERTS_ELSEWHERE)
    return (link_class(hardware, ranks),) if kind == "collective" else ("",)


def is_foreign(hardware: HardwareProfile) -> bool:
    """Return whether no device of this kind was measured: another maker, generation, or data-centre Blackwell."""
    stacked = hardware.generation == "blackwell" and hardware.memory_bandwidth_bytes_per_s > STACKED_BANDWIDTH
    return hardware.vendor != "NVIDIA" or hardware.generation not in MEASURED or stacked


def band_power(hardware: HardwareProfile) -> float:
    """Return how much wider than stated, on a logarithmic scale, the bands of shared curves are on a device."""
    return FOREIGN_WIDENING if is_foreign(hardware) else 1.0


def shared_band(low: float, high: float, hardware: HardwareProfile) -> tuple[float, float]:
    """Return the band of a shared curve on a device.

    Parameters
    ----------
    low, high : float
        Of the curve: 0.2 is 20 % slower than predicted.
    hardware : HardwareProfile
        Where no device of its kind was measured, the band is wider.
    """
    power = band_power(hardware)
    return (1 + low) ** power - 1, (1 + high) ** power - 1


@dataclass(frozen=True, slots=True)
class Figure:
    """One dense product that was measured on a device, or whose rate was published.

    Parameters
    ----------
    rows, d_in, d_out : float
        Shape.
    time_s : float
        What it takes: 2·rows·d_in·d_out over a published rate, or its bytes over a published bandwidth.
    """

    rows: float
    d_in: float
    d_out: float
    time_s: float


def repaired(
    curve: GemmCurve,
    *,
    chip: Chip,
    large: Figure | None = None,
    stream: Figure | None = None,
    bytes_per_value: float = 2.0,
) -> GemmCurve:
    """Return the shared curve of products with the two shares that a device's own figures give.

    Parameters
    ----------
    curve : GemmCurve
        What devices share.
    chip : Chip
        The device, at the width of the figures.
    large : Figure, optional
        A product that the matrix units bound; sets `compute_fraction`.
    stream : Figure, optional
        A product of few rows with much weight; sets `bandwidth_fraction`.
    bytes_per_value : float
        Width of the operands [bytes].

    Raises
    ------
    ValueError
        If a figure is faster than any share allows.
    """
    given = [("compute_fraction", large), ("bandwidth_fraction", stream)]
    for _ in range(SWEEPS):
        for name, figure in given:
            if figure is not None:
                curve = _set(curve, name, figure, chip, bytes_per_value)
    return curve


def _set(curve: GemmCurve, name: str, figure: Figure, chip: Chip, bytes_per_value: float) -> GemmCurve:
    """Return the curve with the share under which the figure comes out, by bisection: time falls with the share."""

    def with_share(logarithm: float) -> GemmCurve:
        return curve.model_copy(update={name: math.exp(logarithm)})

    def predicted_s(logarithm: float) -> float:
        shape = {"d_in": figure.d_in, "d_out": figure.d_out, "bytes_per_value": bytes_per_value}
        return float(gemm_s(figure.rows, chip=chip, curve=with_share(logarithm), **shape))

    low, high = math.log(LEAST_FRACTION), math.log(MOST_FRACTION)
    if predicted_s(high) > figure.time_s:
        raise ValueError(
            f"time_s={figure.time_s:g} of a product of {figure.rows:g} x {figure.d_in:g} x {figure.d_out:g} is shorter "
            f"than {name} can make it; check the figure, or give one that this share bounds"
        )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if predicted_s(middle) > figure.time_s else (low, middle)
    return with_share(high)
