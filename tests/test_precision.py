"""Narrower numbers: what they weigh, which matrix unit computes them, and where they are faster or slower."""

import pytest

from costmodel import Precision, Unsupported, Workload, hardware_names, load_hardware, load_model, predict
from costmodel.blocks import kv_bytes_each, weight_bytes_each
from costmodel.hardware import PRECISIONS_BY_BITS
from costmodel.operators import Kind
from tests.helpers import assert_clean, images
from tests.kinds import GROUPED, KINDS, LATENT, RECURRENT, WITH_EXPERTS

A100, H100 = "a100-sxm4-80gb", "h100-sxm5-80gb"
FULL = Precision()
W4A16, W8A16, W8A8 = Precision(4, 16, 16), Precision(8, 16, 16), Precision(8, 8, 16)
LONG, SHORT = Workload(text_tokens=8000, output_tokens=2), Workload(text_tokens=10, output_tokens=2)


def at(name, workload, precision, *, device=A100, batch=1, engine="fused"):
    return predict(name, device, workload, batch=batch, precision=precision, engine=engine)


def close(value, other, rel=1e-12):
    return value == pytest.approx(other, rel=rel, abs=0.0)


# What numbers weigh


def test_bytes_of_a_weight():
    assert [weight_bytes_each(bits) for bits in (32, 16, 8)] == [4, 2, 1]
    assert weight_bytes_each(4) == (4 + 16 / 128) / 8  # a 16-bit scale for 128 weights


def test_bytes_of_a_cached_number():
    assert [kv_bytes_each(bits) for bits in (16, 8)] == [2, 1]
    assert kv_bytes_each(4) == (4 + 32 / 32) / 8  # a 16-bit scale and zero point for 32 numbers
    assert kv_bytes_each(2) == (2 + 32 / 32) / 8


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_weights_of_the_layers_shrink_and_the_rest_stays(name, bits):
    full, narrow = (at(name, SHORT, precision).memory for precision in (FULL, Precision(bits, 16, 16)))
    decoder = load_model(name).decoder
    saved = decoder.layer_parameters * (2 - weight_bytes_each(bits))
    assert close(full.language_weights_bytes - narrow.language_weights_bytes, saved)
    assert narrow.vision_weights_bytes == full.vision_weights_bytes


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("bits", "share"), [(8, 1 / 2), (4, 5 / 16), (2, 3 / 16)])
def test_the_cache_shrinks_by_its_bits(name, bits, share):
    full, narrow = (at(name, images((900, 600)), p, engine="ideal") for p in (FULL, Precision(kv_bits=bits)))
    states = load_model(name).decoder.state_bytes  # of 32 bits, whatever the cache has
    assert close(narrow.memory.kv_bytes - states, (full.memory.kv_bytes - states) * share)
    assert narrow.memory.weights_bytes == full.memory.weights_bytes
    assert narrow.stages["decode"].kv_bytes < full.stages["decode"].kv_bytes
    if name != RECURRENT:
        assert close(narrow.stages["decode"].kv_bytes, full.stages["decode"].kv_bytes * share)
    assert narrow.stages["prefill"].flops == full.stages["prefill"].flops
    assert narrow.tpot_s < full.tpot_s
    assert narrow.max_batch >= full.max_batch


# Which unit computes


def linear_bits(prediction, stage="prefill"):
    """Return the widths of products that are neither attention nor head, and the kinds that compute them."""
    table = prediction.stages[stage].priced.table
    products = (Kind.GEMM, Kind.MOE_GEMM, Kind.DEQUANT_GEMM)
    rows = [
        (int(bits), Kind(int(kind)))
        for name, bits, kind in zip(table.names, table.bits, table.kinds, strict=True)
        if kind in products and not name.endswith(".head")
    ]
    return {bits for bits, _ in rows}, {kind for _, kind in rows}


@pytest.mark.parametrize(
    ("precision", "bits", "kind"),
    [
        (FULL, 16, Kind.GEMM),
        (W8A8, 8, Kind.GEMM),
        (W4A16, 16, Kind.DEQUANT_GEMM),
        (W8A16, 16, Kind.DEQUANT_GEMM),
        (Precision(4, 8, 16), 8, Kind.DEQUANT_GEMM),
        (Precision(4, 4, 16), 4, Kind.GEMM),
    ],
    ids=str,
)
def test_products_run_at_the_width_of_their_inputs(precision, bits, kind):
    p = at(GROUPED, LONG, precision)
    assert linear_bits(p) == linear_bits(p, "decode") == ({bits}, {kind})
    table = p.stages["prefill"].priced.table
    others = {int(b) for name, b in zip(table.names, table.bits, strict=True) if "attention" in name or "head" in name}
    assert others == {16}  # attention and the head stay


