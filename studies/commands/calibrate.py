"""`lvlm calibrate`: fit the efficiency curves of a device to measured kernels."""

from __future__ import annotations

import datetime as dt
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from costmodel import load_hardware
from studies import new_device
from studies.options import FOR_PEOPLE, OUTPUT, Flag, Format, Texts
from studies.output import Answer, emit, note
from studies.tables import percent, table
from studies.validation.split import is_test, rule

if TYPE_CHECKING:
    from costmodel.hardware import HardwareProfile
    from runtime.calibrate import Fit

COLUMNS = ("library, kind", "size", "rows", "median", "mean", "p90", "bias", "band", "covered")
MISSING = "-"
SEED = 0
NEW = "new:"


def calibrate(
    hardware: str,
    /,
    *,
    tables: Annotated[tuple[Path, ...], Parameter(name="--from")],
    output: Annotated[Path, Parameter(name=("--output", "-o"), group=OUTPUT)],
    library: str | None = None,
    facts: Annotated[Texts, Parameter(name="--set")] = (),
    form: Format = FOR_PEOPLE,
    figure: Annotated[Flag, Parameter(group=OUTPUT)] = False,
) -> None:
    """Fit the efficiency curves of a device to measured kernels, and show the error on shapes that were held out.

    Reads measurement lines (JSON lines), and the tables of aiconfigurator (Parquet), Vidur and LLMCompass (CSV), which
    need the extra `data`. `new:NAME` writes the profile of a device that has none, from its lines, and its curves
    beside it.

    Parameters
    ----------
    hardware : str
        A device, or the path of a TOML file: the one that was measured. Or new:NAME.
    tables : tuple of Path
        A file of measurement lines of this device, or a folder of tables or lines. Repeat for several.
    output : Path
        Write the fitted curves into this file, .toml, or one file a kernel library into this folder. Of a new device,
        write its profile into this file.
    library : str
        Fit this kernel library alone.
    facts : tuple of str
        Numbers of a new device that its lines do not show, key=value,... such as memory_bytes=80e9,core_count=132.
    figure : bool
        Draw measured against predicted times beside each file: .svg.
    """
    _check(output)
    is_new = hardware.startswith(NEW)
    if facts and not is_new:
        raise ValueError(f"--set describes a new device; change a known one as {hardware}:key=value")
    written: list[Path] = []
    if is_new:
        written = [new_device.write(hardware.removeprefix(NEW), tables, facts, output)]
        output = written[0].parent
    device = load_hardware(str(written[0]) if is_new else hardware)
    fits = _fits(device, tables, library, may_be_none=is_new)
    files = _files(fits, device.name, output)
    for path, some in files.items():
        _write(path, some, device.name)
        if figure:
            _draw(path.with_suffix(".svg"), some, device.name)
    inputs = {"hardware": device.name, "from": [str(folder) for folder in tables], "library": library}
    values = {"files": [str(path) for path in (*written, *files)], "fits": [_values(fit) for fit in fits]}
    emit(Answer("calibrate", inputs, values, lambda: _rows(fits), lambda to: _show(to, fits)), form)


def _check(output: Path) -> None:
    """Refuse a place that nothing can be written to, before the work is done."""
    is_file = output.suffix == ".toml" and not output.is_dir() and output.parent.is_dir()
    if not is_file and not output.is_dir():
        raise ValueError(f"cannot write {str(output)!r}; name a .toml file in a folder that exists, or a folder")


