"""The shape of the code, held by reading it: who imports whom, what stays out, units in names, sizes.

A rule is a function from one parsed module to its violations. Each runs over every module of the packages, and over
small pieces of bad and good code that show what it catches.
"""

import ast
import functools
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Package -> the project's packages that it may import.
MAY_IMPORT = {
    "hardware_profiles": set(),
    "costmodel": {"costmodel"},
    "simulator": {"costmodel", "simulator"},
    "runtime": {"costmodel", "runtime"},
    "studies": {"costmodel", "hardware_profiles", "runtime", "simulator", "studies"},
}
OURS = {*MAY_IMPORT, "tests"}
COSTMODEL_NEVER = {"matplotlib", "rich", "scipy", "simpy", "torch"}
COSTMODEL_AT_IMPORT = {"costmodel", "numpy", "pydantic", "pydantic_core", *sys.stdlib_module_names}

# What the extras install: importing the packages must work, and stay quick, without them.
EXTRAS = [
    "torch",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "pynvml",
    "polars",
    "pyarrow",
    "av",
    "optuna",
    "plotly",
    "streamlit",
    "dask",
    "distributed",
    "sphinx",
]
IMPORTED_WITHOUT_EXTRAS = ["costmodel", "simulator", "studies.cli", "runtime", "runtime.calibrate", "runtime.compare"]

LOOSE_QUANTITY = re.compile(r"(^|_)(time|energy|bandwidth|size|power|latency|price|memory|duration)$")
NOT_SI = re.compile(r"_(ms|us|ns|kb|mb|gb|tb|kib|mib|gib|gflops|tflops|gbps)$")
NUMERIC = re.compile(r"^(float|int)\d*$|Float|Int$|[aA]rray|Decimal|Number|Quantity")
WORD = re.compile(r"[A-Za-z_]\w*")

MAX_FUNCTION_LINES, MAX_MODULE_LINES = 40, 350
LONG_FUNCTIONS: set[str] = set()  # "package/module.py:function", each with its reason
LONG_MODULES: set[str] = set()  # "package/module.py", each with its reason

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Module:
    path: PurePosixPath  # relative to the repository
    text: str

    @property
    def package(self) -> str:
        return self.path.parts[0]

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, str(self.path))


@functools.cache
def load_modules() -> list[Module]:
    files = sorted(file for package in MAY_IMPORT for file in (ROOT / package).rglob("*.py"))
    return [Module(PurePosixPath(file.relative_to(ROOT)), file.read_text(encoding="utf-8")) for file in files]


# Rules


