"""A proof says what paired trainings show, of repairs that help and of those that do not."""

from __future__ import annotations

import json
import math
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from isograd.cli import main
from isograd.cli.errors import TargetError
from isograd.cli.prove import proof as proof_of
from isograd.cli.target import load
from isograd.controls import random_edit
from isograd.edit import Edit
from isograd.paired import paired, t_quantile, t_within
from isograd.prescription import Prescription
from isograd.proof import AFTER, BEFORE, RANDOM, RATE, Proof, prove
from isograd.trials import Interrupted

generator = torch.Generator().manual_seed(0)
CENTRES = 3 * torch.randn(4, 8, generator=generator)


def points(seed: int, rows: int = 64) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (rows,), generator=drawn)
    return CENTRES[labels] + torch.randn(rows, 8, generator=drawn), labels


def deep(seed: int = 0) -> nn.Sequential:
    """Ten ReLU layers with weights a tenth of what they should be."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for fan_in in [8] + [16] * 9:
        layers += [nn.Linear(fan_in, 16), nn.ReLU()]
        nn.init.normal_(layers[-2].weight, std=0.1 * math.sqrt(2 / fan_in))  # type: ignore[arg-type]
        nn.init.zeros_(layers[-2].bias)  # type: ignore[arg-type]
    return nn.Sequential(*layers, nn.Linear(16, 4))


def weights(of: str, places: range = range(0, 20, 2), **arguments: float) -> Prescription:
    edits = tuple(Edit(f"{i}.weight", "fill", of, dict(arguments)) for i in places)
    return Prescription("test", f"{of} for {len(edits)} layers", edits)


ORTHOGONAL = weights("nn.init.orthogonal_", gain=math.sqrt(2))
SAME = weights("nn.init.normal_", std=0.02)
EMPTY_HEAD = Prescription("test", "a head of zeros", (Edit("20.weight", "fill", "nn.init.zeros_"),))


def loss(model: nn.Module) -> Tensor:
    x, y = points(0)
    return nn.functional.cross_entropy(model(x), y)


def train(model: nn.Module, seed: int, lr_scale: float = 1.0) -> float:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005 * lr_scale)
    for step in range(40):
        x, y = points(1000 * seed + step)
        value = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    x, y = points(-1, 200)
    return (model(x).argmax(-1) == y).float().mean().item()


def fixed(before: float, after: float, spread: float) -> object:
    """A training whose score depends on whether the head is empty, and on the seed."""

    def score(model: nn.Module, seed: int) -> float:
        empty = not model[20].weight.any()  # type: ignore[index]
        return (after if empty else before) + spread * math.sin(seed * (2 if empty else 3))

    return score


@pytest.fixture(scope="module")
def proof() -> Proof:
    return prove(deep, ORTHOGONAL, train, seeds=4, loss=loss, map=map)


def test_a_repair_that_helps_is_proven_against_both_controls(proof: Proof) -> None:
    assert proof.proven
    assert proof.arms[AFTER].mean > proof.arms[BEFORE].mean + 0.4
    assert set(proof.arms) == {BEFORE, AFTER, RANDOM, RATE}
    assert proof.effect.p < 0.01
    assert proof.sentence.startswith("The repair helps: ")
    assert "the best learning rate alone" in proof.sentence


def test_the_gradient_is_told_before_and_after(proof: Proof) -> None:
    before, expected, after = proof.decades
    assert before < -5
    assert math.isnan(expected)
    assert abs(after) < 1.5


def test_it_prints_itself_and_its_json_is_strict(proof: Proof) -> None:
    assert repr(proof).startswith("proven  nn.init.orthogonal_ for 10 layers")
    content = json.loads(proof.to_json())
    assert content["effect"]["n"] == 4
    assert content["decades"]["expected"] is None
    assert len(content["arms"]["learning rate"]["scores"]) == 4


def test_a_change_without_effect_is_reported_as_such() -> None:
    found = prove(deep(), EMPTY_HEAD, fixed(0.5, 0.5, 0.1), map=map)
    assert not found.helps
    assert found.sentence.startswith("The repair does not help, as far as 5 seeds can tell: ")
    assert repr(found).startswith("not proven")


def test_harm_is_called_harm() -> None:
    found = prove(deep(), EMPTY_HEAD, fixed(0.9, 0.2, 0.01), map=map)
    assert not found.helps
    assert found.sentence.startswith("The repair does harm: 0.2")


def test_threads_of_one_process_train_one_after_the_other() -> None:
    """They share torch's random generators: side by side, no training has the random numbers of its seed."""

    def dropped(model: nn.Module, seed: int) -> float:
        with torch.no_grad():
            drawn = [torch.rand(()).item() for _ in range(20) if time.sleep(1e-3) is None]
            return model(points(0)[0]).norm().item() + sum(drawn)

    with ThreadPoolExecutor(3) as threads:
        side_by_side = prove(deep(), ORTHOGONAL, dropped, seeds=3, map=threads)
    alone = prove(deep(), ORTHOGONAL, dropped, seeds=3, map=map)
    assert {n: a.scores for n, a in side_by_side.arms.items()} == {n: a.scores for n, a in alone.arms.items()}


