"""Faults that need no training to be seen: values that are not finite, backwards that raise, gradients that
the number format rounds to zero, parts that the loss never reaches.

`gallery.establish` records what a plain forward and backward of torch shows of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional

from gallery.case import Built, Case, Loss
from gallery.nets import HE, initialised, mlp, scaled_normal, without_head
from gallery.shipped import built, tokens
from gallery.training import digits
from gallery.trial import evidence, truth

FORWARD = frozenset({"NF401"})
BACKWARD = frozenset({"NF402"})
FAILED = frozenset({"NF404"})

Body = Callable[[Tensor], Tensor]


class Around(nn.Module):
    """A function of the hidden activations between two linear layers."""

    def __init__(self, body: Body, size: int = 64) -> None:
        super().__init__()
        self.before = nn.Linear(64, 64)
        self.after = nn.Linear(size, 10)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.body(self.before(x)))


def batch() -> tuple[Tensor, Tensor]:
    return digits().batch(torch.Generator().manual_seed(0))


def classifier(model: Callable[[], nn.Module], x: Tensor | None = None) -> Built:
    """A model with the cross-entropy of one batch of digits."""
    torch.manual_seed(0)
    made = model().train()
    inputs, y = batch()
    inputs = inputs if x is None else x

    def loss(m: nn.Module) -> Tensor:
        return functional.cross_entropy(cast(Tensor, m(inputs)).float(), y)

    return made, loss


def around(body: Body) -> Callable[[], Built]:
    return lambda: classifier(lambda: Around(body))


def twins_apart() -> Built:
    """Contrastive distance of pairs of which one is the same picture twice: the root of zero."""
    torch.manual_seed(0)
    model = mlp(nn.ReLU, 3, 64, HE)
    x, _ = batch()
    other = torch.cat([x[:1], x[1:].roll(1, 0)])

    def loss(m: nn.Module) -> Tensor:
        return (m(x) - m(other)).square().sum(1).sqrt().mean()

    return model, loss


def log_of_relu() -> Built:
    """The logarithm of a ReLU that is closed."""
    torch.manual_seed(0)
    model = nn.Sequential(mlp(nn.ReLU, 3, 64, HE), nn.ReLU())
    x, _ = batch()
    return model, lambda m: -(m(x).log()).mean()


def likelihood() -> Built:
    """A Gaussian likelihood whose variance is exp of an output that is too large."""
    torch.manual_seed(0)
    model = initialised(mlp(nn.ReLU, 4, 64, HE), scaled_normal(20.0))
    x, y = batch()

    def loss(m: nn.Module) -> Tensor:
        mean, log_variance = cast(Tensor, m(x))[:, :1], cast(Tensor, m(x))[:, 1:2]
        return (log_variance + (y[:, None] - mean).square() / log_variance.exp()).mean()

    return model, loss


def masked_attention(x: Tensor) -> Tensor:
    """A softmax over positions that are all masked."""
    scores = (x @ x.T).masked_fill(torch.ones(len(x), len(x)).tril(-1).T == 0, -math.inf)
    return scores.softmax(-1) @ x


def unit_length(x: Tensor) -> Tensor:
    """Normalise rows of which one is zero."""
    x = x * (torch.arange(len(x)) > 0)[:, None]
    return x / x.norm(dim=1, keepdim=True)


def angle(x: Tensor) -> Tensor:
    """The angle of a vector to itself: acos at 1 has an infinite slope."""
    unit = functional.normalize(x, dim=1)
    cosine = unit @ unit[:1].T
    first = torch.arange(len(x))[:, None] == 0
    # Exactly 1 however its sum was rounded: above 1, the clamp would pass nothing.
    return x * torch.acos(torch.where(first, cosine / cosine.detach(), cosine).clamp(-1, 1))


def masked_root(x: Tensor) -> Tensor:
    """torch.where hides the NaN of the root from the forward pass and not from the backward."""
    return torch.where(x > 0, x.sqrt(), torch.zeros_like(x))


def poisoned(value: float) -> nn.Module:
    """A checkpoint with one weight that is not a number."""
    model = mlp(nn.ReLU, 4, 64, HE)
    with torch.no_grad():
        cast(nn.Linear, model[4]).weight[3, 5] = value
    return model


def missing_value() -> Tensor:
    """A batch with a missing measurement."""
    x, _ = batch()
    x[7, 20] = math.nan
    return x


class Overwriting(nn.Module):
    """Changes in place what the backward of exp still needs."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.before(x).exp()
        return self.after(hidden.add_(1.0))


class WrongShape(torch.autograd.Function):
    """A custom function whose backward returns a gradient of the wrong shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0][:, :3]


class Raising(torch.autograd.Function):
    """A custom function whose backward is not written yet."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise NotImplementedError("backward of the custom kernel")


