"""Techniques on attention and the cache: laws of every one, formulas by hand, and published numbers."""

import functools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from costmodel import (
    Parallelism,
    Precision,
    Unsupported,
    Workload,
    build_query,
    evaluate,
    load_engine,
    load_hardware,
    load_model,
    predict,
)
from costmodel.counts import counting_engine, stage_flops
from costmodel.evaluate import kernels_of
from costmodel.priced import operator_s
from costmodel.query import Turn
from costmodel.streaming import streaming
from costmodel.techniques.kv_evict import KVEvict
from costmodel.techniques.kv_quantize import KVQuantize
from costmodel.techniques.kv_retrieve import KVRetrieve
from costmodel.techniques.sparse_attention import SparseAttention
from costmodel.techniques.sparse_laws import amdahl, attention_share, break_even_tokens, fit_density
from costmodel.techniques.stream_state import StreamState
from tests.helpers import POINT, images
from tests.kinds import CROSS, GROUPED, KINDS, LATENT, MULTI_HEAD, SLIDING

A100, H100 = "a100-sxm4-80gb", "h100-sxm5-80gb"
QWEN_TOKEN_BYTES = 57_344.0  # Qwen2.5-VL-7B and LLaVA-OneVision-7B: 2 x 28 layers x 4 heads x 128 x 2 bytes
WAVES = 0.9  # as in test_laws: other shapes may fill their waves of thread blocks better
PRIMITIVES = (SparseAttention, KVEvict, KVQuantize, KVRetrieve, StreamState)

names = st.sampled_from(KINDS)
engines = st.sampled_from(["ideal", "fused"])
devices = st.sampled_from([A100, H100, "l40s-48gb"])
shares = st.floats(0.02, 1.0)


def law(n_examples):
    return settings(max_examples=n_examples, deadline=None, derandomize=True, database=None)


@functools.cache
def engine_of(name):
    return load_engine(name)


def built(name=GROUPED, *, engine="fused", visual=3000.0, text=200.0, output=64.0, **settings_):
    workload = Workload(visual_tokens=visual, text_tokens=text, output_tokens=output)
    return build_query(
        load_model(name), workload, engine_of(engine) if isinstance(engine, str) else engine, **settings_
    )


def overhead_s(query, hardware, *, stage="prefill", hidden=None):
    kernels = kernels_of(query, hardware)
    wanted = [o for o in query.overheads if o.stage == stage and hidden in (None, o.hidden)]
    return sum(float(operator_s(operator, kernels)) for overhead in wanted for operator in overhead.operators)


def bill(query, hardware):
    p = evaluate(query, hardware)
    m = p.memory
    return {
        "ttft_s": p.ttft_s,
        "tpot_s": p.tpot_s,
        "prefill_s": p.stages["prefill"].time_s,
        "encode_s": p.stages["encode"].time_s,
        "kv_bytes": m.kv_bytes,
        "peak_bytes": m.peak_bytes,
        "decode_traffic": p.stages["decode"].bytes,
        "prefill_flops": p.stages["prefill"].flops,
    }


# Laws of every primitive


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_a_neutral_technique_returns_the_same_query(name, primitive):
    query = built(name)
    assert primitive().apply(query) is query


@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_every_primitive_fits_the_protocol(primitive):
    technique = primitive(name="published")
    assert technique.name == "published"
    assert primitive().name == primitive.__module__.rpartition(".")[2]
    assert technique.slot
    assert technique.stages in {"attention", "kv", "encoder"}
    assert technique.needs <= {"vit_attention", "whole_video", "query", "class_token"}
    assert technique.needs_attention_map == "none"


@st.composite
def removers(draw):
    """Return a technique that removes work."""
    keep = draw(shares)
    window = draw(st.sampled_from([0.0, 32.0, 700.0]))
    return draw(
        st.sampled_from(
            [
                KVEvict(keep=keep, window=window, score="rows"),
                KVEvict(keep=keep, window=window, visual_only=True, score="key_norm", during_prefill=True),
                KVEvict(tokens=keep * 2000, merges=True, score="map"),
                KVEvict(keep=keep, text_keep=1.0),
                KVEvict(keep=keep, by="layer", layers=(1.6, 1.0, 0.4), score="rows"),
                KVEvict(keep=keep, by="head", heads=(1.9, 0.1), ragged=False),
                KVEvict(keep=keep, by="head", heads=(1.9, 0.1, 1.0)),
                KVEvict(keep=keep, masked=True, score="rows"),
                KVQuantize(key_bits=1 + 14 * keep, value_bits=2),
                KVQuantize(key_bits=4, value_bits=8, residual_tokens=128.0, transform="hadamard"),
                KVQuantize(key_bits=2, value_bits=2, visual_only=True, fused=False, transform="fft"),
                KVRetrieve(read=keep, window=window),
                KVRetrieve(read=keep, placement="host"),
                KVRetrieve(tokens=keep * 2000, placement="host", each="step", during_prefill=True, overlap=False),
                SparseAttention(density=keep, estimator="antidiagonal"),
                SparseAttention(law=(keep, 4096.0, 0.8), estimator="compression", visual_only=True),
            ]
        )
    )


def reducible(technique, query):
    """Return the query after a technique; assume that it applies to the model."""
    try:
        return technique.apply(query)
    except Unsupported:
        assume(False)
        raise


