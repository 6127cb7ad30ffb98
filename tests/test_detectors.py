"""Detectors: what each is for, what each must leave alone, and that they go on where they stopped."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gallery.watched import CLEAN, SICK, Watched, readings
from isograd import diagnose, watch
from isograd.cli import main
from isograd.diagnosis import Finding, Severity
from isograd.monitor.baseline import Baseline
from isograd.monitor.detectors import Detectors
from isograd.monitor.reading import ADDED_UP, Reading
from isograd.monitor.seen import seen
from isograd.record import Run
from isograd.record.row import PROCESSES
from isograd.symptoms import STREAMED

LAYERS = 6
SITES = tuple(f"{i}.{kind}" for i in range(LAYERS) for kind in ("weight", "bias"))
SHAPES = tuple((64, 64) if i % 2 == 0 else (64,) for i in range(2 * LAYERS))
NAN = math.nan


@dataclass(frozen=True)
class Step:
    """What a made-up training shows at a step: ten times as much is +1."""

    loss: float = 1.0
    grad: float = 0.0
    slope: float = 0.0
    """Decades of gradient per layer, towards the input negative."""
    weight: float = 1.0
    update: float = -2.5
    early_update: float | None = None
    dead: float = 0.0
    zero: bool = False
    scale: float = 0.0


def made(number: int, step: Step) -> Reading:
    """A training whose layers all look alike, with a little noise that depends on the step alone."""
    noise = 0.05 * math.sin(1.7 * number)
    columns: dict[str, list[float]] = {
        name: [] for name in ("grad_norm", "weight_norm", "update_norm", "nonfinite", "zeros")
    }
    for layer in range(LAYERS):
        delta = step.grad + noise + step.slope * (LAYERS - 1 - layer)
        update = (
            step.early_update if step.early_update is not None and layer < LAYERS // 2 - 1 else step.update
        )
        for matrix in (True, False):
            grad = 10 ** (delta + (math.log10(8) + step.scale if matrix else 0.0))
            last_bias = layer == LAYERS - 1 and not matrix
            columns["grad_norm"].append(0.0 if step.zero and not last_bias else grad)
            columns["weight_norm"].append(10**step.weight if matrix else 0.1)
            columns["update_norm"].append(10 ** (step.weight + update))
            columns["nonfinite"].append(0.0)
            columns["zeros"].append(0.0 if matrix else round(64 * step.dead))
    tensors = {name: torch.tensor(values) for name, values in columns.items()}
    scalars = {"grad_norm": float(tensors["grad_norm"].norm())}
    if not math.isnan(step.loss):
        scalars["loss"] = step.loss
    return Reading(number, SITES, tensors, scalars, shapes=SHAPES)


def told(steps: Sequence[Step | Reading]) -> list[tuple[int, Finding]]:
    detectors = Detectors()
    made_up = [one if isinstance(one, Reading) else made(i, one) for i, one in enumerate(steps)]
    return [(reading.step, finding) for reading in made_up for finding in detectors.observe(reading)]


def codes(steps: Sequence[Step | Reading]) -> set[str]:
    return {finding.code for _, finding in told(steps)}


def falling(count: int, **others: float) -> list[Step]:
    """A healthy course: the loss falls towards a floor."""
    return [Step(loss=0.2 + 2 * math.exp(-i / 60) + 0.02 * math.sin(3.1 * i), **others) for i in range(count)]


def ramp(count: int, of: Callable[[int], Step]) -> list[Step]:
    return [of(i) for i in range(count)]


def exchanged(count: int, blocks: Sequence[int], grad: float = -3.0, high: float = 2.3) -> list[Step]:
    """Data or targets that are others after so many steps, in turn: the loss jumps, and is learned down again."""
    steps: list[Step] = []
    for length in itertools.cycle(blocks):
        steps += [
            Step(high * math.exp(-i / 4) + 0.01, grad=grad + 1.5 * math.exp(-i / 8)) for i in range(length)
        ]
        if len(steps) >= count:
            return steps[:count]
    return steps


LOW = falling(200)[-1]
CASES: dict[str, tuple[list[Step], str]] = {
    "the gradient fades along depth": (
        [replace(step, slope=-1.0, early_update=-5.0) for step in falling(40)],
        "VG103",
    ),
    "the gradient fades, Adam moves the layers, and nothing is learned": (
        [Step(2.3, slope=-1.0)] * 80,
        "VG103",
    ),
    "layers die": (falling(100) + [replace(LOW, zero=True)] * 20, "SA303"),
    "most units of a layer die": (falling(100) + [replace(LOW, loss=1.5, dead=0.9)] * 50, "SA303"),
    "early layers stay": ([replace(step, early_update=-7.0) for step in falling(60)], "UP505"),
    "steps too large from the start": (
        [Step(2.3, update=0.0), Step(20.0, update=0.3), Step(40.0, update=0.0), Step(40.0, update=0.0)],
        "UP506",
    ),
    "steps too small": ([Step(2.3 - 0.001 * i, update=-5.0) for i in range(300)], "UP507"),
    "weights grow": (falling(150) + ramp(80, lambda i: replace(LOW, weight=1 + 0.01 * i)), "UP508"),
    "the gradient grows": (falling(150) + ramp(60, lambda i: replace(LOW, grad=0.05 * i)), "EG203"),
    "the norm drifts": (falling(300) + [Step(loss=0.25, grad=0.7)] * 20, "EG204"),
    "a plateau from the start": ([Step(2.3 + 0.01 * math.sin(2.3 * i)) for i in range(300)], "TR701"),
    "a spike": (falling(200) + [replace(LOW, loss=3.0)] * 10, "TR702"),
    "data in blocks": (exchanged(240, (30, 33, 28)), "TR704"),
    "targets that are renewed": (exchanged(240, (30,)), "TR705"),
    "divergence": (falling(100) + [replace(LOW, loss=30.0, grad=1.0)] * 5, "TR703"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_thing_is_told(name: str) -> None:
    steps, code = CASES[name]
    assert code in codes(steps)


def test_gradients_that_add_up_are_told_and_are_the_cause() -> None:
    steps = falling(100) + [replace(LOW, loss=30.0, grad=1.0)] * 5
    made_up = [replace(made(i, s), notes=(ADDED_UP,) if 0 < i < 3 else ()) for i, s in enumerate(steps)]
    found = [(step, f.code, f.evidence.get("cause")) for step, f in told(made_up)]
    assert found[0] == (2, "UP509", "uncleared-gradient")
    assert ("TR703", "uncleared-gradient") in {(code, cause) for _, code, cause in found}
    assert not told([replace(r, notes=(ADDED_UP,) if i == 1 else ()) for i, r in enumerate(made_up[:100])])


def test_every_detector_has_a_case() -> None:
    pages = {import_module(f"isograd.symptoms.{name}").CODE for name in STREAMED}
    assert pages == {code for _, code in CASES.values()} | {"NF405", "UP509"}


WELL: dict[str, list[Step]] = {
    "a training that converges": falling(600),
    "warm-up": [
        replace(step, update=-2.5 + math.log10(min(1.0, (i + 1) / 200)))
        for i, step in enumerate(falling(500))
    ],
    "annealing to nothing": [replace(step, update=-2.5 - i / 100) for i, step in enumerate(falling(500))],
    "a single hard batch": [*falling(200), replace(LOW, loss=5.0, grad=1.0), *[LOW] * 100],
    "a gradient that grows while the loss falls": [
        replace(s, grad=min(1.5, i / 100)) for i, s in enumerate(falling(300))
    ],
    "weights that grow ever more slowly": [
        replace(s, weight=1 + math.log10(1 + i / 50)) for i, s in enumerate(falling(500))
    ],
    "a head drawn at zero: nothing below it at the first step": [
        replace(falling(1)[0], zero=True),
        *falling(200)[1:],
    ],
    "a layer that grew sparse and trains": falling(100) + [replace(s, dead=0.9) for s in falling(300)[100:]],
    "batches of one class": [
        replace(s, dead=0.0 if i < 50 else 0.8 + 0.1 * (i % 3 == 0)) for i, s in enumerate(falling(200)[::-1])
    ],
    "hard batches here and there": [
        replace(s, loss=3.0) if i > 80 and i % 9 == 8 else s for i, s in enumerate(falling(500, grad=-3.0))
    ],
    "two tasks in turn": [
        replace(s, loss=s.loss * (1.0 if i % 2 else 10.0)) for i, s in enumerate(falling(500, grad=-3.0))
    ],
    "the first steps of RMSprop, ten times as long": [
        replace(s, loss=3.0 if i == 1 else s.loss, update=-0.1 if i < 3 else -2.5)
        for i, s in enumerate(falling(200))
    ],
    "an encoder that waits for its decoder, under Adam": [
        replace(s, slope=-1.0 if i < 40 else -0.3) for i, s in enumerate(falling(200))
    ],
    "half of the units off": [replace(step, dead=0.5) for step in falling(200)],
    "a loss that is always the same": [Step(2.3)] * 150,
    "a loss that moves within a hundredth of itself": [Step(2.3)] * 80 + [Step(2.32)] * 20,
    "no loss": [replace(step, loss=NAN) for step in falling(300)],
    "returns that grow as the policy gets better, and the loss of their estimate with them": [
        Step(25 + 14 * math.tanh((i - 150) / 100) + 2 * math.sin(2.3 * i)) if i > 60 else Step(28 - i / 10)
        for i in range(700)
    ],
    "losses around zero": [Step(loss=math.sin(5.3 * i)) for i in range(400)],
}


@pytest.mark.parametrize("name", WELL)
def test_what_is_well_is_left_alone(name: str) -> None:
    assert told(WELL[name]) == []


def rarely(steps: Sequence[Step]) -> list[Reading]:
    """As a run of short steps is read: weights and updates in the first ten and then in each 32nd."""
    return [
        reading
        if i < 10 or i % 32 == 0
        else replace(reading, columns={name: reading.columns[name] for name in ("grad_norm", "nonfinite")})
        for i, reading in enumerate(map(made, range(len(steps)), steps))
    ]


def test_what_takes_weights_and_zeros_is_told_where_few_steps_are_measured() -> None:
    grow = falling(150) + ramp(250, lambda i: replace(LOW, weight=1 + 0.008 * i))
    (step, found) = next((s, f) for s, f in told(rarely(grow)) if f.code == "UP508")
    assert step <= 352
    assert found.evidence["steps"] == 128
    assert "UP508" not in codes(rarely(WELL["weights that grow ever more slowly"]))
    die = falling(100) + [replace(LOW, loss=1.5, dead=0.5)] * 250
    assert "SA303" in codes(rarely(die))
    assert not codes(rarely(falling(100) + [replace(LOW, dead=0.5)] * 250))


def rescaled(step: Step | Reading, power: int) -> Step | Reading:
    """The same step of ten to that power times the loss."""
    if isinstance(step, Step):
        return replace(step, loss=step.loss * 10.0**power, grad=step.grad + power)
    columns = step.columns | {"grad_norm": step.columns["grad_norm"] * 10.0**power}
    return replace(step, columns=columns, scalars={name: v * 10.0**power for name, v in step.scalars.items()})


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=4, deadline=None)
@given(power=st.integers(-8, 5))
def test_the_scale_of_the_loss_changes_nothing(name: str, power: int) -> None:
    steps, _ = CASES[name]
    scaled = [rescaled(step, power) for step in steps]
    assert [(i, f.code) for i, f in told(scaled)] == [(i, f.code) for i, f in told(steps)]


# -- values that are not finite ---------------------------------------------------------------------------


def broken(number: int, *sites: str, loss: float = 1.0, note: str = "") -> Reading:
    reading = made(number, LOW)
    bad = torch.tensor([name in sites for name in SITES])
    columns = reading.columns | {
        "nonfinite": bad.float(),
        "grad_norm": torch.where(bad, NAN, reading.columns["grad_norm"]),
    }
    return replace(
        reading, columns=columns, scalars={"loss": loss, "grad_norm": NAN}, notes=(note,) if note else ()
    )


def test_values_that_are_not_finite_are_told_once_with_their_place() -> None:
    steps = [made(i, step) for i, step in enumerate(falling(100))]
    steps += [broken(100 + i, "2.weight", "2.bias") for i in range(50)]
    ((step, finding),) = told(steps)
    assert (step, finding.code, finding.sites) == (100, "NF405", ("2.weight", "2.bias"))
    assert finding.evidence["cause"] == "sudden"


@pytest.mark.parametrize(
    ("loss", "words", "remedy"),
    [
        (math.inf, "the loss itself is not finite", "safe-loss"),
        (1.0, "the loss is finite, and something on the way back is not", "safe-derivative"),
        (None, "look at the batch, and at operations", "safe-derivative"),
    ],
)
def test_a_sudden_nan_is_said_to_come_on_the_way_forward_or_back(
    loss: float | None, words: str, remedy: str
) -> None:
    sick = broken(100, "2.weight", loss=1.0 if loss is None else loss)
    if loss is None:
        del sick.scalars["loss"]
    ((_, found),) = told([*(made(i, step) for i, step in enumerate(falling(100))), sick])
    assert words in found.cause
    assert remedy in found.remedies
    assert (" are not finite" in found.message) is (loss == math.inf)


def test_a_nan_of_another_process_is_not_said_to_have_come_on_the_way_back() -> None:
    """Gradients are those of all processes, the loss is that of one."""
    well = [made(i, step) for i, step in enumerate(falling(100))]
    well[0] = replace(well[0], notes=(PROCESSES,))
    ((_, found),) = told([*well, broken(100, "2.weight")])
    assert "those of the other processes are not seen" in found.cause


@pytest.mark.parametrize(("grows", "cause"), [(0, "sudden"), (12, "unclear")])
def test_noise_near_the_end_of_a_training_is_no_explosion(grows: int, cause: str) -> None:
    """Losses and gradients of batches lie a factor of 30 apart, where most are fitted."""
    levels = [0.75 * math.sin(math.pi * i / 8) - 2 for i in range(197)]
    assert levels[-1] - levels[-24] > 1
    levels += [levels[-1] + 0.2 * i for i in range(1, grows + 1)]
    *_, (_, found) = told([*(Step(10**level, level) for level in levels), broken(len(levels), "2.weight")])
    assert (found.code, found.evidence["cause"]) == ("NF405", cause)


def test_a_training_that_never_was_well_is_not_said_to_have_been() -> None:
    (_, found), *_ = told([broken(0, "2.weight", loss=math.inf)])
    assert found.evidence["cause"] == "from-the-start"


def test_a_training_whose_loss_is_absurd_is_not_said_to_have_been_well() -> None:
    """As that of an inner loop whose rate is too high: 1e36 from the first step on."""
    *_, (_, found) = told([Step(2.7e36, 17.0), Step(1.1e36, 16.8), broken(2, "2.weight")])
    assert (found.code, found.evidence["cause"]) == ("NF405", "from-the-start")
    assert "10^36" in found.cause


@pytest.mark.parametrize(
    ("left", "update", "cause"), [(-3.0, -3.3, "clipping"), (-3.0, -1.0, "low-learning-rate")]
)
def test_clipping_that_leaves_next_to_nothing_is_the_cause_unless_the_step_does_not_follow_it(
    left: float, update: float, cause: str
) -> None:
    """The steps of SGD are lr times the gradient as it was left; those of Adam are as long whatever was left of it."""
    steps: list[Reading] = []
    for i in range(300):
        reading = made(i, Step(2.3 - 0.001 * i, weight=1.0, update=-5.0))
        norm = reading.scalars["grad_norm"]
        columns = reading.columns | {"weight_norm": reading.columns["weight_norm"] * 10 ** (update + 4.0)}
        columns["update_norm"] = columns["weight_norm"] * 1e-5
        length = float(columns["update_norm"].norm())
        clipped = norm * 10**left
        rate = length / clipped / 3 if cause == "clipping" else length / clipped / 1e4
        steps.append(
            replace(reading, columns=columns, scalars=reading.scalars | {"clipped_norm": clipped, "lr": rate})
        )
    found = {finding.code: finding for _, finding in told(steps)}["UP507"]
    assert found.evidence["cause"] == cause


@pytest.mark.parametrize("tail", [0.1, 0.8])
def test_a_rate_that_died_is_the_cause_of_a_plateau_and_the_tail_of_a_schedule_is_none(tail: float) -> None:
    """A schedule that is stepped once a batch, where it counts epochs, is over long before the training."""
    count = 600
    steps: list[Reading] = []
    for i in range(count):
        rate = 0.1 if i < (1 - tail) * count else 1e-9
        step = made(i, Step(2.3 + 0.01 * math.sin(2.3 * i), update=math.log10(rate) - 1.5))
        steps.append(replace(step, scalars=step.scalars | {"lr": rate}))
    found = [finding for _, finding in told(steps) if finding.code == "TR701"]
    assert ("schedule" in [finding.evidence["cause"] for finding in found]) == (tail > 0.5)


def test_a_step_that_leaves_values_which_are_not_finite_is_the_cause() -> None:
    """As Adam in float16, whose epsilon is zero there."""
    well = [made(i, step) for i, step in enumerate(falling(40))]
    weights = torch.where(torch.arange(len(SITES)) == 2, NAN, well[-1].columns["weight_norm"])
    well[-1] = replace(well[-1], columns=well[-1].columns | {"weight_norm": weights})
    ((_, found),) = told([*well, broken(40, *SITES, loss=NAN)])
    assert found.evidence["cause"] == "step"
    assert "1.weight" in found.cause
    later = [made(40, falling(41)[-1]), broken(41, *SITES, loss=NAN)]
    ((_, found),) = told([*well, *later])
    assert found.evidence["cause"] == "sudden"


def test_a_first_step_that_replaces_the_weights_is_no_training_that_was_well() -> None:
    """As with gradients that still carry the factor of a loss scaler."""
    *_, (_, found) = told([Step(2.3, update=0.0), broken(1, *SITES, loss=NAN)])
    assert found.evidence["cause"] == "learning-rate"


def test_a_gradient_that_grows_as_the_loss_falls_is_no_explosion() -> None:
    steps = [Step(2.3 - 0.0005 * i, grad=-1.0) for i in range(40)]
    steps += [Step(2.2 - 0.06 * i, grad=-1.0 + 0.1 * i) for i in range(20)]
    *_, (_, found) = told([*steps, broken(60, *SITES, loss=NAN)])
    assert found.evidence["cause"] == "sudden"


def test_they_never_enter_a_baseline() -> None:
    detectors, clean = Detectors(), Detectors()
    for i, step in enumerate(falling(300)):
        if i % 10 == 5:
            detectors.observe(broken(i, "0.weight", loss=NAN))
        detectors.observe(made(i, step))
        clean.observe(made(i, step))
    assert detectors.state()["history"] == clean.state()["history"]


def test_an_overflow_that_the_scaler_skips_is_routine() -> None:
    skipped = [broken(i, *SITES, note="overflow: the optimizer did not step") for i in range(20)]
    well = [made(i, step) for i, step in enumerate(falling(100))]
    assert told([*well, *skipped[:3], *well, *skipped[:3]]) == []
    assert codes([*well, *skipped]) == {"NF405"}


def test_a_loss_that_is_not_finite_counts_without_gradients() -> None:
    assert codes([*falling(50), replace(broken(50), scalars={"loss": math.inf})]) == {"NF405"}


@pytest.mark.parametrize("before", [0, 50])
def test_a_loss_that_is_not_finite_alone_is_no_matter_of_derivatives(before: int) -> None:
    (_, found), *_ = told([*falling(before), replace(made(before, LOW), scalars={"loss": NAN})])
    assert found.evidence["cause"] == "loss"
    assert "safe-derivative" not in found.remedies


def test_gradients_of_zero_have_no_size_to_grow_from() -> None:
    """A policy that has solved its task gets none, until an episode goes another way."""
    solved = [
        replace(made(i, Step(loss=0.0)), scalars={"loss": 0.0, "grad_norm": 0.0}) for i in range(40, 120)
    ]
    for reading in solved:
        reading.columns["grad_norm"].zero_()
    steps = [made(i, Step(loss=math.sin(5.3 * i))) for i in range(160)]
    assert told([*steps[:40], *solved, *steps[120:]]) == []
    assert told([*solved, *steps[120:]]) == []


# -- causes and places -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "slope", "cause"),
    [(2.0, 0.0, "unnormalised-input"), (0.0, 0.9, "initialisation"), (0.0, 0.0, "learning-rate")],
)
def test_the_cause_is_the_most_upstream(scale: float, slope: float, cause: str) -> None:
    steps = [Step(2.3 * 4**i, update=0.0, scale=scale, slope=slope) for i in range(4)]
    found = next(f for _, f in told(steps) if f.code == "UP506")
    assert found.evidence["cause"] == cause


def test_signals_that_fade_were_not_drawn_too_large() -> None:
    """Sigmoids at a learning rate of 500: little reaches the first layers, and the rate throws the last."""
    steps = [Step(2.3 * 4**i, update=0.0, slope=-0.9) for i in range(4)]
    found = next(f for _, f in told(steps) if f.code == "UP506")
    assert found.evidence["cause"] == "learning-rate"


@pytest.mark.parametrize(("update", "cause"), [(-2.5, "data"), (0.0, "learning-rate")])
def test_what_the_step_cannot_explain_is_not_the_learning_rate(update: float, cause: str) -> None:
    quiet = falling(199, grad=-3.0)
    spike = [replace(LOW, loss=3.0, grad=-1.5)] * 8
    told_of = told([*quiet, replace(quiet[-1], update=update), *spike])
    found = next(f for _, f in told_of if f.code == "TR702")
    assert found.evidence["cause"] == cause


def test_across_steps_that_were_not_read_nothing_is_said_of_the_data() -> None:
    steps, _ = CASES["data in blocks"]
    sparse = [replace(made(i, step), step=2 * i) for i, step in enumerate(steps)]
    assert "TR704" not in codes(sparse)


def test_a_loss_without_a_sign_says_nothing_of_the_order_of_the_data() -> None:
    """As that of a policy gradient: returns that are centred."""
    steps, _ = CASES["data in blocks"]
    signed = [replace(step, loss=-1.0) if i == 12 else step for i, step in enumerate(steps)]
    assert "TR704" not in codes(signed)


@pytest.mark.parametrize("every", [25, 100, 200])
@pytest.mark.parametrize("seldom", [False, True])
def test_targets_that_are_renewed_are_told_once_and_as_what_they_are(every: int, seldom: bool) -> None:
    """The target network of a DQN: the loss jumps far above its level, with a gradient thirty times as large, at each copy."""
    steps = exchanged(1200, (every,), high=1.0)
    found = told(rarely(steps) if seldom else steps)
    assert [(f.code, f.severity, f.evidence["period"]) for _, f in found] == [("TR705", Severity.INFO, every)]
    detectors = Detectors()
    detectors.follow([made(i, step) for i, step in enumerate(steps)])
    assert f"every {every} steps" in detectors.outcomes()[1]["TR702"]


def test_the_first_jumps_that_come_back_are_no_spike_and_those_that_stay_are() -> None:
    quiet = [replace(step, grad=-3.0) for step in falling(200)]
    back = [replace(LOW, loss=0.2 + 2 * 0.9**i, grad=-3 + 1.2 * 0.95**i) for i in range(60)]
    assert told(quiet + back) == []
    for slowly in (0.0, 0.001):
        stays = [replace(s, loss=2.2 - slowly * i) for i, s in enumerate(back)]
        assert "TR702" in codes(quiet + stays)


def test_jumps_that_come_as_they_come_are_not_called_regular() -> None:
    chance = random.Random(0)
    assert "TR705" not in codes(exchanged(2000, [chance.randrange(20, 60) for _ in range(50)]))


def test_a_staircase_that_never_comes_down_is_no_exchange() -> None:
    steps = [Step(1.0 + 3.0 * (i // 50), grad=-3 + i // 50) for i in range(600)]
    assert "TR705" not in codes(steps)


def test_a_few_losses_of_a_heavy_tail_are_no_divergence() -> None:
    """As those of a value network, whose targets grow with what it has learned."""
    chance = random.Random(1)
    since = [max(i - 60, 0) for i in range(900)]
    tail = [Step(min(1 + i / 40, 8.0) * math.exp(chance.gauss(0, 1.3)), min(i / 150, 2.0)) for i in since]
    assert "TR703" not in codes(tail)
    assert "TR703" in codes([*tail, *[Step(900.0, 3.0)] * 4])


def test_data_is_blamed_although_few_steps_are_measured() -> None:
    quiet, spike = falling(199, grad=-4.0), [replace(LOW, loss=3.0, grad=-3.0)] * 8
    found = next(f for _, f in told(rarely([*quiet, *spike])) if f.code == "TR702")
    assert found.evidence["cause"] == "data"


def test_one_batch_that_throws_the_network_is_the_cause() -> None:
    quiet, thrown = falling(199, grad=-4.0), [replace(LOW, loss=2.0, grad=-3.0)] * 20
    found = next(
        f for _, f in told([*quiet, replace(LOW, loss=90.0, grad=-1.0), *thrown]) if f.code == "TR702"
    )
    assert found.evidence["cause"] == "data"
    assert "one batch" in str(found.cause)


def test_one_batch_of_another_scale_is_the_cause() -> None:
    hard = replace(LOW, loss=90.0, grad=3.0, scale=3.0)
    made_up = [*falling(199), hard, *[replace(LOW, loss=30.0, grad=1.0)] * 20]
    causes = {f.code: (f.evidence.get("cause"), str(f.cause)) for _, f in told(made_up)}
    assert causes["TR703"][0] == causes["TR702"][0] == "data"
    assert "in one batch" in causes["TR703"][1]


def rated(steps: Sequence[Step], rate: Callable[[int], float]) -> list[Reading]:
    """The same, with the learning rate of each step, which a second optimizer does not share."""
    return [
        replace(reading, scalars=reading.scalars | {"lr": 0.1, "lr_1": rate(i)})
        for i, reading in enumerate(rarely(steps))
    ]


SPIKED = [*falling(200), *[replace(LOW, loss=3.0, grad=1.0)] * 8]


RATES: dict[str, tuple[bool, Callable[[int], float]]] = {
    "a jump": (True, lambda i: 1e-3 if i < 190 else 0.1),
    "a climb": (True, lambda i: 1e-3 * 1.03 ** max(i - 140, 0)),
    "a single step": (True, lambda i: 0.1 if i == 199 else 1e-3),
    "none": (False, lambda _: 1e-3),
    "restarts": (False, lambda i: 1e-3 / 10 ** (i % 95 / 30)),
    "a warm-up that has ended": (False, lambda i: 1e-3 * min(1.0, max(i - 130, 1) / 30)),
    "a warm-up": (False, lambda i: 1e-3 * min(1.0, (i + 1) / 300)),
}


@pytest.mark.parametrize("name", RATES)
def test_a_learning_rate_that_rose_is_named(name: str) -> None:
    rose, rate = RATES[name]
    found = next(f for _, f in told(rated(SPIKED, rate)) if f.code == "TR702")
    assert ("the learning rate has gone from" in str(found.cause)) == rose


def test_units_that_died_of_a_rate_that_rose_say_so() -> None:
    steps = falling(200) + [replace(LOW, zero=True)] * 20
    found = next(f for _, f in told(rated(steps, RATES["a jump"][1])) if f.code == "SA303")
    assert "the learning rate has gone from 0.001 to 0.1" in str(found.cause)


def test_inputs_are_judged_at_the_first_layer_only() -> None:
    """Behind an embedding it is the network's own signal that grows, and that is no change of the data."""
    steps = [*falling(200), *[replace(LOW, loss=3.0, grad=1.0, scale=1.5)] * 8]
    causes: list[object] = []
    for dropped in ("", "0.bias"):
        kept = [
            Reading(
                i,
                tuple(name for name in SITES if name != dropped),
                {name: values[[site != dropped for site in SITES]] for name, values in one.columns.items()},
                one.scalars,
                shapes=tuple(shape for name, shape in zip(SITES, SHAPES, strict=True) if name != dropped),
            )
            for i, one in enumerate(map(made, range(len(steps)), steps))
        ]
        causes.append(next(f for _, f in told(kept) if f.code == "TR702").evidence["cause"])
    assert causes[0] == "input-change"
    assert causes[1] != "input-change"


