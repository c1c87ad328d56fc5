"""Adapters: what maps encoder outputs into the language model, as steps over visual tokens and patches.

Every step runs on `per_token` rows a visual token and `per_patch` rows a patch of the encoder, which covers projectors
(rows = tokens), projectors before pooling (rows = patches), and resamplers (queries attending over patches).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from typing import Literal, TypeAlias


@dataclass(frozen=True, slots=True)
class LinearStep:
    """A linear layer, or a convolution whose patches do not overlap.

    Parameters
    ----------
    name : str
    d_in, d_out : int
        Shape of the weight.
    bias : bool
        Whether there is one.
    per_token, per_patch : float
        Rows a visual token, and a patch.
    repeats : int
        Layers with such a step.
    split : {"none", "columns", "rows"}
        How tensor parallelism divides the weight; a split by rows ends in a sum over devices.
    """

    name: str
    d_in: int
    d_out: int
    bias: bool = True
    per_token: float = 1.0
    per_patch: float = 0.0
    repeats: int = 1
    split: Literal["none", "columns", "rows"] = "none"

    @property
    def parameters(self) -> int:
        """Parameters of all repeats."""
        return self.repeats * (self.d_in + self.bias) * self.d_out


@dataclass(frozen=True, slots=True)
class ElementwiseStep:
    """A norm, an activation, a pooling: `numbers` values a row read and written, and the parameters it may have."""

    name: str
    numbers: float
    parameters: int = 0
    per_token: float = 1.0
    per_patch: float = 0.0
    repeats: int = 1


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """Attention of queries over keys without its projections, which are linear steps of their own.

    Parameters
    ----------
    heads, head_dim : int
    pairs_per_token, pairs_per_patch : float
        Query-key pairs a visual token, and a patch: with q queries over the patches of an item, q pairs a patch.
    per_token : float
        Queries a visual token.
    repeats : int
        Layers with such a step.
    """

    name: str
    heads: int
    head_dim: int
    pairs_per_token: float = 0.0
    pairs_per_patch: float = 0.0
    per_token: float = 1.0
    repeats: int = 1
    parameters: int = 0


Step: TypeAlias = LinearStep | ElementwiseStep | AttentionStep


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """An adapter.

    Parameters
    ----------
    steps : tuple
        What it runs, in order.
    extra_parameters : int
        Query embeddings and the like.
    outputs : int
        Vectors of the language model's width that leave it for one visual token (DeepStack gives several).
    """

    steps: tuple[Step, ...]
    extra_parameters: int = 0
    outputs: int = 1

    @property
    def parameters(self) -> int:
        """Parameters of the adapter; those of an elementwise step are given for all its repeats."""
        return self.extra_parameters + sum(step.parameters for step in self.steps)


def projector(
    widths: Sequence[int],
    *,
    bias: bool = True,
    norm: ElementwiseStep | None = None,
    per_token: float = 1.0,
    per_patch: float = 0.0,
    prefix: str = "",
) -> tuple[Step, ...]:
    """Return the steps of a projector: a norm if there is one, then linear layers with activations between them.

    Two layers are split by columns and then by rows under tensor parallelism; other chains are copied.
    """
    is_pair = len(widths) == len(("in", "hidden", "out"))
    splits: Sequence[Literal["none", "columns", "rows"]] = ("columns", "rows") if is_pair else ("none",)
    steps: list[Step] = [norm] if norm else []
    for i, ((d_in, d_out), split) in enumerate(zip(pairwise(widths), cycle(splits), strict=False)):
        if i:
            steps.append(ElementwiseStep(f"{prefix}activation{i}", 2 * d_in, per_token=per_token, per_patch=per_patch))
        linear = LinearStep(f"{prefix}linear{i + 1}", d_in, d_out, bias, per_token, per_patch, split=split)
        steps.append(linear)
    return tuple(steps)
