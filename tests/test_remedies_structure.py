"""Structural remedies: each over every family of models applies and runs, or says why it does not."""

from __future__ import annotations

import copy
import math
from importlib import import_module
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from isograd.diagnosis import diagnose
from isograd.measure import measure
from isograd.modules import HeadNormed, LayerNormed, PreLayerNorm, QueryKeyNormed
from isograd.modules import Residual as WrappedResidual
from isograd.prescription import Patient, Prescription, Safety, apply
from isograd.remedies import NAMES, Remedy
from isograd.remedies.insert_normalisation import groups_of
from tests.families import FAMILIES, IMAGES, LABELS, SEQUENCE, Functional, PostNorm, Recurrent
from tests.models import HE, Built, Residual, Tied, classified, mlp


def patient_of(family: str) -> tuple[Patient, nn.Module]:
    torch.manual_seed(0)
    model, loss = FAMILIES[family]()
    model.train()
    return Patient(model, diagnose(measure(model, loss)), loss), model


def remedy(name: str) -> Remedy:
    return cast(Remedy, import_module(f"isograd.remedies.{name}"))


def first(name: str, built: Built) -> Prescription:
    """What a remedy prescribes first; fails with its reason where it does not apply."""
    model, loss = built
    rx = next(remedy(name).prescribe(Patient(model, diagnose(measure(model, loss)), loss)))
    assert not rx.why_not, rx.why_not
    return rx


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def runs(model: nn.Module, rx: Prescription, patient: Patient) -> None:
    """Forward and backward with a finite loss; every parameter that was reached before still is."""
    assert patient.loss is not None
    changed = apply(model, rx)
    with torch.random.fork_rng():  # dropout
        plain = copy.deepcopy(model)
        reached = {n for n, g in _gradients(plain, patient.loss(plain)).items() if g is not None}
        loss = patient.loss(changed)
        assert loss.isfinite()
        gradients = _gradients(changed, loss)
    renamed = rx.key_map(model)
    gone = {renamed.get(n, n) for n in reached} - {n for n, g in gradients.items() if g is not None}
    replaced = [e.place for e in rx.edits if e.verb == "replace"]
    lost = {n for n in gone if not any(n.startswith(f"{place}.") for place in replaced)}
    assert not lost, f"no gradient reaches {sorted(lost)} any more"


