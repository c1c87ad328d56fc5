"""Operators: the columns of work that a stage is made of.

An `Operator` is one kernel (or a fused few) repeated over layers. Its columns are numbers, or arrays that broadcast.
Every formula in `costmodel.blocks` is linear in the sums of `costmodel.query`, so evaluated on unit vectors it gives
its own coefficients: `OperatorTable` keeps those, and a product with the sums of a query gives every column at once.
Beside its work, an operator names its shape and what drives it, by which fitted curves give its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from costmodel.base import Array, Quantity
from costmodel.memo import Cache, remember
from costmodel.shapes import Shape


class Kind(IntEnum):
    """Kinds of operators: those of one kind share an efficiency and its error."""

    GEMM = 0
    PREFILL_ATTENTION = 1
    DECODE_ATTENTION = 2
    ENCODER_ATTENTION = 3
    ELEMENTWISE = 4
    COLLECTIVE = 5
    MOE_GEMM = 6
    DEQUANT_GEMM = 7
    DEQUANT_MOE_GEMM = 8
    COPY = 9

    @property
    def label(self) -> str:
        """Name in files and tables."""
        return self.name.lower()


HOST: Final = 0
"""In place of the number of peers: the device exchanges bytes with its host."""


@dataclass(frozen=True, slots=True, eq=False)
class Operator:
    """One operator of one layer.

    Parameters
    ----------
    name : str
        What it is called in tables.
    kind : Kind
        Which efficiency it has.
    repeats : int
        Layers that run it.
    flops : float or ndarray
        Work of the matrix units, a multiply-add being two [FLOP].
    weight_bytes, activation_bytes, kv_bytes : float or ndarray
        Traffic of device memory [bytes].
    link_bytes, messages : float or ndarray
        Traffic of the link between devices [bytes], and messages sent one after another.
    launches : float or ndarray
        Kernels started.
    bits : int
        Width of the matrix product.
    peers : int
        Devices that exchange messages, whose link counts; `HOST` for a copy from or to the host.
    rows, pairs, keys : float or ndarray
        What goes through a product or attention: tokens, query-key pairs, and keys read.
    shape : GemmShape, ExpertsShape, AttentionShape, CollectiveShape, MoveShape or None
        By which a fitted curve knows it; None for what no curve describes.
    """

    name: str
    kind: Kind
    repeats: int = 1
    flops: Quantity = 0.0
    weight_bytes: Quantity = 0.0
    activation_bytes: Quantity = 0.0
    kv_bytes: Quantity = 0.0
    link_bytes: Quantity = 0.0
    messages: Quantity = 0.0
    launches: Quantity = 0.0
    bits: int = 16
    peers: int = 1
    rows: Quantity = 0.0
    pairs: Quantity = 0.0
    keys: Quantity = 0.0
    shape: Shape | None = None

    @property
    def columns(self) -> tuple[Quantity, ...]:
        """The seven columns, in the order of `COLUMNS`."""
        return (
            self.flops,
            self.weight_bytes,
            self.activation_bytes,
            self.kv_bytes,
            self.link_bytes,
            self.messages,
            self.launches,
        )

    @property
    def drivers(self) -> tuple[Quantity, ...]:
        """Rows, pairs and keys, in the order of `DRIVERS`."""
        return self.rows, self.pairs, self.keys

    def scaled(self, factor: Quantity) -> Operator:
        """Return the operator with so many times the work."""
        return replace(self, **{name: getattr(self, name) * factor for name in (*COLUMNS, *DRIVERS)})


COLUMNS: Final = ("flops", "weight_bytes", "activation_bytes", "kv_bytes", "link_bytes", "messages", "launches")
FLOPS, WEIGHT, ACTIVATION, KV, LINK, MESSAGES, LAUNCHES = range(len(COLUMNS))
DRIVERS: Final = ("rows", "pairs", "keys")
ROWS, PAIRS, KEYS = range(len(DRIVERS))


@dataclass(frozen=True, slots=True, eq=False)
class OperatorTable:
    """The operators of a stage as one table.

    Parameters
    ----------
    names : tuple of str
    kinds, repeats, bits, peers : ndarray of int, shape (n_operators,)
    shapes : tuple
        Shape of each operator, or None.
    coefficients : ndarray, shape (n_columns, n_operators, n_sums)
        Columns for one unit of each sum.
    drivers : ndarray, shape (n_drivers, n_operators, n_sums)
        Rows, pairs and keys for one unit of each sum.
    totals : ndarray, shape (n_columns, n_sums)
        Their sum over operators and repeats.
    cache : dict
        The table priced for devices; see `costmodel.roofline`.
    """

    names: tuple[str, ...]
    kinds: NDArray[np.intp]
    repeats: Array
    bits: NDArray[np.intp]
    peers: NDArray[np.intp]
    shapes: tuple[Shape | None, ...]
    coefficients: Array
    drivers: Array
    totals: Array
    cache: Cache = field(default_factory=dict, repr=False)

    @staticmethod
    def of(operators: Sequence[Operator], n_sums: int) -> OperatorTable:
        """Return the table of operators that were listed on unit vectors."""
        coefficients = np.zeros((len(COLUMNS), len(operators), n_sums))
        drivers = np.zeros((len(DRIVERS), len(operators), n_sums))
        for i, operator in enumerate(operators):
            for j, column in enumerate(operator.columns):
                coefficients[j, i] = column
            for j, driver in enumerate(operator.drivers):
                drivers[j, i] = driver
        repeats = np.array([o.repeats for o in operators], dtype=float)
        return OperatorTable(
            names=tuple(o.name for o in operators),
            kinds=np.array([o.kind for o in operators], dtype=np.intp),
            repeats=repeats,
            bits=np.array([o.bits for o in operators], dtype=np.intp),
            peers=np.array([o.peers for o in operators], dtype=np.intp),
            shapes=tuple(o.shape for o in operators),
            coefficients=coefficients,
            drivers=drivers,
            totals=np.einsum("cos,o->cs", coefficients, repeats),
        )

    def only(self, rows: Sequence[int]) -> OperatorTable:
        """Return the table of some of the operators."""
        if len(rows) == len(self.names):
            return self
        coefficients, repeats = self.coefficients[:, rows], self.repeats[rows]
        return OperatorTable(
            names=tuple(self.names[i] for i in rows),
            kinds=self.kinds[rows],
            repeats=repeats,
            bits=self.bits[rows],
            peers=self.peers[rows],
            shapes=tuple(self.shapes[i] for i in rows),
            coefficients=coefficients,
            drivers=self.drivers[:, rows],
            totals=np.einsum("cos,o->cs", coefficients, repeats),
        )

    def driven_by(self, first: int) -> NDArray[np.bool_]:
        """Return which operators depend on any sum from this one on, shape (n_operators,)."""
        driven: NDArray[np.bool_] = np.any(self.coefficients[:, :, first:], axis=(0, 2))
        return driven

    def apart(self, first: int) -> OperatorTable:
        """Return the table of these operators, made once."""
        return remember(self.cache, ("apart", first), lambda: self.only(np.flatnonzero(self.driven_by(first)).tolist()))

    def columns(self, sums: Array) -> Array:
        """Return the work of one repeat, shape (n_columns, n_operators, n_points).

        Parameters
        ----------
        sums : ndarray, shape (n_sums, n_points)
            What the operators depend on.
        """
        product: Array = self.coefficients @ sums
        return product
