"""The stages of a request as operators: encode, adapt, prefill, decode.

Each lister takes the sums of its stage and is linear in them. `table` evaluates a lister on unit vectors, once for each
structure, and keeps the result in the model; `operators` evaluates it on numbers, which is slower and says the same (a
test holds the two together).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from costmodel import equations
from costmodel.adapting import adapter_operators
from costmodel.base import Quantity
from costmodel.blocks import (
    FUSED,
    Execution,
    Run,
    Widths,
    Work,
    all_gather,
    all_reduce,
    elementwise,
    gemm,
    host_copy,
    send,
)
from costmodel.deployment import Parallelism, Precision
from costmodel.ffns import layer
from costmodel.layers import CrossAttentionSpec, LayerSpec
from costmodel.memo import Cache, remember
from costmodel.mixers import attend, cached_width_on_device, cross_keys
from costmodel.models import ModelSpec
from costmodel.operators import Kind, Operator, OperatorTable
from costmodel.query import KVEntry, Query, Segment, Stage
from costmodel.state import grouped

DEVICE_STAGES: Final[tuple[Stage, ...]] = ("encode", "adapt", "prefill", "decode")
PASSES: Final = 0
"""Where forward passes stand among the sums."""
WORKS: Final = 5
"""Where the sums of segments, or of cache entries, begin."""
FULL_BITS = 16
"""Width of what is not quantised with the linear layers: vision tower, adapter, embedding, head."""


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """What the operators of one stage depend on; every field a number, an array, or a unit vector.

    Parameters
    ----------
    passes : float or ndarray
        Forward passes.
    rows : float or ndarray
        Patches (encode), visual tokens (adapt), prompt tokens (prefill) or sequences (decode).
    sequences : float or ndarray
        Rows that go through the head.
    head_passes : float or ndarray
        Passes in which at least one does.
    touched : float or ndarray
        Share of the routed experts that a decode step uses.
    works : tuple of Work
        One a segment (encode, prefill) or a cache entry (decode).
    """

    passes: Quantity
    rows: Quantity
    sequences: Quantity = 0.0
    head_passes: Quantity = 0.0
    touched: Quantity = 0.0
    works: tuple[Work, ...] = ()

    def flat(self) -> list[Quantity]:
        """Return the sums as a list, in the order of `unit_sums`."""
        values = [self.passes, self.rows, self.sequences, self.head_passes, self.touched]
        for work in self.works:
            values += [work.rows, work.pairs, work.keys, work.touched]
        return values


def unit_sums(n_works: int) -> Sums:
    """Return sums whose every field is its own unit vector."""
    units = np.eye(WORKS + 4 * n_works)
    works = tuple(Work(units[0], *units[WORKS + 4 * i : WORKS + 4 + 4 * i]) for i in range(n_works))
    return Sums(units[0], units[1], units[2], units[3], units[4], works)


@dataclass(frozen=True, slots=True, eq=False)
class Structure:
    """The part of a query that is never swept: which operators there are.

    Parameters
    ----------
    model : ModelSpec
    pricing : str
        Of the engine: operators or equations.
    execution : Execution
        Of the engine: how it runs what models leave open.
    encoder, decoder, kv : tuple
        Segments and cache entries, equal ones put together.
    precision, parallelism
        Of the query.
    tables : dict
        The operator table of each stage, and the widest rows, once they were asked for.
    """

    model: ModelSpec
    pricing: str
    execution: Execution
    encoder: tuple[Segment, ...]
    decoder: tuple[Segment, ...]
    kv: tuple[KVEntry, ...]
    precision: Precision
    parallelism: Parallelism
    tables: Cache = field(default_factory=dict)

    @staticmethod
    def of(query: Query) -> Structure:
        """Return the structure of a query, from the model's cache when it was made before."""
        pricing, execution = query.engine.pricing, query.engine.execution
        key = (query.encoder, query.decoder, query.kv, query.precision, query.parallelism, pricing, execution)
        return remember(
            query.model.cache,
            key,
            lambda: Structure(
                query.model,
                pricing,
                execution,
                grouped(query.encoder),
                grouped(query.decoder),
                grouped(query.kv),
                query.precision,
                query.parallelism,
            ),
        )

    @property
    def encoder_widths(self) -> Widths:
        """Widths of vision encoder and adapter."""
        full = max(FULL_BITS, self.precision.weight_bits)
        return Widths(full, full, full, self.parallelism.encoder)

    @property
    def linear_widths(self) -> Widths:
        """Widths of the language model's layers."""
        precision, parallelism = self.precision, self.parallelism
        return Widths(
            precision.weight_bits,
            precision.activation_bits,
            precision.kv_bits,
            parallelism.tp,
            parallelism.ep,
            parallelism.expert_imbalance,
        )

    @property
    def head_widths(self) -> Widths:
        """Widths of embedding and head."""
        full = max(FULL_BITS, self.precision.weight_bits)
        return Widths(full, full, full, self.parallelism.tp)

    def n_layers(self, stage: Stage) -> int:
        """Return how many layers one pass of a stage runs."""
        parts: tuple[Segment, ...] = {"encode": self.encoder, "adapt": ()}.get(stage, self.decoder)
        return sum(part.n_layers for part in parts)

    def n_works(self, stage: Stage) -> int:
        """Return how many segments or cache entries a stage has."""
        return {"encode": len(self.encoder), "adapt": 1, "prefill": len(self.decoder), "decode": len(self.kv)}[stage]

    def table(self, stage: Stage) -> OperatorTable:
        """Return the operators of a stage as a table; structures that differ in shares alone have it in common."""
        return remember(
            self.tables, stage, lambda: remember(self.model.cache, self._key(stage), lambda: compiled(self, stage))
        )

    def _key(self, stage: Stage) -> Hashable:
        parts: tuple[Segment, ...] | tuple[KVEntry, ...] = {"encode": self.encoder, "adapt": ()}.get(
            stage, self.decoder
        )
        layers = tuple(part.structure for part in parts)
        cached = tuple(entry.structure for entry in self.kv) if stage == "decode" else ()
        return stage, self.pricing, self.execution, self.precision, self.parallelism, layers, cached


