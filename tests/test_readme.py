"""The output that the README shows is what the command prints."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from isograd.cli import main

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(
    r"<!-- output of: isograd (?P<line>.+?)(?P<head> \| head -(?P<lines>\d+))? -->\n"
    r"(?P<shown>(?:\n```text\n.*?```\n)?)",
    re.DOTALL,
)
SLOW = {"check examples/efficientnet.py:build"}
SLOW_MARKS = (pytest.mark.slow, pytest.mark.timeout(900))
COMMANDS = [found["line"] for found in BLOCK.finditer(README.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    "line", [pytest.param(line, marks=SLOW_MARKS if line in SLOW else ()) for line in COMMANDS]
)
def test_shown_output_is_real(
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    line: str,
) -> None:
    monkeypatch.chdir(README.parent)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    with pytest.raises(SystemExit):
        main(line.split())
    out = capsys.readouterr().out.rstrip().splitlines()

    def real(found: re.Match[str]) -> str:
        if found["line"] != line:
            return found[0]
        shown = "\n".join(out[: int(found["lines"] or len(out))]).rstrip()
        return f"<!-- output of: isograd {line}{found['head'] or ''} -->\n\n```text\n{shown}\n```\n"

    written = README.read_text(encoding="utf-8")
    if request.config.getoption("--write-snapshots"):
        README.write_text(BLOCK.sub(real, written), encoding="utf-8")
    assert BLOCK.sub(real, written) == README.read_text(encoding="utf-8"), (
        "pytest tests/test_readme.py --write-snapshots"
    )


def test_the_readme_shows_something() -> None:
    assert len(COMMANDS) >= 3
