"""Relaxed verification: when a visually light draft pays, and with how many requests it stops.

Speed-up is the time of a token without a draft over the time with it, prefill apart. The request and the placement are
those under which the survey's Table 10 is scored by `lvlm validate`: one H200 that holds both models, 128 frames as
12,544 visual tokens. Acceptance of a strict draft comes from the accepted tokens of that table, relaxed by
a + (1 - a) p; what visual keep does to acceptance is not known, so it is varied alone.

    python -m studies.frontiers.relaxed_verification
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from costmodel import Prediction, Workload, load_engine, load_hardware, load_model, predict
from costmodel.base import Array, Quantity
from costmodel.speculation import acceptance_of, accepted_tokens
from costmodel.techniques import Technique
from costmodel.techniques.relaxed_verify import RelaxedVerify
from costmodel.techniques.speculate import Speculate
from studies.frontiers.common import Numbers, markdown, panels, write
from studies.frontiers.texts import RELAXED_PAGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEVICE: Final = "h200-sxm-141gb"
ENGINES: Final = ("hf-eager", "vllm")
PAIRS: Final = {
    "32B/7B": ("qwen2.5-vl-32b", "qwen2.5-vl-7b"),
    "32B/3B": ("qwen2.5-vl-32b", "qwen2.5-vl-3b"),
    "7B/7B": ("qwen2.5-vl-7b", "qwen2.5-vl-7b"),
}
VIDEO: Final = 12_544.0
"""Visual tokens of 128 frames, assumed as in the rows of `studies/validation/published/techniques.csv`."""
LENGTHS: Final = {"one image": 1_024.0, "128 frames": VIDEO}
"""Visual tokens of the requests whose batch is varied."""
LONGER: Final = (VIDEO, 25_000.0, 50_000.0, 75_000.0, 100_000.0, 125_000.0)
"""Visual tokens tried for the one number of Table 10 that is assumed."""
TEXT_TOKENS: Final = 64
OUTPUT_TOKENS: Final = 256
DRAFTED: Final = 10.0
KEEP: Final = 0.1
"""Of Table 10: tokens drafted a round, and the visual tokens that the draft sees."""
RELAXED: Final = (0.0, 0.5, 0.75)
TABLE_10: Final = {
    "32B/7B": ((3.40, 1.40, 1.0), (5.55, 2.04, 0.956), (7.42, 2.61, 0.936)),
    "32B/3B": ((2.99, 0.97, 1.0), (5.30, 1.64, 0.845), (7.33, 2.11, 0.814)),
    "7B/7B": ((5.31, 1.26, 1.0), (7.20, 1.61, 0.974), (8.45, 1.80, 0.976)),
}
"""Survey, Table 10: mean accepted tokens, speed-up and quality kept at each of `RELAXED`."""
ACCEPTANCES: Final[Array] = np.linspace(0.02, 0.98, 49)
GAMMAS: Final[Array] = np.arange(1.0, 17.0)
BATCHES: Final[Array] = 2.0 ** np.arange(0.0, 9.0)
KEEPS: Final = np.array([0.0, 0.05, 0.1, 0.2, 0.5, 1.0])
KEEP_BATCH: Final = 8.0
SHOWN: Final = (1.0, 8.0, 64.0)
"""Batches of the table."""


class Case:
    """A pair of models under an engine, and what its tokens cost.

    Parameters
    ----------
    pair, engine : str
        Keys of `PAIRS`, and one of the catalogue.
    """

    def __init__(self, pair: str, engine: str) -> None:
        self.target, self.draft = (load_model(name) for name in PAIRS[pair])
        self.pair, self.engine, self.device = pair, load_engine(engine), load_hardware(DEVICE)
        self.strict = float(acceptance_of(TABLE_10[pair][0][0], DRAFTED))

    def relaxed(self, probability: float) -> float:
        """Return the acceptance when a share of mismatches passes."""
        return self.strict + (1.0 - self.strict) * probability

    def predicted(self, drafting: Sequence[Technique], *, batch: Quantity = 1.0, visual: float = VIDEO) -> Prediction:
        """Return a prediction of the target, with or without a draft."""
        work = Workload(visual_tokens=visual, text_tokens=TEXT_TOKENS, output_tokens=OUTPUT_TOKENS)
        return predict(self.target, self.device, work, techniques=drafting, batch=batch, engine=self.engine)

    def speed_up(self, *, relax: float = 0.0, keep: Quantity = KEEP, **draft: Any) -> Quantity:  # noqa: ANN401
        """Return how many times faster tokens come with a draft; `batch` and `visual` say of which requests."""
        where = {name: draft.pop(name) for name in ("batch", "visual") if name in draft}
        drafting = Speculate(draft=self.draft, draft_visual_keep=keep, **draft)
        with_draft = self.predicted([drafting, RelaxedVerify(probability=relax)], **where)
        return self.predicted([], **where).tpot_s / with_draft.tpot_s

    def largest_batch(self, visual: float) -> int:
        """Return the requests that fit with the draft beside the target."""
        drafting = Speculate(draft=self.draft, tokens=DRAFTED, draft_visual_keep=KEEP)
        return self.predicted([drafting], visual=visual).max_batch


def table_10(case: Case, visual: float = VIDEO) -> list[Numbers]:
    """Return ours beside the published points; only the strict accepted tokens are taken from the table."""
    rows = []
    for relax, (accepted, speed_up, quality) in zip(RELAXED, TABLE_10[case.pair], strict=True):
        ours = float(case.speed_up(tokens=DRAFTED, acceptance=case.strict, relax=relax, visual=visual))
        row = {"relaxed": relax, "published": speed_up, "ours": ours, "error": ours / speed_up - 1.0}
        found = float(np.asarray(accepted_tokens(case.relaxed(relax), DRAFTED)))
        rows.append({**row, "accepted_published": accepted, "accepted_ours": found, "quality_kept": quality})
    return rows


def surface(case: Case, gammas: Array, acceptances: Array) -> Array:
    """Return the speed-up of one request, acceptances by drafted tokens."""
    return np.asarray(case.speed_up(tokens=gammas[None, :], acceptance=acceptances[:, None]))


def over_batch(case: Case, batches: Array, gammas: Array) -> list[Numbers]:
    """Return the speed-up over the batch with `DRAFTED` tokens and with the best number, by length and relaxation."""
    rows = []
    for request, visual in LENGTHS.items():
        for relax in RELAXED:
            how = {"acceptance": case.relaxed(relax), "visual": visual}
            fixed = np.asarray(case.speed_up(batch=batches, tokens=DRAFTED, **how))
            every = np.asarray(case.speed_up(batch=batches[None, :], tokens=gammas[:, None], **how))
            row = {"request": request, "relaxed": relax, "fits": case.largest_batch(visual)}
            row |= {"speed_up": fixed.tolist(), "best_speed_up": every.max(axis=0).tolist()}
            row["best_tokens"] = gammas[every.argmax(axis=0)].tolist()
            rows.append(row | {"pays": pays(batches, fixed)})
    return rows


def pays(batches: Array, speed_ups: Array) -> str:
    """Return at which batches of the axis a draft pays; a border is found on a line between two points."""
    gains = speed_ups > 1.0
    if gains.all() or not gains.any():
        return "at all" if gains.all() else "never"
    borders = np.flatnonzero(gains[1:] != gains[:-1])
    words = []
    for i in borders:
        pair = slice(int(i), int(i) + 2)
        order = np.argsort(speed_ups[pair])
        at = np.exp2(np.interp(1.0, speed_ups[pair][order], np.log2(batches[pair])[order]))
        words.append(f"{'from' if gains[i + 1] else 'up to'} {at:.0f}")
    return ", ".join(words)


def numbers(smoke: bool) -> Numbers:  # noqa: FBT001 - the size, as the command line has it
    """Return the table, the surfaces, and the curves over batch and visual keep."""
    gammas, acceptances = (GAMMAS[::5], ACCEPTANCES[::9]) if smoke else (GAMMAS, ACCEPTANCES)
    batches = BATCHES[::3] if smoke else BATCHES
    cases = []
    for pair in PAIRS:
        for engine in ENGINES:
            case = Case(pair, engine)
            keeps = case.speed_up(tokens=DRAFTED, acceptance=case.strict, keep=KEEPS, batch=KEEP_BATCH)
            found = surface(case, gammas, acceptances)
            cases.append(
                {
                    "pair": pair,
                    "engine": engine,
                    "strict_acceptance": case.strict,
                    "table_10": table_10(case),
                    "surface": found.tolist(),
                    "break_even_acceptance": [crossing(acceptances, column) for column in found.T],
                    "over_batch": over_batch(case, batches, gammas),
                    "longer": [{"visual": v, "rows": table_10(case, v)} for v in LONGER],
                    "over_keep": np.asarray(keeps).tolist(),
                }
            )
    axes = {"gammas": gammas, "acceptances": acceptances, "batches": batches, "keeps": KEEPS}
    return {"device": DEVICE, **{name: axis.tolist() for name, axis in axes.items()}, "cases": cases}


def crossing(acceptances: Array, speed_ups: Array) -> float | None:
    """Return the acceptance from which on a draft pays, None where it never does on the axis."""
    if speed_ups[-1] < 1.0:
        return None
    return float(np.interp(1.0, speed_ups, acceptances))


def table(found: Numbers) -> str:
    """Return ours beside the survey's."""
    rows = []
    for first, second in zip(found["cases"][::2], found["cases"][1::2], strict=True):
        for eager, fast in zip(first["table_10"], second["table_10"], strict=True):
            one = (first["pair"], f"{eager['relaxed']:.0%}", f"{eager['accepted_published']}")
            two = (f"{eager['accepted_ours']:.2f}", f"{eager['published']}")
            errors = [f"{r['ours']:.2f} ({r['error']:+.0%})" for r in (eager, fast)]
            rows.append((*one, *two, *errors, f"{eager['quality_kept']:.1%}"))
    columns = ("pair", "relaxed", "accepted, published", "ours", "speed-up, published")
    return markdown((*columns, "ours, hf-eager", "ours, vllm", "quality kept, published"), rows)


