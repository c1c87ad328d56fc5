"""Inverse questions: the answer meets its target, the next value does not."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel import Image, Workload, build_query, evaluate, load_engine, load_hardware, load_model, predict
from costmodel.solve import (
    AT_LEAST,
    AT_MOST,
    CLOSE,
    Span,
    break_even,
    check_target,
    met,
    solve,
    with_bandwidth,
    with_keep,
    with_price,
)
from studies import cli, parse
from tests.test_compose import KNOWN, Bits, Scored, Thin

MODEL, DEVICE = "qwen2.5-vl-7b", "a100-sxm4-80gb"
WORKLOAD = Workload(images=[Image(1920, 1080)], text_tokens=64, output_tokens=65)


def query_of(**settings_):
    return build_query(load_model(MODEL), WORKLOAD, load_engine("fused"), **settings_)


def law(n_examples):
    return settings(max_examples=n_examples, deadline=None, derandomize=True, database=None)


def batched(batch):
    return predict(MODEL, DEVICE, WORKLOAD, batch=batch)


@law(15)
@given(st.floats(0.4, 60.0), st.booleans())
def test_the_largest_batch_that_meets_a_target_meets_it_and_the_next_does_not(limit, screened):
    target = {"ttft_s": limit}
    found = solve(batched, Span(1, 200, whole=True), target, many=batched if screened else None)
    if found.value is None:
        assert batched(1.0).ttft_s > limit
        return
    assert found.value == int(found.value)
    assert found.prediction.ttft_s == batched(found.value).ttft_s <= limit
    assert found.at_end == (found.value == 200)
    if not found.at_end:
        assert batched(found.value + 1).ttft_s > limit


def test_a_sweep_saves_predictions():
    target, span = {"tpot_s": 0.02}, Span(1, 100_000, whole=True)
    plain, screened = solve(batched, span, target), solve(batched, span, target, many=batched)
    assert plain.value == screened.value
    assert screened.tried < plain.tried


@law(10)
@given(st.floats(0.32, 0.6))
def test_a_share_is_found_to_a_millionth(limit):
    query, hardware = query_of(), load_hardware(DEVICE)

    def make(keep):
        return evaluate(with_keep(query, keep), hardware)

    found = solve(make, Span(1e-3, 1.0), {"ttft_s": limit}, many=make)
    if found.value is None or found.at_end:
        ends = make(1e-3).ttft_s, make(1.0).ttft_s
        assert limit < min(ends) or limit >= max(ends)
        return
    assert found.prediction.ttft_s <= limit < make(found.value * (1 + 3 * CLOSE)).ttft_s


def test_the_least_bandwidth_meets_and_less_does_not():
    query, device = query_of(), load_hardware(DEVICE)

    def make(bytes_per_s):
        return evaluate(query, with_bandwidth(device, bytes_per_s))

    found = solve(make, Span(1e11, 1e14, prefers="least"), {"tpot_s": 0.008})
    assert found.prediction.tpot_s <= 0.008 < make(found.value * (1 - 3 * CLOSE)).tpot_s


def test_a_price_is_what_the_time_is_worth():
    query, device = query_of(), load_hardware(DEVICE)
    found = solve(lambda price: evaluate(query, with_price(device, price)), Span(1e-8, 1.0), {"cost_usd": 1e-3})
    assert found.value == pytest.approx(1e-3 / evaluate(query, device).total_s, rel=2 * CLOSE)


def test_choices_are_taken_as_they_are():
    def make(bits):
        return evaluate(Bits(bits).apply(query_of(batch=30.0)), load_hardware(DEVICE))

    eight = make(8.0).memory.peak_bytes
    span = Span(1, 16, choices=(2.0, 4.0, 8.0, 16.0))
    assert solve(make, span, {"peak_bytes": eight}).value == 8.0
    assert solve(make, span, {"peak_bytes": eight - 1}).value == 4.0
    assert solve(make, span, {"peak_bytes": 1.0}).value is None


def test_several_targets_hold_together():
    target = {"ttft_s": 12.0, "tpot_s": 0.02, "throughput_tokens_per_s": 30.0}
    found = solve(batched, Span(1, 500, whole=True), target)
    assert met(found.prediction, target)
    assert not met(batched(found.value + 1), target)


def test_a_target_that_is_met_at_the_preferred_end_ends_there():
    found = solve(batched, Span(1, 8, whole=True), {"ttft_s": 1000.0})
    assert (found.value, found.at_end, found.tried) == (8, True, 1)


@pytest.mark.parametrize(
    ("target", "message"),
    [({}, "no target"), ({"ttft_s": -1.0}, "above 0"), ({"tpot_s": float("inf")}, "above 0")],
)
def test_targets_that_nobody_can_meet_are_refused(target, message):
    with pytest.raises(ValueError, match=message):
        check_target(target)


def test_unknown_targets_name_the_known_ones():
    with pytest.raises(LookupError, match="did you mean 'ttft_s'"):
        check_target({"tfft_s": 1.0})
    for name in (*AT_MOST, *AT_LEAST):
        check_target({name: 1.0})


# Break-even


def tokens_of(*techniques, text=64):
    def make(tokens):
        workload = Workload(visual_tokens=tokens, text_tokens=text, output_tokens=17)
        query = build_query(load_model(MODEL), workload, load_engine("fused"))
        for technique in techniques:
            query = technique.apply(query)
        return query

    return make


def test_a_technique_pays_from_where_its_savings_exceed_its_own_cost():
    hardware = load_hardware(DEVICE)
    using, without = tokens_of(Thin(0.5), Scored()), tokens_of()
    found = break_even(without, using, hardware, metric="ttft_s", most=1e5)
    assert 1 < found.tokens < 1e5
    for tokens, pays in ((found.tokens - 1, False), (found.tokens, True), (found.tokens + 500, True), (9e4, True)):
        one, other = (evaluate(make(float(tokens)), hardware).ttft_s for make in (using, without))
        assert (one < other) == pays
    assert found.ratio < 1
    assert found.gains_at_end < found.ratio


def test_what_costs_nothing_pays_from_the_first_token_and_what_saves_nothing_never():
    hardware = load_hardware(DEVICE)
    free = break_even(tokens_of(), tokens_of(Thin(0.5)), hardware, metric="total_s", most=1e4)
    assert free.tokens == 1
    never = break_even(tokens_of(), tokens_of(Scored()), hardware, metric="total_s", most=1e4)
    assert never.tokens is None
    assert never.ratio > 1
    with pytest.raises(LookupError, match="metric of a break-even"):
        break_even(tokens_of(), tokens_of(), hardware, metric="energy_j", most=1e4)


# The command

ASKED = ["solve", MODEL, DEVICE, "--image", "1920x1080"]


@pytest.fixture
def lvlm(capsys, monkeypatch):
    known = {**KNOWN, "scored": Scored}
    monkeypatch.setattr(parse, "technique", lambda name, **fields: known[name](**fields))

    def run(*arguments):
        code = cli.main(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


ANSWERED = {
    "keep": ["ttft_s=0.45"],
    "kv-bits": ["peak_bytes=18.2e9"],
    "images": ["ttft_s=2"],
    "batch": ["tpot_s=0.02"],
    "bandwidth": ["tpot_s=0.01", "total_s=3"],
    "price": ["cost_usd=0.0005"],
}


@pytest.mark.parametrize("vary", ANSWERED)
def test_solve_answers(lvlm, vary):
    targets = [word for limit in ANSWERED[vary] for word in ("--target", limit)]
    code, out, err = lvlm(*ASKED, "--vary", vary, *targets, "--json")
    assert (code, err) == (0, "")
    values = json.loads(out)
    low, high = values["span"]
    assert low <= values["value"] <= high
    assert values["inputs"]["vary"] == vary
    for limit in ANSWERED[vary]:
        name, _, most = limit.partition("=")
        assert values["prediction"][name] <= float(most)
    code, text, _ = lvlm(*ASKED, "--vary", vary, *targets)
    assert code == 0
    assert f"{vary} = " in text
    assert max(map(len, text.splitlines())) <= 100
    assert lvlm(*ASKED, "--vary", vary, *targets, "--csv")[1].count("\n") == 2


def test_solve_varies_frames(lvlm):
    asked = ["solve", MODEL, DEVICE, "--video", "640x480:10s@24fps", "--vary", "frames", "--target", "ttft_s=0.5"]
    values = json.loads(lvlm(*asked, "--json")[1])
    assert 1 <= values["value"] <= 240
    assert values["prediction"]["ttft_s"] <= 0.5


def test_solve_varies_what_the_last_technique_keeps(lvlm):
    techniques = ["--technique", "bits", "--technique", "thin:keep=1"]
    with_it = json.loads(lvlm(*ASKED, "--vary", "keep", "--target", "ttft_s=0.45", *techniques, "--json")[1])
    without = json.loads(lvlm(*ASKED, "--vary", "keep", "--target", "ttft_s=0.45", "--json")[1])
    assert with_it["value"] == pytest.approx(without["value"], rel=1e-5)


def test_solve_says_when_nothing_will_do(lvlm):
    code, out, err = lvlm(*ASKED, "--vary", "batch", "--target", "ttft_s=1e-5")
    assert code == 3
    assert "Nothing meets" in out
    assert "no batch from 1 to" in err
    code, _, err = lvlm("solve", "qwen2.5-vl-72b", DEVICE, "--vary", "batch", "--target", "ttft_s=5")
    assert code == 3
    assert "usable" in err


REFUSED = [
    (["--vary", "rate"], "nothing is promised; give --target ttft_s"),
    (["--vary", "rate", "--target", "ttft_s=1", "--rate", "3"], "--rate and --times go with --vary gpus"),
    (["--vary", "rate", "--target", "energy_j=1"], "unknown target of a load 'energy_j'"),
    (["--vary", "rate", "--target", "ttft_s=1", "--batch", "4"], "--batch is formed by the simulator"),
    (["--vary", "rate", "--target", "ttft_s=1", "--arrivals", "burst"], "has no rate that could vary"),
    (["--vary", "batch", "--target", "ttft_s=1", "--gpus", "2"], "need requests that queue"),
    (["--vary", "colour", "--target", "ttft_s=1"], "unknown --vary 'colour'"),
    (["--vary", "batch"], "there is no target"),
    (["--vary", "batch", "--target", "ttft"], "must read NAME=NUMBER"),
    (["--vary", "batch", "--target", "tfft_s=1"], "did you mean 'ttft_s'"),
    (["--vary", "frames", "--target", "ttft_s=1"], "add --video"),
    (["--vary", "price", "--target", "ttft_s=1"], "moves cost_usd alone"),
    (["--target", "ttft_s=1"], "give --vary"),
    (["--break-even", "thin", "--vary", "keep"], "one of --vary and --break-even"),
    (["--break-even", "thin"], "leave --image and --video out"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_solve_refuses_in_one_line(lvlm, options, message):
    code, out, err = lvlm(*ASKED, *options)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_break_even_by_command(lvlm):
    asked = ["solve", MODEL, DEVICE, "--break-even", "thin:keep=0.5", "--technique", "scored", "--metric", "ttft_s"]
    code, out, _ = lvlm(*asked, "--json")
    values = json.loads(out)
    assert (code, values["tokens"], values["varied"]) == (0, 1.0, "visual_tokens")
    code, out, err = lvlm("solve", MODEL, DEVICE, "--break-even", "scored")
    assert code == 3
    assert "never lowers total_s" in out
    assert "never lowers total_s" in err
    code, out, _ = lvlm("solve", "llama-3.1-8b", DEVICE, "--break-even", "bits", "--json")
    assert (code, json.loads(out)["varied"]) == (0, "text_tokens")


def test_predictions_are_single_ones():
    assert np.isscalar(solve(batched, Span(1, 4, whole=True), {"ttft_s": 1.0}).prediction.ttft_s)
