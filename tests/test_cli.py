"""The command `lvlm`, run in this process: what it prints, where, and its exit code."""

import csv
import doctest
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from costmodel import load_model, model_names
from studies import cli, parse, tables

ROOT = Path(__file__).resolve().parents[1]
MODEL, DEVICE = "qwen2.5-vl-7b", "h100-sxm5-80gb"
LARGE = "qwen2.5-vl-72b"  # 147 GB of weights
EXPERTS, TEXT_ONLY = "qwen3-vl-30b-a3b", "llama-3.1-8b"
PICTURES = ["--image", "1920x1080", "--image", "640x480", "--video", "1280x720:5s@24fps"]
DEGREES = ["--tp", "2", "--pp", "2", "--dp", "2", "--ep", "4", "--encoder-tp", "1", "--encoder-dp", "2"]
COMMANDS = {
    "models": ["models"],
    "model": ["models", MODEL],
    "hardware": ["hardware"],
    "device": ["hardware", DEVICE],
    "engines": ["engines"],
    "engine": ["engines", "fused"],
    "tokens": ["tokens", MODEL, *PICTURES],
    "count": ["count", MODEL, *PICTURES],
    "predict": ["predict", MODEL, DEVICE, *PICTURES],
    "roofline": ["roofline", MODEL, DEVICE, *PICTURES],
    "shared": ["predict", EXPERTS, DEVICE, *PICTURES, *DEGREES, "--batch", "6"],
    "shared roofs": ["roofline", EXPERTS, DEVICE, *PICTURES, *DEGREES],
    "cross": ["predict", "llama-3.2-11b-vision", DEVICE, "--image", "1920x1080"],
    "cross tokens": ["tokens", "llama-3.2-11b-vision", "--image", "1920x1080", "--image", "64x64"],
    "recurrent": ["predict", "qwen3.5-9b", DEVICE, *PICTURES, "--weight-bits", "4"],
    "text": ["predict", TEXT_ONLY, DEVICE],
    "language": ["models", TEXT_ONLY],
    "validate": ["validate"],
}
NUMBER = (int, float)
TOKENS = dict.fromkeys(("patches", "visual", "markers", "cross", "text", "prompt"), int)
PARAMETERS = dict.fromkeys(("total", "vision", "adapter", "language", "active"), int)
STAGE = {"time_s": NUMBER, "flops": NUMBER, "bytes": NUMBER, "intensity_flops_per_byte": NUMBER, "bound": str}
STEPS = {"step_time_s": dict.fromkeys(("first", "middle", "last"), NUMBER)}
MEMORY = {
    **dict.fromkeys(("weights_bytes", "kv_bytes", "activation_bytes", "peak_bytes", "capacity_bytes"), NUMBER),
    **dict.fromkeys(("vision_weights_bytes", "language_weights_bytes", "reserve_bytes", "usable_bytes"), NUMBER),
    **dict.fromkeys(("encode_activation_bytes", "prefill_activation_bytes", "kv_block_bytes"), NUMBER),
    "kv_blocks": int,
}
COUNT = {
    "parameters": PARAMETERS,
    "weight_bytes": NUMBER,
    "kv_bytes_per_token": NUMBER,
    "kv_bytes": NUMBER,
    "kv_bytes_per_image": NUMBER,
    "tokens": TOKENS,
    "flops": dict.fromkeys(("encode", "adapt", "prefill", "decode_step"), NUMBER),
    "convention": str,
}
PREDICT = {
    "tokens": TOKENS,
    "parameters": PARAMETERS,
    **dict.fromkeys(("ttft_s", "tpot_s", "total_s"), NUMBER),
    **dict.fromkeys(("throughput_tokens_per_s", "throughput_tokens_per_s_per_gpu"), NUMBER),
    **dict.fromkeys(("energy_j", "co2_g", "cost_usd"), NUMBER),
    "fits": bool,
    "max_batch": int,
    "memory": MEMORY,
    "stages": {**dict.fromkeys(("preprocess", "encode", "adapt", "prefill"), STAGE), "decode": STAGE | STEPS},
    "quality": (dict, type(None)),
    "error_band": {"ttft_s": list, "tpot_s": list},
    "provenance": dict,
}
INPUTS = {
    "model": {"name": str, "source": str},
    "hardware": {"name": str, "source": str},
    "engine": str,
    "images": list,
    "videos": list,
    "text": int,
    "output": int,
    "batch": int,
    "precision": dict.fromkeys(("weight_bits", "activation_bits", "kv_bits"), int),
    "parallelism": dict.fromkeys(("tp", "pp", "dp", "ep", "encoder_tp", "encoder_dp"), int),
    "techniques": list,
}


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    @property
    def rows(self):
        return list(csv.DictReader(io.StringIO(self.out)))