def test_a_control_that_does_as_well_is_named() -> None:
    found = prove(
        deep(),
        SAME,
        lambda model, seed: float(model[0].weight.std() != deep()[0].weight.std()) + 0.01 * seed,
        map=map,
    )  # type: ignore[union-attr]
    assert found.helps
    assert not found.proven
    assert found.equalled == (RANDOM,)
    assert "but not surely more than a random edit of the same kind" in found.sentence
    assert found.unrun[RATE].startswith("train takes no lr_scale")


def test_seeds_that_change_nothing_prove_nothing() -> None:
    found = prove(deep(), EMPTY_HEAD, fixed(0.1, 0.9, 0.0), map=map)
    assert not found.helps
    assert found.sentence.startswith("Nothing is proven: every seed gives the same score")


def test_both_twins_start_from_the_same_seeds() -> None:
    seen: list[tuple[float, float, float]] = []

    def draws(model: nn.Module, seed: int) -> float:
        seen.append((torch.rand(1).item(), random.random(), numpy.random.rand()))
        return seed

    prove(deep(), EMPTY_HEAD, draws, seeds=3, map=map)
    by_seed = [seen[i : i + 3] for i in range(0, 9, 3)]
    assert all(len(set(triple)) == 1 for triple in by_seed)
    assert len(set(seen)) == 3


def test_the_model_and_the_random_numbers_of_the_user_stay_as_they_are() -> None:
    model = deep()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    prove(model, ORTHOGONAL, train, seeds=3, map=map)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_a_training_that_diverges_counts_as_the_worst_and_is_said() -> None:
    def score(model: nn.Module, seed: int) -> float:
        empty = not model[20].weight.any()  # type: ignore[index]
        return 0.9 + 0.01 * seed if empty else math.nan if seed else 0.2

    found = prove(deep(), EMPTY_HEAD, score, map=map)
    assert found.helps
    assert found.against().mean == pytest.approx(0.72)
    assert "before: 4 of 5 trainings gave no finite score" in found.notes
    assert json.loads(found.to_json())["arms"]["before"]["scores"][1] is None


def test_a_training_that_raises_is_told_and_not_swallowed() -> None:
    def score(model: nn.Module, seed: int) -> float:
        raise OSError("no data")

    with pytest.raises(
        RuntimeError, match=r"every training of the model before the repair raised: OSError: no data"
    ):
        prove(deep(), EMPTY_HEAD, score, map=map)


def test_what_the_prescription_configures_is_passed_on_or_its_absence_said() -> None:
    rx = Prescription("test", "clip", (Edit("clip_grad_norm", "configure", arguments={"value": 0.5}),))

    def takes(model: nn.Module, seed: int, clip_grad_norm: float = 100.0) -> float:
        return seed - clip_grad_norm

    found = prove(deep(), rx, takes, map=map)
    assert found.arms[AFTER].scores[0] == -0.5
    assert found.arms[BEFORE].scores[0] == -100
    ignored = prove(deep(), rx, lambda model, seed: float(seed), map=map)
    assert ignored.notes == (
        "clip_grad_norm = 0.5 of the prescription was not used: train takes no clip_grad_norm",
    )


