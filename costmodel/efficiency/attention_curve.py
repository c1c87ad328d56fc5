"""Parameters of attention over whole sequences: how a kernel cuts it, and how it uses a device."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from costmodel.base import Quantity
from costmodel.efficiency.common import AboveOne, Curve, NotNegative, Positive, Share

ANCHORS: Final = (64.0, 128.0, 256.0)


class Tiling(NamedTuple):
    """How a kernel cuts attention.

    Parameters
    ----------
    query_tiles : tuple of int
        Rows of queries a thread block may own; the best is taken.
    packed : bool
        Whether the query heads that share keys fill one tile together.
    pad : int
        What head_dim is rounded up to.
    """

    query_tiles: tuple[int, ...] = (64, 128)
    packed: bool = False
    pad: int = 16


class AttentionCurve(Curve):
    """How attention over whole sequences uses a device.

    Parameters
    ----------
    start_cycles : float
        Start of the kernel and of what the library runs around it.
    compute_64_fraction, compute_128_fraction, compute_256_fraction : float
        Matrix rate of long sequences at these head_dims, as a share of the peak.
    droop_fraction : float
        Slow-down of a kernel much longer than 2 ms.
    wave_quantisation : float
        Share of whole rounds of thread blocks.
    balance_flops_per_byte : float
        16-bit peak over the rate at which the L2 feeds the cores.
    bandwidth_fraction : float
        Reached share of the memory bandwidth; above one where the benchmark's inputs stay in the L2.
    norm : float
        How sharply the roofs meet.
    serial_passes : float
        Passes over queries, keys, values and outputs before or after the kernel.
    block_cycles : float
        Start and end of one thread block.
    """

    start_cycles: NotNegative = 15000.0
    compute_64_fraction: Positive = 0.53
    compute_128_fraction: Positive = 0.66
    compute_256_fraction: Positive = 0.68
    droop_fraction: NotNegative = 0.06
    wave_quantisation: Share = 0.7
    balance_flops_per_byte: NotNegative = 70.0
    bandwidth_fraction: Positive = 0.9
    norm: AboveOne = 2.5
    serial_passes: NotNegative = 0.8
    block_cycles: NotNegative = 1200.0

    def cycles_a_value(self, head_dim: Quantity, pad: int) -> Quantity:
        """Return padded head_dim over the reached share of the peak: the work of one query-key pair.

        Between the anchors it is interpolated in logarithms; it never falls with head_dim, as work does not.
        """
        wide = np.ceil(np.asarray(head_dim) / pad) * pad
        shares = (self.compute_64_fraction, self.compute_128_fraction, self.compute_256_fraction)
        costs = np.log(np.maximum.accumulate([d / share for d, share in zip(ANCHORS, shares, strict=True)]))
        inside = np.exp(np.interp(np.log(wide), np.log(ANCHORS), costs))
        outside = np.where(wide < ANCHORS[0], wide / ANCHORS[0], np.maximum(wide / ANCHORS[-1], 1.0))
        result: Quantity = inside * outside
        return result
