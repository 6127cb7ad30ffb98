"""Remedies that redraw weights and exchange activations: contracts over all of them, and what each one does."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from isograd import check
from isograd.diagnosis import Diagnosis, diagnose
from isograd.layers import layers
from isograd.measure import measure
from isograd.pages import SYMPTOMS
from isograd.prescription import Patient, Prescription, apply
from isograd.remedies import (
    NAMES,
    chrono_initialisation,
    classic_initialisation,
    critical_initialisation,
    delta_orthogonal,
    exchange_activation,
    forget_bias,
    gated_recurrence,
    insert_residual,
    leaky_activation,
    lsuv,
    orthogonal_initialisation,
    orthogonal_recurrence,
    recurrent_initialisation,
    rescale_weights,
    reset_norm_epsilon,
    scale_embeddings,
    scale_residual_branches,
    zero_biases,
)
from isograd.remedies.orthogonal_initialisation import gain
from tests.models import HE, Built, Residual, Tied, classified, mlp

HEADINGS = ("What it does", "When it helps", "Expected effect", "Safety", "References")


class Functional(nn.Module):
    """Calls its activation itself; its output goes through one too, and one gates a product."""

    def __init__(self, layers: int = 6, width: int = 16) -> None:
        super().__init__()
        self.body = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.gate, self.head = nn.Linear(width, width), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.body:
            x = torch.sigmoid(layer(x))
        x = x * torch.sigmoid(self.gate(x))
        return torch.sigmoid(self.head(x))


def functional_net() -> Built:
    x, y = torch.randn(32, 16), torch.rand(32, 1)
    return Functional(), lambda m: functional.binary_cross_entropy(m(x), y)


class Loop(nn.Module):
    """A tanh recurrence written out, with the loss at its end."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.wx, self.wh, self.head = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], self.wh.in_features)
        for t in range(x.shape[1]):
            h = torch.tanh(self.wx(x[:, t]) + self.wh(h))
        return self.head(h)


def loop(steps: int = 40) -> Built:
    x, y = torch.randn(8, steps, 4), torch.randint(3, (8,))
    return Loop(), lambda m: functional.cross_entropy(m(x), y)


class Read(nn.Module):
    def __init__(self, core: nn.RNNBase) -> None:
        super().__init__()
        self.core, self.head = core, nn.Linear(core.hidden_size, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(x)[0][:, -1])


def fused(core: Callable[..., nn.RNNBase]) -> Built:
    x, y = torch.randn(8, 20, 4), torch.randint(3, (8,))
    return Read(core(4, 16, batch_first=True)), lambda m: functional.cross_entropy(m(x), y)


def convolutions() -> Built:
    body: list[nn.Module] = []
    for i in range(5):
        body += [nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1), nn.Tanh()]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    x, y = torch.randn(6, 3, 8, 8), torch.randint(4, (6,))
    return model, lambda m: functional.cross_entropy(m(x), y)


def residual() -> Built:
    blocks = [Residual(mlp(nn.ReLU, 1, 1.4, width=32, inputs=32, classes=32)) for _ in range(10)]
    return classified(nn.Sequential(nn.Linear(64, 32), *blocks, nn.Linear(32, 10)))


def tied() -> Built:
    model, tokens = Tied(), torch.randint(11, (4, 7))
    nn.init.normal_(model.token.weight, 0.0, 4.0)
    return model, lambda m: functional.cross_entropy(m(tokens).flatten(0, 1), tokens.flatten())


def half_frozen() -> Built:
    model, loss = classified(mlp(nn.Sigmoid, 8, 1.0))
    for parameter in model[0].parameters():  # pyright: ignore[reportIndexIssue]
        parameter.requires_grad_(False)
    return model, loss


def post_norm() -> Built:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(4, 6, 16)
    model = nn.Sequential(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Linear(16, 2))
    return model, lambda m: m(x).square().mean()


