"""How tokens are mixed, as operators: projections, attention, caches; one group of formulas a kind of mixer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from costmodel.base import Quantity
from costmodel.blocks import FUSED, Execution, Run, Work, elementwise, gemm, kv_bytes_each
from costmodel.layers import AttentionSpec, CrossAttentionSpec, LatentAttentionSpec, MixerSpec
from costmodel.operators import Kind, Operator
from costmodel.recurrent import STATE_BITS, RecurrentSpec
from costmodel.shapes import AttentionShape, MoveShape
from costmodel.traces import TracedMixerSpec


def kv_width_on_device(spec: AttentionSpec | CrossAttentionSpec, tp: int) -> float:
    """Return the width of one device's key heads: its share, but no less than one head (copies beyond that)."""
    return max(spec.kv_heads / tp, 1.0) * spec.head_dim


def cached_width_on_device(spec: MixerSpec, tp: int) -> float:
    """Return the numbers that one token leaves in one device's cache; a latent is kept whole on every device.

    Of a recurrence it is the state of a sequence, which its cache entry holds as one token.
    """
    if isinstance(spec, RecurrentSpec):
        return spec.state_width / tp
    if isinstance(spec, LatentAttentionSpec | TracedMixerSpec):
        return float(spec.cached_width)
    return 2 * kv_width_on_device(spec, tp)


@dataclass(frozen=True, slots=True)
class HeadWidths:
    """The heads of one device.

    Parameters
    ----------
    heads, kv_heads : float
        Query heads, and heads of keys and values.
    qk_width, v_width : float
        Widths of all query heads, and of their values.
    cached_width : float
        Numbers read for one key.
    """

    heads: float
    kv_heads: float
    qk_width: float
    v_width: float
    cached_width: float


def attention(name: str, work: Work, on: HeadWidths, *, kind: Kind, run: Run, causal: bool = True) -> Operator:
    """Return fused attention: scores, softmax and weighted sum without the score matrix in memory.

    Parameters
    ----------
    work : Work
        Its pairs are computed, its rows read as queries and written as outputs, its keys read from the cache.
    on : HeadWidths
        The heads.
    kind : Kind
        Prefill, decode or encoder attention.
    causal : bool
        Whether a query sees only what came before it.

    Returns
    -------
    Operator
        2 pairs (qk_width + v_width) FLOPs [1]_.

    References
    ----------
    .. [1] T. Dao et al., "FlashAttention", NeurIPS 2022.
    """
    widths, out_width = run.widths, on.qk_width + on.v_width
    key_bytes = on.cached_width * widths.cached_bytes
    return Operator(
        name,
        kind,
        run.repeats,
        flops=work.pairs * (2.0 * out_width),
        activation_bytes=work.rows * (out_width * widths.state_bytes),
        kv_bytes=work.keys * key_bytes,
        launches=run.passes,
        bits=max(16, widths.math_bits),
        rows=work.rows,
        pairs=work.pairs,
        keys=work.keys,
        shape=AttentionShape(on.heads, on.kv_heads, out_width / on.heads, key_bytes / on.kv_heads, causal),
    )


def score_matrix(name: str, work: Work, *, heads: float, run: Run) -> Operator:
    """Return the traffic of a score matrix kept in memory: written, read and written by softmax, read again [bytes]."""
    pair_bytes = 4 * heads * run.widths.state_bytes
    return Operator(
        name,
        Kind.ELEMENTWISE,
        run.repeats,
        activation_bytes=work.pairs * pair_bytes,
        launches=2 * run.passes,
        rows=work.pairs,
        shape=MoveShape("add", pair_bytes),
    )


def cache_write(name: str, rows: Quantity, *, rotated: float, cached: float, run: Run) -> Operator:
    """Return the rotation of `rotated` numbers a row and the write of `cached` ones into the cache [bytes].

    A rotation reads and writes a number once; in PyTorch two products, a negated half, a concatenation and a sum move
    ten (`apply_rotary_pos_emb` and `rotate_half` of `transformers`).
    """
    moved = ((10 if run.apart else 2) * rotated + cached / 2) * run.widths.state_bytes
    kept = cached * run.widths.cached_bytes
    return Operator(
        name,
        Kind.ELEMENTWISE,
        run.repeats,
        activation_bytes=rows * moved,
        kv_bytes=rows * kept,
        launches=run.passes,
        rows=rows,
        shape=MoveShape("rope", moved + kept),
    )


