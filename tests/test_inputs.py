"""What people hand in: pictures, clips, workloads, config files, device files, what-ifs, good and broken."""

import copy
import functools
import itertools
import json
import math
import tomllib

import numpy as np
import pytest
import tomlkit
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Picture

from costmodel import (
    Image,
    Parallelism,
    Precision,
    Video,
    Workload,
    hardware_names,
    load_hardware,
    load_model,
    model_names,
    predict,
)
from costmodel.catalogue import with_pixel_limits
from costmodel.counts import count
from costmodel.hardware import load_catalogue
from tests.helpers import CLEAN_ERRORS, FAST_MODELS, assert_clean, images, load_config, representatives

A100 = "a100-sxm4-80gb"
FUZZ = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def refused(call, *arguments, **settings_):
    """Check that a call raises one of our errors in one line, and return that line."""
    with pytest.raises(CLEAN_ERRORS) as raised:
        call(*arguments, **settings_)
    assert_clean(raised.value)
    return str(raised.value)


# Image files


def picture(path, size=(64, 48), **settings_):
    Picture.new("RGB", size, (200, 30, 30)).save(path, **settings_)
    return path


CODEC_OF_SUFFIX = {"png": "png", "jpg": "jpeg", "webp": "webp", "gif": "other", "bmp": "raw", "tiff": "other"}


@pytest.mark.parametrize(("suffix", "codec"), CODEC_OF_SUFFIX.items())
def test_an_image_file_has_its_size_and_codec(tmp_path, suffix, codec):
    path = picture(tmp_path / f"photo.{suffix}")
    assert Image.open(path) == Image.open(str(path)) == Image(64, 48, codec)


def test_a_codec_that_nobody_knows_is_named():
    with pytest.raises(LookupError, match="unknown image codec 'jpge'; did you mean 'jpeg'"):
        Image(64, 48, "jpge")


@pytest.mark.parametrize(("orientation", "size"), [(1, (64, 48)), (3, (64, 48)), (6, (48, 64)), (8, (48, 64))])
def test_an_image_file_is_seen_as_it_is_shown(tmp_path, orientation, size):
    exif = Picture.Exif()
    exif[0x0112] = orientation
    opened = Image.open(picture(tmp_path / "photo.jpg", exif=exif))
    assert (opened.width, opened.height) == size


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_pixel_has_a_size(tmp_path, mode):
    path = tmp_path / "picture.tiff"
    Picture.new(mode, (31, 17)).save(path)
    assert Image.open(path) == Image(31, 17, "other")


def test_broken_image_files_are_refused(tmp_path):
    whole = picture(tmp_path / "whole.png").read_bytes()
    for name, content in [
        ("short.png", whole[:20]),
        ("empty.png", b""),
        ("text.png", b"hello, I am no picture\n" * 20),
        ("noise.jpg", bytes(range(256)) * 4),
    ]:
        (tmp_path / name).write_bytes(content)
        assert name in refused(Image.open, tmp_path / name)


def test_missing_images_and_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no-such\.png"):
        Image.open(tmp_path / "no-such.png")
    assert "no image" in refused(Image.open, tmp_path)


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (100_001, 5), (2.5, 5), (math.nan, 5), (math.inf, 5), (True, 5)])
def test_sizes_no_image_has_are_refused(size):
    assert "Image." in refused(Image, *size)


# Video files