def labels(segments: Sequence[Segment], stage: str) -> list[str]:
    """Return what the operators of each segment are called."""
    if len(segments) == 1:
        return [stage]
    names = [f"{segment.layer.mixer.label}{i}" for i, segment in enumerate(segments)]
    return [f"{stage}.{name}" for name in names]


def encode(structure: Structure, sums: Sums) -> list[Operator]:
    """List the operators of the vision encoder."""
    vision, widths = structure.model.vision, structure.encoder_widths
    if vision is None:
        return []
    once = Run(sums.passes, widths)
    operators = [gemm("encode.patch_embedding", sums.rows, d_in=vision.patch_width, d_out=vision.width, run=once)]
    if vision.positions:
        operators.append(elementwise("encode.positions", sums.rows, numbers=3 * vision.width, run=once))
    execution = replace(FUSED, apart=structure.execution.apart)
    named = zip(labels(structure.encoder, "encode"), structure.encoder, sums.works, strict=True)
    for label, segment, work in named:
        operators += _layers(label, segment, work, Kind.ENCODER_ATTENTION, widths=widths, execution=execution)
    return operators


def _layers(
    label: str, segment: Segment, work: Work, kind: Kind, *, widths: Widths, execution: Execution
) -> list[Operator]:
    run, spec = Run(work.passes, widths, segment.n_layers, execution.apart), segment.layer
    eager = segment.implementation == "eager"
    operators = layer(label, work, spec, run=run, caches=kind != Kind.ENCODER_ATTENTION)
    if isinstance(spec.mixer, CrossAttentionSpec):
        operators += cross_keys(label, work.keys, spec.mixer, width=spec.width, run=run)
    return operators + attend(label, work, spec.mixer, kind=kind, run=run, eager=eager, execution=execution)


def adapt(structure: Structure, sums: Sums) -> list[Operator]:
    """List the operators of the adapter; `sums.rows` are its tokens, the rows of its one work the encoder's patches."""
    adapter = structure.model.adapter
    if adapter is None:
        return []
    run = Run(sums.passes, structure.encoder_widths)
    return adapter_operators(adapter, tokens=sums.rows, patches=sums.works[0].rows, run=run)


def prefill(structure: Structure, sums: Sums) -> list[Operator]:
    """List the operators of prefill: embedding, layers, head at the last position of each sequence."""
    operators = ends(structure, sums, "prefill")
    kind, widths = Kind.PREFILL_ATTENTION, structure.linear_widths
    for label, segment, work in zip(labels(structure.decoder, "prefill"), structure.decoder, sums.works, strict=True):
        operators += _layers(label, segment, work, kind, widths=widths, execution=structure.execution)
    return operators


def decode(structure: Structure, sums: Sums) -> list[Operator]:
    """List the operators of one decode step: every layer on one row a sequence, attention by cache entry."""
    operators = ends(structure, sums, "decode")
    widths = structure.linear_widths
    n_layers: dict[LayerSpec, int] = {}
    for segment in structure.decoder:
        n_layers[segment.layer] = n_layers.get(segment.layer, 0) + segment.n_layers
    rows = Work(sums.passes, sums.rows, 0.0 * sums.rows, 0.0 * sums.rows, sums.touched)
    for i, (spec, repeats) in enumerate(n_layers.items()):
        label = "decode" if len(n_layers) == 1 else f"decode.run{i}"
        run = Run(sums.passes, widths, repeats, structure.execution.apart)
        operators += layer(label, rows, spec, run=run, caches=True)
    return operators + cached_reads(structure, sums.works, "decode")


