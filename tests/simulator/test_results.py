"""Results: vLLM's keys of our own runs, results of others read back, and runs beside each other."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from simulator import Pool, ServingPlan, report, simulate, traffic
from simulator.results import differences, holds_result, read_result, result_of, statistics, vllm_result
from simulator.service import LinearService
from studies.cli import main

FIXTURES = Path(__file__).parent / "fixtures"
SERVICE = LinearService(step_base_s=5e-3, token_s=1e-5, sequence_s=1e-5, patch_s=1e-6)
PLAN = ServingPlan(model="any", pools=(Pool(hardware="any"),))
SAVED = (
    "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate", "burstiness", "max_concurrency",
    "duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput",
    "request_goodput", "output_throughput", "total_token_throughput", "max_output_tokens_per_s",
    "max_concurrent_requests",
    *(f"{part}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el") for part in ("mean", "median", "std", "p99")),
)  # fmt: skip
DETAILED = ("input_lens", "output_lens", "ttfts", "itls", "start_times", "generated_texts", "errors")
"""Keys of vllm/benchmarks/serve.py, with --save-detailed."""
MODEL = ("--model", "qwen2.5-vl-3b", "--hardware", "h100-sxm5-80gb")


@pytest.fixture(scope="module")
def trace():
    return simulate(PLAN, traffic.preset("text-chat", 6.0, 400, 1), service=SERVICE)


@pytest.fixture(scope="module")
def saved(trace):
    return json.loads(json.dumps(vllm_result(trace, report(trace))))


def test_a_run_has_the_keys_of_vllm(trace, saved):
    assert set(SAVED) <= set(saved)
    assert set(DETAILED) <= set(saved)
    assert all(len(saved[key]) == len(trace) for key in DETAILED)
    assert saved["completed"] == saved["num_prompts"] == len(trace)
    assert saved["failed"] == 0
    assert saved["total_output_tokens"] == trace.output_tokens.sum() == sum(saved["output_lens"])
    assert saved["total_input_tokens"] == sum(saved["input_lens"])


def test_what_vllm_works_out_of_the_lists_is_what_the_run_says(trace, saved):
    latency = np.array(saved["ttfts"]) + np.array([sum(gaps) for gaps in saved["itls"]])
    order = np.argsort(trace.columns["arrival_s"], kind="stable")
    assert latency == pytest.approx(trace.e2e_s[order])
    assert [len(gaps) + 1 for gaps in saved["itls"]] == saved["output_lens"]
    assert np.mean(saved["ttfts"]) * 1000 == pytest.approx(saved["mean_ttft_ms"])
    assert np.std(saved["ttfts"]) * 1000 == pytest.approx(saved["std_ttft_ms"])
    ends = np.array(saved["start_times"]) + latency
    assert ends.max() == pytest.approx(saved["duration"])
    begins = np.array(saved["start_times"])
    inside = [((begins <= at) & (ends > at)).sum() for at in begins]
    assert max(inside) == saved["max_concurrent_requests"]
    assert saved["output_throughput"] <= saved["max_output_tokens_per_s"]


def test_the_gaps_of_tokens_are_the_true_ones_in_the_aggregates(trace, saved):
    values, weights = trace.itl
    assert saved["mean_itl_ms"] == pytest.approx(1000 * np.average(values, weights=weights))


def test_requests_that_did_not_end_are_failures(trace):
    columns = {**trace.columns, "state": trace.columns["state"].copy()}
    columns["state"][3] = 5
    cut = replace(trace, columns=columns)
    held = vllm_result(cut, report(cut))
    assert (held["completed"], held["failed"]) == (len(trace) - 1, 1)
    assert sum(error != "" for error in held["errors"]) == 1


def test_a_written_run_reads_back_as_itself(trace, saved, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(saved))
    rows, missing = differences(result_of(trace), read_result(path))
    assert not missing
    assert len(rows) == 4 * 5 + 2
    for row in rows:
        assert row.error == pytest.approx(0, abs=1e-9), row
    again = traffic.read(path)
    assert again.text_tokens.tolist() == saved["input_lens"]
    assert again.arrival_s.tolist() == pytest.approx(saved["start_times"])


def test_tools_agree_on_the_same_latencies():
    """The fixtures of aiperf and vLLM hold the same requests, of which the last one failed."""
    ours, theirs = (read_result(FIXTURES / name) for name in ("vllm_bench.good.json", "aiperf.good.jsonl"))
    rows, missing = differences(ours, theirs)
    assert not missing
    assert (ours.completed, ours.failed) == (theirs.completed, theirs.failed) == (23, 1)
    for row in rows:
        if row.statistic != "total":
            assert row.error == pytest.approx(0, abs=1e-6), row


def test_guidellm_calls_our_tpot_inter_token_latency():
    held = read_result(FIXTURES / "guidellm.good.json")
    assert "itl_s" not in held.latencies
    assert held.latencies["tpot_s"]["mean"] == pytest.approx(0.012, rel=0.01)
    assert (held.requests_per_s, held.output_tokens_per_s) == (2.4, 140.0)


def test_a_sample_of_guidellm_is_judged_by_its_metrics(tmp_path):
    report_ = json.loads((FIXTURES / "guidellm.good.json").read_text())
    one = report_["benchmarks"][0]
    one["requests"]["successful"] = one["requests"]["successful"][:2]
    path = tmp_path / "g.json"
    path.write_text(json.dumps(report_))
    sample, every = read_result(path), read_result(FIXTURES / "guidellm.good.json")
    for row in differences(every, sample)[0]:
        assert row.error == pytest.approx(0, abs=1e-9)
    assert sample.notes


def test_what_a_run_does_not_say_is_said_to_be_missing():
    rows, missing = differences(
        read_result(FIXTURES / "vllm_bench.good.json"), read_result(FIXTURES / "vllm_bench.aggregates.json")
    )
    figures = {(row.metric, row.statistic) for row in rows}
    assert figures == {
        ("ttft_s", "mean"), ("ttft_s", "p50"), ("ttft_s", "p99"), ("tpot_s", "mean"), ("tpot_s", "p99"),
        ("requests_per_s", "total"), ("output_tokens_per_s", "total"),
    }  # fmt: skip
    assert "vllm_bench.aggregates.json has no itl_s: mean, p50, p90, p95, p99" in missing
    assert "vllm_bench.aggregates.json has no ttft_s: p90, p95" in missing


def test_traces_are_no_results():
    assert not holds_result(FIXTURES / "mooncake.good.jsonl")
    assert not holds_result(FIXTURES / "nowhere.json")
    with pytest.raises(ValueError, match="holds requests, of Mooncake traces"):
        read_result(FIXTURES / "mooncake.good.jsonl")
    assert statistics([]) == {}


# The commands


def test_simulate_writes_by_the_name_of_the_file(capsys, tmp_path):
    files = [tmp_path / name for name in ("run.json", "run.jsonl")]
    for file in files:
        rest = ["--workload", "sliding-window-chat", "--rate", "2", "--requests", "24", "-o", str(file)]
        assert main(["simulate", *MODEL, *rest]) == 0
    assert set(DETAILED) <= set(json.loads(files[0].read_text()))
    lines = [json.loads(line) for line in files[1].read_text().splitlines()]
    held = json.loads(files[0].read_text())
    assert [line["input_length"] for line in lines] == held["input_lens"]
    assert any(lines[0]["hash_ids"][:1] == line["hash_ids"][:1] for line in lines[1:])  # turns share their beginning
    assert "24 requests in" in capsys.readouterr().err


def test_simulate_says_what_a_trace_left_out(capsys):
    trace = FIXTURES / "burstgpt.good.csv"
    assert main(["simulate", *MODEL, "--workload", str(trace), "--json"]) == 0
    assert "burstgpt: 2 requests without response tokens, which failed: left out" in capsys.readouterr().err


def test_compare_puts_a_result_beside_a_run(capsys, tmp_path):
    run, measured = tmp_path / "run.json", FIXTURES / "vllm_bench.good.json"
    assert main(["simulate", *MODEL, "--workload", str(measured), "-o", str(run)]) == 0
    capsys.readouterr()
    assert main(["compare", str(measured), "--simulated", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {(row["metric"], row["statistic"]): row for row in found["differences"]}
    assert len(rows) == 22
    mean = rows["ttft_s", "mean"]
    assert mean["error"] == pytest.approx(mean["simulated"] / mean["measured"] - 1)
    assert main(["compare", str(measured), *MODEL, "--json"]) == 0
    replayed = json.loads(capsys.readouterr().out)["differences"]
    for row in replayed:  # the same run, without the file between
        assert row["simulated"] == pytest.approx(rows[row["metric"], row["statistic"]]["simulated"])
    assert main(["compare", str(measured), "--simulated", str(run), "--csv"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "metric,statistic,measured,simulated,error"
    assert main(["compare", f"{FIXTURES / 'guidellm.good.json'}:benchmark=0", "--simulated", str(run)]) == 0
    assert "guidellm.good.json has no itl_s" in capsys.readouterr().out


def test_compare_replays_a_result_under_a_plan(capsys, tmp_path):
    plan = tmp_path / "plan.toml"
    assert main(["simulate", *MODEL, "--dump-plan"]) == 0
    plan.write_text(capsys.readouterr().out)
    assert main(["compare", str(FIXTURES / "aiperf.good.jsonl"), "--simulated", str(plan), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["simulated"]["completed"] == 23


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["vllm_bench.good.json"], "needs --simulated run.json or PLAN.toml"),
        (["vllm_bench.good.json", "--simulated", "nowhere.json"], "no trace 'nowhere.json'"),
        (["vllm_bench.bad.json", *MODEL], "input_lens[3]=-4"),
        (["vllm_bench.aggregates.json", *MODEL], "input_lens is missing, the file has aggregates alone"),
        (["mooncake.good.jsonl", "--simulated", "run.json"], "--simulated stands beside one result"),
        (["vllm_bench.good.json", *MODEL, "-o", "x.svg"], "no --output"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(capsys, arguments, words):
    assert main(["compare", str(FIXTURES / arguments[0]), *arguments[1:]]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
