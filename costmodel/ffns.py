"""Feed-forward blocks and whole layers, as operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from costmodel.base import Quantity
from costmodel.blocks import Run, Widths, Work, all_reduce, all_to_all, elementwise, gemm, weight_bytes_each
from costmodel.layers import FfnSpec, LayerSpec, MoeSpec, Norm
from costmodel.mixers import projections
from costmodel.operators import Kind, Operator
from costmodel.shapes import ExpertsShape
from costmodel.traces import TracedFfnSpec

MATRICES: Final = 3
"""Matrices of a gated expert."""
NORM_NUMBERS: Final[Mapping[Norm, int]] = {"rms": 21, "layer": 5, "layer_no_bias": 5}
"""16-bit numbers that a residual addition and a norm read and write for each of their width, as PyTorch runs them.

Three for the addition; `torch.layer_norm` is one kernel; `LlamaRMSNorm` of `transformers` widens to 32 bits (3),
squares (4), averages (2), scales (4), narrows (3) and multiplies by its gain (2).
"""


def dense(prefix: str, rows: Quantity, *, hidden: float, gated: bool, width: int, run: Run) -> list[Operator]:
    """Return a dense block: up (and gate), activation, down; apart, an activation is written before it gates."""
    up = hidden * (2 if gated else 1)
    moved = up + hidden + (2 * hidden if gated and run.apart else 0.0)
    return [
        gemm(f"{prefix}.up", rows, d_in=width, d_out=up, run=run),
        elementwise(f"{prefix}.activation", rows, numbers=moved, run=run, operator="activation"),
        gemm(f"{prefix}.down", rows, d_in=hidden, d_out=width, run=run),
    ]


def routed_share(widths: Widths) -> float:
    """Return the routed rows of the busiest device over those of one replica."""
    return widths.expert_imbalance * widths.expert_replicas / widths.ep if widths.ep > 1 else 1.0


def grouped_kind(widths: Widths) -> Kind:
    """Return the kind of a product of routed experts."""
    return Kind.DEQUANT_MOE_GEMM if widths.dequantises else Kind.MOE_GEMM


def routed_experts(name: str, work: Work, spec: MoeSpec, *, width: int, run: Run) -> Operator:
    """Return the routed experts of a layer as engines run them: permuting rows, two grouped products, adding up.

    Returns
    -------
    Operator
        6 rows top_k width hidden FLOPs; of the experts' weights only those that a row uses are read, once a pass;
        rows are read and written around both products [bytes]. With expert parallelism the busiest device's share is
        what counts.
    """
    widths = run.widths
    hidden = spec.hidden / (widths.tp if widths.ep == 1 else 1)
    load, local = routed_share(widths), spec.experts / widths.ep
    each = weight_bytes_each(widths.weight_bits)
    rows = work.rows * (spec.top_k * load)
    products = (width + hidden) * widths.input_bytes + (2 * hidden + width) * widths.state_bytes
    return Operator(
        name,
        grouped_kind(widths),
        run.repeats,
        flops=rows * (MATRICES * 2.0 * width * hidden),
        weight_bytes=work.touched * (local * MATRICES * width * hidden * each),
        activation_bytes=rows * (products + MATRICES * hidden * widths.state_bytes),
        launches=run.passes,
        bits=widths.math_bits,
        rows=work.rows,
        shape=ExpertsShape(
            width=width,
            hidden=hidden,
            experts=spec.experts,
            top_k=spec.top_k,
            local_experts=local,
            matrices=MATRICES,
            replicas=widths.expert_replicas,
            load=load,
            weight_bytes=each,
        ),
    )


def mixture(prefix: str, work: Work, spec: MoeSpec, *, width: int, run: Run) -> list[Operator]:
    """Return a mixture of experts: router, routed experts, shared experts, and the exchange between devices."""
    widths = run.widths
    operators = [
        gemm(f"{prefix}.router", work.rows, d_in=width, d_out=spec.router_width, run=run),
        routed_experts(f"{prefix}.experts", work, spec, width=width, run=run),
    ]
    if spec.shared_hidden:
        shared = spec.shared_hidden / widths.tp
        operators += dense(f"{prefix}.shared", work.rows, hidden=shared, gated=True, width=width, run=run)
    if widths.expert_replicas > 1:  # inside one replica every device has all rows, and the sum after the block serves
        numbers = float(spec.top_k * width)
        operators += [
            all_to_all(f"{prefix}.dispatch", work.rows, numbers=numbers, run=run),
            all_to_all(f"{prefix}.combine", work.rows, numbers=numbers, run=run),
        ]
    return operators


def traced(prefix: str, work: Work, spec: TracedFfnSpec, run: Run) -> list[Operator]:
    """Return the products of a trace; of a grouped one only the weights that a row uses are read."""
    operators = []
    for product in spec.products:
        rows, repeated = work.rows * product.rows_ratio, replace(run, repeats=run.repeats * product.repeats)
        name = f"{prefix}.{product.name}"
        one = gemm(name, rows, d_in=product.d_in, d_out=product.d_out, run=repeated)
        if product.experts:
            weights = product.experts * product.d_in * product.d_out * weight_bytes_each(run.widths.weight_bits)
            one = replace(one, kind=grouped_kind(run.widths), weight_bytes=work.touched * weights, shape=None)
        operators.append(one)
    return operators


def feed_forward(prefix: str, work: Work, spec: FfnSpec, *, width: int, run: Run) -> list[Operator]:
    """Return the feed-forward block of a layer."""
    if isinstance(spec, TracedFfnSpec):
        return traced(prefix, work, spec, run)
    if isinstance(spec, MoeSpec):
        return mixture(prefix, work, spec, width=width, run=run)
    hidden = spec.hidden / run.widths.tp
    return dense(prefix, work.rows, hidden=hidden, gated=spec.gated, width=width, run=run)


def layer(prefix: str, work: Work, spec: LayerSpec, *, run: Run, caches: bool) -> list[Operator]:
    """Return one transformer layer but for its attention: norms, projections, feed-forward, sums over devices.

    Each norm is fused with the residual addition before it: two values read, two written. Apart, see `NORM_NUMBERS`.
    """
    width = spec.width
    moved = (NORM_NUMBERS[spec.norm] if run.apart else 4) * width
    names = ("norm_attention", "norm_ffn", "norm_after_attention", "norm_after_ffn")[: spec.n_norms]
    operators = [elementwise(f"{prefix}.{name}", work.rows, numbers=moved, run=run, operator="norm") for name in names]
    operators += projections(prefix, work, spec.mixer, width=width, run=run, caches=caches)
    operators += feed_forward(prefix, work, spec.ffn, width=width, run=run)
    if run.widths.tp > 1:
        operators += [
            all_reduce(f"{prefix}.all_reduce_attention", work.rows, numbers=width, run=run),
            all_reduce(f"{prefix}.all_reduce_ffn", work.rows, numbers=width, run=run),
        ]
    return operators
