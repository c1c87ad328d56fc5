"""Prompts, sampling, and what cannot be run."""

import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the runtime needs PyTorch")
pytest.importorskip("transformers", reason="the oracle of the runtime")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper  # noqa: E402

from costmodel import DoesNotFit  # noqa: E402
from runtime.generate import Prompt, Sampling, choose, generate, stream  # noqa: E402
from runtime.grids import layout, stretched  # noqa: E402
from runtime.prompts import Picture, batch_of  # noqa: E402
from tests.helpers import assert_clean  # noqa: E402
from tests.runtime import tiny  # noqa: E402

DRAWS = 4000


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.6), (1.0, 4, 0.8)]
)
def test_draws_follow_the_distribution_of_transformers(temperature, top_k, top_p):
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(3)) * 2
    scores = TemperatureLogitsWarper(temperature)(None, logits.clone())
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    expected = scores.softmax(-1)[0]
    sampling = Sampling(temperature, top_k, top_p, seed=1)
    drawn = choose(logits.expand(DRAWS, -1), sampling, torch.Generator().manual_seed(sampling.seed))
    found = torch.bincount(drawn, minlength=12) / DRAWS
    assert ((found > 0) <= (expected > 0)).all()  # nothing is drawn that is barred
    assert (found - expected).abs().max() < 4 * (0.25 / DRAWS) ** 0.5  # four standard deviations


def test_sampling_repeats_with_its_seed(pairs):
    ours = pairs("llava").ours
    prompts = [tiny.prompt(ours)[0]] * 2
    runs = [generate(ours, prompts, max_tokens=20, sampling=Sampling(1.0, seed=seed)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1]  # the same prompt twice, drawn apart


def test_a_prompt_ends_behind_its_stop_token(pairs):
    ours = pairs("llava").ours
    prompts = [tiny.prompt(ours)[0], Prompt(tiny.ids(None))]
    whole = generate(ours, prompts, max_tokens=16)
    stop = whole[0][4]
    cut = generate(ours, prompts, max_tokens=16, stop=[stop])
    assert cut == [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in whole]
    assert len(cut[0]) <= 5


def bad_prompts(ours):
    prompt = tiny.prompt(ours)[0]
    text = [t for t in prompt.tokens if t != tiny.IMAGE]
    return [
        (Prompt([]), "at least one token id"),
        (Prompt([5000]), "token id=5000 must be from 0 to 119"),
        (Prompt([-1]), "token id=-1"),
        (Prompt(text, prompt.pixels), "holds 0 image tokens"),
        (Prompt([*text, tiny.IMAGE]), "and its pictures make 0"),
        (Prompt([tiny.IMAGE, *prompt.tokens[:5], *prompt.tokens[6:]], prompt.pixels), "must stand together"),
    ]


def test_prompts_that_cannot_be_are_refused(pairs):
    ours = pairs("llava").ours
    for prompt, words in bad_prompts(ours):
        with pytest.raises(ValueError, match=words) as raised:
            generate(ours, [prompt], max_tokens=2)
        assert_clean(raised.value)
    with pytest.raises(ValueError, match="prompts=0"):
        generate(ours, [], max_tokens=2)
    with pytest.raises(ValueError, match="max_tokens=0"):
        generate(ours, [Prompt([1])], max_tokens=0)


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -2}, {"temperature": float("nan")}])
def test_sampling_that_cannot_be(bad):
    with pytest.raises(ValueError, match=r"Sampling\."):
        Sampling(**bad)


def test_a_cache_that_does_not_fit_is_refused_before_it_is_taken(pairs):
    ours = pairs("gemma3").ours
    with pytest.raises(DoesNotFit, match="cache of 1000 x 1000000000 tokens"):
        ours.reserve(1000, 10**9)
    assert ours.reserve(3, 50).nbytes == 3 * 50 * ours.spec.decoder.kv_bytes_per_token(32)


def test_a_full_cache_is_refused(pairs):
    ours = pairs("llava").ours
    from runtime.generate import batched

    batch, cache = batched(ours, [Prompt([1, 2, 3])]), ours.reserve(1, 4)
    token = ours.prefill(batch, None, cache).argmax(-1)
    ours.decode_step(token, cache)
    with pytest.raises(ValueError, match="cache is full with 4 tokens"):
        ours.decode_step(token, cache)
    with pytest.raises(ValueError, match="exceeds the 2 reserved"):
        ours.prefill(batch, None, ours.reserve(1, 2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_graph_needs_a_gpu(pairs):
    with pytest.raises(ValueError, match="needs a CUDA device"):
        list(stream(pairs("llava").ours, [Prompt([1])], max_tokens=3, steps="graph"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_graph_gives_the_same_tokens(pairs, name):
    ours = pairs(name).ours.to("cuda")
    try:
        prompts = [tiny.prompt(ours)[0], Prompt(tiny.ids(None))]
        plain = generate(ours, prompts, max_tokens=20)
        assert generate(ours, prompts, max_tokens=20, steps="graph") == plain
    finally:
        ours.to("cpu")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_steps_give_the_same_tokens(pairs):
    ours = pairs("qwen3_vl").ours
    prompts = [tiny.prompt(ours)[0], Prompt(tiny.ids(None))]
    assert generate(ours, prompts, max_tokens=12, steps="compiled") == generate(ours, prompts, max_tokens=12)


SIDES = st.integers(1, 9)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 2), SIDES, SIDES), min_size=1, max_size=3), st.integers(1, 2), st.integers(0, 4)
)
def test_layouts_hold_every_patch_once(grids, merge, window):
    grids = [(t, h * merge, w * merge) for t, h, w in grids]
    found = layout(grids, merge=merge, window=window)
    patches = sum(t * h * w for t, h, w in grids)
    assert sum(n * size for n, size in found.slices) == sum(n * size for n, size in found.windows) == patches
    if window:
        assert sorted(found.order) == list(range(patches))
        start = 0
        for n, size in found.windows:
            for _ in range(n):
                inside = found.order[start : start + size]
                for index in (found.rows[inside], found.columns[inside]):
                    assert len(set((index // (merge * window)).tolist())) == 1  # all of one window
                start += size


@given(SIDES, SIDES, st.integers(2, 7))
@settings(max_examples=60, deadline=None)
def test_stretched_positions_are_bilinear(height, width, side):
    grids = [(1, height, width)]
    indices, weights = stretched(layout(grids, merge=1), grids, side)
    table = torch.randn(side * side, 3, dtype=torch.float64)
    found = (table[indices] * torch.as_tensor(weights)[..., None]).sum(1)
    square = table.T.reshape(1, 3, side, side)
    size = (height, width)
    expected = torch.nn.functional.interpolate(square, size=size, mode="bilinear", align_corners=True)
    assert torch.allclose(found, expected[0].reshape(3, -1).T, atol=1e-9)


def test_positions_of_text_behind_a_picture():
    batch = batch_of([[1, 9, 9, 9, 9, 9, 9, 2]], [[Picture(6, (1, 2, 3))]], image_token=9, vocabulary=10)
    time, row, column = batch.positions[:, 0].tolist()
    assert time == [0, 1, 1, 1, 1, 1, 1, 4]
    assert row == [0, 1, 1, 1, 2, 2, 2, 4]
    assert column == [0, 1, 2, 3, 1, 2, 3, 4]
    assert batch.offsets.tolist() == [5 - 8]
    assert batch.blocks.tolist() == [[-1, 0, 0, 0, 0, 0, 0, -1]]
    assert np.array_equal(batch.lengths, [8])
