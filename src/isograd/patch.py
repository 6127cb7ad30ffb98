"""A prescription as Python for the user's script: the calls that `apply` makes, in the same order.

Equal edits of places that differ in one number become a loop. Helpers of isograd that the code calls are printed
with it, so that it needs torch only.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from inspect import getsource
from itertools import groupby, takewhile
from textwrap import indent

import torch

from isograd.edit import ROOTS, Edit, named, printed
from isograd.prescription import Prescription, combined

OURS = ("surgery", "modules", "recurrences", "calls")
LONG = 100
"""Characters after which a list of places is broken."""
FEWEST = 3
"""Places that a loop over a number is written for: two are read at a glance."""
NUMBER = re.compile(r"(?<!\d)(?:0|[1-9]\d*)(?!\d)")
"""One that is printed as it was written: without zeros in front."""


def code(rx: Prescription) -> str:
    """A module with `repair(model)`; see `Prescription.to_code`.

    Raises:
        ValueError: there are no edits.
    """
    whole = combined([rx])
    edits = [edit for edit in whole.edits if edit.verb != "configure"]
    body = "".join(_run(run) for run in _runs(edits))
    roots = {edit.of.split(".")[0] for edit in edits if not edit.of.startswith(".")}
    draws = any(map(_draws, edits))
    needed = ({"drawing"} if draws else set[str]()) | (
        {"put"} if any(e.verb in ("replace", "wrap") for e in edits) else set()
    )
    needed |= {edit.of.split(".")[1] for edit in edits if edit.of.split(".")[0] in OURS}
    helpers = _sources([root for root in OURS if root in roots | {"surgery"}], needed if edits else set())
    lines = [f"{_quoted(whole.remedy)}: {_quoted(whole.title)}", ""]
    lines += [_quoted(f"{whole.safety.value}: {SAFETY[whole.safety.value]}"), *map(_quoted, _told(whole))]
    opened = "drawing(model, seed), torch.no_grad()" if draws else "torch.no_grad()"
    taken = "model: nn.Module, seed: int = 0" if draws else "model: nn.Module"
    parts = ['"""' + "\n".join(lines).strip() + '\n"""\n']
    parts += helpers or ["import torch\nfrom torch import nn\n"]
    parts.append(
        f"\ndef repair({taken}) -> nn.Module:\n"
        f'    """{_quoted(whole.title)}. Call it before the optimizer is made."""\n'
        + (f"    with {opened}:\n" + indent(body, " " * 8) if edits else "")
        + "    return model\n"
    )
    return "\n".join(parts)


SAFETY = {
    "safe": "the model computes the same function",
    "unsafe": "the model computes another function; train it from here",
    "advice": "words only",
}


def _told(rx: Prescription) -> Iterator[str]:
    if rx.expected:
        yield f"Expected: {rx.expected}."
    for name, value in rx.configuration.items():
        yield f"In the training: {name} = {value!r}."
    yield from rx.advice
    yield from rx.references


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"""', "'''")


FIXED = {"nn.init.ones_", "nn.init.zeros_", "nn.init.constant_", "nn.init.eye_", "nn.init.dirac_"}


def _draws(edit: Edit) -> bool:
    """May the edit use random numbers?"""
    if edit.verb == "fill":
        return not edit.of.startswith(".") and edit.of not in FIXED
    if edit.verb == "replace" and edit.of.startswith("nn."):
        with torch.device("meta"):  # nothing is drawn there
            return any(True for _ in named(edit.of)(**edit.arguments).parameters())
    return edit.verb != "set"


# -- statements ----------------------------------------------------------------------------------------


def _runs(edits: Sequence[Edit]) -> Iterator[list[Edit]]:
    """Neighbours that differ in their place only."""
    for _, run in groupby(edits, key=lambda e: (e.verb, _leaf(e), e.of, repr(e.arguments), e.rows)):
        yield list(run)


def _leaf(edit: Edit) -> str:
    """The attribute's own name, where the statement spells it."""
    return edit.place.rpartition(".")[2] if edit.verb == "set" else ""


def _run(run: Sequence[Edit]) -> str:
    """One statement, or a loop over the places."""
    places = [edit.place.rpartition(".")[0] if edit.verb == "set" else edit.place for edit in run]
    if len(run) == 1:
        return _statement(run[0], _string(places[0])) + "\n"
    loops, name = _loops(places)
    depth = "    " * len(loops)
    opened = "".join("    " * i + loop + "\n" for i, loop in enumerate(loops))
    return f"{opened}{depth}{_statement(run[0], name)}\n"


def _loops(places: Sequence[str]) -> tuple[list[str], str]:
    """Headers of the loops that give the places in this order, and the name as an expression."""
    parts = list(_stretches(places))
    if len(parts) == 1 and isinstance(parts[0], Stretch):
        return [f"{loop}:" for loop in parts[0].loops], parts[0].name
    items = [_string(part) if isinstance(part, str) else f"*({part})" for part in parts]
    listed = ", ".join(items)
    if len(listed) > LONG:
        listed = "\n" + "".join(f"    {item},\n" for item in items)
    return [f"for name in ({listed}):"], "name"


