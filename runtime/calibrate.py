"""Fit the curves of `costmodel.efficiency` to measured kernel times, and say how well they predict held-out shapes."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from costmodel.efficiency import Curve, NcclCurve, Tiling
from costmodel.efficiency.fitted import FittedCurve
from costmodel.errors import Unsupported
from costmodel.hardware import HardwareProfile
from runtime.fitting import Bands, Scored, SizeError, errors, errors_within, fit, joined, scales
from runtime.lines import kernel_samples, one_device
from runtime.measurement import Measurement, measurement_files, read_measurements
from runtime.profiles import read_llmcompass, read_vidur
from runtime.recipes import BITS, RING, Recipe, recipe_of
from runtime.tables import Samples, read_aiconfigurator

IsTest: TypeAlias = Callable[[str, Sequence[int | str]], bool]
"""Whether a family of a group is held out; see `studies.validation.split`."""
Rows: TypeAlias = NDArray[np.intp]

MOST_TRAIN: Final = 1500
MOST_TEST: Final = 6000
"""Rows that are drawn of each side."""
FEWEST_TRAIN: Final = 12


FEW_FAMILIES: Final = range(4, 41)
"""With so few families in the fit, its residuals are narrower than those of a new one: bands are from folds of them."""
FOLDS: Final = 5


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """A fitted curve and its errors.

    Parameters
    ----------
    samples : Samples
        The rows that it is from, all of them.
    curve : Curve
        The parameters.
    option : object
        The way in which the library cuts the work, where there is a choice.
    n_parameters, n_train, n_families : int
        What was fitted, rows that it was fitted to, and their families.
    test : Scored
        Drawn rows of the other side of the split, under the curve.
    errors : tuple of SizeError
        Of the test rows by size, `all` last; without any where the split holds no family out.
    """

    samples: Samples
    curve: Curve
    option: Any
    n_parameters: int
    n_train: int
    n_families: int
    test: Scored
    errors: tuple[SizeError, ...]


def read(paths: Sequence[Path], device: str) -> list[Samples]:
    """Return the samples of all known files.

    Parameters
    ----------
    paths : sequence of Path
        Folders of one device each, with tables of aiconfigurator, Vidur or LLMCompass or with measurement lines, and
        files of measurement lines.
    device : str
        Its name, which chooses among files that name their device.

    Raises
    ------
    FileNotFoundError
        If a path leads nowhere, or a folder holds no file that is known.
    ValueError
        If a file is not what its name says, or a table and lines hold the same kernels.
    """
    found: list[Samples] = []
    for path in paths:
        here: list[Samples] = []
        if path.is_dir():
            here += [*read_aiconfigurator(path), *read_vidur(path), *read_llmcompass(path, device)]
        if not here and not measurement_files([path]):
            raise FileNotFoundError(f"{str(path)!r} holds no table that is known, such as gemm_perf.parquet, nor lines")
        found += [replace(samples, origins=(path,)) for samples in here]
    files = measurement_files(paths)
    from_lines = kernel_samples(read_lines(paths), files)
    twice = sorted({f"{one.library} {one.name}" for one in found} & {f"{one.library} {one.name}" for one in from_lines})
    if twice:
        raise ValueError(f"tables and lines both hold {twice[0]}; fit them one by one")
    return [*_published_once(found), *from_lines]


def read_lines(paths: Iterable[Path]) -> list[Measurement]:
    """Return the measurement lines among files and in folders, which must be of one device."""
    lines = [line for file in measurement_files(paths) for line in read_measurements(file)]
    if lines:
        one_device(lines)
    return lines


def why_not(samples: Iterable[Samples], fits: Iterable[Fit], hardware: HardwareProfile) -> list[str]:
    """Return which samples have no fit and why, one text each."""
    done = {(fit.samples.library, fit.samples.name) for fit in fits}
    left = [one for one in samples if (one.library, one.name) not in done]
    return [f"{one.library} {one.name} ({_obstacle(one, hardware) or _too_few(one)})" for one in left]


def _too_few(samples: Samples) -> str:
    rows = len(samples.measured_s)
    return f"{rows} row{'s' * (rows != 1)}: fewer than {FEWEST_TRAIN} that are not held out"


def _obstacle(samples: Samples, hardware: HardwareProfile) -> str:
    """Return what keeps samples from a fit on this device: a link or number format that it has not; or nothing."""
    try:
        if samples.kind == "collective":
            hardware.link(int(samples.work["ranks"].max()))
        if samples.kind == "gemm":
            hardware.precision(BITS[samples.variant.partition(".")[0]])
    except Unsupported as error:
        return str(error).partition(";")[0]
    return ""


def _published_once(found: Iterable[Samples]) -> list[Samples]:
    """Leave out collectives that a library published again with the same times."""
    seen: set[bytes] = set()
    kept = []
    for samples in found:
        mark = np.sort(samples.measured_s).tobytes()
        if samples.kind != "collective" or mark not in seen:
            kept.append(samples)
        seen.add(mark)
    return kept


def calibrate(
    hardware: HardwareProfile, samples: Iterable[Samples], *, is_test: IsTest, seed: int = 0
) -> Iterator[Fit]:
    """Yield a fit of every kind, variant and library that has rows enough and that the device can run.

    Parameters
    ----------
    hardware : HardwareProfile
        The device that was measured.
    samples : iterable of Samples
        Its rows.
    is_test : callable
        The split.
    seed : int
        Of the rows that are drawn.
    """
    fitted: dict[str, Curve] = {}
    for some in sorted(samples, key=lambda one: one.variant == "custom_all_reduce"):  # these need NCCL's curve
        if _obstacle(some, hardware):
            continue
        recipe = recipe_of(some, fitted)
        rows, families = _sides(some, recipe, is_test, seed)
        if len(rows[0]) >= FEWEST_TRAIN:
            found = _fit(hardware, some, recipe, rows, families)
            if some.library == "nccl":
                fitted[some.name] = found.curve
            yield found


def _fit(hardware: HardwareProfile, samples: Samples, recipe: Recipe, sides: Sequence[Rows], families: Rows) -> Fit:
    """Fit one curve to the rows of the train side, and score it on those of the test side."""
    train, test = (samples.take(rows) for rows in sides)
    fixed, priors = recipe.fixed(samples, hardware), recipe.priors(samples)

    def fitted(some: Samples, option: object) -> tuple[Curve, float]:
        predict = recipe.prepare(some, hardware, option)
        return fit(recipe.curve, predict, some.measured_s, fixed=fixed, priors=priors)

    def scored(some: Samples, curve: Curve) -> Scored:
        none = np.zeros(0)
        predicted = recipe.prepare(some, hardware, option)(curve) if len(some.measured_s) else none
        return Scored(some.work[recipe.size], some.measured_s, predicted)

    tried = [(*fitted(train, option), option) for option in recipe.options]
    curve, _, option = min(tried, key=lambda one: one[1])
    of_train = families[sides[0]]
    kept = np.unique(of_train)
    residuals = scored(train, curve)
    if len(kept) in FEW_FAMILIES:
        parts = [np.isin(of_train, kept[i::FOLDS]) for i in range(min(FOLDS, len(kept)))]
        residuals = joined([scored(train.take(part), fitted(train.take(~part), option)[0]) for part in parts])
    of_test = scored(test, curve)
    return Fit(
        samples=samples,
        curve=curve,
        option=option,
        n_parameters=len(scales(recipe.curve, fixed)),
        n_train=len(sides[0]),
        n_families=len(kept),
        test=of_test,
        errors=errors(residuals, of_test, recipe.edges, recipe.labels),
    )


def score(
    hardware: HardwareProfile, samples: Samples, fitted: FittedCurve, *, is_test: IsTest, seed: int = 0
) -> tuple[SizeError, ...]:
    """Return the errors of a curve that was fitted before, and the share inside its bands, on held-out rows.

    Parameters
    ----------
    hardware : HardwareProfile
        The device that was measured.
    samples : Samples
        Its rows; the same as of the fit, or new ones.
    fitted : FittedCurve
        The curve, with its bands by size.
    is_test, seed
        As for `calibrate`.
    """
    recipe = recipe_of(samples, {RING: NcclCurve(**fitted.ring)} if fitted.ring else {})
    option = fitted.tiling() if isinstance(recipe.options[0], Tiling) else recipe.options[0]
    (_, held_out), _ = _sides(samples, recipe, is_test, seed)
    test = samples.take(held_out)
    predicted = recipe.prepare(test, hardware, option)(fitted.curve()) if len(held_out) else np.zeros(0)
    scored = Scored(test.work[recipe.size], test.measured_s, predicted)
    stated = np.log1p([(size.low, size.high) for size in fitted.sizes])
    bands = Bands(stated[:-1], stated[-1])
    return errors_within(bands, scored, bands.inside(scored, recipe.edges), recipe.edges, recipe.labels)


def _sides(samples: Samples, recipe: Recipe, is_test: IsTest, seed: int) -> tuple[list[Rows], Rows]:
    """Return the rows that are drawn for the fit and for the test, and the number of each row's family."""
    families, verdicts = families_of(samples, recipe, is_test)
    held_out = verdicts[families]
    rows = [drawn(samples, side, most, seed) for side, most in ((~held_out, MOST_TRAIN), (held_out, MOST_TEST))]
    return rows, families


def families_of(samples: Samples, recipe: Recipe, is_test: IsTest) -> tuple[Rows, NDArray[np.bool_]]:
    """Return the number of each row's family, and which families are held out."""
    columns = [samples.work[name] for name in recipe.family]
    codes = np.stack([np.unique(column, return_inverse=True)[1] for column in columns])
    _, first, inverse = np.unique(codes, axis=1, return_index=True, return_inverse=True)
    verdicts = [is_test(recipe.group, [column[row].item() for column in columns]) for row in first]
    return inverse.ravel(), np.array(verdicts, dtype=bool)


def drawn(samples: Samples, side: NDArray[np.bool_], most: int, seed: int) -> Rows:
    """Return at most so many rows of one side, drawn without replacement by a seed of their own."""
    rows = np.flatnonzero(side)
    if len(rows) > most:
        own = zlib.crc32(f"{seed}:{samples.library}:{samples.name}".encode())
        rows = np.sort(np.random.default_rng(own).choice(rows, most, replace=False))
    return rows
