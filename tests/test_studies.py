"""Every study runs at smoke size and writes what it says."""

from __future__ import annotations

import json
import sys

import pytest

from studies.paper import figure4
from studies.validation import preprocess, simulator_speed, speed


def test_figure4_puts_every_stage_on_the_papers_side_of_the_ridge(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["figure4", "-o", str(tmp_path)])
    figure4.main()
    rows = json.loads((tmp_path / "figure4.json").read_text())
    assert [row["stage"] for row in rows] == ["encode", "prefill", "decode"]
    assert all(row["ours_bound"] == row["paper_bound"] for row in rows)
    assert (tmp_path / "figure4.svg").read_text().lstrip().startswith("<?xml")
    assert "ridge 153.0" in capsys.readouterr().out


def test_committed_figure4_is_what_the_code_gives():
    committed = json.loads((figure4.Path(figure4.__file__).parent / "figure4.json").read_text())
    assert committed == json.loads(json.dumps(figure4.rows()))


def test_speed_prints_every_figure(monkeypatch, capsys):
    monkeypatch.setattr(speed, "N_QUERIES", 20)
    monkeypatch.setattr(speed, "N_POINTS", 2000)
    speed.main()
    printed = capsys.readouterr().out
    for part in ("import costmodel", "headline", "everything", "qwen2.5-vl-7b"):
        assert part in printed


@pytest.mark.slow
def test_preprocess_writes_measurement_lines(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setattr(preprocess, "SIZES", ((320, 240), (640, 480)))
    monkeypatch.setattr(preprocess, "REPEATS", 2)
    output = tmp_path / "run.jsonl"
    monkeypatch.setattr(sys, "argv", ["preprocess", "-o", str(output)])
    preprocess.main()
    lines = [json.loads(text) for text in output.read_text().splitlines()]
    assert [line["shape"]["part"] for line in lines] == ["decode", "resize_normalise_patch"] * 2
    assert all(len(line["samples_s"]) == 2 and min(line["samples_s"]) > 0 for line in lines)
    assert "s/pixel" in capsys.readouterr().out


def test_simulator_speed_prints_every_figure(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["simulator_speed"])
    monkeypatch.setattr(simulator_speed, "N_REQUESTS", dict.fromkeys(simulator_speed.TARGETS, 300))
    monkeypatch.setattr(simulator_speed, "N_SATURATION", dict.fromkeys(simulator_speed.TARGETS, 300))
    monkeypatch.setattr(simulator_speed, "N_LEAPS", 20)
    simulator_speed.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["leaps"]["events_leaping"] <= found["leaps"]["events_stepping"] / 10
    assert found["leaps"]["equal_bit_by_bit"] == 1.0
