"""Deep Information Propagation on digits: python -m gallery.trainability [--quick] [--store FILE] [--save]

Plain tanh networks of many depths and weight scales are trained, and stand beside the depth to which theory
expects them to train. Interrupted runs go on where they stopped.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from gallery.training import Setting, digits, train
from isograd import theory
from isograd.trainability import Point, trainability

DOCS = Path(__file__).parents[1] / "docs"
WIDTH, BATCH, STEPS = 100, 64, 200
RATES = (0.1, 0.01)
"""Of SGD with momentum; the best counts, so that a depth is not blamed for its learning rate."""
ENOUGH = 0.5
"""Accuracy that counts as trained: chance is 0.1, shallow networks reach 0.95."""
SIGMA_W = tuple(round(0.8 + 0.2 * k, 1) for k in range(12))
DEPTHS = (4, 8, 12, 16, 24, 32, 48, 64)


def network(point: Point) -> nn.Sequential:
    """64 inputs, `depth` layers of `WIDTH` units, 10 logits; weights and biases drawn as the point says."""
    layers: list[nn.Module] = []
    fan_ins = [64] + [WIDTH] * (point.depth - 1)
    for fan_in in fan_ins:
        linear = nn.Linear(fan_in, WIDTH)
        nn.init.normal_(linear.weight, std=point.sigma_w / math.sqrt(fan_in))
        nn.init.normal_(linear.bias, std=math.sqrt(point.sigma_b2))
        layers += [linear, Elementwise(point.phi)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


class Elementwise(nn.Module):
    """An activation by its name in theory."""

    def __init__(self, phi: str) -> None:
        super().__init__()
        self.phi = phi

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return theory.NAMES[self.phi](x)


def trained(point: Point, *, steps: int = STEPS, rates: Sequence[float] = RATES) -> float:
    """Best held-out accuracy over the learning rates: the trial."""
    task, best = digits(BATCH), 0.0
    for rate in rates:
        score = train(
            lambda: network(point), task, Setting("sgd", rate), seed=0, steps=steps, enough=0.9, every=25
        )
        best = max(best, score)
        if best >= 0.9:
            break
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gallery.trainability",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="six small networks: does it run?")
    parser.add_argument(
        "--store", type=Path, default=Path("trainability.jsonl"), help="of the trials, resumable"
    )
    parser.add_argument("--save", action="store_true", help="write docs/trainability.svg and .json")
    asked = parser.parse_args()
    found = trainability(
        "tanh",
        sigma_w=(1.0, 1.8, 3.0) if asked.quick else SIGMA_W,
        depths=(2, 4) if asked.quick else DEPTHS,
        train=trained,
        store=asked.store,
        progress=lambda done, all: print(
            f"\rtrained {done} of {all} networks", end="", file=sys.stderr, flush=True
        ),
    )
    print(file=sys.stderr)
    print(found)
    print(f"theory tells rightly whether a network reaches {ENOUGH:g}: {found.agreement(ENOUGH):.0%}")
    if asked.save:
        (DOCS / "trainability.svg").write_text(found.to_svg(), encoding="utf-8")
        (DOCS / "trainability.json").write_text(found.to_json(), encoding="utf-8")


if __name__ == "__main__":
    main()
