"""Everything stays somewhere, and steps read what their question asks for."""

import pytest

torch = pytest.importorskip("torch", reason="the runtime needs PyTorch")
pytest.importorskip("transformers", reason="the oracle of the runtime")

from costmodel import Unsupported  # noqa: E402
from costmodel.counts import _prompt_only  # noqa: E402
from costmodel.memory import host_kv_bytes_per_request  # noqa: E402
from costmodel.stages import Structure  # noqa: E402
from costmodel.techniques import technique  # noqa: E402
from costmodel.techniques.kv_quantize import KVQuantize  # noqa: E402
from costmodel.techniques.kv_retrieve import KVRetrieve  # noqa: E402
from runtime.techniques import open_session  # noqa: E402
from runtime.techniques.kv_retrieve import chosen_places, chunk_scores, mean_keys  # noqa: E402
from tests.runtime.techniques import beside  # noqa: E402

WAYS = [(place, each) for place in ("gpu", "host") for each in ("turn", "step")]


@pytest.mark.parametrize(("place", "each"), WAYS)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@torch.inference_mode()
def test_a_full_budget_is_the_reference_exactly(pairs, name, place, each):
    ours = pairs(name).ours
    prompt = beside.prompt_of(ours)
    used = KVRetrieve(placement=place, each=each, chunk_tokens=4)
    plain, session = open_session(ours, prompt), open_session(ours, prompt, [used])
    assert torch.equal(plain.logits, session.logits)
    for token in (3, 5, 7):
        assert torch.equal(plain.step(torch.tensor([token])), session.step(torch.tensor([token])))


def test_chunks_are_those_of_loops():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 3, 8, generator=generator), torch.randn(1, 2, 10, 8, generator=generator)
    means = mean_keys(k, 4)
    scores = [0.0] * 3
    for chunk, places in enumerate((range(4), range(4, 8), range(8, 10))):
        for head in range(4):
            mean = sum(k[0, head // 2, j] for j in places) / len(places)
            scores[chunk] += sum(float(q[0, head, i] @ mean) for i in range(3))
    assert torch.allclose(chunk_scores(q, means), torch.tensor(scores), atol=1e-4)
    best = max(range(2), key=lambda i: scores[i])
    found = chosen_places(torch.tensor(scores[:2]), 8, chunk=4, count=5, window=1)
    assert 7 in found
    assert len(found) == 5
    assert set(range(best * 4, best * 4 + 4)) - {7} <= set(found.tolist())


@pytest.mark.parametrize(("place", "each"), WAYS)
@torch.inference_mode()
def test_a_step_is_that_of_a_mask_over_the_whole_cache(pairs, place, each):
    ours = pairs("llava").ours
    prompt = beside.prompt_of(ours)
    used = KVRetrieve(read=0.25, window=4, placement=place, each=each, chunk_tokens=4)
    plain, session = open_session(ours, prompt), open_session(ours, prompt, [used])
    visual = torch.tensor(prompt.tokens) == 100
    caches = plain.caches

    class Masked:
        def attend_step(self, layer, q, k, v, _window, *, scale):
            store, theirs = caches.stores[layer], session.caches.stores[layer]
            store.append(k, v)
            if each == "step":
                scores = chunk_scores(q, mean_keys(store.keys[:, :, :-1][:, :, visual], 4))
                read = chosen_places(scores, 32, chunk=4, count=12, window=4)
            else:
                read = theirs.places
            open_ = torch.cat((~visual, torch.tensor([True])))
            open_[visual.nonzero()[:, 0][read]] = True
            keys, values = (part.repeat_interleave(2, 1) for part in (store.keys, store.values))
            scores = (q @ keys.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)).masked_fill(~open_, -torch.inf)
            return scores.softmax(-1) @ values

    place_of = torch.tensor([plain.place]).expand(3, 1, 1)
    expected = ours.decoder.step(ours.decoder.embed(torch.tensor([[7]])), place_of, Masked())[0]
    assert torch.allclose(session.step(torch.tensor([7])), ours.decoder.head(expected), atol=1e-4)
    assert {len(store.places) for store in session.caches.stores} == {12}


@pytest.mark.parametrize(("place", "each"), WAYS)
@torch.inference_mode()
def test_bytes_and_flops_are_those_predicted(pairs, place, each):
    ours = beside.in_half(pairs("llava").ours)
    prompt = beside.prompt_of(ours)
    used = [KVRetrieve(read=0.25, placement=place, each=each, chunk_tokens=4)]
    held = []
    found = beside.flops_of(lambda: held.append(open_session(ours, prompt, used)))
    (session,) = held
    said = beside.predicted(ours, prompt, used, output=2)
    stages = ("encode", "adapt", "prefill")
    assert found == pytest.approx(sum(map(said.flops, stages)) + said.own(*stages), rel=beside.CLOSE)
    step = beside.flops_of(lambda: session.step(torch.tensor([3])))
    assert step == pytest.approx(said.flops("decode") + said.own("decode"), rel=beside.CLOSE)
    session.drop(1)
    session.settle()
    only = _prompt_only(said.query)
    assert session.host_bytes == host_kv_bytes_per_request(only, Structure.of(only))
    assert session.nbytes == beside.kv_bytes(ours, prompt, used)
    assert (session.host_bytes > 0) == (place == "host")


@torch.inference_mode()
def test_retrieval_goes_with_pruning_and_a_draft(pairs):
    ours = beside.in_half(pairs("llava").ours)
    prompt = beside.prompt_of(ours)
    used = [technique("fastv", layer=1, keep=0.5), KVRetrieve(read=0.5, placement="host", chunk_tokens=4)]
    assert open_session(ours, prompt, used).nbytes == beside.kv_bytes(ours, prompt, used)
    whole, turn = pairs("llava").ours, [KVRetrieve(read=0.5, chunk_tokens=4)]
    drafted = open_session(whole, prompt, [*turn, technique("speculate", layers=1, tokens=3)])
    assert drafted.greedy(12) == open_session(whole, prompt, turn).greedy(12)


def test_what_does_not_run_is_said(pairs):
    ours = pairs("llava").ours
    for used, words in [
        ([KVRetrieve(read=0.5, scorer="external")], "scorer='external' does not run"),
        ([KVRetrieve(read=0.5, each="step"), technique("speculate", layers=1)], "use 'turn'"),
        ([KVRetrieve(read=0.5), KVQuantize(key_bits=8, value_bits=8)], "leave KVEvict and KVQuantize out"),
    ]:
        with pytest.raises(Unsupported, match=words):
            open_session(ours, beside.prompt_of(ours), used)