def projections(prefix: str, work: Work, spec: MixerSpec, *, width: int, run: Run, caches: bool) -> list[Operator]:
    """Return everything of a mixer but its attention: projections in and out, rotation, the write of the cache."""
    if isinstance(spec, TracedMixerSpec):
        return []  # they are among the products
    if isinstance(spec, LatentAttentionSpec):
        return _latent_projections(prefix, work, spec, width=width, run=run)
    if isinstance(spec, CrossAttentionSpec):
        return _cross_projections(prefix, work, spec, width=width, run=run)
    if isinstance(spec, RecurrentSpec):
        return _recurrent_projections(prefix, work, spec, width=width, run=run)
    tp, rows = run.widths.tp, work.rows
    kv_width = kv_width_on_device(spec, tp)
    q_width = spec.q_width / tp
    operators = [
        gemm(f"{prefix}.qkv", rows, d_in=width, d_out=q_width * (1 + spec.gated) + 2 * kv_width, run=run),
        gemm(f"{prefix}.out", rows, d_in=q_width, d_out=width, run=run),
    ]
    if spec.rotary or caches:
        rotated = (q_width + kv_width) * spec.rotary
        write = cache_write(f"{prefix}.rotary", rows, rotated=rotated, cached=2 * kv_width * caches, run=run)
        operators.append(write)
    return operators


def _latent_projections(prefix: str, work: Work, spec: LatentAttentionSpec, *, width: int, run: Run) -> list[Operator]:
    """Return the projections of latent attention; expanding keys and absorbing them into queries cost the same."""
    tp, rows = run.widths.tp, work.rows
    query = [gemm(f"{prefix}.query", rows, d_in=width, d_out=spec.q_width / tp, run=run)]
    if spec.q_rank:
        query = [
            gemm(f"{prefix}.query_down", rows, d_in=width, d_out=spec.q_rank, run=run),
            gemm(f"{prefix}.query_up", rows, d_in=spec.q_rank, d_out=spec.q_width / tp, run=run),
        ]
    rotated = spec.heads / tp * spec.rope_dim + spec.rope_dim
    return [
        *query,
        gemm(f"{prefix}.latent_down", rows, d_in=width, d_out=spec.cached_width, run=run),
        gemm(f"{prefix}.latent_up", rows, d_in=spec.kv_rank, d_out=spec.expanded_width / tp, run=run),
        gemm(f"{prefix}.out", rows, d_in=spec.out_width / tp, d_out=width, run=run),
        cache_write(f"{prefix}.rotary", rows, rotated=rotated, cached=spec.cached_width, run=run),
    ]


def _cross_projections(prefix: str, work: Work, spec: CrossAttentionSpec, *, width: int, run: Run) -> list[Operator]:
    """Return the query and output projections of cross-attention; its keys are projected by `cross_keys`."""
    q_width = spec.q_width / run.widths.tp
    return [
        gemm(f"{prefix}.query", work.rows, d_in=width, d_out=q_width, run=run),
        gemm(f"{prefix}.out", work.rows, d_in=q_width, d_out=width, run=run),
    ]


def cross_keys(prefix: str, keys: Quantity, spec: CrossAttentionSpec, *, width: int, run: Run) -> list[Operator]:
    """Return the projection of encoder outputs to keys and values, once a request, and their write into the cache."""
    cached = 2 * kv_width_on_device(spec, run.widths.tp)
    return [
        gemm(f"{prefix}.keys", keys, d_in=width, d_out=cached, run=run),
        cache_write(f"{prefix}.cache", keys, rotated=0.0, cached=cached, run=run),
    ]


def attend(
    prefix: str,
    work: Work,
    spec: MixerSpec,
    *,
    kind: Kind,
    run: Run,
    eager: bool = False,
    execution: Execution = FUSED,
) -> list[Operator]:
    """Return the attention of a layer.

    Parameters
    ----------
    eager : bool
        Whether it keeps its score matrix in memory.
    execution : Execution
        How the engine runs latents, recurrences and caches.
    """
    tp = run.widths.tp
    if isinstance(spec, RecurrentSpec):
        return _recur(prefix, work, spec, kind=kind, run=run, executed=execution.expands_latents)
    if isinstance(spec, TracedMixerSpec):
        return _attend_traced(prefix, work, spec, kind=kind, run=run)
    if isinstance(spec, LatentAttentionSpec):
        return _attend_latent(prefix, work, spec, kind=kind, run=run, execution=execution)
    q_width = spec.q_width / tp
    cached = cached_width_on_device(spec, tp)
    on = HeadWidths(spec.heads / tp, cached / (2 * spec.head_dim), q_width, q_width, cached)
    operators = []
    if execution.concatenates_cache and kind == Kind.DECODE_ATTENTION:
        operators.append(copied(f"{prefix}.concatenate_cache", work.keys, read=cached, written=cached, run=run))
    if execution.repeats_heads and on.heads > on.kv_heads:
        wide = 2 * q_width
        operators.append(copied(f"{prefix}.repeat_heads", work.keys, read=cached, written=wide, run=run))
        on = HeadWidths(on.heads, on.heads, q_width, q_width, wide)
    causal = isinstance(spec, AttentionSpec) and spec.causal
    operators.append(attention(f"{prefix}.attention", work, on, kind=kind, run=run, causal=causal))
    if eager:
        operators.append(score_matrix(f"{prefix}.scores", work, heads=spec.heads / tp, run=run))
    return operators