MODELS: dict[str, Callable[[], Built]] = {
    "sigmoid MLP": lambda: classified(mlp(nn.Sigmoid, 8, 1.0)),
    "softplus MLP": lambda: classified(mlp(nn.Softplus, 8, 1.0)),
    "dead ReLU MLP": lambda: classified(dead()),
    "functional sigmoids": functional_net,
    "tanh recurrence": loop,
    "fused RNN": lambda: fused(nn.RNN),
    "LSTM": lambda: fused(nn.LSTM),
    "GRU": lambda: fused(nn.GRU),
    "convolutions": convolutions,
    "residual": residual,
    "tied": tied,
    "half frozen": half_frozen,
    "post-norm": post_norm,
    "eps 10": lambda: classified(normed()),
}


def dead() -> nn.Sequential:
    model = mlp(nn.ReLU, 6, 1.4)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.constant_(layer.bias, -3.0)
    return model


def normed() -> nn.Sequential:
    body = [part for _ in range(6) for part in (nn.Linear(64, 64), nn.LayerNorm(64, eps=10.0), nn.ReLU())]
    return nn.Sequential(*body, nn.Linear(64, 10))


def patient(built: Built) -> Patient:
    model, loss = built
    return Patient(model, diagnose(measure(model, loss)), loss)


def seen(build: Callable[[], Built]) -> Patient:
    torch.manual_seed(0)
    return patient(build())


def first(remedy: Any, build: Callable[[], Built], index: int = 0) -> tuple[Patient, Prescription]:
    known = seen(build)
    return known, list(remedy.prescribe(known))[index]


REMEDIES = (
    critical_initialisation, orthogonal_initialisation, delta_orthogonal, exchange_activation, leaky_activation, lsuv,
    scale_residual_branches, recurrent_initialisation, rescale_weights, chrono_initialisation, forget_bias, reset_norm_epsilon, scale_embeddings, zero_biases,
)  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_every_remedy_applies_or_says_why_not(model: str) -> None:
    """Code and `apply` agree bit by bit; the original and the random numbers are not touched; the copy trains."""
    known = seen(MODELS[model])
    assert known.loss is not None
    before = copy.deepcopy(known.model.state_dict())
    frozen = {name for name, p in known.model.named_parameters() if not p.requires_grad}
    applied = 0
    for remedy in REMEDIES:
        state = torch.get_rng_state()
        variants = list(remedy.prescribe(known))
        assert torch.equal(state, torch.get_rng_state())
        assert variants, "silence is not an answer"
        for rx in variants:
            assert rx.remedy == remedy.SLUG
            if not rx.applicable:
                assert rx.why_not
                continue
            applied += 1
            changed = apply(known.model, rx)
            names: dict[str, Any] = {}
            exec(rx.to_code(), names)
            coded = names["repair"](copy.deepcopy(known.model))
            assert changed.state_dict().keys() == before.keys()
            for key, value in changed.state_dict().items():
                assert torch.equal(value, coded.state_dict()[key]), (rx.title, key)
                assert key not in frozen or torch.equal(value, before[key])
                assert value.isfinite().all()
            value = known.loss(changed)
            assert torch.equal(value, known.loss(coded))
            value.backward()
            assert torch.equal(known.loss(copy.deepcopy(changed)), value)
    assert applied >= 2
    assert all(torch.equal(before[k], v) for k, v in known.model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_a_remedy_is_a_page(name: str) -> None:
    text = (SYMPTOMS.parent / "remedies" / f"{name}.py").read_text(encoding="utf-8")
    positions = [text.index(f"\n{heading}\n") for heading in HEADINGS]
    assert positions == sorted(positions)


# -- what each one does ----------------------------------------------------------------------------


def decades(known: Patient, rx: Prescription) -> float:
    assert known.loss is not None
    return measure(apply(known.model, rx), known.loss).lost


def test_the_critical_gain_is_what_theory_says() -> None:
    known, rx = first(critical_initialisation, lambda: classified(mlp(nn.GELU, 8, 1.0)))
    assert rx.edits[0].arguments["std"] == pytest.approx(1.408211 / 8, rel=1e-4)
    assert rx.edits[-1].arguments == {} or rx.edits[-1].of == "nn.init.zeros_"  # the head's bias
    assert any(
        e.of == "nn.init.normal_" and e.arguments["std"] == pytest.approx(0.41584, rel=1e-3) for e in rx.edits
    )
    assert abs(decades(known, rx)) < 0.7


def test_theory_expects_what_is_measured() -> None:
    known, rx = first(exchange_activation, lambda: classified(mlp(nn.Sigmoid, 20, 1.0, width=128)), index=2)
    assert "ReLU in place of sigmoid (20)" in rx.title
    assert rx.decades == pytest.approx(20 * math.log10(0.70711), rel=0.05)
    assert decades(known, rx) == pytest.approx(rx.decades, abs=0.8)


def test_together_they_cure_what_neither_does_alone() -> None:
    torch.manual_seed(0)
    built = classified(mlp(nn.Sigmoid, 20))
    known = patient(built)
    exchange = next(iter(exchange_activation.prescribe(known)))
    alone = next(iter(orthogonal_initialisation.prescribe(known)))
    drawn = next(iter(orthogonal_initialisation.prescribe(replace(known, exchanged={"sigmoid": "tanh"}))))
    both = exchange + drawn
    assert decades(known, exchange) < -3
    assert decades(known, alone) < -3
    assert abs(decades(known, both)) < 1


def test_orthogonal_layers_are_orthogonal_at_the_gain() -> None:
    known, rx = first(orthogonal_initialisation, lambda: classified(mlp(nn.ReLU, 4, 1.0)))
    weight = dict(apply(known.model, rx).named_parameters())["2.weight"]
    torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(64), atol=1e-4, rtol=1e-4)


