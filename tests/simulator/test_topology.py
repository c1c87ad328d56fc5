"""Plans of several pools: what is needed, who sends what to whom, and one clear line for what cannot be."""

import pytest

from costmodel.errors import DoesNotFit, Unsupported
from simulator import Pool, ServingPlan, simulate
from simulator.capacity import parts_of
from simulator.step_service import StepService
from simulator.topology import STAGES, Link, Topology, encoders_for_others, preprocessors_of
from tests.simulator.clusters import asked, cluster, pictures, pool, service

DEVICE = "h100-sxm5-80gb"


def link(source, target, **more):
    return Link(**{"from": source, "to": target, "bandwidth_bytes_per_s": 1e9}, **more)


def topology(*pools, links=None):
    """Return a topology, with all links that are needed if none are given."""
    return cluster(*pools).topology if links is None else Topology(pools=pools, links=links)


def names(pools):
    return [one.name for one in pools]


# Who works for whom


def test_stages_are_kept_in_the_order_of_a_request_and_named_once():
    assert pool("decode+prefill").stages == ("prefill", "decode")
    assert Pool(hardware=DEVICE).stages == STAGES


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (["preprocess+encode+prefill+decode"], set()),
        (["preprocess+encode", "prefill+decode"], {("preprocess+encode", "prefill+decode", "embeddings")}),
        (
            ["preprocess", "encode", "prefill", "decode"],
            {("preprocess", "encode", "pixels"), ("encode", "prefill", "embeddings"), ("prefill", "decode", "KV")},
        ),
        (["preprocess+encode+prefill", "decode"], {("preprocess+encode+prefill", "decode", "KV")}),
        (
            ["preprocess+encode", "prefill", "prefill+decode"],
            {
                ("preprocess+encode", "prefill", "embeddings"),
                ("preprocess+encode", "prefill+decode", "embeddings"),
                ("prefill", "prefill+decode", "KV"),
            },
        ),
        (
            ["preprocess+encode+decode", "prefill"],
            {("preprocess+encode+decode", "prefill", "embeddings"), ("prefill", "preprocess+encode+decode", "KV")},
        ),
        (["preprocess", "encode+prefill+decode"], {("preprocess", "encode+prefill+decode", "pixels")}),
    ],
)
def test_what_goes_over_which_link(shape, expected):
    found = topology(*map(pool, shape))
    assert {(source.name, target.name, what) for source, target, what in found.hops()} == expected
    assert {(one.source, one.target) for one in found.links} == {(source, target) for source, target, _ in expected}


def test_encoders_apart_encode_for_others_before_those_that_prefill_too():
    found = topology(pool("preprocess+encode"), pool("encode+prefill+decode"), pool("prefill+decode"))
    assert names(encoders_for_others(found)) == ["preprocess+encode"]
    beside = topology(pool("preprocess+encode+prefill+decode"), pool("prefill+decode"))
    assert names(encoders_for_others(beside)) == ["preprocess+encode+prefill+decode"]
    assert not encoders_for_others(
        topology(pool("preprocess+encode+prefill+decode"), pool("prefill+decode", serves="text"))
    )


def test_pixels_come_from_the_pool_itself_or_from_one_that_does_nothing_else():
    found = topology(pool("preprocess"), pool("encode"), pool("prefill+decode"))
    assert names(preprocessors_of(found, found.pool("encode"))) == ["preprocess"]
    own = topology(pool("preprocess+encode"), pool("prefill+decode"))
    assert names(preprocessors_of(own, own.pool("preprocess+encode"))) == ["preprocess+encode"]


def test_pools_by_modality_take_their_own_requests():
    media, text = pool("preprocess+encode+prefill+decode", serves="media"), pool("prefill+decode", serves="text")
    plan = cluster(media, text)
    requests = asked([10] * 6, [2] * 6, items=pictures([1, 0] * 3, [20] * 3))
    trace = simulate(plan, requests, service=service(step_base_s=0.1))
    assert trace.columns["worker"].tolist() == [0, 1] * 3


def test_devices_are_counted_once_where_pools_share_them():
    pools = (
        pool("preprocess+encode", workers=2, tp=2, shares_devices_of="prefill+decode"),
        pool("prefill+decode", workers=2, tp=2),
    )
    assert sum(one.devices for one in topology(*pools).pools) == 4


