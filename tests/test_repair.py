"""The search: the least invasive prescription whose flow is healthy, with the reasons why less was not enough."""

from __future__ import annotations

import copy
import importlib
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from isograd import check
from isograd.candidates import depth_over_width
from isograd.cli import main
from isograd.judge import short_training
from isograd.prescription import Patient, Reach, apply
from isograd.remedies import rescale_weights
from isograd.repair import Repair, repair
from tests.models import HE, Apply, Built, Residual, classified, mlp, relu_he, relu_large
from tests.test_causes import lengths, past
from tests.test_remedies_init import dead, functional_net, loop, normed
from tests.test_symptoms import skipping


def batch_normed(layers: int = 60) -> Built:
    body = [part for _ in range(layers) for part in (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())]
    return classified(nn.Sequential(*body, nn.Linear(64, 10)), batch=64)


def exploding_residual(blocks: int = 30) -> Built:
    parts = [Residual(mlp(nn.ReLU, 1, HE, width=32, inputs=32, classes=32)) for _ in range(blocks)]
    return classified(nn.Sequential(nn.Linear(64, 32), *parts, nn.Linear(32, 10)))


def dim_gains() -> Built:
    body = [part for _ in range(8) for part in (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())]
    for norm in body:
        if isinstance(norm, nn.BatchNorm1d):
            nn.init.normal_(norm.weight, 0.0, 1e-4)
    return classified(nn.Sequential(*body, nn.Linear(64, 10)), batch=64)


def redrawn(model: nn.Module, gain: float) -> nn.Module:
    """Orthogonal weights, as somebody drew them who took care of all but the gain."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)
    return model


class Towers(nn.Module):
    """Two inputs, each with a stack of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = mlp(nn.Sigmoid, 10), mlp(nn.Sigmoid, 10)
        self.head = nn.Linear(20, 10)

    def forward(self, left: Tensor, *, right: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(torch.cat([self.left(left), self.right(right)], 1))}


def towers() -> Built:
    left, right, y = torch.randn(32, 64), torch.randn(32, 64), torch.randint(10, (32,))
    return Towers(), lambda m: functional.cross_entropy(m(left, right=right)["logits"], y)


