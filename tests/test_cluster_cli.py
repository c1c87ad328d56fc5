"""Clusters by command: pools as they are typed, links that are derived, what the report shows, sweeps."""

import csv
import gzip
import json
import re
import tomllib
from pathlib import Path

import pytest

from costmodel import load_hardware
from costmodel.errors import Unsupported
from simulator import Pool, ServingPlan
from simulator.assembly import assumptions, derived_link, preprocess_at, with_links
from simulator.ordering import ORDERS
from simulator.routing import ROUTERS
from simulator.topology import Link
from studies import cli, serving
from studies.serving import Deployment

MODEL, DEVICE, CHEAP = "qwen2.5-vl-7b", "h100-sxm5-80gb", "l4-24gb"
SERVED = ["--model", MODEL, "--hardware", DEVICE]
APART = ["--pools", "encode=1", "--pools", "prefill+decode=2"]
THREE = ["--pools", f"encode=1@{CHEAP}", "--pools", "prefill=1", "--pools", "decode=1"]
COMES = ["--workload", "image-1080p-1", "--rate", "3", "--requests", "30"]
HOSTED = {"name": "e", "stages": ("preprocess", "encode")}


@pytest.fixture
def lvlm(capsys):
    """Run the command and return its exit code, stdout and stderr."""

    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def typed(*pools, **options):
    return serving.plan_of(None, Deployment(model=MODEL, hardware=DEVICE, pools=pools, **options))


# Pools


def test_a_pool_has_as_many_workers_as_its_devices_make():
    plan = typed("encode=1", "prefill+decode=6", set=("prefill+decode.tp=2", "encode.max_batch=3"), gpus=7)
    encode, language = plan.pools
    assert (encode.name, encode.workers, encode.tp, encode.max_batch) == ("encode", 1, 1, 3)
    assert (language.name, language.workers, language.tp, language.max_batch) == ("prefill+decode", 3, 2, None)
    assert plan.devices == 7


def test_pictures_are_preprocessed_where_they_are_encoded_unless_it_is_said():
    assert [pool.stages for pool in typed("encode=1", "prefill+decode=1").pools] == [
        ("preprocess", "encode"),
        ("prefill", "decode"),
    ]
    said = typed("encode=1", "preprocess+prefill+decode=1")
    assert said.pools[0].stages == ("encode",)
    assert preprocess_at([("prefill",), ("decode",)]) == [("preprocess", "prefill"), ("decode",)]


def test_pools_of_equal_stages_are_told_apart_by_their_devices():
    plan = typed("decode+prefill=1", "encode=1", f"encode=1@{CHEAP}", set=(f"encode@{CHEAP}.max_batch=2",))
    assert [pool.name for pool in plan.pools] == ["prefill+decode", f"encode@{DEVICE}", f"encode@{CHEAP}"]
    assert [pool.max_batch for pool in plan.pools] == [None, None, 2]


def test_a_dumped_plan_reads_back_as_the_same(lvlm, tmp_path):
    path = tmp_path / "plan.toml"
    settings = ["--set", "policies.router=least-tokens", "--set", "links.mode=reserve", "--set", "decode.max_batch=9"]
    code, text, _ = lvlm("simulate", *SERVED, *THREE, *settings, "--dump-plan")
    assert code == 0
    path.write_text(text)
    asked = tuple(settings[1::2])
    assert ServingPlan.read(path) == typed(f"encode=1@{CHEAP}", "prefill=1", "decode=1", set=asked)
    assert lvlm("simulate", path, "--dump-plan")[1] == text


