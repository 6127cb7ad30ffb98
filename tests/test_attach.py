"""`isograd watch -- …` on unchanged scripts: the same output, status and weights, and a record beside them."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from isograd import diagnose
from isograd.cli.watch import watch
from isograd.record import NotARun, Run

SCRIPTS = Path(__file__).parent / "scripts"
ISOGRAD = (sys.executable, "-m", "isograd")
QUIET = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "KERAS_BACKEND": "torch",
    "TOKENIZERS_PARALLELISM": "false",
}


def script(name: str, *args: object) -> list[str]:
    return [sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, args)]


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=QUIET, capture_output=True, text=True, timeout=240)


def watched(command: list[str], cwd: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    record = cwd / "run"
    return run([*ISOGRAD, "watch", "--run", str(record), *options, "--", *command], cwd), record


def norms(record: Path) -> list[float]:
    with Run.open(record) as kept:
        return [reading.scalars["grad_norm"] for reading in kept.readings()]


def test_a_plain_loop_trains_bitwise_the_same(tmp_path: Path) -> None:
    alone = run(script("plain", "--save", tmp_path / "alone.pt"), tmp_path)
    beside, record = watched(script("plain", "--save", tmp_path / "beside.pt"), tmp_path)
    assert (beside.returncode, beside.stdout) == (alone.returncode, alone.stdout) == (0, alone.stdout)
    first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("alone", "beside"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    with Run.open(record) as kept:
        readings = list(kept.readings())
    assert [r.step for r in readings] == list(range(30))
    assert readings[0].sites[0] == "inner.0.weight"
    # the gradient before it was clipped to 1, and the loss without a line in the script
    assert max(r.scalars["grad_norm"] for r in readings) > 1.001
    assert f"loss {readings[-1].scalars['loss']:.6f}" == alone.stdout.strip()


def test_findings_are_told_at_the_end_on_standard_error(tmp_path: Path) -> None:
    beside, _ = watched(script("plain", "--lr", "1e5", "--steps", 40), tmp_path)
    assert beside.returncode == 0
    assert "error" in beside.stderr
    assert "isograd report" in beside.stderr


LISTED = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = [nn.Linear(16, 16) for _ in range(3)]
        self.head = nn.Linear(16, 1)
    def forward(self, x):
        for layer in self.body:
            x = layer(x).relu()
        return self.head(x)
model = Net()
teacher = nn.Linear(16, 1).requires_grad_(False)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(3):
    x = torch.randn(4, 16)
    optimizer.zero_grad()
    (model(x) - teacher(x)).square().mean().backward()
    optimizer.step()
"""


@pytest.mark.parametrize("stray", [True, False])
def test_layers_in_a_plain_list_are_said_to_be_trained_by_nobody(tmp_path: Path, stray: bool) -> None:
    code = LISTED if stray else LISTED.replace("[nn", "nn.ModuleList([nn").replace("(3)]", "(3)])")
    (tmp_path / "train.py").write_text(code)
    beside, _ = watched([sys.executable, "train.py"], tmp_path)
    assert beside.returncode == 0
    said = " ".join(beside.stderr.split())
    words = "depends on 6 that are in no module of the model and in no optimizer, the largest 16 x 16"
    assert (words in said) is stray
    assert ("plain list" in said) is stray


SEARCH = """
import torch
from torch import nn
for rate in (0.01, 0.1, 1e9):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for step in range(30):
        x = torch.randn(16, 8)
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
"""


def test_of_a_search_only_what_was_found_is_told(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SEARCH)
    beside, record = watched([sys.executable, "train.py"], tmp_path)
    assert beside.returncode == 0
    assert beside.stderr.count("30 steps of model, nothing found, recorded") == 2
    assert f"30 steps of model recorded: isograd report {record}-3" in beside.stderr
    assert "not examined" not in beside.stderr


BREAKS = """
import torch
torch.manual_seed(0)
class Unit(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.out = torch.nn.Linear(4, 8, bias=False), torch.nn.Linear(8, 1)
    def forward(self, x):
        h = self.inp(x)
        return self.out(h / h.norm(dim=-1, keepdim=True))
model = Unit()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(12):
    x = torch.randn(16, 4) * (step != 9)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
"""


def test_the_line_that_broke_a_step_is_told_where_steps_are_replayed(tmp_path: Path) -> None:
    (tmp_path / "breaks.py").write_text(BREAKS)
    beside, record = watched([sys.executable, "breaks.py"], tmp_path, "--replay")
    assert beside.returncode == 0
    assert "at step 9: the loss is NaN; div · breaks.py:10" in " ".join(beside.stderr.split())
    with Run.open(record) as kept:
        (told,) = [told.content for told in kept.told() if told.content["code"] == "NF401"]
    assert told["evidence"]["source"] == "breaks.py:10"


