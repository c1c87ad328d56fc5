"""The step model equals the direct path, the stages of a prediction, and itself step by step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel import Image, Parallelism, Precision, Workload, load_engine, load_hardware, predict
from costmodel.blocks import Work
from costmodel.evaluate import kernels_of
from costmodel.layers import CrossAttentionSpec
from costmodel.priced import operator_s
from costmodel.query import causal_pairs
from costmodel.recurrent import RecurrentSpec
from costmodel.serving_step import step_operators
from costmodel.step import Chunk, StepModel

H100 = "h100-sxm5-80gb"
MODELS = ["qwen2.5-vl-7b", "gemma-3-12b", "qwen3-vl-30b-a3b", "kimi-vl-a3b", "qwen3.5-4b", "llama-3.2-11b-vision"]
SETTINGS = [("fused", H100), ("fused", "a10-24gb"), ("ideal", "tpu-v5e-16gb")]


def chunks_of(model, tokens, prefix=0.0):
    """Return what one sequence's new tokens behind a prefix bring to every segment."""
    found = []
    for segment in model.structure.decoder:
        mixer = segment.layer.mixer
        if isinstance(mixer, RecurrentSpec):
            found.append(Chunk(tokens, tokens, 1.0))
        elif isinstance(mixer, CrossAttentionSpec):
            found.append(Chunk(tokens, 0.0, 0.0))
        else:
            pairs = float(causal_pairs(tokens, prefix=prefix, window=mixer.window))
            found.append(Chunk(tokens, pairs, tokens + min(prefix, mixer.window)))
    return found


def keys_of(model, contexts):
    return [float(sum(r.reads(r.kept(0.0, c), 1.0) for c in contexts)) for r in model.read_classes]


@pytest.mark.parametrize(("engine", "device"), SETTINGS)
@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=10, deadline=None)
@given(steps=st.tuples(st.integers(0, 3000), st.integers(0, 5000), st.integers(0, 40), st.integers(1, 20_000)))
def test_a_step_is_the_sum_of_its_operators(name, engine, device, steps):
    tokens, prefix, decoding, context = steps
    if not tokens + decoding:
        return
    model = StepModel.of(name, device, engine=engine)
    chunks = chunks_of(model, float(tokens), float(prefix)) if tokens else ()
    keys = keys_of(model, [float(context)] * decoding)
    sums = model.sums(chunks, float(bool(tokens)), float(decoding), keys)
    kernels = kernels_of(model.query, model.hardware)
    direct = sum(float(operator_s(o, kernels)) for o in step_operators(model.structure, sums))
    found = model.step_s(chunks, float(bool(tokens)), float(decoding), keys)
    assert found == pytest.approx(direct, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in MODELS if "llama" not in name])
@pytest.mark.parametrize("precision", [Precision(), Precision(4, 16, 8)])
@pytest.mark.parametrize("parallelism", [Parallelism(), Parallelism(tp=2)])
def test_one_prompt_and_one_step_are_those_of_a_prediction(name, precision, parallelism):
    how = {"engine": "fused", "precision": precision, "parallelism": parallelism}
    model = StepModel.of(name, H100, **how)
    p = predict(name, H100, Workload(text_tokens=900, output_tokens=2), **how)
    assert model.step_s(chunks_of(model, 900.0), 1.0, 0.0, [0.0] * len(model.read_classes)) == pytest.approx(
        p.stages["prefill"].time_s, rel=1e-9
    )
    assert model.decode_step_s(1, keys_of(model, [900.0])) == pytest.approx(p.tpot_s, rel=1e-9)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300), st.floats(1, 50_000), st.integers(1, 400))
