"""`lvlm measure`: a model on a real device, as measurement lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from cyclopts import Parameter
from rich.console import Console

from studies import parse
from studies.options import FOR_PEOPLE, OUTPUT, Format, Texts, Whole
from studies.output import Answer, emit, note
from studies.tables import MISSING, percent, seconds, sections, table

if TYPE_CHECKING:
    from runtime.measurement import Measurement
    from runtime.utilisation import Utilised

SUFFIX: Final = ".jsonl"
COLUMNS: Final = ("implementation, stage", "request", "median", "samples", "MFU", "MBU")
EVERY: Final = ("stages", "microbench", "transformers")
REMARK: Final = (
    "MFU and MBU: FLOPs and bytes that the cost model counts, over the time, as shares of the peaks of {peaks}."
)

NO_PEAKS: Final = "No MFU and MBU: no profile names this device; measure kernels in the same run for its best rates."


def measure(
    model: str,
    /,
    *,
    output: Annotated[Path, Parameter(name=("--output", "-o"), group=OUTPUT)],
    device: str = "cpu",
    what: str = "stages,microbench",
    dtype: str | None = None,
    seconds_budget: Annotated[float, Parameter(name="--seconds")] = 60.0,
    image: Texts = ("640x480",),
    text: Whole = 64,
    batch: tuple[Whole, ...] = (1,),
    cold: bool = False,
    form: Format = FOR_PEOPLE,
) -> None:
    """Measure a model on a device: stages, kernels in its shapes, and transformers beside it.

    Weights are those of the folder, or random ones. Needs the extra `runtime`.

    Parameters
    ----------
    model : str
        A model, a config.json, a folder that holds one.
    output : Path
        Write the measurement lines into this file, .jsonl.
    device : str
        cpu, cuda or cuda:1.
    what : str
        Of stages, microbench and transformers, some or all, with commas.
    dtype : str
        fp32, bf16 or fp16; by default fp32 on a CPU and bf16 on a GPU.
    seconds_budget : float
        For all samples; it is passed a little, and building models comes on top.
    image : tuple of str
        An image of each request: its size. Repeat for several; none for text alone.
    text : int
        Text tokens of each request.
    batch : tuple of int
        Requests that run together. Repeat for several batches.
    cold : bool
        Empty the last cache before every sample of a kernel; such lines are fitted to no curve.
    """
    if output.suffix != SUFFIX or output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"cannot write {str(output)!r}; name a {SUFFIX} file in a folder that exists")
    try:
        from runtime import measure as measuring
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"lvlm measure needs {error.name}: pip install 'lvlm-sim[runtime]'") from None
    from runtime.requests import Request
    from runtime.utilisation import utilised

    images = tuple(parse.image(size) for size in image if size != "none")
    plan = measuring.Plan(
        model=model,
        device=device,
        dtype=dtype or ("fp32" if device == "cpu" else "bf16"),
        what=tuple(part.strip() for part in what.split(",")),
        requests=tuple(Request(images, text, size) for size in batch),
        seconds=seconds_budget,
        cold=cold,
    )
    lines = _taken(measuring.measure(plan, note))
    measuring.write_whole(output, lines)
    note(f"wrote {output}: {len(lines)} lines")
    found = utilised(lines)
    inputs = {"model": model, "device": device, "dtype": plan.dtype, "what": list(plan.what), "output": str(output)}
    rows = [_values(row) for row in found]
    values = {"lines": len(lines), "stages": rows}
    emit(Answer("measure", inputs, values, lambda: rows, lambda to: _show(to, found)), form)


def _taken(lines: Any) -> list[Measurement]:  # noqa: ANN401 - an iterator
    """Return the lines; at an interruption, those that were taken."""
    taken: list[Measurement] = []
    try:
        for line in lines:
            taken.append(line)
            note(f"{line.implementation} {line.kind} {_said(line)}: {seconds(line.median_s)}")
    except KeyboardInterrupt:
        if not taken:
            raise
        note("interrupted; what was measured so far is kept")
    return taken


def _said(line: Measurement) -> str:
    return ", ".join(f"{key} {value}" for key, value in line.shape.items() if key not in ("model", "file_bytes"))


def _values(row: Utilised) -> dict[str, Any]:
    line = row.line
    return {
        "implementation": line.implementation,
        "kind": line.kind,
        "shape": dict(line.shape),
        "median_s": line.median_s,
        "samples": len(line.samples_s),
        "peak_bytes": line.peak_bytes,
        "power_w": line.power_w,
        "mfu": row.mfu,
        "mbu": row.mbu,
        "peaks": row.peaks,
    }


def _show(to: Console, found: Sequence[Utilised]) -> None:
    if not found:
        to.print("No stage was measured; lvlm compare puts kernels beside their predictions.")
        return
    rows = [
        (
            f"{row.line.implementation} {row.line.kind}",
            _request(row.line),
            seconds(row.line.median_s),
            str(len(row.line.samples_s)),
            MISSING if row.mfu is None else percent(row.mfu),
            MISSING if row.mbu is None else percent(row.mbu),
        )
        for row in found
    ]
    remark = REMARK.format(peaks=found[0].peaks) if found[0].peaks else NO_PEAKS
    sections(to, table(COLUMNS, rows, left=2), remark)


def _request(line: Measurement) -> str:
    shape = line.shape
    images = [f"{pair[0]}x{pair[1]}" for pair in shape.get("images") or () if isinstance(pair, tuple)]  # type: ignore[union-attr]
    parts = [*images, f"text {shape['text_tokens']}", f"batch {shape['batch']}"]
    parts += [f"context {shape['context']}"] if "context" in shape else []
    return ", ".join([*parts, *(["graph"] if shape.get("graph") else [])])
