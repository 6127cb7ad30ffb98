"""The command, from its arguments to its exit status."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import torch

from isograd.cli import config, main, progress
from isograd.cli.optimizer import OptimizerSpec, OptimizerType

NET = """
import torch
from torch import nn
import torch.nn.functional as F

def network(layers, activation):
    torch.manual_seed(0)
    made = [part for _ in range(layers) for part in (nn.Linear(16, 16), activation())]
    return nn.Sequential(*made, nn.Linear(16, 4)), torch.randn(32, 16), torch.randint(4, (32,))

def sigmoids():
    model, x, y = network(10, nn.Sigmoid)
    return model, lambda m: F.cross_entropy(m(x), y)

def shallow():
    print("building")
    model, x, y = network(1, nn.Tanh)
    return model, lambda m: F.cross_entropy(m(x), y)

def vector():
    model, x, y = network(1, nn.Tanh)
    return model, lambda m: m(x)

def detached():
    model, x, y = network(1, nn.Tanh)
    return model, lambda m: m(x).sum().detach()

def no_tensor():
    model, x, y = network(1, nn.Tanh)
    return model, lambda m: m(x).sum().item()

class Sleeps(nn.Linear):
    def forward(self, x):
        import time
        open("started", "w").close()
        time.sleep(60)
"""


class Result(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """`run("check net.py:build")` in a folder with `net.py`, in this process."""
    (tmp_path / "net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def command(line: str) -> Result:
        with pytest.raises(SystemExit) as left:
            main(line.split())
        out, err = capsys.readouterr()
        return Result(int(left.value.code or 0), out, err)

    yield command
    for name in ("net", "net_target"):
        sys.modules.pop(name, None)


# -- check ---------------------------------------------------------------------------------------------


def test_a_sick_network_ends_with_1_and_a_healthy_one_with_0(run: Run) -> None:
    sick = run("check net.py:sigmoids")
    assert sick.status == 1
    assert sick.out.startswith("vanishing  net.py:sigmoids\n")
    assert "VG101 vanishing-gradient  error" in sick.out
    well = run("check net.py:shallow")
    assert well.status == 0, well
    assert well.out.startswith("healthy  net.py:shallow\n")
    assert well.err == "building\n", "what the user prints is theirs, and not part of the report"


def test_json_of_a_real_measurement(run: Run) -> None:
    report = json.loads(run("check net.py:sigmoids --format json").out)
    assert report["verdict"] == "vanishing"
    assert report["target"] == "net.py:sigmoids"
    assert report["layers"] == 11
    assert report["decades"] == pytest.approx(sum(site["decades"] or 0 for site in report["backbone"]))
    assert report["findings"][0]["code"] == "VG101"


@pytest.mark.parametrize("form", ["text", "json", "sarif", "github"])
def test_a_report_in_a_file_is_the_one_on_stdout(run: Run, form: str) -> None:
    printed = run(f"check net.py:sigmoids --format {form}")
    written = run(f"check net.py:sigmoids --format {form} -o report")
    assert Path("report").read_text(encoding="utf-8") == printed.out
    assert written == Result(1, "", "vanishing  net.py:sigmoids: written to report\n")


def test_select_and_ignore(run: Run) -> None:
    assert run("check net.py:sigmoids --select EG,SA").status == 0
    assert run("check net.py:sigmoids --ignore vanishing-gradient").status == 0
    assert run("check net.py:sigmoids --ignore VG102,EG").status == 1


def test_a_mistyped_code_is_not_silently_healthy(run: Run) -> None:
    refused = run("check net.py:sigmoids --select vanishing-gradiant")
    assert refused.status == 2
    assert "did you mean vanishing-gradient" in refused.err


def test_the_same_seed_gives_the_same_report(run: Run) -> None:
    Path("net.py").write_text(NET + "\ndef bare(): return network(2, nn.Tanh)[0]\n")

    def report(seed: int) -> str:
        return run(f"check net.py:bare --input 4,16 --format json --seed {seed}").out

    assert report(1) == report(1)
    assert report(1) != report(2)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("check net.py:vector", "the loss has shape (32, 4)"),
        ("check net.py:detached", "does not depend on the model's parameters"),
        ("check net.py:no_tensor", "returned float, not a tensor"),
        ("check net.py:nothing", "has no name 'nothing'"),
        ("check net.py:shallow --input 3,4", "brings its own data"),
        ("check net.py:shallow --input 3x4", "type a shape as 32,64"),
        ("check net.py:shallow --optimizer sgdd", "'sgdd' is none of SGD"),
        ("check net.py:shallow --optimizer sgd:fast", "'fast' is no learning rate"),
        ("check net.py:shallow --optimizer sgd:1 --lr 2", "two learning rates"),
        ("check net.py:shallow --format yaml", "'yaml' is not one of"),
        ("check", "Missing argument 'TARGET'"),
        ("chekc net.py:shallow", "Did you mean 'check'?"),
        ("check net.py:shallow --inptu 3", "Did you mean '--input'?"),
    ],
)
def test_what_cannot_be_carried_out_ends_with_2_and_says_why(run: Run, line: str, words: str) -> None:
    refused = run(line)
    assert refused.status == 2
    assert refused.out == ""
    assert words in refused.err
    assert "Traceback" not in refused.err


def test_a_bug_of_ours_is_called_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["isograd.cli.check"]  # the name `check` in the package is the command
    monkeypatch.setattr(module, "_print", lambda *_: 1 / 0)
    broken = run("check net.py:shallow")
    assert broken.status == 2, "1 would say that the model is sick"
    assert "ZeroDivisionError" in broken.err
    assert "this is a bug in isograd" in broken.err


def test_interrupting_a_long_forward_takes_one_line(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET + "\nmodel = Sleeps(8, 8)\n")
    command = [sys.executable, "-m", "isograd", "check", "net.py:model", "--input", "4,8"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=pipe,
        stderr=pipe,
        text=True,
        encoding="utf-8",
        # A test run in the background ignores the signal, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.strip()) == (130, "", "isograd: interrupted")


# -- progress ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terminal", "patience", "shown"), [("1", 0.0, True), ("1", 60.0, False), ("", 0.0, False)]
)
def test_long_work_is_named_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    terminal: str,
    patience: float,
    shown: bool,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", terminal)
    monkeypatch.setattr(progress, "PATIENCE", patience)
    with progress.progress("importing torch") as say:
        time.sleep(0.2)
        say("measuring")
        time.sleep(0.2)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("measuring" in err) == shown
    assert shown or err == ""


# -- configuration -------------------------------------------------------------------------------------


def test_the_table_in_pyproject_sets_defaults(run: Run) -> None:
    Path("pyproject.toml").write_text(
        '[tool.isograd]\nformat = "github"\nignore = ["VG101"]\noptimizer = "sgd:0.1"\n'
    )
    assert run("check net.py:sigmoids").status == 0
    overridden = run("check net.py:sigmoids --ignore EG")
    assert overridden.status == 1
    assert overridden.out.startswith("::error ")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("selct = ['VG']", "unknown field `selct`"),
        ("select = 'VG'", "Expected `array | null`, got `str` - at `$.select`"),
        ("format = 'yaml'", "Invalid enum value 'yaml' - at `$.format`"),
        ("seed = ", "is not valid TOML"),
    ],
)
def test_a_table_that_makes_no_sense(tmp_path: Path, table: str, words: str) -> None:
    (tmp_path / "pyproject.toml").write_text(f"[tool.isograd]\n{table}\n")
    with pytest.raises(click.UsageError, match=re.escape(words)):
        config.load(tmp_path / "below" / "it")


def test_no_table_means_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.other]\nselect = 3\n")
    assert config.load(tmp_path) == config.Config()


# -- optimizer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rule", "lr"),
    [
        ("adamw:3e-4", "AdamW", 3e-4),
        ("SGD:0.1", "SGD", 0.1),
        ("adam", "Adam", 1e-3),
        ("NAdam", "NAdam", 2e-3),
    ],
)
def test_an_optimizer_by_name_and_rate(text: str, rule: str, lr: float) -> None:
    made = OptimizerType().convert(text, None, None).make(torch.nn.Linear(2, 2))
    assert type(made).__name__ == rule
    assert made.param_groups[0]["lr"] == lr


def test_a_rate_alone_is_that_of_plain_sgd() -> None:
    assert OptimizerSpec.at_rate(None, 0.5) == OptimizerSpec("SGD", 0.5)
    assert OptimizerSpec.at_rate(OptimizerSpec("AdamW", None), 0.5) == OptimizerSpec("AdamW", 0.5)


# -- explain and demo ----------------------------------------------------------------------------------


def test_explain_prints_the_page_by_code_and_by_name(run: Run) -> None:
    by_code = run("explain VG101")
    assert by_code.status == 0
    assert by_code.out.startswith("VG101 vanishing-gradient: ")
    assert by_code == run("explain vanishing-gradient") == run("explain vg101")


def test_explain_lists_all_pages(run: Run) -> None:
    findings, remedies = (part.splitlines() for part in run("explain").out.split("\n\n"))
    for lines in (findings, remedies):
        assert [line.split()[0] for line in lines] == sorted(line.split()[0] for line in lines)
    assert any(line.startswith("VG101  vanishing-gradient ") for line in findings)
    assert any(line.startswith("exchange-activation ") for line in remedies)


def test_explain_of_an_unknown_code_offers_the_nearest(run: Run) -> None:
    unknown = run("explain EG210")
    assert unknown.status == 2
    assert re.search("no finding or remedy is called 'EG210'; did you mean EG20", unknown.err)


def test_the_demo_says_what_is_wrong_and_what_to_type(run: Run) -> None:
    shown = run("demo")
    assert shown.status == 0
    assert "vanishing  isograd.demo:network" in shown.out
    assert "VG101 vanishing-gradient  error" in shown.out
    assert re.search(r"^cured$", shown.out, re.MULTILINE)
    assert re.search(r"^proven  ", shown.out, re.MULTILINE)
    commands = re.findall(r"^  (isograd .+?)  ", shown.out, re.MULTILINE)
    assert "isograd check isograd.demo:network" in commands
    assert run("check isograd.demo:network").status == 1
    assert run("explain vanishing-gradient").status == 0


@pytest.mark.parametrize("command", ["check", "spectrum", "horizon"])
def test_a_report_for_a_folder_that_is_missing_is_refused_before_anything_is_built(
    run: Run, command: str
) -> None:
    result = run(f"{command} net.py:no_such_name -o no/such/report")
    assert result.status == 2
    assert "there is no folder no/such to write report to" in result.err


@pytest.mark.parametrize("command", ["check", "repair", "spectrum", "horizon"])
@pytest.mark.parametrize("target", ["net.py:shallow", "net:shallow"])
def test_the_user_s_own_code_is_not_written_over(run: Run, command: str, target: str) -> None:
    result = run(f"{command} {target} -o ./net.py")
    assert result.status == 2
    assert f"-o would write over net.py, which holds {target}" in result.err
    assert Path("net.py").read_text() == NET


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("command", ["check net.py:shallow", "repair net.py:sigmoids"])
def test_a_full_disk_is_no_error_of_ours(run: Run, command: str) -> None:
    result = run(f"{command} -o /dev/full")
    assert result.status == 2
    assert result.err.endswith("/dev/full could not be written: No space left on device\n")
    assert result.out.startswith("cured" if command.startswith("repair") else "")


@pytest.mark.parametrize("command", ["check", "repair", "spectrum"])
def test_what_to_type_is_the_command_that_was_typed(run: Run, command: str) -> None:
    assert f"try  isograd {command} net.py:" in run(f"{command} net.py").err