class Gated(nn.Module):
    """A product of two layers: of the second degree in what it is given, which no size of its weights holds for long."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value, self.gate, self.out = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.value(x) * functional.gelu(self.gate(x)))


def overflowing() -> Built:
    model = nn.Sequential(nn.Linear(64, 16), *(Residual(Gated(16)) for _ in range(12)), nn.Linear(16, 10))
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, 1.5 * layer.in_features**-0.5)
    return classified(model)


SICK: dict[str, tuple[Callable[[], Built], str, Reach]] = {
    "100 sigmoid layers": (
        lambda: classified(mlp(nn.Sigmoid, 100)),
        "orthogonal-initialisation + exchange-activation",
        Reach.ACTIVATION,
    ),
    "T = 200, tanh": (lambda: loop(200), "recurrent-initialisation", Reach.INITIALISATION),
    "60 batch norms without skips": (batch_normed, "insert-residual", Reach.RESIDUAL),
    "exploding residual net": (exploding_residual, "scale-residual-branches", Reach.INITIALISATION),
    "gains of N(0, 1e-4)": (dim_gains, "reset-norm-gain", Reach.INITIALISATION),
    "statistics of the past": (past, "batch-statistics", Reach.TRAINING),
    "normalised weights of length 0.05": (lambda: lengths(0.05), "reset-norm-gain", Reach.INITIALISATION),
    "epsilon of 10": (lambda: classified(normed()), "reset-norm-epsilon", Reach.INITIALISATION),
    "ReLU at 2.5 of He": (relu_large, "orthogonal-initialisation", Reach.INITIALISATION),
    "default init, 20 ReLU": (
        lambda: classified(mlp(nn.ReLU, 20)),
        "orthogonal-initialisation",
        Reach.INITIALISATION,
    ),
    "orthogonal at 0.4": (
        lambda: classified(redrawn(mlp(nn.ReLU, 20), 0.4 * HE)),
        "rescale-weights",
        Reach.INITIALISATION,
    ),
    "two towers of sigmoids": (
        towers,
        "orthogonal-initialisation + exchange-activation",
        Reach.ACTIVATION,
    ),
    "Xavier, 10 sigmoids": (
        lambda: classified(mlp(nn.Sigmoid, 10, 1.0)),
        "exchange-activation",
        Reach.ACTIVATION,
    ),
    "gated blocks that overflow": (overflowing, "scale-residual-branches", Reach.INITIALISATION),
    "biases of -3": (lambda: classified(dead()), "zero-biases", Reach.INITIALISATION),
}


@pytest.mark.parametrize("case", SICK)
def test_the_search_finds_the_least_invasive_cure(case: str) -> None:
    build, remedy, reach = SICK[case]
    torch.manual_seed(0)
    model, loss = build()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = repair(model, loss)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert found.cured
    assert found.prescription is not None
    assert (found.prescription.remedy, found.prescription.reach) == (remedy, reach)
    assert check(found.model, loss).verdict == "healthy"
    assert all(tried.why for tried in found.tried)
    executed(found, model, loss)


def executed(found: Repair, model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
    """The printed code makes the repaired model."""
    names: dict[str, Any] = {}
    exec(found.to_code(), names)
    coded = names["repair"](copy.deepcopy(model))
    assert torch.equal(loss(coded), loss(found.model))


def test_cheaper_ways_are_said_to_be_not_enough() -> None:
    torch.manual_seed(0)
    found = repair(*classified(mlp(nn.Sigmoid, 30)))
    said = str(found)
    assert said.startswith("cured\n")
    assert "at the critical gain of sigmoid: theory expects" in said
    assert "tanh in place of sigmoid (30): theory expects" in said
    assert "- (1), (3) … (59) (30): Sigmoid()" in said


class Signed(nn.Sequential):
    """Nothing comes back through its second part."""

    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x).sign())


def test_where_no_gradient_arrives_no_decades_are_made_up() -> None:
    torch.manual_seed(0)
    said = str(repair(*classified(Signed(nn.Linear(64, 64), mlp(nn.ReLU, 2)))))
    assert "no gradient before" in said
    assert "no gradient arrives" in said
    assert "400" not in said


class Unique(nn.Sequential):
    """Refuses to be copied, at length."""

    def __deepcopy__(self, _: dict[int, Any]) -> nn.Module:
        raise TypeError(f"there is one of me: {'really ' * 100}")


def test_a_model_that_cannot_be_copied_is_said_so_once() -> None:
    torch.manual_seed(0)
    model, loss = classified(Unique(*mlp(nn.Sigmoid, 30)))
    found = repair(model, loss)
    assert not found.cured
    assert found.model is model
    assert all("theory expects" in tried.why for tried in found.tried)
    said = " ".join(str(found).split())
    assert said.count("cannot be copied (there is one of me: really") == 1
    assert len(found.note) < 300
    assert "in_place=True" in found.note


def test_a_healthy_model_comes_back_as_it_is() -> None:
    torch.manual_seed(0)
    model, loss = relu_he()
    found = repair(model, loss)
    assert found.cured
    assert found.model is model
    assert found.prescription is None
    assert "nothing to repair" in str(found)
    with pytest.raises(ValueError, match="nothing to apply: the flow is healthy"):
        found.to_code()


def test_only_safe_edits_are_tried_where_no_others_are_wanted() -> None:
    torch.manual_seed(0)
    found = repair(*classified(mlp(nn.Sigmoid, 10, 1.0)), unsafe=False)
    assert not found.cured
    assert found.tried == ()


def test_a_spent_budget_is_said_and_the_best_is_kept() -> None:
    torch.manual_seed(0)
    sick = classified(mlp(nn.Sigmoid, 20))
    found = repair(*sick, measurements=0)
    assert not found.cured
    assert "measurements are used up: the best so far" in found.note
    assert "budget is used up" in repair(*sick, budget=0.0).note


def test_an_interrupt_keeps_the_best() -> None:
    torch.manual_seed(0)
    model, loss = classified(mlp(nn.Sigmoid, 20))
    calls = 0

    def interrupted(m: nn.Module) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise KeyboardInterrupt
        return loss(m)

    found = repair(model, interrupted)
    assert found.note == "interrupted: the best so far"
    assert not found.cured


TWICE_SICK = """
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

