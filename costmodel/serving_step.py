"""One step of a serving engine as operators: prefill chunks and decoding sequences in one forward pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from costmodel.base import Quantity
from costmodel.blocks import Run, Work
from costmodel.ffns import layer
from costmodel.layers import CrossAttentionSpec
from costmodel.memo import remember
from costmodel.mixers import attend, cross_keys
from costmodel.operators import Kind, Operator, OperatorTable
from costmodel.stages import Structure, Sums, cached_reads, ends, labels

SCALARS: Final = 7
"""Sums of a step that are neither a segment's nor a cache entry's."""
CHUNK_PASSES: Final = 4
SEGMENT_FIELDS: Final = 4


@dataclass(frozen=True, slots=True, eq=False)
class StepSums:
    """What the operators of one step depend on; every field a number, an array, or a unit vector.

    Parameters
    ----------
    passes : float or ndarray
        Forward passes: one.
    rows : float or ndarray
        New tokens, those of decoding sequences included.
    sequences, head_passes : float or ndarray
        Rows that go through the head, and whether there are any.
    chunk_passes, decode_passes : float or ndarray
        Whether there are chunks, and decoding sequences.
    decoding : float or ndarray
        Decoding sequences.
    chunks : tuple of Work
        Of each segment of layers, what the prefill chunks bring.
    keys : tuple
        Of each cache entry, the keys that all decoding sequences read.
    """

    passes: Quantity
    rows: Quantity
    sequences: Quantity
    head_passes: Quantity
    chunk_passes: Quantity
    decode_passes: Quantity
    decoding: Quantity
    chunks: tuple[Work, ...]
    keys: tuple[Quantity, ...]

    def flat(self) -> list[Quantity]:
        """Return the sums as a list, in the order of `unit_sums`."""
        values = [self.passes, self.rows, self.sequences, self.head_passes]
        values += [self.chunk_passes, self.decode_passes, self.decoding]
        for work in self.chunks:
            values += [work.rows, work.pairs, work.keys, work.touched]
        return [*values, *self.keys]


def unit_sums(n_segments: int, n_entries: int) -> StepSums:
    """Return sums whose every field is its own unit vector."""
    units = np.eye(SCALARS + SEGMENT_FIELDS * n_segments + n_entries)
    scalars, rest = units[:SCALARS], units[SCALARS:]
    starts = range(0, SEGMENT_FIELDS * n_segments, SEGMENT_FIELDS)
    chunks = tuple(Work(scalars[CHUNK_PASSES], *rest[i : i + SEGMENT_FIELDS]) for i in starts)
    return StepSums(*scalars, chunks=chunks, keys=tuple(rest[SEGMENT_FIELDS * n_segments :]))  # type: ignore[misc]


def step_operators(structure: Structure, sums: StepSums) -> list[Operator]:
    """List the operators of one step: products on all rows together, attention by chunks and by cache entries."""
    whole = Sums(sums.passes, sums.rows, sums.sequences, sums.head_passes)
    operators, widths = ends(structure, whole, "step"), structure.linear_widths
    names = labels(structure.decoder, "step")
    for name, segment, chunk in zip(names, structure.decoder, sums.chunks, strict=True):
        spec, apart = segment.layer, structure.execution.apart
        run = Run(sums.passes, widths, segment.n_layers, apart)
        rows = Work(sums.passes, chunk.rows + sums.decoding, 0.0 * sums.rows, 0.0 * sums.rows, chunk.touched)
        operators += layer(name, rows, spec, run=run, caches=True)
        alone = replace(run, passes=sums.chunk_passes)
        if isinstance(spec.mixer, CrossAttentionSpec):
            operators += cross_keys(name, chunk.keys, spec.mixer, width=spec.width, run=alone)
        operators += attend(
            f"{name}.chunks",
            chunk,
            spec.mixer,
            kind=Kind.PREFILL_ATTENTION,
            run=alone,
            eager=segment.implementation == "eager",
            execution=structure.execution,
        )
    works = tuple(Work(sums.decode_passes, sums.decoding, keys, keys) for keys in sums.keys)
    return operators + cached_reads(structure, works, "step")


def step_table(structure: Structure) -> OperatorTable:
    """Return the operators of a step as a table of coefficients, from the structure's cache if it is there."""

    def compiled() -> OperatorTable:
        sums = unit_sums(len(structure.decoder), len(structure.kv))
        return OperatorTable.of(step_operators(structure, sums), len(sums.flat()))

    return remember(structure.tables, "step", compiled)
