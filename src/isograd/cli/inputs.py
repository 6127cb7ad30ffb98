"""`--input 32,64` and `--input input_ids=2,128:int64:500`: shapes, dtypes and bounds of a model's data."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from torch import nn

GRAMMAR = re.compile(
    r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:,\d+)*)(?::(?P<dtype>[a-z]+\d*))?(?::(?P<bound>\d+))?"
)
FLOATS = {"float16", "bfloat16", "float32", "float64"}
INTEGERS = {"int8", "uint8", "int16", "int32", "int64"}
DTYPES = FLOATS | INTEGERS | {"bool"}


@dataclass(frozen=True)
class InputSpec:
    """One tensor: standard normal if its dtype is a float, uniform in [0, bound) if it is an integer."""

    name: str
    """Keyword under which the model takes it; '' for the next positional argument."""
    shape: tuple[int, ...]
    dtype: str
    """'' stands for the dtype of the model's own parameters."""
    bound: int

    def __str__(self) -> str:
        name = f"{self.name}=" if self.name else ""
        dtype = f":{self.dtype}" if self.dtype else ""
        bound = f":{self.bound}" if self.bound else ""
        return f"{name}{','.join(map(str, self.shape))}{dtype}{bound}"


class InputType(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]  # generic from click 8.4
    """Parses `[NAME=]DIM,DIM,…[:DTYPE[:BOUND]]`."""

    name = "spec"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> InputSpec:
        if isinstance(value, InputSpec):
            return value
        parts = GRAMMAR.fullmatch(str(value).strip())
        if parts is None:
            self.fail(
                f"{value!r} is no input; type a shape as 32,64, or with name, dtype and bound as "
                "input_ids=2,128:int64:500",
                param,
                ctx,
            )
        dtype, bound = parts["dtype"] or "", int(parts["bound"] or 0)
        if dtype and dtype not in DTYPES:
            self.fail(f"{dtype!r} is no dtype; there are {', '.join(sorted(DTYPES))}", param, ctx)
        if dtype in INTEGERS and not bound:
            self.fail(
                f"{value!r} needs an upper bound for its integers, as {value}:500 for a vocabulary of 500",
                param,
                ctx,
            )
        if bound and dtype not in INTEGERS:
            self.fail(f"{value!r}: only integers have a bound, and their dtype has to be named", param, ctx)
        shape = tuple(int(size) for size in parts["shape"].split(","))
        return InputSpec(parts["name"] or "", shape, dtype, bound)


def suggestion(model: nn.Module) -> str:
    """An `--input` that would suit the first layer of the model, as far as the layer tells."""
    from torch import nn  # here: parsing a command line needs no torch

    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind not in variadic]
    name = f"{names[0]}=" if len(names) > 1 else ""
    for layer in model.modules():
        match layer:
            case nn.Embedding():
                return f"--input {name}4,16:int64:{layer.num_embeddings}"
            case nn.Linear():
                return f"--input {name}32,{layer.in_features}"
            case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
                return f"--input {name}8,{layer.in_channels}{',32' * len(layer.kernel_size)}"
            case nn.RNNBase():
                return f"--input {name}{'8,32' if layer.batch_first else '32,8'},{layer.input_size}"
            case _:
                continue
    return f"--input {name}32,64"
