"""How the cost grows with depth: the work on the autograd graph is linear in its nodes.

Pre-norm transformers, narrow, so that the graph is all there is to pay for.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from torch import nn

import isograd
from benchmarks.memory import MB, peak_memory
from benchmarks.methods import plain
from benchmarks.report import progress, table
from benchmarks.timing import paired
from benchmarks.workloads import Setting, transformer
from isograd.graph.backbone import Graph, backbone
from isograd.graph.backward import Backward
from isograd.graph.sink import sinks
from isograd.graph.trace import Trace
from isograd.graph.traced import Loss

STAGES = ("graph", "sinks", "backbone", "plan of the backward")


@dataclass(frozen=True)
class Reading:
    """Costs at one depth."""

    layers: int
    nodes: int
    segments: int
    step: float
    measure: float
    ratio: float
    stages: tuple[float, ...]
    """Seconds of each of `STAGES`."""
    peak: float
    """Peak memory over that of a plain step."""
    megabytes: float


def run(setting: Setting) -> Iterator[str]:
    """The report over all depths, once all are there."""
    depths = (4, 16) if setting.quick else (100, 300, 1000)
    readings = [reading(layers, setting) for layers in depths]
    nodes = [r.nodes for r in readings]
    fits = {
        "plain step": [r.step for r in readings],
        "isograd.measure": [r.measure for r in readings],
        "work on the graph alone": [sum(r.stages) for r in readings],
        **{f"  {stage}": [r.stages[i] for r in readings] for i, stage in enumerate(STAGES)},
    }
    yield "Pre-norm transformer of width 32, 16 tokens, batch 4; median seconds."
    header = (
        "layers",
        "nodes",
        "sites",
        "plain step",
        "measure",
        "ratio",
        "graph work",
        "MB in use",
        "ratio",
    )
    yield table(header, [row(r) for r in readings])
    yield "Milliseconds per 1,000 nodes at each depth; exponent p of the fit seconds = c nodes^p (1: linear)."
    yield table(
        ("", *(f"{r.layers} layers" for r in readings), "exponent"),
        [
            (
                name,
                *(f"{1e6 * s / n:.2f}" for s, n in zip(seconds, nodes, strict=True)),
                f"{exponent(nodes, seconds):.2f}",
            )
            for name, seconds in fits.items()
        ],
    )


def row(r: Reading) -> tuple[str, ...]:
    """One depth in the first table."""
    return (
        str(r.layers),
        f"{r.nodes:,}",
        f"{r.segments:,}",
        f"{r.step:.3f}",
        f"{r.measure:.3f}",
        f"{r.ratio:.2f}",
        f"{sum(r.stages):.4f}",
        f"{r.megabytes:.0f}",
        f"{r.peak:.2f}",
    )


def reading(layers: int, setting: Setting) -> Reading:
    """Everything at one depth."""
    progress(f"depth: {layers} layers")
    workload = transformer(layers)
    base, ours = (
        peak_memory(workload.name, method, setting, compact=True)
        for method in ("plain step", "isograd.measure")
    )
    model, loss = workload.built(setting)
    nodes, segments, _ = graph_work(model, loss)
    plain(model, loss)
    times = paired(
        partial(plain, model, loss), partial(isograd.measure, model, loss), workload.rounds, setting.device
    )
    stages = zip(*(graph_work(model, loss)[2] for _ in range(workload.rounds)), strict=True)
    return Reading(
        layers,
        nodes,
        segments,
        times.plain.median,
        times.wall.median,
        times.wall_ratio.median,
        tuple(statistics.median(stage) for stage in stages),
        ours.peak / base.peak,
        ours.peak * MB,
    )


def graph_work(model: nn.Module, loss: Loss) -> tuple[int, int, tuple[float, ...]]:
    """Nodes of the autograd graph, sites of the backbone, and seconds of each of `STAGES`."""
    trace = Trace(model)
    with trace.recording():
        value = loss(model)
    assert value.grad_fn is not None
    clock = [time.perf_counter()]
    graph = Graph(value.grad_fn)
    trace.keep(graph.children)
    clock.append(time.perf_counter())
    sink = sinks(graph, trace)[0]
    clock.append(time.perf_counter())
    line = backbone(graph, trace, sink)
    clock.append(time.perf_counter())
    Backward(graph, line, value.device)
    clock.append(time.perf_counter())
    stages = tuple(after - before for before, after in pairwise(clock))
    return len(graph.order), len(line.segments), stages


def exponent(nodes: Sequence[int], seconds: Sequence[float]) -> float:
    """p of the least-squares fit log(seconds) = p log(nodes) + c."""
    return statistics.linear_regression([math.log(n) for n in nodes], [math.log(s) for s in seconds]).slope
