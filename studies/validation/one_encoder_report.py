"""The part of `vllm_epd.md` on an encoder of its own: what is predicted, beside what the blog says in words."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

from costmodel.engine import EngineProfile
from studies.validation.report import markdown
from studies.validation.serving_curve import THROUGHPUT, TPOT, TTFT, CurvePoint, goodput_rate
from studies.validation.vllm_epd import IMAGES, PREDICTIONS, RATES, STORAGES, TEXTS, one_encoder, predict_run, traffic

BEFORE, APART = "DP4", "1E3PD"
MODERATE: Final = 8
"""An offered rate at which no deployment of the grid is overloaded [requests/s]."""
BLOG_GOODPUT: Final[Mapping[tuple[int, int], tuple[str, str]]] = {
    (400, 1): ("23", "24"),
    (400, 4): ("6", "12"),
    (2000, 1): ("8", "18"),
    (2000, 2): ("", "11"),
    (2000, 3): ("4", "9"),
    (2000, 4): ("4", "8"),
}
"""Rates that keep the promises, by text and pictures, of both topologies, as the text of the blog says [requests/s]."""
Runs: TypeAlias = Mapping[tuple[int, int, str, float, str], float]

DEPLOYMENT: Final = """
## An encoder of its own: 1E3PD

`vllm_epd_predictions.csv` holds DP4 and 1E3PD with 400, 800 and 2,000 tokens of text, from the constants above, rates
of storage that were measured apart from any serving, and nothing else. No curve of 1E3PD was read or fitted.

What is documented, and modelled (`encoder_apart.py`, `vllm_epd.one_encoder`):

- The proxy takes a request apart, sends one of a picture each to the encoder (no text, one token, no stream), waits for
  all, and only then forwards the original request, pictures and all, to an instance of prefill and decode that it draws
  at random (`disagg_epd_proxy.py` of vLLM pull request 25233; of the encoders it takes them in turn, pull request
  52491). The blog's design speaks of hashes in place of pixels; the code that was released forwards the pixels.
- All four are whole vLLM servers. Pictures are decoded and processed twice: by the encoder's server, and by that of
  prefill and decode, which needs their hashes and sizes.
- The three are processes of their own and do not step together.
- The encoder runs no language model and writes embeddings to a file, those of DeepStack included (8.2 MB a picture);
  the others read it. Their steps wait for that (`ECSharedStorageConnector`, the one connector of 0.11.1).
