"""What remedies make of recurrences: weights that are held orthogonal or at norm 1, an LSTM that is called like an RNN.

Plain torch, so that `to_code` can print these functions and classes into the user's own script.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class RNN(nn.RNN):
    """`nn.RNN` whose weights may be parametrized.

    torch's own reads its weights once, when they are assigned, and goes on with the tensors of that moment: under a
    parametrization the optimizer's steps would have no effect.
    """

    @property
    def _flat_weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, _: list[Tensor]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        pass


def recurrent_weights(module: nn.Module) -> list[str]:
    """Of an `nn.RNN` or `nn.RNNCell`; of a linear layer that a loop applies to the state, its weight."""
    names = [name for name, _ in module.named_parameters(recurse=False)]
    return [name for name in names if name.startswith("weight_hh")] or ["weight"]


def keep_orthogonal(rnn: nn.Module) -> None:
    """Hold every recurrent weight of a module to orthogonal matrices, by parametrization.

    Arjovsky et al. 2016, arXiv:1511.06464; Lezcano-Casado and Martínez-Rubio 2019, arXiv:1901.08428. It starts at the
    orthogonal matrix nearest to the weight that is there. The weight is then computed at each call.
    """
    if isinstance(rnn, nn.RNN):
        rnn.__class__ = RNN  # the same module, which reads its weights anew
    for name in recurrent_weights(rnn):
        weight = getattr(rnn, name)
        left, _, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
        weight.data.copy_(left @ right)
        parametrizations.orthogonal(rnn, name)


def keep_spectral_norm(rnn: nn.Module) -> None:
    """Hold the largest singular value of every recurrent weight at 1 (Miyato et al. 2018, arXiv:1802.05957)."""
    if isinstance(rnn, nn.RNN):
        rnn.__class__ = RNN
    for name in recurrent_weights(rnn):
        parametrizations.spectral_norm(rnn, name)


class LSTM(nn.LSTM):
    """`nn.LSTM` that is called like an `nn.RNN`: (x, h_0) -> (output, h_n), with c_0 = 0.

    The cell state stays inside. Code that carries h_n over to the next chunk of a sequence loses it there; a GRU,
    whose state is h alone, does not.
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        state = None if hx is None else (hx, torch.zeros_like(hx))
        output, (hidden, _) = super().forward(input, state)
        return output, hidden