def test_too_few_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="2 seeds are too few"):
        prove(deep(), ORTHOGONAL, train, seeds=2)


def test_a_proof_is_resumed(tmp_path: object) -> None:
    calls: list[int] = []

    def score(model: nn.Module, seed: int) -> float:
        calls.append(seed)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return seed + float(not model[20].weight.any())  # type: ignore[index]

    store = f"{tmp_path}/proof.jsonl"
    with pytest.raises(Interrupted):
        prove(deep(), EMPTY_HEAD, score, seeds=3, map=map, store=store)
    prove(deep(), EMPTY_HEAD, score, seeds=3, map=map, store=store)
    assert len(calls) == 5 + 5


def test_an_interrupt_after_three_pairs_still_tells_what_they_show() -> None:
    calls: list[int] = []

    def score(model: nn.Module, seed: int) -> float:
        calls.append(seed)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return 0.01 * seed + float(not model[20].weight.any())  # type: ignore[index]

    found = prove(deep(), EMPTY_HEAD, score, map=map)
    assert found.seeds == (0, 1, 2)
    assert found.helps
    assert "interrupted before the end" in found.notes


def test_progress_counts_every_training() -> None:
    seen: list[tuple[int, int]] = []
    prove(
        deep(),
        ORTHOGONAL,
        lambda model, seed, lr_scale=1.0: seed,
        seeds=3,
        map=map,
        progress=lambda *n: seen.append(n),
    )
    assert seen[0] == (0, 17)
    assert seen[-1] == (17, 17)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


