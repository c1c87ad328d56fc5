"""`lvlm predict`: what a request costs, and why."""

from __future__ import annotations

import textwrap
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from costmodel import DoesNotFit, Prediction
from costmodel.sums import decode_steps
from costmodel.units import SECONDS_PER_HOUR
from studies.options import FOR_PEOPLE, ONE_DEVICE, TEXT_PROMPT, Format, Prompt, Serving
from studies.output import Answer, emit, note
from studies.request import Request, describe, predict_request, serving_inputs
from studies.roofs import stage_roof
from studies.tables import GB, MS, TERA, gigabytes, number, percent, seconds, sections, table

DOES_NOT_FIT = 3
BETWEEN_DEVICES = ("links.", "efficiency.collective.")
"""Numbers that matter only when several devices share the model."""
ASSUMED_SHOWN = 6
"""Names of assumed numbers in the last line."""


def predict(
    model: str,
    hardware: str,
    /,
    *,
    prompt: Prompt = TEXT_PROMPT,
    serving: Serving = ONE_DEVICE,
    form: Format = FOR_PEOPLE,
) -> int:
    """Predict TTFT, TPOT, memory, energy and cost of a request, and say why.

    Parameters
    ----------
    model : str
        A model, a config.json, a folder that holds one, or a hub id.
    hardware : str
        A device, the path of a TOML file, or name:key=value,... for a what-if.

    Returns
    -------
    int
        0, or 3 when the model does not fit.
    """
    request = Request.of(model, prompt, serving.output)
    prediction = predict_request(request, hardware, serving)
    inputs = serving_inputs(request, hardware, serving)
    answer = Answer(
        "predict",
        inputs,
        prediction.as_dict(),
        lambda: _rows(prediction),
        lambda to: _show(to, prediction, request),
    )
    emit(answer, form)
    if prediction.fits:
        return 0
    memory = prediction.memory
    what = f"{request.model.name} with batch {serving.batch} on {prediction.n_devices} x {prediction.hardware.name}"
    note(str(DoesNotFit(what, required_bytes=memory.peak_bytes, available_bytes=memory.usable_bytes)))
    return DOES_NOT_FIT


def _rows(prediction: Prediction) -> list[dict[str, Any]]:
    """Return one row a stage."""
    rows = []
    for name, stage in prediction.as_dict()["stages"].items():
        step = stage.pop("step_time_s", {})
        steps = {f"{which}_step_time_s": step.get(which) for which in ("first", "middle", "last")}
        rows.append({"stage": name, **stage, **steps})
    return rows


def _show(to: Console, prediction: Prediction, request: Request) -> None:
    why = [textwrap.fill(line, to.width, initial_indent="  - ", subsequent_indent="    ") for line in prediction.why()]
    sections(
        to,
        "\n".join(describe(prediction, request)),
        _headline(prediction),
        _stages(prediction),
        _memory(prediction),
        f"Per request: {_money(prediction)}",
        "\n".join(["Why", *why]),
        f"Trust: {_trust(prediction)}",
    )


def _headline(prediction: Prediction) -> Table:
    band = prediction.error_band
    grid = Table.grid(padding=(0, 3))
    for name, key, value in (
        ("TTFT", "ttft_s", float(prediction.ttft_s)),
        ("TPOT", "tpot_s", float(prediction.tpot_s)),
    ):
        span = f"{seconds(band[key][0])} to {seconds(band[key][1])}" if band else "no error band: not a forecast"
        grid.add_row(name, seconds(value), span)
    grid.add_row("total", seconds(float(prediction.total_s)), "")
    rate = prediction.throughput_tokens_per_s
    each = f"{number(rate / prediction.n_devices)} a device" if prediction.n_devices > 1 else ""
    grid.add_row("throughput", f"{number(rate)} tokens/s", each)
    return grid


def _stages(prediction: Prediction) -> Table:
    steps = float(decode_steps(prediction.query, prediction.query.turns[0]))
    rows = []
    for name, stage in prediction.stages.items():
        roof = stage_roof(prediction, stage)
        share = "" if name == "decode" else percent(stage.time_s / float(prediction.ttft_s))
        rows.append(
            (
                f"decode ({steps:,.0f} steps)" if name == "decode" else name,
                f"{stage.time_s * MS:,.2f}",
                share,
                number(stage.flops * TERA),
                number(stage.bytes * GB),
                number(stage.intensity_flops_per_byte),
                number(roof.ridge_flops_per_byte) if roof else "",
                stage.bound,
            )
        )
    return table(("stage", "ms", "of TTFT", "TFLOP", "GB", "FLOP/byte", "ridge", "bound"), rows)


def _memory(prediction: Prediction) -> Table:
    memory = prediction.memory
    parts = {
        "weights": memory.weights_bytes,
        "KV cache": memory.kv_bytes,
        "activations": memory.activation_bytes,
        "reserve": memory.reserve_bytes,
        "peak": memory.peak_bytes,
        "usable": memory.usable_bytes,
    }
    rows = [(name, gigabytes(value), percent(value / memory.usable_bytes)) for name, value in parts.items()]
    fits = "fits" if prediction.fits else "does NOT fit"
    each = " a device" if prediction.n_devices > 1 else ""
    return table((f"memory{each} ({fits}; largest batch {prediction.max_batch:,})", "GB", "of usable"), rows)


def _money(prediction: Prediction) -> str:
    energy = f"{number(prediction.energy_j)} J, {number(prediction.co2_g)} g CO2"
    cost, price = prediction.cost_usd, prediction.hardware.price_usd_per_s
    if cost is None or price is None:
        return f"{energy}, cost unknown (no public price)"
    return f"{energy}, {number(cost)} USD at {price * SECONDS_PER_HOUR:.2f} USD an hour and device"


WHOSE: Final = {"measured": "of this chip", "derived": "of other devices"}


def _trust(prediction: Prediction) -> str:
    """Return how many numbers were measured, derived and so on, and which are only assumed."""
    counts: dict[str, int] = {}
    assumed = []
    provenance = prediction.provenance
    kernels = provenance.pop("kernels")
    for kinds in provenance.values():
        for kind, keys in kinds.items():
            counts[kind] = counts.get(kind, 0) + len(keys)
        assumed += kinds.get("assumed", [])
    shown = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items(), key=lambda item: -item[1]))
    used = [key for key in assumed if prediction.n_devices > 1 or not key.startswith(BETWEEN_DEVICES)]
    names = ", ".join(used[:ASSUMED_SHOWN]) or "none that matters here"
    more = f" and {len(used) - ASSUMED_SHOWN} more" if len(used) > ASSUMED_SHOWN else ""
    curves = [f"{len(held)} {WHOSE[kind]}" for kind, held in kernels.items()]
    fits = f"fitted kernels: {', '.join(curves)}" if curves else "no fitted kernels"
    return (
        f"{fits}; of {sum(counts.values())} numbers of device and engine, {shown}; assumed and used: {names}{more} "
        "(see --json)"
    )
