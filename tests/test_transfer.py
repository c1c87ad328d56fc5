"""Curves that devices share: joint fits of known laws, bands for unseen devices, the rule, and the committed files."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hardware_profiles
from costmodel import Unsupported, load_hardware
from costmodel.efficiency import Chip, ElementwiseCurve, GemmCurve, elementwise_s, gemm_s
from costmodel.efficiency.fitted import read_fitted
from costmodel.efficiency.transfer import Figure, is_foreign, link_class, repaired, shared_band, shared_variant
from runtime.envelope import MARGIN, envelope
from runtime.fitting import Scored
from runtime.grouping import family, groups
from runtime.recipes import GEMM_RESIDENT
from runtime.tables import Samples
from runtime.transfer import transfer
from studies.validation.split import is_test
from studies.validation.transfer import CHECKED, measured
from studies.validation.transfer_report import REPORT, load_shared, report, target_of

A100, L40S, H100, A40 = (
    load_hardware(f"{name}") for name in ("a100-sxm4-80gb", "l40s-48gb", "h100-sxm5-80gb", "a40-48gb")
)
TRUE = GemmCurve(start_cycles=9000, balance_flops_per_byte=50, bandwidth_fraction=0.7, compute_fraction=0.8)
EDGES = (10.0, 100.0)
FITTED = Path(hardware_profiles.__file__).parent / "fitted"
SHARED = load_shared()
CURVES = [(profile.library, curve) for profile in SHARED for curve in profile.curves]
IDS = [f"{library} {curve.kind}.{curve.variant}" for library, curve in CURVES]


def products(hardware, seed, n_rows=700):
    rng = np.random.default_rng(seed)
    m, n, k = (np.ceil(2 ** rng.uniform(*ends, n_rows)).astype(int) for ends in ((0, 14), (6, 14), (6, 14)))
    seconds = gemm_s(m, d_in=k, d_out=n, chip=Chip.of(hardware), curve=TRUE, resident_share=GEMM_RESIDENT)
    noisy = seconds * np.exp(rng.normal(0, 0.02, n_rows))
    return Samples("gemm", "bf16", "sglang", "1", (), {"m": m, "n": n, "k": k}, noisy)


# Joint fits


def test_two_devices_show_the_constants_that_they_share():
    (group,) = groups([(A100, [products(A100, 1)]), (L40S, [products(L40S, 2)])], is_test=is_test, seed=0)
    (shared,) = transfer([group])
    found = shared.joint.curve
    assert found.start_cycles == pytest.approx(TRUE.start_cycles, rel=0.05)
    assert found.bandwidth_fraction == pytest.approx(TRUE.bandwidth_fraction, rel=0.05)
    assert found.balance_flops_per_byte == pytest.approx(TRUE.balance_flops_per_byte, rel=0.1)
    # What the one device shows is right on the other, and the bands are little wider than the noise.
    assert set(shared.left_out) == {A100.name, L40S.name}
    assert all(rows[-1].median < 0.03 and rows[-1].coverage > 0.9 for rows in shared.left_out.values())
    assert max(shared.repaired.values()) < 0.05
    assert np.abs(shared.bands.of_all).max() < 0.15


def test_what_a_core_moves_shows_among_devices_alone():
    true = ElementwiseCurve(core_bytes_per_cycle=5.0, bandwidth_fraction=0.8, norm=2)
    pairs = []
    for seed, hardware in enumerate((A100, H100, A40)):
        rng = np.random.default_rng(seed)
        width = rng.integers(1, 60, 300) * 128
        traffic = 2 ** rng.uniform(16, 31, 300)
        seconds = elementwise_s(traffic, chip=Chip.of(hardware), curve=true, resident=True)
        work = {"operator": np.full(300, "rope"), "width": width, "traffic_bytes": traffic}
        pairs.append((hardware, [Samples("elementwise", "rope", "vidur", "", (), work, seconds)]))
    (shared,) = transfer(groups(pairs, is_test=is_test, seed=0))
    assert shared.joint.curve.core_bytes_per_cycle == pytest.approx(5.0, rel=0.1)
    (alone,) = transfer(groups(pairs[:1], is_test=is_test, seed=0))
    assert alone.joint.curve.core_bytes_per_cycle == ElementwiseCurve().core_bytes_per_cycle
    assert alone.errors[-1].rows == 0
    assert not alone.left_out


# Bands


def scored(log_ratio, sizes=None):
    log_ratio = np.asarray(log_ratio)
    return Scored(np.full(len(log_ratio), 5.0) if sizes is None else sizes, np.exp(log_ratio), np.ones(len(log_ratio)))


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0.01, 0.5)), min_size=2, max_size=5), st.integers(0, 99))
def test_bands_hold_every_device_and_its_mirror_image(devices, seed):
    rng = np.random.default_rng(seed)
    parts = [scored(rng.normal(bias, spread, 200), 2 ** rng.uniform(0, 8, 200)) for bias, spread in devices]
    bands = envelope(parts, EDGES, devices=len(parts))
    assert np.all(bands.by_size[:, 0] <= 0)
    assert np.all(bands.by_size[:, 1] >= 0)
    for part in parts:
        assert bands.inside(part, EDGES).mean() >= 0.85
        middle = np.median(part.log_ratio)
        turned = scored(part.log_ratio - 2 * middle, part.sizes)  # as far on the other side
        low, high = bands.of_all
        assert np.mean((turned.log_ratio >= low) & (turned.log_ratio <= high)) >= 0.85


def test_of_a_pair_the_band_of_one_holds_the_other():
    one = scored(np.random.default_rng(0).exponential(0.3, 400) + 0.2)
    bands = envelope([one], EDGES, devices=2)
    assert bands.inside(scored(-one.log_ratio), EDGES).mean() > 0.9
    assert bands.of_all == pytest.approx(MARGIN * np.quantile(one.log_ratio, 0.95) * np.array([-1, 1]))


def test_bands_are_wider_beyond_the_measured_kinds():
    foreign = {"mi300x-192gb": True, "b200-sxm-180gb": True, "v100-sxm2-32gb": True}
    known = {"h200-sxm-141gb": False, "rtx-5090-32gb": False, "l4-24gb": False, "a10-24gb": False}
    for name, expected in (foreign | known).items():
        hardware = load_hardware(name)
        assert is_foreign(hardware) is expected
        low, high = shared_band(-0.2, 0.3, hardware)
        if expected:
            assert -1 < low < -0.2 < 0.3 < high
        else:
            assert (low, high) == pytest.approx((-0.2, 0.3))


# The rule


@pytest.mark.parametrize(
    ("kind", "device", "names", "prefix", "expected"),
    [
        ("prefill_attention", "h200-sxm-141gb", ("fa2", "fa3"), "", "fa3"),
        ("prefill_attention", "rtx-4090-24gb", ("fa2", "fa3"), "", "fa2"),
        ("prefill_attention", "a10-24gb", ("fa3", "flash", "flashinfer", "triton"), "", "flash"),
        ("prefill_attention", "rtx-5090-32gb", ("fa3", "flash", "flashinfer", "triton"), "", "flashinfer"),
        ("decode_attention", "h20-96gb", ("mha.fa3", "gqa.fa3", "gqa.fa2"), "gqa.", "gqa.fa3"),
        ("encoder_attention", "mi300x-192gb", ("fa3", "triton"), "", "triton"),
        ("gemm", "l4-24gb", ("bf16", "fp8"), "fp8", "fp8"),
        ("moe_gemm", "h200-sxm-141gb", ("fp8.cutlass", "fp8.cutlass_hopper"), "fp8", "fp8.cutlass_hopper"),
        ("moe_gemm", "rtx-5090-32gb", ("bf16.cutlass", "bf16.triton"), "bf16", "bf16.cutlass"),
        ("moe_gemm", "rtx-4090-24gb", ("bf16.cutlass", "bf16.triton"), "bf16.", "bf16.triton"),
        ("collective", "a800-sxm4-80gb", ("all_reduce.host", "all_reduce.switch"), "all_reduce", "all_reduce.switch"),
        ("collective", "rtx-4090-24gb", ("all_reduce.host", "all_reduce.switch"), "all_reduce", "all_reduce.host"),
        ("elementwise", "a10-24gb", ("norm", "rope"), "norm", "norm"),
    ],
)
def test_generation_and_links_choose_the_kernels(kind, device, names, prefix, expected):
    assert shared_variant(kind, load_hardware(device), names, prefix=prefix) == expected


def test_links_beyond_a_bridged_pair_go_through_the_host():
    bridged = load_hardware("a100-pcie-80gb")
    assert link_class(bridged, 2) == "switch"
    assert link_class(bridged, 4) == "host"


def test_rule_refuses_what_it_does_not_hold_for():
    with pytest.raises(Unsupported, match="tpu-v5e-16gb is of kind accelerator"):
        shared_variant("gemm", load_hardware("tpu-v5e-16gb"), ["bf16"], prefix="bf16")
    with pytest.raises(LookupError, match=r"unknown shared gemm curve for a10-24gb 'fp8'"):
        shared_variant("gemm", load_hardware("a10-24gb"), ["bf16"], prefix="fp8")


# Two figures


def figure(curve, hardware, rows, d_in, d_out):
    time_s = float(gemm_s(rows, d_in=d_in, d_out=d_out, chip=Chip.of(hardware), curve=curve))
    return Figure(rows=rows, d_in=d_in, d_out=d_out, time_s=time_s)


@pytest.mark.parametrize("hardware", [A100, L40S], ids=lambda hardware: hardware.name)
def test_two_figures_give_the_two_shares_back(hardware):
    true = TRUE.model_copy(update={"compute_fraction": 0.55, "bandwidth_fraction": 0.9})
    large, stream = figure(true, hardware, 8192, 8192, 8192), figure(true, hardware, 4, 16384, 16384)
    found = repaired(TRUE, chip=Chip.of(hardware), large=large, stream=stream)
    assert found.compute_fraction == pytest.approx(0.55, rel=1e-3)
    assert found.bandwidth_fraction == pytest.approx(0.9, rel=1e-3)
    changed = {"compute_fraction", "bandwidth_fraction"}
    assert found.model_dump(exclude=changed) == TRUE.model_dump(exclude=changed)
    assert repaired(TRUE, chip=Chip.of(hardware)) == TRUE


def test_a_figure_that_no_share_explains_is_refused():
    with pytest.raises(ValueError, match=r"time_s=1e-09 of a product of 8192 x 8192 x 8192 is shorter than compute_fr"):
        repaired(TRUE, chip=Chip.of(A100), large=Figure(8192, 8192, 8192, 1e-9))


# The committed files


@pytest.mark.parametrize(("library", "curve"), CURVES, ids=IDS)
def test_shared_curves_name_their_devices_and_hold_zero(library, curve):
    assert all(load_hardware(name).kind == "gpu" for name in curve.devices)
    left_out = [device.device for device in curve.left_out]
    assert left_out == (list(curve.devices) if len(curve.devices) > 1 else [])
    assert all(size.low <= 0 <= size.high for size in curve.sizes)
    ends = [size.up_to for size in curve.sizes[:-2]]
    assert all(one < two for one, two in pairwise(ends))
    assert sum(device.rows for device in curve.left_out) == curve.sizes[-1].rows
    assert library in ("nccl", "sglang", "trtllm", "vidur", "vllm")


def measured_curves():
    for path in sorted(FITTED.glob("*.toml")):
        profile = read_fitted(path.read_text(encoding="utf-8"), path.name)
        if profile.device != "shared" and profile.library != "llmcompass":
            yield from ((profile, curve) for curve in profile.curves)


def test_every_measured_curve_has_a_shared_one_that_saw_its_device():
    by_library = {profile.library: profile for profile in SHARED}
    for profile, curve in measured_curves():
        names = [other.variant for other in by_library[profile.library].curves if other.kind == curve.kind]
        prefix = "" if curve.kind in ("prefill_attention", "encoder_attention") else curve.variant.partition(".")[0]
        variant = shared_variant(curve.kind, load_hardware(profile.device), names, prefix=prefix)
        assert profile.device in by_library[profile.library].find(curve.kind, variant).devices


def test_bands_of_unseen_devices_are_wider_than_those_of_seen_ones():
    """The band of a shared curve is wider than that of every device file that it stands for, in logarithms."""
    by_library = {profile.library: profile for profile in SHARED}
    narrower = []
    for profile, curve in measured_curves():
        hardware = load_hardware(profile.device)
        samples = Samples(curve.kind, curve.variant, profile.library, "", (), {"ranks": np.array([2])}, np.ones(1))
        shared = by_library[profile.library].find(curve.kind, family(samples, hardware)).sizes[-1]
        own = curve.sizes[-1]
        widths = [math.log((1 + size.high) / (1 + size.low)) for size in (shared, own)]
        if widths[0] < widths[1]:
            narrower.append((profile.device, profile.library, curve.kind, curve.variant))
    assert narrower == []


def test_report_is_that_of_the_committed_files():
    assert REPORT.read_text(encoding="utf-8") == report(SHARED)


def test_left_out_devices_meet_their_targets_but_for_those_that_the_report_explains():
    missed = {
        (device.device.partition("-")[0], curve.kind.partition("_")[0], curve.variant)
        for library, curve in CURVES
        for device in curve.left_out
        if (target := target_of(library, curve)) is not None and (device.median or 0) > target
    }
    assert missed == {
        ("a100", "decode", "gqa.fa2"),
        ("a100", "decode", "mha.fa2"),
        ("l40s", "decode", "mha.triton"),
        ("rtx", "decode", "mha.triton"),
        ("rtx", "prefill", "flashinfer"),
    }


def test_products_of_left_out_devices_meet_their_mean():
    products = [curve for _, curve in CURVES if (curve.kind, curve.variant) == ("gemm", "bf16")]
    medians = [device.median for curve in products for device in curve.left_out]
    assert len(medians) == 8
    assert np.mean(medians) < 0.12
    assert np.mean([device.repaired for curve in products for device in curve.left_out]) < np.mean(medians)
    assert all(device.coverage > 0.8 for curve in products for device in (*curve.left_out, *curve.beyond))
    assert len(CHECKED) == len([curve for _, curve in CURVES if curve.beyond])


# Real tables


def test_committed_curves_are_those_of_the_tables(shared_data):
    kept = [
        (hardware, [some for some in tables if some.name == "elementwise.rope"])
        for hardware, tables in measured(shared_data / "data")
    ]
    (shared,) = transfer(groups(kept, is_test=is_test, seed=0))
    written = next(profile for profile in SHARED if profile.library == "vidur").find("elementwise", "rope")
    assert shared.joint.curve.model_dump() == pytest.approx(dict(written.parameters), rel=0.01)
