"""Predictions beside measurements: lines of known curves are fitted, compared and turned into a device of their own."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from costmodel import Image, Workload, load_hardware, predict
from costmodel.efficiency.fitted import read_fitted
from runtime.calibrate import calibrate
from runtime.compare import compare, groups
from runtime.devices import NAMED_BY_DRIVER
from runtime.lines import kernel_samples
from runtime.measurement import read_measurements, write_measurements
from runtime.new_device import measured_profile
from studies.cli import main
from studies.validation.split import is_test
from tests.lines import GEMM, H100_SAYS, line, synthetic_run

ROOT = Path(__file__).parents[1]
STORED = ROOT / "studies" / "measurements" / "preprocess-cpu.jsonl"
DEVICE = "h100-sxm5-80gb"
H100 = load_hardware(DEVICE)
NOISE = 0.05
HEADS = {"heads": 32, "kv_heads": 8, "head_dim": 128}
STREAM = {"direction": "d2d", "bytes": 1 << 30}


@pytest.fixture(scope="module")
def run():
    """Lines of known curves."""
    return synthetic_run(H100, noise=NOISE)


@pytest.fixture(scope="module")
def file(run, tmp_path_factory):
    """The same in a file."""
    path = tmp_path_factory.mktemp("lines") / "run.jsonl"
    write_measurements(path, run)
    return path


def only(rows):
    (found,) = rows
    return found


def one(kind, shape, **options):
    return only(compare([line(kind, shape)], **{"hardware": H100, "engine": "ideal", **options}))


# Known curves come back


@pytest.fixture(scope="module")
def fitted(file):
    """The file that the command fits to the lines."""
    path = file.with_name("fitted.toml")
    assert main(["calibrate", DEVICE, "--from", str(file), "-o", str(path)]) == 0
    return read_fitted(path.read_text(encoding="utf-8"), str(path))


def test_calibrate_recovers_curves_to_within_the_noise(run, fitted):
    fits = list(calibrate(H100, kernel_samples(run), is_test=is_test))
    assert {fit.samples.name for fit in fits} == {
        "gemm.bf16",
        "prefill_attention.flash",
        "decode_attention.mha.flash",
        "decode_attention.gqa.flash",
        "elementwise.norm",
    }
    products = next(fit for fit in fits if fit.samples.kind == "gemm")
    assert products.errors[-1].rows > 40
    assert products.errors[-1].median < NOISE
    assert fitted.find("gemm", "bf16").curve().start_cycles == pytest.approx(GEMM.start_cycles, rel=0.1)
    assert fitted.sources[0].title.startswith("measurement lines run.jsonl of NVIDIA H100 80GB HBM3, taken 2026-11-26")


def test_compare_shows_the_fit(run, fitted):
    found = {group.kind: group for group in groups(compare(run, fitted=[fitted]))}
    for kind in ("gemm", "prefill_attention", "decode_attention", "elementwise"):
        assert found[kind].source == "fitted torch", kind
        assert found[kind].median < NOISE, kind
        assert found[kind].coverage > 0.8, kind
    flat = {group.kind: group for group in groups(compare(run))}
    assert flat["gemm"].source == "engine fused"
    assert flat["gemm"].median > 2 * found["gemm"].median


def test_an_engine_without_bands_takes_no_curves(run, fitted):
    assert {row.source for row in compare(run[:3], fitted=[fitted], engine="ideal")} == {"engine ideal"}


def test_curves_of_the_catalogue_are_found_by_library():
    shape = {"m": 4096, "n": 4096, "k": 4096}
    row = only(compare([line("gemm", shape, implementation="sglang")]))
    assert row.source == "fitted sglang"
    assert row.low_s < row.predicted_s < row.high_s
    assert row.device == DEVICE
    curve = read_fitted((ROOT / "hardware_profiles/fitted/h100-sxm5-80gb.sglang.toml").read_text(), "x")
    size = next(size for size in curve.find("gemm", "bf16").sizes if size.size == "above 2048")
    assert row.high_s == pytest.approx(row.predicted_s * (1 + size.high))
    custom = {"algorithm": "custom_all_reduce", "ranks": 4, "message_bytes": 1 << 16}
    assert only(compare([line("collective", custom, implementation="vllm")])).source == "fitted vllm"


# Hand-checked rooflines


def test_kernels_at_datasheet_rates():
    peak, bandwidth = H100.peak_flops_per_s["bf16"], H100.memory_bandwidth_bytes_per_s
    expected = {
        "gemm": ({"m": 8192, "n": 8192, "k": 8192}, 2 * 8192**3 / peak),
        "encoder_attention": ({"b": 2, "s": 8192, **HEADS}, 2 * 8192**2 * 4 * 32 * 128 / peak),
        "prefill_attention": ({"b": 2, "s": 8192, **HEADS}, 8192 * 8193 * 4 * 32 * 128 / peak),
        "decode_attention": (
            {"b": 2, "context": 8192, **HEADS},
            2 * (8192 * 2 * 8 * 128 + 2 * 32 * 128) * 2 / bandwidth,
        ),
        "elementwise": ({"operator": "add", "rows": 100, "width": 1000}, 100 * 1000 * 3 * 2 / bandwidth),
        "collective": (
            {"algorithm": "all_gather", "ranks": 4, "message_bytes": 1 << 20},
            0.75 * (1 << 20) / 450e9 + 1e-5,
        ),
        "copy": (STREAM, 2 * (1 << 30) / bandwidth),
    }
    for kind, (shape, seconds) in expected.items():
        assert one(kind, shape).predicted_s == pytest.approx(seconds, rel=1e-12), kind
    upload = one("copy", {"direction": "h2d", "bytes": 1 << 30})
    assert upload.predicted_s == pytest.approx((1 << 30) / 64e9 + 1e-5)
    assert upload.source == DEVICE
    graph = one("launch", {"kind": "graph", "kernels": 10}, engine="fused")
    assert graph.predicted_s == pytest.approx(10 * 5500 / H100.clock_hz)


def test_errors_are_signed_and_bands_hold_the_measured_time():
    shape = {"m": 8192, "n": 8192, "k": 8192}
    right = one("gemm", shape, engine="fused").predicted_s
    for factor, sign, inside in ((1.1, -1, True), (0.9, 1, True), (3.0, -1, False), (0.2, 1, False)):
        row = only(compare([line("gemm", shape, samples_s=(right * factor,))]))
        assert row.error == pytest.approx(1 / factor - 1)
        assert np.sign(row.error) == sign
        assert row.inside is inside
    assert one("gemm", shape).inside is None  # an idealisation has no band


def test_what_nothing_predicts_says_why():
    reasons = {
        "launch": ({"kind": "eager", "kernels": 10}, "host's time of an eager launch"),
        "technique": ({"technique": "fastv"}, "a technique alone is not predicted"),
        "preprocess": ({"part": "tokenise", "pixels": 5}, "no rate of preprocessing part 'tokenise'"),
        "collective": ({"algorithm": "all_reduce", "ranks": 64, "message_bytes": 8}, "whose node joins 8"),
        "encode": ({"model": "llama-3.1-8b", "images": [[64, 64]]}, "has no vision"),
    }
    for kind, (shape, reason) in reasons.items():
        row = one(kind, shape)
        assert (row.predicted_s, row.error, row.inside) == (None, None, None)
        assert reason in row.source, row.source


# Stages


def test_stages_are_those_of_predict():
    request = Workload(images=[Image(640, 480)], text_tokens=64, output_tokens=2)
    right = predict("llava-1.5-7b", H100, request, batch=4)
    shape = {"model": "llava-1.5-7b", "batch": 4, "images": [[640, 480]], "text_tokens": 64}
    for kind in ("preprocess", "encode", "adapt", "prefill"):
        row = one(kind, shape, engine="fused")
        assert row.predicted_s == pytest.approx(right.stages[kind].time_s, rel=1e-12), kind
        assert row.low_s < row.predicted_s < row.high_s, kind
        assert row.variant == "llava-1.5-7b"
    assert one("decode_step", shape, engine="fused").predicted_s == pytest.approx(right.tpot_s, rel=1e-12)
    by_context = {**shape, "context": right.tokens["prompt"] + 1}
    assert one("decode_step", by_context, engine="fused").predicted_s == pytest.approx(right.tpot_s, rel=1e-12)


def test_a_model_is_named_by_the_line_or_by_the_caller():
    shape = {"visual_tokens": 576, "text_tokens": 64}
    named = one("prefill", {**shape, "model": "llava-1.5-7b"}).predicted_s
    assert one("prefill", shape, model="llava-1.5-7b").predicted_s == named
    assert one("prefill", {**shape, "model": "llava-1.5-7b"}, model="qwen2.5-vl-7b").predicted_s == named
    with pytest.raises(ValueError, match="names no model"):
        one("prefill", shape)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"images": [[640]]}, r"images=\(\(640,\),\), which must be"),
        ({"images": "640x480"}, "images='640x480', which must be"),
        ({"images": [[640, 480.5]]}, "which must be"),
        ({"visual_tokens": "many"}, "visual_tokens='many'"),
        ({"tp": 0}, "tp=0"),
        ({"images": [[640, 480]], "context": 100}, "its pictures alone take 577"),
    ],
)
def test_requests_that_cannot_be_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        one("decode_step", {"model": "llava-1.5-7b", **shape})


def test_preprocessing_of_the_stored_lines():
    stored = read_measurements(STORED)
    rows = compare(stored)
    assert all(row.inside for row in rows)  # the content of a picture moves its decoding threefold
    parts = [(line.shape["part"], line.shape.get("codec")) for line in stored]
    for part in set(parts):
        measured = [statistics.median(line.samples_s) for line, own in zip(stored, parts, strict=True) if own == part]
        predicted = [row.predicted_s for row, own in zip(rows, parts, strict=True) if own == part]
        assert np.mean(np.divide(measured, predicted)) == pytest.approx(1, abs=0.01)


def test_devices_are_known_by_what_drivers_call_them():
    for name in NAMED_BY_DRIVER.values():
        load_hardware(name)
    with pytest.raises(LookupError, match="device 'Abacus' of the lines is none of the catalogue"):
        compare([line("gemm", {"m": 1, "n": 1, "k": 1}, device="Abacus")])


# A new device


def facts(**changes):
    return {**H100_SAYS, "kind": "gpu", **changes}


def test_a_new_device_has_the_best_rates(run):
    lines = [
        *run,
        line("copy", STREAM, samples_s=(1e-3, 1.1e-3)),
        line("copy", {**STREAM, "bytes": 1 << 20}, samples_s=(1e-7,)),  # stays in the cache
        line("copy", {"direction": "h2d", "bytes": 55 << 20}, samples_s=(1e-3,)),
        line("copy", {"direction": "h2d", "bytes": 64}, samples_s=(8e-6,)),
        line("gemm", {"m": 8192, "n": 8192, "k": 8192}, precision="fp8", samples_s=(9e-4,)),
    ]
    values = measured_profile("my-gpu", lines, facts())
    products = [x for x in run if x.kind == "gemm"]
    best = max(2 * x.number("m") * x.number("n") * x.number("k") / x.median_s for x in products)
    assert values["peak_flops_per_s"] == {"bf16": best, "fp8": 2 * 8192**3 / 9e-4}
    streams = [x.traffic_bytes / x.median_s for x in run if x.kind == "elementwise"]
    assert values["memory_bandwidth_bytes_per_s"] == pytest.approx(max(2 * (1 << 30) / 1.05e-3, *streams[-6:]))
    assert values["memory_bandwidth_bytes_per_s"] < 1e13
    assert values["links"][0]["bandwidth_bytes_per_s"] == pytest.approx((55 << 20) / 1e-3)
    assert values["links"][0]["latency_s"] == 8e-6
    launched = [*lines, line("launch", {"kind": "eager", "kernels": 100}, samples_s=(4e-4,))]
    assert measured_profile("my-gpu", launched, facts())["links"][0]["latency_s"] == pytest.approx(4e-6)


def test_facts_come_from_the_lines_or_by_hand():
    lines = [
        line("gemm", {"m": 1024, "n": 1024, "k": 1024}, clocks={**H100_SAYS, "clock_hz": hz})
        for hz in (1e9, 2e9, 1.5e9)
    ]
    lines.append(line("copy", STREAM))
    values = measured_profile("my-gpu", lines, {"tdp_w": 650, "idle_w": 60, "vendor": "NVIDIA"})
    assert (values["clock_hz"], values["core_count"], values["tdp_w"]) == (1.5e9, 132, 650)
    assert (values["kind"], values["vendor"], values["generation"]) == ("gpu", "NVIDIA", "unknown")
    kinds = {key: source["kind"] for source in reversed(values["sources"]) for key in source["covers"]}
    assert kinds["tdp_w"] == kinds["idle_w"] == "assumed"
    assert kinds["core_count"] == kinds["peak_flops_per_s.bf16"] == "measured"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("my-gpu", {"core_count": None, "tdp_w": None}, r"lacks core_count, tdp_w, .* --set core_count=…,tdp_w=…"),
        ("my-gpu", {"l2_bytes": 1e9}, r"lacks memory_bandwidth_bytes_per_s.*at least 4 x l2_bytes"),
        ("my-gpu", {"kind": "abacus"}, "kind='abacus'"),
        ("my-gpu", {"core_count": 0}, "core_count='0'"),
        ("my-gpu", {"tdp_w": "lots"}, r"--set tdp_w='lots' must be a number"),
        ("My GPU", {}, "must be named in small letters"),
        (DEVICE, {}, "is in the catalogue"),
    ],
)
def test_a_new_device_is_never_guessed(name, changes, message):
    lines = [line("gemm", {"m": 1024, "n": 1024, "k": 1024}), line("copy", STREAM)]
    given = {key: value for key, value in facts(**changes).items() if value is not None}
    with pytest.raises(ValueError, match=message) as caught:
        measured_profile(name, lines, given)
    assert "\n" not in str(caught.value)


def test_a_new_device_needs_products_kind_and_agreement():
    product, stream = line("gemm", {"m": 1024, "n": 1024, "k": 1024}), line("copy", STREAM)
    with pytest.raises(ValueError, match=r"lacks peak_flops_per_s\.bf16"):
        measured_profile("my-gpu", [stream], facts())
    cpu = [one.model_copy(update={"driver": None}) for one in (product, stream)]
    with pytest.raises(ValueError, match="lacks kind"):
        measured_profile("my-cpu", cpu, H100_SAYS)
    differs = [product, stream.model_copy(update={"clocks": {"tdp_w": 1.0}}), line("copy", STREAM, clocks={"tdp_w": 2})]
    with pytest.raises(ValueError, match="tdp_w differs between the lines"):
        measured_profile("my-gpu", differs, {key: value for key, value in facts().items() if key != "tdp_w"})
    with pytest.raises(LookupError, match="unknown key of --set 'core_counts'; did you mean 'core_count'"):
        measured_profile("my-gpu", [product, stream], {"core_counts": 3})


# The commands


def test_new_device_end_to_end(run, tmp_path, capsys):
    path, lines = tmp_path / "my-gpu.toml", tmp_path / "run.jsonl"
    write_measurements(
        lines, [*run, line("copy", STREAM, samples_s=(7e-4,)), line("launch", {"kind": "graph", "kernels": 1})]
    )
    given = ",".join(f"{key}={value:g}" for key, value in H100_SAYS.items() if key != "memory_bytes")
    arguments = ["calibrate", "new:my-gpu", "--from", str(lines), "-o", str(path), "--set", given]
    assert main(arguments) == 2
    assert "lacks memory_bytes" in capsys.readouterr().err
    assert not path.exists()
    assert main([*arguments, "--set", "memory_bytes=80e9", "--json"]) == 0
    shown = capsys.readouterr()
    beside = tmp_path / "my-gpu.torch.toml"
    assert json.loads(shown.out)["files"] == [str(path), str(beside)]
    assert "not fitted: copy (1 row: no curve), launch (1 row: no curve)" in shown.err
    device = load_hardware(str(path))
    assert {source.kind for source in device.sources} == {"measured", "assumed"}
    curve = read_fitted(beside.read_text(encoding="utf-8"), str(beside)).find("gemm", "bf16")
    assert curve.curve().compute_fraction == pytest.approx(1.0, abs=0.25)
    assert predict("llava-1.5-7b", device, Workload(images=[Image(640, 480)])).ttft_s > 0
    assert main(["compare", str(lines), "--hardware", str(path), "--fitted", str(beside), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["groups"]
    assert next(group for group in found if group["kind"] == "gemm")["median"] < NOISE


def test_few_rows_are_named(tmp_path, capsys):
    few = tmp_path / "few.jsonl"
    write_measurements(few, [line("gemm", {"m": 1, "n": 64, "k": 64})] * 3)
    assert main(["calibrate", DEVICE, "--from", str(few), "-o", str(tmp_path)]) == 2
    assert "torch gemm.bf16 (3 rows: fewer than 12 that are not held out)" in capsys.readouterr().err
    copy = tmp_path / "copy.jsonl"
    write_measurements(copy, [line("copy", STREAM)])
    given = ",".join(f"{key}={value:g}" for key, value in H100_SAYS.items())
    arguments = [
        "calibrate",
        "new:my-gpu",
        "--from",
        str(few),
        "--from",
        str(copy),
        "--set",
        given,
        "-o",
        str(tmp_path),
    ]
    assert main([*arguments, "--csv"]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "not fitted: torch gemm.bf16 (3 rows: fewer than 12 that are not held out), copy (1 row" in shown.err
    assert load_hardware(str(tmp_path / "my-gpu.toml")).name == "my-gpu"


def test_facts_belong_to_new_devices(file, tmp_path, capsys):
    for arguments, message in (
        ([DEVICE, "--set", "tdp_w=5"], "--set describes a new device"),
        (["new:my-gpu", "--set", "tdp_w"], "must read key=value"),
        (["new:my-gpu", "--set", "tdp_w=1,tdp_w=2"], "given twice"),
    ):
        assert main(["calibrate", *arguments, "--from", str(file), "-o", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err


def test_command_shows_errors_and_draws(tmp_path, capsys):
    path, picture = tmp_path / "run.jsonl", tmp_path / "errors.svg"
    stage = {"model": "llava-1.5-7b", "images": [[640, 480]], "text_tokens": 64}
    write_measurements(path, [line("gemm", {"m": 64, "n": 64, "k": 64}), line("prefill", stage, samples_s=(3e-2,))])
    assert main(["compare", str(path), "-o", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "torch prefill.llava-1.5-7b" in shown
    assert "images 640x480, text_tokens 64" in shown
    assert picture.read_text(encoding="utf-8").startswith("<?xml")
    assert main(["compare", str(tmp_path), "--json", "--engine", "ideal"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["inputs"]["engine"] == "ideal"
    row = answer["rows"][1]
    assert row["error"] == pytest.approx(row["predicted_s"] / row["measured_s"] - 1)
    assert row["shape"] == stage
    assert main(["compare", str(path), "--csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_command_refuses_bad_input(file, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n{", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([str(bad)], "bad.jsonl line 1"),
        ([str(tmp_path / "missing.jsonl")], "no folder or file"),
        ([str(tmp_path / "empty")], "no measurement lines"),
        ([str(file), "--hardware", "h1000"], "unknown hardware"),
        ([str(file), "--engine", "vroom"], "unknown engine"),
        ([str(file), "-o", str(tmp_path / "no" / "x.svg")], "cannot write"),
        ([str(file), "-o", str(tmp_path / "x.txt")], "cannot write"),
        ([str(file), "--fitted", str(tmp_path / "x.toml")], "cannot read fitted curves"),
    ):
        assert main(["compare", *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1


# Imports


def test_importing_runtime_loads_neither_torch_nor_scipy():
    code = (
        "import sys, runtime; assert not {'torch', 'scipy'} & set(sys.modules); "
        "from runtime import compare; assert compare.compare; assert not {'torch', 'scipy'} & set(sys.modules); "
        "assert runtime.calibrate.calibrate; assert 'torch' not in sys.modules; "
        "assert not hasattr(runtime, 'nothing')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
