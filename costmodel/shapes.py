"""What of an operator never changes with its work: the static shape by which fitted curves know it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class GemmShape:
    """A dense product with a weight of this shape on one device.

    Parameters
    ----------
    d_in, d_out : float
        Shape of the weight.
    weight_bytes : float
        One weight, its share of scales included [bytes].
    """

    d_in: float
    d_out: float
    weight_bytes: float


@dataclass(frozen=True, slots=True)
class ExpertsShape:
    """The routed experts of a layer on one device.

    Parameters
    ----------
    width, hidden : float
        Widths of the layer and of one expert on this device.
    experts, top_k : int
        Experts of the layer, and those that a token uses.
    local_experts : float
        Experts on this device.
    matrices : int
        3 for gated experts, 2 for plain ones.
    replicas : int
        Replicas whose tokens meet at these experts.
    load : float
        Rows of this device over tokens of one replica times `top_k`: its share, and how uneven the shares are.
    weight_bytes : float
        One weight, its share of scales included [bytes].
    """

    width: float
    hidden: float
    experts: int
    top_k: int
    local_experts: float
    matrices: int
    replicas: int
    load: float
    weight_bytes: float


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Attention of the heads on one device.

    Parameters
    ----------
    heads, kv_heads : float
        Query heads, and heads of keys and values.
    pair_width : float
        Widths of a query and of a value together, which one query-key pair multiplies.
    key_bytes : float
        One key and its value in the cache, of one head [bytes].
    causal : bool
        Whether a query sees only what came before it.
    """

    heads: float
    kv_heads: float
    pair_width: float
    key_bytes: float
    causal: bool = True


@dataclass(frozen=True, slots=True)
class CollectiveShape:
    """An exchange between devices.

    Parameters
    ----------
    algorithm : str
        all_reduce, all_gather, alltoall or send_recv.
    row_bytes : float
        Buffer of one device for one row [bytes].
    hops : int
        How often it happens, one after another.
    """

    algorithm: str
    row_bytes: float
    hops: int = 1


@dataclass(frozen=True, slots=True)
class MoveShape:
    """An operator that only moves data.

    Parameters
    ----------
    operator : str
        What it is: norm, activation, rope, add or embedding.
    row_bytes : float
        Read and written for one row [bytes].
    """

    operator: str
    row_bytes: float


Shape: TypeAlias = GemmShape | ExpertsShape | AttentionShape | CollectiveShape | MoveShape
