"""Stand-ins for primitives whose files are not there: the fields of their contract, and nothing that they do."""

import sys

import pytest

import costmodel.techniques
from costmodel.techniques import applied, primitives

STAND_INS = {
    "frame_select": "keep=1.0 frames=None scored_share=1.0 scorer_flops_per_frame=0.0 scorer_bytes=0.0",
    "resize": "pixels=1.0 call_probability=0.0 keep_first=True",
    "encoder_replace": "flops_per_pixel=0.0 parameters=0.0 tokens_side_stride=0.0",
    "adapter_reduce": "keep=1.0 tokens_per_item=None tokens_per_frame=None layers=0.0 width=0.0 queries=None",
    "token_reduce": "at='pre_llm' layer=None keep=1.0 schedule=() score='none' score_rows=1 text_keep=1.0 merges=False "
    "masked=False reprunes=False",
    "sparse_attention": "density=1.0 law=() tokens_range=() block=128 estimator='none' estimator_stride=None "
    "visual_only=False",
    "kv_evict": "keep=1.0 tokens=None by='token' window=0 score='none' score_rows=1 merges=False ragged=True",
    "kv_quantize": "key_bits=16 value_bits=16 group=32 residual_tokens=0 visual_only=False fused=True transform='none'",
    "kv_retrieve": "read=1.0 tokens=None placement='gpu' chunk_tokens=1 scorer='mean_key' each='turn'",
    "stream_state": "sink_tokens=0 text_window=0 visual_window_tokens=0 budget_tokens=0 chunk_tokens=0",
    "speculate": "draft=None layers=None head_layers=None tokens=10.0 acceptance=0.8 accepted=None nodes=None "
    "depth=None draft_visual_keep=1.0 parallel=False shares_encoder=True",
    "relaxed_verify": "probability=0.0",
    "output_length": "scale=1.0 short_tokens=None long_probability=1.0",
    "weight_quant": "bits=16",
    "weight_prune": "sparsity=0.0",
    "arch_variant": "kind='none'",
}
PLACES = {
    "frame_select": ("frames", "frames"),
    "resize": ("pixels", "pixels"),
    "encoder_replace": ("encoder", "encoder"),
    "adapter_reduce": ("adapter", "adapter"),
    "sparse_attention": ("attention", "prefill attention"),
    "kv_evict": ("kv", "kv tokens"),
    "kv_quantize": ("kv", "kv bits"),
    "kv_retrieve": ("kv", "kv read"),
    "stream_state": ("kv", "stream"),
    "speculate": ("draft", "draft"),
    "relaxed_verify": ("draft", "verify"),
    "output_length": ("output", "output"),
    "weight_quant": ("weights", "weights bits"),
    "weight_prune": ("weights", "weights sparsity"),
    "arch_variant": ("layers", "architecture"),
}
NAMES = {"kv_evict": "KVEvict", "kv_quantize": "KVQuantize", "kv_retrieve": "KVRetrieve"}
TEXT = {"at", "score", "estimator", "by", "transform", "placement", "scorer", "each", "draft", "kind"}
CODE = """from dataclasses import dataclass, replace
from costmodel.query import Overhead

READS = {{"encoder_row": "vit_attention", "encoder_map": "vit_attention"}}

@dataclass(frozen=True, slots=True)
class {name}:
{fields}
    name: str = {kind!r}

    slot = property(lambda self: {slot})
    stages = property(lambda self: {stages})
    needs_attention_map = property(lambda self: "none")
    needs = property(lambda self: frozenset({{"vit_attention"}} & {{READS.get(getattr(self, "score", ""))}}))

    def apply(self, query):
        return replace(query, overheads=(*query.overheads, Overhead("prefill", (), peak_bytes=1.0)))
"""
CACHED = (
    primitives.load_kinds,
    primitives.load_primitive,
    primitives.load_fields,
    primitives.load_is_named,
    applied.load_identity,
    applied.load_default,
    applied.load_part,
    applied.load_values,
    applied.load_arguments,
)


def forget():
    for function in CACHED:
        function.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def _primitives(tmp_path_factory):
    forget()
    folder = tmp_path_factory.mktemp("primitives")
    missing = set(STAND_INS) - set(primitives.primitive_names())
    for kind in missing:
        (folder / f"{kind}.py").write_text(stand_in(kind), encoding="utf-8")
    costmodel.techniques.__path__.append(str(folder))
    forget()
    yield
    costmodel.techniques.__path__.remove(str(folder))
    for kind in missing:
        sys.modules.pop(f"costmodel.techniques.{kind}", None)
        vars(costmodel.techniques).pop(kind, None)
    forget()


def stand_in(kind):
    name = NAMES.get(kind, kind.title().replace("_", ""))
    lines = []
    for pair in STAND_INS[kind].split():
        field, value = pair.split("=")
        annotation = (
            "str | None" if field in TEXT else {"(": "tuple", "T": "bool", "F": "bool"}.get(value[0], "Quantity | None")
        )
        lines.append(f"    {field}: {annotation!r} = {value}")
    stages, slot = (repr(word) for word in PLACES.get(kind, ("", "")))
    if kind == "token_reduce":
        stages, slot = "'layers' if self.at == 'layer' else 'visual_tokens'", "f'{self.at} tokens'"
    return CODE.format(name=name, fields="\n".join(lines), kind=kind, slot=slot, stages=stages)