@law(150)
@given(
    name=names,
    engine=engines,
    device=devices,
    technique=removers(),
    visual=st.integers(600, 30_000),
    text=st.integers(1, 3000),
    batch=st.integers(1, 16),
    tp=st.sampled_from([1, 2, 4]),
)
def test_removing_work_never_costs_more(*, name, engine, device, technique, visual, text, batch, tp):
    assume(name != "kimi-vl-a3b" or tp < 4)
    settings_ = {"batch": float(batch), "parallelism": Parallelism(tp=tp, encoder_tp=1)}
    query = built(name, engine=engine, visual=float(visual), text=float(text), **settings_)
    hardware = load_hardware(device)
    full, less = bill(query, hardware), bill(reducible(technique, query).without_overheads(), hardware)
    slack = 1e-9 if engine == "ideal" else 1 / WAVES - 1
    for field, value in less.items():
        assert value <= full[field] * (1 + slack), field
    assert less["kv_bytes"] <= full["kv_bytes"] * (1 + 0.02)  # a second entry may fill its last block less


@law(60)
@given(name=names, technique=removers(), visual=st.integers(600, 30_000), text=st.integers(1, 3000))
def test_a_technique_leaves_the_query_as_it_was_and_its_overheads_cost(*, name, technique, visual, text):
    query, hardware = built(name, visual=float(visual), text=float(text)), load_hardware(A100)
    kv, decoder, before = query.kv, query.decoder, evaluate(query, hardware).total_s
    changed = reducible(technique, query)
    assert query.kv is kv
    assert query.decoder is decoder
    assert not query.overheads
    assert evaluate(query, hardware).total_s == before
    bare = evaluate(changed.without_overheads(), hardware)
    charged = evaluate(changed, hardware)
    assert charged.ttft_s >= bare.ttft_s
    assert charged.tpot_s >= bare.tpot_s
    uncharged = isinstance(technique, KVEvict) and technique.score == "none" and technique.masked
    assert bool(changed.overheads) != uncharged


SWEEPS = [
    KVEvict(keep=np.array([0.1, 0.5, 1.0])),
    KVEvict(tokens=np.array([64.0, 900.0, 1e5]), window=np.array([[0.0], [500.0]]), score="rows", merges=True),
    KVEvict(keep=np.array([0.1, 0.6]), by="head", heads=(1.5, 0.5), window=np.array([[30.0], [800.0]]), score="map"),
    KVEvict(keep=np.array([0.1, 0.6]), by="layer", layers=(2.0, 0.1), text_keep=np.array([[0.5], [0.7]])),
    KVRetrieve(read=np.array([0.0, 0.2, 1.0]), placement="host", chunk_tokens=np.array([[16.0], [196.0]])),
    KVRetrieve(tokens=np.array([0.0, 500.0]), each="step"),
    KVRetrieve(read=np.array([0.1, 1.0])),
    SparseAttention(density=np.array([0.05, 0.5, 1.0]), estimator="mean_pool"),
]


@pytest.mark.parametrize("technique", SWEEPS)
@pytest.mark.parametrize("name", [GROUPED, LATENT, SLIDING])
def test_a_sweep_equals_its_points(technique, name):
    fields = ("keep", "tokens", "window", "text_keep", "read", "chunk_tokens", "density")
    swept = {f: getattr(technique, f) for f in fields if isinstance(getattr(technique, f, None), np.ndarray)}
    workload = Workload(visual_tokens=2500.0, text_tokens=300.0, output_tokens=64)
    sweep = predict(name, A100, workload, techniques=[technique])
    shape = np.broadcast_shapes(*(v.shape for v in swept.values()))
    assert sweep.ttft_s.shape == shape
    for index in np.ndindex(shape):
        at = {f: float(np.broadcast_to(v, shape)[index]) for f, v in swept.items()}
        point = predict(name, A100, workload, techniques=[replace(technique, **at)])
        for field in ("ttft_s", "tpot_s", "total_s"):
            assert getattr(sweep, field)[index] == pytest.approx(getattr(point, field), **POINT)


@pytest.mark.parametrize(
    "technique",
    [
        KVEvict(keep=0.2, window=100.0, score="map"),
        KVQuantize(key_bits=2, value_bits=4, residual_tokens=128, fused=False, transform="fft"),
        KVRetrieve(tokens=500.0, placement="host"),
        SparseAttention(law=(0.3, 8192.0, 0.5), estimator="last_queries"),
        StreamState(sink_tokens=64.0, visual_window_tokens=1000.0, budget_tokens=200.0, chunk_tokens=256.0),
    ],
)
def test_a_sweep_of_the_request_equals_its_points(technique):
    visual, text = np.array([500.0, 2000.0, 9000.0]), np.array([[200.0], [1500.0]])
    sweep = predict(GROUPED, A100, Workload(visual_tokens=visual, text_tokens=text), techniques=[technique])
    for i, words in enumerate(text[:, 0]):
        for j, seen in enumerate(visual):
            point = predict(GROUPED, A100, Workload(visual_tokens=seen, text_tokens=words), techniques=[technique])
            for field in ("ttft_s", "tpot_s", "total_s"):
                assert getattr(sweep, field)[i, j] == pytest.approx(getattr(point, field), **POINT)


