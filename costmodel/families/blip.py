"""BLIP-2 and InstructBLIP: an EVA-CLIP tower at a fixed resolution, a Q-Former, a language model.

The Q-Former is a small BERT over a few learned queries: in every layer the queries attend to each other, in every
second one to all outputs of the tower as well, and what comes out of it is mapped into the language model. So every
picture is as many tokens as there are queries. The Q-Former of InstructBLIP reads the instruction beside its queries;
its length is taken to be `INSTRUCTION_TOKENS`, whatever the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from costmodel.adapters import AdapterSpec, AttentionStep, ElementwiseStep, LinearStep, Step
from costmodel.base import Foreign
from costmodel.families.files import Count, Layers, ModelFiles, ModelParts, divide, parse
from costmodel.families.pictures import StillsOnly, patches_along
from costmodel.families.text import read_decoder
from costmodel.layers import AttentionSpec, LayerRun, LayerSpec, MlpSpec, norm_parameters
from costmodel.models import MediaCost, VisionEncoderSpec

MODEL_TYPES = ("blip-2", "instructblip")
UNSAID: dict[str, Any] = {}
"""A part that the file leaves out: every key has the default of its class."""
INSTRUCTION_TOKENS = 32
"""Instruction that InstructBLIP's Q-Former reads [tokens]; a short question, as the golden counts take it."""


class BlipVision(Foreign):
    """`Blip2VisionConfig`, which `InstructBlipVisionConfig` equals."""

    hidden_size: Count = 1408
    intermediate_size: Count = 6144
    num_hidden_layers: Layers = 39
    num_attention_heads: Count = 16
    image_size: Count = 224
    patch_size: Count = 14
    qkv_bias: bool = True

    def patches(self) -> int:
        """Return the patches of a picture."""
        return patches_along(self.image_size, self.patch_size, "vision_config") ** 2

    def encoder(self) -> VisionEncoderSpec:
        """Return the tower."""
        heads, width = self.num_attention_heads, self.hidden_size
        head_dim = divide(width, heads, "hidden_size by heads", "vision_config")
        mixer = AttentionSpec(heads, heads, head_dim, causal=False, rotary=False, qkv_bias=self.qkv_bias, out_bias=True)
        layer = LayerSpec(width, mixer, MlpSpec(self.intermediate_size, gated=False, bias=True), "layer")
        return VisionEncoderSpec(
            width=width,
            runs=(LayerRun(self.num_hidden_layers, layer),),
            patch_width=3 * self.patch_size**2,
            patch_bias=True,
            positions=self.patches() + 1,
            class_token=True,
            extra_parameters=norm_parameters("layer", width),
        )