LEAPS = [Step(2.3, update=-0.5)] * 5
STUCK = [Step(2.3 + 0.01 * math.sin(2.3 * i)) for i in range(300)]


@pytest.mark.parametrize(("first", "replaced"), [(LEAPS, True), (LEAPS[:1], False), ([], False)])
def test_first_steps_that_replace_the_weights_are_the_cause_of_what_follows(
    first: list[Step], replaced: bool
) -> None:
    words = "little is left of the weights as they were drawn"
    for after, code in ((STUCK, "TR701"), ([replace(LOW, zero=True)] * 20, "SA303")):
        readings = [made(i, s) for i, s in enumerate([*first, *after])]
        for reading in readings:
            reading.scalars["lr"] = 0.1
        found = next(f for _, f in told(readings) if f.code == code)
        assert (words in found.cause) is replaced
    worse = [*first, *falling(50), *[replace(LOW, loss=30.0, grad=2.0)] * 5]
    found = next(f for _, f in told(worse) if f.code == "TR703")
    assert (words in found.cause) is replaced


def test_a_plateau_is_seen_although_few_steps_are_measured() -> None:
    """As in a run of short steps; and steps shrink where weights have grown, at the same learning rate."""
    steps = [replace(s, update=-1.0 if i < 10 else -2.5) for i, s in enumerate(STUCK)]
    for rates, codes in ((lambda _: 0.1, ["TR701"]), (lambda i: 0.1 if i < 10 else 0.001, [])):
        readings = [made(i, s) for i, s in enumerate(steps)]
        for i, reading in enumerate(readings):
            reading.scalars["lr"] = rates(i)
            if i >= 10 and i % 32:
                del reading.columns["update_norm"], reading.columns["weight_norm"]
        assert [f.code for _, f in told(readings)] == codes


