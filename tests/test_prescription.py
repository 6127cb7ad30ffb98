"""A prescription is data: it prints as a diff and as code, and both do what `apply` does."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isograd.edit import Edit
from isograd.prescription import Prescription, Reach, Safety, apply, combined, not_applicable
from tests.models import Tied, mlp


def executed(rx: Prescription, model: nn.Module) -> nn.Module:
    """What the printed code makes of a copy."""
    names: dict[str, Any] = {}
    exec(rx.to_code(), names)
    return names["repair"](copy.deepcopy(model))


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def drawn(layers: int = 6, std: float = 0.1) -> Prescription:
    edits = tuple(Edit(f"{2 * i}.weight", "fill", "nn.init.normal_", {"std": std}) for i in range(layers))
    return Prescription("draw", "weights drawn", edits)


def exchanged(layers: int = 6) -> Prescription:
    edits = tuple(Edit(f"{2 * i + 1}", "replace", "nn.ReLU", before="Sigmoid()") for i in range(layers))
    return Prescription("exchange", "ReLU in place of sigmoid", edits, reach=Reach.ACTIVATION)


def test_a_diff_names_the_places_as_the_model_prints_them() -> None:
    assert "- (1), (3) … (11) (6): Sigmoid()\n  + (1), (3) … (11) (6): nn.ReLU()" in str(exchanged())


def test_the_original_is_not_touched_and_the_users_random_numbers_go_on() -> None:
    model = mlp(nn.Sigmoid, 6)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    changed = apply(model, [drawn(), exchanged()])
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert isinstance(model[1], nn.Sigmoid)
    assert isinstance(changed.get_submodule("1"), nn.ReLU)
    assert not torch.equal(before["0.weight"], changed.state_dict()["0.weight"])


def test_the_code_does_bitwise_what_apply_does() -> None:
    model = mlp(nn.Sigmoid, 6)
    rx = drawn() + exchanged()
    assert same(executed(rx, model), apply(model, rx))
    assert str(executed(rx, model)) == str(apply(model, rx))
    assert "isograd" not in rx.to_code().replace("isograd explain", "")


def test_loops_are_compressed() -> None:
    code = (drawn() + exchanged()).to_code()
    assert "for i in range(0, 11, 2):" in code
    assert "for i in range(1, 12, 2):" in code


@pytest.mark.parametrize(
    ("places", "loops"),
    [
        (["inp", *(f"layers.{i}.w" for i in range(9)), "out"], ['*(f"layers.{i}.w" for i in range(9))']),
        (
            [f"stage{s}.{i}.{w}" for s in (1, 2) for i in range(4) for w in ("a", "b")],
            [f'*(f"stage{s}.{{i}}{{part}}" for i in range(4) for part in (".a", ".b"))' for s in (1, 2)],
        ),
        ([f"block{i:02d}.w" for i in range(4)], []),
        (["3.w", "2.w", "1.w", "1.w", "2.w", "4.w", "6.w"], ["range(2, 7, 2)"]),
    ],
)
def test_a_loop_gives_the_places_in_their_order(places: list[str], loops: list[str]) -> None:
    """Also where some of them are in no loop, and where a number is written with zeros in front."""
    code = Prescription(
        "draw", "", tuple(Edit(place, "alter", "surgery.chrono_") for place in places)
    ).to_code()
    body = code[code.index("for name in") : code.index("chrono_(model.get_submodule")]
    assert all(loop in body for loop in loops)
    got: list[str] = []
    exec(f"{body}got.append(name)", {"got": got})
    assert got == places


class Called(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.layer(x))


def test_calls_that_are_exchanged_are_exchanged_in_a_compiled_model_too() -> None:
    """Dynamo traced the mode without seeing the line that it asks for, and left the exchange out."""
    line = f"test_prescription.py:{Called.forward.__code__.co_firstlineno + 1}"
    arguments = {"of": "sigmoid", "to": "tanh", "lines": (line,)}
    rx = Prescription("exchange", "", (Edit("0", "alter", "calls.exchange_calls", arguments),))
    model, x = apply(nn.Sequential(Called(), nn.Linear(4, 2)), rx), torch.randn(3, 4)
    assert torch.equal(model[0](x), torch.tanh(model[0].layer(x)))
    assert torch.equal(torch.compile(model, backend="eager")(x), model(x))


def test_order_does_not_matter() -> None:
    model = mlp(nn.Sigmoid, 6)
    assert same(apply(model, [drawn(), exchanged()]), apply(model, [exchanged(), drawn()]))


def test_two_edits_of_one_place_conflict() -> None:
    with pytest.raises(ValueError, match=r"two edits of 0\.weight conflict: .*std=0\.1.*std=0\.2"):
        combined([drawn(1), drawn(1, std=0.2)])
    whole = Prescription("gone", "", (Edit("0", "replace", "nn.Identity"),))
    with pytest.raises(ValueError, match="lies in 0"):
        combined([whole, Prescription("x", "", drawn(1).edits, reach=Reach.GATING)])


def test_the_same_edit_twice_is_made_once() -> None:
    assert len((drawn() + drawn()).edits) == 6


def test_what_is_not_applicable_is_said_and_refused() -> None:
    rx = not_applicable("exchange", "no activation is a module")
    assert str(rx) == "exchange  not applicable, because no activation is a module"
    with pytest.raises(ValueError, match="not applicable, because no activation"):
        apply(mlp(nn.ReLU, 1), rx)


def test_no_edits_are_no_silent_success() -> None:
    rx = Prescription("warm-up", "a warm-up", safety=Safety.ADVICE, advice=("raise the rate slowly",))
    with pytest.raises(ValueError, match="no edits to apply: raise the rate slowly"):
        apply(mlp(nn.ReLU, 1), rx)


def test_tied_parameters_stay_tied_and_modes_are_kept() -> None:
    model = Tied().eval().double()
    model.blocks[0].train()
    model.token.weight.requires_grad_(False)
    rx = Prescription(
        "p",
        "",
        (Edit("blocks.1.2", "replace", "nn.PReLU"), Edit("token.weight", "fill", ".mul_", {"other": 2.0})),
    )
    changed = apply(model, rx)
    assert isinstance(changed, Tied)
    assert changed.head.weight is changed.token.weight
    assert not changed.token.weight.requires_grad
    assert torch.equal(changed.token.weight, 2 * model.token.weight)
    new = changed.get_submodule("blocks.1.2")
    assert new.weight.dtype == torch.float64  # pyright: ignore
    assert not new.training
    assert changed.blocks[0].training


def test_a_module_registered_twice_is_replaced_twice() -> None:
    act = nn.Sigmoid()
    model = nn.Sequential(nn.Linear(2, 2), act, nn.Linear(2, 2), act)
    changed = apply(model, Prescription("e", "", (Edit("1", "replace", "nn.ReLU"),)))
    assert changed.get_submodule("1") is changed.get_submodule("3")
    assert isinstance(changed.get_submodule("3"), nn.ReLU)


def test_rows_fill_one_gate_only() -> None:
    model = nn.Sequential(nn.LSTM(3, 4))
    edit = Edit("0.bias_hh_l0", "fill", ".fill_", {"value": 1.0}, rows=(4, 8))
    rx = Prescription("forget", "", (edit,))
    bias = dict(apply(model, rx).named_parameters())["0.bias_hh_l0"]
    assert (bias[4:8] == 1).all()
    assert torch.equal(bias[:4], model[0].bias_hh_l0[:4])  # pyright: ignore
    assert same(executed(rx, model), apply(model, rx))


def test_an_optimizer_follows_to_the_copy() -> None:
    model = mlp(nn.Sigmoid, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 64)).sum().backward()
    optimizer.step()
    rx = Prescription("draw", "", (Edit("0.weight", "fill", "nn.init.zeros_"),))
    changed = apply(model, rx, optimizer=optimizer)
    held: list[Tensor] = optimizer.param_groups[0]["params"]
    assert [id(p) for p in held] == [id(p) for p in changed.parameters()]
    assert held[0] not in optimizer.state  # refilled: its moments were of other weights
    assert held[1] in optimizer.state


def stepped(optimizer: torch.optim.Optimizer, model: nn.Module) -> set[str]:
    """Names of the parameters that a step moves."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def closure() -> Tensor:
        model.zero_grad()
        loss = model(torch.ones(4, 64)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


LEARNED = Prescription("learned", "", (Edit("1", "replace", "nn.PReLU"),), reach=Reach.ACTIVATION)


@pytest.mark.parametrize("in_place", [False, True])
def test_lbfgs_follows_and_forgets_the_curvature_of_another_function(in_place: bool) -> None:
    model = mlp(nn.Sigmoid, 2)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    assert "0.weight" in stepped(optimizer, model)
    changed = apply(model, LEARNED, in_place=in_place, optimizer=optimizer)
    assert {"0.weight", "1.weight"} <= stepped(optimizer, changed)


def test_names_of_an_optimizer_are_those_of_the_new_model() -> None:
    model = mlp(nn.Sigmoid, 2)
    optimizer = torch.optim.Adam(model.named_parameters())
    rx = LEARNED + Prescription("w", "", (Edit("0", "wrap", "nn.Sequential"),))
    changed = apply(model, rx, optimizer=optimizer)
    assert sorted(optimizer.param_groups[0]["param_names"]) == sorted(
        n for n, _ in changed.named_parameters()
    )


def test_a_new_parameter_joins_those_of_as_many_axes() -> None:
    """Weight decay and Muon split a model so."""
    model = mlp(nn.Sigmoid, 2)
    few, many = ([p for p in model.parameters() if (p.ndim > 1) is so] for so in (False, True))
    optimizer = torch.optim.AdamW([{"params": few, "weight_decay": 0.0}, {"params": many}])
    changed = apply(model, LEARNED, optimizer=optimizer)
    assert any(p is changed.get_parameter("1.weight") for p in optimizer.param_groups[0]["params"])
    muon, adam = torch.optim.Muon(many), torch.optim.Adam(few)
    changed = apply(model, LEARNED, optimizer=[muon, adam])
    assert any(p is changed.get_parameter("1.weight") for p in adam.param_groups[0]["params"])
    alone = torch.optim.Muon([p for p in model.parameters() if p.ndim > 1])
    with pytest.warns(
        UserWarning, match=r"in no group of the optimizer, which trains others only: 1\.weight"
    ):
        apply(model, LEARNED, optimizer=alone)


def test_an_optimizer_of_another_model_is_refused() -> None:
    optimizer = torch.optim.Adam(mlp(nn.Sigmoid, 2).parameters())
    with pytest.raises(ValueError, match="the optimizer trains no parameter of this model"):
        apply(mlp(nn.Sigmoid, 2), LEARNED, optimizer=optimizer)


def test_keys_that_change_are_told() -> None:
    rx = Prescription("w", "", (Edit("0", "wrap", "nn.Sequential"),))
    model = mlp(nn.ReLU, 1)
    assert rx.key_map(model) == {"0.weight": "0.0.weight", "0.bias": "0.0.bias"}
    loaded = {rx.key_map(model).get(k, k): v for k, v in model.state_dict().items()}
    apply(model, rx).load_state_dict(loaded)


def test_json_holds_the_edits_and_the_code() -> None:
    told = json.loads(exchanged().to_json())
    assert told["edits"][0] | {"source": ""} == {
        "place": "1", "verb": "replace", "of": "nn.ReLU", "arguments": {}, "rows": None, "before": "Sigmoid()",
        "source": "",
    }  # fmt: skip
    assert "def repair(model" in told["code"]


def test_a_prescription_for_another_model_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"the model has no 11: exchange was prescribed for another one"):
        apply(mlp(nn.Sigmoid, 5), exchanged())
    with pytest.raises(ValueError, match=r"the model has no 6\.weight: draw was prescribed"):
        apply(mlp(nn.Sigmoid, 2), drawn())


def test_a_prescription_where_the_model_belongs_is_told() -> None:
    model = mlp(nn.Tanh, 2)
    with pytest.raises(TypeError, match=r"apply\(model, rx\)"):
        apply(not_applicable("lsuv", Reach.INITIALISATION, "no weights"), model)  # pyright: ignore[reportArgumentType]
