"""Lead time and false alarms of the detectors, beside the rules of today's tools: python -m gallery.detectors

Trainings of `gallery.watched`, each with two seeds, and the 13 scenarios of training-failure-atlas with ten. Every
second training was there to develop the detectors with, the others only to judge them. Recorded once, in
build/watched (`--store`): a second call reads the record. Some minutes on one core.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gallery.keras_net import Spec
from gallery.published import facts
from gallery.rules import RULES, Rule, first_after
from gallery.watched import CLEAN, SICK, Session, Watched, classify, readings
from isograd.diagnosis import Finding, Severity
from isograd.monitor.detectors import Detectors
from isograd.monitor.reading import Reading
from isograd.record import Run

SEEDS = (0, 1)
STORE = Path("build/watched")
SLOW = 20
"""Steps from the onset to the break, from which on anybody could be early."""


def recorded(store: Path, watched: Watched, seed: int) -> list[Reading]:
    """The readings of a training, trained now if it was never recorded to its end."""
    path = store / f"{watched.name.replace(' ', '-')}-{seed}"
    if path.is_dir():
        run = Run.open(path)
        if run.progress().ended:
            return list(run.readings())
    with Run.create(path) as run:
        for reading in readings(watched.start(seed), seed):
            run.append(reading)
        return list(run.readings())


def told(made: Iterable[Reading]) -> list[tuple[int, Finding]]:
    """What the detectors tell, by step."""
    detectors = Detectors()
    return [(reading.step, finding) for reading in made for finding in detectors.observe(reading)]


def isograd_rule(made: Iterable[Reading]) -> Iterator[int]:
    """Any finding above INFO."""
    return (step for step, finding in told(made) if finding.severity > Severity.INFO)


# -- lead time and false alarms ---------------------------------------------------------------------------


@dataclass
class Score:
    """How one tool did."""

    clean: int = 0
    false: int = 0
    failing: int = 0
    found: int = 0
    early: int = 0
    """Failing runs with an alarm before the fault."""
    delays: list[int] | None = None
    leads: list[int] | None = None
    """Steps between the alarm and the break, where there is one; negative: too late."""
    slow: list[int] | None = None
    """Of those, the leads of the runs that break SLOW steps after the onset or later."""

    def row(self, name: str) -> str:
        delays = self.delays or []
        cells = (
            f"{self.false} / {self.clean}",
            f"{self.found} / {self.failing}",
            f"{self.early}",
            f"{median(delays):.0f}" if delays else "",
            _before(self.slow or []),
            _before(self.leads or []),
        )
        return f"| {name} | " + " | ".join(cells) + " |"


def _before(leads: Sequence[int]) -> str:
    if not leads:
        return ""
    return f"{median(leads):+.0f} ({sum(lead > 0 for lead in leads)} of {len(leads)} before it)"


def breaks(made: Sequence[Reading], onset: int) -> int | None:
    """The step at which a training is lost for everybody to see: a loss that is not finite, or three times the first."""
    first = made[0].scalars["loss"]
    lost = (r.step for r in made if r.step >= onset and not r.scalars["loss"] <= 3 * first)
    return next(lost, None)


def score(tool: Rule, clean: Iterable[list[Reading]], failing: Iterable[tuple[int, list[Reading]]]) -> Score:
    """Apply one tool to all runs."""
    found = Score(delays=[], leads=[], slow=[])
    assert found.delays is not None
    assert found.leads is not None
    assert found.slow is not None
    for made in clean:
        found.clean += 1
        found.false += next(tool(made), None) is not None
    for onset, made in failing:
        found.failing += 1
        steps = list(tool(made))
        alarm = first_after(steps, onset)
        found.early += any(step < onset for step in steps)
        if alarm is None:
            continue
        found.found += 1
        found.delays.append(alarm - onset)
        broken = breaks(made, onset)
        if broken is not None:
            found.leads.append(broken - alarm)
            if broken - onset >= SLOW:
                found.slow.append(broken - alarm)
    return found


HEAD = (
    "| | clean runs with an alarm | failing runs told | alarm before the fault | median delay | lead, slow onsets | lead, all |\n"
    "|---|---|---|---|---|---|---|"
)


def table(store: Path, half: slice) -> Iterator[str]:
    """One row a tool, over a half of the trainings."""
    clean = [recorded(store, watched, seed) for watched in CLEAN[half] for seed in SEEDS]
    failing = [
        (watched.onset or 0, recorded(store, watched, seed)) for watched in SICK[half] for seed in SEEDS
    ]
    tools: dict[str, Rule] = {"**isograd**": isograd_rule} | RULES
    yield HEAD
    for name, tool in tools.items():
        yield score(tool, clean, failing).row(name)


def misses(store: Path, half: slice) -> Iterator[str]:
    """Every run in which the detectors were wrong: alarms of clean runs, faults untold or named as something else."""
    for watched in CLEAN[half]:
        for seed in SEEDS:
            found = told(recorded(store, watched, seed))
            if found:
                yield f"- clean, {watched.name} #{seed}: {_listed(found)}"
    for watched in SICK[half]:
        for seed in SEEDS:
            found = told(recorded(store, watched, seed))
            onset = watched.onset or 0
            if not any(f.code in watched.expected and step >= onset for step, f in found):
                yield f"- {watched.name} #{seed}, from step {onset}: {_listed(found) or 'nothing told'}"
            elif any(step < onset for step, _ in found):
                yield f"- {watched.name} #{seed}, an alarm before the fault at {onset}: {_listed(found)}"


def _listed(found: Sequence[tuple[int, Finding]]) -> str:
    return ", ".join(f"{f.code} at {step}" for step, f in found[:4])


# -- training-failure-atlas -------------------------------------------------------------------------------


ATLAS_SEEDS = range(300, 310)
SAME_TRAINING = ("val_distribution_shift", "val_leakage", "val_label_mismatch")
"""Faults of the validation only: the training is the healthy one, bit by bit."""


def atlas_session(config: Spec, seed: int) -> Session:
    """The scenario's training: one MLP on scikit-learn's digits, 1,300 rows, an epoch in batches of 64."""
    raw, labels = load_digits(return_X_y=True)
    rows = torch.randperm(len(raw), generator=torch.Generator().manual_seed(seed))[
        : config["train_size"] or 1300
    ]
    x, y = torch.tensor(raw, dtype=torch.float32)[rows], torch.tensor(labels)[rows]
    if config["standardize"]:
        x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
    x = x * config["input_scale"]
    chance = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(y), generator=chance) < config["label_noise"]
    y = torch.where(wrong, torch.randint(10, (len(y),), generator=chance), y)
    if not config["shuffle"]:
        x, y = x[y.argsort()], y.sort().values
    torch.manual_seed(seed)
    model = _mlp(config)
    size = config["batch_size"]
    epoch = math.ceil(len(x) / size)
    order = torch.arange(len(x))

    def batch(step: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        nonlocal order
        if step % epoch == 0 and config["shuffle"]:
            order = torch.randperm(len(x), generator=generator)
        part = order[step % epoch * size :][:size]
        return x[part], y[part]

    optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=0.9)
    return Session(model, optimizer, batch, classify, steps=config["epochs"] * epoch)


@torch.no_grad()
def _mlp(config: Spec) -> nn.Sequential:
    activation = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}[config["activation"]]
    sizes = [64, *config["hidden"], 10]
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        layer = nn.Linear(fan_in, fan_out)
        layer.weight *= config["init_gain"]
        layers.append(layer)
        if i < len(sizes) - 2:
            layer.bias.fill_(config["hidden_bias"])
            layers.append(activation())
    return nn.Sequential(*layers)


def named(found: Sequence[tuple[int, Finding]]) -> str:
    """The scenario that the findings name: by their causes, the earliest first. Nothing told: no gradient fault."""
    causes = {
        "unnormalised-input": "unnormalized_inputs",
        "initialisation": "exploding_init",
        "learning-rate": "lr_too_high",
        "weight-growth": "lr_too_high",
        "data": "unshuffled",
        "data-order": "unshuffled",
    }
    codes = {
        "VG103": "vanishing_gradients",
        "SA303": "dead_relus",
        "UP507": "lr_too_low",
        "UP505": "vanishing_gradients",
    }
    for _, finding in found:
        label = causes.get(str(finding.evidence.get("cause", ""))) or codes.get(finding.code)
        if label:
            return label
    return "other" if found else "none"


def atlas(store: Path, seeds: Iterable[int] = ATLAS_SEEDS) -> Iterator[str]:
    """One row a scenario: how often the detectors name it right, and what they say instead."""
    yield "| scenario | named right | named as |\n|---|---|---|"
    right = total = 0
    gradient = {
        "unnormalized_inputs",
        "exploding_init",
        "lr_too_high",
        "vanishing_gradients",
        "dead_relus",
        "lr_too_low",
    }
    for fact in facts("training_failure_atlas"):
        label = fact["ground_truth"]
        trained = "healthy" if label in SAME_TRAINING else label
        expected = {label} if label in gradient else {label, "none"}

        def start(seed: int, config: Spec = fact["config"]) -> Session:
            return atlas_session(config, seed)

        said = Counter(
            named(told(recorded(store, Watched(f"atlas {trained}", start), seed))) for seed in seeds
        )
        named_right = sum(said[name] for name in expected)
        right, total = right + named_right, total + sum(said.values())
        others = ", ".join(f"{name} {count}" for name, count in said.items() if name not in expected)
        yield f"| {label} | {named_right} / {sum(said.values())} | {others} |"
    yield f"| **all** | **{right} / {total}** | their authors' rules, with the validation to look at: 124 / 130 |"


PARTS: dict[str, Callable[[Path, int], Iterator[str]]] = {
    "judged": lambda store, _: table(store, slice(1, None, 2)),
    "developed": lambda store, _: table(store, slice(0, None, 2)),
    "misses": lambda store, _: misses(store, slice(0, None)),
    "atlas": lambda store, seeds: atlas(store, ATLAS_SEEDS[:seeds]),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="*", help=f"of: {', '.join(PARTS)}; all by default")
    parser.add_argument("--store", type=Path, default=STORE, help=f"default: {STORE}")
    parser.add_argument("--seeds", type=int, default=10, help="seeds of each scenario of the atlas, of 10")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    for part in arguments.part or PARTS:
        print(f"\n## {part}\n")
        for line in PARTS[part](arguments.store, arguments.seeds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