def test_a_gate_and_the_output_keep_their_sigmoid() -> None:
    known, rx = first(exchange_activation, functional_net)
    (edit,) = rx.edits
    assert edit.verb == "alter"
    assert len(edit.arguments["lines"]) == 1  # pyright: ignore[reportArgumentType]
    assert rx.advice[0].startswith(edit.source)
    assert "x = torch.sigmoid(layer(x))" in rx.advice[0]
    changed = apply(known.model, rx)
    assert known.loss is not None
    found = measure(changed, known.loss)
    assert [a.function for a in found.activations] == ["tanh"] * 6 + ["sigmoid"] * 2


class Abreast(nn.Module):
    """An Inception block: two branches of layers with an activation, side by side, and a gate on what they give."""

    def __init__(self, width: int, gated: bool) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Linear(width, width // 2), nn.Sigmoid())
        self.deep = nn.Sequential(
            nn.Linear(width, width), nn.Sigmoid(), nn.Linear(width, width // 2), nn.Sigmoid()
        )
        self.attention, self.gate = (nn.Linear(width, width), nn.Sigmoid()) if gated else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.wide(x), self.deep(x)], -1)
        return y * (2 * self.gate(self.attention(x))) if self.attention and self.gate else y


@pytest.mark.parametrize("gated", [False, True])
def test_activations_side_by_side_are_exchanged_together_and_gates_are_not(gated: bool) -> None:
    torch.manual_seed(0)
    model, loss = classified(nn.Sequential(*(Abreast(64, gated) for _ in range(6)), nn.Linear(64, 10)))
    found = check(model, loss)
    if not gated:
        (finding,) = [f for f in found.findings if f.code == "VG101"]
        assert finding.evidence["cause"] == "activation"
    rx = next(iter(exchange_activation.prescribe(Patient(model, found, loss))))
    branches = ("wide.1", "deep.1", "deep.3")
    assert {edit.place for edit in rx.edits} == {f"{i}.{branch}" for i in range(6) for branch in branches}


def test_an_exchanged_forward_is_copied_pickled_and_read_like_the_original() -> None:
    known, rx = first(exchange_activation, functional_net)
    changed = apply(known.model, rx)
    assert inspect.signature(changed.forward) == inspect.signature(known.model.forward)
    x = torch.randn(4, 16)
    for twin in (copy.deepcopy(changed), pickle.loads(pickle.dumps(changed))):
        assert torch.equal(twin(x), changed(x))
        with torch.no_grad():
            next(twin.parameters()).zero_()
        assert not torch.equal(twin(x), changed(x))  # its forward is its own, not the original's


