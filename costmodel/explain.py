"""Why a request costs what it costs, and what would have to change to move the bottleneck.

A stage's compute and memory times are compared over its matrix products and attention. Weights are read once a pass
whatever the rows, so with weights W, other traffic T and work F (all in seconds at reached rates), memory and compute
meet when the rows are multiplied by W / (F - T).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from costmodel.stage_cost import OperatorCost, StageCost

if TYPE_CHECKING:
    from costmodel.predict import Prediction

N_DEAREST: Final = 3
MANY: Final = 2
ROWS: Final = {"encode": "patches", "adapt": "visual tokens", "prefill": "prompt tokens", "decode": "sequences"}
SPENT: Final = {
    "compute": "compute-bound",
    "memory": "memory-bound",
    "link": "bound by the link between devices",
    "start": "bound by starting kernels",
    "host": "work of the host CPU",
    "none": "nothing to do",
}


def explain(prediction: Prediction) -> list[str]:
    """Return why, one line a finding: each stage that takes time, what leads TTFT, what fills memory."""
    stages = prediction.stages
    lines = [_stage_line(prediction, name, stage) for name, stage in stages.items() if stage.time_s > 0]
    return [
        *lines,
        _first_token_line(prediction),
        _memory_line(prediction),
        *_position_lines(prediction),
        *_note_lines(prediction),
    ]


def _stage_line(prediction: Prediction, name: str, stage: StageCost) -> str:
    head = f"{name}: {SPENT[stage.bound]} for {stage.share(stage.bound):.0%} of its time"
    if name == "preprocess":
        cost = prediction.query.engine.preprocessing
        return (
            f"{head}; decoding and resizing pictures on {_cores(cost.workers)}; fewer pixels or a faster processor help"
        )
    dearest = ", ".join(
        f"{o.name.partition('.')[2]} {o.time_s / stage.time_s:.0%}" for o in stage.operators[:N_DEAREST]
    )
    return f"{head}; dearest: {dearest}; {_what_moves(prediction, name, stage)}"


def _cores(n_cores: int) -> str:
    return "one core" if n_cores == 1 else f"{n_cores} cores"


def _what_moves(prediction: Prediction, name: str, stage: StageCost) -> str:
    """Say what would make another roof bind."""
    contested = [o for o in stage.operators if o.flops]
    compute, memory = sum(o.compute_s for o in contested), sum(o.memory_s for o in contested)
    if not (compute and memory):
        return "the engine's equations price no other roof here"
    if stage.bound == "compute":
        return (
            f"memory would bind with {_factor(compute / memory)} the FLOP/s, or {_fewer(prediction, name, contested)}"
        )
    if stage.bound == "memory":
        rows = _more(prediction, name, contested)
        return f"compute would bind with {_factor(memory / compute)} the bandwidth, or {rows}"
    if stage.bound == "start":
        return (
            f"work would bind with {_factor(_start_over_next(stage))} the rows in a pass, or fewer and larger kernels"
        )
    if stage.bound == "link":
        return "memory would bind with a faster link or fewer devices"
    return "a faster host, or its work overlapped with the device's, would help"


def _start_over_next(stage: StageCost) -> float:
    next_share = max(stage.share("compute"), stage.share("memory"), stage.share("link"))
    return stage.share("start") / next_share if next_share else float("inf")


def _crossing(prediction: Prediction, name: str, operators: list[OperatorCost]) -> float:
    """Return the rows, over those of now, at which memory and compute take equally long; infinite if they never do."""
    stage = prediction.stages[name]
    compute = sum(o.compute_s for o in operators)
    memory = sum(o.memory_s for o in operators)
    weights = memory * stage.weight_bytes / sum(o.bytes for o in operators)
    rising = compute - (memory - weights)
    return weights / rising if rising > 0 else float("inf")


def _fewer(prediction: Prediction, name: str, operators: list[OperatorCost]) -> str:
    rows = _rows(prediction, name) * _crossing(prediction, name, operators)
    return f"below about {rows:,.0f} {ROWS[name]} a pass" if rows >= MANY else f"at no usual number of {ROWS[name]}"


def _more(prediction: Prediction, name: str, operators: list[OperatorCost]) -> str:
    crossing = _crossing(prediction, name, operators)
    if crossing == float("inf"):
        return f"at no number of {ROWS[name]}, for each brings more traffic than work"
    return f"from about {round(_rows(prediction, name) * crossing):,} {ROWS[name]} a step on"


def _rows(prediction: Prediction, name: str) -> float:
    tokens, batch = prediction.tokens, float(prediction.query.replica_batch)
    adapted = tokens["visual"] or tokens["cross"]
    each = {"encode": tokens["patches"], "adapt": adapted, "prefill": tokens["prompt"], "decode": 1}
    rows = each[name] * batch
    return min(rows, prediction.query.engine.prefill_chunk_tokens) if name == "prefill" else rows


def _factor(ratio: float) -> str:
    return f"{ratio:.3g} times"


def _first_token_line(prediction: Prediction) -> str:
    """Say which stage leads TTFT, and how much faster it must become for the next one to lead."""
    parts = sorted(
        ((stage.time_s, name) for name, stage in prediction.stages.items() if name != "decode"), reverse=True
    )
    (first_s, first), (second_s, second) = parts[0], parts[1]
    share = first_s / float(prediction.ttft_s)
    if not second_s:
        return f"TTFT is {first} alone"
    return f"TTFT is led by {first} ({share:.0%}); {second} leads once {first} is {first_s / second_s:.3g} times faster"


def _memory_line(prediction: Prediction) -> str:
    memory, batch = prediction.memory, prediction.max_batch
    largest = max(
        ("weights", memory.weights_bytes),
        ("KV cache", memory.kv_bytes),
        ("activations", memory.activation_bytes),
        key=lambda part: part[1],
    )
    used = memory.peak_bytes / memory.usable_bytes
    fit = f"at most {batch:,} such requests fit together" if batch else "not even one such request fits"
    return f"memory: {used:.0%} of what the engine may use, most of it {largest[0]}; {fit}"


def _position_lines(prediction: Prediction) -> list[str]:
    """Say when the request is longer than the model was trained for."""
    positions = prediction.query.model.decoder.max_positions
    length = prediction.tokens["prompt"] + round(float(prediction.query.turns[0].output_tokens))
    if not positions or length <= positions:
        return []
    return [f"note: prompt and answer are {length:,} tokens, beyond the {positions:,} positions of the model's config"]


def _note_lines(prediction: Prediction) -> list[str]:
    return [f"note: {note}" for note in prediction.query.model.notes]
