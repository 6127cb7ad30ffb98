"""`--optimizer adamw:3e-4`: the rule and the learning rate of the user's training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch
    from torch import nn

# By name, so that help needs no torch: those whose first step is known in closed form.
RULES = ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam")


@dataclass(frozen=True)
class OptimizerSpec:
    """A rule of `torch.optim`, with a learning rate or with torch's default."""

    name: str
    lr: float | None

    @classmethod
    def at_rate(cls, spec: OptimizerSpec | None, lr: float) -> OptimizerSpec:
        """`--lr`: the rate of the given rule, or of plain SGD.

        Raises:
            click.UsageError: the rule has its rate already.
        """
        if spec is not None and spec.lr is not None:
            raise click.UsageError(f"two learning rates: --optimizer {spec.name}:{spec.lr:g} and --lr {lr:g}")
        return cls("SGD" if spec is None else spec.name, lr)

    def make(self, model: nn.Module) -> torch.optim.Optimizer:
        import torch

        rule = getattr(torch.optim, self.name)
        return rule(model.parameters()) if self.lr is None else rule(model.parameters(), lr=self.lr)


class OptimizerType(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]  # generic from click 8.4
    """Parses `NAME[:LR]`."""

    name = "optimizer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> OptimizerSpec:
        name, _, rate = str(value).partition(":")
        rules = {rule.lower(): rule for rule in RULES}
        if name.lower() not in rules:
            self.fail(f"{name!r} is none of {', '.join(RULES)}; type for example adamw:3e-4", param, ctx)
        try:
            lr = float(rate) if rate else None
        except ValueError:
            self.fail(f"{rate!r} is no learning rate; type for example {name}:3e-4", param, ctx)
        return OptimizerSpec(rules[name.lower()], lr)