def write_clip(path, *, n_frames=12, rate=6, size=(64, 48)):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(n_frames):
            pixels = np.full((size[1], size[0], 3), 10 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_a_video_file_has_its_size_length_and_rate(tmp_path, suffix):
    video = Video.open(write_clip(tmp_path / f"clip.{suffix}"))
    assert (video.width, video.height, video.fps) == (64, 48, 6.0)
    assert video.seconds == pytest.approx(2.0, abs=0.2)  # containers round
    assert video.total_frames == pytest.approx(12, abs=1)
    assert count("qwen2.5-vl-7b", Workload(videos=[video])).tokens["visual"] > 0


def test_broken_video_files_are_refused(tmp_path):
    whole = write_clip(tmp_path / "whole.mp4").read_bytes()
    for name, content in [("empty.mp4", b""), ("text.mp4", b"no video\n" * 30), ("short.mp4", whole[:100])]:
        (tmp_path / name).write_bytes(content)
        assert name in refused(Video.open, tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"no-such\.mp4"):
        Video.open(tmp_path / "no-such.mp4")
    with pytest.raises((FileNotFoundError, ValueError)):
        Video.open(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"seconds": 0},
        {"seconds": -1.0},
        {"seconds": math.nan},
        {"seconds": math.inf},
        {"fps": 0},
        {"fps": math.inf},
        {"frames": 0},
        {"frames": -3},
        {"frames": 2.5},
        {"frames": math.nan},
        {"sample_fps": 0.0},
        {"sample_fps": math.nan},
        {"width": 0},
    ],
)
def test_values_no_video_has_are_refused(changes):
    assert "Video." in refused(Video, **({"width": 64, "height": 48, "seconds": 2.0, "fps": 25.0} | changes))


def test_more_frames_than_the_clip_has_are_refused():
    video = Video(64, 48, 2.0, 10.0, frames=21)
    assert "20 frames" in refused(count, "qwen2.5-vl-7b", Workload(videos=[video]))


# Workloads


@pytest.mark.parametrize(
    "changes",
    [
        {"text_tokens": 0},
        {"text_tokens": -5},
        {"text_tokens": math.nan},
        {"text_tokens": math.inf},
        {"text_tokens": 1e12},
        {"text_tokens": np.array([5.0, math.nan])},
        {"text_tokens": np.array([5.0, 0.0])},
        {"text_tokens": np.array([])},
        {"output_tokens": 0},
        {"output_tokens": math.nan},
        {"visual_tokens": -1.0},
        {"visual_tokens": math.nan},
        {"visual_tokens": np.array([1.0, -1.0])},
        {"visual_tokens": 5.0, "images": [Image(5, 5)]},
        {"visual_tokens": 5.0, "videos": [Video(5, 5, 1.0, 1.0)]},
    ],
)
def test_workloads_that_cannot_be_are_refused(changes):
    assert "Workload." in refused(Workload, **changes)


def test_shapes_that_do_not_broadcast_are_refused():
    workload = Workload(text_tokens=np.ones(3), output_tokens=np.ones(4))
    refused(predict, "llava-1.5-7b", A100, workload)


@pytest.mark.parametrize("batch", [0, -1, 0.5, math.nan, math.inf, 1e9, np.array([1.0, 0.0])])
def test_batches_that_cannot_be_are_refused(batch):
    assert "batch" in refused(predict, "llava-1.5-7b", A100, Workload(), batch=batch)


@pytest.mark.parametrize("settings_", [{"tp": 0}, {"tp": -1}, {"tp": 1.5}, {"tp": True}, {"tp": 2, "encoder_tp": 4}])
def test_parallelism_that_cannot_be_is_refused(settings_):
    assert "Parallelism." in refused(Parallelism, **settings_)


def test_parallelism_without_a_link_or_a_fair_share_is_refused():
    assert "a100" in refused(predict, "qwen2.5-vl-72b", A100, Workload(), parallelism=Parallelism(tp=16))
    assert "28 heads" in refused(predict, "qwen2.5-vl-7b", A100, Workload(), parallelism=Parallelism(tp=8))


@pytest.mark.parametrize(
    "settings_",
    [
        {"weight_bits": 5},
        {"weight_bits": 0},
        {"kv_bits": 64},
        {"activation_bits": math.nan},
        {"weight_bits": 16, "activation_bits": 8},
    ],
)
def test_precisions_nobody_stores_are_refused(settings_):
    assert "Precision." in refused(Precision, **settings_)