def test_a_loss_that_creeps_up_at_its_start_is_a_plateau_and_one_that_creeps_down_none() -> None:
    for sign, is_told in ((1, True), (-1, False)):
        steps = [Step(2.3 + sign * 1e-5 * i + 1e-4 * math.sin(2.3 * i)) for i in range(300)]
        found = [f for _, f in told(steps) if f.code == "TR701"]
        assert bool(found) is is_told
        assert all("still at 2.3 " in f.message and "labels" in f.cause for f in found)


def test_a_plateau_of_steps_that_move_nothing_says_so() -> None:
    found = next(f for _, f in told([replace(s, update=-5.1) for s in STUCK]) if f.code == "TR701")
    assert "the learning rate is too low" in found.cause
    assert "the learning rate" not in next(f for _, f in told(STUCK) if f.code == "TR701").cause


def test_nothing_is_well_whose_number_is_beyond_its_threshold() -> None:
    """Where a schedule has ended early there is nothing to tell, and nothing to call healthy."""
    readings = [made(i, replace(s, update=-5.1 - i / 100)) for i, s in enumerate(STUCK)]
    for i, reading in enumerate(readings):
        reading.scalars["lr"] = 1e-6 * 10 ** (-i / 100)
    slowly = [made(i, Step(2.3 - 1e-5 * i)) for i in range(300)]
    for course, well in ((readings, False), (slowly, True)):
        detectors = Detectors()
        assert not any(detectors.follow(course))
        healthy, unexamined = detectors.outcomes()
        assert {"TR701", "UP507"} <= set(healthy if well else unexamined)
        assert not {"TR701", "UP507"} & set(unexamined if well else healthy)
    assert "the loss still falls" in healthy["TR701"]


