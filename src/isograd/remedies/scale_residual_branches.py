"""scale-residual-branches: residual branches scaled down with their number.

What it does
    Multiplies the last weights of every residual branch by 1 / sqrt(2N), N the number of blocks with two branches
    each (GPT-2: one over the square root of the number of branches), or by 0 (zero-last). The architecture stays as
    it is; `complete-p`, `deep-norm` and `identity-blocks` put factors into it.

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
    Radford et al. 2019 (GPT-2); Goyal et al. 2017, arXiv:1706.02677, and Zhang et al. 2019, arXiv:1901.09321, on 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from torch import nn

from isograd.anatomy import attentions
from isograd.edit import Edit, Value
from isograd.flow import Flow
from isograd.graph.operations import WEIGHTED
from isograd.layers import rms
from isograd.prescription import Patient, Prescription, Reach, not_applicable
from isograd.symptoms.damped_skips import DAMPED

SLUG = "scale-residual-branches"
TREATS = ("residual-branch-growth", "EG201", "EG202", "UP502")
NONE = "no residual connection was seen on the way of the signal"


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """GPT-2's factor, then zero."""
    if why := without_skips(patient.flow):
        yield not_applicable(SLUG, why)
        return
    found = ends(patient.flow, patient.model)
    if not found:
        yield not_applicable(SLUG, "no residual branch ends with trainable weights of a module")
        return
    count = len(patient.flow.splits)
    factor = float(f"{count**-0.5:.6g}")
    scaled = Prescription(
        SLUG,
        f"the last weights of {counted(found, count)} scaled by 1/sqrt({count}) = {factor:.3g}",
        tuple(_filled(found, patient.model, ".mul_", {"other": factor})),
        reach=Reach.INITIALISATION,
        treats=TREATS,
        expected=f"{count} branches of variance v change signal and gradient by (1 + {factor**2:.2g} v)^{count / 2:g}",
        references=("Radford et al. 2019 (GPT-2)",),
    )
    if count > 1:
        yield scaled
    yield Prescription(
        SLUG,
        f"the last weights of {counted(found, count)} start at 0",
        tuple(_filled(found, patient.model, "nn.init.zeros_", {})),
        reach=Reach.INITIALISATION,
        treats=TREATS,
        expected="every block starts as the identity; the branches' first layers get their first gradient after one step",
        decades=0.0,
        references=("Goyal et al. 2017, arXiv:1706.02677",),
    )


def without_skips(flow: Flow) -> str:
    """Why a smaller branch would help nothing here: what it leaves is passed on by a whole skip alone; '' if it is."""
    if not flow.splits:
        return NONE
    skip = median(split.skip for split in flow.splits.values())
    return (
        f"the skip connections let only {skip:.2g} of the signal by: see insert-residual"
        if skip < DAMPED
        else ""
    )


def ends(flow: Flow, model: nn.Module) -> dict[str, tuple[str, ...]]:
    """What ends each residual branch: path of a module -> names of its own trainable parameters.

    A branch that ends with a normalisation without weights has no end: the norm divides out what stands before it.
    """
    modules = dict(model.named_modules())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    found: dict[str, tuple[str, ...]] = {}
    for depth in sorted(flow.splits):
        for step in flow.ledgers.get(depth, ()):  # output side first
            site = step.site
            normalises = site.kind == "normalisation" or "norm" in _class(modules.get(site.module))
            if not step.branch or not (site.kind in (*WEIGHTED, "attention") or normalises):
                continue
            own = [name for name in site.parameters if name in trainable]
            if own:  # of an attention that projects too, what comes last is listed last
                owner = own[-1].rpartition(".")[0]
                last = [name.rpartition(".")[2] for name in own if name.rpartition(".")[0] == owner]
                if f"{owner}.bias" in trainable:  # it may be added by an operation of its own
                    last.append("bias")
                found[owner] = tuple(dict.fromkeys((*found.get(owner, ()), *last)))
            if own or normalises:
                break
    return found


def _class(module: nn.Module | None) -> str:
    return type(module).__name__.lower()


def blocks(flow: Flow) -> int:
    """Depth as published schemes count it: a transformer's layer has two branches, attention and feed-forward."""
    return max(len(flow.splits) // 2, 1) if attentions(flow) else len(flow.splits)


def counted(found: dict[str, tuple[str, ...]], count: int) -> str:
    """`24 residual branches`, or how many of them."""
    said = f"{count} residual branch{'es' * (count > 1)}"
    return said if len(found) >= count else f"{len(found)} of {said}"


def normalised(flow: Flow) -> bool:
    """Does a normalisation follow the sums, as in post-norm transformers?"""
    kinds = [site.kind for site in flow.sites]
    sums = [i for i, kind in enumerate(kinds[:-1]) if kind == "residual add"]
    return bool(sums) and sum(kinds[i + 1] == "normalisation" for i in sums) > len(sums) / 2


def multiplied(patient: Patient, value: float, *, learned: bool = False, each: bool = False) -> list[Edit]:
    """A factor of the model's own on every branch, which the weights behind it do not know of.

    `learned`: trained, one number a branch, or with `each` one for every feature.

    Raises:
        ValueError: a branch ends with nothing that such a factor can be put on, and which.
    """
    found = ends(patient.flow, patient.model)
    if len(found) < len(patient.flow.splits):
        shared = "the branches share their last layers, or "
        raise ValueError(f"{shared}some of them end with no trainable weights of their own")
    edits: list[Edit] = []
    for place, names in found.items():
        module = patient.model.get_submodule(place)
        weight = getattr(module, names[0])
        if isinstance(module, nn.ParameterList | nn.RNNBase | nn.RNNCellBase) or "parametrizations" in place:
            raise ValueError(f"the branch that ends at {place} has no weight that a factor could be put on")
        axis = _outputs(module)
        options: dict[str, Value] = {"names": names, "value": float(f"{value:.6g}")}
        if learned:
            options |= {"learned": True}
        if each:
            options |= {"features": weight.shape[axis], "axis": axis}
        edits.append(Edit(place, "alter", "modules.scale_output", options))
    return edits


def _outputs(module: nn.Module) -> int:
    """The axis of a weight along which its outputs lie: the last one of x @ w, as in transformers' Conv1D."""
    first = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or "norm" in _class(module)
    return 0 if first else 1 if isinstance(module, nn.modules.conv._ConvTransposeNd) else -1


def _filled(
    found: dict[str, tuple[str, ...]], model: nn.Module, of: str, arguments: dict[str, Value]
) -> Iterator[Edit]:
    for place, names in found.items():
        for name in names:
            parameter = getattr(model.get_submodule(place), name)
            yield Edit(
                f"{place}.{name}".lstrip("."), "fill", of, arguments, before=f"rms {rms(parameter):.3g}"
            )
