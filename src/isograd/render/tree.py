"""The user's own module tree with its signal: activation forward, gradient backward, repeats folded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from isograd.flow import Flow
from isograd.render import numbers

SCREEN = 40
"""Rows that fit a screen: deeper modules are left out until the tree does."""
REPEATS = 4
"""Blocks in a row from which on repeats are folded: fewer are quicker to read than to unfold."""
LONGEST_PERIOD = 4
"""Modules in the longest repeat looked for: linear, norm, activation, dropout."""
ODD_DECADES = 1.0
"""A repeated block is shown for itself when it changes the gradient a decade more, or less, than its like."""
MOST_ODD = 3
"""How many such blocks are shown, those that differ most first."""

NEVER_CALLED = {"ModuleList", "ModuleDict"}


@dataclass(frozen=True)
class Row:
    """One line of the tree. Ranges hold the first and the last of a fold, else one value."""

    label: str
    kind: str
    indent: int
    activation: tuple[float, ...]
    """rms of the output; NaN: not measured."""
    gradient: tuple[float, ...]
    """Decades of gradient norm relative to the model's output; −inf: none; NaN: not measured."""
    expected: tuple[float, ...] = (math.nan,)
    """The same as theory expects it; NaN where it does not apply."""
    branch: tuple[float, ...] = ()
    """Of residual blocks: rms of the branch over that of the stream, least and largest."""
    folded: int = 0
    """Repeats that this line stands for."""
    hidden: int = 0
    """Modules inside it that are not shown."""


@dataclass
class _Module:
    label: str
    kind: str
    activation: float
    gradient: float
    expected: float
    branch: tuple[float, ...]
    children: list[_Module] = field(default_factory=list["_Module"])
    shape: int = 0
    """Number of the tree's shape: equal for modules that are built alike."""

    @property
    def inside(self) -> int:
        return len(self.children) + sum(child.inside for child in self.children)


def rows(flow: Flow, *, screen: int = SCREEN) -> list[Row]:
    """The tree, root first, as deep as fits `screen` rows.

    The gradient column is relative to the model's output: scaling the loss leaves it as it is.
    """
    if not flow.modules:
        return []
    root = _tree(flow)
    deepest = max(module.path.count(".") for module in flow.modules) + 1
    shown: list[Row] = []
    for depth in range(deepest, 0, -1):
        shown = [_row(root, 0, closed=False), *_below(root, 1, depth)]
        if len(shown) <= screen:
            break
    return shown


def _reference(flow: Flow) -> float:
    """log10 gradient norm at the model's output."""
    logs, steps = numbers.column(flow, "grad_norm_log10"), numbers.column(flow, "decades")
    inside = [log for log, step in zip(logs, steps, strict=True) if not math.isnan(step)]
    known = inside or [m.grad_norm_log10 for m in flow.modules if not math.isnan(m.grad_norm_log10)]
    return known[-1] if known and math.isfinite(known[-1]) else 0.0


def _expected(flow: Flow) -> dict[str, float]:
    """Decades between the output and the last backbone site of each module, as theory expects them."""
    levels, level, found = flow.expected.decades, 0.0, dict[str, float]()
    measured = numbers.column(flow, "decades")
    if flow.expected.over(slice(1, len(flow.sites))) is None:
        return found
    for i in range(len(flow.sites) - 1, -1, -1):
        path = flow.sites[i].module
        while path:
            found.setdefault(path, level)
            path = path.rpartition(".")[0]
        if not math.isnan(measured[i]):
            level += levels[i]
    return found


def _branches(flow: Flow) -> dict[str, tuple[float, ...]]:
    """By module: branch over stream of the residual additions in it."""
    found: dict[str, tuple[float, ...]] = {}
    for i, split in flow.splits.items():
        if math.isfinite(split.forward_ratio):
            path = flow.sites[i].module
            found[path] = (*found.get(path, ()), split.forward_ratio)
    return found


def _tree(flow: Flow) -> _Module:
    by_path: dict[str, _Module] = {}
    reference, expected, branches = _reference(flow), _expected(flow), _branches(flow)
    for m in flow.modules:
        above, _, name = m.path.rpartition(".")
        gradient = m.grad_norm_log10 - reference
        level = expected.get(m.path, math.nan) if math.isfinite(gradient) else math.nan
        branch = branches.get(m.path, ())
        module = _Module(name, m.kind, m.activation_rms, gradient, level, branch)
        by_path[m.path] = module
        if m.path:
            by_path[above].children.append(module)
    root = by_path[""]
    _splice(root)
    _number(root, {})
    return root


