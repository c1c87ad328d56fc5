"""The pages of the studies of the frontiers, with places for what is found."""

from __future__ import annotations

from typing import Final

HYBRID: Final = """# Hybrid compression: {model}, 30,104 visual and 64 text tokens, 128 output tokens

A budget is the share of the prompt's cache that a step reads, in bytes. `retrieve` keeps everything; `prune` and
`quantise` lose what they drop. `heads:` splits the four key heads in two groups, `layers:` the 28 layers in two or
three, each with an operator of its own and all at the budget together. Quantising alone cannot go below {floor:.1%} (one
bit, and scales for every {group:g} numbers).

{points}
Quality is what HybridKV published at budgets from 10 to 20 % on Video-ChatGPT; of every other point it is unknown, and
the survey's Table 7 does not say its budget.

## Where each wins

Operators within {close:.0%} of the best, and how far the worst lies from the best.

{winners}
## Beside the survey's Table 8 (L40S, `hf-eager`, prune and retrieve by head)

{table_8}
Ours counts the budget alone, and {generated} generated tokens beside it; a window of 772 tokens that is always kept
would give the published bytes. Published decoding falls less than ours: that software does work at low budgets which
this model does not have, or its full cache is copied less.

## What it says, and what not

- Per byte read, operators cost a step the same: the kernels see bytes. What differs is the rest: what the device holds
  (retrieval on the device frees nothing), the way from the host, and the wide copy where nothing is fused.
- With `hf-eager` on H100 the host issues kernels more slowly than the device runs them: no operator shortens a step.
- With `vllm` a step is mostly weights: a tenth of the cache shortens it by {gain:.0%} on H100. The gain is the batch.
- Which heads or layers are sensitive is not modelled: shares and groups are given, not found. A hybrid costs what its
  parts cost; whether it keeps more quality is only what others measured.
- `vllm` with `quantise` assumes a fused kernel for any mean width, which that engine does not ship below eight bits.
"""

RELAXED_PAGE: Final = """# Relaxed verification: Qwen2.5-VL pairs on one {device}, 12,544 visual tokens, 256 output tokens

## Beside the survey's Table 10 ({drafted:g} tokens drafted, {keep:.0%} of the visual tokens seen by the draft)

{table}
Accepted tokens follow from the strict ones alone. The table was measured on two H200 with Hugging Face code; frames,
text and placement are assumed. Median error {median:.0%} with `hf-eager`, {other:.0%} with `vllm`.

The number of visual tokens is the assumption that matters. Median error of `hf-eager` by it, 32B pairs and 7B/7B:

{longer}
Read it as what would explain the table, not as a check: one number is fitted to nine. At no length does a 7B draft of a
7B target gain here, and the survey has 1.26 to 1.80: its target took some 2.4 times as long as its draft's pass.

## Where speculation stops paying

Speed-up with {drafted:g} drafted tokens a round by batch (up to 256; * does not fit on one device), at which batches it
pays, and the best speed-up of one request over the drafted tokens (in brackets).

{batches}
## The least acceptance at which one request gains

{acceptance}
## What the draft sees

Speed-up of {keep_batch:g} requests at strict acceptance, by the share of visual tokens that the draft sees.

{keeps}
## What it says, and what not

- Under `hf-eager` one request waits for the host, which issues target and draft layer by layer: a draft of 28 (7B) or
  36 layers (3B) against a target of 64 or 28 cannot gain ten times over. A smaller draft with more layers is slower.
- With a short prompt, batches stop it: verifying {rows:g} rows a request is no longer free once the products are bound by
  compute, and the draft's passes stay. With a long prompt they do not: a step is mostly the cache of every request, a
  round reads it once for {rows:g} rows, and the draft holds a tenth of it. The gain then grows with the batch.
- Relaxing raises accepted tokens and leaves the round as it is, so it moves every curve by the same factor. It saves a
  slow draft only where that factor reaches one.
- What the draft sees hardly moves one request; its worth is room in memory, and batches of long prompts. That acceptance
  stays when it sees less is assumed: nobody published it by keep.
- Independent acceptance at every position is assumed; quality is what Table 10 prints, down to {quality:.1%}, and unknown
  between its points. Trees, and drafts on devices of their own, are not in this study.
- Requests of a batch are taken to finish a round together; engines that pad or wait lose more.
"""

STREAMING: Final = """# Streaming state: {model} under `{engine}`, 640x360 at two frames a second

{table}

{growing}

{published}
"""
