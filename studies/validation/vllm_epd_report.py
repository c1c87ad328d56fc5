"""What stands beside `vllm_epd.py`: predicted and measured curves as text and as a figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from costmodel import load_engine
from costmodel.base import Array
from costmodel.engine import EngineProfile
from studies import figures
from studies.scatter import COLOURS
from studies.validation.one_encoder_report import section
from studies.validation.report import markdown
from studies.validation.serving_curve import (
    METRICS,
    OVERLOAD,
    THROUGHPUT,
    TPOT,
    TTFT,
    CurvePoint,
    last_passing_rate,
    measured_points,
    plateau,
)
from studies.validation.vllm_epd import (
    ENGINE,
    IMAGES,
    PICTURE,
    PROMPTS,
    Topology,
    dp4,
    fitted_engine,
    independent4,
    predicted_beside,
)

REPORT: Final = Path(__file__).with_name("vllm_epd.md")
FIGURE: Final = REPORT.with_suffix(".svg")
NAMES: Final = {THROUGHPUT: "throughput [requests/s]", TTFT: "p99 TTFT [ms]", TPOT: "p99 TPOT [ms]"}
INDEPENDENT_FIT: Final = (31.2e-3, 17.5e-3, 1.78e-3)
"""What `--calibrate` finds for ranks that do not wait for each other [s]."""
DRAINED: Final = 0.99
"""Place of the 99th percentile in a queue that is drained in order."""
BORDER: Final = 0.05

HEAD: Final = """# vLLM on four A100s: the published serving curve

