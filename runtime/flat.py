"""What a measured kernel takes under the flat efficiencies that an engine states: the roofline of one operator."""

from __future__ import annotations

from typing import Final

from costmodel.base import Quantity
from costmodel.blocks import Run, Widths, Work, gemm
from costmodel.engine import EngineProfile
from costmodel.errors import Unsupported
from costmodel.hardware import HardwareProfile
from costmodel.kernels import Kernels
from costmodel.mixers import HeadWidths, attention
from costmodel.operators import Kind, Operator
from costmodel.priced import operator_s
from costmodel.query import causal_pairs
from runtime.measurement import SIZES, Measurement
from runtime.recipes import TWICE

BITS_A_BYTE: Final = 8
KINDS: Final = {
    "prefill_attention": Kind.PREFILL_ATTENTION,
    "encoder_attention": Kind.ENCODER_ATTENTION,
    "decode_attention": Kind.DECODE_ATTENTION,
}


def flat_s(line: Measurement, hardware: HardwareProfile, engine: EngineProfile) -> tuple[float, Kind | None]:
    """Return the time of a kernel, copy or launch, and whose band it has: none for the link to the host [s].

    Raises
    ------
    Unsupported
        If neither device nor engine says what it takes.
    """
    if line.kind == "copy" and line.shape["direction"] != "d2d":
        return _host_copy_s(line, hardware), None
    operator = operator_of(line)
    flat = engine.model_copy(update={"kernels": {}})
    return float(operator_s(operator, Kernels(hardware, flat))), operator.kind


def operator_of(line: Measurement) -> Operator:
    """Return a measured kernel, a copy on the device or a replay of empty kernels as an operator.

    Raises
    ------
    Unsupported
        If it is none of them.
    """
    if line.kind == "elementwise":
        return Operator(line.kind, Kind.ELEMENTWISE, activation_bytes=line.traffic_bytes, launches=1.0)
    if line.kind == "copy":
        return Operator(line.kind, Kind.ELEMENTWISE, activation_bytes=2 * line.number("bytes"), launches=1.0)
    if line.kind == "launch":
        if line.shape["kind"] != "graph":
            raise Unsupported("the host's time of an eager launch is in no profile")
        return Operator(line.kind, Kind.ELEMENTWISE, launches=line.number("kernels"))
    if line.kind == "collective":
        return _collective(line)
    if line.precision not in SIZES:
        raise Unsupported(f"precision {line.precision!r} has no known width; known: {', '.join(SIZES)}")
    bits = SIZES[line.precision] * BITS_A_BYTE
    run = Run(1.0, Widths(bits, bits, bits))
    if line.kind == "gemm":
        return gemm(line.kind, line.number("m"), d_in=line.number("k"), d_out=line.number("n"), run=run)
    return _attention(line, run)


def _attention(line: Measurement, run: Run) -> Operator:
    batch = line.number("b")
    pairs: Quantity
    if line.kind == "decode_attention":
        rows, keys = 1.0, line.number("context")
        pairs = keys
    else:
        rows = keys = line.number("s")
        pairs = causal_pairs(rows) if line.kind == "prefill_attention" else rows * rows
    heads, kv_heads, head_dim = (line.number(key) for key in ("heads", "kv_heads", "head_dim"))
    on = HeadWidths(heads, kv_heads, heads * head_dim, heads * head_dim, 2 * kv_heads * head_dim)
    work = Work(1.0, batch * rows, batch * pairs, batch * keys)
    return attention(line.kind, work, on, kind=KINDS[line.kind], run=run)


def _collective(line: Measurement) -> Operator:
    ranks = int(line.number("ranks"))
    rounds = 2.0 if line.shape["algorithm"] in TWICE else 1.0
    sent = rounds * (ranks - 1) / ranks * line.number("message_bytes")
    return Operator(line.kind, Kind.COLLECTIVE, link_bytes=sent, messages=1.0, launches=1.0, peers=ranks)


def _host_copy_s(line: Measurement, hardware: HardwareProfile) -> float:
    links = [link for link in hardware.links if link.kind == "pcie"]
    if not links:
        raise Unsupported(f"{hardware.name} has no link to its host")
    link = max(links, key=lambda one: one.bandwidth_bytes_per_s)
    return line.number("bytes") / link.bandwidth_bytes_per_s + link.latency_s
