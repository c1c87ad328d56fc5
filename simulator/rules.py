"""What a plan says of failures, of workers that come, go and change their role, and of a store that pools share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from costmodel.base import Frozen

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Signal = Literal["waiting", "requests", "tokens"]


class Failure(Frozen):
    """Something that goes wrong, once or again and again.

    Parameters
    ----------
    kind : {"crash", "straggler", "link", "preprocessing"}
        A worker loses all that it holds and comes back after `for_s`, the time to load its weights included; a worker
        takes `slowdown` times as long; a link has `bandwidth_left` of its bandwidth; CPU workers take `slowdown` times
        as long for tasks that they begin.
    pool : str
        Whose worker, CPU workers or outgoing link.
    to : str or None
        For a link, the receiving pool.
    worker : int or None
        For crashes and stragglers, which of the pool's workers, from 0; None draws one each time.
    at_s : float or None
        When [s].
    mean_time_between_s : float or None
        In place of `at_s`: from a repair to the next failure in the mean, exponentially distributed [s].
    for_s : float or None
        Until it is repaired; None is for ever [s].
    slowdown : float
        How many times as long work takes.
    bandwidth_left : float
        Share of the bandwidth that is left.
    """

    kind: Literal["crash", "straggler", "link", "preprocessing"]
    pool: str
    to: str | None = None
    worker: Annotated[int, Field(ge=0)] | None = None
    at_s: Annotated[float, Field(ge=0)] | None = None
    mean_time_between_s: Positive | None = None
    for_s: Positive | None = None
    slowdown: Annotated[float, Field(ge=1)] = 2.0
    bandwidth_left: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _check(self) -> Failure:
        if (self.at_s is None) == (self.mean_time_between_s is None):
            raise ValueError(f"at_s={self.at_s} and mean_time_between_s={self.mean_time_between_s}: give one of them")
        if self.mean_time_between_s is not None and self.for_s is None:
            raise ValueError("for_s=None must be given with mean_time_between_s: the next comes after the repair")
        if (self.kind == "link") != (self.to is not None):
            raise ValueError(f"to={self.to!r} must name the receiving pool of a link, and of nothing else")
        if self.worker is not None and self.kind not in ("crash", "straggler"):
            raise ValueError(f"worker={self.worker} is of crashes and stragglers; leave it out for {self.kind!r}")
        return self


class Scaling(Frozen):
    """Workers of a pool come and go with the work.

    Parameters
    ----------
    pool : str
    least, most : int
        Workers.
    signal : {"waiting", "requests", "tokens"}
        What is looked at, a worker that takes work: requests that wait, requests that are there, tokens of their
        prompts.
    above, below : float
        One worker more, one less; a gap between them keeps numbers from swinging.
    holds : int
        For how many looks in a row a signal must say so.
    cold_start_s : float
        Until a new worker takes work: its device is paid from the decision on [s].
    """

    pool: str
    least: Count = 1
    most: Count
    signal: Signal = "waiting"
    above: Positive
    below: Annotated[float, Field(ge=0)]
    holds: Count = 2
    cold_start_s: Annotated[float, Field(ge=0)] = 60.0

    @model_validator(mode="after")
    def _check(self) -> Scaling:
        if self.most < self.least:
            raise ValueError(f"most={self.most} must be least={self.least} or more; raise it")
        _check_gap(self.above, self.below)
        return self


class Move(Frozen):
    """Workers of one pool change to another where there is more to do (EPDServe's role switch).

    Parameters
    ----------
    source, target : str
        From which pool to which; the way back is a rule of its own.
    least : int
        Workers that stay; where a pool is scaled too, it keeps the bounds of that rule as well.
    signal, above, below, holds
        As in `Scaling`: `above` of the target, `below` of the source.
    switch_s : float
        From when it has nothing left to do, which a look finds, to the first request in the new role [s].
    """

    source: str = Field(alias="from")
    target: str = Field(alias="to")
    least: Count = 1
    signal: Signal = "waiting"
    above: Positive
    below: Annotated[float, Field(ge=0)]
    holds: Count = 2
    switch_s: Annotated[float, Field(ge=0)] = 1.0

    @model_validator(mode="after")
    def _check(self) -> Move:
        if self.source == self.target:
            raise ValueError(f"to={self.target!r} must be another pool than from; change one")
        return self


class Control(Frozen):
    """Looks at the pools now and then, and changes how many workers they have. It sees what is, not what will come.

    Parameters
    ----------
    every_s : float
        Between two looks [s].
    scale : tuple of Scaling
    move : tuple of Move
    """

    every_s: Positive = 5.0
    scale: tuple[Scaling, ...] = ()
    move: tuple[Move, ...] = ()

    def most(self, pool: str, workers: Sequence[tuple[str, int]]) -> int:
        """Return the most workers that a pool can come to have.

        Parameters
        ----------
        workers : sequence of tuple of str and int
            Pools, and the workers that they begin with.
        """
        highest = dict(workers)
        for rule in self.scale:
            highest[rule.pool] = max(highest[rule.pool], rule.most)
        group, size = {pool}, 0  # pools between which workers move
        while len(group) > size:
            size = len(group)
            for change in self.move:
                ends = {change.source, change.target}
                group |= ends if ends & group else set()
        return sum(highest[name] for name in group)


class Store(Frozen):
    """A place for embeddings that all pools reach, by what pictures show: memory of a host, or of other machines.

    Parameters
    ----------
    capacity_bytes : float
        Room [bytes].
    bandwidth_bytes_per_s : float
        Rate of its wire; all reads and writes at the same time share it equally [bytes/s].
    latency_s : float
        From the last byte sent to the landing [s].
    """

    capacity_bytes: Annotated[float, Field(ge=0)]
    bandwidth_bytes_per_s: Positive
    latency_s: Annotated[float, Field(ge=0)] = 0.0


def _check_gap(above: float, below: float) -> None:
    if below >= above:
        raise ValueError(f"below={below:g} must be less than above={above:g}; else workers come and go without end")