LONG = """
import time, torch
w = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(w.parameters(), lr=0.1)
for step in range(6):
    optimizer.zero_grad()
    (w(torch.ones(2, 4)).sum() * (float("nan") if step == 4 else 1)).backward()
    optimizer.step()
time.sleep(3)
"""


@pytest.mark.slow
def test_what_is_found_is_said_while_a_long_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text(LONG)
    beside = run([*ISOGRAD, "watch", "--", sys.executable, "long.py"], tmp_path)
    (record,) = (tmp_path / "isograd-runs").iterdir()
    first, *lines = beside.stderr.splitlines()
    assert first.endswith(f"the record goes to isograd-runs/{record.name}")
    said = lines.index(
        "isograd: step 4  error NF405: the loss and the gradient of 2 of 2 parameters are not finite (5 elements)"
    )
    assert said < lines.index("broken")
    assert "--deep-every 1000" in beside.stderr


def test_the_exit_status_passes(tmp_path: Path) -> None:
    beside, record = watched(script("plain", "--fail"), tmp_path)
    assert beside.returncode == 7
    assert len(norms(record)) == 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_pass_and_what_was_found_is_told(tmp_path: Path, number: signal.Signals) -> None:
    record = tmp_path / "run"
    training = script("plain", "--steps", 1000000, "--lr", "1e5")
    process = subprocess.Popen(
        [*ISOGRAD, "watch", "--run", str(record), "--", *training],
        cwd=tmp_path,
        env=QUIET,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(600):
        with contextlib.suppress(NotARun):  # until its first steps are committed
            if len(norms(record)) > 9:
                break
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in errors
        assert process.returncode == -signal.SIGINT
    else:
        assert process.returncode == -number
        if hasattr(os, "pidfd_open"):
            assert "of a process that was killed" in errors
    if number == signal.SIGINT or hasattr(os, "pidfd_open"):
        assert errors.count("TR703 diverging  error") == 1
    assert len(norms(record)) > 9


SWEEP = """
import subprocess, sys
for rate in ("0.1", "0.01"):
    subprocess.run([sys.executable, sys.argv[1], "--lr", rate, "--steps", "5"], check=True)
"""


def test_trainings_of_one_script_have_a_record_each(tmp_path: Path) -> None:
    (tmp_path / "sweep.py").write_text(SWEEP)
    command = [sys.executable, "sweep.py", str(SCRIPTS / "plain.py")]
    for times in (1, 2):  # the second time each goes on where it was
        beside, record = watched(command, tmp_path)
        assert "another process" not in beside.stderr
        for path, rate in ((record, 0.1), (record.with_name("run-2"), 0.01)):
            with Run.open(path) as kept:
                assert kept.series("lr")[1] == pytest.approx([rate] * 5 * times)


def test_a_module_and_a_script_without_python_before_it(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text((SCRIPTS / "plain.py").read_text())
    for number, command in enumerate((["-m", "plain"], ["plain.py"], [sys.executable, "-m", "plain"])):
        got = run([*ISOGRAD, "watch", "--run", f"run{number}", "--quiet", "--", *command], tmp_path)
        assert got.returncode == 0, got.stderr
        assert got.stdout.startswith("loss ")
        assert "isograd" not in got.stderr
        assert len(norms(tmp_path / f"run{number}")) == 30


def test_torchrun_with_two_processes_keeps_one_record(tmp_path: Path) -> None:
    beside, record = watched(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(SCRIPTS / "ddp.py")],
        tmp_path,
    )
    assert beside.returncode == 0, beside.stderr
    told = [float(line.split()[1]) for line in beside.stdout.splitlines() if line.startswith("grad_norm")]
    assert norms(record) == pytest.approx(told, rel=1e-5)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["run"]


def test_hugging_face_trainer(tmp_path: Path) -> None:
    beside, record = watched(script("huggingface", tmp_path / "out"), tmp_path)
    assert beside.returncode == 0, beside.stderr
    # the Trainer's own log has the norm before clipping
    told = [float(line.split()[1]) for line in beside.stdout.splitlines() if line.startswith("grad_norm")]
    assert len(told) == 6
    assert norms(record) == pytest.approx(told, rel=1e-5)


def test_accelerate(tmp_path: Path) -> None:
    beside, record = watched(script("accelerate_loop"), tmp_path)
    assert beside.returncode == 0, beside.stderr
    told = [float(line.split()[1]) for line in beside.stdout.splitlines() if line.startswith("grad_norm")]
    # the epoch ends in the middle of an accumulation: its last step has one backward, not two
    assert norms(record) == pytest.approx(told, rel=1e-5)


def test_lightning(tmp_path: Path) -> None:
    beside, record = watched(script("lightning_module"), tmp_path)
    assert beside.returncode == 0, beside.stderr
    assert "steps 8" in beside.stdout
    assert len(norms(record)) == 8
    assert min(norms(record)) > 0.1  # before it was clipped to 0.1
    with Run.open(record) as kept:
        assert all(site.startswith("net.") for site in next(iter(kept.readings())).sites)


def test_keras(tmp_path: Path) -> None:
    alone = run(script("keras_fit"), tmp_path)
    beside, record = watched(script("keras_fit"), tmp_path)
    assert (beside.returncode, beside.stdout) == (0, alone.stdout)
    assert len(norms(record)) == 15
    assert all(norm > 0 for norm in norms(record))


def test_a_script_without_torch_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "hello.py").write_text("import sys\nprint(sys.argv[1:], 'torch' in sys.modules)\n")
    beside, record = watched([sys.executable, "hello.py", "--x", "1"], tmp_path, "--quiet")
    assert beside.stdout == "['--x', '1'] False\n"
    assert beside.stderr == ""
    assert not record.exists()