NET = """
import torch
from torch import nn
from torch.nn import functional

centres = 3 * torch.randn(4, 8, generator=torch.Generator().manual_seed(0))

def points(seed):
    drawn = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (64,), generator=drawn)
    return centres[labels] + torch.randn(64, 8, generator=drawn), labels

def build(seed=0):
    torch.manual_seed(seed)
    layers = []
    for fan_in in [8] + [16] * 11:
        layers += [nn.Linear(fan_in, 16), nn.ReLU()]
    x, y = points(0)
    return nn.Sequential(*layers, nn.Linear(16, 4)), lambda m: functional.cross_entropy(m(x), y)

def train(model, seed):
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(40):
        x, y = points(100 * seed + step + 1)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    x, y = points(10**6)
    return (model(x).argmax(-1) == y).float().mean().item()

def raising(model, seed):
    raise OSError("no data here")

def wordy(model, seed):
    return "good"

def criterion(output):
    return output.mean()

class Pair:
    def __init__(self, model, seed):
        pass
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "proof_net.py").write_text(NET)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    return f"{tmp_path}/proof_net.py"


def test_repair_prove_ends_with_a_proof(net: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["repair", f"{net}:build", "--prove", "--train", f"{net}:train", "--seeds", "4"])
    out = capsys.readouterr().out
    assert "The repair helps: " in out
    assert "train takes no lr_scale" in out
    assert left.value.code == 0


def test_a_function_that_is_no_training_is_refused_in_words(
    net: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("criterion", "Pair"):
        with pytest.raises(SystemExit) as left:
            main(["repair", f"{net}:build", "--prove", "--train", f"{net}:{name}"])
        assert left.value.code == 2
        assert "it is called as train(model, seed)" in capsys.readouterr().err


@pytest.mark.parametrize("stopped", [KeyboardInterrupt(), TargetError("it was not proven")])
def test_what_was_found_is_kept_when_its_proof_comes_to_nothing(
    net: str,
    tmp_path: Path,
    stopped: BaseException,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ends(*args: Any, **kwargs: Any) -> Any:
        raise stopped

    monkeypatch.setattr("isograd.cli.prove.proof", ends)
    with pytest.raises(SystemExit) as left:
        main(["repair", f"{net}:build", "--prove", "-o", str(tmp_path / "patch.py")])
    assert left.value.code == (130 if isinstance(stopped, KeyboardInterrupt) else 2)
    out, err = capsys.readouterr()
    assert "cured" in out
    assert "interrupted" in err or "it was not proven" in err
    assert "def repair(model" in (tmp_path / "patch.py").read_text()


def test_a_training_that_raises_shows_the_user_s_own_lines(
    net: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, said in (("raising", "no data here"), ("wordy", "returned 'good', which is no number")):
        with pytest.raises(SystemExit) as left:
            main(["repair", f"{net}:build", "--train", f"{net}:{name}"])
        assert left.value.code == 2
        err = capsys.readouterr().err
        assert said in err
        assert "a bug in isograd" not in err


def test_arguments_that_lead_nowhere_are_refused_before_the_search(
    net: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, said in (
        (["-o", "/no/such/folder/patch.py"], "there is no folder /no/such/folder"),
        (["--store", "proof.jsonl"], "give --prove as well"),
        (["--trainings", "2"], "give one of them as well"),
        (["--train", "train"], "a training is file.py:name"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["repair", f"{net}:build", *options])
        assert left.value.code == 2
        assert said in capsys.readouterr().err


def test_a_store_that_cannot_be_written_is_told_after_what_was_found(
    net: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    store = str(tmp_path / "file" / "proof.jsonl")
    with pytest.raises(SystemExit) as left:
        main(["repair", f"{net}:build", "--prove", "--seeds", "3", "--store", store])
    assert left.value.code == 2
    out, err = capsys.readouterr()
    assert out.startswith("cured")
    assert "was not proven: " in err
    assert "bug in isograd" not in err


def test_without_a_training_the_target_s_own_batch_is_fitted(net: str) -> None:
    rx = weights("nn.init.orthogonal_", range(0, 24, 2), gain=math.sqrt(2))
    found = proof_of(f"{net}:build", (), rx, load(f"{net}:build").loss, train=None, seeds=3)
    assert found.helps
    assert set(found.arms) == {BEFORE, AFTER, RANDOM, RATE}
    assert found.arms[AFTER].mean > found.arms[BEFORE].mean + 0.5


# -- the controls --------------------------------------------------------------------------------------


def test_a_random_edit_changes_the_same_places_in_another_way() -> None:
    rx = Prescription(
        "test",
        "all kinds",
        (
            Edit("0.weight", "fill", "nn.init.orthogonal_"),
            Edit("2.weight", "fill", "nn.init.orthogonal_"),
            Edit("1", "replace", "nn.Tanh"),
            Edit("3", "replace", "nn.Tanh"),
            Edit("5.inplace", "set", arguments={"value": True}),
            Edit("clip_grad_norm", "configure", arguments={"value": 1.0}),
        ),
    )
    found = random_edit(rx, deep(), 3)
    assert [(e.place, e.verb) for e in found.edits] == [(e.place, e.verb) for e in rx.edits]
    assert found.edits[2].of == found.edits[3].of
    assert found.edits[0].arguments["std"] == pytest.approx(found.edits[1].arguments["std"] * math.sqrt(2))
    assert found.edits[5].arguments["value"] != 1.0
    assert random_edit(rx, deep(), 3) == found
    assert random_edit(rx, deep(), 4) != found


# -- the statistics, against another implementation ----------------------------------------------------


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 30, 101])
def test_student_s_t_agrees_with_scipy(freedom: int) -> None:
    for t in (0.1, 1.0, 2.7, 15.0):
        assert t_within(t, freedom) == pytest.approx(1 - 2 * stats.t.sf(t, freedom), abs=1e-12)
    assert t_quantile(0.95, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-6)


def test_a_difference_agrees_with_scipy() -> None:
    first, second = [0.1, 0.3, 0.2, 0.25], [0.4, 0.5, 0.45, 0.9]
    found, oracle = paired(first, second), stats.ttest_rel(second, first)
    interval = oracle.confidence_interval(0.95)
    assert found.p == pytest.approx(oracle.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_equal_differences_leave_no_doubt() -> None:
    assert paired([1, 2, 3], [2, 3, 4]).better
    assert not paired([1, 2, 3], [1, 2, 3]).better
    with pytest.raises(ValueError, match="two pairs"):
        paired([1], [2])
