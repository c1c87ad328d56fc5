"""What a worker does in small cases that can be worked out by hand: rules of vLLM V1, policies, preemption, caches."""

import numpy as np
import pytest

from costmodel import Image
from simulator import Pool, ServingPlan, check, simulate
from simulator.batching import Decision, batch_policy, policy_names
from simulator.encoder_cache import EncoderCache
from simulator.kv_cache import KvCache, Node
from simulator.request import LIFE, Items, RequestView, State, requests_of
from simulator.service import Capacity, LinearService
from simulator.serving_plan import Policies
from simulator.tape import Tape

BASE, TOKEN, SEQUENCE = 1.0, 0.001, 0.01
ROOM = {"kv_blocks": 10_000, "block_tokens": 16, "chunk_tokens": 100, "max_sequences": 8, "encoder_tokens": 200}


def serve(text, output, arrival=None, *, batch="vllm", capacity=None, items=None, pool=None, prefix=True, **more):
    n = len(text)
    service = LinearService(
        step_base_s=BASE, token_s=TOKEN, sequence_s=SEQUENCE, patch_s=more.pop("patch_s", 0.0),
        capacity=Capacity(**{**ROOM, **(capacity or {})}), visual_tokens_per_pixel=1.0,
    )  # fmt: skip
    links = {key: np.array(more.pop(key)) for key in ("parent", "shared_text_tokens", "shared_items") if key in more}
    requests = requests_of(
        np.zeros(n) if arrival is None else np.array(arrival),
        np.array(text),
        np.array(output),
        items=items,
        links=links,
    )
    plan = ServingPlan(
        model="any",
        pools=(Pool(hardware="any", **(pool or {})),),
        policies=Policies(batch=batch, prefix_caching=prefix),
    )
    trace = simulate(plan, requests, service=service, **more)
    check(trace)
    return trace


def steps(trace, *names):
    return [tuple(row) for row in np.column_stack([trace.steps[0][name] for name in names]).tolist()]


def pictures(counts, tokens, content=None, before=None):
    """Return square-free pictures of so many tokens each, in front of the text."""
    total = sum(counts)
    sizes = sorted(set(tokens))
    zero = np.zeros(total, dtype=int)
    return Items(
        np.concatenate([[0], np.cumsum(counts)]),
        np.array([sizes.index(size) for size in tokens]),
        np.arange(total) if content is None else np.array(content),
        zero if before is None else np.array(before),
        tuple(Image(size, 1) for size in sizes),
    )


def test_a_prompt_is_computed_in_chunks_of_the_budget_and_then_decodes():
    trace = serve([250], [3])
    assert steps(trace, "chunk_tokens", "finishing", "decoding") == [
        (100, 0, 0),
        (100, 0, 0),
        (50, 1, 0),
        (0, 0, 1),
        (0, 0, 1),
    ]
    assert trace.ttft_s[0] == pytest.approx(3 * BASE + 250 * TOKEN)
    assert trace.tpot_s[0] == pytest.approx(BASE + SEQUENCE)


def test_decoding_sequences_take_their_token_of_the_budget_first():
    trace = serve([10, 300], [50, 2], [0.0, 1.5])
    mixed = [chunk for chunk, decoding in steps(trace, "chunk_tokens", "decoding") if chunk and decoding]
    assert mixed == [99, 99, 99, 3]


def test_waiting_requests_share_what_is_left_of_a_step():
    trace = serve([60, 60, 10], [1, 1, 1])
    assert steps(trace, "chunk_tokens", "chunks") == [(100, 2), (30, 2)]


def test_no_more_sequences_run_than_may():
    trace = serve([5] * 20, [10] * 20, capacity={"max_sequences": 3})
    assert max(running for (running,) in steps(trace, "running")) == 3


def test_prefill_first_keeps_decoding_sequences_waiting():
    trace = serve([50, 90], [5, 2], [0.0, 1.5], batch="sglang")
    assert not [1 for chunk, decoding in steps(trace, "chunk_tokens", "decoding") if chunk and decoding]
    assert trace.itl[0].max() == pytest.approx(2 * BASE + 90 * TOKEN + 2 * SEQUENCE)


def test_static_batches_do_not_mix():
    trace = serve([10, 10, 10], [4, 9, 2], [0.0, 0.0, 1.5], batch="static")
    assert trace.columns["scheduled_s"][2] == trace.columns["finish_s"][1]


