"""DeepSeek decoders against `transformers` on the meta device, and the operators of latent attention and experts."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from costmodel import Image, Workload, build_query, load_engine, load_hardware, load_model, predict
from costmodel.counts import count
from costmodel.errors import Unsupported
from costmodel.families.text import read_decoder
from costmodel.families.text.deepseek import TEXT_CONFIGS
from costmodel.layers import LatentAttentionSpec, MoeSpec
from costmodel.memory import kv_bytes_per_request, memory, weights_bytes
from costmodel.models import ModelSpec
from costmodel.operators import KV, WEIGHT, Kind
from costmodel.stages import Structure
from costmodel.sums import decode_points, touched_share
from tests.check_golden import GOLDEN
from tests.helpers import load_config

SMALL = {
    "num_hidden_layers": 3,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 48,
    "n_group": 1,
    "topk_group": 1,
}
VARIANTS = {
    "no_query_rank": {"q_lora_rank": None, "first_k_dense_replace": 1},
    "query_rank": {"q_lora_rank": 80, "first_k_dense_replace": 0},
    "all_dense": {"q_lora_rank": 80, "first_k_dense_replace": 3},
    "biases_and_tied": {
        "q_lora_rank": 80,
        "first_k_dense_replace": 2,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
}
MLA_MODELS = ("deepseek-vl2", "deepseek-vl2-small", "kimi-vl-a3b")


def real(values):
    config = CONFIG_MAPPING[values["model_type"]].from_dict(dict(values))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", experts_implementation="batched_mm", dtype=torch.bfloat16
        )
    return model.eval()


@torch.no_grad()
def real_flops(model, n_tokens, cache=None):
    """Return FLOPs of a forward pass with the head at the last position, and the cache it leaves."""
    rows = torch.empty(1, n_tokens, model.config.hidden_size, device="meta", dtype=torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        out = model(inputs_embeds=rows, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return counter.get_total_flops(), out.past_key_values


def text_model(values):
    tied = values.get("tie_word_embeddings", False)
    return ModelSpec("small", "deepseek", read_decoder(values, "test", tied=tied))


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_are_those_of_transformers(model_type, variant):
    values = {"model_type": model_type, **SMALL, **VARIANTS[variant]}
    ours, theirs = text_model(values), real(values)
    assert ours.parameters()["total"] == theirs.num_parameters()
    prompt = 24
    flops = count(ours, Workload(text_tokens=prompt), convention="torch").flops
    prefill, cache = real_flops(theirs, prompt)
    assert flops["prefill"] == prefill
    assert flops["decode_step"] == real_flops(theirs, 1, cache)[0]
    # the cache holds the decoded token as well by now
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert ours.decoder.kv_bytes_per_token() * (prompt + 1) == held


def test_biases_of_dense_and_shared_blocks_are_counted():
    values = {"model_type": "deepseek_v2", **SMALL, "q_lora_rank": None, "first_k_dense_replace": 1, "mlp_bias": True}
    assert text_model(values).parameters()["total"] == real(values).num_parameters()


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
def test_missing_keys_fall_back_as_in_transformers(model_type):
    sparse = {"model_type": model_type, "num_hidden_layers": 4, "num_experts_per_tok": 4, "tie_word_embeddings": False}
    assert text_model(sparse).parameters()["total"] == real(sparse).num_parameters()


@pytest.mark.parametrize("model_type", TEXT_CONFIGS)
def test_defaults_are_those_of_transformers(model_type):
    theirs, fields = CONFIG_MAPPING[model_type](), TEXT_CONFIGS[model_type].model_fields
    ours = {key: field.default for key, field in fields.items() if hasattr(theirs, key)}
    ours["num_key_value_heads"] = ours["num_key_value_heads"] or ours["num_attention_heads"]
    assert ours == {key: getattr(theirs, key) for key in ours}


def test_experts_may_stand_in_every_other_layer():
    values = {"model_type": "deepseek_v2", **SMALL, "num_hidden_layers": 6, "moe_layer_freq": 2, "q_lora_rank": None}
    layers = text_model(values | {"first_k_dense_replace": 1}).decoder.layers()
    assert [isinstance(layer.ffn, MoeSpec) for layer in layers] == [False, False, True, False, True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 17}, "num_experts_per_tok"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok"),
        ({"v_head_dim": 0}, "v_head_dim"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises((ValueError, Unsupported), match=message):
        read_decoder({"model_type": "deepseek_v2", **SMALL, **changes}, "test")


# Latent attention


@pytest.mark.parametrize("name", MLA_MODELS)
def test_the_cache_of_a_token_is_its_latent(name):
    model = load_model(name)
    assert model.decoder.kv_bytes_per_token() == 1152 * model.decoder.n_layers


def latent_by_hand(spec, width, rows, pairs, *, absorbed):
    """Return FLOPs of one layer's attention: projections of the rows, then scores and sums over the pairs."""
    nope, rope, value, rank, heads = spec.nope_dim, spec.rope_dim, spec.value_dim, spec.kv_rank, spec.heads
    query = width * heads * (nope + rope)
    if spec.q_rank:
        query = width * spec.q_rank + spec.q_rank * heads * (nope + rope)
    latent = width * (rank + rope)
    between = rank * heads * (nope + value)  # expansion of the latent, or absorption into query and output
    out = heads * value * width
    each_pair = heads * ((rank + rope) + rank) if absorbed else heads * ((nope + rope) + value)
    return 2 * rows * (query + latent + between + out) + 2 * pairs * each_pair