def test_precisions_without_a_matrix_unit_are_refused():
    assert "activation_bits=4" in refused(
        predict, "llava-1.5-7b", "h100-sxm5-80gb", Workload(), precision=Precision(4, 4)
    )


def test_unknown_names_say_which_is_near():
    assert "did you mean 'h100-sxm5-80gb'" in refused(load_hardware, "h100-sxm")
    assert "did you mean 'qwen2.5-vl-7b'" in refused(load_model, "qwen2.5vl-7b")
    assert "known: " in refused(predict, "llava-1.5-7b", A100, Workload(), engine="fast")
    assert "LLaVA" in refused(predict, "llava-1.5-7b", A100, Workload(videos=[Video(64, 48, 2.0, 10.0)]))


# Model folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a function that writes files into a new folder."""
    numbers = itertools.count()

    def write(**files):
        folder = tmp_path_factory.mktemp(f"model{next(numbers)}")
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / f"{name}.json").write_text(text, encoding="utf-8")
        return folder

    return write


def visual(model, width=1920, height=1080):
    return count(model, images((width, height))).tokens["visual"]


def in_video(model):
    return count(model, Workload(videos=[Video(1280, 720, 8.0, 8.0, frames=8)])).tokens["visual"]


@pytest.mark.parametrize(
    "limits",
    [
        {"min_pixels": 3136, "max_pixels": 602112},
        {"size": {"shortest_edge": 3136, "longest_edge": 602112}},
        {"size": {"min_pixels": 3136, "max_pixels": 602112}},
    ],
)
def test_pixel_limits_beside_a_config_are_read(folders, limits):
    config, model = load_config("qwen2.5-vl-7b"), load_model("qwen2.5-vl-7b")
    limited = load_model(folders(config=config, preprocessor_config=limits))
    assert visual(limited) == visual(with_pixel_limits(model, 3136, 602112)) < visual(model)
    assert in_video(limited) < in_video(model)  # without a video file of its own
    both = load_model(
        folders(config=config, preprocessor_config=limits, video_preprocessor_config={"max_pixels": 10**7})
    )
    assert visual(both) == visual(limited)
    assert in_video(both) == in_video(model)
    nested = folders(config=config, processor_config={"image_processor": limits})
    assert visual(load_model(nested)) == visual(limited)


def write_real_processors(folder, name):
    """Let `transformers` write the processor files of a family."""
    from tests.oracle import transformers_tokens as oracle

    if name == "llava-1.5-7b":
        oracle.CLIPImageProcessorPil(crop_size=336, size={"shortest_edge": 336}).save_pretrained(folder)
    elif name == "internvl3-8b":
        oracle.GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}).save_pretrained(folder)
        oracle._video_processor("internvl").save_pretrained(folder)
    else:
        least, most = oracle.QWEN_PIXELS
        size = {"shortest_edge": least, "longest_edge": most}
        oracle.Qwen2VLImageProcessorPil(min_pixels=least, max_pixels=most).save_pretrained(folder)
        oracle._video_processor("qwen2_vl", size=size).save_pretrained(folder)


@pytest.mark.parametrize("name", FAST_MODELS)
def test_the_files_that_transformers_writes_are_read(folders, name):
    folder = folders(config=load_config(name))
    write_real_processors(folder, name)
    assert {"config.json", "preprocessor_config.json"} <= {file.name for file in folder.iterdir()}
    same_costs(load_model(folder), load_model(name))
    assert load_model(folder).media == load_model(name).media


def test_the_processor_file_of_the_released_model_is_read(folders):
    released = {  # Qwen/Qwen2.5-VL-7B-Instruct, preprocessor_config.json
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    model = load_model(folders(config=load_config("qwen2.5-vl-7b"), preprocessor_config=released))
    assert model.media == load_model("qwen2.5-vl-7b").media


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("qwen2.5-vl-7b", ("num_hidden_layers",)),
        ("qwen2.5-vl-7b", ("vision_config", "depth")),
        ("llava-1.5-7b", ("text_config", "num_hidden_layers")),
        ("internvl3-8b", ("text_config", "num_hidden_layers")),
    ],
)
def test_layer_counts_no_model_has_are_refused(folders, name, path):
    config = load_config(name)
    *into, key = path
    (config[into[0]] if into else config)[key] = 200_000
    assert key in refused(load_model, folders(config=config))


