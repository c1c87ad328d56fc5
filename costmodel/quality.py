"""What techniques do to quality, as far as it was published: retention at a setting, never a formula of ours.

A published score over its baseline is the retention at one setting. Between two published settings of one benchmark and
model it is interpolated along the argument that the method's file names; outside of them it is unknown. Of several
benchmarks the lowest counts, and of several techniques the losses add: what is lost to one is not what the next would
have lost anyway. A gain counts as no loss. Benchmarks, models and requests differ from yours: every figure is an
estimate.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from costmodel.techniques.applied import Published, load_arguments
from costmodel.techniques.method import MethodFile, QualityPoint
from costmodel.techniques.protocol import Technique

RULE: Final = "lowest of the published benchmarks; losses of several techniques add; a gain counts as no loss"


@dataclass(frozen=True, slots=True)
class Kept:
    """What one technique keeps of the quality.

    Parameters
    ----------
    technique : str
        Its name.
    retention : float or None
        Share that is kept on the benchmark where least is; None where it is unknown.
    benchmarks : mapping
        Retention by benchmark and model.
    reason : str
        Why it is unknown, or how sure it is.
    """

    technique: str
    retention: float | None
    benchmarks: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return it under the names of the JSON interface."""
        return {
            "technique": self.technique,
            "retention": self.retention,
            "benchmarks": dict(self.benchmarks),
            "reason": self.reason,
        }


def quality_of(technique: Technique) -> Kept:
    """Return what a technique keeps of the quality at its arguments."""
    if not isinstance(technique, Published):
        return Kept(technique.name, None, reason="no published method, so that nothing is known")
    file = technique.file
    if not file.quality:
        return Kept(technique.name, None, reason=f"no figure published with its baseline: {file.stated.quality}")
    setting = setting_of(technique)
    found: dict[str, float] = {}
    for (benchmark, model), points in _grouped(file).items():
        share = _retention(points, setting, file)
        if share is not None:
            found[f"{benchmark} ({model})"] = share
    if not found:
        return Kept(technique.name, None, reason=f"published at other settings alone: {_published(file)}")
    sources = sorted({point.source for point in file.quality})
    return Kept(technique.name, min(found.values()), found, f"estimate from {'; '.join(sources)}")


def quality_dict(techniques: Sequence[Technique]) -> dict[str, Any] | None:
    """Return what techniques together keep, under the names of the JSON interface; None without techniques."""
    if not techniques:
        return None
    kept = [quality_of(technique) for technique in techniques]
    return {
        "retention": combined([one.retention for one in kept]),
        "estimate": True,
        "rule": RULE,
        "techniques": [one.as_dict() for one in kept],
    }


def combined(retentions: Sequence[float | None]) -> float | None:
    """Return what is kept after all losses; None where one is unknown.

    Examples
    --------
    >>> round(combined([0.9, 1.02, 0.95]), 3)
    0.85
    """
    known = [share for share in retentions if share is not None]
    if len(known) < len(retentions):
        return None
    return max(0.0, 1.0 - sum(max(0.0, 1.0 - share) for share in known))


def setting_of(technique: Published) -> dict[str, Any]:
    """Return the arguments of a method that its file or the caller sets."""
    uses = technique.file.primitives
    setting = {
        argument: uses[position].parameters[name]
        for argument, (position, name) in load_arguments(technique.identity).items()
        if name in uses[position].parameters
    }
    return {**setting, **technique.arguments}


def _grouped(file: MethodFile) -> dict[tuple[str, str], list[QualityPoint]]:
    groups: dict[tuple[str, str], list[QualityPoint]] = {}
    for point in file.quality:
        groups.setdefault((point.benchmark, point.model), []).append(point)
    return groups


def _retention(points: Sequence[QualityPoint], setting: Mapping[str, Any], file: MethodFile) -> float | None:
    """Return the retention at a setting: published, or between two published ones."""
    defaults = _defaults(file)
    unpublished = {name for names in file.required for name in names.split("|")}
    settings = [(point, {**defaults, **point.at}) for point in points]
    exact = [p.retention for p, at in settings if p.everywhere or _same(at, setting, ignored=unpublished)]
    if exact or file.knob not in setting:
        return min(exact, default=None)
    ignored = unpublished | {file.knob}
    along = [(float(at[file.knob]), p.retention) for p, at in settings if _same(at, setting, ignored=ignored)]
    return _between(sorted(along), setting[file.knob])


def _between(along: Sequence[tuple[float, float]], wanted: object) -> float | None:
    if len(along) < 2 or not isinstance(wanted, int | float):  # noqa: PLR2004 - a line has two ends
        return None
    places, shares = zip(*along, strict=True)
    return float(np.interp(wanted, places, shares)) if places[0] <= wanted <= places[-1] else None


def _defaults(file: MethodFile) -> dict[str, Any]:
    return {use.prefix + name: value for use in reversed(file.primitives) for name, value in use.parameters.items()}


def _same(one: Mapping[str, Any], other: Mapping[str, Any], *, ignored: Collection[str]) -> bool:
    return all(_equal(one.get(key), other.get(key)) for key in {*one, *other}.difference(ignored))


def _equal(one: object, other: object) -> bool:
    """Return whether two values of an argument are the same, arrays never."""
    return False if isinstance(one, np.ndarray) or isinstance(other, np.ndarray) else _plain(one) == _plain(other)


def _plain(value: Any) -> Any:  # noqa: ANN401 - numbers, words, and rows of them
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _published(file: MethodFile) -> str:
    places = {", ".join(f"{k}={v}" for k, v in point.at.items()) or "the defaults" for point in file.quality}
    return "; ".join(sorted(places))