def test_a_plan_file_takes_settings_by_pool_and_link(lvlm, tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(lvlm("simulate", *SERVED, *APART, "--dump-plan")[1])
    changed = serving.plan_of(str(path), Deployment(set=("encode.encode_items=2", "links.latency_s=0.5")))
    assert changed.pools[0].encode_items == 2
    assert changed.pools[1].encode_items is None
    assert changed.links[0].latency_s == 0.5


# Links


def link(source, target, what="embeddings", others=()):
    return derived_link(source, target, what, [source, target, *others])


def encoder(hardware=DEVICE, **fields):
    return Pool.model_validate({**HOSTED, "hardware": hardware, **fields})


def language(hardware=DEVICE, **fields):
    return Pool.model_validate({"name": "l", "stages": ("prefill", "decode"), "hardware": hardware, **fields})


@pytest.mark.parametrize("hardware", [DEVICE, "a100-sxm4-80gb"])
def test_devices_of_a_node_use_their_fastest_link(hardware):
    own = load_hardware(hardware).links[0]
    found = link(encoder(hardware), language(hardware, workers=7))
    assert (found.kind, found.bandwidth_bytes_per_s, found.latency_s) == (
        own.kind,
        own.bandwidth_bytes_per_s,
        own.latency_s,
    )
    assert (found.source, found.target, found.per, found.mode) == ("e", "l", "worker", "push")


def test_a_pair_of_a_mesh_has_its_share():
    found = link(encoder("v100-sxm2-32gb"), language("v100-sxm2-32gb"))
    own = next(one for one in load_hardware("v100-sxm2-32gb").links if one.kind == "nvlink")
    assert found.bandwidth_bytes_per_s == pytest.approx(own.bandwidth_bytes_per_s / (own.devices - 1))


def test_bridged_pairs_fall_back_to_the_host_when_there_are_more():
    pair = link(encoder("h100-pcie-80gb"), language("h100-pcie-80gb"))
    four = link(encoder("h100-pcie-80gb"), language("h100-pcie-80gb", workers=3))
    assert (pair.kind, four.kind) == ("nvlink", "pcie")


def test_different_devices_use_the_slower_host_link_and_say_so():
    found = link(encoder(CHEAP), language())
    assert found.kind == "pcie"
    assert found.bandwidth_bytes_per_s == load_hardware(CHEAP).host_link().bandwidth_bytes_per_s
    assert found.bandwidth_bytes_per_s < load_hardware(DEVICE).host_link().bandwidth_bytes_per_s
    mixed = with_links(MODEL, [encoder(CHEAP), language()])
    assert "as if both were in one host" in next(assumptions(mixed))
    assert not list(assumptions(with_links(MODEL, [encoder(), language()])))
    assert link(encoder(f"{DEVICE}:tdp_w=500"), language()).kind == "nvlink"


def test_pixels_go_over_the_receivers_link_to_its_host():
    found = link(Pool(name="p", stages=("preprocess",), hardware=DEVICE), encoder(), "pixels")
    host = load_hardware(DEVICE).host_link()
    assert (found.kind, found.bandwidth_bytes_per_s) == ("pcie", host.bandwidth_bytes_per_s)


def test_kv_uses_as_many_devices_at_once_as_the_smaller_end_has():
    own = load_hardware(DEVICE).links[0].bandwidth_bytes_per_s
    front = Pool(name="f", stages=("encode", "prefill"), hardware=DEVICE, tp=4)
    back = Pool(name="d", stages=("decode",), hardware=DEVICE, tp=2)
    assert link(front, back, "KV").bandwidth_bytes_per_s == 2 * own
    assert link(front, back, "embeddings").bandwidth_bytes_per_s == own


def test_more_devices_than_a_node_joins_need_a_network(tmp_path):
    with pytest.raises(Unsupported, match=r"9 x h100-sxm5-80gb have no link.*joins 8; give \[\[links\]\]"):
        link(encoder(), language(workers=8))
    text = (load_hardware_file(DEVICE)) + NIC
    path = tmp_path / "node.toml"
    path.write_text(text)
    found = link(encoder(str(path)), language(str(path), workers=8))
    assert (found.kind, found.bandwidth_bytes_per_s, found.latency_s) == ("infiniband", 5e10, 2e-6)
    assert link(encoder(str(path)), language(str(path), workers=7)).kind == "nvlink"


NIC = """
[[links]]
kind = "infiniband"
bandwidth_bytes_per_s = 50e9
latency_s = 2e-6
devices = 1024
topology = "switch"
"""


def load_hardware_file(name):
    from costmodel.hardware import load_catalogue

    return load_catalogue()[name]


# What goes wrong


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpus", "4", *APART], "--gpus 4 must be what the pools have together, 3 (encode 1, prefill+decode 2)"),
        (["--pools", "encode=1"], "stage 'prefill' is run by no pool"),
        (["--pools", "prefill=1", "--pools", "encode=1"], "stage 'decode' is run by no pool"),
        (["--pools", "prefill+decode=1"], "stage 'encode' is run by no pool, and requests with pictures need it"),
        (
            ["--pools", "encode=1", "--pools", "encode+prefill+decode=1"],
            "'encode' (preprocess+encode) is fed by nobody",
        ),
        (["--pools", "encod=1", "--pools", "prefill+decode=1"], "unknown stage 'encod'; did you mean 'encode'?"),
        (["--pools", "encode:1"], "must read STAGES=DEVICES"),
        (["--pools", "encode=0"], "must read STAGES=DEVICES"),
        (["--pools", "encode=1@"], "must read STAGES=DEVICES"),
        (["--pools", "encode=1@l4-24", "--pools", "prefill+decode=1"], "did you mean 'l4-24gb'"),
        (["--pools", "encode=1", "--pools", "encode=2", "--pools", "prefill+decode=1"], "is given twice"),
        (["--pools", "encode=1", "--pools", "prefill+decode=8"], "9 x h100-sxm5-80gb have no link"),
        ([*APART, "--tp", "2"], "pool 'encode': devices=1 must be a multiple of the 2 of a worker"),
        ([*APART, "--set", "decode.tp=2"], "names: encode, prefill+decode"),
        ([*APART, "--set", "links.speed=2"], "links.0.speed"),
        (["--set", "links.mode=push"], "changes no link"),
        ([*APART, "--set", "policies.router=nearest"], "unknown router 'nearest'"),
    ],
)
def test_impossible_plans_get_one_line_and_exit_code_2(lvlm, options, words):
    code, out, err = lvlm("simulate", *SERVED, *options, *COMES)
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.splitlines()) == 1


