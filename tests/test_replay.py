"""AutoTrainer's rules and repairs as its papers state them, and the table of the replay."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import replay
from benchmarks.autotrainer import (
    ORDER,
    Trainer,
    Watched,
    activation,
    batch_normalisation,
    curve,
    rate,
    repaired,
    setting,
)
from benchmarks.population import Recipe, Run
from benchmarks.replay import attempt, cases, networks, settings, sick
from benchmarks.replay_table import MARK, PAGE, control, disputed, effect, fails, problem, read, report, saved
from gallery.autotrainer import data


def dense(units: int, function: str, kernel: object = "he_uniform") -> list[dict[str, object]]:
    layer = {"class": "Dense", "units": units, "activation": "linear", "kernel_initializer": kernel}
    return [layer, {"class": "Activation", "activation": function}]


def net(function: str, depth: int, kernel: object = "he_uniform") -> Recipe:
    hidden = [spec for _ in range(depth) for spec in dense(8, function, kernel)]
    return Recipe([*hidden, *dense(1, "sigmoid")], "binary_crossentropy", lr=1e-2)


CIRCLE = data("circle")
LOUD = {"class": "RandomNormal", "mean": 0.0, "stddev": 1e12}


def watched(recipe: Recipe, epochs: int) -> Watched:
    return Trainer(CIRCLE, epochs).watched([(recipe, 0)])[0]


def test_a_deep_sigmoid_net_is_called_vanishing_and_a_sound_one_nothing() -> None:
    assert watched(net("sigmoid", 10), 10).problem == "vanishing"
    assert watched(net("tanh", 2), 20).problem in ("", "oscillating")


def test_values_that_are_not_finite_are_called_exploding_at_once() -> None:
    seen = watched(net("exponential", 4, LOUD), 10)
    assert (seen.problem, seen.at) == ("exploding", 0)


def test_vanishing_gradients_get_selu_first_and_that_ends_the_search() -> None:
    tries = repaired(net("sigmoid", 10), Trainer(CIRCLE, 10), [0])[0]
    assert tries[0][1].problem == "vanishing"
    assert tries[1][0] == activation("selu", "lecun_uniform")(net("sigmoid", 10))
    assert tries[-1][1].problem != "vanishing"


class Told(Trainer):
    """Answers each seed from a list of problems, and notes who was trained together."""

    def __init__(self, problems: dict[int, list[str]]) -> None:
        super().__init__(CIRCLE, 0)
        self.problems, self.rounds = problems, list[list[int]]()

    def watched(self, asked: Sequence[tuple[Recipe, int]]) -> list[Watched]:
        self.rounds.append([seed for _, seed in asked])
        return [Watched(Run(), self.problems[seed].pop(0)) for _, seed in asked]


def test_each_seed_is_repaired_in_its_own_way_and_all_that_still_search_are_trained_together() -> None:
    dying, slow = ["dying"] * 7, ["vanishing", "slow", ""]
    trainer = Told({3: [""], 4: slow, 5: dying})
    recipe = net("sigmoid", 2)
    tries = repaired(recipe, trainer, [3, 4, 5])
    assert trainer.rounds == [[3, 4, 5], [4, 5], [4, 5], [5], [5], [5], [5]]
    assert [len(each) for each in tries] == [1, 3, 7]
    chained = ORDER["slow"][0](ORDER["vanishing"][0](recipe))
    assert [asked for asked, _ in tries[1]] == [recipe, ORDER["vanishing"][0](recipe), chained]
    assert [asked for asked, _ in tries[2][1:]] == [change(recipe) for change in ORDER["dying"]]


def test_what_was_trained_is_not_trained_again() -> None:
    trainer = Trainer(CIRCLE, 2)
    first = trainer.watched([(net("tanh", 2), 0), (net("tanh", 2), 1), (net("tanh", 2), 0)])
    assert first[0] is first[2]
    assert trainer.watched([(net("tanh", 2), 1)])[0] is first[1]


def test_the_orders_of_repair_are_those_of_the_paper() -> None:
    assert {problem: len(order) for problem, order in ORDER.items()} == {
        "vanishing": 3,
        "exploding": 6,
        "dying": 6,
        "oscillating": 10,
        "slow": 7,
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
    assert rate(10.0)(recipe).lr == pytest.approx(0.1)
    assert json.dumps(recipe.layers) == before


def test_a_curve_that_falls_often_is_called_oscillating() -> None:
    zigzag = [0.5, 0.9] * 10
    assert curve(Run(train=zigzag, held_out=zigzag)) == "oscillating"
    assert curve(Run(train=[0.5] * 20, held_out=[0.5] * 20)) == "slow"
    assert curve(Run(train=[0.5, 0.7, 0.9], held_out=[0.5, 0.7, 0.9])) == ""


def test_each_published_network_is_trained_as_published() -> None:
    recipes = {name: Recipe.of(fact) for name, fact in networks().items()}
    assert len(recipes) == 40
    assert recipes["L15_eg_circle"].clip_norm == 1.0
    assert recipes["case24_blob_lr0.1"].lr == 0.1
    assert {recipe.optimizer for recipe in recipes.values()} == {"adam", "sgd", "adagrad"}


@pytest.mark.parametrize("arm", ["none", "isograd", "judged", "autotrainer", "selu", "random", "lr"])
def test_every_arm_trains_a_published_network(arm: str) -> None:
    name = next(name for name, fact in networks().items() if sick(fact))
    rows = attempt({"case": name, "arm": arm, "seeds": 2, "epochs": 2})
    assert len(rows) == 2
    for row in rows:
        assert 0 <= row["score"] <= 1
        assert row["trainings"] >= 1
        assert (row["edits"] > 0) == (arm not in ("none", "autotrainer") or row["trainings"] > 1)


def test_a_slice_of_every_arm_runs() -> None:
    assert [len(settings(arm, 2, 2, 20)) for arm in ("check", "none", "random", "orders")] == [12, 2, 1, 5]
    assert all(attempt(wanted)[0]["said"] for wanted in settings("check", 1, 1, 100))
    wanted = settings("orders", 2, 2, 40)[0]
    assert {row["shows"] for row in attempt(wanted)} <= {"sick", "healthy", "border"}


# -- the table -------------------------------------------------------------------------------------------


def store(path: Path, results: dict[tuple[str, str], list[dict[str, object]]]) -> Path:
    lines = [
        {"key": f"{i}", "setting": {"case": case, "arm": arm}, "result": rows}
        for i, ((case, arm), rows) in enumerate(results.items())
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def cells(text: str, start: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.split("|")][2:-1]


ROW = {"edits": 2, "trainings": 1, "seconds": 1.0, "said": "it", "verdict": "vanishing"}


def runs(score: float, **more: object) -> list[dict[str, object]]:
    return [ROW | {"score": score + seed / 1e4} | more for seed in range(10)]


def test_the_table_grades_against_the_best_healthy_control(tmp_path: Path) -> None:
    ill = [name for name, fact in networks().items() if sick(fact) and fact["dataset"] == "circle"][:2]
    well = next(n for n, f in networks().items() if not f["ground_truth"] and f["dataset"] == "circle")
    results = {(well, "none"): runs(0.85), (ill[0], "none"): runs(0.5), (ill[1], "none"): runs(0.5)}
    results |= {(ill[0], "isograd"): runs(0.84), (ill[1], "isograd"): runs(0.7)}
    results |= {(well, "isograd"): runs(0.80), (well, "selu"): runs(0.85, edits=0)}
    path = store(tmp_path / "replay.jsonl", results)
    rows = read(path)
    assert control(rows, "circle") == pytest.approx(0.85045)
    assert fails(ill[0], rows)
    assert not fails(well, rows)
    text = report(path)
    repair, rest = text.split("## Within 2 points, by problem")
    assert cells(repair, "isograd.repair")[:7] == [
        "2 x 10", "2 of 2", "1 of 2", "10 of 20", "0.080", "+0.270", "2 of 2",
    ]  # fmt: skip
    harm = rest.split("## Networks with no published gradient problem")[1]
    assert cells(harm, "isograd.repair")[:3] == ["1", "10 of 10", "1 of 1"]
    assert cells(harm, "blind")[:3] == ["1", "0 of 10", "0 of 1"]
    short = text.split("## What falls short: repair")[1]
    assert f"| {ill[1]}" in short
    assert f"| {ill[0]} " not in short


def test_a_label_that_trainings_do_not_bear_out_is_said_and_not_counted(tmp_path: Path) -> None:
    ill = next(name for name, fact in networks().items() if sick(fact) and fact["dataset"] == "circle")
    well = next(n for n, f in networks().items() if not f["ground_truth"] and f["dataset"] == "circle")
    results = {(well, "none"): runs(0.85), (ill, "none"): runs(0.84), (ill, "isograd"): runs(0.84)}
    text = report(store(tmp_path / "replay.jsonl", results))
    assert "## Repair" not in text
    assert cells(text.split("## Labels")[1], ill)[2] == "0 of 10"


def test_detection_is_told_by_problem_and_apart_where_the_order_of_rows_decides(tmp_path: Path) -> None:
    ill = [name for name, case in cases().items() if case.sick and problem(case) == "vanishing gradient"][:2]
    well = next(name for name, case in cases().items() if not case.sick)
    found = {"said": "vanishing", "faults": [], "codes": ["VG101"], "cause": "activation", "seconds": 0.5}
    missed = found | {"said": "healthy", "faults": ["miss"], "codes": []}
    wrong = found | {"faults": ["false alarm"]}
    orders = [{"score": 0.5, "shows": shown} for shown in ["sick"] * 5 + ["healthy"] * 5]
    results = {(ill[0], "check"): [found], (ill[1], "check"): [missed], (well, "check"): [wrong]}
    results |= {(ill[1], "orders"): orders, (ill[0], "orders"): orders[:5]}
    path = store(tmp_path / "replay.jsonl", results)
    rows = read(path)
    assert [disputed(cases()[name], rows) for name in ill] == [False, True]
    text = report(path)
    assert cells(text, "all gradient problems")[:2] == ["1 of 2", "0.500"]
    assert cells(text, "… where the order")[:2] == ["1 of 1", "1.000"]
    assert cells(text.split("## What is said")[1], "vanishing")[:3] == ["1", "1", "0.500"]
    assert cells(text.split("falls short: detection")[1], ill[1])[3] == "5 of 10"


def test_an_effect_needs_both_its_size_and_its_certainty() -> None:
    assert effect([0.5] * 10, [0.6] * 10) == (float("inf"), 0.0)
    size, p = effect([0.5, 0.6] * 5, [0.5, 0.6] * 5)
    assert (size, p) == (0.0, pytest.approx(1.0))
    assert replay.SEEDS >= 10


def test_the_tables_are_put_below_the_mark_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "replay.md"
    page.write_text(f"# Title\n\n{MARK}\n\nold\n")
    saved(page, "## New")
    assert page.read_text() == f"# Title\n\n{MARK}\n\n## New\n"
    assert MARK in PAGE.read_text()
