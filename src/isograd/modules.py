"""Modules that repaired models are made of.

Each keeps what was there before as `inner` and adds nothing else: its parameters stay the same objects, so that
tied weights stay tied, frozen ones frozen, and state-dict keys only gain an `inner.`. What a wrapper does not have
itself is looked up in what it wraps: a forward that reads `self.fc.weight` still finds it. Arguments are plain
values, and everything here depends on torch and on other names of this file only, so that it can be printed whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Around(nn.Module):
    """Base: answers for `inner` wherever it has no attribute of its own."""

    inner: nn.Module

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__.get("_modules", {})
        if name in own or "inner" not in own:
            return super().__getattr__(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(own["inner"], name)


# -- normalisation ---------------------------------------------------------------------------------


class Normed(Around):
    """norm(inner(x)): after a layer, before its activation (Ioffe and Szegedy 2015, arXiv:1502.03167)."""

    norm: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.norm(self.inner(*args, **kwargs))


class LayerNormed(Normed):
    """(…, features) -> the same shape, each sample to mean 0 and variance 1 over its features."""

    def __init__(self, inner: nn.Module, features: int) -> None:
        super().__init__(inner)
        self.norm = nn.LayerNorm(features)


class RMSNormed(Normed):
    """(…, features) -> the same shape, each sample to mean square 1 over its features."""

    def __init__(self, inner: nn.Module, features: int) -> None:
        super().__init__(inner)
        self.norm = nn.RMSNorm(features)


class BatchNormed(Normed):
    """(sample, features, …) -> the same shape, each feature to mean 0 and variance 1 over the batch.

    `dims`: positions of a feature: 0 behind a linear layer, 1, 2 or 3 behind a convolution.
    """

    def __init__(self, inner: nn.Module, features: int, dims: int = 0) -> None:
        super().__init__(inner)
        self.norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims](features)


class GroupNormed(Normed):
    """(sample, channels, …) -> the same shape, each group of channels of a sample to mean 0 and variance 1."""

    def __init__(self, inner: nn.Module, groups: int, channels: int) -> None:
        super().__init__(inner)
        self.norm = nn.GroupNorm(groups, channels)


class PreNorm(Around):
    """inner(norm(h)): at the entrance of a residual branch (Xiong et al. 2020, arXiv:2002.04745).

    `norm` acts on the first argument, by position or name; the others go to `inner` as they are.
    """

    norm: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            return self.inner(self.norm(args[0]), *args[1:], **kwargs)
        first = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
        return self.inner(**{**kwargs, first: self.norm(kwargs[first])})


class PreLayerNorm(PreNorm):
    """LayerNorm over the last dimension at the entrance."""

    def __init__(self, inner: nn.Module, features: int) -> None:
        super().__init__(inner)
        self.norm = nn.LayerNorm(features)


class PreRMSNorm(PreNorm):
    """RMSNorm over the last dimension at the entrance."""

    def __init__(self, inner: nn.Module, features: int) -> None:
        super().__init__(inner)
        self.norm = nn.RMSNorm(features)


class PreGroupNorm(PreNorm):
    """GroupNorm over the channels at the entrance."""

    def __init__(self, inner: nn.Module, groups: int, channels: int) -> None:
        super().__init__(inner)
        self.norm = nn.GroupNorm(groups, channels)


def end_with_layer_norm(module: nn.Module, features: int) -> None:
    """Give an `nn.TransformerEncoder` or `nn.TransformerDecoder` the final norm that pre-norm layers need."""
    like = next(module.parameters())
    module.norm = nn.LayerNorm(features, device=like.device, dtype=like.dtype).train(module.training)


class HeadNormed(Around):
    """RMSNorm over each head of a projection to queries or keys: (…, heads * head_dim) -> the same shape.

    It bounds the logits of attention whatever the weights do (Henry et al. 2020, arXiv:2010.04245; Dehghani et al.
    2023, arXiv:2302.05442).
    """

    def __init__(self, inner: nn.Module, head_dim: int) -> None:
        super().__init__(inner)
        self.norm = nn.RMSNorm(head_dim)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = self.inner(*args, **kwargs)
        return self.norm(x.unflatten(-1, (-1, self.norm.normalized_shape[0]))).flatten(-2)


class QueryKeyNormed(Around):
    """The same for a projection that makes queries, keys and values at once, in this order: (…, 3 * width)."""

    def __init__(self, inner: nn.Module, head_dim: int) -> None:
        super().__init__(inner)
        self.query_norm = nn.RMSNorm(head_dim)
        self.key_norm = nn.RMSNorm(head_dim)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        query, key, value = self.inner(*args, **kwargs).chunk(3, -1)
        heads = (-1, self.query_norm.normalized_shape[0])
        query = self.query_norm(query.unflatten(-1, heads)).flatten(-2)
        key = self.key_norm(key.unflatten(-1, heads)).flatten(-2)
        return torch.cat([query, key, value], -1)


class WeightStandardisation(nn.Module):
    """Parametrization: the weights of every unit to mean 0 and standard deviation gain / sqrt(fan_in).

    Qiao et al. 2019, arXiv:1903.10520, with the scale of Brock et al. 2021, arXiv:2101.08692.
    """

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, weight: Tensor) -> Tensor:
        rows = weight.flatten(1)
        centred = rows - rows.mean(1, keepdim=True)
        deviation = centred.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
        return (centred / deviation * (self.gain / rows.shape[1] ** 0.5)).view_as(weight)

    def extra_repr(self) -> str:
        return f"gain={self.gain:.4g}"


def standardise_weight(layer: nn.Module, gain: float) -> None:
    """Standardise the weight of a linear layer or a convolution: `weight` is then computed at each call."""
    parametrize.register_parametrization(layer, "weight", WeightStandardisation(gain))


class Standardised(Around):
    """inner((x - mean) / std): one number for all features, or one for each along the dimension `dim`."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        inner: nn.Module,
        mean: float | tuple[float, ...],
        std: float | tuple[float, ...],
        dim: int = -1,
    ) -> None:
        super().__init__(inner)
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))
        self.dim = dim

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        shape = [1] * x.ndim
        shape[self.dim] = self.mean.numel()
        return self.inner((x - self.mean.view(shape)) / self.std.view(shape), *args, **kwargs)


