"""Write `report.md` and `report.svg`: what every suite of `lvlm validate` finds.

Run `python -m studies.validation.report` after anything that moves a prediction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from studies.commands.validate import ERROR_COLUMNS, ROW_COLUMNS, bands_line, error_cells, row_cells, summary_line
from studies.validation.published_files import load_sources
from studies.validation.rows import Suite
from studies.validation.suites import run_suites

REPORT: Final = Path(__file__).with_suffix(".md")
FIGURE: Final = Path(__file__).with_suffix(".svg")
HEAD: Final = """# Validation: predictions beside published and measured data

Written by `python -m studies.validation.report`; `lvlm validate` prints the same. No measurement of our own is in it.
"""
READING: Final = """
## How to read it

- The error is predicted/measured - 1: below zero, the prediction is too fast. Median, mean and p90 are of its size.
- A band holds the measured value in 90 % of cases if it does what it says; `covered` counts how often it did.
- Each source has one engine (last table). It stands for the software that was measured; no row chooses its own. A
  source may have one setting beside it (`published/sources.toml`): CUDA time, or what its plain baseline says of its
  host; such baselines are not scored. What misses:
  [techniques_accuracy](../../docs/techniques_accuracy.md).
- Published figures of equal requests differ by 1.5 to 4 times among their sources; a large error need not be ours.
  The requests were described before any prediction was made; what the source does not say is assumed in the row's note
  (`published/end_to_end.csv`).

## What is validated, and what is not

- Counts (tokens, parameters, cache, FLOPs): by equality with `transformers`; here, figures that papers print.
- Kernels: held-out families of shapes on five devices, errors by fit. More, with targets: [operators.md](operators.md).
- Whole requests: a text model of 70 and one of 176 billion parameters on A100 and H100 with TP 2 to 8 (Splitwise), and
  single vision-language requests on A100, A800, H100, H20, L40S and GeForce cards.
- Methods: ratios of requests with and without them, and their own values, from papers that name their GPU; FLOPs, cache
  and accepted tokens by the source's own convention.
- Many requests at once: the throughput of one published serving curve, to which an engine was fitted; its latencies
  are in [vllm_epd.md](vllm_epd.md), NVIDIA's attribution of TTFT in [nvidia_ttft.md](nvidia_ttft.md).
- Not validated here: other queues and batches that change, energy, cost, other devices, AMD beyond a few kernels,
  8-bit end to end, several nodes.
- What was left out, and why: [published/EXCLUDED.md](published/EXCLUDED.md).
"""


def report(suites: Sequence[Suite]) -> str:
    """Return the report as Markdown."""
    parts = [
        HEAD,
        _summary(suites),
        f"\n{bands_line(suites)}\n",
        "\n![Predicted against measured](report.svg)\n",
        READING,
    ]
    parts += [_section(suite) for suite in suites]
    return "\n".join([*parts, _sources(suites)])


def _summary(suites: Sequence[Suite]) -> str:
    rows = [(f"[{suite.name}](#{suite.name})", *error_cells(suite.summary)) for suite in suites]
    return "## Summary\n\n" + markdown(("suite", *ERROR_COLUMNS), rows)


def _section(suite: Suite) -> str:
    groups = [(name, *error_cells(errors)) for name, errors in suite.groups.items()]
    parts = [f"## {suite.name}\n\n{suite.title}. {summary_line(suite)} {suite.note}\n"]
    parts.append(markdown(("group", *ERROR_COLUMNS), groups))
    if suite.rows:
        rows = [(*row_cells(row), row.source, row.note) for row in suite.rows]
        parts.append(markdown((*ROW_COLUMNS, "source", "note"), rows))
    if suite.fits:
        parts.append(markdown(("fit", *ERROR_COLUMNS), [(fit.name, *error_cells(fit.errors)) for fit in suite.fits]))
    return "\n".join(parts)


def _sources(suites: Sequence[Suite]) -> str:
    used = dict.fromkeys(row.source for suite in suites for row in suite.rows)
    rows = []
    for key in used:
        source = load_sources()[key]
        rows.append(
            (key, f"[{source.title}]({source.url})", source.software or "-", source.engine or "-", _setting(key))
        )
    return "## Sources\n\n" + markdown(("source", "document", "software", "engine here", "setting"), rows)


def _setting(key: str) -> str:
    settings = load_sources()[key].settings
    return "-" if settings is None else settings.why


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    return "\n".join(_lines(columns, rows)) + "\n"


def _lines(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"| {' | '.join(['---'] * len(columns))} |"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def main() -> None:
    """Write both files."""
    from studies import figures, scatter  # half a second of matplotlib

    suites = run_suites()
    REPORT.write_text(report(suites), encoding="utf-8")
    figures.save(scatter.suites_against_measured(suites), FIGURE)
    print(f"wrote {REPORT} and {FIGURE}")


if __name__ == "__main__":
    main()
