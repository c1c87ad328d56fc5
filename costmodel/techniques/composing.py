"""Techniques together: their order, the places that exclude each other, and the pairs that cannot be.

Ratios are never multiplied: each technique rewrites the state that the ones before it left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from costmodel.query import Query
from costmodel.techniques.protocol import PLACES, Technique

UNSAID: Final = "layers"
"""Where a technique acts that does not say."""
WITHIN: Final = {
    "encoder_layer": 0,
    "encoder_out": 1,
    "pre_llm": 2,
    "kv tokens": 0,
    "kv bits": 1,
    "kv read": 2,
    "stream": 3,
    "draft": 0,
    "verify": 1,
}
"""Order of what edits one state: tokens where they appear first; what is cached before how, and before what is read."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A rewrite and the technique that it belongs to.

    Parameters
    ----------
    rewrite : Technique
        The primitive, or the technique itself.
    owner : Technique
        What was asked for.
    """

    rewrite: Technique
    owner: Technique

    @property
    def name(self) -> str:
        """The name of what was asked for."""
        return self.owner.name

    @property
    def slot(self) -> str:
        """The place it takes."""
        return self.rewrite.slot

    @property
    def place(self) -> str:
        """The state it edits."""
        return str(getattr(self.rewrite, "stages", UNSAID))

    @property
    def order(self) -> tuple[int, int]:
        """Where it comes among others."""
        if self.place not in PLACES:
            raise ValueError(f"{self.name}.stages={self.place!r} must be one of {', '.join(PLACES)}")
        return PLACES.index(self.place), WITHIN.get(getattr(self.rewrite, "at", "") or self.slot, 0)

    def needs(self, what: str) -> bool:
        """Return whether it, or what it belongs to, needs something."""
        return any(what in getattr(one, "needs", ()) for one in (self.rewrite, self.owner))

    def has(self, trait: str) -> bool:
        """Return whether what it belongs to has a trait."""
        return trait in getattr(self.owner, "traits", ())


def parts_of(techniques: Sequence[Technique]) -> tuple[Part, ...]:
    """Return the rewrites of techniques in the order in which they apply: by place, then as given.

    Raises
    ------
    ValueError
        If a technique names a place that there is not.
    """
    parts = [Part(rewrite, owner) for owner in techniques for rewrite in getattr(owner, "parts", (owner,))]
    return tuple(sorted(parts, key=lambda part: part.order))


def check(parts: Sequence[Part]) -> None:
    """Refuse techniques that exclude each other.

    Raises
    ------
    ValueError
        If two take the same slot, or a pair cannot be, with the reason.
    """
    taken: dict[str, Part] = {}
    for part in parts:
        other = taken.setdefault(part.slot, part) if part.slot else part
        if other is not part:
            raise ValueError(f"techniques {other.name!r} and {part.name!r} both take slot {part.slot!r}; use one")
    for one in parts:
        for other in parts:
            if one is not other:
                for reason in _reasons(one, other):
                    raise ValueError(f"techniques {one.name!r} and {other.name!r} exclude each other: {reason}")


def compose(query: Query, techniques: Sequence[Technique]) -> Query:
    """Return the query after all techniques, each on the state that the ones before it left.

    Parameters
    ----------
    query : Query
        Before.
    techniques : sequence of Technique
        In any order: they apply by place (frames first, weights last), and as given within one.

    Raises
    ------
    ValueError
        If two of them take the same slot, or cannot go together.
    """
    parts = parts_of(techniques)
    check(parts)
    for part in parts:
        query = part.rewrite.apply(query)
    return query


def _scores_by_what_is_replaced(one: Part, other: Part) -> bool:
    reads = one.needs("vit_attention") or one.needs("class_token")
    return reads and other.slot == "encoder" and not other.has("keeps_vit_attention")


def _waits_for_the_end_of_a_stream(one: Part, other: Part) -> bool:
    return one.needs("whole_video") and (other.slot == "stream" or other.has("streams"))


def _evicts_what_may_be_rolled_back(one: Part, other: Part) -> bool:
    return one.has("evicts_each_step") and other.slot == "draft"


def _prunes_what_does_not_run(one: Part, other: Part) -> bool:
    return one.place == "layers" and other.slot == "architecture"


RULES: Final[tuple[tuple[Callable[[Part, Part], bool], str], ...]] = (
    (
        _scores_by_what_is_replaced,
        "the first scores tokens by the attention of a ViT, and the second puts another encoder in its place; use one",
    ),
    (
        _waits_for_the_end_of_a_stream,
        "the first must see the whole video, and the second answers while it runs; use a causal reducer",
    ),
    (
        _evicts_what_may_be_rolled_back,
        "the first evicts at every step, and rejected tokens of the second must be rolled back; evict after prefill",
    ),
    (
        _prunes_what_does_not_run,
        "the first prunes visual tokens inside the language model, and with the second none run there; use one",
    ),
)
"""Pairs that cannot be, and why."""


def _reasons(one: Part, other: Part) -> Iterator[str]:
    yield from (reason for holds, reason in RULES if one.owner is not other.owner and holds(one, other))