# What cannot be


@pytest.mark.parametrize(
    ("pools", "links", "message"),
    [
        (["prefill"], None, "stage 'decode' is run by no pool; add it to the stages of one"),
        (["preprocess+encode", "decode"], None, "stage 'prefill' is run by no pool; add it"),
        (
            ["preprocess+encode+prefill+decode", "encode"],
            None,
            r"pool 'encode' \(encode\) is fed by nobody: others do all of its stages themselves",
        ),
        (["preprocess+encode+prefill+decode", "decode"], None, r"pool 'decode' \(decode\) is fed by nobody"),
        (
            ["preprocess+encode+prefill+decode", "preprocess"],
            None,
            r"pool 'preprocess' \(preprocess\) is fed by nobody",
        ),
        (
            ["preprocess+encode", "prefill+decode"],
            [],
            "a link from 'preprocess\\+encode' to 'prefill\\+decode' is missing, over which embeddings go; add",
        ),
        (["prefill", "decode"], [], "a link from 'prefill' to 'decode' is missing, over which KV go"),
        (
            ["preprocess", "encode", "prefill+decode"],
            [("encode", "prefill+decode")],
            "a link from 'preprocess' to 'encode' is missing, over which pixels go",
        ),
        (
            ["prefill", "decode"],
            [("prefill", "decode"), ("prefill", "cloud")],
            "ends at 'cloud', which is no pool; known: ",
        ),
        (
            ["prefill", "decode"],
            [("prefill", "decode")] * 2,
            "links=2 must have ends of their own; two lead from prefill to",
        ),
        (["prefill+decode"] * 2, None, r"pools=\['prefill\+decode', 'prefill\+decode'\] must have names of their own"),
    ],
)
def test_a_plan_that_cannot_be_says_why_in_one_line(pools, links, message):
    with pytest.raises(ValueError, match=message) as error:
        topology(*map(pool, pools), links=None if links is None else tuple(link(*ends) for ends in links))
    assert (
        len([line for line in str(error.value).splitlines() if "must" in line or "is " in line or "known" in line]) == 1
    )


def test_a_layerwise_link_needs_its_receiver_beforehand():
    with pytest.raises(
        ValueError, match="mode='push' of a layerwise link must be 'reserve': the receiver is known before"
    ):
        link("prefill", "decode", layerwise=True)
    assert link("prefill", "decode", layerwise=True, mode="reserve").layerwise


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_link_carries_something(value):
    with pytest.raises(ValueError, match="bandwidth_bytes_per_s"):
        Link(**{"from": "a", "to": "b", "bandwidth_bytes_per_s": value})


@pytest.mark.parametrize(
    ("sharing", "other", "message"),
    [
        ("cloud", {}, "shares_devices_of='cloud' must name another pool with devices of its own"),
        ("preprocess+encode", {}, "shares_devices_of='preprocess\\+encode' must name another pool"),
        ("prefill+decode", {"workers": 2}, "workers=1, tp, pp and dp must be those of 'prefill\\+decode', 2"),
        ("prefill+decode", {"hardware": "a100-sxm4-80gb"}, "hardware='any' must be that of 'prefill\\+decode', 'a100"),
        (
            "prefill+decode",
            {"shares_devices_of": "preprocess+encode"},
            "must name another pool with devices of its own",
        ),
    ],
)
def test_devices_can_be_shared_with_a_pool_that_has_some(sharing, other, message):
    with pytest.raises(ValueError, match=message):
        topology(pool("preprocess+encode", shares_devices_of=sharing), pool("prefill+decode", **other))


@pytest.mark.parametrize(
    ("pools", "counts", "message"),
    [
        (["prefill+decode"], [0, 1], "stage 'preprocess' is run by no pool, and requests with pictures need it"),
        (["preprocess+prefill+decode"], [0, 1], "stage 'encode' is run by no pool, and requests with pictures need it"),
    ],
)
def test_traffic_that_no_pool_can_serve_is_refused_before_the_run(pools, counts, message):
    plan = cluster(*map(pool, pools))
    with pytest.raises(ValueError, match=message) as error:
        simulate(plan, asked([5] * 2, [1] * 2, items=pictures(counts, [20] * sum(counts))), service=service())
    assert "\n" not in str(error.value)
    assert simulate(plan, asked([5], [1]), service=service()).finished.all()