def build():
    body = [part for _ in range(60) for part in (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())]
    for norm in body[1::3]:
        nn.init.normal_(norm.weight, 0.0, 1e-4)
    x, y, calls = torch.randn(64, 64), torch.randint(10, (64,)), []

    def loss(model):
        calls.append(model)
        if len(calls) == 3:  # the gains have been tried: far better, and not enough
            Path("reached").touch()
            time.sleep(120)
        return functional.cross_entropy(model(x), y)

    return nn.Sequential(*body, nn.Linear(64, 10)), loss
"""


@pytest.mark.slow
def test_a_signal_from_the_terminal_ends_the_command_with_the_best_so_far(tmp_path: Path) -> None:
    (tmp_path / "twice_sick.py").write_text(TWICE_SICK)
    command = [sys.executable, "-m", "isograd", "repair", "twice_sick.py:build", "--format", "json"]
    running = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "reached").exists() and running.poll() is None:
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        printed, _ = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130
    told = json.loads(printed)
    assert not told["cured"]
    assert told["note"] == "interrupted: the best so far"
    assert told["prescription"]["remedy"] == "reset-norm-gain"


def test_functional_calls_are_repaired_at_their_line() -> None:
    torch.manual_seed(0)

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.ModuleList(nn.Linear(32, 32) for _ in range(12))
            self.head = nn.Linear(32, 1)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.body:
                x = torch.sigmoid(layer(x))
            return torch.sigmoid(self.head(x))

    x, y = torch.randn(32, 32), torch.rand(32, 1)
    model, loss = Deep(), lambda m: functional.binary_cross_entropy(m(x), y)
    found = repair(model, loss)
    assert found.cured
    assert (found.model(x) >= 0).all()  # the output is a sigmoid still
    assert "by hand" in str(found)
    executed(found, model, loss)


class Hot(nn.Module):
    """log(softmax(1000 x)): two errors, of which one can be mended."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(functional.softmax(1e3 * self.layer(x), -1))


def test_of_two_errors_the_one_that_can_be_mended_is() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(32, 64), torch.randint(10, (32,))
    found = repair(Hot(), lambda m: functional.nll_loss(m(x), y))
    assert not found.cured
    assert found.prescription is not None
    assert found.prescription.remedy == "safe-loss"
    assert {f.code for f in found.after.errors}.isdisjoint({f.code for f in found.before.errors})


def test_what_only_the_user_can_do_is_said_where_nothing_cures() -> None:
    """Gains that are frozen at 0.01: no edit may thaw them."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU()) for _ in range(6)]
    model, loss = classified(nn.Sequential(*layers, nn.Linear(64, 10)))
    for block in layers:
        nn.init.constant_(block[1].weight, 0.01)
        block[1].requires_grad_(False)
    found = repair(model, loss)
    assert not found.cured
    (rx,) = found.by_hand
    assert rx.remedy == "reset-norm-gain"
    assert "thaw" in str(found)
    assert [told["remedy"] for told in json.loads(found.to_json())["by_hand"]] == [rx.remedy]


class PlusOneNorm(nn.Module):
    """RMS normalisation whose gain is 1 + weight."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(start + 0.01 * torch.randn(64))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (64,)) * (1 + self.weight)


def test_with_the_gains_only_those_shifts_are_reset_that_are_not_zero() -> None:
    torch.manual_seed(0)
    model, loss = dim_gains()
    nn.init.constant_(model[1].bias, 0.1)  # pyright: ignore
    found = repair(model, loss)
    assert found.prescription is not None
    assert [edit.place for edit in found.prescription.edits if edit.place.endswith("bias")] == ["1.bias"]


