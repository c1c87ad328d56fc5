"""`lvlm validate`: the published files, the statistics, the suites, the command and the committed report."""

import csv
import io
import json
import statistics
from pathlib import Path

import polars as pl
import pytest

from costmodel import Workload, engine_names, hardware_names, load_hardware, predict
from costmodel.efficiency import Chip, GemmCurve, gemm_s
from studies.cli import main
from studies.validation import published_files, report, serving_curve, suites, vllm_epd
from studies.validation.methods import EXACT, MEASURED, MethodFigure
from studies.validation.operators import fits_of, load_profiles, load_scored
from studies.validation.published_files import (
    FOLDER,
    CountFigure,
    EndToEnd,
    PhaseTimes,
    load_sources,
    model_of,
    read_rows,
    source_of,
)
from studies.validation.requests import STAGES, WHATS, band, engine_of, predict_figure, value
from studies.validation.rows import Errors, Row, Suite, bands, by_group, errors_of, pooled
from studies.validation.suites import run_suites, suite_names

FILES = {
    "end_to_end.csv": EndToEnd,
    "counts.csv": CountFigure,
    "splitwise.csv": PhaseTimes,
    serving_curve.FILE: serving_curve.CurvePoint,
    **dict.fromkeys((MEASURED, EXACT), MethodFigure),
}
FIGURES = [row for name in ("end_to_end.csv", "counts.csv") for row in read_rows(name, FILES[name])]
SERVED = read_rows("end_to_end.csv", EndToEnd)
PHASES = read_rows("splitwise.csv", PhaseTimes)
METHODS = [row for name in (MEASURED, EXACT) for row in read_rows(name, MethodFigure)]
SUMMARY = {"rows", "median", "mean", "p90", "bias", "banded", "inside", "exact", "coverage"}
ROW = {"name", "what", "predicted", "measured", "unit", "low", "high", "error", "inside", "source", "note", "exact"}


# The files


def test_every_file_of_the_folder_is_read_or_explained():
    assert {path.name for path in FOLDER.glob("*.csv")} == set(FILES)
    assert {path.name for path in FOLDER.iterdir() if path.is_file()} == {*FILES, "sources.toml", "EXCLUDED.md"}


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_every_figure_has_a_source_and_a_known_model(figure):
    source = source_of(figure.source)
    assert source.title
    assert source.url.startswith("https://")
    assert figure.name
    assert figure.where
    assert not figure.model or model_of(figure.model).parameters()["total"] > 0
    assert not figure.hardware or figure.hardware in hardware_names()


@pytest.mark.parametrize("figure", SERVED, ids=lambda figure: figure.name)
def test_every_served_figure_says_what_is_asked_and_what_is_assumed(figure):
    assert figure.what in WHATS
    assert figure.hardware
    assert figure.note
    assert source_of(figure.source).software
    assert engine_of(figure.source).name in engine_names()


def test_names_of_figures_are_unique_and_no_source_is_idle():
    names = [figure.name + figure.source for figure in FIGURES]
    assert len(names) == len(set(names))
    used = {figure.source for figure in (*FIGURES, *METHODS)} | {"splitwise", vllm_epd.SOURCE}
    assert used == set(load_sources())


def test_splitwise_requests_take_their_prompt_and_their_steps():
    for times in PHASES:
        assert model_of(times.model).decoder.runs
        assert times.hardware in hardware_names()
        assert times.e2e_ms == pytest.approx(times.prompt_ms + (times.output_tokens - 1) * times.token_ms, rel=0.05)


