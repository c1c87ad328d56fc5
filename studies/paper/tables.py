"""Write `tables.md` and `taxonomy.svg`: the survey's taxonomy and its tables of methods, from the catalogue.

The survey's figure is a tree of methods by stage; its tables list what methods of prefilling (Table 2) and decoding
(Table 3) do. Every cell here comes from `costmodel/techniques/catalogue/`; what no source says stays "not found". Run
`python -m studies.paper.tables` after the catalogue changes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any, Final

from costmodel.techniques import technique_names
from costmodel.techniques.method import CONFIDENCE, SOURCE_LETTERS, MethodFile, load_method

COLUMNS: Final = (
    "method",
    "where",
    "primitives",
    "default",
    "costs itself",
    "kept quality",
    "published effect",
    "sure",
)
TABLES: Final[Mapping[str, str]] = {
    "Table 2: prefilling": "Prefilling",
    "Table 3: decoding": "Decoding",
    "Encoding": "Encoding",
    "Frontiers and serving": "Frontiers|Serving",
}
"""Headings, and the roots of the taxonomy whose methods each table lists."""
INDENT, LINE, LEFT = 26, 18, 12
"""Of the drawing: step to the right a level, line height, and margin [px]."""
WIDTH: Final = 900
WRAP: Final = 105
HEAD: Final = """# Methods: taxonomy and tables of the survey, from the catalogue

Written by `python -m studies.paper.tables` from `costmodel/techniques/catalogue/`. The survey (arXiv:2604.05546) prints
one line a method; the columns here are what this project holds of each. A method stands in every branch in which the
figure has it. "not found" is what sources leave open: it is never guessed.
"""


def tree() -> dict[str, Any]:
    """Return the taxonomy: branches by name, down to lists of methods."""
    root: dict[str, Any] = {}
    for identity, leaf in leaves():
        *branches, last = leaf.split("/")
        node = root
        for branch in branches:
            node = node.setdefault(branch, {})
        node.setdefault(last, []).append(load_method(identity).name)
    return root


def leaves() -> Iterator[tuple[str, str]]:
    """Yield every method with each leaf of the taxonomy that has it, in the figure's order."""
    order = ("Encoding", "Prefilling", "Decoding", "Frontiers", "Serving")
    pairs = [(identity, leaf) for identity in technique_names() for leaf in load_method(identity).taxonomy]
    return iter(sorted(pairs, key=lambda pair: (order.index(pair[1].split("/")[0]), pair[1], pair[0])))


def outline(node: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[int, str]]:
    """Yield the lines of a tree with their depth."""
    for name, below in node.items():
        if isinstance(below, dict):
            yield depth, name
            yield from outline(below, depth + 1)
        else:
            yield depth, f"{name}: {', '.join(below)}"


def report() -> str:
    """Return the taxonomy and all tables as Markdown."""
    lines = [f"{'  ' * depth}- {text}" for depth, text in outline(tree())]
    parts = [HEAD, "## Taxonomy\n", "![Taxonomy](taxonomy.svg)\n", "\n".join(lines) + "\n"]
    for heading, roots in TABLES.items():
        parts.append(f"## {heading}\n\n{_markdown(roots.split('|'))}")
    sure = "; ".join(f"{letter}: {meaning}" for letter, meaning in CONFIDENCE.items())
    sources = "; ".join(f"{letter}: {meaning}" for letter, meaning in SOURCE_LETTERS.items())
    left = [load_method(i).name for i in technique_names() if not load_method(i).taxonomy]
    parts.append(
        f"Sure: {sure}. Letters of sources: {sources}. In the catalogue beyond the survey: {', '.join(left)}.\n"
    )
    return "\n".join(parts)


def _markdown(roots: list[str]) -> str:
    found = dict.fromkeys(identity for identity, leaf in leaves() if leaf.split("/")[0] in roots)
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(_cells(load_method(identity)) for identity in found)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"


def _cells(file: MethodFile) -> tuple[str, ...]:
    stated = file.stated
    uses = " + ".join(use.kind for use in file.primitives) or "none"
    name = f"{file.name} ({file.paper.arxiv})"
    cells = (name, stated.where, uses, stated.defaults, stated.overheads, stated.quality, stated.published)
    return (*(cell.replace("|", "\\|") for cell in cells), file.confidence)


def drawing() -> str:
    """Return the taxonomy as SVG: an indented tree, long lists of methods wrapped."""
    lines = [(depth, part) for depth, text in outline(tree()) for part in _wrapped(text, WRAP - 3 * depth)]
    height = LINE * (len(lines) + 1)
    body = [
        f'<text x="{LEFT + INDENT * depth}" y="{LINE * row}" font-weight="{"bold" if not depth else "normal"}">'
        f"{escape(text)}</text>"
        for row, (depth, text) in enumerate(lines, start=1)
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif"'
    return "\n".join(['<?xml version="1.0" encoding="utf-8"?>', f'{head} font-size="13">', *body, "</svg>"]) + "\n"


def _wrapped(text: str, width: int) -> list[str]:
    """Return a line in pieces, those after the first set in."""
    import textwrap  # needed here alone

    return textwrap.wrap(text, width, subsequent_indent="\u00a0" * 6)


def main() -> None:
    """Write tables.md and taxonomy.svg into the output folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("studies/paper"))
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    (output / "tables.md").write_text(report(), encoding="utf-8")
    (output / "taxonomy.svg").write_text(drawing(), encoding="utf-8")
    print(f"wrote {output / 'tables.md'} and {output / 'taxonomy.svg'}")


if __name__ == "__main__":
    main()