def test_gains_that_are_added_to_one_become_zero() -> None:
    torch.manual_seed(0)
    body = [part for _ in range(8) for part in (nn.Linear(64, 64), PlusOneNorm(-1.0), nn.Tanh())]
    found = repair(*classified(nn.Sequential(*body, nn.Linear(64, 10))))
    assert found.cured
    assert found.prescription is not None
    assert {(e.place, e.of) for e in found.prescription.edits} == {
        (f"{i}.weight", "nn.init.zeros_") for i in range(1, 24, 3)
    }


def test_what_alone_is_too_loud_is_scaled_alone() -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU()) for _ in range(4)]
    model, loss = classified(nn.Sequential(*layers, nn.Linear(64, 10)))
    with torch.no_grad():
        model[-1].weight.mul_(200)  # pyright: ignore
    found = repair(model, loss)
    assert found.cured
    assert found.prescription is not None
    assert [edit.place for edit in found.prescription.edits] == ["4.weight"]


class Attending(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)
        with torch.no_grad():
            self.inner.in_proj_weight[:32].mul_(factor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.inner(y, y, y, need_weights=False)[0]


def test_values_and_output_of_an_attention_that_are_loud_as_well_are_scaled_each_by_its_own_factor() -> None:
    torch.manual_seed(0)
    attending = Attending(60.0)
    with torch.no_grad():
        for part, factor in zip(attending.inner.in_proj_weight.split(16), (60, 60, 30), strict=True):
            nn.init.orthogonal_(part, factor)  # no independent draws, which would be drawn anew
        nn.init.orthogonal_(attending.inner.out_proj.weight, 40)
    body = nn.Sequential(nn.Unflatten(1, (4, 16)), attending, nn.Flatten())
    model, loss = classified(nn.Sequential(body, nn.Linear(64, 10)))
    rx = next(iter(rescale_weights.prescribe(Patient(model, check(model, loss), loss))))
    assert {edit.place.rpartition("inner.")[2] for edit in rx.edits} == {"in_proj_weight", "out_proj.weight"}
    inner = apply(model, rx).get_submodule("0.1.inner")
    parts = [*inner.get_parameter("in_proj_weight").split((32, 16)), inner.get_parameter("out_proj.weight")]
    assert [float(part.detach().square().mean().sqrt()) * 4 for part in parts] == pytest.approx(
        [1.0] * 3, rel=1e-3
    )


def test_queries_and_keys_that_are_packed_in_an_attention_are_scaled_and_its_values_kept() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Unflatten(1, (4, 16)), Attending(30.0), Attending(30.0), nn.Flatten())
    model, loss = classified(nn.Sequential(body, nn.Linear(64, 10)))
    found = repair(model, loss)
    assert [f.code for f in found.before.errors] == ["SA304"]
    assert found.cured
    assert found.prescription is not None
    assert {edit.rows for edit in found.prescription.edits} == {(0, 16), (16, 32)}


def test_of_errors_that_are_left_it_is_said_what_to_write_and_of_warnings_nothing() -> None:
    """The cut is an error, what is lost behind it a warning."""
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Linear(64, 64), nn.Sigmoid()) for _ in range(2)]
    cut = Apply(lambda x: x.detach())
    found = repair(*classified(nn.Sequential(nn.Linear(64, 64), cut, *parts, nn.Linear(64, 10))))
    assert not found.cured
    (rx,) = found.by_hand
    assert rx.remedy == "parameter-without-gradient"
    assert "take the .detach() out" in str(found)


