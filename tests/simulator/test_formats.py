"""Formats of others: each has a fixture in its public schema, and a malformed twin that is refused in one line."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from costmodel import Image
from simulator import Pool, ServingPlan, check, simulate, traffic
from simulator.request import Items, requests_of
from simulator.resolve import resolve
from simulator.service import LinearService
from simulator.traffic import mooncake, servegen
from simulator.traffic.read import NOT_FORMATS, format_of, formats

FIXTURES = Path(__file__).parent / "fixtures"
SERVICE = LinearService(step_base_s=5e-3, token_s=1e-5, sequence_s=1e-5, patch_s=1e-6, visual_tokens_per_pixel=1 / 784)
PLAN = ServingPlan(model="any", pools=(Pool(hardware="any"),))
NAMES = traffic.format_names()
COLUMNS = ("arrival_s", "text_tokens", "output_tokens", "parent", "shared_text_tokens")


def fixture(name, kind="good"):
    found = sorted(FIXTURES.glob(f"{name}.{kind}*"))
    assert len(found) == 1, f"{name} needs one fixture tests/simulator/fixtures/{name}.{kind}.*"
    return found[0]


def refusal(path, **options):
    with pytest.raises((ValueError, LookupError)) as caught:
        traffic.read(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# The contract: a format is one file, one fixture and one malformed twin


def test_modules_of_the_package_are_formats_or_are_said_not_to_be():
    folder = Path(servegen.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files == set(NAMES) | NOT_FORMATS


@pytest.mark.parametrize("name", NAMES)
def test_a_format_reads_its_fixture(name):
    path = fixture(name)
    lines = path if path.is_file() else path / "chunk-0-trace.csv"
    records = json.loads(lines.read_text()) if path.suffix == ".json" else lines.read_text().splitlines()
    requests = traffic.read(path)
    assert len(records) >= 20 or len(requests) >= 20
    assert len(requests) >= 20
    check(simulate(PLAN, requests, service=SERVICE))
    again = traffic.read(path)
    for column in COLUMNS:
        assert getattr(requests, column).tobytes() == getattr(again, column).tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_format_knows_its_own_fixture_alone(name):
    path = fixture(name)
    assert format_of(path).__name__.rpartition(".")[2] == name
    head = "\n".join(p.name for p in path.iterdir()) if path.is_dir() else path.read_text()[:4096]
    assert [module.__name__.rpartition(".")[2] for module in formats() if module.matches(head)] == [name]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("aiperf", "aiperf.bad.jsonl, line 7, metrics, input_sequence_length: value='long' must be a number"),
        ("azure", "azure.bad.csv, line 6: ContextTokens='-3' must be a number of 0 or more"),
        ("burstgpt", "burstgpt.bad.csv, line 11: Request tokens='many' must be a number"),
        ("guidellm", "guidellm.bad.json, benchmarks[0], requests, successful[3]: prompt_tokens is missing"),
        ("mooncake", "mooncake.bad.jsonl, line 6: "),
        ("rows", "rows.bad.csv, line 4: text_tokens='0' must be a number of 1 or more"),
        ("servegen", "chunk-1-trace.csv, line 5: unknown family of gaps 'Lognormal'"),
        ("vllm_bench", "vllm_bench.bad.json: input_lens[3]=-4 must be a number of 0 or more"),
    ],
)
def test_a_malformed_twin_is_refused_by_file_line_and_key(name, words):
    assert words in refusal(fixture(name, "bad"))


def test_every_format_has_a_malformed_twin():
    for name in NAMES:
        refusal(fixture(name, "bad"))


# What can be wrong with any of them


def replaced(tmp_path, name, old, new):
    path = fixture(name)
    copy = tmp_path / path.name
    text = path.read_text()
    assert old in text
    copy.write_text(text.replace(old, new, 1))
    return copy


@pytest.mark.parametrize("name", [name for name in NAMES if fixture(name).suffix == ".csv"])
def test_a_table_without_a_column_is_refused(tmp_path, name):
    header = fixture(name).read_text().splitlines()[0]
    module = next(module for module in formats() if module.__name__.endswith(f".{name}"))
    for column in module.NEEDED:
        if not module.matches(header.replace(column, "other")):
            continue  # then the file is in no known format at all
        assert f"line 1: the column {column} is missing" in refusal(replaced(tmp_path, name, column, "other"))


@pytest.mark.parametrize("name", [name for name in NAMES if fixture(name).suffix == ".csv"])
def test_a_line_that_is_cut_off_is_refused(tmp_path, name):
    lines = fixture(name).read_text().splitlines()
    copy = tmp_path / fixture(name).name
    copy.write_text("\n".join([*lines[:6], lines[6].partition(",")[0]]) + "\n")
    assert "line 7: 1 columns, and the head has" in refusal(copy)


@pytest.mark.parametrize("name", [name for name in NAMES if "json" in fixture(name).suffix])
def test_json_that_is_cut_off_is_refused(tmp_path, name):
    copy = tmp_path / fixture(name).name
    text = fixture(name).read_text()
    copy.write_text(text[: len(text) * 3 // 4])
    assert re.search(r"line \d+: .* the JSON is cut off or malformed", refusal(copy))


@pytest.mark.parametrize("name", [name for name in NAMES if fixture(name).is_file()])
def test_a_file_without_requests_is_refused(tmp_path, name):
    copy = tmp_path / fixture(name).name
    first = fixture(name).read_text().splitlines()[0]
    copy.write_text(first + "\n" if copy.suffix == ".csv" else "\n")
    refusal(copy)


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("mooncake", '"output_length": ', '"output_length": -', "output_length="),
        ("mooncake", '"hash_ids": [', '"hash_ids": ["x", ', "hash_ids="),
        ("mooncake", '"timestamp": ', '"time": ', "line 1: timestamp is missing"),
        ("azure", "2024-10-15 ", "15.10.2024 ", "TIMESTAMP='15.10.2024"),
        ("aiperf", '"unit": "ms"', '"unit": "min"', "unit of a time 'min'"),
        ("aiperf", '"request_end_ns": ', '"ended_ns": ', "line 1, metadata: request_end_ns is missing"),
        ("vllm_bench", '"output_lens": [', '"output_lens": [0.5, ', "output_lens"),
        ("vllm_bench", '"input_lens": [', '"input_lens": [7, ', "input_lens has 25 entries and output_lens 24"),
        ("guidellm", '"request_start_time": ', '"request_start_time": "soon", "x": ', "request_start_time='soon'"),
        ("rows", "640,480", ",480", "width is missing"),
    ],
)
def test_wrong_values_are_refused_by_key(tmp_path, name, old, new, words):
    copy = replaced(tmp_path, name, old, new)
    if "unit" in new:
        with pytest.raises(ValueError, match=words):
            format_of(copy).result(copy)
    else:
        assert words in refusal(copy)


def test_what_is_left_out_is_counted():
    assert traffic.read(fixture("burstgpt")).notes == ("2 requests without response tokens, which failed: left out",)
    assert traffic.read(fixture("vllm_bench")).notes == ("1 request that failed: left out",)
    assert traffic.read(fixture("guidellm")).notes == ("1 request not answered: left out",)
    assert traffic.read(fixture("aiperf")).notes == ("1 request unanswered: left out",)
    assert traffic.read(fixture("azure")).notes == ()


@pytest.mark.parametrize("name", NAMES)
def test_requests_are_limited_and_stretched(name):
    few = traffic.read(fixture(name), n=10, rate=4.0)
    assert 8 <= len(few) <= 10
    alone = few.arrival_s[few.after < 0]
    if name != "servegen":  # there the rate is that of the whole trace
        assert len(few) / len(alone) * (len(alone) - 1) / np.ptp(alone) == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("azure", {"options": {"tiles": "yes"}}, "tiles=yes is no option of Azure"),
        ("azure", {"options": {"images": "tile"}}, "did you mean 'tiles'"),
        ("guidellm", {"options": {"benchmark": "3"}}, "benchmark=3 must be 0 to 0"),
        ("servegen", {"options": {"start": "9e9"}}, "start=9e9 must lie in the trace"),
        ("rows", {"rate": -1.0}, "rate=-1.0 must be a positive number"),
        ("rows", {"n": 0}, "requests=0 must be at least 1"),
    ],
)
def test_options_of_a_format_are_checked(name, given, words):
    assert words in refusal(fixture(name), **given)


def test_options_follow_the_name_of_a_file(tmp_path):
    assert traffic.with_options("a.csv:images=tiles,x=1") == ("a.csv", {"images": "tiles", "x": "1"})
    assert traffic.with_options("C:/a.csv") == ("C:/a.csv", {})
    odd = tmp_path / "a:b=1"
    odd.write_text("")
    assert traffic.with_options(str(odd)) == (str(odd), {})


# One by one


def test_both_readings_of_azure_pictures():
    counted = traffic.read(fixture("azure"))
    tiled = traffic.read(fixture("azure"), options={"images": "tiles"})
    assert counted.n_items[:6].tolist() == [0, 1, 1, 4, 0, 2]
    assert tiled.n_items[:6].tolist() == [0, 1, 1, 1, 0, 1]
    assert [tiled.media[kind] for kind in tiled.item_kind[:4]] == [Image(504, 504)] * 2 + [
        Image(1008, 1008),
        Image(1008, 504),
    ]
    assert counted.text_tokens.tolist() == tiled.text_tokens.tolist()
    pixels = [sum(item.width * item.height for item in map(r.media.__getitem__, r.item_kind)) for r in (counted, tiled)]
    assert pixels[0] == pixels[1]


def test_azure_times_may_name_a_zone_and_lack_a_fraction(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00.009930+00:00,10,5\n2024-05-10 00:00:01+00:00,10,0\n"
    )
    requests = traffic.read(path)
    assert requests.arrival_s.tolist() == pytest.approx([0.0, 0.99007])
    assert requests.notes == ("1 request with no generated tokens: counted as one",)


def test_sessions_of_burstgpt_are_conversations():
    requests = traffic.read(fixture("burstgpt"))
    later = requests.after >= 0
    assert later.sum() == 10
    assert (
        requests.arrival_s[later] > 50
    ).all()  # a turn of each session in five minutes, each answered in two seconds
    said = requests.text_tokens[requests.after] + requests.output_tokens[requests.after]
    assert (requests.shared_text_tokens[later] == said[later]).all()
    assert (requests.parent == requests.after).all()


def test_mooncake_lines_come_back_as_they_went(tmp_path):
    requests = traffic.read(fixture("mooncake"))
    mooncake.write(requests, tmp_path / "m.jsonl")
    again = traffic.read(tmp_path / "m.jsonl")
    for column in COLUMNS:
        assert getattr(again, column) == pytest.approx(getattr(requests, column), abs=1e-9)


def test_real_mooncake_lines_come_back_as_they_went(shared_data, tmp_path):
    requests = traffic.read(shared_data / "data/traces/mooncake/conversation_trace.jsonl")
    mooncake.write(requests, tmp_path / "m.jsonl")
    again = traffic.read(tmp_path / "m.jsonl")
    for column in COLUMNS:
        assert (getattr(again, column) == getattr(requests, column)).all()


def test_blocks_that_prompts_share_have_equal_ids(tmp_path):
    links = {"parent": np.array([-1, 0, 1, 0]), "shared_text_tokens": np.array([0, 1100, 2000, 1500])}
    text, output = np.array([1500, 1300, 2100, 1500]), np.array([700, 900, 5, 5])
    mooncake.write(requests_of(np.arange(4.0), text, output, links=links), tmp_path / "m.jsonl")
    ids = [json.loads(line)["hash_ids"] for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [len(blocks) for blocks in ids] == [3, 3, 5, 3]
    assert ids[1][:2] == ids[0][:2]  # 1,100 tokens are two blocks
    assert ids[1][2] != ids[0][2]
    assert ids[2][:2] == ids[1][:2]
    assert ids[2][2] not in ids[1]  # a block that reaches into the answer
    assert ids[3] == ids[0]  # the same prompt as a whole, its short last block too
    again = traffic.read(tmp_path / "m.jsonl")
    assert again.shared_text_tokens.tolist() == [0, 1024, 1024, 1500]


def test_pictures_become_tokens_of_mooncake_lines(tmp_path):
    items = Items.same(2, 2, Image(280, 280))
    requests = requests_of(np.arange(2.0), np.array([5, 6]), np.array([3, 3]), items=items)
    mooncake.write(requests, tmp_path / "m.jsonl", SERVICE)
    again = traffic.read(tmp_path / "m.jsonl")
    assert again.text_tokens.tolist() == resolve(requests, SERVICE).prompt_tokens
    with pytest.raises(ValueError, match="a picture is no tokens without a model"):
        mooncake.write(requests, tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match="requests that follow on answers have no times"):
        mooncake.write(traffic.preset("text-chat", 1.0, 20), tmp_path / "m.jsonl")


def test_tables_have_priorities_and_patience(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("arrival_s,text_tokens,output_tokens,priority,patience_s\n0,5,5,2,1.5\n1,5,5,,\n")
    requests = traffic.read(path)
    assert requests.priority.tolist() == [2, 0]
    assert requests.patience_s.tolist() == [1.5, np.inf]
    path.write_text(path.read_text().replace("1.5", "0"))
    assert "line 2: patience_s='0' must be more than 0" in refusal(path)


def test_a_table_whose_pictures_have_no_size_is_refused(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("arrival_s,text_tokens,output_tokens,items\n0,5,5,2\n")
    assert "items='2' has no images, width and height" in refusal(path)


def test_a_guidellm_report_with_several_benchmarks_needs_a_name(tmp_path):
    report = json.loads(fixture("guidellm").read_text())
    second = json.loads(json.dumps(report["benchmarks"][0]))
    second["requests"]["successful"] = second["requests"]["successful"][:7]
    path = tmp_path / "g.json"
    path.write_text(json.dumps({"benchmarks": [report["benchmarks"][0], second]}))
    assert "benchmarks has 2; name one, such as g.json:benchmark=0" in refusal(path)
    requests = traffic.read(path, options={"benchmark": "1"})
    assert len(requests) == 7
    assert "17 requests answered and not in the file, which keeps a sample: left out" in requests.notes


@pytest.mark.parametrize(("setting", "burst"), [({"request_rate": 2.0}, False), ({"request_rate": "inf"}, True)])
def test_a_result_without_start_times_comes_as_the_tool_sends(tmp_path, setting, burst):
    held = json.loads(fixture("vllm_bench").read_text())
    del held["start_times"]
    path = tmp_path / "v.json"
    path.write_text(json.dumps({**held, **setting, "max_concurrency": 4}))
    requests = traffic.read(path)
    assert (np.ptp(requests.arrival_s) == 0) == burst
    assert requests.concurrency == (4 if burst else 0)
    assert "arrivals are drawn" in requests.notes[-1]


# ServeGen


def test_the_fixture_of_servegen_keeps_rates_and_shares():
    requests = traffic.read(fixture("servegen"), rate=2.0)
    assert len(requests) == pytest.approx(2.0 * 24 * 600, rel=1e-3)
    assert (requests.n_items == 3).mean() == pytest.approx(0.2, abs=0.01)
    assert (requests.output_tokens == 100).mean() == pytest.approx(0.6, abs=0.01)
    windows = np.bincount((requests.arrival_s // 600).astype(int), minlength=24)
    assert (windows[::3] == 0).all()  # silent windows stay silent
    assert windows[1] == pytest.approx(windows[2], abs=2)


def test_seeds_of_servegen_and_where_it_begins():
    one, two = (traffic.read(fixture("servegen"), seed=seed) for seed in (1, 2))
    assert one.arrival_s.tobytes() != two.arrival_s.tobytes()
    late = traffic.read(fixture("servegen"), n=20, options={"start": "7200"})
    assert late.arrival_s[0] > 600  # the first window from there on is a silent one


def test_gaps_of_a_servegen_client_are_as_bursty_as_its_shape_says():
    rng = np.random.default_rng(0)
    for family, shape, cv in (("Gamma", 0.25, 2.0), ("Weibull", 0.5, 5**0.5), ("Gamma", 4.0, 0.5)):
        gaps = np.diff(servegen._within(family, shape, 200_000, rng))
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"audio_count": "{0: 0.5, 1: 0.5}"}, "audio_count="),
        ({"text_tokens": "{40: 0.5}"}, "probabilities that add up to 1"),
        ({"text_tokens": "[1, 2]"}, "must be a mapping of counts"),
        ({"text_tokens": "__import__('os')"}, "must be a mapping of counts"),
        ({"output_tokens": 5}, "output_tokens=5 must be a text"),
        ({"image_tokens": None}, "image_tokens is missing"),
    ],
)
def test_wrong_spreads_of_servegen_are_refused(tmp_path, change, words):
    folder = tmp_path / "mm"
    shutil.copytree(fixture("servegen"), folder)
    path = folder / "chunk-1-dataset.json"
    held = json.loads(path.read_text())
    held["0"].update(change)
    path.write_text(json.dumps(held))
    message = refusal(folder)
    assert "chunk-1-dataset.json, 0: " in message
    assert words in message


def test_a_servegen_client_needs_both_its_files(tmp_path):
    folder = tmp_path / "mm"
    shutil.copytree(fixture("servegen"), folder)
    (folder / "chunk-0-dataset.json").unlink()
    assert "chunk-0-trace.csv has no chunk-0-dataset.json beside it" in refusal(folder)


def folder_figures(folder):
    """Return rate and, by column, values and weights of a ServeGen folder, straight from its files."""
    clients, pooled = servegen._clients(folder), {}
    for client in clients:
        which = np.searchsorted(client.begins, np.arange(len(client.rates)) * 600, side="right") - 1
        for index, spread in enumerate(client.spreads):
            weight = client.rates[which == index].sum()
            counts = servegen._histogram(spread, "image_count")
            for key in ("text_tokens", "output_tokens", "image_count", "image_tokens"):
                values, shares = servegen._histogram(spread, key)
                held = pooled.setdefault(key, {})
                scale = weight * (np.dot(*counts) if key == "image_tokens" else 1.0)
                for value, share in zip(values.tolist(), shares.tolist(), strict=True):
                    held[value] = held.get(value, 0.0) + scale * share
    rate = sum(client.rates.sum() for client in clients) / len(clients[0].rates)
    return rate, {
        key: (np.array(sorted(held)), np.array([held[v] for v in sorted(held)])) for key, held in pooled.items()
    }


def test_real_servegen_keeps_its_statistics(shared_data):
    folder = shared_data / "data/traces/servegen-mm-image"
    rate, spreads = folder_figures(folder)
    requests = traffic.read(folder)
    assert len(requests) / 86_400 == pytest.approx(rate, rel=1e-6)
    assert rate == pytest.approx(7.955, rel=1e-3)  # 84 % of the 9.47 requests a second of all 35 clients
    sizes = np.array([round(item.width * item.height / 784) for item in requests.media])
    drawn = {
        "text_tokens": requests.text_tokens,
        "output_tokens": requests.output_tokens,
        "image_count": requests.n_items,
        "image_tokens": sizes[requests.item_kind],
    }
    for key, (values, weights) in spreads.items():
        assert drawn[key].mean() == pytest.approx(np.average(values, weights=weights), rel=0.01), key
        reached = np.cumsum(weights) / weights.sum()
        for share in (0.25, 0.5, 0.75, 0.9, 0.99):
            low, high = values[np.searchsorted(reached, [share - 0.003, share + 0.003])]
            assert low * 0.98 <= np.percentile(drawn[key], 100 * share) <= high * 1.02, (key, share)
    windows = np.bincount((requests.arrival_s // 600).astype(int)) / 600
    assert windows.max() / windows.mean() == pytest.approx(1.49, abs=0.02)


def test_real_mooncake_keeps_its_statistics_when_stretched(shared_data):
    path = shared_data / "data/traces/mooncake/conversation_trace.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    requests = traffic.read(path, rate=3.0)
    assert len(requests) == len(rows)
    assert (len(rows) - 1) / np.ptp(requests.arrival_s) == pytest.approx(3.0)
    assert requests.text_tokens.sum() == sum(row["input_length"] for row in rows)
    assert requests.output_tokens.sum() == sum(row["output_length"] for row in rows)
