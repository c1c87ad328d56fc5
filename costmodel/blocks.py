"""The blocks of a transformer as operators: each formula once.

Every function is linear in its work arguments (`rows`, `pairs`, `keys`, …), so it takes numbers, arrays, or the unit
vectors from which `OperatorTable` is compiled. A multiply-add counts as two FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

from costmodel.base import Quantity
from costmodel.operators import HOST, Kind, Operator
from costmodel.shapes import CollectiveShape, GemmShape, MoveShape
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


def kv_bytes_each(bits: float, scale_bits: float | None = None) -> float:
    """Return the bytes of one cached number, its share of scale and zero point included [bytes].

    Where `scale_bits` does not say how much that is, numbers below eight bits share them in groups of `KV_GROUP`.
    """
    if scale_bits is None:
        scale_bits = 2 * SCALE_BITS / KV_GROUP if bits < BITS_PER_BYTE else 0.0
    return (bits + scale_bits) / BITS_PER_BYTE


@dataclass(frozen=True, slots=True)
class Widths:
    """Widths of numbers in a tower, and over how many devices its matrices are split.

    Parameters
    ----------
    weight_bits, activation_bits, kv_bits : float
        Of weights, of the inputs of matrix products, of cached keys and values.
    kv_scale_bits : float or None
        Of scale and zero point, for each cached number; None is the rule of `kv_bytes_each`.
    tp : int
        Devices that share every layer.
    ep : int
        Devices over which routed experts are dealt out: those of one replica, or of several that share them.
    expert_imbalance : float
        Load of the busiest of those devices over the mean.
    """

    weight_bits: float = 16
    activation_bits: float = 16
    kv_bits: float = 16
    tp: int = 1
    ep: int = 1
    expert_imbalance: float = 1.0
    kv_scale_bits: float | None = None

    @property
    def cached_bytes(self) -> float:
        """Bytes of one cached number [bytes]."""
        return kv_bytes_each(self.kv_bits, self.kv_scale_bits)

    @property
    def expert_replicas(self) -> int:
        """Replicas whose rows meet at one set of experts."""
        return max(1, self.ep // self.tp)

    @property
    def state_bytes(self) -> float:
        """Bytes of one number of the residual stream: never fewer than two [bytes]."""
        return max(16.0, self.activation_bits) / BITS_PER_BYTE

    @property
    def input_bytes(self) -> float:
        """Bytes of one number that enters a matrix product [bytes]."""
        return self.activation_bits / BITS_PER_BYTE

    @property
    def dequantises(self) -> bool:
        """Whether weights are widened to the inputs' width inside the product (W4A16, W8A16)."""
        return self.weight_bits < self.activation_bits

    @property
    def math_bits(self) -> int:
        """Width in which products are computed: that of the activations."""
        return int(self.activation_bits)


@dataclass(frozen=True, slots=True)
class Execution:
    """How an engine runs what models leave open.

    Parameters
    ----------
    expands_latents : bool
        Whether a decode step of latent attention expands every cached latent, as `transformers` does, instead of
        absorbing the expansion into the query; of a recurrence, whether what `transformers` executes is counted.
    concatenates_cache : bool
        Whether a decode step copies the cache to append to it.
    repeats_heads : bool
        Whether keys and values are copied for every query head before attention.
    apart : bool
        Whether norms, activations and rotations run as the several kernels that PyTorch has for them.
    """

    expands_latents: bool = False
    concatenates_cache: bool = False
    repeats_heads: bool = False
    apart: bool = False