def computes_the_same(model: nn.Module, changed: nn.Module, patient: Patient) -> None:
    """The loss on the same batch, to rounding; dropout sees the same random numbers."""
    assert patient.loss is not None
    losses: list[float] = []
    for one in (copy.deepcopy(model), changed):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            losses.append(float(patient.loss(one).detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


PRINTED = ("sigmoid mlp", "batch-normalised convolutions", "rnn", "post-norm written by hand", "gpt2")
"""Families on which the printed code is run beside `apply`."""


def prints_what_is_applied(model: nn.Module, rx: Prescription) -> None:
    """The code runs without isograd's names around it, and makes bitwise the same model."""
    names: dict[str, Any] = {}
    exec(rx.to_code(), names)
    printed, applied = names["repair"](copy.deepcopy(model)).state_dict(), apply(model, rx).state_dict()
    assert printed.keys() == applied.keys()
    assert all(torch.equal(printed[key], applied[key]) for key in applied)


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {n: g for (n, _), g in zip(named, found, strict=True)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_remedy_applies_or_says_why_not(family: str) -> None:
    patient, model = patient_of(family)
    before, state = bits(model), torch.get_rng_state()
    for name in NAMES:
        found = list(remedy(name).prescribe(patient))
        assert found, f"{name} says nothing of {family}"
        for rx in found:
            if rx.why_not:
                assert not rx.edits
                assert len(rx.why_not) > 20
                continue
            assert rx.edits
            assert rx.safety is not Safety.ADVICE
            runs(model, rx, patient)
            if rx.safety is Safety.SAFE:
                computes_the_same(model, apply(model, rx), patient)
            if family in PRINTED:
                with torch.random.fork_rng():
                    prints_what_is_applied(model, rx)
    after = bits(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before), "the user's model was changed"
    assert torch.equal(state, torch.get_rng_state())


# -- normalisation ---------------------------------------------------------------------------------


def test_a_norm_stands_between_each_hidden_layer_and_its_activation_and_never_behind_the_head() -> None:
    torch.manual_seed(0)
    model, loss = classified(mlp(nn.Tanh, 4, 2.0))
    found = remedy("insert_normalisation").prescribe(Patient(model, diagnose(measure(model, loss)), loss))
    rx = next(rx for rx in found if rx.title.startswith("LayerNorm"))
    assert [e.place for e in rx.edits] == ["0", "2", "4", "6"]
    changed, x = apply(model, rx), torch.randn(5, 64)
    h = x
    for layer in model[:-1]:
        h = layer(h)
        h = functional.layer_norm(h, (64,)) if isinstance(layer, nn.Linear) else h
    assert torch.allclose(changed(x), model[-1](h), atol=1e-6)


def test_theory_chooses_batch_norm_for_sigmoids_and_is_near_what_is_measured() -> None:
    torch.manual_seed(0)
    model, loss = classified(mlp(nn.Sigmoid, 20, 1.0, width=128), batch=256)
    rx = first("insert_normalisation", (model, loss))
    assert rx.title.startswith("BatchNorm"), "LayerNorm keeps the mean that all samples share: 0.39 a layer"
    measured = measure(apply(model, rx), loss)
    assert measured.lost == pytest.approx(rx.decades, abs=1.0)
    assert measure(model, loss).lost < -10


def test_convolutions_get_groups_of_channels() -> None:
    torch.manual_seed(0)
    model, loss = FAMILIES["convolutions"]()
    kinds = {
        rx.title.split()[0]
        for rx in remedy("insert_normalisation").prescribe(
            Patient(model, diagnose(measure(model, loss)), loss)
        )
    }
    assert kinds == {"GroupNorm", "BatchNorm"}
    assert [groups_of(c) for c in (3, 8, 64, 256, 512)] == [1, 2, 16, 32, 32]


def test_batch_norm_needs_a_batch() -> None:
    torch.manual_seed(0)
    built = classified(mlp(nn.Tanh, 4, 2.0), batch=2)
    found = remedy("insert_normalisation").prescribe(Patient(built[0], diagnose(measure(*built)), built[1]))
    assert not any(rx.title.startswith("BatchNorm") for rx in found)


def test_a_residual_stream_without_norms_gets_one_at_each_branch_and_one_before_the_head() -> None:
    torch.manual_seed(0)
    body = [Residual(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))) for _ in range(3)]
    built = classified(nn.Sequential(nn.Linear(64, 64), *body, nn.Linear(64, 10)))
    rx = first("insert_normalisation", built)
    assert {e.place for e in rx.edits if e.of == "modules.PreLayerNorm"} == {
        "1.branch",
        "2.branch",
        "3.branch",
        "4",
    }


# -- residual connections --------------------------------------------------------------------------


def test_a_skip_adds_the_input_of_each_part_to_its_output() -> None:
    torch.manual_seed(0)
    model, loss = classified(mlp(nn.Tanh, 5, 0.5))
    rx = first("insert_residual", (model, loss))
    changed, x = apply(model, rx), torch.randn(5, 64)
    h = model[1](model[0](x))
    for i in range(2, 10, 2):
        h = h + 0.5 * model[i + 1](model[i](h))  # four parts: 1/sqrt(4)
    assert torch.allclose(changed(x), model[-1](h), atol=1e-6)
    assert changed[2] is not model[2]
    assert torch.equal(changed[2].weight, model[2].weight)


def test_the_same_for_an_activation_called_in_a_loop() -> None:
    torch.manual_seed(0)
    model, loss = classified(Functional(torch.sigmoid, 5), inputs=16, classes=4)
    rx = first("insert_residual", (model, loss))
    assert "families.py:" in rx.advice[0]
    assert abs(measure(apply(model, rx), loss).lost) < 0.5 < 2 < -measure(model, loss).lost


def test_changed_channels_and_resolution_are_projected() -> None:
    torch.manual_seed(0)
    rx = first("insert_residual", FAMILIES["batch-normalised convolutions"]())
    projected = {e.place: e.arguments for e in rx.edits if "features" in e.arguments}
    assert projected["2"]["features"] == (8, 16)
    assert projected["3"] == {"scale": 5**-0.5, "features": (16, 16), "dims": 2, "stride": 2}
    assert "features" not in next(e for e in rx.edits if e.place == "1").arguments


class Halving(nn.Module):
    """A residual block that halves the picture where it is told to, with its skip multiplied."""

    def __init__(self, skip: float, halves: bool, projects: bool = False) -> None:
        super().__init__()
        stride = 2 if halves else 1
        self.skip, self.halves = skip, halves
        self.branch = nn.Sequential(
            nn.Conv2d(8, 8, 3, stride, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
        )
        self.shortcut = nn.Conv2d(8, 8, 1, stride) if projects else None

    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut is not None:
            return self.skip * self.shortcut(x) + self.branch(x)
        return self.skip * (functional.avg_pool2d(x, 2) if self.halves else x) + self.branch(x)


def halving(*blocks: Halving) -> Built:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *blocks, nn.Flatten(), nn.LazyLinear(4))
    x, y = torch.randn(4, 3, 16, 16), torch.randint(4, (4,))
    model(x)
    return model, lambda m: functional.cross_entropy(m(x), y)


def test_a_whole_skip_goes_only_around_what_keeps_its_shape() -> None:
    torch.manual_seed(0)
    model, loss = halving(Halving(0.1, False), Halving(0.1, True), Halving(0.1, False))
    rx = first("insert_residual", (model, loss))
    assert [edit.place for edit in rx.edits] == ["1", "3"]
    assert loss(apply(model, rx)).isfinite()


@pytest.mark.parametrize("projects", [True, False])
def test_where_all_damped_skips_halve_the_picture_there_is_a_line_for_the_user_at_most(
    projects: bool,
) -> None:
    torch.manual_seed(0)
    model, loss = halving(Halving(0.1, True, projects), Halving(0.1, True, projects))
    patient = Patient(model, diagnose(measure(model, loss)), loss)
    (rx,) = remedy("insert_residual").prescribe(patient)
    assert rx.why_not
    assert bool(rx.advice) is not projects, "the gain of a projection is that of its weights"


def test_skips_cure_batch_norm_without_skips() -> None:
    torch.manual_seed(0)
    body = [nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()) for _ in range(40)]
    built = classified(nn.Sequential(*body, nn.Linear(64, 10)), batch=64)
    rx = first("insert_residual", built)
    assert measure(*built).lost > 2.5
    assert abs(measure(apply(built[0], rx), built[1]).lost) < 1


