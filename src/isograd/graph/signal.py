"""What a forward signal is like: how much of it tells one token from the others, what functions and losses make of it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from isograd.losses import REGRESSIONS

NORMS = ("layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm")
ROOTS = ("rsqrt", "sqrt")
"""By these a normalisation that is written out divides."""
MASKED = -1e9
"""A logit below it takes no part: masks are written as the lowest number of a format, or as -inf."""
MANY = 100_000
"""Elements by which samples are told apart, behind every operation: a measurement of a ResNet of 8 blocks takes a fifth
more processor time with them, and twice as much with all elements."""
EQUAL = 1e-5
"""Share of the largest target below which targets do not differ, but for rounding."""
LARGEST = 500_000
"""Elements that statistics are taken over, here and in the trace: beyond, whole samples are left out."""


def distinct(tensor: Tensor) -> Tensor | None:
    """Root mean square of what belongs to one token of one sample alone: (sample, token, feature) -> scalar.

    What a position has in common in all samples, and a sample in all its tokens, is taken off. None: no tokens, or
    nothing to compare them with.
    """
    if tensor.ndim != 3 or len(tensor) < 2 or tensor.shape[1] < 2:
        return None
    x = _sampled(tensor)
    return (x - x.mean(0) - x.mean(1, keepdim=True) + x.mean((0, 1))).square().mean().sqrt().double()


def varying(tensor: Tensor) -> Tensor | None:
    """Root mean square of what differs between the samples: (sample, ...) -> scalar. None: nothing to compare.

    Source: Schoenholz et al. 2017, section 3: where all samples become alike, no depth can tell them apart again.
    """
    if tensor.ndim < 2 or len(tensor) < 2:
        return None
    # Welford's way: exact for samples that are all but alike, and without a copy of the signal.
    return _sampled(tensor, MANY).var(0, correction=0).mean().sqrt().double()


def derivative(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """phi'(x) element by element, from the function itself, whatever it is. None: not elementwise."""
    # Own identity hooks: inside a checkpointed block its packing must not see our saved tensors.
    with torch._C.DisableTorchFunction(), torch.enable_grad(), saved_tensors_hooks(_unchanged, _unchanged):
        x = args[0].detach()
        if x.numel() > LARGEST and x.ndim > 1:  # enough samples to know a unit by
            x = x[: max(1, LARGEST * x.shape[0] // x.numel())]
        x = x.clone().requires_grad_()
        rest = {key: False if key == "inplace" else value for key, value in kwargs.items()}
        plain = getattr(torch, func.__name__[:-1], func) if func.__name__.endswith("_") else func
        y = plain(x, *(False if a is True else a for a in args[1:]), **rest)
        if not isinstance(y, Tensor) or y.shape != x.shape or y.grad_fn is None:
            return None
        return torch.autograd.grad(y, x, torch.ones_like(y))[0]


def slopes(derivative: Tensor, unit_dim: int, largest: float) -> tuple[Tensor, int]:
    """Of an activation's phi'(x): mean |phi'|, saturated share, dead share of units (float64, on its device); units."""
    slope = derivative.abs()
    dim = unit_dim % slope.ndim if slope.ndim else 0
    units = slope.shape[dim] if slope.ndim else 1
    zero = slope == 0
    dead = zero.movedim(dim, 0).reshape(units, -1).all(dim=1) if units else zero
    # float32 on purpose: a mean of a million bf16 values would lose its digits
    mean = slope.mean(dtype=torch.float32)
    saturated = (slope < 0.05 * largest).mean(dtype=torch.float32) if largest else torch.zeros_like(mean)
    return torch.stack([mean, saturated, dead.mean(dtype=torch.float32)]).double(), units


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def asked(name: str, given: Tensor, target: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """What a loss is given: the values of a `call.LossCall`, float64 on their device, and its rows and columns."""
    rows = given.flatten(1) if given.ndim > 1 else given[:, None]
    if given.ndim > 2 and name in ("cross_entropy", "nll_loss"):
        rows = given.movedim(1, -1).flatten(0, -2)
    rows = rows[: max(2, LARGEST // max(rows.shape[1], 1))].float()
    sums = rows.sum(1).sub(1).abs().amax()
    spread = rows.std(0, correction=0).amax() if rows.shape[0] > 1 else torch.zeros_like(sums)
    seen = target.float() if target.numel() else torch.zeros(1)
    values = [rows.amin(), rows.amax(), sums, spread, seen.amin(), seen.amax(), excess(name, rows, target)]
    return torch.stack(values).double(), (given.numel() // max(rows.shape[1], 1), rows.shape[1])


def pairs(name: str, given: Tensor, target: Tensor) -> bool:
    """Does broadcasting compare each output with all targets? Not where both were given their axes on purpose."""
    if name not in REGRESSIONS or given.ndim == target.ndim:
        return False
    elements = math.prod(torch.broadcast_shapes(given.shape, target.shape))
    return elements > max(given.numel(), target.numel())


def excess(name: str, rows: Tensor, target: Tensor) -> Tensor:
    """How far beyond a constant answer a loss starts; NaN: not known. rows: (row, class or output), float32.

    Of classes the loss over that of equal probabilities, or what the logits alone make of it where that is less: a margin
    that the loss takes off the right class is no weight's. Of values how far the outputs scatter, in standard deviations
    of the targets: around the targets' mean where they are larger than the targets, around their own where not.
    """
    unknown = rows.new_full((), torch.nan)
    if name in ("cross_entropy", "nll_loss") and not target.is_floating_point() and rows.shape[1] > 1:
        classes = target.flatten()[: len(rows)]
        told = (classes >= 0) & (classes < rows.shape[1])
        chosen = rows.gather(1, classes.where(told, 0)[:, None])[:, 0]
        most = rows.logsumexp(1)
        costs = ((most - rest).where(told, 0).sum() / told.sum() for rest in (chosen, rows.mean(1)))
        return torch.minimum(*costs) / math.log(rows.shape[1])
    if target.numel() % rows.shape[1] or not target.is_floating_point():
        return unknown
    wanted = target.reshape(-1, rows.shape[1])[: len(rows)].float()
    if name == "binary_cross_entropy_with_logits" and wanted.shape == rows.shape:
        return (functional.softplus(rows) - wanted * rows).mean() / math.log(2)
    if name in REGRESSIONS and wanted.shape == rows.shape and len(rows) > 1:
        differs = wanted.var(0, correction=0).mean().sqrt()
        told = differs > EQUAL * wanted.abs().amax()
        # Targets that lie far from zero are no fault of the model that says zero.
        larger = rows.square().mean() > wanted.square().mean()
        beyond = (rows - wanted.mean(0)).square().mean().where(larger, rows.var(0, correction=0).mean())
        return (beyond.sqrt() / differs).where(told, unknown)
    return unknown


def denominator(
    func: Callable[..., Any], args: Any, kwargs: Any
) -> tuple[float, Tensor, Tensor | None] | None:
    """Epsilon of one of torch's normalisations, and the mean variance that it is added to; None: something else.

    Third, where that is a running variance: the mean variance of the input itself.
    """
    name = getattr(func, "__name__", "")
    if name not in NORMS or not inspect.isfunction(func):
        return None
    call = inspect.signature(func).bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    epsilon = given["eps"] if given["eps"] is not None else torch.finfo(given["input"].dtype).eps
    x = _sampled(given["input"])
    fixed = not given.get("training", True) or not given.get("use_input_stats", True)
    own: Tensor | None = None
    match name:
        case "layer_norm":
            spread = x.var(tuple(range(-len(given["normalized_shape"]), 0)), correction=0)
        case "rms_norm":
            spread = x.square().mean(tuple(range(-len(given["normalized_shape"]), 0)))
        case _ if fixed and given["running_var"] is not None:
            spread, own = given["running_var"].detach(), _by_channel(x)
        case "batch_norm":
            spread = _by_channel(x)
        case "group_norm":
            spread = x.reshape(len(x), given["num_groups"], -1).var(-1, correction=0)
        case _:
            spread = x.flatten(2).var(-1, correction=0)
    return float(epsilon), spread.double().mean(), own.double().mean() if own is not None else None


def _by_channel(x: Tensor) -> Tensor:
    """Variance of each channel over the batch: (sample, channel, ...) -> (channel,)."""
    return x.transpose(0, 1).flatten(1).var(1, correction=0)


def _sampled(tensor: Tensor, most: int = LARGEST) -> Tensor:
    """Enough samples, in at least float32."""
    tensor = tensor.detach()
    if tensor.numel() > most:
        tensor = tensor[: max(2, most * len(tensor) // tensor.numel())]
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def spread(func: Callable[..., Any], args: Any, kwargs: Any) -> Tensor | None:
    """How far attention leaves several positions open: mean of 1 - sum(p^2), over that of even attention.

    It is the size of the softmax's derivative: 1 where all positions count alike, 0 where one is picked. Of
    `scaled_dot_product_attention`, of `nn.MultiheadAttention`, of a softmax over the last axis, of which the
    caller has to know that it mixes values, and of a Gumbel softmax, with noise of its own; None: something else.
    """
    name = getattr(func, "__name__", "")
    if name == "scaled_dot_product_attention":
        logits = _logits(*args, **kwargs)
    elif name == "multi_head_attention_forward":
        logits = _of_module(func, args, kwargs)
    elif name in ("softmax", "gumbel_softmax"):
        logits = _of_rows(name, bound(func, args, kwargs) if name == "gumbel_softmax" else kwargs, args)
        if logits is None:
            return None
    else:
        return None
    seen = torch.where(logits > MASKED, 0.0, -torch.inf)
    left, even = ((1 - part.softmax(-1).square().sum(-1)).nanmean() for part in (logits + seen, seen))
    return (left / even).double()


def _of_rows(name: str, given: dict[str, Any], args: Any) -> Tensor | None:
    """The logits of a softmax over the last axis; with the noise that a Gumbel softmax adds to them, from another generator."""
    logits = args[0].detach() if args else given.get("logits")
    dim = given.get("dim", args[-1] if len(args) > 1 else None)
    if logits is None or logits.ndim < 2 or dim not in (-1, logits.ndim - 1):
        return None
    logits = logits[: 2 if logits.ndim > 3 else 16].float()
    if name == "softmax":
        return logits
    generator = torch.Generator(logits.device).manual_seed(0)
    noise = torch.rand(logits.shape, generator=generator, device=logits.device)
    return (logits - (-noise.log()).log()) / given["tau"]


def bound(func: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call of a Python function by their names, defaults included."""
    call = inspect.signature(func).bind(*args, **kwargs)
    call.apply_defaults()
    return call.arguments


def _of_module(func: Callable[..., Any], args: Any, kwargs: Any) -> Tensor:
    """The logits inside of one call of `nn.MultiheadAttention`: query and key are (token, sample, feature)."""
    given = bound(func, args, kwargs)
    size, heads = given["embed_dim_to_check"], given["num_heads"]
    if given["use_separate_proj_weight"]:
        weights = given["q_proj_weight"], given["k_proj_weight"]
    else:
        weights = given["in_proj_weight"].split(size)[:2]
    shifts = given["in_proj_bias"].split(size)[:2] if given["in_proj_bias"] is not None else (None, None)
    query, key = (
        functional.linear(x.detach()[:, :2], w, b)
        .unflatten(-1, (heads, -1))
        .movedim(0, -2)  # (sample, head, token, ·)
        for x, w, b in zip((given["query"], given["key"]), weights, shifts, strict=True)
    )
    mask = given["attn_mask"]
    if mask is not None and mask.ndim == 3:  # (sample * head, query, key)
        mask = mask.unflatten(0, (-1, heads))
    logits = _logits(query, key, key, mask if mask is None or mask.dtype != torch.bool else ~mask)
    absent = given["key_padding_mask"]
    if absent is None:
        return logits
    absent = absent.detach()[:2, None, None]
    return logits.masked_fill(absent, -torch.inf) if absent.dtype == torch.bool else logits + absent


def _logits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Of the first two samples."""
    query, key = query.detach()[:2].float(), key.detach()[:2].float()
    if key.ndim > 2 and query.shape[-3] != key.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        logits = logits.masked_fill(torch.ones_like(logits[0], dtype=torch.bool).triu(1), -torch.inf)
    if attn_mask is None:
        return logits
    mask = attn_mask.detach()[:2] if attn_mask.ndim == query.ndim else attn_mask.detach()
    return logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.float()