def test_units_that_are_off_by_turns_are_not_said_to_be_few() -> None:
    """As under dropout of 95%; and those that have been off for a short time are not called well."""
    turns = [replace(step, dead=0.97 if i % 2 else 0.93) for i, step in enumerate(falling(100))]
    for course, said in ((turns, True), ([*falling(100), *[replace(LOW, dead=0.9)] * 5], False)):
        detectors = Detectors()
        assert not any(detectors.follow([made(i, step) for i, step in enumerate(course)]))
        healthy, unexamined = detectors.outcomes()
        assert ("by turns" in healthy.get("SA303", "")) == said
        assert ("SA303" in unexamined) != said


def test_the_cause_of_units_that_died_is_what_stood_when_they_did() -> None:
    """The learning rate that has killed them is no news ten steps later."""
    steps = falling(100) + [replace(LOW, loss=2.0)] * 28 + [replace(LOW, loss=2.0, zero=True)] * 20
    rated = [made(i, step) for i, step in enumerate(steps)]
    for i, one in enumerate(rated):
        one.scalars["lr"] = 1e-3 if i < 100 else 1.0
    found = next(f for _, f in told(rated) if f.code == "SA303")
    assert "the learning rate has gone from 0.001 to 1" in str(found.cause)


def test_steps_are_not_called_too_small_for_their_rate_where_the_layers_are_dead() -> None:
    dead = [made(i, Step(2.3 - 1e-4 * i, zero=True, update=-5.0)) for i in range(300)]
    found = {finding.code: finding.evidence.get("cause") for _, finding in told(dead)}
    assert found["UP507"] == "zero-gradient"


