"""Pictures become the numbers that the real processors make, and as many tokens as the cost model counts."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the runtime needs PyTorch")
pytest.importorskip("transformers", reason="the oracle of the runtime")

from PIL import Image  # noqa: E402
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil  # noqa: E402
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil  # noqa: E402
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402

from runtime.blueprint import load_blueprint  # noqa: E402
from runtime.preprocess import preprocess  # noqa: E402

SIZES = [(640, 480), (333, 517), (90, 40), (1000, 200)]
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def photo(width, height):
    rng = np.random.default_rng(width)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def unfolded(pixels, patch):
    pixels = torch.as_tensor(np.stack(pixels))
    n, _, height, width = pixels.shape
    parts = pixels.reshape(n, 3, height // patch, patch, width // patch, patch)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3 * patch**2)


def real_patches(name, image):
    """Return what the real processor makes, with the settings of the released files."""
    if name == "llava-1.5-7b":
        processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
        return unfolded(processor(image)["pixel_values"], 14)
    if name == "internvl3-8b":
        imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
        processor = GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}, crop_to_patches=True, **imagenet)
        return unfolded(processor(image)["pixel_values"], 14)
    if name == "gemma-3-4b":
        return unfolded(Gemma3ImageProcessorPil(size={"height": 896, "width": 896})(image)["pixel_values"], 14)
    limits = {"shortest_edge": 3136, "longest_edge": 12845056}
    if name.startswith("qwen3"):
        limits = {"shortest_edge": 65536, "longest_edge": 16777216}
        return torch.as_tensor(Qwen2VLImageProcessorPil(size=limits, patch_size=16, **HALF)(image)["pixel_values"])
    return torch.as_tensor(Qwen2VLImageProcessorPil(size=limits)(image)["pixel_values"])


NAMES = ["llava-1.5-7b", "qwen2.5-vl-7b", "qwen3-vl-2b", "internvl3-8b", "gemma-3-4b"]


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_those_of_the_real_processor(name):
    blueprint = load_blueprint(name)
    for size in SIZES:
        image = photo(*size)
        found, expected = preprocess(blueprint, [image]).patches, real_patches(name, image)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < 1e-4, size


@pytest.mark.parametrize("name", NAMES)
def test_patches_and_tokens_are_those_of_the_cost_model(name):
    blueprint = load_blueprint(name)
    images = [photo(*size) for size in SIZES]
    found = preprocess(blueprint, images)
    costs = [blueprint.spec.media.image(*size, n_images=len(SIZES)) for size in SIZES]
    assert len(found.patches) == sum(cost.patches for cost in costs) == sum(t * h * w for t, h, w in found.grids)
    assert [picture.tokens for picture in found.pictures] == [cost.visual_tokens for cost in costs]
    assert found.patches.shape[1] == blueprint.spec.vision.patch_width


def test_a_model_without_pictures_is_refused():
    with pytest.raises(ValueError, match="pictures=0"):
        preprocess(load_blueprint("qwen2.5-vl-7b"), [])
    blueprint = load_blueprint("qwen2.5-vl-7b")
    blind = dataclasses.replace(blueprint, spec=dataclasses.replace(blueprint.spec, media=None))
    with pytest.raises(ValueError, match="of a model that sees"):
        preprocess(blind, [photo(10, 10)])
