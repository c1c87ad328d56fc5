"""`lvlm solve`: inverse questions: what meets a target, and from where on a technique pays."""

from __future__ import annotations

import math
from typing import Any

from costmodel import Workload, build_query, compose, load_engine, load_hardware
from costmodel.base import Array
from costmodel.composition import bottleneck
from costmodel.deployment import Precision
from costmodel.query import Query
from costmodel.solve import AT_LEAST, AT_MOST, BreakEven, Solution, break_even, check_target
from costmodel.solve import solve as solve_for
from costmodel.units import SECONDS_PER_HOUR
from simulator.assembly import assumptions
from studies import parse
from studies.load import NO_LOAD, Load, asked
from studies.options import FOR_PEOPLE, ONE_DEVICE, TEXT_PROMPT, Format, Prompt, Serving, Texts
from studies.output import Answer, emit, note
from studies.request import Request, check_encoder, describe, parallelism_of, serving_inputs
from studies.serving import NOTHING_PROMISED, Promises
from studies.tables import GB, number, seconds
from studies.varied import LOADS, VARIED, Varied, techniques_of, varied

INFEASIBLE = 3
MOST_TOKENS = 1e6
"""Tokens up to which a break-even is looked for."""
SHOWN = ("ttft_s", "tpot_s", "total_s", "throughput_tokens_per_s", "energy_j", "cost_usd", "fits", "max_batch")


def solve(
    model: str,
    hardware: str | None = None,
    /,
    *,
    vary: str = "",
    target: Texts = (),
    break_even: str = "",
    metric: str = "total_s",
    prompt: Prompt = TEXT_PROMPT,
    serving: Serving = ONE_DEVICE,
    load: Load = NO_LOAD,
    promises: Promises = NOTHING_PROMISED,
    form: Format = FOR_PEOPLE,
) -> int:
    """Find what meets a target, or from where on a technique pays.

    Parameters
    ----------
    model : str
        A model, a config.json, a folder that holds one, or a hub id; with --vary rate or gpus also a PLAN.toml.
    hardware : str
        A device, the path of a TOML file, or name:key=value,... for a what-if.
    vary : str
        What may change: keep, kv-bits, frames, images, batch, bandwidth or price; rate, the load that a deployment
        bears; gpus, how it scales. Of keep it is the share that the last technique keeps, or that of the visual tokens.
    target : tuple of str
        A limit, such as ttft_s=0.5; at least for throughput_tokens_per_s and max_batch. Of a rate: ttft_s, tpot_s,
        total_s, and attainment, the share of requests that must keep them. Repeat for several.
    break_even : str
        A technique, NAME or NAME:key=value,...: the fewest visual tokens from which on it pays; of a model without
        vision, text tokens.
    metric : str
        What a technique shall make less: ttft_s, tpot_s or total_s.

    Returns
    -------
    int
        0, or 3 when nothing meets the target.
    """
    if vary in LOADS and not break_even:
        return _loaded(vary, (model, hardware), load, target, promises, prompt=prompt, options=serving, form=form)
    if hardware is None:
        raise ValueError("solve needs MODEL and HARDWARE; a PLAN.toml alone goes with --vary rate or gpus")
    if load != NO_LOAD or promises != NOTHING_PROMISED:
        raise ValueError("options of load and promises need requests that queue: --vary rate or gpus")
    if bool(vary) == bool(break_even):
        known = f"--vary {', '.join((*VARIED, *LOADS))}" if not vary else "one of --vary and --break-even"
        raise ValueError(f"solve needs something to look for; give {known}" + (" or --break-even" if not vary else ""))
    request = Request.of(model, prompt, serving.output)
    inputs = serving_inputs(request, hardware, serving)
    if break_even:
        return _break_even(request, hardware, serving, form, inputs | {"break_even": break_even, "metric": metric})
    limits = dict(_limit(text) for text in target)
    check_target(limits)
    if vary == "price" and "cost_usd" not in limits:
        raise ValueError("--vary price moves cost_usd alone; give --target cost_usd=…")
    what = varied(vary, request, hardware, serving)
    found = solve_for(what.make, what.span, limits, many=what.many)
    values = _values(vary, what, found)
    inputs |= {"vary": vary, "target": limits}
    answer = Answer(
        "solve", inputs, values, lambda: [_row(values)], lambda to: to.print(_text(vary, what, found, request))
    )
    emit(answer, form)
    if found.value is not None:
        return 0
    note(f"no {vary} from {what.span.low:g} to {what.span.high:g} meets {' and '.join(target)}")
    return INFEASIBLE


def _loaded(
    vary: str,
    names: tuple[str, str | None],
    load: Load,
    target: Texts,
    promises: Promises,
    *,
    prompt: Prompt,
    options: Serving,
    form: Format,
) -> int:
    """Answer what needs requests that queue."""
    from studies.loaded import solve_gpus, solve_rate

    if vary == "rate" and (load.rate is not None or load.times):
        raise ValueError("--rate and --times go with --vary gpus; --vary rate tries the rates itself")
    limits = dict(_limit(text) for text in target)
    what = asked(names, load, targets=limits, promises=promises, prompt=prompt, options=options)
    for said in assumptions(what.plan_at(1)) if names[1] is not None else ():
        note(said)
    answer, found = (solve_rate if vary == "rate" else solve_gpus)(what)
    emit(answer, form)
    if found:
        return 0
    note("no rate meets the target; see what one request alone takes with lvlm predict")
    return INFEASIBLE