@pytest.mark.parametrize(("batch", "decoding"), [("vllm", 0), ("sarathi", 1)])
def test_who_gets_the_budget_when_a_prompt_stands_in_front_of_a_decoding_sequence(batch, decoding):
    """In order of admission, as vLLM V1, or decoding sequences first, as Sarathi.

    The first request fills the encoder cache, so the second is cut in front of its picture and the third overtakes it.
    """
    items = pictures([1, 1, 0], [150, 150], before=[0, 10])
    how = {"items": items, "capacity": {"encoder_tokens": 150, "max_sequences": 4}, "pool": {"token_budget": 60}}
    trace = serve([5, 20, 5], [1, 1, 30], batch=batch, **how)
    assert steps(trace, "chunk_tokens", "chunks", "decoding")[:5] == [
        (60, 1, 0), (60, 1, 0), (50, 3, 0), (60 - decoding, 1, decoding), (60 - decoding, 1, decoding),
    ]  # fmt: skip


def test_the_last_request_is_preempted_and_computes_again_with_what_it_had_said():
    trace = serve([64, 64], [40, 40], capacity={"kv_blocks": 10})
    assert trace.columns["preemptions"].tolist() == [0, 1]
    assert trace.finished.all()
    assert trace.columns["finish_s"][1] > trace.columns["finish_s"][0]


def test_a_preempted_request_finds_its_own_blocks_again():
    kept = serve([64, 64], [40, 40], capacity={"kv_blocks": 10})
    lost = serve([64, 64], [40, 40], capacity={"kv_blocks": 10}, prefix=False)
    assert kept.steps[0]["chunk_tokens"].sum() < lost.steps[0]["chunk_tokens"].sum()


def test_the_first_request_that_does_not_fit_stops_the_queue():
    trace = serve([100, 90, 1], [30, 1, 1], [0.0, 0.5, 0.6], capacity={"kv_blocks": 10, "chunk_tokens": 200})
    scheduled = trace.columns["scheduled_s"]
    assert scheduled[2] >= scheduled[1] >= trace.columns["finish_s"][0]


def test_a_request_larger_than_the_cache_is_rejected_and_others_go_on():
    trace = serve([1000, 10], [5, 5], capacity={"kv_blocks": 20})
    assert trace.columns["state"].tolist() == [State.REJECTED, State.FINISHED]


# Pictures


def test_the_encoder_runs_before_the_step_and_everybody_waits():
    trace = serve([5, 5], [20, 1], [0.0, 3.0], items=pictures([0, 1], [80]), patch_s=0.1)
    assert trace.steps[0]["encode_s"].max() == pytest.approx(8.0)
    assert trace.itl[0].max() == pytest.approx(BASE + 85 * TOKEN + SEQUENCE + 8.0)


def test_a_chunk_ends_before_a_picture_that_the_budget_cannot_encode():
    """150 and 100 embeddings do not fit 200 in one step: the second waits for the next, where the first is in KV."""
    trace = serve([10], [1], items=pictures([2], [150, 100]), capacity={"chunk_tokens": 1000})
    assert steps(trace, "chunk_tokens", "encoded_items") == [(150, 1), (110, 1)]


def test_a_picture_is_encoded_whole_with_its_first_token():
    trace = serve([10], [1], items=pictures([1], [150]))
    assert steps(trace, "chunk_tokens", "encoded_items") == [(100, 1), (60, 0)]


def test_a_picture_that_comes_again_is_encoded_once():
    trace = serve([10, 10], [1, 1], [0.0, 9.0], items=pictures([1, 1], [150, 150], content=[7, 7]))
    assert (trace.encoder_hits, trace.encoder_misses) == (1, 1)


def test_the_encoder_cache_makes_room_only_from_what_nobody_needs():
    cache = EncoderCache(100)
    cache.put(1, 60)
    assert not cache.fits(50)
    cache.drop(1)
    assert cache.fits(50)
    assert cache.use(1)
    cache.drop(1)
    cache.put(2, 50)
    assert not cache.use(1)
    assert not list(cache.audit())


# Prefixes


def test_a_prompt_that_starts_like_another_computes_only_the_rest():
    trace = serve([200, 210], [1, 1], [0.0, 9.0], parent=[-1, 0], shared_text_tokens=[0, 100])
    assert trace.columns["cached_tokens"].tolist() == [0, 96]  # whole blocks of 16


