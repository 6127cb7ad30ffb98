"""The twins: pairs differ in their fault alone, the table reads what was trained, a slice runs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.twins import __main__ as command
from benchmarks.twins.arms import BLIND, drawn
from benchmarks.twins.case import Case, train
from benchmarks.twins.cases import cases
from benchmarks.twins.results import Store, forget
from benchmarks.twins.table import _beaten, report
from benchmarks.twins.trial import attempt, model_of, setting
from isograd import check

CASES = {case.name: case for case in cases()}
DEFAULT = CASES["relu mlp 16 / torch's default initialisation"]


def parts(case: Case, seed: int = 0, *, faulty: bool) -> dict[str, torch.Tensor]:
    return dict(case.build(seed, faulty=faulty).state_dict())


def test_there_are_enough_cases_of_every_kind() -> None:
    assert len(CASES) == len(cases())
    kinds, families = Counter(case.kind for case in cases()), Counter(case.family for case in cases())
    assert kinds["vanishing"] + kinds["exploding"] >= 120
    assert kinds["decoy"] >= 12
    assert set(families) == {"mlp", "cnn", "rnn", "residual", "transformer", "transformers"}


@pytest.mark.parametrize(
    "case", [case for case in cases() if case.kind != "decoy"], ids=lambda case: case.name
)
def test_a_fault_changes_the_model_and_nothing_else(case: Case) -> None:
    sound, faulty = parts(case, faulty=False), parts(case, faulty=True)
    assert all(torch.equal(value, parts(case, faulty=False)[name]) for name, value in sound.items())
    changed = {name for name in sound if name in faulty and not torch.equal(sound[name], faulty[name])}
    assert len(changed) < len(sound)  # the head, at least, is the twin's
    if not changed:  # a fault of the architecture: the function differs, no weight does
        x, _ = case.task().held_out
        answers = [case.build(0, faulty=fault).eval()(x[:2]) for fault in (False, True)]
        first, second = (a if isinstance(a, torch.Tensor) else a.logits for a in answers)
        assert not torch.allclose(first, second)


def test_a_model_that_is_balanced_otherwise_computes_the_same() -> None:
    case = CASES["relu mlp 8 / layers x 20 and / 20"]
    x, _ = case.task().held_out
    twin, decoy = (case.build(0, faulty=faulty)(x) for faulty in (False, True))
    assert torch.allclose(twin, decoy, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "seed", "code"),
    [
        (
            "post-norm decoder 3 / no skips",
            1,
            "VG105",
        ),  # little is left to average: the second half takes less
        ("lstm on rows, T=120 / recurrence x 8", 2, "RN602"),  # 1.3 decades
    ],
)
def test_a_fault_is_found_in_the_luckiest_of_five_draws(name: str, seed: int, code: str) -> None:
    case = CASES[name]
    healthy, sick = (check(case.build(seed, faulty=f).train(), case.loss(seed)) for f in (False, True))
    assert not healthy.errors
    assert [f.code for f in sick.errors] == [code]


def test_a_training_is_the_same_each_time() -> None:
    case = CASES["relu mlp 8 / nothing"]
    assert train(case, case.build(3, faulty=False), 3) == train(case, case.build(3, faulty=False), 3)


def test_the_twin_learns_and_the_fault_keeps_the_model_from_it() -> None:
    twin, fault = (attempt(setting(DEFAULT, arm, 0))["score"] for arm in ("twin", "fault"))
    assert twin > 0.8
    assert fault < 0.5


@pytest.mark.parametrize("name", [*BLIND])
def test_blind_changes_count_their_edits(name: str) -> None:
    treated = BLIND[name](DEFAULT, DEFAULT.build(0, faulty=True), 0)
    assert treated.edits >= 15
    x, _ = DEFAULT.task().held_out
    assert treated.model(x).shape == (len(x), 10)


def test_random_search_draws_the_same_change_for_every_seed() -> None:
    said = [drawn(1)(DEFAULT, DEFAULT.build(seed, faulty=True), seed).said for seed in range(2)]
    assert said[0] == said[1] != drawn(2)(DEFAULT, DEFAULT.build(0, faulty=True), 0).said


def store(tmp_path: Path, scores: dict[str, list[float]]) -> Store:
    """A store that says that the arms reached these scores."""
    path = tmp_path / "results.jsonl"
    row = {"seconds": 1.0, "search_seconds": 0.5, "edits": 3, "said": "it"}
    lines = [
        {"key": "-", "setting": setting(DEFAULT, arm, seed), "result": {"score": score, **row}}
        for arm, values in scores.items()
        for seed, score in enumerate(values)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Store(path)


@pytest.mark.parametrize(
    ("fault", "truth"),
    [
        ([0.1, 0.2, 0.15], "sick"),
        ([0.9, 0.88, 0.91], "harmless"),
        ([0.1, 0.9, 0.9], "border"),
        ([0.1], "unknown"),
    ],
)
def test_training_decides_what_a_fault_is(tmp_path: Path, fault: list[float], truth: str) -> None:
    found = store(tmp_path, {"twin": [0.9, 0.91, 0.89], "fault": fault})
    assert found.truth(DEFAULT) == truth


def test_a_repair_counts_by_its_distance_to_the_healthy_twin(tmp_path: Path) -> None:
    scores = {"twin": [0.9, 0.91, 0.89], "fault": [0.1, 0.1, 0.11]}
    good = store(tmp_path, scores | {"isograd": [0.88, 0.9, 0.89]})
    assert good.restored(DEFAULT, "isograd")
    assert good.restored(DEFAULT, "selu") is None
    bad = store(tmp_path, scores | {"isograd": [0.88, 0.3, 0.89]})
    assert not bad.restored(DEFAULT, "isograd")
    text = report(bad)
    assert "## What isograd does not restore" in text
    assert DEFAULT.name in text
    assert model_of(DEFAULT) == "relu mlp 16"


def test_only_what_is_sick_is_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoy = CASES["relu mlp 8 / a small head"]
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results.jsonl")
    scores = {"twin": [0.9, 0.91, 0.89], "fault": [0.9, 0.88, 0.91]}
    assert command.worth("selu", [DEFAULT]) == [DEFAULT]  # not judged yet
    store(tmp_path, scores)
    assert command.worth("selu", [DEFAULT]) == []
    assert command.worth("isograd", [DEFAULT, decoy]) == [decoy]
    assert command.worth("fault", [DEFAULT, decoy]) == [DEFAULT, decoy]


def test_the_table_says_by_how_many_cases_isograd_is_ahead() -> None:
    ours = {f"case {i}": 0.9 for i in range(8)}
    theirs = {f"case {i}": 0.95 if i == 0 else 0.4 - i / 100 for i in range(8)}
    assert _beaten(ours, theirs).startswith("7, 0 (0.0")
    assert _beaten(ours, ours) == "0, 0 (1.000)"
    assert _beaten(ours, {"case 1": 0.1}) == ""  # too few to tell


def test_what_an_older_version_did_can_be_forgotten(tmp_path: Path) -> None:
    store(tmp_path, {"twin": [0.9], "isograd": [0.1, 0.2]})
    path = tmp_path / "results.jsonl"
    assert forget(path, ["isograd"]) == 2
    assert [json.loads(line)["setting"]["arm"] for line in path.read_text().splitlines()] == ["twin"]


def test_a_slice_runs_and_prints_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results.jsonl")
    arguments = [
        "twins",
        "run",
        "twin",
        "fault",
        "isograd",
        "--only",
        "relu mlp 16 / (sigmoid|weights x 3)",
        "--seeds",
        "1",
    ]
    monkeypatch.setattr("sys.argv", arguments)
    command.main()
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    scores = {(line["setting"]["case"], line["setting"]["arm"]): line["result"]["score"] for line in lines}
    for name in ("sigmoid", "weights x 3"):
        assert scores[f"relu mlp 16 / {name}", "fault"] < 0.5
        assert scores[f"relu mlp 16 / {name}", "isograd"] > scores["relu mlp 16", "twin"] - 0.1
