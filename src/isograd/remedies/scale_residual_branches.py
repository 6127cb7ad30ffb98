"""scale-residual-branches: residual branches scaled down with their number.

What it does
    Multiplies the last weights of every residual branch by 1 / sqrt(2L) (GPT-2), 1 / L (CompleteP), beta^2 / alpha
    (DeepNorm with its alpha folded in: the normalisation behind the sum divides it out again) or 0 (ReZero,
    zero-last), or all weights of the branches as Fixup does.

When it helps
    Each of L branches adds its variance to the stream: unscaled and unnormalised, x + f(x) doubles it, and L blocks
    multiply signal and gradient by 2^(L/2). Behind a normalisation the stream's share in each sum falls instead,
    and with it the gradient that passes the blocks; deep post-norm transformers diverge from their first steps.

Expected effect
    Branches of variance v, scaled by s, change signal and gradient by (1 + v s^2)^(L/2): a factor of at most
    sqrt(e) for s = 1 / sqrt(L) and v = 1. At 0 each block is the identity at first.

Safety
    Unsafe: the model computes another function.

References
    Radford et al. 2019; Zhang et al. 2019, Fixup, arXiv:1901.09321; Bachlechner et al. 2021, ReZero,
    arXiv:2003.04887; Wang et al. 2022, DeepNet, arXiv:2203.00555; Dey et al. 2025, CompleteP, arXiv:2505.01618.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from isograd.flow import Flow
from isograd.graph.operations import WEIGHTED
from isograd.layers import rms
from isograd.prescription import Edit, Patient, Prescription, Reach, not_applicable

SLUG = "scale-residual-branches"
TREATS = ("residual-branch-growth", "EG201", "EG202", "UP502")


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """Factors from the mildest to zero, then Fixup."""
    branches = ends(patient.flow, patient.model)
    if not patient.flow.splits:
        yield not_applicable(SLUG, "no residual connection was seen on the way of the signal")
        return
    if not branches:
        yield not_applicable(SLUG, "no residual branch ends with trainable weights of a module")
        return
    count = len(patient.flow.splits)
    variants = [
        ("1/sqrt(2L)", (2 * count) ** -0.5, "Radford et al. 2019 (GPT-2)"),
        ("1/L", 1 / count, "Dey et al. 2025, CompleteP, arXiv:2505.01618"),
    ]
    if normalised(patient.flow):  # L counts sublayers: of N encoder layers there are 2N
        alpha, beta = count**0.25, (4 * count) ** -0.25
        variants.insert(0, ("beta^2/alpha (DeepNorm)", beta**2 / alpha, "Wang et al. 2022, arXiv:2203.00555"))
    for name, factor, reference in variants:
        yield Prescription(
            SLUG,
            f"the last weights of {count} residual branches scaled by {name} = {factor:.3g}",
            tuple(_scaled(branches, patient.model, float(f"{factor:.6g}"))),
            reach=Reach.INITIALISATION,
            treats=TREATS,
            expected=f"{count} branches of variance v change signal and gradient by (1 + {factor**2:.2g} v)^{count / 2:g}",
            references=(reference,),
        )
    yield _zero(branches, patient.model, count)
    if not normalised(patient.flow):
        yield from _fixup(patient, branches, count)


def ends(flow: Flow, model: nn.Module) -> list[str]:
    """Module that ends each residual branch: the last one on it with trainable weights, once each."""
    modules = dict(model.named_modules())
    found: dict[str, None] = {}
    for depth in sorted(flow.splits):
        for step in flow.ledgers.get(depth, ()):  # output side first
            module = modules.get(step.site.module)
            own = [] if module is None else [p for p in module.parameters(recurse=False) if p.requires_grad]
            if own and step.site.module and step.site.kind in (*WEIGHTED, "normalisation"):
                found[step.site.module] = None
                break
    return list(found)


def normalised(flow: Flow) -> bool:
    """Does a normalisation follow the sums, as in post-norm transformers?"""
    kinds = [site.kind for site in flow.sites]
    sums = [i for i, kind in enumerate(kinds[:-1]) if kind == "residual add"]
    return bool(sums) and sum(kinds[i + 1] == "normalisation" for i in sums) > len(sums) / 2


def _scaled(branches: list[str], model: nn.Module, factor: float) -> Iterator[Edit]:
    for name, parameter in _parameters(branches, model):
        yield Edit(name, "fill", ".mul_", {"other": factor}, before=f"rms {rms(parameter):.3g}")


def _parameters(branches: list[str], model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for branch in branches:
        for name, parameter in model.get_submodule(branch).named_parameters(branch, recurse=False):
            if parameter.requires_grad:
                yield name, parameter


def _zero(branches: list[str], model: nn.Module, count: int) -> Prescription:
    edits = [
        Edit(name, "fill", "nn.init.zeros_", before=f"rms {rms(parameter):.3g}")
        for name, parameter in _parameters(branches, model)
    ]
    return Prescription(
        SLUG,
        f"the last weights of {count} residual branches start at 0",
        tuple(edits),
        reach=Reach.INITIALISATION,
        treats=TREATS,
        expected="every block starts as the identity; the branches' first layers get their first gradient after one step",
        decades=0.0,
        references=("Bachlechner et al. 2021, arXiv:2003.04887", "Goyal et al. 2017, arXiv:1706.02677"),
    )


def _fixup(patient: Patient, branches: list[str], count: int) -> Iterator[Prescription]:
    """Layers of a branch by L^(-1/(2m-2)), its last layer 0; m layers a branch."""
    edits: list[Edit] = []
    modules = dict(patient.model.named_modules())
    for depth in sorted(patient.flow.splits):
        steps = [
            s
            for s in patient.flow.ledgers.get(depth, ())
            if s.site.kind in WEIGHTED and s.site.module in modules
        ]
        names = list(dict.fromkeys(s.site.module for s in steps))
        factor = float(f"{count ** (-1 / max(2 * len(names) - 2, 1)):.6g}")
        for name in names:
            for weight, p in modules[name].named_parameters(name, recurse=False):
                if p.requires_grad and name not in branches:
                    edits.append(Edit(weight, "fill", ".mul_", {"other": factor}, before=f"rms {rms(p):.3g}"))
    if edits:
        zero = _zero(branches, patient.model, count)
        yield Prescription(
            SLUG,
            f"Fixup: {count} branches scaled down, their last weights 0",
            (*{e.place: e for e in edits}.values(), *zero.edits),
            reach=Reach.INITIALISATION,
            treats=TREATS,
            expected=zero.expected,
            decades=0.0,
            references=("Zhang et al. 2019, arXiv:1901.09321",),
        )
