"""The sick zoo: faults that training showed to do harm. What turned out harmless goes to the healthy side."""

from __future__ import annotations

from dataclasses import replace

from gallery.case import Built, Case
from gallery.sick_blocks import block_trials
from gallery.sick_layers import layer_trials
from gallery.sick_losses import loss_trials
from gallery.sick_values import value_cases
from gallery.trial import Trial, truth


def trials() -> tuple[Trial, ...]:
    """Every fault whose effect training decides."""
    return (*layer_trials(), *loss_trials(), *block_trials())


def sick() -> tuple[Case, ...]:
    """Cases that must be found sick."""
    return (*(case for case in _tried() if case.sick), *units(), *value_cases())


def harmless() -> tuple[Case, ...]:
    """Faults that did no harm: saying anything of them is a false alarm."""
    return tuple(case for case in _tried() if not case.sick)


def units() -> tuple[Case, ...]:
    """A sick network stays sick when its loss is in another unit."""

    def scaled(case: Case, factor: float) -> Case:
        def build() -> Built:
            model, loss = case.build()
            return model, lambda m: loss(m) * factor

        return replace(case, name=f"{case.name}, loss x {factor:g}", build=build)

    rescaled = {"sigmoid Xavier, 10 layers": (1e-8, 65536.0), "relu, 2.5 x He, 12 layers": (1e-8, 65536.0)}
    return tuple(
        scaled(case, factor) for case in _tried() for factor in rescaled.get(case.name, ()) if case.sick
    )


def _tried() -> tuple[Case, ...]:
    return tuple(t.case() for t in trials() if truth().get(t.name, {}).get("verdict") in ("sick", "healthy"))
