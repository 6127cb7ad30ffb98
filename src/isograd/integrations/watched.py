"""A model that was found in a script, and what is said of it: a line while it trains, its diagnosis at the end."""

from __future__ import annotations

import sys
import time
import weakref
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from isograd.integrations.loss import AccumulatedLoss
from isograd.monitor import Monitor
from isograd.monitor.reading import Reading
from isograd.record import Run
from isograd.record.verdict import verdict

UNEXAMINED = {
    "loss": "none was seen: it is read where a backward starts, from one number: loss.backward()",
    "activations": "isograd watch --deep-every 1000 looks at every thousandth step from inside",
}
"""What `isograd.watch` says of the line that is missing in a script is said of the command."""


@dataclass
class Watched:
    """A model that was found. The script alone keeps it alive: models of a search go when it lets go of them."""

    monitor: weakref.ref[Monitor]
    model: weakref.ref[nn.Module]
    loss: AccumulatedLoss
    name: str
    path: str
    record: Any
    """What is kept there; None in all processes but one."""
    process: int
    """Which process trains it: one that is forked from it does not."""
    since: int
    """Step of the record at which this process began to train it."""
    again: bool
    """Another optimizer has trained it before in this process: the record knows what was found then."""
    began: int = 0
    """Step of the record at which its newest optimizer began."""
    strangers: str = ""
    """What is said of parameters that its loss depends on and that nobody trains."""
    shown: tuple[float, int] | None = None
    """When a line of it was first shown, and the step."""
    told: int = 0
    """Findings that were said as they came."""

    def report(self, deep: bool, brief: bool = False) -> None:
        """Say what was found, how many steps were seen, and where they are kept.

        deep: it was asked to look from inside. brief: nothing but the findings.
        """
        record, monitor = self.record, self.monitor()
        if monitor is not None:
            newest = monitor.newest()
            steps, diagnosis = 0 if newest is None else newest.step + 1, monitor.diagnosis()
            if self.again and record.recording:
                with Run.open(record.path) as run:
                    whole = verdict(run, self.since)
                known = {finding.code for finding in whole.findings}
                inside = (finding for finding in diagnosis.findings if finding.code not in known)
                healthy = {code: words for code, words in diagnosis.healthy.items() if code not in known}
                diagnosis = replace(diagnosis, findings=(*whole.findings, *inside), healthy=healthy)
            asked = {name: words for name, words in UNEXAMINED.items() if name in diagnosis.unexamined}
            if deep:  # then it says why not
                asked.pop("activations", None)
            diagnosis = replace(diagnosis, unexamined=diagnosis.unexamined | asked)
        elif record.recording:  # the script let go of the model
            with Run.open(record.path) as run:
                steps, diagnosis = run.last + 1, verdict(run)
        else:
            return
        if self.strangers:
            said = filter(None, (diagnosis.unexamined.get("parameters"), self.strangers))
            diagnosis = replace(diagnosis, unexamined=diagnosis.unexamined | {"parameters": "; ".join(said)})
        if not steps:
            why = "" if monitor is None else diagnosis.unexamined.get("training", "")
            say(f"{self.name} was found, but {why or 'no step of its optimizer was seen'}")
            return
        if brief:
            diagnosis = replace(diagnosis, flow=replace(diagnosis.flow, notes=()), healthy={}, unexamined={})
        if diagnosis.findings or not brief:
            print(diagnosis, file=sys.stderr)
        kept = f"recorded: isograd report {record.path}" if record.recording else "watched, and not recorded"
        if record.recording and record.missed:
            kept = f"watched, the last {record.missed} of them not recorded: isograd report {record.path}"
        nothing = ", nothing found," if brief and not diagnosis.findings else ""
        say(f"{steps} {'step' if steps == 1 else 'steps'} of {self.name}{nothing} {kept}")

    def line(self, reading: Reading) -> str:
        """Where the training is: `step 300  loss 1.2  gradient norm 0.4  12 steps/s`."""
        parts = [f"step {reading.step}"]
        for name, words in (("loss", "loss"), ("grad_norm", "gradient norm")):
            if name in reading.scalars:
                parts.append(f"{words} {reading.scalars[name]:.4g}")
        now = time.monotonic()
        if self.shown is None:
            self.shown = now, reading.step
        else:
            since, first = self.shown
            parts.append(f"{(reading.step - first) / (now - since):.3g} steps/s")
        return "  ".join(parts)


def say(words: str) -> None:
    """On standard error: standard output is the script's."""
    print(f"isograd: {words}", file=sys.stderr, flush=True)
