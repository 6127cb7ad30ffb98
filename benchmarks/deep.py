"""Very deep transformers diagnosed: time and memory beside a training step, and what the diagnosis says.

Each reading comes from a process of its own: python -m benchmarks.deep SCHEME LAYERS METHOD …
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import isograd
from benchmarks.memory import MB, ROOT, in_use
from benchmarks.report import progress, table
from benchmarks.workloads import Setting
from gallery.nets import Shape, Transformer
from isograd.graph.traced import Loss

SCHEMES = {"pre-norm": "pre", "post-norm": "post", "DeepNorm": "deep", "no norm": "none"}
TOKENS, BATCH, WIDTH, VOCABULARY = 32, 8, 64, 64
RATE = 1e-3
"""Of AdamW: what a shallow transformer of this width trains with."""


@dataclass(frozen=True)
class Cost:
    """What one method took in its own process."""

    seconds: float
    """Of processor time: other programs on the same cores do not count."""
    megabytes: float
    """Highest resident memory over that of the model before any step."""
    said: dict[str, Any]
    """Of a diagnosis: verdict, codes, gains and branch-to-stream ratios of the residual sites."""


def run(setting: Setting) -> Iterator[str]:
    """A table of costs and one of readings for every scheme, as they are measured."""
    depths = (6, 12) if setting.quick else (100, 300, 1000)
    yield (
        f"Decoders of width {WIDTH}, {TOKENS} tokens, batch {BATCH}, Xavier weights. Step: forward, backward and AdamW "
        f"at {RATE:g}; check: isograd.check with that optimizer. Seconds of processor time. Memory: highest resident "
        "set over that of the model before, MB. Each figure comes from a process of its own."
    )
    for scheme in SCHEMES:
        costs, readings = list[tuple[str, ...]](), list[tuple[str, ...]]()
        for layers in depths:
            progress(f"deep: {scheme}, {layers} layers")
            step, checked = (cost(scheme, layers, method, setting) for method in METHODS)
            costs.append(costs_row(layers, step, checked))
            readings.append(readings_row(layers, checked.said))
        yield f"## {scheme}"
        yield table(COSTS, costs)
        yield table(READINGS, readings)


COSTS = ("layers", "step s", "check s", "ratio", "step MB", "check MB", "ratio")
READINGS = ("layers", "verdict", "gain, all sublayers", "gain of one", "branch / stream", "findings")


def costs_row(layers: int, step: Cost, checked: Cost) -> tuple[str, ...]:
    """One depth in the table of costs."""
    return (
        f"{layers:,}",
        f"{step.seconds:.2f}",
        f"{checked.seconds:.2f}",
        f"{checked.seconds / step.seconds:.2f}",
        f"{step.megabytes:.0f}",
        f"{checked.megabytes:.0f}",
        f"{checked.megabytes / step.megabytes:.2f}",
    )


def readings_row(layers: int, said: dict[str, Any]) -> tuple[str, ...]:
    """One depth in the table of what was found."""

    def ends(values: list[float]) -> str:
        return f"{min(values):.4g} … {max(values):.4g}" if values else ""

    gains = said["gains"]
    decades = sum(math.log10(gain) for gain in gains)
    return (
        f"{layers:,}",
        said["verdict"],
        "" if not gains else f"{10**decades:.2f}" if abs(decades) < 4 else f"10^{decades:.0f}",
        ends(said["gains"]),
        ends(said["ratios"]),
        ", ".join(said["findings"]) or "none",
    )


def cost(scheme: str, layers: int, method: str, setting: Setting) -> Cost:
    """One method on one model in a fresh process.

    Raises:
        RuntimeError: the process failed, with the last line that it said.
    """
    # The C library returns what is freed at once, so that the peak is what was in use.
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-m", "benchmarks.deep", scheme, str(layers), method, str(setting.threads)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{scheme}, {layers} layers, {method}: {done.stderr.strip().splitlines()[-1]}")
    return Cost(*json.loads(done.stdout.splitlines()[-1]))


def built(scheme: str, layers: int) -> tuple[nn.Module, Loss, torch.optim.Optimizer]:
    """The model, the loss of one batch, and its optimizer; the same each time."""
    torch.manual_seed(0)
    model = Transformer(Shape(layers, width=WIDTH, norm=SCHEMES[scheme], vocabulary=VOCABULARY))
    tokens = torch.randint(VOCABULARY, (BATCH, TOKENS))

    def loss(model: nn.Module) -> Tensor:
        return functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())

    return model.train(), loss, torch.optim.AdamW(model.parameters(), lr=RATE)


def step(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """One training step."""
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()
    return {}


def check(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """One diagnosis, with its causes tested where something is wrong, and what it found."""
    diagnosis = isograd.check(model, loss, optimizer=optimizer)
    flow = diagnosis.flow
    ratios = [flow.splits[depth].forward_ratio for depth in sorted(flow.splits)]
    return {
        "verdict": diagnosis.verdict,
        "gains": sublayer_gains(flow),
        "ratios": [ratio for ratio in ratios if math.isfinite(ratio)],
        "findings": [f"{f.code} {f.severity.name.lower()}" for f in diagnosis.findings],
    }


def sublayer_gains(flow: isograd.Flow) -> list[float]:
    """Gain of each residual addition, with the normalisation that follows it where that is the scheme."""
    at, decades = sorted(flow.splits), flow.column("decades")
    after = int(bool(at) and flow.sites[at[0] + 1].kind == "normalisation")
    return [float(10 ** decades[i : i + 1 + after].sum()) for i in at if decades[i].isfinite()]


METHODS = {"step": step, "check": check}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scheme", choices=SCHEMES)
    parser.add_argument("layers", type=int)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("threads", type=int)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    model, loss, optimizer = built(asked.scheme, asked.layers)
    # What torch sets up with its first step, and what the diagnosis imports, is no cost of depth.
    METHODS[asked.method](*built("pre-norm", 1))
    before, _ = in_use("cpu")
    start = time.process_time()
    said = METHODS[asked.method](model, loss, optimizer)
    seconds = time.process_time() - start
    print(json.dumps((seconds, (in_use("cpu")[1] - before) * MB, said)))


if __name__ == "__main__":
    main()
