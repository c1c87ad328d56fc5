"""The pages of the studies of the frontiers, with places for what is found."""

from __future__ import annotations

from typing import Final

HYBRID: Final = """# Hybrid compression: {model}, 30,104 visual and 64 text tokens, 128 output tokens

A budget is the share of the prompt's cache that a step reads, in bytes. `retrieve` keeps everything; `prune` and
`quantise` lose what they drop. `heads:` splits the four key heads in two groups, `layers:` the 28 layers in two or
three, each with an operator of its own and all at the budget together. Quantising alone cannot go below {floor:.1%}
(one bit, and scales for every {group:g} numbers). The figure and the JSON file have every budget.

{points}
Quality is what HybridKV published at budgets from 10 to 20 % on Video-ChatGPT. Of every other point it is unknown; the
notes on the survey's Table 7 name no budget, so its scores stand on no axis here.

## Where each wins

Operators within {close:.0%} of the best, and the largest value over the smallest. {codes}.

{winners}
## Beside the survey's Table 8 (L40S, `hf-eager`, prune and retrieve by head)

{table_8}
Bytes are below the published ones: ours are the budget and {generated} generated tokens, and the published ones fit a
window of 772 tokens that is always kept. That is 0.04 GB, and explains little of the time: the published step falls
from 59 to 39 ms and ours from 65 to 27. What HybridKV does in every step (choosing, ragged heads) is not in its file.

## What it says, and what not

- At one budget all operators read as much, and the TTFT is the same; what differs is where the rest is. Retrieval on
  the device frees nothing, so it loses the batch. Retrieval from the host once a question costs 1.7 GB of host memory
  and no time here; anew for every step it is the slowest of all at large batches, by the link.
- Hybrids lie between their parts. Splitting heads costs a second kernel a layer, some 0.3 ms a step on H100.
- Quantising wins the batch where eviction must hold the full cache until prefill ends, and loses the step where no
  kernel reads narrow numbers (`hf-eager` writes a wide copy). Below its floor it needs another operator beside it.
- With `hf-eager` on H100 the host issues kernels more slowly than the device runs them: no operator shortens a step of
  one request. With `vllm` a step is mostly weights: pruning to the least budget shortens it by {gain:.0%} on H100. What
  compression buys there is the batch.
- Which heads or layers are sensitive is not modelled: groups are given, not found. A hybrid costs what its parts cost;
  whether it keeps more quality is only what others measured.
- `vllm` with `quantise` assumes a fused kernel for any mean width; that engine ships none below eight bits.
"""

RELAXED_PAGE: Final = """# Relaxed verification: Qwen2.5-VL pairs on one {device}

One request is 12,544 visual, 64 text and 256 output tokens where nothing else is said.

## Beside the survey's Table 10 ({drafted:g} tokens drafted, {keep:.0%} of the visual tokens seen by the draft)

{table}
Accepted tokens follow from the strict ones alone, and agree within 3 %. Speed-ups do not: the median error is
{median:.0%} with `hf-eager`, whose software it was, and {other:.0%} with `vllm`. The table was measured on two H200;
frames, text and placement are assumed.

The number of visual tokens is the assumption that matters. Median error of `hf-eager` by it:

{longer}
Read it as what would explain the table, not as a check: a length is fitted. The 32B pairs then agree; the 7B/7B pair
does not at any length. By the table a round there takes 5.0 to 5.2 steps of the target, so a pass of the draft some
0.4 of a step, although both have the same layers and, in our model, the same host.

## Where speculation stops paying

Speed-up with {drafted:g} drafted tokens a round by batch (* does not fit on one device), at which batches up to 256 it
pays, and the best speed-up of one request over the number of drafted tokens (in brackets).

{batches}
## The least acceptance at which one request gains

{acceptance}
## What the draft sees

Speed-up of {keep_batch:g} requests at strict acceptance, by the share of visual tokens that the draft sees.

{keeps}
## What it says, and what not

- Under `hf-eager` one request waits for the host, which issues kernels layer by layer: a pass of the draft takes 28/64
  (7B) or 36/64 (3B) of a step of the 32B target. The draft with fewer parameters and more layers is the slower one, as
  in the table; with graphs (`vllm`) the order turns.
- With a short prompt, batches stop a strict draft under `vllm`: {rows:g} rows a request are no longer free once
  products are bound by compute. With a long one they do not: a step is mostly the caches of all requests, a round
  reads them once for {rows:g} rows, and the draft holds a tenth. The gain grows with the batch, until memory ends it.
- Relaxing raises accepted tokens and leaves the round as it is: every curve moves by one factor. A draft as large as
  its target pays only where that factor, or long caches, carry it over one.
- What the draft sees hardly moves one request; its worth is memory, and batches of long prompts. That acceptance stays
  when it sees less is assumed: nobody published it by keep.
- Acceptance is taken as independent at every position. Quality is what Table 10 prints, down to {quality:.1%}, and
  unknown between its points. Trees, and drafts on devices of their own, are not in this study.
- Requests of a batch are taken to finish a round together; engines that pad or wait lose more.
"""