def test_bloom_is_an_opt_of_its_size():
    published = 176_247_271_424  # bigscience/bloom, safetensors metadata
    assert model_of("bloom-176b").parameters()["total"] == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize(
    ("column", "text", "says"),
    [
        ("published", "-3", "published"),
        ("unit", "furlongs", "must be one of"),
        ("images", "4x0x1920", "width=0"),
        ("images", "wide", "must read WIDTHxHEIGHT"),
        ("batch", "0", "batch"),
        ("visual_tokens", "100", "replaces images"),
    ],
)
def test_a_broken_row_is_named(tmp_path, monkeypatch, column, text, says):
    lines = list(csv.DictReader((FOLDER / "end_to_end.csv").open(encoding="utf-8", newline="")))
    row = {**next(line for line in lines if line["images"]), column: text}
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)
    monkeypatch.setattr(published_files, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match=says) as caught:
        read_rows("rows.csv", EndToEnd)
    assert "rows.csv line 2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_source_and_an_unknown_engine_are_named(monkeypatch):
    with pytest.raises(LookupError, match="unknown source 'nobody'"):
        source_of("nobody")
    changed = source_of("fastv").model_copy(update={"engine": "fussed"})
    monkeypatch.setattr("studies.validation.requests.source_of", lambda _key: changed)
    with pytest.raises(LookupError, match=r"sources\.toml: sources\.fastv\.engine: unknown engine 'fussed'"):
        engine_of("fastv")


def test_figures_in_their_units():
    by_name = {figure.name: figure for figure in FIGURES}
    decode = by_name["Qwen2.5-VL-7B decode"]
    assert decode.si_unit == "s"
    assert (decode.measured, decode.rounding) == pytest.approx((0.05894, 5e-6))
    cache = by_name["Qwen2.5-VL-72B cache of 40K tokens"]
    assert (cache.measured, cache.rounding) == (13e9, 0.5e9)
    assert by_name["LLaVA-1.5 tokens of 336x336"].rounding == 0
    assert len(by_name["vLLM TTFT of 8 video frames"].pictures()) == 8


# Requests


def test_quantities_of_a_prediction_are_its_stages():
    prediction = predict_figure(next(figure for figure in SERVED if figure.what == "ttft_s"))
    parts = {what: value(prediction, what) for what in WHATS}
    assert parts["preprocess_s"] + parts["device_ttft_s"] == pytest.approx(parts["ttft_s"], rel=1e-12)
    assert parts["encode_s"] + parts["prefill_s"] == pytest.approx(parts["device_ttft_s"], rel=1e-12)
    whole = float(prediction.total_s)
    assert parts["preprocess_s"] + parts["device_total_s"] == pytest.approx(whole, rel=1e-9)
    assert 0 < parts["encode_share"] < 1
    for what in (*STAGES, "ttft_s", "tpot_s"):
        low, high = band(prediction, what)
        assert low < parts[what] < high
    assert band(prediction, "encode_share") is None
    with pytest.raises(LookupError, match="unknown quantity"):
        value(prediction, "speed")


def test_an_engine_that_is_no_forecast_has_no_bands():
    figure = next(figure for figure in SERVED if figure.what == "encode_s")
    request = Workload(figure.pictures(), text_tokens=figure.text_tokens, output_tokens=figure.output_tokens)
    ideal = predict(figure.model, figure.hardware, request, engine="ideal")
    assert band(ideal, "encode_s") is None
    assert band(ideal, "tpot_s") is None


# Statistics


def row(predicted, measured, low=None, high=None, *, what="ttft_s", rounding=0.0):
    return Row("request", what, predicted, measured, "s", "fastv", low=low, high=high, rounding=rounding)


def test_errors_of_a_hand_made_case():
    rows = [
        row(1.1, 1.0, 0.9, 1.3),  # inside
        row(0.8, 1.0, 0.6, 0.9),  # above the band
        row(3.0, 2.0),  # no band
        row(1.004, 1.0, 1.01, 1.02, rounding=0.005),  # below the band, but the same to the last digit
        row(0.5, 1.0, 1.0, 1.0),  # on the edge
    ]
    found = errors_of(rows)
    assert found.median == pytest.approx(0.2)
    assert found.mean == pytest.approx((0.1 + 0.2 + 0.5 + 0.004 + 0.5) / 5)
    assert found.p90 == pytest.approx(0.5)
    assert found.bias == pytest.approx(0.004)
    assert (found.rows, found.banded, found.inside, found.exact) == (5, 4, 2, 1)
    assert found.coverage == 0.5
    assert [one.inside for one in rows] == [True, False, None, False, True]
    assert errors_of([]) == Errors(0)
    assert errors_of([]).coverage is None