- 64 sequences an instance, 114,688 tokens a step of the encoder's: the script with which an author of the blog later
  tried to reproduce it (`epd_test_num.sh`, [issue 31961](https://github.com/vllm-project/vllm/issues/31961)). DP4 stays
  as it was fitted, with 256 a rank.

What is assumed:

- Of the 36.2 ms that a request takes of its server, the encoder's spends 1/150 on a picture: nearly all of it is taken
  to be the streaming of 150 tokens. No measurement splits it. If it were spent once a picture, 1E3PD would saturate far
  below DP4 (last table), which nobody saw.
- A file takes what it takes on a machine of ours where files are never deleted (`embedding_file.txt`), and the copy
  over PCIe. In memory that was used before it is four times as fast. The link alone and the store of a later connector
  are in the last table: storage decides when the encoder saturates. This choice was not blind: the blog's words, quoted
  below, were known, and link and store had been tried, when the file was taken for being what was released. Its rate
  was measured then and not moved.
- The proxy itself, one process of Python, costs nothing.

The cluster of the simulator gives a request one preprocessing, in front of the encoder. A second one, in front of
prefill, it cannot express, so the four instances run one after another, each as a simulation of its own: the encoder's
with a request a picture, then each of the others with what has become ready for it, when it has. Nothing flows back, so
this is exact. With no second preprocessing and instances in turn the two agree (`test_published.py`).
"""
READING: Final = """
Of 1E3PD the blog gives curves as pictures and some figures in words; the words are all that is compared here. It says
that p99 TTFT and TPOT are often 20 to 50 % lower with short texts (30 to 50 % and 20 to 40 % with long ones), that DP4
becomes unstable between 12 and 14 requests/s with several pictures, and that decode throughput gains 10 to 30 % with
long texts.

- **Short texts.** Goodput agrees with the four figures that are said. p99 TPOT falls by more than the blog says:
  nothing but prefill and loading disturbs decode in an instance of 1E3PD here, and what else shares its host is not
  modelled. p99 TTFT falls by less: two servers and a file stand in front of the first token.
- **Long texts.** Goodput of both topologies is predicted too high, of 1E3PD by a third to twice. The fit saw 400 tokens
  of text alone; prefill of long prompts in that server seems to cost about twice what kernels and launches add up to
  here.
- **Who wins.** 1E3PD is ahead everywhere, but hardly with four pictures, where one encoder saturates as early as one
  server of DP4, and with one picture and 2,000 tokens, where three devices do the work of four.
"""


def section(engine: EngineProfile) -> str:
    """Return the part of the report."""
    points = _predictions()
    runs = {(*point.run, point.metric): point.value for point in points}
    return "\n".join([DEPLOYMENT, _ratios(runs), _goodputs(points), READING, _sensitivity(engine)])


def _predictions() -> list[CurvePoint]:
    """Return what was written last."""
    with PREDICTIONS.open(encoding="utf-8", newline="") as file:
        return [CurvePoint.model_validate(_typed(row)) for row in csv.DictReader(file)]


def _typed(row: Mapping[str, str]) -> Mapping[str, Any]:
    return {name: value if name in ("topology", "metric") else float(value) for name, value in row.items()}


def _ratios(runs: Runs) -> str:
    rows = []
    for text in TEXTS:
        for n in IMAGES:
            cells = [str(text), str(n)]
            for rate, metric, form in (
                (RATES[-1], THROUGHPUT, ".2f"),
                (MODERATE, TTFT, ".0f"),
                (MODERATE, TPOT, ".0f"),
            ):
                before, apart = (runs[text, n, name, rate, metric] for name in (BEFORE, APART))
                cells.append(f"{apart:{form}} / {before:{form}} = {apart / before:.2f}")
            rows.append(tuple(cells))
    head = (
        "text",
        "pictures",
        f"throughput at {RATES[-1]} offered [requests/s], {APART} / {BEFORE}",
        f"p99 TTFT at {MODERATE} requests/s [ms]",
        f"p99 TPOT at {MODERATE} requests/s [ms]",
    )
    return "### Predicted, beside DP4\n\n" + markdown(head, rows)


def _goodputs(points: Sequence[CurvePoint]) -> str:
    rows = []
    for text in TEXTS:
        for n in IMAGES:
            ours = [goodput_rate([p for p in points if p.run[:3] == (text, n, name)]) for name in (BEFORE, APART)]
            theirs = BLOG_GOODPUT.get((text, n), ("", ""))
            rows.append((str(text), str(n), *(f"{rate:g}" for rate in ours), *(some or "not said" for some in theirs)))
    names = [f"{name}, {whose}" for whose in ("predicted", "the blog's text") for name in (BEFORE, APART)]
    note = "The highest rate up to which all runs keep 20 s of p99 TTFT and 100 ms of p99 TPOT; the grid ends at 24.\n"
    return "\n### Goodput [requests/s]\n\n" + markdown(("text", "pictures", *names), rows) + "\n" + note


def _sensitivity(engine: EngineProfile) -> str:
    cases: dict[str, dict[str, Any]] = {f"storage: {name}": {"storage": some} for name, some in STORAGES.items()}
    cases["storage: file, a whole request's time on the encoder's server"] = {"encoder_answers": False}
    rows = []
    for name, settings in cases.items():
        cells = [name]
        for text in (TEXTS[0], TEXTS[-1]):
            for n in IMAGES:
                found = predict_run(one_encoder(n, engine, **settings), traffic(text, n, RATES[-1]))
                cells.append(f"{found[THROUGHPUT]:.1f}")
        rows.append(tuple(cells))
    head = ("1E3PD", *(f"{n} + {text}" for text in (TEXTS[0], TEXTS[-1]) for n in IMAGES))
    title = (
        f"### What storage and server decide: throughput at {RATES[-1]} offered, by pictures + text [requests/s]\n\n"
    )
    return title + markdown(head, rows)
