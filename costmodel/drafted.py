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
    priced = cost.priced
    return replace(
        cost,
        **{name: getattr(cost, name) * factor for name in ("time_s", "flops", "weight_bytes", "activation_bytes")},
        **{name: getattr(cost, name) * factor for name in ("kv_bytes", "link_bytes", "busy_s")},
        **{name: _times(getattr(cost, name), factor) for name in ("kind_s", "below_s", "above_s", "step_time_s")},
        priced=priced and _scaled_operators(priced, factor),
    )


def _scaled_operators(priced: Priced, factor: float) -> Priced:
    columns = {name: getattr(priced, name) * factor for name in ("sums", "roofs_s", "busy_s", "start_s")}
    return replace(priced, **columns)


def _times(values: Sequence[float], factor: float) -> tuple[float, ...]:
    return tuple(value * factor for value in values)


def _plus(values: Sequence[float], others: Sequence[float], weight: float = 1.0) -> tuple[float, ...]:
    return tuple(a + weight * b for a, b in zip(values, others, strict=True))


def _joined(evaluator: Evaluator, stage: Stage, own: StageCost, draft: StageCost | None, time_s: float) -> StageCost:
    """Return the target's and the draft's part as one stage; of a draft beside the target, what is waited for counts."""
    if draft is None or not draft.time_s:
        return replace(own, time_s=time_s)
    drafting = evaluator.drafting
    assert drafting is not None  # noqa: S101 - the caller asked
    waited = (time_s - own.time_s) / draft.time_s
    busy = drafting.query.parallelism.busy(stage) / evaluator.query.parallelism.busy(stage)
    sums = ("flops", "weight_bytes", "activation_bytes", "kv_bytes", "link_bytes")
    return replace(
        own,
        time_s=time_s,
        **{name: getattr(own, name) + getattr(draft, name) for name in sums},
        **{name: _plus(getattr(own, name), getattr(draft, name), waited) for name in ("kind_s", "below_s", "above_s")},
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
