"""Networks without skips: deep MLPs and plain CNNs on the digits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from torch import nn

from benchmarks.twins import faults
from benchmarks.twins.case import Case, Make, Plant
from benchmarks.twins.data import digits, images
from gallery.nets import HE, Initialise, initialised, mlp, orthogonal, plain_cnn, scaled_normal

DOWN, UP, DECOY = "vanishing", "exploding", "decoy"
WIDTH = 48


def _he(depth: int) -> Initialise:
    """He's gain; orthogonal where a Gaussian draw of narrow layers spreads too much to train every time."""
    return HE if depth < 16 else orthogonal(math.sqrt(2))


def _mlp(activation: Callable[[], nn.Module], depth: int, weights: Initialise) -> Make:
    return lambda: mlp(activation, depth, WIDTH, weights)


def _cases(
    model: str, family: str, make: Make, planted: dict[str, tuple[str, Plant]], **training: float | str
) -> Iterator[Case]:
    task = images if family == "cnn" else digits
    for fault, (kind, plant) in planted.items():
        yield Case(f"{model} / {fault}", family, make, plant, task, kind, **training)  # type: ignore[arg-type]


def relu_mlps() -> Iterator[Case]:
    for depth in (8, 16, 24):
        planted: dict[str, tuple[str, Plant]] = {
            "torch's default initialisation": (DOWN, faults.torch_default),
            "weights x 0.4": (DOWN, faults.rescale(0.4)),
            "weights N(0, 0.01)": (DOWN, faults.redraw(0.01)),
            "weights N(0, 1)": (UP, faults.redraw(1.0)),
            "weights x 3": (UP, faults.rescale(3.0)),
            "sigmoid": (DOWN, faults.exchange(nn.ReLU, nn.Sigmoid)),
            "biases -2": (DOWN, faults.biases(-2.0)),
            "one layer x 0.0001": (DOWN, faults.one_layer(1e-4)),
        }
        yield from _cases(f"relu mlp {depth}", "mlp", _mlp(nn.ReLU, depth, _he(depth)), planted)


def other_mlps() -> Iterator[Case]:
    for depth in (16, 30, 50):
        planted: dict[str, tuple[str, Plant]] = {
            "torch's default initialisation": (DOWN, faults.torch_default),
            "weights x 0.4": (DOWN, faults.rescale(0.4)),
            "weights x 4": (UP, faults.rescale(4.0)),
            "sigmoid": (DOWN, faults.exchange(nn.Tanh, nn.Sigmoid)),
        }
        make = _mlp(nn.Tanh, depth, orthogonal(1.05))
        yield from _cases(f"tanh mlp {depth}", "mlp", make, planted, lr=1e-3)
    for depth in (16, 24):
        planted = {
            "torch's default initialisation": (DOWN, faults.torch_default),
            "weights x 4": (UP, faults.rescale(4.0)),
            "softplus": (DOWN, faults.exchange(nn.GELU, nn.Softplus)),
        }
        make = _mlp(nn.GELU, depth, orthogonal(1.45))
        yield from _cases(f"gelu mlp {depth}", "mlp", make, planted)
    planted = {
        "torch's default initialisation": (DOWN, faults.torch_default),
        "weights x 0.3": (DOWN, faults.rescale(0.3)),
        "weights x 3": (UP, faults.rescale(3.0)),
    }
    yield from _cases("selu mlp 30", "mlp", _mlp(nn.SELU, 30, scaled_normal(1.0)), planted, lr=1e-3)
    planted = {
        "torch's default initialisation": (DOWN, faults.torch_default),
        "weights x 0.5": (DOWN, faults.rescale(0.5)),
        "weights x 2": (UP, faults.rescale(2.0)),
        "sigmoid": (DOWN, faults.exchange(nn.ReLU, nn.Sigmoid)),
    }
    sgd = {"optimizer": "sgd", "lr": 0.02, "steps": 160, "clip": 1.0}
    yield from _cases("relu mlp 12, sgd", "mlp", _mlp(nn.ReLU, 12, HE), planted, **sgd)


def cnns() -> Iterator[Case]:
    for depth in (8, 12):
        planted: dict[str, tuple[str, Plant]] = {
            "torch's default initialisation": (DOWN, faults.torch_default),
            "weights x 0.4": (DOWN, faults.rescale(0.4)),
            "weights x 3": (UP, faults.rescale(3.0)),
            "sigmoid": (DOWN, faults.exchange(nn.ReLU, nn.Sigmoid)),
            "weights N(0, 0.01)": (DOWN, faults.redraw(0.01)),
            "biases -2": (DOWN, faults.biases(-2.0)),
        }

        def make(depth: int = depth) -> nn.Module:
            return initialised(plain_cnn(depth, 8, False), _he(depth + 8))

        yield from _cases(f"relu cnn {depth}", "cnn", make, planted, lr=3e-3)
    planted = {
        "gains N(0, 0.02)": (DOWN, faults.SMALL_GAINS),
        "epsilon 1000": (DOWN, faults.epsilon(1e3)),
        "sigmoid": (DOWN, faults.exchange(nn.ReLU, nn.Sigmoid)),
    }
    for depth in (6, 10):

        def normed(depth: int = depth) -> nn.Module:
            return plain_cnn(depth, 8, True)

        yield from _cases(f"batch-normalised cnn {depth}", "cnn", normed, planted, lr=3e-3)


def decoys() -> Iterator[Case]:
    he = _mlp(nn.ReLU, 8, HE)
    planted: dict[str, tuple[str, Plant]] = {
        "nothing": (DECOY, faults.unchanged),
        "layers x 20 and / 20": (DECOY, faults.balanced(20.0)),
        "a small head": (DECOY, faults.small_head),
        "a loud head": (DECOY, faults.loud),
        "first layer frozen": (DECOY, faults.frozen_first),
        "a third of the first units shut": (DECOY, faults.half_asleep),
    }
    yield from _cases("relu mlp 8", "mlp", he, planted)
    shallow: dict[str, tuple[str, Plant]] = {"nothing": (DECOY, faults.unchanged)}
    sigmoid = _mlp(nn.Sigmoid, 2, scaled_normal(math.sqrt(2)))
    yield from _cases("sigmoid mlp 2", "mlp", sigmoid, shallow, lr=1e-2)
    yield from _cases("batch-normalised cnn 6", "cnn", lambda: plain_cnn(6, 8, True), shallow, lr=3e-3)


def chains() -> Iterator[Case]:
    yield from relu_mlps()
    yield from other_mlps()
    yield from cnns()
    yield from decoys()