STREAMING: Final = """# Streaming state: {model} under `{engine}`, 640x360 at two frames a second

Every way is asked after an hour of video. `chunk` is the time from a chunk's last frame until the state has it, and
`ms a frame` its share of a frame. The host prepares {host:.0f} frames a second with the one thread that the engine
gives it; the second column of rates leaves it out, and so do the streams, which rate and memory of the device bound.

{table}
## Without a bound

{growing}
## Beside published figures (`hf-eager`)

{published}
ReKV's rates include the way to the host and what its software does for each chunk; ours has the former alone. The times
of a token were read off a plot, and the resolution of that video is not known here. Ours are two to three times
faster than all four: read the rates as what a device allows, not as what such software reaches.

## What it says, and what not

- A bounded state holds its rate for ever, at a fraction of a GB; everything kept, the rate falls under two frames a
  second within the hour on most devices, and small ones are full in minutes.
- Computing the state again for every chunk and token costs 3 to 8 times the rate and 7 to 36 times the time of a token
  (StreamingVLM's own plot: 5 to 8 times, under slower software).
- One stream does not fill a large device: a chunk of 299 tokens is small for its launches and weights, and on H100 and
  H200 the host's thread is the limit. InfiniPot-V's larger blocks use the device better and answer later: rate against
  latency.
- Retrieval keeps the device bounded and not the host: 62 GB an hour. Devices that share their memory with the host have
  no place for it, and are left out there.
- States differ in size by their own papers (5,808 tokens, 3,360, and 15,000 of a local window): these are methods as
  published, not at equal quality. What they keep of the answers is not compared, as no benchmark has all of them.
- Questions wait for nothing, answers take no time from digesting, and streams arrive in step: how they collide is a
  question for the simulator. Edge devices are priced by shared curves, with wide bands.
"""

CODESIGN: Final = """# Co-design: {model} under `{engine}`, a video of {tokens:,} tokens, {output} output tokens

TTFT leaves out the host, which prepares the frames in {host:.1f} s with one thread wherever they are encoded. Decoding
takes the largest batch (a power of two) that fits and keeps a token within {tpot:g} ms. Prices are list prices of the
device profiles. `together` has one copy of the weights, so one width; `apart` may choose one by stage.

## Stages alone, 16 bits

{stages}
## The cheapest plan of each set

Over a link of {rdma_gb:g} GB/s (RDMA):

{rdma}
Apart, over a link of {tcp_gb:.2g} GB/s (TCP):

{tcp}
## What it says, and what not

- Techniques save more than placement: dropping tokens before the language model cuts the price 2.5 times, whatever the
  devices; the best placement moves it by a few percent.
- At these prices the cheap GPU is not the cheap encoder: L40S takes three times as long as H100 at half the price.
  H100 encodes and prefills, H200 decodes; that is worth while only once decoding is a large share of the price and
  batches are bound by memory.
- The cache is what travels: 2.2 GB a request delay the second token by 0.1 s over RDMA and 2.3 s over TCP, where apart
  costs twice as much as together. Dropping tokens and evicting shrink that, so techniques make placement affordable.
- Quality kept is what was published for the techniques, losses added; what narrower weights lose is not in it.
- No queueing, no interference: together, prefill and decoding are taken not to disturb each other, which favours it;
  apart, transfers are never overlapped, which does not. Tails, bursts and how many devices each pool needs are
  questions for the simulator. Devices without measured kernels or a public price are left out.
"""
