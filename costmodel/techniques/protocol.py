"""What a technique is, and the words in which it says where it acts and what it needs."""

from __future__ import annotations

from typing import Final, Literal, Protocol

from costmodel.query import Query

AttentionMap = Literal["none", "rows", "full"]
ATTENTION_MAPS: Final[tuple[AttentionMap, ...]] = ("none", "rows", "full")
"""Attention scores that a technique reads, the least first."""

PLACES: Final = (
    "frames",
    "pixels",
    "encoder",
    "adapter",
    "visual_tokens",
    "layers",
    "attention",
    "kv",
    "draft",
    "output",
    "weights",
)
"""States that techniques edit, in the order in which a request meets them."""

NEEDS: Final = ("vit_attention", "whole_video", "query", "class_token")
"""What a technique may need from a model or a request."""


class Technique(Protocol):
    """A rewrite of a query."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def slot(self) -> str:
        """The place it takes: two techniques of one slot exclude each other; "" takes none."""

    @property
    def needs_attention_map(self) -> AttentionMap:
        """Which attention scores it must see."""

    def apply(self, query: Query) -> Query:
        """Return the changed query."""


class Primitive(Technique, Protocol):
    """One kind of rewrite: a class in a file of its own, whose fields a published method sets."""

    @property
    def needs(self) -> frozenset[str]:
        """What it needs from the model or the request: some of `NEEDS`."""

    @property
    def stages(self) -> str:
        """The state it edits: one of `PLACES`."""
