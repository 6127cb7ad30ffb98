"""safe-loss: logarithms of probabilities are taken in log space.

What it does
    Inside a model's forward, log(softmax(x)) is computed as log_softmax(x), and log(sigmoid(x)) as logsigmoid(x). For
    the loss outside of the model it names the line, and what to write there.

When it helps
    softmax underflows to exactly 0 where a logit lies 104 below the largest in float32, 17 in float16. Its
    logarithm is then -inf, and the gradient NaN; behind a clamp it is 0, and the sample teaches nothing. Saturated
    sigmoids do the same to `binary_cross_entropy`.

Expected effect
    The same values to rounding where both are finite; finite ones with the exact gradient p - y elsewhere.

Safety
    Safe inside the model: the same function. In the loss it is advice, as that code is yours.

References
    PyTorch, BCEWithLogitsLoss and CrossEntropyLoss; Blanchard et al. 2021, Accurately computing the log-sum-exp and
    softmax functions.
"""

from __future__ import annotations

from collections.abc import Iterator

from isograd.anatomy import shared
from isograd.edit import Edit
from isograd.flow import Flow
from isograd.prescription import Patient, Prescription, Reach, Safety, not_applicable
from isograd.statistics import Site

SLUG = "safe-loss"
TREATS = ("head", "VG102", "NF401", "NF402")
WRITE = {
    "softmax": "torch.log_softmax(x, dim) for torch.log(torch.softmax(x, dim)), or F.cross_entropy on the logits",
    "sigmoid": "F.logsigmoid(x) for torch.log(torch.sigmoid(x)), or F.binary_cross_entropy_with_logits on the logits",
    "binary_cross_entropy": "F.binary_cross_entropy_with_logits on what goes into the sigmoid, which then leaves the model",
    "nll_loss": "F.cross_entropy(x, y) for F.nll_loss(torch.log(torch.softmax(x, -1)), y)",
}


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """Log space inside the model as an edit, in the loss as words."""
    pairs = list(_pairs(patient.flow))
    inside = [(of, log) for of, log in pairs if log.kind != "loss"]
    outside = [(of.operation, log.source) for of, log in pairs if log.kind == "loss"]
    for call in patient.flow.losses:
        if call.function == "binary_cross_entropy" and call.source == "sigmoid":
            outside.append((call.function, call.site.source))
    if inside:
        places = dict.fromkeys(shared(of.module, log.module) for of, log in inside)
        yield Prescription(
            SLUG,
            f"{len(inside)} logarithms of probabilities taken in log space",
            tuple(
                Edit(place, "alter", "calls.log_in_log_space", source=inside[0][1].source) for place in places
            ),
            safety=Safety.SAFE,
            reach=Reach.TRAINING,
            treats=TREATS,
            expected="the same values to rounding, finite where a probability underflows",
            references=("PyTorch, CrossEntropyLoss",),
            advice=tuple(f"by hand, {log.source}: {WRITE[of.operation]}" for of, log in inside),
        )
    if outside:
        yield not_applicable(
            SLUG,
            "the logarithm is taken in the loss, which is your code",
            *(f"{source}: write {WRITE[of]}" for of, source in dict.fromkeys(outside)),
        )
    if not inside and not outside:
        yield not_applicable(SLUG, "no logarithm of a softmax or sigmoid lies on the way to the loss")


def _pairs(flow: Flow) -> Iterator[tuple[Site, Site]]:
    """Softmax or sigmoid, and the logarithm that directly follows it on the backbone."""
    for before, site in zip(flow.sites, flow.sites[1:], strict=False):
        if site.operation == "log" and before.operation in ("softmax", "sigmoid"):
            yield before, site