def ffn_by_hand(model, rows):
    total = 0
    for layer in model.decoder.layers():
        ffn, width = layer.ffn, layer.width
        if isinstance(ffn, MoeSpec):
            total += 2 * rows * width * (ffn.experts + 3 * (ffn.top_k * ffn.hidden + ffn.shared_hidden))
        else:
            total += 2 * rows * width * 3 * ffn.hidden
    return total


@pytest.mark.parametrize("q_rank", [None, 80])
def test_flops_of_latent_attention_by_hand(q_rank):
    values = {"model_type": "deepseek_v3", **SMALL, "q_lora_rank": q_rank, "first_k_dense_replace": 1}
    model, tokens = text_model(values), 100
    layers, head = model.decoder.layers(), 2 * model.decoder.width * model.decoder.vocabulary
    flops = count(model, Workload(text_tokens=tokens)).flops
    causal = tokens * (tokens + 1) // 2
    prefill = sum(latent_by_hand(x.mixer, x.width, tokens, causal, absorbed=False) for x in layers)
    assert flops["prefill"] == prefill + ffn_by_hand(model, tokens) + head
    step = sum(latent_by_hand(x.mixer, x.width, 1, tokens + 1, absorbed=True) for x in layers)
    assert flops["decode_step"] == step + ffn_by_hand(model, 1) + head


def decode_bytes(model, column, *, kind, batch, text_tokens=100):
    """Return the bytes of the first decode step's operators of this kind, and of all others."""
    query = build_query(model, Workload(text_tokens=text_tokens), load_engine("ideal"), batch=batch)
    structure = Structure.of(query)
    table = structure.table("decode")
    points = decode_points(query, structure, query.turns[0], detailed=True)
    each = table.columns(points.sums)[column, :, 0] * table.repeats
    return each[table.kinds == kind].sum(), each[table.kinds != kind].sum()


def test_decode_reads_the_latents_of_all_tokens():
    model = load_model("kimi-vl-a3b")
    read, written = decode_bytes(model, KV, kind=Kind.DECODE_ATTENTION, batch=5, text_tokens=1000)
    assert read == 5 * 1001 * 1152 * 27
    assert written == 5 * 1152 * 27


