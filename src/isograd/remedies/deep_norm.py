"""deep-norm: norm(alpha h + f(h)) in place of norm(h + f(h)), with branch weights drawn at gain beta.

What it does
    For N post-norm layers, alpha = (2N)^(1/4) on the skip path and Xavier's weights at gain beta = (8N)^(-1/4) for values,
    attention outputs and feed-forward layers, at gain 1 for queries and keys. The sum stands in your code: alpha is put on
    the branch, as 1/alpha, and into the norm behind, as eps / alpha^2. That is the same function and gradient, as the norm
    divides a common factor out.

When it helps
    Post-norm transformers of more than about a dozen layers, which diverge or stay on a plateau although the gradient at
    the start looks healthy. It keeps post-norm's quality where `pre-norm` gives it up.

Expected effect
    Updates bounded by a constant at any depth: 1000 layers were trained. A gain of 0.98 to 1.04 a block at 200 layers.

Safety
    Unsafe: another function, trained weights of the blocks are lost. The last weight of each branch is called
    `parametrizations.weight.original` from then on.

References
    Wang et al. 2022, DeepNet: Scaling transformers to 1,000 layers, arXiv:2203.00555, figure 2.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from isograd.anatomy import Branch, branches
from isograd.edit import Edit
from isograd.graph.operations import WEIGHTED
from isograd.layers import rms
from isograd.prescription import Patient, Prescription, Reach, not_applicable
from isograd.remedies.pre_norm import PLAIN
from isograd.remedies.query_key_norm import thirds
from isograd.remedies.reset_norm_epsilon import epsilons
from isograd.remedies.scale_residual_branches import multiplied

SLUG = "deep-norm"
TREATS = ("post-norm", "residual-branch-growth", "UP502")
FIRST = "nn.init.xavier_normal_"
BOTH = (
    "encoder: alpha = 0.81 (N^4 M)^(1/16), beta = 0.87 (N^4 M)^(-1/16); decoder: alpha = (3M)^(1/4), "
    "beta = (12M)^(-1/4), for N encoder and M decoder layers"
)


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """Alpha and beta for all blocks of one stack."""
    flow = patient.flow
    found = branches(flow, patient.model)
    post = [b for b in found if b.after is not None and not b.inside]
    if not post:
        yield not_applicable(SLUG, "no normalisation stands behind a residual sum")
        return
    if len(post) < len(found):
        yield not_applicable(SLUG, "only some of the residual sums have a normalisation behind them")
        return
    if any(abs(b.skip - 1) > PLAIN for b in post):
        yield not_applicable(SLUG, "the skip path is scaled already")
        return
    if _two_stacks(patient.model):
        yield not_applicable(SLUG, "encoder and decoder need an alpha and beta each", BOTH)
        return
    alpha, beta = len(post) ** 0.25, float(f"{(4 * len(post)) ** -0.25:.6g}")  # 2N branches
    try:
        drawn = [edit for b in post for edit in _drawn(b, beta, patient)]
        skips = multiplied(patient, 1 / alpha)
    except ValueError as error:
        yield not_applicable(SLUG, str(error), f"write norm({alpha:.4g} * h + f(h)) for norm(h + f(h))")
        return
    yield Prescription(
        SLUG,
        f"alpha {alpha:.4g} on the skip of {len(post)} residual sums, beta {beta:.4g} on their branches' weights",
        (*{(e.place, e.rows): e for e in drawn}.values(), *skips, *_epsilons(post, patient.model, alpha)),
        reach=Reach.RESIDUAL,
        treats=TREATS,
        expected="a gain within a few hundredths of 1 for each block, and updates that do not grow with depth",
        decades=0.0,
        references=("Wang et al. 2022, arXiv:2203.00555",),
    )


def _two_stacks(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) or any(
        isinstance(m, nn.Transformer | nn.TransformerDecoder) for m in model.modules()
    )


def _drawn(branch: Branch, beta: float, patient: Patient) -> Iterator[Edit]:
    """Xavier's weights for one branch: beta for what the stream is given by, 1 for queries and keys."""
    trainable = {n: p for n, p in patient.model.named_parameters() if p.requires_grad and p.ndim > 1}
    steps = [s.site for s in patient.flow.ledgers.get(branch.addition.depth, ()) if s.branch]
    mixing = [site for site in steps if site.kind in ("attention", "product") and site.module]
    passing = [n for s in steps if s.kind in WEIGHTED or s in mixing for n in s.parameters if n in trainable]
    for name in dict.fromkeys(passing):
        weight, packed = trainable[name], thirds(name, patient.model, patient.flow)
        before = f"rms {rms(weight):.3g}"
        if packed is None and any(_packed(name, weight, site.module) for site in mixing):
            raise ValueError(f"queries, keys and values cannot be told apart in {name}")
        if packed is None:
            yield Edit(name, "fill", FIRST, {"gain": beta}, before=before)
            continue
        for part, gain in enumerate((1.0, 1.0, beta)):
            rows = (part * packed, (part + 1) * packed)
            yield Edit(name, "fill", FIRST, {"gain": gain}, rows=rows, before=before)
    multiplying = {p.name for p in patient.flow.parameters if p.fan_in}
    for name in trainable:
        if name in multiplying and name not in passing and any(_within(name, site.module) for site in mixing):
            yield Edit(name, "fill", FIRST, {"gain": 1.0}, before=f"rms {rms(trainable[name]):.3g}")


def _within(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")


def _packed(name: str, weight: nn.Parameter, attention: str) -> bool:
    """Makes queries, keys and values at once: three times as many outputs as inputs, inside of the attention."""
    return _within(name, attention) and max(weight.shape) == 3 * min(weight.shape)


def _epsilons(post: list[Branch], model: nn.Module, alpha: float) -> Iterator[Edit]:
    for place in dict.fromkeys(b.after.module for b in post if b.after is not None and b.after.module):
        for attribute, value in epsilons(model.get_submodule(place)):
            new = float(f"{value / alpha**2:.6g}")
            yield Edit(f"{place}.{attribute}", "set", arguments={"value": new}, before=f"{value:g}")
