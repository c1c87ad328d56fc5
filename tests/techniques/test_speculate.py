"""Speculative decoding: what a round costs, what it gives, and the published accepted lengths."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel import (
    Image,
    Parallelism,
    Unsupported,
    Workload,
    build_query,
    compose,
    evaluate,
    load_engine,
    load_hardware,
    load_model,
    predict,
)
from costmodel.blocks import Work
from costmodel.evaluate import Evaluator, kernels_of
from costmodel.memory import weights_bytes
from costmodel.priced import operator_s
from costmodel.speculation import acceptance_of, accepted_tokens
from costmodel.stages import Structure, Sums, operators
from costmodel.sums import decode_points
from costmodel.techniques.relaxed_verify import RelaxedVerify
from costmodel.techniques.speculate import Speculate
from tests.helpers import POINT
from tests.kinds import KINDS

H100, H200 = "h100-sxm5-80gb", "h200-sxm-141gb"
TARGET, SMALL = "qwen2.5-vl-32b", "qwen2.5-vl-3b"
WORKLOAD = Workload(images=[Image(1000, 800)], text_tokens=64, output_tokens=129)
LAUNCHED = 0.5e-3


def law(n_examples):
    return settings(max_examples=n_examples, deadline=None, derandomize=True, database=None)


def query_of(name=TARGET, workload=WORKLOAD, *, engine="fused", batch=1.0, **settings_):
    profile = load_engine(engine) if isinstance(engine, str) else engine
    return build_query(load_model(name), workload, profile, batch=batch, **settings_)


def close(value, other, rel=1e-9):
    return value == pytest.approx(other, rel=rel, abs=0.0)


# What a round gives


def test_accepted_tokens_are_those_of_a_chain_that_is_drawn():
    rng = np.random.default_rng(1)
    for acceptance, levels in [(0.3, 4), (0.8, 10), (0.95, 6)]:
        hits = rng.random((200_000, levels)) < acceptance
        drawn = np.cumprod(hits, axis=1).sum(axis=1).mean()
        assert accepted_tokens(acceptance, levels) == pytest.approx(drawn, rel=0.01)


def test_accepted_tokens_at_the_ends():
    assert accepted_tokens(0.0, 10) == 0.0
    assert accepted_tokens(1.0, 7) == 7.0
    assert np.allclose(accepted_tokens(np.array([0.0, 0.5, 1.0]), 2), [0.0, 0.75, 2.0])


@law(100)
@given(st.floats(0.01, 0.999), st.integers(1, 40))
def test_acceptance_is_the_inverse_of_accepted_tokens(acceptance, levels):
    assert acceptance_of(accepted_tokens(acceptance, levels), levels) == pytest.approx(acceptance, abs=1e-9)


TABLE_10 = {
    # arXiv:2604.05546, Table 10: mean accepted drafts of 10 at strict, 50 % and 75 % relaxed verification
    "32b/7b": (3.40, 5.55, 7.42),
    "32b/3b": (2.99, 5.30, 7.33),
    "7b/7b": (5.31, 7.20, 8.45),
}


@pytest.mark.parametrize("pair", TABLE_10)
def test_relaxed_verification_gives_the_published_accepted_lengths(pair):
    strict, *relaxed = TABLE_10[pair]
    draft = Speculate(draft=SMALL, tokens=10, acceptance=acceptance_of(strict, 10))
    measured = Speculate(draft=SMALL, tokens=10, accepted=strict)
    for probability, published in zip((0.5, 0.75), relaxed, strict=True):
        for first in (draft, measured):
            query = compose(query_of(), [first, RelaxedVerify(probability=probability)])
            assert query.draft.accepted_tokens == pytest.approx(published, rel=0.03)


# What a round costs


def direct_s(query, evaluator, reads):
    """Return a decode step with these keys in every cache, from its list of operators."""
    rows = query.batch * query.step_rows
    works = tuple(Work(1.0, rows, rows * keys, query.batch * keys) for keys in reads)
    sums = Sums(1.0, rows, rows, 1.0, 0.0, works)
    assert operators(query, "decode", sums)
    return float(evaluator.priced("decode").total_s(np.array([sums.flat()], dtype=float).T)[0])


def test_a_round_is_the_passes_of_the_draft_and_one_step_of_the_target():
    query, hardware = query_of(), load_hardware(H100)
    spoken = Speculate(draft=SMALL, tokens=6, acceptance=0.7).apply(query)
    p = evaluate(spoken, hardware)
    drafting = p.evaluator.drafting
    prompt, steps = float(query.prompt_tokens), 128.0
    seen = prompt + (steps + 1) / 2
    target_s = direct_s(spoken, p.evaluator, [seen + 6])
    draft_s = direct_s(drafting.query, drafting, [seen])
    assert close(p.tpot_s, (target_s + 6 * draft_s) / (1 + accepted_tokens(0.7, 6)))


@pytest.mark.parametrize("name", KINDS)
def test_direct_and_compiled_paths_agree_on_steps_of_several_rows(name):
    query = replace(query_of(name, batch=3.0), step_rows=11.0)
    hardware, turn = load_hardware(H100), query.turns[0]
    evaluator, points = Evaluator.of(query, hardware), decode_points(query, Structure.of(query), turn, detailed=False)
    scalars, rest = points.sums[:5, 0].tolist(), points.sums[5:, 0].tolist()
    works = tuple(Work(scalars[0], *rest[i : i + 4]) for i in range(0, len(rest), 4))
    listed = operators(query, "decode", Sums(*scalars, works))
    direct = sum(operator_s(operator, kernels_of(query, hardware)) for operator in listed)
    assert close(float(np.squeeze(evaluator.own_s("decode", turn))), direct, rel=1e-12)


def test_several_rows_are_verified_with_one_reading_of_weights_and_cache():
    query = query_of("llava-1.5-7b", batch=3.0)
    rows = replace(query, step_rows=8.0)
    one, many = (_step_work(q) for q in (query, rows))
    weights, cache = many.weight_bytes / one.weight_bytes, many.kv_bytes / one.kv_bytes
    assert close(weights, 1.0)
    assert 1.0 < cache < 1.02  # the new rows themselves are read and written
    assert many.flops / one.flops == pytest.approx(8.0, rel=0.01)


def _step_work(query):
    stage = evaluate(query, load_hardware(H100)).stages["decode"]
    assert stage.flops > 0
    return stage


def test_the_gain_erodes_with_the_batch():
    gains = []
    for batch in (1.0, 16.0, 128.0):
        workload = Workload(text_tokens=200, output_tokens=64)
        plain = predict("llama-3.1-70b", H200, workload, batch=batch, parallelism=Parallelism(tp=4))
        spoken = predict(
            "llama-3.1-70b",
            H200,
            workload,
            batch=batch,
            techniques=[Speculate(draft="llama-3.1-8b", tokens=4)],
            parallelism=Parallelism(tp=4),
        )
        gains.append(plain.tpot_s / spoken.tpot_s)
    assert gains[0] > gains[1] > gains[2]
    assert gains[0] > 1.5


def test_drafts_that_wait_for_their_launches_cost_by_layers_not_by_parameters():
    eager = load_engine("fused").model_copy(update={"layer_host_s": {"decode": LAUNCHED}})
    seven, three = (
        Evaluator.of(Speculate(draft=name, tokens=10).apply(query_of(engine=eager)), load_hardware(H200))
        for name in ("qwen2.5-vl-7b", SMALL)
    )
    times = [e.draft_s("decode", e.query.turns[0]) for e in (seven, three)]
    layers = [e.drafting.query.model.decoder.n_layers for e in (seven, three)]
    assert times == pytest.approx([10 * LAUNCHED * n / load_hardware(H200).host_speed for n in layers], rel=1e-9)
    assert times[1] > times[0]  # 36 layers against 28, with less than half of the weights


def test_the_host_is_waited_for_once_a_round():
    waits = load_engine("fused").model_copy(update={"step_host_s": 0.01})
    spoken, free = (
        evaluate(Speculate(draft=SMALL, tokens=5, accepted=3.0).apply(query_of(engine=e)), load_hardware(H100))
        for e in (waits, load_engine("fused"))
    )
    assert spoken.tpot_s - free.tpot_s == pytest.approx(0.01 / 4 / load_hardware(H100).host_speed, rel=1e-9)


def test_a_draft_prefills_what_it_sees():
    query, hardware = query_of(), load_hardware(H100)
    plain = evaluate(query, hardware)
    whole, tenth, blind = (
        evaluate(Speculate(draft=SMALL, draft_visual_keep=keep).apply(query), hardware) for keep in (1.0, 0.1, 0.0)
    )
    assert plain.ttft_s < blind.ttft_s < tenth.ttft_s < whole.ttft_s
    alone = predict(SMALL, H100, WORKLOAD)
    assert close(whole.ttft_s - plain.ttft_s, alone.stages["prefill"].time_s, rel=1e-6)
    itself = evaluate(Speculate(draft=SMALL, shares_encoder=False).apply(query), hardware)
    encoding = alone.stages["encode"].time_s + alone.stages["adapt"].time_s
    assert close(itself.ttft_s - whole.ttft_s, encoding, rel=1e-6)


def test_memory_holds_both_weights_and_both_caches():
    query, hardware = query_of(), load_hardware(H200)
    plain, spoken = evaluate(query, hardware), evaluate(Speculate(draft=SMALL).apply(query), hardware)
    language = weights_bytes(Structure.of(query_of(SMALL)))[1]
    assert close(spoken.memory.draft_weights_bytes, language)
    assert close(spoken.memory.weights_bytes, plain.memory.weights_bytes + language)
    alone = predict(SMALL, H200, WORKLOAD).memory
    assert close(spoken.memory.kv_bytes, plain.memory.kv_bytes + alone.kv_bytes)
    assert spoken.max_batch < plain.max_batch
    itself = evaluate(Speculate(draft=SMALL, shares_encoder=False).apply(query), hardware).memory
    assert close(itself.draft_weights_bytes, alone.weights_bytes)


@pytest.mark.parametrize("name", [TARGET, SMALL])
def test_the_largest_batch_with_a_draft_is_the_largest_that_fits(name):
    speculate, hardware = Speculate(draft=SMALL, draft_visual_keep=0.5), load_hardware(H200)
    most = evaluate(speculate.apply(query_of(name)), hardware).max_batch
    assert most > 0
    assert evaluate(speculate.apply(query_of(name, batch=float(most))), hardware).fits
    assert not evaluate(speculate.apply(query_of(name, batch=most + 1.0)), hardware).fits


# Other drafts


def test_first_layers_draft_for_their_share_of_a_step_and_no_memory():
    query, hardware = query_of("llava-1.5-7b"), load_hardware(H100)
    plain, half = evaluate(query, hardware), evaluate(Speculate(layers=16, tokens=1).apply(query), hardware)
    assert half.ttft_s == plain.ttft_s
    assert half.memory.peak_bytes == plain.memory.peak_bytes
    draft_s = half.evaluator.draft_s("decode", half.query.turns[0])
    assert 0.5 * plain.tpot_s < draft_s < 0.55 * plain.tpot_s  # and the head


def test_a_head_is_lighter_than_a_model_and_keeps_its_own_cache():
    query, hardware = query_of("llava-1.5-13b"), load_hardware(H100)
    plain = evaluate(query, hardware)
    head = evaluate(Speculate(head_layers=1, tokens=30, nodes=30, depth=3, accepted=1.9).apply(query), hardware)
    model = evaluate(Speculate(draft="llava-1.5-7b", tokens=3, accepted=1.9).apply(query), hardware)
    assert plain.tpot_s > head.tpot_s
    assert head.tpot_s < model.tpot_s
    width = query.model.decoder.width
    layer = query.model.decoder.runs[0].layer.parameters
    assert close(head.memory.draft_weights_bytes, 2 * (layer + 2 * width**2))
    assert close(head.memory.kv_bytes, plain.memory.kv_bytes * 41 / 40)
    assert head.ttft_s > plain.ttft_s


def test_a_tree_verifies_its_nodes_and_drafts_its_depth():
    tree = Speculate(draft=SMALL, nodes=26, depth=5, accepted=3.0).apply(query_of())
    assert tree.step_rows == 26
    assert (tree.draft.passes, tree.draft.levels) == (5, 5)
    assert tree.draft.query.step_rows == pytest.approx(26 / 5)
    chain = Speculate(draft=SMALL, tokens=5, accepted=3.0).apply(query_of())
    hardware = load_hardware(H100)
    assert evaluate(tree, hardware).tpot_s >= evaluate(chain, hardware).tpot_s


def test_a_draft_beside_the_target_hides_what_was_accepted_whole():
    query, hardware = query_of(), load_hardware(H100)
    serial, beside = (
        evaluate(Speculate(draft=SMALL, tokens=4, parallel=p).apply(query), hardware) for p in (False, True)
    )
    turn = query.turns[0]
    target_s, draft_s = (getattr(beside.evaluator, f"{who}_s")("decode", turn) for who in ("own", "draft"))
    saved = 0.8**4 * min(target_s, draft_s)
    assert close((serial.tpot_s - beside.tpot_s) * serial.query.draft.round_tokens, saved, rel=1e-6)
    assert beside.n_devices == 2
    assert beside.memory.peak_bytes == evaluate(query, hardware).memory.peak_bytes
    always = evaluate(Speculate(draft=SMALL, tokens=4, acceptance=1.0, parallel=True).apply(query), hardware)
    assert close(always.tpot_s * 5, max(target_s, draft_s), rel=1e-6)


def test_a_draft_is_deployed_as_widely_as_its_heads_allow():
    wide = query_of("internvl3-8b", parallelism=Parallelism(tp=4))  # 28 heads
    assert Speculate(draft="qwen2.5-vl-7b").apply(wide).draft.query.parallelism.tp == 4
    eight = query_of(TARGET, parallelism=Parallelism(tp=8, pp=2, dp=3))  # 40 heads; the draft has 28
    drafting = Speculate(draft="qwen2.5-vl-7b").apply(eight).draft.query.parallelism
    assert (drafting.tp, drafting.pp, drafting.dp) == (4, 2, 3)


def test_techniques_behind_a_draft_reach_it_through_turns_and_batch():
    query = Speculate(draft=SMALL).apply(query_of())
    shorter = replace(query, turns=(replace(query.turns[0], output_tokens=11.0),), batch=4.0)
    straight = Speculate(draft=SMALL).apply(replace(query_of(), turns=shorter.turns, batch=4.0))
    hardware = load_hardware(H100)
    one, other = evaluate(shorter, hardware), evaluate(straight, hardware)
    assert (one.ttft_s, one.tpot_s, one.memory) == (other.ttft_s, other.tpot_s, other.memory)


# Laws

drafts = st.sampled_from(["model", "layers", "head"])


def speculate(kind, **fields):
    source = {"model": {"draft": SMALL}, "layers": {"layers": 4}, "head": {"head_layers": 1}}[kind]
    return Speculate(**source, **fields)


@pytest.mark.parametrize(
    "neutral",
    [Speculate(), Speculate(draft=SMALL, tokens=0), Speculate(layers=3, tokens=0.0), RelaxedVerify()],
)
def test_neutral_is_the_same_object(neutral):
    query = query_of()
    assert neutral.apply(query) is query


@law(60)
@given(
    kind=drafts,
    target=st.sampled_from([TARGET, *KINDS]),
    engine=st.sampled_from(["ideal", "fused", "paper"]),
    tokens=st.integers(1, 12),
    acceptance=st.floats(0.0, 1.0),
    keep=st.floats(0.0, 1.0),
    visual=st.integers(0, 30_000),
    batch=st.integers(1, 64),
)
def test_a_better_draft_never_costs_more(*, kind, target, engine, tokens, acceptance, keep, visual, batch):
    workload = Workload(visual_tokens=float(visual), text_tokens=50, output_tokens=64)
    query, hardware = query_of(target, workload, engine=engine, batch=float(batch)), load_hardware(H200)
    fields = {"tokens": tokens, "acceptance": acceptance, "draft_visual_keep": keep}
    p = evaluate(speculate(kind, **fields).apply(query), hardware)
    righter = evaluate(speculate(kind, **fields | {"acceptance": (1 + acceptance) / 2}).apply(query), hardware)
    blinder = evaluate(speculate(kind, **fields | {"draft_visual_keep": keep / 2}).apply(query), hardware)
    for better in (righter, blinder):
        assert better.tpot_s <= p.tpot_s * (1 + 1e-12)
        assert better.energy_j <= p.energy_j * (1 + 1e-12)
        assert better.memory.peak_bytes <= p.memory.peak_bytes
        slack = 1.0 / 0.9 if engine == "fused" else 1 + 1e-12  # a product cut otherwise may fill its waves better
        assert better.ttft_s <= p.ttft_s * slack


@law(60)
@given(
    kind=drafts,
    parallel=st.booleans(),
    target=st.sampled_from([TARGET, *KINDS]),
    engine=st.sampled_from(["ideal", "fused"]),
    tokens=st.integers(1, 12),
    output=st.integers(1, 300),
    batch=st.integers(1, 64),
)
def test_wholes_are_the_sums_of_their_parts(*, kind, parallel, target, engine, tokens, output, batch):
    workload = Workload(images=[Image(500, 400)], text_tokens=50, output_tokens=output)
    query = query_of(target, workload, engine=engine, batch=float(batch))
    p = evaluate(speculate(kind, tokens=tokens, parallel=parallel).apply(query), load_hardware(H200))
    stages = p.stages
    assert close(p.ttft_s, sum(stages[name].time_s for name in ("preprocess", "encode", "adapt", "prefill")), 1e-12)
    assert stages["decode"].time_s == pytest.approx((output - 1) * p.tpot_s, rel=1e-12, abs=1e-18)
    for name in ("encode", "adapt", "prefill", "decode"):
        cost = stages[name]
        if not cost.time_s:
            continue
        assert sum(share for _, share in cost.shares) == pytest.approx(1.0, rel=1e-6)
        if name != "decode" or kind != "head":  # what joins state and embedding is no operator of the table
            assert sum(cost.kind_s) == pytest.approx(cost.time_s * (1 - cost.share("host")), rel=1e-9, abs=1e-15)
        if kind != "head":
            assert close(cost.flops, sum(o.flops for o in cost.operators))
            assert close(cost.bytes, sum(o.bytes for o in cost.operators))
    first, middle, last = stages["decode"].step_time_s
    if output > 1:
        assert first <= p.tpot_s * 1.001
        assert first <= middle * 1.001 <= last * 1.01
    json = p.as_dict()
    assert json["memory"]["draft_weights_bytes"] == p.memory.draft_weights_bytes
    assert p.why()
    if engine == "fused" and output > 1:
        low, high = p.error_band["tpot_s"]
        assert low < p.tpot_s < high


def test_a_sweep_equals_its_points():
    acceptance, keep = np.array([0.3, 0.9]), np.array([[0.0], [0.1], [1.0]])
    text = np.array([[[20.0]], [[9000.0]]])
    workload = Workload(visual_tokens=4000.0, text_tokens=text, output_tokens=100)
    for kind in ("model", "layers", "head"):
        swept = speculate(kind, acceptance=acceptance, draft_visual_keep=keep, tokens=np.array([2.0, 7.0]))
        relax = RelaxedVerify(probability=np.array([0.0, 0.5]))
        sweep = predict(TARGET, H200, workload, techniques=[swept, relax], batch=3.0)
        assert sweep.tpot_s.shape == (2, 3, 2)
        for k, i, j in np.ndindex(2, 3, 2):
            at = Workload(visual_tokens=4000.0, text_tokens=float(text[k, 0, 0]), output_tokens=100)
            one = speculate(
                kind,
                acceptance=float(acceptance[j]),
                draft_visual_keep=float(keep[i, 0]),
                tokens=float([2.0, 7.0][j]),
            )
            techniques = [one, RelaxedVerify(probability=float([0.0, 0.5][j]))]
            point = predict(TARGET, H200, at, techniques=techniques, batch=3.0)
            for field in ("ttft_s", "tpot_s", "total_s"):
                assert getattr(sweep, field)[k, i, j] == pytest.approx(getattr(point, field), **POINT)


@pytest.mark.parametrize("kind", ["model", "layers", "head"])
def test_the_original_is_left_as_it_was(kind):
    query, hardware = query_of(), load_hardware(H100)
    before = evaluate(query, hardware)
    spoken = speculate(kind).apply(query)
    evaluate(spoken, hardware)
    after = evaluate(query, hardware)
    assert query.draft is None
    assert query.step_rows == 1.0
    assert after.as_dict() == before.as_dict()
    with pytest.raises(dataclasses.FrozenInstanceError):
        spoken.draft.acceptance = 0.1


def test_points_of_a_plain_query_have_one_row_a_sequence():
    query = query_of(batch=5.0)
    points = decode_points(query, Structure.of(query), query.turns[0], detailed=False)
    assert points.sums[1, 0] == 5.0


# What is refused

WRONG = [
    ({"draft": SMALL, "layers": 3}, "one of draft, layers and head_layers"),
    ({"draft": SMALL, "nodes": 30}, "give its depth"),
    ({"draft": SMALL, "tokens": -1}, "tokens=-1 must be 0 or more"),
    ({"draft": SMALL, "acceptance": 1.4}, "acceptance=1.4 must lie in"),
    ({"draft": SMALL, "draft_visual_keep": 2.0}, "draft_visual_keep=2.0"),
    ({"draft": SMALL, "accepted": 11.0}, "accepted=11.0"),
    ({"draft": SMALL, "acceptance": float("nan")}, "acceptance=nan"),
    ({"layers": 0}, "layers=0"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_what_no_round_can_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Speculate(**fields)


def test_a_draft_must_be_less_than_its_target_and_see_as_it_does():
    with pytest.raises(ValueError, match=r"Speculate\.layers=64 must be fewer than the 64 layers"):
        Speculate(layers=64).apply(query_of())
    with pytest.raises(Unsupported, match="cuts pictures otherwise"):
        Speculate(draft="llava-1.5-7b", shares_encoder=False).apply(query_of())
    with pytest.raises(ValueError, match="speculate first"):
        RelaxedVerify(probability=0.5).apply(query_of())
    with pytest.raises(ValueError, match="probability=2"):
        RelaxedVerify(probability=2)
    with pytest.raises(LookupError, match="no-such"):
        Speculate(draft="no-such").apply(query_of())


def test_applying_a_draft_is_quick(benchmark):
    query = query_of()
    speculating = Speculate(draft=SMALL, draft_visual_keep=0.1)
    assert benchmark(speculating.apply, query).draft is not None
