"""Which fitted curve gives the time of an operator: by device, kernel library, kind, precision and shape.

An engine names, for each kind of operator, the libraries whose kernels it runs. A device whose chip was measured has a
file of fitted curves a library; others get the curves that all measured devices share, with a wider band.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias, TypeVar

import numpy as np

from costmodel.base import Array
from costmodel.beside import fitted_beside
from costmodel.efficiency.attention_curve import AttentionCurve
from costmodel.efficiency.collective import CustomCurve, NcclCurve, custom_all_reduce_s, nccl_s, switch_reduces
from costmodel.efficiency.common import Chip
from costmodel.efficiency.cpu_gemm import CpuGemmCurve, cpu_gemm_s
from costmodel.efficiency.decode import DecodeCurve
from costmodel.efficiency.elementwise import ElementwiseCurve, elementwise_s
from costmodel.efficiency.fitted import FittedCurve, FittedProfile
from costmodel.efficiency.gemm import GemmCurve, gemm_s
from costmodel.efficiency.moe import MoeCurve, Routing, moe_s
from costmodel.efficiency.transfer import band_power, shared_variant
from costmodel.engine import EngineProfile
from costmodel.fitted_files import SHARED, load_fitted, load_fitted_texts, measured_as
from costmodel.hardware import HardwareProfile
from costmodel.memo import Cache, remember
from costmodel.operators import Kind
from costmodel.shapes import CollectiveShape, ExpertsShape, GemmShape, MoveShape, Shape
from costmodel.units import BITS_PER_BYTE

Product = TypeVar("Product", GemmCurve, CpuGemmCurve, MoeCurve)
STARTING: Final = (GemmCurve, CpuGemmCurve, MoeCurve, ElementwiseCurve, AttentionCurve, DecodeCurve)
"""Curves with a start of the kernel."""
Times: TypeAlias = Callable[[Array], Array]
"""Seconds of one call by the rows that go through it."""

PRECISIONS: Final[Mapping[int, tuple[str, ...]]] = {32: ("fp32",), 16: ("bf16", "fp16"), 8: ("fp8",)}
PLAIN: Final[Mapping[Kind, Kind]] = {Kind.DEQUANT_GEMM: Kind.GEMM, Kind.DEQUANT_MOE_GEMM: Kind.MOE_GEMM}
"""Products that widen their weights have the curve of the plain ones, lowered by what the engine states for both."""
SINGLE: Final = "fp32."
"""Begins the variant of attention in single precision; without it, attention is at 16 bits."""
SINGLE_BITS: Final = 32


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """A fitted curve and where it is from.

    Parameters
    ----------
    fitted : FittedCurve
    library, device : str
        Of the measurements; the device is `shared` where several were fitted together.
    widening : float
        How much wider its bands are on a logarithmic scale, where no device of this kind was measured.
    """

    fitted: FittedCurve
    library: str
    device: str
    widening: float = 1.0

    @property
    def is_shared(self) -> bool:
        """Whether the device itself was never measured."""
        return self.device == SHARED

    @property
    def name(self) -> str:
        """Its name in tables."""
        return f"{self.device}.{self.library} {self.fitted.kind}.{self.fitted.variant}"

    def band(self, size: float) -> tuple[float, float]:
        """Return the band of measured over predicted time, less one, at a size."""
        *ranges, _ = self.fitted.sizes
        part = next((r for r in ranges if r.up_to is None or size <= r.up_to), ranges[-1])
        return (1 + part.low) ** self.widening - 1, (1 + part.high) ** self.widening - 1


@dataclass(frozen=True, slots=True)
class Wish:
    """What curve is looked for.

    Parameters
    ----------
    kind : str
        Kind of kernel.
    prefixes : tuple of str
        Beginnings of the variants that will do, the best first.
    peers : int
        Devices of an exchange.
    """

    kind: str
    prefixes: tuple[str, ...]
    peers: int


@dataclass(frozen=True, slots=True, eq=False)
class Kernels:
    """The fitted curves that an engine runs on a device.

    Parameters
    ----------
    hardware : HardwareProfile
    engine : EngineProfile
    cache : dict
        Curves that were looked for, and what was tabulated from them.
    """

    hardware: HardwareProfile
    engine: EngineProfile
    cache: Cache = field(default_factory=dict)

    def find(self, kind: Kind, shape: Shape | None, *, bits: int, peers: int) -> Kernel | None:
        """Return the curve of an operator, None where no file has one."""
        libraries = self.engine.kernels.get(kind.label, ())
        if shape is None or not libraries:
            return None
        wish = Wish(PLAIN.get(kind, kind).label, wanted(kind, shape, bits), peers)
        found: tuple[Kernel | None] = remember(
            self.cache, (kind, wish), lambda: (_find(self.hardware, libraries, wish, self.beside),)
        )
        return found[0]

    @property
    def beside(self) -> tuple[FittedProfile, ...]:
        """The curves that a person keeps beside the file of the device."""
        found: tuple[FittedProfile, ...] = remember(self.cache, "beside", lambda: fitted_beside(self.hardware))
        return found

    def chip(self, bits: int) -> Chip:
        """Return the device as curves see it."""
        chip: Chip = remember(self.cache, ("chip", bits), lambda: Chip.of(self.hardware, bits))
        return chip


def wanted(kind: Kind, shape: Shape, bits: int) -> tuple[str, ...]:
    """Return the variants of curves that describe an operator, as the beginnings of their names, the best first."""
    if isinstance(shape, GemmShape):
        return PRECISIONS.get(bits, ())
    if isinstance(shape, ExpertsShape):
        return tuple(f"{precision}." for precision in PRECISIONS.get(bits, ()))
    if isinstance(shape, MoveShape):
        return (shape.operator,)
    if isinstance(shape, CollectiveShape):
        return ("custom_all_reduce", "all_reduce") if shape.algorithm == "all_reduce" else (shape.algorithm,)
    plain: tuple[str, ...] = ("",)
    if kind == Kind.DECODE_ATTENTION:
        plain = ("gqa.",) if shape.heads > shape.kv_heads else ("mha.", "gqa.")
    return (*(f"{SINGLE}{name}" for name in plain), *plain) if bits == SINGLE_BITS else plain


def _find(
    hardware: HardwareProfile, libraries: Sequence[str], wish: Wish, beside: Sequence[FittedProfile]
) -> Kernel | None:
    """Return the first curve that a library has for the device's chip, else that measured devices share.

    Curves beside the device's own file come first, whatever their library: somebody measured them on this device.
    """
    named = [library.partition(".")[0] for library in libraries]
    for profile in sorted(beside, key=lambda one: named.index(one.library) if one.library in named else len(named)):
        found = _own([curve for curve in profile.curves if curve.kind == wish.kind], wish)
        if found is not None:
            return Kernel(found, profile.library, profile.device)
    own = measured_as(hardware)
    for device in dict.fromkeys((own, SHARED)):
        for entry in libraries:
            library, _, suffix = entry.partition(".")
            if f"{device}.{library}" not in load_fitted_texts():
                continue
            held = load_fitted(f"{device}.{library}").curves
            curves = [curve for curve in held if curve.kind == wish.kind and curve.variant.endswith(suffix)]
            found = _shared(curves, hardware, wish) if device == SHARED else _own(curves, wish)
            if found is not None:
                return Kernel(found, library, device, band_power(hardware) if device == SHARED else 1.0)
    return None


def _own(curves: Sequence[FittedCurve], wish: Wish) -> FittedCurve | None:
    for prefix in wish.prefixes:
        single = prefix.startswith(SINGLE)
        for curve in curves:
            if curve.variant.startswith(prefix) and curve.variant.startswith(SINGLE) <= (single or wish.kind == "gemm"):
                return curve
    return None


def _shared(curves: Sequence[FittedCurve], hardware: HardwareProfile, wish: Wish) -> FittedCurve | None:
    if hardware.kind != "gpu":
        return None
    by_name = {curve.variant: curve for curve in curves}
    for prefix in wish.prefixes:
        with contextlib.suppress(LookupError):
            return by_name[shared_variant(wish.kind, hardware, list(by_name), prefix=prefix, ranks=wish.peers)]
    return None


def times_of(kernel: Kernel, kind: Kind, shape: Shape, *, bits: int, peers: int, kernels: Kernels) -> Times:
    """Return the time of one call by the rows that go through it.

    Parameters
    ----------
    kernel : Kernel
        The curve.
    kind : Kind
    shape : GemmShape, ExpertsShape, MoveShape or CollectiveShape
        What runs.
    bits, peers : int
        Width of the product, and devices that exchange messages.
    kernels : Kernels
        The device.

    Returns
    -------
    callable
        Of rows; non-decreasing.
    """
    curve, chip = kernel.fitted.curve(), kernels.chip(bits)
    if isinstance(shape, GemmShape) and isinstance(curve, CpuGemmCurve):
        on_cpu = widening(curve, kind, kernels.engine)
        width, weight = bits / BITS_PER_BYTE, shape.weight_bytes
        sides = {"d_in": shape.d_in, "d_out": shape.d_out}
        return lambda x: cpu_gemm_s(x, **sides, chip=chip, curve=on_cpu, bytes_per_value=width, weight_bytes=weight)
    if isinstance(shape, GemmShape):
        assert isinstance(curve, GemmCurve)  # noqa: S101 - the file was checked when it was read
        own = widening(curve, kind, kernels.engine)
        each = bits / BITS_PER_BYTE
        return lambda x: gemm_s(
            x,
            d_in=shape.d_in,
            d_out=shape.d_out,
            chip=chip,
            curve=own,
            bytes_per_value=each,
            weight_bytes=shape.weight_bytes,
        )
    if isinstance(shape, ExpertsShape):
        assert isinstance(curve, MoeCurve)  # noqa: S101
        return _experts(shape, widening(curve, kind, kernels.engine), chip, bits)
    if isinstance(shape, MoveShape):
        assert isinstance(curve, ElementwiseCurve)  # noqa: S101
        stays = kernels.hardware.kind == "cpu"  # its last cache holds what the operator before has written
        return lambda x: elementwise_s(x * shape.row_bytes, chip=chip, curve=curve, resident=stays)
    assert isinstance(shape, CollectiveShape)  # noqa: S101 - attention has curves of several arguments
    return _collective(kernel, shape, peers, kernels.hardware)


def widening(curve: Product, kind: Kind, engine: EngineProfile) -> Product:
    """Return the curve of products that widen their weights: the plain one's shares as far lower as the engine says."""
    if kind not in PLAIN:
        return curve
    own, plain = engine.kind(kind), engine.kind(PLAIN[kind])
    return curve.model_copy(
        update={
            "compute_fraction": curve.compute_fraction * own.compute_fraction / plain.compute_fraction,
            "bandwidth_fraction": curve.bandwidth_fraction * own.bandwidth_fraction / plain.bandwidth_fraction,
        }
    )


