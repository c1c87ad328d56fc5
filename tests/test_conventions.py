"""Published FLOP figures to the printed digit, each in the convention of its paper.

The figures and how they were reconciled: `techniques.md`, section 1.1, in the project's knowledge base.
"""

import pytest

from costmodel import Unsupported, Workload, load_model
from costmodel.conventions import CONVENTIONS, layer_flops, prefill_flops
from costmodel.counts import count
from tests.helpers import POINT, assert_clean
from tests.kinds import CROSS, WITH_EXPERTS

QWEN2_7B = load_model("qwen2.5-vl-7b").decoder  # the decoder of LLaVA-OneVision-7B has the same shape
VICUNA_7B = load_model("llava-1.5-7b").decoder  # LLaVA-1.5-7B and LLaVA-NeXT-7B


def schedule(*runs):
    """Return one token count a layer from (layers, tokens) pairs."""
    return [tokens for n_layers, tokens in runs for _ in range(n_layers)]


FIGURES = [
    ("FastV, arXiv:2403.06764: LLaVA-OV-7B, 32 frames", QWEN2_7B, 6272, "fastv", 40.8),
    ("PyramidDrop, arXiv:2410.17247, Table 5: LLaVA-1.5-7B", VICUNA_7B, 576, "swiglu-mac", 3.82),
    ("PyramidDrop, Table 5: LLaVA-NeXT-7B", VICUNA_7B, 2880, "swiglu-mac", 20.8),
    ("PyramidDrop, Table 5: FastV K=2 R=50 %", VICUNA_7B, schedule((2, 576), (30, 288)), "swiglu-mac", 2.01),
    (
        "PyramidDrop, Table 5: half after layers 8, 16 and 24",
        VICUNA_7B,
        schedule((8, 576), (8, 288), (8, 144), (8, 72)),
        "swiglu-mac",
        1.78,
    ),
    (
        "PyramidDrop, Table 5: LLaVA-NeXT-7B, half after layers 8, 16 and 24",
        VICUNA_7B,
        schedule((8, 2880), (8, 1440), (8, 720), (8, 360)),
        "swiglu-mac",
        9.46,
    ),
    ("FastVID, arXiv:2503.11187: LLaVA-OV-7B", QWEN2_7B, 6272, "gqa-mac", 48.82),
    ("FastVID: 9.7 % of the tokens", QWEN2_7B, 608, "gqa-mac", 4.04),
    ("ShortV, arXiv:2504.00502: LLaVA-1.5-7B, 64 text tokens", VICUNA_7B, 640, "torch", 8.50),
    ("ShortV: FastV K=2 R=50 %", VICUNA_7B, schedule((2, 640), (30, 288 + 64)), "torch", 4.87),
]


@pytest.mark.parametrize(("source", "decoder", "tokens", "convention", "teraflops"), FIGURES)
def test_published_figure_to_its_last_digit(source, decoder, tokens, convention, teraflops):
    digits = len(str(teraflops).rpartition(".")[2])
    assert round(prefill_flops(decoder, tokens, convention) / 1e12, digits) == teraflops, source


def test_aim_within_three_per_mille():
    # AIM, arXiv:2412.03248, LLaVA-OV-7B, 32 frames: a quarter of 6272 tokens enter, full up to layer 13, then an eighth
    # less a layer. Its text length is not published; 100 tokens fit both figures, so neither can be exact.
    text = 100
    kept = [6272 / 4 * (1 - max(0.0, 0.125 * (layer - 13))) for layer in range(28)]
    ramp = [max(0.0, visual) + text for visual in kept]
    assert prefill_flops(QWEN2_7B, 6272 + text, "torch") / 1e12 == pytest.approx(99.63, rel=3e-3)
    assert prefill_flops(QWEN2_7B, ramp, "torch") / 1e12 == pytest.approx(14.76, rel=3e-3)


@pytest.mark.parametrize("decoder", [QWEN2_7B, VICUNA_7B])
def test_conventions_differ_as_they_say(decoder):
    layer, n = decoder.runs[0].layer, 1000.0
    fastv, swiglu, gqa, torch, kernel = (
        layer_flops(layer, n, c) for c in ("fastv", "swiglu-mac", "gqa-mac", "torch", "kernel")
    )
    d, m, d_kv = layer.width, layer.ffn.hidden, layer.mixer.kv_width
    assert swiglu - fastv == pytest.approx(n * d * m, **POINT)  # the gate
    assert swiglu - gqa == pytest.approx(2 * n * d * (d - d_kv), rel=1e-12, abs=1e-3)  # narrower keys and values
    assert torch == 2 * gqa  # a multiply-add is two
    assert torch - kernel == pytest.approx(2 * n * n * d, **POINT)  # the masked half


@pytest.mark.parametrize("name", ["llava-1.5-7b", "qwen2.5-vl-7b", "internvl3-8b"])
def test_count_offers_every_convention(name):
    decoder, workload = load_model(name).decoder, Workload(text_tokens=500)
    head = 2 * decoder.width * decoder.vocabulary
    for convention in CONVENTIONS:
        flops = count(name, workload, convention=convention).flops
        formula = prefill_flops(decoder, 500, convention)
        if convention == "torch":
            assert flops["prefill"] - head == pytest.approx(formula, **POINT)
        elif convention == "kernel":  # the diagonal is computed: n (n + 1) / 2 pairs against n^2 / 2
            diagonal = sum(run.n_layers * 2 * 500 * run.layer.mixer.q_width for run in decoder.runs)
            assert flops["prefill"] - head == pytest.approx(formula + diagonal, **POINT)
        else:
            assert flops["prefill"] == pytest.approx(formula, **POINT)
            assert flops["encode"] is flops["adapt"] is flops["decode_step"] is None


@pytest.mark.parametrize("name", [*WITH_EXPERTS, CROSS])
def test_formulas_refuse_layers_that_they_do_not_know(name):
    workload = Workload(text_tokens=500)
    for convention in ("fastv", "swiglu-mac", "gqa-mac"):
        with pytest.raises(Unsupported, match=f"convention {convention} has no formula") as raised:
            count(name, workload, convention=convention)
        assert_clean(raised.value)
    for convention in ("torch", "kernel"):
        assert count(name, workload, convention=convention).flops["prefill"] > 0


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_what_one_token_uses_is_what_prefill_multiplies(name):
    # Two FLOPs an active parameter and token, but for the embedding, norms, attention, and scans; the head runs once.
    model, n = load_model(name), 64.0
    active = model.parameters()["active"] - model.parameters()["vision"] - model.parameters()["adapter"]
    ends = model.decoder.end_parameters
    head = 2 * model.decoder.width * model.decoder.vocabulary
    flops = count(name, Workload(text_tokens=n), convention="kernel").flops["prefill"] - head
    assert flops == pytest.approx(2 * n * (active - ends), rel=0.05)


def test_a_schedule_must_name_every_layer():
    with pytest.raises(ValueError, match="32 layers"):
        prefill_flops(VICUNA_7B, [576] * 31, "torch")
    with pytest.raises(LookupError, match="known: "):
        prefill_flops(VICUNA_7B, 576, "macs")
