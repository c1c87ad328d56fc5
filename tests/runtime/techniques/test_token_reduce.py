"""Visual tokens that techniques take out are gone: from the rows, from the cache, from the work."""

import pytest

torch = pytest.importorskip("torch", reason="the runtime needs PyTorch")
pytest.importorskip("transformers", reason="the oracle of the runtime")

from costmodel import Unsupported  # noqa: E402
from costmodel.techniques import technique  # noqa: E402
from costmodel.techniques.token_reduce import TokenReduce  # noqa: E402
from runtime.attention import attend_openly  # noqa: E402
from runtime.generate import Prompt, generate, start  # noqa: E402
from runtime.techniques import open_session  # noqa: E402
from runtime.techniques.token_reduce import max_min, merged  # noqa: E402
from tests.runtime import tiny  # noqa: E402
from tests.runtime.techniques import beside  # noqa: E402

STEPS = 8
FASTV = {"layer": 1, "keep": 0.5}
WAYS = {
    "visionzip": lambda: technique("visionzip", keep=0.5),
    "divprune": lambda: technique("divprune", keep=0.25),
    "fastv": lambda: technique("fastv", **FASTV),
    "fastv_rows": lambda: technique("fastv", variant="rows", **FASTV),
    "pdrop": lambda: technique("pdrop", schedule=((1, 0.5), (2, 0.25))),
}
NEUTRAL = {
    "encoder_out": TokenReduce(at="encoder_out", keep=1.0, score="encoder_map", merges=True),
    "pre_llm": TokenReduce(at="pre_llm", keep=1.0, score="max_min"),
    "layer": TokenReduce(at="layer", layer=1, keep=1.0, score="llm_rows"),
}


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
@torch.inference_mode()
def test_without_techniques_a_session_is_the_model(pairs, name):
    ours = pairs(name).ours
    prompt = tiny.prompt(ours)[0]
    logits, _ = start(ours, [prompt], STEPS)
    session = open_session(ours, prompt)
    assert torch.equal(session.logits, logits[0])
    assert session.greedy(STEPS) == generate(ours, [prompt], max_tokens=STEPS)[0]


@pytest.mark.parametrize("place", NEUTRAL)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
@torch.inference_mode()
def test_all_tokens_kept_is_the_reference_exactly(pairs, name, place):
    ours = pairs(name).ours
    prompt = tiny.prompt(ours)[0]
    plain, session = open_session(ours, prompt), open_session(ours, prompt, [NEUTRAL[place]])
    assert torch.equal(session.logits, plain.logits)
    assert session.greedy(STEPS) == plain.greedy(STEPS)


def masked_reference(ours, prompt, layer, keep):
    """Return FastV without any optimisation: all tokens run through all layers, and some are hidden behind a mask."""
    seen = []

    class Naive:
        def __init__(self):
            self.hidden = torch.zeros(len(prompt.tokens), dtype=torch.bool)
            self.visual = torch.tensor(prompt.tokens) == tiny.IMAGE

        def attend_prompt(self, index, q, k, v, _mask, *, scale):
            tokens = q.shape[2]
            open_ = torch.ones(tokens, tokens, dtype=torch.bool).tril() & ~(self.hidden & (index >= layer))
            open_ |= torch.eye(tokens, dtype=torch.bool)
            k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
            scores = (
                (q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)).masked_fill(~open_, -torch.inf).softmax(-1)
            )
            if index == layer - 1:
                worth = scores[0, :, -1].mean(0).masked_fill(~self.visual, -1)
                kept = worth.argsort(descending=True)[: round(keep * int(self.visual.sum()))]
                self.hidden = self.visual.clone()
                self.hidden[kept] = False
                seen.append(self.hidden)
            return scores @ v

    from runtime.generate import batched

    batch = batched(ours, [prompt])
    parts = (torch.from_numpy(part) for part in (batch.tokens, batch.positions, batch.blocks))
    tokens, positions, blocks = parts
    x, deep = ours.merge(tokens, blocks, ours.adapt(ours.encode(prompt.pixels)))
    out = ours.decoder.prefill(x, positions, Naive(), blocks=None, deep=deep)
    return ours.decoder.head(out[0, -1]), seen[0]


