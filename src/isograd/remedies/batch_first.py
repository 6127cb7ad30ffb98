"""batch-first: recurrences and attentions take the first axis for the samples.

What it does
    Sets `batch_first` of nn.RNN, nn.LSTM, nn.GRU, nn.MultiheadAttention and nn.Transformer to True.

When it helps
    They expect (step, sample, feature) as they are made, and take (sample, step, feature) without a word: the samples of a
    batch are then read as one sequence.

Expected effect
    No sample's answer depends on another's. GRUs and LSTMs of digits go from 0.47 to 0.56 of the samples right after 300 steps
    to 0.86 to 0.97.

Safety
    Unsafe: the model computes another function. Hidden states that are kept from one call to the next have the same
    layout as before, (layer, sample, feature).

References
    PyTorch, nn.LSTM and nn.MultiheadAttention, batch_first.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from isograd.edit import Edit
from isograd.prescription import Patient, Prescription, Reach, not_applicable
from isograd.symptoms.mixed_samples import mixing

SLUG = "batch-first"
TREATS = ("layout", "RN604")
Running = nn.RNNBase | nn.MultiheadAttention | nn.Transformer


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """One edit a layer, of all that have the setting."""
    edits = tuple(
        Edit(f"{name}.batch_first".lstrip("."), "set", arguments={"value": True}, before="False")
        for name, module in patient.model.named_modules()
        if isinstance(module, Running) and not module.batch_first
    )
    if not edits or not mixing(patient.flow):
        yield not_applicable(SLUG, "nothing that runs along time is seen to run over the samples")
        return
    yield Prescription(
        SLUG,
        f"batch_first for {len(edits)} layers",
        edits,
        reach=Reach.TRAINING,
        treats=TREATS,
        expected="the samples of a batch are told apart from the steps of a sequence",
        references=("PyTorch, nn.LSTM, batch_first",),
    )
