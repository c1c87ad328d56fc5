"""What eviction takes is freed, and what stays is what an unoptimised choice keeps."""

import pytest

torch = pytest.importorskip("torch", reason="the runtime needs PyTorch")
pytest.importorskip("transformers", reason="the oracle of the runtime")

from costmodel import Unsupported  # noqa: E402
from costmodel.techniques import technique  # noqa: E402
from costmodel.techniques.kv_evict import KVEvict  # noqa: E402
from costmodel.techniques.kv_quantize import KVQuantize  # noqa: E402
from runtime.attention import attention_rows  # noqa: E402
from runtime.techniques import open_session  # noqa: E402
from runtime.techniques.kv_evict import Evictor  # noqa: E402
from tests.runtime.techniques import beside  # noqa: E402

WAYS = {
    "lookm": technique("lookm", keep=0.25),
    "sparsemm": technique("sparsemm", tokens=16, window=8, score_rows=8),
    "heads": KVEvict(keep=0.25, by="head", heads=(0.5, 1.5), score="rows", score_rows=4),
    "padded": KVEvict(keep=0.25, by="head", heads=(0.5, 1.5), ragged=False),
    "layers": KVEvict(keep=0.25, by="layer", layers=(2.0, 0.5, 0.5), score="key_norm"),
    "visual": KVEvict(keep=0.25, visual_only=True),
    "modalities": KVEvict(keep=0.25, text_keep=0.75, score="map"),
}


def kept_by_hand(q, k, used, rows):
    """Return the places that each key head keeps, by loops over a whole map."""
    heads, group, tokens = k.shape[1], q.shape[1] // k.shape[1], k.shape[2]
    found = []
    for head in range(heads):
        worth = [0.0] * tokens
        for query in range(head * group, (head + 1) * group):
            for i in range(tokens - rows, tokens):
                shares = (q[0, query, i] @ k[0, head, : i + 1].T / q.shape[-1] ** 0.5).softmax(-1)
                for j in range(i + 1):
                    worth[j] += float(shares[j])
        ranked = sorted(range(tokens), key=lambda j: (-float("inf") if j >= tokens - used.window else -worth[j], j))
        found.append(sorted(ranked[: round((used.keep + used.window / tokens) * tokens)]))
    return found


@pytest.mark.parametrize("rows", [3, 12])
def test_kept_tokens_are_those_of_loops(rows):
    generator = torch.Generator().manual_seed(rows)
    q, k, v = (torch.randn(1, heads, 12, 4, generator=generator) for heads in (4, 2, 2))
    used = KVEvict(keep=0.25, window=2, score="rows", score_rows=rows)
    evictor = Evictor(used, 1)
    places = evictor.kept(0, evictor.scores(q, k, v, None, scale=None), torch.zeros(12, dtype=torch.bool))
    assert [part.tolist() for part in places] == kept_by_hand(q, k, used, rows)


def test_rows_are_those_of_the_map():
    q, k = (torch.randn(1, heads, 9, 4) for heads in (4, 2))
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 2
    whole = scores.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    assert torch.allclose(attention_rows(q, k, 4), whole[:, :, -4:], atol=1e-6)


def test_merging_is_a_mean_over_what_joins():
    k, v = torch.randn(2, 1, 1, 10, 4, generator=torch.Generator().manual_seed(0)).unbind()
    places = torch.tensor([2, 5, 9])
    keys, values = Evictor(KVEvict(keep=0.3, merges=True), 1)._head(k, v, places)
    groups = {int(p): [int(p)] for p in places}
    for i in sorted(set(range(10)) - set(groups)):
        near = max(groups, key=lambda p: float(torch.cosine_similarity(k[0, 0, i], k[0, 0, p], dim=0)))
        groups[near].append(i)
    for found, whole in ((keys, k), (values, v)):
        expected = torch.stack([whole[0, 0, members].mean(0) for members in groups.values()])
        assert torch.allclose(found[0, 0], expected, atol=1e-6)


NEUTRAL = [KVEvict(), KVEvict(score="rows"), KVEvict(by="head", heads=(2.0, 3.0)), KVEvict(merges=True)]


@pytest.mark.parametrize("used", NEUTRAL)
@torch.inference_mode()
def test_a_budget_of_everything_is_the_reference_exactly(pairs, used):
    ours = pairs("llava").ours
    prompt = beside.prompt_of(ours)
    plain, session = open_session(ours, prompt), open_session(ours, prompt, [used])
    assert torch.equal(plain.logits, session.logits)
    for token in (3, 5, 7):
        assert torch.equal(plain.step(torch.tensor([token])), session.step(torch.tensor([token])))


