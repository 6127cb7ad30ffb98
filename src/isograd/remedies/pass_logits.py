"""pass-logits: the function at the model's output that the loss applies itself, or cannot reach its targets through, goes.

What it does
    Puts `nn.Identity` in the place of a softmax, sigmoid, tanh or ReLU module that ends the model, so that the loss is
    given logits; a softmax over one unit becomes a sigmoid where the loss expects a probability. Only where the loss
    as it stands takes what the model then returns: a loss that takes the logarithm of probabilities has to be changed
    together with the model, and is named with its line. So is a function that is called in the forward.

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

from isograd.edit import Edit
from isograd.flow import Flow
from isograd.graph.source import where_written
from isograd.losses import oversteps
from isograd.prescription import Patient, Prescription, Reach, not_applicable
from isograd.statistics import Site
from isograd.symptoms.no_gradient_at_loss import logarithm, taken

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
OF_ONE_SIDE = ("relu", "relu6", "hardtanh", "softplus")
"""Ends that a regression does without: they say nothing but that the output is positive, or clipped."""
LOGITS = {
    "softmax": "torch.nn.functional.cross_entropy",
    "log_softmax": "torch.nn.functional.cross_entropy",
    "sigmoid": "torch.nn.functional.binary_cross_entropy_with_logits",
    "hardsigmoid": "torch.nn.functional.binary_cross_entropy_with_logits",
}


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """Where a head does not fit its loss, the function at its end is taken off."""
    flow = patient.flow
    wrong = [f for f in patient.diagnosis.findings if f.code == "VG102"]
    if not wrong:
        yield not_applicable(SLUG, "output, loss and target fit each other")
        return
    end = _end(flow)
    if end is None:
        yield not_applicable(
            SLUG, "the model does not end in a softmax or a bounded function", *wrong[0].remedies
        )
        return
    if any(call.function == "ctc_loss" for call in flow.losses):
        yield not_applicable(
            SLUG, "ctc_loss takes the logarithm of what the model returns", *wrong[0].remedies
        )
        return
    takes, one = taken(flow), end.operation == "softmax" and end.shape[-1:] == (1,)
    if one and any(call.function == "cross_entropy" for call in flow.losses):
        yield not_applicable(SLUG, "logits of one class are not enough either", *wrong[0].remedies)
        return
    keeps = one and takes in ("probabilities", "values")
    keeps = keeps and not any(oversteps(call) for call in flow.losses)
    if not keeps and not _fits_without(flow, end, takes):
        yield not_applicable(
            SLUG,
            f"the loss takes {takes or 'what the model returns'}: model and loss have to change together",
            _together(flow, end),
        )
        return
    module = patient.model.get_submodule(end.module)
    if not end.module or next(module.children(), None) is not None or _shared(flow, end):
        yield not_applicable(
            SLUG,
            f"the {end.operation} at the end is no module of its own",
            f"{where_written(end.source)}: return what goes into the {end.operation}",
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


def _fits_without(flow: Flow, end: Site, takes: str) -> bool:
    """Does the loss, as it stands, take what goes into the function at the model's end?"""
    if takes == "values":
        return any(oversteps(call) for call in flow.losses) or end.operation in OF_ONE_SIDE
    return takes == "logits"


def _together(flow: Flow, end: Site) -> str:
    """What to change by hand, in the model and in the loss."""
    log = logarithm(flow)
    lines = [log] if log is not None else [call.site for call in flow.losses]
    lines += [site for site in flow.sites if site.kind == "loss"]
    where = next((site.source for site in lines if site.source), "in the loss")
    if end.operation not in LOGITS:
        return f"{where}: the loss is flat where the output of {end.operation} stands"
    return (
        f"{where}: take {LOGITS[end.operation]} of what goes into the {end.operation}, and leave the "
        f"{end.operation} out of the model ({end.place}); never the one without the other"
    )


def _shared(flow: Flow, end: Site) -> bool:
    """Is the module that ends the model at work elsewhere too?"""
    sites = (*flow.sites, *(step.site for ledger in flow.ledgers.values() for step in ledger))
    return len({site.depth for site in sites if site.module == end.module}) > 1


def _end(flow: Flow) -> Site | None:
    """The function that made the model's result."""
    inside = [site for site in flow.sites if site.kind != "loss"]
    return inside[-1] if inside and inside[-1].operation in ENDS else None
