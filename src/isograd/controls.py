"""A random edit of the same kind: what a prescription is held against.

It changes the same kind of thing in as many places and knows nothing of why. Weights are drawn at a random
scale, activations exchanged for a random one, numbers multiplied by a random factor; what is put around
modules is put around a random half of them.
"""

from __future__ import annotations

import random
from dataclasses import replace

from torch import Tensor, nn

from isograd.edit import Edit, Value
from isograd.prescription import Prescription

ACTIVATIONS = ("Sigmoid", "Tanh", "ReLU", "LeakyReLU", "ELU", "SELU", "GELU", "SiLU", "Softplus", "Softsign")
SCALES = (-2.0, 1.0)
"""log10 of the scale at which weights are drawn, times 1/sqrt(fan-in): critical ones lie between 0 and 0.3."""
FACTORS = (-2.0, 2.0)
"""log10 of the factor on a number."""


def random_edit(rx: Prescription, model: nn.Module, seed: int) -> Prescription:
    """A prescription with random values where `rx` has considered ones; the same for the same seed.

    One scale, one activation and one factor are drawn for the whole prescription: drawn for every layer
    anew, they would average out.
    """
    choice = random.Random(seed)
    scale = 10 ** choice.uniform(*SCALES)
    activation = choice.choice(ACTIVATIONS)
    factor = 10 ** choice.uniform(*FACTORS)
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    edits: list[Edit] = []
    for edit in rx.edits:
        match edit:
            case Edit(verb="fill") if edit.place in tensors:
                edits.append(_filled(edit, tensors[edit.place], scale))
            case Edit(verb="replace", of=of) if of.removeprefix("nn.") in ACTIVATIONS:
                edits.append(replace(edit, of=f"nn.{activation}", arguments={}))
            case Edit(verb="set" | "configure", arguments={"value": float() | int() as value}):
                edits.append(replace(edit, arguments={"value": _times(value, factor)}))
            case _:
                if choice.random() < 0.5:
                    edits.append(edit)
    return replace(rx, title=f"a random edit like: {rx.title}", edits=tuple(edits), expected="", advice=())


def _filled(edit: Edit, tensor: Tensor, scale: float) -> Edit:
    """Matrices at the random scale over the square root of their fan-in, vectors at the scale itself."""
    fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
    return replace(edit, of="nn.init.normal_", arguments={"mean": 0.0, "std": scale / fan_in**0.5})


def _times(value: float | int | bool, factor: float) -> Value:
    return value if isinstance(value, bool) else value * factor
