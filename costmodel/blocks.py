"""The blocks of a transformer as operators: each formula once.

Every function is linear in its work arguments (`rows`, `pairs`, `keys`, …), so it takes numbers, arrays, or the unit
vectors from which `OperatorTable` is compiled. A multiply-add counts as two FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

from costmodel.base import Quantity
from costmodel.models import AttentionSpec, LayerSpec, MlpSpec
from costmodel.operators import Kind, Operator
from costmodel.units import BITS_PER_BYTE

SCALE_GROUP = 128
"""Weights that share one 16-bit scale below eight bits (the group size of AWQ and GPTQ checkpoints)."""
KV_GROUP = 32
"""Cached numbers that share a 16-bit scale and a 16-bit zero point below eight bits (KIVI, arXiv:2402.02750)."""
SCALE_BITS = 16


def weight_bytes_each(bits: float) -> float:
    """Return the bytes of one weight, its share of the scales included below eight bits [bytes]."""
    scales = SCALE_BITS / SCALE_GROUP if bits < BITS_PER_BYTE else 0.0
    return (bits + scales) / BITS_PER_BYTE


def kv_bytes_each(bits: float) -> float:
    """Return the bytes of one cached number, its share of scale and zero point included below eight bits [bytes]."""
    scales = 2 * SCALE_BITS / KV_GROUP if bits < BITS_PER_BYTE else 0.0
    return (bits + scales) / BITS_PER_BYTE


@dataclass(frozen=True, slots=True)
class Widths:
    """Widths of numbers in a tower, and over how many devices its matrices are split.

    Parameters
    ----------
    weight_bits, activation_bits, kv_bits : float
        Of weights, of the inputs of matrix products, of cached keys and values.
    tp : int
        Devices that share every layer.
    """

    weight_bits: float = 16
    activation_bits: float = 16
    kv_bits: float = 16
    tp: int = 1

    @property
    def state_bytes(self) -> float:
        """Bytes of one number of the residual stream: never fewer than two [bytes]."""
        return max(16.0, self.activation_bits) / BITS_PER_BYTE

    @property
    def input_bytes(self) -> float:
        """Bytes of one number that enters a matrix product [bytes]."""
        return self.activation_bits / BITS_PER_BYTE

    @property
    def math_bits(self) -> int:
        """Width in which products are computed: that of the activations."""
        return int(self.activation_bits)


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What the attention of a run of layers has to do.

    Parameters
    ----------
    passes : float or ndarray
        Forward passes: times the weights are read.
    rows : float or ndarray
        Tokens or patches that go through.
    pairs : float or ndarray
        Query-key pairs that attention computes.
    keys : float or ndarray
        Cached tokens whose keys and values attention reads.
    """

    passes: Quantity
    rows: Quantity
    pairs: Quantity
    keys: Quantity


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """How an operator runs.

    Parameters
    ----------
    passes : float or ndarray
        Forward passes: times the weights are read and the kernel is started.
    widths : Widths
        Precision of each operand, and devices that share it.
    repeats : int
        Layers that run it.
    """

    passes: Quantity
    widths: Widths
    repeats: int = 1


def gemm(name: str, rows: Quantity, *, d_in: float, d_out: float, run: Run) -> Operator:
    """Return a dense matrix product.

    Parameters
    ----------
    name : str
        What it is called in tables.
    rows : float or ndarray
        Rows of the input, over all passes.
    d_in, d_out : float
        Shape of the weight on one device.
    run : Run
        Passes, precisions and repeats.

    Returns
    -------
    Operator
        2 rows d_in d_out FLOPs; the weight read once a pass, the input read and the output written once [bytes].

    References
    ----------
    .. [1] S. Williams, A. Waterman, D. Patterson, "Roofline", Commun. ACM 52(4), 2009.
    """
    widths = run.widths
    return Operator(
        name,
        Kind.GEMM,
        run.repeats,
        flops=rows * (2.0 * d_in * d_out),
        weight_bytes=run.passes * (d_in * d_out * weight_bytes_each(widths.weight_bits)),
        activation_bytes=rows * (d_in * widths.input_bytes + d_out * widths.state_bytes),
        launches=run.passes,
        bits=widths.math_bits,
    )


def elementwise(name: str, rows: Quantity, *, numbers: float, run: Run) -> Operator:
    """Return a memory-bound operator that reads and writes `numbers` values a row [bytes]."""
    traffic = rows * (numbers * run.widths.state_bytes)
    return Operator(name, Kind.ELEMENTWISE, run.repeats, activation_bytes=traffic, launches=run.passes)


def attention(name: str, work: Work, spec: AttentionSpec, *, kind: Kind, run: Run) -> Operator:
    """Return fused attention: scores, softmax and weighted sum without the score matrix in memory.

    Parameters
    ----------
    work : Work
        Its pairs are computed, its rows read as queries and written as outputs, its keys read from the cache.
    spec : AttentionSpec
        Heads; those of one device are the whole over its devices, key/value heads at least one.
    kind : Kind
        Prefill, decode or encoder attention.

    Returns
    -------
    Operator
        4 pairs heads head_dim FLOPs [1]_.

    References
    ----------
    .. [1] T. Dao et al., "FlashAttention", NeurIPS 2022.
    """
    widths = run.widths
    q_width = spec.q_width / widths.tp
    kv_bytes = 2 * kv_width_on_device(spec, widths.tp) * kv_bytes_each(widths.kv_bits)
    return Operator(
        name,
        kind,
        run.repeats,
        flops=work.pairs * (4.0 * q_width),
        activation_bytes=work.rows * (2 * q_width * widths.state_bytes),
        kv_bytes=work.keys * kv_bytes,
        launches=run.passes,
        bits=max(16, widths.math_bits),
    )


