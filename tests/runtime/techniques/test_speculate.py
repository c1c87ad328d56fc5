"""A draft changes no token of the target, and costs what is predicted."""

import pytest

torch = pytest.importorskip("torch", reason="the runtime needs PyTorch")
pytest.importorskip("transformers", reason="the oracle of the runtime")

from costmodel import Unsupported  # noqa: E402
from costmodel.counts import _prompt_only, stage_flops  # noqa: E402
from costmodel.memory import draft_kv_bytes, kv_bytes_per_request  # noqa: E402
from costmodel.techniques import technique  # noqa: E402
from costmodel.techniques.kv_evict import KVEvict  # noqa: E402
from costmodel.techniques.relaxed_verify import RelaxedVerify  # noqa: E402
from costmodel.techniques.speculate import Speculate  # noqa: E402
from runtime.blueprint import load_blueprint  # noqa: E402
from runtime.generate import Sampling, generate  # noqa: E402
from runtime.techniques import open_session  # noqa: E402
from runtime.weights import load  # noqa: E402
from tests.runtime import tiny  # noqa: E402
from tests.runtime.techniques import beside  # noqa: E402

STEPS = 24


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    """Return a model of the same sizes whose weights are others, but not by much."""
    folder = tmp_path_factory.mktemp("draft")
    real = tiny.real_model("llava")
    with torch.no_grad():
        for parameter in real.parameters():
            parameter.add_(0.05 * parameter.std() * torch.randn_like(parameter))
    real.save_pretrained(folder)
    return load(load_blueprint(folder), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("keep", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("shares", [True, False])
def test_tokens_are_those_of_the_target(pairs, draft, tokens, keep, shares):
    ours = pairs("llava").ours
    prompt = beside.prompt_of(ours)
    used = Speculate(draft=draft.spec, tokens=tokens, draft_visual_keep=keep, shares_encoder=shares)
    session = open_session(ours, prompt, [used], draft=draft)
    assert session.greedy(STEPS) == generate(ours, [prompt], max_tokens=STEPS)[0]
    assert sum(session.speculator.accepted) + len(session.speculator.accepted) >= STEPS - 1


def test_a_perfect_draft_is_accepted_whole(pairs):
    ours = pairs("llava").ours
    prompt = beside.prompt_of(ours)
    session = open_session(ours, prompt, [Speculate(draft=ours.spec, tokens=5)], draft=ours)
    assert session.greedy(STEPS) == generate(ours, [prompt], max_tokens=STEPS)[0]
    assert set(session.speculator.accepted) == {5}


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_first_layers_draft_and_leave_nothing_behind(pairs, name, layers):
    ours = pairs(name).ours
    prompt = beside.prompt_of(ours)
    session, plain = open_session(ours, prompt, [Speculate(layers=layers, tokens=3)]), open_session(ours, prompt)
    assert session.greedy(STEPS) == plain.greedy(STEPS)
    moved = session.place - open_session(ours, prompt).place
    lengths = {store.keys.shape[2] for store in session.caches.stores}
    assert lengths == {len(prompt.tokens) + moved}


@pytest.mark.parametrize(
    "others", [[technique("fastv", layer=1, keep=0.5)], [KVEvict(keep=0.5, score="rows")], [technique("visionzip")]]
)
def test_a_draft_is_lossless_for_a_target_under_other_techniques(pairs, draft, others):
    ours = pairs("llava").ours
    prompt = beside.prompt_of(ours)
    used = [*others, Speculate(draft=draft.spec, tokens=3, draft_visual_keep=0.5)]
    found = generate(ours, [prompt], max_tokens=STEPS, techniques=used, draft=draft)
    assert found == generate(ours, [prompt], max_tokens=STEPS, techniques=others)


def relaxed_by_hand(ours, draft, prompt, *, gamma, probability, count):
    """Return the tokens of relaxed rounds without any cache: every choice is made on a fresh prefill."""

    def next_of(model, tokens):
        return int(open_session(model, type(prompt)([*prompt.tokens, *tokens], prompt.pixels)).logits.argmax())

    generator = torch.Generator().manual_seed(7)
    found = [next_of(ours, [])]
    while len(found) < count:
        proposed = []
        for _ in range(gamma):
            proposed.append(next_of(draft, [*found, *proposed]))
        kept = []
        for token in proposed:
            right = next_of(ours, [*found, *kept]) == token
            if not right and not float(torch.rand((), generator=generator)) < probability:
                break
            kept.append(token)
        found += [*kept, next_of(ours, [*found, *kept])]
    return found[:count]


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_relaxed_rounds_are_those_of_fresh_prefills(pairs, draft, probability):
    ours = pairs("llava").ours
    prompt = beside.prompt_of(ours)
    used = [Speculate(draft=draft.spec, tokens=3, shares_encoder=False), RelaxedVerify(probability=probability)]
    session = open_session(ours, prompt, used, draft=draft, seed=7)
    assert session.greedy(12) == relaxed_by_hand(ours, draft, prompt, gamma=3, probability=probability, count=12)
    if probability == 1.0:
        assert set(session.speculator.accepted) == {3}


@torch.inference_mode()
def test_flops_and_bytes_are_those_predicted(pairs, draft):
    ours, small = (beside.in_half(model) for model in (pairs("llava").ours, draft))
    prompt = beside.prompt_of(ours)
    used = [Speculate(draft=small.spec, tokens=4, draft_visual_keep=0.25)]
    held = []
    found = beside.flops_of(lambda: held.append(open_session(ours, prompt, used, draft=small)))
    (session,) = held
    said = beside.predicted(ours, prompt, used, output=2)
    query, own = said.query, said.query.drafting
    expected = sum(map(said.flops, ("encode", "adapt", "prefill"))) + stage_flops(own, "prefill")
    assert found == pytest.approx(expected, rel=beside.CLOSE)
    only = _prompt_only(query)
    assert session.nbytes == kv_bytes_per_request(only) + draft_kv_bytes(only)
    proposing = beside.flops_of(lambda: session.speculator.drafter.pass_over(torch.tensor([3])))
    assert proposing == pytest.approx(stage_flops(own, "decode"), rel=beside.CLOSE)
    verifying = beside.flops_of(lambda: session.step(torch.tensor([3, 4, 5, 6, 7])))
    assert verifying == pytest.approx(said.flops("decode"), rel=beside.CLOSE)


def test_what_does_not_run_is_said(pairs):
    ours = pairs("llava").ours
    prompt = beside.prompt_of(ours)
    for used, words in [
        ([Speculate(head_layers=1)], "head_layers=1 does not run"),
        ([Speculate(layers=1, nodes=8, depth=2)], "nodes=8 does not run"),
        ([technique("specvlm_ji")], "give the model as draft="),
    ]:
        with pytest.raises(Unsupported, match=words):
            open_session(ours, prompt, used)
    with pytest.raises(ValueError, match="there is none"):
        open_session(ours, prompt, [RelaxedVerify(probability=0.5)])
    with pytest.raises(Unsupported, match="greedily"):
        generate(ours, [prompt], max_tokens=2, techniques=[KVEvict()], sampling=Sampling(1.0))
    assert open_session(ours, prompt, [Speculate()]).greedy(3) == open_session(ours, prompt).greedy(3)


def test_an_answer_ends_behind_its_stop_token(pairs, draft):
    ours = pairs("llava").ours
    prompt = beside.prompt_of(ours)
    whole = generate(ours, [prompt], max_tokens=16)
    used = [Speculate(draft=draft.spec, tokens=3)]
    for stop in whole[0][3:7]:
        expected = generate(ours, [prompt], max_tokens=16, stop=[stop])
        assert generate(ours, [prompt], max_tokens=16, stop=[stop], techniques=used, draft=draft) == expected
