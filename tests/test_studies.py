"""Every study runs at smoke size and writes what it says."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from costmodel import evaluate, load_engine, load_hardware, load_model
from costmodel.query import build_query
from studies.frontiers import codesign, common, hybrid_compression, relaxed_verification, streaming_state
from studies.paper import figure4
from studies.validation import cluster_speed, preprocess, simulator_speed, speed


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
    counted = Counter((line["shape"]["part"], line["shape"].get("codec")) for line in lines)
    assert counted == {("decode", "jpeg"): 2, ("resize_normalise_patch", None): 2}
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


def test_cluster_speed_prints_every_figure(monkeypatch, capsys):
    for name, value in {
        "WORKERS": 3,
        "PER_WORKER": 20,
        "RUNS": 1,
        "RUNS_ALONE": 1,
        "N_PICTURES": 30,
        "N_BURST": 30,
    }.items():
        monkeypatch.setattr(cluster_speed, name, value)
    cluster_speed.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found) == 1 + len(cluster_speed.ROUTERS) + len(cluster_speed.CPU_WORKERS)
    assert all(figures["events_per_request"] > 1 for figures in found.values())
    one, many = (found[f"1 encode : 3 prefill+decode, {name}"] for name in cluster_speed.CPU_WORKERS)
    assert one["requests_per_s"] < many["requests_per_s"]


# The four frontiers

FRONTIERS = (hybrid_compression, relaxed_verification, streaming_state, codesign)


def short_name(study: ModuleType) -> str:
    return study.__name__.rpartition(".")[2]


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, f"{path}/{key}")
    else:
        yield path, value


@pytest.fixture(scope="module")
def smoke() -> dict[str, Any]:
    return {short_name(study): study.numbers(True) for study in FRONTIERS}


@pytest.mark.parametrize("study", FRONTIERS, ids=short_name)
def test_every_frontier_runs_at_smoke_size_and_writes_its_three_files(study, tmp_path, monkeypatch, capsys):
    name = short_name(study)
    monkeypatch.setattr(sys, "argv", [name, "--smoke", "-o", str(tmp_path)])
    common.write(name, study.numbers, study.report, study.draw)
    page = (tmp_path / f"{name}.md").read_text()
    assert page in capsys.readouterr().out
    assert page.count("| --- |") >= 2
    assert "What it says, and what not" in page
    assert json.loads((tmp_path / f"{name}.json").read_text())
    assert (tmp_path / f"{name}.svg").read_text().lstrip().startswith("<?xml")


@pytest.mark.slow
@pytest.mark.parametrize("study", FRONTIERS, ids=short_name)
def test_committed_frontier_is_what_the_code_gives(study):
    folder, name = Path(common.__file__).parent, short_name(study)
    committed = json.loads((folder / f"{name}.json").read_text())
    found = json.loads(json.dumps(common.rounded(study.numbers(False))))
    expected = {p: pytest.approx(v, rel=1e-4) if isinstance(v, float) else v for p, v in leaves(committed)}
    assert dict(leaves(found)) == expected, f"run python -m studies.frontiers.{name} and read its page again"
    assert (folder / f"{name}.md").read_text() == study.report(common.rounded(found))


@pytest.mark.parametrize("by", ["layer", "head"])
def test_groups_with_one_operator_hold_and_read_what_it_does_alone(by):
    model, device = load_model(hybrid_compression.MODEL), load_hardware("h100-sxm5-80gb")
    query = build_query(model, hybrid_compression.REQUEST, load_engine("ideal"))
    for one in (hybrid_compression.prune(0.2), hybrid_compression.quantise(0.2, "vllm")):
        alone = evaluate(one.apply(query), device)
        split = evaluate(hybrid_compression.ByGroup(by, (one, one)).apply(query), device)
        assert split.memory.kv_bytes == pytest.approx(alone.memory.kv_bytes, rel=1e-9)
        read = [p.stages["decode"].kv_bytes for p in (alone, split)]
        assert read[1] == pytest.approx(read[0], rel=1e-9)


def test_at_one_budget_all_operators_hold_it_on_the_device_but_retrieval_there(smoke):
    rows = [r for r in smoke["hybrid_compression"]["rows"] if r["budget"] == 0.2]
    full = next(r for r in smoke["hybrid_compression"]["rows"] if r["operator"] == "none")
    for r in rows:
        share = 1.0 if r["operator"] == "retrieve, device" else 0.2
        assert r["kv_gb"] == pytest.approx(share * full["kv_gb"], rel=0.04)  # 128 generated tokens are never dropped
        assert (r["quality"] is None) != (r["operator"] == "heads: prune + retrieve")
    assert {r["operator"] for r in rows} == set(hybrid_compression.CODES)


def test_relaxed_acceptance_is_the_published_one_and_a_better_draft_is_faster(smoke):
    for case in smoke["relaxed_verification"]["cases"]:
        for row in case["table_10"]:
            assert row["accepted_ours"] == pytest.approx(row["accepted_published"], rel=0.03)
        by_acceptance = list(zip(*case["surface"], strict=True))
        assert all(list(column) == sorted(column) for column in by_acceptance)
        strict, half, most = case["over_batch"][:3]
        ratios = [a / b for a, b in zip(most["speed_up"], strict["speed_up"], strict=True)]
        assert ratios == pytest.approx([ratios[0]] * len(ratios))  # relaxing moves a curve by one factor
        assert half["speed_up"] > strict["speed_up"]


@pytest.mark.parametrize(
    ("speed_ups", "words"),
    [
        ([2.0, 1.5, 1.25], "at all"),
        ([0.5, 0.75, 0.9], "never"),
        ([1.5, 1.25, 0.75], "up to 8"),  # halfway from 4 to 16 on a logarithmic axis
        ([0.5, 1.5, 1.5], "from 2"),
        ([0.5, 1.5, 0.5], "from 2, up to 8"),
    ],
)
def test_where_a_draft_pays_is_found_between_batches(speed_ups, words):
    import numpy as np

    assert relaxed_verification.pays(np.array([1.0, 4.0, 16.0]), np.array(speed_ups)) == words


def test_streams_are_bounded_but_the_one_that_keeps_everything(smoke):
    found = smoke["streaming_state"]
    assert all(r["is_bounded"] and r["full_after_s"] is None for r in found["rows"])
    assert all(not r["is_bounded"] and r["full_after_s"] > 0 for r in found["growing"])
    by = {(r["device"], r["method"]): r for r in found["rows"]}
    for device in streaming_state.SMOKE_DEVICES:
        kept, again = by[device, "StreamingVLM"], by[device, "recompute"]
        assert kept["kv_gb"] == pytest.approx(again["kv_gb"])
        assert kept["token_s"] < again["token_s"]
        assert kept["device_frames_per_s"] > again["device_frames_per_s"]
        assert [r["host_gb_per_hour"] > 0 for (d, _), r in by.items() if d == device] == [False, False, True, False]


def test_a_plan_costs_its_parts_and_a_slower_link_never_less(smoke):
    best = smoke["codesign"]["best"]
    apart = {(b["set"], b["target_ttft_s"], b["link"]): b["plan"] for b in best if b["kind"] == "apart"}
    assert any(apart.values())
    for (name, target, link), plan in apart.items():
        if plan is None:
            continue
        assert sum(plan["costs"].values()) == pytest.approx(plan["usd"])
        moved = (plan["embeddings_gb"] + plan["cache_gb"]) * 1e9
        assert plan["transfer_s"] == pytest.approx(moved / codesign.LINKS[link])
        if link == "TCP":
            assert plan["usd"] >= apart[name, target, "RDMA"]["usd"]
    together = [b["plan"] for b in best if b["kind"] == "together" and b["link"] == "TCP"]
    assert together == [b["plan"] for b in best if b["kind"] == "together" and b["link"] == "RDMA"]
