"""What is measured of each part of a model: a place, an activation, a normalisation, a parameter, a loss call …

Plain numbers that no longer hold a tensor; `flow.Flow` has them all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Site:
    """A place in a model: where it is, what happens there, and how deep it lies.

    `depth` counts along the backbone from the input (0) to the loss.
    """

    name: str
    """What the user would call it: `h.3 · residual add`."""
    kind: str
    """linear, convolution, activation, normalisation, residual add, attention, embedding,
    recurrent, pooling, dropout, softmax, elementwise, reshape, custom, input, loss."""
    operation: str
    """The autograd operation: `addmm`, `gelu`."""
    module: str
    """Module path in the model, '' for the root or for code outside of any module."""
    source: str
    """`file.py:112` in the user's code, or '' when no frame of theirs was found."""
    shape: tuple[int, ...]
    dtype: str
    depth: int
    parameters: tuple[str, ...] = ()
    """Names of the parameters that it works with; of an attention, those that made its values."""
    settings: tuple[tuple[str | int, object], ...] = ()
    """Arguments of its call that are no tensors, by name or position: a slope, a stride, whether it is training."""

    @property
    def numbers(self) -> list[float]:
        """The numbers among the arguments of its call."""
        return [v for _, v in self.settings if isinstance(v, int | float) and not isinstance(v, bool)]

    @property
    def over_samples(self) -> bool:
        """Is it a softmax that sums to 1 along the first axis, which is not that of its classes as well?"""
        given = dict(self.settings)
        along = given.get("dim", given.get(1))
        if "softmax" not in self.operation or not isinstance(along, int) or len(self.shape) < 2:
            return False
        return along % len(self.shape) == 0 and 1 < self.shape[0] != self.shape[-1]

    @property
    def place(self) -> str:
        """Name, kind and source on one line."""
        return " · ".join(part for part in (self.name, self.source) if part)


@dataclass(frozen=True, slots=True)
class Step:
    """One operation inside a segment: a row of the ledger that says which operation costs what."""

    site: Site
    level: float
    """log10 of the gradient norm at its output over that at the segment's output; NaN: not measured."""
    decades: float
    """What it costs: the level below it less its own; NaN where its gradient forks."""
    activation_rms: float
    branch: bool
    """Lies on the branch of a residual block."""


@dataclass(frozen=True, slots=True)
class Split:
    """How much of the gradient that leaves a residual segment came by which way.

    The two are norms relative to the gradient that entered the segment, and do not add up to
    the gain: the vectors do.
    """

    skip: float
    branch: float
    forward_ratio: float
    """rms(branch output) / rms(stream) in the forward pass; NaN: not measured."""
    projected: bool = False
    """The skip leads through a layer, whose gain is that of its weights: a shortcut where the width changes, a frozen layer
    beside its adapter, one expert beside the others."""


@dataclass(frozen=True, slots=True)
class Activation:
    """One activation function at work: how much of the gradient it lets through."""

    site: Site
    function: str
    bottleneck: bool
    """All gradient of its backbone segment or residual branch passes through it."""
    mean_derivative: float
    """Mean of |phi'| over all elements."""
    saturated: float
    """Share of elements whose |phi'| is below 5% of the function's largest derivative;
    0 for functions that saturate on one side only by design (ReLU and its relatives)."""
    dead: float
    """Share of units whose derivative is exactly 0 for every sample and position."""
    units: int
    samples: int
    """Samples and positions each unit was seen on."""
    abreast: bool = False
    """It stands beside others of its function, as in an Inception block, and all gradient of the segment or branch
    passes through one of them."""

    gate: bool = False
    """Its output is multiplied with another part of the signal, inside of the model."""
    output_rms: float = math.nan

    @property
    def carries(self) -> bool:
        """Can the signal get round it by no way but through the same function?"""
        return self.bottleneck or self.abreast


@dataclass(frozen=True, slots=True)
class Normalisation:
    """One normalisation at work: what it divides by is sqrt(variance + epsilon)."""

    site: Site
    epsilon: float
    variance: float
    """Mean variance of what it was given; of an RMS norm its mean square."""
    output_rms: float
    """Root mean square of its output, behind gain and shift."""
    given: float = math.nan
    """Mean variance of what it was given, where it divides by that of the past instead; NaN: it does not."""
    weights: tuple[str, ...] = ()
    """Parameters of the layer whose result it was given as it is; empty: of none, or of none that was seen."""

    @property
    def fixed(self) -> bool:
        """Does it divide by running statistics?"""
        return not math.isnan(self.given)

    @property
    def fits(self) -> float:
        """Scale of what running statistics make of its input: 1 where they are those of the input."""
        if not self.fixed:
            return 1.0
        return math.sqrt(self.given / self.variance) if self.variance > 0 else math.nan

    @property
    def kept(self) -> float:
        """Scale of its output over that of a normalised one, before gain and shift: 1 where it normalises."""
        whole = self.variance + self.epsilon
        return math.sqrt(self.variance / whole) if self.variance > 0 and whole > 0 else math.nan

    @property
    def gain(self) -> float:
        """Scale that gain and shift give to what is normalised; it is 1 where they start as usual."""
        normalised = self.kept * self.fits
        return self.output_rms / normalised if normalised > 0 else math.nan