# -- pre-norm --------------------------------------------------------------------------------------


def test_torch_layers_are_switched_and_get_a_final_norm() -> None:
    torch.manual_seed(0)
    model, loss = FAMILIES["transformer encoder of torch"]()
    changed = apply(model, first("pre_norm", (model, loss)))
    stack = changed[1]
    assert all(layer.norm_first for layer in stack.layers)
    assert isinstance(stack.norm, nn.LayerNorm)
    assert set(model.state_dict()) < set(changed.state_dict()), "every key is kept"


def test_a_written_block_becomes_pre_norm_with_one_norm_behind_the_last_sum() -> None:
    torch.manual_seed(0)
    model, loss = FAMILIES["post-norm written by hand"]()
    changed, x = apply(model, first("pre_norm", (model, loss))), torch.randint(60, (2, 8))
    h = model[0](x)
    for block in model[1:-1]:
        assert isinstance(block, PostNorm)
        h = h + block.attention(functional.layer_norm(h, (16,)))
        h = h + block.feed_forward(functional.layer_norm(h, (16,)))
    assert torch.allclose(changed(x), model[-1](functional.layer_norm(h, (16,))), atol=1e-5)


# -- attention, recurrence -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["post-norm written by hand", "gpt2", "llama", "bert", "vit"])
def test_logits_of_attention_are_bounded_whatever_the_weights_are(family: str) -> None:
    if family not in FAMILIES:
        pytest.skip("transformers is not installed")
    torch.manual_seed(0)
    model, loss = FAMILIES[family]()
    changed = apply(model, first("query_key_norm", (model, loss)))
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, out: Tensor) -> None:
        part = out.chunk(3, -1)[0] if isinstance(module, QueryKeyNormed) else out
        size = (module.query_norm if isinstance(module, QueryKeyNormed) else module.norm).normalized_shape[0]
        seen.append(part.unflatten(-1, (-1, size)).square().mean(-1))

    for module in changed.modules():
        if isinstance(module, HeadNormed | QueryKeyNormed):
            module.register_forward_hook(keep)
            with torch.no_grad():
                module.inner.weight.mul_(1e3)
    loss(changed)
    assert seen
    assert all(torch.allclose(s, torch.ones_like(s), atol=1e-2) for s in seen)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_gated_recurrence_has_the_interface_of_the_plain_one(
    layers: int, bidirectional: bool, batch_first: bool
) -> None:
    rnn = nn.RNN(5, 8, layers, batch_first=batch_first, bidirectional=bidirectional)
    model = nn.Sequential(rnn, First(), nn.Linear(8 * (1 + bidirectional), 4))
    loss = lambda m: m(SEQUENCE).square().mean()  # noqa: E731
    state = torch.randn(layers * (1 + bidirectional), SEQUENCE.shape[0 if batch_first else 1], 8)
    expected, last = rnn(SEQUENCE, state)
    found = list(remedy("gated_recurrence").prescribe(Patient(model, diagnose(measure(model, loss)), loss)))
    assert len(found) == 2
    for rx in found:
        gated = apply(model, rx)[0]
        for hx in (None, state):
            out, h = gated(SEQUENCE, hx)
            assert (out.shape, h.shape) == (expected.shape, last.shape)