class Field(nn.Module):
    """Calls one function at one line, layer by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(4, 32), nn.Linear(32, 32), nn.Linear(32, 32)])
        self.head = nn.Linear(32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.inner:
            x = torch.relu(layer(x))
        return self.head(x)


def test_kinks_of_a_model_that_the_loss_differentiates_are_exchanged_in_all_its_runs() -> None:
    torch.manual_seed(0)
    points, border = torch.rand(64, 4), torch.zeros(2, 4)

    def loss(m: nn.Module) -> torch.Tensor:
        x = points.clone().requires_grad_()
        (slope,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
        (curved,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        return (curved.sum(1) - 1).square().mean() + m(border).square().mean()

    found = repair(Field(), loss)
    assert found.before.verdict == "vanishing"
    assert found.cured
    assert found.prescription is not None
    assert "exchange-activation" in found.prescription.remedy


def test_json_tells_all() -> None:
    torch.manual_seed(0)
    told = json.loads(repair(*relu_large()).to_json())
    assert told["cured"]
    assert told["prescription"]["code"].startswith('"""orthogonal-initialisation')
    assert told["before"]["verdict"] == "exploding"
    assert told["tried"][-1]["why"] == "healthy"


def test_training_judges_what_the_flow_does_not_show() -> None:
    """24 post-norm sublayers: a healthy flow, and a plateau that only a change of the blocks leaves."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
    model = nn.Sequential(nn.Embedding(20, 16), encoder, nn.Linear(16, 20))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
    tokens = torch.randint(20, (8, 8))

    def loss(m: nn.Module) -> Tensor:
        return functional.cross_entropy(m(tokens).flatten(0, 1), tokens.flatten())

    found = repair(model, loss, train=short_training(loss, steps=12, lr=3e-3))
    assert found.before.verdict == "healthy"
    assert found.prescription is not None
    assert found.cured
    assert found.score_after > found.score_before + 0.1


def test_what_trains_worse_is_passed_over() -> None:
    torch.manual_seed(0)
    model, loss = relu_large()
    first = repair(model, loss)
    assert first.prescription is not None
    times = iter((1.0, 0.0, 2.0))  # as it is, with the first healthy candidate, with the next
    found = repair(model, loss, train=lambda _model, _seed: next(times))
    assert found.cured
    assert found.prescription is not None
    assert found.prescription.edits != first.prescription.edits
    assert (found.score_before, found.score_after) == (1.0, 2.0)
    passed = next(tried for tried in found.tried if tried.prescription.edits == first.prescription.edits)
    assert "the score goes from 1 to 0" in passed.why


def test_a_training_is_asked_about_what_no_gradient_shows() -> None:
    """Sigmoids behind batch normalisation: a healthy flow, and features that hardly differ between samples."""
    torch.manual_seed(0)
    body = [part for _ in range(6) for part in (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Sigmoid())]
    model, loss = classified(nn.Sequential(*body, nn.Linear(64, 10)))
    scored: list[nn.Module] = []

    def without_sigmoids(changed: nn.Module, _seed: int) -> float:
        scored.append(changed)
        return -float(sum(isinstance(module, nn.Sigmoid) for module in changed.modules()))

    found = repair(model, loss, train=without_sigmoids)
    assert not found.before.errors
    assert found.prescription is not None
    assert found.prescription.remedy == "exchange-activation"
    scored.clear()
    assert repair(model, loss, train=without_sigmoids, trainings=2).score_before == -6
    assert len(scored) == 4  # as it is and one change, from each of two seeds
    unasked = repair(model, loss, train=without_sigmoids, trainings=1)
    assert unasked.prescription is None
    assert unasked.note.endswith("a change of it asks for two trainings")


def test_a_change_of_what_is_healthy_is_taken_when_a_second_seed_agrees() -> None:
    torch.manual_seed(0)
    body = [part for _ in range(6) for part in (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Sigmoid())]
    model, loss = classified(nn.Sequential(*body, nn.Linear(64, 10)))
    seeds: list[int] = []

    def lucky(changed: nn.Module, seed: int) -> float:
        seeds.append(seed)
        exchanged = not any(isinstance(module, nn.Sigmoid) for module in changed.modules())
        return float(exchanged and seed == 0)

    found = repair(model, loss, train=lucky)
    assert found.prescription is None
    assert seeds.count(1) >= 2  # the model as it is, and a change that the first seed preferred
    assert any("with a second seed from 0 to 0" in tried.why for tried in found.tried)


def test_loud_states_of_an_lstm_are_drawn_anew_and_not_held_down_by_its_gates() -> None:
    """Two hundred steps of training: .29 with the one and 1.4 with the other, on symbols of five steps before."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = nn.LSTM(8, 64, num_layers=2, batch_first=True, bidirectional=True)
            self.head = nn.Linear(128, 10)
            for name, p in self.memory.named_parameters():
                if "weight_hh" in name:
                    nn.init.normal_(p, std=0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.memory(x)[0]).flatten(0, 1)

    torch.manual_seed(0)
    x, y = torch.randn(8, 80, 8), torch.randint(0, 10, (640,))
    found = repair(Tagger(), lambda m: functional.cross_entropy(m(x), y))
    (finding,) = found.before.errors
    assert finding.code == "RN602"
    assert finding.remedies == ("recurrent-initialisation", "clip-gradients")
    assert found.prescription is not None
    assert found.prescription.remedy == "recurrent-initialisation"


