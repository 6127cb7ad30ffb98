"""A measured network as theory sees it: the operations along its backbone, with the weights' own scales.

What is expected is what random weights of the sizes found would do: a trained network may depart from it.
Each operation is held against the forward signal that was measured. Where theory has no word for it, or
the signal is not as it says, nothing is expected, and the chain begins again at the next measured signal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from isograd.flow import Flow
from isograd.theory.chain import Operation, Response, Signal, propagate
from isograd.theory.operations import Operations, is_signal, width_of

NEAR = 0.5
"""How far log q of an operation's output may lie from what its measured input lets expect: weights that are
no independent draws, or data with a few large features, do not lie near."""
NOTHING = 0.1
"""Decades at functions that theory has no word for, up to which what it expects of the rest is that of the whole."""
DEVIATIONS = 5.0
"""The same in standard deviations over draws of the weights, for narrow layers."""


@dataclass(frozen=True)
class Expectation:
    """What theory expects at each site of a flow, input first; None where it does not apply."""

    responses: tuple[Response | None, ...]
    measured: tuple[float, ...]
    """Decades found at each site; NaN: none."""
    weighted: tuple[bool, ...]
    unknown: tuple[bool, ...]
    """A function that theory has no word for."""

    @property
    def decades(self) -> list[float]:
        """(site,) expected mean of log10 of the gain; NaN where theory does not apply."""
        return [math.nan if r is None else r.decades for r in self.responses]

    def over(self, part: slice) -> Part | None:
        """The sites of a part that theory applies to, taken together; None: to no layer of it."""
        at = [i for i in range(*part.indices(len(self.responses))) if not math.isnan(self.measured[i])]
        runs, run = list[Response](), None
        for i in at:
            response = self.responses[i]
            if response is None:
                runs, run = [*runs, *([run] if run else [])], None
            else:
                run = response if run is None else run.then(response)
        runs += [run] if run else []
        covered = [i for i in at if self.responses[i] is not None]
        layers = sum(self.weighted[i] for i in covered)
        if not layers:
            return None
        return Part(
            sum(run.decades for run in runs),
            math.sqrt(sum(run.spread**2 for run in runs)),
            sum(self.measured[i] for i in covered),
            layers,
            whole=layers == sum(self.weighted[i] for i in at)
            and sum(abs(self.measured[i]) for i in at if self.unknown[i]) < NOTHING,
        )


@dataclass(frozen=True, slots=True)
class Part:
    """Expected and measured over the same sites."""

    decades: float
    """Mean of log10 of the factor on the gradient's norm, over draws of the weights."""
    spread: float
    """Its standard deviation over draws, from the finite widths."""
    measured: float
    layers: int
    """Layers among them that multiply by weights."""
    whole: bool
    """No layer of the part is left out, nor anything else that changes the gradient."""


def expectation(flow: Flow) -> Expectation:
    """What theory expects of a measured flow, with the scales of its weights as they are."""
    found: list[Response | None] = [None] * len(flow.sites)
    rms = [float(v) for v in flow.column("activation_rms")]
    decades = [float(v) for v in flow.column("decades")]
    weighted = [float(v) == 1 for v in flow.column("weighted")]
    operations = Operations(flow)
    apart = 0.0 if _asked(flow) else math.nan  # what two samples share, where nothing is known of it
    signal, gaussian = _entering(flow, rms[0], apart) if rms else None, False
    for i in range(1, len(flow.sites)):
        measured = _measured(rms[i - 1], signal)
        chain = operations.site(i, rms[i - 1], gaussian) if signal is not None else None
        if chain is not None and signal is not None and measured is not None:
            found[i] = _response(chain, signal, measured, rms[i])
        gaussian = operations.gaussian(flow.sites[i], gaussian)
        response = found[i]
        if response is not None:
            signal = response.signal
        else:
            seen = Signal(rms[i] ** 2, shared=apart, width=width_of(flow.sites[i]))
            signal = seen if is_signal(rms[i]) else None
    unknown = [
        r is None and s.kind in ("elementwise", "custom") for r, s in zip(found, flow.sites, strict=True)
    ]
    return Expectation(tuple(found), tuple(decades), tuple(weighted), tuple(unknown))


def _entering(flow: Flow, rms: float, shared: float) -> Signal | None:
    if not is_signal(rms):
        return None
    site = flow.sites[0]
    for seen in flow.inputs.values():
        if math.isclose(seen.rms, rms, rel_tol=1e-3) and len(site.shape) == 2:
            shared = max(shared, min(seen.rms**2 - seen.varying**2, seen.rms**2))
    return Signal(rms**2, shared=shared, width=width_of(site))


def _asked(flow: Flow) -> bool:
    """Does anything ask what two samples share? A BatchNorm does, and nothing else."""
    inner = (step.site for ledger in flow.ledgers.values() for step in ledger)
    return any(site.operation == "batch_norm" for site in (*flow.sites, *inner))


def _measured(rms: float, signal: Signal | None) -> Signal | None:
    """The signal that was measured, with what theory knows of its mean."""
    if signal is None or not is_signal(rms):
        return None
    scale = rms**2 / signal.q
    return replace(signal, q=rms**2, mean=signal.mean * math.sqrt(scale), shared=signal.shared * scale)


def _response(chain: Sequence[Operation], signal: Signal, measured: Signal, rms: float) -> Response | None:
    """What the operations do, if the measured forward signal bears out that they are what they seem."""
    if not is_signal(signal.rms):
        return None
    try:
        local, response = propagate(chain, measured), propagate(chain, signal)
    except ValueError:  # a signal of zero, an average without end
        return None
    if not (is_signal(rms) and 0 < local.signal.q < math.inf and 0 < response.chi < math.inf):
        return None
    far = abs(math.log(rms**2 / local.signal.q))
    return response if far <= max(NEAR, DEVIATIONS * math.sqrt(max(local.noise, 0.0))) else None