@pytest.mark.parametrize("variant", ["rows", "50"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
@torch.inference_mode()
def test_fastv_equals_a_mask_over_all_tokens(pairs, name, variant):
    ours = pairs(name).ours
    prompt = tiny.prompt(ours)[0]
    session = open_session(ours, prompt, [technique("fastv", variant=variant, **FASTV)])
    logits, hidden = masked_reference(ours, prompt, 1, 0.5)
    assert torch.allclose(session.logits, logits, atol=1e-4)
    kept = [store.keys.shape[2] for store in session.caches.stores]
    assert kept == [len(prompt.tokens)] + [len(prompt.tokens) - int(hidden.sum())] * 2


@torch.inference_mode()
def test_pyramid_is_fastv_over_and_over(pairs):
    ours = pairs("llava").ours
    prompt = tiny.prompt(ours)[0]
    session = open_session(ours, prompt, [WAYS["pdrop"]()])
    assert [store.keys.shape[2] for store in session.caches.stores] == [
        len(prompt.tokens) - gone for gone in (0, 16, 24)
    ]
    once = open_session(ours, prompt, [technique("fastv", variant="rows", **FASTV)])
    same = open_session(ours, prompt, [technique("pdrop", schedule=((1, 0.5), (2, 0.5)))])
    assert torch.equal(once.logits, same.logits)


@torch.inference_mode()
def test_positions_of_what_stays_are_those_of_the_prompt(pairs):
    # Behind tokens that are taken out in front of the model, it computes as with a prompt that never had them, but
    # with the places of the whole one.
    ours = pairs("llava").ours
    prompt = tiny.prompt(ours)[0]
    session = open_session(ours, prompt, [TokenReduce(at="pre_llm", keep=0.5)])
    assert session.place == len(prompt.tokens)
    assert session.caches.stores[0].keys.shape[2] == len(prompt.tokens) - 16


def test_max_min_is_the_greedy_choice_by_brute_force():
    x = torch.randn(11, 5, generator=torch.Generator().manual_seed(0))
    normed = x / x.norm(dim=-1, keepdim=True)
    distance = [[1 - float(a @ b) for b in normed] for a in normed]
    chosen = [max(range(11), key=lambda i: min(distance[i][j] for j in range(11) if j != i))]
    while len(chosen) < 4:
        rest = [i for i in range(11) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(distance[i][j] for j in chosen)))
    assert max_min(x, 4).tolist() == sorted(chosen)
    assert max_min(x, 11).tolist() == list(range(11))


def test_merging_keeps_dominant_tokens_and_every_token_counts_once():
    generator = torch.Generator().manual_seed(0)
    x, received = torch.randn(20, 1, 6, generator=generator), torch.rand(20, generator=generator)
    places, tokens = merged(x, received, 8)
    dominant = received.argsort(descending=True)[:7].tolist()
    assert set(dominant) < set(places.tolist())
    (target,) = set(places.tolist()) - set(dominant)
    joined = [i for i in range(20) if i not in dominant]
    assert torch.allclose(tokens[places.tolist().index(target)], x[joined].mean(0), atol=1e-6)
    for place in dominant:
        assert torch.equal(tokens[places.tolist().index(place)], x[place])


@pytest.mark.parametrize("way", WAYS)
@torch.inference_mode()
def test_flops_are_those_predicted(pairs, way):
    ours = pairs("llava").ours
    prompt, used = beside.prompt_of(ours), WAYS[way]()
    found = beside.flops_of(lambda: open_session(ours, prompt, [used]))
    said = beside.predicted(ours, prompt, [used])
    stages = ("encode", "adapt", "prefill")
    expected = sum(said.flops(stage) for stage in stages)
    whole = expected + said.own(*stages)
    if way == "visionzip":  # it merges into contextual tokens alone, and is priced as if into all that stay
        assert expected <= found <= whole
    assert found == pytest.approx(whole, rel=beside.CLOSE)
    plain = beside.flops_of(lambda: open_session(ours, prompt))
    assert plain == sum(beside.predicted(ours, prompt).flops(stage) for stage in stages)
    assert found < 0.95 * plain
    step = beside.predicted(ours, prompt, [used], output=2).flops("decode")
    session = open_session(ours, prompt, [used])
    assert beside.flops_of(lambda: session.step(torch.tensor([3]))) == pytest.approx(step, rel=beside.CLOSE)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@torch.inference_mode()
def test_bytes_of_the_cache_are_those_predicted(pairs, name, way):
    ours = beside.in_half(pairs(name).ours)
    prompt, used = beside.prompt_of(ours), WAYS[way]()
    session = open_session(ours, prompt, [used])
    assert session.nbytes == beside.kv_bytes(ours, prompt, [used]) < beside.kv_bytes(ours, prompt)
    each = ours.spec.decoder.kv_bytes_per_token()
    before = session.nbytes
    session.greedy(4)
    assert session.nbytes == before + 3 * each  # three of four new tokens were read again


@torch.inference_mode()
def test_reducers_in_different_places_go_together(pairs):
    ours = beside.in_half(pairs("llava").ours)
    prompt, used = beside.prompt_of(ours), [WAYS["visionzip"](), WAYS["fastv"]()]
    assert open_session(ours, prompt, used).nbytes == beside.kv_bytes(ours, prompt, used)


@pytest.mark.parametrize(
    ("name", "used", "words"),
    [
        ("llava", technique("fastv", variant="masked", **FASTV), "masked=True does not run"),
        ("llava", technique("fastv", variant="original", **FASTV), "reprunes=True does not run"),
        ("llava", TokenReduce(at="pre_llm", keep=0.5, score="dpp"), "'dpp' at 'pre_llm' does not run"),
        ("gemma3", technique("fastv", **FASTV), "layers with a window"),
        ("qwen2_5_vl", TokenReduce(at="encoder_out", keep=0.5, score="encoder_row"), "needs a class token"),
        ("internvl", technique("visionzip"), "use at='pre_llm'"),
        ("llava", technique("aks"), "does not run; TokenReduce"),
    ],
)
def test_what_does_not_run_is_said(pairs, name, used, words):
    ours = pairs(name).ours
    with pytest.raises(Unsupported, match=words):
        open_session(ours, tiny.prompt(ours)[0], [used])


def test_text_alone_is_left_as_it_is(pairs):
    ours = pairs("llava").ours
    prompt = Prompt(tiny.ids(None))
    assert torch.equal(open_session(ours, prompt, [WAYS["fastv"]()]).logits, open_session(ours, prompt).logits)


def test_an_open_map_gives_the_same_attention():
    q, k, v = (torch.randn(1, heads, 9, 4) for heads in (4, 2, 2))
    mixed, shares = attend_openly(q, k, v)
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(mixed, fused, atol=1e-5)
    assert torch.allclose(shares.sum(-1), torch.ones(1, 4, 9))