# -- residual connections --------------------------------------------------------------------------


class Residual(Around):
    """h + scale * inner(h), or projection(h) + scale * inner(h) where the width changes.

    He et al. 2016, arXiv:1512.03385. With L in a row, scale = L ** -0.5 keeps the stream and the gradient within a
    constant factor, whatever L is.

    Args:
        inner: the branch; further arguments of a call go to it.
        scale: factor on the branch.
        features: from and to how many features `projection` leads; None: no projection.
        dims: 0 for a linear projection, else the dimensions of a 1x1 convolution.
        stride: of that convolution.
    """

    projection: nn.Module | None

    def __init__(
        self,
        inner: nn.Module,
        scale: float = 1.0,
        features: tuple[int, ...] | None = None,
        dims: int = 0,
        stride: int = 1,
    ) -> None:
        super().__init__(inner)
        self.scale = scale
        self.projection = None
        if features is not None and dims:
            kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
            self.projection = kind(features[0], features[1], 1, stride=stride, bias=False)
        elif features is not None:
            self.projection = nn.Linear(features[0], features[1], bias=False)
        if self.projection is not None:
            nn.init.orthogonal_(self.projection.weight)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        h = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
        skip = h if self.projection is None else self.projection(h)
        result = self.inner(*args, **kwargs)
        if isinstance(result, tuple):  # an attention that returns its weights too
            return (skip + self.scale * result[0], *result[1:])
        return skip + self.scale * result

    def extra_repr(self) -> str:
        return f"scale={self.scale:.4g}"


class Residuals(Around):
    """An `nn.Sequential` with skip connections: h + scale * part(h) around each part from `starts` up to `stops`.

    The parts keep their places, and their keys but for the leading `inner.`.
    """

    def __init__(
        self, inner: nn.Module, starts: tuple[int, ...], stops: tuple[int, ...], scale: float = 1.0
    ) -> None:
        super().__init__(inner)
        self.starts, self.stops, self.scale = starts, stops, scale

    def forward(self, x: Any) -> Any:
        skip = x
        for i, part in enumerate(self.inner.children()):
            if i in self.starts:
                skip = x
            x = part(x)
            if i + 1 in self.stops:
                x = skip + self.scale * x
        return x

    def __getitem__(self, index: int) -> nn.Module:
        return list(self.inner.children())[index]

    def __len__(self) -> int:
        return len(list(self.inner.children()))

    def extra_repr(self) -> str:
        parts = ", ".join(f"{i}:{j}" for i, j in zip(self.starts, self.stops, strict=True))
        return f"{parts}, scale={self.scale:.4g}"


class Factor(nn.Module):
    """Parametrization: a weight or a bias times a factor. On both of a layer it multiplies what the layer returns.

    `value`: a constant, or where `learned` what it starts at: one number, or with `features` one for each output, which
    lie along the weight's `axis`.
    """

    def __init__(self, value: float, learned: bool = False, features: int = 0, axis: int = 0) -> None:
        super().__init__()
        start = torch.full((features,) if features else (), value)
        self.axis, self.value = axis, nn.Parameter(start) if learned else value

    def forward(self, weight: Tensor) -> Tensor:
        factor = self.value
        if isinstance(factor, Tensor) and factor.ndim and weight.ndim > 1:
            shape = [1] * weight.ndim
            shape[self.axis] = -1
            factor = factor.view(shape)
        return weight * factor

    def extra_repr(self) -> str:
        return f"value={self.value:.4g}" if isinstance(self.value, float) else ""


def scale_output(
    layer: nn.Module,
    names: tuple[str, ...],
    value: float,
    learned: bool = False,
    features: int = 0,
    axis: int = 0,
) -> None:
    """Put a `Factor` on what a layer returns, by way of its weight and bias, of these names.

    So it also acts where a forward reads the weight and does not call the layer, as torch's attention does.
    """
    like = getattr(layer, names[0])
    factor = Factor(value, learned, features, axis).to(like.device, like.dtype)
    for name in names:
        parametrize.register_parametrization(layer, name, factor)


class Offset(Around):
    """inner(x + offset), with one learned number that starts at 0."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.offset = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.inner(x + self.offset, *args, **kwargs)
