"""Now and then, or where it breaks, a step is looked at from inside: its flow along the backbone, with its own batch.

The loss is not known to the monitor, but its gradient at the model's outputs is: with that as cotangent the
backward is the user's own. So the step's forward and backward are repeated on the side, once, by
`isograd.measure`, with the random state of the first: the same dropout, the same gradients.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.graph.operations import ACTIVATIONS
from isograd.graph.traced import Loss
from isograd.measure import measure
from isograd.monitor.names import ADDED
from isograd.monitor.parts import Part
from isograd.monitor.sharding import is_sharded
from isograd.nonfinite import find_nonfinite
from isograd.statistics import Site
from isograd.symptoms import nonfinite_backward

REPLAYS = 3
"""Steps that are repeated until one of them tells where it broke."""
SAMPLES = 8
"""A unit that is off half of the time is off in 8 samples by chance once in 256."""


class Staying:
    """A forward hook that stays with its module.

    Copies of a watched model (an average of its weights, a target network) and files it is saved to get
    in its place a function of the standard library that takes the same three arguments and does nothing.
    """

    def __init__(self, hook: Callable[..., object]) -> None:
        self._hook = hook

    def __call__(self, *args: Any) -> None:
        self._hook(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


class Deep:
    """Keeps one step's batch and cotangent, measures its flow, and names what made a NaN in it.

    Attributes:
        every: measure the flow of every so many steps; None: of none.
        replays: steps that break and are still to be repeated.
        last: the flow that was measured last.
        refused: why this model cannot be looked at; '' where it can.
        missed: why the last step that broke was not located; '' where it was.
    """

    def __init__(self, model: nn.Module, every: int | None = None, replay: bool = False) -> None:
        self.every, self.replays = every, REPLAYS if replay else 0
        self.last: Flow | None = None
        self._flow: Flow | None = None
        self._found: tuple[Finding, ...] = ()
        self.refused = self.missed = ""
        if hasattr(model, "_orig_mod"):
            self.refused = "the model is compiled: hooks would compile it again"
        while isinstance(inner := getattr(model, "module", None), nn.Module):  # DDP: no reduction on the side
            if isinstance(model, nn.DataParallel):
                self.refused = (
                    "replicas of a data-parallel model (DataParallel) cannot be looked at one by one"
                )
            model = inner
        if any(is_sharded(p) for p in model.parameters()):
            self.refused = "the model is sharded"
        if not self.refused and type(model).forward is nn.Module.forward:
            self.refused = "the script calls the parts one by one: there is no forward of the whole to repeat"
        self._model = model
        self._handles: list[Any] = []
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._state: Tensor | None = None
        self._precision: tuple[str, torch.dtype] | None = None
        self._cotangents: dict[int, Tensor] = {}

    def prepare(self, step: int) -> None:
        """Keep the batch of a step that is to be looked at, or may have to be."""
        if self.replays or self._due(step):
            self.arm()

    def _due(self, step: int) -> bool:
        return self.every is not None and step % self.every == 0

    def stepping(self, step: int, part: Part) -> None:
        """Look at the step from inside, if it is the turn of one or if it breaks."""
        if self.replays and part.broken:
            self.replay()
        if self._due(step) and self._flow is None:
            self._flow = self.measure()
            self.last = self._flow or self.last

    def replay(self) -> None:
        """Tell where the step broke whose backward has ended, if there are replays left."""
        if self.replays and (found := self.locate()):
            self._found, self.replays = (found,), 1
        self.replays = max(self.replays - 1, 0)

    def taken(self) -> tuple[Flow | None, tuple[Finding, ...]]:
        """What was seen and found in the step that ends."""
        seen = self._flow, self._found
        self._flow, self._found = None, ()
        return seen

    def arm(self) -> None:
        """Keep the next batch."""
        if self.refused or self._handles:
            return
        self._handles = [
            self._model.register_forward_pre_hook(Staying(self._before), with_kwargs=True, prepend=True),
            self._model.register_forward_hook(Staying(self._after)),
        ]

    def measure(self) -> Flow | None:
        """The flow of the step whose backward has ended; None if its batch was not seen."""
        loss, _ = self._repeated()
        self.disarm()
        if loss is None:
            return None
        with torch.enable_grad():
            return measure(self._model, loss)

    def locate(self) -> Finding | None:
        """What made the first value that is not finite in the step whose backward has ended; None: nothing in its last forward."""
        loss, broken = self._repeated()
        self.disarm()
        if loss is None:
            self.missed = (
                self.refused
                or "a step broke, and no forward of the model as a whole was seen whose output got a gradient"
            )
            return None
        with torch.enable_grad():
            found = find_nonfinite(self._model, loss)
        if found is None and broken:
            self.missed = ""
            return Finding(
                nonfinite_backward.CODE,
                nonfinite_backward.NAME,
                Severity.ERROR,
                "the output of the model is finite, and the gradient that the loss sends back to it is not",
                cause="the loss function, its targets, or what the script does between the model and it",
                evidence={"operation": "", "source": "", "phase": "loss"},
                remedies=("safe-loss", "safe-derivative"),
            )
        self.missed = (
            ""
            if found is not None
            else "a step broke, and nothing in the last forward here: it was one before it, or another process"
        )
        return found

    def _repeated(self) -> tuple[Loss | None, bool]:
        """The forward of the batch that is kept, and whether what comes back to it is not finite; that counts as 0."""
        call, cotangents, state = self._call, self._cotangents, self._state
        if call is None or not cotangents:
            return None, False
        finite = {i: torch.nan_to_num(c, nan=0.0, posinf=0.0, neginf=0.0) for i, c in cotangents.items()}
        broken = any(not torch.equal(finite[i], cotangents[i]) for i in finite)

        def loss(model: nn.Module) -> Tensor:
            if state is not None:
                torch.set_rng_state(state)
            with nullcontext() if self._precision is None else torch.autocast(*self._precision):
                outputs = _tensors(model(*call[0], **call[1]))
            direct = _direct({i: outputs[i] for i in finite}, finite)
            return torch.stack([(outputs[i] * sent).sum().float() for i, sent in direct.items()]).sum()

        return loss, broken

    def disarm(self) -> None:
        """Let go of the batch and of the model."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._call, self._cotangents = [], None, {}

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():  # a validation pass
            return
        self._call, self._cotangents = (args, kwargs), {}
        self._state = torch.get_rng_state()
        device = next((p.device.type for p in module.parameters()), "cpu")
        on = torch.is_autocast_enabled(device)
        self._precision = (device, torch.get_autocast_dtype(device)) if on else None

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        for i, leaf in enumerate(_tensors(output)):
            if leaf.requires_grad:
                leaf.register_hook(self._keep(i, self._cotangents))

    @staticmethod
    def _keep(place: int, cotangents: dict[int, Tensor]) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            cotangents[place] = gradient.detach()

        return hook