def copied(name: str, keys: Quantity, *, read: float, written: float, run: Run) -> Operator:
    """Return a copy of cached keys and values, `read` numbers a key read and `written` written [bytes]."""
    key_bytes = (read + written) * run.widths.cached_bytes
    return Operator(
        name,
        Kind.ELEMENTWISE,
        run.repeats,
        kv_bytes=keys * key_bytes,
        launches=2 * run.passes,
        rows=keys,
        shape=MoveShape("add", key_bytes),
    )


def _attend_latent(
    prefix: str, work: Work, spec: LatentAttentionSpec, *, kind: Kind, run: Run, execution: Execution
) -> list[Operator]:
    heads, name, cached = spec.heads / run.widths.tp, f"{prefix}.attention", float(spec.cached_width)
    qk_width, v_width = heads * (spec.nope_dim + spec.rope_dim), heads * spec.value_dim
    if kind != Kind.DECODE_ATTENTION:  # expanded keys and values are read like cached ones
        on = HeadWidths(heads, heads, qk_width, v_width, qk_width + v_width)
        return [attention(name, work, on, kind=kind, run=run)]
    copies = []
    if execution.concatenates_cache:
        copies = [copied(f"{prefix}.concatenate_cache", work.keys, read=cached, written=cached, run=run)]
    if not execution.expands_latents:
        on = HeadWidths(heads, 1.0, heads * cached, heads * spec.kv_rank, cached)
        return [*copies, attention(name, work, on, kind=kind, run=run)]
    old = work.keys - work.rows  # the new token's latent is expanded with the projections
    up = gemm(f"{prefix}.expand_cache", old, d_in=spec.kv_rank, d_out=spec.expanded_width / run.widths.tp, run=run)
    on = HeadWidths(heads, 1.0, qk_width, v_width, cached)
    return [*copies, up, attention(name, work, on, kind=kind, run=run)]


def _recurrent_projections(prefix: str, work: Work, spec: RecurrentSpec, *, width: int, run: Run) -> list[Operator]:
    """Return the projections of a recurrence, and its gated norm."""
    tp, value_width = run.widths.tp, spec.value_width / run.widths.tp
    mixed = spec.mixed_width / tp + value_width
    return [
        gemm(f"{prefix}.mixed", work.rows, d_in=width, d_out=mixed, run=run),
        gemm(f"{prefix}.gates", work.rows, d_in=width, d_out=2 * spec.value_heads / tp, run=run),
        elementwise(f"{prefix}.gated_norm", work.rows, numbers=3 * value_width, run=run, operator="norm"),
        gemm(f"{prefix}.out", work.rows, d_in=value_width, d_out=width, run=run),
    ]


def _recur(prefix: str, work: Work, spec: RecurrentSpec, *, kind: Kind, run: Run, executed: bool) -> list[Operator]:
    """Return the convolution and the recurrence, whose state is read and written once a pass and sequence.

    Parameters
    ----------
    work : Work
        Its pairs are tokens through the recurrence, its keys the states.
    executed : bool
        Whether to count what `transformers` executes in PyTorch: a convolution that runs past both ends, no
        triangular systems (they are no products), and a decode step without any product.
    """
    widths, tp, stepwise = run.widths, run.widths.tp, kind == Kind.DECODE_ATTENTION
    mixed = spec.mixed_width / tp
    past_ends = work.keys * (1 if stepwise else spec.kernel - 1) if executed else 0.0 * work.keys
    convolution = replace(
        elementwise(f"{prefix}.convolution", work.rows, numbers=2 * mixed, run=run),
        flops=(work.rows + past_ends) * (2.0 * spec.kernel * mixed),
        bits=max(16, widths.math_bits),
    )
    each = spec.step_flops * (not executed) if stepwise else spec.block_flops(solves=not executed)
    recurrence = Operator(
        f"{prefix}.recurrence",
        kind,
        run.repeats,
        flops=work.pairs * (float(each) / tp),
        activation_bytes=work.rows * ((mixed + spec.value_width / tp) * widths.state_bytes),
        kv_bytes=work.keys * (2 * spec.state_width / tp * kv_bytes_each(STATE_BITS)),
        launches=run.passes,
        bits=max(16, widths.math_bits),
    )
    return [convolution, recurrence]


def _attend_traced(prefix: str, work: Work, spec: TracedMixerSpec, *, kind: Kind, run: Run) -> list[Operator]:
    """Return the attentions of a trace; the cache, known as a whole, is shared out evenly."""
    n_repeats = sum(group.repeats for group in spec.attentions)
    operators = []
    for i, group in enumerate(spec.attentions):
        heads = float(group.heads)
        on = HeadWidths(heads, heads, heads * group.qk_dim, heads * group.v_dim, spec.cached_width / n_repeats)
        own = replace(work, pairs=work.pairs * group.pairs_ratio)
        repeated = replace(run, repeats=run.repeats * group.repeats)
        operators.append(attention(f"{prefix}.attention{i}", own, on, kind=kind, run=repeated))
    return operators
