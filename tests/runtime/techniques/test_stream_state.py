"""A stream's state does not grow, and each chunk sees it and itself."""

import pytest

torch = pytest.importorskip("torch", reason="the runtime needs PyTorch")
pytest.importorskip("transformers", reason="the oracle of the runtime")

from costmodel import Unsupported  # noqa: E402
from costmodel.techniques import technique  # noqa: E402
from costmodel.techniques.stream_state import StreamState  # noqa: E402
from runtime.generate import batched  # noqa: E402
from runtime.techniques import open_session  # noqa: E402
from tests.runtime.techniques import beside  # noqa: E402

USED = StreamState(sink_tokens=4, text_window=12, visual_window_tokens=16, chunk_tokens=8)


@pytest.mark.parametrize("used", [StreamState(), StreamState(sink_tokens=4, text_window=99, visual_window_tokens=99)])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@torch.inference_mode()
def test_a_state_that_holds_all_is_the_reference_exactly(pairs, name, used):
    ours = pairs(name).ours
    prompt = beside.prompt_of(ours)
    plain, session = open_session(ours, prompt), open_session(ours, prompt, [used])
    assert torch.equal(plain.logits, session.logits)
    assert plain.greedy(6) == session.greedy(6)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@torch.inference_mode()
def test_chunks_alone_change_nothing(pairs, chunk):
    ours = pairs("llava").ours
    prompt = beside.prompt_of(ours)
    plain, session = open_session(ours, prompt), open_session(ours, prompt, [StreamState(chunk_tokens=chunk)])
    assert torch.allclose(plain.logits, session.logits, atol=1e-4)
    assert session.nbytes == plain.nbytes


def seen_by_hand(visual, used):
    """Return what every token of a stream sees, chunk by chunk, and what stays behind the last."""
    size, tokens = int(used.chunk_tokens), len(visual)
    mask, state = torch.zeros(tokens, tokens, dtype=torch.bool), []
    for start in range(0, tokens, size):
        chunk = list(range(start, min(start + size, tokens)))
        for i in chunk:
            mask[i, [*state, *[j for j in chunk if j <= i]]] = True
        everything = [*state, *chunk]
        sinks = [j for j in everything if j < used.sink_tokens]
        text = [j for j in everything if j not in sinks and not visual[j]][-int(used.text_window) :]
        shown = [j for j in everything if j not in sinks and visual[j]][-int(used.visual_window_tokens) :]
        state = [*sinks, *text, *shown]
    return mask, sorted(state)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@torch.inference_mode()
def test_a_stream_is_a_mask_over_the_whole_prompt(pairs, name):
    ours = pairs(name).ours
    prompt = beside.prompt_of(ours)
    mask, state = seen_by_hand([token == 100 for token in prompt.tokens], USED)

    class Masked:
        def attend_prompt(self, _layer, q, k, v, _mask, *, scale):
            k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
            scores = (q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)).masked_fill(~mask, -torch.inf)
            return scores.softmax(-1) @ v

    batch = batched(ours, [prompt])
    tokens, positions, blocks = (torch.from_numpy(p) for p in (batch.tokens, batch.positions, batch.blocks))
    x, _ = ours.merge(tokens, blocks, ours.adapt(ours.encode(prompt.pixels)))
    expected = ours.decoder.head(ours.decoder.prefill(x, positions, Masked(), blocks=None)[0, -1])
    session = open_session(ours, prompt, [USED])
    assert torch.allclose(session.logits, expected, atol=1e-4)
    assert session.streamer.index.tolist() == state
    assert not torch.allclose(session.logits, open_session(ours, prompt).logits, atol=1e-2)


@torch.inference_mode()
def test_bytes_and_flops_are_those_predicted(pairs):
    ours = beside.in_half(pairs("llava").ours)
    prompt = beside.prompt_of(ours, n_text=352)
    held = []
    found = beside.flops_of(lambda: held.append(open_session(ours, prompt, [USED])))
    (session,) = held
    said = beside.predicted(ours, prompt, [USED], square=False, output=2)
    stages = ("encode", "adapt", "prefill")
    assert found == pytest.approx(sum(map(said.flops, stages)) + said.own(*stages), rel=beside.CLOSE)
    assert session.nbytes == beside.kv_bytes(ours, prompt, [USED])
    assert session.nbytes == 32 * ours.spec.decoder.kv_bytes_per_token()
    step = beside.flops_of(lambda: session.step(torch.tensor([3])))
    assert step == pytest.approx(said.flops("decode"), rel=beside.CLOSE)
    session.settle()
    session.greedy(20)
    assert session.nbytes == 32 * ours.spec.decoder.kv_bytes_per_token()  # it does not grow


@torch.inference_mode()
def test_a_stream_goes_with_fewer_tokens_in_front(pairs):
    ours = beside.in_half(pairs("llava").ours)
    prompt, used = beside.prompt_of(ours), [technique("visionzip", keep=0.5), USED]
    assert open_session(ours, prompt, used).nbytes == beside.kv_bytes(ours, prompt, used)


def test_what_does_not_run_is_said(pairs):
    ours = pairs("llava").ours
    for used, words in [
        ([StreamState(budget_tokens=8)], "budget_tokens=8 does not run"),
        ([USED, technique("fastv", layer=1)], "not with layer"),
    ]:
        with pytest.raises(Unsupported, match=words):
            open_session(ours, beside.prompt_of(ours), used)
    deep = pairs("qwen3_vl").ours
    from tests.runtime import tiny

    with pytest.raises(Unsupported, match="behind the first layers"):
        open_session(deep, tiny.prompt(deep)[0], [USED])