def test_what_takes_a_warning_away_need_not_train_better_but_no_worse() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory, self.head = nn.GRU(4, 32, batch_first=True), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.memory(x)[0][:, -1])

    torch.manual_seed(0)
    model, x, y = Reader(), torch.randn(32, 50, 4), torch.randint(0, 4, (32,))

    def loss(m: nn.Module) -> Tensor:
        return functional.cross_entropy(m(x), y)

    def trained(better: float) -> Repair:
        return repair(model, loss, train=lambda m, _: better * (not torch.equal(_biases(m), _biases(model))))

    assert [f.code for f in check(model, loss).findings if f.code == "RN601"]
    relieved = trained(0.0).prescription
    assert relieved is not None
    assert relieved.remedy == "chrono-initialisation"
    assert trained(-0.01).prescription is None


def _biases(model: nn.Module) -> Tensor:
    return torch.cat([p.detach() for name, p in model.named_parameters() if "bias" in name])


def test_what_is_left_behind_a_cure_is_asked_of_a_training() -> None:
    torch.manual_seed(0)
    model, loss = relu_large()
    first = repair(model, loss).prescription
    assert first is not None

    def normed(changed: nn.Module, _seed: int) -> float:
        return float(any("Norm" in type(module).__name__ for module in changed.modules()))

    found = repair(model, loss, train=normed, trainings=5)  # two draws of weights gain nothing
    assert found.cured
    assert (found.score_before, found.score_after) == (0, 1)
    assert found.prescription is not None
    assert all(edit in found.prescription.edits for edit in first.edits)
    assert len(found.prescription.edits) > len(first.edits)
    assert not any(isinstance(module, nn.LayerNorm | nn.RMSNorm) for module in model.modules())


def test_a_damped_skip_is_mended_before_new_weights_bridge_it() -> None:
    """And where gains near zero hide it, both are."""
    torch.manual_seed(0)
    model, loss = skipping(0.0)
    found = repair(model, loss)
    assert found.cured
    assert found.prescription is not None
    assert {(edit.verb, edit.of) for edit in found.prescription.edits} == {("wrap", "modules.Residual")}
    for norm in (module for module in model.modules() if isinstance(module, nn.LayerNorm)):
        nn.init.normal_(norm.weight, std=0.02)
    both = repair(model, loss)
    assert both.cured
    assert both.prescription is not None
    assert both.prescription.remedy == "reset-norm-gain + insert-residual"


class Abreast(nn.Module):
    """The same input through several narrow layers, and what they give side by side."""

    def __init__(self, branches: int, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(branches * width, width) for _ in range(branches))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.relu(branch(x)) for branch in self.branches], 1)


def test_layers_side_by_side_make_a_network_no_deeper() -> None:
    torch.manual_seed(0)
    model, loss = classified(nn.Sequential(*(Abreast(8, 8) for _ in range(4)), nn.Linear(64, 10)))
    assert depth_over_width(Patient(model, check(model, loss), loss)) == pytest.approx(5 / 64)


