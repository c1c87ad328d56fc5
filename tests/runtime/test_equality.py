"""Our logits and tokens are those of `transformers`, from checkpoints that it saved itself."""

import pytest

torch = pytest.importorskip("torch", reason="the runtime needs PyTorch")
pytest.importorskip("transformers", reason="the oracle of the runtime")

from runtime.generate import Prompt, batched, generate, joined, stream  # noqa: E402
from tests.runtime import tiny  # noqa: E402

TOLERANCE = 1e-4  # of logits of size 1 to 10, in single precision
STEPS = 64


def prefilled(ours, prompts, *, room=STEPS, every=True):
    pixels = joined([prompt.pixels for prompt in prompts if prompt.pixels])
    visual = ours.adapt(ours.encode(pixels)) if pixels else None
    batch = batched(ours, prompts)
    cache = ours.reserve(len(prompts), batch.tokens.shape[1] + room)
    return ours.prefill(batch, visual, cache, every=every), cache


@pytest.mark.parametrize("name", tiny.CONFIGS)
@torch.inference_mode()
def test_logits_of_prompt_and_of_every_step(pairs, name):
    both = pairs(name)
    prompt, values = tiny.prompt(both.ours)
    theirs = both.real(**tiny.real_inputs(name, list(prompt.tokens), values), use_cache=True)
    logits, cache = prefilled(both.ours, [prompt])
    assert theirs.logits.abs().max() > 1  # weights are large enough that a wrong part would show
    assert (logits - theirs.logits).abs().max() < TOLERANCE
    past, token = theirs.past_key_values, theirs.logits[:, -1].argmax(-1)
    for _ in range(STEPS if name in tiny.FAMILIES else 12):
        theirs = both.real(input_ids=token[:, None], past_key_values=past, use_cache=True).logits[:, -1]
        assert (both.ours.decode_step(token, cache) - theirs).abs().max() < TOLERANCE
        token = theirs.argmax(-1)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_greedy_tokens_are_identical(pairs, name):
    both = pairs(name)
    prompt, values = tiny.prompt(both.ours, seed=1)
    inputs = tiny.real_inputs(name, list(prompt.tokens), values)
    theirs = both.real.generate(**inputs, max_new_tokens=STEPS, do_sample=False, pad_token_id=0)
    assert generate(both.ours, [prompt], max_tokens=STEPS) == [theirs[0, len(prompt.tokens) :].tolist()]


@pytest.mark.parametrize("name", tiny.FAMILIES)
@torch.inference_mode()
def test_text_alone(pairs, name):
    both = pairs(name)
    tokens = tiny.ids(None) * 5
    theirs = both.real(**tiny.real_inputs(name, tokens, {})).logits
    assert (prefilled(both.ours, [Prompt(tokens)])[0] - theirs).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_batch_of_different_prompts_gives_each_its_own_tokens(pairs, name):
    ours = pairs(name).ours
    prompts = [tiny.prompt(ours, seed=2)[0], Prompt(tiny.ids(None, seed=3)), tiny.prompt(ours, seed=4)[0]]
    alone = [generate(ours, [prompt], max_tokens=20)[0] for prompt in prompts]
    assert generate(ours, prompts, max_tokens=20) == alone


@pytest.mark.parametrize("name", tiny.FAMILIES)
@torch.inference_mode()
def test_steps_of_fixed_shape_give_the_same(pairs, name):
    # What a CUDA graph replays: the whole reserve behind a mask.
    ours = pairs(name).ours
    prompt = tiny.prompt(ours)[0]
    (logits, plain), (_, fixed) = prefilled(ours, [prompt], every=False), prefilled(ours, [prompt], every=False)
    fixed.fixed = True
    token = logits.argmax(-1)
    for _ in range(12):
        expected, found = ours.decode_step(token, plain), ours.decode_step(token, fixed)
        assert (expected - found).abs().max() < TOLERANCE
        token = expected.argmax(-1)


@pytest.mark.parametrize("name", tiny.FAMILIES)
@torch.inference_mode()
def test_pictures_and_their_order_matter(pairs, name):
    ours = pairs(name).ours
    prompt = tiny.prompt(ours)[0]
    other = Prompt(prompt.tokens, tiny.pictures(ours, seed=9)[0])
    assert (prefilled(ours, [prompt])[0] - prefilled(ours, [other])[0]).abs().max() > 0.1


def test_stream_yields_what_generate_returns(pairs):
    ours = pairs("qwen3_vl").ours
    prompts = [tiny.prompt(ours)[0], Prompt(tiny.ids(None))]
    steps = list(stream(ours, prompts, max_tokens=7))
    assert [list(tokens) for tokens in zip(*steps, strict=True)] == generate(ours, prompts, max_tokens=7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", tiny.FAMILIES)
@torch.inference_mode()
def test_half_precisions_stay_near(pairs, name, dtype):
    from runtime.blueprint import load_blueprint
    from runtime.weights import load

    both = pairs(name)
    half = load(load_blueprint(both.folder), torch.device("cpu"), dtype)
    prompt = tiny.prompt(both.ours)[0]
    expected, found = prefilled(both.ours, [prompt])[0], prefilled(half, [prompt])[0]
    assert found.dtype == dtype
    error = (found.float() - expected).norm() / expected.norm()
    assert error < (0.1 if dtype == torch.bfloat16 else 0.02)