@pytest.fixture
def lvlm(capsys):
    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return run


def assert_shape(value, shape, where="answer"):
    if not isinstance(shape, dict):
        fits = isinstance(value, shape) and not (isinstance(value, bool) and shape is not bool)
        assert fits, f"{where}={value!r} is no {shape}"
        return
    assert isinstance(value, dict), where
    assert set(shape) <= set(value), f"{where} lacks {sorted(set(shape) - set(value))}"
    for key, inner in shape.items():
        assert_shape(value[key], inner, f"{where}.{key}")


def one_line(result):
    """Return the only line on stderr, with nothing on stdout."""
    assert result.out == ""
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert "Traceback" not in result.err
    return lines[0]


# Every command, every format


@pytest.mark.parametrize("name", COMMANDS)
def test_text_is_plain_and_fits_on_a_page(lvlm, name):
    result = lvlm(*COMMANDS[name])
    assert (result.code, result.err) == (0, "")
    assert "\x1b" not in result.out
    lines = result.out.splitlines()
    assert len(lines) > 3
    assert max(map(len, lines)) <= 100
    assert [line for line in lines if line != line.rstrip()] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_json_is_one_object_that_says_what_was_asked(lvlm, name):
    result = lvlm(*COMMANDS[name], "--json")
    assert (result.code, result.err) == (0, "")
    assert result.json["schema_version"] == 1
    assert result.json["command"] == COMMANDS[name][0]
    assert result.json["version"]
    assert isinstance(result.json["inputs"], dict)


@pytest.mark.parametrize(
    ("name", "n_rows"),
    [("tokens", 4), ("cross tokens", 3), ("predict", 5), ("shared", 5), ("count", 9), ("roofline", None)]
    + [(name, None) for name in ("engines", "models", "hardware", "validate")],
)
def test_csv_has_rows(lvlm, name, n_rows):
    result = lvlm(*COMMANDS[name], "--csv")
    assert (result.code, result.err) == (0, "")
    assert len(result.rows) == n_rows if n_rows else len(result.rows) > 2
    assert all(None not in row and None not in row.values() for row in result.rows)


@pytest.mark.parametrize("name", ["model", "language", "device", "engine"])
def test_details_name_the_source_of_every_number(lvlm, name):
    rows = lvlm(*COMMANDS[name], "--csv").rows
    assert len(rows) > 10
    assert all(row["kind"] and (row.get("title") or row.get("source")) for row in rows)
    listed = lvlm(*COMMANDS[name], "--json").json[COMMANDS[name][0]]
    assert [number["key"] for number in listed[0]["numbers"]] == [row["key"] for row in rows]


# The keys of the interface


def test_tokens_json(lvlm):
    values = lvlm(*COMMANDS["tokens"], "--json").json
    assert_shape(values, TOKENS)
    assert values["prompt"] == values["visual"] + values["markers"] + values["text"]
    assert values["inputs"]["images"][0] == {"source": "1920x1080", "width": 1920, "height": 1080, "codec": "jpeg"}
    assert values["inputs"]["videos"][0]["frames"] == 10


@pytest.mark.parametrize("name", ["tokens", "cross tokens"])
def test_tokens_csv_adds_up(lvlm, name):
    *items, total = lvlm(*COMMANDS[name], "--csv").rows
    for key in ("patches", "visual", "markers", "cross"):
        assert sum(int(row[key]) for row in items) == int(total[key])


