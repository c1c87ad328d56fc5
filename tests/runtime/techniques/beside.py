"""What the cost model says of a tiny model's prompt, and what a run does."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from costmodel import Image, Workload
from costmodel.counts import count, counting_engine, stage_flops
from costmodel.query import build_query
from costmodel.techniques import compose
from runtime.generate import Prompt
from tests.runtime import tiny

SIDES = {"llava": ((56, 56),) * 2, "qwen2_5_vl": ((112, 168), (84, 140))}
CLOSE = 0.01  # of the FLOPs


def prompt_of(ours, *, n_text: int = 32, seed: int = 0) -> Prompt:
    """Return a prompt with two pictures and so many tokens of text."""
    pixels, _ = tiny.pictures(ours, seed=seed)
    numbers = torch.randint(1, tiny.IMAGE - 1, (n_text,), generator=torch.Generator().manual_seed(seed)).tolist()
    first, second = (picture.tokens for picture in pixels.pictures)
    ids = [*numbers[:5], *[tiny.IMAGE] * first, *numbers[5:8], *[tiny.IMAGE] * second, *numbers[8:]]
    return Prompt(ids, pixels)


def workload_of(ours, prompt: Prompt, *, output: int = 1) -> Workload:
    """Return the workload whose tokens are those of a prompt."""
    sides = SIDES[ours.spec.family if ours.spec.family in SIDES else "llava"] if prompt.pixels else ()
    images = [Image(w, h) for h, w in sides]
    others = sum(token != tiny.IMAGE for token in prompt.tokens)
    query = build_query(ours.spec, Workload(text_tokens=1, images=images), counting_engine("torch"))
    markers = round(float(query.media.marker_tokens))
    assert query.visual_tokens == sum(p.tokens for p in prompt.pixels.pictures) if prompt.pixels else True
    return Workload(text_tokens=others - markers, images=images, output_tokens=output)


@dataclass
class Predicted:
    """The cost model's query of a prompt under techniques, as an engine runs it that counts as one convention."""

    query: Any

    def flops(self, stage: str) -> float:
        return stage_flops(self.query, stage)

    def own(self, *stages: str) -> float:
        """Return the FLOPs of the techniques themselves."""
        operators = [o for part in self.query.overheads if part.stage in stages for o in part.operators]
        return sum(float(o.flops * o.repeats) for o in operators)


def predicted(ours, prompt, techniques=(), *, square=True, output=1) -> Predicted:
    engine = counting_engine("torch").model_copy(
        update={"executes_everything": False, "counts_full_square": square}  # layers that nobody reads are not built
    )
    query = build_query(ours.spec, workload_of(ours, prompt, output=output), engine)
    return Predicted(compose(query, techniques))


def kv_bytes(ours, prompt, techniques=()) -> float:
    """Return the bytes of a prompt's cache [bytes]."""
    return count(ours.spec, workload_of(ours, prompt), convention="torch", techniques=techniques).kv_bytes


def flops_of(run) -> float:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def in_half(ours):
    """Return a copy whose numbers take two bytes, as the cost model counts them."""
    return copy.deepcopy(ours).to(torch.bfloat16)
