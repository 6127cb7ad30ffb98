"""VG101 vanishing-gradient: the gradient shrinks from layer to layer on its way to the input.

What it means
    Between the head and the first layers the gradient loses several decades. The first layers receive
    almost none of the error signal: they barely move, and the loss lies on a plateau or falls very slowly.

Why it happens
    Backpropagation multiplies the Jacobians of the layers. Where their gain is below 1, the product of L
    of them shrinks like sigma^L: activations with small derivatives (sigmoid' is at most 1/4), weights
    drawn too small for the activation in use, units that are dead, normalisations whose gain is near 0.

Evidence
    The decades between the output and the input side, measured in one backward that is rescaled at each
    backbone node, so that it neither underflows nor depends on the scale of the loss. The input layer and
    the head are left out where they change the width. A loss of 3 decades stopped SGD at every learning
    rate, and slowed AdamW, in 109 networks trained on digits (`python -m gallery.border`); at 30 layers
    and more, 2 decades did. 2 decades are enough, too, where the signal is lost as well: where at the head less than
    a hundredth is left of what differs between the samples, adaptive steps make up for a gradient that is small and
    not for inputs that are all alike. Luck of a narrow network (five times its finite-width spread) is never called sick.
    Where theory applies to all layers, `expected` is what it says of random weights of these sizes (docs/theory.md).

What helps
    An initialisation at the critical gain of the activation; ReLU, GELU or tanh in place of sigmoid;
    normalisation; residual connections. `isograd check` tries each on a copy and says what it gives back.

References
    Hochreiter 1991; Glorot and Bengio 2010; Schoenholz et al. 2017, Deep Information Propagation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from torch import Tensor

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow, per_layer
from isograd.graph.operations import STEPS
from isograd.horizon import LEFT
from isograd.statistics import Parameter, Site
from isograd.symptoms import Healthy, Outcome, Unexamined
from isograd.symptoms.shrunk_output import leave_out

CODE = "VG101"
NAME = "vanishing-gradient"

ERROR = 3.0
"""Decades lost from which SGD trained at no learning rate and AdamW worse (gallery.border)."""
ERROR_DEEP = 2.0
"""The same at 30 layers and more: 0.85 per layer over 30 layers left SGD at 24%, 0.85 over 20 at 70%."""
STACKED = 3.5
"""Decades that a stack of fused recurrent layers costs, from which it is an error: what the last step passes down is in
all of them, so that no length of time accounts for it. LSTMs and GRUs of two and three layers, 32 wide, cost 1.1 to 2.3 as
torch draws them; at 3.7 LSTMs have lost a quarter to two fifths of what they learn, GRUs at 3.1 a third, at 5 and more half
to two thirds. A single layer, which learns to undo its scale, is not told. Of more than three layers one decade each: LSTMs
cost 0.7 to 0.9 as torch draws them, and six of them fit their batch."""
ALIKE = 0.01
"""Share that is left at the head of what differed between the samples at the input. Networks that lose 2 to 3 decades
behind sigmoids or softsigns keep 0.0003 to 0.003 and lose a fifth to all of their lead; ReLUs on small weights, which
lose as many, keep a third, and Adam trains them. Eight ReLU layers at torch's default, at 0.012, lose a sixth
(`python -m benchmarks.twins run twin fault`). Shipped models start above 0.06."""
FORGOTTEN = (
    "every layer passes on what all samples have in common and less of what tells them apart (not tested)"
)
WEIGHTED = ("linear", "convolution", "recurrent", "attention")
"""Kinds of the layers that learn."""
SEVERAL = 6
"""Layers from which a fall of what differs is one of the depth. In fewer it is that of one layer, which learns to undo it:
embeddings and input weights of a GRU times 1e-3 and 1e-4 train as well as others."""
WARNING = 2.0
"""Decades lost from which SGD slows down in shallow nets while AdamW still trains."""

FACTORS = 0.7
"""Share of the decades that constants cost, from which they are named beside what could make up for them."""

LUCK = 5.0
"""Standard deviations of a critical network of these widths: networks 5 units wide have heavy tails, and
train in spite of -3.3 decades (`python -m gallery.zoo --cases`)."""


def threshold(layers: int) -> float:
    """Decades that count as an error: 3 up to 15 layers, falling to 2 at 30."""
    share = min(max((layers - 15) / 15, 0.0), 1.0)
    return ERROR + share * (ERROR_DEEP - ERROR)


def examine(flow: Flow) -> Iterator[Outcome]:
    """Decades lost along the main backbone and along those of the model's other inputs."""
    if flow.failure is not None or flow.nonfinite is not None:
        yield Unexamined("the gradient is not finite or the backward failed")
        return
    for line in (flow, *flow.towers):
        yield from _along(line)


