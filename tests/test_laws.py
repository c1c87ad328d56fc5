"""Laws of the cost model, whatever its numbers: sweeps, monotony, conservation, and two ways to the same time."""

import copy
import dataclasses
import functools
import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from costmodel import (
    Image,
    Parallelism,
    Precision,
    Unsupported,
    Workload,
    build_query,
    compose,
    engine_names,
    evaluate,
    hardware_names,
    load_engine,
    load_hardware,
    load_model,
    predict,
    technique,
)
from costmodel.conventions import prefill_flops
from costmodel.counts import count, counting_engine, stage_flops
from costmodel.evaluate import Evaluator, kernels_of
from costmodel.hardware import PRECISIONS_BY_BITS
from costmodel.operators import Kind, Operator
from costmodel.priced import operator_s
from costmodel.priced import priced as priced_table
from costmodel.query import KVEntry, Overhead, Query, Segment, Turn
from costmodel.stages import DEVICE_STAGES, WORKS, Structure, Sums, cached_reads, operators
from costmodel.stages import Work as StageWork
from costmodel.sums import (
    adapt_points,
    decode_points,
    decode_steps,
    encode_points,
    prefill_points,
    prompt_in_cache,
    touched_share,
)
from costmodel.units import UNBOUNDED
from tests.helpers import POINT, images
from tests.kinds import DENSE, KINDS, LATENT

A100, H100 = "a100-sxm4-80gb", "h100-sxm5-80gb"
SHARED = (
    Parallelism(),
    Parallelism(tp=2, encoder_tp=1),
    Parallelism(tp=4, dp=3),
    Parallelism(tp=2, pp=2, encoder_dp=2),
    Parallelism(tp=2, dp=2, ep=4, encoder_tp=2, expert_imbalance=1.5),
)
STAGES = ("preprocess", "encode", "adapt", "prefill", "decode")

names = st.sampled_from(KINDS)
devices = st.sampled_from([A100, "h200-sxm-141gb", "l40s-48gb", "cpu-epyc-9654"])
engines = st.sampled_from(engine_names())
counts = st.integers(1, 40_000)
outputs = st.integers(1, 3000)
batches = st.integers(1, 64)
sizes = st.tuples(st.integers(20, 2500), st.integers(20, 2500))
precisions = st.sampled_from([Precision(), Precision(weight_bits=8), Precision(4, 16, 8), Precision(8, 8, 4)])


def law(n_examples):
    """Return the settings of a law: the same examples every time, no clock."""
    return settings(max_examples=n_examples, deadline=None, derandomize=True, database=None)


def close(value, other):
    return value == pytest.approx(other, **POINT)


def never_less(larger, smaller):
    """Return whether nothing got cheaper, rounding aside."""
    return np.all(np.asarray(larger) >= np.asarray(smaller) * (1 - 1e-12))


# A sweep equals its points

SHAPES = st.sampled_from([(), (1,), (3,), (2, 1), (2, 3), (4, 1, 1)])