def test_small_pictures_grow_to_the_least_area(folders):
    config = load_config("qwen2.5-vl-7b")
    grown = load_model(folders(config=config, preprocessor_config={"min_pixels": 200704, "max_pixels": 12845056}))
    assert visual(grown, 28, 28) == 256 > visual("qwen2.5-vl-7b", 28, 28)


def test_the_frame_rate_beside_a_config_is_read(folders):
    video = Video(320, 240, 60.0, 30.0)
    model = load_model(folders(config=load_config("qwen2.5-vl-7b"), video_preprocessor_config={"fps": 1.0}))
    one, two = (count(m, Workload(videos=[video])).tokens["visual"] for m in (model, "qwen2.5-vl-7b"))
    assert two == 2 * one
    few = load_model(folders(config=load_config("qwen2.5-vl-7b"), video_preprocessor_config={"max_frames": 10}))
    assert count(few, Workload(videos=[video])).tokens["visual"] == one // 6


def test_tile_limits_beside_a_config_are_read(folders):
    config = load_config("internvl3-8b")
    few = load_model(folders(config=config, preprocessor_config={"max_patches": 4, "min_patches": 1}))
    assert visual("internvl3-8b", 1000, 1000) == 256 * 10
    assert visual(few, 1000, 1000) == 256 * 5
    least = load_model(folders(config=config, preprocessor_config={"min_patches": 9, "max_patches": 12}))
    assert visual(least, 448, 448) == 256 * 10
    # InternVLProcessor passes crop_to_patches=True whatever the file says, and its files say false, the class default.
    written = load_model(folders(config=config, preprocessor_config={"crop_to_patches": False}))
    assert visual(written, 4000, 500) == visual("internvl3-8b", 4000, 500) > 256


@pytest.mark.parametrize(
    "limits",
    [
        {"min_pixels": 602112, "max_pixels": 3136},
        {"min_pixels": -1},
        {"max_pixels": "many"},
        {"size": {"shortest_edge": -5, "longest_edge": 10**6}},
        {"size": {"shortest_edge": "a", "longest_edge": [3]}},
        {"size": {"shortest_edge": 10**6, "longest_edge": 10}},
        {"size": 5},
        [],
    ],
)
def test_pixel_limits_that_cannot_be_are_refused(folders, limits):
    refused(load_model, folders(config=load_config("qwen2.5-vl-7b"), preprocessor_config=limits))


@pytest.mark.parametrize(
    "limits", [{"fps": -1.0}, {"fps": 0}, {"fps": "fast"}, {"min_frames": 0}, {"min_frames": 900, "max_frames": 4}]
)
def test_frame_limits_that_cannot_be_are_refused(folders, limits):
    refused(load_model, folders(config=load_config("qwen2.5-vl-7b"), video_preprocessor_config=limits))


@pytest.mark.parametrize("limits", [{"max_patches": 0}, {"min_patches": 5, "max_patches": 2}, {"max_patches": 10**5}])
def test_tile_limits_that_cannot_be_are_refused(folders, limits):
    refused(load_model, folders(config=load_config("internvl3-8b"), preprocessor_config=limits))


@pytest.mark.parametrize("limits", [(0, 100), (100, 50), (-5, 100), (math.nan, 100), (100, math.inf)])
def test_pixel_limits_by_number_that_cannot_be_are_refused(limits):
    refused(with_pixel_limits, load_model("qwen2.5-vl-7b"), *limits)


def test_a_family_of_fixed_sizes_has_no_pixel_limits():
    assert "fixed sizes" in refused(with_pixel_limits, load_model("llava-1.5-7b"), 100, 200)


