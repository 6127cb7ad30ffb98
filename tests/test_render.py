"""Text, HTML, JSON, SARIF and GitHub annotations of the same diagnosis."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from isograd.diagnosis import Diagnosis, Finding, Severity
from isograd.flow import Flow
from isograd.render.github import github
from isograd.render.json import schema
from isograd.render.sarif import sarif
from isograd.render.text import document
from isograd.render.tree import SCREEN, rows
from isograd.statistics import ModuleSignal

DOCS = Path(__file__).parents[1] / "docs"
Snapshot = Callable[[str, str], None]
NASTY = "[bold red]<script>alert(1)</script>[/] & 100%,:\r\nfc"


@pytest.fixture
def nasty(sick: Diagnosis) -> Diagnosis:
    """Everything that a user can name is hostile to some format."""
    finding = replace(sick.findings[0], message=NASTY, cause=NASTY, sites=(NASTY,), remedies=(NASTY,))
    modules = (ModuleSignal("", NASTY, 1.0, 0.0), ModuleSignal("[bold]x", NASTY, 1.0, 0.0))
    flow = replace(sick.flow, modules=modules)
    return replace(sick, flow=flow, findings=(finding,), healthy={"VG101": NASTY}, target=NASTY)


# -- text ----------------------------------------------------------------------------------------------


def test_text(sick: Diagnosis, healthy: Diagnosis, snapshot: Snapshot) -> None:
    snapshot("sick.txt", f"{sick}\n")
    snapshot("healthy.txt", f"{healthy}\n")


def test_text_keeps_to_its_width(sick: Diagnosis) -> None:
    for width in (70, 100):
        assert max(line.cell_len for line in document(sick, width=width).split()) <= width


def test_print_repr_and_rich_say_the_same(sick: Diagnosis) -> None:
    console = Console(file=io.StringIO(), width=300)
    console.print(sick)
    said = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert str(sick) == repr(sick) == said.rstrip("\n")


def test_brackets_are_text_and_not_markup(nasty: Diagnosis) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=300)
    console.print(nasty)
    said = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "[bold red]<script>" in said
    assert "[bold]x" in said


# -- html ----------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_is_the_text_with_styles(sick: Diagnosis) -> None:
    html = Tags(sick._repr_html_())
    assert html.tags == {"pre", "span"}
    assert html.text.strip() == str(sick)


def test_html_escapes_what_the_user_named(nasty: Diagnosis) -> None:
    html = Tags(nasty.to_html())
    assert html.tags == {"pre", "span"}
    assert "<script>alert(1)</script>" in html.text


# -- json ----------------------------------------------------------------------------------------------


def test_json(sick: Diagnosis, snapshot: Snapshot) -> None:
    snapshot("sick.json", sick.to_json())


def test_the_documented_schema_is_the_one_in_use() -> None:
    assert (DOCS / "diagnosis.schema.json").read_text(encoding="utf-8") == schema(), "run `make schema`"


def test_json_follows_its_schema(sick: Diagnosis, healthy: Diagnosis, nasty: Diagnosis) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(schema()))
    validator.check_schema(validator.schema)
    for diagnosis in (sick, healthy, nasty, Diagnosis(Flow((), {}))):
        validator.validate(json.loads(diagnosis.to_json()))
    broken = json.loads(sick.to_json()) | {"verdict": None}
    assert not validator.is_valid(broken)


readings = st.floats(-200, 200) | st.sampled_from([math.nan, math.inf, -math.inf])


@given(st.lists(readings, min_size=7, max_size=7))
def test_json_is_strict_whatever_was_measured(column: list[float]) -> None:
    from tests.conftest import flow_of

    flow = flow_of()
    columns = dict.fromkeys(flow.columns, torch.tensor(column, dtype=torch.float64))
    finding = Finding("NF401", "non-finite-forward", Severity.ERROR, "", evidence={"value": column[0]})
    text = Diagnosis(replace(flow, columns=columns, loss=column[1]), (finding,)).to_json()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    report = json.loads(text, parse_constant=refuse)
    for site, value in zip(report["backbone"], column, strict=True):
        assert site["gain"] == (value if math.isfinite(value) else None)


# -- sarif and github ----------------------------------------------------------------------------------


def test_sarif(sick: Diagnosis, snapshot: Snapshot) -> None:
    snapshot("sick.sarif", sarif(sick))


def test_sarif_points_to_relative_files(sick: Diagnosis) -> None:
    (run,) = json.loads(sarif(sick))["runs"]
    vanishing, without_site = run["results"]
    assert vanishing["locations"][0]["physicalLocation"] == {
        "artifactLocation": {"uri": "src/net.py"},
        "region": {"startLine": 11},
    }
    assert len(vanishing["relatedLocations"]) == 5
    assert without_site["locations"][0]["physicalLocation"]["region"] == {"startLine": 1}
    assert [run["tool"]["driver"]["rules"][r["ruleIndex"]]["id"] for r in run["results"]] == [
        "VG101",
        "UP501",
    ]


def test_a_finding_without_any_file_has_no_location(sick: Diagnosis) -> None:
    elsewhere = replace(sick, findings=sick.findings[1:], target="package.module:build")
    assert json.loads(sarif(elsewhere))["runs"][0]["results"][0]["locations"] == []
    assert github(elsewhere).startswith("::warning title=UP501")


def test_github(sick: Diagnosis, healthy: Diagnosis, snapshot: Snapshot) -> None:
    snapshot("sick.github.txt", github(sick))
    assert github(healthy) == ""


def test_github_annotations_cannot_be_broken_out_of(nasty: Diagnosis) -> None:
    said = github(nasty)
    assert said.count("\n") == 1
    assert "\r" not in said
    assert "100%25,:%0D%0Afc" in said
    properties = said.removeprefix("::error ").split("::")[0]
    assert properties == "title=VG101 vanishing-gradient"


# -- tree ----------------------------------------------------------------------------------------------


def transformer(depth: int, log: Callable[[int], float]) -> Flow:
    """`depth` blocks of four modules, with the gradient `log(i)` at the end of block i."""
    modules = [ModuleSignal("", "GPT", 1.0, 0.0), ModuleSignal("h", "ModuleList", math.nan, math.nan)]
    for i in range(depth):
        modules.append(ModuleSignal(f"h.{i}", "Block", 1.0 + i, log(i)))
        modules += [ModuleSignal(f"h.{i}.{name}", kind, 1.0, log(i)) for name, kind in
                    (("ln", "LayerNorm"), ("attn", "Attention"), ("mlp", "MLP"))]  # fmt: skip
    return Flow((), {}, modules=(*modules, ModuleSignal("head", "Linear", 1.0, 0.0)))


def labels(flow: Flow) -> list[str]:
    return [f"{row.label} {row.kind}".strip() for row in rows(flow)]


def test_repeated_blocks_fold() -> None:
    flow = transformer(96, lambda i: (i - 95) / 10)
    shown = rows(flow)
    assert labels(flow) == [
        "GPT", "h.0 Block", "ln LayerNorm", "attn Attention", "mlp MLP",
        "h.1 … 94 Block", "h.95 Block", "head Linear",
    ]  # fmt: skip
    fold = shown[5]
    assert fold.folded == 94
    assert fold.activation == (2.0, 95.0)
    assert fold.gradient == pytest.approx((-9.4, -0.1))
    assert shown[6].hidden == 3


def test_a_block_that_differs_from_its_like_is_not_folded_away() -> None:
    kills = 40
    flow = transformer(96, lambda i: -8.0 if i < kills else 0.0)
    assert "h.40 Block" in labels(flow)
    assert "h.1 … 39 Block" in labels(flow)
    assert "h.41 … 94 Block" in labels(flow)


def test_alternating_layers_fold_by_their_period() -> None:
    kinds = ["Linear", "BatchNorm1d", "ReLU"] * 20 + ["Linear"]
    modules = [ModuleSignal(str(i), kind, 1.0, 0.0) for i, kind in enumerate(kinds)]
    flow = Flow((), {}, modules=(ModuleSignal("", "Sequential", 1.0, 0.0), *modules))
    assert "3 … 56 Linear + BatchNorm1d + ReLU" in labels(flow)
    assert len(rows(flow)) == 1 + 3 + 1 + 3 + 1


def test_blocks_that_are_built_differently_do_not_fold() -> None:
    modules = [ModuleSignal(str(i), f"Kind{i}", 1.0, 0.0) for i in range(6)]
    flow = Flow((), {}, modules=(ModuleSignal("", "Net", 1.0, 0.0), *modules))
    assert len(rows(flow)) == 7


def test_a_tree_that_is_too_deep_for_a_screen_is_cut_where_it_fits() -> None:
    modules = [ModuleSignal("", "Net", 1.0, 0.0)]
    for i in range(5):
        modules.append(ModuleSignal(f"{i}", f"Stage{i}", 1.0, 0.0))
        modules += [ModuleSignal(f"{i}.{j}", f"Kind{j}", 1.0, 0.0) for j in range(20)]
    shown = rows(Flow((), {}, modules=tuple(modules)))
    assert len(shown) == 6 <= SCREEN
    assert [row.hidden for row in shown] == [0, 20, 20, 20, 20, 20]


def test_the_gradient_column_does_not_depend_on_the_scale_of_the_loss(sick: Diagnosis) -> None:
    def scaled(decades: float) -> list[tuple[float, ...]]:
        logs = {"grad_norm_log10": sick.flow.column("grad_norm_log10") + decades}
        modules = tuple(replace(m, grad_norm_log10=m.grad_norm_log10 + decades) for m in sick.flow.modules)
        return [
            row.gradient
            for row in rows(replace(sick.flow, columns=sick.flow.columns | logs, modules=modules))
        ]

    for usual, tiny in zip(scaled(0.0), scaled(-8.0), strict=True):
        assert tiny == pytest.approx(usual)
