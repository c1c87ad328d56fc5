"""A narrow cache holds the bits that it says, and computes what its numbers say."""

import pytest

torch = pytest.importorskip("torch", reason="the runtime needs PyTorch")
pytest.importorskip("transformers", reason="the oracle of the runtime")

from costmodel import Unsupported  # noqa: E402
from costmodel.techniques import technique  # noqa: E402
from costmodel.techniques.kv_quantize import KVQuantize  # noqa: E402
from runtime.techniques import open_session  # noqa: E402
from runtime.techniques.kv_quantize import Packed, QuantizedStore  # noqa: E402
from tests.runtime.techniques import beside  # noqa: E402

WAYS = {
    "8": KVQuantize(key_bits=8, value_bits=8),
    "4": KVQuantize(key_bits=4, value_bits=4, group=8),
    "2": KVQuantize(key_bits=2, value_bits=2, group=16),
    "4_2_residual": KVQuantize(key_bits=4, value_bits=2, group=16, residual_tokens=32),
    "8_16_residual": KVQuantize(key_bits=8, value_bits=16, residual_tokens=7),
}


def naive(x, bits):
    """Return a list of numbers as a group of so many bits gives them back."""
    low, high = min(x), max(x)
    scale = float(torch.tensor((high - low) / (2**bits - 1)).half())
    zero = float(torch.tensor(low).half())
    codes = [min(max(round((value - zero) / scale), 0), 2**bits - 1) for value in x]
    return [code * scale + zero for code in codes]


@pytest.mark.parametrize("bits", [2, 4])
def test_packed_numbers_are_codes_of_so_many_bits(bits):
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(bits))
    packed = Packed.of(x, bits)
    assert packed.codes.nbytes == x.numel() * bits // 8
    expected = torch.tensor([[naive(group.tolist(), bits) for group in row] for row in x])
    assert torch.allclose(packed.unpacked(), expected, atol=1e-5)
    assert torch.equal(Packed.of(torch.full((2, 8), 0.5), bits).unpacked(), torch.full((2, 8), 0.5))


@pytest.mark.parametrize("bits", [2, 4])
def test_keys_share_scales_along_channels_and_values_along_tokens(bits):
    generator = torch.Generator().manual_seed(1)
    k, v = torch.randn(2, 1, 2, 35, 16, generator=generator).unbind()
    store = QuantizedStore(KVQuantize(key_bits=bits, value_bits=bits, group=16, residual_tokens=2), k, v)
    keys, values = store.read()
    assert torch.equal(keys[:, :, 32:], k[:, :, 32:])  # the residual window, and what fills no group
    assert torch.equal(values[:, :, 32:], v[:, :, 32:])
    for head in range(2):
        for start in (0, 16):
            for channel in range(16):
                group = k[0, head, start : start + 16, channel]
                expected = torch.tensor(naive(group.tolist(), bits))
                assert torch.allclose(keys[0, head, start : start + 16, channel], expected, atol=1e-5)
        for token in range(32):
            expected = torch.tensor(naive(v[0, head, token].tolist(), bits))
            assert torch.allclose(values[0, head, token], expected, atol=1e-5)


def test_new_tokens_are_packed_group_by_group():
    k, v = torch.randn(2, 1, 2, 64, 16, generator=torch.Generator().manual_seed(2)).unbind()
    used = KVQuantize(key_bits=4, value_bits=4, group=16, residual_tokens=8)
    whole, grown = QuantizedStore(used, k, v), QuantizedStore(used, k[:, :, :20], v[:, :, :20])
    for i in range(20, 64):
        grown.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        grown.settle()
        assert 8 <= grown.keys.shape[2] < 8 + 16
    for ours, theirs in zip(whole.read(), grown.read(), strict=True):
        assert torch.equal(ours, theirs)


def test_more_bits_are_nearer():
    k, v = torch.randn(2, 1, 2, 64, 16, generator=torch.Generator().manual_seed(3)).unbind()
    errors = []
    for bits in (2, 4, 8, 16):
        store = QuantizedStore(KVQuantize(key_bits=bits, value_bits=bits), k, v)
        errors.append(float((store.read()[0] - k).norm() / k.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


@torch.inference_mode()
def test_sixteen_bits_are_the_reference_exactly(pairs):
    ours = pairs("llava").ours
    prompt = beside.prompt_of(ours)
    plain, session = open_session(ours, prompt), open_session(ours, prompt, [KVQuantize()])
    assert torch.equal(plain.logits, session.logits)
    for token in (3, 5, 7):
        assert torch.equal(plain.step(torch.tensor([token])), session.step(torch.tensor([token])))


@pytest.mark.parametrize("way", WAYS)
@torch.inference_mode()
def test_bytes_and_flops_are_those_predicted(pairs, way):
    ours = beside.in_half(pairs("llava").ours)
    prompt, used = beside.prompt_of(ours), [WAYS[way]]
    session = open_session(ours, prompt, used)
    assert session.nbytes == beside.kv_bytes(ours, prompt, used) < beside.kv_bytes(ours, prompt)
    step = beside.predicted(ours, prompt, used, output=2).flops("decode")
    assert beside.flops_of(lambda: session.step(torch.tensor([3]))) == pytest.approx(step, rel=beside.CLOSE)


@torch.inference_mode()
def test_narrow_caches_go_with_fewer_tokens(pairs):
    ours = beside.in_half(pairs("llava").ours)
    prompt = beside.prompt_of(ours)
    used = [technique("fastv", layer=1, keep=0.5), KVQuantize(key_bits=2, value_bits=2, group=16)]
    assert open_session(ours, prompt, used).nbytes == beside.kv_bytes(ours, prompt, used)


@pytest.mark.parametrize(
    ("used", "words"),
    [
        (technique("vidkv"), "transform='fft' does not run"),
        (KVQuantize(key_bits=1.5, value_bits=2), "key_bits=1.5 does not run"),
        (KVQuantize(key_bits=2, value_bits=2, group=0), "group=0 must be a multiple of four"),
        (KVQuantize(key_bits=2, value_bits=2, group=12), "divides the 16 numbers"),
    ],
)
def test_what_does_not_run_is_said(pairs, used, words):
    ours = pairs("llava").ours
    with pytest.raises(Unsupported, match=words):
        open_session(ours, beside.prompt_of(ours), [used])