def test_an_activation_held_as_an_attribute_is_set() -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.act = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), torch.tanh

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.body:
                x = self.act(layer(x))
            return x

    x = torch.randn(16, 8)
    known, rx = first(exchange_activation, lambda: (Held(), lambda m: m(x).sum()), index=1)
    assert rx.edits[0].place == "act"
    assert apply(known.model, rx).act is functional.relu


def test_a_delta_kernel_is_zero_but_at_its_centre() -> None:
    known, rx = first(delta_orthogonal, convolutions)
    kernel = dict(apply(known.model, rx).named_parameters())["2.weight"].detach()
    centre = kernel[:, :, 1, 1].clone()
    kernel[:, :, 1, 1] = 0
    assert (kernel == 0).all()
    torch.testing.assert_close(centre @ centre.T, torch.eye(8), atol=1e-5, rtol=1e-5)


def test_lsuv_gives_unit_variance() -> None:
    known, rx = first(lsuv, lambda: classified(mlp(nn.Softplus, 6, 0.3)))
    changed = apply(known.model, rx)
    deviations: list[float] = []
    for layer in list(changed.children())[:-1]:
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda _m, _a, out: deviations.append(float(out.detach().std())))
    assert known.loss is not None
    known.loss(changed)
    assert deviations == pytest.approx([1.0] * 6, abs=1e-3)


def test_scaled_branches_cure_an_exploding_residual_net() -> None:
    known, rx = first(scale_residual_branches, residual)
    assert known.flow.growth > 1
    assert known.loss is not None
    assert measure(apply(known.model, rx), known.loss).growth < 0.5
    assert {e.place.split(".")[-2] for e in rx.edits} == {"2"}  # the last layer of each branch


def test_a_state_that_keeps_its_directions_keeps_its_biases() -> None:
    torch.manual_seed(0)
    cell = nn.RNN(4, 32, batch_first=True)
    x, y = torch.randn(8, 40, 4), torch.randint(3, (8,))
    nn.init.orthogonal_(cell.weight_hh_l0, 0.2)
    known = patient((Read(cell), lambda m: functional.cross_entropy(m(x), y)))
    multiplied = next(iter(recurrent_initialisation.prescribe(known)))
    assert [(e.place, e.of) for e in multiplied.edits] == [("core.weight_hh_l0", ".mul_")]
    nn.init.normal_(cell.weight_hh_l0, std=0.02)
    drawn = next(iter(recurrent_initialisation.prescribe(known)))
    assert [e.place for e in drawn.edits] == ["core.weight_hh_l0", "core.bias_ih_l0", "core.bias_hh_l0"]


def test_a_recurrence_carries_its_gradient() -> None:
    known = seen(lambda: loop(100))
    alone, small, identity = recurrent_initialisation.prescribe(known)
    assert {e.of for e in alone.edits} == {"nn.init.orthogonal_", "nn.init.zeros_"}
    assert {e.place for e in alone.edits if e.of == "nn.init.zeros_"} == {
        e.place.replace("weight", "bias") for e in alone.edits if e.of == "nn.init.orthogonal_"
    }
    assert decades(known, small) == pytest.approx(-1, abs=0.5)
    assert decades(known, identity) > -1.5
    assert decades(known, next(iter(orthogonal_initialisation.prescribe(known)))) < -5


def test_every_gate_of_a_loud_recurrence_is_drawn_for_itself() -> None:
    def loud() -> Built:
        model, loss = fused(nn.LSTM)
        core = model.get_submodule("core")
        assert isinstance(core, nn.LSTM)
        with torch.no_grad():
            for gate in core.weight_hh_l0.chunk(4):
                nn.init.orthogonal_(gate)
            core.weight_hh_l0[16:32] *= 8
        return model, loss

    known, rx = first(recurrent_initialisation, loud)
    (edit,) = rx.edits  # the one gate that is off
    assert edit.rows == (16, 32)
    core = apply(known.model, rx).get_submodule("core")
    assert isinstance(core, nn.LSTM)
    for gate in core.weight_hh_l0.chunk(4):
        assert torch.allclose(gate @ gate.T, torch.eye(16), atol=1e-5)


