"""The survey's equations (arXiv:2604.05546) against the engine `paper`, written out from the model's dimensions."""

import numpy as np
import pytest

from costmodel import Image, Parallelism, Precision, Video, Workload, load_hardware, load_model, predict
from costmodel import equations as eq
from costmodel.counts import count
from costmodel.energy import energy_per_token_j
from tests.helpers import POINT, images
from tests.kinds import CROSS, EXPERTS, LATENT, RECURRENT, SLIDING

A100 = "a100-sxm4-80gb"
PEAK, BANDWIDTH, TDP = 312e12, 2.039e12, 400.0  # FLOP/s, bytes/s, W: its datasheet

# (L, D_L, query width, key/value width, FFN width, vocabulary, tied head, biases on q, k and v)
LANGUAGE = {
    "llava-1.5-7b": (32, 4096, 4096, 4096, 11008, 32064, False, False),
    "qwen2.5-vl-3b": (36, 2048, 2048, 256, 11008, 151936, True, True),
    "qwen2.5-vl-7b": (28, 3584, 3584, 512, 18944, 152064, False, True),
    "internvl3-8b": (28, 3584, 3584, 512, 18944, 151674, False, True),
}


def language_parameters(name):
    n_layers, width, q_width, kv_width, ffn, vocabulary, tied, biased = LANGUAGE[name]
    attention = width * (q_width + 2 * kv_width) + q_width * width + (q_width + 2 * kv_width) * biased
    layer = attention + 3 * width * ffn + 2 * width
    return n_layers * layer + vocabulary * width * (1 if tied else 2) + width


def cache_bytes_per_token(name):
    n_layers, width, _, kv_width, *_ = LANGUAGE[name]
    return 2 * n_layers * width * (kv_width / width) * 2  # Eq. 5: 2 L D_L r_kv P


@pytest.fixture(params=LANGUAGE)
def name(request):
    return request.param


def paper(name, workload, **settings):
    return predict(name, A100, workload, engine="paper", **settings)


def test_equation_2_adds_the_stages_and_a_step_for_every_output_token(name):
    p = paper(name, images((640, 480), output_tokens=57))
    assert p.ttft_s == pytest.approx(p.stages["encode"].time_s + p.stages["prefill"].time_s, **POINT)
    assert p.total_s == pytest.approx(p.ttft_s + 57 * p.tpot_s, **POINT)
    assert p.stages["preprocess"].time_s == p.stages["adapt"].time_s == 0


def test_equation_3_of_a_fixed_resolution_encoder():
    # CLIP ViT-L/14 at 336: 23 of 24 layers are needed, 577 rows, width 1024, FFN 4096
    rows, width, ffn, n_layers = 577, 1024, 4096, 23
    layer = 2 * rows * (4 * width**2 + 2 * width * ffn) + 4 * rows**2 * width
    flops = n_layers * layer + 2 * 576 * (3 * 14 * 14) * width
    assert paper("llava-1.5-7b", images((1000, 600))).stages["encode"].time_s == pytest.approx(flops / PEAK, **POINT)


def test_equation_3_of_a_windowed_encoder():
    # Qwen2.5-VL at 336x224: 24x16 patches, so 6 windows of 64; 28 layers see a window, 4 the whole image
    patches, width, ffn = 24 * 16, 1280, 3420
    linear = 32 * 2 * patches * (4 * width**2 + 3 * width * ffn) + 2 * patches * (3 * 2 * 14 * 14) * width
    pairs = 4 * patches**2 + 28 * 6 * 64**2
    p = paper("qwen2.5-vl-7b", images((336, 224)))
    assert p.stages["encode"].time_s == pytest.approx((linear + 4 * pairs * width) / PEAK, **POINT)


