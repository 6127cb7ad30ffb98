"""The law of depth of a model, carried to other depths, and held against models built that deep.

sigma^L is fitted to the layers that were measured. What it says of a deeper model is a prediction, and
where the deeper model is a config away, or a factory builds it, it is built and measured.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from isograd.flow import Flow
from isograd.graph.traced import Loss, unwrapped
from isograd.measure import measure
from isograd.theory.law import Law, law

DEPTH_FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What transformers configurations call their number of blocks."""
DERIVED_FIELDS = ("layer_types",)
"""One entry a block: left to the configuration to fill in anew."""


@dataclass(frozen=True, slots=True)
class Deeper:
    """One depth: what the law says of it, and what was found."""

    depth: int
    """Blocks."""
    layers: int
    """Layers that multiply by weights, as sigma^L counts them."""
    decades: float
    """log10 of the factor on the gradient's norm by the law."""
    error: float
    """Standard error of `decades`: of the fitted sigma, and of the luck of new layers."""
    measured: float
    """The same, of a model built this deep; NaN: none was."""

    @property
    def off(self) -> float:
        """Standard errors between the law and what was found; NaN: not measured."""
        return (self.measured - self.decades) / self.error if self.error > 0 else math.nan


@dataclass(frozen=True, repr=False)
class Extrapolated:
    """The law of one model at other depths. Prints itself."""

    law: Law
    depth: int
    """Blocks of the model that the law was fitted to."""
    deeper: tuple[Deeper, ...]

    def __repr__(self) -> str:
        fit = (
            f"sigma {self.law.sigma:.4g} ± {self.law.error:.2g} per layer, fitted to {self.law.layers} layers"
        )
        share = f"r² {self.law.r2:.2f}" if self.law.r2 >= 0 else "r² below 0"
        how = "one sigma describes the chain" if self.law.r2 > GOOD else "no one sigma describes the chain"
        lines = [
            f"{fit}; {share}: {how}",
            f"{'depth':>7}{'layers':>8}{'by the law':>18}{'measured':>10}{'off':>7}",
        ]
        for d in self.deeper:
            said = f"{d.decades:+.2f} ± {d.error:.2f}"
            found = "" if math.isnan(d.measured) else f"{d.measured:+.2f}"
            off = "" if math.isnan(d.off) else f"{d.off:+.1f}"
            lines.append(f"{d.depth:>7}{d.layers:>8}{said:>18}{found:>10}{off:>7}")
        return "\n".join(line.rstrip() for line in lines)

    def to_json(self) -> str:
        """Everything, with null for what is not finite."""

        def plain(found: dict[str, Any]) -> dict[str, Any]:
            return {k: v if math.isfinite(v) else None for k, v in found.items()}

        deeper = [plain(asdict(d) | {"off": d.off}) for d in self.deeper]
        return (
            json.dumps({"depth": self.depth, "law": plain(asdict(self.law)), "deeper": deeper}, indent=1)
            + "\n"
        )


GOOD = 0.9
"""r² from which one number describes a chain; a power of depth, as along a healthy stream, stays below."""


def extrapolate(
    model: nn.Module,
    loss: Loss,
    depths: Sequence[int],
    *,
    build: Callable[[int], nn.Module] | None = None,
    depth: int | None = None,
    seed: int = 0,
) -> Extrapolated:
    """Fit sigma^L to a model, carry it to other depths, and check it there.

    Args:
        model, loss: as for `measure`; the same loss is taken of the deeper models.
        depths: numbers of blocks (layers, in a plain chain).
        build: makes the model of a depth, drawn anew. Without it, a model of transformers is built from its
            configuration with another number of blocks, and of any other the law alone is told.
        depth: blocks of the model itself; by default those of its configuration, or its layers.
        seed: of the weights of the models that are built. Random generators are left as they were.

    Raises:
        ValueError: the model has no layers on its backbone, one lets no gradient through, or as `measure`.

    Example:
        >>> extrapolate(gpt2, lambda m: m(input_ids=x, labels=x).loss, [24, 48])
        >>> extrapolate(net(10), loss, [20, 50], build=net, depth=10)
    """
    inner = unwrapped(model)[0]
    ledger = measure(model, loss).decades_by_layer
    fitted, own = law(ledger), depth or _blocks(inner) or len(ledger)
    build = build or _builder(inner)
    found: list[Deeper] = []
    for other in depths:
        flow = _built(build, other, loss, seed) if build is not None else None
        layers = len(flow.decades_by_layer) if flow is not None else round(len(ledger) * other / own)
        said = fitted.extrapolate(layers)
        measured = float(flow.decades_by_layer.sum()) if flow is not None else math.nan
        found.append(Deeper(other, layers, said.decades, said.error, measured))
    return Extrapolated(fitted, own, tuple(found))


def _built(build: Callable[[int], nn.Module], depth: int, loss: Loss, seed: int) -> Flow:
    with _seeded(seed):
        return measure(build(depth), loss)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's own generators at a seed, and back where they were."""
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.manual_seed(seed)
        yield


def _field(model: nn.Module) -> str | None:
    config: Any = getattr(model, "config", None)
    return next((name for name in DEPTH_FIELDS if isinstance(getattr(config, name, None), int)), None)


def _blocks(model: nn.Module) -> int | None:
    name, config = _field(model), getattr(model, "config", None)
    return None if name is None else int(getattr(config, name))


def _builder(model: nn.Module) -> Callable[[int], nn.Module] | None:
    """The same class from a configuration with another number of blocks, where it has one."""
    name = _field(model)
    if name is None:
        return None
    first = next(model.parameters())

    def build(depth: int) -> nn.Module:
        config: Any = copy.deepcopy(getattr(model, "config", None))
        given = {k: v for k, v in config.to_dict().items() if k not in DERIVED_FIELDS}
        config = type(config)(**given | {name: depth})
        kind: Any = type(model)
        return kind(config).to(first.device, first.dtype).train(model.training)

    return build
