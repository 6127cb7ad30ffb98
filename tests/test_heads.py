"""Heads, losses and targets that do not fit are named before any layer is blamed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from isograd import check
from tests.models import Apply, Built

X = torch.linspace(-1, 1, 8 * 16).reshape(8, 16)
CLASSES, BINARY = torch.arange(8) % 4, (torch.arange(8) % 2).float().unsqueeze(1)


def headed(
    width: int, loss: Callable[[Tensor], Tensor], output: Callable[[Tensor], Tensor] = torch.clone
) -> Built:
    """Two layers, `width` outputs and an output function inside the model; `loss` gets what it returns."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, width), Apply(output))
    return model, lambda m: loss(m(X))


def clipped_log(p: Tensor) -> Tensor:
    """Keras: the answer sums to one and is clipped before its logarithm is taken."""
    p = (p / p.sum(-1, keepdim=True)).clamp(1e-7, 1 - 1e-7)
    return -(functional.one_hot(CLASSES) * p.log()).sum(-1).mean()


def both_logs(p: Tensor) -> Tensor:
    p = p.clamp(1e-7, 1 - 1e-7)
    return -(BINARY * p.log() + (1 - BINARY) * (1 - p).log()).mean()


def aligned(p: Tensor) -> Tensor:
    """The rows of the batch as the steps of one sequence that says 1, 2."""
    return functional.ctc_loss(p, torch.tensor([1, 2]), torch.tensor(len(p)), torch.tensor(2))


MISFITS: dict[str, Callable[[], Built]] = {
    "softmax, then cross_entropy": lambda: headed(4, lambda p: functional.cross_entropy(p, CLASSES), lambda x: x.softmax(-1)),
    "softmax over one unit": lambda: headed(1, lambda p: functional.binary_cross_entropy(p, BINARY), lambda x: x.softmax(-1)),
    "softmax over one unit, mse": lambda: headed(1, lambda p: functional.mse_loss(p, BINARY), lambda x: x.softmax(-1)),
    "cross_entropy over one unit": lambda: headed(1, lambda p: functional.cross_entropy(p, CLASSES * 0)),
    "sigmoid, then with_logits": lambda: headed(1, lambda p: functional.binary_cross_entropy_with_logits(p, BINARY), torch.sigmoid),
    "sigmoid, then cross_entropy": lambda: headed(4, lambda p: functional.cross_entropy(p, CLASSES), torch.sigmoid),
    "relu, then cross_entropy": lambda: headed(4, lambda p: functional.cross_entropy(p, CLASSES), torch.relu),
    "softmax, then nll_loss": lambda: headed(4, lambda p: functional.nll_loss(p, CLASSES), lambda x: x.softmax(-1)),
    "logits, then nll_loss": lambda: headed(4, lambda p: functional.nll_loss(p, CLASSES)),
    "softmax, then ctc_loss": lambda: headed(4, aligned, lambda x: x.softmax(-1)),
    "softmax, then log_softmax by hand": lambda: headed(4, lambda p: functional.nll_loss(p.log_softmax(-1), CLASSES), lambda x: x.softmax(-1)),
    "sigmoid, then logsigmoid by hand": lambda: headed(1, lambda p: -functional.logsigmoid(p).mean(), torch.sigmoid),
    "sigmoid for targets up to 50": lambda: headed(1, lambda p: functional.mse_loss(p, BINARY * 50), torch.sigmoid),
    "relu for negative targets": lambda: headed(1, lambda p: functional.l1_loss(p, BINARY * 9 - 5), torch.relu),
    "tanh for targets up to 50, by hand": lambda: headed(1, lambda p: (p - BINARY * 50).square().mean(), torch.tanh),
    "log of a saturated sigmoid": lambda: headed(1, lambda p: -p.log().mean(), lambda x: torch.sigmoid(x + 12)),
    "clipped output": lambda: headed(1, lambda p: functional.mse_loss(p, BINARY), lambda x: (x + 9).clamp(max=1)),
}  # fmt: skip

