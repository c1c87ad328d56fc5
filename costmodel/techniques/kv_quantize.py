"""Quantisation of the cache: fewer bits for keys and values, and what widening them again costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

from costmodel.base import Quantity
from costmodel.blocks import KV_GROUP, SCALE_BITS
from costmodel.errors import Unsupported
from costmodel.layers import CrossAttentionSpec
from costmodel.operators import Kind, Operator
from costmodel.query import KVEntry, Overhead, Query
from costmodel.recurrent import RecurrentSpec
from costmodel.sums import decode_steps, prompt_in_cache
from costmodel.techniques.kv_common import (
    Held,
    Prompt,
    cache_groups,
    check_choice,
    check_count,
    check_scalar,
    split_modalities,
    state_bytes,
)
from costmodel.units import BITS_PER_BYTE, UNBOUNDED

FULL_BITS: Final = 16
TRANSFORMS: Final = ("none", "hadamard", "fft")
HADAMARD_FLOPS: Final = 1.0
"""Additions for each number and each of log2 d levels of butterflies along a head of width d."""
FFT_FLOPS: Final = 2.5
"""FLOPs of the same of a real Fourier transform: half of the usual 5 d log2 d of a complex one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVQuantize:
    """Store keys and values in fewer bits.

    A number takes its bits and its share of a 16-bit scale and zero point, 2 x 16 / group. Prefill computes at full
    width and quantises what it leaves; a step reads the narrow cache. One stream gains little: the freed memory is room
    for a larger batch (see `Prediction.max_batch`).

    Parameters
    ----------
    key_bits, value_bits : float
        Mean width of a number.
    group : float
        Numbers that share a scale and a zero point below eight bits; 0 is a whole channel, whose share is nothing.
    residual_tokens : float
        Most recent tokens that stay at full width: an entry of their own, and a second kernel.
    visual_only : bool
        Whether visual tokens alone are quantised: two entries. Layers with a window of their own are left as they are.
    fused : bool
        Whether attention widens numbers as it reads them; otherwise every step writes a 16-bit copy and reads it, so
        that b + 16 + 16 bits a number move instead of b, and holds that copy of a layer.
    transform : {"none", "hadamard", "fft"}
        What spreads outliers along a head first. A rotation of keys and queries alike is never undone; a Fourier
        transform of the keys is, in every step.
    """

    key_bits: float = FULL_BITS
    value_bits: float = FULL_BITS
    group: float = KV_GROUP
    residual_tokens: float = 0.0
    visual_only: bool = False
    fused: bool = True
    transform: Literal["none", "hadamard", "fft"] = "none"
    name: str = "kv_quantize"

    def __post_init__(self) -> None:
        """Refuse widths that no cache has."""
        for field in ("key_bits", "value_bits", "group", "residual_tokens"):
            check_scalar("KVQuantize", field, getattr(self, field))
        for field in ("key_bits", "value_bits"):
            value = getattr(self, field)
            if not 1 <= value <= FULL_BITS:
                raise ValueError(f"KVQuantize.{field}={value!r} must lie in [1, {FULL_BITS}]; {FULL_BITS} is no change")
        check_count("KVQuantize", "group", self.group)
        check_count("KVQuantize", "residual_tokens", self.residual_tokens)
        check_choice("KVQuantize", "transform", self.transform, TRANSFORMS)
        if self.visual_only and self.residual_tokens:
            kept = f"KVQuantize.residual_tokens={self.residual_tokens}"
            raise ValueError(f"{kept} are text, which visual_only leaves at full width anyway; leave one of them out")

    @property
    def slot(self) -> str:
        """The place it takes."""
        return "kv bits"

    @property
    def needs_attention_map(self) -> Literal["none", "rows", "full"]:
        """Which attention scores it must see."""
        return "none"

    @property
    def needs(self) -> frozenset[str]:
        """What it needs of model and request."""
        return frozenset()

    @property
    def stages(self) -> str:
        """The part of the query that it edits."""
        return "kv"

    @property
    def bits(self) -> float:
        """Mean width of a cached number, scales not included."""
        return (self.key_bits + self.value_bits) / 2

    @property
    def scale_bits(self) -> float:
        """Mean bits of scale and zero point for a cached number."""
        scaled = sum(bits < BITS_PER_BYTE for bits in (self.key_bits, self.value_bits))
        return scaled / 2 * (2 * SCALE_BITS / self.group if self.group else 0.0)

    @property
    def bytes_each(self) -> float:
        """Bytes of one cached number, its share of scale and zero point included [bytes]."""
        return (self.bits + self.scale_bits) / BITS_PER_BYTE

    def apply(self, query: Query) -> Query:
        """Return the query with a narrower cache, and the work of narrowing and widening."""
        if self.bits == FULL_BITS:
            return query
        prompt = Prompt.of(query)
        kept: list[KVEntry] = []
        before: list[Operator] = []
        steps: list[Operator] = []
        copied: Quantity = 0.0
        for entry in cache_groups(query):
            narrow, rest = self._narrowed(entry, prompt)
            kept += [*narrow, *rest]
            for part in narrow:
                before += self._quantise(part, prompt, query)
                if part.is_read:
                    added, peak = self._widen(part, entry, query)
                    steps += added
                    copied = np.maximum(copied, peak)
        overheads = [Overhead("prefill", tuple(before))] if before else []
        if steps:
            overheads.append(Overhead("decode", tuple(steps), copied))
        return replace(query, kv=tuple(kept), overheads=(*query.overheads, *overheads))

    def _narrowed(self, entry: KVEntry, prompt: Prompt) -> tuple[list[KVEntry], list[KVEntry]]:
        """Return the parts of an entry that are narrowed, and those that stay."""
        if isinstance(entry.mixer, RecurrentSpec) or entry.bytes_each <= self.bytes_each:
            return [], [entry]
        if self.visual_only and not isinstance(entry.mixer, CrossAttentionSpec):
            if not np.any(prompt.visual) or entry.mixer.window < UNBOUNDED:
                return [], [entry]
            visual, rest = split_modalities(entry, prompt.visual_fraction)
            return [self._at_width(visual)], [rest]
        if not (self.residual_tokens and entry.grows):
            return [self._at_width(entry)], []
        return self._with_residual(entry, prompt)

    def _at_width(self, entry: KVEntry) -> KVEntry:
        return replace(entry, bits=self.bits, scale_bits=self.scale_bits)

    def _with_residual(self, entry: KVEntry, prompt: Prompt) -> tuple[list[KVEntry], list[KVEntry]]:
        """Return an entry without its last tokens, and these at full width: as many, whatever is generated."""
        window = entry.mixer.window
        if window <= self.residual_tokens + 1:
            return [], [entry]
        if isinstance(entry.fixed_tokens, float) and entry.fixed_tokens < 0:
            raise Unsupported("KVQuantize.residual_tokens were set aside once already; quantise the cache once")
        visual, other = prompt.seen_in(entry)
        residual = np.minimum(self.residual_tokens, visual + other)
        cut = entry.mixer if window == UNBOUNDED else replace(entry.mixer, window=window - self.residual_tokens)
        main = replace(self._at_width(entry), mixer=cut, fixed_tokens=entry.fixed_tokens - residual)
        last = replace(
            entry,
            visual_share=0.0,
            text_share=0.0,
            cross_share=0.0,
            fixed_tokens=residual,
            prefix_share=0.0,
            visual_evicted=0.0,
            text_evicted=0.0,
            grows=False,
        )
        return [main], [last]

    def _quantise(self, entry: KVEntry, prompt: Prompt, query: Query) -> list[Operator]:
        """Return what prefill adds: keys and values read at full width, transformed, and written narrow."""
        visual, other = prompt.seen_in(entry)
        held = Held.of(query, entry.mixer, entry.n_layers, bytes_each=entry.bytes_each, tokens=visual + other)
        numbers = held.batch * held.tokens * held.cached_width
        moved = numbers * (state_bytes(query) + entry.bytes_each)
        write = Operator("quantise.write", Kind.ELEMENTWISE, entry.n_layers, kv_bytes=moved, launches=2.0)
        return [write, *self._transform("quantise", held, held.batch * held.tokens, query)]

    def _transform(self, label: str, held: Held, tokens: Quantity, query: Query) -> list[Operator]:
        """Return the transform of new tokens: of keys, values and queries, or of keys alone."""
        if self.transform == "none":
            return []
        rotates = self.transform == "hadamard"
        width = held.cached_width + held.query_width if rotates else held.cached_width / 2
        each = (HADAMARD_FLOPS if rotates else FFT_FLOPS) * math.log2(held.head_width)
        numbers = tokens * width
        return [
            Operator(
                f"{label}.{self.transform}",
                Kind.ELEMENTWISE,
                held.n_layers,
                flops=numbers * each,
                activation_bytes=numbers * (2.0 * state_bytes(query)),
                launches=2.0 if rotates else 1.0,
            )
        ]

    def _widen(self, entry: KVEntry, before: KVEntry, query: Query) -> tuple[list[Operator], Quantity]:
        """Return what every step adds, and the 16-bit copy of one layer [bytes]."""
        turn = query.turns[0]
        cached, steps = prompt_in_cache(query, entry, turn), np.maximum(decode_steps(query, turn), 1.0)
        reads = entry.mean_reads(cached, steps)
        held = Held.of(query, entry.mixer, entry.n_layers, bytes_each=entry.bytes_each, tokens=reads)
        operators = self._transform("step", held, held.batch, query) if entry.grows else []
        numbers = held.batch * reads * held.cached_width
        if self.transform == "fft":
            keys = numbers / 2
            again = 0.0 if self.fused else 2.0 * state_bytes(query)
            flops = keys * (FFT_FLOPS * math.log2(held.head_width))
            inverse = Operator(
                "step.inverse_fft",
                Kind.ELEMENTWISE,
                entry.n_layers,
                flops=flops,
                kv_bytes=keys * again,
                launches=0.0 if self.fused else 1.0,
            )
            operators.append(inverse)
        if self.fused:
            return operators, 0.0
        copy_bytes = numbers * before.bytes_each
        widen = Operator("step.dequantise", Kind.ELEMENTWISE, entry.n_layers, kv_bytes=2.0 * copy_bytes, launches=2.0)
        return [*operators, widen], copy_bytes