def _fits(
    device: HardwareProfile, tables: Sequence[Path], library: str | None, *, may_be_none: bool = False
) -> list[Fit]:
    try:
        from runtime import calibrate as fitting
        from runtime.lines import without_curve

        samples = fitting.read(tables, device.name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"lvlm calibrate needs {error.name}: pip install 'lvlm-sim[data]'") from None
    known = sorted({some.library for some in samples})
    if library is not None and library not in known:
        raise LookupError(f"unknown library {library!r} in these tables; known: {', '.join(known)}")
    wanted = [some for some in samples if library is None or some.library in (library, "nccl")]
    found = list(fitting.calibrate(device, wanted, is_test=is_test, seed=SEED))
    chosen = [fit for fit in found if library is None or fit.samples.library == library]
    asked = [some for some in wanted if library is None or some.library == library]
    left = fitting.why_not(asked, found, device) + without_curve(fitting.read_lines(tables))
    if not (chosen or may_be_none):
        raise ValueError(f"too few rows to fit in {', '.join(str(folder) for folder in tables)}: {', '.join(left)}")
    if left:
        note(f"not fitted: {', '.join(left)}")
    return sorted(chosen, key=lambda fit: (fit.samples.library, fit.samples.kind, fit.samples.variant))


def _files(fits: Sequence[Fit], device: str, output: Path) -> dict[Path, list[Fit]]:
    """Return which fits go into which file."""
    libraries = list(dict.fromkeys(fit.samples.library for fit in fits))
    if output.is_dir():
        return {
            output / f"{device}.{name}.toml": [fit for fit in fits if fit.samples.library == name] for name in libraries
        }
    if len(libraries) > 1:
        raise ValueError(f"the tables hold {', '.join(libraries)}; choose one with --library, or name a folder with -o")
    return {output: list(fits)}


def _write(path: Path, fits: Sequence[Fit], device: str) -> None:
    from runtime import fitted

    values = fitted.profile_of(
        fits,
        device=device,
        library=fits[0].samples.library,
        sources=[
            fitted.data_source(folder)
            for folder in dict.fromkeys(origin for fit in fits for origin in fit.samples.origins)
        ],
        fitted_on=dt.datetime.now(tz=dt.UTC).date().isoformat(),
        split=f"studies/validation/split.json, salt {rule()['salt']}",
        seed=SEED,
    )
    path.write_text(fitted.to_toml(values), encoding="utf-8")
    note(f"wrote {path}: {len(fits)} curves")


def _draw(path: Path, fits: Sequence[Fit], device: str) -> None:
    from studies import figures, scatter

    figures.save(scatter.measured_against_predicted(fits, device), path)
    note(f"wrote {path}")


def _values(fit: Fit) -> dict[str, Any]:
    samples = fit.samples
    return {
        "library": samples.library,
        "version": samples.version,
        "kind": samples.kind,
        "variant": samples.variant,
        "rows": len(samples.measured_s),
        "train_rows": fit.n_train,
        "train_families": fit.n_families,
        "fitted_parameters": fit.n_parameters,
        "parameters": fit.curve.model_dump(),
        "errors": [{key: _plain(value) for key, value in asdict(error).items()} for error in fit.errors],
    }


def _plain(value: object) -> object:
    return None if isinstance(value, float) and math.isnan(value) else value


def _rows(fits: Sequence[Fit]) -> list[dict[str, Any]]:
    return [
        {"library": fit.samples.library, "kind": fit.samples.name, **json.loads(json.dumps(error))}
        for fit in fits
        for error in _values(fit)["errors"]
    ]


def _label(fit: Fit) -> str:
    name = fit.samples.name.removeprefix("collective.").replace("_attention", "").replace("moe_gemm", "moe")
    return f"{fit.samples.library} {name}"


def _show(to: Console, fits: Sequence[Fit]) -> None:
    rows = []
    for fit in fits:
        for i, error in enumerate(reversed(fit.errors)):
            name = _label(fit) if i == 0 else ""
            shares = (error.median, error.mean, error.p90, error.bias)
            shown = [MISSING if math.isnan(share) else percent(share) for share in shares]
            band = f"{error.low:+.0%}/{error.high:+.0%}"
            covered = MISSING if math.isnan(error.coverage) else f"{error.coverage:.0%}"
            rows.append((name, error.size, f"{error.rows:,}", *shown, band, covered))
    to.print(table(COLUMNS, rows, left=2))
    to.print("Errors of |predicted/measured - 1| on families of shapes that were held out; - where none was.")
