"""pass-logits: the function at the model's output that the loss applies itself, or cannot reach its targets through, goes.

What it does
    Puts `nn.Identity` in the place of a softmax, sigmoid, tanh or ReLU module that ends the model, so that the loss is
    given logits; a softmax over one unit becomes a sigmoid where the loss expects a probability. Where the function
    is called in the forward, it names the line.

When it helps
    `cross_entropy` on probabilities has a gradient that is flat by design; softmax over one unit is always 1 and has
    none; a bounded output never reaches targets outside of its bounds and saturates on its way.

Expected effect
    The gradient at the output becomes p - y, or the plain error.

Safety
    Unsafe: the model returns logits from then on. Where it is used, apply the function there.

References
    PyTorch, CrossEntropyLoss; Nikanjam et al. 2021, arXiv:2105.08095 (NeuraLint).
"""

from __future__ import annotations

from collections.abc import Iterator

from isograd.flow import Site
from isograd.prescription import Edit, Patient, Prescription, Reach, not_applicable

SLUG = "pass-logits"
TREATS = ("head", "VG102")
ENDS = (
    "softmax",
    "log_softmax",
    "sigmoid",
    "tanh",
    "relu",
    "hardsigmoid",
    "hardtanh",
    "relu6",
    "softplus",
    "softsign",
)
PROBABILITY = ("binary_cross_entropy",)
"""Losses that go on expecting a probability."""


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """Where a head does not fit its loss, the function at its end is taken off."""
    wrong = [f for f in patient.diagnosis.findings if f.code == "VG102"]
    if not wrong:
        yield not_applicable(SLUG, "output, loss and target fit each other")
        return
    end = _end(patient)
    if end is None:
        yield not_applicable(
            SLUG, "the model does not end in a softmax or a bounded function", *wrong[0].remedies
        )
        return
    module = patient.model.get_submodule(end.module)
    if not end.module or next(module.children(), None) is not None:
        yield not_applicable(
            SLUG,
            f"{end.operation} is called in the forward",
            f"{end.source}: return what goes into the {end.operation}",
        )
        return
    one = end.operation == "softmax" and end.shape[-1:] == (1,)
    keeps = one and any(call.function in PROBABILITY for call in patient.flow.losses)
    if not keeps and any(call.function in (*PROBABILITY, "nll_loss") for call in patient.flow.losses):
        yield not_applicable(
            SLUG, "the loss expects a probability", *(f"{f.message}: {r}" for f in wrong for r in f.remedies)
        )
        return
    yield Prescription(
        SLUG,
        "a sigmoid for one unit" if keeps else f"no {type(module).__name__} at the model's output",
        (Edit(end.module, "replace", "nn.Sigmoid" if keeps else "nn.Identity", before=str(module)),),
        reach=Reach.TRAINING,
        treats=TREATS,
        expected="the gradient at the output becomes p - y" if keeps else "the loss is given logits",
        references=("PyTorch, CrossEntropyLoss",),
        advice=() if keeps else (f"where the model is used, apply {end.operation} to what it returns",),
    )


def _end(patient: Patient) -> Site | None:
    """The function that made the model's result."""
    inside = [site for site in patient.flow.sites if site.kind != "loss"]
    return inside[-1] if inside and inside[-1].operation in ENDS else None