def test_the_last_token_of_a_prompt_is_always_computed():
    trace = serve([160, 160], [1, 1], [0.0, 9.0], parent=[-1, 0], shared_text_tokens=[0, 160])
    assert trace.columns["cached_tokens"].tolist() == [0, 144]


def test_an_answer_is_part_of_what_is_shared():
    trace = serve([40, 90], [30, 1], [0.0, 99.0], parent=[-1, 0], shared_text_tokens=[0, 70])
    assert trace.columns["cached_tokens"].tolist() == [0, 64]  # the last of the 70 was never computed


def test_blocks_are_evicted_from_the_end_of_what_was_freed_first():
    node, other = Node(0, 6), Node(0, 4)
    cache = KvCache(10, {0: node, 1: node, 2: other})
    for request, blocks in ((0, 6), (2, 4)):
        cache.hold(request, 0)
        cache.take(blocks)
        cache.publish(request, blocks)
    cache.release(0, 6)
    cache.release(2, 4)
    cache.take(2)
    assert cache.hit(1, 99) == (4, 4)
    assert cache.hit(2, 99) == (4, 4)
    cache.hold(1, 4)
    assert cache.free == 4
    assert not list(cache.audit())


def test_blocks_that_are_in_use_are_shared_not_copied():
    node = Node(0, 6)
    cache = KvCache(10, {0: node, 1: node})
    cache.hold(0, 0)
    cache.take(6)
    cache.publish(0, 6)
    assert cache.hit(1, 5) == (5, 0)
    cache.hold(1, 5)
    assert cache.free == 4
    cache.release(0, 6)
    assert cache.free == 5
    cache.release(1, 5)
    assert cache.free == 10


# Leaps, lives, policies


def test_leaping_needs_a_tenth_of_the_events_and_changes_nothing():
    rng = np.random.default_rng(0)
    n = 60
    arrival = np.cumsum(rng.exponential(700.0, n))
    leapt = serve([100] * n, [1000] * n, arrival)
    stepped = serve([100] * n, [1000] * n, arrival, leaps=False)
    assert leapt.events <= stepped.events / 10
    for name in leapt.columns:
        assert leapt.columns[name].tobytes() == stepped.columns[name].tobytes()
    assert sorted(leapt.itl[0]) == sorted(stepped.itl[0])


def test_a_life_goes_only_where_the_table_says():
    tape = Tape(requests_of(np.zeros(1), np.ones(1, int), np.ones(1, int)))
    with pytest.raises(RuntimeError, match="cannot go from EXPECTED to FINISHED"):
        tape.finish(0, 1.0)
    assert set(LIFE) == set(State)
    assert not LIFE[State.FINISHED]


@pytest.mark.parametrize("name", policy_names())
def test_policies_are_pure_and_never_see_an_answers_length(name):
    class OnlyCounts:
        waiting, prefilling, decoding = 3, 1, 2

    policy = batch_policy(name)
    assert isinstance(policy.decide(OnlyCounts()), Decision)
    assert policy.decide(OnlyCounts()) == batch_policy(name).decide(OnlyCounts())
    assert not [field for field in RequestView.__slots__ if field == "output_tokens"]


@pytest.mark.parametrize("name", policy_names())
def test_what_a_policy_does_with_a_request_does_not_depend_on_answers_to_come(name):
    """Two answers of different length: until the shorter one ends, every step is the same."""
    short, long = (serve([30, 80, 50], [5, output, 9], [0.0, 0.2, 0.4], batch=name, leaps=False) for output in (20, 40))
    end = short.columns["finish_s"].min()
    for key in ("start_s", "chunk_tokens", "decoding"):
        rows = [trace.steps[0][key][trace.steps[0]["end_s"] <= end].tolist() for trace in (short, long)]
        assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ({"max_batch": 500}, "token_budget=100 must be max_sequences=500"),
        ({"token_budget": 4}, "token_budget=4 must be"),
    ],
)
def test_settings_that_no_engine_starts_with_are_refused_in_one_line(pool, message):
    with pytest.raises(ValueError, match=message) as error:
        serve([5], [5], pool={"token_budget": 100, **pool})
    assert "\n" not in str(error.value)
