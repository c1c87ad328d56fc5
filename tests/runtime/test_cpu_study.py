"""The study on a CPU: that it completes at smoke size, what it writes, and that a fit finds a made-up device again."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the study measures with PyTorch")

from costmodel import Image, Workload, load_hardware, predict  # noqa: E402
from costmodel.efficiency import Chip, CpuGemmCurve, cpu_gemm_s  # noqa: E402
from costmodel.query import Precision  # noqa: E402
from runtime.measurement import read_measurements, write_measurements  # noqa: E402
from studies.cli import main as lvlm  # noqa: E402
from studies.validation import cpu  # noqa: E402
from tests.lines import line  # noqa: E402

PEAK, BANDWIDTH, CACHE = 2e11, 2e10, 32e6
TRUTH = CpuGemmCurve(start_cycles=4000, compute_fraction=0.9, pack_rows=40, pass_rows=4, bandwidth_fraction=0.8)
NOISE = 0.03
SAYS = {"clock_hz": 2.5e9, "core_count": 1, "l2_bytes": CACHE, "memory_bytes": 32e9}
CHIP = Chip(1, 2.5e9, PEAK, PEAK, BANDWIDTH, CACHE, CACHE)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Return the folder of a run at smoke size."""
    folder = tmp_path_factory.mktemp("cpu")
    assert cpu.main(["--smoke", "-o", str(folder)]) == 0
    return folder


def test_smoke_size_completes_and_writes_its_files(smoke):
    found = json.loads((smoke / "cpu.json").read_text(encoding="utf-8"))
    assert_schema(found)
    assert found["smoke"]
    assert len(found["rows"]) == len(cpu.STAGES) * len(cpu.REQUESTS)
    assert "no number means anything" in (smoke / "cpu.md").read_text(encoding="utf-8")
    assert (smoke / "cpu.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_what_is_committed_has_the_schema_and_four_sizes_a_model():
    found = json.loads((cpu.FOLDER / "cpu.json").read_text(encoding="utf-8"))
    assert_schema(found)
    assert not found["smoke"]
    for model in cpu.REQUESTS:
        sizes = {
            (str(row["images"]), row["text_tokens"], row["batch"]) for row in found["rows"] if row["model"] == model
        }
        assert len(sizes) == 4
    assert all(found["median_error"][stage] <= found["target"] for stage in (*cpu.STAGES, "all"))


def test_no_kernel_of_the_fit_is_one_that_is_predicted():
    from runtime.blueprint import load_blueprint
    from runtime.microbench import weights

    measured = read_measurements(cpu.LINES / cpu.KERNELS)
    assert not any(row.kind in cpu.STAGES for row in measured)
    fitted = {(row.number("n"), row.number("k")) for row in measured if row.kind == "gemm"}
    for model in cpu.REQUESTS:
        assert not fitted & weights(load_blueprint(str(cpu.FOLDER / model)).spec)


def assert_schema(found):
    assert found["schema_version"] == 1
    assert set(found["median_error"]) == set(found["median_flat_error"]) == {*cpu.STAGES, "all"}
    assert {fit["kind"] for fit in found["fits"]} >= {"gemm", "prefill_attention", "elementwise"}
    for row in found["rows"]:
        assert row["stage"] in cpu.STAGES
        assert row["fastest_s"] <= row["measured_s"] <= row["slowest_s"]
        assert row["predicted_s"] > 0
        assert row["error"] == pytest.approx(row["predicted_s"] / row["measured_s"] - 1)


def made_up_lines(seed=0):
    """Return products on a device with known parameters, a little noisy, and a stream at its bandwidth."""
    rng = np.random.default_rng(seed)
    side, lines = 8192, []
    for n, k in ((320, 320), (640, 2560), (1280, 1280), (4096, 1024), (3072, 3072), (side, side)):
        turns = max(1, round(4 * CACHE / (4 * n * k)))
        for m in (1, 2, 3, 4, 5, 6, 8, 12, 16, 32, 64, 128, 256, 1024):
            for taken in {1, turns}:
                time_s = float(cpu_gemm_s(m, d_in=k, d_out=n, chip=CHIP, curve=TRUTH, turns=taken))
                samples = tuple((time_s * np.exp(rng.normal(0, NOISE, 3))).tolist())
                shape = {"m": m, "n": n, "k": k, "turns": taken}
                lines.append(of_cpu("gemm", shape, samples))
    lines.append(of_cpu("copy", {"direction": "d2d", "bytes": 1 << 28}, (2 * (1 << 28) / BANDWIDTH,)))
    return lines


def of_cpu(kind, shape, samples):
    return line(kind, shape, samples_s=samples, precision="fp32", device="Abacus", driver=None, clocks=SAYS)


def test_the_fit_finds_a_made_up_device_again(tmp_path, capsys):
    path, output = tmp_path / "run.jsonl", tmp_path / "abacus.toml"
    write_measurements(path, made_up_lines())
    facts = f"kind=cpu,tdp_w=100,peak_flops_per_s.fp32={PEAK:g},memory_bandwidth_bytes_per_s={BANDWIDTH:g}"
    assert lvlm(["calibrate", "new:abacus", "--from", str(path), "-o", str(output), "--set", facts, "--json"]) == 0
    capsys.readouterr()
    (fit,) = cpu.fits(tmp_path / "abacus.torch.toml")
    found = CpuGemmCurve(**fit["parameters"])
    assert found.pass_rows == TRUTH.pass_rows
    for name in ("compute_fraction", "bandwidth_fraction"):
        assert getattr(found, name) == pytest.approx(getattr(TRUTH, name), rel=0.05)
    assert found.pack_rows == pytest.approx(TRUTH.pack_rows, rel=0.15)
    for m in (1, 4, 5, 64, 700):
        true_s, again_s = (cpu_gemm_s(m, d_in=512, d_out=1536, chip=CHIP, curve=curve) for curve in (TRUTH, found))
        assert again_s == pytest.approx(true_s, rel=0.06)
    # predictions find the curve beside the profile, and not where it has been moved away
    request = Workload(images=[Image(256, 256)], text_tokens=50, output_tokens=2)
    model, single = str(Path(cpu.FOLDER / "small-lvlm")), Precision(32, 32, 32)
    with_curve = predict(model, load_hardware(str(output)), request, precision=single)
    (tmp_path / "abacus.torch.toml").rename(tmp_path / "elsewhere.toml")
    without = predict(model, load_hardware(str(output)), request, precision=single)
    assert with_curve.stages["decode"].time_s != without.stages["decode"].time_s


def test_curves_of_another_device_beside_a_profile_are_refused(tmp_path):
    for name in ("a.toml", "a.torch.toml"):
        file = cpu.FOLDER / name.replace("a.", "study-cpu.", 1)
        text = file.read_text(encoding="utf-8")
        (tmp_path / name).write_text(text.replace('name = "study-cpu"', 'name = "a"'), encoding="utf-8")
    with pytest.raises(ValueError, match="device='study-cpu', and lies beside a"):
        predict("llava-1.5-7b", load_hardware(str(tmp_path / "a.toml")), Workload(text_tokens=5))


@pytest.mark.parametrize("side", ["rows", "d_in", "d_out"])
def test_products_on_a_cpu_never_take_less_time_for_more_work(side):
    sizes = {"rows": 7.0, "d_in": 640.0, "d_out": 640.0, side: np.arange(1.0, 3000.0)}
    for turns in (0, 1, 8):
        times = cpu_gemm_s(**sizes, chip=CHIP, curve=TRUTH, turns=turns)
        assert (np.diff(times) >= -1e-15).all()