def same_costs(left, right):
    workload = images((900, 600))
    assert left.parameters() == right.parameters()
    assert left.decoder == right.decoder
    assert count(left, workload).as_dict() == count(right, workload).as_dict()


@pytest.mark.parametrize("name", [n for n in model_names() if load_config(n)["model_type"] == "qwen2_5_vl"])
def test_flat_and_nested_layouts_agree(folders, name):
    flat = load_config(name)
    outer = {key: flat.pop(key) for key in ("model_type", "architectures", "vision_config")}
    for text in (dict(flat), flat | {"model_type": "qwen2_5_vl_text"}):
        same_costs(load_model(folders(config=outer | {"text_config": text})), load_model(name))
    tied = flat.pop("tie_word_embeddings")
    outside = outer | {"text_config": flat, "tie_word_embeddings": tied}
    same_costs(load_model(folders(config=outside)), load_model(name))


@pytest.mark.parametrize("name", [n for n in model_names() if load_config(n)["model_type"] == "internvl"])
def test_both_internvl_layouts_agree(folders, name):
    config = load_config(name)
    vision = config["vision_config"]
    original = {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "force_image_size": 448,
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "select_layer": -1,
        "ps_version": "v2",
        "llm_config": config["text_config"] | {"tie_word_embeddings": config["tie_word_embeddings"]},
        "vision_config": {
            "model_type": "intern_vit_6b",
            "hidden_size": vision["hidden_size"],
            "image_size": 448,
            "intermediate_size": vision["intermediate_size"],
            "num_attention_heads": vision["num_attention_heads"],
            "num_hidden_layers": vision["num_hidden_layers"],
            "patch_size": 14,
            "norm_type": "layer_norm",
            "qk_normalization": False,
            "qkv_bias": True,
        },
    }
    same_costs(load_model(folders(config=original)), load_model(name))


# Broken config files

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -1, 1, 2, 3, 50_000, 10**30, 0.5, -0.5, 1e300]),
    st.floats(allow_nan=True),
    st.text(max_size=12),
    st.sampled_from(["llama", "qwen2", "internlm2", "clip_vision_model", "\n", "x" * 5000, "448"]),
    st.lists(st.integers(-5, 500), max_size=4),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
    st.recursive(
        st.none() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner)
    ),
)
EXTRA_KEYS = {
    "quantization_config": {"quant_method": "awq", "bits": 4},
    "layer_types": ["linear_attention"] * 28,
    "num_experts": 64,
    "num_local_experts": 8,
    "n_routed_experts": 64,
    "kv_lora_rank": 512,
    "audio_config": {"hidden_size": 10},
    "vision_lora": {"r": 256},
}


def paths(value, path=()):
    """Yield the path of every key and element inside a JSON document."""
    keys = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in keys:
        yield (*path, key)
        yield from paths(part, (*path, key))


@functools.cache
def config_paths(name):
    return list(paths(load_config(name)))


@st.composite
def mutations(draw, name):
    """Return the text of a config of the catalogue after one to three changes."""
    config = load_config(name)
    for _ in range(draw(st.integers(1, 3))):
        *into, key = draw(st.sampled_from(config_paths(name)))
        place = config
        for step in into:
            place = place[step] if isinstance(place, dict | list) and _has(place, step) else None
        if not isinstance(place, dict | list) or not _has(place, key):
            continue
        if draw(st.booleans()):
            place[key] = draw(JUNK)
        else:
            del place[key]
    if draw(st.integers(0, 4)) == 0:
        config[draw(st.sampled_from(sorted(EXTRA_KEYS)))] = draw(JUNK)
    return json.dumps(config)


def _has(place, key):
    return key in place if isinstance(place, dict) else isinstance(key, int) and key < len(place)


def attempt(call, *arguments, **settings_):
    """Return the result of a call, or None when it was refused with a clean error."""
    try:
        return call(*arguments, **settings_)
    except Exception as error:  # noqa: BLE001 - the point is that only clean ones come
        assert_clean(error)
        return None