def test_a_recurrence_of_zeros_is_drawn_with_what_goes_in() -> None:
    def zeros() -> Built:
        model, loss = fused(partial(nn.GRU, num_layers=2))
        with torch.no_grad():
            for parameter in model.get_submodule("core").parameters():
                parameter.zero_()
        return model, loss

    known, rx = first(recurrent_initialisation, zeros)
    assert known.loss is not None
    assert check(known.model, known.loss).verdict == "vanishing"
    changed = apply(known.model, rx)
    assert check(changed, known.loss).verdict == "healthy"
    core = changed.get_submodule("core")
    assert isinstance(core, nn.GRU)
    assert all(gate.any() for gate in core.weight_ih_l1.chunk(3))


def test_only_the_layer_that_is_off_is_scaled_and_its_directions_are_kept() -> None:
    def faint() -> Built:
        model = mlp(nn.ReLU, 10, HE)
        with torch.no_grad():
            model.get_parameter("8.weight").mul_(1e-4)
        return classified(model)

    known, rx = first(rescale_weights, faint)
    (edit,) = rx.edits
    assert edit.place == "8.weight"
    changed = apply(known.model, rx).get_parameter("8.weight").detach()
    before = known.model.get_parameter("8.weight").detach()
    assert torch.allclose(changed / changed.norm(), before / before.norm(), atol=1e-7)
    assert float(changed.square().mean().sqrt()) * 8 == pytest.approx(HE, rel=0.01)
    assert known.loss is not None
    assert check(apply(known.model, rx), known.loss).verdict == "healthy"


def test_the_forget_gate_has_one_bias_of_1_though_torch_has_two() -> None:
    known, rx = first(forget_bias, lambda: fused(nn.LSTM))
    core = apply(known.model, rx).get_submodule("core")
    assert isinstance(core, nn.LSTM)
    assert (core.bias_ih_l0[16:32] + core.bias_hh_l0[16:32] == 1).all()
    chrono = apply(known.model, next(iter(chrono_initialisation.prescribe(known)))).get_submodule("core")
    assert isinstance(chrono, nn.LSTM)
    forget = chrono.bias_ih_l0[16:32] + chrono.bias_hh_l0[16:32]
    assert (forget >= 0).all()
    assert (forget <= math.log(19)).all()
    assert torch.equal(chrono.bias_ih_l0[:16], -chrono.bias_ih_l0[16:32])


def test_embeddings_of_a_sane_size_are_left_alone() -> None:
    known, rx = first(scale_embeddings, tied)
    assert rx.applicable
    changed = apply(known.model, rx)
    assert isinstance(changed, Tied)
    assert changed.head.weight is changed.token.weight
    healthy = Patient(changed, Diagnosis(known.flow))
    assert not next(iter(scale_embeddings.prescribe(healthy))).applicable


