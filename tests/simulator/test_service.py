"""What a service says beside times: what a pool holds, and what moves between pools."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel import (
    DoesNotFit,
    Image,
    Parallelism,
    Unsupported,
    Workload,
    build_query,
    load_engine,
    load_hardware,
    load_model,
    predict,
    technique,
)
from costmodel.memory import PARTS, kv_bytes_per_request, memory
from simulator import Pool, ServingPlan, check, simulate, traffic
from simulator.capacity import parts_of
from simulator.decoding import DecodeSet
from simulator.prompt import Item, Layers, Prompt, Prompts, places, works_of
from simulator.request import Items, requests_of
from simulator.service import Capacity, LinearService, ReadRule
from simulator.serving_plan import Method
from simulator.step_service import StepService
from tests.simulator import fuzz

A100, H100 = "a100-sxm4-80gb", "h100-sxm5-80gb"
EPD_SAVINGS = {"minicpm-v-2.6": 0.95, "internvl2-8b": 0.96, "internvl2-26b": 0.78}
"""EPDServe (arXiv:2501.05460), section 4.4: weights that a worker leaves out where it only encodes."""


def service(model, *, stages=None, **pool):
    given = Pool(hardware=pool.pop("hardware", H100), **({"stages": stages} if stages else {}), **pool)
    plan = ServingPlan(model=model, pools=(given,))
    return StepService.of_pool(plan, given)


def held(model, parts, images=1):
    query = build_query(
        load_model(model), Workload(images=[Image(4032, 3024)] * images, text_tokens=22), load_engine("vllm")
    )
    return memory(query, load_hardware(A100), parts=parts)


# What a pool holds


@pytest.mark.parametrize(("model", "saving"), EPD_SAVINGS.items())
def test_a_worker_that_only_encodes_leaves_out_the_weights_that_epdserve_says(model, saving):
    left_out = 1 - held(model, ["vision"]).weights_bytes / held(model, PARTS).weights_bytes
    assert left_out == pytest.approx(saving, abs=0.02)


@pytest.mark.parametrize("model", [*EPD_SAVINGS, "qwen3-vl-8b", "llama-3.2-11b-vision"])
def test_the_parts_of_a_model_add_up_to_it(model):
    whole, vision, language = (held(model, parts) for parts in (PARTS, ["vision"], ["language"]))
    parameters = load_model(model).parameters()
    other = parameters["total"] - parameters["language"]
    assert (vision.weights_bytes, language.weights_bytes) == (2 * other, 2 * parameters["language"])
    assert vision.weights_bytes + language.weights_bytes == whole.weights_bytes
    assert vision.kv_bytes == vision.block_bytes == vision.kv_blocks == vision.prefill_activation_bytes == 0
    assert (language.kv_bytes, language.encode_activation_bytes) == (whole.kv_bytes, 0)
    assert held(model, []).peak_bytes == whole.reserve_bytes


def most_images(model, parts, kv_share, most=600):
    """Return the most pictures of a request for which there is room beside a cache of that share of free memory."""

    def fits(images):
        room = held(model, parts, images)
        free = room.usable_bytes - room.weights_bytes - room.reserve_bytes
        cache = kv_share * free if "language" in parts else 0.0
        return cache + room.encode_activation_bytes <= free

    able = [n for n in (1, 2, 5, 10, 20, 40, 80, 160, most) if fits(n)]
    return max(able, default=0)


@pytest.mark.parametrize("model", EPD_SAVINGS)
def test_more_pictures_fit_where_encoder_and_language_model_stand_apart(model):
    """EPDServe, table 2: with the cache at 80 % of the free memory, 7 → 49 and 1 → 10 pictures of 4032 x 3024."""
    assert most_images(model, ["vision"], 0.8) > most_images(model, PARTS, 0.8)


def kv_share(model, parts, images):
    """Return the largest share of the free memory that can be cache beside the activations of a request."""
    room = held(model, parts, images)
    free = room.usable_bytes - room.weights_bytes - room.reserve_bytes
    return 1 - room.activation_bytes / free


@pytest.mark.parametrize("model", EPD_SAVINGS)
def test_a_larger_share_of_memory_is_cache_where_nothing_is_encoded(model):
    """EPDServe, table 8: shares fall with the pictures of a request, and are larger on workers that do not encode."""
    counts = (5, 10, 20)
    whole, apart = ([kv_share(model, parts, n) for n in counts] for parts in (PARTS, ["language"]))
    assert all(one > other for one, other in zip(apart, whole, strict=True))
    assert all(more <= fewer for shares in (whole, apart) for fewer, more in pairwise(shares))
    gain = [one - other for one, other in zip(apart, whole, strict=True)]
    assert gain[-1] > gain[0]


def test_pools_hold_what_their_stages_need():
    stages = {"encode": ("vision",), "prefill": ("language",), "decode": ("language",), "preprocess": ()}
    assert {name: parts_of(Pool(hardware=H100, stages=(name,))) for name in stages} == stages
    encoder, whole, decoder = (
        service("qwen2.5-vl-7b", stages=stages).capacity
        for stages in (("encode",), ("encode", "prefill", "decode"), ("decode",))
    )
    assert encoder.kv_blocks == 0 < whole.kv_blocks < decoder.kv_blocks
    assert encoder.encoder_tokens == whole.encoder_tokens


def test_an_encoder_fits_where_the_model_does_not():
    assert service("qwen2.5-vl-32b", stages=("encode",), hardware="a10-24gb").capacity.kv_blocks == 0
    with pytest.raises(DoesNotFit, match=r"qwen2\.5-vl-32b"):
        service("qwen2.5-vl-32b", hardware="a10-24gb")


# What moves between pools


def test_embeddings_have_the_width_of_the_language_model_and_a_vector_for_every_depth():
    """A picture of 1920 x 1080: 60 x 34 tokens of 4,096 numbers, and three levels of DeepStack beside them."""
    qwen = service("qwen3-vl-8b")
    cost = qwen.media(Image(1920, 1080), 1)
    assert qwen.embedding_bytes(cost) == 60 * 34 * 4096 * 2 * 4
    llama = service("qwen2.5-vl-7b")
    cost = llama.media(Image(1288, 952), 1)
    assert llama.embedding_bytes(cost) == 46 * 34 * 3584 * 2


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("model", ["qwen2.5-vl-7b", "gemma-3-12b", "qwen3.5-4b", "kimi-vl-a3b"])
def test_the_cache_that_moves_is_what_the_devices_hold(model, tp):
    tokens, times = 5000, service(model, tp=tp)
    query = build_query(
        times.model.query.model,
        Workload(text_tokens=tokens - 1, output_tokens=1),
        load_engine("ideal"),  # no blocks
        parallelism=times.model.query.parallelism,
    )
    assert times.kv_bytes(tokens) == pytest.approx(tp * float(kv_bytes_per_request(query)), rel=1e-12)
    assert times.kv_layers == times.model.query.model.decoder.n_layers


def test_pixels_are_those_of_the_resized_picture_in_32_bits():
    times = service("qwen2.5-vl-7b")
    cost = times.media(Image(1920, 1080), 1)
    assert times.pixel_bytes(cost) == cost.resized_pixels * 12


def test_a_linear_service_moves_what_it_is_told():
    linear = LinearService(embedding_token_bytes=8.0, kv_token_bytes=3.0, kv_layers=4)
    cost = linear.media(Image(784, 10), 1)
    assert (linear.embedding_bytes(cost), linear.kv_bytes(7), linear.kv_layers) == (80.0, 21.0, 4)
    assert linear.pixel_bytes(cost) == 784 * 10 * 12
    assert LinearService().kv_bytes(7, [cost]) == LinearService().embedding_bytes(cost) == 0


# One request alone is what the direct path says


PICTURE = Image(336, 336)


def alone(model, methods=(), images=(PICTURE,), *, text=64, output=2, **how):
    """Return the trace of one request, and its prediction; engine `fused` has no host time, which others share."""
    pool = {"hardware": H100, "engine": "fused", **how}
    plan = ServingPlan(
        model=model,
        pools=(Pool(**pool),),
        techniques=tuple(Method(name=name, parameters=parameters) for name, parameters in methods),
    )
    items = Items.same(1, len(images), images[0]) if images else None
    asked = requests_of(np.zeros(1), np.array([text]), np.array([output]), items=items)
    trace = simulate(plan, asked, leaps=False)
    check(trace)
    expected = predict(
        model,
        H100,
        Workload(images=list(images), text_tokens=text, output_tokens=output),
        engine="fused",
        parallelism=Parallelism(tp=pool.get("tp", 1), encoder_dp=pool.get("encoder_dp", 1)),
        techniques=[technique(name, **parameters) for name, parameters in methods],
    )
    return trace, expected


def assert_equal(trace, expected):
    assert trace.ttft_s[0] == pytest.approx(float(expected.ttft_s), rel=1e-12)
    assert trace.tpot_s[0] == pytest.approx(float(expected.tpot_s), rel=1e-12)


WHOLE_TOKENS = [
    ("token_reduce", {"at": "pre_llm", "keep": 0.25}),
    ("token_reduce", {"at": "pre_llm", "keep": 0.25, "merges": True}),
    ("token_reduce", {"at": "encoder_out", "keep": 0.25, "score": "encoder_row"}),
    ("token_reduce", {"at": "encoder_layer", "layer": 12, "keep": 0.25}),
    ("token_reduce", {"at": "layer", "layer": 2, "keep": 0.5, "score": "llm_rows"}),
    ("pdrop", {}),
    ("adapter_reduce", {"keep": 0.25}),
    ("resize", {"pixels": 0.25}),
    ("arch_variant", {"kind": "cross_inject"}),
    ("kv_evict", {"keep": 0.25, "score": "rows"}),
    ("kv_evict", {"tokens": 160.0, "score": "map"}),
    ("kv_quantize", {"key_bits": 4, "value_bits": 4}),
    ("kv_quantize", {"key_bits": 2, "value_bits": 2, "fused": False}),
    ("kv_quantize", {"key_bits": 2, "value_bits": 2, "visual_only": True}),
    ("kv_quantize", {"key_bits": 2, "value_bits": 2, "residual_tokens": 32}),
    ("kv_retrieve", {"read": 0.25}),
    ("kv_retrieve", {"read": 0.25, "placement": "host"}),
    ("sparse_attention", {"density": 0.5, "estimator": "antidiagonal"}),
    ("sparse_attention", {"density": 0.5, "stage": "encode"}),
    ("weight_quant", {"bits": 4}),
    ("weight_prune", {"sparsity": 0.5}),
]


@pytest.mark.parametrize(("name", "parameters"), WHOLE_TOKENS)
def test_a_technique_costs_a_request_alone_what_the_direct_path_says(name, parameters):
    assert_equal(*alone("llava-1.5-7b", [(name, parameters)]))


def test_techniques_together_cost_what_the_direct_path_says():
    both = [
        ("token_reduce", {"at": "pre_llm", "keep": 0.25}),
        ("kv_evict", {"keep": 0.5}),
        ("weight_quant", {"bits": 8}),
    ]
    assert_equal(*alone("llava-1.5-7b", both))


@pytest.mark.parametrize("methods", [[], [("kv_quantize", {"key_bits": 4, "value_bits": 4})]])
@pytest.mark.parametrize("images", [(), (Image(448, 448),), (Image(448, 448),) * 3])
@pytest.mark.parametrize("model", ["llama-3.2-11b-vision", "gemma-3-12b", "qwen3.5-4b"])
def test_pictures_across_both_ways_and_beside_states_cost_what_the_direct_path_says(model, images, methods):
    if methods and not images and "llama" in model:
        return  # the simulator starts the kernels of an empty cache of pictures, too
    assert_equal(*alone(model, methods, images))


def test_a_prompt_in_chunks_brings_the_pairs_of_a_whole_one():
    """Pruned layers, tokens that see both ways, keys that are seen across: nothing is lost or counted twice."""
    items = (Item(10, 110, 96.0, 0.0, 4560.0), Item(150, 200, 48.0, 1601.0, 0.0))
    prompt = Prompt(400, items, ((1.0, 1.0, 1.0, 0.0), (0.5, 1.0, 1.0, 0.0), (1.0, 1.0, 1.0, 0.0)))
    layers = [Layers("window", 1e18, 1.0), Layers("window", 1e18, 1.0), Layers("cross", 1e18)]
    whole, parts = works_of([(0, 400, prompt)], layers), np.zeros((3, 3))
    for start, end in pairwise((0, 60, 130, 170, 171, 400)):
        parts += np.array(works_of([(start, end - start, prompt)], layers))
    assert parts[:2, :2] == pytest.approx(np.array(whole)[:2, :2])
    assert parts[2, [0, 2]] == pytest.approx([400.0, 1601.0])
    assert whole[1][0] == 400 - 72


# Sums of sequences that differ


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(2, 60), st.integers(-1, 40), st.integers(0, 50)), max_size=12)
)
def test_keys_are_those_of_the_sequences_one_by_one(sequences):
    rules = (ReadRule(), ReadRule(0.5, 120), ReadRule(grows=False), ReadRule(0.0, fixed=3.0, grows=False))
    own = [(-min(less, context - 1), -min(less, context - 1), across, 0) for context, _, less, across in sequences]
    decode = DecodeSet(rules, 16, own, [less for less, *_ in own])
    now = {}
    for request, (context, steps, *_) in enumerate(sequences):
        decode.join(request, context, steps)
        now[request] = context
    while now:
        expected = [
            sum(context + own[r][0] for r, context in now.items()),
            sum(0.5 * min(context + own[r][1], 120) for r, context in now.items()),
            sum(own[r][2] for r in now),
            3.0 * len(now),
        ]
        assert list(decode.keys()) == expected
        assert decode.new_blocks() == sum((context - 1 + own[r][0]) % 16 == 0 for r, context in now.items())
        decode.advance(1)
        now = {request: context + 1 for request, context in now.items()}
        for request in decode.ended():
            decode.leave(request)
            del now[request]
    assert decode.keys() == (0, 0, 0, 0)


MIXED = [
    ("llama-3.2-11b-vision", []),
    ("qwen2.5-vl-7b", [("fastv", {})]),
    ("gemma-3-12b", [("kv_evict", {"keep": 0.3, "score": "rows"})]),
    ("qwen2.5-vl-7b", [("kv_quantize", {"key_bits": 2, "value_bits": 2, "fused": False, "visual_only": True})]),
    ("qwen2.5-vl-7b", [("token_reduce", {"keep": 0.2}), ("kv_retrieve", {"read": 0.25, "placement": "host"})]),
]


@pytest.mark.parametrize(("model", "methods"), MIXED)
def test_laws_hold_and_leaps_are_steps_under_techniques(model, methods):
    techniques = tuple(Method(name=name, parameters=parameters) for name, parameters in methods)
    plan = ServingPlan(model=model, pools=(Pool(hardware=H100),), techniques=techniques)
    times = StepService.of(plan)
    times.capacity = replace(times.capacity, kv_blocks=450)  # so that some are preempted
    requests = traffic.preset("visionarena", 12.0, 60, 0)
    leapt, stepped = (simulate(plan, requests, service=times, leaps=leaps) for leaps in (True, False))
    check(leapt)
    check(stepped)
    for name, column in leapt.columns.items():
        assert column.tobytes() == stepped.columns[name].tobytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class Evicting(LinearService):
    """Keeps a share of every prompt, holds some cache beside it, and reads some of that."""

    keep: float = 0.5
    beside: int = 0
    shares_prefixes: bool = False

    def prompts(self, requests, costs, kinds):
        spans = np.array([cost.visual_tokens for cost in costs] or [0])[kinds]
        _, tokens = places(requests, spans)
        evicted = np.floor((1 - self.keep) * tokens).astype(int)
        own = [(-less, -less, self.beside) for less in evicted.tolist()]
        return Prompts(
            prompts=[None] * len(requests),
            own_keys=own,
            item_spans=spans,
            item_embeds=np.maximum(spans, 1),
            beside_tokens=[self.beside] * len(requests),
            kept_tokens=(self.beside - evicted).tolist(),
        )


@settings(max_examples=60, deadline=None)
@given(fuzz.traffic(), st.floats(0, 1), st.integers(0, 200), st.integers(40, 400), st.sampled_from([1, 4, 16]))
def test_laws_hold_and_leaps_are_steps_whatever_is_evicted(requests, keep, beside, blocks, block):
    times = Evicting(
        step_base_s=0.01,
        token_s=1e-5,
        key_s=1e-7,
        rules=(ReadRule(), ReadRule(0.5, 40), ReadRule(grows=False)),
        capacity=Capacity(blocks * 16 // block, block, 300, 8, 4000),
        keep=keep,
        beside=beside,
    )
    plan = ServingPlan(model="any", pools=(Pool(hardware="any"),))
    leapt, stepped = (simulate(plan, requests, service=times, leaps=leaps) for leaps in (True, False))
    check(leapt)
    check(stepped)
    assert leapt.held_blocks == 0
    for name, column in leapt.columns.items():
        assert column.tobytes() == stepped.columns[name].tobytes()


# What the cache holds


def blocks_of_one(methods, output=200, **how):
    trace, _ = alone("llava-1.5-7b", methods, output=output, **how)
    return trace.steps[0]["kv_used_blocks"].tolist()


def test_eviction_gives_blocks_back_when_the_prompt_ends():
    whole, evicted = blocks_of_one([]), blocks_of_one([("kv_evict", {"keep": 0.25})])
    assert whole[:2] == [640 / 16, 640 / 16 + 1]
    assert evicted[:2] == [640 / 16, 640 / 4 / 16 + 1]
    assert whole[-1] - whole[1] == evicted[-1] - evicted[1] > 0


def test_keys_of_pictures_take_blocks_beside_the_text():
    """Four tiles of 1,601 tokens in 8 layers, where a token of text has 32."""
    trace, _ = alone("llama-3.2-11b-vision", images=(Image(1120, 1120),), text=15)
    assert trace.steps[0]["kv_used_blocks"][0] == math.ceil((16 + math.ceil(4 * 1601 * 8 / 32)) / 16)


def test_narrow_weights_and_caches_leave_more_blocks():
    def blocks(*methods):
        techniques = tuple(Method(name=name, parameters=parameters) for name, parameters in methods)
        plan = ServingPlan(model="llava-1.5-7b", pools=(Pool(hardware=A100),), techniques=techniques)
        return StepService.of(plan).capacity.kv_blocks

    plain = blocks()
    assert blocks(("weight_quant", {"bits": 4})) > plain
    assert blocks(("kv_quantize", {"key_bits": 8, "value_bits": 8})) == pytest.approx(2 * plain, rel=1e-3)


def test_prompts_share_prefixes_only_where_caches_are_whole():
    assert service("qwen2.5-vl-7b").shares_prefixes
    assert not service("llama-3.2-11b-vision").shares_prefixes
    techniques = {"kv_evict": {"keep": 0.5}, "token_reduce": {"keep": 0.5}, "weight_quant": {"bits": 4}}
    shares = {}
    for name, parameters in techniques.items():
        plan = ServingPlan(
            model="llava-1.5-7b", pools=(Pool(hardware=H100),), techniques=(Method(name=name, parameters=parameters),)
        )
        shares[name] = StepService.of(plan).shares_prefixes
    assert shares == {"kv_evict": False, "token_reduce": False, "weight_quant": True}


# What is refused


@pytest.mark.parametrize(
    ("name", "parameters", "reason"),
    [
        ("specvlm_ji", {}, "a draft gives several tokens a step"),
        ("resize", {"pixels": 0.25, "call_probability": 0.3}, "several turns"),
        ("output_length", {"scale": 0.5}, "how long answers are is said by the traffic"),
        ("streamingvlm", {}, "a stream sets the size of prefill chunks"),
    ],
)
def test_techniques_that_steps_cannot_say_are_refused_in_one_line(name, parameters, reason):
    plan = ServingPlan(
        model="llava-1.5-7b", pools=(Pool(hardware=H100),), techniques=(Method(name=name, parameters=parameters),)
    )
    with pytest.raises(Unsupported, match=reason) as error:
        StepService.of(plan)
    assert "\n" not in str(error.value)
    assert "leave" in str(error.value)


# Several devices


def many(model, n=8, text=100, output=2, **pool):
    """Return the trace of some equal requests of text that come at once."""
    plan = ServingPlan(model=model, pools=(Pool(**{"hardware": H100, "engine": "fused", **pool}),))
    trace = simulate(plan, requests_of(np.zeros(n), np.full(n, text), np.full(n, output)))
    check(trace)
    return trace


def test_replicas_that_share_experts_step_together_as_the_direct_path_says():
    """Eight requests on two replicas: four each, and experts that rows of both use."""
    workload = Workload(text_tokens=100, output_tokens=2)
    for ep in (2, 4):
        how = {"tp": ep // 2, "dp": 2, "ep": ep}
        p = predict("qwen3-vl-30b-a3b", H100, workload, batch=8, engine="fused", parallelism=Parallelism(**how))
        trace = many("qwen3-vl-30b-a3b", **how)
        assert len(trace.steps) == 1
        assert trace.ttft_s == pytest.approx(np.full(8, float(p.ttft_s)), rel=1e-12)
        assert trace.tpot_s == pytest.approx(np.full(8, float(p.tpot_s)), rel=1e-12)


def test_replicas_that_share_experts_leap_as_they_step():
    times = service("qwen3-vl-30b-a3b", dp=2, ep=2)
    leap = times.decode_steps_s(31, (30_007,), (31,), 40)
    assert leap.tolist() == [times.step_s((), 0, 31, (30_007 + 31 * i,)) for i in range(40)]


def test_replicas_that_share_nothing_are_workers():
    dealt, workers = many("qwen2.5-vl-7b", dp=2), many("qwen2.5-vl-7b", workers=2)
    assert len(dealt.steps) == 2
    for name, column in dealt.columns.items():
        assert column.tobytes() == workers.columns[name].tobytes()


def test_a_batch_of_a_pipeline_takes_the_way_through_all_stages_and_as_many_run_as_there_are():
    p = predict(
        "qwen3-8b", H100, Workload(text_tokens=100, output_tokens=2), engine="fused", parallelism=Parallelism(pp=2)
    )
    one = many("qwen3-8b", n=1, pp=2)
    assert len(one.steps) == 2
    assert one.ttft_s[0] == pytest.approx(float(p.ttft_s), rel=1e-12)
    assert one.tpot_s[0] == pytest.approx(float(p.tpot_s), rel=1e-12)
    two = many("qwen3-8b", n=2, pp=2)
    assert two.columns["finish_s"] == pytest.approx(np.full(2, one.columns["finish_s"][0]), rel=1e-12)
    assert (
        many("qwen3-8b", pp=2).pools[0].limits.kv_blocks
        == service("qwen3-8b", pp=2, engine="fused").capacity.kv_blocks // 2
    )


def test_stages_of_a_pipeline_wait_for_the_one_with_most_layers():
    """Of 36 layers on 8 devices, one has five: a step takes 40 / 36 of its time."""
    p = predict(
        "qwen3-8b", H100, Workload(text_tokens=100, output_tokens=2), engine="fused", parallelism=Parallelism(pp=8)
    )
    assert many("qwen3-8b", n=1, pp=8).tpot_s[0] == pytest.approx(float(p.tpot_s) * 40 / 36, rel=1e-12)


def test_a_pipeline_that_encodes_is_refused():
    with pytest.raises(Unsupported, match="pp=2 of pool 'all' would encode on the devices of its first stage"):
        service("qwen2.5-vl-7b", pp=2)
    assert service("qwen2.5-vl-7b", pp=2, stages=("prefill", "decode")).capacity.kv_blocks


@pytest.mark.parametrize("score", ["none", "encoder_map"])
def test_pictures_that_are_encoded_together_start_the_kernels_of_a_technique_once(score):
    trace, expected = alone("llava-1.5-7b", [("token_reduce", {"keep": 0.25, "score": score})], (PICTURE,) * 3)
    assert trace.ttft_s[0] == pytest.approx(float(expected.ttft_s), rel=1e-5)


@pytest.mark.parametrize("methods", [[], [("resize", {"pixels": 0.25})]])
def test_copies_of_the_encoder_share_pictures_as_the_direct_path_says(methods):
    """Three pictures on two copies: one has two."""
    assert_equal(*alone("llava-1.5-7b", methods, (PICTURE,) * 3, tp=2, encoder_dp=2))