def batch_table(found: Numbers) -> str:
    """Return the speed-ups by batch, strict and most relaxed."""
    rows = []
    shown = [i for i, batch in enumerate(found["batches"]) if batch in SHOWN]
    for case in found["cases"]:
        for r in case["over_batch"]:
            if r["relaxed"] in (RELAXED[0], RELAXED[-1]):
                cells = [f"{r['speed_up'][i]:.2f}{'*' * (found['batches'][i] > r['fits'])}" for i in shown]
                best = f"{r['best_speed_up'][0]:.2f} ({r['best_tokens'][0]:g})"
                head = (r["request"], case["pair"], case["engine"], f"{r['relaxed']:.0%}")
                rows.append((*head, *cells, f"{r['fits']}", r["pays"], best))
    batches = [f"batch {found['batches'][i]:g}" for i in shown]
    columns = ("request", "pair", "engine", "relaxed", *batches, "fits", "pays", "best of one")
    return markdown(columns, sorted(rows, key=lambda r: r[0] != "one image"))


def longer_table(found: Numbers) -> str:
    """Return the median error of the eager engine by visual tokens."""
    cells = []
    for pairs in (("32B/7B", "32B/3B"), ("7B/7B",)):
        cases = [c for c in found["cases"] if c["engine"] == "hf-eager" and c["pair"] in pairs]
        errors = [[r["error"] for c in cases for r in c["longer"][i]["rows"]] for i in range(len(LONGER))]
        cells.append((" and ".join(pairs), *(f"{np.median(e):+.0%}" for e in errors)))
    return markdown(("pairs", *(f"{v:,.0f}" for v in LONGER)), cells)


