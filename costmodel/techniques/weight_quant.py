"""Narrower weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from costmodel.deployment import BITS
from costmodel.query import Query

FULL_BITS = 16


@dataclass(frozen=True, slots=True)
class WeightQuant:
    """Stores the linear layers of the language model in fewer bits.

    Vision tower, adapter, embedding and head stay as they are. Weights alone in four bits make decoding faster and,
    because products widen them on the way, a long prefill slower: `activation_bits` runs the products narrower too.

    Parameters
    ----------
    bits : int
        Of weights; 16 leaves them alone.
    activation_bits : int, optional
        Of the inputs of their products; not given, those of the request.
    """

    bits: int = FULL_BITS
    activation_bits: int | None = None
    name: str = "WeightQuant"

    def __post_init__(self) -> None:
        """Refuse widths that nobody stores."""
        for field in ("bits", "activation_bits"):
            value = getattr(self, field)
            if value is not None and value not in BITS:
                raise ValueError(f"{self.name}.{field}={value!r} must be one of {', '.join(map(str, BITS))}")

    @property
    def slot(self) -> str:
        """The place it takes."""
        return "weights bits"

    @property
    def needs_attention_map(self) -> Literal["none", "rows", "full"]:
        """It needs no attention of the model."""
        return "none"

    @property
    def needs(self) -> frozenset[str]:
        """It needs nothing of model or request."""
        return frozenset()

    @property
    def stages(self) -> str:
        """Which state it edits."""
        return "weights"

    def apply(self, query: Query) -> Query:
        """Return the query with narrower weights."""
        old = query.precision
        weights = old.weight_bits if self.bits == FULL_BITS else self.bits
        inputs = old.activation_bits if self.activation_bits is None else self.activation_bits
        if (weights, inputs) == (old.weight_bits, old.activation_bits):
            return query
        return replace(query, precision=replace(old, weight_bits=int(weights), activation_bits=int(inputs)))
