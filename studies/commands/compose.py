"""`lvlm compose`: each technique alone and all together: what adds up, what cancels, where the bottleneck went."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from costmodel import load_hardware
from costmodel.composition import METRICS, Bottleneck, Composition, Interaction, Metric, bottleneck, compose_on
from studies import parse
from studies.options import FOR_PEOPLE, ONE_DEVICE, TEXT_PROMPT, Format, Prompt, Serving
from studies.output import Answer, emit, note
from studies.request import Request, build_request, describe, serving_inputs
from studies.tables import MISSING, gigabytes, number, percent, seconds, sections, table

TITLES: dict[Metric, str] = {
    "ttft_s": "TTFT",
    "tpot_s": "TPOT",
    "peak_bytes": "memory, GB",
    "max_batch": "largest batch",
    "energy_j": "energy, J",
}
DOES_NOT_FIT = 3


def compose(
    model: str,
    hardware: str,
    /,
    *,
    prompt: Prompt = TEXT_PROMPT,
    serving: Serving = ONE_DEVICE,
    form: Format = FOR_PEOPLE,
) -> int:
    """Compare each technique alone with all together: what adds up, what cancels, where the bottleneck went.

    Parameters
    ----------
    model : str
        A model, a config.json, a folder that holds one, or a hub id.
    hardware : str
        A device, the path of a TOML file, or name:key=value,... for a what-if.

    Returns
    -------
    int
        0, or 3 when the request does not fit with all techniques.
    """
    if not serving.technique:
        raise ValueError("there is nothing to compose; give --technique NAME[:key=value,...], once for each")
    request = Request.of(model, prompt, serving.output)
    techniques = [parse.method(text) for text in serving.technique]
    found = compose_on(build_request(request, serving), load_hardware(hardware), techniques)
    inputs = serving_inputs(request, hardware, serving)
    answer = Answer(
        "compose", inputs, found.as_dict(), lambda: _rows(found), lambda to: _show(to, found, request, serving)
    )
    emit(answer, form)
    if found.together.fits:
        return 0
    note(f"{request.model.name} with batch {serving.batch} does not fit on {hardware}, all techniques together")
    return DOES_NOT_FIT


def _rows(found: Composition) -> list[dict[str, Any]]:
    """Return one row a number."""
    rows = []
    for one in found.interactions:
        values = one.as_dict()
        alone, factors = values.pop("alone"), values.pop("factors")
        each = {f"alone_{i}": value for i, value in enumerate(alone, start=1)}
        rows.append({"metric": one.metric, **values, **each, **{f"factor_{i}": f for i, f in enumerate(factors, 1)}})
    return rows


def _show(to: Console, found: Composition, request: Request, serving: Serving) -> None:
    names = [f"{i}: {text}" for i, text in enumerate(serving.technique, start=1)]
    tops = [f"{name} cannot stand alone: on top of those before it" for name, top in _pairs(found) if top]
    heads = [f"bottleneck of {TITLES[metric]}: {_moved(found, metric)}" for metric in METRICS]
    sections(
        to,
        "\n".join(describe(found.plain, request)),
        "\n".join([*names, *tops]),
        _numbers(found),
        _factors(found),
        "\n".join(_because(one) for one in found.interactions),
        "\n".join(heads),
    )


def _pairs(found: Composition) -> list[tuple[str, bool]]:
    return list(zip(found.names, found.on_top, strict=True))


def _numbers(found: Composition) -> Table:
    each = [f"{i} alone" for i in range(1, len(found.names) + 1)]
    rows = [
        (TITLES[one.metric], *(_value(one.metric, v) for v in (one.plain, *one.alone, one.together)))
        for one in found.interactions
    ]
    return table(("", "without", *each, "together"), rows)


def _value(metric: Metric, value: float) -> str:
    if metric in ("ttft_s", "tpot_s"):
        return seconds(value)
    if metric == "peak_bytes":
        return gigabytes(value)
    return f"{value:,.0f}" if metric == "max_batch" else number(value)


def _factors(found: Composition) -> Table:
    each = [f"{i} alone" for i in range(1, len(found.names) + 1)]
    rows = [
        (
            TITLES[one.metric],
            *(_times(factor) for factor in (*one.factors, one.guessed, one.reached)),
            f"{one.surplus:+.1%}",
        )
        for one in found.interactions
    ]
    return table(("times better", *each, "product", "together", "surplus"), rows)


def _times(factor: float) -> str:
    text = number(factor)
    return text if text == MISSING else f"{text}x"


def _because(one: Interaction) -> str:
    """Say why the product was not reached."""
    if not round(one.surplus, 3):
        return f"{TITLES[one.metric]}: the product holds"
    kind = "beyond" if one.surplus > 0 else "short of"
    return f"{TITLES[one.metric]}: {percent(abs(one.surplus))} {kind} the product, most of it {one.explained_by}"


def _moved(found: Composition, metric: Metric) -> str:
    before, after = bottleneck(found.plain, metric), bottleneck(found.together, metric)
    if before == after:
        return f"{_words(before)}, as before"
    return f"{_words(before)} -> {_words(after)}"


def _words(where: Bottleneck) -> str:
    return f"{where.part} ({where.bound}; {where.operator})" if where.bound else where.part
