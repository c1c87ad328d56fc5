"""Fit one set of constants to the kernels of several devices, and test it on each device that a fit has not seen.

Constants in cycles, FLOP per byte and shares of datasheet rates are the same for all devices of a group: one kind of
kernel, of one family, of one library. The device enters by its datasheet alone; see `costmodel.efficiency.transfer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from costmodel.efficiency import Chip, Curve, GemmCurve
from costmodel.efficiency.transfer import Figure, band_power, repaired
from costmodel.hardware import HardwareProfile
from runtime.envelope import envelope, widest
from runtime.fitting import Bands, Scored, SizeError, errors_within, fit, joined, quantiles, scales, together
from runtime.grouping import Group, Member
from runtime.recipes import BITS, RING, Recipe, recipe_of
from runtime.tables import Samples

TRITON: Final = "triton"
LARGE: Final = 8192
"""Side of a product whose rate is usually published, some milliseconds long; the nearest row is taken. A much longer
one would charge its fall in clock to the shorter ones."""
STREAM_ROWS: Final = 8
"""Products of no more rows than this read their weights and do little else."""


@dataclass(frozen=True, slots=True, eq=False)
class Joint:
    """One curve for the devices of a group.

    Parameters
    ----------
    recipe : Recipe
        How its kind is fitted.
    curve : Curve
        The parameters.
    option : object
        How the library cuts the work.
    n_parameters : int
        What was fitted.
    """

    recipe: Recipe
    curve: Curve
    option: Any
    n_parameters: int

    def scored(self, samples: Samples, hardware: HardwareProfile) -> Scored:
        """Return rows of a device under the curve."""
        measured = samples.measured_s
        times = self.recipe.prepare(samples, hardware, self.option)(self.curve) if len(measured) else np.zeros(0)
        return Scored(samples.work[self.recipe.size], measured, times)


@dataclass(frozen=True, slots=True, eq=False)
class LeftOut:
    """A device under the curve of the others.

    Parameters
    ----------
    device : str
        Which.
    residuals, test : Scored
        Its train and test rows.
    repaired : Scored or None
        The test rows after two figures of it have been given; of products alone.
    """

    device: str
    residuals: Scored
    test: Scored
    repaired: Scored | None


@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """What a group's devices share, and how far it carries.

    Parameters
    ----------
    group : Group
        Whose.
    joint : Joint
        Fitted to all of them.
    bands : Bands
        For a device that is not among them.
    left_out : mapping of str to tuple of SizeError
        Errors of each device under the curve of the others; the bands beside them and the coverage are those that the
        other devices alone give.
    repaired : mapping of str to float
        Median error after two figures of the device have been given.
    errors : tuple of SizeError
        Of all left-out devices together, by size, `all` last; rows are none where there is one device.
    beyond : mapping of str to tuple of SizeError
        Errors of devices unlike those of the group under the shared curve, within the band for such devices.
    """

    group: Group
    joint: Joint
    bands: Bands
    left_out: Mapping[str, tuple[SizeError, ...]]
    repaired: Mapping[str, float]
    errors: tuple[SizeError, ...]
    beyond: Mapping[str, tuple[SizeError, ...]] = field(default_factory=dict)


def with_beyond(shared: Shared, hardware: HardwareProfile, samples: Samples) -> Shared:
    """Return what a group shares with the errors of a device unlike its own, all rows of which are unseen."""
    recipe = shared.joint.recipe
    scored = shared.joint.scored(samples, hardware)
    power = band_power(hardware)
    bands = Bands(shared.bands.by_size * power, shared.bands.of_all * power)
    errors = errors_within(bands, scored, bands.inside(scored, recipe.edges), recipe.edges, recipe.labels)
    return replace(shared, beyond={**shared.beyond, hardware.name: errors})


def transfer(found: Iterable[Group]) -> Iterator[Shared]:
    """Yield what each group shares.

    A group of one device has nothing to leave out. It takes the widest band of groups of its kind, those whose name is
    nearest, and comes last.

    Parameters
    ----------
    found : iterable of Group
        All-reduces of NCCL before those that need them.
    """
    rings: dict[tuple[str, ...], Curve] = {}
    lone, several = [], []
    for group in found:
        if len(group.members) == 1:
            lone.append((group, _joint(group, rings)))
        else:
            shared = _shared(group, rings)
            several.append(shared)
            yield shared
    for group, joint in lone:
        yield _alone(group, joint, several)


def _shared(group: Group, rings: dict[tuple[str, ...], Curve]) -> Shared:
    joint = _joint(group, rings)
    edges, labels = joint.recipe.edges, joint.recipe.labels
    parts = [_left_out(group, member, rings) for member in group.members]
    devices = len(group.members)
    bands = envelope([part.residuals for part in parts], edges, devices=devices)
    errors, inside = {}, []
    for part in parts:
        others = envelope([other.residuals for other in parts if other is not part], edges, devices=devices)
        inside.append(others.inside(part.test, edges))
        errors[part.device] = errors_within(others, part.test, inside[-1], edges, labels)
    return Shared(
        group=group,
        joint=joint,
        bands=bands,
        left_out=errors,
        repaired={part.device: _median(part.repaired) for part in parts if part.repaired is not None},
        errors=errors_within(bands, joined([part.test for part in parts]), np.concatenate(inside), edges, labels),
    )


def _median(scored: Scored) -> float:
    return float(np.median(np.abs(scored.predicted_s / scored.measured_s - 1)))


def _alone(group: Group, joint: Joint, several: Sequence[Shared]) -> Shared:
    """Return the constants of one device with the bands of its kind where devices were left out."""
    edges, labels = joint.recipe.edges, joint.recipe.labels
    (member,) = group.members
    own = quantiles(joint.scored(member.train, member.hardware), edges)
    alike = [(_likeness(group, shared.group), shared.bands) for shared in several if shared.group.kind == group.kind]
    closest = max((likeness for likeness, _ in alike), default=None)
    bands = widest([own, *(band for likeness, band in alike if likeness == closest)])
    none = Scored(np.zeros(0), np.zeros(0), np.zeros(0))
    errors = errors_within(bands, none, np.zeros(0, dtype=bool), edges, labels)
    return Shared(group, joint, bands, {}, {}, errors)


def _likeness(one: Group, other: Group) -> tuple[bool, int]:
    """Return whether two groups' kernels are both of Triton or both not, and how many parts of a name they share."""
    names, others = one.variant.split("."), other.variant.split(".")
    return (TRITON in names) == (TRITON in others), len(set(names) & set(others))