def _splice(module: _Module) -> None:
    """A ModuleList is no step of the computation: its members stand in its place, as `h.0`."""
    for child in module.children:
        _splice(child)
    spliced: list[_Module] = []
    for child in module.children:
        if child.kind in NEVER_CALLED and child.children:
            for inner in child.children:
                inner.label = f"{child.label}.{inner.label}"
            spliced += child.children
        else:
            spliced.append(child)
    module.children = spliced


def _number(module: _Module, known: dict[tuple[object, ...], int]) -> None:
    for child in module.children:
        _number(child, known)
    key = (module.kind, *((c.label, c.shape) for c in module.children))
    module.shape = known.setdefault(key, len(known))


def _below(module: _Module, indent: int, depth: int) -> list[Row]:
    if depth == 0:
        return []
    shown: list[Row] = []
    children, i = module.children, 0
    while i < len(children):
        period, repeats = _repeat(children, i)
        if repeats < REPEATS:
            shown += _open(children[i], indent, depth)
            i += 1
            continue
        blocks = [children[i + k * period : i + (k + 1) * period] for k in range(repeats)]
        shown += _fold(blocks, indent, depth)
        i += period * repeats
    return shown


def _open(module: _Module, indent: int, depth: int) -> list[Row]:
    return [_row(module, indent, closed=depth == 1), *_below(module, indent + 1, depth - 1)]


def _row(module: _Module, indent: int, *, closed: bool) -> Row:
    hidden = module.inside if closed else 0
    return Row(
        module.label,
        module.kind,
        indent,
        (module.activation,),
        (module.gradient,),
        (module.expected,),
        _ends(module.branch),
        hidden=hidden,
    )


def _ends(values: Sequence[float]) -> tuple[float, ...]:
    return (min(values), max(values)) if len(values) > 1 else tuple(values)


def _repeat(children: Sequence[_Module], start: int) -> tuple[int, int]:
    """(period, repeats) of the repeat that begins here and covers most modules, the shortest period first."""
    best = (1, 1)
    for period in range(1, LONGEST_PERIOD + 1):
        repeats = 1
        while _alike(children, start, start + repeats * period, period):
            repeats += 1
        if repeats >= REPEATS and repeats * period > best[0] * best[1]:
            best = (period, repeats)
    return best


def _alike(children: Sequence[_Module], a: int, b: int, period: int) -> bool:
    if b + period > len(children):
        return False
    return all(children[a + k].shape == children[b + k].shape for k in range(period))


def _fold(blocks: Sequence[Sequence[_Module]], indent: int, depth: int) -> list[Row]:
    """The first block and the odd ones in full, the last closed, each stretch between them as one row."""
    full = {0, *_odd(blocks)}
    alone = full | {len(blocks) - 1}
    shown: list[Row] = []
    i = 0
    while i < len(blocks):
        stretch = next((k for k in range(i, len(blocks)) if k in alone), len(blocks)) - i
        if stretch > 1:
            shown.append(_folded(blocks[i : i + stretch], indent))
            i += stretch
        else:
            for module in blocks[i]:
                shown += _open(module, indent, depth if i in full else 1)
            i += 1
    return shown


def _odd(blocks: Sequence[Sequence[_Module]]) -> list[int]:
    """Blocks that change the gradient otherwise than their like."""
    steps: dict[int, float] = {}
    for i in range(1, len(blocks)):
        step = blocks[i][-1].gradient - blocks[i - 1][-1].gradient
        if math.isfinite(step):
            steps[i] = step
    if not steps:
        return []
    usual = median(steps.values())
    odd = [i for i in steps if abs(steps[i] - usual) > ODD_DECADES]
    return sorted(odd, key=lambda i: abs(steps[i] - usual), reverse=True)[:MOST_ODD]


def _folded(blocks: Sequence[Sequence[_Module]], indent: int) -> Row:
    first, last = blocks[0], blocks[-1]
    listed = first[0].label.rpartition(".")[0]  # `h.1 … 10`: members of the same list
    return Row(
        f"{first[0].label} … {last[-1].label.removeprefix(f'{listed}.')}",
        " + ".join(module.kind for module in first),
        indent,
        (first[-1].activation, last[-1].activation),
        (first[-1].gradient, last[-1].gradient),
        (first[-1].expected, last[-1].expected),
        _ends([ratio for block in blocks for module in block for ratio in module.branch]),
        folded=len(blocks),
    )