def test_groups_keep_their_order_and_their_rows():
    rows = [row(1, 2, what="b"), row(1, 1, what="a"), row(3, 2, what="b")]
    found = by_group(rows, lambda one: one.what)
    assert list(found) == ["b", "a"]
    assert found["b"].mean == pytest.approx(0.5)
    assert sum(errors.rows for errors in found.values()) == 3


def test_pooled_mean_and_coverage_are_those_of_the_rows():
    first = [row(1.2, 1.0, 0.9, 1.1), row(0.7, 1.0, 0.1, 0.5)]
    second = [row(1.05, 1.0, 1.2, 1.3)]
    both, together = pooled([errors_of(first), errors_of(second), Errors(0)]), errors_of(first + second)
    assert both.mean == pytest.approx(together.mean)
    assert (both.rows, both.coverage) == (together.rows, together.coverage)
    assert both.median is None
    assert pooled([errors_of(first), Errors(0)]) == errors_of(first)


def test_bands_count_kernels_and_requests_apart():
    requests = Suite("a", "A", rows=(row(1, 1, 0, 2), row(1, 9, 0, 2)))
    found = bands([requests, *run_suites(["operators"])])
    assert found["requests"] == {"banded": 2, "inside": 1, "coverage": 0.5}
    assert found["banded"] > 300_000
    assert bands([Suite("c", "C", rows=(row(1, 1),))])["coverage"] is None


# Suites