def assert_sound(model):
    """Check that whatever was read is a model that costs something, or says why it cannot be priced."""
    assert all(isinstance(n, int) and n >= 0 for n in model.parameters().values())
    assert model.parameters()["language"] > 0
    assert model.parameters()["total"] > 0
    words = attempt(count, model, Workload(text_tokens=100))
    assert words is not None, "a model that loads must take text"
    assert 0 < words.kv_bytes < math.inf
    assert 0 < words.flops["prefill"] < math.inf
    seen = attempt(count, model, images((640, 480)))
    if model.media and seen:
        assert seen.tokens["patches"] > 0
        assert seen.tokens["visual"] + seen.tokens["cross"] > 0
        assert 0 < seen.flops["encode"] < math.inf
    p = attempt(predict, model, A100, images((640, 480)))
    assert p is None or (0 < p.ttft_s < math.inf and 0 < p.tpot_s < math.inf)


@pytest.mark.parametrize("name", representatives())
@pytest.mark.parametrize("n_examples", [15, pytest.param(300, marks=pytest.mark.slow)])
def test_a_mutated_config_works_or_is_refused_in_one_line(folders, name, n_examples):
    @settings(FUZZ, max_examples=n_examples)
    @given(text=mutations(name))
    def check(text):
        model = attempt(load_model, folders(config=text))
        if model:
            assert_sound(model)

    check()


def numbers(name):
    """Return the path of every whole number in a config of the catalogue; the first of a list stands for all."""
    kept = []
    for path in config_paths(name):
        value = functools.reduce(lambda part, step: part[step], path, load_config(name))
        if type(value) is int and not any(isinstance(step, int) and step > 0 for step in path):
            kept.append(path)
    return kept


@pytest.mark.parametrize("name", representatives())
@pytest.mark.parametrize("number", [1, 5])
def test_each_number_of_a_config_may_be_tiny_or_is_refused(folders, name, number):
    for path in numbers(name):
        config = load_config(name)
        *into, key = path
        functools.reduce(lambda part, step: part[step], into, config)[key] = number
        model = attempt(load_model, folders(config=config))
        if model:
            assert_sound(model)


@FUZZ
@given(
    name=st.sampled_from(FAST_MODELS),
    limits=st.dictionaries(
        st.sampled_from(
            [
                "min_pixels",
                "max_pixels",
                "size",
                "fps",
                "min_frames",
                "max_frames",
                "min_patches",
                "max_patches",
                "crop_to_patches",
            ]
        ),
        JUNK | st.fixed_dictionaries({}, optional={"shortest_edge": JUNK, "longest_edge": JUNK}),
        max_size=4,
    ),
)
def test_mutated_processor_files_work_or_are_refused_in_one_line(folders, name, limits):
    folder = folders(config=load_config(name), preprocessor_config=limits, video_preprocessor_config=limits)
    model = attempt(load_model, folder)
    if not model:
        return
    assert_sound(model)
    if model.family != "llava":
        seen = attempt(count, model, Workload(videos=[Video(640, 480, 10.0, 24.0)]))
        assert seen is None or seen.tokens["visual"] > 0


@pytest.mark.parametrize("name", FAST_MODELS)
@pytest.mark.parametrize("key", sorted(EXTRA_KEYS))
def test_keys_that_change_the_cost_are_refused(folders, name, key):
    config = load_config(name)
    text = config.get("text_config", config)
    where = config if key in ("quantization_config", "vision_lora", "audio_config") else text
    where[key] = EXTRA_KEYS[key]
    assert key in refused(load_model, folders(config=config))


@pytest.mark.parametrize("name", FAST_MODELS)
@pytest.mark.parametrize("key", ["quantization_config", "num_experts", "kv_lora_rank"])
def test_keys_that_change_nothing_are_taken(folders, name, key):
    config = load_config(name) | {key: None}
    same_costs(load_model(folders(config=config)), load_model(name))


