"""What sparse attention can gain: attention's part of prefill, densities from measurements, where it breaks even."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from costmodel.base import Quantity
from costmodel.conventions import layer_flops
from costmodel.models import DecoderSpec
from costmodel.techniques.sparse_attention import SparseAttention

BRACKET = (64.0, 2.0**21)
"""Lengths between which a break-even is looked for [tokens]."""
POINTS = 121


def attention_share(decoder: DecoderSpec, tokens: Quantity, *, causal: bool = True) -> Quantity:
    """Return attention's part of the FLOPs of prefill's layers: phi.

    Parameters
    ----------
    causal : bool
        Whether the masked half is left out, as kernels do; papers on sparse attention count the square.
    """
    linear: Quantity = 0.0
    pairs: Quantity = 0.0
    for run in decoder.runs:
        whole = layer_flops(run.layer, tokens, "torch")
        half = whole - layer_flops(run.layer, tokens, "kernel")
        linear = linear + run.n_layers * (whole - 2.0 * half)
        pairs = pairs + run.n_layers * half * (1.0 if causal else 2.0)
    return pairs / (linear + pairs)


def amdahl(share: Quantity, density: Quantity) -> Quantity:
    """Return how many times faster prefill is where attention, this share of it, is cut to this density."""
    return 1.0 / (1.0 - share + share * density)


def fit_density(tokens: Sequence[float], densities: Sequence[float]) -> tuple[float, float, float]:
    """Return the law (density, tokens, exponent) through measured points, by least squares of logarithms.

    It never rises: points that do give a constant.
    """
    x, y = np.log(tokens), np.log(densities)
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread if spread else 0.0
    density = float(np.exp(y.mean()))
    return min(density, 1.0), float(np.exp(x.mean())), max(-slope, 0.0)


def break_even_tokens(technique: SparseAttention, model: str, hardware: str, *, engine: str = "fused") -> float | None:
    """Return the shortest prompt from which prefill is never slower than dense; None where that never happens.

    Examples
    --------
    >>> technique = SparseAttention(law=(0.2, 32768.0, 0.8), estimator="antidiagonal")
    >>> 0 < break_even_tokens(technique, "qwen2.5-vl-7b", "a100-sxm4-80gb") < 32768
    True
    """
    from costmodel.predict import predict  # which imports the techniques
    from costmodel.workload import Workload

    tokens = np.geomspace(*BRACKET, POINTS).round()
    workload = Workload(text_tokens=tokens, output_tokens=1)
    dense, sparse = (
        np.asarray(predict(model, hardware, workload, techniques=t, engine=engine).ttft_s) for t in ([], [technique])
    )
    slower = np.flatnonzero(sparse > dense)
    if not slower.size:
        return float(tokens[0])
    return None if slower[-1] == POINTS - 1 else float(tokens[slower[-1] + 1])
