"""Adapters as operators: one function a kind of step."""

from __future__ import annotations

from dataclasses import replace

from costmodel.adapters import AdapterSpec, AttentionStep, ElementwiseStep, LinearStep, Step
from costmodel.base import Quantity
from costmodel.blocks import Run, Work, all_reduce, elementwise, gemm
from costmodel.mixers import HeadWidths, attention
from costmodel.operators import Kind, Operator


def adapter_operators(adapter: AdapterSpec, *, tokens: Quantity, patches: Quantity, run: Run) -> list[Operator]:
    """List the operators of an adapter.

    Parameters
    ----------
    tokens, patches : float or ndarray
        Tokens that it makes, and patches of the encoder that it sees.
    run : Run
        Passes and precisions; a weight split by rows ends in a sum over the devices.
    """
    operators = []
    for step in adapter.steps:
        repeated = replace(run, repeats=step.repeats)
        if isinstance(step, AttentionStep):
            operators.append(_attention(step, tokens, patches, repeated))
            continue
        rows = tokens * step.per_token + patches * step.per_patch
        operators.append(_dense(step, rows, repeated))
        if run.widths.tp > 1 and isinstance(step, LinearStep) and step.split == "rows":
            operators.append(all_reduce(f"adapt.{step.name}_sum", rows, numbers=step.d_out, run=repeated))
    return operators


def _attention(step: AttentionStep, tokens: Quantity, patches: Quantity, run: Run) -> Operator:
    pairs = tokens * step.pairs_per_token + patches * step.pairs_per_patch
    width = float(step.heads * step.head_dim)
    work = Work(run.passes, tokens * step.per_token, pairs, 0.0 * tokens)
    on = HeadWidths(float(step.heads), float(step.heads), width, width, 0.0)
    return attention(f"adapt.{step.name}", work, on, kind=Kind.ENCODER_ATTENTION, run=run, causal=False)


def _dense(step: Step, rows: Quantity, run: Run) -> Operator:
    name, tp = f"adapt.{step.name}", run.widths.tp
    if isinstance(step, ElementwiseStep):
        return elementwise(name, rows, numbers=step.numbers, run=run)
    assert isinstance(step, LinearStep)  # noqa: S101 - attention was handled before
    d_in = step.d_in / tp if step.split == "rows" else float(step.d_in)
    d_out = step.d_out / tp if step.split == "columns" else float(step.d_out)
    return gemm(name, rows, d_in=d_in, d_out=d_out, run=run)
