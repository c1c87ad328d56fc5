"""Measurement lines: what is written is read again, bad ones are named by number, and kernels find their curve."""

import json
from pathlib import Path

import pytest

from costmodel import load_hardware
from costmodel.hardware import HardwareProfile
from runtime.calibrate import read, read_lines, why_not
from runtime.compare import compare
from runtime.lines import curve_name, kernel_samples, without_curve
from runtime.measurement import KINDS, measurement_files, read_measurements, write_measurements
from runtime.new_device import measured_profile
from tests.lines import line

STORED = Path(__file__).parents[1] / "studies" / "measurements" / "preprocess-cpu.jsonl"
SMALL = STORED.with_name("small-lvlm-cpu.jsonl")
H100 = load_hardware("h100-sxm5-80gb")
HEADS = {"heads": 32, "kv_heads": 8, "head_dim": 128}
SHAPES = {
    "gemm": {"m": 64, "n": 128, "k": 256},
    "prefill_attention": {"b": 1, "s": 512, **HEADS},
    "encoder_attention": {"b": 1, "s": 512, **HEADS, "kernel": "vllm_flash_attn_fa3"},
    "decode_attention": {"b": 4, "context": 4096, **HEADS, "kernel": "eager"},
    "elementwise": {"operator": "norm", "rows": 4096, "width": 1024},
    "collective": {"algorithm": "all_reduce", "ranks": 4, "message_bytes": 1 << 20},
    "copy": {"direction": "h2d", "bytes": 1 << 20},
    "launch": {"kind": "graph", "kernels": 100},
    "preprocess": {"part": "decode", "pixels": 1 << 20},
    "encode": {"model": "llava-1.5-7b", "batch": 2, "images": [[640, 480], [336, 336]]},
    "adapt": {"model": "llava-1.5-7b", "visual_tokens": 576},
    "prefill": {"model": "llava-1.5-7b", "visual_tokens": 576, "text_tokens": 64},
    "decode_step": {"model": "llava-1.5-7b", "batch": 8, "context": 1024},
    "technique": {"technique": "fastv"},
}


def write(path, *texts):
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def text(kind="gemm", shape=None, **changes):
    values = {
        **line("gemm", SHAPES["gemm"]).model_dump(mode="json"),
        "kind": kind,
        "shape": SHAPES.get(kind) if shape is None else shape,
    }
    return json.dumps({**values, **changes})


def test_every_kind_comes_back_as_it_was_written(tmp_path):
    assert set(SHAPES) == set(KINDS)
    lines = tuple(line(kind, shape, samples_s=(2e-3, 1e-3, 4e-3)) for kind, shape in SHAPES.items())
    write_measurements(tmp_path / "run.jsonl", lines)
    assert read_measurements(tmp_path / "run.jsonl") == lines
    assert {one.median_s for one in lines} == {2e-3}


def test_stored_lines_keep_their_numbers(tmp_path):
    stored = read_measurements(STORED)
    assert len(stored) == 40
    write_measurements(tmp_path / "again.jsonl", stored)
    again = [json.loads(x) for x in (tmp_path / "again.jsonl").read_text().splitlines()]
    assert again == [json.loads(x) for x in STORED.read_text().splitlines()]


def test_lines_cannot_be_changed():
    one = line("gemm", SHAPES["gemm"])
    with pytest.raises(TypeError):
        one.shape["m"] = 1
    with pytest.raises(ValueError, match="frozen"):
        one.device = "other"