@st.composite
def quantities(draw, low, high):
    """Return a number, or an array of a shape that broadcasts with the others."""
    shape = draw(SHAPES)
    flat = draw(st.lists(st.integers(low, high), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    return np.array(flat, dtype=float).reshape(shape) if shape else float(flat[0])


def settled(value, shape, index):
    """Return the number that a quantity has at a point of a sweep."""
    return float(np.broadcast_to(value, shape)[index])


@law(200)
@given(
    name=names,
    device=devices,
    engine=engines,
    visual=quantities(0, 40_000) | st.none(),
    text=quantities(1, 20_000),
    output=quantities(1, 2000),
    batch=quantities(1, 300),
    precision=precisions,
)
def test_a_sweep_equals_its_points(*, name, device, engine, visual, text, output, batch, precision):
    assume(not (device == "cpu-epyc-9654" and precision.activation_bits == 4))
    settings_ = {"engine": engine, "precision": precision}
    sweep = predict(
        name,
        device,
        Workload(visual_tokens=visual, text_tokens=text, output_tokens=output),
        batch=batch,
        **settings_,
    )
    shape = np.broadcast_shapes(*(np.shape(value) for value in (visual, text, output, batch) if value is not None))
    assert np.shape(sweep.ttft_s) == np.shape(sweep.tpot_s) == np.shape(sweep.total_s) == shape
    for index in np.ndindex(shape):
        seen = None if visual is None else settled(visual, shape, index)
        workload = Workload(
            visual_tokens=seen, text_tokens=settled(text, shape, index), output_tokens=settled(output, shape, index)
        )
        point = predict(name, device, workload, batch=settled(batch, shape, index), **settings_)
        for field in ("ttft_s", "tpot_s", "total_s"):
            assert np.asarray(getattr(sweep, field))[index] == pytest.approx(getattr(point, field), **POINT), field


@law(60)
@given(
    name=names,
    pictures=st.lists(sizes, min_size=1, max_size=3),
    text=quantities(1, 20_000),
    batch=quantities(1, 300),
    parallelism=st.sampled_from(SHARED),
)
def test_a_sweep_on_several_devices_equals_its_points(*, name, pictures, text, batch, parallelism):
    assume(parallelism.ep == 1 or load_model(name).routing)
    settings_ = {"parallelism": parallelism, "engine": "fused"}
    sweep = predict(name, H100, images(*pictures, text_tokens=text), batch=batch, **settings_)
    shape = np.broadcast_shapes(np.shape(text), np.shape(batch))
    for index in np.ndindex(shape):
        workload = images(*pictures, text_tokens=settled(text, shape, index))
        point = predict(name, H100, workload, batch=settled(batch, shape, index), **settings_)
        for field in ("ttft_s", "tpot_s", "total_s"):
            assert np.asarray(getattr(sweep, field))[index] == pytest.approx(getattr(point, field), **POINT), field


def test_a_sweep_over_several_blocks_equals_its_points():
    visual, text = np.arange(1.0, 30_002.0, 2.5), np.array([[7.0], [900.0]])
    sweep = predict(
        "qwen2.5-vl-7b", H100, Workload(visual_tokens=visual, text_tokens=text, output_tokens=visual + text), batch=3
    )
    assert sweep.ttft_s.size > 2 * 8192
    for row, column in [(0, 0), (0, 8191), (0, 8192), (1, 0), (1, 4383), (1, 4384), (1, visual.size - 1)]:
        words = text[row, 0]
        at = Workload(visual_tokens=visual[column], text_tokens=words, output_tokens=visual[column] + words)
        point = predict("qwen2.5-vl-7b", H100, at, batch=3)
        for field in ("ttft_s", "tpot_s", "total_s"):
            assert close(getattr(sweep, field)[row, column], getattr(point, field))


def test_a_sweep_beside_pictures_equals_its_points():
    text, batch = np.array([10.0, 9000.0]), np.array([[1.0], [40.0]])
    sweep = predict("internvl3-8b", A100, images((640, 480), (99, 800), text_tokens=text), batch=batch)
    for (i, b), (j, t) in [((i, b), (j, t)) for i, b in enumerate(batch[:, 0]) for j, t in enumerate(text)]:
        point = predict("internvl3-8b", A100, images((640, 480), (99, 800), text_tokens=t), batch=b)
        assert close(sweep.ttft_s[i, j], point.ttft_s)
        assert close(sweep.total_s[i, j], point.total_s)


def test_a_sweep_offers_no_more_than_times_and_says_so():
    sweep = predict("llava-1.5-7b", A100, Workload(text_tokens=np.array([1.0, 2.0])))
    with pytest.raises(ValueError, match="sweep"):
        _ = sweep.stages


# More never costs less


@dataclass(frozen=True)
class Bill:
    """What a prediction costs in all: the energy of the whole batch, not of one request."""

    ttft_s: float
    tpot_s: float
    total_s: float
    energy_j: float
    peak_bytes: float
    flops: float
    traffic_bytes: float

    @staticmethod
    def of(p, batch):
        flops = sum(stage.flops for stage in p.stages.values())
        traffic = sum(stage.bytes for stage in p.stages.values())
        return Bill(p.ttft_s, p.tpot_s, p.total_s, p.energy_j * batch, p.memory.peak_bytes, flops, traffic)


def assert_dearer(larger, smaller, *fields):
    for field in fields or [f.name for f in dataclasses.fields(Bill)]:
        assert never_less(getattr(larger, field), getattr(smaller, field)), field


def bill(name, device, engine, *, visual, text, output, batch, parallelism=None):
    workload = Workload(visual_tokens=visual, text_tokens=text, output_tokens=output)
    return Bill.of(predict(name, device, workload, batch=batch, engine=engine, parallelism=parallelism), batch)


@law(400)
@given(
    name=names,
    device=devices,
    engine=engines,
    visual=st.integers(0, 40_000),
    text=counts,
    output=outputs,
    batch=batches,
    what=st.sampled_from(["visual", "text", "output", "batch"]),
    more=st.integers(1, 20_000),
)
def test_more_never_costs_less(*, name, device, engine, visual, text, output, batch, what, more):
    start = {"visual": float(visual), "text": text, "output": output, "batch": batch}
    end = start | {what: start[what] + (1 + more % 50 if what == "batch" else more)}
    assert_dearer(bill(name, device, engine, **end), bill(name, device, engine, **start))


@law(150)
@given(
    name=names,
    engine=engines,
    visual=st.integers(0, 40_000),
    text=counts,
    output=outputs,
    batch=batches,
    what=st.sampled_from(["visual", "text", "output", "batch"]),
    more=st.integers(1, 20_000),
    parallelism=st.sampled_from(SHARED),
)
def test_more_never_costs_less_on_several_devices(
    *, name, engine, visual, text, output, batch, what, more, parallelism
):
    assume(parallelism.ep == 1 or load_model(name).routing)
    start = {"visual": float(visual), "text": text, "output": output, "batch": batch}
    end = start | {what: start[what] + (1 + more % 50 if what == "batch" else more)}
    dear, cheap = (bill(name, H100, engine, parallelism=parallelism, **of) for of in (end, start))
    assert_dearer(dear, cheap, "ttft_s", "tpot_s", "total_s", "energy_j", "peak_bytes")


@law(100)
@given(names, engines, st.lists(sizes, max_size=3), sizes, batches)
def test_another_image_always_costs_more(name, engine, before, added, batch):
    few = predict(name, H100, images(*before), batch=batch, engine=engine)
    many = predict(name, H100, images(*before, added), batch=batch, engine=engine)
    for kinds in (("patches",), ("visual", "cross"), ("prompt",)):  # what cross-attention sees is in no prompt
        assert sum(many.tokens[kind] for kind in kinds) > sum(few.tokens[kind] for kind in kinds)
    assert_dearer(Bill.of(many, batch), Bill.of(few, batch))
    for stage in ("encode", "prefill", "decode"):
        if engine != "paper" or stage == "prefill":  # Eq. 3 has no bytes, and the FLOPs of Eq. 6 are the weights'
            assert many.stages[stage].flops > few.stages[stage].flops, stage
            assert many.stages[stage].bytes > few.stages[stage].bytes, stage


@law(200)
@given(
    name=names,
    device=devices,
    engine=engines,
    visual=st.integers(0, 30_000),
    text=counts,
    output=outputs,
    batch=batches,
)
def test_ideal_is_never_slower(*, name, device, engine, visual, text, output, batch):
    assume(engine != "paper")  # its prefill is attention alone
    settings_ = {"visual": float(visual), "text": text, "output": output, "batch": batch}
    fields = ("ttft_s", "tpot_s", "total_s")
    assert_dearer(bill(name, device, engine, **settings_), bill(name, device, "ideal", **settings_), *fields)


@law(200)
@given(
    name=names,
    device=st.sampled_from([A100, "l40s-48gb"]),
    engine=engines,
    key=st.sampled_from(
        ["memory_bandwidth_bytes_per_s", "peak_flops_per_s.bf16", "clock_hz", "links.pcie.bandwidth_bytes_per_s"]
    ),
    factor=st.floats(1.0, 50.0),
    text=counts,
    batch=batches,
)
def test_faster_hardware_is_never_slower(*, name, device, engine, key, factor, text, batch):
    base = load_hardware(device)
    value = factor * dict(base.numbers())[key]
    faster = load_hardware(f"{device}:{key}={value!r}")
    workload = images((900, 600), text_tokens=text)
    slow = predict(name, base, workload, batch=batch, engine=engine)
    fast = predict(name, faster, workload, batch=batch, engine=engine)
    for field in ("ttft_s", "tpot_s", "total_s"):
        assert never_less(getattr(slow, field), getattr(fast, field)), field


WAVES = 0.9
"""A product cut into chunks may fill its waves of thread blocks better, and stay below the power limit: not by much."""


@law(100)
@given(names, st.integers(1, 100_000), batches, st.sampled_from([64, 512, 2048, 8192]))
def test_chunks_never_save_traffic_or_time(name, text, batch, chunk):
    engine = load_engine("fused")
    whole = engine.model_copy(update={"prefill_chunk_tokens": UNBOUNDED})
    chunked = engine.model_copy(update={"prefill_chunk_tokens": float(chunk)})
    one, many = (
        predict(name, H100, Workload(text_tokens=text), batch=batch, engine=e).stages["prefill"]
        for e in (whole, chunked)
    )
    assert never_less(many.bytes, one.bytes)
    assert never_less(many.time_s, one.time_s * WAVES)
    assert many.flops == pytest.approx(one.flops, rel=1e-9)
    if text * batch > chunk:
        assert many.weight_bytes > one.weight_bytes


# The direct path equals the compiled one

N_SCALARS = len(dataclasses.fields(Sums)) - 1  # all but the works
N_COLUMNS = len(dataclasses.fields(StageWork)) - 1  # all but the passes, which are those of the sums
LISTS = {"encode": encode_points, "adapt": adapt_points, "prefill": prefill_points}
WIDTHS = (Precision(), Precision(4, 16, 8), Precision(8, 8, 2), Precision(8, 16, 16), Precision(32, 32, 16))
SAMPLE = (A100, "h200-sxm-141gb", "cpu-epyc-9654", "mi300x-192gb", "gaudi3-128gb", "tpu-v5e-16gb", "jetson-thor-128gb")
"""One device a maker and a kind: with and without fp8, int8 and fp4, with a link for two, for 256, for none."""


def summed(column):
    """Return the sums of a point from the column that the compiled path multiplies with."""
    scalars, rest = column[:N_SCALARS], column[N_SCALARS:]
    works = tuple(StageWork(scalars[0], *rest[i : i + N_COLUMNS]) for i in range(0, len(rest), N_COLUMNS))
    return Sums(*scalars, works)


def direct_s(query, hardware, stage, points):
    """Return the time of a stage from its list of operators, point by point: no less than the host issues them in."""
    evaluator = Evaluator.of(query, hardware)
    times, floor = [], evaluator.host_floor_s(stage, points)
    floors = [0.0] * points.sums.shape[1] if floor is None else floor.tolist()
    for column, least in zip(points.sums.T.tolist(), floors, strict=True):
        sums = summed(column)
        assert len(sums.works) == Structure.of(query).n_works(stage)
        assert [float(value) for value in sums.flat()] == column
        kernels = kernels_of(query, hardware)
        total = sum(operator_s(o, kernels) for o in operators(query, stage, sums))
        cache = cached_reads(evaluator.structure, sums.works, stage) if evaluator.adds_to_host(stage) else []
        beyond = sum(operator_s(o, kernels) for o in cache)
        times.append(max(total - beyond, least) + beyond)
    return times


def assert_paths_agree(query, hardware):
    structure, evaluator, turn = Structure.of(query), Evaluator.of(query, hardware), query.turns[0]
    times = evaluator.turn(turn)
    hosts_s = {stage: evaluator.host_s(stage) for stage in ("prefill", "decode")}
    for stage in DEVICE_STAGES:
        if stage == "decode":
            points, expected = decode_points(query, structure, turn, detailed=False), times.decode_step_s
            weights = [1.0]
        else:
            points, expected = LISTS[stage](query, structure, turn), getattr(times, f"{stage}_s")
            weights = [float(n) for n in points.counts]
        direct = sum(w * t for w, t in zip(weights, direct_s(query, hardware, stage, points), strict=True))
        found = float(np.squeeze(expected)) - hosts_s.get(stage, 0.0)
        assert found == pytest.approx(direct, rel=1e-12, abs=1e-18), stage


def is_able(name, hardware, precision, parallelism):
    """Return whether a device has the matrix units and the link, and a model the experts, that a setting needs."""
    units = set(PRECISIONS_BY_BITS[precision.activation_bits]) & set(hardware.peak_flops_per_s)
    widest = max(parallelism.tp * parallelism.pp, parallelism.ep)
    joined = max((link.devices for link in hardware.links), default=1)
    return units and widest <= joined and (parallelism.ep == 1 or load_model(name).routing)


@pytest.mark.parametrize("engine", engine_names())
@pytest.mark.parametrize("device", SAMPLE)
@pytest.mark.parametrize("name", KINDS)
def test_direct_and_compiled_paths_agree(name, device, engine):
    hardware, model = load_hardware(device), load_model(name)
    pictures = images((640, 480), (1500, 900), text_tokens=5000, output_tokens=77)
    tried = 0
    for i, parallelism in enumerate(SHARED):
        for precision in (WIDTHS[0], WIDTHS[1 + i % 4], WIDTHS[1 + (i + 1) % 4]):
            if is_able(name, hardware, precision, parallelism):
                settings_ = {"batch": 3, "precision": precision, "parallelism": parallelism}
                assert_paths_agree(build_query(model, pictures, load_engine(engine), **settings_), hardware)
                tried += 1
    assert tried


@pytest.mark.parametrize("device", hardware_names())
def test_direct_and_compiled_paths_agree_on_every_device(device):
    hardware = load_hardware(device)
    assert_paths_agree(build_query(load_model(LATENT), images((640, 480)), load_engine("fused"), batch=3), hardware)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("convention", ["torch", "kernel"])
def test_direct_and_compiled_paths_agree_on_what_is_counted(name, convention):
    query = build_query(load_model(name), images((640, 480)), counting_engine(convention), batch=3)
    assert_paths_agree(query, load_hardware(A100))


def edited(query):
    """Return a query with its layers split, thinned and sparse, and its caches cut and quantised."""
    first, *others = query.decoder
    rest = tuple(replace(segment, visual_keep=0.4, text_keep=0.9, density=0.3) for segment in others)
    eager = replace(first, n_layers=first.n_layers + 5, visual_keep=0.1, implementation="eager")
    narrow, *entries = query.kv
    cached = tuple(replace(e, bits=4, read_share=0.5, fixed_tokens=e.fixed_tokens + 8) for e in entries)
    thinned = tuple(replace(s, visual_keep=0.5, implementation="eager") for s in query.encoder)
    kept = (replace(narrow, n_layers=3, visual_share=0.2), replace(narrow, bits=8))
    return replace(query, decoder=(first, eager, *rest), kv=(*kept, *cached), encoder=thinned)


@pytest.mark.parametrize("name", KINDS)
def test_direct_and_compiled_paths_agree_on_edited_queries(name):
    query = build_query(load_model(name), images((1500, 900)), load_engine("fused"), batch=2)
    assert_paths_agree(edited(query), load_hardware(A100))


def test_direct_and_compiled_paths_agree_on_windows_of_our_own():
    query = build_query(load_model("qwen2.5-vl-7b"), images((1500, 900)), load_engine("fused"), batch=2)
    first, entry = query.decoder[0], query.kv[0]
    windowed = replace(first.layer, mixer=replace(first.layer.mixer, window=300.0))
    segments = (replace(first, n_layers=8), Segment(20, windowed, visual_keep=0.1, text_keep=0.5, density=0.3))
    entries = (replace(entry, n_layers=8), replace(entry, n_layers=20, mixer=windowed.mixer, bits=4))
    assert_paths_agree(replace(query, decoder=segments, kv=entries), load_hardware(A100))


TRACE = {
    "model_type": "lvlm-trace",
    "schema_version": 1,
    "decoder": {
        "width": 512,
        "parameters": 10_000_000,
        "vocabulary": 1000,
        "end_parameters": 512_512,
        "cached_width": 2048,
        "products": [
            {"name": "qkv", "d_in": 512, "d_out": 1536, "rows_ratio": 1.0, "repeats": 4},
            {"name": "experts", "d_in": 512, "d_out": 256, "rows_ratio": 2.0, "repeats": 4, "experts": 8},
        ],
        "attentions": [{"heads": 8, "qk_dim": 64, "v_dim": 32, "pairs_ratio": 0.5, "repeats": 4}],
    },
    "vision": {
        "width": 256,
        "parameters": 1_000_000,
        "rows": 400,
        "side_px": 280,
        "visual_tokens": 100,
        "products": [{"name": "all", "d_in": 256, "d_out": 256, "rows_ratio": 4.0}],
        "attentions": [{"heads": 4, "qk_dim": 64, "v_dim": 64}],
        "adapter": [{"name": "up", "d_in": 1024, "d_out": 512, "rows_ratio": 0.25}],
        "adapter_parameters": 524_288,
    },
}


@pytest.mark.parametrize("engine", engine_names())
def test_direct_and_compiled_paths_agree_on_a_trace(tmp_path, engine):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(TRACE), encoding="utf-8")
    model = load_model(path)
    for parallelism in (Parallelism(), Parallelism(dp=2)):
        settings_ = {"batch": 3, "parallelism": parallelism, "precision": Precision(4, 16, 8)}
        assert_paths_agree(build_query(model, images((9, 9)), load_engine(engine), **settings_), load_hardware(A100))


# Parts and wholes


@law(150)
@given(
    name=names,
    device=devices,
    engine=engines,
    pictures=st.lists(sizes, max_size=3),
    text=counts,
    output=outputs,
    batch=batches,
)
def test_wholes_are_the_sums_of_their_parts(*, name, device, engine, pictures, text, output, batch):
    p = predict(name, device, images(*pictures, text_tokens=text, output_tokens=output), batch=batch, engine=engine)
    first = [p.stages[stage].time_s for stage in STAGES[:-1]]
    assert close(p.ttft_s, sum(first))
    steps = output if engine == "paper" else output - 1
    assert close(p.total_s, p.ttft_s + steps * p.tpot_s)
    assert p.stages["decode"].time_s == pytest.approx(steps * p.tpot_s, rel=1e-12, abs=1e-18)
    for stage in STAGES[1:]:
        cost = p.stages[stage]
        on_device = cost.time_s * (1 - cost.share("host"))
        assert sum(cost.kind_s) == pytest.approx(on_device, rel=1e-9, abs=1e-15), stage
        assert sum(operator.time_s for operator in cost.operators) == pytest.approx(on_device, rel=1e-9, abs=1e-15)
        assert cost.bytes == pytest.approx(sum(o.bytes for o in cost.operators), rel=1e-12)
        assert cost.flops == pytest.approx(sum(o.flops for o in cost.operators), rel=1e-12)
        assert sum(share for _, share in cost.shares) == pytest.approx(1.0, rel=1e-6)
    memory = p.memory
    parts = memory.weights_bytes + memory.kv_bytes + memory.activation_bytes + memory.reserve_bytes
    assert close(memory.peak_bytes, parts)
    assert p.fits == (memory.peak_bytes <= memory.usable_bytes <= memory.capacity_bytes)
    assert close(p.throughput_tokens_per_s, batch * output / p.total_s)


@law(150)
@given(
    name=names,
    device=devices,
    engine=engines,
    visual=st.integers(0, 20_000),
    text=st.integers(1, 3000),
    output=st.integers(2, 120),
    batch=batches,
    precision=precisions,
)
def test_the_mean_step_is_the_mean_of_all_steps(*, name, device, engine, visual, text, output, batch, precision):
    assume(not (device == "cpu-epyc-9654" and precision.activation_bits == 4))
    workload = Workload(visual_tokens=float(visual), text_tokens=text, output_tokens=output)
    settings_ = {"precision": precision, "batch": batch}
    query = build_query(load_model(name), workload, load_engine(engine), **settings_)
    hardware = load_hardware(device)
    p = evaluate(query, hardware)
    priced = Evaluator.of(query, hardware).priced("decode")
    turn, evaluator = query.turns[0], Evaluator.of(query, hardware)
    cache = priced_table(evaluator.table("decode").apart(WORKS), evaluator.kernels)
    layer_s = query.engine.layer_host_s.get("decode", 0.0) / hardware.host_speed
    floor_s, host_s = layer_s * Structure.of(query).n_layers("decode"), float(evaluator.host_s("decode"))
    n_steps = int(decode_steps(query, turn))
    steps_s = []
    for i in range(1, n_steps + 1):
        reads = [entry.reads(float(prompt_in_cache(query, entry, turn)), i) for entry in Structure.of(query).kv]
        works = tuple(StageWork(1.0, batch, batch * keys, batch * keys) for keys in reads)
        sums = Sums(1.0, batch, batch, 1.0, touched_share(query, batch), works)
        column = np.array([sums.flat()], dtype=float).T
        beyond = cache.total_s(column)[0] if evaluator.adds_to_host("decode") else 0.0
        steps_s.append(max(priced.total_s(column)[0] - beyond, floor_s) + beyond + host_s)
    # The step at the mean of the keys is the mean step but where a roof is crossed on the way; roofs are convex. A
    # fitted curve bends where it splits its keys over one more thread block.
    assert p.tpot_s == pytest.approx(np.mean(steps_s), rel=5e-3 if query.engine.kernels else 1e-5)
    assert p.tpot_s <= np.mean(steps_s) * (1 + 1e-9) or query.engine.kernels
    shown = p.stages["decode"].step_time_s
    assert shown == pytest.approx((steps_s[0], steps_s[-(-n_steps // 2) - 1], steps_s[-1]), rel=1e-9)


# Nothing is changed, nothing is random


def state(value):
    """Return a deep copy of a query's numbers."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, tuple):
        return tuple(map(state, value))
    if isinstance(value, Query | Turn | Segment | KVEntry | Overhead) or type(value).__name__ == "MediaTotals":
        return {f.name: state(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "model"}
    return copy.copy(value) if isinstance(value, float | int | str) else repr(value)


def test_a_query_is_left_as_it_was_and_always_says_the_same():
    text, batch = np.array([5.0, 9000.0]), np.array([[1.0], [7.0]])
    sweep = build_query(
        load_model("qwen2.5-vl-7b"), images((500, 300), text_tokens=text), load_engine("fused"), batch=batch
    )
    point = build_query(load_model("qwen2.5-vl-7b"), images((500, 300)), load_engine("fused"), batch=2)
    hardware = load_hardware(H100)
    for query in (sweep, point):
        before = state(query)
        first, second = evaluate(query, hardware), evaluate(query, hardware)
        assert state(query) == before
        for field in ("ttft_s", "tpot_s", "total_s"):
            assert np.array_equal(getattr(first, field), getattr(second, field))
    assert first.as_dict() == second.as_dict()
    with pytest.raises(dataclasses.FrozenInstanceError):
        point.batch = 3


# What techniques may write into a query


def plain(name="qwen2.5-vl-7b", *, engine="fused", batch=1.0, text=64, output=32, size=(900, 600)):
    workload = images(size, text_tokens=text, output_tokens=output)
    return build_query(
        load_model(name), workload, load_engine(engine) if isinstance(engine, str) else engine, batch=batch
    )


def split(query, *keeps):
    """Return the query with its decoder in segments of (layers, share of visual tokens that stays)."""
    (segment,) = query.decoder
    assert sum(n for n, _ in keeps) == segment.n_layers
    return replace(query, decoder=tuple(replace(segment, n_layers=n, visual_keep=keep) for n, keep in keeps))


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("convention", ["torch", "kernel"])
def test_dropping_tokens_inside_the_decoder_follows_the_convention(name, convention):
    query = plain(name, engine=counting_engine(convention))
    decoder = query.model.decoder
    edited = split(query, (2, 1.0), (decoder.n_layers - 2, 0.5))
    visual, other = query.visual_tokens, query.media.marker_tokens + 64
    kept = [visual + other] * 2 + [visual / 2 + other] * (decoder.n_layers - 2)
    head = 2 * decoder.width * decoder.vocabulary
    diagonal = sum(2 * n * decoder.runs[0].layer.mixer.q_width for n in kept) * (convention == "kernel")
    expected = prefill_flops(decoder, kept, convention) + head + diagonal
    assert close(stage_flops(edited, "prefill"), expected)
    assert stage_flops(edited, "prefill") < stage_flops(query, "prefill")


def test_equal_segments_are_one():
    query, hardware = plain(), load_hardware(A100)
    for keeps in [((28, 1.0),), ((3, 1.0), (25, 1.0)), ((1, 1.0),) * 28]:
        assert close(evaluate(split(query, *keeps), hardware).total_s, evaluate(query, hardware).total_s)
    there_and_back = ((3, 1.0), (5, 0.5), (9, 1.0), (11, 0.5))
    assert close(
        evaluate(split(query, *there_and_back), hardware).ttft_s,
        evaluate(split(query, (12, 1.0), (16, 0.5)), hardware).ttft_s,
    )


def test_sparse_attention_computes_its_share_of_the_pairs():
    query = plain(engine=counting_engine("torch"))
    (segment,) = query.decoder
    sparse = replace(query, decoder=(replace(segment, density=0.25),))
    prompt, mixer = query.prompt_tokens, segment.layer.mixer
    saved = 0.75 * 4 * prompt**2 * mixer.q_width * segment.n_layers
    assert close(stage_flops(query, "prefill") - saved, stage_flops(sparse, "prefill"))


def test_evicting_from_the_cache_saves_reads_and_memory():
    query, hardware = plain(), load_hardware(A100)
    (entry,) = query.kv
    half = replace(query, kv=(replace(entry, n_layers=10, visual_share=0.5), replace(entry, n_layers=18)))
    full, less = evaluate(query, hardware), evaluate(half, hardware)
    saved = query.visual_tokens / 2 * 10 * 2 * entry.mixer.kv_width * 2
    assert close(full.memory.kv_bytes - less.memory.kv_bytes, saved)
    steps = 31
    assert full.stages["decode"].kv_bytes - less.stages["decode"].kv_bytes == pytest.approx(steps * saved, rel=1e-9)
    assert less.tpot_s < full.tpot_s
    assert close(less.ttft_s, full.ttft_s)  # prefill has run by then
    assert less.max_batch > full.max_batch


def test_reading_a_share_of_the_cache_saves_reads_and_no_memory():
    query, hardware = plain(), load_hardware(A100)
    (entry,) = query.kv
    full = evaluate(query, hardware)
    less = evaluate(replace(query, kv=(replace(entry, read_share=0.25),)), hardware)
    written = 31 * 28 * 2 * entry.mixer.kv_width * 2  # every step adds its own token
    reads, fewer = (p.stages["decode"].kv_bytes - written for p in (full, less))
    assert fewer == pytest.approx(reads / 4, rel=1e-9)
    assert less.memory.kv_bytes == full.memory.kv_bytes


def test_a_quantised_cache_is_smaller_by_its_bits():
    query, hardware = plain(), load_hardware(A100)
    (entry,) = query.kv
    full = evaluate(query, hardware).memory.kv_bytes
    assert close(evaluate(replace(query, kv=(replace(entry, bits=8),)), hardware).memory.kv_bytes, full / 2)
    four = evaluate(replace(query, kv=(replace(entry, bits=4),)), hardware).memory.kv_bytes
    assert full / 4 < four < full / 2  # scales and zero points


def test_a_window_caps_what_is_read_and_kept():
    query, hardware = plain(text=500, output=300), load_hardware(A100)
    (entry,) = query.kv
    windowed = replace(entry, mixer=replace(entry.mixer, window=100.0))
    assert windowed.reads(50.0, 20.0) == 70.0
    assert windowed.reads(50.0, 2000.0) == windowed.reads(5e6, 1.0) == 100.0
    p = evaluate(replace(query, kv=(windowed,)), hardware)
    each = 28 * 2 * entry.mixer.kv_width * 2
    assert close(p.memory.kv_bytes, 112 * each)  # 99 tokens in blocks of 16: the next one sees itself too
    first, middle, last = p.stages["decode"].step_time_s
    assert first == middle == last < evaluate(query, hardware).stages["decode"].step_time_s[0]
    reads = p.stages["decode"].kv_bytes - 299 * each  # less what every step writes
    assert reads == pytest.approx(299 * 100 * each, rel=1e-9)


@law(200)
@given(
    st.integers(0, 5000),
    st.integers(1, 400),
    st.floats(1, 6000) | st.just(UNBOUNDED),
    st.booleans(),
    st.floats(0.05, 1.0),
)
def test_mean_reads_is_the_mean_of_reads(prompt, steps, window, grows, share):
    mixer = replace(load_model("llava-1.5-7b").decoder.runs[0].layer.mixer, window=float(np.floor(window)))
    entry = KVEntry(32, mixer, grows=grows, read_share=share)
    mean = np.mean([entry.reads(float(prompt), float(i)) for i in range(1, steps + 1)])
    assert entry.mean_reads(float(prompt), float(steps)) == pytest.approx(mean, rel=1e-9)


def test_a_cache_that_does_not_grow_stays():
    query, hardware = plain(output=200), load_hardware(A100)
    (entry,) = query.kv
    p = evaluate(replace(query, kv=(replace(entry, grows=False),)), hardware)
    assert close(p.memory.kv_bytes, p.tokens["prompt"] * 28 * 2 * entry.mixer.kv_width * 2)
    first, _, last = p.stages["decode"].step_time_s
    assert first == last


def test_a_cache_on_the_host_is_fetched_for_every_step_and_frees_the_device():
    query, hardware = plain(), load_hardware(A100)
    away = replace(query, kv=tuple(replace(entry, placement="host") for entry in query.kv))
    here, there = evaluate(query, hardware), evaluate(away, hardware)
    link, copy, turn = hardware.host_link(), query.engine.kind(Kind.COPY), query.turns[0]
    read, starts_s = 0.0, copy.start_cycles / hardware.clock_hz + link.latency_s
    for entry in query.kv:
        tokens = float(entry.mean_reads(prompt_in_cache(query, entry, turn), 31.0))
        read += entry.n_layers * entry.mixer.cached_width * 2 * tokens
    fetched_s = read / (link.bandwidth_bytes_per_s * copy.bandwidth_fraction)
    fetched_s += starts_s * sum(entry.n_layers for entry in query.kv)
    assert there.tpot_s - here.tpot_s == pytest.approx(fetched_s, rel=1e-9)
    assert there.ttft_s == here.ttft_s
    assert there.memory.host_kv_bytes == here.memory.kv_bytes
    archive = replace(query, kv=tuple(replace(e, placement="host", read_share=0.0) for e in query.kv))
    assert evaluate(archive, hardware).memory.kv_bytes == 0.0
    with pytest.raises(Unsupported, match="no link to its host"):
        evaluate(away, load_hardware("tpu-v5e-16gb"))


@pytest.mark.parametrize("stage", STAGES)
def test_what_runs_beside_a_stage_counts_where_it_takes_longer(stage):
    query, hardware = plain(), load_hardware(A100)
    before = evaluate(query, hardware)
    own = {"decode": float(before.tpot_s)}.get(stage, before.stages[stage].time_s)
    for share, waits in ((0.5, 0.0), (3.0, 2.0)):
        work = Operator("beside", Kind.GEMM, flops=1e12)
        unit = float(operator_s(work, kernels_of(query, hardware)))
        beside = replace(work, flops=1e12 * share * own / unit)
        after = evaluate(replace(query, overheads=(Overhead(stage, (beside,), hidden=True),)), hardware)
        grown = after.tpot_s - before.tpot_s if stage == "decode" else after.ttft_s - before.ttft_s
        assert grown == pytest.approx(waits * own, rel=1e-6, abs=1e-12)
        stages = after.stages[stage]
        assert sum(dict(stages.shares).values()) == pytest.approx(1.0)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("batch", [1.0, 8.0])
def test_an_overhead_adds_its_operators_time(stage, batch):
    query, hardware = plain(batch=batch), load_hardware(A100)
    scoring = Operator("score", Kind.GEMM, flops=3e12, activation_bytes=2e9, launches=5.0)
    sorting = Operator("sort", Kind.ELEMENTWISE, repeats=4, activation_bytes=1e9, launches=100.0)
    charged = replace(query, overheads=(Overhead(stage, (scoring, sorting)),))
    added = sum(operator_s(o, kernels_of(query, hardware)) for o in (scoring, sorting))
    before, after = evaluate(query, hardware), evaluate(charged, hardware)
    assert after.stages[stage].time_s - before.stages[stage].time_s == pytest.approx(
        added * (31 if stage == "decode" else 1), rel=1e-9
    )
    grown = after.tpot_s - before.tpot_s if stage == "decode" else after.ttft_s - before.ttft_s
    assert grown == pytest.approx(added, rel=1e-9)
    assert evaluate(charged.without_overheads(), hardware).total_s == before.total_s


@pytest.mark.parametrize("stage", ["encode", "prefill"])
def test_an_overheads_peak_is_memory(stage):
    query, hardware = plain(), load_hardware(A100)
    before = evaluate(query, hardware).memory
    after = evaluate(replace(query, overheads=(Overhead(stage, (), peak_bytes=5e10),)), hardware).memory
    assert 0 < after.activation_bytes - before.activation_bytes <= 5e10
    assert after.activation_bytes > 5e10


def test_turns_add_up_and_read_their_prefix():
    query = plain(engine=counting_engine("kernel"))
    hardware = load_hardware(A100)
    first = query.turns[0]
    again = Turn(0.0, 40.0, 16.0, prefix_tokens=1500.0)
    often = replace(again, probability=0.25, repeats=8.0)
    one, only = evaluate(query, hardware), evaluate(replace(query, turns=(again,)), hardware)
    assert close(evaluate(replace(query, turns=(first, again)), hardware).total_s, one.total_s + only.total_s)
    assert close(evaluate(replace(query, turns=(first, often)), hardware).total_s, one.total_s + 2 * only.total_s)
    assert evaluate(replace(query, turns=(first, again)), hardware).ttft_s == one.ttft_s
    decoder = query.model.decoder
    mixer = decoder.runs[0].layer.mixer
    pairs = sum(1500 + i for i in range(1, 41))
    linear = prefill_flops(decoder, 40, "kernel") - 2 * 40**2 * mixer.q_width * decoder.n_layers
    expected = linear + 4 * pairs * mixer.q_width * decoder.n_layers + 2 * decoder.width * decoder.vocabulary
    assert close(stage_flops(replace(query, turns=(again,)), "prefill"), expected)
    assert only.stages["encode"].flops == 0  # the pictures came before
    assert only.stages["decode"].step_time_s[0] > one.stages["decode"].step_time_s[0]


def test_a_prefix_costs_more_than_none_and_less_than_prefill():
    query, hardware = plain(text=2000), load_hardware(A100)

    def ttft(prefix, text):
        return evaluate(replace(query, turns=(Turn(0.0, text, 16.0, prefix_tokens=prefix),)), hardware).ttft_s

    assert ttft(0.0, 500.0) < ttft(5000.0, 500.0) < ttft(0.0, 5500.0)


# Techniques


@dataclass(frozen=True)
class KeepShare:
    """Keeps a share of the visual tokens behind a layer: a technique of our own."""

    keep: float | np.ndarray
    after: int = 2
    slot: str = "decoder tokens"
    name: str = "keep-share"
    needs_attention_map: str = "none"

    def apply(self, query):
        (segment,) = query.decoder
        (entry,) = query.kv
        rest = segment.n_layers - self.after
        return replace(
            query,
            decoder=(replace(segment, n_layers=self.after), replace(segment, n_layers=rest, visual_keep=self.keep)),
            kv=(replace(entry, n_layers=self.after), replace(entry, n_layers=rest, visual_share=self.keep)),
        )


@dataclass(frozen=True)
class Nothing:
    name: str = "nothing"
    slot: str = ""
    needs_attention_map: str = "none"

    def apply(self, query):
        return query


def test_a_technique_of_our_own_works():
    workload = images((900, 600))
    plain_, pruned = (
        predict("qwen2.5-vl-7b", A100, workload, techniques=techniques) for techniques in ([], [KeepShare(0.2)])
    )
    assert pruned.ttft_s < plain_.ttft_s
    assert pruned.tpot_s < plain_.tpot_s
    assert pruned.memory.kv_bytes < plain_.memory.kv_bytes
    assert pruned.stages["encode"].time_s == plain_.stages["encode"].time_s
    assert predict("qwen2.5-vl-7b", A100, workload, techniques=[KeepShare(1.0)]).total_s == pytest.approx(
        plain_.total_s, **POINT
    )


def test_a_neutral_technique_is_the_identity():
    query = plain()
    assert compose(query, []) is query
    assert compose(query, [Nothing(), Nothing()]) is query  # "" takes no slot


def test_a_swept_technique_equals_its_points():
    keeps, text = np.array([0.1, 0.5, 1.0]), np.array([[20.0], [9000.0]])
    sweep = predict("llava-1.5-7b", H100, images((336, 336), text_tokens=text), techniques=[KeepShare(keeps)])
    assert sweep.ttft_s.shape == (2, 3)
    for row, words in enumerate(text[:, 0]):
        for column, keep in enumerate(keeps):
            point = predict(
                "llava-1.5-7b", H100, images((336, 336), text_tokens=words), techniques=[KeepShare(float(keep))]
            )
            for field in ("ttft_s", "tpot_s", "total_s"):
                assert close(getattr(sweep, field)[row, column], getattr(point, field))


def test_two_techniques_of_one_slot_exclude_each_other():
    with pytest.raises(ValueError, match="both take slot 'decoder tokens'"):
        compose(plain(), [KeepShare(0.5), Nothing(), replace(KeepShare(0.2), name="other")])


def test_an_unknown_technique_is_a_lookup_error():
    with pytest.raises(LookupError, match="no-such-method"):
        technique("no-such-method")


# Tools that use the same models again and again


@functools.cache
def reference():
    return predict("qwen2.5-vl-7b", A100, images((900, 600))).as_dict()


@law(15)
@given(st.sampled_from(DENSE), devices, st.lists(st.floats(0.01, 0.99), min_size=1, max_size=3, unique=True))
def test_caches_never_mix_queries_up(name, device, keeps):
    before = reference()
    for keep in keeps:
        predict(name, device, images((900, 600)), techniques=[KeepShare(keep)])
    assert predict("qwen2.5-vl-7b", A100, images((900, 600))).as_dict() == before


def test_visual_tokens_by_number_cost_what_a_picture_of_them_does():
    picture = count("llava-1.5-7b", Workload(images=[Image(336, 336)]), convention="torch")
    number = count("llava-1.5-7b", Workload(visual_tokens=576.0), convention="torch")
    assert number.flops == pytest.approx(picture.flops, **POINT)
    assert number.tokens == picture.tokens
