"""The catalogue of devices: complete, no rate above what second sources say, families that scale as printed."""

from __future__ import annotations

import math

import pytest

from costmodel import Image, Workload, hardware_names, load_hardware, predict

# The names of the public interface ("Names: Hardware"), which lives outside this repository.
NAMES = """
    v100-sxm2-32gb t4-16gb a10-24gb a30-24gb a40-48gb a100-sxm4-40gb a100-sxm4-80gb a100-pcie-80gb a800-sxm4-80gb
    l4-24gb l40s-48gb rtx-3090-24gb rtx-4090-24gb rtx-5090-32gb rtx-a6000-48gb rtx-6000-ada-48gb rtx-pro-6000-96gb
    h20-96gb h800-sxm5-80gb h100-sxm5-80gb h100-pcie-80gb h100-nvl-94gb h200-sxm-141gb b200-sxm-180gb b300-sxm-288gb
    gb200-nvl72-186gb mi210-64gb mi250x-128gb mi300x-192gb mi325x-256gb mi355x-288gb gaudi2-96gb gaudi3-128gb
    tpu-v5e-16gb tpu-v5p-95gb tpu-v6e-32gb ascend-910b-64gb jetson-agx-orin-64gb jetson-thor-128gb cpu-epyc-9654
"""
SLUGS = NAMES.split()

BEKMAN = "S. Bekman, Machine Learning Engineering (stas00/ml-engineering), compute/accelerator"
AICONFIGURATOR = "aiconfigurator system files (Apache-2.0, 095f58a)"
SPECS = "GitHub winston-zhang-orz/gpu-specs, specs.md"
SHEETS = "GitHub astroC86/gpu-datasheet, README.md"
THROTTLE = "torring.dev/blog/2026/rtx-spark-throttling: SMs x FLOP a cycle x clock, sparse fp4 / 16"
PRESS = "press tables of the export models (zangshuxian.com, jishuzhan.net)"

# Dense 16-bit peaks, fp32 accumulation, in TFLOP/s, from a source that is not the profile's own. For RTX 3090, A6000
# and 6000 Ada and MI210 no second one was found: the test of cycles below is their only check.
PUBLISHED_TFLOPS = {
    "v100-sxm2-32gb": (125, SPECS),
    "t4-16gb": (65, "Hugging Face RajBhope/gpu-runtime-predictor, gpu_catalog.json"),
    "a10-24gb": (125, SHEETS),
    "a30-24gb": (165, AICONFIGURATOR),
    "a40-48gb": (149.7, SHEETS),
    "a100-sxm4-40gb": (312, SPECS),
    "a100-sxm4-80gb": (312, AICONFIGURATOR),
    "a100-pcie-80gb": (312, AICONFIGURATOR),
    "a800-sxm4-80gb": (312, BEKMAN + ", the A100"),
    "l4-24gb": (121, AICONFIGURATOR),
    "l40s-48gb": (362.05, AICONFIGURATOR),
    "rtx-4090-24gb": (165.2, "hmc-tech.com, RTX 4090: Tensor FP16-32"),
    "rtx-5090-32gb": (209.5, THROTTLE),
    "rtx-pro-6000-96gb": (467.8, AICONFIGURATOR),
    "h20-96gb": (148, PRESS),
    "h800-sxm5-80gb": (989, BEKMAN + ", the H100"),
    "h100-sxm5-80gb": (989, AICONFIGURATOR),
    "h100-pcie-80gb": (756.5, AICONFIGURATOR),
    "h100-nvl-94gb": (1671 / 2, PRESS),
    "h200-sxm-141gb": (989, BEKMAN),
    "b200-sxm-180gb": (2250, BEKMAN),
    "b300-sxm-288gb": (2250, AICONFIGURATOR),
    "gb200-nvl72-186gb": (2500, AICONFIGURATOR),
    "mi250x-128gb": (383, BEKMAN),
    "mi300x-192gb": (1307.4, BEKMAN),
    "mi325x-256gb": (1307.4, BEKMAN + ", as the MI300X"),
    "mi355x-288gb": (20.1e3 / 8, "Tom's Hardware: 20.1 PFLOP/s of fp4 with sparsity"),
    "gaudi2-96gb": (432, BEKMAN),
    "gaudi3-128gb": (1677, BEKMAN),
    "tpu-v5e-16gb": (197, BEKMAN),
    "tpu-v5p-95gb": (459, BEKMAN),
    "tpu-v6e-32gb": (920, "jax/_src/pallas/mosaic/tpu_info.py"),
    "ascend-910b-64gb": (376, "Huawei, Atlas 800T A2, vector cores included"),
    "jetson-agx-orin-64gb": (170 / 4, "Jetson AGX Orin technical brief (mzph.cn): sparse int8 / 4"),
    "jetson-thor-128gb": (257.2, THROTTLE),
}
ROUNDED = 1.01  # published figures are rounded to three digits

