"""Tokens, patches and sampled frames as the `transformers` processors of three families count them.

The numbers come from the processors' own code: the PIL image processors and their size functions, the placeholder
text that each processor writes for an image or a video (its tokens are counted), and the video processors. The two
video modules import torchvision at the top although sizes and frame indices need none of it, so an empty stand-in
takes its place during that import where torchvision is missing. No code is copied.

Three things are not in `transformers` but in the checkpoints' own files, and are constants here: the pixel limits of
Qwen2.5-VL, its two wrapper tokens (chat template) and the 336-pixel crop of LLaVA-1.5.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.video_utils import VideoMetadata

from .transformers_counts import Vision, parse

QWEN_PIXELS = (3136, 12845056)  # preprocessor_config.json on the hub; the class defaults differ
QWEN_WRAPPERS = 2  # <|vision_start|> and <|vision_end|>, from the chat template
QWEN_FPS = 2.0
VISUAL, MARKER = "\ue000", "\ue001"  # stand for the placeholder and the wrapper tokens
STUBS = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2", "torchvision.transforms.v2.functional")


def image_input(config: Mapping[str, Any], width: int, height: int, *, pixels: tuple[int, int] = QWEN_PIXELS) -> Vision:
    """Return what the image processor hands to the encoder.

    Parameters
    ----------
    config : mapping
        Content of a config.json.
    width, height : int
        Image size [pixels].
    pixels : tuple of int
        Smallest and largest area of a Qwen2.5-VL image [pixels].

    Returns
    -------
    int or tuple of int
        Number of tiles, or patches as (temporal, height, width).
    """
    model = parse(config)
    if model.model_type == "llava":
        return 1
    if model.model_type == "internvl":
        size = dict(zip(("height", "width"), model.vision_config.image_size, strict=True))
        processor = GotOcr2ImageProcessorPil(
            size=size, crop_to_patches=InternVLProcessor.images_kwargs["crop_to_patches"]
        )
        return processor.get_number_of_image_patches(height, width)
    return (1, *_qwen_grid(model.vision_config, width, height, pixels))


def video_input(
    config: Mapping[str, Any], n_frames: int, width: int, height: int, *, pixels: tuple[int, int] = QWEN_PIXELS
) -> Vision:
    """Return what the video processor hands to the encoder for `n_frames` sampled frames; see `image_input`."""
    model = parse(config)
    if model.model_type == "llava":
        raise ValueError("LLaVA-1.5 takes no video; use Qwen2.5-VL or InternVL")
    if model.model_type == "internvl":
        return n_frames
    rows, columns = _qwen_grid(model.vision_config, width, height, pixels)
    processor = _video_processor("qwen2_vl", size=dict(zip(("shortest_edge", "longest_edge"), pixels, strict=True)))
    return processor.get_num_of_video_patches(n_frames, height, width, {}) // (rows * columns), rows, columns


def image_tokens(
    config: Mapping[str, Any], width: int, height: int, *, pixels: tuple[int, int] = QWEN_PIXELS
) -> dict[str, int]:
    """Return the tokens of one image.

    Returns
    -------
    dict
        `patches` out of the patch embedding (all tiles, without class tokens), `visual` placeholder tokens,
        `markers` wrapper tokens around them.
    """
    model, vision = parse(config), image_input(config, width, height, pixels=pixels)
    if model.model_type == "llava":
        text = _llava_text(model, width, height)
    elif model.model_type == "internvl":
        text = InternVLProcessor.replace_image_token(_internvl_processor(model), {"num_patches": [vision]}, 0)
    else:
        processor = _qwen_processor(model.vision_config)
        text = Qwen2_5_VLProcessor.replace_image_token(processor, {"image_grid_thw": torch.tensor([vision])}, 0)
    return _count(model, vision, text)


def video_tokens(
    config: Mapping[str, Any], n_frames: int, width: int, height: int, *, pixels: tuple[int, int] = QWEN_PIXELS
) -> dict[str, int]:
    """Return the tokens of `n_frames` sampled frames, as `image_tokens`.

    Qwen2.5-VL limits the pixels of each frame and repeats the last one of an odd number. InternVL makes one tile of a
    frame; the text in front of each ("Frame1: ", a line break between) is text and not in `markers`.
    """
    model, vision = parse(config), video_input(config, n_frames, width, height, pixels=pixels)
    if model.model_type == "internvl":
        frames = SimpleNamespace(shape=(n_frames,))
        text = InternVLProcessor.replace_video_token(_internvl_processor(model), {"pixel_values_videos": [frames]}, 0)
    else:
        processor = _qwen_processor(model.vision_config)
        text = Qwen2_5_VLProcessor.replace_video_token(processor, {"video_grid_thw": torch.tensor([vision])}, 0)
    return _count(model, vision, text)


def sample_frames(
    config: Mapping[str, Any],
    total_frames: int,
    fps: float,
    *,
    target_fps: float | None = None,
    n_frames: int | None = None,
) -> int:
    """Return how many frames the family's video processor takes from a clip.

    Both classes leave sampling off (`do_sample_frames` is false). With neither `target_fps` nor `n_frames`, the
    published use is counted: 2 frames a second for Qwen2.5-VL, every frame for InternVL. In about one clip of a
    hundred, rounding makes the Qwen2.5-VL processor ask for one frame past the end; the decoder has none, so it is
    not counted.

    Parameters
    ----------
    config : mapping
        Content of a config.json.
    total_frames : int
        Frames in the clip.
    fps : float
        Its frame rate [1/s].
    target_fps, n_frames : float or int, optional
        What to sample; one of the two.
    """
    family = "internvl" if config["model_type"] == "internvl" else "qwen2_vl"
    if target_fps is None and n_frames is None:
        if family == "internvl":
            return total_frames
        target_fps = QWEN_FPS
    metadata = VideoMetadata(total_num_frames=total_frames, fps=fps)
    indices = _video_processor(family).sample_frames(metadata, num_frames=n_frames, fps=target_fps)
    return int((indices < total_frames).sum())


def _qwen_grid(vision: Any, width: int, height: int, pixels: tuple[int, int]) -> tuple[int, int]:
    """Return patch rows and columns of an image or a frame, checked against the processor's own patch count."""
    factor = vision.patch_size * vision.spatial_merge_size
    size = smart_resize(height, width, factor, min_pixels=pixels[0], max_pixels=pixels[1])
    rows, columns = (side // vision.patch_size for side in size)
    limits = dict(zip(("min_pixels", "max_pixels"), pixels, strict=True))
    sizes = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
    patches = Qwen2VLImageProcessorPil(**limits, **sizes).get_number_of_image_patches(height, width)
    if rows * columns != patches:
        raise AssertionError(f"{rows}x{columns} patches, but the image processor counts {patches}")
    return rows, columns


def _llava_text(model: Any, width: int, height: int) -> str:
    """Run the CLIP processor on a blank image and return the placeholder text for its pixels."""
    side = model.vision_config.image_size
    crop = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = SimpleNamespace(
        patch_size=model.vision_config.patch_size,
        num_additional_image_tokens=1,  # the class token
        vision_feature_select_strategy=model.vision_feature_select_strategy,
        image_token=VISUAL,
    )
    return LlavaProcessor.replace_image_token(processor, crop(Image.new("RGB", (width, height))), 0)


def _internvl_processor(model: Any) -> SimpleNamespace:
    return SimpleNamespace(
        image_seq_length=model.image_seq_length,
        image_token=VISUAL,
        start_image_token=MARKER,
        end_image_token=MARKER,
    )


def _qwen_processor(vision: Any) -> SimpleNamespace:
    merge = SimpleNamespace(merge_size=vision.spatial_merge_size)
    return SimpleNamespace(image_token=VISUAL, video_token=VISUAL, image_processor=merge, video_processor=merge)


def _count(model: Any, vision: Vision, text: str) -> dict[str, int]:
    markers = QWEN_WRAPPERS if model.model_type == "qwen2_5_vl" else text.count(MARKER)
    return {"patches": _patches(model.vision_config, vision), "visual": text.count(VISUAL), "markers": markers}


def _patches(vision: Any, image: Vision) -> int:
    if not isinstance(image, int):
        return image[0] * image[1] * image[2]
    sides, patch = (
        side if isinstance(side, list | tuple) else (side, side) for side in (vision.image_size, vision.patch_size)
    )
    return image * (sides[0] // patch[0]) * (sides[1] // patch[1])


def _video_processor(family: str, **settings: Any) -> Any:
    module = _video_module(family)
    name = {"qwen2_vl": "Qwen2VLVideoProcessor", "internvl": "InternVLVideoProcessor"}[family]
    return getattr(module, name)(**settings)


@lru_cache(maxsize=2)
def _video_module(family: str) -> ModuleType:
    importlib.import_module("transformers.video_processing_utils")  # settles that there is no torchvision
    with _torchvision():
        return importlib.import_module(f"transformers.models.{family}.video_processing_{family}")


@contextmanager
def _torchvision() -> Iterator[None]:
    """Let `import torchvision.transforms.v2.functional` pass where it is not installed."""
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    modules = {name: ModuleType(name) for name in STUBS}
    for name in STUBS[1:]:
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, modules[name])
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in STUBS:
            del sys.modules[name]