class Bags(nn.Module):
    """Two loud tables that are three modules: a bag of words, and one table with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.one, self.other = (nn.EmbeddingBag(20, 16), nn.Embedding(20, 16), nn.Embedding(20, 16))
        self.other.weight = self.one.weight
        nn.init.normal_(self.bag.weight, std=50.0)
        nn.init.normal_(self.one.weight, std=50.0)
        self.body = nn.Sequential(
            nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 10)
        )

    def forward(self, words: Tensor) -> Tensor:
        parts = (self.bag(words), self.one(words[:, 0]), self.other(words[:, 1]))
        return self.body(torch.cat(parts, -1))


def test_a_bag_of_embeddings_is_a_table_and_a_shared_one_is_drawn_once() -> None:
    words, y = torch.randint(20, (32, 5)), torch.randint(10, (32,))
    _, rx = first(scale_embeddings, lambda: (Bags(), lambda m: functional.cross_entropy(m(words), y)))
    assert [edit.place for edit in rx.edits] == ["bag.weight", "one.weight"]


def test_a_frozen_bias_keeps_its_numbers() -> None:
    model, loss = fused(nn.LSTM)
    model.get_parameter("core.bias_hh_l0").requires_grad_(False)
    known = patient((model, loss))
    changed = apply(model, next(iter(chrono_initialisation.prescribe(known))))
    assert torch.equal(changed.get_parameter("core.bias_hh_l0"), model.get_parameter("core.bias_hh_l0"))
    assert not torch.equal(changed.get_parameter("core.bias_ih_l0"), model.get_parameter("core.bias_ih_l0"))


def test_half_precision_is_drawn_orthogonal_too() -> None:
    torch.manual_seed(0)
    known = patient(classified(mlp(nn.Tanh, 4, 0.5).bfloat16()))
    rx = next(iter(orthogonal_initialisation.prescribe(known)))
    weight = apply(known.model, rx).get_parameter("2.weight")
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close((weight @ weight.T).float(), torch.eye(64), atol=0.05, rtol=0)


def test_each_matrix_of_a_stack_is_orthogonal() -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights, self.head = nn.Parameter(0.05 * torch.randn(6, 16, 16)), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            for weight in self.weights:
                x = torch.tanh(x @ weight)
            return self.head(x)

    torch.manual_seed(0)
    known = patient(classified(Stacked(), inputs=16, classes=4))
    rx = next(iter(orthogonal_initialisation.prescribe(known)))
    changed = apply(known.model, rx)
    drawn = changed.get_parameter("weights")
    torch.testing.assert_close(drawn @ drawn.mT, torch.eye(16).expand(6, 16, 16), atol=1e-5, rtol=0)
    names: dict[str, Any] = {}
    exec(rx.to_code(), names)
    assert torch.equal(names["repair"](copy.deepcopy(known.model)).weights, drawn)


def test_an_activation_that_is_a_gate_too_is_not_exchanged() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.body = nn.Sigmoid(), nn.ModuleList(nn.Linear(16, 16) for _ in range(6))
            self.gate, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.body:
                x = self.act(layer(x))
            return self.head(x * self.act(self.gate(x)))

    torch.manual_seed(0)
    known = patient(classified(Gated(), inputs=16, classes=4))
    rx = next(iter(exchange_activation.prescribe(known)))
    assert not rx.applicable
    assert "act: a gate or the output goes through it too" in rx.advice[0]
    (skips,) = insert_residual.prescribe(known)  # its activation is a module that holds no layer
    assert known.loss is not None
    assert float(known.loss(apply(known.model, skips)).detach()) != float(known.loss(known.model).detach())


def test_a_loop_over_a_linear_layer_is_held_orthogonal_or_told_where_a_gate_belongs() -> None:
    known, rx = first(orthogonal_recurrence, lambda: loop(20))
    state = apply(known.model, rx).get_submodule("wh").weight
    torch.testing.assert_close(state @ state.T, torch.eye(32), atol=1e-4, rtol=0)
    (gates,) = gated_recurrence.prescribe(known)
    assert gates.why_not == "the recurrence is a loop of your own"
    assert "test_remedies_init.py:" in gates.advice[0]
    assert "nn.GRUCell(inputs, 32)" in gates.advice[0]


def test_gates_of_an_lstm_that_are_closed_are_opened_with_it() -> None:
    model, loss = fused(nn.LSTM)
    core = model.get_submodule("core")
    assert isinstance(core, nn.LSTM)
    nn.init.constant_(core.bias_ih_l0.data[:16], -8.0)
    known = Patient(model, Diagnosis(measure(model, loss)), loss)
    opened = apply(model, next(iter(forget_bias.prescribe(known)))).get_submodule("core")
    assert isinstance(opened, nn.LSTM)
    both = opened.bias_ih_l0 + opened.bias_hh_l0
    assert (both[:16] == 0).all()
    assert (both[16:32] == 1).all()
    assert torch.equal(opened.bias_ih_l0[48:], core.bias_ih_l0[48:])


def test_an_operand_of_an_einsum_gets_the_variance_of_its_fan_in() -> None:
    """Its first axis is neither its inputs nor its outputs: an orthogonal matrix is scaled by what it sums over."""
    torch.manual_seed(0)

    class Votes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.votes = nn.Linear(8, 6 * 8), nn.Parameter(torch.randn(6, 10, 8, 12))
            self.head = nn.Linear(120, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            parts = self.part(x).unflatten(-1, (6, 8))
            return self.head(torch.einsum("bid,iode->boe", parts, self.votes).flatten(1))

    model, x = Votes(), torch.randn(16, 8)
    flow = measure(model, lambda m: m(x).square().mean())
    (layer,) = (found for found in layers(flow, model) if found.weight == "votes")
    drawn = nn.init.orthogonal_(torch.empty(6, 10, 8, 12), gain(layer))
    assert float(drawn.square().mean()) * layer.fan_in == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(
    ("equation", "shape", "fan_in"),
    [
        ("bid,iode->boe", (6, 10, 8, 12), 48),
        ("big, iog -> bo", (6, 10, 8), 48),  # splines: their basis is summed over as well
        ("bid,kiod->bkio", (4, 6, 10, 8), 8),
        ("...d,de->...e", (8, 12), 8),
        ("bid,de", (8, 12), 8),
    ],
)
def test_the_fan_in_of_an_einsum_is_what_it_sums_over(
    equation: str, shape: tuple[int, ...], fan_in: int
) -> None:
    torch.manual_seed(0)

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(shape))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum(equation, x, self.weight)

    x = torch.randn(5, 6, 8)
    (weight,) = measure(Product(), lambda m: m(x).square().mean()).parameters
    assert weight.fan_in == fan_in


class Sine(nn.Module):
    """sin(30 W x), with a constant that belongs to the gain of the layer (Sitzmann et al. 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30 * self.layer(x))