NO_CONFIGS = [
    "",
    "{",
    "[]",
    "null",
    "5",
    '"llava"',
    "{}",
    '{"model_type": null}',
    '{"model_type": "gpt2"}',
    '{"model_type": 5}',
    '{"model_type": []}',
    '{"model_type": {}}',
    '{"model_type": "qwen2_5_vl", "vision_config": {}, "text_config": {"model_type": []}}',
    '{"model_type": "llava", "text_config": 5}',
    '{"model_type": "internvl", "text_config": [], "vision_config": []}',
    "[" * 5000,
    '{"model_type": "llava", "text_config": ' + '{"a":' * 2000,
    "\x00\x01",
    "NaN",
]


@pytest.mark.parametrize("text", NO_CONFIGS)
def test_files_that_are_no_config_are_refused(folders, text):
    refused(load_model, folders(config=text))


def test_files_that_are_no_text_or_not_there_are_refused(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00\xd8")
    refused(load_model, tmp_path)
    refused(load_model, tmp_path / "no-such.json")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(load_model, empty)
    for name in ("", "   ", ".", "..", "a/b/c", "no-such-model", "x" * 3000):
        refused(load_model, name)


def test_layers_that_slide_are_read(folders):
    config = load_config("internvl3-8b")
    config["text_config"] |= {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 20}
    sliding = load_model(folders(config=config))
    assert [(run.n_layers, run.layer.mixer.window) for run in sliding.decoder.runs][1] == (8, 512.0)
    long = Workload(text_tokens=20_000)
    assert count(sliding, long).flops["prefill"] < count("internvl3-8b", long).flops["prefill"]
    kept = count("internvl3-8b", long).kv_bytes  # the next query sees itself beside 511 cached keys
    assert count(sliding, long).kv_bytes == pytest.approx(kept * (20 + 8 * 511 / 20_000) / 28, rel=1e-12)


# Device files and what-ifs


@pytest.fixture(scope="module")
def device_file(tmp_path_factory):
    """Return a function that writes a device file."""
    folder, numbers = tmp_path_factory.mktemp("devices"), itertools.count()

    def write(content):
        path = folder / f"device{next(numbers)}.toml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def toml_with(name, change):
    document = tomlkit.parse(load_catalogue()[name])
    change(document)
    return tomlkit.dumps(document)


TOML_JUNK = st.one_of(
    st.integers(-(2**62), 2**62),
    st.floats(),
    st.booleans(),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12),
    st.sampled_from([0, -1, math.nan, math.inf, 1e300, 1e-300]),
    st.lists(st.integers(0, 9), max_size=3),
)


@st.composite
def device_files(draw):
    """Return the text of a device of the catalogue after one to three changes."""
    values = tomllib.loads(load_catalogue()[draw(st.sampled_from(hardware_names()))])
    for _ in range(draw(st.integers(1, 3))):
        *into, key = draw(st.sampled_from(list(paths(values))))
        place = values
        for step in into:
            place = place[step]
        if draw(st.booleans()):
            place[key] = draw(TOML_JUNK)
        elif not isinstance(place, list) or draw(st.booleans()):
            del place[key]
        if not list(paths(values)):
            break
    return values


@FUZZ
@given(values=device_files())
def test_a_mutated_device_works_or_is_refused_in_one_line(device_file, values):
    try:
        text = tomlkit.dumps(values)
    except (TypeError, ValueError):  # a list of mixed kinds that tomlkit does not write
        return
    device = attempt(load_hardware, device_file(text))
    if device:
        assert all(math.isfinite(number) for _, number in device.numbers())
        p = attempt(predict, "llava-1.5-7b", device, images((640, 480)))
        assert p is None or (0 < p.ttft_s < math.inf and 0 < p.tpot_s < math.inf)


