"""All requests in one query: what techniques, cross-attention and states leave of every prompt, as columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from costmodel.base import Array, Quantity
from costmodel.deployment import Parallelism, Precision
from costmodel.engine import EngineProfile
from costmodel.errors import Unsupported
from costmodel.hardware import HardwareProfile
from costmodel.kernels import Kernels
from costmodel.media import SUMMED as ADDING
from costmodel.media import MediaTotals
from costmodel.models import MediaCost, ModelSpec
from costmodel.priced import operator_s
from costmodel.query import KVEntry, Overhead, Query, Stage, Turn, build_query
from costmodel.state import grouped
from costmodel.step import StepModel
from costmodel.techniques import Technique, compose
from costmodel.workload import Workload
from simulator.request import Ints, Requests
from simulator.service import ReadRule

SUMMED: Final = (*ADDING, "frames", "frame_pixels")
"""Fields of an item, or totals of it, that add up."""
SECOND_UNIT_S: Final = 2.0**-50
"""Seconds that techniques add to steps are whole multiples of this, so that sums of them are exact [s]."""
SECONDS: Final = ReadRule(share=SECOND_UNIT_S, grows=False)
"""The rule of these seconds among those of the caches."""
EXAMPLE_SIDES: Final = (1280, 960)
N_EXAMPLES: Final = 2
"""Two of different length: then whatever depends on a request is an array."""


@dataclass(frozen=True, slots=True, eq=False)
class Asking:
    """How requests become a query.

    Parameters
    ----------
    model : ModelSpec
    engine : EngineProfile
    precision : Precision
    parallelism : Parallelism
    techniques : tuple of Technique
    """

    model: ModelSpec
    engine: EngineProfile
    precision: Precision
    parallelism: Parallelism
    techniques: tuple[Technique, ...] = ()

    def query(self, media: MediaTotals, text: Quantity, output: Quantity, *, batch: float = 1.0) -> Query:
        """Return the query of requests after all techniques.

        Raises
        ------
        Unsupported
            If the result is nothing that steps of one token a sequence can run.
        """
        asked = Workload(visual_tokens=1.0 if self.model.media else None, text_tokens=1.0)
        plain = build_query(
            self.model, asked, self.engine, batch=batch, precision=self.precision, parallelism=self.parallelism
        )
        plain = replace(plain, media=media, visual_tokens=media.visual_tokens, turns=(Turn(1.0, text, output),))
        if not self.techniques:
            return plain
        with np.errstate(divide="ignore", invalid="ignore"):  # requests without pictures have shares of nothing
            query = compose(plain, self.techniques)
        reason = _reason(query, plain)
        if reason:
            names = ", ".join(repr(technique.name) for technique in self.techniques)
            raise Unsupported(f"techniques {names}: {reason}; leave them out of the plan, or use `predict`")
        return query

    def plain_steps(self, device: HardwareProfile, *, pictures: bool = True) -> StepModel:
        """Return the steps without techniques."""
        how = {"engine": self.engine, "precision": self.precision, "parallelism": self.parallelism}
        return StepModel.of(self.model, device, pictures=pictures, **how)  # type: ignore[arg-type]


def _reason(query: Query, plain: Query) -> str:
    """Return why a query cannot be simulated after techniques; "" where it can."""
    turn = query.turns[0]
    once = _is(turn.probability, 1.0) and _is(turn.repeats, 1.0) and len(query.turns) == 1
    fresh = _is(turn.visual_share, 1.0) and _is(turn.prefix_tokens, 0.0) and _is(turn.prefix_visual_share, 0.0)
    found = (
        (query.draft is not None, "a draft gives several tokens a step, and a simulated sequence takes one a step"),
        (
            query.engine is not plain.engine,
            "a stream sets the size of prefill chunks, and the simulator's are the token_budget of a pool",
        ),
        (not once, "an answer in several turns is several requests, and a simulated request has one"),
        (
            not _is(turn.output_tokens, plain.turns[0].output_tokens),
            "how long answers are is said by the traffic, whose output_tokens can be scaled instead",
        ),
        (not fresh, "a stream keeps its cache between turns, and a simulated request starts with none of its own"),
        (
            any(isinstance(entry.read_share, np.ndarray) for entry in query.kv),
            "how much of the cache a step reads differs between requests, and steps add up what they read",
        ),
        (
            any(entry.is_read and entry.placement != "gpu" for entry in query.kv),
            "steps read a cache on the host, whose copies the sums of a step do not hold",
        ),
    )
    return next((reason for holds, reason in found if holds), "")


def _is(value: Quantity, number: Quantity) -> bool:
    return bool(np.all(np.equal(value, number)))


def totals_of(costs: Sequence[MediaCost], kinds: Ints, owner: Ints, n: int) -> MediaTotals:
    """Return what pictures add up to, by request.

    Parameters
    ----------
    costs : sequence of MediaCost
        The different pictures.
    kinds, owner : ndarray of int
        By item, which of them it is, and its request.
    n : int
        Requests.
    """

    def summed(values: Sequence[float], chosen: Any = slice(None)) -> Array:  # noqa: ANN401 - what indexes an array
        column = np.array([float(value) for value in values] or [0.0])
        found: Array = np.bincount(owner[chosen], weights=column[kinds[chosen]], minlength=n).astype(float)
        return found

    def totals(chosen: Any) -> MediaTotals:  # noqa: ANN401
        sums = {name: summed([getattr(cost, name) for cost in costs], chosen) for name in SUMMED}
        made = [cost.visual_tokens if cost.adapter_tokens is None else cost.adapter_tokens for cost in costs]
        largest = np.zeros(n)
        rows = np.array([float(cost.largest_rows) for cost in costs] or [0.0])
        np.maximum.at(largest, owner[chosen], rows[kinds[chosen]])
        return MediaTotals(
            items=np.bincount(owner[chosen], minlength=n).astype(float),
            adapter_tokens=summed(made, chosen),
            largest_rows=largest,
            item_rows=(1.0,),  # that there are pictures of known size; who encodes which is none of a query of many
            **sums,  # type: ignore[arg-type]
        )

    filmed = np.array([cost.frames > 0 for cost in costs] or [False])[kinds]
    everything = totals(slice(None))
    if not filmed.any() or filmed.all():
        return everything
    return replace(everything, video=totals(filmed))


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """Requests that stand beside those of a run, so that one run's query has the structure of every other's.

    Parameters
    ----------
    costs : tuple of MediaCost
        Their picture, if the model sees.
    text, output : ndarray
        Their text and answers [tokens].
    """

    costs: tuple[MediaCost, ...]
    text: Array
    output: Array

    @staticmethod
    def of(model: ModelSpec) -> Example:
        """Return two requests of different length, with a picture each where the model sees."""
        costs = () if model.media is None else (model.media.image(*EXAMPLE_SIDES, n_images=1),)
        return Example(costs, np.array([64.0, 256.0]), np.array([64.0, 128.0]))


def example_query(asking: Asking) -> Query:
    """Return the query whose structure the steps of all requests have."""
    example = Example.of(asking.model)
    each = np.arange(N_EXAMPLES if example.costs else 0)
    media = totals_of(example.costs, np.zeros(len(each), dtype=np.int64), each, N_EXAMPLES)
    return asking.query(media, example.text, example.output)


def beside_example(asking: Asking, items: Sequence[MediaCost], tokens: float) -> Query:
    """Return the query of a request of some items and of so many tokens with them; an example stands behind it."""
    example = Example.of(asking.model)
    costs = [*items, *example.costs[:1]]
    owner = np.array([0] * len(items) + [1] * (len(costs) - len(items)), dtype=np.int64)
    media = totals_of(costs, np.arange(len(costs)), owner, 2)
    first = asking.query(media, example.text, example.output)
    text = tokens - (first.visual_tokens + first.media.marker_tokens)
    return asking.query(media, np.maximum(text, 1.0), example.output)


def _check_structure(query: Query, model: StepModel) -> None:
    """Refuse requests whose layers part otherwise than those that the steps were compiled for."""
    found = [part.structure for part in grouped(query.decoder)], [entry.structure for entry in grouped(query.kv)]
    known = model.structure
    if found != ([part.structure for part in known.decoder], [entry.structure for entry in known.kv]):
        raise Unsupported(
            f"layers of {query.model.name} part otherwise by request; leave the techniques out of the plan"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """The requests of a run, and two examples behind them, in one query.

    Parameters
    ----------
    asking : Asking
    model : StepModel
        The steps.
    requests : Requests
    costs : sequence of MediaCost
        The different pictures.
    kinds : ndarray of int
        By item, which of them it is.
    before : MediaTotals
        Pictures before techniques.
    query : Query
        After them.
    """

    asking: Asking
    model: StepModel
    requests: Requests
    costs: Sequence[MediaCost]
    kinds: Ints
    before: MediaTotals
    query: Query

    @staticmethod
    def of(asking: Asking, model: StepModel, requests: Requests, costs: Sequence[MediaCost], kinds: Ints) -> Columns:
        """Work out the query of a run's requests."""
        example, n = Example.of(asking.model), len(requests)
        more = N_EXAMPLES if example.costs else 0
        all_kinds = np.concatenate([kinds, np.full(more, len(costs))]).astype(np.int64)
        owner = np.concatenate([requests.item_request, n + np.arange(more)])
        media = totals_of([*costs, *example.costs], all_kinds, owner, n + N_EXAMPLES)
        text = np.concatenate([requests.text_tokens, example.text])
        output = np.concatenate([requests.output_tokens, example.output])
        query = asking.query(media, text, output)
        _check_structure(query, model)
        return Columns(asking, model, requests, costs, kinds, media, query)

    @property
    def of_two(self) -> Query:
        """The query where every request comes twice: what starts of kernels are shared."""
        turn = self.query.turns[0]
        text, output = (
            turn.text_tokens,
            np.concatenate([self.requests.output_tokens, Example.of(self.asking.model).output]),
        )
        return self.asking.query(self.before, text, output, batch=2.0)

    def column(self, value: Quantity) -> Array:
        """Return a number of the query by request of the run."""
        n = len(self.requests)
        whole: Array = np.broadcast_to(np.asarray(value, dtype=float), (n + N_EXAMPLES,))[:n]
        return whole

    def at_example(self, value: Quantity) -> float:
        """Return a number of the query at the first of the examples, the same in every run."""
        return float(np.broadcast_to(np.asarray(value, dtype=float), (len(self.requests) + N_EXAMPLES,))[-N_EXAMPLES])

    def item_tokens(self, field: str, after: Quantity, *, least: float = 0.0) -> Ints:
        """Return a kind of tokens of every item when those of its request are so many: whole, and adding up.

        Parameters
        ----------
        field : str
            The tokens, of `MediaCost`.
        after : float or ndarray
            How many they are in the query.
        least : float
            The fewest of an item that had any.
        """
        owner, offsets = self.requests.item_request, self.requests.item_offsets
        each = np.array([float(getattr(cost, field)) for cost in self.costs] or [0.0])[self.kinds]
        ratio = self.column(after) / np.maximum(self.column(getattr(self.before, field)), 1.0)
        reached = np.concatenate([[0.0], np.cumsum(each * ratio[owner])])
        first = reached[offsets[owner]]
        whole = np.floor(reached[1:] - first + 0.5) - np.floor(reached[:-1] - first + 0.5)
        tokens: Ints = np.where(each > 0, np.maximum(whole, least), 0.0).astype(np.int64)
        return tokens

    def kept(self, entry: KVEntry) -> Array:
        """Return the tokens that a cache entry holds of every prompt once it is computed, before a window cuts them."""
        query, media = self.query, self.query.media
        other = media.marker_tokens + query.turns[0].text_tokens
        return self.column(entry.kept_prompt(query.visual_tokens, other, media.cross_tokens))

    def added_s(self, stage: Stage, kernels: Kernels, *, hidden: bool, query: Query | None = None) -> Quantity:
        """Return what techniques add to a stage of every request alone, examples included [s]."""
        query = query or self.query
        wanted = [o for o in query.overheads if o.stage == stage and o.hidden == hidden]
        return sum((self._priced(overhead, kernels) for overhead in wanted), start=0.0)

    def _priced(self, overhead: Overhead, kernels: Kernels) -> Quantity:
        seconds = sum((operator_s(operator, kernels) for operator in overhead.operators), start=0.0)
        return seconds * np.minimum(self.before.items, 1.0) if overhead.with_pictures else seconds