def test_gates_open_for_the_sequence_carry_the_gradient_over_it() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 100, 5).double()

    def reached(model: nn.Module) -> float:
        """log10 of the last step's gradient at the first input over that at the last."""
        inputs = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(model.rnn(inputs)[0][:, -1].sum(), inputs)
        return math.log10(float(g[:, 0].norm()) / float(g[:, -1].norm()))

    model = Recurrent(nn.RNN).double()
    loss = lambda m: m(x).square().mean()  # noqa: E731
    found = list(remedy("gated_recurrence").prescribe(Patient(model, diagnose(measure(model, loss)), loss)))
    assert reached(model) < -15
    assert all(reached(apply(model, rx)) > -3 for rx in found)


@pytest.mark.parametrize("family", ["rnn", "rnn cell"])
def test_a_recurrent_matrix_stays_orthogonal_while_it_is_trained(family: str) -> None:
    torch.manual_seed(0)
    model, loss = FAMILIES[family]()
    changed = apply(model, first("orthogonal_recurrence", (model, loss)))
    optimizer = torch.optim.SGD(changed.parameters(), lr=0.5)
    before = float(loss(changed).detach())
    for _ in range(5):
        optimizer.zero_grad()
        loss(changed).backward()
        optimizer.step()
    held = changed.rnn.weight_hh_l0 if family == "rnn" else changed.cell.weight_hh
    assert torch.allclose(held @ held.T, torch.eye(8), atol=1e-4)
    assert float(loss(changed).detach()) < before, "the optimizer moves the weights that the forward reads"
    assert float(loss(copy.deepcopy(changed)).detach()) == float(loss(changed).detach())


# -- weights, inputs, logarithms, heads ------------------------------------------------------------


def test_standardised_weights_keep_the_gradient_of_sigmoids_and_stay_so() -> None:
    torch.manual_seed(0)
    model, loss = classified(mlp(nn.Sigmoid, 20, 1.0, width=128))
    rx = first("standardise_weights", (model, loss))
    changed = apply(model, rx)
    assert measure(changed, loss).lost == pytest.approx(rx.decades, abs=0.5)
    rows = changed[2].weight
    assert torch.allclose(rows.mean(1), torch.zeros(128), atol=1e-6)
    assert torch.allclose(rows.square().sum(1).sqrt(), torch.full((128,), 4.801313), rtol=1e-4)
    assert rx.key_map(model)["2.weight"] == "2.parametrizations.weight.original"


