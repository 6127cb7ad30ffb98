"""A network trained among others ends where it ends alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from benchmarks.population import EPSILON, Member, Population, Recipe, Run, member, structure, trained
from gallery.autotrainer import Data, data
from gallery.keras_net import Spec, loss_of
from isograd.modules import Residual

EPOCHS = 4


def double(name: str) -> Data:
    """In float64: Adam makes whole steps of the rounding errors of a gradient that is zero, as before a BatchNorm."""
    found = data(name)
    return Data(found.x.double(), found.y.double(), found.held_x.double(), found.held_y.double(), found.sound)


CIRCLE, BLOB = double("circle"), double("blob")


def drawn(recipe: Recipe, seed: int) -> Member:
    own = member(recipe, data("circle"), seed)
    return Member(own.model.double(), recipe, seed)


def layers(function: str, depth: int = 3, units: int = 1, *, normed: bool = False) -> list[Spec]:
    found: list[Spec] = []
    for _ in range(depth):
        found.append({"class": "Dense", "units": 6, "activation": "linear"})
        found += [{"class": "BatchNormalization"}] if normed else []
        found.append({"class": "Activation", "activation": function})
    return [
        *found,
        {"class": "Dense", "units": units, "activation": "softmax" if units > 1 else "sigmoid"},
    ]


def alone(recipe: Recipe, found: Data, seed: int) -> nn.Module:
    """The same training written the plain way: one module, one optimizer of torch."""
    model, loss = drawn(recipe, seed).model, loss_of(recipe.loss)
    optimizer = _optimizer(recipe, list(model.parameters()))
    generator = torch.Generator().manual_seed(seed)
    steps = 0
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(found.x), generator=generator).split(recipe.batch):
            steps += 1
            optimizer.zero_grad()
            loss(model(found.x[rows]), found.y[rows]).backward()
            if recipe.clip_norm < math.inf:
                _clip(list(model.parameters()), recipe.clip_norm)
            if recipe.clip < math.inf:
                nn.utils.clip_grad_value_(model.parameters(), recipe.clip)
            if recipe.optimizer == "adam":  # Keras adds epsilon to what torch divides by sqrt(1 - beta2^t)
                optimizer.param_groups[0]["eps"] = EPSILON / math.sqrt(1 - recipe.betas[1] ** steps)
            optimizer.step()
    return model


def _clip(parameters: list[nn.Parameter], largest: float) -> None:
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    for p in parameters:
        assert p.grad is not None
        p.grad *= min(1.0, largest / norm.item())


def _optimizer(recipe: Recipe, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, recipe.lr, recipe.betas)
    if recipe.optimizer == "adagrad":
        return torch.optim.Adagrad(parameters, recipe.lr, eps=EPSILON)
    return torch.optim.SGD(parameters, recipe.lr, momentum=recipe.momentum)


RECIPES: dict[str, tuple[Recipe, Data]] = {
    "adam": (Recipe(layers("tanh"), "binary_crossentropy", lr=0.03), CIRCLE),
    "adam, own betas": (Recipe(layers("selu"), "mse", betas=(0.4, 0.5), lr=0.01, batch=256), CIRCLE),
    "batch normalisation": (Recipe(layers("relu", normed=True), "binary_crossentropy", lr=0.03), CIRCLE),
    "three classes": (Recipe(layers("elu", units=3), "categorical_crossentropy", lr=0.03, clip=0.01), BLOB),
    "momentum, clipped": (
        Recipe(layers("sigmoid"), "binary_crossentropy", "sgd", 0.3, momentum=0.9, clip_norm=0.02),
        CIRCLE,
    ),
    "adagrad": (Recipe(layers("relu", units=3), "categorical_crossentropy", "adagrad", 0.1, batch=64), BLOB),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_seed_trained_among_others_equals_the_same_seed_trained_alone(name: str) -> None:
    recipe, found = RECIPES[name]
    members, runs = [drawn(recipe, seed) for seed in range(3)], [Run() for _ in range(3)]
    population = Population(members, runs, range(3), found)
    population.train(EPOCHS)
    for seed in range(3):
        expected = alone(recipe, found, seed)
        for own, value in (*expected.named_parameters(), *expected.named_buffers()):
            torch.testing.assert_close((population.parameters | population.buffers)[own][seed], value)
        moved = nn.utils.parameters_to_vector(drawn(recipe, seed).model.parameters()) - population.flat[seed]
        assert moved.norm() > 1e-2
        answer = expected.eval()(found.held_x)
        if answer.shape[-1] == 1:
            right = (answer > 0.5).double() == found.held_y
        else:
            right = answer.argmax(-1) == found.held_y.argmax(-1)
        assert runs[seed].final == pytest.approx(right.double().mean().item())


def test_each_member_has_its_own_learning_rate_and_members_of_another_structure_train_beside() -> None:
    recipe, found = RECIPES["adam"]
    others = [
        Recipe(recipe.layers, recipe.loss, lr=0.0),
        Recipe(layers("relu", 2), recipe.loss, lr=0.03),
        Recipe(layers("relu", 2, normed=True), recipe.loss, lr=0.03),
    ]
    runs = trained([drawn(one, 0) for one in (others[0], recipe, *others[1:])], found, EPOCHS)
    assert runs[0].held_out == [runs[0].untrained] * EPOCHS
    for run, one in zip(runs[1:], (recipe, *others[1:]), strict=True):
        assert run.held_out == trained([drawn(one, 0)], found, EPOCHS)[0].held_out


def test_a_training_whose_loss_is_lost_ends_with_its_last_finite_epoch_and_the_others_go_on() -> None:
    found = CIRCLE
    wild = Recipe(layers("exponential"), "mse", "sgd", lr=100.0)
    calm = Recipe(wild.layers, "mse", "sgd", lr=0.1)
    lost, kept = trained([drawn(wild, 0), drawn(calm, 0)], found, EPOCHS)
    assert lost.lost is not None
    assert len(lost.held_out) == lost.lost
    assert lost.final == (lost.held_out[-1] if lost.held_out else lost.untrained)
    assert kept.lost is None
    assert kept.held_out == trained([drawn(calm, 0)], found, EPOCHS)[0].held_out


def test_any_module_trains_in_a_stack() -> None:
    """Skip connections, a layer norm: what a repair inserts."""

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        block = Residual(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), scale=0.5)
        return nn.Sequential(nn.Linear(2, 6), nn.LayerNorm(6), block, nn.Linear(6, 1), nn.Sigmoid()).double()

    recipe = Recipe([], "binary_crossentropy", lr=0.03)
    together = trained([Member(build(seed), recipe, seed) for seed in range(3)], CIRCLE, EPOCHS)
    single = [trained([Member(build(seed), recipe, seed)], CIRCLE, EPOCHS)[0] for seed in range(3)]
    assert [run.held_out for run in together] == [run.held_out for run in single]
    assert structure(build(0)) == structure(build(1))
    other = build(0)
    other.get_submodule("2").scale = 0.25
    assert structure(other) != structure(build(0))


def test_the_gradient_a_look_is_given_is_that_of_the_kernels() -> None:
    recipe, found = RECIPES["adam"]
    seen: list[tuple[int, int, list[Tensor]]] = []

    def look(number: int, _: Run, epoch: int, kernels: list[Tensor]) -> None:
        seen.append((number, epoch, kernels))

    trained([drawn(recipe, seed) for seed in (4, 7)], found, 2, look)
    assert [(number, epoch) for number, epoch, _ in seen] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    model = drawn(recipe, 7).model
    rows = torch.randperm(len(found.x), generator=torch.Generator().manual_seed(7))[: recipe.batch]
    loss_of(recipe.loss)(model(found.x[rows]), found.y[rows]).backward()
    expected = [p.grad for p in model.parameters() if p.ndim > 1]
    torch.testing.assert_close(seen[1][2], expected)