@dataclass(frozen=True, slots=True)
class Logits:
    """What happens to the product of queries and keys before its softmax, where both are written out."""

    times: float = 1.0
    """The constants that it is multiplied by, in all."""
    scaled: Site | None = None
    """Where the last of them stands."""
    louder: float = 0.0
    """rms of what is added to it and has a gradient, as a table of relative positions has, over its own; 0: nothing is."""
    added: Site | None = None


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention at work."""

    site: Site
    spread: float
    """Mean of 1 - sum(p^2), the size of its softmax's derivative, over that of even attention."""
    through: float = 1.0
    """Mean |phi'|, over its largest, of the tanh or sigmoid that queries and keys are added in; 1: there is none."""
    logits: Logits | None = None
    """None: one call does it all, or another way than a product leads to them."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter and its gradient, true values: the renormalisation is undone in log space."""

    name: str
    shape: tuple[int, ...]
    state: str
    """'measured', 'frozen' (requires no gradient), 'unused' (its module did not run), 'no-grad' (it ran under
    `no_grad`), 'detached' (it ran, but the loss does not depend on it), 'stepped' (all that the loss knows of it went
    through round, sign or another step, whose derivative is zero), 'inside' (reversible layers: a backward that runs
    inside of the backward gives it its gradient, whose size is not known), or 'unmeasured' (the backward failed)."""
    grad_norm_log10: float
    """log10 of the gradient's L2 norm; -inf: exactly zero; NaN: not measured."""
    weight_norm: float
    zeros: float
    """Share of gradient elements that are exactly 0."""
    nonfinite: int
    """Gradient elements that are NaN or Inf."""
    depth: float
    """Where it acts along the backbone, in sites from the input; NaN: off the backbone."""
    fan_in: int = 0
    """Inputs that each output of its layer sums over; 0: no layer multiplies by it."""
    bias: bool = False
    """A layer adds it."""
    matrices: int = 1
    """Layers that it is the weight of, row behind row: 3 where it makes queries, keys and values at once."""
    generates: int = 0
    """Fan-in of the weight that its layer makes for another, as in a hypernetwork; 0: it makes none."""
    first_update: float = math.nan
    """rms(first update) / rms(weight) under the optimizer's rule; NaN: no optimizer given."""
    weight_mean: float = math.nan
    """Mean of the elements of what a layer multiplies by; NaN: none does."""

    @property
    def rms(self) -> float:
        """Root mean square of the elements."""
        return self.weight_norm / math.sqrt(max(math.prod(self.shape), 1))

    @property
    def sigma_w(self) -> float:
        """Root mean square of the elements times sqrt(fan_in): theory's sigma_w."""
        return self.rms * math.sqrt(self.fan_in)

    @property
    def coherence(self) -> float:
        """Singular value that the mean of the elements makes, over the largest that their scatter does.

        mean sqrt(fan_in fan_out) over std (sqrt(fan_in) + sqrt(fan_out)), the edge of Marchenko and Pastur (1967). Above 1
        one direction stands out: all outputs are nearly the same sum of the inputs.
        """
        mean = abs(self.weight_mean)
        variance = self.rms**2 - mean**2
        if not mean > 0 or math.isnan(variance):
            return mean
        if variance <= 0:
            return math.inf
        wide, tall = math.sqrt(self.fan_in), math.sqrt(math.prod(self.shape) / self.fan_in)
        return mean * wide * tall / (math.sqrt(variance) * (wide + tall))

    @property
    def ratio_log10(self) -> float:
        """log10 of gradient norm over weight norm."""
        if not self.weight_norm > 0:
            return math.nan
        return self.grad_norm_log10 - math.log10(self.weight_norm)


@dataclass(frozen=True, slots=True)
class LossCall:
    """A loss function at work: facts about what it was given, before any gradient."""

    site: Site
    function: str
    source: str
    """Operation that made its input: 'softmax', 'sigmoid', 'linear' …"""
    width: int
    """Elements in one row of its input: classes, or outputs."""
    rows: int
    input_min: float
    input_max: float
    row_sum_error: float
    """Largest |sum of a row - 1|: 0 for probabilities over classes."""
    input_spread: float
    """Largest standard deviation of an output over the rows: 0 if the output ignores the input."""
    target_min: float
    target_max: float
    target: str
    """'classes' or 'values'."""
    excess: float = math.nan
    """How far beyond a constant answer it starts: of classes the loss over that of equal probabilities, of values how far
    the outputs scatter, in standard deviations of the targets; NaN: not known."""
    pairs: bool = False
    """Is each output compared with all targets, (N, 1) with (N,), their shapes being broadcast?"""
    over_samples: bool = False
    """Does the softmax that made its input sum to 1 over the rows, and not over the classes?"""


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """What a float input of the model looks like, over all of its elements."""

    mean: float
    rms: float
    std: float
    largest: float
    """Largest magnitude."""
    varying: float
    """Root mean square, over the features, of the standard deviation between the samples of the batch."""


@dataclass(frozen=True, slots=True)
class ModuleSignal:
    """A module of the user's tree with its signal: rms of its output and log10 gradient norm there."""

    path: str
    kind: str
    """Class name."""
    activation_rms: float
    grad_norm_log10: float


@dataclass(frozen=True, slots=True)
class Failure:
    """A forward or backward that raised: the user's own traceback, kept as text."""

    phase: str
    """'forward' or 'backward'."""
    error: str
    traceback: str
    source: str


@dataclass(frozen=True, slots=True)
class NonFinite:
    """The first operation, in the order of execution, that made a NaN or an Inf, or was given one."""

    phase: str
    site: Site
    what: str
    """What its forward gave, where that was not finite: 'a NaN' or 'an Inf'."""
    cause: str
    """'numerics', 'growth', 'precision', 'data', 'weights', 'mask' or 'empty'."""
    words: str
    """The same for the user, with the names of what is to blame."""
