"""The benchmarks run and print figures; how large the figures are is not tested."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import __main__ as command
from benchmarks import depth, flow, report, search, timing
from benchmarks.memory import peak_memory
from benchmarks.methods import METHODS, plain
from benchmarks.workloads import FLOW, Setting, workload

QUICK = Setting(quick=True, device="cpu", threads=1)
RATIO = re.compile(r"\d+\.\d\d \(\d+\.\d\d \.\. \d+\.\d\d\)")


def cells(text: str, first: str) -> list[str]:
    """The cells of the row that starts with `first`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} "))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_flow_prints_the_ratios_of_time_and_of_memory() -> None:
    text = flow.section(workload("mlp"), QUICK)
    for method in METHODS:
        if method != flow.PLAIN:
            name = f"{method}: healthy" if method == "isograd.check" else method
            _, _, wall, processor = cells(text, name)
            assert RATIO.fullmatch(wall)
            assert RATIO.fullmatch(processor)
    _, memory = text.split("Peak memory")
    _, _, in_use, ratio, _ = cells(memory, "isograd.measure")
    assert float(in_use) > 0
    assert float(ratio) == pytest.approx(1.0, abs=0.5)


def test_depth_prints_the_cost_at_every_depth_and_how_it_grows(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    command.main(["depth", "--quick", "--threads", "1", "--save"])
    text = capsys.readouterr().out
    nodes = [int(cells(text, str(layers))[0].replace(",", "")) for layers in (4, 16)]
    assert nodes[1] > 3 * nodes[0]
    for row in ("plain step", "isograd.measure", "work on the graph alone", "  backbone"):
        assert all(math.isfinite(float(cell)) for cell in cells(text, row))
    (saved,) = (tmp_path / "results").iterdir()
    assert saved.read_text() == text
    assert re.fullmatch(r"depth-\d{4}-\d\d-\d\d-cpu-1-threads-quick\.md", saved.name)
    assert f"torch {torch.__version__}" in text
    assert "python -m benchmarks depth --quick" in text


def test_a_search_is_told_in_training_steps() -> None:
    (case,) = (c for c in search.CASES if c.name == "exploding residual net, 30 blocks")
    found = search.once(case, "repair")
    assert 0 < found.step < found.seconds
    assert found.said["cured"]
    assert found.said["measured"] >= 1


@pytest.mark.slow
def test_the_table_of_searches_has_a_row_for_each_case() -> None:
    text = "\n".join(search.run(QUICK))
    for name in search.QUICK:
        assert float(cells(text, name)[3]) > 1  # no search is cheaper than a step
        assert cells(text, name)[4] == "yes"


@pytest.mark.slow
@pytest.mark.parametrize("name", [w.name for w in FLOW])
def test_every_method_runs_on_every_model_or_its_failure_is_said(name: str) -> None:
    text = flow.section(workload(name), QUICK)
    for method in ("isograd.measure", "isograd.check: healthy", "gradient norm of every parameter"):
        assert RATIO.fullmatch(cells(text, method)[2])
    hooks = cells(text, "full backward hook on every module")[2]
    assert RATIO.fullmatch(hooks) or hooks == "fails: RuntimeError"  # ResNet's additions in place forbid them


def test_a_peak_is_that_of_its_own_process() -> None:
    ballast = torch.ones(10**9 // 4)
    built, peak = peak_memory("mlp", flow.PLAIN, QUICK, compact=True)
    assert 0 < built < peak < ballast.nbytes


def test_every_method_leaves_the_model_as_it_was() -> None:
    model, loss = workload("mlp").built(QUICK)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for method in METHODS.values():
        method(model, loss)
        assert all(p.grad is None for p in model.parameters())
        assert all(not module._backward_hooks for module in model.modules())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_a_method_that_fails_leaves_no_hook_behind() -> None:
    class InPlace(nn.Sequential):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self[0](input).add_(1)

    model = InPlace(nn.Linear(2, 2))

    def loss(m: nn.Module) -> torch.Tensor:
        return m(torch.ones(3, 2)).sum()

    row = flow.timing("full backward hook on every module", model, loss, 2, QUICK)
    assert row[3] == "fails: RuntimeError"
    plain(model, loss)


def test_pairs_alternate_in_order() -> None:
    calls: list[str] = []
    found = timing.paired(lambda: calls.append("plain"), lambda: calls.append("method"), 3, "cpu")
    assert calls == ["plain", "method", "method", "plain", "plain", "method"]
    assert len(found.wall_ratio.values) == 3


def test_a_ratio_is_of_its_own_pair() -> None:
    assert timing.Sample((3.0, 1.0, 2.0)).show() == "2.00 (1.00 .. 3.00)"


def test_the_exponent_of_a_power_is_found() -> None:
    nodes = (10, 100, 1000)
    assert depth.exponent(nodes, [3e-4 * n**1.5 for n in nodes]) == pytest.approx(1.5)


def test_a_table_is_aligned_markdown() -> None:
    assert report.table(("", "ms"), [("a", "1"), ("long", "12.5")]).splitlines() == [
        "|      |   ms |",
        "|------|-----:|",
        "| a    |    1 |",
        "| long | 12.5 |",
    ]
