"""What a case of the zoo is: a model with its loss, and what is known to be true of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

Loss = Callable[[nn.Module], Tensor]
Built = tuple[nn.Module, Loss]


@dataclass(frozen=True)
class Case:
    """A model with a loss whose gradient flow is known."""

    name: str
    family: str
    build: Callable[[], Built]
    """Makes the model and its loss closure; seeded inside, so that every call gives the same pair."""
    verdict: str
    """'healthy', 'vanishing', 'exploding', 'broken', or 'sick': whatever the verdict, one of `codes` is found."""
    causes: frozenset[str] = frozenset()
    """Cause slugs of which the diagnosis must name one; empty: the cause is not asked for."""
    codes: frozenset[str] = frozenset()
    """Codes of which one must be found; empty: any error finding will do."""
    tolerated: frozenset[str] = frozenset()
    """Codes that may be reported as errors of a healthy case: true of it, and no gradient fault along depth."""
    truth: str = ""
    """How the verdict was established."""
    residuals: int | None = None
    """Residual additions on the backbone, counted from the architecture; None: not asked for."""

    @property
    def sick(self) -> bool:
        return self.verdict != "healthy"