class QFormer(Foreign):
    """`Blip2QFormerConfig`, which `InstructBlipQFormerConfig` equals but for the text, which it always has."""

    vocab_size: Count = 30522
    hidden_size: Count = 768
    num_hidden_layers: Layers = 12
    num_attention_heads: Count = 12
    intermediate_size: Count = 3072
    max_position_embeddings: Count = 512
    cross_attention_frequency: Count = 2
    use_qformer_text_input: bool = False

    def steps(self, *, queries: int, text: int, rows: int, encoder_width: int) -> tuple[Step, ...]:
        """Return what the Q-Former runs.

        Parameters
        ----------
        queries, text : int
            Learned queries, and tokens of the instruction beside them.
        rows : int
            Outputs of the tower that the queries attend to.
        encoder_width : int
            Their width.
        """
        layers, every = self.num_hidden_layers, 1 + text / queries
        crossing = -(-layers // self.cross_attention_frequency)
        own = self._attention("self", every=every, pairs=(queries + text) ** 2 / queries, repeats=layers)
        cross = self._attention("cross", every=1.0, pairs=rows, repeats=crossing, keys=(encoder_width, rows / queries))
        behind = self._feed_forward("text_ffn", every=text / queries) if text else ()
        return own + cross + self._feed_forward("ffn", every=1.0) + behind

    def _attention(
        self, name: str, *, every: float, pairs: float, repeats: int, keys: tuple[int, float] | None = None
    ) -> tuple[Step, ...]:
        """Return attention and the norm behind it; `keys` are the width and the number a query where they differ."""
        width, heads = self.hidden_size, self.num_attention_heads
        head_dim = divide(width, heads, "hidden_size by heads", "qformer_config")
        key_width, keys_each = keys or (width, every)
        return (
            LinearStep(f"{name}_query", width, width, per_token=every, repeats=repeats),
            LinearStep(f"{name}_key_value", key_width, 2 * width, per_token=keys_each, repeats=repeats),
            AttentionStep(f"{name}_attention", heads, head_dim, pairs, per_token=every, repeats=repeats),
            LinearStep(f"{name}_out", width, width, per_token=every, repeats=repeats),
            self._norm(f"{name}_norm", every=every, repeats=repeats),
        )

    def _feed_forward(self, name: str, *, every: float) -> tuple[Step, ...]:
        width, hidden, layers = self.hidden_size, self.intermediate_size, self.num_hidden_layers
        return (
            LinearStep(f"{name}_up", width, hidden, per_token=every, repeats=layers),
            ElementwiseStep(f"{name}_activation", 2 * hidden, per_token=every, repeats=layers),
            LinearStep(f"{name}_down", hidden, width, per_token=every, repeats=layers),
            self._norm(f"{name}_norm", every=every, repeats=layers),
        )

    def _norm(self, name: str, *, every: float, repeats: int) -> ElementwiseStep:
        """Return a norm with the residual addition before it: two values read, two written."""
        parameters = repeats * norm_parameters("layer", self.hidden_size)
        return ElementwiseStep(name, 4 * self.hidden_size, parameters, per_token=every, repeats=repeats)

    def unread_text_parameters(self) -> int:
        """Return the parameters for text of a BLIP-2 checkpoint that has them, which pictures alone do not run."""
        steps = self._feed_forward("text_ffn", every=0.0) if self.use_qformer_text_input else ()
        return sum(step.parameters for step in steps)

    def embedding_parameters(self) -> int:
        """Return the parameters of the words and positions that InstructBLIP's instruction is looked up in."""
        return (self.vocab_size + self.max_position_embeddings) * self.hidden_size


class Blip(Foreign):
    """`Blip2Config`, and `InstructBlipConfig`."""

    vision_config: dict[str, Any] | None = UNSAID
    qformer_config: dict[str, Any] | None = UNSAID
    text_config: dict[str, Any] | None = UNSAID
    num_query_tokens: Count = 32


@dataclass(frozen=True, slots=True)
class Queries(StillsOnly):
    """Every picture becomes one square of the same size, and as many tokens as there are queries."""

    family: ClassVar[str] = "BLIP"
    side: int
    patches: int
    queries: int

    def image(self, width: int, height: int, *, n_images: int = 1) -> MediaCost:
        """Return what an image of any size [pixels] is to the model."""
        del width, height, n_images
        return self.unit()

    def unit(self) -> MediaCost:
        """Return one picture."""
        rows = self.patches + 1
        return MediaCost(self.patches, rows, rows * rows, rows * rows, self.queries, 0, rows, self.side**2)


def read(files: ModelFiles) -> ModelParts:
    """Return the parts of a BLIP-2 or InstructBLIP model from its files."""
    config = parse(Blip, files.config, files.source)
    vision = parse(BlipVision, config.vision_config or {}, f"{files.source}: vision_config")
    qformer = parse(QFormer, config.qformer_config or {}, f"{files.source}: qformer_config")
    decoder = read_decoder({"model_type": "opt"} | (config.text_config or {}), f"{files.source}: text_config")
    instructed = files.config.get("model_type") == "instructblip"
    return ModelParts(
        decoder=decoder,
        vision=vision.encoder(),
        adapter=_adapter(config, vision, qformer, width=decoder.width, instructed=instructed),
        media=Queries(vision.image_size, vision.patches(), config.num_query_tokens),
    )


def _adapter(config: Blip, vision: BlipVision, qformer: QFormer, *, width: int, instructed: bool) -> AdapterSpec:
    """Return the Q-Former, a norm over its inputs before it, and the projection into the language model behind it."""
    queries, text = config.num_query_tokens, INSTRUCTION_TOKENS * instructed
    hidden = qformer.hidden_size
    norm = ElementwiseStep("norm", 2 * hidden, norm_parameters("layer", hidden), per_token=1 + text / queries)
    steps = qformer.steps(queries=queries, text=text, rows=vision.patches() + 1, encoder_width=vision.hidden_size)
    spare = qformer.embedding_parameters() if instructed else qformer.unread_text_parameters()
    projection = LinearStep("projection", hidden, width)
    return AdapterSpec((norm, *steps, projection), extra_parameters=queries * hidden + spare)
