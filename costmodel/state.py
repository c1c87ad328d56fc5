"""The parts of a query: turns, segments of layers, cache entries, and what techniques cost themselves."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

from costmodel.base import Quantity
from costmodel.blocks import kv_bytes_each
from costmodel.layers import LayerSpec, MixerSpec
from costmodel.operators import Operator
from costmodel.units import UNBOUNDED

Stage = Literal["preprocess", "encode", "adapt", "prefill", "decode"]
STAGES: tuple[Stage, ...] = ("preprocess", "encode", "adapt", "prefill", "decode")


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One exchange of a request: new tokens in, tokens out, on top of a kept prefix.

    Parameters
    ----------
    visual_share : float or ndarray
        Share of the request's pictures that arrive (and are encoded) in this turn.
    text_tokens, output_tokens : float or ndarray
        New text and tokens to generate [tokens].
    prefix_tokens : float or ndarray
        Tokens whose keys and values are already cached.
    prefix_visual_share : float or ndarray
        Share of the request's visual tokens that are cached beside them, in every layer as many as it keeps.
    pair_scale : float or ndarray
        Pairs between patches over those of `visual_share`, where the pictures come at another size.
    probability, repeats : float or ndarray
        Chance that the turn happens, and how often it does.
    """

    visual_share: Quantity
    text_tokens: Quantity
    output_tokens: Quantity
    prefix_tokens: Quantity = 0.0
    probability: Quantity = 1.0
    repeats: Quantity = 1.0
    prefix_visual_share: Quantity = 0.0
    pair_scale: Quantity = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A run of equal layers of either tower, and the share of tokens that goes through it.

    Parameters
    ----------
    n_layers : int
    layer : LayerSpec
    visual_keep, text_keep : float or ndarray
        Shares of the visual and of the other tokens still present in these layers.
    density : float or ndarray
        Share of the query-key pairs that attention computes.
    implementation : {"fused", "eager"}
        Whether attention keeps its score matrix out of memory.
    prefix_share : float or ndarray
        Share of a turn's kept prefix that these layers still hold and attend to.
    injected : float or ndarray
        Share of the visual tokens that these layers see as keys without carrying them as rows.
    """

    n_layers: int
    layer: LayerSpec
    visual_keep: Quantity = 1.0
    text_keep: Quantity = 1.0
    density: Quantity = 1.0
    implementation: Literal["fused", "eager"] = "fused"
    prefix_share: Quantity = 1.0
    injected: Quantity = 0.0

    @property
    def structure(self) -> tuple[int, LayerSpec, str]:
        """What the coefficients of the segment's operators depend on."""
        return self.n_layers, self.layer, self.implementation

    @property
    def identity(self) -> Hashable:
        """Equal for segments that do equal work in every layer."""
        shares = (self.visual_keep, self.text_keep, self.density, self.prefix_share, self.injected)
        return self.layer, self.implementation, *map(_key, shares)


