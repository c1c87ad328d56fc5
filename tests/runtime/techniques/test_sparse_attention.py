"""Blocks that are not chosen are never computed, and all of them are plain attention."""

import pytest

torch = pytest.importorskip("torch", reason="the runtime needs PyTorch")
pytest.importorskip("transformers", reason="the oracle of the runtime")

from costmodel import Unsupported  # noqa: E402
from costmodel.techniques import technique  # noqa: E402
from costmodel.techniques.sparse_attention import SparseAttention  # noqa: E402
from runtime.techniques import open_session  # noqa: E402
from runtime.techniques.sparse_attention import SparsePrefill, antidiagonal_scores, chosen_blocks  # noqa: E402
from tests.runtime.techniques import beside  # noqa: E402

LONG = 352  # tokens of text; with the pictures 48 blocks of eight


def sparse(density, estimator="antidiagonal"):
    return SparseAttention(density=density, block=8, estimator=estimator, estimator_stride=4)


def test_worth_of_blocks_is_that_of_sums_along_antidiagonals():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 16, 6, generator=generator).unbind()
    found = antidiagonal_scores(q, k, block=8, stride=4, scale=0.5)
    for head in range(2):
        scores = q[head] @ k[head].T
        for i in range(4):
            sums = [sum(float(scores[4 * i + 3 - a, 4 * j + a]) for a in range(4)) for j in range(i + 1)]
            shares = (torch.tensor(sums) * 0.5 / 4).softmax(-1)
            found[head, i // 2, : i // 2 + 1] -= torch.stack([shares[b : b + 2].sum() for b in range(0, i + 1, 2)])
    assert found.abs().max() < 1e-5


def test_the_diagonal_is_always_computed_and_nothing_lies_above_it():
    chosen = chosen_blocks(torch.rand(3, 10, 10), 0.4)
    assert chosen.diagonal(dim1=1, dim2=2).all()
    assert not chosen.triu(1).any()
    assert (chosen.sum((1, 2)) == 22).all()  # of 55
    assert (chosen_blocks(torch.rand(3, 10, 10), 0.01).sum((1, 2)) == 10).all()


@pytest.mark.parametrize("estimator", ["none", "antidiagonal"])
@pytest.mark.parametrize("tokens", [24, 29])
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_attention_is_that_of_a_mask(density, tokens, estimator):
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(1, heads, tokens, 8, generator=generator) for heads in (4, 2, 2))
    runs = SparsePrefill(sparse(density, estimator))
    blocks = runs._chosen(q, k, scale=8**-0.5, density=density)
    mask = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :tokens, :tokens].tril()
    keys, values = (part.repeat_interleave(2, 1) for part in (k, v))
    expected = (q @ keys.transpose(-1, -2) * 8**-0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ values
    assert torch.allclose(runs.attend(q, k, v, scale=None), expected, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("used", [sparse(1.0), SparseAttention()])
def test_all_blocks_are_the_reference_exactly(pairs, used):
    ours = pairs("llava").ours
    prompt = beside.prompt_of(ours)
    plain, session = open_session(ours, prompt), open_session(ours, prompt, [used])
    assert torch.equal(plain.logits, session.logits)
    assert plain.greedy(8) == session.greedy(8)


@pytest.mark.parametrize("estimator", ["none", "antidiagonal"])
@torch.inference_mode()
def test_flops_are_those_predicted_and_the_cache_stays(pairs, estimator):
    ours = beside.in_half(pairs("llava").ours)
    prompt, used = beside.prompt_of(ours, n_text=LONG), [sparse(0.25, estimator)]
    held = []
    found = beside.flops_of(lambda: held.append(open_session(ours, prompt, used)))
    said = beside.predicted(ours, prompt, used, square=False)
    stages = ("encode", "adapt", "prefill")
    assert found == pytest.approx(sum(map(said.flops, stages)) + said.own(*stages), rel=beside.CLOSE)
    assert found < 0.85 * sum(map(beside.predicted(ours, prompt, square=False).flops, stages))
    assert held[0].nbytes == beside.kv_bytes(ours, prompt)


@torch.inference_mode()
def test_sparse_attention_goes_with_pruning(pairs):
    ours = beside.in_half(pairs("llava").ours)
    prompt = beside.prompt_of(ours)
    used = [technique("fastv", variant="rows", layer=1, keep=0.5), sparse(0.5)]
    assert open_session(ours, prompt, used).nbytes == beside.kv_bytes(ours, prompt, used)


@pytest.mark.parametrize(
    ("used", "words"),
    [
        (SparseAttention(density=0.5, estimator="mean_pool"), "estimator='mean_pool' does not run"),
        (SparseAttention(density=0.5, stage="encode"), "stage='encode' does not run"),
        (SparseAttention(density=0.5, block=10, estimator_stride=4), "the first a multiple"),
    ],
)
def test_what_does_not_run_is_said(pairs, used, words):
    ours = pairs("llava").ours
    with pytest.raises(Unsupported, match=words):
        open_session(ours, beside.prompt_of(ours), [used])