def _joint(group: Group, rings: dict[tuple[str, ...], Curve]) -> Joint:
    """Fit one curve to the train rows of all devices; what no device shows stays at its prior."""
    first = group.members[0]
    devices = tuple(sorted(member.hardware.name for member in group.members))
    algorithm, _, link = group.variant.partition(".")
    ring = rings.get((link, *devices))
    recipe = recipe_of(first.samples, {} if ring is None else {RING: ring})
    hidden = [recipe.fixed(member.samples, member.hardware) for member in group.members]
    shown = recipe.among_devices if len(devices) > 1 else {}
    names = set.intersection(*map(set, hidden)) - set(shown)
    fixed = {name: hidden[0][name] for name in hidden[0] if name in names}
    priors = {**recipe.priors(first.samples), **shown}
    measured = np.concatenate([member.train.measured_s for member in group.members])

    def fitted(option: object) -> tuple[Curve, float]:
        parts = [recipe.prepare(member.train, member.hardware, option) for member in group.members]
        return fit(recipe.curve, together(parts), measured, fixed=fixed, priors=priors)

    tried = [(*fitted(option), option) for option in recipe.options]
    curve, _, option = min(tried, key=lambda one: one[1])
    if group.library == "nccl" and f"{group.kind}.{algorithm}" == RING:
        rings[link, *devices] = curve
    return Joint(recipe, curve, option, len(scales(recipe.curve, fixed)))


def _left_out(group: Group, member: Member, rings: dict[tuple[str, ...], Curve]) -> LeftOut:
    hardware = member.hardware
    joint = _joint(group.without(hardware.name), rings)
    again = _repair(joint, member) if isinstance(joint.curve, GemmCurve) else None
    return LeftOut(
        device=hardware.name,
        residuals=joint.scored(member.train, hardware),
        test=joint.scored(member.test, hardware),
        repaired=None if again is None else again.scored(member.test, hardware),
    )


def _repair(joint: Joint, member: Member) -> Joint:
    """Set two shares from one large product of the train rows, and from the one that streams most weights."""
    work, measured = member.train.work, member.train.measured_s
    m, n, k = (work[name].astype(float) for name in ("m", "n", "k"))
    far = np.abs(np.log(np.stack([m, n, k]) / LARGE)).sum(axis=0)
    weights = np.where(m <= STREAM_ROWS, n * k, 0.0)
    large, stream = (
        Figure(rows=float(m[i]), d_in=float(k[i]), d_out=float(n[i]), time_s=float(measured[i]))
        for i in (int(far.argmin()), int(weights.argmax()))
    )
    bits = BITS[member.samples.variant]
    chip = Chip.of(member.hardware, bits)
    assert isinstance(joint.curve, GemmCurve)  # noqa: S101 - the caller asked
    curve = repaired(joint.curve, chip=chip, large=large, stream=stream, bytes_per_value=bits / 8)
    return replace(joint, curve=curve)