def test_inputs_are_standardised_feature_by_feature_from_the_batch() -> None:
    torch.manual_seed(0)
    scale = torch.logspace(-3, 3, 64)
    x, y = torch.randn(32, 64) * scale + 5 * scale, torch.randint(10, (32,))
    built = (mlp(nn.Tanh, 3, 1.0), lambda m: functional.cross_entropy(m(x), y))
    changed = apply(built[0], first("standardise_input", built))
    mean, std = changed[0].mean, changed[0].std
    assert torch.allclose(mean, x.mean(0), rtol=1e-4)
    assert torch.allclose(
        (x - mean) / std, (x - x.mean(0)) / x.std(0).clamp(min=float(x.std()) * 1e-3), rtol=1e-2, atol=1e-2
    )


class TwoInputs(nn.Module):
    """Both inputs meet before the first layer; the dense one comes in raw."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(32, 10)

    def forward(self, dense: Tensor, token: Tensor | None = None) -> Tensor:
        assert token is not None
        x = torch.cat([dense, token], -1)
        return self.head(torch.cat([self.one(x).tanh(), self.other(x).tanh()], -1))


def test_what_hardly_differs_in_one_batch_is_not_blown_up_in_the_next() -> None:
    x, y = 100 * torch.randn(32, 3), torch.randint(10, (32,))
    x[:, 1], x[:, 2] = 0.0, 0.0
    x[0, 2] = 5.0
    built = nn.Sequential(nn.Linear(3, 10)), lambda m: functional.cross_entropy(m(x), y)
    (edit,) = first("standardise_input", built).edits
    std = edit.arguments["std"]
    assert isinstance(std, tuple)
    assert std == pytest.approx((float(x[:, 0].std()), float(x[:, 0].std()), 5.0), rel=1e-3)


def test_of_several_inputs_the_one_that_is_off_is_standardised_as_the_argument_that_it_is() -> None:
    torch.manual_seed(0)
    dense, token, y = torch.randn(32, 4) * 1e4 + 3e4, torch.randn(32, 4), torch.randint(10, (32,))
    model, loss = TwoInputs(), lambda m: functional.cross_entropy(m(dense, token=token), y)
    rx = first("standardise_input", (model, loss))
    (edit,) = rx.edits
    assert (edit.place, edit.arguments["name"]) == ("", "dense")
    seen = measure(apply(model, rx), loss)
    assert seen.sites[0].kind == "input"
    assert torch.allclose(
        apply(model, rx)(dense, token), model((dense - dense.mean(0)) / dense.std(0), token), atol=1e-3
    )
    prints_what_is_applied(model, rx)


class First(nn.Module):
    """The first of several results."""

    def forward(self, results: tuple[Tensor, Tensor]) -> Tensor:
        return results[0]


class Logarithms(nn.Module):
    """The logarithm of a softmax, taken in the forward."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        nn.init.normal_(self.layer.weight, 0.0, gain / 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(torch.softmax(self.layer(x), -1))


def test_a_log_in_log_space_is_the_same_number_and_finite_where_the_plain_one_is_not() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(16, 64), torch.randint(10, (16,))
    loss = lambda m: functional.nll_loss(m(x), y)  # noqa: E731
    plain = Logarithms(1.0)
    rx = first("safe_loss", (plain, loss))
    assert rx.safety is Safety.SAFE
    assert "test_remedies_structure.py:" in rx.advice[0]
    changed = apply(plain, rx)
    assert torch.allclose(changed(x), plain(x), atol=1e-5)
    assert "forward" not in vars(plain)
    sick = Logarithms(200.0)
    assert not loss(sick).isfinite()
    cured = apply(sick, rx)
    loss(cured).backward()
    assert loss(cured).isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in cured.parameters())