FITS: dict[str, Callable[[], Built]] = {
    "logits, cross_entropy": lambda: headed(4, lambda p: functional.cross_entropy(p, CLASSES)),
    "log_softmax, nll_loss": lambda: headed(4, lambda p: functional.nll_loss(p, CLASSES), lambda x: x.log_softmax(-1)),
    "log_softmax, ctc_loss": lambda: headed(4, aligned, lambda x: x.log_softmax(-1)),
    "logits, with_logits": lambda: headed(1, lambda p: functional.binary_cross_entropy_with_logits(p, BINARY)),
    "sigmoid, binary_cross_entropy": lambda: headed(1, lambda p: functional.binary_cross_entropy(p, BINARY), torch.sigmoid),
    "sigmoid for targets of 0 and 1": lambda: headed(1, lambda p: functional.mse_loss(p, BINARY), torch.sigmoid),
    "linear for any target": lambda: headed(1, lambda p: functional.mse_loss(p, BINARY * 50)),
    "softmax for probabilities": lambda: headed(4, lambda p: functional.mse_loss(p, functional.one_hot(CLASSES).float()), lambda x: x.softmax(-1)),
    "relu for positive targets": lambda: headed(1, lambda p: functional.mse_loss(p, BINARY * 50), torch.relu),
    "saturated softmax, clip, log": lambda: headed(4, clipped_log, lambda x: (20 * x).softmax(-1)),
    "saturated softmax, log, nll_loss": lambda: headed(4, lambda p: functional.nll_loss((p + 1e-9).log(), CLASSES), lambda x: (20 * x).softmax(-1)),
    "saturated sigmoid, binary_cross_entropy": lambda: headed(1, lambda p: functional.binary_cross_entropy(p, BINARY), lambda x: (30 * x).sigmoid()),
    "saturated sigmoid, both logarithms by hand": lambda: headed(1, both_logs, lambda x: (30 * x).sigmoid()),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_a_head_that_does_not_fit_is_named_before_the_layers_are_blamed(case: str) -> None:
    diagnosis = check(*MISFITS[case]())
    assert [f.code for f in diagnosis.errors] == ["VG102"]
    assert diagnosis.verdict == "broken"
    (finding,) = diagnosis.errors
    assert finding.evidence["cause"] == "head"
    assert not {"insert-normalisation", "insert-residual"} & set(finding.remedies)


@pytest.mark.parametrize("case", FITS)
def test_a_head_that_fits_is_healthy(case: str) -> None:
    diagnosis = check(*FITS[case]())
    assert diagnosis.errors == ()
    assert "VG102" in diagnosis.healthy


def test_a_sigmoid_that_is_saturated_for_good_is_not_called_dead_below_zero() -> None:
    built = headed(1, lambda p: (p - BINARY).square().mean(), lambda x: torch.sigmoid(x + 40))
    assert "SA302" not in {f.code for f in check(*built).findings}


def test_a_saturated_output_whose_loss_does_not_undo_it_is_an_error() -> None:
    built = headed(1, lambda p: functional.mse_loss(p, BINARY), lambda x: torch.sigmoid(x + 12))
    (finding,) = check(*built).errors
    assert finding.code == "VG102"
    assert "saturated" in finding.message


class Policy(nn.Module):
    """Logits of four actions and a value."""

    def __init__(self, loud: float) -> None:
        super().__init__()
        self.body, self.actor, self.critic = (
            nn.Sequential(nn.Linear(16, 16), nn.Tanh()),
            nn.Linear(16, 4),
            nn.Linear(16, 1),
        )
        with torch.no_grad():
            self.actor.weight.mul_(loud)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.actor(h), self.critic(h)


def advantage(m: nn.Module) -> Tensor:
    """Expected advantage of the policy, whose own probability of the right action is the baseline."""
    logits, value = m(X)
    p, sure = logits.softmax(-1).detach(), logits.log_softmax(-1)
    right = functional.one_hot(CLASSES, 4)
    reward = (p * right).sum(-1, keepdim=True)
    return -(p * (right - reward) * sure).sum(-1).mean() + (value - reward).square().mean()


@pytest.mark.parametrize(("loud", "found"), [(1.0, False), (1e3, True)])
def test_a_policy_that_is_sure_of_everything_learns_nothing(loud: float, found: bool) -> None:
    torch.manual_seed(0)
    diagnosis = check(Policy(loud), advantage)
    assert ("VG102" in {f.code for f in diagnosis.errors}) == found
    assert (diagnosis.verdict == "healthy") == (not found)


def warming_up(m: nn.Module) -> Tensor:
    """A term whose weight is still zero."""
    logits, value = m(X)
    return value.square().mean() - 0.0 * logits.log_softmax(-1).mean()


def test_a_term_of_the_loss_whose_weight_is_still_zero_is_not_accused() -> None:
    torch.manual_seed(0)
    assert check(Policy(1.0), warming_up).verdict == "healthy"


def squashed(x: Tensor) -> Tensor:
    """The length of each of four capsules, after Sabour et al. 2017."""
    parts = x.unflatten(-1, (4, -1))
    squares = parts.square().sum(-1, keepdim=True)
    return (parts * squares / (1 + squares) / (squares + 1e-8).sqrt()).norm(dim=-1) * 4


@pytest.mark.parametrize(("loud", "codes"), [(1.0, []), (300.0, ["VG102"])])
def test_a_function_behind_the_head_that_leaves_the_samples_alike_is_saturated(
    loud: float, codes: list[str]
) -> None:
    model, loss = headed(16, lambda p: functional.cross_entropy(p, CLASSES), squashed)
    with torch.no_grad():
        model[2].weight.mul_(loud)  # pyright: ignore
    assert [f.code for f in check(model, loss).errors] == codes


def test_a_temperature_is_no_saturation() -> None:
    """It costs decades, and all that tells the samples apart is left: what is named is the factor."""
    cold, mild = (
        check(*headed(4, lambda p: functional.cross_entropy(p, CLASSES), lambda x, c=c: x / c))
        for c in (1e6, 8)
    )
    assert [f.evidence["cause"] for f in cold.errors] == ["factor"]
    assert mild.verdict == "healthy"