def _tensors(output: object) -> list[Tensor]:
    """The tensors in what a model returns, each once: containers, dataclasses, and objects such as a distribution."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    waiting: list[object] = [output]
    while waiting:
        for leaf in tree_leaves(waiting.pop(0)):
            if isinstance(leaf, Tensor):
                found.setdefault(id(leaf), leaf)
            elif (
                hasattr(leaf, "__dict__") and id(leaf) not in seen and not isinstance(leaf, nn.Module | type)
            ):
                seen.add(id(leaf))
                waiting.append(list(vars(leaf).values()))
    return list(found.values())


def _direct(outputs: dict[int, Tensor], arrived: dict[int, Tensor]) -> dict[int, Tensor]:
    """What the loss itself sends to each: without what reaches a hidden state by way of an output that is made from it (the
    latent mean of an autoencoder beside the reconstruction), which would count twice."""
    inner = _inner(outputs.values())
    order = {i: -1 if out.grad_fn is None else out.grad_fn._sequence_nr() for i, out in outputs.items()}
    direct: dict[int, Tensor] = {}
    for i in sorted(outputs, key=lambda i: -order[i]):  # the last that was made comes first
        direct[i] = arrived[i]
        if len(direct) > 1 and (order[i] < 0 or outputs[i].grad_fn in inner):
            later = [j for j in direct if j != i]
            try:
                sent: Any = torch.autograd.grad(
                    [outputs[j] for j in later],
                    outputs[i],
                    [direct[j] for j in later],
                    retain_graph=True,
                    allow_unused=True,
                )
            except RuntimeError:  # a reentrant checkpoint has no such backward: what is left is not known
                sent = (arrived[i],)
            through = sent[0]
            if through is not None:
                left = torch.nan_to_num(arrived[i] - through, nan=0.0, posinf=0.0, neginf=0.0)
                rounding = 16 * torch.finfo(left.dtype).eps * through.abs().amax()
                direct[i] = torch.where(left.abs() <= rounding, 0.0, left)
    return direct


def _inner(outputs: Iterable[Tensor]) -> set[object]:
    """Nodes of the graph that one of these is made from."""
    inner: set[object] = set()
    nodes: list[Any] = [output.grad_fn for output in outputs]
    waiting = [edge for node in nodes if node is not None for edge, _ in node.next_functions]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in inner:
            inner.add(node)
            waiting += [edge for edge, _ in node.next_functions]
    return inner


def dead_units(flow: Flow) -> dict[str, float]:
    """Share of units whose derivative is zero for every sample, by the last parameter (its bias, mostly) of
    the layer that feeds them.

    Counted of functions that pass nothing on one side. Where a layer feeds several, the largest share is told.
    """
    shares: dict[tuple[str, str], list[float]] = defaultdict(list)
    for seen in flow.activations:
        if not ACTIVATIONS[seen.function].bounded and seen.samples >= SAMPLES:
            shares[seen.site.name, seen.site.source].append(seen.dead)
    found: dict[str, float] = {}
    feeding = ""
    for site in _forward(flow):
        if site.parameters:
            feeding = ".".join(part for part in site.parameters[-1].split(".") if part not in ADDED)
        waiting = shares.get((site.name, site.source))
        if waiting and feeding:
            found[feeding] = max(waiting.pop(0), found.get(feeding, 0.0))
    return found


def _forward(flow: Flow) -> Iterator[Site]:
    """The backbone from the input on, with what happens inside each segment before the site that ends it."""
    for depth, site in enumerate(flow.sites):
        for step in reversed(flow.ledgers.get(depth, ())):
            if step.site != site:
                yield step.site
        yield site
