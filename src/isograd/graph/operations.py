"""What kind of thing an operation is: the only table of names, for torch calls and autograd nodes alike."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torch.autograd.graph import Node


@dataclass(frozen=True, slots=True)
class ActivationFunction:
    """`largest_slope`: supremum of |phi'|; 0 where one side is flat or linear by design (ReLU and kin)."""

    largest_slope: float
    bounded: bool = False
    """Its output is bounded on both sides, so that its derivative vanishes on both."""


ACTIVATIONS = {
    "sigmoid": ActivationFunction(0.25, bounded=True),
    "tanh": ActivationFunction(1.0, bounded=True),
    "hardtanh": ActivationFunction(1.0, bounded=True),
    "hardsigmoid": ActivationFunction(1 / 6, bounded=True),
    "softsign": ActivationFunction(1.0, bounded=True),
    "relu6": ActivationFunction(0.0),
    "softplus": ActivationFunction(0.0),
    "logsigmoid": ActivationFunction(0.0),
    "relu": ActivationFunction(0.0),
    "leaky_relu": ActivationFunction(0.0),
    "elu": ActivationFunction(0.0),
    "selu": ActivationFunction(0.0),
    "celu": ActivationFunction(0.0),
    "gelu": ActivationFunction(0.0),
    "silu": ActivationFunction(0.0),
    "mish": ActivationFunction(0.0),
    "hardswish": ActivationFunction(0.0),
    "threshold": ActivationFunction(0.0),
    "tanhshrink": ActivationFunction(0.0),
    "softshrink": ActivationFunction(0.0),
    "hardshrink": ActivationFunction(0.0),
}

RECTIFIERS = {"relu", "leaky_relu", "gelu", "elu", "silu", "selu", "celu", "mish", "hardswish", "relu6"}
"""Functions that pass about half of their input unchanged."""

STEPS = {"round", "sign", "sgn", "floor", "ceil", "trunc", "fix", "heaviside"}
"""Functions that are constant piece by piece: their derivative is zero wherever there is one."""

LOSSES = {
    "cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div",
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "poisson_nll_loss", "gaussian_nll_loss",
    "soft_margin_loss", "hinge_embedding_loss", "multi_margin_loss", "multilabel_margin_loss",
    "multilabel_soft_margin_loss", "margin_ranking_loss", "cosine_embedding_loss", "triplet_margin_loss",
    "ctc_loss",
}  # fmt: skip

WEIGHTED = {"linear", "convolution", "recurrent"}
"""Kinds of call that multiply by a weight: layers in the sense of sigma^L."""

IDENTITIES = {"addition", "reshape", "dropout", "elementwise"}
"""Kinds of call that a skip path may consist of."""

_KINDS = {
    "linear": "linear addmm addmv addbmm baddbmm mm mv matmul bmm einsum bilinear tensordot __matmul__ __rmatmul__",
    "convolution": "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution",
    "normalisation": "layer_norm batch_norm group_norm instance_norm rms_norm normalize local_response_norm "
    "native_layer_norm native_batch_norm native_group_norm fused_rms_norm",
    "attention": "scaled_dot_product_attention multi_head_attention_forward flex_attention",
    "embedding": "embedding embedding_bag",
    "recurrent": "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell",
    "pooling": "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
    "max_pool2d_with_indices lp_pool2d mean sum amax amin max min logsumexp",
    "dropout": "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout",
    "softmax": "softmax log_softmax gumbel_softmax",
    "addition": "add __add__ __iadd__ __radd__ sub __sub__ __isub__ __rsub__ subtract addcmul",
    "reshape": "view reshape permute transpose t movedim swapaxes flatten unflatten squeeze unsqueeze expand "
    "expand_as contiguous to type type_as float half bfloat16 double clone detach __getitem__ getitem narrow "
    "select slice chunk split unbind chunk_split tensor_split as_strided view_as reshape_as repeat "
    "repeat_interleave tile roll flip pad cat concat stack hstack vstack dstack einops pixel_shuffle "
    "index_select gather unfold fold T mT rot90 alias numpy_T ravel broadcast_to",
}
_KIND_OF = (
    {name: kind for kind, names in _KINDS.items() for name in names.split()}
    | dict.fromkeys(ACTIVATIONS, "activation")
    | dict.fromkeys(LOSSES, "loss")
)

# Nodes that carry a tensor on without computing: they fold into their neighbour.
_TRIVIAL_NODES = set(
    "view t transpose permute unsafe_view expand squeeze unsqueeze clone to_copy alias as_strided slice select "
    "reshape_alias detach unflatten flatten copy_slices copy_backwards mkldnn_reshape unsafe_split split "
    "split_with_sizes unbind cat stack repeat index roll flip constant_pad_nd tbackward".split()
)


def operation_of(node: Node) -> str:
    """`addmm` for AddmmBackward0, `copy_slices` for CopySlices; a custom Function keeps its own name."""
    name = node.name().rsplit("::", 1)[-1]
    if hasattr(node, "_forward_cls"):
        return name.removesuffix("Backward")
    name = re.sub(r"Backward\d*$", "", name)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def is_trivial(operation: str) -> bool:
    """A view, a cast or an alias: the gradient passes unchanged but for its layout."""
    return operation in _TRIVIAL_NODES


def kind_of_call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Kind of a torch call by its name and, for products, by what it multiplies."""
    kind = (
        _KIND_OF.get(name) or _KIND_OF.get(name.rstrip("_")) or _KIND_OF.get(name.strip("_"), "elementwise")
    )
    if kind == "linear" and name not in ("linear", "bilinear"):
        operands = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if all(parameter_of(t) is None for t in operands):
            return "product"  # of two activations, as in attention
    return kind


def clips(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Is it a hard tanh under another name: a clamp between two numbers? One bound alone keeps off a pole, or rectifies."""
    bounds = [*args[1:], *kwargs.values()]
    return name.rstrip("_") in ("clamp", "clip") and [type(b) in (int, float) for b in bounds] == [True, True]


def summed_over(equation: str, operands: Sequence[Tensor]) -> list[int]:
    """Of each operand of an einsum, how many of its elements are summed into one of the result: a weight's fan-in."""
    given, arrow, result = equation.replace(" ", "").partition("->")
    kept = set(result) if arrow else {letter for letter in given if given.count(letter) == 1}
    counts: list[int] = []
    for term, operand in zip(given.split(","), operands, strict=False):
        front, _, back = term.partition("...")
        sizes = dict(zip(front, operand.shape, strict=False))
        sizes.update(zip(reversed(back), reversed(operand.shape), strict=False))
        counts.append(math.prod(size for letter, size in sizes.items() if letter not in kept))
    return counts


def parameter_of(tensor: Tensor) -> Tensor | None:
    """The parameter that a tensor is, or is a view of."""
    if tensor.is_leaf:
        return tensor if tensor.requires_grad else None
    node, steps = tensor.grad_fn, 0
    while node is not None and steps < 4:
        if hasattr(node, "variable"):
            return node.variable  # pyright: ignore[reportAttributeAccessIssue]
        if not is_trivial(operation_of(node)):
            return None
        node, steps = node.next_functions[0][0], steps + 1
    return None


def kind_of_module(name: str, kind: str) -> str:
    """Kind of a small module by its class name, or that of its last call."""
    lowered = name.lower()
    if "norm" in lowered:
        return "normalisation"
    if "activation" in lowered or any(lowered.endswith(known.replace("_", "")) for known in ACTIVATIONS):
        return "activation"
    return "embedding" if "embedding" in lowered and kind != "addition" else kind
