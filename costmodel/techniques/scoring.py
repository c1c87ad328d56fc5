"""What selecting tokens costs: similarities, greedy steps, attention rows and maps, merges, the gather behind.

Each function returns an `Overhead` in its own columns. Matrix work is priced flat as `Kind.GEMM`, passes over memory as
`Kind.ELEMENTWISE`; steps that wait for each other are a launch each. The formulas are those of the methods' papers as
collected in `techniques.md` of the project's knowledge base, section 2.1, a multiply-add being two FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from costmodel.base import Quantity
from costmodel.errors import Unsupported
from costmodel.layers import AttentionSpec, LatentAttentionSpec, MixerSpec
from costmodel.mixers import cached_width_on_device
from costmodel.operators import Kind, Operator
from costmodel.query import Overhead, Stage

Score = Literal[
    "none",
    "encoder_row",
    "encoder_map",
    "llm_rows",
    "llm_map",
    "cosine",
    "max_min",
    "dpp",
    "knn",
    "linear",
]
STATE_BYTES: Final = 2
"""Hidden states that are compared are 16 bits wide [bytes]."""
DISTANCE_BYTES: Final = 4
"""Distances and gains are kept in 32 bits [bytes]."""
MAP_BYTES: Final = 8
"""One pair of an attention map that is kept: its 16-bit score, the 32-bit softmax of it and that in 16 bits again, all
alive at once in the eager attention of `transformers` [bytes]."""
MAP_PASSES: Final = 4
"""A map is written, read and written by the softmax, and read again (`costmodel.mixers.score_matrix`)."""
GATHER_LAUNCHES: Final = 2  # ranking, and moving what stays
SIMILARITY_LAUNCHES: Final = 2  # normalising, and the product
ROW_LAUNCHES: Final = 2  # scores, and softmax with the mean over heads
KNN_LAUNCHES: Final = 8  # distances, top-k, density, comparison, masking, minimum, product, top-k: DPC-kNN in PyTorch
MERGE_LAUNCHES: Final = 3  # similarities, arg max, scatter


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """Tokens of which some stay: in one round, or in several one after another.

    Parameters
    ----------
    rounds : tuple of (float or ndarray, float or ndarray)
        Tokens of one request in front of every round, and behind it; none where it does not take place.
    requests : float or ndarray
        Requests that are handled at once.
    width : float
        Width of a token.
    groups : float or ndarray
        Parts of the tokens that are compared among themselves alone: tiles, frames, segments of a video.
    n_rounds : float or ndarray
        Rounds that take place: in a sweep some points may keep everything, and pay nothing.
    """

    rounds: tuple[tuple[Quantity, Quantity], ...]
    requests: Quantity
    width: float
    groups: Quantity = 1.0
    n_rounds: Quantity = 1.0

    @property
    def tokens(self) -> Quantity:
        """Tokens looked at, over all rounds and requests."""
        return self._summed(lambda n, _: n)

    @property
    def pairs(self) -> Quantity:
        """Pairs of tokens of one group."""
        return self._summed(lambda n, _: n * n) / self.groups

    @property
    def largest_pairs(self) -> Quantity:
        """Pairs of the round that has most."""
        most, _ = self.rounds[0]
        for n, _ in self.rounds[1:]:
            most = np.maximum(most, n)
        return most * most / self.groups * self.requests

    @property
    def steps(self) -> Quantity:
        """Greedy steps that wait for each other: one a token that stays; groups and requests run side by side."""
        return sum((kept for _, kept in self.rounds), start=0.0) / self.groups

    def launches(self, each: float) -> Quantity:
        """Return the kernels started when every round starts so many."""
        return self.n_rounds * each

    def _summed(self, term: Callable[[Quantity, Quantity], Quantity]) -> Quantity:
        total = sum((term(n, kept) for n, kept in self.rounds), start=0.0)
        return total * self.requests


def none(stage: Stage, selection: Selection) -> Overhead:
    """Return what needs no score, or one that the model computes anyway."""
    del selection
    return Overhead(stage, (), with_pictures=True)


def linear(stage: Stage, selection: Selection) -> Overhead:
    """Return one pass over the tokens against a few vectors (VidCom2, STTM): N d multiply-adds."""
    read = selection.tokens * (selection.width * STATE_BYTES)
    flops, launches = selection.tokens * (2.0 * selection.width), selection.launches(SIMILARITY_LAUNCHES)
    scores = Operator("score.linear", Kind.GEMM, flops=flops, activation_bytes=read, launches=launches)
    return Overhead(stage, (scores,), with_pictures=True)


def cosine(stage: Stage, selection: Selection, pivots: Quantity | None = None) -> Overhead:
    """Return the similarities of all pairs, N^2 d multiply-adds, or of every token with some pivots (DART)."""
    pairs = selection.pairs if pivots is None else selection.tokens * pivots
    peak = selection.largest_pairs if pivots is None else pairs
    moved = selection.tokens * (2 * selection.width * STATE_BYTES) + pairs * DISTANCE_BYTES
    product = Operator(
        "score.similarities",
        Kind.GEMM,
        flops=pairs * (2.0 * selection.width),
        activation_bytes=moved,
        launches=selection.launches(SIMILARITY_LAUNCHES),
    )
    return Overhead(stage, (product,), peak_bytes=peak * DISTANCE_BYTES, with_pictures=True)


def max_min(stage: Stage, selection: Selection) -> Overhead:
    """Return greedy max-min selection (DivPrune): similarities, then a step a token kept, each reading N d numbers."""
    moved = selection.requests * selection.width * STATE_BYTES / selection.groups
    read = sum((kept * n for n, kept in selection.rounds), start=0.0) * moved
    greedy = Operator("score.greedy", Kind.ELEMENTWISE, activation_bytes=read, launches=selection.steps)
    return _with(cosine(stage, selection), greedy)


def dpp(stage: Stage, selection: Selection) -> Overhead:
    """Return the greedy MAP of a determinantal process (CDPruner): similarities, then k steps of k N in the mean.

    References
    ----------
    .. [1] L. Chen, G. Zhang, E. Zhou, "Fast greedy MAP inference for DPP", NeurIPS 2018: O(k^2 N).
    """
    work = sum((kept * kept * n for n, kept in selection.rounds), start=0.0)
    work = work * selection.requests / selection.groups**2
    greedy = Operator(
        "score.greedy",
        Kind.GEMM,
        flops=work,  # step i multiplies i N numbers, an add each: 2 N (1 + … + k)
        activation_bytes=work * (DISTANCE_BYTES / 2),
        launches=selection.steps,
    )
    return _with(cosine(stage, selection), greedy)


def knn(stage: Stage, selection: Selection) -> Overhead:
    """Return density peaks by nearest neighbours (FastVID, PruneVid): distances, read again for density and peaks."""
    read = selection.pairs * (2 * DISTANCE_BYTES)
    passes = Operator(
        "score.density", Kind.ELEMENTWISE, activation_bytes=read, launches=selection.launches(KNN_LAUNCHES)
    )
    return _with(cosine(stage, selection), passes)


def merge(stage: Stage, selection: Selection) -> Overhead:
    """Return the merging of what goes into what stays: the similarities of the two, and a weighted sum."""
    requests = selection.requests
    pairs = sum(((n - kept) * kept for n, kept in selection.rounds), start=0.0) * requests / selection.groups
    kept = sum((kept for _, kept in selection.rounds), start=0.0) * requests
    moved = (selection.tokens + kept) * (selection.width * STATE_BYTES) + pairs * DISTANCE_BYTES
    launches = selection.launches(MERGE_LAUNCHES)
    work = Operator(
        "score.merge", Kind.GEMM, flops=pairs * (2.0 * selection.width), activation_bytes=moved, launches=launches
    )
    return Overhead(stage, (work,), with_pictures=True)


def gather(stage: Stage, selection: Selection) -> Overhead:
    """Return ranking and compaction: 2 N d numbers read and written."""
    moved = selection.tokens * (2 * selection.width * STATE_BYTES)
    launches = selection.launches(GATHER_LAUNCHES)
    work = Operator("score.gather", Kind.ELEMENTWISE, activation_bytes=moved, launches=launches)
    return Overhead(stage, (work,), with_pictures=True)


READABLE: Final = (AttentionSpec, LatentAttentionSpec)
"""Mixers whose attention a second pass can compute; convolutions, recurrences and traces have none to read."""


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention that scores, on one device.

    Parameters
    ----------
    heads, q_width, key_width : float
        Query heads, their width, and numbers of one token's keys.
    causal : bool
        Whether a query sees only what came before it.
    """

    heads: float
    q_width: float
    key_width: float
    causal: bool

    @staticmethod
    def of(mixer: MixerSpec, n_devices: int, owner: str) -> Heads:
        """Return the heads of a layer, or refuse what is not among `READABLE`."""
        if isinstance(mixer, LatentAttentionSpec):
            return Heads(mixer.heads / n_devices, mixer.q_width / n_devices, mixer.cached_width, causal=True)
        if not isinstance(mixer, AttentionSpec):
            raise Unsupported(f"{owner} has no layer whose attention could be read; use another score")
        keys = cached_width_on_device(mixer, n_devices) / 2
        return Heads(mixer.heads / n_devices, mixer.q_width / n_devices, keys, causal=mixer.causal)


