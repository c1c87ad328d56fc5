"""LLaVA-1.5: a CLIP tower at a fixed resolution, two linear layers, a Llama.

Every image is resized and cropped to one square, so its size does not matter. The language model reads the layer
before the last (`vision_feature_layer`), so an engine need not run the last one; `transformers` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from costmodel.base import Foreign
from costmodel.errors import Unsupported
from costmodel.families.files import Count, Layers, ModelFiles, ModelParts, divide, parse
from costmodel.families.text import read_decoder
from costmodel.models import (
    AdapterSpec,
    AttentionSpec,
    LayerRun,
    LayerSpec,
    MediaCost,
    MlpSpec,
    VisionEncoderSpec,
    norm_parameters,
)
from costmodel.workload import Video

MODEL_TYPES = ("llava",)


CLIP_LARGE_336: dict[str, object] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
"""The tower of a config that names none."""


class ClipVision(Foreign):
    """`CLIPVisionConfig`."""

    model_type: Literal["clip_vision_model"] = "clip_vision_model"
    hidden_size: Count = 768
    intermediate_size: Count = 3072
    num_hidden_layers: Layers = 12
    num_attention_heads: Count = 12
    num_channels: Count = 3
    image_size: Count = 224
    patch_size: Count = 32

    def layer(self) -> LayerSpec:
        """Return one layer of the tower."""
        head_dim = divide(self.hidden_size, self.num_attention_heads, "hidden_size by heads", "vision_config")
        heads = self.num_attention_heads
        mixer = AttentionSpec(heads, heads, head_dim, causal=False, rotary=False, qkv_bias=True, out_bias=True)
        return LayerSpec(self.hidden_size, mixer, MlpSpec(self.intermediate_size, gated=False, bias=True), "layer")

    def encoder(self, n_used: int) -> VisionEncoderSpec:
        """Return the tower when the output of layer `n_used` is read."""
        layer = self.layer()
        unused = self.num_hidden_layers - n_used
        return VisionEncoderSpec(
            width=self.hidden_size,
            runs=(LayerRun(n_used, layer),),
            unused_runs=(LayerRun(unused, layer),) if unused else (),
            patch_width=self.num_channels * self.patch_size**2,
            positions=(self.image_size // self.patch_size) ** 2 + 1,
            class_token=True,
            extra_parameters=2 * norm_parameters("layer", self.hidden_size),
        )


class Llava(Foreign):
    """`LlavaConfig`."""

    vision_config: dict[str, object] = CLIP_LARGE_336
    text_config: dict[str, object]
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    multimodal_projector_bias: bool = True
    tie_word_embeddings: bool = False


@dataclass(frozen=True, slots=True)
class FixedSquare:
    """Every image becomes one square of the same size."""

    side: int
    patch: int
    keeps_class_token: bool

    def image(self, width: int, height: int) -> MediaCost:
        """Return what an image of any size [pixels] is to the model."""
        del width, height
        return self.unit()

    def unit(self) -> MediaCost:
        """Return one square."""
        patches = (self.side // self.patch) ** 2
        rows = patches + 1
        tokens = patches + self.keeps_class_token
        return MediaCost(patches, rows, rows * rows, rows * rows, tokens, 0, rows, self.side**2)

    def frames(self, video: Video) -> int:
        """Refuse: the family was not trained on videos."""
        del video
        raise Unsupported("LLaVA-1.5 takes no video; give the frames as images (--image, once a frame)")

    def video(self, n_frames: int, width: int, height: int) -> MediaCost:
        """Refuse: the family was not trained on videos."""
        del n_frames, width, height
        raise Unsupported("LLaVA-1.5 takes no video; give the frames as images (--image, once a frame)")


def read(files: ModelFiles) -> ModelParts:
    """Return the parts of a LLaVA-1.5 model from its files."""
    config = parse(Llava, files.config, files.source)
    vision = parse(ClipVision, config.vision_config, f"{files.source}: vision_config")
    tied = config.tie_word_embeddings or bool(config.text_config.get("tie_word_embeddings", False))
    decoder = read_decoder(config.text_config, f"{files.source}: text_config", tied=tied)
    keeps_class_token = config.vision_feature_select_strategy == "full"
    return ModelParts(
        decoder=decoder,
        vision=vision.encoder(_used_layers(config, vision, files.source)),
        adapter=AdapterSpec((vision.hidden_size, decoder.width, decoder.width), bias=config.multimodal_projector_bias),
        media=FixedSquare(vision.image_size, vision.patch_size, keeps_class_token),
    )


def _used_layers(config: Llava, vision: ClipVision, source: str) -> int:
    # hidden_states[0] is the embedding, so -1 is the last layer and -2 the one before
    index = config.vision_feature_layer
    used = index if index >= 0 else vision.num_hidden_layers + 1 + index
    if not 1 <= used <= vision.num_hidden_layers:
        raise ValueError(f"{source}: vision_feature_layer={index} must name one of {vision.num_hidden_layers} layers")
    return used