BAD = [
    ("{", "is no JSON object"),
    ("[1]", r"is no JSON object: \[1\]"),
    ("[" * 100_000, "is no JSON object"),
    (text(colour="red"), "colour='red' extra inputs are not permitted"),
    (text(kind="fold", shape={}), "kind='fold' input should be"),
    (text(samples_s=[]), "samples_s"),
    (text(samples_s=[1.0, 0.0]), r"samples_s\.1='0\.0'"),
    (text(samples_s=[float("nan")]), r"samples_s\.0='nan'"),
    (text(taken_at="yesterday"), "taken_at='yesterday' must be a time"),
    (text(device=""), "device"),
    (text(schema_version=2), "schema_version='2'"),
    (text(shape={"m": 1, "n": 2}), "shape of gemm lacks 'k'"),
    (text(shape={"m": 1, "n": 2, "k": 0}), "shape of gemm has k=0, which must be a whole number"),
    (text(shape={"m": 1, "n": 2, "k": 2.5}), "shape of gemm has k=2.5, which must be a whole number"),
    (text(shape={"m": 1, "n": 2, "k": 10**400}), "shape of gemm has k=1000"),
    (text(shape={"m": 1, "n": 2, "k": "8"}), "shape of gemm has k='8'"),
    (text("decode_attention", {"b": 1, "s": 2, **HEADS}), "lacks 'context'"),
    (text("elementwise", {"operator": "twirl", "rows": 2, "width": 2}), "lacks 'traffic_bytes'"),
    (text("elementwise", {"operator": "norm", "rows": 2}), "lacks 'width'"),
    (text("elementwise", precision="q4"), "precision='q4' has no known width"),
    (text("copy", {"bytes": 4}), "lacks 'direction'"),
    (text("copy", {"bytes": 4, "direction": "up"}), "use one of h2d, d2h, d2d"),
    (text("preprocess", {"part": "decode"}), "lacks 'width'"),
    (text("prefill", {"batch": -1}), "batch=-1"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=range(len(BAD)))
def test_a_bad_line_is_named(tmp_path, bad, message):
    path = write(tmp_path / "run.jsonl", text(), "", bad, text())
    with pytest.raises(ValueError, match=rf"run\.jsonl line 3:? .*{message}") as caught:
        read_measurements(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_all_bad_lines_are_numbered(tmp_path):
    path = write(tmp_path / "run.jsonl", text(), "{", text(), "{", "{}")
    with pytest.raises(ValueError, match=r"line 2 .*\(and 2 more bad lines: 4, 5\)"):
        read_measurements(path)


def test_files_that_hold_nothing(tmp_path):
    with pytest.raises(ValueError, match="holds no measurement line"):
        read_measurements(write(tmp_path / "empty.jsonl", "", " "))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot read measurements"):
        read_measurements(tmp_path / "binary.jsonl")
    with pytest.raises(ValueError, match="cannot read measurements"):
        read_measurements(tmp_path / "missing.jsonl")


def test_files_and_folders_mix_and_count_once(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    one, two = write(tmp_path / "a" / "one.jsonl", text()), write(folder / "two.jsonl", text())
    assert measurement_files([two, tmp_path / "a"]) == [two, one]
    with pytest.raises(ValueError, match=r"must end in \.jsonl"):
        measurement_files([write(tmp_path / "run.json", text())])
    with pytest.raises(FileNotFoundError, match="no folder or file"):
        measurement_files([tmp_path / "c"])


# Which curve a line belongs to


def test_kernels_find_their_curve():
    found = {kind: curve_name(line(kind, shape)) for kind, shape in SHAPES.items()}
    names = {kind: name.text for kind, name in found.items() if name}
    assert names == {
        "gemm": "torch gemm.bf16",
        "prefill_attention": "torch prefill_attention.flash",
        "encoder_attention": "torch encoder_attention.fa3",
        "decode_attention": "torch decode_attention.gqa.eager",
        "elementwise": "torch elementwise.norm",
        "collective": "torch collective.all_reduce",
    }


def test_traffic_of_named_operators():
    by_rows = line("elementwise", {"operator": "gated_activation", "rows": 10, "width": 7}, precision="fp32")
    assert by_rows.traffic_bytes == 10 * 7 * 3 * 4
    assert line("elementwise", {"operator": "twirl", "traffic_bytes": 640}).traffic_bytes == 640


def test_lines_become_samples_by_curve(tmp_path):
    lines = [line(kind, shape) for kind, shape in SHAPES.items()] + [
        line("gemm", {"m": 1, "n": 2, "k": 3}, samples_s=(3e-3, 1e-3, 2e-3)),
        line("gemm", {"m": 1, "n": 2, "k": 3}, precision="tf32"),
        line("prefill_attention", SHAPES["prefill_attention"], precision="fp32"),
    ]
    write_measurements(tmp_path / "run.jsonl", lines)
    found = {some.name: some for some in read([tmp_path], H100.name)}
    products = found["gemm.bf16"]
    assert [products.work[side].tolist() for side in "mnk"] == [[64, 1], [128, 2], [256, 3]]
    assert products.measured_s.tolist() == [1e-3, 2e-3]
    assert (products.library, products.version, products.origins) == ("torch", "2.9", (tmp_path / "run.jsonl",))
    assert "prefill_attention.fp32.flash" in found  # apart from the curve of 16 bits
    assert len(found) == 7
    left = without_curve(read_lines([tmp_path]))
    assert [name.partition(" ")[0] for name in left] == [*list(KINDS)[6:], "gemm.tf32"]
    assert why_not(found.values(), [], H100)[0] == "torch gemm.bf16 (2 rows: fewer than 12 that are not held out)"


def test_collectives_need_a_link():
    one = kernel_samples([line("collective", {**SHAPES["collective"], "ranks": 16})])
    assert "tp=16 has no link on h100-sxm5-80gb" in why_not(one, [], H100)[0]


def test_lines_of_two_devices_are_refused(tmp_path):
    write_measurements(
        tmp_path / "run.jsonl", [line("gemm", SHAPES["gemm"], device=name) for name in ("NVIDIA A", "NVIDIA B")]
    )
    with pytest.raises(ValueError, match="'NVIDIA A', 'NVIDIA B'; give those of one"):
        read_lines([tmp_path])


def test_stored_lines_of_a_cpu_give_a_profile_that_prices_its_stages(monkeypatch):
    # What docs/measurements.md tells a person without a GPU to do, on the lines that are kept.
    monkeypatch.chdir(Path(__file__).parents[1])
    lines = read_measurements(SMALL)
    given = {"kind": "cpu", "tdp_w": 100.0}
    here = HardwareProfile.model_validate(measured_profile("my-cpu", lines, given))
    rows = [row for row in compare(lines, hardware=here) if row.kind in ("encode", "adapt", "prefill", "decode_step")]
    assert {(row.kind, row.implementation) for row in rows} == {
        (kind, name) for kind in ("encode", "adapt", "prefill", "decode_step") for name in ("ours", "transformers")
    }
    assert all(row.predicted_s for row in rows)
