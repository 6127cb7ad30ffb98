"""The phase diagram over sigma_w and depth: theory, trials wherever they run, and the picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import isograd
from gallery import trainability as gallery
from gallery.nets import HE, mlp, residual_mlp, scaled_normal
from gallery.theory.measured import DIGITS, LABELS
from isograd import trials
from isograd.trainability import DEPTH_SCALES, Point, trainability

GRID = {"sigma_w": (1.0, 1.4, 2.0), "depths": (4, 16, 64)}


def by_theory(point: Point) -> float:
    """A trial that trains exactly as theory says: no network is needed to see that trials are put in their places."""
    (column,) = trainability(point.phi, sigma_w=[point.sigma_w], sigma_b2=point.sigma_b2).columns
    return 0.9 if point.depth <= column.deepest else 0.1


def test_depth_scales_are_those_of_the_paper() -> None:
    """tanh, sigma_b^2 = 0.05: critical near sigma_w^2 = 1.76 (Schoenholz et al. 2017, figures 1 and 5)."""
    fine = [1.2 + 0.01 * k for k in range(30)]
    found = trainability("tanh", sigma_w=fine)
    assert found.critical.sigma_w**2 == pytest.approx(1.76, abs=0.05)
    below = [c.deepest for c in found.columns if c.phase == "ordered"]
    above = [c.deepest for c in found.columns if c.phase == "chaotic"]
    assert all(a < b for a, b in pairwise(below))
    assert all(a > b for a, b in pairwise(above))


def test_a_depth_scale_is_where_the_gradient_falls_to_its_share() -> None:
    (column,) = trainability("tanh", sigma_w=[1.0]).columns
    assert column.gain ** (2 * column.depth_scale) == pytest.approx(1 / math.e)
    assert column.deepest == DEPTH_SCALES * column.depth_scale


def test_a_critical_relu_trains_at_any_depth() -> None:
    found = trainability("relu", sigma_w=[math.sqrt(2)], sigma_b2=0.0)
    assert found.columns[0].phase == "critical"
    assert math.isinf(found.columns[0].deepest)
    assert json.loads(found.to_json())["columns"][0]["depth_scale"] is None
    assert " any" in repr(found)


def test_an_activation_of_ones_own_has_a_depth_too() -> None:
    def doubled(x: isograd.theory.Phi) -> object:
        return x.tanh() * 2  # pyright: ignore

    ours = trainability(doubled, sigma_w=[0.5], sigma_b2=0.0).columns[0]
    theirs = trainability("tanh", sigma_w=[1.0], sigma_b2=0.0).columns[0]
    assert ours.gain == pytest.approx(theirs.gain, rel=1e-6)


def test_a_model_is_read_off_and_stands_in_the_picture() -> None:
    def loss(model: nn.Module) -> Tensor:
        return functional.cross_entropy(model(DIGITS), LABELS)

    torch.manual_seed(0)
    deep = trainability(mlp(nn.Tanh, 40, 64, scaled_normal(2.0)), loss)
    assert deep.own is not None
    assert deep.own.depth == 40
    assert deep.own.sigma_w == pytest.approx(2.0, rel=0.01)
    assert deep.own.sigma_b2 == 0.0
    assert deep.trains is False
    assert "beyond" in repr(deep)
    assert "this model" in deep.to_svg()
    assert json.loads(deep.to_json())["own"]["trains"] is False
    assert trainability(mlp(nn.ReLU, 40, 64, HE), loss).columns
    assert trainability(mlp(nn.Tanh, 5, 64, scaled_normal(1.0)), loss).trains
    with pytest.raises(ValueError, match="no plain chain"):
        trainability(residual_mlp(3, 64, torch.tensor(1.0), nn.ReLU), loss)


def test_trials_that_go_as_theory_says_agree_with_it() -> None:
    found = trainability("tanh", **GRID, train=by_theory, map=map)
    assert found.agreement(0.5) == 1.0
    assert found.scores == ((0.9, 0.9, 0.1), (0.9, 0.9, 0.9), (0.9, 0.9, 0.1))
    assert "trained to" in repr(found)
    assert math.isnan(trainability("tanh", **GRID).agreement(0.5))


def test_the_same_wherever_the_trials_run() -> None:
    here = trainability("tanh", **GRID, train=by_theory, map=map)
    with ThreadPoolExecutor(2) as threads:
        assert trainability("tanh", **GRID, train=by_theory, map=threads).scores == here.scores
    assert trainability("tanh", **GRID, train=by_theory).scores == here.scores
    joblib = pytest.importorskip("joblib")

    def parallel(function: Callable[[object], object], items: Iterable[object]) -> list[object]:
        return joblib.Parallel(n_jobs=2)(joblib.delayed(function)(item) for item in items)

    assert trainability("tanh", **GRID, train=by_theory, map=parallel).scores == here.scores


@pytest.mark.timeout(180)
def test_a_dask_cluster_trains_the_same_networks() -> None:
    distributed = pytest.importorskip("distributed")
    small = {"sigma_w": (1.0, 1.8), "depths": (2,)}

    def train(point: Point) -> float:
        return gallery.trained(point, steps=20, rates=(0.1,))

    here = trainability("tanh", **small, train=train, map=map)
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        there = trainability("tanh", **small, train=train, map=client.get_executor())
    assert there.scores == here.scores
    assert not there.failed


def test_what_was_trained_is_not_trained_again(tmp_path: Path) -> None:
    asked = list[Point]()

    def train(point: Point) -> float:
        asked.append(point)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return by_theory(point)

    store = tmp_path / "trials.jsonl"
    with pytest.raises(trials.Interrupted):
        trainability("tanh", **GRID, train=train, map=map, store=store)
    seen = list[tuple[int, int]]()
    found = trainability(
        "tanh", **GRID, train=train, map=map, store=store, progress=lambda done, of: seen.append((done, of))
    )
    assert seen[0] == (4, 9)
    assert len(asked) == 5 + 5
    assert found.agreement(0.5) == 1.0


def test_a_training_that_fails_is_said_and_stays_blank() -> None:
    def train(point: Point) -> float:
        if point.depth == 64:
            raise RuntimeError("out of memory")
        return 0.9

    found = trainability("tanh", **GRID, train=train, map=map)
    assert [math.isnan(row[2]) for row in found.scores] == [True] * 3
    assert "out of memory at sigma_w 1.4, depth 64" in repr(found)
    assert json.loads(found.to_json())["scores"][0] == [0.9, 0.9, None]
    assert "<svg" in found.to_svg()


def test_the_picture_shows_the_curve_over_what_was_trained() -> None:
    pytest.importorskip("matplotlib")
    picture = trainability("tanh", **GRID, train=by_theory, map=map).to_svg()
    assert "score of the trained network" in picture
    assert "6 ξ" in picture
    assert "decades of gradient, expected" in trainability("tanh", **GRID).to_svg()


def test_digits_are_learned_where_theory_says() -> None:
    """Two layers and twenty, far in the ordered phase: the first learns, the second is not reached."""
    ordered = trainability("tanh", sigma_w=[0.8], sigma_b2=0.05).columns[0]
    assert 2 < ordered.deepest < 20
    assert gallery.trained(Point("tanh", 0.8, 0.05, 2), steps=100) > 0.8
    assert gallery.trained(Point("tanh", 0.8, 0.05, 20), steps=100, rates=(0.1,)) < 0.5