def test_a_leap_is_its_steps_bit_by_bit(name, decoding, context, k):
    model = StepModel.of(name, H100, engine="fused")
    keys = keys_of(model, [context] * decoding)
    growth = [float(decoding) * r.grows * (r.cap > context + k + 1) for r in model.read_classes]
    leap = model.decode_steps_s(decoding, keys, growth, k)
    steps = [model.decode_step_s(decoding, [a + i * b for a, b in zip(keys, growth, strict=True)]) for i in range(k)]
    assert leap.tolist() == steps


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.integers(1, 8000), st.integers(1, 4000))
def test_more_work_takes_no_less(decoding, context, tokens):
    model = StepModel.of("qwen2.5-vl-7b", H100, engine="fused")
    keys = keys_of(model, [float(context)] * decoding)
    alone = model.decode_step_s(decoding, keys)
    assert model.decode_step_s(decoding, [key + 1 for key in keys]) >= alone * (1 - 1e-12)
    with_chunk = model.step_s(chunks_of(model, float(tokens)), 1.0, float(decoding), keys)
    assert with_chunk >= alone * (1 - 1e-12)


def test_pictures_are_encoded_and_preprocessed_as_in_a_prediction():
    model = StepModel.of("qwen2.5-vl-7b", H100, engine="fused")
    media = model.media([Image(1280, 960)])
    p = predict("qwen2.5-vl-7b", H100, Workload(images=[Image(1280, 960)], text_tokens=10), engine="fused")
    assert model.encode_s(media) == pytest.approx(p.stages["encode"].time_s + p.stages["adapt"].time_s, rel=1e-12)
    assert model.preprocess_s(media) == pytest.approx(p.stages["preprocess"].time_s, rel=1e-12)
    assert media.visual_tokens == p.tokens["visual"]


def test_a_slow_host_bounds_every_step_and_sequences_add():
    engine = load_engine("fused").model_copy(
        update={"layer_host_s": {"prefill": 2e-3, "decode": 1e-3}, "step_host_s": 1e-4, "sequence_host_s": 1e-5}
    )
    device = load_hardware(H100)
    model = StepModel.of("qwen2.5-vl-7b", device, engine=engine)
    keys = keys_of(model, [100.0] * 4)
    assert model.decode_step_s(4, keys) == pytest.approx((28e-3 + 1e-4 + 4e-5) / device.host_speed)
    chunk = model.step_s(chunks_of(model, 16.0), 1.0, 4.0, keys)
    assert chunk == pytest.approx((56e-3 + 1e-4 + 5e-5) / device.host_speed)


def test_a_step_of_a_pipeline_runs_through_all_stages():
    how = {"engine": "fused", "parallelism": Parallelism(pp=2)}
    model = StepModel.of("qwen2.5-vl-7b", H100, **how)
    p = predict("qwen2.5-vl-7b", H100, Workload(text_tokens=900, output_tokens=2), **how)
    assert model.decode_step_s(1, keys_of(model, [900.0])) == pytest.approx(p.tpot_s, rel=1e-9)


def test_without_pictures_layers_of_cross_attention_do_not_run():
    """What is left is the model of a request of text alone, as the direct path has it."""
    both, text = (StepModel.of(MODELS[-1], H100, engine="fused", pictures=pictures) for pictures in (True, False))
    assert both.structure.n_layers("decode") - text.structure.n_layers("decode") == 8
    p = predict(MODELS[-1], H100, Workload(text_tokens=900, output_tokens=2), engine="fused")
    assert text.decode_step_s(1, [901.0]) == pytest.approx(p.tpot_s, rel=1e-12)
    chunk = text.step_s([Chunk(900.0, float(causal_pairs(900.0)), 900.0)], 1.0, 0.0, [0.0])
    assert chunk == pytest.approx(p.stages["prefill"].time_s, rel=1e-12)


def test_a_work_without_chunks_is_none():
    model = StepModel.of("qwen2.5-vl-7b", H100, engine="fused")
    sums = model.sums((), 0.0, 3.0, [300.0])
    assert all(isinstance(work, Work) and work.rows == work.pairs == work.keys == 0 for work in sums.chunks)
    assert np.array(sums.flat()).sum() > 0
