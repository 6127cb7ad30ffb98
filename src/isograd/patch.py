"""A prescription as Python for the user's script: the calls that `apply` makes, in the same order.

Equal edits of places that differ in one number become a loop. Helpers of isograd that the code calls are printed
with it, so that it needs torch only.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from inspect import getsource
from itertools import groupby
from textwrap import indent

import torch

from isograd.prescription import ROOTS, Edit, Prescription, combined, named, printed

OURS = ("surgery", "modules", "calls")
LONG = 100
"""Characters after which a list of places is broken."""


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
    split = [re.fullmatch(r"(\D*)(\d+)(.*)", place, re.DOTALL) for place in places]
    if all(split):
        found = [(m[1], int(m[2]), m[3]) for m in split if m]
        numbers = [number for number, _ in groupby(found, key=lambda f: f[1])]
        tails = [[tail for _, _, tail in group] for _, group in groupby(found, key=lambda f: f[1])]
        step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
        even = step > 0 and numbers == list(range(numbers[0], numbers[-1] + 1, step))
        alike = all(tail == tails[0] for tail in tails) and len({head for head, _, _ in found}) == 1
        if even and alike and len(numbers) > 2:
            head = _braced(found[0][0])
            last = numbers[-1] + 1
            span = (
                f"{numbers[0]}, {last}" + (f", {step}" if step > 1 else "")
                if numbers[0] or step > 1
                else f"{last}"
            )
            outer = f"for i in range({span}):"
            if len(tails[0]) == 1:
                return [outer], f'f"{head}{{i}}{_braced(tails[0][0])}"'
            inner = ", ".join(map(_string, tails[0]))
            return [outer, f"for part in ({inner}):"], f'f"{head}{{i}}{{part}}"'
    listed = ", ".join(map(_string, places))
    if len(listed) > LONG:
        listed = "\n" + "".join(f"    {_string(place)},\n" for place in places)
    return [f"for name in ({listed}):"], "name"


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
    torch_last = [
        sorted(
            (line for line in lines if (" torch" in line) is ours), key=lambda line: (line[0] == "f", line)
        )
        for ours in (False, True)
    ]
    head = (
        "from __future__ import annotations\n\n"
        + "\n\n".join("\n".join(part) for part in torch_last if part)
        + "\n"
    )
    return [head, *(f"\n{known[name][0]}\n" for name in known if name in needed and not known[name][2])]
