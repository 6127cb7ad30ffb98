"""Each symptom is a page: every file keeps to one form, and a new file is tested by existing."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import pytest

import isograd
from isograd import causes
from isograd.pages import SYMPTOMS, explain, pages
from isograd.render.remedies import WORDS, in_words
from isograd.symptoms import NAMES, STREAMED

HEADINGS = ["What it means", "Why it happens", "Evidence", "What helps", "References"]
FILES = sorted(path for path in SYMPTOMS.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_symptom_is_a_page(path: Path) -> None:
    module = import_module(f"isograd.symptoms.{path.stem}")
    page = explain(module.CODE)
    assert (page.code, page.name) == (module.CODE, module.NAME)
    assert path.stem in NAMES + STREAMED, "the diagnosis does not look for it"
    lines = page.text.splitlines()
    assert [line for line in lines if line in HEADINGS] == HEADINGS
    for heading, following in zip(HEADINGS, [lines[lines.index(h) + 1] for h in HEADINGS], strict=True):
        assert following.strip(), f"nothing is said under {heading!r}"


def test_every_symptom_that_is_looked_for_has_a_file() -> None:
    assert sorted(NAMES + STREAMED) == [path.stem for path in FILES]


def test_codes_and_names_are_unique() -> None:
    keys = [key for page in pages() for key in (page.code, page.name)]
    assert len(keys) == len(set(keys)) == 2 * len(FILES)


def slugs() -> set[str]:
    """Names of remedies in the symptoms and causes; a remedy with a space in it is a sentence already."""
    found = set(causes._REMEDY.values())
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "remedies":
                found |= {part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant)}
    return {slug for slug in found if isinstance(slug, str) and " " not in slug}


@pytest.mark.parametrize("slug", sorted(slugs()))
def test_every_remedy_is_said_in_words(slug: str) -> None:
    assert in_words(slug) == f"{slug}: {WORDS[slug]}"


def test_a_page_is_read_from_any_folder_without_importing_it(tmp_path: Path) -> None:
    (tmp_path / "new.py").write_text('"""ZZ999 new-thing: it is new.\n\nMore.\n"""\nraise SystemExit\n')
    (tmp_path / "helper.py").write_text('"""Not a page."""\n')
    page = explain("new-thing", folder=tmp_path)
    assert (page.code, page.summary) == ("ZZ999", "it is new.")
    assert str(page) == repr(page) == "ZZ999 new-thing: it is new.\n\nMore."


def test_the_verb_explains() -> None:
    assert isograd.explain("vanishing-gradient").code == "VG101"
    with pytest.raises(ValueError, match="no finding or remedy is called 'VG1'"):
        isograd.explain("VG1")
