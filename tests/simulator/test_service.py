"""What a service says beside times: what a pool holds, and what moves between pools."""

from itertools import pairwise

import pytest

from costmodel import DoesNotFit, Image, Workload, build_query, load_engine, load_hardware, load_model
from costmodel.memory import PARTS, kv_bytes_per_request, memory
from simulator import Pool, ServingPlan
from simulator.service import LinearService
from simulator.step_service import StepService, parts_of

A100, H100 = "a100-sxm4-80gb", "h100-sxm5-80gb"
EPD_SAVINGS = {"minicpm-v-2.6": 0.95, "internvl2-8b": 0.96, "internvl2-26b": 0.78}
"""EPDServe (arXiv:2501.05460), section 4.4: weights that a worker leaves out where it only encodes."""


def service(model, *, stages=None, **pool):
    given = Pool(hardware=pool.pop("hardware", H100), **({"stages": stages} if stages else {}), **pool)
    plan = ServingPlan(model=model, pools=(given,))
    return StepService.of_pool(plan, given)


def held(model, parts, images=1):
    query = build_query(
        load_model(model), Workload(images=[Image(4032, 3024)] * images, text_tokens=22), load_engine("vllm")
    )
    return memory(query, load_hardware(A100), parts=parts)


# What a pool holds


@pytest.mark.parametrize(("model", "saving"), EPD_SAVINGS.items())
def test_a_worker_that_only_encodes_leaves_out_the_weights_that_epdserve_says(model, saving):
    left_out = 1 - held(model, ["vision"]).weights_bytes / held(model, PARTS).weights_bytes
    assert left_out == pytest.approx(saving, abs=0.02)


@pytest.mark.parametrize("model", [*EPD_SAVINGS, "qwen3-vl-8b", "llama-3.2-11b-vision"])
def test_the_parts_of_a_model_add_up_to_it(model):
    whole, vision, language = (held(model, parts) for parts in (PARTS, ["vision"], ["language"]))
    parameters = load_model(model).parameters()
    other = parameters["total"] - parameters["language"]
    assert (vision.weights_bytes, language.weights_bytes) == (2 * other, 2 * parameters["language"])
    assert vision.weights_bytes + language.weights_bytes == whole.weights_bytes
    assert vision.kv_bytes == vision.block_bytes == vision.kv_blocks == vision.prefill_activation_bytes == 0
    assert (language.kv_bytes, language.encode_activation_bytes) == (whole.kv_bytes, 0)
    assert held(model, []).peak_bytes == whole.reserve_bytes


def most_images(model, parts, kv_share, most=600):
    """Return the most pictures of a request for which there is room beside a cache of that share of free memory."""

    def fits(images):
        room = held(model, parts, images)
        free = room.usable_bytes - room.weights_bytes - room.reserve_bytes
        cache = kv_share * free if "language" in parts else 0.0
        return cache + room.encode_activation_bytes <= free

    able = [n for n in (1, 2, 5, 10, 20, 40, 80, 160, most) if fits(n)]
    return max(able, default=0)


@pytest.mark.parametrize("model", EPD_SAVINGS)
def test_more_pictures_fit_where_encoder_and_language_model_stand_apart(model):
    """EPDServe, table 2: with the cache at 80 % of the free memory, 7 → 49 and 1 → 10 pictures of 4032 x 3024."""
    assert most_images(model, ["vision"], 0.8) > most_images(model, PARTS, 0.8)


def kv_share(model, parts, images):
    """Return the largest share of the free memory that can be cache beside the activations of a request."""
    room = held(model, parts, images)
    free = room.usable_bytes - room.weights_bytes - room.reserve_bytes
    return 1 - room.activation_bytes / free


@pytest.mark.parametrize("model", EPD_SAVINGS)
def test_a_larger_share_of_memory_is_cache_where_nothing_is_encoded(model):
    """EPDServe, table 8: shares fall with the pictures of a request, and are larger on workers that do not encode."""
    counts = (5, 10, 20)
    whole, apart = ([kv_share(model, parts, n) for n in counts] for parts in (PARTS, ["language"]))
    assert all(one > other for one, other in zip(apart, whole, strict=True))
    assert all(more <= fewer for shares in (whole, apart) for fewer, more in pairwise(shares))
    gain = [one - other for one, other in zip(apart, whole, strict=True)]
    assert gain[-1] > gain[0]


def test_pools_hold_what_their_stages_need():
    stages = {"encode": ("vision",), "prefill": ("language",), "decode": ("language",), "preprocess": ()}
    assert {name: parts_of(Pool(hardware=H100, stages=(name,))) for name in stages} == stages
    encoder, whole, decoder = (
        service("qwen2.5-vl-7b", stages=stages).capacity
        for stages in (("encode",), ("encode", "prefill", "decode"), ("decode",))
    )
    assert encoder.kv_blocks == 0 < whole.kv_blocks < decoder.kv_blocks
    assert encoder.encoder_tokens == whole.encoder_tokens


def test_an_encoder_fits_where_the_model_does_not():
    assert service("qwen2.5-vl-32b", stages=("encode",), hardware="a10-24gb").capacity.kv_blocks == 0
    with pytest.raises(DoesNotFit, match=r"qwen2\.5-vl-32b"):
        service("qwen2.5-vl-32b", hardware="a10-24gb")


# What moves between pools


def test_embeddings_have_the_width_of_the_language_model_and_a_vector_for_every_depth():
    """A picture of 1920 x 1080: 60 x 34 tokens of 4,096 numbers, and three levels of DeepStack beside them."""
    qwen = service("qwen3-vl-8b")
    cost = qwen.media(Image(1920, 1080), 1)
    assert qwen.embedding_bytes(cost) == 60 * 34 * 4096 * 2 * 4
    llama = service("qwen2.5-vl-7b")
    cost = llama.media(Image(1288, 952), 1)
    assert llama.embedding_bytes(cost) == 46 * 34 * 3584 * 2


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("model", ["qwen2.5-vl-7b", "gemma-3-12b", "qwen3.5-4b", "kimi-vl-a3b"])
def test_the_cache_that_moves_is_what_the_devices_hold(model, tp):
    tokens, times = 5000, service(model, tp=tp)
    query = build_query(
        times.model.query.model,
        Workload(text_tokens=tokens - 1, output_tokens=1),
        load_engine("ideal"),  # no blocks
        parallelism=times.model.query.parallelism,
    )
    assert times.kv_bytes(tokens) == pytest.approx(tp * float(kv_bytes_per_request(query)), rel=1e-12)
    assert times.kv_layers == times.model.query.model.decoder.n_layers


def test_pixels_are_those_of_the_resized_picture_in_32_bits():
    times = service("qwen2.5-vl-7b")
    cost = times.media(Image(1920, 1080), 1)
    assert times.pixel_bytes(cost) == cost.resized_pixels * 12


def test_a_linear_service_moves_what_it_is_told():
    linear = LinearService(embedding_token_bytes=8.0, kv_token_bytes=3.0, kv_layers=4)
    cost = linear.media(Image(784, 10), 1)
    assert (linear.embedding_bytes(cost), linear.kv_bytes(7), linear.kv_layers) == (80.0, 21.0, 4)
    assert linear.pixel_bytes(cost) == 784 * 10 * 12
    assert LinearService().kv_bytes(7, [cost]) == LinearService().embedding_bytes(cost) == 0