def test_a_plateau_of_layers_that_are_dead_says_so() -> None:
    dead = [made(i, Step(2.3 + 0.01 * math.sin(2.3 * i), zero=True)) for i in range(300)]
    found = {finding.code: finding.evidence.get("cause") for _, finding in told(dead)}
    assert found["TR701"] == "zero-gradient"


@pytest.mark.parametrize("rated", [True, False])
def test_a_learning_rate_that_is_not_known_is_not_said_to_be_as_before(rated: bool) -> None:
    steps = [
        made(i, step) for i, step in enumerate([*falling(100), *[replace(LOW, loss=30.0, grad=1.0)] * 5])
    ]
    for step in steps:
        del step.columns["update_norm"], step.columns["weight_norm"]
        step.scalars.update({"lr": 0.1} if rated else {})
    found = next(f for _, f in told(steps) if f.code == "TR703")
    assert ("learning rate were as before" in str(found.cause)) == rated


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_layers_whose_rate_alone_is_zero_are_a_note(rate: float) -> None:
    steps = [made(i, step) for i, step in enumerate(falling(250))]
    for step in steps:
        step.columns["update_norm"][:4] *= rate
    assert [(f.code, f.severity, f.sites) for _, f in told(steps)] == [
        ("UP505", Severity.INFO, ("0.weight", "1.weight"))
    ] * (rate == 0)


