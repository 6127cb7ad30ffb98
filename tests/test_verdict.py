"""What a diagnosis says of itself: its verdict, what --select leaves of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from isograd.diagnosis import Diagnosis, Finding, Severity


def found(code: str, severity: Severity = Severity.ERROR) -> Finding:
    return Finding(code, f"name-of-{code.lower()}", severity, "")


@pytest.mark.parametrize(
    ("codes", "verdict"),
    [
        ((), "healthy"),
        (("VG101",), "vanishing"),
        (("SA302",), "vanishing"),
        (("VG101", "EG201"), "exploding"),
        (("EG201", "NF401"), "broken"),
        (("VG102",), "broken"),
        (("UP509",), "exploding"),
    ],
)
def test_the_verdict_is_that_of_the_worst_error(
    healthy: Diagnosis, codes: tuple[str, ...], verdict: str
) -> None:
    assert replace(healthy, findings=tuple(map(found, codes))).verdict == verdict


def test_a_warning_leaves_the_verdict_healthy(healthy: Diagnosis) -> None:
    warned = replace(healthy, findings=(found("EG201", Severity.WARNING),))
    assert warned.verdict == "healthy"
    assert warned.errors == ()


@pytest.mark.parametrize(
    ("select", "ignore", "left"),
    [
        (None, None, ["VG101", "EG201", "EG202"]),
        (["EG"], None, ["EG201", "EG202"]),
        (["EG2", "VG101"], ["EG202"], ["VG101", "EG201"]),
        (["name-of-eg201"], None, ["EG201"]),
        ([], None, []),
        (None, ["name-of-eg201", "V"], ["EG202"]),
    ],
)
def test_select_and_ignore_take_prefixes_and_names(
    healthy: Diagnosis, select: list[str] | None, ignore: list[str] | None, left: list[str]
) -> None:
    all_three = replace(healthy, findings=(found("VG101"), found("EG201"), found("EG202")))
    assert [f.code for f in all_three.narrowed(select, ignore).findings] == left