def test_a_missing_link_and_two_sources_of_a_plan_get_one_line(lvlm, tmp_path):
    path = tmp_path / "plan.toml"
    text = lvlm("simulate", *SERVED, *APART, "--dump-plan")[1]
    path.write_text(text)
    code, _, err = lvlm("simulate", path, "--pools", "encode=1", *COMES)
    assert code == 2
    assert "exclude each other" in err
    path.write_text(text.partition("[[links]]")[0])
    code, _, err = lvlm("simulate", path, *COMES)
    assert code == 2
    assert "a link from 'encode' to 'prefill+decode' is missing, over which embeddings go" in err


def test_a_model_too_large_for_a_pool_is_infeasible(lvlm):
    pools = ["--pools", "encode=1", "--pools", f"prefill+decode=1@{CHEAP}"]
    code, _, err = lvlm("simulate", "--model", "qwen2.5-vl-72b", "--hardware", DEVICE, *pools, *COMES)
    assert code == 3
    assert CHEAP in err.splitlines()[-1]
    assert "GB are usable" in err.splitlines()[-1]


# The report


def test_the_report_shows_every_pool_every_link_and_why_requests_ended(lvlm):
    limits = ["--set", "policies.admission=queue", "--set", "policies.admission_limit=1"]
    comes = ["--workload", "servegen-mm-image", "--rate", "40", "--requests", "60"]
    code, out, err = lvlm("simulate", *SERVED, *THREE, *limits, *comes)
    assert code == 0
    assert f"on 1 x {CHEAP} + 2 x {DEVICE}" in out
    pools = ("encode ", "prefill ", "decode ")
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith(pools) and " x " in line}
    assert set(rows) == {"encode", "prefill", "decode"}
    assert f"1 x {CHEAP}" in rows["encode"]
    assert rows["decode"].count("%") == 2  # decode, and idle
    links = [line for line in out.splitlines() if " > " in line and line.endswith("%")]
    assert [line.split()[3] for line in links] == ["pcie", "nvlink"]
    assert " without an answer: " in out
    assert "as if both were in one host" in err


