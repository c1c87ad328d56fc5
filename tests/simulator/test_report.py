"""The report: its figures against the columns that they come from, files, goodputs, the command."""

import csv
import gzip
import json
from dataclasses import replace

import numpy as np
import pytest

from costmodel.query import causal_pairs
from costmodel.recurrent import RecurrentSpec
from costmodel.step import Chunk
from simulator import Pool, ServingPlan, Slo, check, report, simulate, traffic
from simulator.goodput import attained_rate, max_rate, serves_90, serves_p99
from simulator.report import Spread, confidence
from simulator.request import requests_of
from simulator.rows import write_rows
from simulator.service import LinearService
from simulator.serving_plan import Policies
from simulator.step_service import StepService
from simulator.steplog import MOST_GAPS, StepLog
from simulator.timeline import write_timeline
from studies.cli import main

SERVICE = LinearService(step_base_s=5e-3, token_s=1e-5, sequence_s=1e-5)
PLAN = ServingPlan(model="qwen2.5-vl-7b", pools=(Pool(hardware="h100-sxm5-80gb"),))
SLO = Slo(ttft_s=0.02, tpot_s=0.0085)
COMMAND = ["simulate", "--model", "qwen2.5-vl-7b", "--hardware", "h100-sxm5-80gb"]
SMALL = [*COMMAND, "--workload", "text-500-200", "--rate", "5", "--requests", "60"]


def run(rate=20.0, n=400, seed=0):
    return simulate(PLAN, traffic.preset("text-500-200", rate, n, seed), service=SERVICE)


@pytest.fixture(scope="module")
def trace():
    return run()


def test_latencies_are_those_of_the_columns(trace):
    found = report(trace)
    assert found.ttft_s.mean == pytest.approx(trace.ttft_s.mean())
    assert found.e2e_s.p50 == pytest.approx(np.percentile(trace.e2e_s, 50), rel=0.01)
    gaps = np.maximum(trace.output_tokens - 1, 0)
    spent = (trace.columns["finish_s"] - trace.columns["first_token_s"]).sum()
    assert found.itl_s.mean == pytest.approx(spent / gaps.sum(), rel=1e-9)


def test_tpot_divides_by_gaps_and_leaves_out_answers_of_one_token(trace):
    one = trace.output_tokens == 1
    assert np.isnan(trace.tpot_s[one]).all()
    assert not np.isnan(trace.tpot_s[~one]).any()


def test_attainment_is_over_arrived_requests_and_goodput_is_its_rate(trace):
    found = report(trace, SLO)
    both = (trace.ttft_s <= SLO.ttft_s) & (np.nan_to_num(trace.tpot_s) <= SLO.tpot_s)
    assert found.slo_attainment["joint"] == pytest.approx(both.mean())
    assert 0 < both.mean() < 1
    assert found.goodput_requests_per_s == pytest.approx(both.sum() / trace.span_s)
    assert found.slo_attainment["e2e"] is None
    assert found.cost_per_good_request_usd == pytest.approx(found.cost_per_request_usd * len(trace) / both.sum())


def test_stages_fill_the_time_of_the_worker(trace):
    shares = report(trace).utilisation["all"]
    assert sum(shares[stage] for stage in ("encode", "prefill", "decode", "idle")) == pytest.approx(1.0)
    computed = trace.prompt_tokens.sum() * SERVICE.token_s
    assert shares["prefill"] * trace.span_s == pytest.approx(computed, rel=0.4)


def test_a_weighted_spread_is_that_of_the_repeated_values():
    values, weights = np.array([3.0, 1.0, 2.0]), np.array([1.0, 5.0, 4.0])
    assert Spread.of(values, weights) == Spread.of(np.repeat(values, weights.astype(int)))


def test_gaps_are_binned_within_their_promise_when_they_are_many():
    log, rng = StepLog(), np.random.default_rng(0)
    values = rng.lognormal(-4, 1, MOST_GAPS + 10)
    log.gaps(np.cumsum(np.concatenate([[0.0], values])), 3)
    found, counts = log.distribution()
    assert counts.sum() == 3 * len(values)
    for share in (0.5, 0.99):
        exact = np.quantile(values, share)
        assert found[np.searchsorted(np.cumsum(counts), share * counts.sum())] == pytest.approx(exact, rel=3e-4)


def test_confidence_narrows_with_more_seeds():
    reports = [report(run(n=150, seed=seed), SLO) for seed in range(6)]
    few, many = confidence(reports[:3])["ttft_s.mean"], confidence(reports)["ttft_s.mean"]
    assert few["low"] < few["mean"] < few["high"]
    assert many["high"] - many["low"] < few["high"] - few["low"]


