"""The page and the figure of the study on a CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from studies.frontiers.common import markdown, panels
from studies.scatter import COLOURS

MS: Final = 1e3
LIMITS: Final = (0.8, 1.25)
"""Lines beside the diagonal of the figure: a fifth off."""
NAMES: Final = {"encode": "encode", "prefill": "prefill", "decode_step": "decode step", "all": "all"}


def page(found: Mapping[str, Any]) -> str:
    """Return the report in Markdown."""
    return "\n".join(
        [
            "# Two small models on a CPU, predicted from kernels alone\n",
            *([SMOKE] if found["smoke"] else []),
            INTRODUCTION.format(
                device=found["device"],
                torch=found["versions"]["torch"],
                clock=found["clock"],
                day=found["taken_at"].partition("T")[0],
                load=found["load_average"],
                cores=found["cores"],
                peak=found["peak_flops_per_s"] / 1e9,
                bandwidth=found["memory_bandwidth_bytes_per_s"] / 1e9,
            ),
            _summary(found),
            "## Every request\n",
            _requests(found["rows"]),
            "## Curves\n",
            CURVES,
            _curves(found["fits"]),
            WHY,
        ]
    )


SMOKE: Final = "Smoke size: it shows that the study runs, and no number means anything.\n"
INTRODUCTION: Final = """\
Written by `python -m studies.validation.cpu`; numbers in `cpu.json`, lines in `studies/measurements/`
(`cpu-kernels.jsonl` and `cpu-stages.jsonl`), profile and curves in `study-cpu.toml` and `study-cpu.torch.toml`.

{device}, one thread, single precision, PyTorch {torch}, {day}; {clock}. The machine
has {cores} cores and was shared while this ran (load up to {load:.1f}): other work takes cache and bandwidth, which the
processor time of one process does not hide. Measured peaks: {peak:.0f} GFLOP/s of products, {bandwidth:.1f} GB/s
of reading.

Kernels of sizes that no model has (products of 1 to 1024 rows with weights of 0.4 to 200 MB that take turns, as layers
do, attention, element-wise operators) were measured and given to `lvlm calibrate new:study-cpu`. No time of a model is
in the fit. `predict` with engine `fused` finds the curves beside the profile. Errors are (predicted - measured) /
measured, measured being the median.
"""
CURVES: Final = """\
Errors on families of sizes that were held out of the fit, by the same rule as for GPUs.
"""
WHY: Final = """\
## What is not in the model

Predictions with curves come out low throughout, because each is the sum of its kernels and nothing else. Not in it are

- the host's own work: dispatch and Python count only as far as the curves hold the start of one call;
- norms of queries and keys, and copies with which the reference model lays out heads and appends to its cache;
- the kind of an activation: the curve is of the exact GELU. The tanh form of small-lvlm's encoder took 4.6 times as
  long in one run by hand (2.05 against 0.44 ns a number): by that, some 5 % of its encode;
- products of 7 to 15 rows, which with this library take longer than one of 16: a curve that never falls is below;
- other tenants: the cache of the socket is shared, so that what stays in it changes from minute to minute.

How much each of the others weighs was not measured. Flat shares, with the rates of the same profile, come closer on
encode and prefill: an engine's share is of a datasheet's peak, so on a measured one they charge the loss twice, which
may stand in for what is left out here.
"""


def _summary(found: Mapping[str, Any]) -> str:
    shown = [
        (name, str(_count(found["rows"], stage)), f"{found['median_error'][stage]:.1%}",
         f"{found['median_flat_error'][stage]:.1%}")
        for stage, name in NAMES.items()
    ]  # fmt: skip
    aim = f"Median error aimed at: {found['target']:.0%}.\n"
    return markdown(("stage", "rows", "median error", "with flat shares instead of curves"), shown) + "\n" + aim


def _count(rows: Sequence[Mapping[str, Any]], stage: str) -> int:
    return sum(stage in ("all", row["stage"]) for row in rows)


def _requests(rows: Sequence[Mapping[str, Any]]) -> str:
    shown = [
        (
            row["model"],
            NAMES[row["stage"]],
            " ".join(f"{width}x{height}" for width, height in row["images"]),
            str(row["text_tokens"]),
            str(row["batch"]),
            f"{row['measured_s'] * MS:.1f}",
            f"{row['predicted_s'] * MS:.1f}",
            f"{row['error']:+.1%}",
            f"{row['slowest_s'] / row['fastest_s']:.2f}",
        )
        for row in rows
    ]
    columns = (
        "model",
        "stage",
        "pictures",
        "text",
        "batch",
        "measured [ms]",
        "predicted [ms]",
        "error",
        "slowest/fastest",
    )
    return markdown(columns, shown)


def _curves(fits: Sequence[Mapping[str, Any]]) -> str:
    shown = []
    for fit in fits:
        known = fit["median"] is not None
        errors = (f"{fit['median']:.1%}", f"{fit['bias']:+.1%}") if known else ("-", "-")
        shown.append((f"{fit['kind']}.{fit['variant']}", str(fit["rows"]), str(fit["held_out"]), *errors))
    return markdown(("curve", "rows", "held out", "median error", "bias"), shown)


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw predicted against measured times."""

    def show(axes: Sequence[Any]) -> None:
        (plot,) = axes
        rows = found["rows"]
        ends = [min(row["measured_s"] for row in rows) * MS / 2, max(row["measured_s"] for row in rows) * MS * 2]
        plot.loglog(ends, ends, color="0.3", linewidth=1)
        for share in LIMITS:
            plot.loglog(ends, [end * share for end in ends], color="0.7", linewidth=0.8, linestyle="--")
        for marker, model in zip("os", dict.fromkeys(row["model"] for row in rows), strict=False):
            for colour, stage in zip(COLOURS, ("encode", "prefill", "decode_step"), strict=False):
                some = [row for row in rows if row["model"] == model and row["stage"] == stage]
                times = [[row[key] * MS for row in some] for key in ("measured_s", "predicted_s")]
                plot.scatter(*times, color=colour, marker=marker, s=28, label=f"{model}, {NAMES[stage]}")
        plot.set(xlabel="measured [ms]", ylabel="predicted [ms]", title=f"{found['device']}, one thread")
        plot.legend(fontsize=7)

    panels(path, 1, show)