def test_a_constant_behind_a_layer_is_a_part_of_its_gain() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Sine(8), *(Sine(64) for _ in range(5)), nn.Linear(64, 1))
    x, y = torch.randn(64, 8), torch.randn(64, 1)

    def loss(m: nn.Module) -> Tensor:
        return functional.mse_loss(m(x), y)

    diagnosis = check(model, loss)
    assert [f.evidence.get("cause") for f in diagnosis.errors] == ["initialisation"]
    found = layers(diagnosis.flow, model)
    assert [layer.times for layer in found] == pytest.approx([30.0] * 6 + [1.0], rel=1e-3)
    rx = next(iter(orthogonal_initialisation.prescribe(Patient(model, diagnosis, loss))))
    assert check(apply(model, rx), loss).verdict == "healthy"


def test_a_function_that_passes_more_than_it_is_given_costs_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Sine(8), *(Sine(64) for _ in range(5)), nn.Linear(64, 1))
    with torch.no_grad():
        for weight in model.parameters():
            weight.div_(500)
    x, y = torch.randn(64, 8), torch.randn(64, 1)
    (finding,) = check(model, lambda m: functional.mse_loss(m(x), y)).errors
    assert finding.evidence["cause"] == "initialisation"
    assert not [effect for effect in finding.effects if "left out" in effect.intervention]


