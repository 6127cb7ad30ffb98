"""The scenarios of training-failure-atlas: one change each to an MLP on scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from gallery.case import Built, Case
from gallery.keras_net import Spec
from gallery.published import SEEDS, facts

ATLAS: dict[str, tuple[str, frozenset[str], frozenset[str]]] = {
    "unnormalized_inputs": ("sick", frozenset({"unnormalised-input"}), frozenset({"UP504"})),
    "dead_relus": ("vanishing", frozenset({"dead-units"}), frozenset({"SA302", "VG101"})),
    "vanishing_gradients": ("vanishing", frozenset({"activation", "initialisation"}), frozenset({"VG101"})),
    "exploding_init": ("exploding", frozenset({"initialisation"}), frozenset({"EG201", "EG202"})),
}
"""The scenarios that show before training; all others leave the flow healthy."""


def atlas_build(config: Spec, seed: int) -> Built:
    """nn.Linear's initialisation times `init_gain`, hidden biases at `hidden_bias`; 1,300 training rows."""
    raw, labels = load_digits(return_X_y=True)
    x = torch.tensor(raw[:1300], dtype=torch.float32)
    if config["standardize"]:
        x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
    x, y = x[:64] * config["input_scale"], torch.tensor(labels[:64])
    torch.manual_seed(seed)
    activation: Callable[[], nn.Module] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}[config["activation"]]
    sizes = [64, *config["hidden"]]
    model = nn.Sequential()
    for fan_in, fan_out in pairwise(sizes):
        hidden = nn.Linear(fan_in, fan_out)
        nn.init.constant_(hidden.bias, config["hidden_bias"])
        model.append(hidden).append(activation())
    model.append(nn.Linear(sizes[-1], 10))
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.weight *= config["init_gain"]
    return model, lambda m: functional.cross_entropy(m(x), y)


def atlas() -> tuple[Case, ...]:
    """The scenarios of training-failure-atlas, three seeds each."""

    def one(fact: Spec, seed: int) -> Case:
        label = fact["ground_truth"]
        verdict, causes, codes = ATLAS.get(label, ("healthy", frozenset[str](), frozenset[str]()))
        said = f"published: {label}, accuracies {min(fact['val_acc']):.2f} to {max(fact['val_acc']):.2f} of ten seeds"

        def build() -> Built:
            return atlas_build(fact["config"], seed)

        return Case(f"atlas {label} #{seed}", "atlas", build, verdict, causes, codes, truth=said)

    return tuple(one(fact, seed) for fact in facts("training_failure_atlas") for seed in range(SEEDS))
