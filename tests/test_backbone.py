"""Dominators, named sites, residual splits and the places where data comes in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn import functional

from isograd import measure
from isograd.graph.backbone import Graph
from tests.models import Residual, branch, line_of, log10, projected


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# -- dominators ------------------------------------------------------------------------------------


@dataclass(eq=False)
class Fake:
    """A node of an autograd graph, as far as `Graph` looks at it."""

    number: int
    next_functions: list[tuple[Fake, int]] = field(default_factory=list[tuple["Fake", int]])


def graph_of(edges: dict[int, list[int]]) -> tuple[Graph, list[Fake]]:
    nodes = [Fake(i) for i in range(max([0, *edges, *(j for to in edges.values() for j in to)]) + 1)]
    for i, to in edges.items():
        nodes[i].next_functions = [(nodes[j], 0) for j in to]
    return Graph(cast(Node, nodes[0])), nodes


@st.composite
def dags(draw: st.DrawFn) -> dict[int, list[int]]:
    """Edges from smaller to larger numbers; every node but the root is reached from one before it."""
    size = draw(st.integers(2, 24))
    edges: dict[int, list[int]] = {i: [] for i in range(size)}
    for j in range(1, size):
        for i in draw(st.sets(st.integers(0, j - 1), min_size=1, max_size=3)):
            edges[i].append(j)
    return edges


@given(dags())
@settings(max_examples=200, deadline=None)
def test_dominators_are_those_of_networkx(edges: dict[int, list[int]]) -> None:
    graph, nodes = graph_of(edges)
    sink = nodes[-1]
    found = graph.dominators(graph.above(cast(Node, sink)))

    immediate = nx.immediate_dominators(nx.DiGraph((i, j) for i, to in edges.items() for j in to), 0)
    chain = [sink.number]
    while chain[-1] != 0:
        chain.append(immediate[chain[-1]])
    assert [cast(Fake, node).number for node in found] == chain[::-1]


@given(dags())
@settings(max_examples=50, deadline=None)
def test_the_order_is_topological_and_the_depth_that_of_the_longest_path(edges: dict[int, list[int]]) -> None:
    graph, nodes = graph_of(edges)
    position = {node: i for i, node in enumerate(graph.order)}
    assert all(position[a] < position[b] for a in graph.order for b in graph.children[a])  # pyright: ignore
    dag = nx.DiGraph((i, j) for i, to in edges.items() for j in to)
    longest = {
        n: max(len(p) for p in nx.all_simple_paths(dag, 0, n)) - 1 for n in dag if n and len(nodes) < 12
    }
    assert all(graph.depth[cast(Node, nodes[n])] == length for n, length in longest.items())


class Counted(list[Any]):
    """A list that counts what is read from it."""

    steps = 0

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            Counted.steps += 1
            yield item


def steps(size: int) -> int:
    """Edges that are looked at for a ladder of `size` nodes: each leads to the next two."""
    graph, nodes = graph_of({i: [j for j in (i + 1, i + 2) if j < size] for i in range(size)})
    graph.children = {node: Counted(children) for node, children in graph.children.items()}
    Counted.steps = 0
    graph.dominators(graph.above(cast(Node, nodes[-1])))
    assert graph.depth[cast(Node, nodes[-1])] == size - 1
    return Counted.steps


def test_the_work_is_linear_in_the_nodes() -> None:
    small, large = steps(500), steps(5000)
    assert large <= 10.1 * small
    assert large <= 3 * 2 * 5000  # every edge once in each of three passes


def test_a_chain_of_twenty_thousand_nodes_needs_no_recursion() -> None:
    graph, nodes = graph_of({i: [i + 1] for i in range(19_999)})
    assert len(graph.dominators(graph.above(cast(Node, nodes[-1])))) == 20_000


# -- sites -----------------------------------------------------------------------------------------


class Written(nn.Module):
    """Functional code and modules, all of it on lines of this file."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.lin = nn.Linear(16, 16)
        self.mix = nn.Parameter(torch.randn(16, 16))
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.rnn = nn.GRU(16, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)  # here: convolution
        x = self.norm(x)  # here: normalisation
        x = functional.max_pool2d(x, 2)  # here: pooling
        x = x.flatten(2)
        x = functional.gelu(x)  # here: activation
        x = self.lin(x)  # here: linear
        x = x @ self.mix  # here: product
        x = self.attend(x, x, x, need_weights=False)[0]  # here: attention
        x = functional.dropout(x, 0.1)  # here: dropout
        x = self.rnn(x)[0]  # here: recurrent
        x = x.softmax(-1)  # here: softmax
        return x * 2  # here: elementwise


