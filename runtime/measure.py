"""Measure a model on a device: stages, kernels in its shapes, `transformers` beside it, as measurement lines."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch

from costmodel.errors import DoesNotFit, first_line, unknown
from runtime import reference
from runtime.blueprint import load_blueprint
from runtime.device import DTYPES, device_name, dtype_of, facts, free_bytes, memory_guarded, open_device
from runtime.measurement import Measurement
from runtime.microbench import Bench, Case, cases
from runtime.model import Lvlm
from runtime.nvml import Nvml
from runtime.requests import Request
from runtime.settings import Blueprint
from runtime.staged import StageCase, stage_cases
from runtime.timing import LEAST, Stopwatch, Timing, clock_of
from runtime.weights import has_weights, load

WHAT: Final = ("stages", "microbench", "transformers")
PACKAGES: Final = ("torch", "transformers", "pillow", "numpy", "lvlm-sim")
SHARE_OF_MEMORY: Final = 0.4
"""Of the free memory, for the operands of one kernel."""
STAGES: Final = 6
"""Of a request, the decode step as a graph counted too; `transformers` has half of them in one call."""
LONGEST: Final = 5.0
"""A kernel is left out when its fewest samples would take this many times its part of the budget."""

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, and where.

    Parameters
    ----------
    model : str
        A model with a runtime: a name, a config.json, a folder.
    device, dtype : str
        Where and in which number format.
    what : tuple of str
        Of `WHAT`.
    requests : tuple of Request
        Whose stages are measured.
    seconds : float
        Budget for all samples [s]; it is passed a little, and by the building of models.
    cold : bool
        Whether kernels find an empty cache.
    """

    model: str
    device: str = "cpu"
    dtype: str = "bf16"
    what: tuple[str, ...] = ("stages", "microbench")
    requests: tuple[Request, ...] = (Request(),)
    seconds: float = 60.0
    cold: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be measured, before anything is."""
        for part in self.what:
            if part not in WHAT:
                raise unknown("part to measure", part, WHAT)
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if not self.seconds > 0:
            raise ValueError(f"seconds={self.seconds} must be above 0")
        if not (self.what and self.requests):
            raise ValueError("nothing to measure; name a part and a request")


@torch.inference_mode()
def measure(plan: Plan, report: Report = lambda _: None) -> Iterator[Measurement]:
    """Yield measurements as they are taken.

    Parameters
    ----------
    plan : Plan
    report : callable
        Is told, in a line, what is left out and why.

    Raises
    ------
    LookupError
        If a name is unknown, or the family of the model has no runtime.
    ValueError
        If the device is not there or the weights are broken.
    DoesNotFit
        If the weights exceed the free memory.
    """
    blueprint, device = load_blueprint(plan.model), open_device(plan.device)
    if "transformers" in plan.what:
        reference.check_installed()
    lines = Lines.of(device, plan.dtype)
    share_s = plan.seconds / len(plan.what)
    if "microbench" in plan.what:
        yield from _kernels(plan, blueprint, lines, share_s, report)
    if "stages" in plan.what or "transformers" in plan.what:
        model = load(blueprint, device, dtype_of(plan.dtype))
        report(f"weights of {blueprint.spec.name} are {'read' if has_weights(blueprint) else 'random'}")
        with memory_guarded(f"stages of {blueprint.spec.name} with such requests", device):
            if "stages" in plan.what:
                yield from _stages(plan, blueprint, model, lines, share_s)
            if "transformers" in plan.what:
                yield from _transformers(plan, blueprint, model, lines, share_s)


def _stages(plan: Plan, blueprint: Blueprint, model: Lvlm, lines: Lines, share_s: float) -> Iterator[Measurement]:
    """Yield the stages of every request."""
    watch = Stopwatch(model.device, budget_s=share_s / len(plan.requests) / STAGES)
    graph = model.device.type == "cuda"
    for request in plan.requests:
        for stage in stage_cases(model, blueprint, request, plan.model, graph=graph):
            yield lines.line(stage, watch.time(stage.action))


def _kernels(plan: Plan, blueprint: Blueprint, lines: Lines, share_s: float, report: Report) -> Iterator[Measurement]:
    """Yield kernels; what would outlast its part of the budget, or the memory, is left out."""
    device = open_device(plan.device)
    every = sorted(cases(blueprint, Bench(device, dtype_of(plan.dtype))), key=lambda case: (case.group, case.work))
    left: dict[str, int] = {}
    watch = Stopwatch(device, budget_s=0.0, cold=plan.cold)
    rate: dict[str, float] = {}  # seconds a unit of work of the last case of each group, which was smaller
    started = time.perf_counter()
    for number, case in enumerate(every):
        remaining_s = share_s - (time.perf_counter() - started)
        watch.budget_s = max(remaining_s, 0.0) / (len(every) - number)
        too_long = rate.get(case.group, 0.0) * case.work * LEAST > LONGEST * share_s / len(every)
        if (too_long and not case.needed) or case.nbytes > SHARE_OF_MEMORY * free_bytes(device):
            left[case.kind] = left.get(case.kind, 0) + 1
            continue
        try:
            with memory_guarded(case.kind, device):
                timing = watch.time(case.prepare(), repeatable=case.repeatable)
        except (DoesNotFit, NotImplementedError) as error:
            report(f"left out {case.kind} {dict(case.shape)}: {first_line(error)}")
            continue
        rate[case.group] = min(timing.samples_s) / case.work
        yield lines.line(case, timing, cold=plan.cold)
    if left:
        counts = ", ".join(f"{n} {kind}" for kind, n in left.items())
        report(f"left out for the budget of {share_s:.0f} s, or for memory: {counts}")


def _transformers(plan: Plan, blueprint: Blueprint, ours: Lvlm, lines: Lines, share_s: float) -> Iterator[Measurement]:
    model = reference.load_reference(blueprint, ours.device, ours.dtype)
    watch = Stopwatch(ours.device, budget_s=2 * share_s / len(plan.requests) / STAGES)
    for request in plan.requests:
        for stage, clock in reference.reference_cases(model, ours, blueprint, request, plan.model):
            timing = watch.time(stage.action)
            if clock is None:
                yield lines.line(stage, timing)
                continue
            adapted_s = tuple(clock.calls_s[-len(timing.samples_s) :])
            encoded_s = tuple(max(a - b, 1e-9) for a, b in zip(timing.samples_s, adapted_s, strict=True))
            yield lines.line(stage, replace(timing, samples_s=encoded_s))
            yield lines.line(replace(stage, kind="adapt"), replace(timing, samples_s=adapted_s, peak_bytes=None))


@dataclass(frozen=True, slots=True)
class Lines:
    """What all lines of a run say: the device, its driver, versions, the commit."""

    precision: str
    device: str
    driver: str | None
    versions: Mapping[str, str]
    commit: str | None
    facts: Mapping[str, float]

    @staticmethod
    def of(device: torch.device, dtype: str) -> Lines:
        """Ask the device."""
        nvml = Nvml.of(device)
        power = {"tdp_w": nvml.tdp_w} if nvml and nvml.tdp_w else {}
        driver = nvml.driver if nvml else None
        return Lines(dtype, device_name(device), driver, versions(device), commit(), {**facts(device), **power})

    def line(self, case: Case | StageCase, timing: Timing, *, cold: bool = False) -> Measurement:
        """Return the line of a case."""
        clock = {"clock_hz": timing.clock_hz} if timing.clock_hz else {}
        host = case.kind == "preprocess"
        return Measurement(
            schema_version=1,
            kind=case.kind,  # type: ignore[arg-type]
            implementation=case.implementation,
            shape=_frozen({**case.shape, **({"cold": True} if cold else {})}),
            precision="fp32" if host else self.precision,
            samples_s=timing.samples_s,
            peak_bytes=None if host else timing.peak_bytes,
            power_w=None if host else timing.power_w,
            device=self.device,
            driver=self.driver,
            versions=dict(self.versions),
            commit=self.commit,
            clocks={**self.facts, **clock},
            taken_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def _frozen(shape: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(map(tuple, value)) if key == "images" else value for key, value in shape.items()}


def versions(device: torch.device) -> dict[str, str]:
    """Return versions of the software by name, which clock times, and the threads of the host."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found |= {"clock": clock_of(device), "threads": str(torch.get_num_threads())}
    return found | ({"cuda": str(torch.version.cuda)} if device.type == "cuda" else {})


def commit() -> str | None:
    """Return the commit of this repository, if this is one."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)  # noqa: S603
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def write_whole(path: Path, measurements: Iterable[Measurement]) -> None:
    """Write measurements into a file that is there whole or not at all."""
    from runtime.measurement import write_measurements

    part = path.with_name(f".{path.name}.part")
    try:
        write_measurements(part, tuple(measurements))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