def test_suites_are_the_files_of_their_folder(tmp_path, monkeypatch):
    files = {path.stem for path in Path(suites.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(suite_names()) == files == {"counts", "operators", "published", "serving", "splitwise", "techniques"}
    text = "from studies.validation.rows import Suite\ndef evaluate(data=None):\n    return Suite('new', str(data))\n"
    (tmp_path / "new.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(suites, "__path__", [*suites.__path__, str(tmp_path)])
    assert "new" in suite_names()
    assert run_suites(["new"], Path("tables"))[0].title == "tables"


@pytest.mark.parametrize("name", suite_names())
def test_every_suite_scores_something(name):
    (suite,) = run_suites([name])
    assert suite.name == name
    assert suite.title
    assert suite.lines
    assert suite.groups
    assert suite.summary.rows == sum(errors.rows for key, errors in suite.groups.items() if " on " not in key)
    for one in suite.rows:
        assert source_of(one.source)
        assert 0 < one.predicted < float("inf")
        assert one.measured > 0


def test_published_counts_agree():
    (suite,) = run_suites(["counts"])
    differ = {one.name for one in suite.rows if not one.exact}
    # the papers of these do not give their text length, or round early
    assert differ == {
        "LLaVA-NeXT-7B cache of 2880 tokens",
        "prefill of LLaVA-OneVision-0.5B, 6272 tokens",
        "prefill of LLaVA-OneVision-7B, 6272 tokens",
        "prefill of LLaVA-OneVision-72B, 6272 tokens",
    }
    assert max(abs(one.error) for one in suite.rows if one.name in differ) < 0.03


def test_operators_of_the_fitted_files():
    fits = fits_of(load_profiles())
    (suite,) = run_suites(["operators"])
    assert len(suite.fits) == len(fits) == sum(len(profile.curves) for profile in load_profiles())
    rows = [fit.errors for fit in fits if fit.errors.rows]
    assert suite.summary.rows == sum(errors.rows for errors in rows)
    assert suite.summary.mean == pytest.approx(sum(e.rows * e.mean for e in rows) / suite.summary.rows)
    assert 0.85 < suite.summary.coverage < 0.95


# Raw tables


def write_gemm(folder, slower=1.0):
    """The table of products of an A100 as its committed curve sees them, times a factor."""
    device = "a100-sxm4-80gb"
    profile = next(p for p in load_profiles() if (p.device, p.library) == (device, "sglang"))
    curve = profile.find("gemm", "bf16").curve()
    assert isinstance(curve, GemmCurve)
    n, k = ([value for value in range(256, 4352, 256) for _ in range(4)], [512, 1024, 2048, 4096] * 16)
    m = [64] * len(n)
    columns = {"m": m, "n": n, "k": k}
    arrays = pl.DataFrame(columns)
    seconds = gemm_s(
        arrays["m"].to_numpy(),
        d_in=arrays["k"].to_numpy(),
        d_out=arrays["n"].to_numpy(),
        chip=Chip.of(load_hardware(device), 16),
        curve=curve,
        bytes_per_value=2.0,
        resident_share=0.19,
    )
    names = {"framework": ["SGLang"] * len(n), "gemm_dtype": ["bfloat16"] * len(n)}
    path = folder / "data" / "a100_sxm" / "gemm" / "sglang" / "1" / "gemm_perf.parquet"
    path.parent.mkdir(parents=True)
    pl.DataFrame({**names, **columns, "latency": seconds * slower * 1e3}).write_parquet(path)


def test_raw_tables_score_the_committed_curve(tmp_path):
    write_gemm(tmp_path)
    (fit,) = fits_of(load_scored(tmp_path))
    assert fit.name == "a100-sxm4-80gb sglang gemm.bf16"
    assert 0 < fit.errors.rows < 64
    assert fit.errors.mean == pytest.approx(0, abs=1e-9)
    assert fit.errors.coverage == 1


def test_raw_tables_that_are_slower_leave_the_band(tmp_path, capsys):
    write_gemm(tmp_path, slower=4.0)
    assert main(["validate", "operators", "--data", str(tmp_path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    (found,) = answer["suites"]["operators"]["rows"]
    assert found["median"] == pytest.approx(0.75)
    assert found["coverage"] == 0
    assert answer["inputs"]["data"] == str(tmp_path)


@pytest.mark.slow
def test_raw_tables_give_the_errors_that_the_fitted_files_state(shared_data):
    stated = {fit.name: fit.errors for fit in fits_of(load_profiles())}
    found = {fit.name: fit.errors for fit in fits_of(load_scored(shared_data / "data"))}
    assert set(found) == set(stated)
    for name, errors in found.items():
        assert errors.rows == stated[name].rows, name
        if errors.rows:  # parameters are written with four digits
            assert errors.median == pytest.approx(stated[name].median, abs=1e-3), name
            assert errors.coverage == pytest.approx(stated[name].coverage, abs=5e-3), name


def test_folders_without_tables_are_refused(tmp_path, capsys):
    assert main(["validate", "operators", "--data", str(tmp_path)]) == 2
    assert "holds none of the tables" in capsys.readouterr().err
    assert main(["validate", "operators", "--data", str(tmp_path / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err


# The command


def test_json_has_the_documented_keys(capsys):
    assert main(["validate", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["schema_version"] == 1
    assert answer["inputs"]["suites"] == suite_names() == list(answer["suites"])
    assert set(answer["inputs"]["sources"]) == set(load_sources())
    for name, suite in answer["suites"].items():
        assert set(suite) == {"title", "note", "rows", "groups", "summary"}
        assert set(suite["summary"]) == SUMMARY
        keys = {"device", "library", "kind", "variant"} | SUMMARY if name == "operators" else ROW
        assert all(keys <= set(one) for one in suite["rows"])
    held = answer["bands"]
    assert held["coverage"] == held["inside"] / held["banded"]
    assert held["requests"]["banded"] < held["banded"]


def test_csv_has_a_row_a_value(capsys):
    assert main(["validate", "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {one["suite"] for one in rows} == set(suite_names())
    assert sum(one["suite"] == "splitwise" for one in rows) == 2 * len(
        [times for times in PHASES if not times.calibration]
    )


def test_text_has_a_table_and_a_summary(capsys):
    assert main(["validate", "published"]) == 0
    shown = capsys.readouterr().out
    assert "58.94 ms" in shown
    assert "24 rows: absolute error median" in shown
    assert "Bands at 90%" in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_an_unknown_suite_is_one_line_and_exit_2(capsys):
    assert main(["validate", "splitwize"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == (
        "lvlm: unknown suite 'splitwize'; did you mean 'splitwise'? known: counts, operators, published, serving, "
        "splitwise, techniques\n"
    )


def test_pictures(tmp_path, capsys):
    target = tmp_path / "picture.svg"
    assert main(["validate", "published", "-o", str(target), "--json"]) == 0
    assert target.read_text(encoding="utf-8").startswith("<?xml")
    assert main(["validate", "counts", "-o", str(tmp_path / "none.svg")]) == 0
    assert "no times to draw in counts" in capsys.readouterr().err
    assert not (tmp_path / "none.svg").exists()
    assert main(["validate", "counts", "-o", str(tmp_path / "x.gif")]) == 2


# The committed report


def test_report_is_that_of_the_code():
    assert report.REPORT.read_text(encoding="utf-8") == report.report(run_suites())
    assert report.FIGURE.read_text(encoding="utf-8").startswith("<?xml")


# What was copied


def test_splitwise_medians_are_those_of_the_data(shared_data):
    with (shared_data / "data" / "splitwise" / "perf_model.csv").open(encoding="utf-8", newline="") as lines:
        raw = [line for line in csv.DictReader(lines) if int(line["token_size"]) == PHASES[0].output_tokens]
    models = {"llama-2-70b": "llama2-70b", "bloom-176b": "bloom-176b"}
    devices = {"a100-sxm4-80gb": "a100-80gb", "h100-sxm5-80gb": "h100-80gb"}
    for times in PHASES:
        wanted = (models[times.model], devices[times.hardware], times.tp, times.prompt_tokens, times.batch)
        keys = ("tensor_parallel", "prompt_size", "batch_size")
        runs = [line for line in raw if (line["model"], line["hardware"], *(int(line[key]) for key in keys)) == wanted]
        assert len(runs) == times.runs
        for column, copied in (("prompt", times.prompt_ms), ("token", times.token_ms), ("e2e", times.e2e_ms)):
            median = statistics.median(float(line[f"{column}_time"]) for line in runs)
            assert copied == pytest.approx(median, abs=1e-3)


def test_published_figures_are_those_of_the_tables(shared_data):
    printed = set()
    for name, columns in (("serving", ("value",)), ("technique", ("baseline_value", "method_value"))):
        path = shared_data / "validation" / f"{name}_measurements.csv"
        with path.open(encoding="utf-8", newline="") as lines:
            printed |= {number(line[column]) for line in csv.DictReader(lines) for column in columns}
    # read in the notes on these tables
    notes = {"EPDServe encode of a video frame", "EPDServe encode of a 4K image", "SGLang TPOT of 4 images"}
    notes |= {"LLaVA-NeXT-7B prefill (CDPruner)"}
    for figure in SERVED:
        assert figure.name in notes or float(figure.published) in printed, figure.name


def number(text):
    try:
        return float(text)
    except ValueError:
        return None


def test_golden_counts_are_those_of_the_tests():
    golden = json.loads((Path(__file__).parent / "goldens" / "transformers_counts.json").read_text(encoding="utf-8"))
    copied = [figure for figure in FIGURES if figure.source == "transformers"]
    assert copied
    for figure in copied:
        values = golden[figure.model]
        tokens = values["image_tokens"]["1920x1080"]
        expected = values["parameters"]["total"] if figure.what == "parameters" else tokens["feature_tokens"]
        assert figure.published == expected, figure.name