def cached_reads(structure: Structure, works: Sequence[Work], stage: str) -> list[Operator]:
    """List the attention of decoding sequences, by cache entry."""
    operators, widths, execution = [], structure.linear_widths, structure.execution
    for i, (entry, work) in enumerate(zip(structure.kv, works, strict=True)):
        label = stage if len(structure.kv) == 1 else f"{stage}.cache{i}"
        if not entry.is_read:
            continue
        kept = replace(widths, kv_bits=entry.bits, kv_scale_bits=entry.scale_bits)
        run = Run(work.passes, kept, entry.n_layers)
        if entry.placement != "gpu":
            key_bytes = cached_width_on_device(entry.mixer, widths.tp) * entry.bytes_each
            fetched = work.keys * key_bytes
            operators.append(host_copy(f"{label}.fetch", fetched, messages=work.passes, repeats=entry.n_layers))
        operators += attend(label, work, entry.mixer, kind=Kind.DECODE_ATTENTION, run=run, execution=execution)
    return operators


def ends(structure: Structure, sums: Sums, stage: str) -> list[Operator]:
    """List embedding, last norm, head and sampling."""
    decoder, widths = structure.model.decoder, structure.head_widths
    run, head = Run(sums.passes, widths), Run(sums.head_passes, widths)
    operators = [
        elementwise(f"{stage}.embedding", sums.rows, numbers=2 * decoder.width, run=run, operator="embedding"),
        elementwise(f"{stage}.final_norm", sums.rows, numbers=4 * decoder.width, run=run, operator="norm"),
        gemm(f"{stage}.head", sums.sequences, d_in=decoder.width, d_out=decoder.vocabulary / widths.tp, run=head),
        elementwise(f"{stage}.sampling", sums.sequences, numbers=2 * decoder.vocabulary, run=head),
    ]
    n_stages = structure.parallelism.pp
    if n_stages > 1:
        operators.append(send(f"{stage}.send", sums.rows, numbers=decoder.width, n_hops=n_stages - 1, run=run))
    if widths.tp > 1:
        operators += [
            all_reduce(f"{stage}.all_reduce_embedding", sums.rows, numbers=decoder.width, run=run),
            all_gather(f"{stage}.all_gather_logits", sums.sequences, numbers=decoder.vocabulary, run=head),
        ]
    return operators


def _equation_3(structure: Structure, sums: Sums) -> list[Operator]:
    flops = sum((o.flops * o.repeats for o in encode(structure, sums)), start=0.0 * sums.rows)
    return [equations.encode_operator(flops)] if structure.model.vision else []


def _no_adapter(structure: Structure, sums: Sums) -> list[Operator]:
    del structure, sums  # the survey's model has none
    return []


def _equation_4(structure: Structure, sums: Sums) -> list[Operator]:
    widths = structure.linear_widths
    return [
        equations.prefill_operator(segment, work, kv_bits=widths.kv_bits, n_devices=widths.tp)
        for segment, work in zip(structure.decoder, sums.works, strict=True)
    ]


def _equation_6(structure: Structure, sums: Sums) -> list[Operator]:
    widths = structure.linear_widths
    weights = equations.weights_operator(
        structure.model.decoder, sums, weight_bits=widths.weight_bits, n_devices=widths.tp
    )
    entries = zip(structure.kv, sums.works, strict=True)
    read = [(entry, work) for entry, work in entries if entry.is_read]
    return [weights, *(equations.cache_operator(entry, work, n_devices=widths.tp) for entry, work in read)]


Lister = Callable[[Structure, Sums], list[Operator]]
LISTERS: Final[Mapping[tuple[str, Stage], Lister]] = {
    ("operators", "encode"): encode,
    ("operators", "adapt"): adapt,
    ("operators", "prefill"): prefill,
    ("operators", "decode"): decode,
    ("equations", "encode"): _equation_3,
    ("equations", "adapt"): _no_adapter,
    ("equations", "prefill"): _equation_4,
    ("equations", "decode"): _equation_6,
}


def operators(query: Query, stage: Stage, sums: Sums) -> list[Operator]:
    """Return the operators of a stage for these sums, techniques' own not included."""
    return LISTERS[query.engine.pricing, stage](Structure.of(query), sums)


def compiled(structure: Structure, stage: Stage) -> OperatorTable:
    """Return the operators of a stage as a table of coefficients: its lister evaluated on unit vectors."""
    sums = unit_sums(structure.n_works(stage))
    return OperatorTable.of(LISTERS[structure.pricing, stage](structure, sums), len(sums.flat()))