def half_precision(gain: float, depth: int, scale: float) -> Built:
    """A float16 network; its loss times `scale`, as a mean over many tokens makes it."""
    torch.manual_seed(0)
    model = initialised(mlp(nn.ReLU, depth, 64, HE), scaled_normal(gain)).half()
    x, y = batch()
    return model, lambda m: functional.cross_entropy(m(x.half()).float(), y) * scale


class Detached(nn.Module):
    """An encoder whose output is detached by mistake."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = without_head(mlp(nn.ReLU, 3, 64, HE))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).detach())


class Argmax(nn.Module):
    """Hard quantisation in the middle: no derivative passes an index."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(64, 32)
        self.codes = nn.Embedding(32, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.codes(self.encoder(x).argmax(-1)))


def xlstm() -> nn.Module:
    """transformers 5.23.0's xLSTM changes a tensor in place that its backward needs."""
    return hf.xLSTMForCausalLM(
        hf.xLSTMConfig(
            vocab_size=500,
            hidden_size=64,
            num_blocks=4,
            num_heads=2,
            mode="train",
            chunk_size=16,
            qk_dim_factor=1.0,
        )
    )


def value_cases() -> tuple[Case, ...]:
    """Every fault of this file, with the findings that name it."""

    def one(
        name: str,
        family: str,
        build: Callable[[], tuple[nn.Module, Loss]],
        codes: frozenset[str],
        causes: frozenset[str] = frozenset(),
        verdict: str = "broken",
    ) -> Case:
        record = truth().get(name)
        return Case(name, family, build, verdict, causes, codes, truth=evidence(record) if record else "")

    def forward(name: str, build: Callable[[], Built]) -> Case:
        return one(name, "not finite", build, FORWARD)

    def backward(name: str, build: Callable[[], Built]) -> Case:
        return one(name, "not finite", build, BACKWARD)

    def failed(name: str, build: Callable[[], Built]) -> Case:
        return one(name, "failed backward", build, FAILED)

    precision = frozenset({"precision"})
    unused = frozenset({"UP501"})
    return (
        backward("distance of twins: root of 0", twins_apart),
        one("where over a root of negative numbers", "not finite", around(masked_root), FORWARD | BACKWARD),
        backward("acos at 1", around(angle)),
        forward("log of a closed relu", log_of_relu),
        forward("0 / 0 in a normalisation", around(unit_length)),
        forward("softmax over masked positions", around(masked_attention)),
        forward("exp overflows", around(lambda x: (x * 1000).exp())),
        forward("root of a negative number", around(lambda x: x.sqrt())),
        one("variance from exp of a large output", "not finite", likelihood, FORWARD | BACKWARD),
        forward("deviation of one sample", around(lambda x: x / x[:1].std(0))),
        forward("a weight is NaN", lambda: classifier(lambda: poisoned(math.nan))),
        forward("a weight is infinite", lambda: classifier(lambda: poisoned(math.inf))),
        forward("an input is NaN", lambda: classifier(lambda: mlp(nn.ReLU, 4, 64, HE), missing_value())),
        one(
            "float16 overflows forward", "precision", lambda: half_precision(30.0, 8, 1.0), FORWARD, precision
        ),
        one(
            "float16 gradients underflow",
            "precision",
            lambda: half_precision(math.sqrt(2), 8, 1e-6),
            frozenset({"NF403"}),
            precision,
            "broken",
        ),
        failed("in-place change", lambda: classifier(Overwriting)),
        failed("custom gradient of the wrong shape", around(lambda x: cast(Tensor, WrongShape.apply(x)))),
        failed("custom gradient raises", around(lambda x: cast(Tensor, Raising.apply(x)))),
        failed("xlstm, as shipped in 5.23.0", lambda: built(xlstm, tokens)),
        one("a detached encoder", "no gradient", lambda: classifier(Detached), unused, verdict="sick"),
        one("argmax in the middle", "no gradient", lambda: classifier(Argmax), unused, verdict="sick"),
    )


def observed(case: Case) -> dict[str, Any]:
    """What torch alone shows of a case: one plain forward and backward."""
    model, loss = case.build()
    value = loss(model)
    record: dict[str, Any] = {"verdict": "sick", "loss": str(value.item())}
    try:
        value.backward()
    except Exception as error:
        return record | {"backward": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    gradients = [p.grad for p in model.parameters()]
    present = [g for g in gradients if g is not None]
    return record | {
        "parameters": len(gradients),
        "without_gradient": len(gradients) - len(present),
        "not_finite": sum(not bool(g.isfinite().all()) for g in present),
        "zero": sum(not bool(g.any()) for g in present),
        "zero_share": sum(int((g == 0).sum()) for g in present) / max(1, sum(g.numel() for g in present)),
    }