def _experts(shape: ExpertsShape, curve: MoeCurve, chip: Chip, bits: int) -> Times:
    def seconds(tokens: Array) -> Array:
        routing = Routing.expected(
            tokens,
            top_k=shape.top_k,
            experts=shape.experts,
            local_experts=shape.local_experts,
            replicas=shape.replicas,
            load=shape.load,
        )
        return moe_s(
            routing,
            hidden=shape.width,
            inter=shape.hidden,
            local_experts=shape.local_experts,
            matrices=shape.matrices,
            chip=chip,
            curve=curve,
            bytes_per_value=bits / BITS_PER_BYTE,
            weight_bytes=shape.weight_bytes,
        )

    return seconds


def _collective(kernel: Kernel, shape: CollectiveShape, peers: int, hardware: HardwareProfile) -> Times:
    link, curve = hardware.link(peers), kernel.fitted.curve()
    rate, rounds = link.rate_bytes_per_s(peers), 2.0 if shape.algorithm in ("all_reduce", "send_recv") else 1.0
    ranks = 2 if shape.algorithm == "send_recv" else peers
    reduces = shape.algorithm == "all_reduce" and switch_reduces(hardware, link)

    def ring(message_bytes: Array, own: NcclCurve) -> Array:
        return nccl_s(
            message_bytes, ranks=ranks, rounds=rounds, link_bytes_per_s=rate, curve=own, switch_reduces=reduces
        )

    if isinstance(curve, CustomCurve):
        behind = NcclCurve.model_validate(dict(kernel.fitted.ring))
        most = 2 if link.topology == "host" else link.devices

        def joined(rows: Array) -> Array:
            message = rows * shape.row_bytes
            return custom_all_reduce_s(
                message, ranks=peers, link_bytes_per_s=rate, curve=curve, ring_s=ring(message, behind), most_ranks=most
            )

        return joined
    assert isinstance(curve, NcclCurve)  # noqa: S101
    return lambda x: shape.hops * ring(x * shape.row_bytes, curve)


def start_s(kernel: Kernel, shape: Shape, times: Times | None, kernels: Kernels) -> float:
    """Return what one call takes beyond its work: the start of kernels, or the latency of an exchange [s]."""
    curve = kernel.fitted.curve()
    if isinstance(shape, CollectiveShape):
        assert times is not None  # noqa: S101
        return float(times(np.zeros(1))[0])
    assert isinstance(curve, STARTING)  # noqa: S101
    experts = (
        shape.local_experts * curve.expert_cycles
        if isinstance(curve, MoeCurve) and isinstance(shape, ExpertsShape)
        else 0.0
    )
    return (curve.start_cycles + experts) / kernels.hardware.clock_hz