def imported(module: Module, node: ast.AST, *, lazy: bool = False) -> Iterator[tuple[str, bool, int]]:
    """Yield the first part of each name imported under `node`, whether that waits for a call, and the line."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import(names=names):
                dotted = [alias.name for alias in names]
            case ast.ImportFrom(module=name, level=0):
                dotted = [name or ""]
            case ast.ImportFrom(module=name, level=level):
                parents = module.path.parts[:-1]
                dotted = [".".join([*parents[: len(parents) - level + 1], name or ""])]
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                dotted = [name]
            case _:
                dotted = []
        yield from ((name.partition(".")[0], lazy, child.lineno) for name in dotted)
        yield from imported(module, child, lazy=lazy or isinstance(child, FUNCTION))


def imports_point_one_way(module: Module) -> Iterator[str]:
    for name, _, line in imported(module, module.tree):
        if module.package == "hardware_profiles" or (name in OURS and name not in MAY_IMPORT[module.package]):
            yield f"{module.path}:{line} {module.package} must not import {name or 'beyond its package'}"


def costmodel_is_light(module: Module) -> Iterator[str]:
    if module.package != "costmodel":
        return
    for name, lazy, line in imported(module, module.tree):
        if name in COSTMODEL_NEVER:
            yield f"{module.path}:{line} costmodel never imports {name}"
        elif not lazy and name not in COSTMODEL_AT_IMPORT:
            yield f"{module.path}:{line} costmodel imports {name} inside a function or not at all"


def prints_only_in_studies(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Name) and node.id == "print" and module.package != "studies":
            yield f"{module.path}:{node.lineno} print outside studies/"


def no_star_imports(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            yield f"{module.path}:{node.lineno} star import"


def spellings_of_cache(tree: ast.Module) -> Iterator[str]:
    """Yield each way in which a module may say functools.cache, by what it imports: `functools.cache`, `cache`, `c`."""
    caches = ("cache", "lru_cache")
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                owners = [alias.asname or alias.name for alias in names if alias.name == "functools"]
                yield from (f"{owner}.{cache}" for owner in owners for cache in caches)
            case ast.ImportFrom(module="functools", names=names):
                yield from (alias.asname or alias.name for alias in names if alias.name in caches)


def only_loaders_are_cached(module: Module) -> Iterator[str]:
    spellings = set(spellings_of_cache(module.tree))
    loaders = [node for node in module.tree.body if isinstance(node, FUNCTION) and re.match(r"_?load_", node.name)]
    allowed = {id(node) for loader in loaders for decorator in loader.decorator_list for node in ast.walk(decorator)}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node) in spellings and id(node) not in allowed:
            yield f"{module.path}:{node.lineno} functools.cache is for module functions called load_… or _load_…"


def no_vectorize(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        used = isinstance(node, ast.Attribute) and node.attr == "vectorize"
        if used or (isinstance(node, ast.ImportFrom) and any(alias.name == "vectorize" for alias in node.names)):
            yield f"{module.path}:{node.lineno} np.vectorize is a loop; write the formula for arrays"


@functools.cache
def load_numeric_aliases() -> set[str]:
    """Names that costmodel gives to numeric types, `Rate = Annotated[float, …]`, aliases of aliases included."""
    pairs = [
        (target.id, ast.unparse(node.value))
        for module in load_modules()
        for node in module.tree.body
        if module.package == "costmodel" and isinstance(node, ast.Assign | ast.AnnAssign) and node.value
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    ]
    found: set[str] = set()
    for _ in range(3):
        found |= {name for name, value in pairs if is_numeric(value, found)}
    return found


def is_numeric(annotation: str, aliases: set[str]) -> bool:
    return any(word in aliases or NUMERIC.search(word) for word in WORD.findall(annotation))


def numeric_fields_name_their_unit(module: Module) -> Iterator[str]:
    # Families read foreign config files: `hidden_size` there is the file's own name, and a count.
    if module.package != "costmodel" or "families" in module.path.parts:
        return
    for owner in (node for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)):
        for field in owner.body:
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            name, annotation = field.target.id, ast.unparse(field.annotation)
            unclear = LOOSE_QUANTITY.search(name) or NOT_SI.search(name)
            if unclear and "ClassVar" not in annotation and is_numeric(annotation, load_numeric_aliases()):
                yield f"{module.path}:{field.lineno} {owner.name}.{name} needs an SI unit: _s, _bytes, _j, …"


def functions_fit_on_a_screen(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if not isinstance(node, FUNCTION):
            continue
        body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
        lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
        if lines > MAX_FUNCTION_LINES and f"{module.path}:{node.name}" not in LONG_FUNCTIONS:
            yield f"{module.path}:{node.lineno} {node.name} has {lines} lines; at most {MAX_FUNCTION_LINES}"


def modules_stay_short(module: Module) -> Iterator[str]:
    lines = len(module.text.splitlines())
    if lines > MAX_MODULE_LINES and str(module.path) not in LONG_MODULES:
        yield f"{module.path} has {lines} lines; at most {MAX_MODULE_LINES}"


RULES: list[Callable[[Module], Iterator[str]]] = [
    imports_point_one_way,
    costmodel_is_light,
    prints_only_in_studies,
    no_star_imports,
    only_loaders_are_cached,
    no_vectorize,
    numeric_fields_name_their_unit,
    functions_fit_on_a_screen,
    modules_stay_short,
]

FORTY_LINES = "def f():\n    '''Doc.'''\n" + "    x = 1\n" * 40

BAD = [
    (imports_point_one_way, "hardware_profiles/__init__.py", "import json"),
    (imports_point_one_way, "costmodel/a.py", "import hardware_profiles"),
    (imports_point_one_way, "costmodel/a.py", "from simulator.engine import simulate"),
    (imports_point_one_way, "costmodel/a.py", "import importlib\nimportlib.import_module('runtime.measure')"),
    (imports_point_one_way, "simulator/a.py", "def f():\n    from runtime import measure"),
    (imports_point_one_way, "simulator/systems/a.py", "from studies import cli"),
    (imports_point_one_way, "runtime/a.py", "import numpy, simulator.engine as e"),
    (imports_point_one_way, "studies/a.py", "from tests import conftest"),
    (costmodel_is_light, "costmodel/a.py", "def f():\n    import scipy.optimize"),
    (costmodel_is_light, "costmodel/a.py", "from PIL import Image"),
    (costmodel_is_light, "costmodel/a.py", "if True:\n    import av"),
    (costmodel_is_light, "costmodel/a.py", "class A:\n    import tomlkit"),
    (prints_only_in_studies, "simulator/a.py", "print(1)"),
    (prints_only_in_studies, "costmodel/a.py", "def f():\n    return map(print, [])"),
    (no_star_imports, "studies/a.py", "from costmodel import *"),
    (only_loaders_are_cached, "costmodel/a.py", "import functools\n@functools.cache\ndef gemm(): ..."),
    (only_loaders_are_cached, "costmodel/a.py", "from functools import lru_cache\n@lru_cache(maxsize=9)\ndef f(): ..."),
    (only_loaders_are_cached, "costmodel/a.py", "from functools import cache as load\n@load\ndef f(): ..."),
    (only_loaders_are_cached, "costmodel/a.py", "from functools import cache\nf = cache(len)"),
    (only_loaders_are_cached, "costmodel/a.py", "import functools as ft\n@ft.cache\ndef f(): ..."),
    (
        only_loaders_are_cached,
        "costmodel/a.py",
        "import functools\nclass A:\n    @functools.cache\n    def load_it(self): ...",
    ),
    (no_vectorize, "simulator/a.py", "import numpy as np\nf = np.vectorize(len)"),
    (no_vectorize, "simulator/a.py", "from numpy import vectorize"),
    (numeric_fields_name_their_unit, "costmodel/a.py", "class A:\n    step_time: float"),
    (numeric_fields_name_their_unit, "costmodel/a.py", "class A:\n    bandwidth: 'NDArray[np.float64] | None' = None"),
    (numeric_fields_name_their_unit, "costmodel/a.py", "class A:\n    latency_ms: PositiveInt"),
    (functions_fit_on_a_screen, "studies/a.py", FORTY_LINES + "    x = 2\n"),
    (functions_fit_on_a_screen, "studies/a.py", "class A:\n    async def f(self):\n" + "        x = 1\n" * 41),
    (modules_stay_short, "runtime/a.py", "x = 1\n" * 351),
]

GOOD = [
    (imports_point_one_way, "hardware_profiles/__init__.py", "'''Data.'''"),
    (imports_point_one_way, "costmodel/families/a.py", "from ..models import ModelSpec\nfrom . import b"),
    (imports_point_one_way, "simulator/a.py", "from costmodel import predict\nfrom .request import Request"),
    (imports_point_one_way, "studies/a.py", "import simulator, runtime, costmodel, hardware_profiles"),
    (costmodel_is_light, "costmodel/a.py", "import numpy as np\nfrom importlib.resources import files"),
    (costmodel_is_light, "costmodel/a.py", "def f():\n    from PIL import Image"),
    (costmodel_is_light, "simulator/a.py", "import simpy"),
    (prints_only_in_studies, "studies/cli.py", "print(1)"),
    (only_loaders_are_cached, "costmodel/a.py", "from functools import cache\n@cache\ndef _load_names(): ..."),
    (
        only_loaders_are_cached,
        "costmodel/a.py",
        "import functools\n@functools.lru_cache(maxsize=1)\ndef load_it(): ...",
    ),
    (only_loaders_are_cached, "costmodel/a.py", "from functools import cached_property as lazy, reduce"),
    (only_loaders_are_cached, "simulator/a.py", "import functools\ncache = {}\nworker.cache = cache"),
    (
        numeric_fields_name_their_unit,
        "costmodel/a.py",
        "class A:\n    time_s: float\n    memory: Memory\n    n_layers: int",
    ),
    (numeric_fields_name_their_unit, "costmodel/a.py", "class A:\n    price: Fingerprint | None"),
    (numeric_fields_name_their_unit, "costmodel/families/a.py", "class A:\n    hidden_size: int"),
    (functions_fit_on_a_screen, "studies/a.py", FORTY_LINES),
    (modules_stay_short, "runtime/a.py", "x = 1\n" * 350),
]


@pytest.mark.parametrize("rule", RULES)
def test_every_module_keeps_the_rule(rule):
    assert [violation for module in load_modules() for violation in rule(module)] == []


@pytest.mark.parametrize(("rule", "path", "code"), BAD)
def test_rule_catches_bad_code(rule, path, code):
    assert list(rule(Module(PurePosixPath(path), code)))


@pytest.mark.parametrize(("rule", "path", "code"), GOOD)
def test_rule_passes_good_code(rule, path, code):
    assert list(rule(Module(PurePosixPath(path), code))) == []


def test_exceptions_to_sizes_are_still_needed():
    paths = {str(module.path) for module in load_modules()}
    assert {entry.partition(":")[0] for entry in LONG_FUNCTIONS | LONG_MODULES} <= paths


# Imports for real


IMPORT_WITHOUT = """
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[2:]:
            raise AssertionError(f"{name} was asked for")  # not ImportError: a caught attempt counts too

