"""On a CPU, from nothing: kernels are measured, a profile and curves are fitted to them, and two models are predicted.

No time of a model is in the fit, and no kernel of it has the size of one that is predicted. Each of two models (made
up, single precision, random weights) runs four requests; encode, prefill and a decode step are compared with `predict`.

Run by hand, from the root of the repository, with nothing else on the machine if possible::

    OMP_NUM_THREADS=1 python -m studies.validation.cpu
    python -m studies.validation.cpu --stored
    python -m studies.validation.cpu --smoke -o /tmp/smoke

`--stored` fits and predicts again from the lines that are there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from costmodel import Image, load_hardware
from costmodel.hardware import HardwareProfile
from studies.validation.cpu_kernels import kernels
from studies.validation.cpu_report import draw, page

if TYPE_CHECKING:
    from runtime.measurement import Measurement
    from runtime.requests import Request

FOLDER: Final = Path(__file__).parent
LINES: Final = FOLDER.parent / "measurements"
KERNELS, STAGED = "cpu-kernels.jsonl", "cpu-stages.jsonl"
NAME: Final = "study-cpu"
FACTS: Final = "kind=cpu,tdp_w=100"
"""What no line shows; the power is made up, and nothing here depends on it."""
STAGES: Final = ("encode", "prefill", "decode_step")
TARGET: Final = 0.20
"""Median error that is aimed at."""
KERNEL_S: Final = 0.01
"""Budget of the samples of one kernel [s]; three are taken whatever they last."""
STAGE_S: Final = 60.0
"""Budget of the samples of all stages of one model [s]."""
SMOKE_S: Final = 0.1
Sizes = tuple[tuple[tuple[int, int], ...], int, int]
"""Pictures, tokens of text, batch."""
REQUESTS: Final[Mapping[str, tuple[Sizes, ...]]] = {
    "small-lvlm": (
        (((256, 192),), 24, 1),
        (((448, 320),), 100, 2),
        (((640, 480),), 200, 1),
        (((320, 320), (320, 320)), 60, 4),
    ),
    "small-internvl": (
        (((300, 300),), 40, 1),
        (((600, 300),), 150, 1),
        (((224, 224),), 30, 3),
        (((900, 600),), 300, 1),
    ),
}
SMOKE_REQUESTS: Final[tuple[Sizes, ...]] = ((((64, 64),), 4, 1),)


def requests(model: str, *, smoke: bool = False) -> tuple[Request, ...]:
    """Return what is measured of a model."""
    from runtime.requests import Request

    sizes = SMOKE_REQUESTS if smoke else REQUESTS[model]
    return tuple(Request(tuple(Image(*size) for size in images), text, batch) for images, text, batch in sizes)


def kernel_lines(*, smoke: bool = False) -> Iterator[Measurement]:
    """Yield the measured kernels."""
    import torch

    from runtime.measure import Lines
    from runtime.microbench import Bench
    from runtime.timing import Stopwatch

    bench = Bench(torch.device("cpu"), torch.float32)
    lines, watch = Lines.of(bench.device, "fp32"), Stopwatch(bench.device, budget_s=0.0 if smoke else KERNEL_S)
    with torch.inference_mode():
        for case in kernels(bench, smoke=smoke):
            yield lines.line(case, watch.time(case.prepare(), repeatable=case.repeatable))


def stage_lines(model: str, *, smoke: bool = False) -> Iterator[Measurement]:
    """Yield the measured stages of the requests of a model."""
    from runtime.measure import Plan, measure

    path = os.path.relpath(FOLDER / model)
    seconds = SMOKE_S if smoke else STAGE_S
    plan = Plan(path, "cpu", "fp32", ("stages",), requests(model, smoke=smoke), seconds)
    yield from (line for line in measure(plan) if line.kind in STAGES)


def fitted(lines: Path, folder: Path) -> HardwareProfile:
    """Write the profile of the device and its curves with `lvlm calibrate`, and return the profile, which finds them.

    Raises
    ------
    RuntimeError
        If the command fails.
    """
    from studies.cli import main as lvlm

    path = folder / f"{NAME}.toml"
    arguments = ["calibrate", f"new:{NAME}", "--from", str(lines), "-o", str(path), "--set", FACTS, "--json"]
    with contextlib.redirect_stdout(io.StringIO()):
        code = lvlm(arguments)
    if code:
        raise RuntimeError(f"lvlm {' '.join(arguments)} failed with code {code}")
    return load_hardware(str(path))


def without_curves(hardware: HardwareProfile) -> HardwareProfile:
    """Return a device that has the same rates and no curves: then flat shares of an engine stand for kernels."""
    return HardwareProfile.model_validate(hardware.model_dump(exclude_unset=True))


def predicted_rows(lines: Sequence[Measurement], hardware: HardwareProfile) -> list[dict[str, Any]]:
    """Return every stage with its prediction, and with that of the same device without curves."""
    from runtime.compare import compare

    found, flat = compare(lines, hardware=hardware), compare(lines, hardware=without_curves(hardware))
    return [_row(line, row.predicted_s, bare.predicted_s) for line, row, bare in zip(lines, found, flat, strict=True)]


def _row(line: Measurement, predicted_s: float | None, flat_s: float | None) -> dict[str, Any]:
    assert predicted_s is not None  # noqa: S101 - stages of a request with a picture all take time
    assert flat_s is not None  # noqa: S101
    shape = line.shape
    return {
        "model": Path(str(shape["model"])).name,
        "stage": line.kind,
        "images": shape["images"],
        "text_tokens": shape["text_tokens"],
        "batch": shape["batch"],
        "samples": len(line.samples_s),
        "measured_s": line.median_s,
        "fastest_s": min(line.samples_s),
        "slowest_s": max(line.samples_s),
        "predicted_s": predicted_s,
        "error": predicted_s / line.median_s - 1,
        "flat_error": flat_s / line.median_s - 1,
    }


def medians(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, float]:
    """Return the median size of an error by stage, and of all."""
    found = {stage: median(abs(row[key]) for row in rows if row["stage"] == stage) for stage in STAGES}
    return {**found, "all": median(abs(row[key]) for row in rows)}


def fits(path: Path) -> list[dict[str, Any]]:
    """Return the curves of a fitted file: what they are, their parameters, and errors on families held out."""
    curves = tomllib.loads(path.read_text(encoding="utf-8"))["curves"]
    found = []
    for curve in curves:
        whole = next(size for size in curve["sizes"] if size["size"] == "all")
        errors = {"held_out": whole["rows"], "median": whole.get("median"), "bias": whole.get("bias")}
        names = ("kind", "variant", "rows", "train_rows", "parameters")
        found.append({**{name: curve[name] for name in names}, **errors})
    return found


def study(folder: Path, lines_folder: Path, *, smoke: bool = False) -> dict[str, Any]:
    """Measure, fit, predict, and return what is found; lines, profile and curves are written on the way.

    Parameters
    ----------
    folder, lines_folder : Path
        For the profile and its curves, and for the lines.
    smoke : bool
        Whether at the smallest size.
    """
    import torch

    from runtime.measure import write_whole

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that the clock is that of the processor
    try:
        load = os.getloadavg()[0]
        write_whole(lines_folder / KERNELS, kernel_lines(smoke=smoke))
        write_whole(lines_folder / STAGED, (line for model in REQUESTS for line in stage_lines(model, smoke=smoke)))
        load = max(load, os.getloadavg()[0])
    finally:
        torch.set_num_threads(threads)
    return judged(folder, lines_folder, smoke=smoke, load=load)


def judged(folder: Path, lines_folder: Path, *, smoke: bool, load: float) -> dict[str, Any]:
    """Fit to the kernels' lines of a folder, predict the stages' lines, and return what is found."""
    from runtime.measurement import read_measurements

    hardware = fitted(lines_folder / KERNELS, folder)
    stages = read_measurements(lines_folder / STAGED)
    return results(hardware, stages, fits(folder / f"{NAME}.torch.toml"), smoke=smoke, load=load)


def results(
    hardware: HardwareProfile,
    lines: Sequence[Measurement],
    curves: Sequence[Mapping[str, Any]],
    *,
    smoke: bool,
    load: float,
) -> dict[str, Any]:
    """Return what the study says, as its JSON has it."""
    rows = predicted_rows(lines, hardware)
    line = lines[0]
    return {
        "schema_version": 1,
        "smoke": smoke,
        "device": line.device,
        "clock": line.versions["clock"],
        "threads": int(line.versions["threads"]),
        "versions": dict(line.versions),
        "taken_at": line.taken_at,
        "load_average": load,
        "cores": os.cpu_count(),
        "target": TARGET,
        "peak_flops_per_s": hardware.peak_flops_per_s["fp32"],
        "memory_bandwidth_bytes_per_s": hardware.memory_bandwidth_bytes_per_s,
        "median_error": medians(rows, "error"),
        "median_flat_error": medians(rows, "flat_error"),
        "fits": list(curves),
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and write its files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="folder for all files; by default beside this script")
    parser.add_argument("--smoke", action="store_true", help="few kernels, one tiny request a model")
    parser.add_argument("--stored", action="store_true", help="measure nothing: use the lines that are there")
    options = parser.parse_args(arguments)
    folder: Path = options.output or FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    lines = options.output or LINES
    if options.stored:
        before = json.loads((folder / "cpu.json").read_text(encoding="utf-8"))
        found = judged(folder, lines, smoke=before["smoke"], load=before["load_average"])
    else:
        found = study(folder, lines, smoke=options.smoke)
    (folder / "cpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (folder / "cpu.md").write_text(page(found), encoding="utf-8")
    draw(found, folder / "cpu.svg")
    print(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
