"""`lvlm techniques`, and the tables and the tree that are made from the catalogue."""

import csv
import io
import json
import sys
from pathlib import Path

import pytest

from costmodel.techniques import technique_names
from studies.cli import main
from studies.paper import tables


def answer(capsys, *arguments):
    assert main(["techniques", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_list_has_every_method(capsys):
    found = answer(capsys)["techniques"]
    assert [row["id"] for row in found] == technique_names()
    assert all(row["defaults"] and row["title"] and row["confidence"] in "ABCD" for row in found)
    assert main(["techniques", "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["id"] for row in rows] == technique_names()


@pytest.mark.parametrize("name", technique_names())
def test_everything_known_of_one_is_for_programs(name, capsys):
    (found,) = answer(capsys, name)["techniques"]
    assert {"stated", "settings", "uses", "arguments", "quality", "efficiency", "variants", "paper"} <= set(found)
    assert bool(found["arguments"]) == bool(found["uses"])
    assert all(point["retention"] > 0 for point in found["quality"])


def test_an_alias_and_a_primitive_are_found_and_nonsense_is_not(capsys):
    assert answer(capsys, "LOOK-M")["inputs"] == {"name": "lookm"}
    (found,) = answer(capsys, "token_reduce")["techniques"]
    assert {"at", "keep", "schedule"} <= set(found["parameters"])
    assert main(["techniques", "fastw"]) == 2
    assert capsys.readouterr().err.startswith("lvlm: unknown technique 'fastw'; did you mean 'fastv'?")


def test_text_says_what_is_published_and_what_is_not(capsys):
    assert main(["techniques", "fastv"]) == 0
    shown = capsys.readouterr().out
    for piece in ("A-OKVQA", "81.9", "token_reduce: at=layer, layer=2, keep=0.5", "lmms-eval"):
        assert piece in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert main(["techniques", "longvlm"]) == 0
    shown = capsys.readouterr().out
    assert "must be given: keep" in shown
    assert "not found" in shown
    assert main(["techniques", "spaceserve"]) == 0
    assert "rewrites no request" in capsys.readouterr().out


def test_csv_of_one_has_a_row_a_published_value(capsys):
    assert main(["techniques", "visionzip", "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {row["kind"] for row in rows} == {"efficiency", "quality"}
    prefill = next(row for row in rows if row["what"] == "prefill latency" and row["baseline"] == "218.0")
    assert float(prefill["ratio"]) == pytest.approx(27.8 / 218)


# Tables of the survey


def test_every_method_of_the_survey_is_in_the_tree_and_in_a_table():
    text = tables.report()
    placed = {identity for identity, _ in tables.leaves()}
    assert set(technique_names()) - placed == {"lvspec", "parallelvlm"}
    for leaf, size in {"Diversity-guided": 16, "Attention-guided": 13, "Bit-level": 3, "Head-level": 2}.items():
        (line,) = (line for _, line in tables.outline(tables.tree()) if line.startswith(f"{leaf}: "))
        assert len(line.split(", ")) == size
    for identity in placed:
        assert f"| {tables.load_method(identity).name} (" in text


def test_committed_tables_are_what_the_catalogue_gives(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tables", "-o", str(tmp_path)])
    tables.main()
    assert "wrote" in capsys.readouterr().out
    for name in ("tables.md", "taxonomy.svg"):
        committed = Path(tables.__file__).with_name(name).read_text(encoding="utf-8")
        assert (tmp_path / name).read_text(encoding="utf-8") == committed
