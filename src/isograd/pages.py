"""The page of each finding and remedy: the docstring of its file, read without importing it or torch."""

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
REMEDIES = Path(__file__).parent / "remedies"
REMEDY = re.compile(r"(?P<code>)(?P<name>[a-z0-9]+(-[a-z0-9]+)*): (?P<summary>.+)")
"""First line of a remedy's page: `forget-bias: gates of LSTM and GRU that remember at first.`"""


@dataclass(frozen=True, repr=False)
class Page:
    """What one code means, why it happens, the evidence, what helps; or what one remedy does and when."""

    code: str
    """'' for a remedy, which has a name only."""
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


@cache
def remedies(folder: Path = REMEDIES) -> tuple[Page, ...]:
    """The pages of all remedies in the order of their names."""
    read = (_page(path, REMEDY) for path in sorted(folder.glob("*.py")) if path.stem != "__init__")
    return tuple(sorted((page for page in read if page is not None), key=lambda page: page.name))


def explain(code: str, *, folder: Path = SYMPTOMS) -> Page:
    """The page of a finding, by its code (`VG101`) or its name (`vanishing-gradient`), or of a remedy by its name.

    Raises:
        ValueError: no page has this code or name; the message offers the nearest.
    """
    known = {page.name: page for page in remedies()}
    known |= {key: page for page in pages(folder) for key in (page.code, page.name)}
    for key in (code, code.upper(), code.lower()):
        if key in known:
            return known[key]
    raise ValueError(f"no finding or remedy is called {code!r}{nearest(code, known)}")


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean VG101?`, or nothing where nothing is near."""
    spelled = {key.lower(): key for key in known}
    near = [spelled[key] for key in get_close_matches(word.lower(), spelled, n=3)]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _page(path: Path, title: re.Pattern[str] = TITLE) -> Page | None:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    found = title.match(text)
    return None if found is None else Page(**found.groupdict(), text=text)