@dataclass(frozen=True, slots=True, eq=False)
class KVEntry:
    """Cached keys and values of a run of layers.

    Parameters
    ----------
    n_layers : int
    mixer : MixerSpec
        The attention that reads them.
    visual_share, text_share, cross_share : float or ndarray
        Shares that are kept of the visual and other prompt tokens, and of the tokens that only cross-attention sees.
    fixed_tokens : float or ndarray
        Tokens kept whatever the prompt: sinks, and the one state of a recurrence.
    read_share : float or ndarray
        Share of the kept tokens that a step reads; the number 0 makes it an archive, for which no kernel runs.
    bits : float
        Width of keys and values.
    placement : {"gpu", "host"}
        Where they are kept; what a step reads of a cache on the host is fetched anew for it.
    grows : bool
        Whether generated tokens are added.
    scale_bits : float or None
        Bits of scale and zero point that each number takes; None is the rule of `costmodel.blocks.kv_bytes_each`.
    prefix_share : float or ndarray
        Share that is kept of a turn's prefix.
    visual_evicted, text_evicted : float or ndarray
        Shares of the visual and other prompt tokens that the device holds until prefill ends, and not after.
    evicted : bool
        Whether an eviction has chosen among its tokens.
    """

    n_layers: int
    mixer: MixerSpec
    visual_share: Quantity = 1.0
    text_share: Quantity = 1.0
    cross_share: Quantity = 0.0
    fixed_tokens: Quantity = 0.0
    read_share: Quantity = 1.0
    bits: float = 16
    placement: Literal["gpu", "host"] = "gpu"
    grows: bool = True
    scale_bits: float | None = None
    prefix_share: Quantity = 1.0
    visual_evicted: Quantity = 0.0
    text_evicted: Quantity = 0.0
    evicted: bool = False

    @property
    def is_read(self) -> bool:
        """Whether decode steps read it at all."""
        return isinstance(self.read_share, np.ndarray) or self.read_share > 0

    @property
    def bytes_each(self) -> float:
        """Bytes of one cached number, its share of scale and zero point included [bytes]."""
        return kv_bytes_each(self.bits, self.scale_bits)

    @property
    def structure(self) -> Hashable:
        """What the coefficients of the entry's operators depend on."""
        return self.n_layers, self.mixer, self.bits, self.scale_bits, self.placement, self.is_read

    @property
    def identity(self) -> Hashable:
        """Equal for entries that cost the same in every layer."""
        kept = (self.visual_share, self.text_share, self.cross_share, self.fixed_tokens, self.read_share)
        shares = (*kept, self.prefix_share, self.visual_evicted, self.text_evicted)
        return self.mixer, self.bits, self.scale_bits, self.placement, self.grows, self.evicted, *map(_key, shares)

    def kept_prompt(self, visual_tokens: Quantity, other_tokens: Quantity, cross_tokens: Quantity) -> Quantity:
        """Return how many prompt tokens are kept, before the window cuts them."""
        seen = self.visual_share * visual_tokens + self.text_share * other_tokens + self.cross_share * cross_tokens
        return self.fixed_tokens + seen

    def reads(self, prompt: Quantity, generated: Quantity) -> Quantity:
        """Return the tokens that a step reads after this many generated ones."""
        kept = prompt + generated * self.grows
        return self.read_share * np.minimum(kept, self.mixer.window)

    def mean_reads(self, prompt: Quantity, steps: Quantity) -> Quantity:
        """Return the mean of `reads` over the generated tokens 1 … `steps`, exactly."""
        if not self.grows:
            return self.reads(prompt, 0.0)
        return self.read_share * causal_pairs(steps, prefix=prompt, window=self.mixer.window) / steps


@dataclass(frozen=True, slots=True, eq=False)
class Overhead:
    """What a technique itself costs, in one stage of every request.

    Parameters
    ----------
    stage : str
        The stage it lengthens.
    operators : tuple of Operator
        Its work, with numbers (or arrays) in the columns.
    peak_bytes : float or ndarray
        Memory it needs while it runs [bytes].
    hidden : bool
        Whether it runs beside the stage, which it lengthens only where it takes longer: a copy that is prefetched.
    each_turn : bool
        Whether a turn without pictures pays it too: a stream pays the others as its frames come.
    with_pictures : bool
        Whether it comes with the pictures: a turn pays as much of it as it brings of them.
    """

    stage: Stage
    operators: tuple[Operator, ...]
    peak_bytes: Quantity = 0.0
    hidden: bool = False
    each_turn: bool = False
    with_pictures: bool = False

    def in_turn(self, turn: Turn) -> tuple[Operator, ...]:
        """Return its operators in a turn."""
        share = turn.visual_share
        if not self.with_pictures or (not isinstance(share, np.ndarray) and share == 1.0):
            return self.operators
        return tuple(operator.scaled(share) for operator in self.operators)


def _key(quantity: Quantity) -> Hashable:
    """Return something equal for equal numbers, and for one and the same array."""
    return id(quantity) if isinstance(quantity, np.ndarray) else quantity


def causal_pairs(rows: Quantity, *, prefix: Quantity = 0.0, window: float = UNBOUNDED) -> Quantity:
    """Return the query-key pairs of causal attention: the sum over i = 1 … rows of min(prefix + i, window)."""
    rising = np.minimum(np.maximum(window - prefix, 0.0), rows)
    pairs: Quantity = rising * prefix + rising * (rising + 1) / 2 + (rows - rising) * window
    return pairs


Part = TypeVar("Part", Segment, KVEntry)


def grouped(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Return the parts with equal ones put together: their order changes no cost."""
    groups: dict[Hashable, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.identity, []).append(part)
    return tuple(replace(same[0], n_layers=sum(p.n_layers for p in same)) for same in groups.values())
