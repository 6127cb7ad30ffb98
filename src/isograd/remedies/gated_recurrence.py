"""gated-recurrence: a GRU or LSTM in the place of a plain RNN, with the same interface.

What it does
    Exchanges `nn.RNN` for `nn.GRU`, or for an LSTM that is called like an RNN, and `nn.RNNCell` for `nn.GRUCell`, of the
    same sizes. Their gates start so that memories last for 1 to T steps, T the length of the sequences seen (chrono
    initialisation; torch's second bias of each gate is set to 0, or it would count twice).

When it helps
    A plain recurrence multiplies the gradient by the same matrix and by a slope below 1 at every step. A gate that
    stays open passes it on unchanged.

Expected effect
    Units forget at rates spread over 1/T … 1: the gradient at a lag of T falls to about 0.2, where a tanh RNN
    as torch draws it keeps 0.51^T. Without the biases a GRU keeps 0.63^T: gates alone are no cure.

Safety
    Unsafe: another function with three or four times the parameters; the RNN's weights are lost.

References
    Hochreiter and Schmidhuber 1997; Cho et al. 2014, arXiv:1406.1078; Tallec and Ollivier 2018, arXiv:1804.11188.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from isograd.edit import Edit, Value
from isograd.flow import Flow
from isograd.layers import Layer, layers, recurrent, steps_of
from isograd.prescription import Patient, Prescription, Reach, not_applicable

SLUG = "gated-recurrence"
TREATS = ("ungated-recurrence", "RN601", "RN602", "VG101", "EG201")
DECADES = -0.71
"""log10 of sqrt(E f^2T) for f = u / (1 + u), u uniform in [1, T - 1], as T grows: the integral of exp(-2/x) over [0, 1]."""


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """A GRU in place of every RNN, and the same with an LSTM."""
    modules = dict(patient.model.named_modules())
    rnns = {name: m for name, m in modules.items() if isinstance(m, nn.RNN)}
    cells = {name: m for name, m in modules.items() if isinstance(m, nn.RNNCell)}
    if not rnns and not cells:
        gated = any(isinstance(m, nn.LSTM | nn.GRU | nn.LSTMCell | nn.GRUCell) for m in modules.values())
        written = recurrent(layers(patient.flow, patient.model))
        if written and not gated:
            yield _by_hand(written[0], patient.flow)
            return
        yield not_applicable(
            SLUG, "the recurrence is gated already" if gated else "there is no nn.RNN or nn.RNNCell"
        )
        return
    for kind in ("GRU", "LSTM"):
        edits = [e for name, rnn in rnns.items() for e in _layer(kind, name, rnn, patient.flow)]
        if kind == "LSTM" and cells:
            continue  # its second state would have to go through the user's loop
        edits += [e for name, cell in cells.items() for e in _cell(name, cell, patient.flow)]
        yield Prescription(
            SLUG,
            f"{kind} in place of {len(rnns) + len(cells)} plain recurrences, open for the length of the sequence",
            tuple(edits),
            reach=Reach.GATING,
            treats=TREATS,
            expected=f"{DECADES:+.1f} decades at a lag of a whole sequence",
            decades=DECADES,
            references=("Cho et al. 2014, arXiv:1406.1078", "Tallec and Ollivier 2018, arXiv:1804.11188"),
            advice=(
                "code that carries h_n to the next chunk of a sequence loses the LSTM's cell state; a GRU has none",
            )
            if kind == "LSTM"
            else (),
        )


def _by_hand(state: Layer, flow: Flow) -> Prescription:
    line = next((s.source for s in flow.sites if s.module == state.module and s.source), state.module)
    return not_applicable(
        SLUG,
        "the recurrence is a loop of your own",
        f"{line}: h = cell(x_t, h) in place of this step, with cell = nn.GRUCell(inputs, {state.fan_out})",
    )


def _layer(kind: str, name: str, rnn: nn.RNN, flow: Flow) -> Iterator[Edit]:
    sizes: dict[str, Value] = {
        "input_size": rnn.input_size,
        "hidden_size": rnn.hidden_size,
        "num_layers": rnn.num_layers,
        "bias": bool(rnn.bias),
        "batch_first": rnn.batch_first,
        "dropout": rnn.dropout,
        "bidirectional": rnn.bidirectional,
    }
    of = "nn.GRU" if kind == "GRU" else "recurrences.LSTM"
    yield Edit(name, "replace", of, sizes, before=str(rnn))
    if rnn.bias:
        yield Edit(name, "alter", "surgery.chrono_", {"steps": steps_of(flow, name, rnn)})


def _cell(name: str, cell: nn.RNNCell, flow: Flow) -> Iterator[Edit]:
    sizes: dict[str, Value] = {
        "input_size": cell.input_size,
        "hidden_size": cell.hidden_size,
        "bias": bool(cell.bias),
    }
    yield Edit(name, "replace", "nn.GRUCell", sizes, before=str(cell))
    if cell.bias:
        yield Edit(name, "alter", "surgery.chrono_", {"steps": steps_of(flow, name, cell)})