@FUZZ
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode(errors="replace")))
def test_files_that_are_no_device_are_refused(device_file, content):
    refused(load_hardware, device_file(content))


@pytest.mark.parametrize("name", hardware_names())
def test_a_number_without_a_source_does_not_load(device_file, name):
    def drop(document):
        document["sources"] = document["sources"][1:]

    assert "no source" in refused(load_hardware, device_file(toml_with(name, drop)))


def test_unknown_keys_and_formats_of_a_device_are_refused(device_file):
    def misspell(document):
        document["memory_bandwith_bytes_per_s"] = document.pop("memory_bandwidth_bytes_per_s")

    def fp12(document):
        document["peak_flops_per_s"]["fp12"] = 1e15

    refused(load_hardware, device_file(toml_with(A100, misspell)))
    assert "fp12" in refused(load_hardware, device_file(toml_with(A100, fp12)))
    refused(load_hardware, "no-such-file.toml")


@pytest.mark.parametrize(
    "change",
    [
        "memory_bytes",
        "memory_bytes=",
        "memory_bytes=lots",
        "memory_bytes=-1",
        "memory_bytes=0",
        "memory_bytes=nan",
        "memory_bytes=inf",
        "memory_bytes=1e500",
        "memory=5",
        "memory_bandwidth=5e12",
        "schema_version=2",
        "name=5",
        "kind=5",
        "peak_flops_per_s=5",
        "peak_flops_per_s.=5",
        "peak_flops_per_s.fp12=5e14",
        "links=5",
        "links.nvlink=5",
        "links.nvlink.bandwidth=5",
        "links.warp.bandwidth_bytes_per_s=5e9",
        "links.nvlink.devices=0",
        "links.nvlink.devices=2.5",
        "links.nvlink.topology=5",
        "links.nvlink.kind=5",
        "sources=5",
        "core_count=1.5",
        "tdp_w=5,",
        "tdp_w=5,,idle_w=1",
        "=5",
        "tdp_w==5",
    ],
)
def test_what_ifs_that_cannot_be_are_refused(change):
    refused(load_hardware, f"{A100}:{change}")


@FUZZ
@given(
    change=st.text(max_size=60)
    | st.builds(
        "{}={}".format, st.sampled_from(["tdp_w", "memory_bytes", "clock_hz", "x"]), st.text(max_size=10) | st.floats()
    )
)
def test_what_ifs_of_any_text_work_or_are_refused_in_one_line(change):
    device = attempt(load_hardware, f"{A100}:{change}")
    assert device is None or all(math.isfinite(number) for _, number in device.numbers())


def test_a_what_if_changes_what_it_names_and_says_so():
    base = load_hardware(A100)
    changed = load_hardware(f"{A100}:memory_bandwidth_bytes_per_s=4e12,peak_flops_per_s.fp8=6e14,price_usd_per_s=0.001")
    assert changed.memory_bandwidth_bytes_per_s == 4e12
    assert changed.peak_flops_per_s["fp8"] == 6e14
    assert changed.precision(8) == "fp8"
    assert base.precision(8) == "int8"
    assert changed.tdp_w == base.tdp_w
    assert set(changed.provenance["assumed"]) >= {"memory_bandwidth_bytes_per_s", "peak_flops_per_s.fp8"}
    assert changed.name != base.name
    assert load_hardware(A100) == base


def test_a_what_if_of_a_file_works(device_file):
    path = device_file(load_catalogue()[A100])
    assert load_hardware(f"{path}:tdp_w=300").tdp_w == 300


def test_loaded_values_cannot_be_changed():
    device = load_hardware(A100)
    with pytest.raises(Exception, match="frozen"):
        device.tdp_w = 5.0
    with pytest.raises(TypeError):
        device.peak_flops_per_s["bf16"] = 1.0
    before = copy.deepcopy(load_model("llava-1.5-7b").parameters())
    load_model("llava-1.5-7b").parameters()["total"] = 0
    assert load_model("llava-1.5-7b").parameters() == before
