"""Generation with the model's verbs: greedy or sampled, several prompts at once, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from costmodel.errors import Unsupported
from costmodel.techniques import Technique
from runtime.cache import KvCache
from runtime.device import memory_guarded
from runtime.graphs import CompiledStep, GraphedStep
from runtime.model import Lvlm, Pixels
from runtime.prompts import Batch, batch_of
from runtime.techniques import open_session

Steps: TypeAlias = Literal["plain", "graph", "compiled"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids with placeholders for visual tokens, and the pictures that fill them."""

    tokens: Sequence[int]
    pixels: Pixels | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Parameters
    ----------
    temperature : float
        Logits are divided by it; 0 takes the most likely token.
    top_k : int
        Tokens that may be drawn, the most likely ones; 0 is all.
    top_p : float
        They must hold this probability together, the most likely first.
    seed : int
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn from."""
        if not self.temperature >= 0:
            raise ValueError(f"Sampling.temperature={self.temperature} must be at least 0; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling.top_p={self.top_p} must be above 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"Sampling.top_k={self.top_k} must be at least 0; 0 is all tokens")


GREEDY = Sampling()


def generate(
    model: Lvlm,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[int] = (),
    steps: Steps = "plain",
    techniques: Sequence[Technique] = (),
    draft: Lvlm | None = None,
) -> list[list[int]]:
    """Return the new tokens of every prompt; see `stream`.

    With techniques prompts run one behind another, greedily; `draft` is the model that a technique speculates with.
    """
    if techniques:
        if sampling != GREEDY or steps != "plain":
            raise Unsupported(f"techniques run greedily and plain, not with {sampling} and steps={steps!r}; leave them")
        sessions = (open_session(model, prompt, techniques, draft=draft) for prompt in prompts)
        return [session.greedy(max_tokens, stop=stop) for session in sessions]
    found: list[list[int]] = [[] for _ in prompts]
    for step in stream(model, prompts, max_tokens=max_tokens, sampling=sampling, stop=stop, steps=steps):
        for tokens, token in zip(found, step, strict=True):
            if token is not None:
                tokens.append(token)
    return found


@torch.inference_mode()
def stream(
    model: Lvlm,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[int] = (),
    steps: Steps = "plain",
) -> Iterator[list[int | None]]:
    """Yield the new tokens one step at a time, one a prompt; None for a prompt that has ended.

    Parameters
    ----------
    model : Lvlm
    prompts : sequence of Prompt
        They may differ in length.
    max_tokens : int
        New tokens of each at most.
    sampling : Sampling
    stop : sequence of int
        Tokens behind which a prompt has ended; they are given too.
    steps : {"plain", "graph", "compiled"}
        How decode steps run: call by call, as one CUDA graph, or through torch.compile.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1")
    logits, cache = start(model, prompts, max_tokens)
    step = stepper(model, cache, steps)
    generator = torch.Generator(model.device).manual_seed(sampling.seed)
    ended = [False] * len(prompts)
    for left in range(max_tokens - 1, -1, -1):
        tokens = choose(logits, sampling, generator)
        given = [None if done else token for done, token in zip(ended, tokens.tolist(), strict=True)]
        yield given
        ended = [done or token in stop for done, token in zip(ended, given, strict=True)]
        if all(ended) or not left:
            return
        logits = step(tokens)


def stepper(model: Lvlm, cache: KvCache, steps: Steps) -> Callable[[Tensor], Tensor]:
    """Return what takes one token a sequence to the logits of what follows."""
    if steps == "graph":
        return GraphedStep(model, cache)
    if steps == "compiled":
        return CompiledStep(model, cache)
    return lambda tokens: model.decode_step(tokens, cache)


def start(model: Lvlm, prompts: Sequence[Prompt], max_tokens: int) -> tuple[Tensor, KvCache]:
    """Encode, adapt and prefill; return the first logits and the cache with room for so many new tokens."""
    batch = batched(model, prompts)
    cache = model.reserve(len(prompts), batch.tokens.shape[1] + max_tokens)
    pixels = joined([prompt.pixels for prompt in prompts if prompt.pixels is not None])
    with memory_guarded(f"{len(prompts)} x {batch.tokens.shape[1]} tokens of {model.spec.name}", model.device):
        visual = None if pixels is None else model.adapt(model.encode(pixels))
        return model.prefill(batch, visual, cache), cache


def batched(model: Lvlm, prompts: Sequence[Prompt]) -> Batch:
    """Return prompts as one padded batch."""
    return batch_of(
        [prompt.tokens for prompt in prompts],
        [() if prompt.pixels is None else prompt.pixels.pictures for prompt in prompts],
        image_token=model.settings.image_token,
        vocabulary=model.spec.decoder.vocabulary,
    )


def joined(parts: Sequence[Pixels]) -> Pixels | None:
    """Return the pictures of several prompts as one batch for the encoder."""
    if not parts:
        return None
    return Pixels(
        torch.cat([part.patches for part in parts]),
        tuple(grid for part in parts for grid in part.grids),
        tuple(picture for part in parts for picture in part.pictures),
    )


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Return one token a row of logits."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    ordered, ids = (logits.float() / sampling.temperature).sort(-1, descending=True)
    shares = ordered.softmax(-1)
    likelier = shares.cumsum(-1) - shares  # probability of all tokens before this one
    barred = likelier >= sampling.top_p
    if sampling.top_k:
        barred[:, sampling.top_k :] = True
    drawn = torch.multinomial(shares.masked_fill(barred, 0.0), 1, generator=generator)
    return ids.gather(-1, drawn)[:, 0]