FUSED = Execution()
"""What modern engines do."""


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What a run of layers has to do.

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
    touched : float or ndarray
        Share of the routed experts that any row uses, summed over passes.
    """

    passes: Quantity
    rows: Quantity
    pairs: Quantity
    keys: Quantity
    touched: Quantity = 0.0


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
    apart : bool
        As in `Execution`.
    """

    passes: Quantity
    widths: Widths
    repeats: int = 1
    apart: bool = False


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
        Products that widen their weights on the way are a kind of their own.

    References
    ----------
    .. [1] S. Williams, A. Waterman, D. Patterson, "Roofline", Commun. ACM 52(4), 2009.
    """
    widths = run.widths
    each = weight_bytes_each(widths.weight_bits)
    return Operator(
        name,
        Kind.DEQUANT_GEMM if widths.dequantises else Kind.GEMM,
        run.repeats,
        flops=rows * (2.0 * d_in * d_out),
        weight_bytes=run.passes * (d_in * d_out * each),
        activation_bytes=rows * (d_in * widths.input_bytes + d_out * widths.state_bytes),
        launches=run.passes,
        bits=widths.math_bits,
        rows=rows,
        shape=GemmShape(d_in, d_out, each),
    )


def elementwise(name: str, rows: Quantity, *, numbers: float, run: Run, operator: str = "add") -> Operator:
    """Return a memory-bound operator that reads and writes `numbers` values a row [bytes].

    `operator` says what it resembles most: norm, activation, rope, add or embedding.
    """
    row_bytes = numbers * run.widths.state_bytes
    return Operator(
        name,
        Kind.ELEMENTWISE,
        run.repeats,
        activation_bytes=rows * row_bytes,
        launches=run.passes,
        rows=rows,
        shape=MoveShape(operator, row_bytes),
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
    return _collective(name, rows, "all_reduce", numbers=numbers, rounds=2.0, run=run)


def all_gather(name: str, rows: Quantity, *, numbers: float, run: Run) -> Operator:
    """Return an all-gather of `numbers` values a row, of which each device holds its share: half an all-reduce."""
    return _collective(name, rows, "all_gather", numbers=numbers, rounds=1.0, run=run)


def _collective(name: str, rows: Quantity, algorithm: str, *, numbers: float, rounds: float, run: Run) -> Operator:
    n_devices = run.widths.tp
    shape = CollectiveShape(algorithm, numbers * run.widths.state_bytes)
    sent = shape.row_bytes * rounds * (n_devices - 1) / n_devices
    return _exchange(name, rows, shape, sent=sent, peers=n_devices, run=run)


def all_to_all(name: str, rows: Quantity, *, numbers: float, run: Run) -> Operator:
    """Return an all-to-all of `numbers` values a row of each replica over all devices that hold experts.

    Returns
    -------
    Operator
        Of its share of a replica's rows, a device sends all but what stays [bytes].
    """
    n_devices = run.widths.ep
    shape = CollectiveShape("alltoall", numbers / run.widths.tp * run.widths.state_bytes)
    sent = shape.row_bytes * (n_devices - 1) / n_devices
    return _exchange(name, rows, shape, sent=sent, peers=n_devices, run=run)


def send(name: str, rows: Quantity, *, numbers: float, n_hops: int, run: Run) -> Operator:
    """Return the passing on of `numbers` values a row between pipeline stages, one hop after another [bytes]."""
    shape = CollectiveShape("send_recv", numbers * run.widths.state_bytes / run.widths.tp, hops=n_hops)
    return _exchange(name, rows, shape, sent=shape.row_bytes * n_hops, peers=run.widths.tp * (n_hops + 1), run=run)


def host_copy(name: str, copied_bytes: Quantity, *, messages: Quantity, repeats: int = 1) -> Operator:
    """Return a copy between the device and its host, in so many pieces one after another [bytes]."""
    return Operator(name, Kind.COPY, repeats, link_bytes=copied_bytes, messages=messages, launches=messages, peers=HOST)


def _exchange(name: str, rows: Quantity, shape: CollectiveShape, *, sent: float, peers: int, run: Run) -> Operator:
    return Operator(
        name,
        Kind.COLLECTIVE,
        run.repeats,
        link_bytes=rows * sent,
        messages=run.passes * shape.hops,
        launches=run.passes,
        peers=peers,
        rows=rows,
        shape=shape,
    )