def test_a_logarithm_in_the_loss_is_told_by_its_line() -> None:
    torch.manual_seed(0)
    model, (x, y) = mlp(nn.ReLU, 2, HE), (torch.randn(16, 64), torch.randint(10, (16,)))
    loss = lambda m: functional.nll_loss(torch.log(torch.softmax(m(x), -1)), y)  # noqa: E731
    (rx,) = remedy("safe_loss").prescribe(Patient(model, diagnose(measure(model, loss)), loss))
    assert rx.why_not == "the logarithm is taken in the loss, which is your code"
    assert "test_remedies_structure.py:" in rx.advice[0]
    assert "log_softmax" in rx.advice[0]


def test_a_softmax_before_cross_entropy_goes() -> None:
    torch.manual_seed(0)
    model, loss = FAMILIES["softmax before cross-entropy"]()
    changed = apply(model, first("pass_logits", (model, loss)))
    assert isinstance(changed[-1], nn.Identity)
    assert not any(f.code == "VG102" for f in diagnose(measure(changed, loss)).findings)


def test_wrapped_modules_answer_for_what_they_hold() -> None:
    inner = nn.Linear(4, 4)
    for wrapped in (LayerNormed(inner, 4), WrappedResidual(inner), PreLayerNorm(inner, 4)):
        assert wrapped.weight is inner.weight
        assert wrapped.in_features == 4
        assert not hasattr(wrapped, "nothing_of_this_name")
        again = copy.deepcopy(wrapped)
        assert torch.equal(again.weight, inner.weight)
        assert again.weight is not inner.weight


def test_tied_weights_stay_tied_and_a_frozen_layer_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    model, loss = FAMILIES["tied weights"]()
    assert isinstance(model, Tied)
    for name in NAMES:
        for rx in remedy(name).prescribe(Patient(model, diagnose(measure(model, loss)), loss)):
            if not rx.why_not:
                changed = apply(model, rx)
                assert changed.head.weight is changed.token.weight, rx.title
    frozen = FAMILIES["frozen first layer"]()
    rx = first("insert_normalisation", frozen)
    assert "0" not in {e.place for e in rx.edits}
    assert not any(p.requires_grad for p in apply(frozen[0], rx)[0].parameters())


def test_a_branch_that_widens_the_stream_is_normalised_over_what_enters_it() -> None:
    hf = pytest.importorskip("transformers")
    sizes = {
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [2, 2],
        "layer_type": "basic",
        "num_labels": 4,
    }
    torch.manual_seed(0)
    model = hf.ResNetForImageClassification(hf.ResNetConfig(**sizes))
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    loss = lambda m: m(pixel_values=IMAGES, labels=LABELS).loss  # noqa: E731
    rx = first("insert_normalisation", (model, loss))
    assert {8, 16} <= {e.arguments["channels"] for e in rx.edits if e.of == "modules.PreGroupNorm"}
    assert loss(apply(model, rx)).isfinite()


class Paired(nn.Module):
    """Returns its result with something beside it, as attention returns its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.layer(hidden)), hidden


def test_a_skip_around_several_results_is_added_to_the_first() -> None:
    x = torch.randn(3, 64)
    paired = Paired()
    for result in (WrappedResidual(paired, 0.5)(x), WrappedResidual(paired, 0.5)(hidden=x)):
        assert torch.allclose(result[0], x + 0.5 * paired(x)[0])
        assert result[1] is x


def test_a_norm_goes_before_an_attention_of_a_list_and_not_before_the_list() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixing = nn.ModuleList(nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(3))
            self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))
            self.enter, self.head = nn.Linear(5, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            for attention, norm in zip(self.mixing, self.norms, strict=True):
                x = norm(x + attention(x, x, x)[0])
            return self.head(x)

    torch.manual_seed(0)
    model, loss = Listed(), lambda m: m(SEQUENCE).square().mean()
    rx = first("pre_norm", (model, loss))
    assert [e.place for e in rx.edits if e.verb == "wrap"] == ["mixing.0", "mixing.1", "mixing.2"]
    assert loss(apply(model, rx)).isfinite()
