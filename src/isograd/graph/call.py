"""What is kept of the calls of a forward: plain facts, and statistics that are still on their device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import Node

from isograd.graph.operations import WEIGHTED


@dataclass(slots=True)
class Call:
    """One call of a torch function and the module it happened in."""

    operation: str
    kind: str
    module: str
    invocation: int
    """Number of the module call it happened in: a shared layer is called several times."""
    source: str
    order: int
    leaf: str
    """Class name of that module if it has no children, else ''."""
    unit_dim: int = -1
    """Dimension of the output along which units (features, channels) lie."""
    data: bool = False
    """Reads a tensor that no gradient reaches: the entrance of the model's data."""
    user_input: bool = False
    """That tensor is one of the arguments given to the model."""
    parameters: tuple[str, ...] = ()
    """Names of the model's parameters that it works with; of an attention, those that made its values."""
    settings: tuple[tuple[str | int, object], ...] = ()
    """Its arguments that are no tensors, by name or position: a slope, a stride, whether it is training."""
    given: tuple[tuple[str, Tensor], ...] = ()
    """The numbers it works with that no gradient reaches (a target, a mask, a buffer), and which argument they are."""

    @property
    def weighted(self) -> bool:
        """Multiplies by weights: a layer in the sense of sigma^L."""
        return self.kind in WEIGHTED or self.operation == "multi_head_attention_forward"


@dataclass(slots=True)
class Made:
    """What is known of one autograd node."""

    call: Call
    shape: tuple[int, ...] | None = None
    """None: not the result of its call, but a step towards it."""
    dtype: str = ""
    rms: Tensor | None = None
    distinct: Tensor | None = None
    """Root mean square of what belongs to one token alone."""
    varying: Tensor | None = None
    """Root mean square of what differs between the samples."""


@dataclass(slots=True)
class ActivationStatistics:
    """Derivative statistics of one activation call, as tensors on its device."""

    node: Node
    function: str
    values: Tensor
    """mean |phi'|, saturated share, dead share of units."""
    units: int
    samples: int


@dataclass(slots=True)
class NormalisationStatistics:
    """One normalisation call and what it divides by."""

    node: Node
    epsilon: float
    variance: Tensor
    """Mean variance of what it was given; of an RMS norm its mean square."""
    given: Tensor | None
    """The same, where `variance` is a running one."""
    weights: tuple[str, ...] = ()
    """Parameters of the layer whose result it was given."""


@dataclass(slots=True)
class AttentionStatistics:
    """One attention at work."""

    node: Node
    spread: Tensor
    """How far it leaves several positions open: see `signal.spread`."""


@dataclass(slots=True)
class LossCall:
    """A loss function at work: the facts about its input and target, before any gradient."""

    function: str
    node: Node | None
    input_node: Node | None
    shape: tuple[int, ...]
    values: Tensor
    """input min, max, largest |row sum - 1|, std; target min, max; excess: see `signal.excess`."""
    target: str
    """'classes', 'values' or ''."""
    pairs: bool
    """Is each output compared with all targets?"""