def test_count_json(lvlm):
    values = lvlm(*COMMANDS["count"], "--json").json
    assert_shape(values, COUNT)
    assert values["convention"] == "kernel"
    executed = lvlm(*COMMANDS["count"], "--convention", "torch", "--json").json
    assert executed["flops"]["prefill"] > values["flops"]["prefill"]
    published = lvlm(*COMMANDS["count"], "--convention", "fastv", "--json").json
    assert published["flops"]["encode"] is None


def test_predict_json(lvlm):
    values = lvlm(*COMMANDS["predict"], "--json").json
    assert_shape(values, PREDICT)
    assert_shape(values["inputs"], INPUTS)
    assert values["fits"] is True
    low, high = values["error_band"]["ttft_s"]
    assert low < values["ttft_s"] < high


def test_predict_resolves_its_inputs(lvlm):
    options = ["--batch", "1e1", "--output", "32", "--tp", "2", "--encoder-tp", "1", "--engine", "ideal"]
    widths = ["--weight-bits", "8", "--activation-bits", "8", "--kv-bits", "8"]
    values = lvlm("predict", MODEL, f"{DEVICE}:tdp_w=500", *options, *widths, "--json").json
    inputs = values["inputs"]
    assert (inputs["batch"], inputs["output"], inputs["engine"], inputs["text"]) == (10, 32, "ideal", 64)
    assert inputs["parallelism"] == {"tp": 2, "pp": 1, "dp": 1, "ep": 1, "encoder_tp": 1, "encoder_dp": 1}
    assert set(inputs["precision"].values()) == {8}
    assert inputs["hardware"]["name"] == f"{DEVICE}:tdp_w=500"
    assert values["error_band"] == {"ttft_s": None, "tpot_s": None}


def test_predict_counts_all_devices(lvlm):
    values = lvlm(*COMMANDS["shared"], "--json").json
    assert_shape(values, PREDICT)
    degrees = {"tp": 2, "pp": 2, "dp": 2, "ep": 4, "encoder_tp": 1, "encoder_dp": 2}
    assert values["inputs"]["parallelism"] == degrees
    each = values["throughput_tokens_per_s_per_gpu"]
    assert values["throughput_tokens_per_s"] == pytest.approx(8 * each, rel=1e-12)
    price = lvlm("hardware", DEVICE, "--json").json["hardware"][0]["price_usd_per_s"]
    assert values["cost_usd"] == pytest.approx(price * 8 * values["total_s"] / 6, rel=1e-12)
    head = lvlm(*COMMANDS["shared"]).out.splitlines()[0]
    assert f"8 x {DEVICE} (TP 2, PP 2, DP 2, EP 4, encoder DP 2)" in head


def test_the_encoder_is_shared_like_the_language_model_unless_told(lvlm):
    def encoder(*options):
        inputs = lvlm("predict", MODEL, DEVICE, *options, "--json").json["inputs"]["parallelism"]
        return inputs["encoder_tp"], inputs["encoder_dp"]

    assert encoder("--tp", "4") == (4, 1)
    assert encoder("--tp", "4", "--encoder-tp", "2") == (2, 1)
    assert encoder("--tp", "4", "--encoder-dp", "4") == (1, 4)
    assert encoder("--tp", "2", "--pp", "2", "--encoder-tp", "2", "--encoder-dp", "2") == (2, 2)


def test_models_lists_every_model_with_its_family(lvlm):
    listed = lvlm("models", "--json").json["models"]
    assert [(row["name"], row["family"]) for row in listed] == [(n, load_model(n).family) for n in model_names()]
    lines = [line.split() for line in lvlm("models").out.splitlines()]
    heads = {(words[0], words[1]) for words in lines if len(words) > 2}
    assert {(row["name"], row["family"]) for row in listed} <= heads  # each on a line of its own, in one piece
    assert len({row["family"] for row in listed}) > 20


def test_predict_of_a_device_without_price(lvlm):
    assert "no public price" in lvlm("predict", MODEL, "cpu-epyc-9654").out
    assert lvlm("predict", MODEL, "cpu-epyc-9654", "--json").json["cost_usd"] is None