def case_rows(found: Numbers, key: str, form: str) -> list[tuple[str, ...]]:
    """Return one list of every case as cells."""
    cells = [["never" if v is None else format(v, form) for v in case[key]] for case in found["cases"]]
    return [(case["pair"], case["engine"], *row) for case, row in zip(found["cases"], cells, strict=True)]


def median_error(found: Numbers, engine: str) -> float:
    """Return the median error beside Table 10."""
    errors = [abs(r["error"]) for case in found["cases"] if case["engine"] == engine for r in case["table_10"]]
    return float(np.median(errors))


def report(found: Numbers) -> str:
    """Return the page."""
    gammas = [f"{g:g} drafted" for g in found["gammas"]]
    shown = range(0, len(gammas), 3 if len(gammas) == GAMMAS.size else 1)
    least = [(r[0], r[1], *(r[2 + i] for i in shown)) for r in case_rows(found, "break_even_acceptance", ".2f")]
    worst = min(q for rows in TABLE_10.values() for _, _, q in rows)
    return RELAXED_PAGE.format(
        device=DEVICE,
        drafted=DRAFTED,
        keep=KEEP,
        rows=DRAFTED + 1,
        table=table(found),
        median=median_error(found, "hf-eager"),
        other=median_error(found, "vllm"),
        batches=batch_table(found),
        acceptance=markdown(("pair", "engine", *(gammas[i] for i in shown)), least),
        keeps=markdown(("pair", "engine", *(f"{k:.0%}" for k in found["keeps"])), case_rows(found, "over_keep", ".2f")),
        longer=longer_table(found),
        keep_batch=KEEP_BATCH,
        quality=worst,
    )