sys.meta_path.insert(0, Absent())
importlib.import_module(sys.argv[1])
"""


@pytest.mark.parametrize("name", IMPORTED_WITHOUT_EXTRAS)
def test_imports_without_torch_and_other_extras(name):
    file = ROOT.joinpath(*name.split("."))
    if not (file.with_suffix(".py").is_file() or (file / "__init__.py").is_file()):
        pytest.skip(f"{name} is not written yet")
    command = [sys.executable, "-c", IMPORT_WITHOUT, name, *EXTRAS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def all_order(name: str) -> tuple[int, str]:
    """Order names as ruff's RUF022 does: constants, classes, the rest."""
    kind = 0 if name.isupper() else 1 if name[0].isupper() else 2
    return kind, name


def test_public_names_of_costmodel():
    if not (ROOT / "costmodel" / "__init__.py").is_file():
        pytest.skip("costmodel is not written yet")
    costmodel = importlib.import_module("costmodel")
    names = list(costmodel.__all__)
    assert names == sorted(set(names), key=all_order)
    for name in names:
        value = getattr(costmodel, name)
        if inspect.isclass(value) or inspect.isroutine(value):
            doc = value.__doc__ or ""
            assert doc.strip(), f"costmodel.{name} has no docstring"
            assert not doc.startswith(f"{name}("), f"costmodel.{name} has only the docstring that dataclass makes"
