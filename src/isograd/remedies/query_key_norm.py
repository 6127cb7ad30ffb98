"""query-key-norm: queries and keys are normalised for each head, which bounds the logits of attention.

What it does
    Wraps the projections to queries and keys so that each head's vector has rms 1 times a learned gain.

When it helps
    Where logits of attention have grown, by large weights or in a long training: the softmax then picks one position,
    its derivative vanishes, and one outlier makes the loss spike.

Expected effect
    |logit| <= sqrt(head_dim) at gain 1, whatever the weights are; a standard deviation of about 1 where queries and keys
    are unrelated.

Safety
    Unsafe: the model computes another function.

References
    Henry et al. 2020, arXiv:2010.04245; Dehghani et al. 2023, arXiv:2302.05442; Wortsman et al. 2023, arXiv:2309.14322.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from isograd.edit import Edit
from isograd.flow import Flow
from isograd.prescription import Patient, Prescription, Reach, not_applicable

SLUG = "query-key-norm"
TREATS = ("attention-logits",)
PAIRS = (
    ("q_proj", "k_proj"), ("query", "key"), ("q_lin", "k_lin"), ("to_q", "to_k"), ("q", "k"), ("wq", "wk"),
    ("query_proj", "key_proj"), ("linear_q", "linear_k"), ("W_q", "W_k"), ("w_q", "w_k"), ("Wq", "Wk"),
)  # fmt: skip
"""What the two projections are called."""
JOINT = ("c_attn", "qkv", "to_qkv", "in_proj", "qkv_proj", "Wqkv", "query_key_value")
HEAD_DIMS = ("head_dim", "attention_head_size", "head_size", "d_head", "dim_head")
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead", "h")


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """Norms on every pair of projections whose heads are known."""
    edits = list(_edits(patient.model, patient.flow))
    if not edits:
        packed = any(isinstance(m, nn.MultiheadAttention) for m in patient.model.modules())
        yield not_applicable(
            SLUG,
            "nn.MultiheadAttention projects and attends in one call"
            if packed
            else "no attention with separate, not yet normalised projections to queries and keys was found",
            *(
                ["put F.rms_norm on queries and keys of your own F.scaled_dot_product_attention"]
                if packed
                else _written_out(patient.flow)
            ),
        )
        return
    yield Prescription(
        SLUG,
        f"RMSNorm for each head behind {len(edits)} projections to queries and keys",
        tuple(edits),
        reach=Reach.NORMALISATION,
        treats=TREATS,
        expected="logits of attention within sqrt(head_dim), with a standard deviation near 1",
        references=("Henry et al. 2020, arXiv:2010.04245", "Dehghani et al. 2023, arXiv:2302.05442"),
    )


def _written_out(flow: Flow) -> list[str]:
    """What to write where the logits come by another way than a product of two projections."""
    shut = sorted((a for a in flow.attentions if a.spread >= 0), key=lambda a: a.spread)
    lines = dict.fromkeys(a.site.source for a in shut if a.site.source)
    return [
        f"{line}: scale the logits to a standard deviation near 1 before their softmax" for line in lines
    ][:3]


def _edits(model: nn.Module, flow: Flow) -> Iterator[Edit]:
    for name, module in model.named_modules():
        children = dict(module.named_children())
        if any("norm" in child.lower() and child[:1] in "qk" for child in children):
            continue  # it has them already
        for pair in PAIRS:
            if all(_width(children.get(child)) for child in pair):
                size = _head_dim(module, _width(children[pair[0]]))
                if size:
                    for child in pair:
                        yield Edit(
                            f"{name}.{child}".lstrip("."), "wrap", "modules.HeadNormed", {"head_dim": size}
                        )
        for child in JOINT:
            width = _width(children.get(child))
            size = _head_dim(module, width // 3)
            if width and width % 3 == 0 and size and _in_thirds(module, name, width, flow):
                yield Edit(
                    f"{name}.{child}".lstrip("."), "wrap", "modules.QueryKeyNormed", {"head_dim": size}
                )


def _width(projection: nn.Module | None) -> int:
    """Output features of a linear layer, of torch's or of transformers' transposed kind; 0: it is none."""
    weight, bias = getattr(projection, "weight", None), getattr(projection, "bias", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return 0
    return (
        weight.shape[0] if isinstance(projection, nn.Linear) else len(bias) if isinstance(bias, Tensor) else 0
    )


def _head_dim(attention: nn.Module, width: int) -> int:
    for name in HEAD_DIMS:
        if isinstance(size := getattr(attention, name, None), int) and size and width % size == 0:
            return size
    for name in HEADS:
        if isinstance(heads := getattr(attention, name, None), int) and heads and width % heads == 0:
            return width // heads
    return 0


def thirds(name: str, model: nn.Module, flow: Flow) -> int | None:
    """Width of queries, keys and values, where the weight `name` makes all three in this order, one after another."""
    place, _, leaf = name.rpartition(".")
    if leaf == "in_proj_weight":
        return model.get_parameter(name).shape[0] // 3
    owner, _, child = place.rpartition(".")
    width = _width(model.get_submodule(place))
    if not isinstance(model.get_submodule(place), nn.Linear) or child not in JOINT or width % 3:
        return None
    return width // 3 if _in_thirds(model.get_submodule(owner), owner, width, flow) else None


def _in_thirds(attention: nn.Module, name: str, width: int, flow: Flow) -> bool:
    """Queries come first, then keys, then values; some models interleave them head by head instead."""
    if getattr(attention, "split_size", 0) * 3 == width:
        return True
    sites = [*flow.sites, *(step.site for steps in flow.ledgers.values() for step in steps)]
    shapes = [s.shape for s in sites if s.module == name and s.kind == "reshape"]
    return any(len(s) >= 3 and (s[-3] == 3 or s[-1] * 3 == width) for s in shapes)
