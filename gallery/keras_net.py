"""Networks described in Keras terms, built in PyTorch with the conventions of Keras.

Glorot-uniform kernels and zero biases unless said otherwise; `VarianceScaling` truncated at two standard
deviations and corrected for it; batch normalisation with momentum 0.99 and epsilon 1e-3; losses on
probabilities clipped at 1e-7, means over the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CLIP = 1e-7
TRUNCATED = 0.87962566103423978
"""Standard deviation of a unit normal cut at two: Keras divides by it."""

Spec = dict[str, Any]

SHORT: dict[str, Spec] = {
    "glorot_uniform": {
        "class": "VarianceScaling",
        "scale": 1.0,
        "mode": "fan_avg",
        "distribution": "uniform",
    },
    "he_uniform": {"class": "VarianceScaling", "scale": 2.0, "mode": "fan_in", "distribution": "uniform"},
    "he_normal": {
        "class": "VarianceScaling",
        "scale": 2.0,
        "mode": "fan_in",
        "distribution": "truncated_normal",
    },
    "lecun_uniform": {"class": "VarianceScaling", "scale": 1.0, "mode": "fan_in", "distribution": "uniform"},
    "zeros": {"class": "Zeros"},
    "RandomUniform": {"class": "RandomUniform", "minval": -0.05, "maxval": 0.05},
}
SAME = {"GlorotUniform": "glorot_uniform", "HeNormal": "he_normal", "HeUniform": "he_uniform"}


class Exponential(nn.Module):
    """Keras's `exponential` activation."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "exponential": Exponential,
    "softmax": lambda: nn.Softmax(-1),
}


@torch.no_grad()
def initialise(tensor: Tensor, spec: Spec | str, fan_in: int, fan_out: int) -> None:
    """Fill a tensor as a Keras initialiser does; for a bias both fans are its length."""
    if isinstance(spec, str):
        spec = SHORT[spec]
    spec = SHORT[SAME[spec["class"]]] if spec["class"] in SAME else spec
    match spec["class"]:
        case "Zeros":
            tensor.zero_()
        case "Ones":
            tensor.fill_(1.0)
        case "Constant":
            tensor.fill_(spec["value"])
        case "RandomUniform":
            tensor.uniform_(spec["minval"], spec["maxval"])
        case "RandomNormal":
            tensor.normal_(spec["mean"], spec["stddev"])
        case "TruncatedNormal":
            _truncated(tensor, spec["stddev"])
        case "VarianceScaling":
            fans = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}
            variance = spec["scale"] / max(1.0, fans[spec["mode"]])
            match spec["distribution"]:
                case "uniform":
                    limit = math.sqrt(3 * variance)
                    tensor.uniform_(-limit, limit)
                case "untruncated_normal":
                    tensor.normal_(0.0, math.sqrt(variance))
                case "normal" | "truncated_normal":
                    _truncated(tensor, math.sqrt(variance) / TRUNCATED)
                case other:
                    raise ValueError(f"unknown distribution {other!r}")
        case other:
            raise ValueError(f"unknown initialiser {other!r}")


def _truncated(tensor: Tensor, deviation: float) -> None:
    nn.init.trunc_normal_(tensor, 0.0, deviation, -2 * deviation, 2 * deviation)


class ChannelsFirst(nn.Module):
    """(batch, height, width, channels) to torch's order."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


class FlattenLast(nn.Module):
    """Flatten in Keras's order, channels last."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1) if x.ndim == 4 else x.flatten(1)


def network(layers: list[Spec], sample: Tensor) -> nn.Sequential:
    """The network, its sizes inferred by running `sample` (a batch of inputs) through it layer by layer."""
    model = nn.Sequential()
    value = sample
    if value.ndim == 4:
        model.append(ChannelsFirst())
        value = model(value)
    for spec in layers:
        for module in _modules(spec, value):
            model.append(module)
            with torch.no_grad():
                value = module(value)
    return model


def _modules(spec: Spec, value: Tensor) -> list[nn.Module]:
    """The torch modules of one Keras layer."""
    found: list[nn.Module] = []
    match spec["class"]:
        case "Dense":
            found.append(_dense(spec, value.shape[-1]))
        case "Conv2D":
            found.append(_convolution(spec, value.shape[1]))
        case "MaxPooling2D":
            pool = spec["pool_size"][0]
            found.append(nn.MaxPool2d(pool, spec.get("strides", [pool])[0]))
        case "Flatten":
            found.append(FlattenLast())
        case "Reshape" if len(spec["target_shape"]) == 3:
            found += [nn.Unflatten(1, tuple(spec["target_shape"])), ChannelsFirst()]
        case "Reshape":
            found.append(FlattenLast())
        case "Dropout":
            found.append(nn.Dropout(spec["rate"]))
        case "BatchNormalization":
            found.append(nn.BatchNorm1d(value.shape[-1], eps=1e-3, momentum=0.01))
        case "Softmax":
            found.append(nn.Softmax(-1))
        case "Activation":
            pass
        case other:
            raise ValueError(f"unknown layer {other!r}")
    activation = spec.get("activation") or "linear"
    if activation != "linear":
        found.append(ACTIVATIONS[activation]())
    return found


def _dense(spec: Spec, fan_in: int) -> nn.Linear:
    units = spec["units"]
    layer = nn.Linear(fan_in, units)
    initialise(layer.weight, spec.get("kernel_initializer") or "glorot_uniform", fan_in, units)
    initialise(layer.bias, spec.get("bias_initializer") or "zeros", units, units)
    return layer


def _convolution(spec: Spec, channels: int) -> nn.Conv2d:
    size = spec["kernel_size"][0]
    layer = nn.Conv2d(channels, spec["filters"], size, padding=size // 2 if spec["padding"] == "same" else 0)
    area = size * size
    kernel = spec.get("kernel_initializer") or "glorot_uniform"
    initialise(layer.weight, kernel, area * channels, area * spec["filters"])
    assert layer.bias is not None
    initialise(layer.bias, spec.get("bias_initializer") or "zeros", spec["filters"], spec["filters"])
    return layer


def loss_of(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A Keras loss: (answer, target) -> mean over the batch."""
    return LOSSES[name]


def _same_shape(answer: Tensor, target: Tensor) -> Tensor:
    return target.reshape(answer.shape) if target.numel() == answer.numel() else target


def _categorical(answer: Tensor, target: Tensor) -> Tensor:
    """Keras makes the answer sum to one and clips it before it takes the logarithm."""
    p = (answer / answer.sum(-1, keepdim=True)).clamp(CLIP, 1 - CLIP)
    return -(target * p.log()).sum(-1).mean()


def _sparse(answer: Tensor, target: Tensor) -> Tensor:
    return _categorical(answer, functional.one_hot(target.flatten().long(), answer.shape[-1]).float())


def _binary(answer: Tensor, target: Tensor) -> Tensor:
    p = answer.clamp(CLIP, 1 - CLIP)
    target = _same_shape(answer, target)
    return -(target * p.log() + (1 - target) * (1 - p).log()).mean()


def _squared(answer: Tensor, target: Tensor) -> Tensor:
    return functional.mse_loss(answer, _same_shape(answer, target))


def _absolute(answer: Tensor, target: Tensor) -> Tensor:
    return functional.l1_loss(answer, _same_shape(answer, target))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "categorical_crossentropy": _categorical,
    "sparse_categorical_crossentropy": _sparse,
    "binary_crossentropy": _binary,
    "mean_squared_error": _squared,
    "mse": _squared,
    "mean_absolute_error": _absolute,
}
