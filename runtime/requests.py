"""Requests to be measured: sizes, and prompts of random tokens around real pictures that have these sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from costmodel.media import media_costs
from costmodel.models import ModelSpec
from costmodel.workload import Image as Size
from costmodel.workload import Workload
from runtime.generate import Prompt
from runtime.microbench import jpeg, opened
from runtime.preprocess import preprocess
from runtime.settings import Blueprint


@dataclass(frozen=True, slots=True)
class Request:
    """What every sequence of a batch brings.

    Parameters
    ----------
    images : tuple of Image
        Sizes.
    text_tokens : int
        Text of the prompt.
    batch : int
        Equal requests that run together.
    """

    images: tuple[Size, ...] = ()
    text_tokens: int = 64
    batch: int = 1

    def __post_init__(self) -> None:
        """Refuse counts below one."""
        for name in ("text_tokens", "batch"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"Request.{name}={value} must be a whole number from 1")

    def shape(self, name: str) -> dict[str, Any]:
        """Return the request as the shape of a measurement line has it."""
        sizes = [[image.width, image.height] for image in self.images]
        return {"model": name, "batch": self.batch, "images": sizes, "text_tokens": self.text_tokens}

    def prompt_tokens(self, spec: ModelSpec) -> int:
        """Return the tokens of a prompt: visual, around pictures, text."""
        return sum(cost[0] + cost[1] for cost in self._tokens(spec)) + self.text_tokens

    def _tokens(self, spec: ModelSpec) -> list[tuple[int, int]]:
        """Return visual tokens and those around them of every picture."""
        if not self.images or spec.media is None:
            return []
        costs = media_costs(spec.media, Workload(images=self.images))
        return [(cost.visual_tokens, cost.marker_tokens) for cost in costs]

    def photos(self) -> list[Image.Image]:
        """Return a picture of every size, decoded."""
        return [opened(jpeg(size.width, size.height)) for size in self.images]

    def prompts(self, blueprint: Blueprint, *, seed: int = 0) -> list[Prompt]:
        """Return the prompts of the batch: random tokens, with each picture between its own."""
        pixels = preprocess(blueprint, self.photos()) if self.images else None
        image_token = blueprint.settings.image_token
        known = min(blueprint.spec.decoder.vocabulary, image_token)
        rng = np.random.default_rng(seed)
        return [Prompt(self._ids(blueprint.spec, image_token, known, rng), pixels) for _ in range(self.batch)]

    def _ids(self, spec: ModelSpec, image_token: int, known: int, rng: np.random.Generator) -> Sequence[int]:
        found: list[int] = []
        text: list[int] = rng.integers(0, known, self.text_tokens).tolist()
        for visual, around in self._tokens(spec):
            found += rng.integers(0, known, around).tolist() + [image_token] * visual
        return [*found, *text]