def score_matrix(name: str, work: Work, spec: AttentionSpec, *, run: Run) -> Operator:
    """Return the traffic of a score matrix kept in memory: written, read and written by softmax, read again [bytes]."""
    traffic = work.pairs * (4 * spec.heads / run.widths.tp * run.widths.state_bytes)
    return Operator(name, Kind.ELEMENTWISE, run.repeats, activation_bytes=traffic, launches=2 * run.passes)


def kv_width_on_device(spec: AttentionSpec, tp: int) -> float:
    """Return the width of one device's key heads: its share, but no less than one head (copies beyond that)."""
    return max(spec.kv_heads / tp, 1.0) * spec.head_dim


def rotary_and_cache(name: str, rows: Quantity, spec: AttentionSpec, *, run: Run, caches: bool) -> Operator:
    """Return the rotation of queries and keys, and the write of keys and values into the cache [bytes]."""
    widths = run.widths
    kv_width = kv_width_on_device(spec, widths.tp)
    rotated = 2 * (spec.q_width / widths.tp + kv_width) * spec.rotary + kv_width * caches
    written = 2 * kv_width * kv_bytes_each(widths.kv_bits) * caches
    return Operator(
        name,
        Kind.ELEMENTWISE,
        run.repeats,
        activation_bytes=rows * (rotated * widths.state_bytes),
        kv_bytes=rows * written,
        launches=run.passes,
    )


def all_reduce(name: str, rows: Quantity, *, numbers: float, run: Run) -> Operator:
    """Return a ring all-reduce of `numbers` values a row over all devices.

    Returns
    -------
    Operator
        Each device sends 2 (n - 1) / n of the buffer [1]_ [bytes].

    References
    ----------
    .. [1] P. Patarasuk, X. Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 2009.
    """
    return _collective(name, rows * numbers, sent=2.0, run=run)


def all_gather(name: str, rows: Quantity, *, numbers: float, run: Run) -> Operator:
    """Return an all-gather of `numbers` values a row, of which each device holds its share: half an all-reduce."""
    return _collective(name, rows * numbers, sent=1.0, run=run)


def _collective(name: str, numbers: Quantity, *, sent: float, run: Run) -> Operator:
    n_devices = run.widths.tp
    link_bytes = numbers * (run.widths.state_bytes * sent * (n_devices - 1) / n_devices)
    return Operator(name, Kind.COLLECTIVE, run.repeats, link_bytes=link_bytes, messages=run.passes, launches=run.passes)


def feed_forward(prefix: str, rows: Quantity, spec: MlpSpec, *, width: int, run: Run) -> list[Operator]:
    """Return a dense feed-forward block: up (and gate), activation, down."""
    hidden = spec.hidden / run.widths.tp
    up = hidden * (2 if spec.gated else 1)
    return [
        gemm(f"{prefix}.up", rows, d_in=width, d_out=up, run=run),
        elementwise(f"{prefix}.activation", rows, numbers=up + hidden, run=run),
        gemm(f"{prefix}.down", rows, d_in=hidden, d_out=width, run=run),
    ]


def layer(prefix: str, rows: Quantity, spec: LayerSpec, *, run: Run, caches: bool) -> list[Operator]:
    """Return one transformer layer but for its attention: norms, projections, feed-forward, sums over devices.

    Each norm is fused with the residual addition before it: two values read, two written.
    """
    mixer, width, tp = spec.mixer, spec.width, run.widths.tp
    qkv = mixer.q_width / tp + 2 * kv_width_on_device(mixer, tp)
    operators = [
        elementwise(f"{prefix}.norm_attention", rows, numbers=4 * width, run=run),
        gemm(f"{prefix}.qkv", rows, d_in=width, d_out=qkv, run=run),
        gemm(f"{prefix}.out", rows, d_in=mixer.q_width / tp, d_out=width, run=run),
        elementwise(f"{prefix}.norm_ffn", rows, numbers=4 * width, run=run),
        *feed_forward(prefix, rows, spec.ffn, width=width, run=run),
    ]
    if mixer.rotary or caches:
        operators.append(rotary_and_cache(f"{prefix}.rotary", rows, mixer, run=run, caches=caches))
    if tp > 1:
        operators += [
            all_reduce(f"{prefix}.all_reduce_attention", rows, numbers=width, run=run),
            all_reduce(f"{prefix}.all_reduce_ffn", rows, numbers=width, run=run),
        ]
    return operators


def attend(
    prefix: str, work: Work, spec: AttentionSpec, *, kind: Kind, run: Run, eager: bool = False
) -> list[Operator]:
    """Return the attention of a layer; eager attention keeps its score matrix in memory."""
    operators = [attention(f"{prefix}.attention", work, spec, kind=kind, run=run)]
    if eager:
        operators.append(score_matrix(f"{prefix}.scores", work, spec, run=run))
    return operators
