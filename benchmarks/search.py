"""What finding a repair costs, in training steps of the same model, and what is found.

Each reading comes from a process of its own, in which nothing was computed before: python -m benchmarks.search CASE METHOD
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import isograd
from benchmarks.memory import ROOT
from benchmarks.report import progress, table
from benchmarks.workloads import Setting
from gallery.nets import HE, Shape, Transformer, initialised, mlp
from isograd.graph.traced import Loss
from isograd.judge import Train, short_training
from isograd.remedies import remedies

TARGET = 50
"""Training steps that a search may take."""
STEPS = 15
"""Steps of which the median is taken."""
METHODS = ("check", "repair")
Built = tuple[nn.Module, Loss]


@dataclass(frozen=True)
class Case:
    """A sick model, and how it is to be judged."""

    name: str
    build: Callable[[], Built]
    named: bool = True
    """One of those that the target is for; the others are small, where a step costs next to nothing."""
    judge: Callable[[Loss], Train] | None = None
    """Training by which a healthy flow is judged."""


def classified(model: nn.Module, batch: int = 64) -> Built:
    """64 numbers in, 10 classes out."""
    x, y = torch.randn(batch, 64), torch.randint(10, (batch,))
    return model, lambda m: functional.cross_entropy(m(x), y)


class Recurrent(nn.Module):
    """A tanh recurrence and a head that reads its last step."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.rec, self.head = nn.RNN(8, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rec(x)[0][:, -1])


def recurrent(steps: int) -> Built:
    x, y = torch.randn(32, steps, 8), torch.randint(10, (32,))
    return Recurrent(), lambda m: functional.cross_entropy(m(x), y)


class Branching(nn.Module):
    """x + f(x) with nothing that holds its size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.branch = initialised(inner, HE)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def normalised(layers: int, width: int = 64) -> Built:
    body = [part for _ in range(layers) for part in (nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU())]
    return classified(nn.Sequential(*body, nn.Linear(width, 10)))


def residual(blocks: int, width: int = 64) -> Built:
    body = (Branching(width) for _ in range(blocks))
    return classified(nn.Sequential(nn.Linear(64, width), *body, nn.Linear(width, 10)))


def post_norm(layers: int) -> Built:
    tokens = torch.randint(64, (8, 32))
    model = Transformer(Shape(layers, width=64, norm="post"))
    return model, lambda m: functional.cross_entropy(m(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())


def efficientnet() -> Built:
    import transformers

    from examples.efficientnet import build

    transformers.logging.set_verbosity_error()
    return build()


def twin(name: str) -> Built:
    from benchmarks.twins.trial import _by_name

    case = _by_name()[name]
    return case.build(0, faulty=True), case.loss(0)


CASES = (
    Case("sigmoid mlp, 100 layers", lambda: classified(mlp(nn.Sigmoid, 100, 64, None))),
    Case("tanh rnn, T = 200", lambda: recurrent(200)),
    Case("60 batch norms without skips", lambda: normalised(60)),
    Case("exploding residual net, 30 blocks", lambda: residual(30)),
    Case("post-norm transformer, 96 layers", lambda: post_norm(96), judge=lambda loss: short_training(loss)),
    Case("EfficientNet as transformers builds it", efficientnet),
    *(
        Case(name, lambda name=name: twin(name), named=False)
        for name in (
            "relu mlp 16 / weights x 0.4",
            "relu mlp 16 / sigmoid",
            "relu mlp 16 / biases -2",
            "relu mlp 16 / one layer x 0.0001",
            "tanh mlp 30 / weights x 4",
            "relu cnn 8 / weights x 3",
            "bare residual mlp 20 / skips x 2",
            "lstm on rows, T=64 / gates that forget",
            "pre-norm decoder 3 / weights x 8",
        )
    ),
)
"""Those that the target is for, then small ones."""
QUICK = ("exploding residual net, 30 blocks", "relu mlp 16 / weights x 0.4")


@dataclass(frozen=True)
class Reading:
    """What one method took in its own process: seconds of processor time."""

    step: float
    """One training step: forward, backward and AdamW; the median."""
    seconds: float
    """The method, once, without any training that judged it."""
    said: dict[str, Any]


def run(setting: Setting) -> Iterator[str]:
    """One table: a row for each case."""
    yield (
        f"Processor time, each method once in a process of its own with nothing computed before. Step: the median of "
        f"{STEPS} training steps (forward, backward, AdamW). Ratio: of the search to one step; goal {TARGET}. Where a "
        "training judges, its own time is left out. Measured: candidates of which the flow was measured."
    )
    chosen = [case for case in CASES if not setting.quick or case.name in QUICK]
    for title, named in (("named", True), ("small", False)):
        rows = [row(case, setting) for case in chosen if case.named is named]
        yield f"## {title}\n\n" + table(
            ("", "step ms", "check", "search s", "ratio", "cured", "measured", "prescription"), rows
        )


def row(case: Case, setting: Setting) -> tuple[str, ...]:
    """One case in the table."""
    checked, found = (reading(case, method, setting) for method in METHODS)
    step = min(checked.step, found.step)
    progress(f"search: {case.name}, {found.seconds / step:.0f} steps")
    return (
        case.name,
        f"{step * 1e3:.1f}",
        f"{checked.seconds / step:.1f}",
        f"{found.seconds:.2f}",
        f"{found.seconds / step:.1f}",
        "yes" if found.said["cured"] else "no",
        str(found.said["measured"]),
        found.said["prescription"],
    )


def reading(case: Case, method: str, setting: Setting) -> Reading:
    """One method on one model in a fresh process.

    Raises:
        RuntimeError: the process failed, with the last line that it said.
    """
    command = [sys.executable, "-m", "benchmarks.search", case.name, method, str(setting.threads)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case.name}, {method}: {done.stderr.strip().splitlines()[-1]}")
    return Reading(*json.loads(done.stdout.splitlines()[-1]))


def training_step(model: nn.Module, loss: Loss) -> float:
    """Median seconds of processor time, on a copy-free model that is built anew afterwards."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6)
    taken: list[float] = []
    for _ in range(STEPS + 2):
        began = time.process_time()
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
        taken.append(time.process_time() - began)
    return statistics.median(taken[2:])


def once(case: Case, method: str) -> Reading:
    """Build, time the steps, build again, and time the method."""
    list(remedies())  # what is imported is not computed
    torch.manual_seed(0)
    step = training_step(*case.build())
    torch.manual_seed(0)
    model, loss = case.build()
    judging = 0.0
    train = case.judge(loss) if case.judge is not None else None

    def judged(changed: nn.Module, seed: int) -> float:
        nonlocal judging
        assert train is not None
        began = time.process_time()
        score = train(changed, seed)
        judging += time.process_time() - began
        return score

    began = time.process_time()
    if method == "check":
        diagnosis = isograd.check(model, loss)
        return Reading(step, time.process_time() - began, {"verdict": diagnosis.verdict})
    found = isograd.repair(model, loss, train=None if train is None else judged)
    seconds = time.process_time() - began - judging
    rx = found.prescription
    said = {
        "cured": found.cured,
        "measured": sum(bool(tried.verdict) for tried in found.tried),
        "prescription": "none" if rx is None else f"{rx.remedy}: {rx.title}",
    }
    return Reading(step, seconds, said)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__)
    parser.add_argument("case", choices=[case.name for case in CASES])
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("threads", type=int)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    case = next(case for case in CASES if case.name == chosen.case)
    found = once(case, chosen.method)
    print(json.dumps([found.step, found.seconds, found.said]))


if __name__ == "__main__":
    main()