def _along(flow: Flow) -> Iterator[Outcome]:
    lost, limit = flow.lost, max(threshold(flow.layers), LUCK * flow.spread)
    if zero := stuck(flow):
        yield _all_zero(zero)
        return
    if math.isnan(lost) and flow.decades == -math.inf:
        zero = any(p.fan_in and p.weight_norm == 0 and p.state != "frozen" for p in flow.parameters)
        yield Unexamined(
            "the head passes no gradient yet, its weights being zero: check again after one step"
            if zero
            else "no gradient leaves the head"
        )
        return
    if opening := _opens(flow):
        yield Unexamined(
            f"{opening.name} starts at zero, as the second matrix of a low-rank adapter does, and opens with the first "
            "step: check again after it"
        )
        return
    if stack := _stacked(flow):
        yield stack
        return
    if math.isnan(lost):
        yield Unexamined("no backbone between the loss and an input, so no product of gains")
        return
    if spared(flow):
        yield Unexamined(
            "the loss differentiates the model, and every weight receives a gradient: that of the input alone is exactly "
            "zero, as that of a slope is behind functions of straight pieces"
        )
        return
    where = f"{flow.sites[0].name} … {flow.sites[-1].name}"
    said = (
        f"{lost:+.1f} decades over {flow.lost_over} layers, sigma {_sigma(flow):.3g} per layer"
        if lost > -math.inf
        else f"nothing comes back over {flow.lost_over} layer{'' if flow.lost_over == 1 else 's'}"
    )
    fading = flow.layers >= SEVERAL and _fading(flow) < ALIKE
    if lost > -min(limit, max(WARNING, LUCK * flow.spread)) and not fading:
        yield Healthy(f"{said} (an error from {-limit:.1f})")
        return
    starved = _typical(flow) <= -limit and _starved(flow)
    kept = told_apart(flow)
    alike = not starved and (fading or kept < ALIKE)
    if not (starved or alike) and _recurs(flow):
        yield Healthy(
            f"{said}, along the steps of a recurrence, of which more than {LEFT:.0%} reaches the first"
        )
        return
    worst = sorted(range(len(flow.sites)), key=lambda i: _or_zero(float(flow.column("decades")[i])))[:3]
    step = next((flow.sites[i] for i in worst if flow.sites[i].operation in STEPS), None)
    lone = _lone(flow) if lost == -math.inf else None
    yield Finding(
        CODE,
        NAME,
        Severity.ERROR if starved or alike else Severity.WARNING,
        f"{said}; {_received(lost)}"
        + (f"; at the head {kept:.0e} of what tells the samples apart is left" if alike else ""),
        cause=f"the derivative of {step.operation} is zero everywhere"
        if step and lost == -math.inf
        else FORGOTTEN
        if fading and lost > -WARNING
        else f"{lone.name} normalises each value by itself: less its own mean, nothing is left of it"
        if lone
        else "",
        sites=(lone.place,)
        if lone
        else tuple(flow.sites[i].place for i in worst if _or_zero(float(flow.column("decades")[i])) < 0),
        evidence={
            "decades": lost,
            "decades_end_to_end": flow.decades,
            "layers": flow.lost_over,
            "sigma": _sigma(flow),
            "threshold": -WARNING if alike else -limit,
            "told_apart": kept,
            "told_apart_threshold": ALIKE,
            "finite_width_spread": flow.spread,
            **expected(flow),
            "from_to": where,
        },
        remedies=("straight-through",)
        if step and lost == -math.inf
        else (f"{lone.source or lone.name}: normalise over an axis of several values, such as the features",)
        if lone
        else (
            *dict.fromkeys(leave_out(site) for site in costly(flow)),
            "critical-initialisation",
            "exchange-activation",
            "insert-normalisation",
            "insert-residual",
        ),
    )