def test_matrices_drawn_as_zeros_have_lost_nothing() -> None:
    steps = [made(i, replace(s, update=-math.log10(i + 1))) for i, s in enumerate(LEAPS)]
    assert not Detectors().follow(steps)[-1]
    detectors = Detectors()
    detectors.follow(steps)
    assert detectors.history.leaps == 0


def test_parameters_that_joined_are_the_cause_of_what_follows() -> None:
    steps = [made(i, s) for i, s in enumerate([*falling(100), *[replace(LOW, loss=30.0, grad=2.0)] * 5])]
    frozen = torch.tensor([name.startswith(("0", "1", "2")) for name in SITES])
    for since, cause in ((98, "unfrozen"), (20, "unclear")):
        readings = [
            replace(r, columns={name: values.masked_fill(frozen, NAN) for name, values in r.columns.items()})
            if i < since
            else r
            for i, r in enumerate(steps)
        ]
        found = next(f for _, f in told(readings) if f.code == "TR703")
        assert found.evidence["cause"] == cause
        assert ("6 of 12 parameters, 0.weight first" in found.cause) == (cause == "unfrozen")


def test_a_norm_that_drifts_after_parameters_have_joined() -> None:
    drift = [Step(loss=0.25, grad=min(0.7, 0.2 * i)) for i in range(12)]
    steps = [made(i, step) for i, step in enumerate([*falling(300), *drift])]
    keep = len(SITES) - 2
    for i, one in enumerate(steps[:-7]):
        columns = {name: values[:keep] for name, values in one.columns.items()}
        steps[i] = replace(one, sites=SITES[:keep], columns=columns, shapes=SHAPES[:keep])
    found = next(f for _, f in told(steps) if f.code == "EG204")
    assert len(found.sites) == 3


def test_inputs_that_changed_long_ago_are_not_the_cause() -> None:
    steps = [replace(s, scale=min(i / 100, 1.0)) for i, s in enumerate(falling(300))]
    steps += [replace(steps[-1], loss=3.0, grad=1.0)] * 8
    found = next(f for _, f in told(steps) if f.code == "TR702")
    assert found.evidence["cause"] != "input-change"


def test_the_scale_of_the_inputs_is_read_off_the_gradients() -> None:
    torch.manual_seed(0)
    for rms in (0.1, 1.0, 30.0):
        layer = torch.nn.Linear(100, 50)
        x = rms * torch.randn(256, 100)
        layer(x).tanh().square().mean().backward()
        assert layer.weight.grad is not None
        assert layer.bias.grad is not None
        norms = torch.stack([layer.weight.grad.norm(), layer.bias.grad.norm()])
        reading = Reading(0, ("a.weight", "a.bias"), {"grad_norm": norms}, shapes=((50, 100), (50,)))
        # the samples' deltas cancel here, in part: a factor of two
        assert 10 ** float(seen([reading])[0].scale) == pytest.approx(rms, rel=1.0)


def test_the_layer_that_moved_first_is_named() -> None:
    steps = [made(i, step) for i, step in enumerate(falling(200))]
    for i in range(20):
        reading = made(200 + i, replace(LOW, loss=LOW.loss if i < 12 else 3.0))
        lift = torch.tensor([10.0 if name == "3.weight" else 10.0 if i >= 10 else 1.0 for name in SITES])
        steps.append(
            replace(reading, columns=reading.columns | {"grad_norm": reading.columns["grad_norm"] * lift})
        )
    spike = next(f for _, f in told(steps) if f.code == "TR702")
    assert spike.sites[0] == "3.weight"
    assert 12 <= float(spike.evidence["lead"]) <= 20


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("stepped", [False, True])
def test_a_weight_that_something_else_wrote_to_is_named(every: int, stepped: bool) -> None:
    """Its norm changes by more than the optimizer's steps can make of it; where one is long enough, nothing is said."""
    steps: list[Step | Reading] = []
    for i, step in enumerate(falling(120) + [replace(LOW, loss=3.0, grad=0.5)] * 20):
        reading, one = made(i, step), torch.tensor([name == "3.weight" for name in SITES])
        changed = dict(reading.columns)
        if i >= 120:
            changed["weight_norm"] = changed["weight_norm"] * torch.where(one, 10.0, 1.0)
        if i == 120 and stepped:
            changed["update_norm"] = changed["update_norm"].where(~one, 90.0)
        kept = changed if i % every == 0 else {name: changed[name] for name in ("grad_norm", "nonfinite")}
        steps.append(replace(reading, columns=kept))
    causes = {finding.cause for _, finding in told(steps)}
    named = {
        cause for cause in causes if cause.startswith("the norm of 3.weight went from 10 to 100, of which")
    }
    assert bool(named) is not stepped
    assert causes


def test_weights_that_a_guard_brought_back_are_written_by_nobody() -> None:
    steps: list[Step | Reading] = []
    for i, step in enumerate(falling(120) + [replace(LOW, loss=3.0, grad=0.5)] * 20):
        reading = made(i, step)
        changed = dict(reading.columns)
        if i >= 120:
            changed["weight_norm"] = changed["weight_norm"] / 10
        notes = ("isograd.Guard: went back, to step 100",) if i == 120 else ()
        steps.append(replace(reading, columns=changed, notes=notes))
    causes = {finding.cause for _, finding in told(steps)}
    assert causes
    assert not any("something else wrote" in cause for cause in causes)


