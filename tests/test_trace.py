"""Traced models: what `lvlm trace` writes agrees with the analytic model, and predict takes it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from costmodel import Image, Unsupported, Workload, load_model, predict
from costmodel.counts import count
from studies.cli import main

pytest.importorskip("torch")
pytest.importorskip("transformers")
from runtime.trace import trace

CONFIGS = Path(__file__).parent.parent / "costmodel" / "model_configs"
FAST = "llava-1.5-7b"
WITH_VISION = [FAST, "llava-1.5-13b", "internvl3-8b", "internvl2.5-8b", "gemma-3-4b"]
LANGUAGE_ALONE = [
    "qwen2.5-vl-7b",
    "qwen2-vl-2b",
    "qwen3-vl-8b",
    "qwen3-vl-30b-a3b",
    "idefics3-8b",
    "llama-3.2-11b-vision",
]
TEXT_TOKENS = 700


def config(name):
    return json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))


def traced(name, tmp_path):
    found = trace(config(name), source=name)
    path = tmp_path / f"traced-{name}.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    return load_model(path), found


def names(fast, slow):
    return [fast, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


@pytest.mark.parametrize("name", names(FAST, WITH_VISION[1:] + LANGUAGE_ALONE))
def test_language_models_agree_with_the_analytic_operators(name, tmp_path):
    model, _ = traced(name, tmp_path)
    analytic = load_model(name)
    ours, theirs = (count(m, Workload(text_tokens=TEXT_TOKENS), convention="torch") for m in (model, analytic))
    for stage in ("prefill", "decode_step"):
        assert ours.flops[stage] == pytest.approx(theirs.flops[stage], rel=1e-3), stage
    assert model.parameters()["language"] == analytic.parameters()["language"]
    assert model.parameters()["active"] - model.parameters()["total"] == pytest.approx(
        analytic.parameters()["active"] - analytic.parameters()["total"], rel=1e-3
    )
    assert ours.kv_bytes_per_token == theirs.kv_bytes_per_token


@pytest.mark.parametrize("name", names(FAST, WITH_VISION[1:]))
def test_vision_parts_agree_with_the_analytic_operators(name, tmp_path):
    model, found = traced(name, tmp_path)
    side = found["vision"]["side_px"]
    workload = Workload(images=[Image(side, side)], text_tokens=TEXT_TOKENS)
    ours, theirs = (count(m, workload, convention="torch") for m in (model, load_model(name)))
    for stage in ("encode", "adapt"):
        assert ours.flops[stage] == pytest.approx(theirs.flops[stage], rel=1e-3), stage
    assert ours.parameters == theirs.parameters
    assert ours.tokens["visual"] == theirs.tokens["visual"]


def test_what_a_trace_cannot_know_is_said_beside_the_prediction(tmp_path):
    model, found = traced("qwen2.5-vl-3b", tmp_path)
    assert "vision" not in found
    lines = predict(model, "a100-sxm4-80gb", Workload(text_tokens=100)).why()
    assert any("vision part could not be traced" in line for line in lines)
    assert any("element-wise" in line for line in lines)
    with pytest.raises(Unsupported, match="no vision part"):
        predict(model, "a100-sxm4-80gb", Workload(images=[Image(100, 100)]))


def test_the_command_writes_a_file_that_predict_takes(tmp_path, capsys):
    path = tmp_path / "model.json"
    assert main(["trace", str(CONFIGS / f"{FAST}.json"), "-o", str(path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["parameters"]["total"] == load_model(FAST).parameters()["total"]
    assert main(["predict", str(path), "h100-sxm5-80gb", "--image", "640x480", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"]["visual"] == 576


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(model_type="no_such_family"), "no class for model_type"),
        (lambda c: c.pop("model_type"), "no class for model_type"),
    ],
)
def test_a_config_without_a_class_is_refused_in_one_line(change, message, tmp_path, capsys):
    values = copy.deepcopy(config(FAST))
    change(values)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    assert main(["trace", str(path), "-o", str(tmp_path / "out.json")]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


def test_tensor_parallelism_of_a_trace_is_refused(tmp_path):
    from costmodel import Parallelism

    model, _ = traced(FAST, tmp_path)
    with pytest.raises(ValueError, match="tp=2"):
        predict(model, "h100-sxm5-80gb", Workload(text_tokens=10), parallelism=Parallelism(tp=2))
