"""orthogonal-recurrence: the recurrent matrix of an RNN is held orthogonal, or at spectral norm 1.

What it does
    Parametrizes `weight_hh` of every `nn.RNN` and `nn.RNNCell`, or the linear layer that a loop of yours applies to its
    state: orthogonal, starting at the orthogonal matrix nearest to what is there, or divided by its largest singular
    value. It stays so in training. An `nn.RNN` then reads its weights at each call, which torch's own does not.

When it helps
    The same matrix multiplies the gradient at every step: a spectral radius r leaves r^T of it. Orthogonal, it
    neither grows nor shrinks; at spectral norm 1 it cannot grow.

Expected effect
    A factor of at most 1 a step. What is left is the activation's slope: near 1 for a tanh whose input is small.

Safety
    Unsafe: another function. The parameter is called `parametrizations.weight_hh_l0.original` from then on.

References
    Arjovsky et al. 2016, arXiv:1511.06464; Vorontsov et al. 2017, arXiv:1702.00071; Lezcano-Casado and Martínez-Rubio 2019,
    arXiv:1901.08428; Miyato et al. 2018, arXiv:1802.05957.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.utils import parametrize

from isograd.edit import Edit
from isograd.layers import layers, recurrent
from isograd.prescription import Patient, Prescription, Reach, not_applicable

SLUG = "orthogonal-recurrence"
TREATS = ("ungated-recurrence", "RN601", "RN602", "VG101", "EG201")


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """Orthogonal first: it treats both directions; then the spectral norm, which treats growth only."""
    modules = dict(patient.model.named_modules())
    plain = [
        n
        for n, m in modules.items()
        if isinstance(m, nn.RNN | nn.RNNCell) and not parametrize.is_parametrized(m)
    ]
    if not plain:
        states = recurrent(layers(patient.flow, patient.model))
        plain = [la.module for la in states if isinstance(modules[la.module], nn.Linear)]
    if not plain:
        gated = any(isinstance(m, nn.LSTM | nn.GRU | nn.LSTMCell | nn.GRUCell) for m in modules.values())
        yield not_applicable(
            SLUG,
            "the recurrence is gated: its gates and not one matrix decide what a step keeps"
            if gated
            else "there is no nn.RNN, nn.RNNCell or loop over a linear layer with a free recurrent matrix",
        )
        return
    for of, what, expected, reference in (
        (
            "recurrences.keep_orthogonal",
            "held orthogonal",
            "a factor of 1 a step, times the activation's slope",
            "Lezcano-Casado and Martínez-Rubio 2019, arXiv:1901.08428",
        ),
        (
            "recurrences.keep_spectral_norm",
            "held at spectral norm 1",
            "a factor of at most 1 a step",
            "Miyato et al. 2018, arXiv:1802.05957",
        ),
    ):
        yield Prescription(
            SLUG,
            f"the recurrent matrix of {len(plain)} recurrences {what}",
            tuple(Edit(name, "alter", of) for name in plain),
            reach=Reach.NORMALISATION,  # after the weights are filled: then they are computed
            treats=TREATS,
            expected=expected,
            references=(reference,),
        )
