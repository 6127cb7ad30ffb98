"""Changes of the torch calls that a module's forward makes, for code that calls functions where others hold modules.

A forward runs under a function mode, which sees each call of torch below it. What a prescription prints contains
these names in full: everything here depends on torch and on other names of this file only.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

COMPILED = "a function mode looks at its calls of torch"


class Under:
    """A forward that runs under a mode; it has the signature of the forward that it holds.

    `torch.compile` runs it as it is: a compiled graph knows neither lines nor tensors that are the same object, and
    would leave the change out without a word.
    """

    def __init__(
        self, forward: Callable[..., Any], mode: Callable[..., TorchFunctionMode], *options: Any
    ) -> None:
        self.__wrapped__, self.mode, self.options = forward, mode, options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(self.run, reason=COMPILED)(*args, **kwargs)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with self.mode(*self.options):
            return self.__wrapped__(*args, **kwargs)


# -- standardised data ---------------------------------------------------------------------------------


def standardise_argument(
    module: nn.Module,
    name: str,
    mean: float | tuple[float, ...],
    std: float | tuple[float, ...],
    dim: int = -1,
) -> None:
    """Give `module.forward` the argument `name` as (x - mean) / std, of all features or of each along `dim`."""
    module.forward = Standardising(module.forward, name, mean, std, dim)


class Standardising:
    """A forward that standardises one of its arguments; it has the signature of the forward that it holds."""

    def __init__(
        self,
        forward: Callable[..., Any],
        name: str,
        mean: float | tuple[float, ...],
        std: float | tuple[float, ...],
        dim: int,
    ) -> None:
        self.__wrapped__, self.name, self.mean, self.std, self.dim = forward, name, mean, std, dim

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(self.__wrapped__).bind(*args, **kwargs)
        x = given.arguments[self.name]
        mean, std = x.new_tensor(self.mean), x.new_tensor(self.std)
        shape = [1] * x.ndim
        shape[self.dim] = mean.numel()
        given.arguments[self.name] = (x - mean.view(shape)) / std.view(shape)
        return self.__wrapped__(*given.args, **given.kwargs)


# -- another activation ----------------------------------------------------------------------------


def exchange_calls(
    module: nn.Module, of: str, to: str, lines: Sequence[str] = (), extra: Sequence[float] = ()
) -> None:
    """Let `module.forward` get the result of torch's function `to` where it calls the activation `of`.

    Only at these lines (`net.py:17`); without them, everywhere below it. `extra` are further arguments of `to`.
    """
    module.forward = Under(module.forward, ExchangedCalls, of, to, tuple(lines), tuple(extra))


class ExchangedCalls(TorchFunctionMode):
    """The function `to` in place of the activation `of`, at these lines or everywhere."""

    def __init__(self, of: str, to: str, lines: tuple[str, ...], extra: tuple[float, ...]) -> None:
        super().__init__()
        self.of, self.lines, self.extra = of, lines, extra
        self.to = getattr(torch, to, None) or getattr(functional, to)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = getattr(func, "__name__", "").strip("_") == self.of
        if not named or (self.lines and calling_line() not in self.lines):
            return func(*args, **(kwargs or {}))
        return self.to(args[0] if args else kwargs["input"], *self.extra)


def calling_line() -> str:
    """`net.py:17`: where the call of torch stands that a function mode has just been given."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(os.path.dirname(torch.__file__)):
            return f"{os.path.basename(file)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


# -- without a factor ------------------------------------------------------------------------------


def leave_out_factor(module: nn.Module, of: str, lines: Sequence[str], inverse: bool = False) -> None:
    """Let `module.forward` get the tensor itself where it calls `of`, `mul` or `truediv`, with one number, at these lines.

    With `inverse`, the tensor divided by what it is multiplied by, or multiplied by what it is divided by.
    """
    module.forward = Under(module.forward, WithoutFactor, of, tuple(lines), inverse)


class WithoutFactor(TorchFunctionMode):
    """x, or the inverse call, in place of x * number and x / number, at these lines."""

    def __init__(self, of: str, lines: tuple[str, ...], inverse: bool) -> None:
        super().__init__()
        self.of, self.lines, self.inverse = of, lines, inverse

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "").strip("_") == self.of and calling_line() in self.lines:
            tensors = [given for given in args if isinstance(given, Tensor) and given.numel() > 1]
            if len(tensors) == 1 and not self.inverse:
                return tensors[0]
            if len(tensors) == 1:
                (number,) = (given for given in args if given is not tensors[0])
                return tensors[0] / number if "mul" in self.of else tensors[0] * number
        return func(*args, **(kwargs or {}))


# -- numerically safe logarithms -------------------------------------------------------------------


def log_in_log_space(module: nn.Module) -> None:
    """Let `module.forward` compute every log of a softmax or sigmoid in log space."""
    module.forward = Under(module.forward, StableLog)


class StableLog(TorchFunctionMode):
    """log(softmax(x)) and log(sigmoid(x)) are computed as log_softmax(x) and logsigmoid(x): the same numbers.

    Where the probability underflows, the plain form gives -inf and a gradient of NaN.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[Tensor, int, str, Any, Any]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "log" and args and id(args[0]) in self.made:
            out, version, how, given, options = self.made[id(args[0])]
            if out._version == version:  # else changed in place since: no softmax any more
                plain = how == "sigmoid"
                return functional.logsigmoid(given[0]) if plain else functional.log_softmax(*given, **options)
        out = func(*args, **kwargs)
        if name in ("softmax", "sigmoid") and isinstance(out, Tensor):
            self.made[id(out)] = (out, out._version, name, args, kwargs)  # held, so that its id stays its own
        return out


# -- skip connections ------------------------------------------------------------------------------


def skip_calls(module: nn.Module, activation: str, scale: float) -> None:
    """Let `module.forward` add the input of each layer that keeps its width to what its activation returns."""
    module.forward = Under(module.forward, SkipCalls, activation, scale)


class SkipCalls(TorchFunctionMode):
    """h + scale * phi(layer(h)) wherever a call of `activation` follows a layer that keeps the shape of its input."""

    def __init__(self, activation: str, scale: float) -> None:
        super().__init__()
        self.activation, self.scale = activation, scale
        self.entered: dict[int, tuple[Tensor, Tensor]] = {}
        """Input of the layer that a tensor came from, by the tensor's id; the tensor is held with it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_")
        if not args or not isinstance(out, Tensor) or not isinstance(args[0], Tensor):
            return out
        came_from = self.entered.get(id(args[0]))
        if name in ("linear", "conv1d", "conv2d", "conv3d"):
            self.entered[id(out)] = (args[0], out)
        elif came_from is not None and name == self.activation and came_from[0].shape == out.shape:
            return came_from[0] + self.scale * out
        elif came_from is not None and (name.endswith("norm") or name.startswith("dropout")):
            self.entered[id(out)] = (came_from[0], out)
        return out