def _recurs(flow: Flow) -> bool:
    """Is it one matrix that most layers multiply by, step by step, and does time itself lose little?

    A layer of its own that receives so little moves late; a shared one is moved by the later steps. Gated recurrences
    by hand, 48 units and steps, cost 2.0 to 2.4 decades at gates that keep 0.88 to 0.98, and 3.5 at 0.73, where less than 1% reaches the first step.
    """
    if flow.horizon is None or flow.horizon.steps < math.inf:
        return False
    used: Counter[str] = Counter()
    for i in flow.weighted:
        inside = [flow.sites[i], *(step.site for step in flow.ledgers.get(i, ()))]
        used.update({name for site in inside for name in site.parameters})
    return max(used.values(), default=0) > len(flow.weighted) / 2


def _lone(flow: Flow) -> Site | None:
    """The normalisation that is given one value at a time, whose variance is exactly zero, and passes nothing back."""
    decades = flow.column("decades").tolist()
    lone = (n.site for n in flow.normalisations if n.variance == 0 and n.site.depth >= 0)
    return next((site for site in lone if decades[site.depth] == -math.inf), None)


def costly(flow: Flow) -> list[Site]:
    """The constants below 1, where they cost most of what is lost."""
    sites = damped(flow)
    return sites if sum(math.log10(flow.factors[site.depth]) for site in sites) <= FACTORS * flow.lost else []


def damped(flow: Flow) -> list[Site]:
    """Where the signal is multiplied by a constant below 1 between the input layer and the head."""
    return [site for site in flow.sites[flow.hidden] if flow.factors.get(site.depth, 1.0) < 1]


def stuck(flow: Flow) -> list[Parameter]:
    """Weights that start at zero, where none that does receives a gradient, and at most the head learns beside them.

    A single layer of zeros receives one and opens with the first step, and then what lies before it. Where a second
    one does, as in an adapter of which both matrices are zero, each is the reason why the other receives nothing.
    """
    biases = {p.name for p in flow.parameters if p.bias or p.name.rpartition(".")[2].startswith("bias")}
    zero = [p for p in flow.parameters if p.weight_norm == 0 and p.name not in biases]
    opens = any(p.state == "measured" and p.grad_norm_log10 > -math.inf for p in zero)
    shut = any(p.state == "frozen" and len(p.shape) > 1 for p in zero)
    closed = [
        p for p in zero if p.state == "measured" and p.grad_norm_log10 == -math.inf and len(p.shape) > 1
    ]
    learn = [p for p in flow.parameters if len(p.shape) > 1 and p.grad_norm_log10 > -math.inf]
    return closed if len(closed) > 1 and len(learn) < 2 and not opens and not shut else []


def _stacked(flow: Flow) -> Finding | None:
    """A stack of recurrent layers in one kernel, of which only the whole is seen. What closed gates cost is RN603's."""
    if flow.horizon is not None and any(r.passes_most < LEFT for r in flow.horizon.recurrences):
        return None
    decades = flow.column("decades").tolist()
    for i, site in enumerate(flow.sites):
        if site.kind != "recurrent":
            continue
        above = f"{site.module}.weight_hh_l".lstrip(".")
        layers = len({p.name.rpartition("_l")[2] for p in flow.parameters if p.name.startswith(above)})
        limit = max(STACKED, layers)
        if layers > 1 and -math.inf < decades[i] < -limit:
            return Finding(
                CODE,
                NAME,
                Severity.ERROR,
                f"{decades[i]:+.1f} decades over the {layers} layers of {site.name}",
                cause="the weights of the recurrent layers are too small for what they are given (not tested)",
                sites=(site.place,),
                evidence={
                    "decades": decades[i],
                    "layers": layers,
                    "sigma": per_layer(decades[i], layers),
                    "threshold": -limit,
                    "cause": "initialisation",
                },
                remedies=("recurrent-initialisation",),
            )
    return None


def _all_zero(zero: list[Parameter]) -> Finding:
    return Finding(
        CODE,
        NAME,
        Severity.ERROR,
        f"{len(zero)} weights start at exactly zero, one behind the other: none of them receives any gradient, for good",
        cause="each of these weights is the reason why the others receive nothing: drawn at random they do",
        sites=tuple(p.name for p in zero[:3]),
        evidence={"decades": -math.inf, "zero_weights": len(zero), "cause": "initialisation"},
        remedies=("critical-initialisation",),
    )


