"""The page of each finding: the docstring of its file in `symptoms/`, read without importing it or torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path

SYMPTOMS = Path(__file__).parent / "symptoms"
TITLE = re.compile(r"(?P<code>[A-Z]{2}\d{3}) (?P<name>[a-z0-9-]+): (?P<summary>.+)")
"""First line of a page: `VG101 vanishing-gradient: the gradient dies out on its way to the input.`"""


@dataclass(frozen=True, repr=False)
class Page:
    """What one code means, why it happens, the evidence, what helps, and the references."""

    code: str
    name: str
    summary: str
    text: str

    def __repr__(self) -> str:
        return self.text


@cache
def pages(folder: Path = SYMPTOMS) -> tuple[Page, ...]:
    """All pages in the order of their codes."""
    read = (_page(path) for path in sorted(folder.glob("*.py")))
    return tuple(sorted((page for page in read if page is not None), key=lambda page: page.code))


def explain(code: str, *, folder: Path = SYMPTOMS) -> Page:
    """The page of a finding, by its code (`VG101`) or its name (`vanishing-gradient`).

    Raises:
        ValueError: no page has this code or name; the message offers the nearest.
    """
    known = {key: page for page in pages(folder) for key in (page.code, page.name)}
    for key in (code, code.upper(), code.lower()):
        if key in known:
            return known[key]
    raise ValueError(f"no finding is called {code!r}{nearest(code, known)}")


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean VG101?`, or nothing where nothing is near."""
    spelled = {key.lower(): key for key in known}
    near = [spelled[key] for key in get_close_matches(word.lower(), spelled, n=3)]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _page(path: Path) -> Page | None:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    title = TITLE.match(text)
    return None if title is None else Page(**title.groupdict(), text=text)
