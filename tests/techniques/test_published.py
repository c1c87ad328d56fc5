"""Published measurements of methods: what is scored, what is left out, and how a row becomes a prediction."""

import csv
import re

import pytest

from costmodel import Unsupported, hardware_names, load_engine, load_model
from costmodel.query import build_query
from costmodel.techniques import primitives
from studies.validation import methods
from studies.validation.methods import EXACT, MEASURED, MethodFigure, Pair, counted, is_known, layer_flops, rows_of
from studies.validation.published_files import FOLDER, read_rows, source_of
from studies.validation.requests import engine_of
from studies.validation.suites import techniques as suite

FIGURES = {name: read_rows(name, MethodFigure) for name in (MEASURED, EXACT)}
ALL = [figure for figures in FIGURES.values() for figure in figures]
LEFT_OUT = {MEASURED: {57, 58, 292, 294, 296, 298, 317, 360}, EXACT: {205, 209, 267, 272, 324, 352}}
MOST_LEFT_OUT = 0.2


def test_at_most_a_fifth_of_the_candidates_is_left_out_and_each_says_why():
    text = (FOLDER / "EXCLUDED.md").read_text(encoding="utf-8")
    told = {int(rank) for cell in re.findall(r"^\| ([\d, ]+) \|", text, re.MULTILINE) for rank in cell.split(",")}
    for name, left in LEFT_OUT.items():
        ranks = [figure.rank for figure in FIGURES[name]]
        assert len(ranks) == len(set(ranks))
        assert not left & set(ranks)
        assert left <= told
        assert len(left) <= MOST_LEFT_OUT * (len(left) + len(ranks))
    assert len(FIGURES[MEASURED]) == 55
    assert len(FIGURES[EXACT]) == 32


@pytest.mark.parametrize("figure", ALL, ids=lambda figure: str(figure.rank))
def test_a_row_has_a_source_a_model_and_techniques_that_there_are(figure):
    assert source_of(figure.source).title
    assert load_model(figure.model).decoder.n_layers
    assert is_known(figure.what)
    assert figure.rewrites()
    if figure in FIGURES[MEASURED]:
        assert figure.hardware in hardware_names()
        assert source_of(figure.source).software
        assert engine_of(figure.source)
        assert figure.note
    else:
        assert not figure.hardware
        assert bool(figure.convention) == (figure.what != "kv_bytes")


@pytest.mark.parametrize("figure", ALL, ids=lambda figure: str(figure.rank))
def test_a_row_is_what_the_list_has(figure, shared_data):
    with (shared_data / "validation" / "technique_measurements.csv").open(encoding="utf-8", newline="") as lines:
        listed = {int(line["rank"]): line for line in csv.DictReader(lines)}
    line = listed[figure.rank]
    assert float(figure.value) == float(line["method_value"])
    strict = figure.what == "accepted_tokens"  # its baseline is the row of strict verification
    baseline = listed[figure.rank - {171: 4, 175: 2, 181: 2}[figure.rank]]["method_value"] if strict else None
    assert float(figure.baseline) == float(baseline or line["baseline_value"])


def test_a_missing_primitive_is_an_error_that_names_the_row(monkeypatch):
    def missing(kind):
        raise Unsupported(f"primitive={kind!r} is not modelled; known: none")

    monkeypatch.setattr("costmodel.techniques.applied.load_fields", missing)
    figure = next(figure for figure in ALL if figure.techniques.startswith("token_reduce"))
    with pytest.raises(Unsupported, match=rf"technique row {figure.rank} \(token_reduce.*is not modelled") as caught:
        figure.rewrites()
    assert "\n" not in str(caught.value)
    with pytest.raises(Unsupported, match="technique row"):
        suite.evaluate()
    assert primitives.primitive_names()


@pytest.mark.parametrize(
    ("column", "text", "says"),
    [
        ("ratio", "0.9", "is not value/baseline"),
        ("unit", "furlongs", "must be one of"),
        ("scored", "never", "scored"),
        ("visual_tokens", "100", "replaces images"),
        ("convention", "paper", "convention"),
    ],
)
def test_a_broken_row_is_named(tmp_path, monkeypatch, column, text, says):
    with (FOLDER / MEASURED).open(encoding="utf-8", newline="") as lines:
        row = {**next(csv.DictReader(lines)), column: text}
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)
    monkeypatch.setattr("studies.validation.published_files.FOLDER", tmp_path)
    with pytest.raises(ValueError, match=says) as caught:
        read_rows("rows.csv", MethodFigure)
    assert "rows.csv line 2" in str(caught.value)


def test_a_measurement_gives_a_ratio_and_where_it_can_a_value(monkeypatch):
    monkeypatch.setattr(methods, "timed", lambda _figure: Pair(0.2, 0.1, 0.05, 0.15))
    both = next(figure for figure in FIGURES[MEASURED] if figure.scored == "both" and figure.unit == "ms")
    value, ratio = rows_of(both)
    assert (value.predicted, value.low, value.high, value.unit) == (0.1, 0.05, 0.15, "s")
    assert value.measured == pytest.approx(float(both.value) / 1e3)
    assert (ratio.predicted, ratio.unit, ratio.what) == (0.5, "ratio", f"{both.what} ratio")
    assert ratio.measured == pytest.approx(float(both.value / both.baseline))
    alone = next(figure for figure in FIGURES[MEASURED] if figure.scored == "ratio")
    assert [row.unit for row in rows_of(alone)] == ["ratio"]


def test_frames_of_a_video_are_its_requests():
    figure = next(figure for figure in ALL if figure.frames)
    workload = figure.workload()
    assert not workload.images
    assert [video.frames for video in workload.videos] == [32]
    query = build_query(load_model(figure.model), workload, load_engine("ideal"))
    assert query.visual_tokens == 6273  # 32 frames of 196 tokens and a newline


def test_baselines_in_flops_are_those_that_papers_print():
    for figure in FIGURES[EXACT]:
        if figure.what != "prefill_flops" or figure.scored == "ratio" or figure.source == "dycoke":
            continue
        plain = build_query(load_model(figure.model), figure.workload(), load_engine("ideal"))
        assert layer_flops(plain, figure) == pytest.approx(float(figure.baseline) * 1e12, rel=5e-3), figure.rank


def test_cache_of_a_baseline_is_what_is_printed():
    figure = next(figure for figure in FIGURES[EXACT] if figure.rank == 270)
    assert counted(figure).baseline == pytest.approx(18.8 * 2**30, rel=5e-3)
