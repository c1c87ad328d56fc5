"""What a stage costs where a draft takes part in it: the target's part and the draft's, put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from costmodel.evaluate import Evaluator
from costmodel.query import Stage, Turn
from costmodel.stage_cost import Bound, Priced, StageCost, own_cost
from costmodel.sums import decode_steps


def drafted_cost(evaluator: Evaluator, stage: Stage, turn: Turn, time_s: float) -> StageCost:
    """Return a stage with the draft's part in it.

    Parameters
    ----------
    time_s : float
        Its time as the headline has it [s].

    Notes
    -----
    Decode is worked out as if every token were a round, and divided by the tokens of a round.
    """
    draft, drafting = evaluator.query.draft, evaluator.drafting
    assert draft is not None  # noqa: S101 - the caller asked
    assert drafting is not None  # noqa: S101
    target_s, draft_s = float(evaluator.own_s(stage, turn)), float(evaluator.draft_s(stage, turn))
    if stage != "decode":
        own = own_cost(evaluator, stage, turn, target_s)
        return _joined(evaluator, stage, own, own_cost(drafting, stage, turn, draft_s) if draft_s else None, time_s)
    tokens, steps, passes = float(draft.round_tokens), float(decode_steps(evaluator.query, turn)), float(draft.passes)
    own = _scaled(own_cost(evaluator, stage, turn, steps * target_s), 1 / tokens)
    drafted = _scaled(own_cost(drafting, stage, turn, steps * draft_s / passes), passes / tokens)
    joined = _joined(evaluator, stage, own, drafted, time_s)
    rounds = zip(own.step_time_s, drafted.step_time_s, strict=True)
    host_s = float(drafting.host_s("decode")) * passes / tokens
    each = [float(draft.joined_s(stage, target, passes_s - host_s)) for target, passes_s in rounds]
    return replace(joined, step_time_s=tuple(each))


def _scaled(cost: StageCost, factor: float) -> StageCost:
    """Return a stage that happens so many times as often."""
    return replace(
        cost,
        time_s=cost.time_s * factor,
        flops=cost.flops * factor,
        weight_bytes=cost.weight_bytes * factor,
        activation_bytes=cost.activation_bytes * factor,
        kv_bytes=cost.kv_bytes * factor,
        link_bytes=cost.link_bytes * factor,
        kind_s=_times(cost.kind_s, factor),
        below_s=_times(cost.below_s, factor),
        above_s=_times(cost.above_s, factor),
        busy_s=cost.busy_s * factor,
        step_time_s=_times(cost.step_time_s, factor),
        priced=cost.priced and _scaled_operators(cost.priced, factor),
    )


def _scaled_operators(priced: Priced, factor: float) -> Priced:
    return replace(
        priced,
        sums=priced.sums * factor,
        roofs_s=priced.roofs_s * factor,
        busy_s=priced.busy_s * factor,
        start_s=priced.start_s * factor,
    )


def _times(values: Sequence[float], factor: float) -> tuple[float, ...]:
    return tuple(value * factor for value in values)


def _plus(values: Sequence[float], others: Sequence[float], weight: float = 1.0) -> tuple[float, ...]:
    return tuple(a + weight * b for a, b in zip(values, others, strict=True))


def _joined(evaluator: Evaluator, stage: Stage, own: StageCost, draft: StageCost | None, time_s: float) -> StageCost:
    """Return the target's and the draft's part as one stage; of a draft beside the target counts what is waited for."""
    if draft is None or not draft.time_s:
        return replace(own, time_s=time_s)
    drafting = evaluator.drafting
    assert drafting is not None  # noqa: S101 - the caller asked
    waited = (time_s - own.time_s) / draft.time_s
    busy = drafting.query.parallelism.busy(stage) / evaluator.query.parallelism.busy(stage)
    return replace(
        own,
        time_s=time_s,
        flops=own.flops + draft.flops,
        weight_bytes=own.weight_bytes + draft.weight_bytes,
        activation_bytes=own.activation_bytes + draft.activation_bytes,
        kv_bytes=own.kv_bytes + draft.kv_bytes,
        link_bytes=own.link_bytes + draft.link_bytes,
        kind_s=_plus(own.kind_s, draft.kind_s, waited),
        below_s=_plus(own.below_s, draft.below_s, waited),
        above_s=_plus(own.above_s, draft.above_s, waited),
        busy_s=own.busy_s + draft.busy_s * busy,
        shares=_shares(((own.time_s, own), (time_s - own.time_s, draft)), time_s),
        drafts=(draft,),
    )


def _shares(parts: Sequence[tuple[float, StageCost]], time_s: float) -> tuple[tuple[Bound, float], ...]:
    """Return the share of the time by what binds it, from those of the parts and their times."""
    seconds: dict[Bound, float] = {}
    for part_s, part in parts:
        for bound, share in part.shares:
            seconds[bound] = seconds.get(bound, 0.0) + share * part_s
    ranked = sorted(seconds.items(), key=lambda item: -item[1])
    return tuple((bound, value / time_s) for bound, value in ranked) if time_s else (("none", 1.0),)