def test_predict_says_what_was_asked_first_and_how_far_to_trust_it_last(lvlm):
    lines = lvlm(*COMMANDS["predict"]).out.splitlines()
    assert lines[0].startswith(f"{MODEL} on {DEVICE}, engine fused")
    assert "image 1920x1080" in lines[1]
    assert any(line.startswith("Trust: ") for line in lines[-4:])
    assert {"TTFT", "TPOT", "total", "throughput", "Why"} <= {(line.split() or [""])[0] for line in lines}


def test_a_model_that_does_not_fit_is_printed_whole_and_exits_3(lvlm):
    result = lvlm("predict", LARGE, DEVICE, "--image", "1920x1080", "--json")
    assert result.code == cli.Exit.INFEASIBLE
    assert_shape(result.json, PREDICT)
    assert result.json["fits"] is False
    (line,) = result.err.splitlines()
    assert LARGE in line
    assert "GB are usable" in line
    shared = lvlm("predict", LARGE, DEVICE, "--pp", "2", "--dp", "2", "--batch", "999")
    assert f"{LARGE} with batch 999 on 4 x {DEVICE}" in shared.err
    assert "does NOT fit" in lvlm("predict", LARGE, DEVICE).out


# Pictures and files


def test_an_image_file_counts_as_its_size(lvlm, tmp_path):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (640, 480)).save(photo)
    from_file = lvlm("tokens", MODEL, "--image", photo, "--json").json
    from_size = lvlm("tokens", MODEL, "--image", "640×480", "--json").json
    assert {key: from_file[key] for key in TOKENS} == {key: from_size[key] for key in TOKENS}
    assert from_file["inputs"]["images"] == [{"source": str(photo), "width": 640, "height": 480, "codec": "png"}]


