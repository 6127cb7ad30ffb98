"""Real data that comes with the libraries, and one series that is stated in full: nothing is downloaded."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor

BATCH = 64
SMALL_BATCH = 32
"""For pictures."""
WINDOWS = 16
"""Windows of text in a batch."""
HELD_OUT = 400
"""Rows or windows on which a score is taken."""
VOCABULARY = 64
"""Characters of the text task; all rarer ones are one character."""
CONTEXT = 16

Batch = Callable[[torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    """Inputs and integer targets, as batches to train on and held-out rows to score on."""

    batch: Batch
    held_out: tuple[Tensor, Tensor]
    chance: float
    """Share of the most frequent answer: what a model that ignores its input reaches."""


def _task(x: Tensor, y: Tensor, held: Tensor, size: int = BATCH) -> Task:
    seen = (~held).nonzero().flatten()
    score_on = held.nonzero().flatten()[:HELD_OUT]

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = seen[torch.randint(len(seen), (size,), generator=generator)]
        return x[rows], y[rows]

    answers = y[score_on]
    chance = answers.flatten().bincount().max().item() / answers.numel()
    return Task(batch, (x[score_on], answers), chance)


def _digits() -> tuple[Tensor, Tensor, Tensor]:
    raw, labels = load_digits(return_X_y=True)
    x = torch.tensor((raw - raw.mean()) / raw.std(), dtype=torch.float32)
    return x, torch.tensor(labels), torch.arange(len(x)) % 4 == 3


@cache
def digits() -> Task:
    """scikit-learn's 1,797 handwritten digits as 64 standardised numbers; every fourth is held out."""
    return _task(*_digits())


@cache
def images() -> Task:
    """The same digits as 8 x 8 pictures with one channel."""
    x, y, held = _digits()
    return _task(x.view(-1, 1, 8, 8), y, held, SMALL_BATCH)


@cache
def rows(time: int) -> Task:
    """The same digits row by row, 8 steps of 8 numbers, then zeros until `time`: the answer is asked at the end.

    A gradient must reach back over the `time - 8` empty steps.
    """
    x, y, held = _digits()
    empty = torch.zeros(len(x), time - 8, 8)
    return _task(torch.cat([x.view(-1, 8, 8), empty], 1), y, held)


@cache
def tones(time: int) -> Task:
    """Which of four slow tones is it? sin(2 pi (k + 1) t / time + phase) + 0.3 noise, k = 0 … 3, seed 0."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(4, (1600,), generator=generator)
    t = torch.arange(time) / time
    phase = 2 * math.pi * torch.rand(1600, 1, generator=generator)
    clean = torch.sin(2 * math.pi * (y[:, None] + 1) * t + phase)
    noisy = clean + 0.3 * torch.randn(clean.shape, generator=generator)
    return _task(noisy[..., None], y, torch.arange(1600) % 4 == 3)


@cache
def text() -> Task:
    """The next character of Python's standard library: learned on argparse and json, scored on textwrap.

    White space is one blank, or a quarter of all answers would be known from the indentation.
    """
    sources = [" ".join(inspect.getsource(module).split()) for module in (argparse, json, textwrap)]
    common = [character for character, _ in Counter("".join(sources)).most_common(VOCABULARY - 1)]
    number = {character: i for i, character in enumerate(common)}

    def encoded(source: str) -> Tensor:
        return torch.tensor([number.get(character, VOCABULARY - 1) for character in source])

    learned, scored = encoded(sources[0] + sources[1]), encoded(sources[2])

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(learned) - CONTEXT, (WINDOWS,), generator=generator)
        windows = learned[starts[:, None] + torch.arange(CONTEXT + 1)]
        return windows[:, :-1], windows[:, 1:]

    starts = torch.arange(HELD_OUT // 4) * ((len(scored) - CONTEXT) // (HELD_OUT // 4))
    windows = scored[starts[:, None] + torch.arange(CONTEXT + 1)]
    answers = windows[:, 1:]
    chance = answers.flatten().bincount().max().item() / answers.numel()
    return Task(batch, (windows[:, :-1], answers), chance)
