"""The README's code runs: Python blocks as they stand, `lvlm` commands of the table and the blocks with real files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from matplotlib import cbook

from studies.cli import main

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")
FOUND = re.findall(r"^(lvlm .+)$|`(lvlm .+?)`", TEXT, flags=re.MULTILINE)
COMMANDS = sorted(command for command in {block or quoted for block, quoted in FOUND} if "…" not in command)


def test_python_blocks_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(README), "exec"), {})  # noqa: S102 - our own text
    assert "TTFT" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, tmp_path, monkeypatch, capsys):
    photo = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    monkeypatch.chdir(tmp_path)
    config = README.parent / "costmodel" / "model_configs" / "llava-1.5-7b.json"
    run = README.parent / "tests" / "simulator" / "fixtures" / "vllm_bench.good.json"
    files = {"photo.jpg": str(photo), "config.json": str(config), "measured.json": str(run), "run.json": str(run)}
    arguments = [files.get(part, part) for part in shlex.split(command)[1:]]
    assert main(arguments) == 0, capsys.readouterr().err


def test_every_link_to_a_file_leads_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT)
    assert links
    missing = [link for link in links if not (README.parent / link).exists()]
    assert not missing
