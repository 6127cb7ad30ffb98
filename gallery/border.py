"""Where depth starts to hurt: decades of gradient against the accuracy that training still reaches.

    python -m gallery.border               print the table
    python -m gallery.border --establish   train what the table lacks, one row at a time (resumable)

Each row is a plain MLP on scikit-learn's digits. The accuracy is the best over a grid of learning
rates, on seed 0, confirmed with a second seed; training stops at 90%.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gallery.training import ADAMW, SGD, Setting, Task, best_of, digits, train

RESULTS = Path(__file__).with_name("border.json")
STEPS = 300
ENOUGH = 0.9

ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


@dataclass(frozen=True)
class Net:
    """An MLP of `depth` hidden layers between 64 inputs and 10 logits, biases zero unless default."""

    activation: str
    weights: str
    """'gain': N(0, gain^2 * 2 / fan_in), 'xavier': uniform, 'default': what nn.Linear does."""
    gain: float
    depth: int
    width: int

    def build(self) -> nn.Sequential:
        sizes = [64] + [self.width] * self.depth
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            layers += [self._linear(fan_in, fan_out), ACTIVATIONS[self.activation]()]
        return nn.Sequential(*layers, nn.Linear(self.width, 10))

    def _linear(self, fan_in: int, fan_out: int) -> nn.Linear:
        linear = nn.Linear(fan_in, fan_out)
        if self.weights == "gain":
            nn.init.normal_(linear.weight, std=self.gain * math.sqrt(2 / fan_in))
            nn.init.zeros_(linear.bias)
        elif self.weights == "xavier":
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        return linear

    @property
    def key(self) -> str:
        return f"{self.activation}-{self.weights}-{self.gain:g}-d{self.depth}-w{self.width}"


def grid() -> list[Net]:
    """The rows of the table."""
    gains = (0.3, 0.41, 0.5, 0.7, 0.85, 0.95, 1.05, 1.2, 1.5, 2.0)
    nets = [Net("relu", "gain", g, depth, 128) for depth in (4, 6, 8, 12, 20, 30, 50) for g in gains]
    nets += [
        Net(activation, weights, 1.0, depth, 128)
        for activation in ("sigmoid", "tanh")
        for weights in ("xavier", "default")
        for depth in (3, 4, 5, 6, 8, 10, 15, 20)
    ]
    nets += [Net("relu", "default", 1.0, depth, 128) for depth in (4, 6, 8, 12, 20, 30)]
    nets += [
        Net("relu", "gain", g, depth, width)
        for width in (64, 256)
        for depth in (8, 12, 20)
        for g in (0.41, 0.5, 0.7, 1.5, 2.0)
    ]
    return nets


def flow(net: Net, seeds: int = 3) -> dict[str, float]:
    """Decades from the last hidden layer to the first, backward and forward, in float64; mean over seeds."""
    x, y = digits().held_out
    backward: list[float] = []
    forward: list[float] = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = net.build().double()
        hidden: list[Tensor] = []
        value = x.double()
        for layer in model:
            value = layer(value)
            if not isinstance(layer, nn.Linear):
                hidden.append(value)
        loss = nn.functional.cross_entropy(value, y)
        first, last = torch.autograd.grad(loss, (hidden[0], hidden[-1]))
        backward.append(math.log10(first.norm().item() / last.norm().item()))
        forward.append(math.log10(hidden[-1].norm().item() / hidden[0].norm().item()))
    return {"decades": sum(backward) / seeds, "forward_decades": sum(forward) / seeds}


def trained(net: Net, task: Task, setting: Setting, seed: int) -> float:
    """The accuracy that one training reaches."""
    return train(net.build, task, setting, seed=seed, steps=STEPS, enough=ENOUGH)


def establish() -> None:
    """Measure and train every row that the file lacks; the file grows row by row."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    task = digits()
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for net in grid():
        if net.key in rows:
            continue
        started = time.perf_counter()
        row: dict[str, Any] = asdict(net) | flow(net)
        run = partial(trained, net, task)
        for name, settings in (("adamw", ADAMW), ("sgd", SGD)):
            row[name] = asdict(best_of(run, settings, seeds=2, enough=ENOUGH))
        row["seconds"] = round(time.perf_counter() - started, 1)
        rows[net.key] = row
        RESULTS.write_text(json.dumps(rows, indent=1))
        print(net.key, f"{row['decades']:+.2f}", row["adamw"]["score"], row["sgd"]["score"], flush=True)


def table() -> str:
    """The rows by measured decades, the most negative first."""
    rows: list[dict[str, Any]] = sorted(
        json.loads(RESULTS.read_text()).values(), key=lambda row: row["decades"]
    )
    head = f"{'net':32} {'depth':>5} {'width':>5} {'back':>7} {'fwd':>7} {'per layer':>9} {'AdamW':>6} {'SGD':>6}  best"
    lines = [head]
    for row in rows:
        name = f"{row['activation']} {row['weights']}" + (
            f" {row['gain']:g}" if row["weights"] == "gain" else ""
        )
        sigma = 10 ** (row["decades"] / (row["depth"] - 1))
        best = max((row["adamw"], row["sgd"]), key=lambda outcome: outcome["score"])
        lines.append(
            f"{name:32} {row['depth']:5} {row['width']:5} {row['decades']:7.2f} {row['forward_decades']:7.2f}"
            f" {sigma:9.3f} {row['adamw']['score']:6.2f} {row['sgd']['score']:6.2f}  {best['setting']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--establish", action="store_true")
    if parser.parse_args().establish:
        establish()
    print(table())