# -- state ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 30, 120, 205])
def test_they_go_on_where_they_stopped(cut: int) -> None:
    steps = [made(i, step) for i, step in enumerate(falling(200) + [replace(LOW, loss=3.0, dead=0.9)] * 30)]
    whole, first, second = Detectors(), Detectors(), Detectors()
    expected = [(r.step, f) for r in steps for f in whole.observe(r)]
    found = [(r.step, f) for r in steps[:cut] for f in first.observe(r)]
    second.restore(json.loads(json.dumps(first.state())))
    found += [(r.step, f) for r in steps[cut:] for f in second.observe(r)]
    assert expected
    assert found == expected
    assert json.dumps(second.state()) == json.dumps(whole.state())


def test_readings_with_missing_columns_are_read() -> None:
    detectors = Detectors()
    for i, step in enumerate(falling(300)):
        reading = made(i, step)
        if i % 4:
            kept = {name: reading.columns[name] for name in ("grad_norm", "nonfinite")}
            reading = replace(reading, columns=kept)
        assert detectors.observe(reading) == ()
    healthy, unexamined = detectors.outcomes()
    assert "UP506" in healthy
    assert not set(healthy) & set(unexamined)


def test_parameters_that_no_gradient_reaches_are_named() -> None:
    detectors = Detectors()
    never, late = SITES.index("2.weight"), SITES.index("3.bias")
    for i, step in enumerate(falling(20)):
        reading = made(i, step)
        for column in reading.columns.values():
            column[[never, late] if i < 10 else [never]] = NAN
        detectors.observe(reading)
        detectors.restore(json.loads(json.dumps(detectors.state())))
    said = detectors.outcomes()[1]["gradients"]
    assert said.startswith("1 of 12 parameters")
    assert said.endswith("2.weight")


def without_gradient(reading: Reading, *sites: str) -> Reading:
    """As of parameters that the optimizer holds, and no backward reaches."""
    at = [SITES.index(site) for site in sites]
    columns = {name: column.clone() for name, column in reading.columns.items()}
    for name, column in columns.items():
        column[at] = 0.0 if name == "update_norm" else column[at] if name == "weight_norm" else NAN
    return replace(reading, columns=columns)


@pytest.mark.parametrize(
    ("sites", "told_of"), [(("0.weight", "0.bias", "1.weight"), True), (("5.weight",), False)]
)
def test_the_first_layers_that_are_cut_off_are_told(sites: tuple[str, ...], told_of: bool) -> None:
    found = told([without_gradient(made(i, step), *sites) for i, step in enumerate(falling(60))])
    assert [(step, f.code, f.sites) for step, f in found] == [
        (31, "UP505", ("0.weight", "1.weight"))
    ] * told_of


def test_an_optimizer_over_parameters_that_are_not_used_is_told() -> None:
    steps = [without_gradient(made(i, step), *SITES) for i, step in enumerate(falling(60))]
    found = told([replace(r, scalars={"loss": r.scalars["loss"], "lr": 0.1}) for r in steps])
    assert [(step, f.code, f.evidence["cause"]) for step, f in found] == [(31, "UP507", "no-gradient")]


def test_a_learning_rate_of_zero_is_told_unless_it_is_the_first_of_a_schedule() -> None:
    made_up = [made(i, replace(step, update=-math.inf)) for i, step in enumerate([Step(2.3)] * 60)]
    never = [replace(r, scalars=r.scalars | {"lr": 0.0}) for r in made_up]
    assert [(step, f.code, f.evidence["cause"]) for step, f in told(never)] == [
        (31, "UP507", "low-learning-rate")
    ]
    assert not told([replace(r, scalars=r.scalars | {"lr": 0.1 * (i > 30)}) for i, r in enumerate(made_up)])


def test_what_was_not_logged_is_unexamined_and_not_well() -> None:
    detectors = Detectors()
    for i, step in enumerate(falling(300)):
        detectors.observe(replace(made(i, step), scalars={}))
    healthy, unexamined = detectors.outcomes()
    assert {"TR701", "TR702", "TR703"} <= set(unexamined)
    assert "monitor.log(loss=" in unexamined["TR702"]
    assert {"VG103", "NF405"} <= set(healthy)


def test_a_baseline_holds_against_outliers() -> None:
    values = [math.sin(i) for i in range(64)]
    spoiled = [1e6 if i % 4 == 0 else value for i, value in enumerate(values)]
    clean, dirty = Baseline([*values, 5.0], 1), Baseline([*spoiled, 5.0], 1)
    assert abs(dirty.level) < 1
    assert dirty.spread < 2.5 * clean.spread
    assert dirty.deviations > 2


# -- a run is diagnosed ------------------------------------------------------------------------------------


def recorded(path: Path, steps: Sequence[Step]) -> Path:
    detectors = Detectors()
    with Run.create(path, detectors=detectors) as run:
        for i, step in enumerate(steps):
            run.append(made(i, step), detectors.observe(made(i, step)))
    return path


def test_a_run_is_diagnosed(tmp_path: Path) -> None:
    diagnosis = diagnose(Run.open(recorded(tmp_path / "run", CASES["divergence"][0])))
    assert diagnosis.verdict == "exploding"
    assert "TR703" in {finding.code for finding in diagnosis.errors}
    assert diagnosis.findings[0].message.startswith("at step 10")
    assert "NF405" in diagnosis.healthy
    well = diagnose(Run.open(recorded(tmp_path / "well", falling(300))))
    assert (well.verdict, well.findings) == ("healthy", ())


def test_a_run_is_diagnosed_by_a_fresh_process(tmp_path: Path) -> None:
    path = recorded(tmp_path / "run", falling(20))
    command = [sys.executable, "-m", "isograd", "check", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()[0]) == (0, "healthy"), done.stderr


