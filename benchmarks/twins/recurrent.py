"""Recurrences over 24 to 200 steps: tanh, LSTM and GRU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.twins import faults
from benchmarks.twins.case import Case, Make, Plant
from benchmarks.twins.data import Task, rows, tones

DOWN, UP, DECOY = "vanishing", "exploding", "decoy"
HIDDEN = 32


class Reader(nn.Module):
    """Reads a sequence and answers after its last step."""

    def __init__(self, cell: type[nn.RNNBase], inputs: int, classes: int, memory: int) -> None:
        super().__init__()
        self.rec = cell(inputs, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, classes)
        for name, p in self.rec.named_parameters():
            if "bias" in name:
                nn.init.zeros_(p)
            elif "weight_hh" in name:
                for gate in p.data.chunk(len(p) // HIDDEN):
                    nn.init.orthogonal_(gate)
        if not isinstance(self.rec, nn.RNN):
            self._chrono(memory)

    @torch.no_grad()
    def _chrono(self, memory: int) -> None:
        """Gates open for times spread over the sequence (Tallec and Ollivier 2018, arXiv 1804.11188)."""
        kept = torch.log(1 + torch.rand(HIDDEN) * (memory - 2))
        self.rec.bias_ih_l0[HIDDEN : 2 * HIDDEN] = kept
        if isinstance(self.rec, nn.LSTM):
            self.rec.bias_ih_l0[:HIDDEN] = -kept

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rec(x)[0][:, -1])


def _reader(cell: type[nn.RNNBase], task: Callable[[], Task], memory: int) -> Make:
    inputs = task().held_out[0].shape[-1]
    classes = int(task().held_out[1].max()) + 1
    return lambda: Reader(cell, inputs, classes, memory)


def recurrent() -> Iterator[Case]:
    tanh: dict[str, tuple[str, Plant]] = {
        "recurrence x 0.3": (DOWN, faults.recurrent_weights(0.3)),
        "recurrence N(0, 0.01)": (DOWN, faults.recurrent_noise(0.01)),
        "torch's default initialisation": (DOWN, faults.recurrent_default),
        "recurrence x 4": (UP, faults.recurrent_weights(4.0)),
    }
    gated: dict[str, tuple[str, Plant]] = {
        "gates that forget": (DOWN, faults.gate_bias(-4.0)),
        "torch's default initialisation": (DOWN, faults.recurrent_default),
        "recurrence x 8": (UP, faults.recurrent_weights(8.0)),
    }
    none: dict[str, tuple[str, Plant]] = {"nothing": (DECOY, faults.unchanged)}
    settings: list[tuple[str, type[nn.RNNBase], dict[str, tuple[str, Plant]], tuple[int, ...], float]] = [
        ("tanh rnn", nn.RNN, tanh, (16, 24, 40, 64), 3e-3),
        ("lstm", nn.LSTM, gated, (24, 64, 120, 200), 1e-2),
        ("gru", nn.GRU, gated, (24, 64), 1e-2),
        ("lstm", nn.LSTM, none, (48,), 1e-2),
    ]
    for name, cell, planted, times, lr in settings:
        for time in times:

            def task(time: int = time) -> Task:
                return rows(time)

            yield from _each(f"{name} on rows, T={time}", _reader(cell, task, time), planted, task, lr)

    def fifty() -> Task:
        return tones(50)

    yield from _each("gru on tones, T=50", _reader(nn.GRU, fifty, 50), gated, fifty, 1e-2)
    some = {name: tanh[name] for name in ("recurrence x 0.3", "recurrence x 4")}
    yield from _each("tanh rnn on tones, T=50", _reader(nn.RNN, fifty, 50), some, fifty, 3e-3)


def _each(
    model: str, make: Make, planted: dict[str, tuple[str, Plant]], task: Callable[[], Task], lr: float
) -> Iterator[Case]:
    for fault, (kind, plant) in planted.items():
        yield Case(f"{model} / {fault}", "rnn", make, plant, task, kind, lr=lr, steps=100, clip=1.0)