def test_the_encoder_is_not_quantised():
    narrow, full = (at(GROUPED, images((900, 600)), p) for p in (W8A8, FULL))
    for stage in ("encode", "adapt"):
        assert narrow.stages[stage].time_s == full.stages[stage].time_s


UNITS = [
    (A100, "int8"),
    (H100, "fp8"),
    ("mi300x-192gb", "fp8"),
    ("mi210-64gb", "int8"),
    ("rtx-4090-24gb", "fp8"),
    ("tpu-v6e-32gb", "int8"),
    ("gaudi2-96gb", "fp8"),
    ("t4-16gb", "int8"),
    ("b300-sxm-288gb", "fp8"),
]


@pytest.mark.parametrize(("device", "unit"), UNITS)
def test_eight_bits_run_on_the_unit_that_the_device_has(device, unit):
    hardware = load_hardware(device)
    assert hardware.precision(8) == unit
    p = at(GROUPED, LONG, W8A8, device=device, engine="ideal")
    (up,) = (o for o in p.stages["prefill"].operators if o.name == "prefill.up")
    assert close(up.compute_s, up.flops / hardware.peak_flops_per_s[unit])


@pytest.mark.parametrize("device", hardware_names())
def test_a_width_that_a_device_lacks_is_refused(device):
    hardware = load_hardware(device)
    for bits in (4, 8, 16):
        if set(PRECISIONS_BY_BITS[bits]) & set(hardware.peak_flops_per_s):
            assert at(GROUPED, LONG, Precision(4, bits, 16), device=device).ttft_s > 0
            continue
        with pytest.raises(Unsupported, match=f"activation_bits={bits} has no matrix unit on {device}") as raised:
            at(GROUPED, LONG, Precision(4, bits, 16), device=device)
        assert_clean(raised.value)


@pytest.mark.parametrize(
    ("device", "bits"), [(H100, 4), ("v100-sxm2-32gb", 8), ("mi300x-192gb", 4), ("gaudi2-96gb", 4)]
)
def test_some_devices_lack_some_widths(device, bits):
    with pytest.raises(Unsupported, match="no matrix unit"):
        at(GROUPED, LONG, Precision(4, bits, 16), device=device)


# Faster and slower


@pytest.mark.parametrize("name", [name for name in KINDS if name not in WITH_EXPERTS])
@pytest.mark.parametrize("precision", [W4A16, W8A16], ids=str)
def test_widening_weights_slows_prefill_and_speeds_decode(name, precision):
    full, narrow = (at(name, LONG, p) for p in (FULL, precision))
    assert narrow.stages["prefill"].time_s > 1.2 * full.stages["prefill"].time_s
    assert narrow.tpot_s < 0.8 * full.tpot_s
    assert close(narrow.stages["prefill"].flops, full.stages["prefill"].flops)
    crowded = [at(name, SHORT, p, batch=2000).stages["decode"].time_s for p in (FULL, precision)]
    assert crowded[1] > crowded[0]  # thousands of sequences are a prefill


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_narrow_experts_speed_decode(name):
    full, narrow = (at(name, LONG, p) for p in (FULL, W4A16))
    assert narrow.tpot_s < full.tpot_s


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("device", [A100, H100])
def test_eight_bits_speed_both(name, device):
    full, narrow = (at(name, LONG, p, device=device) for p in (FULL, W8A8))
    assert narrow.stages["prefill"].time_s < full.stages["prefill"].time_s
    assert narrow.tpot_s < full.tpot_s


def test_four_bits_reach_the_published_slowdown():
    # FastV repository: LLaVA-1.5-13B on an A100, 0.203 s at 16 bits and 0.308 s with 4-bit weights
    full, narrow = (at("llava-1.5-13b", images((336, 336)), p).stages["prefill"].time_s for p in (FULL, W4A16))
    assert narrow / full == pytest.approx(0.308 / 0.203, rel=0.05)


# What nobody stores


@pytest.mark.parametrize("bits", [0, 5, 7, 12, 64, -8, 16.5, None, "16"])
@pytest.mark.parametrize("field", ["weight_bits", "activation_bits", "kv_bits"])
def test_widths_that_nobody_stores_are_refused(field, bits):
    with pytest.raises(ValueError, match=f"Precision.{field}=") as raised:
        Precision(**{field: bits})
    assert_clean(raised.value)


def test_inputs_narrower_than_weights_are_refused():
    with pytest.raises(Unsupported, match="activation_bits=8 below weight_bits=16") as raised:
        Precision(16, 8, 16)
    assert_clean(raised.value)


def test_a_latent_may_be_narrow_too():
    full, narrow = (at(LATENT, LONG, Precision(kv_bits=bits)).memory.kv_bytes for bits in (16, 8))
    assert close(full, 2 * narrow)