def test_a_run_that_no_detector_watched_is_diagnosed_too(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run") as run:
        for i, step in enumerate(CASES["a spike"][0]):
            run.append(made(i, step))
    assert {f.code for f in diagnose(Run.open(tmp_path / "run")).findings} == codes(CASES["a spike"][0])


def run_command(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sick = recorded(tmp_path / "runs" / "sick", CASES["divergence"][0])
    well = recorded(tmp_path / "runs" / "well", falling(300))
    status, out, _ = run_command(capsys, "runs", tmp_path / "runs")
    assert status == 0
    assert [line.split()[1:3] for line in out.splitlines()[1:]] == [["ended", "104"], ["ended", "299"]]
    status, out, _ = run_command(capsys, "check", sick)
    assert (status, out.split()[0]) == (1, "exploding")
    status, out, _ = run_command(capsys, "check", sick, "--ignore", "TR,EG,UP", "--format", "json")
    assert (status, json.loads(out)["verdict"]) == (0, "healthy")
    assert run_command(capsys, "check", well)[0] == 0
    status, out, _ = run_command(capsys, "report", sick)
    assert status == 0
    assert "TR703 diverging  error" in out
    status, _, err = run_command(capsys, "check", tmp_path)
    assert status == 2
    assert "no run is recorded in" in err
    assert run_command(capsys, "report", tmp_path)[0] == 2
    (tmp_path / "empty").mkdir()
    status, _, err = run_command(capsys, "runs", tmp_path / "empty")
    assert "no run is recorded in" in err


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_export_holds_all(tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    sick = recorded(tmp_path / "run", CASES["divergence"][0])
    assert run_command(capsys, "export", sick, "--to", form, "-o", tmp_path / "out")[0] == 0
    read = pandas.read_csv if form == "csv" else pandas.read_parquet
    steps, sites, findings = (
        read(tmp_path / "out" / f"{name}.{form}") for name in ("steps", "sites", "findings")
    )
    assert len(steps) == 105
    assert len(sites) == 105 * len(SITES)
    assert steps["loss"].tolist() == pytest.approx([step.loss for step in CASES["divergence"][0]])
    row = sites[(sites["step"] == 7) & (sites["site"] == "3.weight")]
    assert row["grad_norm"].item() == pytest.approx(
        made(7, CASES["divergence"][0][7]).columns["grad_norm"][6].item()
    )
    assert "TR703" in set(findings["code"])


# -- real trainings ------------------------------------------------------------------------------------------


def named(table: Sequence[Watched], *names: str) -> list[Watched]:
    return [watched for watched in table if watched.name in names]


@pytest.mark.parametrize(
    "watched",
    named(SICK, "mlp rate x30", "not a number", "units die plain", "sigmoid", "head swells"),
    ids=lambda w: w.name,
)
def test_a_failing_training_is_told(watched: Watched) -> None:
    detectors = Detectors()
    found = [(r.step, f) for r in readings(watched.start(7), 7) for f in detectors.observe(r)]
    assert not [f for step, f in found if watched.onset is not None and step < watched.onset]
    assert {f.code for _, f in found} & watched.expected


@pytest.mark.parametrize(
    "watched",
    named(CLEAN, "mlp restarts", "batch grows", "experts sgd", "policy gradient"),
    ids=lambda w: w.name,
)
def test_a_clean_training_is_left_alone(watched: Watched) -> None:
    detectors = Detectors()
    found = [
        f for r in readings(watched.start(7), 7) for f in detectors.observe(r) if f.severity > Severity.INFO
    ]
    assert found == []


# -- what is given, and what lies beside ----------------------------------------------------------------------


def test_a_norm_that_came_with_other_data_has_not_grown() -> None:
    """As where the targets are computed anew: the loss rises by more than the step explains, and so does the norm."""
    before, new = falling(200, grad=-3.0), [replace(LOW, loss=1.8, grad=-1.8)]
    assert not codes(before + new * 60) & {"EG203", "EG204"}
    rising = [replace(LOW, loss=1.8, grad=-1.8 + i / 20) for i in range(40)]
    assert "EG203" in codes(before + new * 8 + rising)


def test_what_drifts_has_a_cause() -> None:
    drifting = [replace(s, scale=3.0 if i == 300 else 0.0) for i, s in enumerate(falling(301))]
    found = next(f for _, f in told(drifting + [Step(loss=0.25, grad=0.7)] * 20) if f.code == "EG204")
    assert "in one batch" in found.cause
    assert "look at the batch" in found.remedies


def test_weights_that_have_shrunk_are_the_cause_of_what_fades() -> None:
    fade = [Step(2.3, slope=-1.0, weight=max(-1.0, 1 - i / 40)) for i in range(300)]
    found = {f.code: f for _, f in told(fade)}
    assert "weight decay" in found["VG103"].cause
    assert found["VG103"].remedies == ("lower the weight decay",)
    assert "weight decay" in found["TR701"].cause
    fade = [replace(step, weight=1.0) for step in fade]
    kept = {f.code: f for _, f in told(fade)}
    assert "weight decay" not in kept["VG103"].cause + kept["TR701"].cause
    thrown = {f.code: f for _, f in told([Step(2.3, update=-0.1)] * 4 + fade)}
    assert "first steps" in thrown["VG103"].cause
    since = {f.code: f for _, f in told([Step(2.3)] * 20 + fade)}
    assert "the steps since" in since["VG103"].cause


def renamed(steps: Sequence[Step], names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> list[Reading]:
    sites = tuple(f"{name}.{kind}" for name in names for kind in ("weight", "bias"))
    both = tuple(one for shape in shapes for one in (shape, shape[:1]))
    return [replace(made(i, step), sites=sites, shapes=both) for i, step in enumerate(steps)]


def test_a_network_beside_another_is_not_behind_it() -> None:
    """An actor whose loss is small beside that of its critic: its first layer gets little, and none is lost on the way."""
    steps = [replace(step, slope=-0.8, early_update=-5.0) for step in falling(60)]
    assert "VG103" in codes(steps)
    actor, critic = ([f"{name}.{i}" for i in (0, 2, 4)] for name in ("actor", "critic"))
    beside = [(64, 4), (64, 64), (2, 64), (64, 4), (64, 64), (1, 64)]
    assert not codes(renamed(steps, actor + critic, beside))
    behind = [(64, 4), (64, 64), (8, 64), (64, 8), (64, 64), (1, 64)]  # an encoder and its head
    assert "VG103" in codes(renamed(steps, actor + critic, behind))


def test_inputs_are_not_read_off_errors_that_cancel() -> None:
    """The bias of a critic's last layer gets +1 - 1: no gradient, and those below get little."""
    rise = [
        Step(2.3, update=0.0, scale=1.3),
        Step(20.0, update=0.3),
        Step(40.0, update=0.0),
        Step(40.0, update=0.0),
    ]
    alone = next(f for _, f in told(rise) if f.code == "UP506")
    assert "not normalised" in alone.cause
    readings = [made(i, step) for i, step in enumerate(rise)]
    for reading in readings:
        reading.columns["grad_norm"][-1] *= 1e-7
    critic = next(f for _, f in told(readings) if f.code == "UP506")
    assert "the learning rate" in critic.cause


@pytest.mark.parametrize("shuffled", [False, True])
def test_data_that_is_sorted_by_class_is_told_though_a_batch_of_two_classes_lies_between(
    shuffled: bool,
) -> None:
    torch.manual_seed(0)
    sizes = [1000, 1060, 930, 1100, 970, 1030, 1090, 910, 950, 1010]
    centres = 0.6 * torch.randn(len(sizes), 32)
    y = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])
    x = centres[y] + torch.randn(len(y), 32)
    order = torch.randperm(len(y)) if shuffled else torch.arange(len(y))
    model = nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, len(sizes))
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    with watch(model, optimizer, budget=1.0) as monitor:
        for _ in range(4):
            for rows in order.split(32):
                loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                monitor.log(loss=loss)
        told = {f.code for f in monitor.diagnosis().findings}
    assert ("TR704" in told) == (not shuffled)