def test_memory_holds_all_experts_and_the_latents():
    model = load_model("kimi-vl-a3b")
    query = build_query(model, Workload(text_tokens=900, output_tokens=100), load_engine("ideal"), batch=3)
    assert sum(weights_bytes(Structure.of(query))) == 2 * model.parameters()["total"]
    assert kv_bytes_per_request(query) == 1000 * 1152 * 27
    used = memory(query, load_hardware("h100-sxm5-80gb"))
    assert used.kv_bytes == 3 * 1000 * 1152 * 27


# Experts


@pytest.mark.parametrize("name", ["deepseek-vl2", "deepseek-vl2-tiny", "deepseek-vl2-small", "kimi-vl-a3b"])
def test_touched_experts_grow_from_those_of_one_row_to_all(name):
    model = load_model(name)
    experts, top_k = model.routing
    query = build_query(model, Workload(text_tokens=10), load_engine("ideal"), batch=1)
    rows = np.array([1.0, 2.0, 8.0, 64.0, 4096.0])
    share = touched_share(query, rows)
    assert share[0] == pytest.approx(top_k / experts, rel=1e-12)
    assert (np.diff(share) > 0).all()
    assert share[-1] == pytest.approx(1.0, abs=1e-9)
    assert (share <= np.minimum(1.0, rows * top_k / experts) + 1e-12).all()


@pytest.mark.parametrize("batch", [1, 4, 32, 1024])
def test_decode_reads_the_weights_of_the_experts_that_are_touched(batch):
    model = load_model("deepseek-vl2")
    query = build_query(model, Workload(), load_engine("ideal"), batch=batch)
    read, rest = decode_bytes(model, WEIGHT, kind=Kind.MOE_GEMM, batch=batch)
    layers = [x for x in model.decoder.layers() if isinstance(x.ffn, MoeSpec)]
    routed = sum(2 * 3 * x.width * x.ffn.experts * x.ffn.hidden for x in layers)
    assert read == pytest.approx(routed * touched_share(query, float(batch)), rel=1e-12)
    # everything else is read whole, once, whatever the batch; norms are not among the products
    decoder = model.decoder
    norms = (2 * decoder.n_layers + 1) * decoder.width + 512 * decoder.n_layers
    expected = 2 * (decoder.parameters - norms - decoder.vocabulary * decoder.width) - routed
    assert rest == pytest.approx(expected, rel=1e-12)


def test_active_parameters_leave_out_the_other_experts():
    for name in ("deepseek-vl2", "deepseek-vl2-tiny", "kimi-vl-a3b"):
        parts, decoder = load_model(name).parameters(), load_model(name).decoder
        idle = sum(
            3 * x.width * (x.ffn.experts - x.ffn.top_k) * x.ffn.hidden
            for x in decoder.layers()
            if isinstance(x.ffn, MoeSpec)
        )
        assert parts["active"] == parts["total"] - idle
        assert parts["active"] == GOLDEN[name]["parameters"]["active"]


def test_a_larger_batch_costs_less_than_as_many_small_ones():
    def step(batch):
        return predict("deepseek-vl2", "h200-sxm-141gb", Workload(images=[Image(640, 480)]), batch=batch).tpot_s

    assert step(1) < step(8) < 8 * step(1)


def test_mixers_of_the_catalogue():
    assert all(isinstance(x.mixer, LatentAttentionSpec) for n in MLA_MODELS for x in load_model(n).decoder.layers())
    assert not any(isinstance(x.mixer, LatentAttentionSpec) for x in load_model("deepseek-vl2-tiny").decoder.layers())
    first, *others = load_model("deepseek-vl2").decoder.layers()
    assert not isinstance(first.ffn, MoeSpec)
    assert all(x.ffn.shared_hidden == 2 * x.ffn.hidden for x in others)


@pytest.mark.parametrize(("name", "part"), [("kimi-vl-a3b", "text_config"), ("deepseek-vl2-small", "language_config")])
def test_decoders_of_the_catalogue_have_the_parameters_of_transformers(name, part):
    assert load_model(name).decoder.parameters == real(load_config(name)[part]).num_parameters()