# Dense 16-bit FLOP a cycle and core with fp32 accumulation, from descriptions of the architectures.
FLOPS_PER_CYCLE = {
    1024: "v100-sxm2-32gb t4-16gb a10-24gb a40-48gb rtx-a6000-48gb l4-24gb l40s-48gb rtx-6000-ada-48gb"
    " rtx-pro-6000-96gb mi210-64gb mi250x-128gb",
    512: "rtx-3090-24gb rtx-4090-24gb rtx-5090-32gb",  # GeForce: half
    2048: "a30-24gb a100-sxm4-40gb a100-sxm4-80gb a100-pcie-80gb a800-sxm4-80gb jetson-agx-orin-64gb mi300x-192gb"
    " mi325x-256gb",
    4096: "h100-sxm5-80gb h100-pcie-80gb h100-nvl-94gb h200-sxm-141gb h800-sxm5-80gb mi355x-288gb",
    8192: "b200-sxm-180gb b300-sxm-288gb gb200-nvl72-186gb jetson-thor-128gb ascend-910b-64gb",
}
CYCLES = [(slug, flops) for flops, slugs in FLOPS_PER_CYCLE.items() for slug in slugs.split()]

NO_BF16 = {"v100-sxm2-32gb", "t4-16gb"}
FACTOR_8_BITS = {"mi210-64gb": 1, "mi250x-128gb": 1, "gaudi3-128gb": 1, "rtx-3090-24gb": 4}  # others: 2


def peak(device, bits=16):
    return device.peak_flops_per_s[device.precision(bits)]


def test_every_name_of_the_interface_is_there():
    assert len(set(SLUGS)) == 40
    assert sorted(SLUGS) == hardware_names()


@pytest.mark.parametrize("slug", SLUGS)
def test_a_7b_model_can_be_priced(slug):
    device = load_hardware(slug)
    p = predict("qwen2.5-vl-7b", slug, Workload(images=[Image(640, 480)]))
    assert 0 < p.ttft_s < 1
    assert 0 < p.tpot_s < 1
    assert 0 < p.energy_j < math.inf
    assert device.precision(16) == ("fp16" if slug in NO_BF16 else "bf16")


@pytest.mark.parametrize("slug", PUBLISHED_TFLOPS)
def test_no_rate_is_above_a_second_source(slug):
    published, source = PUBLISHED_TFLOPS[slug]
    rates = load_hardware(slug).peak_flops_per_s
    for precision in {"bf16", "fp16"} & set(rates):
        assert rates[precision] <= published * 1e12 * ROUNDED, f"{precision}: {source}"
        assert rates[precision] >= published * 1e12 * 0.93, f"{precision}: {source}"


@pytest.mark.parametrize(("slug", "flops"), CYCLES)
def test_rates_follow_from_cores_and_clock(slug, flops):
    device = load_hardware(slug)
    assert peak(device) == pytest.approx(flops * device.core_count * device.clock_hz, rel=0.015)


@pytest.mark.parametrize("slug", SLUGS)
def test_narrower_formats_are_faster_by_the_usual_factors(slug):
    device = load_hardware(slug)
    rates = device.peak_flops_per_s
    if set(rates) & {"fp8", "int8"}:
        assert peak(device, 8) == pytest.approx(FACTOR_8_BITS.get(slug, 2) * peak(device), rel=0.015)
    if "tf32" in rates:
        assert rates["tf32"] == pytest.approx(peak(device) / 2, rel=0.02)
    assert rates.get("bf16", rates.get("fp16")) == rates.get("fp16", rates.get("bf16"))
    assert rates.get("fp32", 0.0) <= peak(device)


@pytest.mark.parametrize("slug", SLUGS)
def test_what_the_name_says_is_the_memory(slug):
    gigabytes = float(slug.rpartition("-")[2].removesuffix("gb")) if slug.endswith("gb") else 768.0
    in_gb = load_hardware(slug).memory_bytes / 1e9
    assert gigabytes * 0.97 <= in_gb <= gigabytes * 1.1


def test_ridge_points_are_plausible():
    ridges = {slug: peak(load_hardware(slug)) / load_hardware(slug).memory_bandwidth_bytes_per_s for slug in SLUGS}
    assert min(ridges, key=ridges.get) == "h20-96gb"
    assert max(ridges, key=ridges.get) == "jetson-thor-128gb"
    assert all(35 < ridge < 1000 for ridge in ridges.values())


# Families

SAME_COMPUTE = [
    ("a100-sxm4-40gb", "a100-sxm4-80gb"),
    ("a100-pcie-80gb", "a100-sxm4-80gb"),
    ("a800-sxm4-80gb", "a100-sxm4-80gb"),
    ("h800-sxm5-80gb", "h100-sxm5-80gb"),
    ("h200-sxm-141gb", "h100-sxm5-80gb"),
    ("mi325x-256gb", "mi300x-192gb"),
]


