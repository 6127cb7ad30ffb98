"""What the loss and the gradient norm did in one step that the step does not explain: whether it stays, and whether it comes
again and again.

Other data came, or other targets, and the weights are where they were. Where that happens every so many steps, as a target
network is copied, the loss has no level of its own: it stands where the last exchange has put it.
"""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

from isograd.monitor.seen import Seen

if TYPE_CHECKING:
    from isograd.monitor.history import History

JUMP = 1 / 3
"""Share of the first loss: a smaller rise from one batch to the next is noise."""
LEAP = 0.5
"""Decades above all gradient norms of the last NEAR readings: a factor of three, which batches drawn alike seldom have."""
NEAR = 16
"""Readings that a leap must stand above, and for which one waits whether it comes back."""
FASTER = 1.5
"""Times the lowest learning rate of the last NEAR readings: then the step may explain it."""
FELL = 0.2
"""Decades by which a norm that has leapt must have fallen since to be on its way back."""
HALVES = 32
"""Readings in which half of a jump must be gone to be on its way back; a few times what a target network's take."""
SOON = 5
"""Readings whose median is what a leap has brought."""
SEVERAL = 64
"""Sudden steps that are remembered."""
CHANCE = 1e-4
"""Of sudden steps that come at random to seem regular, at each."""


def compare(history: History, seen: Seen, *, start: float) -> None:
    """Did the last step change the loss, or another batch? `start`: the first loss.

    The loss of a quadratic changes by the mean of the gradients at both ends along the step (the trapezoid
    rule is exact), so at most by the step's length times the mean of their norms.
    """
    before, norm, length = history.last
    explained = 10**length * (10**norm + 10**seen.grad_norm) / 2
    rise, jump = seen.loss - before, history.jump
    if rise > max(explained, JUMP * start) > 0:
        history.jump = [history.count, before, seen.loss, explained, 0.0]
        return
    if jump and jump[0] == history.count - 1:
        if -rise > explained and 2 * seen.loss < jump[1] + jump[2]:
            jump[-1] = 1.0
        elif jump[2] - max(history.losses[-NEAR - 1 : -1]) > JUMP * start:
            _again(history, [seen.step - 1, 0, *jump[1:3]])
    if jump and jump[-1] and seen.loss < jump[1] + JUMP * start:
        history.jump = []


def leapt(history: History, seen: Seen) -> None:
    """Has the gradient norm leapt in a step that was no faster than those before it?"""
    before, now, leap = history.norms[-NEAR:], seen.grad_norm, history.leap
    if leap and leap[0] == history.count - 1 and math.isfinite(now):
        if now < (leap[1] + leap[2]) / 2:  # it was one batch
            history.leap = []
        elif seen.step == leap[3] + 1:
            _again(history, [leap[3], 1, *leap[1:3]])
    if len(before) < NEAR or not LEAP <= now - max(before) < math.inf or _faster(history):
        return
    history.leap = [history.count, median(before), now, seen.step, history.last[0], seen.loss]


def absorbed(history: History, recent: int) -> bool:
    """Is a jump of the loss that no step explains on its way back, or too new to tell? Then the weights have lost nothing.

    `recent`: losses whose median is that of now. One batch alone that was hard is none to be absorbed, nor is what something else
    has written to the weights.
    """
    jump, leap = history.jump, history.leap
    if jump and not jump[-1] and _sinks(history, jump[:3], recent, most=2 * HALVES):
        return True
    return bool(leap) and _sinks(history, [leap[0], *leap[4:6]], recent, most=NEAR)


def judged(history: History, recent: int) -> list[float]:
    """The losses without those since a jump that no step explains, but for the newest `recent`: what has jumped, and is waited for
    to come back, is no level to hold it against."""
    counts = [*history.leap[:1], *(history.jump[:1] if history.jump and not history.jump[-1] else ())]
    since = history.count - int(max(counts, default=0)) + 1
    losses = history.losses
    return [*losses[:-since], *losses[-recent:]] if recent < since <= 2 * HALVES else losses


def _sinks(history: History, jump: list[float], recent: int, *, most: int) -> bool:
    """Is the loss coming back from this jump, so many readings ago at most?"""
    count, before, after = jump
    since = history.count - int(count)
    if since >= most or (history.written and history.written[0] >= count):
        return False
    now = median(history.losses[-min(since + 1, recent) :])
    return since < recent or after - now >= (1 - 0.5 ** (since / HALVES)) * (after - before)


def settling(history: History, now: float) -> bool:
    """Has the gradient norm leapt, and is it on its way back, or too new to tell? `now`: log10 of what is held against others."""
    since = history.count - int(history.leap[0]) + 1 if history.leap else math.inf
    if since > 2 * HALVES:
        return False
    brought = median(history.norms[-int(since) :][:SOON])
    return since <= NEAR or now <= brought + (LEAP if _regular(history, int(history.leap[3])) else -FELL)


def _regular(history: History, step: int) -> bool:
    """Is this a step at which it comes each time?"""
    return bool(history.period) and (step - int(history.period[1])) % int(history.period[0]) == 0


def _faster(history: History) -> bool:
    """Was the last step made at a higher rate than those before it?"""
    rates = history.rates[-NEAR:-1]  # the newest is that of the step to come
    return len(rates) > 1 and any(
        rate > FASTER * min(others) for rate, *others in zip(*rates[::-1], strict=True)
    )


def _again(history: History, sudden: list[float]) -> None:
    """Another sudden step: do they come every so many steps, and back in between?"""
    known = history.sudden
    if known and known[-1][0] == sudden[0]:  # of the loss, and of its gradient
        return
    known.append(sudden)
    del known[:-SEVERAL]
    by_step = {int(one[0]): one for one in known}
    *earlier, step = by_step
    span = step - min(by_step)
    rate = len(earlier) / span if span else 1.0
    found = history.period
    for period in (step - one for one in earlier if step - one >= NEAR):
        expected = range(step - 2 * period, min(by_step) - 1, -period)
        hits = [by_step[one] for one in expected if one in by_step]
        chance = len(earlier) * tail(len(expected), len(hits), rate)
        series = [*hits[::-1], by_step[step - period], sudden]
        # Of a period and its multiples the one that is least by chance is the period.
        if chance < min([CHANCE, *found[3:]]) and all(map(_came_back, series, series[1:])):
            found = [period, step, len(series), chance]
    history.period = found


def _came_back(one: list[float], following: list[float]) -> bool:
    """Was what had jumped half back before it jumped again?"""
    return one[1] != following[1] or following[2] < (one[2] + one[3]) / 2


def regular(history: History) -> bool:
    """Are the last three sudden steps as far apart?"""
    apart = [b[0] - a[0] for a, b in pairwise(history.sudden[-3:])]
    return bool(history.period) or (len(apart) == 2 and apart[0] == apart[1])


def tail(times: int, hits: int, share: float) -> float:
    """The chance of so many hits and more, each having this one: the binomial tail."""
    return sum(math.comb(times, k) * share**k * (1 - share) ** (times - k) for k in range(hits, times + 1))