@pytest.mark.parametrize("way", ["heads", "visual"])
@torch.inference_mode()
def test_steps_are_those_of_a_mask_over_the_whole_cache(pairs, way):
    ours = pairs("qwen2_5_vl").ours
    prompt = beside.prompt_of(ours)
    plain, session = open_session(ours, prompt), open_session(ours, prompt, [WAYS[way]])
    evictor, hidden = session.caches.evictor, {}
    visual = torch.tensor(prompt.tokens) == 100

    class Masked:
        """The whole cache, of which each head sees what it would keep."""

        def attend_prompt(self, layer, q, k, v, mask, *, scale):
            places = evictor.kept(layer, evictor.scores(q, k, v, None, scale=scale), visual)
            hidden[layer] = torch.ones(k.shape[1], k.shape[2] + 1, dtype=torch.bool)
            for head, kept in enumerate(places):
                hidden[layer][head, kept] = False
            hidden[layer][:, -1] = False
            return plain.caches.attend_prompt(layer, q, k, v, mask, scale=scale)

        def attend_step(self, layer, q, k, v, _window, *, scale):
            store = plain.caches.stores[layer]
            store.append(k, v)
            group = q.shape[1] // k.shape[1]
            keys, values = (part.repeat_interleave(group, 1) for part in (store.keys, store.values))
            barred = hidden[layer].repeat_interleave(group, 0)[None, :, None]
            scores = (q @ keys.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)).masked_fill(barred, -torch.inf)
            return scores.softmax(-1) @ values

    from runtime.generate import batched

    batch, naive = batched(ours, [prompt]), Masked()
    plain.caches.stores.clear()
    tokens, positions, blocks = (torch.from_numpy(p) for p in (batch.tokens, batch.positions, batch.blocks))
    x, deep = ours.merge(tokens, blocks, ours.adapt(ours.encode(prompt.pixels)))
    ours.decoder.prefill(x, positions, naive, blocks=None, deep=deep)
    place = torch.tensor([plain.place]).expand(3, 1, 1)
    expected = ours.decoder.head(ours.decoder.step(ours.decoder.embed(torch.tensor([[7]])), place, naive)[0])
    assert torch.allclose(session.step(torch.tensor([7])), expected, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
@torch.inference_mode()
def test_bytes_and_flops_are_those_predicted(pairs, way):
    ours = beside.in_half(pairs("llava").ours)
    prompt, used = beside.prompt_of(ours), [WAYS[way]]
    held = []
    found = beside.flops_of(lambda: held.append(open_session(ours, prompt, used)))
    (session,) = held
    assert session.nbytes == beside.kv_bytes(ours, prompt, used) < beside.kv_bytes(ours, prompt)
    said = beside.predicted(ours, prompt, used, output=2)
    stages = ("encode", "adapt", "prefill")
    assert found == pytest.approx(sum(map(said.flops, stages)) + said.own(*stages), rel=beside.CLOSE)
    step = beside.flops_of(lambda: session.step(torch.tensor([3])))
    assert step == pytest.approx(said.flops("decode"), rel=beside.CLOSE)
    assert step < beside.predicted(ours, prompt, output=2).flops("decode")


@torch.inference_mode()
def test_eviction_goes_with_pruning_and_with_fewer_bits(pairs):
    ours = beside.in_half(pairs("llava").ours)
    prompt = beside.prompt_of(ours)
    used = [
        technique("fastv", layer=1, keep=0.5),
        KVEvict(keep=0.5, score="rows", score_rows=4),
        KVQuantize(key_bits=4, value_bits=4, group=8),
    ]
    assert open_session(ours, prompt, used[:2]).nbytes == beside.kv_bytes(ours, prompt, used[:2])
    assert open_session(ours, prompt, used).nbytes == beside.kv_bytes(ours, prompt, used)


def test_what_does_not_run_is_said(pairs):
    ours = pairs("llava").ours
    for used, words in [
        ([KVEvict(keep=0.5, masked=True)], "masked=True does not run"),
        ([KVEvict(keep=0.5, head_share=0.5)], "head_share=0.5 does not run"),
        ([WAYS["heads"], KVQuantize(key_bits=8, value_bits=8)], "ragged=False"),
    ]:
        with pytest.raises(Unsupported, match=words):
            open_session(ours, beside.prompt_of(ours), used)