def _opens(flow: Flow) -> Site | None:
    """A layer of zeros that alone holds back the gradient of the one behind it, and receives one itself.

    Of several behind it, where the model's input reaches the loss by another way: its signal is not lost with theirs.
    """
    if flow.lost != -math.inf:
        return None
    decades, weighted = flow.column("decades").tolist(), flow.column("weighted").tolist()
    last = max(i for i, lost in enumerate(decades) if lost == -math.inf)
    waking = [p.name for p in flow.parameters if p.weight_norm == 0 and p.grad_norm_log10 > -math.inf]
    site = flow.sites[last]
    # Coupling layers pass the data by.
    around = bool(flow.inputs) and flow.sites[0].kind not in ("input", "embedding")
    own = any(
        name in site.parameters or (not site.parameters and name.rpartition(".")[0] == site.module)
        for name in waking
    )
    return site if own and (around or sum(weighted[:last]) <= 1) else None


def spared(flow: Flow) -> bool:
    """Is it the input alone that receives nothing of a derivative that the loss takes, while all weights do?

    A gradient penalty knows the model by its slope, a product of weights, which through ReLUs is the same all around a
    sample. A second derivative of straight pieces is zero itself, and teaches nobody.
    """
    weights = [p for p in flow.parameters if len(p.shape) > 1 and p.state in ("measured", "stepped")]
    if flow.lost != -math.inf or not weights or any(p.grad_norm_log10 == -math.inf for p in weights):
        return False
    lost = (i for i, decades in enumerate(flow.column("decades").tolist()) if decades == -math.inf)
    rms = flow.column("activation_rms")
    return all(flow.sites[i].operation == "grad" and rms[i] > 0 for i in lost)


def told_apart(flow: Flow) -> float:
    """What is left at the input of the head of what differs between the samples, as a share of the signal; NaN: unknown.

    Source: Schoenholz et al. 2017, section 3: in the ordered phase the correlation of any two inputs goes to 1.
    """
    known = _differing(flow)
    return float(known[-1] / known[0]) if len(known) > 1 and known[0] > 0 else math.nan


def _fading(flow: Flow) -> float:
    """The same, if it fell all the way as it does from the first half of the sites to the second, where that is more.

    An embedding that is small beside the first bias loses as much at once, and grows back.
    """
    known = _differing(flow)
    first, second = known[: len(known) // 2], known[len(known) // 2 :]
    if not len(first) or not float(first.median()) > 0:
        return told_apart(flow)
    return max(told_apart(flow), float(second.median() / first.median()) ** 2)


def _differing(flow: Flow) -> Tensor:
    """Share of the signal that differs between the samples at each site before the head where that is known."""
    layers = flow.weighted
    before = flow.column("varying")[: layers[-1] if layers else 0]
    return before[before.isfinite()]


def expected(flow: Flow) -> dict[str, float]:
    """Evidence: what theory expects of random weights of these sizes, where it applies to every layer counted."""
    part = flow.expected.over(flow.lost_part)
    if part is None or not part.whole:
        return {}
    return {"expected": part.decades, "expected_spread": part.spread}


def _typical(flow: Flow) -> float:
    """Decades lost; of weights that were lucky, within two standard deviations, what theory expects of their like."""
    theory = expected(flow)
    if not theory or not 0 < flow.lost - theory["expected"] <= 2 * theory["expected_spread"]:
        return flow.lost
    return theory["expected"]


def _starved(flow: Flow) -> bool:
    """Does more than the first layer receive little, or any layer nothing at all, for good?

    A first layer that is all but frozen still feeds the others, which learn from what it makes. A part without a
    backbone, as a U-Net between its input and its head, counts layer by layer.
    """
    if flow.lost == -math.inf:
        return True
    reaching = flow.column("decades").nan_to_num(0.0, neginf=-math.inf).flip(0).cumsum(0).flip(0).tolist()
    layers = flow.weighted
    reached: list[float] = []
    for i in layers:
        above = reaching[i + 1] if i + 1 < len(reaching) else 0.0
        inside = [s.level for s in flow.ledgers.get(i, ()) if s.site.kind in WEIGHTED and not s.branch]
        reached += [above + level for level in inside if not math.isnan(level)] or [above]
    head = reaching[layers[-1]] if layers else 0.0
    return len(reached) < 3 or sum(not share - head > -WARNING for share in reached) > 1


def _received(lost: float) -> str:
    if lost == -math.inf:
        return "the gradient of the first layers is exactly zero"
    share = f"{10**lost:.0e}" if lost > -300 else f"10^{lost:.0f}"
    return f"the first layers receive {share} of the gradient at the head"


def _sigma(flow: Flow) -> float:
    return per_layer(flow.lost, max(flow.lost_over, 1))


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value