def test_a_folder_with_a_config_is_a_model(lvlm, tmp_path):
    text = (ROOT / "costmodel" / "model_configs" / f"{MODEL}.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    values = lvlm("count", tmp_path, "--image", "640x480", "--json").json
    assert values["flops"] == lvlm("count", MODEL, "--image", "640x480", "--json").json["flops"]
    assert values["inputs"]["model"]["source"] == str(tmp_path / "config.json")


def test_pixel_limits_and_frames_change_the_tokens(lvlm):
    whole = lvlm("tokens", MODEL, *PICTURES, "--json").json["visual"]
    assert lvlm("tokens", MODEL, *PICTURES, "--pixels", "100352:200704", "--json").json["visual"] < whole
    sampled = lvlm("tokens", MODEL, *PICTURES, "--fps", "1", "--json").json
    given = lvlm("tokens", MODEL, *PICTURES, "--frames", "4", "--json").json
    assert sampled["visual"] < whole
    assert sampled["inputs"]["videos"][0]["frames"] == given["inputs"]["videos"][0]["frames"] == 4
    assert sampled["visual"] == given["visual"]


@pytest.mark.parametrize(("suffix", "head"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("PDF", b"%PDF")])
def test_roofline_draws_a_file(lvlm, tmp_path, suffix, head):
    figure = tmp_path / f"plot.{suffix}"
    result = lvlm(*COMMANDS["roofline"], "--weight-bits", "8", "--activation-bits", "8", "-o", figure, "--json")
    assert result.code == 0
    assert result.err == f"lvlm: wrote {figure}\n"
    assert figure.read_bytes().startswith(head)
    assert set(result.json["roofs"]) == {"fp8", "bf16"}


def test_roofline_operators_add_up_to_their_stages(lvlm):
    values = lvlm(*COMMANDS["roofline"], "--json").json
    for name, stage in values["stages"].items():
        operators = [row for row in values["operators"] if row["stage"] == name]
        assert sum(row["flops"] for row in operators) == pytest.approx(stage["flops"])
        assert sum(row["time_s"] for row in operators) == pytest.approx(stage["time_s"], rel=1e-6)
    assert len(lvlm(*COMMANDS["roofline"], "--csv").rows) == len(values["operators"])


# What goes wrong


@pytest.fixture
def bad_files(tmp_path, monkeypatch):
    (tmp_path / "text.jpg").write_text("no picture", encoding="utf-8")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "qwen2_5_vl",', encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign.json").write_text('{"name": "package", "version": "1.0"}', encoding="utf-8")
    (tmp_path / "list.json").write_text("[1, 2]", encoding="utf-8")
    (tmp_path / "other.json").write_text('{"model_type": "whisper"}', encoding="utf-8")
    (tmp_path / "device.toml").write_text("name = ", encoding="utf-8")
    (tmp_path / "deep.json").write_text("[" * 100_000, encoding="utf-8")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00\x80")
    trace = {"model_type": "lvlm-trace", "schema_version": 2}
    (tmp_path / "trace.json").write_text(json.dumps(trace), encoding="utf-8")
    monkeypatch.chdir(tmp_path)


PREDICTION = f"predict {MODEL} {DEVICE}"
CLIP = "--video 1280x720:5s@24fps"
TEXT_COMMANDS = [f"tokens {TEXT_ONLY}", f"count {TEXT_ONLY}"]
TEXT_COMMANDS += [f"{command} {TEXT_ONLY} {DEVICE}" for command in ("predict", "roofline")]
BAD = [
    ("predict qwen25-vl-7b h100-sxm5-80gb", "did you mean 'qwen2.5-vl-7b'?"),
    (f"predict {MODEL} h1000", "did you mean 'h100-sxm5-80gb'?"),
    (f"predict {MODEL}", "HARDWARE requires an argument"),
    (f"{PREDICTION} more", "unexpected argument 'more'"),
    (f"{PREDICTION} --imge 3x3", "Did you mean --image?"),
    (f"{PREDICTION} --image", "--image requires an argument"),
    (f"{PREDICTION} --technique nonesuch:keep=0.5", "unknown technique 'nonesuch'"),
    (f"{PREDICTION} --technique fastv:keep", "must read key=value"),
    (f"{PREDICTION} --engine fusd", "did you mean 'fused'?"),
    (f"{PREDICTION} --activation-bits 4 --weight-bits 4", "no matrix unit"),
    (f"{PREDICTION} --weight-bits 5", "weight_bits=5"),
    (f"{PREDICTION} --tp 3", "tp=3"),
    (f"{PREDICTION} --tp 2 --encoder-tp 4", "encoder_tp x encoder_dp=4 must not exceed tp x pp=2"),
    (f"{PREDICTION} --tp 16", "tp=16 does not divide the 28 heads"),
    (f"{PREDICTION} --tp 7 --encoder-tp 7", "encoder_tp=7 does not divide the 16 heads"),
    (f"{PREDICTION} --pp 0", "must be a whole number from 1"),
    (f"{PREDICTION} --pp two", "must be a whole number from 1"),
    (f"{PREDICTION} --pp", "--pp requires an argument"),
    (f"{PREDICTION} --pp 29", "pp=29 exceeds the 28 layers"),
    (f"{PREDICTION} --pp 4 --tp 4", "whose node joins 8"),
    (f"{PREDICTION} --dp 1.5", "must be a whole number from 1"),
    (f"{PREDICTION} --dp 2000", "Parallelism.dp=2000 must be a whole number from 1 to 1024"),
    (f"{PREDICTION} --dp -1", "must be a whole number from 1"),
    (f"{PREDICTION} --ep 2", "ep=2 must be 1, tp=1 or tp x dp=1"),
    (f"{PREDICTION} --tp 2 --ep 2", "ep=2 needs routed experts"),
    (f"predict {EXPERTS} {DEVICE} --tp 2 --dp 4 --ep 4", "ep=4 must be 1, tp=2 or tp x dp=8"),
    (f"predict {EXPERTS} {DEVICE} --tp 4 --dp 4 --ep 16", "whose node joins 8"),
    (f"{PREDICTION} --encoder-dp 2", "encoder_tp x encoder_dp=2 must not exceed tp x pp=1"),
    (f"{PREDICTION} --encoder-dp inf", "must be a whole number from 1"),
    (f"{PREDICTION} --encoder-dp 0", "must be a whole number from 1"),
    (f"{PREDICTION} --expert-imbalance 2", "--expert-imbalance"),
    (f"predict {MODEL} jetson-thor-128gb --tp 2", "whose node joins 1"),
    (f"roofline {MODEL} {DEVICE} --pp 29", "pp=29 exceeds"),
    *[(f"{command} --image 640x480", "has no vision part") for command in TEXT_COMMANDS],
    *[(f"{command} {CLIP}", "has no vision part") for command in TEXT_COMMANDS],
    (f"predict trace.json {DEVICE}", "trace.json: schema_version"),
    ("trace missing.json -o out.json", "no file 'missing.json'"),
    ("trace missing -o out.json", "no file 'missing'"),
    ("trace empty -o out.json", "no file 'empty/config.json'"),
    ("trace text.jpg -o out.json", "'text.jpg' is no JSON file"),
    ("trace bytes.json -o out.json", "'bytes.json' is no JSON file"),
    ("trace deep.json -o out.json", "'deep.json' is no JSON file"),
    ("trace broken -o out.json", "'broken/config.json' is no JSON file"),
    ("trace list.json -o out.json", "holds list, not an object"),
    ("trace other.json", "requires an argument"),
    ("trace -o out.json", "requires an argument"),
    ("trace other.json -o out.txt", "name a .json file"),
    ("trace other.json -o missing/out.json", "in a folder that exists"),
    ("trace other.json -o empty", "name a .json file"),
    (f"{PREDICTION} --batch 0", "must be a whole number from 1"),
    (f"{PREDICTION} --batch -3", "must be a whole number from 1"),
    (f"{PREDICTION} --batch nan", "must be a whole number from 1"),
    (f"{PREDICTION} --text 1e300", "must be a whole number from 1"),
    (f"{PREDICTION} --output 1.5", "must be a whole number from 1"),
    (f"{PREDICTION} --json --csv", "--json and --csv exclude each other"),
    (f"predict {MODEL} {DEVICE}:speed=3", "unknown what-if key 'speed'"),
    (f"predict {MODEL} {DEVICE}:tdp_w=inf", "needs a number"),
    (f"predict {MODEL} device.toml", "device.toml"),
    (f"predict {MODEL} missing.toml", "missing.toml"),
    ("predct", 'Did you mean "predict"?'),
    ("--nonsense", "--nonsense"),
    ("models nonesuch", "unknown model"),
    ("hardware nonesuch", "unknown hardware"),
    ("engines nonesuch", "unknown engine"),
    (f"count {MODEL} --convention torc", 'Did you mean "torch"?'),
    ("tokens broken", "broken/config.json"),
    ("tokens empty", "no file 'empty/config.json'"),
    ("tokens foreign.json", "no model_type"),
    ("tokens list.json", "list.json"),
    ("tokens other.json", "'whisper'"),
    ("tokens missing/config.json", "no file 'missing/config.json'"),
    (f"tokens {MODEL} --image text.jpg", "no image that can be read"),
    (f"tokens {MODEL} --image missing.jpg", "no image file 'missing.jpg'"),
    (f"tokens {MODEL} --image empty", "no image that can be read"),
    (f"tokens {MODEL} --image 0x10", "width=0"),
    (f"tokens {MODEL} --image -5x5", "width=-5"),
    (f"tokens {MODEL} --image 1e9x1", "width=1000000000"),
    (f"tokens {MODEL} --image 1e99x1", "must read WIDTHxHEIGHT"),
    (f"tokens {MODEL} --image 1.5x2", "must read WIDTHxHEIGHT"),
    (f"tokens {MODEL} --video 1280x720", "1280x720:5s@24fps"),
    (f"tokens {MODEL} --video 1280x720:5@24", "1280x720:5s@24fps"),
    (f"tokens {MODEL} --video 1280x720:0s@24fps", "seconds=0"),
    (f"tokens {MODEL} --video missing.mp4", "no video file 'missing.mp4'"),
    (f"tokens {MODEL} {CLIP} --frames 500", "exceeds the 120 frames"),
    (f"tokens {MODEL} {CLIP} --fps nan", "must be a positive number"),
    (f"tokens {MODEL} {CLIP} --fps 1 --frames 4", "exclude each other"),
    (f"tokens {MODEL} --frames 4", "there are none"),
    (f"tokens {MODEL} --pixels 1:2", "there are none"),
    (f"tokens {MODEL} --image 3x3 --pixels 5", "must read MIN:MAX"),
    (f"tokens {MODEL} --image 3x3 --pixels 50:20", "the smaller first"),
    ("tokens llava-1.5-7b --image 3x3 --pixels 10:20", "no pixel limits"),
    (f"roofline {MODEL} {DEVICE} -o plot.gif", ".svg, .png, .pdf"),
    (f"roofline {MODEL} {DEVICE} -o missing/plot.svg", "its folder must exist"),
]


@pytest.mark.parametrize(("line", "says"), BAD, ids=[line for line, _ in BAD])
@pytest.mark.usefixtures("bad_files")
def test_bad_input_is_one_line_and_exit_2(lvlm, line, says):
    result = lvlm(*line.split())
    assert says in one_line(result)
    assert result.code == cli.Exit.BAD_INPUT


def test_an_unexpected_failure_is_one_line_and_exit_1(lvlm, monkeypatch):
    def fail(*_, **__):
        raise KeyError("slip")

    monkeypatch.setattr("studies.commands.tokens.count", fail)
    monkeypatch.delenv("LVLM_DEBUG", raising=False)
    result = lvlm(*COMMANDS["tokens"])
    assert "KeyError" in one_line(result)
    assert result.code == cli.Exit.FAILED
    monkeypatch.setenv("LVLM_DEBUG", "1")
    assert "Traceback" in lvlm(*COMMANDS["tokens"]).err


# Help, version, completion, streams


def test_help_and_version(lvlm):
    result = lvlm("--help")
    assert (result.code, result.err) == (0, "")
    assert all(name in result.out for name in cli.COMMANDS)
    assert lvlm().out == result.out
    assert lvlm("--version").out.strip()


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(lvlm, name):
    result = lvlm(name, "--help")
    assert (result.code, result.err) == (0, "")
    assert "--json" in result.out


def test_completion_is_installed(lvlm, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert lvlm("--install-completion", "--shell", "bash", "-o", tmp_path / "lvlm.bash").code == 0
    assert "--encoder-tp" in (tmp_path / "lvlm.bash").read_text(encoding="utf-8")


def test_a_technique_is_a_name_with_numbers_and_words():
    assert parse.split_method("visionzip") == ("visionzip", {})
    assert parse.split_method("fastv:keep=.5,score=last") == ("fastv", {"keep": 0.5, "score": "last"})
    with pytest.raises(ValueError, match="twice"):
        parse.split_method("fastv:keep=1,keep=2")


@pytest.mark.parametrize("module", [parse, tables])
def test_examples_run(module):
    assert doctest.testmod(module).failed == 0


def python(code, **options):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, **options
    )


def test_help_imports_nothing_heavy():
    heavy = ["torch", "numpy", "pydantic", "matplotlib", "scipy", "costmodel"]
    code = (
        f"import sys; from studies.cli import main; main(['--help']); print([m for m in {heavy} if m in sys.modules])"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "reader", "read"),
    [
        (f"roofline {MODEL} {DEVICE} --json", "head -1", "{\n"),
        (f"roofline {MODEL} {DEVICE}", "true", ""),
        ("--help", "true", ""),
    ],
)
def test_a_closed_pipe_is_no_failure(arguments, reader, read):
    command = f"{sys.executable} -m studies.cli {arguments} | {reader}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, read, "")


def test_prediction_imports_no_torch_and_no_matplotlib():
    arguments = COMMANDS["predict"]
    done = python(
        f"import sys; from studies.cli import main; code = main({arguments}); "
        "sys.exit(code or any(m in sys.modules for m in ('torch', 'matplotlib', 'transformers')))"
    )
    assert done.returncode == 0, done.stderr