def attention_rows(
    stage: Stage, heads: Heads, *, rows: Quantity, tokens: Quantity, rounds: Quantity = 1.0, name: str = "score.rows"
) -> Overhead:
    """Return a second pass that computes a few rows of attention which a fused kernel hides.

    Parameters
    ----------
    heads : Heads
        The attention that is read.
    rows : float or ndarray
        Rows of every group of tokens: the last one, a class token, or those of chosen text tokens.
    tokens : float or ndarray
        Keys of all groups, rounds and requests.
    rounds : float or ndarray
        Rounds, zero where nothing is selected.

    Returns
    -------
    Overhead
        2 rows tokens q_width FLOPs; all keys are read, heads x rows x tokens scores are kept [bytes].
    """
    pairs = rows * tokens
    scores = Operator(
        name,
        Kind.GEMM,
        flops=pairs * (2.0 * heads.q_width),
        activation_bytes=pairs * (MAP_PASSES * heads.heads * STATE_BYTES),
        kv_bytes=tokens * (heads.key_width * STATE_BYTES),
        launches=rounds * ROW_LAUNCHES,
    )
    return Overhead(stage, (scores,), peak_bytes=pairs * (heads.heads * MAP_BYTES), with_pictures=True)


def attention_map(
    stage: Stage, heads: Heads, *, pairs: Quantity, peak_pairs: Quantity, square: bool, rounds: Quantity = 1.0
) -> Overhead:
    """Return what a layer costs more when it runs eagerly, for its whole map to be read.

    Parameters
    ----------
    heads : Heads
        The attention that is read.
    pairs, peak_pairs : float or ndarray
        Pairs of the whole square, masked ones included: over all rounds, and alive at once.
    square : bool
        Whether the stage is charged for the masked half anyway.
    rounds : float or ndarray
        Layers that run so, zero where nothing is selected.

    Returns
    -------
    Overhead
        The map's traffic [bytes], and the masked half of a causal one, which no fused kernel computes [FLOP].
    """
    masked = 0.5 if heads.causal and not square else 0.0
    scores = Operator(
        "score.map",
        Kind.GEMM,
        flops=pairs * (masked * 4.0 * heads.q_width),
        activation_bytes=pairs * (MAP_PASSES * heads.heads * STATE_BYTES),
        launches=rounds * ROW_LAUNCHES,
    )
    return Overhead(stage, (scores,), peak_bytes=peak_pairs * (heads.heads * MAP_BYTES), with_pictures=True)


