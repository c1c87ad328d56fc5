"""Which curve an operator has, and what tables of curves give back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel import Image, Parallelism, Precision, Workload, load_engine, load_hardware, load_model, predict
from costmodel.efficiency.attention import Chunks
from costmodel.efficiency.decode import step_attention_s
from costmodel.efficiency.gemm import gemm_s
from costmodel.engine import engine_names
from costmodel.evaluate import Evaluator
from costmodel.fitted_files import SHARED, load_fitted, load_fitted_texts, measured_as
from costmodel.hardware import hardware_names
from costmodel.kernels import Kernels
from costmodel.operators import Kind
from costmodel.query import build_query
from costmodel.shapes import AttentionShape, GemmShape, MoveShape
from costmodel.stages import DEVICE_STAGES
from costmodel.tabulated import BATCH_GRID, CONTEXT_GRID, ROWS_GRID

MODEL, A100, H100 = "qwen2.5-vl-7b", "a100-sxm4-80gb", "h100-sxm5-80gb"
PICTURE = Workload(images=[Image(1280, 960)], text_tokens=64, output_tokens=32)
GEMM = GemmShape(3584, 18944, 2.0)


def kernels(device, engine="fused"):
    return Kernels(load_hardware(device), load_engine(engine))


def found(device, kind, shape, bits=16, peers=1):
    return kernels(device).find(kind, shape, bits=bits, peers=peers)


@pytest.mark.parametrize("device", ["a100-sxm4-80gb", "h100-sxm5-80gb", "l40s-48gb", "rtx-pro-6000-96gb"])
def test_a_measured_device_has_its_own_products(device):
    kernel = found(device, Kind.GEMM, GEMM)
    assert (kernel.device, kernel.is_shared) == (device, False)


@pytest.mark.parametrize(
    ("device", "chip"),
    [
        ("h200-sxm-141gb", "h100-sxm5-80gb"),
        ("a100-sxm4-40gb", "a100-sxm4-80gb"),
        ("h100-sxm5-80gb:memory_bandwidth_bytes_per_s=4e12", "h100-sxm5-80gb"),
        ("a10-24gb", SHARED),
        ("b200-sxm-180gb", SHARED),
    ],
)
def test_a_device_with_the_same_cores_has_the_curves_of_its_sibling(device, chip):
    assert measured_as(load_hardware(device)) == chip
    assert found(device, Kind.GEMM, GEMM).device == chip


@pytest.mark.parametrize("device", ["cpu-epyc-9654", "tpu-v5e-16gb", "gaudi2-96gb"])
def test_what_is_no_gpu_has_no_curve(device):
    assert found(device, Kind.GEMM, GEMM) is None


def test_hopper_has_its_own_attention_and_others_have_the_second():
    shape = AttentionShape(28, 4, 256, 512)
    by_device = {name: found(name, Kind.PREFILL_ATTENTION, shape).fitted.variant for name in (A100, H100, "a10-24gb")}
    assert by_device == {A100: "flash", H100: "fa3", "a10-24gb": "fa2"}


@pytest.mark.parametrize(("heads", "prefix"), [((32, 32), "mha"), ((32, 8), "gqa")])
def test_decode_has_a_curve_for_shared_and_for_own_keys(heads, prefix):
    shape = AttentionShape(*heads, 256, 512)
    assert found(H100, Kind.DECODE_ATTENTION, shape).fitted.variant.startswith(prefix)


def test_a_precision_that_was_not_measured_has_no_curve():
    assert found(H100, Kind.GEMM, GEMM, bits=32) is None
    assert found(H100, Kind.GEMM, GEMM, bits=8).fitted.variant == "fp8"


def test_bands_are_wider_the_less_was_measured():
    widths = []
    for device in (H100, "a10-24gb", "mi300x-192gb"):
        low, high = found(device, Kind.GEMM, GEMM).band(1000.0)
        assert low < 0 < high
        widths.append(np.log1p(high) - np.log1p(low))
    assert widths == sorted(widths)
    assert widths[0] < widths[1] < widths[2]


@pytest.mark.parametrize("name", sorted(load_fitted_texts()))
def test_no_curve_has_more_than_twenty_parameters(name):
    assert all(1 <= curve.fitted_parameters <= 20 for curve in load_fitted(name).curves)


@pytest.mark.parametrize("engine", [name for name in engine_names() if load_engine(name).kernels])
@pytest.mark.parametrize("device", hardware_names())
def test_every_library_that_an_engine_names_has_files(engine, device):
    libraries = {entry.partition(".")[0] for some in load_engine(engine).kernels.values() for entry in some}
    have = {name.partition(".")[2] for name in load_fitted_texts()}
    assert libraries <= have
    p = predict(MODEL, device, PICTURE, engine=engine)
    assert 0 < p.error_band["ttft_s"][0] <= p.ttft_s <= p.error_band["ttft_s"][1]


# Tables


def curve_and_table(shape):
    own = kernels(H100)
    kernel = own.find(Kind.GEMM, shape, bits=16, peers=1)
    chip, curve = own.chip(16), kernel.fitted.curve()
    return lambda rows: gemm_s(rows, d_in=shape.d_in, d_out=shape.d_out, chip=chip, curve=curve)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40_000), st.sampled_from([(3584, 4608), (1280, 3840), (8192, 28672), (1024, 1024)]))
def test_a_table_of_rows_is_close_to_its_curve(rows, sides):
    exact = curve_and_table(GemmShape(*map(float, sides), 2.0))
    read = np.interp(rows, ROWS_GRID, exact(ROWS_GRID))
    # between two grid points a tile's step is drawn as a slope: at most one wave of thread blocks off
    assert read == pytest.approx(float(exact(float(rows))), rel=0.12)


def test_a_table_of_rows_is_its_curve_on_the_grid_and_close_on_average():
    exact = curve_and_table(GEMM)
    rows = np.arange(1.0, 8193.0)
    table = exact(ROWS_GRID)
    assert np.interp(ROWS_GRID, ROWS_GRID, table) == pytest.approx(table)
    errors = np.interp(rows, ROWS_GRID, table) / exact(rows) - 1
    assert np.abs(errors).mean() < 0.01
    assert abs(errors.mean()) < 0.005


@settings(max_examples=200, deadline=None)
@given(st.floats(1, 200_000), st.floats(1, 2000))
def test_a_table_of_decode_steps_is_close_to_its_curve(context, batch):
    query = build_query(load_model(MODEL), PICTURE, load_engine("fused"))
    step = Evaluator.of(query, load_hardware(H100)).priced("decode").steps[0]
    own = kernels(H100)
    shape = AttentionShape(28, 4, 256, 512)
    curve = own.find(Kind.DECODE_ATTENTION, shape, bits=16, peers=1).fitted.curve()
    exact = step_attention_s(
        context, batch, heads=28, kv_heads=4, pair_width=256, key_bytes=512, chip=own.chip(16), curve=curve
    )
    left, right = np.searchsorted(CONTEXT_GRID, context), np.searchsorted(BATCH_GRID, batch)
    near = step.seconds[max(right - 1, 0) : right + 1, max(left - 1, 0) : left + 1] / 28
    assert near.min() * (1 - 1e-9) <= float(exact) <= near.max() * (1 + 1e-9)


@given(st.integers(1, 5000), st.integers(0, 5000), st.integers(1, 64), st.booleans())
def test_equal_sequences_are_found_again_from_their_sums(new, old, sequences, causal):
    if causal:
        pairs, keys = new * (old + (new + 1) / 2), old + new
    else:
        pairs, keys = new * (new + old), new + old
    sums = (np.array([sequences * float(x)]) for x in (new, pairs, keys))
    chunks = Chunks.of(*sums, causal=causal)
    assert chunks.queries[0] == pytest.approx(new)
    assert chunks.sequences[0] == pytest.approx(sequences)
    assert chunks.keys[0] == pytest.approx(old + new)


# In predictions


def test_operators_add_up_to_the_stage_and_carry_their_curve():
    query = build_query(load_model(MODEL), PICTURE, load_engine("fused"), parallelism=Parallelism(tp=2))
    evaluator = Evaluator.of(query, load_hardware(H100))
    for stage in DEVICE_STAGES:
        priced, points = evaluator.priced(stage), evaluator.points(stage, query.turns[0])
        assert all(kernel is not None for kernel in priced.found), stage
        times = priced.operators_s(points.sums)
        assert (times.busy_s + times.start_s).sum(axis=0) == pytest.approx(priced.total_s(points.sums), rel=1e-12)
        assert (times.start_s >= 0).all()
        assert (times.busy_s >= 0).all()


def test_the_share_of_a_band_that_a_kind_gives_is_its_share_of_the_time():
    p = predict(MODEL, H100, PICTURE)
    for stage in p.stages.values():
        parts = (*stage.kind_s, stage.time_s, stage.time_s)
        for part, below, above in zip(parts, stage.below_s, stage.above_s, strict=True):
            assert (abs(below) <= part and (above <= 0) == (below >= 0)) or part == above == below == 0


def test_four_bit_weights_read_a_quarter_and_cost_more_with_many_rows():
    few, many = Workload(text_tokens=1, output_tokens=2), Workload(text_tokens=8000, output_tokens=1)
    full, narrow = Precision(), Precision(weight_bits=4)
    assert predict(MODEL, H100, few, precision=narrow).tpot_s < 0.6 * predict(MODEL, H100, few, precision=full).tpot_s
    assert predict(MODEL, H100, many, precision=narrow).ttft_s > predict(MODEL, H100, many, precision=full).ttft_s


def test_a_move_knows_its_operator():
    assert found(A100, Kind.ELEMENTWISE, MoveShape("norm", 100.0)).fitted.variant == "norm"