def draw(found: Numbers, path: Path) -> None:
    """Draw Table 10 beside ours, the speed-up over the batch, and a surface."""

    def paint(axes: Sequence[Axes]) -> None:
        for engine, marker in zip(ENGINES, "os", strict=True):
            rows = [r for c in found["cases"] if c["engine"] == engine for r in c["table_10"]]
            axes[0].plot([r["published"] for r in rows], [r["ours"] for r in rows], marker, label=f"ours, {engine}")
        axes[0].plot([0.8, 3.5], [0.8, 3.5], "k:", label="equal")
        axes[0].set(xlabel="speed-up, survey Table 10", ylabel="speed-up, ours", title="beside Table 10")
        for case in (c for c in found["cases"] if c["engine"] == "vllm"):
            for r in (r for r in case["over_batch"] if r["relaxed"] == RELAXED[-1]):
                style = "--" if r["request"] == "one image" else "-"
                axes[1].plot(found["batches"], r["speed_up"], style, label=f"{case['pair']}, {r['request']}")
        axes[1].axhline(1.0, color="black", linestyle=":")
        axes[1].set_xscale("log", base=2)
        axes[1].set(xlabel="batch", ylabel="speed-up", title="vllm, 10 drafted, relaxed by 75 %")
        _surface(axes[2], found)
        axes[0].legend(fontsize=7)
        axes[1].set_ylim(0.0, 5.2)  # room for the legend
        axes[1].legend(fontsize=7, loc="upper left", ncols=2)

    panels(path, 3, paint)


def _surface(axes: Axes, found: Numbers) -> None:
    case = next(c for c in found["cases"] if (c["pair"], c["engine"]) == ("32B/7B", "vllm"))
    drawn = axes.contourf(found["gammas"], found["acceptances"], case["surface"], levels=12, cmap="cividis")
    axes.contour(found["gammas"], found["acceptances"], case["surface"], levels=[1.0], colors="white")
    axes.figure.colorbar(drawn, ax=axes, label="speed-up")
    for row in case["table_10"]:
        strict = case["strict_acceptance"]
        axes.plot([DRAFTED], [strict + (1.0 - strict) * row["relaxed"]], "r*")
    axes.set(xlabel="drafted tokens", ylabel="acceptance", title="32B/7B, vllm; white: 1, stars: Table 10")


if __name__ == "__main__":
    write("relaxed_verification", numbers, report, draw)
