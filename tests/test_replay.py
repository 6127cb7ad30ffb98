"""AutoTrainer's rules and repairs as its papers state them, and the table of the replay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import replay
from benchmarks.autotrainer import (
    ORDER,
    Recipe,
    Watched,
    activation,
    batch_normalisation,
    repaired,
    setting,
    trained,
)
from benchmarks.replay import attempt, networks, report, sick
from gallery.autotrainer import data


def dense(units: int, function: str, kernel: str = "he_uniform") -> list[dict[str, object]]:
    layer = {"class": "Dense", "units": units, "activation": "linear", "kernel_initializer": kernel}
    return [layer, {"class": "Activation", "activation": function}]


def net(function: str, depth: int, kernel: str = "he_uniform") -> Recipe:
    hidden = [spec for _ in range(depth) for spec in dense(8, function, kernel)]
    return Recipe([*hidden, *dense(1, "sigmoid")], "binary_crossentropy", lr=1e-2)


CIRCLE = data("circle")


def test_a_deep_sigmoid_net_is_called_vanishing_and_a_sound_one_nothing() -> None:
    assert trained(net("sigmoid", 10), CIRCLE, 0, 10).problem == "vanishing"
    assert trained(net("tanh", 2), CIRCLE, 0, 20).problem in ("", "oscillating")


def test_values_that_are_not_finite_are_called_exploding_at_once() -> None:
    loud = {"class": "RandomNormal", "mean": 0.0, "stddev": 1e12}
    seen = trained(net("exponential", 4, loud), CIRCLE, 0, 10)  # type: ignore[arg-type]
    assert (seen.problem, seen.at) == ("exploding", 0)


def test_vanishing_gradients_get_selu_first_and_that_ends_the_search() -> None:
    tries = list(repaired(net("sigmoid", 10), CIRCLE, 0, 10))
    assert tries[0][1].problem == "vanishing"
    assert tries[1][0] == activation("selu", "lecun_uniform")(net("sigmoid", 10))
    assert tries[-1][1].problem != "vanishing"


def test_the_orders_of_repair_are_those_of_the_paper() -> None:
    assert {problem: len(order) for problem, order in ORDER.items()} == {
        "vanishing": 3,
        "exploding": 6,
        "dying": 5,
        "oscillating": 4,
        "slow": 6,
    }


def test_repairs_leave_the_last_layer_and_the_original_alone() -> None:
    recipe = net("relu", 2)
    before = json.dumps(recipe.layers)
    changed = activation("selu", "lecun_uniform")(recipe)
    assert [spec["activation"] for spec in changed.layers if spec["class"] == "Activation"] == [
        "selu",
        "selu",
        "sigmoid",
    ]
    assert changed.layers[-2] == recipe.layers[-2]
    normed = batch_normalisation(recipe)
    assert [spec["class"] for spec in normed.layers].count("BatchNormalization") == 2
    assert setting(clip=9.0)(recipe).clip == 9.0
    assert json.dumps(recipe.layers) == before


def test_a_curve_that_falls_often_is_called_oscillating() -> None:
    from benchmarks.autotrainer import _curve

    zigzag = [0.5, 0.9] * 10
    assert _curve(Watched(train=zigzag, held_out=zigzag)) == "oscillating"
    assert _curve(Watched(train=[0.5] * 20, held_out=[0.5] * 20)) == "slow"
    assert _curve(Watched(train=[0.5, 0.7, 0.9], held_out=[0.5, 0.7, 0.9])) == ""


@pytest.mark.parametrize("arm", ["none", "isograd", "autotrainer", "selu", "random", "lr"])
def test_every_arm_trains_a_published_network(arm: str) -> None:
    name = next(name for name, fact in networks().items() if sick(fact))
    row = attempt({"case": name, "arm": arm, "seed": 0, "epochs": 2})
    assert 0 <= row["score"] <= 1
    assert row["trainings"] >= 1
    assert (row["edits"] > 0) == (
        arm in ("isograd", "selu", "random") or (arm == "autotrainer" and row["trainings"] > 1)
    )


def test_the_table_grades_against_the_best_healthy_control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ill = [name for name, fact in networks().items() if sick(fact) and fact["dataset"] == "circle"][:2]
    well = next(
        n for n, f in networks().items() if not sick(f) and not f["ground_truth"] and f["dataset"] == "circle"
    )
    row = {"edits": 2, "trainings": 1, "said": "it", "verdict": "vanishing"}
    scores = {(well, "none"): 0.85, (ill[0], "none"): 0.5, (ill[1], "none"): 0.5}
    scores |= {(ill[0], "isograd"): 0.84, (ill[1], "isograd"): 0.7}
    lines = [
        {
            "key": "-",
            "setting": {"case": name, "arm": arm, "seed": seed},
            "result": {"score": score + seed / 1e4, **row},
        }
        for (name, arm), score in scores.items()
        for seed in range(10)
    ]
    path = tmp_path / "replay.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(replay, "RESULTS", path)
    text = report()
    cells = [
        cell.strip()
        for cell in next(line for line in text.splitlines() if "isograd.repair" in line).split("|")
    ]
    assert cells[2:8] == ["2 x 10", "2 of 2", "1 of 2", "0.080", "+0.270", "2 of 2"]
    assert f"| {ill[1]}" in text.split("## What falls short")[1]
    assert f"| {ill[0]} " not in text.split("## What falls short")[1]