def test_the_three_goodputs_are_told_apart():
    slo = Slo(ttft_s=0.05, tpot_s=0.0095)

    def at(rate):
        return report(run(rate=rate, n=300), slo)

    by_share = max_rate(at, slo, serves=serves_90, low=1.0, high=200.0, tolerance=0.05)
    by_p99 = max_rate(at, slo, serves=serves_p99, low=1.0, high=200.0, tolerance=0.05)
    assert 1.0 < by_p99 < by_share < 200.0
    assert serves_90(at(by_share), slo)
    assert attained_rate(at(by_share)) == at(by_share).goodput_requests_per_s


@pytest.mark.parametrize(
    ("pool", "preset", "rate", "words"),
    [
        ({}, "text-500-200", 0.5, "nothing is saturated"),
        ({}, "image-1080p-1", 20.0, "CPU preprocessing is busy"),
        ({"max_batch": 4}, "text-500-200", 20.0, "because 4 sequences run"),
    ],
)
def test_the_bottleneck_is_named(pool, preset, rate, words):
    plan = ServingPlan(model="qwen2.5-vl-7b", pools=(Pool(hardware="h100-sxm5-80gb", **pool),))
    trace = simulate(plan, traffic.preset(preset, rate, 200, 0))
    check(trace)
    assert words in report(trace).bottleneck


# The cost model as a service


@pytest.mark.parametrize("model", ["qwen2.5-vl-7b", "gemma-3-12b", "qwen3-vl-30b-a3b", "qwen3.5-4b"])
@pytest.mark.parametrize("engine", ["vllm", "ideal"])
def test_a_step_of_the_service_is_that_of_the_step_model_and_leaps_are_steps(model, engine):
    plan = ServingPlan(model=model, pools=(Pool(hardware="h100-sxm5-80gb", engine=engine),))
    service = StepService.of(plan)
    keys = tuple(rule.fixed * 30 + rule.share * 30 * min(900, rule.cap) for rule in service.rules)
    growth = tuple(30 * rule.share * (rule.cap > 1000) for rule in service.rules)
    leap = service.decode_steps_s(30, keys, growth, 40)
    at = [service.step_s((), 0, 30, tuple(k + i * g for k, g in zip(keys, growth, strict=True))) for i in range(40)]
    assert leap.tolist() == at
    alone = service.step_s([(0, 500, None)], 1, 0, (0.0,) * len(keys))
    with_others = service.step_s([(0, 500, None)], 1, 30, keys)
    again = service.step_s([(0, 500, None)], 1, 30, keys)
    assert with_others == again > max(alone, at[0])
    assert with_others == pytest.approx(_asked_directly(service, keys), rel=1e-12)
    requests = traffic.preset("visionarena", 3.0, 20, 0)
    leapt, stepped = (simulate(plan, requests, service=service, leaps=leaps) for leaps in (True, False))
    check(leapt)
    assert leapt.columns["finish_s"].tobytes() == stepped.columns["finish_s"].tobytes()


def _asked_directly(service, keys):
    """Return the step with a prompt of 500 tokens and 30 decoding sequences from the step model itself."""
    model, chunks = service.model, []
    for segment in model.structure.decoder:
        mixer = segment.layer.mixer
        if isinstance(mixer, RecurrentSpec):
            chunks.append(Chunk(500.0, 500.0, 1.0))
        else:
            chunks.append(Chunk(500.0, float(causal_pairs(500.0, window=mixer.window)), 500.0))
    return model.step_s(chunks, 1, 30, keys) - model.request_host_s


def test_an_unloaded_request_takes_what_the_prediction_says():
    from costmodel import Image, Workload, predict

    requests = traffic.preset("image-1080p-1", 0.01, 1, 0)
    trace = simulate(PLAN, requests)
    p = predict(
        "qwen2.5-vl-7b",
        "h100-sxm5-80gb",
        Workload([Image(1920, 1080)], text_tokens=64, output_tokens=150),
        engine="vllm",
    )
    assert trace.ttft_s[0] == pytest.approx(float(p.ttft_s), rel=0.02)
    assert trace.tpot_s[0] == pytest.approx(float(p.tpot_s), rel=0.02)


def test_a_model_that_does_not_fit_says_so():
    from costmodel import DoesNotFit

    with pytest.raises(DoesNotFit):
        StepService.of(ServingPlan(model="qwen2.5-vl-72b", pools=(Pool(hardware="a10-24gb"),)))


# Files and the command


