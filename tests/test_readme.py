"""The output that the README shows is what the command prints."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from isograd.cli import main

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(
    r"<!-- output of: isograd (?P<line>.+?) -->\n(?P<shown>(?:\n```text\n.*?```\n)?)", re.DOTALL
)


def test_shown_output_is_real(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def run(found: re.Match[str]) -> str:
        with pytest.raises(SystemExit):
            main(found["line"].split())
        out = capsys.readouterr().out.rstrip()
        return f"<!-- output of: isograd {found['line']} -->\n\n```text\n{out}\n```\n"

    written = README.read_text(encoding="utf-8")
    assert BLOCK.search(written), "nothing is shown at all"
    real = BLOCK.sub(run, written)
    if request.config.getoption("--write-snapshots"):
        README.write_text(real, encoding="utf-8")
        return
    assert real == written, "pytest tests/test_readme.py --write-snapshots"
