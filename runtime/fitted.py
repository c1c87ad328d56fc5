"""Write fits as files: one a device and kernel library, with their data, errors and bands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from costmodel.base import Frozen
from costmodel.efficiency import Curve, NcclCurve, Tiling
from costmodel.efficiency.fitted import FittedProfile
from runtime.calibrate import Fit
from runtime.fitting import Scored, SizeError
from runtime.measurement import read_measurements
from runtime.recipes import recipe_of
from runtime.transfer import Shared

DIGITS: Final = 4
SHARED: Final = "shared"
"""Stands for the device in files of curves that several devices share."""
UNSEEN: Final = ("rows", "median", "mean", "p90", "bias", "coverage")
ROWS: Final = ("sizes", "left_out", "beyond")
"""Entries of a curve that are written one a line."""
HEAD: Final = """# Written by `lvlm calibrate`: edit nothing, fit again. Errors are those of held-out shape families.
# Constants are in clock cycles, FLOP per byte and shares of datasheet rates; see costmodel/efficiency.
"""


class DataSource(Frozen):
    """Where a folder of tables is from, as a file SOURCE.txt in or above it says.

    Parameters
    ----------
    title, url, commit, licence : str
        Empty where nothing is said.
    """

    title: str
    url: str = ""
    commit: str = ""
    licence: str = ""


def data_source(folder: Path) -> DataSource:
    """Return where a folder of tables, or a file of measurement lines, is from."""
    if folder.is_file():
        return _lines_source(folder)
    for parent in (folder.resolve(), *folder.resolve().parents):
        file = parent / "SOURCE.txt"
        if file.is_file():
            lines = (line.partition(":") for line in file.read_text(encoding="utf-8").splitlines())
            said = {key.strip(): value.strip() for key, _, value in lines}
            url = said.get("source repository", "")
            title = f"{url.rstrip('/').rpartition('/')[2] or parent.name} kernel tables, {folder.name}"
            return DataSource(
                title=title, url=url, commit=said.get("commit", ""), licence=said.get("licence", "").partition(" (")[0]
            )
    return DataSource(title=f"tables in {folder.name}")


def _lines_source(file: Path) -> DataSource:
    lines = read_measurements(file)
    commits = sorted({line.commit for line in lines if line.commit})
    days = sorted({line.taken_at.partition("T")[0] for line in lines})
    taken = " to ".join(dict.fromkeys((days[0], days[-1])))
    title = f"measurement lines {file.name} of {lines[0].device}, taken {taken}"
    return DataSource(title=title, commit=", ".join(commits), licence="own measurement")


def profile_of(
    fits: Sequence[Fit],
    *,
    device: str,
    library: str,
    sources: Sequence[DataSource],
    fitted_on: str,
    split: str,
    seed: int,
) -> dict[str, Any]:
    """Return what the file of one library holds, checked.

    Parameters
    ----------
    fits : sequence of Fit
        Of this library.
    device, library : str
        Whose they are.
    sources : sequence of DataSource
        Of the tables.
    fitted_on : str
        Date.
    split : str
        The rule by which families were held out.
    seed : int
        Of the rows that were drawn.
    """
    values = {
        "schema_version": 1,
        "device": device,
        "library": library,
        "fitted_on": fitted_on,
        "seed": seed,
        "split": split,
        "sources": [
            {
                "kind": "measured",
                "title": source.title,
                "url": source.url,
                "note": f"commit {source.commit or 'unknown'}, {source.licence or 'licence unknown'}",
                "covers": ["curves.*"],
            }
            for source in sources
        ],
        "curves": [_curve(fit) for fit in fits],
    }
    FittedProfile.model_validate(values)
    return values


def shared_profile(several: Sequence[Shared], *, library: str, fitted_on: str, split: str, seed: int) -> dict[str, Any]:
    """Return what the file of the curves that devices share holds, checked; see `profile_of`."""
    members = [member for shared in several for member in shared.group.members]
    origins = dict.fromkeys(origin for member in members for origin in member.samples.origins)
    sources = list(dict.fromkeys(data_source(origin) for origin in origins))
    values = profile_of(
        [_pooled(shared) for shared in several],
        device=SHARED,
        library=library,
        sources=sources,
        fitted_on=fitted_on,
        split=split,
        seed=seed,
    )
    for curve, shared in zip(values["curves"], several, strict=True):
        curve["devices"] = [member.hardware.name for member in shared.group.members]
        for key, found in (("left_out", shared.left_out), ("beyond", shared.beyond)):
            if found:
                curve[key] = [_unseen(device, rows[-1], shared.repaired.get(device)) for device, rows in found.items()]
    FittedProfile.model_validate(values)
    return values


def _pooled(shared: Shared) -> Fit:
    """Return a shared curve as a fit of all rows of its devices."""
    members = shared.group.members
    versions = sorted({member.samples.version for member in members} - {""})
    samples = replace(
        members[0].samples,
        variant=shared.group.variant,
        version=", ".join(versions),
        measured_s=np.concatenate([member.samples.measured_s for member in members]),
    )
    none = np.zeros(0)
    return Fit(
        samples=samples,
        curve=shared.joint.curve,
        option=shared.joint.option,
        n_parameters=shared.joint.n_parameters,
        n_train=sum(len(member.train.measured_s) for member in members),
        n_families=max(member.families for member in members),
        test=Scored(none, none, none),
        errors=shared.errors,
    )


def _unseen(device: str, error: SizeError, repaired: float | None) -> dict[str, Any]:
    found = _size(error, None)
    values: dict[str, Any] = {"device": device}
    values |= {key: found[key] for key in UNSEEN if key in found}
    return values if repaired is None else {**values, "repaired": round(repaired, DIGITS)}


def _curve(fit: Fit) -> dict[str, Any]:
    samples, option = fit.samples, fit.option
    recipe = recipe_of(samples, {})
    values: dict[str, Any] = {
        "kind": samples.kind,
        "variant": samples.variant,
        "version": samples.version,
        "rows": len(samples.measured_s),
        "train_rows": fit.n_train,
        "train_families": fit.n_families,
        "fitted_parameters": fit.n_parameters,
        "by": recipe.size,
    }
    if isinstance(option, Tiling):
        values |= {"query_tiles": list(option.query_tiles), "packed": option.packed, "pad": option.pad}
    values["parameters"] = _rounded(fit.curve)
    if isinstance(option, NcclCurve):
        values["ring"] = _rounded(option)
    ends = (*recipe.edges, None, None)
    values["sizes"] = [_size(error, end) for error, end in zip(fit.errors, ends, strict=True)]
    return values


def _rounded(curve: Curve) -> dict[str, float]:
    return {name: _digits(value) for name, value in curve.model_dump().items()}


def _digits(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _size(error: SizeError, end: float | None) -> dict[str, Any]:
    values = {
        key: value for key, value in asdict(error).items() if not (isinstance(value, float) and math.isnan(value))
    }
    rounded = {key: round(value, DIGITS) if isinstance(value, float) else value for key, value in values.items()}
    return {"size": rounded.pop("size"), **({} if end is None else {"up_to": end}), **rounded}


def to_toml(values: dict[str, Any], head: str = HEAD) -> str:
    """Return a profile as text, with one line a range of sizes, under comments that say what it is."""
    import tomlkit

    document = tomlkit.document()
    for key, value in values.items():
        if key not in ("sources", "curves"):
            document.add(key, value)
    for key in ("sources", "curves"):
        tables = tomlkit.aot()
        for entry in values[key]:
            tables.append(_table(entry))
        document.add(key, tables)
    return head + tomlkit.dumps(document)


def _table(entry: dict[str, Any]) -> Any:  # noqa: ANN401 - tomlkit has a type for every shape
    import tomlkit

    table = tomlkit.table()
    for key, value in entry.items():
        if key in ROWS:
            rows = tomlkit.array()
            for row in value:
                inline = tomlkit.inline_table()
                inline.update(row)
                rows.append(inline)
            table.add(key, rows.multiline(multiline=True))
        else:
            table.add(key, value)
    return table