Written by `python -m studies.validation.vllm_epd`; constants by `--calibrate`. Qwen3-VL-4B, `--data-parallel-size 4`,
pictures of 640x640, 400 tokens of text, 150 out, Poisson arrivals, 1,000 requests a run, from the
[blog](https://blog.vllm.ai/2025/12/15/vllm-epd.html) on encoder disaggregation. The pictures are JPEGs in base64
(`process_image` of vLLM's `datasets.py`).

![Curves](vllm_epd.svg)
"""
READING: Final = """
## What explains the curve

Kernels are those of engine `vllm`, untouched. Two mechanisms and three constants are not:

1. **One API server** reads, decodes and processes all pictures and streams all answers. Throughput levels off at
   1/(36.2 ms + 18.6 ms a picture), whatever the devices do. The picture's time is 15.7 ms of resizing and the like (0.4
   of what `vllm` assumes), 2.6 of decoding, 0.3 of the copy; the request's is parsing, tokens, and the streaming of an
   answer of 150 tokens: no measurement splits it. All of this is inferred from the curve: the blog states no number of
   servers. More than one had to be asked for when `--api-server-count` came (vLLM pull request 17546); by 0.15 the
   default was the number of ranks. Four servers that take four times as long would level off alike.
2. **Ranks in step.** Until vLLM pull request 30739, opened the day after the blog, ranks of dense models met in an
   all-reduce every step. Whoever decodes waits for whoever encodes and prefills, on any of the four devices.
   `simulator` has no such group yet: `one_server.Lockstep` makes one worker of it, with prompts dealt out evenly.
3. **Eager launches**, 0.68 ms a layer in every stage and a pass for each picture. vLLM of 2023 needed 0.5 to 0.7 ms
   (`vllm-0.2`), which was not used here. The scripts of vLLM's encoder-disaggregation example pass `--enforce-eager`;
   that this baseline did too is inferred.

With ranks that do not wait for each other the same fit asks for 1.78 ms a layer, more than any host that was measured,
and leaves p99 TPOT nearly three times as far off (second table). Throughput does not tell the two apart.

## What is not explained

- **p99 TTFT in overload** is mostly 1.1 to 2 times the prediction. The identity of a queue that is drained in order,
  0.99 N (1/X - 1/rate), is an upper bound when X counts a whole run, its last answers included: predictions lie below
  it, the measured curve above, by up to 74 % (third table). In order, no request could wait that long in a run of
  that throughput, so the server does not serve requests in the order in which they come; asyncio tasks and pools of
  threads need not. The simulator's station is first come, first served.
- **p99 TTFT near the knee** (4 pictures, 7 to 9 requests/s) is about twice the prediction: service times vary, here
  they do not.
- **p99 TPOT at the knee** of 3 and 4 pictures peaks above the prediction (last table).
- Noise: one run a point; neighbouring points differ by up to 20 % in p99 TPOT and 10 % in throughput.
"""


def write_report() -> None:
    """Write text and figure."""
    points, engine = measured_points(), load_engine(ENGINE)
    found = predicted_beside(points, dp4, engine)
    base = load_engine("vllm")
    others = {
        "ranks in step, `vllm-0.11`": found,
        "ranks in step, `vllm` as it is": predicted_beside(points, dp4, base),
        "independent ranks, `vllm` as it is": predicted_beside(points, independent4, base),
        "independent ranks, fitted": predicted_beside(points, independent4, fitted_engine(*INDEPENDENT_FIT)),
    }
    parts = [HEAD, _plateaus(points, found), _errors(points, others), _drain(points, found), READING]
    parts.append(section(engine))
    REPORT.write_text("\n".join([*parts, _all(points, found)]), encoding="utf-8")
    figures.save(_figure(points, dp4, engine), FIGURE)
    print(f"wrote {REPORT} and {FIGURE}")


def _beside(points: Sequence[CurvePoint], found: Array) -> list[CurvePoint]:
    """Return the points with predicted values."""
    return [p.model_copy(update={"value": float(v)}) for p, v in zip(points, found, strict=True)]


def _plateaus(points: Sequence[CurvePoint], found: Array) -> str:
    ours = _beside(points, found)
    rows = []
    for n in IMAGES:
        here, there = _overloaded_mean(points, ours, n), plateau(points, n)
        rates = [last_passing_rate(some, n) for some in (ours, points)]
        rows.append((str(n), f"{here:.2f}", f"{there:.2f}", f"{here / there - 1:+.1%}", *(f"{r:g}" for r in rates)))
    head = (
        "pictures",
        "plateau, predicted",
        "measured",
        "error",
        "last rate within 20 s of TTFT, predicted",
        "measured",
    )
    note = f"Plateaus [requests/s] are means over runs offered more than {OVERLOAD:g} times their throughput.\n"
    return "## Plateaus and knees\n\n" + markdown(head, rows) + "\n" + note


def _overloaded_mean(points: Sequence[CurvePoint], ours: Sequence[CurvePoint], images: int) -> float:
    """Return what is predicted for the runs of which the measured plateau is the mean."""
    pairs = zip(points, ours, strict=True)
    picked = [o.value for p, o in pairs if p.metric == THROUGHPUT and p.images == images]
    over = [p.offered_rps > OVERLOAD * p.value for p in points if p.metric == THROUGHPUT and p.images == images]
    return float(np.mean([x for x, keep in zip(picked, over, strict=True) if keep]))


def _errors(points: Sequence[CurvePoint], others: dict[str, Array]) -> str:
    measured = np.array([p.value for p in points])
    rows = []
    for name, found in others.items():
        error = found / measured - 1
        cells = [name]
        for metric in METRICS:
            mine = error[[p.metric == metric for p in points]]
            cells.append(f"{np.mean(np.abs(mine)):.1%} ({np.median(mine):+.1%})")
        rows.append(tuple(cells))
    counts = [sum(p.metric == metric for p in points) for metric in METRICS]
    head = ("mean absolute error (median)", *(f"{NAMES[m]}, {c} points" for m, c in zip(METRICS, counts, strict=True)))
    return "## Errors over all points\n\n" + markdown(head, rows)


def _drain(points: Sequence[CurvePoint], found: Array) -> str:
    """Return p99 TTFT beside the identity of a queue that is drained in order."""
    by_run = {(p.run, p.metric): (p.value, float(v)) for p, v in zip(points, found, strict=True)}
    rows = []
    for (run, metric), (x, ours) in by_run.items():
        ttft = by_run.get((run, TTFT))
        if metric != THROUGHPUT or ttft is None or run[3] <= OVERLOAD * x:
            continue
        ideal = [DRAINED * PROMPTS * (1 / some - 1 / run[3]) for some in (ours, x)]
        cells = [f"{v / 1e3:.1f} / {i:.1f} = {v / 1e3 / i:.2f}" for v, i in zip(reversed(ttft), ideal, strict=True)]
        rows.append((str(run[1]), f"{run[3]:g}", *cells))
    head = ("pictures", "offered", "predicted p99 TTFT / identity [s]", "measured p99 TTFT / identity [s]")
    return "\n## Overload: p99 TTFT beside the drain of the queue\n\n" + markdown(head, rows)


def _all(points: Sequence[CurvePoint], found: Array) -> str:
    rows = [
        (p.metric, str(p.images), f"{p.offered_rps:g}", f"{v:.5g}", f"{p.value:.5g}", f"{v / p.value - 1:+.1%}")
        for p, v in zip(points, found, strict=True)
    ]
    return "## All points\n\n" + markdown(("metric", "pictures", "offered", "predicted", "measured", "error"), rows)


def _figure(points: Sequence[CurvePoint], topology: Topology, engine: EngineProfile) -> Figure:
    """Return a panel a metric: lines predicted, dots measured."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("Qwen3-VL-4B on four A100-80GB: lines predicted, dots published", fontsize=10)
    grid = [
        CurvePoint(text_tokens=400, images=n, topology="DP4", offered_rps=rate, metric=metric, value=1.0)
        for n in IMAGES
        for rate in range(4, 25)
        for metric in METRICS
    ]
    drawn = _beside(grid, predicted_beside(grid, topology, engine))
    for axes, metric in zip(figure.subplots(1, len(METRICS)), METRICS, strict=True):
        for n, colour in zip(IMAGES, COLOURS, strict=False):
            axes.plot(*_curve(drawn, n, metric), color=colour, linewidth=1.2)
            label = f"{n} x {PICTURE.width}x{PICTURE.height}"
            axes.plot(*_curve(points, n, metric), "o", color=colour, markersize=3.5, label=label)
        axes.set(xlabel="offered [requests/s]", ylabel=NAMES[metric], ylim=(0, None))
        axes.margins(x=BORDER)
        axes.legend(fontsize=7)
    return figure


def _curve(points: Sequence[CurvePoint], images: int, metric: str) -> Iterator[tuple[float, ...]]:
    """Return rates and values."""
    held = sorted((p.offered_rps, p.value) for p in points if p.images == images and p.metric == metric)
    return zip(*held, strict=True)
