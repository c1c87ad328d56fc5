"""The efficiency curves: laws for any parameters, the roofline as the neutral case, and fitting them back."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import hardware_profiles
from costmodel import load_hardware
from costmodel.efficiency import (
    AttentionCurve,
    Chip,
    CustomCurve,
    DecodeCurve,
    ElementwiseCurve,
    GemmCurve,
    MoeCurve,
    NcclCurve,
    Routing,
    Tiling,
    attention_s,
    custom_all_reduce_s,
    decode_attention_s,
    elementwise_s,
    gemm_s,
    moe_s,
    nccl_s,
)
from costmodel.efficiency.common import cold_share, soft_max, waves
from costmodel.efficiency.fitted import read_fitted
from runtime.fitting import fit, scales
from studies.validation.split import COLUMNS, is_test, rule

H100 = Chip.of(load_hardware("h100-sxm5-80gb"))
L40S = Chip.of(load_hardware("l40s-48gb"))
FITTED = sorted((Path(hardware_profiles.__file__).parent / "fitted").glob("*.toml"))
LINK = 450e9
ROOT = Path(__file__).parents[1]


def curves(form):
    """Curves of a form within a factor of eight of the priors, shares of one within theirs."""
    fields = {}
    for scale in scales(form, {}):
        start = scale.encode(form.model_fields[scale.name].default or 1.0)
        fields[scale.name] = st.floats(start - 2, start + 2).map(scale.decode)
    return st.builds(form, **fields)


CHIPS = st.sampled_from([H100, L40S])
ROWS = st.integers(1, 40_000)
WIDTHS = st.integers(16, 30_000)
MORE = st.integers(1, 5_000)
TILINGS = st.sampled_from(
    [
        Tiling(),
        Tiling((64,), packed=True),
        Tiling((128,), packed=True),
        Tiling((16, 64, 128), packed=True),
        Tiling((128,), pad=32),
    ]
)


def never_falls(time, work, more):
    assert time(work + more) >= time(work) * (1 - 1e-12)


@given(CHIPS, curves(GemmCurve), st.tuples(ROWS, WIDTHS, WIDTHS), MORE, st.sampled_from([0.0, 0.19]))
def test_gemm_never_falls_with_any_side(chip, curve, shape, more, resident):
    m, n, k = shape
    price = partial(gemm_s, chip=chip, curve=curve, resident_share=resident)
    never_falls(lambda x: price(x, d_in=k, d_out=n), m, more)
    never_falls(lambda x: price(m, d_in=x, d_out=n), k, more)
    never_falls(lambda x: price(m, d_in=k, d_out=x), n, more)


@given(CHIPS, curves(AttentionCurve), TILINGS, st.booleans(), st.data())
def test_attention_never_falls_with_length_batch_heads_and_width(chip, curve, tiling, causal, data):
    s, b = data.draw(st.integers(1, 9_000)), data.draw(st.integers(1, 64))
    kv, group = data.draw(st.integers(1, 16)), data.draw(st.integers(1, 16))
    d, more = data.draw(st.sampled_from([64, 72, 80, 128, 192, 256])), data.draw(st.integers(1, 300))
    price = partial(
        attention_s,
        causal=causal,
        chip=chip,
        curve=curve,
        tiling=tiling,
        resident_share=data.draw(st.sampled_from([0.0, 1.0])),
    )
    shape = {"batch": b, "heads": kv * group, "kv_heads": kv, "head_dim": d}
    never_falls(lambda x: price(x, **shape), s, more)
    never_falls(lambda x: price(s, **{**shape, "batch": x}), b, more)
    never_falls(lambda x: price(s, **{**shape, "head_dim": x}), d, more)
    never_falls(lambda x: price(s, **{**shape, "heads": x * group, "kv_heads": x}), kv, more)


@given(CHIPS, curves(DecodeCurve), st.integers(1, 100_000), st.booleans(), st.data())
def test_decode_never_falls_with_context_batch_heads_and_width(chip, curve, context, resident, data):
    b = data.draw(st.integers(1, 500))
    kv, group = data.draw(st.integers(1, 16)), data.draw(st.integers(1, 40))
    d, more = data.draw(st.sampled_from([64, 128, 256])), data.draw(MORE)
    price = partial(decode_attention_s, chip=chip, curve=curve, resident=resident)
    shape = {"batch": b, "heads": kv * group, "kv_heads": kv, "head_dim": d}
    never_falls(lambda x: price(x, **shape), context, more)
    never_falls(lambda x: price(context, **{**shape, "batch": x}), b, more)
    never_falls(lambda x: price(context, **{**shape, "head_dim": x}), d, more)
    never_falls(lambda x: price(context, **{**shape, "heads": x * group, "kv_heads": x}), kv, more)
    never_falls(lambda x: price(context, **{**shape, "heads": x * kv}), group, more)


@given(CHIPS, curves(MoeCurve), st.integers(1, 20_000), st.sampled_from([8, 64, 256]), st.data())
def test_moe_never_falls_with_tokens_and_widths(chip, curve, tokens, experts, data):
    top_k = data.draw(st.integers(1, 8))
    hidden, inter, more = data.draw(WIDTHS), data.draw(WIDTHS), data.draw(MORE)
    price = partial(moe_s, local_experts=experts, matrices=3, chip=chip, curve=curve, resident=data.draw(st.booleans()))

    def routing(tokens):
        return Routing.balanced(tokens, top_k=top_k, experts=experts)

    never_falls(lambda x: price(routing(x), hidden=hidden, inter=inter), tokens, more)
    never_falls(lambda x: price(routing(tokens), hidden=x, inter=inter), hidden, more)
    never_falls(lambda x: price(routing(tokens), hidden=hidden, inter=x), inter, more)


@given(curves(NcclCurve), curves(CustomCurve), st.integers(1, 10**9), st.integers(1, 10**8), st.sampled_from([2, 4, 8]))
def test_collectives_never_fall_with_the_message(ring, custom, size, more, ranks):
    def nccl(x):
        return nccl_s(x, ranks=ranks, rounds=2, link_bytes_per_s=LINK, curve=ring, switch_reduces=True)

    never_falls(nccl, size, more)
    never_falls(
        lambda x: custom_all_reduce_s(
            x, ranks=ranks, link_bytes_per_s=LINK, curve=custom, ring_s=nccl(x), most_ranks=8
        ),
        size,
        more,
    )


@given(CHIPS, curves(ElementwiseCurve), st.integers(1, 10**10), st.integers(1, 10**8), st.booleans())
def test_elementwise_never_falls_with_traffic(chip, curve, traffic, more, resident):
    never_falls(lambda x: elementwise_s(x, chip=chip, curve=curve, resident=resident), traffic, more)


@given(st.floats(0.1, 1e12), st.floats(1.0, 4.0), st.floats(1e3, 1e9), st.floats(1, 10))
def test_cold_traffic_never_falls(traffic, factor, resident, sharpness):
    cold = [x * cold_share(x, resident, sharpness) for x in (traffic, traffic * factor)]
    assert cold[1] >= cold[0] * (1 - 1e-12)


@given(st.integers(1, 10**6), st.integers(1, 200), st.floats(0, 1))
def test_waves_lie_between_the_average_and_whole_rounds(blocks, cores, quantisation):
    found = waves(blocks, cores, quantisation)
    assert max(blocks / cores, 1) * (1 - 1e-12) <= found <= -(-blocks // cores) * (1 + 1e-12)


@given(st.lists(st.floats(0, 1e3), min_size=2, max_size=4), st.floats(1, 60))
def test_soft_maximum_lies_between_maximum_and_sum(terms, norm):
    assume(max(terms) == 0 or max(terms) > 1e-9)
    assert max(terms) * (1 - 1e-9) <= soft_max(norm, *terms) <= sum(terms) * (1 + 1e-9)


SHARP = {"norm": 400.0, "start_cycles": 0.0}
NEUTRAL = GemmCurve(
    **SHARP,
    compute_fraction=1,
    droop_fraction=0,
    ramp_elements=0,
    wave_quantisation=0,
    balance_flops_per_byte=0,
    bandwidth_fraction=1,
    split_cycles=0,
)


@pytest.mark.parametrize(
    ("m", "k", "n"), [(8192, 4096, 8192), (16384, 8192, 4096), (8192, 64, 8192), (128, 8192, 65536)]
)
def test_neutral_gemm_is_the_roofline(m, k, n):
    roofline = max(2 * m * k * n / H100.peak_flops_per_s, 2 * (m * k + k * n + m * n) / H100.bandwidth_bytes_per_s)
    assert gemm_s(m, d_in=k, d_out=n, chip=H100, curve=NEUTRAL) == pytest.approx(roofline, rel=0.01)


@pytest.mark.parametrize("causal", [False, True])
def test_neutral_attention_is_the_roofline(causal):
    curve = AttentionCurve(
        **SHARP,
        compute_64_fraction=1,
        compute_128_fraction=1,
        compute_256_fraction=1,
        droop_fraction=0,
        wave_quantisation=0,
        balance_flops_per_byte=0,
        bandwidth_fraction=1,
        serial_passes=0,
        block_cycles=0,
    )
    s, b, h, d = 16384, 4, 32, 128
    time = attention_s(
        s, batch=b, heads=h, kv_heads=h, head_dim=d, causal=causal, chip=H100, curve=curve, tiling=Tiling()
    )
    flops = 4 * b * h * s * s * d / (2 if causal else 1)
    assert time == pytest.approx(flops / H100.peak_flops_per_s, rel=0.01)


def test_neutral_decode_is_the_roofline():
    curve = DecodeCurve(
        **SHARP,
        stream_fraction=1e3,
        ramp_tokens=0,
        wave_quantisation=0,
        compute_fraction=1e3,
        bandwidth_fraction=1,
        split_cycles=0,
        block_cycles=0,
    )
    time = decode_attention_s(8192, batch=64, heads=32, kv_heads=8, head_dim=128, chip=H100, curve=curve)
    assert time == pytest.approx(64 * 8192 * 8 * 2 * 128 * 2 / H100.bandwidth_bytes_per_s, rel=0.01)


def test_neutral_moe_is_the_roofline():
    curve = MoeCurve(
        **SHARP,
        expert_cycles=0,
        compute_fraction=1,
        ramp_elements=0,
        wave_quantisation=0,
        balance_flops_per_byte=0,
        bandwidth_fraction=1,
        activation_passes=0,
    )
    price = partial(moe_s, hidden=4096, inter=14336, local_experts=8, matrices=3, chip=H100, curve=curve)
    many, one = (Routing.balanced(tokens, top_k=2, experts=8) for tokens in (16384, 1))
    flops = 2 * 16384 * 2 * 3 * 4096 * 14336
    assert price(many) == pytest.approx(flops / H100.peak_flops_per_s, rel=0.01)
    assert price(one) == pytest.approx(2 * 3 * 4096 * 14336 * 2 / H100.bandwidth_bytes_per_s, rel=0.01)


def test_resident_weights_are_read_from_the_cache_and_served_ones_are_not():
    small = partial(gemm_s, 1, d_in=1024, d_out=1024, chip=L40S, curve=NEUTRAL)
    large = partial(gemm_s, 1, d_in=16384, d_out=16384, chip=L40S, curve=NEUTRAL)
    assert small(resident_share=0.19) < 0.1 * small()
    assert large(resident_share=0.19) == pytest.approx(large(), rel=0.01)


def test_arrays_equal_points():
    rng = np.random.default_rng(0)
    m, k, n = rng.integers(1, 9000, (3, 20))
    swept = gemm_s(m, d_in=k, d_out=n, chip=H100, curve=GemmCurve())
    points = [gemm_s(a, d_in=b, d_out=c, chip=H100, curve=GemmCurve()) for a, b, c in zip(m, k, n, strict=True)]
    assert swept == pytest.approx(np.array(points), rel=1e-14)
    shape = {"batch": m % 64 + 1, "heads": 32, "kv_heads": 8, "head_dim": 128}
    swept = decode_attention_s(k, **shape, chip=H100, curve=DecodeCurve())
    one = decode_attention_s(k[3], **{**shape, "batch": m[3] % 64 + 1}, chip=H100, curve=DecodeCurve())
    assert swept[3] == pytest.approx(one, rel=1e-14)
    grid = gemm_s(m[:, None], d_in=512, d_out=n[None, :], chip=H100, curve=GemmCurve())
    assert grid.shape == (20, 20)


def test_routing_balances_and_counts():
    found = Routing.balanced(np.array([1, 64]), top_k=2, experts=8)
    assert found.rows.tolist() == [2, 128]
    assert found.active.tolist() == [2, 8]
    assert found.tiles.tolist() == [[2, 2, 2, 2], [8, 8, 8, 8]]
    counted = Routing.of(np.array([[0.0, 17.0, 128.0]]))
    assert (counted.rows, counted.active, counted.tiles.tolist()) == (145, 2, [[10, 5, 3, 2]])


# Fitting


TRUE = GemmCurve(
    start_cycles=7000,
    compute_fraction=0.8,
    droop_fraction=0.1,
    ramp_elements=120,
    wave_quantisation=0.3,
    balance_flops_per_byte=95,
    bandwidth_fraction=0.7,
    norm=4,
    split_cycles=9000,
)


def test_known_parameters_are_fitted_back():
    rng = np.random.default_rng(1)
    m, n, k = 2 ** rng.uniform(0, 14, 400), 2 ** rng.uniform(6, 14, 400), 2 ** rng.uniform(6, 14, 400)

    def predict(curve):
        return gemm_s(np.ceil(m), d_in=np.ceil(k), d_out=np.ceil(n), chip=H100, curve=curve)

    noisy = predict(TRUE) * np.exp(rng.normal(0, 0.02, 400))
    found, _ = fit(GemmCurve, predict, noisy, fixed={"quantise_passes": 0.0})
    assert np.median(np.abs(predict(found) / predict(TRUE) - 1)) < 0.01
    assert found.start_cycles == pytest.approx(TRUE.start_cycles, rel=0.05)
    assert found.bandwidth_fraction == pytest.approx(TRUE.bandwidth_fraction, rel=0.05)
    assert found.balance_flops_per_byte == pytest.approx(TRUE.balance_flops_per_byte, rel=0.1)
    asymptotes = [curve.compute_fraction / (1 + curve.droop_fraction) for curve in (found, TRUE)]
    assert asymptotes[0] == pytest.approx(asymptotes[1], rel=0.1)


@given(st.sampled_from([GemmCurve, AttentionCurve, DecodeCurve, MoeCurve, NcclCurve, CustomCurve]), st.floats(0.1, 3))
def test_scales_go_there_and_back(form, factor):
    for scale in scales(form, {}):
        value = form.model_fields[scale.name].default or 1.0
        value = 1 + (value - 1) * factor if scale.form == "log above one" else value * factor
        if scale.form != "logit" or value < 0.99:
            assert scale.decode(scale.encode(value)) == pytest.approx(value, rel=1e-9)


# The split, and the committed files


def test_split_is_the_one_that_is_written_down():
    written = json.loads((ROOT / "studies" / "validation" / "split.json").read_text(encoding="utf-8"))
    assert written == rule()
    # Frozen: a change of the rule makes every published error incomparable.
    assert [n for n in (512, 1024, 2048, 4096, 8192, 12288) if is_test("gemm", (n, 4096))] == [1024, 8192]
    for algorithm in ("all_reduce", "custom_all_reduce"):
        assert [ranks for ranks in (2, 4, 8) if is_test("collective", (ranks, algorithm))] == [4]


def test_split_holds_out_about_three_in_ten():
    held = [is_test("attention", (heads, kv, d)) for heads in range(1, 30) for kv in range(1, 9) for d in (64, 128)]
    assert 0.25 < np.mean(held) < 0.35
    with pytest.raises(ValueError, match="must give heads, kv_heads, head_dim"):
        is_test("attention", (1, 2))
    assert set(COLUMNS) == {"gemm", "attention", "collective", "moe", "elementwise"}


@pytest.mark.parametrize("path", FITTED, ids=lambda path: path.stem)
def test_committed_fits_load(path):
    profile = read_fitted(path.read_text(encoding="utf-8"), path.name)
    assert path.name == f"{profile.device}.{profile.library}.toml"
    assert profile.device == "shared" or load_hardware(profile.device)
    assert all("commit" in source.note and "unknown" not in source.note for source in profile.sources)
    for curve in profile.curves:
        assert profile.find(curve.kind, curve.variant) is curve
        assert curve.sizes[-1].size == "all"
        assert all(size.low <= 0 <= size.high or size.size != "all" for size in curve.sizes)


def test_measured_devices_have_fits():
    devices = {path.name.partition(".")[0] for path in FITTED}
    assert devices >= {"a100-sxm4-80gb", "h100-sxm5-80gb", "l40s-48gb", "rtx-pro-6000-96gb"}


def test_unknown_curve_names_the_known_ones():
    profile = read_fitted(FITTED[0].read_text(encoding="utf-8"), FITTED[0].name)
    with pytest.raises(LookupError, match=r"unknown curve of .*gemm\.fp3"):
        profile.find("gemm", "fp3")
    with pytest.raises(ValueError, match=r"x\.toml is no TOML file"):
        read_fitted("a = ", "x.toml")
    text = FITTED[0].read_text(encoding="utf-8").replace("schema_version = 1", "schema_version = 2")
    with pytest.raises(ValueError, match="schema_version"):
        read_fitted(text, "x.toml")