WRONG = [
    (lambda: KVEvict(keep=1.4), r"KVEvict.keep=1.4 must lie in \[0, 1\]"),
    (lambda: KVEvict(keep=0.5, tokens=64.0), "two budgets"),
    (lambda: KVEvict(heads=(1.0,)), "needs by='head'"),
    (lambda: KVEvict(score="attention"), "use one of none, rows, map, key_norm"),
    (lambda: KVEvict(visual_only=True, text_keep=0.5), "contradicts visual_only"),
    (lambda: KVQuantize(key_bits=0.5), r"must lie in \[1, 16\]"),
    (lambda: KVQuantize(key_bits=np.array([2.0, 4.0])), "is structure and is not swept"),
    (lambda: KVQuantize(key_bits=4, visual_only=True, residual_tokens=128), "leave one of them out"),
    (lambda: KVRetrieve(read=0.2, tokens=64.0), "give one of them"),
    (lambda: KVRetrieve(retriever_flops=1e12), 'need scorer="external"'),
    (lambda: KVRetrieve(chunk_tokens=0.0), "must be a number of 1 or more"),
    (lambda: SparseAttention(density=0.0), r"must lie in \(0, 1\]"),
    (lambda: SparseAttention(law=(0.2, 4096.0)), r"must be \(density, tokens, exponent\)"),
    (lambda: SparseAttention(law=(0.2, 4096.0, -0.5)), "it falls"),
    (lambda: SparseAttention(density=0.5, law=(0.2, 4096.0, 1.0)), "exclude each other"),
    (lambda: StreamState(sink_tokens=float("nan")), "must be a number of 0 or more"),
    (lambda: StreamState(recompute=True), "give a window"),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_a_wrong_field_is_one_clear_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


# Sparse attention


def test_sparse_attention_leaves_all_but_attention_as_it_was():
    query = built(engine=counting_engine("kernel"))
    sparse = SparseAttention(density=0.25).apply(query)
    (segment,) = query.decoder
    rows, mixer = 3200.0, segment.layer.mixer
    pairs = rows * (rows + 1) / 2
    saved = 0.75 * pairs * 4 * mixer.q_width * segment.n_layers
    assert stage_flops(query, "prefill") - stage_flops(sparse, "prefill") == pytest.approx(saved, rel=1e-9)
    assert sparse.kv is query.kv
    assert stage_flops(sparse, "encode") == stage_flops(query, "encode")


def test_sparse_attention_in_the_encoder_spares_its_global_layers_alone():
    query = built(engine=counting_engine("kernel"))
    sparse = SparseAttention(density=0.5, stage="encode").apply(query)
    kinds = {s.layer.mixer.grouping: s.density for s in sparse.encoder}
    assert kinds == {"sequence": 0.5, "window": 1.0}
    assert stage_flops(sparse, "encode") < stage_flops(query, "encode")
    assert stage_flops(sparse, "prefill") == stage_flops(query, "prefill")


def test_a_density_law_falls_and_a_block_is_its_floor():
    technique = SparseAttention(law=(0.2, 32_768.0, 0.8))
    tokens = np.geomspace(128, 1e6, 40)
    density = technique.density_at(tokens)
    assert np.all(np.diff(density) <= 0)
    assert technique.density_at(32_768.0) == pytest.approx(0.2)
    assert technique.density_at(65_536.0) == pytest.approx(0.2 / 2**0.8)
    assert technique.density_at(100.0) == 1.0
    assert SparseAttention(density=0.01).density_at(1280.0) == pytest.approx(0.1)  # ten blocks, of which one is its own


def test_a_constant_density_is_refused_outside_what_was_published():
    technique = SparseAttention(density=0.3, tokens_range=(8192.0, 262_144.0), name="xattn")
    assert technique.apply(built(visual=9000.0)).decoder[0].density == 0.3
    with pytest.raises(Unsupported, match="xattn was published for 8192 to 262144 tokens and not for 3200"):
        technique.apply(built())


# Search of XAttention, a layer of Llama-3.1-8B at 32K tokens (figures/breakdown.pdf): 73.8 ms dense attention,
# search 3.6 ms at stride 16 and 9.3 ms at stride 8. The GPU is not stated, so shares of the dense time are compared.
@pytest.mark.parametrize(("stride", "search_ms"), [(16.0, 3.6), (8.0, 9.3)])
def test_antidiagonal_search_takes_its_published_share(stride, search_ms):
    hardware, engine = load_hardware(A100), engine_of("ideal")
    query = build_query(load_model("llama-3.1-8b"), Workload(text_tokens=32_768.0), engine)
    technique = SparseAttention(density=0.5, estimator="antidiagonal", estimator_stride=stride)
    dense = next(o for o in evaluate(query, hardware).stages["prefill"].operators if "attention" in o.name)
    share = overhead_s(technique.apply(query), hardware) / dense.time_s
    assert share == pytest.approx(search_ms / 73.8, rel=0.3)


def test_estimators_cost_what_their_papers_say():
    query = build_query(load_model("llama-3.1-8b"), Workload(text_tokens=32_768.0), engine_of("ideal"))
    pairs, width, layers = 32_768 * 32_769 / 2, 4096, 32
    expected = {
        ("antidiagonal", 16.0): 2 * pairs * width / 16,
        ("mean_pool", 64.0): 2 * pairs * width / (128 * 64),
        ("last_queries", 64.0): 2 * 64 * 32_768 * width,
        ("compression", 64.0): 4 * pairs * width / 64,
    }
    for (name, stride), flops in expected.items():
        (overhead,) = SparseAttention(density=0.5, estimator=name, estimator_stride=stride).apply(query).overheads
        assert sum(o.flops * o.repeats for o in overhead.operators) == pytest.approx(flops * layers, rel=1e-9)


# Attention's share of Qwen2-7B's prefill as papers count it (the square), from the survey's notes on MMInference.
def test_attention_shares_of_qwen2_7b():
    decoder = load_model("qwen2-vl-7b").decoder
    tokens = 1024.0 * np.array([6, 128, 512, 1024])
    square, kernel = (attention_share(decoder, tokens, causal=causal) for causal in (False, True))
    assert square == pytest.approx([0.16, 0.80, 0.94, 0.97], abs=0.006)
    assert kernel == pytest.approx([0.09, 0.67, 0.89, 0.94], abs=0.006)
    assert amdahl(square, 0.0)[0] < 1.2  # at 6K tokens nothing that spares attention alone gains a fifth
    assert amdahl(square, 0.1)[3] > 7.5  # at 1M it does (MMInference: 8.3)


# XAttention, stride 16, speed-up of attention with its search by length (figures/speedup.pdf, exact labels).
XATTENTION = {8: 1.5, 16: 2.5, 32: 5.1, 64: 8.4, 128: 11.7, 256: 13.5}


def test_a_fitted_law_gives_published_speed_ups_back():
    tokens = [1024.0 * thousands for thousands in XATTENTION]
    search = 3.6 / 73.8
    densities = [max(1 / speed - search, 0.01) for speed in XATTENTION.values()]
    law_ = fit_density(tokens, densities)
    assert 0.5 < law_[2] < 1.5  # density falls nearly with the length
    technique = SparseAttention(law=law_)
    for length, speed in zip(tokens, XATTENTION.values(), strict=True):
        assert 1 / (technique.density_at(length) + search) == pytest.approx(speed, rel=0.35)
    assert fit_density([100.0, 200.0], [0.2, 0.4])[2] == 0.0  # a law never rises


def test_sparse_attention_breaks_even_somewhere():
    cheap = SparseAttention(law=(0.2, 32_768.0, 0.8), estimator="antidiagonal")
    dear = replace(cheap, estimator_stride=2.0)
    at, later = (break_even_tokens(t, GROUPED, A100) for t in (cheap, dear))
    assert 128 < at < later < 262_144
    assert break_even_tokens(SparseAttention(density=1.0, estimator="mean_pool"), GROUPED, A100) is None
    for tokens, wins in ((at * 1.5, True), (at / 2, False)):
        dense, sparse = (predict(GROUPED, A100, Workload(text_tokens=tokens), techniques=t) for t in ([], [cheap]))
        assert (sparse.ttft_s < dense.ttft_s) == wins


# Eviction

# Survey, Table 8: KV cache of Qwen2.5-VL-7B on Video-ChatGPT by budget [GB].
TABLE_8 = {1.0: 1.73, 0.2: 0.40, 0.1: 0.22}


def test_survey_table_8_with_one_window_for_both_budgets():
    prompt = TABLE_8[1.0] * 1e9 / QWEN_TOKEN_BYTES - 128
    whole = 900.0  # the one unknown, 128 generated tokens included: 880 to 919 give both budgets, 0.05 GB
    for budget, gigabytes in TABLE_8.items():
        query = built(visual=prompt - 100, text=100.0, output=128.0)
        query = KVEvict(keep=budget, window=whole - 128).apply(query)
        assert round(evaluate(query, load_hardware("l40s-48gb")).memory.kv_bytes / 1e9, 2) == gigabytes


def test_eviction_keeps_prefill_as_it_was_and_scoring_makes_it_longer():
    query, hardware = built(), load_hardware(A100)
    before = evaluate(query, hardware)
    silent = KVEvict(keep=0.2).apply(query)
    assert evaluate(silent.without_overheads(), hardware).ttft_s == pytest.approx(before.ttft_s, **POINT)
    rows, norms, whole = (
        evaluate(KVEvict(keep=0.2, score=score).apply(query), hardware) for score in ("rows", "key_norm", "map")
    )
    assert before.ttft_s < min(rows.ttft_s, norms.ttft_s) < whole.ttft_s
    heads, tokens = query.decoder[0].layer.mixer.heads, 3200.0
    more = whole.memory.peak_bytes - evaluate(silent, hardware).memory.peak_bytes
    assert more == pytest.approx(6 * heads * tokens**2, rel=1e-6)  # the map of one layer while softmax runs


def test_peak_memory_is_the_full_cache_unless_layers_evict_as_they_go():
    query, hardware = built(visual=0.0, text=60_000.0, output=1.0), load_hardware(A100)
    full = evaluate(query, hardware).memory
    after, during = (
        evaluate(KVEvict(keep=0.1, during_prefill=during).apply(query).without_overheads(), hardware).memory
        for during in (False, True)
    )
    assert after.kv_bytes == during.kv_bytes < 0.11 * full.kv_bytes
    assert after.peak_bytes == pytest.approx(full.peak_bytes, rel=1e-3)
    assert full.peak_bytes - during.peak_bytes == pytest.approx(full.kv_bytes - during.kv_bytes, rel=1e-6)


def test_only_requests_in_prefill_hold_what_is_evicted():
    query, hardware = built(visual=0.0, text=20_200.0, batch=4.0), load_hardware(H100)
    kept = evaluate(KVEvict(keep=0.25).apply(query).without_overheads(), hardware)
    full = evaluate(query, hardware)
    saved = full.memory.peak_bytes - kept.memory.peak_bytes
    evicted = 0.75 * 20_200 * QWEN_TOKEN_BYTES
    assert saved == pytest.approx(3 * evicted, rel=1e-3)  # one of four has all its prompt still
    assert kept.max_batch > 2.5 * full.max_batch


def test_the_largest_batch_under_eviction_is_the_largest_that_fits():
    hardware = load_hardware(A100)
    for visual, during in ((900.0, False), (20_000.0, False), (20_000.0, True)):
        technique = KVEvict(keep=0.1, during_prefill=during)
        query = technique.apply(built(visual=visual)).without_overheads()
        most = evaluate(query, hardware).max_batch
        at, above = (
            evaluate(technique.apply(built(visual=visual, batch=n)).without_overheads(), hardware)
            for n in (float(most), most + 1.0)
        )
        assert at.fits
        assert not above.fits


def test_generated_tokens_are_added_to_what_is_kept():
    hardware = load_hardware(A100)
    short, long = (KVEvict(keep=0.1).apply(built(output=n)) for n in (16.0, 1616.0))
    grown = evaluate(long, hardware).memory.kv_bytes - evaluate(short, hardware).memory.kv_bytes
    assert grown == pytest.approx(1600 * QWEN_TOKEN_BYTES)


def test_budgets_by_layer_are_entries_at_their_mean():
    query, hardware = built(MULTI_HEAD), load_hardware(A100)
    (entry,) = query.kv
    budgets = (1.8, 1.2, 0.6, 0.4)
    together = KVEvict(keep=0.5, by="layer", layers=budgets).apply(query).without_overheads()
    quarters = [replace(entry, n_layers=8, visual_share=s, text_share=s) for s in (0.9, 0.6, 0.3, 0.2)]
    apart = replace(query, kv=tuple(quarters))
    one, four = bill(together, hardware), bill(apart, hardware)
    assert one["kv_bytes"] == pytest.approx(four["kv_bytes"], rel=5e-3)  # whole blocks
    assert one["decode_traffic"] == pytest.approx(four["decode_traffic"], rel=1e-9)
    assert one["tpot_s"] == pytest.approx(four["tpot_s"], rel=1e-3)
    capped = KVEvict(keep=1.0, by="layer", layers=(2.0, 0.5)).apply(query).kv[0]
    assert capped.visual_share == pytest.approx(0.75)  # no layer keeps more than there is


def test_the_device_with_most_kept_heads_counts():
    skewed = KVEvict(keep=0.4, by="head", heads=(2.0, 1.0, 0.5, 0.5))
    shares_ = [skewed.apply(built(parallelism=Parallelism(tp=tp))).kv[0].visual_share for tp in (1, 2, 4)]
    assert shares_ == pytest.approx([0.4, 0.6, 0.8])  # all four heads; two on the busier device; the longest alone
    padded = replace(skewed, ragged=False).apply(built()).kv[0]
    assert padded.visual_share == pytest.approx(0.8)


def test_modalities_have_budgets_of_their_own():
    (entry,) = KVEvict(keep=0.1, text_keep=0.6).apply(built()).kv
    assert (entry.visual_share, entry.text_share) == pytest.approx((0.1, 0.6))
    (entry,) = KVEvict(keep=0.1, visual_only=True, window=300.0).apply(built()).kv
    assert (entry.visual_share, entry.text_share) == pytest.approx((0.2, 1.0))
    (cross,) = (e for e in KVEvict(keep=0.1, visual_only=True).apply(built(CROSS)).kv if e.cross_share)
    assert cross.cross_share < 1


def test_merging_compares_every_evicted_token_with_every_kept_one():
    query = built()
    plain, merging = (KVEvict(keep=0.25, merges=merges).apply(query) for merges in (False, True))
    flops = [sum(o.flops * o.repeats for o in q.overheads[0].operators) for q in (plain, merging)]
    assert flops[0] == 0.0
    assert flops[1] == pytest.approx(28 * 2 * (0.25 * 3200) * (0.75 * 3200) * 512)


def test_masks_save_nothing():
    query, hardware = built(), load_hardware(A100)
    masked = KVEvict(keep=0.2, masked=True, score="rows").apply(query)
    assert masked.kv[0] is query.kv[0]
    assert evaluate(masked, hardware).ttft_s > evaluate(query, hardware).ttft_s
    assert evaluate(masked, hardware).tpot_s == evaluate(query, hardware).tpot_s


def test_a_later_turn_attends_to_what_an_earlier_one_kept():
    hardware = load_hardware(A100)
    query = built()
    question = Turn(0.0, 40.0, 16.0, prefix_tokens=3264.0)
    chat = replace(query, turns=(*query.turns, question))
    kept = KVEvict(keep=0.2).apply(chat).without_overheads()
    times = [evaluate(q, hardware).turns[1] for q in (chat, kept)]
    assert times[1].prefill_s < times[0].prefill_s
    assert times[1].decode_step_s < times[0].decode_step_s
    token = 28 * 2 * 512 * 2
    full, less = (evaluate(q, hardware).memory.kv_bytes for q in (chat, kept))
    assert full - less == pytest.approx(0.8 * 3240 * token, rel=0.01)  # what both turns brought, in blocks


def test_part_of_the_heads_can_keep_everything():
    query, hardware = built(), load_hardware(A100)
    half = KVEvict(keep=0.2, head_share=0.5).apply(query)
    assert [e.mixer.kv_heads for e in half.kv] == [2, 2]
    full, less = bill(query, hardware), bill(half.without_overheads(), hardware)
    assert less["kv_bytes"] == pytest.approx(full["kv_bytes"] * 0.6, rel=0.02)
    assert less["decode_traffic"] < full["decode_traffic"]
    hybrid = KVRetrieve(read=0.1, placement="host", spare_evicted=True).apply(half)
    assert evaluate(hybrid, hardware).memory.host_kv_bytes == pytest.approx(3000 * QWEN_TOKEN_BYTES / 2, rel=0.01)
    assert len(hybrid.kv) == 3  # the evicted heads, the other heads' copy, and their archive
    with pytest.raises(ValueError, match="takes 2 of 4 key heads, and 4 devices"):
        KVEvict(keep=0.2, head_share=0.5).apply(built(parallelism=Parallelism(tp=4)))


# Quantisation


@pytest.mark.parametrize(
    ("technique", "share"),
    [
        (KVQuantize(key_bits=4, value_bits=4), 5 / 16),  # P8: group 32 with scale and zero point is one bit more
        (KVQuantize(key_bits=2, value_bits=2), 3 / 16),  # AKVQ-VL, where all are at two bits
        (KVQuantize(key_bits=1.5, value_bits=1.58), (1.54 + 1) / 16),  # VidKV: keys 1.5, values 1.58, group 32
        (KVQuantize(key_bits=1, value_bits=1, group=0), 1 / 16),  # CalibQuant: scales by channel
        (KVQuantize(key_bits=4, value_bits=4, group=64), 4.5 / 16),
        (KVQuantize(key_bits=8, value_bits=8), 8 / 16),
        (KVQuantize(key_bits=16, value_bits=2), (16 + 3) / 32),
    ],
)
def test_bits_and_scales_add_up(technique, share):
    query, hardware = built(), load_hardware(A100)
    full, less = (evaluate(q, hardware) for q in (query, technique.apply(query)))
    assert less.memory.kv_bytes == pytest.approx(full.memory.kv_bytes * share)
    written = 63 * QWEN_TOKEN_BYTES
    read, fewer = (p.stages["decode"].kv_bytes - written for p in (full, less))
    assert fewer == pytest.approx(read * share, rel=1e-9)
    assert less.max_batch > 1.2 * full.max_batch / (0.4 + share)  # throughput comes from the freed memory


def test_quantising_is_what_the_precision_option_does():
    hardware = load_hardware(A100)
    for bits in (4, 8):
        option = evaluate(built(precision=Precision(kv_bits=bits)), hardware)
        technique = KVQuantize(key_bits=bits, value_bits=bits).apply(built())
        assert evaluate(technique, hardware).memory.kv_bytes == pytest.approx(option.memory.kv_bytes)
        assert evaluate(technique.without_overheads(), hardware).tpot_s == pytest.approx(option.tpot_s, rel=1e-3)
    narrow = built(precision=Precision(kv_bits=2))
    assert KVQuantize(key_bits=4, value_bits=4).apply(narrow).kv[0] is narrow.kv[0]


def test_a_residual_window_stays_at_full_width():
    query, hardware = built(), load_hardware(A100)
    main, last = KVQuantize(key_bits=2, value_bits=2, residual_tokens=128).apply(query).kv
    assert (main.bits, last.bits) == (2, 16)
    memory = evaluate(replace(query, kv=(main, last)), hardware).memory.kv_bytes
    expected = (3264 - 128) * QWEN_TOKEN_BYTES * 3 / 16 + 128 * QWEN_TOKEN_BYTES
    assert memory == pytest.approx(expected)
    windowed = KVQuantize(key_bits=2, value_bits=2, residual_tokens=128).apply(built(SLIDING)).kv
    assert {e.mixer.window for e in windowed if e.grows} == {1024 - 128, 1e18}


def test_visual_tokens_alone_are_two_entries():
    query, hardware = built(), load_hardware(A100)
    visual, rest = KVQuantize(key_bits=4, value_bits=4, visual_only=True).apply(query).kv
    assert (visual.bits, visual.grows, rest.bits, rest.grows) == (4, False, 16, True)
    memory = evaluate(replace(query, kv=(visual, rest)), hardware).memory.kv_bytes
    assert memory == pytest.approx((3000 * 5 / 16 + 272) * QWEN_TOKEN_BYTES)  # 264 others in blocks of 16


def test_unfused_widening_moves_the_cache_three_times():
    query, hardware = built(batch=8.0), load_hardware(A100)
    fused, unfused = (
        evaluate(KVQuantize(key_bits=4, value_bits=4, fused=f).apply(query), hardware) for f in (True, False)
    )
    plain = evaluate(query, hardware)
    written = 63 * 8 * QWEN_TOKEN_BYTES
    reads = [p.stages["decode"].kv_bytes - written for p in (plain, fused, unfused)]
    assert reads[1] == pytest.approx(reads[0] * 5 / 16, rel=1e-9)
    assert reads[2] == pytest.approx(reads[0] * (5 + 16 + 16) / 16, rel=1e-9)
    assert fused.tpot_s < plain.tpot_s < unfused.tpot_s
    assert unfused.memory.prefill_activation_bytes > fused.memory.prefill_activation_bytes


def test_transforms_cost_work_and_an_inverse_only_for_fourier():
    query, hardware = built(), load_hardware(A100)
    none, hadamard, fourier = (
        KVQuantize(key_bits=2, value_bits=2, transform=t).apply(query) for t in ("none", "hadamard", "fft")
    )
    assert none.overheads[0].stage == "prefill"
    assert len(none.overheads) == 1  # nothing is added to a fused step
    steps = [sum(o.flops * o.repeats for o in q.overheads[1].operators) for q in (hadamard, fourier)]
    reads = float(none.kv[0].mean_reads(3200.0, 63.0))
    assert steps[0] == pytest.approx(28 * 7 * (2 * 512 + 3584))
    assert steps[1] == pytest.approx(28 * 2.5 * 7 * 512 * (1 + reads))
    assert evaluate(hadamard, hardware).ttft_s > evaluate(none, hardware).ttft_s


# Retrieval


# ReKV on LLaVA-OneVision-7B: 64 frames of 196 tokens are 0.72 GB, about 29 ms at 25 GB/s of PCIe 4.
def test_rekv_fetches_64_frames_in_29_ms():
    hardware = load_hardware(A100)
    assert hardware.host_link().bandwidth_bytes_per_s * 0.78 == pytest.approx(25e9, rel=0.01)
    query = built("llava-onevision-7b", visual=600 * 196.0, text=50.0)
    technique = KVRetrieve(tokens=64 * 196.0, placement="host", during_prefill=True)
    (fetch,) = (
        o
        for overhead in technique.apply(query).overheads
        if overhead.hidden
        for o in overhead.operators
        if "fetch" in o.name
    )
    assert fetch.link_bytes * fetch.repeats == pytest.approx(64 * 196 * QWEN_TOKEN_BYTES)
    assert fetch.link_bytes * fetch.repeats / 1e9 == pytest.approx(0.72, abs=0.005)
    starts = fetch.repeats * 1.5e-5
    assert float(operator_s(fetch, kernels_of(query, hardware))) == pytest.approx(0.029 + starts, rel=0.03)


# ReKV keeps 18.8 GiB of keys and values for an hour of video at 0.5 frames a second.
def test_rekv_keeps_18_8_gib_an_hour_on_the_host():
    query = built("llava-onevision-7b", visual=600 * 196.0, text=50.0)
    technique = KVRetrieve(tokens=64 * 196.0, placement="host", during_prefill=True)
    stream = streaming(technique.apply(query), load_hardware(A100), frames=600.0)
    assert stream.host_kv_bytes_per_frame * 0.5 * 3600 / 2**30 == pytest.approx(18.8, abs=0.05)


def test_retrieval_keeps_everything_and_reads_a_part():
    query, hardware = built(), load_hardware(A100)
    full = bill(query, hardware)
    for placement in ("gpu", "host"):
        changed = KVRetrieve(tokens=500.0, placement=placement).apply(query)
        p = evaluate(changed, hardware)
        near, archive = changed.kv
        assert (archive.placement, archive.is_read, near.grows) == (placement, False, True)
        reads = float(near.mean_reads(500.0 + 200.0, 63.0))
        written = 63 * QWEN_TOKEN_BYTES
        assert p.stages["decode"].kv_bytes == pytest.approx(63 * reads * QWEN_TOKEN_BYTES + written, rel=1e-9)
        kept = p.memory.kv_bytes + p.memory.host_kv_bytes
        copies = 500 * QWEN_TOKEN_BYTES if placement == "host" else 0.0
        assert kept == pytest.approx(full["kv_bytes"] + copies, rel=0.01)
        assert p.tpot_s < full["tpot_s"]
    assert len(evaluate(changed, hardware).stages["decode"].operators) == len(
        evaluate(query, hardware).stages["decode"].operators
    )  # an archive runs no kernel


def test_the_device_holds_all_until_prefill_ends_unless_it_leaves_meanwhile():
    query, hardware = built(visual=50_000.0, output=1.0), load_hardware(A100)
    after, during = (
        KVRetrieve(tokens=1000.0, placement="host", during_prefill=d).apply(query).without_overheads()
        for d in (False, True)
    )
    memories = [evaluate(q, hardware).memory for q in (query, after, during)]
    peaks = [m.kv_bytes + m.prefill_activation_bytes for m in memories]  # encoding needs more here, at another time
    assert peaks[1] == pytest.approx(peaks[0], rel=1e-3)
    assert peaks[1] - peaks[2] == pytest.approx(49_000 * QWEN_TOKEN_BYTES, rel=1e-3)


def test_copies_beside_the_layers_cost_less_than_copies_before_them():
    query, hardware = built(visual=30_000.0), load_hardware(A100)
    beside, before = (
        evaluate(KVRetrieve(read=0.4, placement="host", overlap=o).apply(query), hardware) for o in (True, False)
    )
    assert beside.ttft_s < before.ttft_s
    each_step = KVRetrieve(read=0.4, placement="host", each="step", overlap=False).apply(query)
    assert evaluate(each_step, hardware).tpot_s > 3 * before.tpot_s
    assert overhead_s(each_step, hardware, stage="decode") > 0


def test_scores_are_queries_times_chunks_in_every_layer():
    changed = KVRetrieve(read=0.1, chunk_tokens=100.0).apply(built())
    product = next(o for overhead in changed.overheads for o in overhead.operators if o.name == "retrieve.scores")
    assert product.flops * product.repeats == pytest.approx(2 * 200 * 30 * 3584 * 28)
    step = KVRetrieve(read=0.1, chunk_tokens=100.0, each="step").apply(built())
    product = next(o for o in step.overheads[1].operators if o.name == "retrieve.scores")
    assert product.flops * product.repeats == pytest.approx(2 * 1 * 30 * 3584 * 28)
    gathers = [o.name for overhead in step.overheads for o in overhead.operators if "gather" in o.name]
    assert not gathers  # a kernel reads chosen pages where they are


def test_an_external_retriever_takes_time_and_memory():
    query, hardware = built(), load_hardware(A100)
    own = KVRetrieve(read=0.1, placement="host")
    other = replace(own, scorer="external", retriever_flops=2e13, retriever_bytes=17e9)
    one, two = (evaluate(t.apply(query), hardware) for t in (own, other))
    assert two.ttft_s > one.ttft_s + 0.05
    assert two.memory.peak_bytes - one.memory.peak_bytes == pytest.approx(17e9, rel=0.01)  # ReKV: 17 GB more


def test_retrieval_without_tokens_to_choose_is_refused():
    with pytest.raises(Unsupported, match="finds no layer"):
        KVRetrieve(read=0.1).apply(build_query(load_model(GROUPED), Workload(text_tokens=500), engine_of("fused")))
    streamed = StreamState(visual_window_tokens=1000.0).apply(built())
    with pytest.raises(Unsupported, match="before a stream's window"):
        KVRetrieve(read=0.1).apply(streamed)


# Streams

# StreamingVLM: a sink and a window of 512 text tokens each, 16 seconds at 2 frames a second, chunks of a second.
FRAME = 196.0
STREAMING_VLM = StreamState(
    sink_tokens=512.0, text_window=512.0, visual_window_tokens=32 * FRAME, chunk_tokens=2 * FRAME, name="streamingvlm"
)


def video(frames, *, name="llava-onevision-7b", engine="fused", **settings_):
    return built(name, engine=engine, visual=frames * FRAME, text=50.0, output=100.0, **settings_)


def test_streamingvlm_holds_its_windows_however_long_the_video():
    hardware = load_hardware(H100)
    state = 512 + 512 + 16 * 2 * FRAME
    assert STREAMING_VLM.state_tokens == state
    short, long = (streaming(STREAMING_VLM.apply(video(n)), hardware, frames=n) for n in (600.0, 7200.0))
    for stream in (short, long):
        assert stream.is_bounded
        assert stream.state_tokens == state
        assert stream.kv_bytes == pytest.approx(state * QWEN_TOKEN_BYTES)
        assert stream.kv_bytes_after(24.0, frames_per_s=2.0) == stream.kv_bytes
        assert stream.frames_per_chunk == 2
        assert stream.keeps_up(2.0)
    assert long.frames_per_s == pytest.approx(short.frames_per_s, rel=1e-3)
    assert long.token_s == pytest.approx(short.token_s, rel=1e-9)


def test_a_stream_without_a_state_grows_and_slows():
    hardware = load_hardware(H100)
    short, long = (streaming(video(n), hardware, frames=n, chunk_frames=2.0) for n in (100.0, 1000.0))
    assert not short.is_bounded
    assert short.kv_bytes_per_frame == pytest.approx(FRAME * QWEN_TOKEN_BYTES)
    assert long.kv_bytes - short.kv_bytes == pytest.approx(900 * short.kv_bytes_per_frame, rel=1e-3)
    assert long.frames_per_s < short.frames_per_s
    assert long.token_s > short.token_s


def test_a_chunk_is_its_tokens_against_the_state():
    engine, chunk = counting_engine("kernel"), 2 * FRAME
    state = STREAMING_VLM.state_tokens
    before, after = (
        stage_flops(STREAMING_VLM.apply(video(n, engine=engine)).without_overheads(), "prefill") for n in (400, 402)
    )
    spec = load_model("llava-onevision-7b").decoder.runs[0].layer
    linear = chunk * 2 * (spec.parameters - spec.width * 2 - spec.mixer.q_width - 2 * spec.mixer.kv_width)
    pairs = chunk * (state + chunk)
    expected = 28 * (linear + 4 * pairs * spec.mixer.q_width)
    assert after - before == pytest.approx(expected, rel=0.01)  # c f_lin + 2 c (w + c) d, products counted twice


# StreamingVLM's figure: a window that is computed again takes 0.25 to 0.41 s a token where a kept one takes 0.05.
def test_computing_the_window_again_costs_its_length_for_every_token():
    hardware = load_hardware(H100)
    query = video(600.0)
    kept = streaming(STREAMING_VLM.apply(query), hardware, frames=600.0)
    again = streaming(replace(STREAMING_VLM, recompute=True).apply(query), hardware, frames=600.0)
    wider = replace(STREAMING_VLM, recompute=True, visual_window_tokens=2 * 32 * FRAME)
    twice = streaming(wider.apply(query), hardware, frames=600.0)
    assert 0.1 < again.token_s - kept.token_s < 0.41
    ratio = (twice.token_s - kept.token_s) / (again.token_s - kept.token_s)
    assert ratio == pytest.approx(wider.state_tokens / STREAMING_VLM.state_tokens, rel=0.15)
    assert again.frames_per_s < kept.frames_per_s
    assert again.kv_bytes == kept.kv_bytes


def test_retrieval_before_the_window_keeps_an_archive_on_the_host():
    hardware, query = load_hardware(A100), video(3600.0)
    rekv = KVRetrieve(tokens=64 * FRAME, placement="host", during_prefill=True).apply(query)
    stream = streaming(
        StreamState(visual_window_tokens=15_000.0, chunk_tokens=FRAME).apply(rekv), hardware, frames=3600.0
    )
    assert stream.is_bounded
    assert stream.host_kv_bytes == pytest.approx(3600 * FRAME * QWEN_TOKEN_BYTES, rel=1e-3)
    assert stream.host_kv_bytes_per_frame == pytest.approx(FRAME * QWEN_TOKEN_BYTES)
    assert stream.question_s > 0.028  # the frames come over the link


def test_a_bounded_state_never_costs_more_memory_or_a_slower_step():
    hardware = load_hardware(A100)
    for name in (MULTI_HEAD, GROUPED, SLIDING, LATENT, "qwen3.5-35b-a3b"):
        query = built(name, visual=20_000.0)
        full, less = (bill(q, hardware) for q in (query, STREAMING_VLM.apply(query).without_overheads()))
        for field in ("kv_bytes", "peak_bytes", "tpot_s", "prefill_flops"):
            assert less[field] <= full[field] * (1 + 1e-9), (name, field)
    with pytest.raises(Unsupported, match="keeps pictures in cross-attention"):
        STREAMING_VLM.apply(built(CROSS))


def test_streaming_asks_for_what_it_needs():
    query = video(10.0)
    with pytest.raises(ValueError, match="needs a device"):
        streaming(query, frames=10.0)
    with pytest.raises(ValueError, match="one request with a video"):
        streaming(
            build_query(load_model(GROUPED), Workload(text_tokens=9), engine_of("fused")),
            load_hardware(A100),
            frames=1.0,
        )
    with pytest.raises(ValueError, match="chunk_frames=50"):
        streaming(query, load_hardware(A100), frames=10.0, chunk_frames=50)
    prediction = predict("llava-onevision-7b", A100, images((640, 480)))
    assert streaming(prediction, frames=1.0).frames_per_s > 0


# Together


def test_eviction_and_quantisation_multiply_through_the_state():
    query, hardware = built(), load_hardware(A100)
    both = KVQuantize(key_bits=4, value_bits=4).apply(KVEvict(keep=0.25).apply(query))
    full = evaluate(query, hardware).memory.kv_bytes
    kept = 0.25 * 3200 + 64
    assert evaluate(both, hardware).memory.kv_bytes == pytest.approx(kept * QWEN_TOKEN_BYTES * 5 / 16)
    assert full == pytest.approx(3264 * QWEN_TOKEN_BYTES)