@pytest.mark.parametrize("sizes", [{}, {"kdim": 24, "vdim": 40}], ids=["packed", "separate"])
def test_the_projections_of_an_attention_are_layers_with_their_own_fan_in(sizes: dict[str, int]) -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(16, 2, add_bias_kv=True, batch_first=True, **sizes)
            self.into, self.head = nn.Linear(16, 16), nn.Linear(16, 3)
            with torch.no_grad():
                for name, weight in self.inner.named_parameters():
                    if name.endswith("weight"):
                        weight.mul_(1e-3)

        def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
            x = torch.relu(self.into(x))
            return self.head((x + self.inner(x, key, value, need_weights=False)[0]).mean(1))

    torch.manual_seed(0)
    model = Crossed()
    given = (torch.randn(8, 5, 16), torch.randn(8, 5, sizes.get("kdim", 16)))
    value, y = torch.randn(8, 5, sizes.get("vdim", 16)), torch.randint(3, (8,))
    loss = lambda m: functional.cross_entropy(m(*given, value), y)  # noqa: E731
    patient = Patient(model, check(model, loss), loss)
    projections = [la for la in layers(patient.flow, model) if la.attends]
    fan_in = [16, sizes.get("kdim", 16), sizes.get("vdim", 16), 16]
    assert sorted(la.fan_in for la in projections) == sorted(fan_in)
    assert all(
        (la.shape[0], la.activation, la.calls, la.head) == (16, "linear", 0, False) for la in projections
    )
    for remedy in (critical_initialisation, orthogonal_initialisation, classic_initialisation, lsuv):
        rx = next(rx for rx in remedy.prescribe(patient) if rx.applicable)
        inner = apply(model, rx).get_submodule("inner")
        for leaf, weight in inner.named_parameters():
            for part in weight.detach().chunk(3 if leaf == "in_proj_weight" else 1):
                if leaf.endswith("weight"):
                    sigma_w = float(part.square().mean().sqrt()) * math.sqrt(part.shape[1])
                    assert 0.5 < sigma_w < 2, (remedy.SLUG, leaf)
        kept = {"inner.bias_k", "inner.bias_v"}
        assert not kept & {edit.place for edit in rx.edits}


class Hyper(nn.Module):
    """Each layer's weight is made by another one from what it has learned of that layer (Ha et al. 2016)."""

    def __init__(self, factor: float, width: int = 24) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(4, 8))
        self.make = nn.ModuleList(nn.Linear(8, width * width) for _ in range(4))
        self.into, self.head, self.width = nn.Linear(16, width), nn.Linear(width, 4), width
        for layer in self.make:
            nn.init.normal_(layer.weight, std=factor / math.sqrt(8))  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for code, make in zip(self.codes, self.make, strict=True):
            x = functional.relu(functional.linear(x, make(code).view(self.width, self.width)))
        return self.head(x)


def test_a_layer_that_makes_weights_is_drawn_for_their_fan_in() -> None:
    torch.manual_seed(0)
    model, x, y = Hyper(0.01), torch.randn(32, 16), torch.randint(4, (32,))
    loss = lambda m: functional.cross_entropy(m(x), y)  # noqa: E731
    diagnosis = check(model, loss)
    found = {la.weight: la for la in layers(diagnosis.flow, model)}
    assert set(found) == {*(f"make.{i}.weight" for i in range(4)), "into.weight", "head.weight"}
    assert found["make.1.weight"].times == pytest.approx(math.sqrt(24))
    assert not any(p.bias for p in diagnosis.flow.parameters if p.name == "codes")
    rx = next(iter(critical_initialisation.prescribe(Patient(model, diagnosis, loss))))
    changed = apply(model, rx)
    assert check(changed, loss).verdict == "healthy"
    assert torch.equal(changed.get_parameter("codes"), model.codes)


def test_a_sigmoid_that_makes_one_of_several_results_is_left_alone() -> None:
    class Boxes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(16, 16), nn.Sigmoid(), nn.Linear(16, 16), nn.Tanh())
            self.classes, self.boxes = nn.Linear(16, 3), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.body(x)
            return self.classes(x), self.boxes(x).sigmoid()

    torch.manual_seed(0)
    model, x, y, boxes = Boxes(), torch.randn(8, 16), torch.randint(3, (8,)), torch.rand(8, 4)

    def loss(m: nn.Module) -> Tensor:
        scores, found = m(x)
        return functional.cross_entropy(scores, y) + functional.l1_loss(found, boxes)

    flow = measure(model, loss)
    assert [(a.function, a.site.module) for a in flow.hidden_activations] == [
        ("sigmoid", "body.1"),
        ("tanh", "body.3"),
    ]
    rx = next(
        rx for rx in exchange_activation.prescribe(Patient(model, diagnose(flow), loss)) if rx.applicable
    )
    assert [edit.place for edit in rx.edits] == ["body.1"]
