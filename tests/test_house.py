"""The arrows of the house: the core knows no edge, and help waits for no torch.

Every rule is a function of a source folder, so that a copy with a planted fault shows that it can fail.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

import isograd

SOURCE = Path(isograd.__file__).parent
EDGES = ("cli", "render", "sinks", "integrations", "pytest_plugin")
# A diagnosis prints itself: it asks the renderer when it is printed, and not before.
GRANTED = {
    ("diagnosis.py", "isograd.render"),
    ("prescription.py", "isograd.render"),
    ("repair.py", "isograd.render"),
    ("spectrum.py", "isograd.render"),
    ("horizon.py", "isograd.render"),
    ("proof.py", "isograd.render"),
    ("trainability.py", "isograd.render"),
}
HARD_DEPENDENCIES = {"torch", "click", "rich", "msgspec", "cloudpickle"}
WITHOUT_TORCH = ["--help", "--version", "check --help", "explain", "explain VG101"]


def files(source: Path) -> list[str]:
    return sorted(path.relative_to(source).as_posix() for path in source.rglob("*.py"))


def imported(source: Path, file: str) -> Iterator[str]:
    """Full names of all that a file imports, at its top or in a function, and of `torch.…` attributes."""
    for node in ast.walk(ast.parse((source / file).read_text(encoding="utf-8"))):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom(module=str(module)):
                yield from (f"{module}.{alias.name}" for alias in node.names)
            case ast.Attribute(value=ast.Name(id="torch"), attr=attr):
                yield f"torch.{attr}"
            case _:
                pass


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def core_imports_of_edges(source: Path) -> list[str]:
    return [
        f"{file} imports {name}"
        for file in files(source)
        if file.split("/")[0].removesuffix(".py") not in EDGES and file != "__main__.py"
        for name in imported(source, file)
        for edge in EDGES
        if within(name, f"isograd.{edge}") and (file, f"isograd.{edge}") not in GRANTED
    ]


def layers_in_symptoms_and_render(source: Path) -> list[str]:
    return [
        f"{file} imports {name}"
        for file in files(source)
        if file.startswith(("symptoms/", "render/"))
        for name in imported(source, file)
        if within(name, "torch.nn")
    ]


def python(source: Path, program: str) -> str:
    """Standard output of a program that finds the package in `source`."""
    environment = {**os.environ, "PYTHONPATH": str(source.parent)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", env=environment, check=True
    )
    return done.stdout


def loaded(source: Path, program: str) -> set[str]:
    """Top-level names of the modules, other than Python's own, that a program has loaded when it ends."""
    report = "\nimport sys, json\nprint(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    names = json.loads(python(source, program + report).splitlines()[-1])
    return {name for name in names if name not in sys.stdlib_module_names and not name.startswith("_")}


@cache
def loaded_by_torch() -> set[str]:
    return loaded(SOURCE, "import torch")


def frameworks_loaded_by_the_verbs(source: Path) -> list[str]:
    verbs = loaded(source, "import isograd\nfor name in isograd.__all__: getattr(isograd, name)")
    return sorted(verbs - loaded_by_torch() - HARD_DEPENDENCIES - {"isograd"})


def commands_that_need_torch(source: Path) -> list[str]:
    """Each is run where importing torch fails."""
    program = f"""
import contextlib, os, sys
sys.modules["torch"] = None
silence = open(os.devnull, "w")
for line in {WITHOUT_TORCH}:
    status = "not run"
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        try:
            from isograd.cli import main
            main(line.split())
        except SystemExit as left:
            status = left.code
        except ImportError:
            pass
    if status != 0:
        print("isograd", line)
"""
    return python(source, program).splitlines()


def modules_that_hide_a_verb(source: Path) -> list[str]:
    """`isograd.measure` stays the verb after `isograd/measure.py` was imported, whoever imported it first."""
    program = """
import importlib, pathlib, isograd
for path in pathlib.Path(isograd.__file__).parent.iterdir():
    name = path.stem
    if name in isograd.__all__:
        importlib.import_module(f"isograd.{name}")
        if not callable(getattr(isograd, name)):
            print(name)
"""
    return python(source, program).split()


RULES: list[tuple[Callable[[Path], list[str]], list[tuple[str, str]]]] = [
    (
        core_imports_of_edges,
        [
            ("flow.py", "from isograd.cli import main"),
            ("symptoms/dead_units.py", "def late():\n    import isograd.render.text"),
            ("diagnosis.py", "import isograd.pytest_plugin"),
        ],
    ),
    (
        layers_in_symptoms_and_render,
        [
            ("symptoms/dead_units.py", "from torch import nn"),
            ("render/text.py", "import torch.nn.functional as F"),
            ("render/text.py", "import torch\nlayer = torch.nn.Linear"),
        ],
    ),
    (frameworks_loaded_by_the_verbs, [("flow.py", "import sklearn")]),
    (
        commands_that_need_torch,
        [
            ("cli/explain.py", "import torch"),
            ("__init__.py", "from isograd import flow"),
            ("pages.py", "import torch"),
        ],
    ),
    (modules_that_hide_a_verb, [("__init__.py", "sys.modules[__name__].__class__ = ModuleType")]),
]


@pytest.mark.parametrize("rule", [rule for rule, _ in RULES], ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(rule: Callable[[Path], list[str]]) -> None:
    assert rule(SOURCE) == []


@pytest.mark.parametrize(
    ("rule", "file", "fault"),
    [
        pytest.param(rule, file, fault, id=f"{rule.__name__}-{file}")
        for rule, faults in RULES
        for file, fault in faults
    ],
)
def test_the_rule_sees_a_planted_fault(
    tmp_path: Path, rule: Callable[[Path], list[str]], file: str, fault: str
) -> None:
    copy = tmp_path / "isograd"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / file).open("a", encoding="utf-8") as source:
        source.write(f"\n{fault}\n")
    assert rule(copy) != []
