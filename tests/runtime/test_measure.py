"""Measurements: what they time, the lines that they write, and what happens when something is wrong."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="the runtime needs PyTorch")
pytest.importorskip("transformers", reason="the oracle of the runtime")

from costmodel import Image  # noqa: E402
from costmodel.counts import count  # noqa: E402
from costmodel.workload import Workload  # noqa: E402
from runtime import measure as measuring  # noqa: E402
from runtime import reference  # noqa: E402
from runtime.blueprint import load_blueprint  # noqa: E402
from runtime.calibrate import read_lines  # noqa: E402
from runtime.compare import compare  # noqa: E402
from runtime.lines import kernel_samples  # noqa: E402
from runtime.measurement import read_measurements  # noqa: E402
from runtime.microbench import Bench, cases, weights  # noqa: E402
from runtime.nvml import Nvml  # noqa: E402
from runtime.requests import Request  # noqa: E402
from runtime.timing import LEAST, MOST, Stopwatch  # noqa: E402
from runtime.utilisation import utilised  # noqa: E402
from studies.cli import main  # noqa: E402
from tests.helpers import assert_clean  # noqa: E402
from tests.runtime import tiny  # noqa: E402

CPU = torch.device("cpu")
REQUEST = Request((Image(64, 64),), text_tokens=6, batch=2)
STAGES = ["preprocess", "encode", "adapt", "prefill", "decode_step"]


@pytest.fixture(scope="module")
def lines(tmp_path_factory, pairs):
    """Return all lines of a tiny model, once."""
    plan = measuring.Plan(
        model=str(pairs("qwen3_vl").folder),
        dtype="fp32",
        what=("microbench", "stages", "transformers"),
        requests=(REQUEST,),
        seconds=0.3,
    )
    path = tmp_path_factory.mktemp("lines") / "run.jsonl"
    measuring.write_whole(path, measuring.measure(plan))
    return path


def of(path, **wanted):
    return [line for line in read_measurements(path) if all(getattr(line, k) == v for k, v in wanted.items())]


def test_every_stage_of_ours_and_of_transformers_is_there(lines):
    assert [line.kind for line in of(lines, implementation="ours") if "part" not in line.shape] == STAGES
    theirs = [line.kind for line in of(lines, implementation="transformers")]
    assert theirs == ["encode", "adapt", "prefill", "decode_step"]
    prompt = REQUEST.prompt_tokens(load_blueprint(of(lines, kind="prefill")[0].shape["model"]).spec)
    assert {line.shape["context"] for line in of(lines, kind="decode_step")} == {prompt + 1}


def test_lines_say_where_and_with_what(lines):
    for line in read_measurements(lines):
        assert line.device
        assert line.driver is None
        assert line.versions["torch"] == torch.__version__ or line.versions["torch"] in torch.__version__
        assert line.clocks["core_count"] == torch.get_num_threads()
        assert line.clocks["memory_bytes"] > 1e8
        assert len(line.samples_s) >= LEAST


def test_every_kind_of_kernel_is_there_and_fits_its_curve(lines):
    kinds = {line.kind for line in read_measurements(lines)}
    kernels = {"gemm", "prefill_attention", "decode_attention", "encoder_attention", "elementwise"}
    assert kernels | {"launch", "copy", "preprocess"} <= kinds
    taken = read_lines([lines])
    assert {samples.kind for samples in kernel_samples(taken)} == kernels
    assert {samples.variant for samples in kernel_samples(taken) if samples.kind == "gemm"} == {"fp32.cpu"}
    halves = [line.model_copy(update={"precision": "bf16"}) for line in taken]
    assert {samples.kind for samples in kernel_samples(halves)} == kernels


def test_measurements_stand_beside_predictions(lines):
    rows = compare(read_measurements(lines), hardware="cpu-epyc-9654")
    predicted = {row.kind for row in rows if row.predicted_s is not None}
    assert set(STAGES) | {"gemm", "copy", "prefill_attention"} <= predicted


def test_a_profile_comes_from_the_lines(lines, tmp_path, capsys):
    facts = "kind=cpu,tdp_w=100,clock_hz=2e9,l2_bytes=1e6"
    output = tmp_path / "here.toml"
    code = main(["calibrate", "new:here", "--from", str(lines), "-o", str(output), "--set", facts])
    assert code == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["compare", str(lines), "--hardware", str(output), "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert {"ours", "transformers", "torch"} <= {group["implementation"] for group in groups}


def test_requests_are_counted_as_the_cost_model_counts_them():
    for name in ("llava-1.5-7b", "qwen2.5-vl-7b", "gemma-3-4b", "internvl3-8b"):
        blueprint, request = load_blueprint(name), Request((Image(300, 200), Image(90, 400)), 11)
        counted = count(name, Workload(images=request.images, text_tokens=11)).tokens
        (prompt,) = request.prompts(blueprint)
        assert len(prompt.tokens) == request.prompt_tokens(blueprint.spec) == counted["prompt"]
        assert prompt.tokens.count(blueprint.settings.image_token) == counted["visual"]


@pytest.mark.parametrize("name", tiny.FAMILIES)
@torch.inference_mode()
def test_transformers_is_given_the_same_pictures(pairs, name):
    both = pairs(name)
    blueprint = load_blueprint(both.folder)
    request = Request((Image(70, 50), Image(120, 64)))
    (prompt,) = request.prompts(blueprint)
    theirs = both.real.model.get_image_features(**reference._pictures(prompt.pixels, both.ours)).pooler_output
    theirs = torch.cat(list(theirs)).reshape(-1, 32)
    ours = both.ours.adapt(both.ours.encode(prompt.pixels)).embeddings
    assert (ours - theirs).abs().max() < 1e-4


def test_what_is_not_installed_is_said_before_anything_runs(pairs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reference, "find_spec", lambda _: None)
    assert lvlm(pairs("llava").folder, "-o", tmp_path / "run.jsonl", "--what", "stages,transformers") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_weights_of_kernels_are_those_of_the_model():
    spec = load_blueprint("qwen3-vl-30b-a3b").spec
    assert (spec.decoder.vocabulary, spec.decoder.width) in weights(spec)
    assert (2 * 768, 2048) in weights(spec)  # one expert's gate and input
    assert (3 * 1152, 1152) in weights(spec)  # queries, keys and values of the encoder


def test_work_of_cases_is_what_they_run(pairs):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    found = {"gemm": 0, "encoder_attention": 0, "decode_attention": 0}
    for case in cases(load_blueprint(pairs("llava").folder), Bench(CPU, torch.float32)):
        if case.kind in found and case.work < 1e6:
            run = case.prepare()
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                run()
            assert case.work == counter.get_total_flops(), case.shape
            found[case.kind] += 1
    assert all(found.values())


def test_a_stopwatch_tells_time():
    watch = Stopwatch(CPU, budget_s=0.05)

    def spin():
        start = watch.clock()
        while watch.clock() - start < 0.004:
            pass

    timing = watch.time(spin)
    assert LEAST <= len(timing.samples_s) <= MOST
    assert all(sample >= 0.004 for sample in timing.samples_s)
    assert min(timing.samples_s) < 0.01
    assert timing.peak_bytes is None or timing.peak_bytes > 1e6


def test_short_kernels_are_repeated_and_divided():
    calls = []
    timing = Stopwatch(CPU, budget_s=0.0).time(lambda: calls.append(1), repeatable=True)
    assert len(timing.samples_s) == LEAST
    assert len(calls) > 10 * LEAST
    assert max(timing.samples_s) < 1e-4


def test_a_cold_stopwatch_empties_the_cache_before_every_sample():
    watch = Stopwatch(CPU, budget_s=0.05, cold=True)
    assert watch.buffer is not None
    seen = []
    rows = torch.ones(64, 1024)

    def action():
        seen.append(int(watch.buffer[0]))
        rows.sum()

    n_samples = len(watch.time(action).samples_s)
    assert len(set(seen[-n_samples:])) == n_samples  # written over in between each time


def test_cold_lines_belong_to_no_curve(pairs, monkeypatch):
    monkeypatch.setattr(measuring, "cases", lambda *given: [case for case in cases(*given) if case.nbytes < 8000])
    plan = measuring.Plan(str(pairs("llava").folder), dtype="fp32", what=("microbench",), seconds=0.1, cold=True)
    taken = list(measuring.measure(plan))
    assert {"gemm", "elementwise"} <= {line.kind for line in taken}
    assert all(line.shape["cold"] for line in taken)
    assert kernel_samples(taken) == []


def test_utilisation_is_work_over_time_and_peak(lines):
    some = of(lines, implementation="ours") + of(lines, implementation="torch")
    rows = {row.line.kind: row for row in utilised(some)}
    line, row = rows["prefill"].line, rows["prefill"]
    images, text = [Image(*size) for size in line.shape["images"]], line.shape["text_tokens"]
    flops = count(line.shape["model"], Workload(images=images, text_tokens=text)).flops["prefill"] * REQUEST.batch
    peak = max(2 * x.shape["m"] * x.shape["n"] * x.shape["k"] / x.median_s for x in of(lines, kind="gemm"))
    assert row.mfu == pytest.approx(flops / line.median_s / peak, rel=1e-6)
    assert rows["preprocess"].mfu is None
    assert "same run" in row.peaks


class Driver:
    """Answers as pynvml does, but for the energy of an old device."""

    NVML_CLOCK_SM = 1

    class NVMLError(Exception):
        pass

    def nvmlDeviceGetTotalEnergyConsumption(self, _):  # noqa: N802
        raise self.NVMLError

    def nvmlDeviceGetClockInfo(self, *_):  # noqa: N802
        return 1980

    def nvmlDeviceGetPowerManagementDefaultLimit(self, _):  # noqa: N802
        return 700_000

    def nvmlSystemGetDriverVersion(self):  # noqa: N802
        return b"570.1"


def test_what_a_driver_tells_is_in_si_units():
    nvml = Nvml(Driver(), SimpleNamespace())
    assert (nvml.energy_j, nvml.clock_hz, nvml.tdp_w, nvml.driver) == (None, 1.98e9, 700.0, "570.1")
    assert Nvml.of(CPU) is None


# The command


def lvlm(*arguments):
    return main(["measure", *map(str, arguments)])


def test_the_command_writes_lines_and_says_utilisation(pairs, tmp_path, capsys):
    output = tmp_path / "run.jsonl"
    options = ("--image", "64x64", "--text", 4, "--seconds", 0.1, "--what", "stages", "--json")
    assert lvlm(pairs("llava").folder, "-o", output, *options) == 0
    captured = capsys.readouterr()
    values = json.loads(captured.out)
    assert values["lines"] == len(read_measurements(output)) == len(STAGES)
    assert [row["kind"] for row in values["stages"]] == STAGES
    assert "ours decode_step" in captured.err
    assert "are read" in captured.err


def test_text_alone_has_no_encoder(pairs, tmp_path, capsys):
    output = tmp_path / "run.jsonl"
    options = ("--image", "none", "--text", 4, "--seconds", 0.1, "--what", "stages")
    assert lvlm(pairs("llava").folder, "-o", output, *options) == 0
    assert [line.kind for line in read_measurements(output)] == ["prefill", "decode_step"]
    assert "No MFU and MBU" in capsys.readouterr().out


BAD = [
    (("--device", "gpu"), 2, "unknown device 'gpu'"),
    (("--dtype", "int3"), 2, "unknown dtype 'int3'"),
    (("--what", "stages,magic"), 2, "unknown part to measure 'magic'"),
    (("--seconds", "0"), 2, "seconds=0.0 must be above 0"),
    (("--batch", "0"), 2, "invalid value for --batch"),
    (("--image", "64"), 2, "no image file '64'"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad[0][0])
def test_bad_usage_is_one_line_and_no_file(pairs, tmp_path, capsys, bad):
    options, code, words = bad
    output = tmp_path / "run.jsonl"
    assert lvlm(pairs("llava").folder, "-o", output, *options) == code
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_one_line(pairs, tmp_path, capsys):
    assert lvlm(pairs("llava").folder, "-o", tmp_path / "run.jsonl", "--device", "cuda") == 2
    assert "use --device cpu" in capsys.readouterr().err


def test_what_does_not_fit_is_one_line_and_no_file(tmp_path, capsys):
    assert lvlm("qwen2.5-vl-72b", "-o", tmp_path / "run.jsonl", "--what", "stages", "--dtype", "fp32") == 3
    assert "weights of qwen2.5-vl-72b needs 293.6 GB" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_memory_that_runs_out_on_the_way_leaves_no_file(pairs, tmp_path, capsys, monkeypatch):
    def runs_out(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr("runtime.model.Lvlm.prefill", runs_out)
    assert lvlm(pairs("llava").folder, "-o", tmp_path / "run.jsonl", "--what", "stages", "--seconds", 0.1) == 3
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("lvlm: stages of")
    assert "needs 2.1 GB" in last
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_kind_is_refused_before_anything_runs(pairs, tmp_path, capsys):
    assert lvlm(pairs("llava").folder, "-o", tmp_path / "run.csv") == 2
    assert "name a .jsonl file" in capsys.readouterr().err


def test_without_torch_the_command_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['torch'] = None; from studies.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "measure", "llava-1.5-7b", "-o", str(tmp_path / "run.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'lvlm-sim[runtime]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_plan_refuses_what_cannot_be():
    for bad in ({"what": ()}, {"requests": ()}, {"seconds": float("nan")}):
        with pytest.raises(ValueError, match=r"must be above 0|nothing to measure") as raised:
            measuring.Plan("llava-1.5-7b", **bad)
        assert_clean(raised.value)
    with pytest.raises(ValueError, match=r"Request\.batch=0"):
        Request(batch=0)


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_at_smoke_size(tmp_path, capsys):
    from studies.validation import gpu

    assert gpu.main(["-o", str(tmp_path), "--device", "cpu", "--smoke", "--hardware", "cpu-epyc-9654"]) == 0
    assert "1 of 1 models measured" in capsys.readouterr().out
    assert read_measurements(tmp_path / "small-lvlm.jsonl")
    assert (tmp_path / "fitted").is_dir()