@pytest.mark.parametrize(("serves", "what"), [("text", "with pictures"), ("media", "without pictures")])
def test_requests_of_a_kind_that_no_pool_takes_are_refused(serves, what):
    plan = cluster(pool("preprocess+encode+prefill+decode", serves=serves))
    counts = [1] if serves == "text" else [0]
    with pytest.raises(ValueError, match=f"requests {what} are taken by no pool that prefills; change serves of one"):
        simulate(plan, asked([5], [1], items=pictures(counts, [20] * sum(counts))), service=service())


def test_a_request_that_fits_nowhere_is_rejected_and_says_so():
    plan = cluster(pool("prefill"), pool("decode"))
    trace = simulate(plan, asked([50, 50], [10, 60]), service=service(kv_blocks=80))
    assert trace.finished.tolist() == [True, False]
    assert trace.reasons == {1: "no pool has room for so many tokens"}


# Models on the devices of a pool


def model_plan(*pools, model="qwen2.5-vl-7b"):
    return ServingPlan(model=model, pools=pools, links=cluster(*pools, bandwidth_bytes_per_s=1e10).links)


def test_a_pool_holds_the_parts_that_its_stages_need():
    assert parts_of(pool("preprocess+encode")) == ("vision",)
    assert parts_of(pool("prefill")) == ("language",)
    assert parts_of(pool("preprocess+encode+prefill+decode")) == ("vision", "language")
    plan = model_plan(pool("preprocess+encode", hardware=DEVICE), pool("prefill+decode", hardware=DEVICE))
    whole = StepService.of(model_plan(pool("preprocess+encode+prefill+decode", hardware=DEVICE))).capacity.kv_blocks
    assert StepService.of_pool(plan, plan.pools[1]).capacity.kv_blocks > whole


@pytest.mark.parametrize("stages", ["prefill+decode", "prefill", "decode"])
def test_a_model_that_fits_no_device_of_a_pool_says_how_much_is_missing(stages):
    plan = model_plan(pool("preprocess+encode+prefill+decode", hardware="a100-sxm4-80gb"), model="qwen2.5-vl-72b")
    with pytest.raises(DoesNotFit, match=r"qwen2.5-vl-72b .* on a100-sxm4-80gb") as error:
        StepService.of_pool(plan, pool(stages, hardware="a100-sxm4-80gb"))
    assert "\n" not in str(error.value)
    encoder = StepService.of_pool(plan, pool("encode", hardware="a100-sxm4-80gb"))  # its encoder alone does
    assert encoder.capacity.encoder_tokens > 0


def test_pipelines_do_not_encode():
    plan = model_plan(pool("preprocess+encode+prefill+decode", hardware=DEVICE, pp=2))
    with pytest.raises(Unsupported, match="encode in a pool of its own, or use tp"):
        StepService.of(plan)


# Files


def test_a_plan_of_several_pools_is_the_same_after_a_file(tmp_path):
    pools = pool("preprocess+encode", workers=3), pool("prefill", max_batch=8), pool("decode")
    wires = {("prefill", "decode"): {"mode": "reserve", "layerwise": True}}
    plan = cluster(*pools, wires=wires, bandwidth_bytes_per_s=2e10, latency_s=1e-5, policies={"router": "least-tokens"})
    path = tmp_path / "plan.toml"
    path.write_text(plan.as_toml())
    assert ServingPlan.read(path) == plan
    assert ServingPlan.read(path).topology.link("prefill", "decode").layerwise


def test_a_file_without_a_link_names_what_to_add(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(
        'model = "any"\n[[pools]]\nname = "p"\nhardware = "any"\nstages = ["preprocess", "encode", "prefill"]\n'
        '[[pools]]\nname = "d"\nhardware = "any"\nstages = ["decode"]\n'
    )
    with pytest.raises(ValueError, match='from = "p", to = "d"') as error:
        ServingPlan.read(path)
    assert "\n" not in str(error.value)