def test_another_sitecustomize_still_runs(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sitecustomize.py").write_text("print('mine')\n")
    command = [*ISOGRAD, "watch", "--quiet", "--run", "run", "--", sys.executable, "-c", "print('script')"]
    environment = {**QUIET, "PYTHONPATH": str(tmp_path / "mine")}
    got = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    # once in the process of `isograd watch` itself, once in the script's
    assert got.stdout.splitlines()[-2:] == ["mine", "script"]


def test_two_models_of_one_process_have_a_record_each(tmp_path: Path) -> None:
    beside, record = watched(script("gan"), tmp_path)
    assert beside.returncode == 0, beside.stderr
    told = [line.split()[1:] for line in beside.stdout.splitlines()]
    for column, path in enumerate((record, record.with_name("run-2"))):
        with Run.open(path) as kept:
            losses = [reading.scalars["loss"] for reading in kept.readings()]
        assert losses == pytest.approx([float(row[column]) for row in told], rel=1e-5)


def test_a_search_over_models_has_a_record_of_each_and_lets_go_of_them(tmp_path: Path) -> None:
    """Raw norms from the first step on, the loss of each step although gradients are cleared to zeros."""
    beside, record = watched(script("search"), tmp_path)
    assert beside.returncode == 0, beside.stderr
    lines = [line.split() for line in beside.stdout.splitlines()]
    for seed in range(3):
        with Run.open(tmp_path / f"run-{seed + 1}" if seed else record) as kept:
            rows = list(kept.rows())
        told = [
            (float(norm), float(loss))
            for who, norm, loss in (x for x in lines if len(x) == 3)
            if who == str(seed)
        ]
        assert [row.scalars["grad_norm"] for row in rows] == pytest.approx(
            [norm for norm, _ in told], rel=1e-4
        )
        assert [row.scalars["loss"] for row in rows] == pytest.approx([loss for _, loss in told], rel=1e-4)
        assert all(not row.notes for row in rows)
    # one that was let go of may stay until the next is found, two never
    assert max(int(words[1]) for words in lines if words[0] == "alive") <= 2
    assert beside.stderr.count("isograd report") == 3


SELF = """
import isograd, torch
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
monitor = isograd.watch(model, optimizer, run="own")
for _ in range(5):
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
print(monitor.latest().step)
"""  # and never closed


def test_a_script_that_watches_itself_is_left_to_it(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(SELF)
    beside, record = watched([sys.executable, "own.py"], tmp_path)
    assert (beside.returncode, beside.stdout) == (0, "4\n"), beside.stderr
    assert not record.exists()
    assert "the script watches its own training" in beside.stderr
    assert len(norms(tmp_path / "own")) == 5  # the last step too


ABRUPT = """
import os, torch
def train(steps):
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
train(5)
child = os.fork()
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    print("parent", flush=True)
    os._exit(4)
train(7)
os._exit(3)
"""


def test_a_process_that_leaves_at_once_tells_what_it_has_watched_itself(tmp_path: Path) -> None:
    (tmp_path / "abrupt.py").write_text(ABRUPT)
    beside, record = watched([sys.executable, "abrupt.py"], tmp_path)
    assert (beside.returncode, beside.stdout) == (4, "parent\n")
    assert [len(norms(record)), len(norms(tmp_path / "run-2"))] == [5, 7]
    lines = [line for line in beside.stderr.splitlines() if "isograd report" in line]
    assert [line.split()[1] for line in lines] == ["7", "5"]


PARTS = """
import torch
from torch import nn
encoder, decoder = nn.Linear(4, 3), nn.Sequential(nn.Linear(3, 2))
scale = torch.ones(2, requires_grad=True)
loose = {"fc.weight": torch.ones(1, 2, requires_grad=True)}
optimizer = torch.optim.SGD([*encoder.parameters(), *decoder.parameters(), scale, *loose.values()], lr=0.01)
for step in range(5):
    optimizer.zero_grad()
    loss = (nn.functional.linear(decoder(encoder(torch.ones(8, 4))) * scale, loose["fc.weight"]) - 1).square().mean()
    loss.backward()
    optimizer.step()
    print(loss.item())
"""


def test_what_is_no_single_module_has_the_names_of_the_script(tmp_path: Path) -> None:
    (tmp_path / "parts.py").write_text(PARTS)
    beside, record = watched([sys.executable, "parts.py"], tmp_path, "--deep-every", "2")
    assert beside.returncode == 0, beside.stderr
    with Run.open(record) as kept:
        readings = list(kept.readings())
    assert readings[0].sites == (
        *("scale", "fc.weight"),
        *("encoder.weight", "encoder.bias", "decoder.0.weight", "decoder.0.bias"),
    )
    told = [float(line) for line in beside.stdout.splitlines()]
    assert [reading.scalars["loss"] for reading in readings] == pytest.approx(told)
    assert all((reading.columns["grad_norm"] > 0).all() for reading in readings)
    assert "5 steps of encoder and decoder recorded" in beside.stderr
    assert "the script calls the parts one by one" in beside.stderr


BY_HAND = """
import sys, torch
model = torch.nn.Linear(4, 1)
model(torch.ones(2, 4)).sum().backward()
for p in model.parameters():
    p.data -= p.grad
sys.stdout.buffer.write(bytes(range(256)))
sys.exit(3)
"""


def test_a_script_without_an_optimizer_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "hand.py").write_text(BY_HAND)
    command = [*ISOGRAD, "watch", "--run", "run", "--", sys.executable, "hand.py"]
    done = subprocess.run(command, cwd=tmp_path, env=QUIET, capture_output=True, timeout=240)
    assert (done.returncode, done.stdout) == (3, bytes(range(256)))
    assert b"nothing was recorded: no optimizer of torch took a step" in done.stderr
    assert b"monitor.step()" in done.stderr


def test_a_script_that_ends_before_it_trains_is_not_told_what_a_loop_needs(tmp_path: Path) -> None:
    """As argparse ends it: nobody is told of a SystemExit."""
    beside, _ = watched([sys.executable, "-c", "import torch, sys; sys.exit(2)"], tmp_path)
    assert beside.returncode == 2
    assert "nothing was recorded: the script ended before it made an optimizer" in beside.stderr
    assert "monitor.step()" not in beside.stderr


def test_a_script_that_fails_before_its_first_step_is_not_told_what_a_loop_needs(tmp_path: Path) -> None:
    code = "import torch; torch.optim.SGD([torch.zeros(1)], lr=-1)"
    beside, _ = watched([sys.executable, "-c", code], tmp_path)
    assert beside.returncode == 1
    assert "nothing was recorded: the script ended with ValueError before" in beside.stderr
    assert "monitor.step()" not in beside.stderr


WORKERS = """
import torch
from torch.utils.data import DataLoader
if __name__ == "__main__":
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for x in DataLoader(torch.randn(12, 4), batch_size=4, num_workers=2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
"""


REMADE = """
import sys, torch

torch.manual_seed(0)
net = torch.nn.Linear(4, 2)
for part in range(2):
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for step in range(60):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(torch.eye(4)), torch.tensor([0, 1, 0, 1]))
        loss = loss * (float(sys.argv[1]) if part else 1)
        (loss if (part, step) != (0, 30) else loss + torch.tensor(0.0).log()).backward()
        optimizer.step()
"""


@pytest.mark.parametrize("factor", [1, 100])
def test_an_optimizer_that_is_made_anew_goes_on_with_the_training(tmp_path: Path, factor: int) -> None:
    """Unless the loss is another; what was found under the one before is told in any case."""
    (tmp_path / "remade.py").write_text(REMADE)
    beside, record = watched([sys.executable, "remade.py", str(factor)], tmp_path)
    assert beside.returncode == 0, beside.stderr
    assert "at step 30: the loss is not finite" in beside.stderr
    assert "120 steps of net recorded" in beside.stderr
    with Run.open(record) as kept:
        assert any("begins at step 60" in n for n in diagnose(kept).flow.notes) == (factor > 1)


MANY = """
import torch

torch.manual_seed(0)
net = torch.nn.Linear(4, 2)
for epoch in range(34):
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for step in range(int(__import__("sys").argv[1])):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(torch.eye(4)), torch.tensor([0, 1, 0, 1])).backward()
        optimizer.step()
"""


@pytest.mark.parametrize("steps", [10, 1])
def test_optimizers_that_take_over_a_model_are_watched_however_many_they_are(
    tmp_path: Path, steps: int
) -> None:
    """Unless each of them takes few steps: to look for one costs as much as many."""
    (tmp_path / "many.py").write_text(MANY)
    beside, _ = watched([sys.executable, "many.py", str(steps)], tmp_path)
    assert f"{340 if steps == 10 else 32} steps of net recorded" in beside.stderr
    assert ("make it before the loop" in beside.stderr) == (steps == 1)


WITHIN = """
import torch

torch.manual_seed(0)
net = torch.nn.Linear(4, 2)
optimizers = {p: torch.optim.Adam([p], lr=1e-3) for p in net.parameters()}

def step(p):
    optimizers[p].step()
    optimizers[p].zero_grad()

for p in net.parameters():
    p.register_post_accumulate_grad_hook(step)
for _ in range(10):
    torch.nn.functional.cross_entropy(net(torch.eye(4)), torch.tensor([0, 1, 0, 1])).backward()
"""


def test_the_loss_of_optimizers_that_step_within_the_backward_is_seen(tmp_path: Path) -> None:
    (tmp_path / "within.py").write_text(WITHIN)
    _, record = watched([sys.executable, "within.py"], tmp_path)
    with Run.open(record) as kept:
        losses = kept.series("loss")[1]
    assert len(losses) == len(norms(record)) == 10
    assert losses == sorted(losses, reverse=True)


COMPILED = """
import torch

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
optimizer = torch.optim.Adam(net.parameters(), lr=0.01)

@torch.compile(backend="eager")
def step(x):
    loss = net(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss

for _ in range(5):
    step(torch.randn(16, 4))
print([p.sum().item() for p in net.parameters()])
"""


def test_a_step_that_is_compiled_as_a_whole_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "compiled.py").write_text(COMPILED)
    alone = run([sys.executable, "compiled.py"], tmp_path)
    beside, _ = watched([sys.executable, "compiled.py"], tmp_path)
    assert (beside.returncode, beside.stdout) == (alone.returncode, alone.stdout) == (0, alone.stdout)
    assert "stopped watching" not in beside.stderr
    assert "leave loss.backward() and optimizer.step() out of it" in beside.stderr