@pytest.mark.parametrize("tokens", [10, 100, 152, 154, 1000, 30000])
def test_equation_4_is_the_higher_of_attention_and_cache(name, tokens):
    n_layers, _, q_width, *_ = LANGUAGE[name]
    attention_s = n_layers * 4 * tokens**2 * q_width / PEAK
    cache_s = tokens * cache_bytes_per_token(name) / BANDWIDTH
    p = paper(name, Workload(text_tokens=tokens))
    assert p.stages["prefill"].time_s == pytest.approx(max(attention_s, cache_s), **POINT)
    assert p.stages["prefill"].bound == ("compute" if attention_s > cache_s else "memory")


def test_equation_5_is_the_cache(name):
    p = paper(name, images((640, 480), text_tokens=40, output_tokens=9))
    tokens = p.tokens["prompt"] + 9
    assert p.memory.kv_bytes == pytest.approx(tokens * cache_bytes_per_token(name), **POINT)
    n_layers, width, _, kv_width, *_ = LANGUAGE[name]
    formula = eq.kv_bytes(n_layers=n_layers, tokens=tokens, width=width, kv_ratio=kv_width / width)
    assert p.memory.kv_bytes == pytest.approx(formula, **POINT)


# No more devices than key/value heads: beyond, heads are copied, which Eq. 6 does not know.
DEVICES = [(name, n) for name, dims in LANGUAGE.items() for n in (1, 2, 4) if n <= dims[3] // 128]


@pytest.mark.parametrize(("name", "n_devices"), DEVICES)
def test_equation_6_reads_weights_and_cache_through_all_devices(name, n_devices):
    p = paper(name, images((640, 480), output_tokens=31), parallelism=Parallelism(tp=n_devices))
    prompt, each = p.tokens["prompt"], cache_bytes_per_token(name)
    step_s = [(2 * language_parameters(name) + (prompt + i) * each) / (n_devices * BANDWIDTH) for i in range(1, 32)]
    assert p.tpot_s == pytest.approx(np.mean(step_s), **POINT)
    assert p.stages["decode"].step_time_s == pytest.approx((step_s[0], step_s[15], step_s[-1]), **POINT)
    assert p.stages["decode"].time_s == pytest.approx(sum(step_s), **POINT)


# name, bytes that a token adds to the caches, bytes that stay whatever the context
KEPT = [
    (EXPERTS, 2 * 48 * 4 * 128 * 2, 0),
    (LATENT, 27 * (512 + 64) * 2, 0),
    (RECURRENT, 10 * 2 * 2 * 256 * 2, 30 * (32 * 128 * 128 * 4 + 8192 * 3 * 2)),
    (CROSS, 2 * 32 * 8 * 128 * 2, 0),  # without pictures none of the layers that see them
]


@pytest.mark.parametrize(("kind", "each", "fixed"), KEPT)
@pytest.mark.parametrize("batch", [1, 5])
def test_equations_5_and_6_of_other_layers(kind, each, fixed, batch):
    p = paper(kind, Workload(text_tokens=300, output_tokens=31), batch=batch)
    assert p.memory.kv_bytes == pytest.approx(batch * (331 * each + fixed), **POINT)
    weights = 2 * load_model(kind).parameters()["language"]  # the survey's equations know no experts: all are read
    step_s = [(weights + batch * ((300 + i) * each + fixed)) / BANDWIDTH for i in range(1, 32)]
    assert p.tpot_s == pytest.approx(np.mean(step_s), **POINT)


def test_equation_5_of_windows():
    p = paper(SLIDING, Workload(text_tokens=3000, output_tokens=31))
    assert p.memory.kv_bytes == pytest.approx((5 * 3031 + 29 * 1023) * 2 * 4 * 256 * 2, **POINT)
    reads = 5 * np.mean([3000 + i for i in range(1, 32)]) + 29 * 1024  # a step sees itself too
    weights = 2 * load_model(SLIDING).parameters()["language"]
    assert p.tpot_s == pytest.approx((weights + reads * 2 * 4 * 256 * 2) / BANDWIDTH, **POINT)


def test_equation_9_is_the_power_limit_over_a_token(name):
    p = paper(name, images((640, 480), output_tokens=20))
    assert energy_per_token_j(TDP, p.tpot_s) == pytest.approx(TDP * p.tpot_s, **POINT)
    first = paper(name, images((640, 480), output_tokens=19))
    last_step_s = p.total_s - first.total_s
    assert p.energy_j - first.energy_j == pytest.approx(TDP * last_step_s, rel=1e-9)
    assert p.energy_j == pytest.approx(TDP * p.total_s, **POINT)


def test_equation_10_ridge_of_the_a100_is_153():
    device = load_hardware(A100)
    ridge = eq.ridge_flops_per_byte(device.peak_flops_per_s["bf16"], device.memory_bandwidth_bytes_per_s)
    assert round(ridge, 1) == 153.0


@pytest.mark.parametrize(("batch", "weight_bits"), [(1, 16), (8, 16), (1, 8)])
def test_equation_11_decode_does_one_flop_a_byte(name, batch, weight_bits):
    precision = Precision(weight_bits=weight_bits)
    stage = paper(name, images((640, 480)), batch=batch, precision=precision).stages["decode"]
    parameters = language_parameters(name)
    assert stage.flops / stage.weight_bytes == pytest.approx(batch * 16 / weight_bits, **POINT)
    formula = eq.decode_intensity_flops_per_byte(parameters, bytes_each=weight_bits / 8, batch=batch)
    assert stage.flops / stage.weight_bytes == pytest.approx(formula, **POINT)
    assert stage.intensity_flops_per_byte < batch * 16 / weight_bits  # the cache is read beside the weights


def test_decode_of_all_operators_does_about_one_flop_a_byte():
    stages = predict("qwen2.5-vl-7b", A100, images((640, 480)), engine="fused").stages
    assert 0.85 < stages["decode"].intensity_flops_per_byte < 1.1  # survey, Figure 4: about 1
    encode, prefill, decode = (stages[stage].intensity_flops_per_byte for stage in ("encode", "prefill", "decode"))
    assert min(encode, prefill) > 100 * decode


# Numbers of the text


def test_a_token_of_the_72b_is_327680_bytes():
    assert count("qwen2.5-vl-72b", Workload()).kv_bytes_per_token == 327680 == 2 * 80 * 8 * 128 * 2


def test_twenty_images_exceed_40k_tokens_and_13_gb():
    at_1080p = count("qwen2.5-vl-72b", images(*[(1920, 1080)] * 20, text_tokens=1))
    assert at_1080p.tokens["visual"] == 53820  # over 40 000
    assert at_1080p.kv_bytes > 13e9
    assert at_1080p.kv_bytes == pytest.approx(17.6e9, rel=5e-3)
    assert count("qwen2.5-vl-72b", images(*[(1024, 768)] * 20)).tokens["visual"] == 19980  # too small for the claim


def test_five_seconds_of_720p_exceed_50k_tokens_and_16_gb():
    every_frame = Workload(videos=[Video(1280, 720, seconds=5.0, fps=24.0, sample_fps=24.0)], text_tokens=1)
    counts = count("qwen2.5-vl-72b", every_frame)
    assert counts.tokens["visual"] == 120 // 2 * 1196  # over 50 000
    assert counts.kv_bytes > 16e9


def test_a_336_pixel_image_is_576_tokens():
    assert count("llava-1.5-7b", Workload(images=[Image(336, 336)])).tokens["visual"] == 576 == (336 // 14) ** 2


def test_the_cache_can_exceed_the_weights_and_is_mostly_visual():
    sizes, text = [(1920, 1080)] * 8, 3000
    p = predict("qwen2.5-vl-7b", A100, images(*sizes, text_tokens=text, output_tokens=128), batch=16)
    assert p.memory.kv_bytes > p.memory.weights_bytes
    without = predict("qwen2.5-vl-7b", A100, Workload(text_tokens=text, output_tokens=128), batch=16)
    visual_share = 1 - without.memory.kv_bytes / p.memory.kv_bytes
    assert 0.8 <= visual_share <= 0.9