def test_json_and_csv_have_every_pool(lvlm):
    values = json.loads(lvlm("simulate", *SERVED, *THREE, *COMES, "--json")[1])
    assert {name: sorted(shares) for name, shares in values["utilisation"].items()} == {
        "encode": ["encode", "idle", "preprocess"],
        "prefill": ["idle", "prefill"],
        "decode": ["decode", "idle"],
    }
    assert set(values["links"]) == {"encode > prefill", "prefill > decode"}
    row = next(csv.DictReader(lvlm("simulate", *SERVED, *THREE, *COMES, "--csv")[1].splitlines()))
    assert float(row["utilisation.decode.decode"]) == pytest.approx(values["utilisation"]["decode"]["decode"])
    assert float(row["links.encode > prefill"]) > 0


def test_rows_timeline_and_plot_know_the_pools(lvlm, tmp_path):
    table, timeline, plot = (tmp_path / name for name in ("r.csv", "t.json.gz", "p.svg"))
    assert lvlm("simulate", *SERVED, *THREE, *COMES, "-o", table, "--timeline", timeline, "--plot", plot)[0] == 0
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 30
    for row in rows:
        times = [
            float(row[f"{name}_s"]) for name in ("arrival", "encoded", "scheduled", "first_token", "joined", "finish")
        ]
        assert times == sorted(times)
        assert (row["worker"], row["decode_worker"], row["retries"], row["reason"]) == ("1", "2", "0", "")
    events = json.loads(gzip.decompress(timeline.read_bytes()))["traceEvents"]
    by_worker = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert by_worker == {0: "worker 0 (encode)", 1: "worker 1 (prefill)", 2: "worker 2 (decode)"}
    names = {worker: {e["name"] for e in events if e["ph"] == "X" and e["tid"] == worker} for worker in by_worker}
    assert names == {0: {"encode"}, 1: {"prefill"}, 2: {"decode"}}
    phases = {event["name"] for event in events if event["ph"] == "b"}
    assert {"preprocess", "prefill", "move", "decode"} <= phases
    drawn = plot.read_text()
    assert "svg" in drawn
    assert plot.stat().st_size > 5000


def test_a_plain_run_has_empty_columns_of_what_did_not_happen(lvlm, tmp_path):
    table = tmp_path / "r.csv"
    assert lvlm("simulate", *SERVED, *COMES, "-o", table)[0] == 0
    row = next(csv.DictReader(table.open()))
    assert (row["encoded_s"], row["joined_s"], row["decode_worker"]) == ("", "", "-1")


# Loads