@pytest.mark.parametrize(("one", "other"), SAME_COMPUTE)
def test_siblings_compute_alike(one, other):
    assert load_hardware(one).peak_flops_per_s == load_hardware(other).peak_flops_per_s
    assert load_hardware(one).core_count == load_hardware(other).core_count


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ("a100-sxm4-40gb", "a100-pcie-80gb"),
        ("a100-pcie-80gb", "a100-sxm4-80gb"),
        ("h100-pcie-80gb", "h100-sxm5-80gb"),
        ("h100-sxm5-80gb", "h100-nvl-94gb"),
        ("h100-sxm5-80gb", "h20-96gb"),
        ("h100-nvl-94gb", "h200-sxm-141gb"),
        ("h200-sxm-141gb", "b200-sxm-180gb"),
        ("mi300x-192gb", "mi325x-256gb"),
        ("mi325x-256gb", "mi355x-288gb"),
        ("gaudi2-96gb", "gaudi3-128gb"),
        ("tpu-v5e-16gb", "tpu-v6e-32gb"),
        ("rtx-3090-24gb", "rtx-4090-24gb"),
        ("rtx-4090-24gb", "rtx-5090-32gb"),
        ("jetson-agx-orin-64gb", "jetson-thor-128gb"),
    ],
)
def test_memory_bandwidth_orders_relatives(less, more):
    assert load_hardware(less).memory_bandwidth_bytes_per_s < load_hardware(more).memory_bandwidth_bytes_per_s


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ("h20-96gb", "h100-pcie-80gb"),
        ("h100-pcie-80gb", "h100-nvl-94gb"),
        ("h100-nvl-94gb", "h100-sxm5-80gb"),
        ("a30-24gb", "a100-sxm4-40gb"),
        ("a10-24gb", "a40-48gb"),
        ("a40-48gb", "rtx-a6000-48gb"),
        ("l40s-48gb", "rtx-6000-ada-48gb"),
        ("h100-sxm5-80gb", "b200-sxm-180gb"),
        ("b200-sxm-180gb", "gb200-nvl72-186gb"),
        ("mi210-64gb", "mi250x-128gb"),
        ("tpu-v5e-16gb", "tpu-v5p-95gb"),
        ("tpu-v5p-95gb", "tpu-v6e-32gb"),
    ],
)
def test_16_bit_rates_order_relatives(less, more):
    assert peak(load_hardware(less)) < peak(load_hardware(more))


@pytest.mark.parametrize(
    ("slower", "faster", "factor"),
    [
        ("h800-sxm5-80gb", "h100-sxm5-80gb", 400 / 900),
        ("a800-sxm4-80gb", "a100-sxm4-80gb", 400 / 600),
        ("a100-sxm4-80gb", "h100-sxm5-80gb", 600 / 900),
        ("v100-sxm2-32gb", "a100-sxm4-40gb", 300 / 600),
        ("h200-sxm-141gb", "b200-sxm-180gb", 900 / 1800),
        ("mi325x-256gb", "mi355x-288gb", 128 / 153.6),
        ("gaudi2-96gb", "gaudi3-128gb", 100 / 200),
    ],
)
def test_scale_up_links_differ_as_printed(slower, faster, factor):
    slow, fast = (load_hardware(slug).links[0] for slug in (slower, faster))
    assert slow.kind == fast.kind
    assert slow.bandwidth_bytes_per_s == pytest.approx(factor * fast.bandwidth_bytes_per_s)


def test_a_geforce_runs_at_half_the_rate_of_its_professional_twin():
    for geforce, professional in (
        ("rtx-3090-24gb", "rtx-a6000-48gb"),
        ("rtx-4090-24gb", "rtx-6000-ada-48gb"),
        ("rtx-5090-32gb", "rtx-pro-6000-96gb"),
    ):
        one, other = load_hardware(geforce), load_hardware(professional)
        a_cycle, full = (peak(d) / d.core_count / d.clock_hz for d in (one, other))
        assert a_cycle == pytest.approx(full / 2, rel=0.01)


def test_an_mi250x_is_two_dies():
    whole, die = load_hardware("mi250x-128gb"), load_hardware("mi210-64gb")  # the MI210 is one die with fewer units
    for field in ("memory_bytes", "memory_bandwidth_bytes_per_s", "l2_bytes"):
        assert getattr(whole, field) == 2 * getattr(die, field)
    assert peak(whole) / whole.core_count == pytest.approx(peak(die) / die.core_count, rel=1e-3)


@pytest.mark.parametrize("slug", SLUGS)
def test_the_scale_up_link_comes_first(slug):
    links = load_hardware(slug).links
    assert all(links[0].bandwidth_bytes_per_s >= link.bandwidth_bytes_per_s for link in links)
    assert bool(links) != slug.startswith("jetson")


def test_a_bridge_can_be_taken_away():
    bridged = load_hardware("h100-pcie-80gb")
    bare = load_hardware("h100-pcie-80gb:links.nvlink.devices=1")
    assert (bridged.link(2).kind, bridged.link(4).kind) == ("nvlink", "pcie")
    assert bare.link(2).kind == "pcie"