def test_a_convolution_is_as_wide_as_it_has_channels() -> None:
    torch.manual_seed(0)
    body = [nn.Sequential(nn.Conv2d(1 if i == 0 else 8, 8, 3, padding=1), nn.ReLU()) for i in range(8)]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.02)
    x, y = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))

    def loss(m: nn.Module) -> Tensor:
        return functional.cross_entropy(m(x), y)

    assert depth_over_width(Patient(model, check(model, loss), loss)) == pytest.approx(9 / 8)
    found = repair(model, loss)
    assert found.cured
    assert found.prescription is not None
    assert found.prescription.remedy == "orthogonal-initialisation + exchange-activation"


def test_a_training_that_raises_loses_nothing() -> None:
    torch.manual_seed(0)
    model, loss = relu_large()

    def broken(_model: nn.Module, _seed: int) -> float:
        raise FileNotFoundError("train.csv")

    found = repair(model, loss, train=broken)
    assert found.cured
    assert found.prescription is not None
    assert found.note == "not judged by training, which raised FileNotFoundError: train.csv"
    assert math.isnan(found.score_before)


def test_a_change_that_the_training_cannot_take_is_passed_over() -> None:
    torch.manual_seed(0)
    model, loss = relu_large()
    trained: list[nn.Module] = []

    def first_change_raises(changed: nn.Module, _seed: int) -> float:
        trained.append(changed)
        if len(trained) == 2:
            raise KeyError("0.weight")
        return 1.0

    found = repair(model, loss, train=first_change_raises)
    assert found.cured
    assert found.failure is None
    assert found.score_after == 1.0
    assert any(tried.why.endswith("its training raised KeyError: '0.weight'") for tried in found.tried)


def test_an_interrupted_training_keeps_the_candidate() -> None:
    torch.manual_seed(0)
    model, loss = relu_large()

    def interrupted(_model: nn.Module, _seed: int) -> float:
        raise KeyboardInterrupt

    found = repair(model, loss, train=interrupted)
    assert found.cured
    assert found.prescription is not None
    assert found.note == "interrupted: the best so far"


def test_functional_net_of_the_contracts_is_repaired() -> None:
    torch.manual_seed(0)
    model, loss = functional_net()
    found = repair(model, loss)
    assert found.cured


# -- the command -----------------------------------------------------------------------------------

NET = """
import torch
from torch import nn

def build():
    layers = [nn.Linear(8, 32), nn.Sigmoid()]
    for _ in range(12):
        layers += [nn.Linear(32, 32), nn.Sigmoid()]
    model = nn.Sequential(*layers, nn.Linear(32, 1))
    x, y = torch.randn(32, 8), torch.randn(32, 1)
    return model, lambda m: (m(x) - y).square().mean()
"""


def command(*words: str) -> object:
    """Its exit status."""
    with pytest.raises(SystemExit) as left:
        main(["repair", *words])
    return left.value.code


def test_the_command_prints_the_diff_and_writes_a_patch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sick_net.py").write_text(NET)
    assert command("sick_net.py:build", "-o", "patch.py") == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("cured  sick_net.py:build\n")
    assert "+ (1), (3) … (25) (13): nn.Tanh()" in printed.out
    assert "from patch import repair; model = repair(model)" in printed.err
    names: dict[str, Any] = {}
    exec(Path("patch.py").read_text(), names)
    exec(NET, names)
    model, loss = names["build"]()
    assert check(names["repair"](model), loss).verdict == "healthy"


def test_a_patch_whose_name_is_no_name_in_python_is_told_how_to_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    Path("dashed_net.py").write_text(NET)
    assert command("dashed_net.py:build", "-o", "my-patch.py") == 0
    told = capsys.readouterr().err.rpartition("is made: ")[2]
    names: dict[str, Any] = {"model": importlib.import_module("dashed_net").build()[0]}
    exec(told, names)
    assert isinstance(names["model"][1], nn.Tanh)


def test_the_command_says_what_it_could_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other_net.py").write_text(NET)
    assert command("other_net.py:build", "--safe", "--format", "json") == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["cured"]
    assert told["prescription"] is None
    assert command("other_net.py:buidl") == 2


