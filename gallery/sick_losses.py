"""Faults where the head, the loss and the target do not fit: no gradient leaves the loss, or the wrong one."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn import functional

from gallery.nets import HE, mlp, without_head
from gallery.training import Loss, Score, Task, accuracy, cross_entropy, digits, explained
from gallery.trial import Make, Trial, Twin

HEAD = frozenset({"head"})
NO_GRADIENT = frozenset({"VG102"})


def one_unit() -> nn.Sequential:
    """Three layers of ReLU and one output."""
    return nn.Sequential(*without_head(mlp(nn.ReLU, 3, 64, HE)), nn.Linear(64, 1))


def larger() -> Task:
    """Is the digit above 4? Targets 0 or 1, shape (batch, 1)."""
    plain = digits()

    def sample(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = plain.batch(generator)
        return x, (y > 4).float()[:, None]

    x, y = plain.held_out
    return Task("digit above 4", 0.5, sample, (x, (y > 4).float()[:, None]))


def diabetes(sign: float = 1.0) -> Task:
    """scikit-learn's disease progression, 25 to 346, from ten standardised features."""
    raw, progression = load_diabetes(return_X_y=True)
    x = torch.tensor(raw / raw.std(), dtype=torch.float32)
    y = sign * torch.tensor(progression, dtype=torch.float32)[:, None]
    kept = torch.arange(len(x)) % 4 != 3

    def sample(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(int(kept.sum()), (64,), generator=generator)
        return x[kept][rows], y[kept][rows]

    return Task("diabetes", 0.0, sample, (x[~kept], y[~kept]))


def negative_diabetes() -> Task:
    return diabetes(-1.0)


def regressor(*last: nn.Module) -> Make:
    return lambda: nn.Sequential(
        nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1), *last
    )


def thresholded(bound: float) -> Score:
    """Accuracy of a yes/no answer at a bound on the output."""

    def score(model: nn.Module, x: Tensor, y: Tensor) -> float:
        return ((cast(Tensor, model(x)) > bound).float() == y).float().mean().item()

    return score


def with_logits(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(cast(Tensor, model(x)), y)


def bce(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return functional.binary_cross_entropy(cast(Tensor, model(x)), y)


def mse(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return functional.mse_loss(cast(Tensor, model(x)), y)


def log_of_clamped(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """-log of a softmax clipped at 1e-7, written by hand: no gradient where the clip holds."""
    probabilities = cast(Tensor, model(x)).softmax(-1).clamp(1e-7, 1 - 1e-7)
    return -probabilities.gather(1, y[:, None]).log().mean()


def rounded(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The error of the rounded answer: its derivative is zero everywhere."""
    return functional.mse_loss(cast(Tensor, model(x)).round(), y)


def hard_accuracy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """1 - accuracy, made of a sign that has no derivative."""
    return (1 - torch.sign(cast(Tensor, model(x))) * (2 * y - 1)).mean() / 2


def far_from_target(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Answers clamped to [0, 1] for targets in the hundreds."""
    return functional.mse_loss(cast(Tensor, model(x)).add(3).clamp(0, 1), y)


def only_class(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy over one class: always 0."""
    return functional.cross_entropy(cast(Tensor, model(x)), torch.zeros(len(x), dtype=torch.long))


def loud_head(model: nn.Sequential) -> nn.Sequential:
    """Logits in the thousands, so that a softmax or sigmoid behind them saturates."""
    with torch.no_grad():
        cast(nn.Linear, model[-1]).weight.mul_(1e4)
    return model


def loss_trials() -> tuple[Trial, ...]:
    """Heads that do not fit, beside the same network with the head that does."""
    yes_no = Twin("one logit", one_unit, with_logits)
    ten = Twin("ten logits", lambda: mlp(nn.ReLU, 3, 64, HE))
    number = Twin("one number", regressor(), mse)

    def above(name: str, make: Make, loss: Loss, bound: float) -> Trial:
        return Trial(
            name, "head", make, yes_no, larger, "broken", HEAD, NO_GRADIENT, loss, score=thresholded(bound)
        )

    def classes(name: str, make: Make, loss: Loss = cross_entropy) -> Trial:
        return Trial(name, "head", make, ten, digits, "broken", HEAD, NO_GRADIENT, loss, score=accuracy)

    def value(name: str, make: Make, loss: Loss = mse, task: Callable[[], Task] = diabetes) -> Trial:
        return Trial(name, "head", make, number, task, "broken", HEAD, NO_GRADIENT, loss, score=explained)

    def ended(last: nn.Module) -> Make:
        return lambda: one_unit().append(last)

    return (
        above("softmax over one unit, binary cross-entropy", ended(nn.Softmax(-1)), bce, 0.5),
        above("softmax over one unit, squared error", ended(nn.Softmax(-1)), mse, 0.5),
        above("cross-entropy over one class", one_unit, only_class, 0.5),
        above("sigmoid before a loss with logits", ended(nn.Sigmoid()), with_logits, 0.5),
        above(
            "saturated sigmoid, squared error", lambda: loud_head(one_unit()).append(nn.Sigmoid()), mse, 0.5
        ),
        above("layer norm over one unit", ended(nn.LayerNorm(1)), with_logits, 0.0),
        above("a sign in the loss", one_unit, hard_accuracy, 0.0),
        classes("softmax before cross-entropy", lambda: mlp(nn.ReLU, 3, 64, HE).append(nn.Softmax(-1))),
        classes(
            "saturated softmax before cross-entropy",
            lambda: loud_head(mlp(nn.ReLU, 3, 64, HE)).append(nn.Softmax(-1)),
        ),
        classes(
            "log of a clipped, saturated softmax", lambda: loud_head(mlp(nn.ReLU, 3, 64, HE)), log_of_clamped
        ),
        classes("sigmoid before cross-entropy", lambda: mlp(nn.ReLU, 3, 64, HE).append(nn.Sigmoid())),
        classes("relu before cross-entropy", lambda: mlp(nn.ReLU, 3, 64, HE).append(nn.ReLU())),
        value("sigmoid output for targets in the hundreds", regressor(nn.Sigmoid())),
        value("tanh output for targets in the hundreds", regressor(nn.Tanh())),
        value("softmax output for targets in the hundreds", regressor(nn.Softmax(-1))),
        value("relu output for negative targets", regressor(nn.ReLU()), mse, negative_diabetes),
        value("a rounded answer", regressor(), rounded),
        value("a clamped answer", regressor(), far_from_target),
    )
