"""pre-norm: h + f(norm(h)) in place of norm(h + f(h)).

What it does
    Moves the normalisation from behind each residual sum to the entrance of the branch, and leaves one behind the
    last sum. `nn.TransformerEncoderLayer` and `nn.TransformerDecoderLayer` have a switch for it; elsewhere the module
    at the branch's entrance is wrapped and the norm behind the sum becomes `nn.Identity`.

When it helps
    Post-norm transformers of more than about a dozen layers: each norm behind a sum rescales the skip path as well,
    so that the gradient has no path that is not multiplied, and training diverges without a long warm-up.

Expected effect
    The skip path's gain becomes exactly 1. The gradient grows towards the input like a power of depth, (1 + L v / q)^(c /
    2v) for branches of variance v and gradient c, and no longer exponentially.

Safety
    Unsafe: the model computes another function, and new norms start at gain 1.

References
    Xiong et al. 2020, arXiv:2002.04745; Nguyen and Salazar 2019, arXiv:1910.05895.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from isograd.anatomy import Branch, branches
from isograd.edit import Edit
from isograd.prescription import Patient, Prescription, Reach, not_applicable

SLUG = "pre-norm"
TREATS = ("post-norm", "VG101", "EG201")
TORCH_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
TORCH_STACKS = (nn.TransformerEncoder, nn.TransformerDecoder)
PLAIN = 1e-2
"""How far from 1 the skip path's factor may lie: DeepNorm's, which needs its norm behind the sum, is 1.4 and more."""


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """The switch of torch's own layers, or the norms of recognised blocks moved."""
    switched = list(_switched(patient.model))
    if switched:
        yield _prescription(f"norm_first in {_count(switched, 'set')} layers of torch", switched)
        return
    post = [b for b in branches(patient.flow, patient.model) if b.after is not None and not b.inside]
    if not post:
        yield not_applicable(SLUG, "no normalisation stands behind a residual sum")
        return
    why = _obstacle(post)
    if why:
        yield not_applicable(
            SLUG, why, f"{post[0].addition.source}: write h = h + f(norm(h)) for h = norm(h + f(h))"
        )
        return
    edits = list(_moved(post, patient.model))
    yield _prescription(f"the norm behind {len(post)} residual sums moved to the branches' entrances", edits)


def _prescription(title: str, edits: list[Edit]) -> Prescription:
    return Prescription(
        SLUG,
        title,
        tuple(edits),
        reach=Reach.NORMALISATION,
        treats=TREATS,
        expected="the skip path's gain becomes 1; the gradient grows like a power of depth",
        references=("Xiong et al. 2020, arXiv:2002.04745",),
    )


def _count(edits: list[Edit], verb: str) -> int:
    return sum(edit.verb == verb for edit in edits)


def _switched(model: nn.Module) -> Iterator[Edit]:
    """`norm_first` of torch's layers, and a final norm for their stacks."""
    modules = dict(model.named_modules())
    last = ""
    for name, module in modules.items():
        if isinstance(module, TORCH_LAYERS) and not module.norm_first:
            yield Edit(f"{name}.norm_first".lstrip("."), "set", arguments={"value": True}, before="False")
            last = name
    for name, module in modules.items():
        if isinstance(module, TORCH_STACKS) and module.norm is None and last:
            layer = module.layers[0]
            assert isinstance(layer, TORCH_LAYERS)
            if not layer.norm_first:
                yield Edit(
                    name, "alter", "modules.end_with_layer_norm", {"features": layer.linear1.in_features}
                )


def _obstacle(post: list[Branch]) -> str:
    """Why the norms cannot be moved; '' if they can."""
    if any(not b.entrance for b in post):
        return "a residual branch is not a module of its own, so that nothing can be put at its entrance"
    if any(abs(b.skip - 1) > PLAIN for b in post):
        return "the skip path is scaled, as in DeepNorm, and would grow without the norm behind the sum"
    if len({b.after.module for b in post if b.after is not None}) < len(post):
        return "layers share one normalisation, which cannot be both moved and left behind the last sum"
    if any(b.after is None or not b.after.module for b in post):
        return "a normalisation is called as a function, not held by a module"
    return ""


def _moved(post: list[Branch], model: nn.Module) -> Iterator[Edit]:
    for branch in post:
        assert branch.after is not None
        norm = model.get_submodule(branch.after.module)
        of = "modules.PreRMSNorm" if "rms" in type(norm).__name__.lower() else "modules.PreLayerNorm"
        yield Edit(branch.entrance, "wrap", of, {"features": branch.entered[-1]})
        if branch is not post[-1]:
            yield Edit(branch.after.module, "replace", "nn.Identity", before=str(norm))