@pytest.mark.parametrize("pre", [False, True], ids=["post-norm", "pre-norm"])
def test_a_loud_branch_is_put_right_before_its_end_is_scaled(pre: bool) -> None:
    """At zero, or scaled with the number of blocks, it would hide values that are thirty times too large."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=pre)
    body = nn.TransformerEncoder(layer, 6, nn.LayerNorm(32) if pre else None, enable_nested_tensor=False)
    model = nn.Sequential(nn.Embedding(20, 32), body, nn.Linear(32, 20))
    attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    with torch.no_grad():
        for inner in attentions:
            inner.in_proj_weight[64:].mul_(30)
            inner.out_proj.weight.mul_(30)
    x = torch.randint(20, (8, 12))

    def loss(m: nn.Module) -> Tensor:
        return functional.cross_entropy(m(x).flatten(0, 1), x.roll(1, 1).flatten())

    found = repair(model, loss)
    assert [f.code for f in found.before.errors] == ["VG105"]
    assert found.cured
    after = [m for m in found.model.modules() if isinstance(m, nn.MultiheadAttention)]
    values = [float(inner.in_proj_weight[64:].detach().square().mean().sqrt()) * 32**0.5 for inner in after]
    assert values == pytest.approx([1.0] * 6, rel=1e-3)
    ends = [float(inner.out_proj.weight.detach().square().mean().sqrt()) * 32**0.5 for inner in after]
    assert all(0.1 < end <= 1.001 for end in ends)


def own_chain(function: Callable[[Tensor], Tensor]) -> Built:
    """As torch draws them, with a function of the user's own between them."""
    parts = [part for _ in range(8) for part in (nn.Linear(64, 64), Apply(function))]
    return classified(nn.Sequential(*parts, nn.Linear(64, 10)))


def test_weights_are_drawn_for_what_a_function_of_ones_own_does_and_what_saturates_is_exchanged() -> None:
    """sin(30 x) keeps the gradient at sigma_w 1/30; weights as small would move far too fast under clamp(40 x)."""
    torch.manual_seed(0)
    waves = repair(*own_chain(lambda x: torch.sin(30 * x)))
    assert [f.evidence["cause"] for f in check(*own_chain(lambda x: torch.sin(30 * x))).errors] == [
        "initialisation"
    ]
    assert waves.cured
    assert waves.prescription is not None
    assert waves.prescription.reach is Reach.INITIALISATION
    assert float(waves.model[2].weight.detach().std()) == pytest.approx(1 / 30 / 8, rel=0.1)  # pyright: ignore
    clipped = repair(*own_chain(lambda x: torch.clamp(40 * x, -1, 1)))
    assert clipped.cured
    assert clipped.prescription is not None
    assert clipped.prescription.remedy.endswith("exchange-activation")
    assert clipped.prescription.reach is Reach.ACTIVATION


class Cooled(nn.Sequential):
    """Logits, or hidden layers, times a constant of the user's."""

    def forward(self, x: Tensor) -> Tensor:
        return 1e-3 * super().forward(x)


def test_a_constant_that_costs_the_signal_is_left_out_of_the_forward() -> None:
    torch.manual_seed(0)
    model, loss = classified(Cooled(*mlp(nn.ReLU, 3, HE)))
    found = repair(model, loss)
    assert [f.code for f in found.before.errors] == ["VG108"]
    assert found.cured
    assert found.prescription is not None
    assert found.prescription.remedy == "leave-out-factor"
    assert "test_repair.py" in found.prescription.advice[0]
    x = torch.randn(4, 64)
    assert torch.allclose(found.model(x), 1e3 * model(x))
    scope: dict[str, Any] = {}
    exec(found.to_code(), scope)  # needs torch only
    assert torch.allclose(scope["repair"](copy.deepcopy(model))(x), 1e3 * model(x))
    hidden = nn.Sequential(*(Cooled(nn.Linear(64, 64), nn.Tanh()) for _ in range(6)), nn.Linear(64, 10))
    deep = repair(*classified(hidden))
    assert deep.cured
    assert deep.prescription is not None
    assert deep.prescription.remedy == "leave-out-factor"