def test_the_python_and_the_links_of_the_docs_are_right(capsys):
    text = (Path(__file__).parents[1] / "docs" / "clusters.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "clusters.md", "exec"), {})  # noqa: S102 - our own text
    assert "1.0" in capsys.readouterr().out
    written = tomllib.loads(re.search(r"```toml\n(.*?)```", text, flags=re.DOTALL)[1])["links"][0]
    assert Link.model_validate(written).mode == "reserve"
    for table in (ROUTERS, ORDERS):
        assert all(f"`{name}`" in text for name in table)


PROMISED = ["--target", "ttft_s=1", "--target", "tpot_s=0.05", "--requests", "60", "--tolerance", "0.2"]
PICTURE = ["--image", "1920x1080", "--text", "64", "--output", "40"]


def test_the_rate_that_a_cluster_bears(lvlm, tmp_path):
    command = ["solve", MODEL, DEVICE, "--vary", "rate", *APART, *PICTURE, *PROMISED]
    found = json.loads(lvlm(*command, "--json")[1])
    last, first = found["goodput_last_pass"], found["goodput_first_violation"]
    assert found["value"] == last < first <= 1.2 * last
    assert found["tried"][0]["attainment"] == 1.0
    assert found["knee_requests_per_s"] > 0
    assert found["saturation_requests_per_s"] == max(row["throughput_requests_per_s"] for row in found["tried"])
    assert found["inputs"]["slo"] == {"ttft_s": 1.0, "tpot_s": 0.05, "e2e_s": None}
    rows = list(csv.DictReader(lvlm(*command, "--csv")[1].splitlines()))
    assert [float(row["rate_requests_per_s"]) for row in rows] == [row["rate_requests_per_s"] for row in found["tried"]]
    text = lvlm(*command)[1]
    assert "goodput: promises are kept up to" in text
    assert "knee: " in text
    path = tmp_path / "plan.toml"
    path.write_text(lvlm("simulate", *SERVED, *APART, "--dump-plan")[1])
    again = json.loads(lvlm("solve", path, "--vary", "rate", *PICTURE, *PROMISED, "--json")[1])
    assert again["tried"] == found["tried"]


def test_a_rate_of_a_sweep_is_that_of_simulate(lvlm):
    load = ["--workload", "image-1080p-1", "--requests", "40"]
    swept = ["solve", MODEL, DEVICE, "--vary", "rate", *APART, *load, "--slo-ttft", "1", "--tolerance", "0.5"]
    found = json.loads(lvlm(*swept, "--json")[1])["tried"][2]
    rate = ["--rate", repr(found["rate_requests_per_s"]), "--slo-ttft", "1"]
    one = json.loads(lvlm("simulate", *SERVED, *APART, *load, *rate, "--json")[1])
    assert one["ttft_s"]["p99"] == found["ttft_s.p99"]
    assert one["slo_attainment"]["joint"] == pytest.approx(found["attainment"])


def test_options_of_serving_reach_the_plan(lvlm):
    options = ["--tp", "2", "--engine", "sglang", "--kv-bits", "8", "--technique", "fastv:keep=0.5"]
    command = ["solve", MODEL, DEVICE, "--vary", "rate", "--gpus", "4", *PICTURE, *options, *PROMISED, "--json"]
    plan = json.loads(lvlm(*command)[1])["inputs"]["plan"]
    pool = plan["pools"][0]
    assert (pool["tp"], pool["workers"], pool["engine"], plan["kv_bits"]) == (2, 2, "sglang", 8)
    assert plan["techniques"] == [{"name": "fastv", "parameters": {"keep": 0.5}}]


def test_nothing_feasible_is_exit_code_3(lvlm):
    tight = ["--target", "ttft_s=0.001", "--requests", "20"]
    code, out, err = lvlm("solve", MODEL, DEVICE, "--vary", "rate", *PICTURE, *tight)
    assert code == 3
    assert "no rate keeps the promises" in out
    assert "no rate meets the target" in err


def test_how_a_cluster_scales(lvlm):
    pair = ["--pools", "encode=1", "--pools", "prefill+decode=1"]
    command = ["solve", MODEL, DEVICE, "--vary", "gpus", *pair, *PICTURE, *PROMISED]
    given = json.loads(lvlm(*command, "--rate", "2", "--json")[1])
    assert [row["devices"] for row in given["scaled"]] == [2, 4, 8]  # a node of eight
    assert [row["rate_requests_per_s"] for row in given["scaled"]] == [2.0, 4.0, 8.0]
    assert given["scaled"][0]["slo_efficiency"] == 1.0
    assert all(0 < row["throughput_efficiency"] < 1.1 for row in given["scaled"])
    code, _, err = lvlm(*command, "--rate", "2", "--times", "8")
    assert code == 2
    assert "16 x h100-sxm5-80gb have no link" in err
    searched = json.loads(lvlm(*command, "--times", "2", "--json")[1])
    assert searched["rate_searched"]
    assert [row["times"] for row in searched["scaled"]] == [2]
