"""What a guard saves, and what it costs where nothing breaks: python -m gallery.guarded

The trainings of `gallery.watched`: the clean ones must come out bitwise as they do without it; of those with a fault it is
measured where they end, beside nothing, torch's clipping at 1 and `AdaptiveClip`. Some minutes on one core.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

import isograd
from gallery.watched import CLEAN, SICK, Session, Watched, backwards, data, faulty, poisoned, rate

SEEDS = (0, 1)
HELD_OUT = 8
"""Batches that the loss at the end is the median of."""
KEPT = 0.8
"""Share of what the clean training gains that one with a fault has to reach to be called saved."""

PASSING = 10
"""Steps that a fault lasts that passes."""

Step = Callable[[float], object]


def _named(name: str) -> Watched:
    return next(watched for watched in (*CLEAN, *SICK) if watched.name == name)


def passing(
    name: str, clean: str, act: Callable[[Session, int], None], onset: int = 200
) -> tuple[Watched, Watched]:
    """A fault that is over after some steps, and the training without it."""

    def for_a_while(session: Session, step: int) -> None:
        if step < onset + PASSING:
            act(session, step)
        else:
            session.factor, session.spoil = 1.0, lambda batch: batch

    return faulty(name, _named(clean), onset, frozenset(), for_a_while), _named(clean)


PASSES = (
    passing("mlp, rate x 100 for 10 steps", "mlp sgd", rate(100)),
    passing("adam, rate x 300 for 10 steps", "mlp adam", rate(300)),
    passing("lstm, rate x 200 for 10 steps", "lstm", rate(200)),
    passing("transformer, rate x 100 for 10 steps", "transformer", rate(100)),
    passing("residual, rate x 100 for 10 steps", "residual adam", rate(100)),
    passing("cnn, rate x 300 for 10 steps", "cnn adam", rate(300), 150),
    passing("mlp, 10 batches with a NaN", "mlp sgd", data(poisoned)),
    passing("cnn, 10 batches with a NaN", "cnn adam", data(poisoned), 150),
    passing("mlp, 10 batches x 1000", "mlp sgd", data(lambda x: 1000 * x)),
    passing("adam, 10 batches x 1000", "mlp adam", data(lambda x: 1000 * x)),
    passing("residual, 10 batches x 1000", "residual sgd", data(lambda x: 1000 * x)),
)
STAYS = tuple(
    (_named(fault), _named(clean))
    for fault, clean in (
        ("mlp rate x30", "mlp sgd"),
        ("mlp rate x100", "mlp plain sgd"),
        ("adam rate x300", "mlp adam"),
        ("transformer rate x100", "transformer clip"),
        ("residual rate x100", "residual adam"),
        ("cnn rate x300", "cnn sgd"),
        ("lstm rate x200", "lstm"),
        ("mlp rate climbs", "mlp sgd"),
        ("residual rate climbs", "residual sgd"),
        ("transformer rate climbs", "transformer"),
        ("tanh rate climbs", "deep tanh"),
        ("rmsprop rate climbs", "rmsprop"),
        ("weights x5", "deep he"),
        ("rate too high", "mlp sgd"),
        ("rate too high plain", "mlp plain sgd"),
        ("rate too high adam", "mlp adam"),
        ("rate too high cnn", "cnn adam"),
        ("rate too high transformer", "transformer"),
    )
)


@dataclass(frozen=True)
class Ended:
    """A training that is over."""

    loss: float
    """Of batches that were not trained on and are not spoiled; inf where it is not finite."""
    weights: Tensor
    guard: isograd.Guard | None = None


def nothing(session: Session) -> Iterator[Step]:
    yield lambda _loss: session.optimizer.step()


def clipped(session: Session) -> Iterator[Step]:
    def step(_loss: float) -> None:
        nn.utils.clip_grad_norm_([p for p in session.model.parameters() if p.grad is not None], 1.0)
        session.optimizer.step()

    yield step


def adaptive(session: Session) -> Iterator[Step]:
    limit = isograd.AdaptiveClip()
    with isograd.watch(session.model, session.optimizer) as monitor:

        def step(_loss: float) -> None:
            monitor.clip_(limit)
            session.optimizer.step()

        yield step


def guarded(session: Session, limit: bool = False) -> Iterator[isograd.Guard]:
    with isograd.Guard(
        session.model, session.optimizer, max_norm=isograd.AdaptiveClip() if limit else math.inf
    ) as guard:
        yield guard


def trained(watched: Watched, seed: int, way: Callable[[Session], Iterator[object]]) -> Ended:
    """Train, each step made in one way."""
    session = watched.start(seed)
    model, makes = session.model, way(session)
    made = next(makes)
    make = made.step if isinstance(made, isograd.Guard) else made
    assert callable(make)
    for _, loss in backwards(session, seed):
        if math.isfinite(session.clip):
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], session.clip)
        make(loss)
    next(makes, None)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return Ended(_held_out(session), weights, made if isinstance(made, isograd.Guard) else None)


def _held_out(session: Session) -> float:
    generator = torch.Generator().manual_seed(7)
    session.model.eval()
    with torch.no_grad():
        losses = [
            float(session.loss(session.model, session.batch(session.steps, generator), generator))
            for _ in range(HELD_OUT)
        ]
    return median(losses) if all(map(math.isfinite, losses)) else math.inf


WAYS: dict[str, Callable[[Session], Iterator[object]]] = {
    "nothing": nothing,
    "clip_grad_norm_(1)": clipped,
    "AdaptiveClip": adaptive,
    "**Guard**": guarded,
    "Guard, AdaptiveClip": lambda session: guarded(session, limit=True),
}


def harmless(every: int, progress: Callable[[str], None]) -> Iterator[str]:
    """Clean trainings that come out otherwise with a guard."""
    for watched in CLEAN[::every]:
        for seed in SEEDS:
            progress(f"clean: {watched.name}")
            alone, with_it = trained(watched, seed, nothing), trained(watched, seed, guarded)
            assert with_it.guard is not None
            if with_it.guard.events or not torch.equal(alone.weights, with_it.weights):
                yield f"- {watched.name} #{seed}: loss {alone.loss:.3g}, with it {with_it.loss:.3g}; {with_it.guard}"


def saved(
    pairs: Sequence[tuple[Watched, Watched]], progress: Callable[[str], None]
) -> tuple[dict[str, int], list[str]]:
    """Trainings with a fault that end near where those without it do, by way; and a row for each."""
    counts, rows = dict.fromkeys(WAYS, 0), list[str]()
    for fault, clean in pairs:
        for seed in SEEDS:
            progress(fault.name)
            start, goal = _held_out(clean.start(seed)), trained(clean, seed, nothing).loss
            ended = {name: trained(fault, seed, way) for name, way in WAYS.items()}
            for name, one in ended.items():
                counts[name] += start - one.loss >= KEPT * (start - goal)
            guard = ended["**Guard**"].guard
            did = len([event for event in guard.events if event.what == "went back"]) if guard else 0
            losses = " | ".join(f"{one.loss:.3g}" for one in ended.values())
            rows.append(f"| {fault.name} #{seed} | {start:.3g} | {goal:.3g} | {losses} | {did} |")
    return counts, rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gallery.guarded",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--every", type=int, default=1, help="each n-th training only: a slice")
    every = parser.parse_args().every
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    def progress(what: str) -> None:
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)

    changed = list(harmless(every, progress))
    total = len(CLEAN[::every]) * len(SEEDS)
    print(f"Clean trainings that a guard changes: {len(changed)} of {total}", *changed, sep="\n")
    for title, pairs in (("a fault of 10 steps", PASSES), ("a fault that stays", STAYS)):
        counts, rows = saved(pairs[::every], progress)
        print(f"\n## {title}: saved of {len(rows)}\n\n| | " + " | ".join(counts) + " |")
        print("|---" * (len(counts) + 1) + "|\n| saved | " + " | ".join(map(str, counts.values())) + " |")
        print("\n| training | first loss | without the fault | " + " | ".join(counts) + " | went back |")
        print("|---" * (len(counts) + 4) + "|", *rows, sep="\n")
    progress("")


if __name__ == "__main__":
    main()