def test_workers_of_a_loader_record_nothing(tmp_path: Path) -> None:
    (tmp_path / "workers.py").write_text(WORKERS)
    beside, record = watched([sys.executable, "workers.py"], tmp_path)
    assert beside.returncode == 0, beside.stderr
    assert len(norms(record)) == 6
    assert beside.stderr.count("isograd report") == 1
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["run"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "there is nothing to watch"),
        (["--lr", "3", "train.py"], "isograd watch has no option --lr"),
        (["--run", "file/run", "--", "python", "x.py"], "file is a file"),
        (["--run", "sealed/run", "--", "python", "x.py"], "sealed may not be written"),
        (
            ["--run", "other", "--", "python", "x.py"],
            "other/run.sqlite is a database, but no record of a run",
        ),
        (["--run", "spoilt", "--", "python", "x.py"], "file is not a database"),
        (["--", "no-such-program"], "there is no program 'no-such-program'"),
    ],
)
def test_what_cannot_be_watched_says_why_and_what_to_type(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for name in ("sealed", "other", "spoilt"):
        (tmp_path / name).mkdir()
    (tmp_path / "spoilt" / "run.sqlite").write_text("hello" * 1000)
    sqlite3.connect(tmp_path / "other" / "run.sqlite").execute("CREATE TABLE info (key)").connection.close()
    access = os.access  # root may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "sealed" and access(path, mode))
    monkeypatch.chdir(tmp_path)
    got = CliRunner().invoke(watch, words)
    assert got.exit_code == 2
    assert told in got.stderr
    assert "  try  isograd watch " in got.stderr
