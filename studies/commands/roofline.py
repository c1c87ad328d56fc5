"""`lvlm roofline`: every stage and operator under the roofs of the device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from costmodel import Prediction
from costmodel.report import stage_dict
from costmodel.stage_cost import OperatorCost
from studies.options import FOR_PEOPLE, ONE_DEVICE, OUTPUT, TEXT_PROMPT, Format, Prompt, Serving
from studies.output import Answer, emit, note
from studies.request import Request, describe, predict_request, serving_inputs
from studies.roofs import Roof, device_stages, operator_bits, rate_flops_per_s, roofs
from studies.tables import GB, MS, TERA, number, percent, sections, table

SUFFIXES = (".svg", ".png", ".pdf")
COLUMNS = ("stage, operator", "ms", "share", "TFLOP", "GB", "FLOP/byte", "ridge", "TFLOP/s", "bound")


def roofline(
    model: str,
    hardware: str,
    /,
    *,
    prompt: Prompt = TEXT_PROMPT,
    serving: Serving = ONE_DEVICE,
    form: Format = FOR_PEOPLE,
    figure: Annotated[Path | None, Parameter(name=("--figure", "-o"), group=OUTPUT)] = None,
) -> None:
    """Show every stage and operator under the roofs of the device.

    Parameters
    ----------
    model : str
        A model, a config.json, a folder that holds one, or a hub id.
    hardware : str
        A device, the path of a TOML file, or name:key=value,... for a what-if.
    figure : Path
        Draw it into this file: .svg, .png or .pdf.
    """
    if figure is not None:
        _check(figure)
    request = Request.of(model, prompt, serving.output)
    prediction = predict_request(request, hardware, serving)
    if figure is not None:
        from studies import figures  # half a second of matplotlib

        figures.save(figures.roofline(prediction, describe(prediction, request)), figure)
        note(f"wrote {figure}")
    if not prediction.fits:
        note("the model does not fit on the device: the roofs are those of a device with more memory")
    inputs = serving_inputs(request, hardware, serving)
    answer = Answer(
        "roofline", inputs, _values(prediction), lambda: _rows(prediction), lambda to: _show(to, prediction, request)
    )
    emit(answer, form)


def _check(path: Path) -> None:
    """Refuse a file that no figure can be written to, before the work is done."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"cannot draw into {str(path)!r}; use a name that ends in {', '.join(SUFFIXES)}")
    if path.is_dir() or not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {str(path)!r}: its folder must exist, and it must be no folder itself")


def _values(prediction: Prediction) -> dict[str, Any]:
    stages = device_stages(prediction)
    return {
        "memory_bandwidth_bytes_per_s": prediction.hardware.memory_bandwidth_bytes_per_s,
        "roofs": {
            roof.name: {"flops_per_s": roof.peak_flops_per_s, "ridge_flops_per_byte": roof.ridge_flops_per_byte}
            for roof in roofs(prediction)
        },
        "stages": {name: stage_dict(name, stage) for name, stage in stages.items()},
        "operators": _rows(prediction),
    }


def _rows(prediction: Prediction) -> list[dict[str, Any]]:
    rows = []
    for name, stage in device_stages(prediction).items():
        bits = operator_bits(stage)
        rows += [
            {
                "stage": name,
                "operator": operator.name,
                "kind": operator.kind,
                "time_s": operator.time_s,
                "flops": operator.flops,
                "bytes": operator.bytes,
                "intensity_flops_per_byte": operator.intensity_flops_per_byte,
                "flops_per_s": rate_flops_per_s(operator),
                "ridge_flops_per_byte": Roof.of(prediction.hardware, bits[operator.name]).ridge_flops_per_byte,
                "bound": operator.bound,
            }
            for operator in stage.operators
        ]
    return rows


def _show(to: Console, prediction: Prediction, request: Request) -> None:
    cells: list[tuple[str, ...]] = []
    for name, stage in device_stages(prediction).items():
        bits = operator_bits(stage)
        cells.append(
            (
                name,
                f"{stage.time_s * MS:,.2f}",
                "",
                number(stage.flops * TERA),
                number(stage.bytes * GB),
                number(stage.intensity_flops_per_byte),
                "",
                number(rate_flops_per_s(stage) * TERA),
                stage.bound,
            )
        )
        for operator in stage.operators:
            roof = Roof.of(prediction.hardware, bits[operator.name])
            cells.append(_operator_cells(operator, name, operator.time_s / stage.time_s, roof))
    bandwidth = number(prediction.hardware.memory_bandwidth_bytes_per_s * TERA)
    peaks = ", ".join(
        f"{r.name} {number(r.peak_flops_per_s * TERA)} TFLOP/s (ridge {number(r.ridge_flops_per_byte)} FLOP/byte)"
        for r in roofs(prediction)
    )
    legend = f"Roofs of one device: memory {bandwidth} TB/s; {peaks}. Work and traffic are those of one device."
    sections(to, "\n".join(describe(prediction, request)), table(COLUMNS, cells), legend)


def _operator_cells(operator: OperatorCost, stage: str, share: float, roof: Roof) -> tuple[str, ...]:
    return (
        "  " + operator.name.removeprefix(f"{stage}."),
        f"{operator.time_s * MS:,.2f}",
        percent(share),
        number(operator.flops * TERA),
        number(operator.bytes * GB),
        number(operator.intensity_flops_per_byte),
        number(roof.ridge_flops_per_byte) if operator.flops else "",
        number(rate_flops_per_s(operator) * TERA),
        operator.bound,
    )