def test_rows_are_the_requests(trace, tmp_path):
    write_rows(trace, tmp_path / "r.csv")
    with (tmp_path / "r.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(trace)
    assert [float(row["ttft_s"]) for row in rows] == trace.ttft_s.tolist()
    again = traffic.read(tmp_path / "r.csv")
    assert again.text_tokens.tolist() == trace.requests.text_tokens.tolist()


def test_parquet_holds_the_same(trace, tmp_path):
    polars = pytest.importorskip("polars")
    write_rows(trace, tmp_path / "r.parquet")
    held = polars.read_parquet(tmp_path / "r.parquet")
    assert held["finish_s"].to_list() == trace.columns["finish_s"].tolist()


def test_a_timeline_holds_every_step_and_every_phase(trace, tmp_path):
    write_timeline(trace, tmp_path / "t.json.gz")
    with gzip.open(tmp_path / "t.json.gz") as file:
        events = json.load(file)["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert len(slices) == len(trace.steps[0]["start_s"])
    assert sum(event["ph"] == "b" for event in events) == sum(event["ph"] == "e" for event in events) > len(trace)


def printed(capsys, *arguments):
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_the_command_prints_the_keys_of_the_interface(capsys):
    found = json.loads(printed(capsys, *SMALL, "--slo-ttft", "1", "--seeds", "2", "--compare", "sglang", "--json"))
    for key in (
        "requests", "ttft_s", "tpot_s", "itl_s", "e2e_s", "throughput_requests_per_s", "throughput_tokens_per_s",
        "slo_attainment", "goodput_requests_per_s", "cost_per_request_usd", "energy_per_token_j", "utilisation",
        "bottleneck", "confidence", "wall_s", "cpu_s", "events",
    ):  # fmt: skip
        assert key in found
    assert found["requests"]["finished"] == 60
    assert set(found["requests"]) == {"arrived", "finished", "rejected", "cancelled", "failed", "running", "queued"}
    assert set(found["slo_attainment"]) == {"ttft", "tpot", "joint", "e2e"}
    assert set(found["ttft_s"]) == {"mean", "p50", "p90", "p95", "p99"}
    assert found["compare"]["sglang"]["requests"]["finished"] == 60
    assert found["schema_version"] == 1


def test_a_dumped_plan_runs_as_the_options_do(capsys, tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(printed(capsys, *COMMAND, "--system", "sarathi", "--set", "pool.max_batch=32", "--dump-plan"))
    rest = SMALL[len(COMMAND) :]
    typed = json.loads(printed(capsys, *COMMAND, "--system", "sarathi", "--set", "pool.max_batch=32", *rest, "--json"))
    read = json.loads(printed(capsys, "simulate", str(path), *rest, "--json"))
    assert read["ttft_s"] == typed["ttft_s"]


def test_the_command_writes_its_files(capsys, tmp_path):
    files = [tmp_path / name for name in ("r.csv", "t.json.gz", "p.svg")]
    text = printed(capsys, *SMALL, "-o", str(files[0]), "--timeline", str(files[1]), "--plot", str(files[2]))
    assert all(file.stat().st_size > 500 for file in files)
    assert "TTFT" in text
    assert "Bottleneck: " in text


def test_workloads_are_listed(capsys):
    assert "image-1080p-1" in printed(capsys, "workloads")
    found = json.loads(printed(capsys, "workloads", "--json"))
    assert [row["workload"] for row in found["workloads"]] == traffic.preset_names()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*COMMAND, "--workload", "nope", "--rate", "1"], "unknown workload 'nope'"),
        ([*COMMAND, "--workload", "text-500-200"], "give a rate"),
        ([*COMMAND, "--workload", "text-500-200", "--rate", "-1"], "greater than 0"),
        ([*COMMAND, "--rate", "1"], "needs --workload"),
        (["simulate", "--workload", "text-500-200", "--rate", "1"], "needs PLAN.toml, or --model and --hardware"),
        ([*SMALL, "--set", "pool.max_batch=0"], "max_batch='0'"),
        ([*SMALL, "--set", "max_batch=8"], "must read pool.KEY=VALUE"),
        ([*SMALL, "--set", "pool.maxbatch=8"], "maxbatch"),
        ([*SMALL, "--set", "policies.batch=vlm"], "did you mean 'vllm'"),
        ([*SMALL, "--system", "vlm"], "did you mean 'vllm'"),
        ([*SMALL, "--gpus", "3", "--tp", "2"], "must be a multiple"),
        ([*SMALL, "--concurrency", "3"], "exclude each other"),
        (["simulate", "missing.toml"], "no plan 'missing.toml'"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(capsys, arguments, words):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_each_priority_has_figures_of_its_own_and_one_alone_has_none():
    """Ten requests come at once to a worker that runs one at a time: the urgent five are served first."""
    urgent = np.arange(10) % 2
    requests = replace(requests_of(np.zeros(10), np.full(10, 10), np.full(10, 2)), priority=urgent)
    plan = ServingPlan(model="any", pools=(Pool(hardware="any", max_batch=1),), policies=Policies(order="priority"))
    times = LinearService(step_base_s=0.1)
    found = report(simulate(plan, requests, service=times), Slo(ttft_s=1.0)).classes
    assert list(found) == ["0", "1"]
    assert [one["finished"] for one in found.values()] == [5, 5]
    assert found["0"]["ttft_s"].p99 < found["1"]["ttft_s"].p50
    assert found["0"]["slo_attainment"]["ttft"] == 1.0 > found["1"]["slo_attainment"]["ttft"]
    assert report(simulate(plan, replace(requests, priority=np.zeros(10, dtype=int)), service=times)).classes == {}