def _limit(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    try:
        limit = float(value)
    except ValueError:
        limit = math.nan
    if not equals or not math.isfinite(limit):
        known = ", ".join((*AT_MOST, *AT_LEAST))
        raise ValueError(f"--target {text!r} must read NAME=NUMBER, such as ttft_s=0.5; known: {known}")
    return name.strip(), limit


def _values(vary: str, what: Varied, found: Solution) -> dict[str, Any]:
    return {
        "vary": vary,
        "value": found.value,
        "unit": what.unit,
        "at_end": found.at_end,
        "span": [what.span.low, what.span.high],
        "predictions": found.tried,
        "prediction": {name: getattr(found.prediction, name) for name in SHOWN}
        | {"peak_bytes": found.prediction.memory.peak_bytes},
    }


def _row(values: dict[str, Any]) -> dict[str, Any]:
    low, high = values["span"]
    return {key: values[key] for key in ("vary", "value", "unit", "at_end")} | {
        "low": low,
        "high": high,
        **values["prediction"],
    }


def _text(vary: str, what: Varied, found: Solution, request: Request) -> str:
    p = found.prediction
    where = bottleneck(p, "ttft_s")
    numbers = (
        f"TTFT {seconds(float(p.ttft_s))}, TPOT {seconds(float(p.tpot_s))}, total {seconds(float(p.total_s))},"
        f" {number(p.energy_j)} J, {number(p.memory.peak_bytes * GB)} GB of {number(p.memory.usable_bytes * GB)} usable"
    )
    if found.value is None:
        answer = f"Nothing meets the target. The closest of both ends: {numbers}"
    else:
        end = f", the {what.span.prefers} that was looked for" if found.at_end else ""
        answer = f"{vary} = {_shown(vary, found.value)}{end}: {numbers}"
    lines = describe(p, request) if vary not in ("frames", "images") else describe(p, request)[:1]
    return "\n".join([*lines, "", answer, f"TTFT is led by {where.part} ({where.bound}; {where.operator})"])


def _shown(vary: str, value: float) -> str:
    if vary == "bandwidth":
        return f"{number(value * GB)} GB/s"
    if vary == "price":
        return f"{number(value * SECONDS_PER_HOUR)} USD an hour and device"
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


def _break_even(request: Request, hardware: str, serving: Serving, form: Format, inputs: dict[str, Any]) -> int:
    if request.workload.has_media:
        raise ValueError("--break-even varies the visual tokens itself; leave --image and --video out")
    name, metric = inputs["break_even"], inputs["metric"]
    before, added = techniques_of(serving), parse.method(name)
    device, what = load_hardware(hardware), "visual" if request.model.media else "text"
    found = break_even(
        lambda tokens: compose(_query(request, serving, tokens), before),
        lambda tokens: compose(_query(request, serving, tokens), [*before, added]),
        device,
        metric=metric,
        most=MOST_TOKENS,
    )
    values = {"technique": name, "metric": metric, "varied": f"{what}_tokens", **_even(found)}
    emit(Answer("solve", inputs, values, lambda: [values], lambda to: to.print(_even_text(values, request))), form)
    if found.tokens is not None:
        return 0
    note(f"{name} never lowers {metric} up to {MOST_TOKENS:,.0f} {what} tokens")
    return INFEASIBLE


def _query(request: Request, serving: Serving, tokens: Array) -> Query:
    """Return the request with so many tokens: visual ones where the model sees."""
    check_encoder(request.model, serving)
    text, output = request.prompt.text, request.workload.output_tokens
    seen = Workload(visual_tokens=tokens, text_tokens=text, output_tokens=output)
    return build_query(
        request.model,
        seen if request.model.media else Workload(text_tokens=tokens, output_tokens=output),
        load_engine(serving.engine),
        batch=serving.batch,
        precision=Precision(serving.weight_bits, serving.activation_bits, serving.kv_bits),
        parallelism=parallelism_of(serving),
    )


def _even(found: BreakEven) -> dict[str, Any]:
    return {"tokens": found.tokens, "ratio": found.ratio, "ratio_at_end": found.gains_at_end}


def _even_text(values: dict[str, Any], request: Request) -> str:
    kind = values["varied"].replace("_", " ")
    who, at_end = f"{values['technique']} on {request.model.name}", f"at {MOST_TOKENS:,.0f} it takes"
    ratio = f"{values['ratio_at_end']:.3g} times as long as without"
    if values["tokens"] is None:
        return f"{who} never lowers {values['metric']}: {at_end} {ratio}"
    return f"{who} lowers {values['metric']} from {values['tokens']:,.0f} {kind} on; {at_end} {ratio}"