def test_sites_have_a_kind_a_module_and_a_line_of_the_users_file() -> None:
    flow = measure(Written(), projected(torch.randn(2, 1, 8, 8)))
    told = [
        (s.kind, s.module, s.source.rsplit("/", 1)[-1]) for s in flow.sites if s.kind not in ("input", "loss")
    ]
    expected = [
        ("convolution", "conv", "convolution"),
        ("normalisation", "norm", "normalisation"),
        ("pooling", "", "pooling"),
        ("activation", "", "activation"),
        ("linear", "lin", "linear"),
        ("linear", "", "product"),
        ("attention", "attend", "attention"),
        ("dropout", "", "dropout"),
        ("recurrent", "rnn", "recurrent"),
        ("softmax", "", "softmax"),
        ("elementwise", "", "elementwise"),
    ]
    assert told == [(kind, module, line_of(__file__, marker)) for kind, module, marker in expected]
    assert [site.depth for site in flow.sites] == list(range(len(flow.sites)))
    assert [site.shape for site in flow.sites[:3]] == [(2, 1, 8, 8), (2, 4, 8, 8), (2, 4, 8, 8)]
    assert {site.dtype for site in flow.sites} == {"float32"}


def test_names_are_unique_and_say_module_and_operation() -> None:
    model = nn.Sequential(nn.Linear(16, 16), *(Residual(branch()) for _ in range(2)))
    model.append(nn.Sequential(nn.Tanh(), nn.Linear(16, 4)))
    names = [site.name for site in measure(model, projected(torch.randn(8, 16))).sites]
    assert names[:6] == [
        "input",
        "0 · linear",
        "1 · residual add",
        "2 · residual add",
        "3.0 · tanh",
        "3.1 · linear",
    ]
    assert len(set(names)) == len(names)


def test_a_repeated_place_is_counted() -> None:
    shared = nn.Linear(16, 16)
    names = [
        site.name for site in measure(nn.Sequential(shared, shared), projected(torch.randn(8, 16))).sites
    ]
    assert names[1:3] == ["0 · linear #1", "0 · linear #2"]


class Handwritten(nn.Module):
    """An RMSNorm in the five lines of which every model has its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x.float() * torch.rsqrt(variance + 1e-6)).to(x.dtype)


class HandRMSNorm(Handwritten):
    pass


def test_the_lines_of_a_small_module_are_one_site() -> None:
    flow = measure(
        nn.Sequential(nn.Linear(16, 16), HandRMSNorm(), nn.Linear(16, 4)), projected(torch.randn(8, 16))
    )
    assert [s.kind for s in flow.sites][:4] == ["input", "linear", "normalisation", "linear"]


# -- parts without a backbone ----------------------------------------------------------------------


class Dense(nn.Module):
    """Every layer reads all before it: no node inside that all gradient passes through."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4 + 4 * i, 4) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, torch.tanh(layer(x))], 1)
        return x


def test_a_dense_block_has_a_site_at_each_concatenation_and_tells_what_lies_between() -> None:
    model, x = nn.Sequential(nn.Linear(8, 4), Dense(), nn.Linear(20, 4)).double(), torch.randn(8, 8).double()
    flow = measure(model, projected(x))
    told = [(s.module, s.operation, s.shape) for s in flow.sites if s.kind not in ("input", "loss")]
    assert told == [
        ("0", "linear", (8, 4)),
        *(("1", "cat", (8, 8 + 4 * i)) for i in range(4)),
        ("2", "linear", (8, 4)),
    ]
    inside = [{step.site.module for step in flow.ledgers[depth]} for depth in range(2, 6)]
    assert inside == [{"1", f"1.layers.{i}"} for i in range(4)]
    leaf = x.clone().requires_grad_()
    end = torch.autograd.grad(projected(leaf)(model), leaf)[0]
    assert float(flow.column("grad_norm_log10")[0]) == pytest.approx(log10(end), abs=1e-9)


class Nested(nn.Module):
    """A U-Net: what goes down comes back by concatenations, the outermost of which holds all."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(8, 8), nn.Linear(16, 8)
        self.inner = Nested(depth - 1) if depth else nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.down(x))
        return self.up(torch.cat([x, self.inner(x)], 1))


def test_the_inside_of_a_u_net_is_one_segment_whose_inside_is_described() -> None:
    model, x = Nested(3).double(), torch.randn(8, 8, dtype=torch.float64)
    flow = measure(model, projected(x))
    assert [s.operation for s in flow.sites if s.kind not in ("input", "loss")] == [
        "linear",
        "tanh",
        "cat",
        "linear",
    ]
    (cat,) = [s for s in flow.sites if s.operation == "cat"]
    inside = {step.site.module for step in flow.ledgers[cat.depth]}
    assert {"inner.down", "inner.inner.up", "inner.inner.inner.inner"} <= inside
    leaf = x.clone().requires_grad_()
    end = torch.autograd.grad(projected(leaf)(model), leaf)[0]
    assert float(flow.column("grad_norm_log10")[0]) == pytest.approx(log10(end), abs=1e-9)