@dataclass(frozen=True)
class Stretch:
    """Places that differ in a number which counts up, each number with the same endings."""

    head: str
    numbers: range
    tails: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.numbers) * len(self.tails)

    def __str__(self) -> str:
        return f"{self.name} {' '.join(self.loops)}"

    @property
    def loops(self) -> list[str]:
        first, last, step = self.numbers.start, self.numbers[-1] + 1, self.numbers.step
        span = f"{first}, {last}, {step}" if step > 1 else f"{first}, {last}" if first else f"{last}"
        inner = [f"for part in ({', '.join(map(_string, self.tails))})"] if len(self.tails) > 1 else []
        return [f"for i in range({span})", *inner]

    @property
    def name(self) -> str:
        tail = _braced(self.tails[0]) if len(self.tails) == 1 else "{part}"
        return f'f"{_braced(self.head)}{{i}}{tail}"'


def _stretches(places: Sequence[str]) -> Iterator[Stretch | str]:
    """The places in their order: stretches where a number counts up, and each other one by itself."""
    at = 0
    while at < len(places):
        found = [_stretch(places[at:], number.start()) for number in NUMBER.finditer(places[at])]
        longest = max((s for s in found if len(s.numbers) >= FEWEST), key=len, default=None)
        yield places[at] if longest is None else longest
        at += 1 if longest is None else len(longest)


def _stretch(places: Sequence[str], at: int) -> Stretch:
    """As many of the first places as the number counts up in that begins with character `at` of the first."""
    head = places[0][:at]
    found = [NUMBER.match(place, at) if place.startswith(head) else None for place in places]
    split = [(int(m[0]), m.string[m.end() :]) for m in takewhile(bool, found) if m]
    groups = [(i, tuple(tail for _, tail in group)) for i, group in groupby(split, key=lambda s: s[0])]
    first, tails = groups[0]
    step = max(groups[1][0] - first, 1) if len(groups) > 1 else 1
    even = takewhile(lambda g: g[1] == (first + g[0] * step, tails), enumerate(groups))
    return Stretch(head, range(first, first + step * sum(1 for _ in even), step), tails)


def _string(text: str) -> str:
    """A literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _braced(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}").replace("\\", "\\\\").replace('"', '\\"')


def _statement(edit: Edit, name: str) -> str:
    """The call of one edit, `name` being the expression of its place."""
    call = printed(edit)
    root, _, rest = call.partition(".")
    if root in OURS:
        call = rest
    match edit.verb:
        case "fill":
            rows = "" if edit.rows is None else f"[{edit.rows[0]}:{edit.rows[1]}]"
            tensor = f"model.get_parameter({name}){rows}"
            return f"{tensor}.{call}" if edit.of.startswith(".") else _with_first(call, tensor)
        case "alter":
            return _with_first(call, f"model.get_submodule({name})")
        case "set":
            return f"model.get_submodule({name}).{_leaf(edit)} = {call}"
        case "replace":
            return f"model = put(model, {name}, {call})"
        case _:
            return f"model = put(model, {name}, {_with_first(call, f'model.get_submodule({name})')})"


def _with_first(call: str, first: str) -> str:
    function, _, rest = call.partition("(")
    return f"{function}({first}{')' if rest == ')' else f', {rest}'}"


# -- helpers -------------------------------------------------------------------------------------------


@cache
def _statements(root: str) -> dict[str, tuple[str, frozenset[str], bool]]:
    """Top-level names of one of our files: source, the names it uses, and whether it is an import."""
    text = getsource(import_module(ROOTS[root]))
    found: dict[str, tuple[str, frozenset[str], bool]] = {}
    for node in ast.parse(text).body:
        uses = frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name))
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                start = min((d.lineno for d in node.decorator_list), default=node.lineno)
                source = "\n".join(text.splitlines()[start - 1 : node.end_lineno])
                found[node.name] = (source, uses, False)
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                found[name] = (ast.get_source_segment(text, node) or "", uses, False)
            case ast.Import() | ast.ImportFrom() if getattr(node, "module", "") != "__future__":
                for alias in node.names:
                    plain = f"from {node.module} import" if isinstance(node, ast.ImportFrom) else "import"
                    named = alias.name if alias.asname is None else f"{alias.name} as {alias.asname}"
                    found[alias.asname or alias.name.split(".")[0]] = (f"{plain} {named}", frozenset(), True)
            case _:
                pass
    return found


def _sources(roots: Sequence[str], wanted: set[str]) -> list[str]:
    """Imports, then every function and class that `wanted` needs, in the order of their files."""
    known = {name: entry for root in reversed(roots) for name, entry in _statements(root).items()}
    needed: set[str] = {"torch", "nn"} if wanted else set()
    rest = set(wanted)
    while rest:
        name = rest.pop()
        if name in known and name not in needed:
            needed.add(name)
            rest |= known[name][1]
    if not needed:
        return []
    lines = {known[name][0] for name in needed if known[name][2]}
    torch_last = [_merged(line for line in lines if (" torch" in line) is ours) for ours in (False, True)]
    head = (
        "from __future__ import annotations\n\n"
        + "\n\n".join("\n".join(part) for part in torch_last if part)
        + "\n"
    )
    return [head, *(f"\n{known[name][0]}\n" for name in known if name in needed and not known[name][2])]


def _merged(imports: Iterable[str]) -> list[str]:
    """Sorted, `import` before `from`, and the names of one module in one line."""
    found: dict[str, list[str]] = {}
    for line in imports:
        module, _, name = line.rpartition(" import ")
        found.setdefault(module or line, []).append(name)
    joined = [
        f"{of} import {', '.join(sorted(names))}" if of[0] == "f" else of for of, names in found.items()
    ]
    return sorted(joined, key=lambda line: (line[0] == "f", line))
