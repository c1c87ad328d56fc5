"""The survey's model, equation by equation (arXiv:2604.05546, Section 3).

Plain functions of numbers or arrays, and the operators that make the engine `paper` out of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from costmodel.base import Quantity
from costmodel.blocks import Work
from costmodel.models import DecoderSpec
from costmodel.operators import Kind, Operator
from costmodel.query import KVEntry, Segment
from costmodel.recurrent import STATE_BITS, RecurrentSpec
from costmodel.units import BITS_PER_BYTE

if TYPE_CHECKING:
    from costmodel.stages import Sums


def total_s(encode_s: Quantity, prefill_s: Quantity, output_tokens: Quantity, decode_s: Quantity) -> Quantity:
    """Return Eq. 2: encode, prefill, and one decode step an output token [s]."""
    return encode_s + prefill_s + output_tokens * decode_s


def encode_s(flops: Quantity, peak_flops_per_s: float) -> Quantity:
    """Return Eq. 3: the encoder is bound by compute [s]."""
    return flops / peak_flops_per_s


def kv_bytes(*, n_layers: int, tokens: Quantity, width: int, kv_ratio: float, bytes_each: float = 2.0) -> Quantity:
    """Return Eq. 5 (and the KV of Eq. 4): keys and values of this many tokens [bytes]."""
    return 2.0 * n_layers * tokens * width * kv_ratio * bytes_each


def decode_s(
    weight_bytes: Quantity, cache_bytes: Quantity, bandwidth_bytes_per_s: float, n_devices: int = 1
) -> Quantity:
    """Return Eq. 6: weights and cache through the memory of all devices [s]."""
    return (weight_bytes + cache_bytes) / (bandwidth_bytes_per_s * n_devices)


def ridge_flops_per_byte(peak_flops_per_s: float, bandwidth_bytes_per_s: float) -> float:
    """Return Eq. 10: the intensity at which compute and memory take equally long [FLOP/byte]."""
    return peak_flops_per_s / bandwidth_bytes_per_s


def decode_intensity_flops_per_byte(parameters: float, *, bytes_each: float = 2.0, batch: Quantity = 1.0) -> Quantity:
    """Return Eq. 11: two FLOPs a weight and sequence over the bytes of the weights [FLOP/byte]."""
    return 2.0 * parameters * batch / (parameters * bytes_each)


def encode_operator(flops: Quantity) -> Operator:
    """Return the encoder as Eq. 3 sees it."""
    return Operator("encode.eq3", Kind.GEMM, flops=flops)


def prefill_operator(segment: Segment, work: Work, *, kv_bits: float, n_devices: int) -> Operator:
    """Return prefill as Eq. 4 sees it: attention FLOPs against the keys and values written."""
    mixer = segment.layer.mixer
    if isinstance(mixer, RecurrentSpec):
        flops, state = mixer.step_flops / n_devices, mixer.state_width * STATE_BITS / BITS_PER_BYTE / n_devices
        name, kind = "prefill.eq4_state", Kind.PREFILL_ATTENTION
        return Operator(name, kind, segment.n_layers, flops=work.pairs * flops, kv_bytes=work.keys * state)
    return Operator(
        "prefill.eq4",
        Kind.PREFILL_ATTENTION,
        segment.n_layers,
        flops=work.pairs * (4.0 * mixer.q_width / n_devices),
        kv_bytes=work.rows * (mixer.cached_width * kv_bits / BITS_PER_BYTE / n_devices),
    )


def weights_operator(decoder: DecoderSpec, sums: Sums, *, weight_bits: float, n_devices: int) -> Operator:
    """Return the weights of Eq. 6, with the FLOPs of Eq. 11."""
    parameters = decoder.parameters / n_devices
    return Operator(
        "decode.eq6_weights",
        Kind.GEMM,
        flops=sums.rows * (2.0 * parameters),
        weight_bytes=sums.passes * (parameters * weight_bits / BITS_PER_BYTE),
    )


def cache_operator(entry: KVEntry, work: Work, *, n_devices: int) -> Operator:
    """Return the cache of Eq. 6."""
    width = entry.mixer.state_width if isinstance(entry.mixer, RecurrentSpec) else entry.mixer.cached_width
    each = width * (entry.bits + (entry.scale_bits or 0.0)) / BITS_PER_BYTE / n_devices
    return Operator("decode.eq6_cache", Kind.DECODE_ATTENTION, entry.n_layers, kv_bytes=work.keys * each)