BY_NAME: Final[Mapping[str, Callable[[Stage, Selection], Overhead]]] = {
    "none": none,
    "linear": linear,
    "cosine": cosine,
    "max_min": max_min,
    "dpp": dpp,
    "knn": knn,
}
"""The scores that need tokens alone."""
BY_ENCODER: Final = frozenset({"encoder_row", "encoder_map"})
BY_DECODER: Final = frozenset({"llm_rows", "llm_map"})
SCORES: Final = (*BY_NAME, *sorted(BY_ENCODER), *sorted(BY_DECODER))


def together(overheads: tuple[Overhead, ...]) -> tuple[Overhead, ...]:
    """Return the overheads of a stage as one whose peak is the largest, for they follow each other."""
    if len(overheads) == 1:
        return overheads
    operators = tuple(operator for overhead in overheads for operator in overhead.operators)
    peak: Quantity = 0.0
    for overhead in overheads:
        held = overhead.peak_bytes
        arrays = isinstance(held, np.ndarray) or isinstance(peak, np.ndarray)
        peak = np.maximum(peak, held) if arrays else max(peak, held)
    return (Overhead(overheads[0].stage, operators, peak_bytes=peak, with_pictures=True),)


def _with(overhead: Overhead, *operators: Operator) -> Overhead:
    together = (*overhead.operators, *operators)
    return Overhead(overhead.stage, together, peak_bytes=overhead.peak_bytes, with_pictures=True)
