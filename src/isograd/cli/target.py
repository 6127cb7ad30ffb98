"""TARGET: `file.py:name` or `package.module:name`, and what `name` may be."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import click
from torch import Tensor, nn

from isograd.cli import losses
from isograd.cli.errors import TargetError, users_code
from isograd.cli.inputs import InputSpec, suggestion
from isograd.pages import nearest

FORMS = "an nn.Module, (model, batch), or (model, loss) where loss(model) is a scalar"


@dataclass(frozen=True)
class Target:
    """A model with its loss, as `isograd.check` takes them."""

    text: str
    """As it was typed."""
    model: nn.Module
    loss: losses.Loss


def load(text: str, inputs: Sequence[InputSpec] = (), *, seed: int = 0) -> Target:
    """The model and the loss that TARGET names.

    A bare module is given `inputs`, and random weights on its outputs (fixed by `seed`) as its loss. The
    loss raises `TargetError` where the user's own code raises.

    Raises:
        TargetError: no such file or name, or it is none of the forms that a target may have.
    """
    found = resolve(text)
    if isinstance(found, nn.Module):
        return _bare(text, found, inputs, seed)
    if not callable(found):
        raise TargetError(
            f"{text} is {_described(found)}",
            why=f"a target is an nn.Module, or a function without required arguments that returns {FORMS}",
        )
    made = _called(text, found)
    match made:
        case nn.Module():
            return _bare(text, made, inputs, seed)
        case (nn.Module() as model, second):
            if inputs:
                raise TargetError(
                    f"{text} brings its own data", why="--input describes that of a bare module"
                )
            if callable(second) and not isinstance(second, Mapping | Tensor):
                _check_loss(text, second)
                return Target(text, model, _guarded(text, cast(losses.Loss, second)))
            hint = _batch_hint(second)
            return Target(text, model, _guarded(text, losses.of_batch(second, seed), type_=hint))
        case _:
            raise TargetError(f"{text} returned {_described(made)}", why=f"it must return {FORMS}")


# -- what the text names -------------------------------------------------------------------------------


def resolve(text: str, *, model: bool = True) -> Any:
    """The object that a target's text names, not yet called. `model`: it should be one, and others are offered."""
    place, colon, name = text.rpartition(":")
    if not colon:
        place, name = text, ""
    module = _imported(place, text)
    if not name:
        raise TargetError(
            f"{text} names no model",
            why="a target is file.py:name or package.module:name",
            type_=_offer(place, module),
        )
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            near = nearest(name, vars(module))
            raise TargetError(
                f"{place} has no name {name!r}{near}", type_=_offer(place, module) if model else ""
            )
        found = getattr(found, part)
    return found


def _imported(place: str, text: str) -> ModuleType:
    if place.endswith(".py") or "/" in place or "\\" in place:
        path = Path(place).resolve()
        if not path.is_file():
            near = nearest(path.stem, (p.stem for p in path.parent.glob("*.py")))
            raise TargetError(f"there is no file {place}{near}")
        with _as_script(path), users_code(f"{place} could not be imported"):
            return _import_file(path)
    if not all(place.split(".")):
        raise TargetError(
            f"{text} names no file and no module", why="a target is file.py:name or package.module:name"
        )
    sys.path.insert(0, str(Path.cwd()))
    with users_code(f"{place} could not be imported"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is not None and (place == error.name or place.startswith(error.name + ".")):
                type_ = (
                    f"{_command()} {place}.py:{text.rpartition(':')[2]}"
                    if Path(f"{place}.py").is_file()
                    else ""
                )
                raise TargetError(f"there is no module {place}", type_=type_) from None
            raise


def _import_file(path: Path) -> ModuleType:
    """Import as its package would, so that relative imports work; a lone file as a script would be."""
    root, names = path.parent, [path.stem]
    while (root / "__init__.py").is_file():
        names.insert(0, root.name)
        root = root.parent
    sys.path.insert(0, str(root))
    name = ".".join(names)
    if len(names) > 1:
        return importlib.import_module(name.removesuffix(".__init__"))
    if name in sys.modules:  # a user's `random.py` must not replace the library's
        name = f"{name}_target"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up by name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _as_script(path: Path) -> Iterator[None]:
    """A script that reads its options when it is imported finds none, instead of ours."""
    given, sys.argv = sys.argv, [str(path)]
    try:
        yield
    finally:
        sys.argv = given


def _command() -> str:
    """The command that was typed, to be typed again."""
    context = click.get_current_context(silent=True)
    return f"isograd {context.info_name if context is not None else 'check'}"


def _offer(place: str, module: ModuleType) -> str:
    """The commands for the models that this file seems to hold."""
    names = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (
            isinstance(value, nn.Module)
            or (
                callable(value)
                and getattr(value, "__module__", "") == module.__name__
                and not _required(value)
            )
        )
    ]
    return "\n".join(f"{_command()} {place}:{name}" for name in names[:5])


# -- what the name gives -------------------------------------------------------------------------------


def _called(text: str, build: Callable[..., Any]) -> Any:
    if required := _required(build):
        raise TargetError(
            f"{text} needs arguments: {', '.join(required)}",
            why="a target is called without any",
            type_=f"a function in the same file: def build(): return {getattr(build, '__name__', 'it')}(…)",
        )
    with users_code(f"{text} raised while the model was built"):
        return build()


def _required(build: Callable[..., Any]) -> list[str]:
    """Names of the arguments that have to be given."""
    try:
        parameters = inspect.signature(build).parameters.values()
    except ValueError:  # a builtin without a signature: calling it will tell
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


def _bare(text: str, model: nn.Module, inputs: Sequence[InputSpec], seed: int) -> Target:
    if not inputs:
        raise TargetError(
            f"{text} is a model without data",
            why="its input has to be described, or its loss given",
            type_=f"{_command()} {text} {suggestion(model)}\n"
            f"or a function that returns (model, loss), where loss(model) is the training loss on one batch",
        )
    with users_code(f"the input for {text} could not be made"):
        args, kwargs = losses.random_inputs(model, inputs, seed)
    why = f"the data was {' '.join(f'--input {spec}' for spec in inputs)}"
    type_ = f"{_command()} {text} {suggestion(model)}"
    return Target(text, model, _guarded(text, losses.of_call(args, kwargs, seed), why=why, type_=type_))


def _check_loss(text: str, loss: Callable[..., Any]) -> None:
    """A criterion of (output, target) is not yet a loss: it knows no data."""
    if isinstance(loss, nn.Module) or len(_required(loss)) > 1:
        raise TargetError(
            f"{text} returned {_described(loss)} as its loss",
            why="the loss is called as loss(model), and brings the data itself",
            type_="return model, lambda m: criterion(m(x), y)",
        )


def _guarded(text: str, loss: losses.Loss, *, why: str = "", type_: str = "") -> losses.Loss:
    def guarded(model: nn.Module) -> Tensor:
        with users_code(f"{text} raised in the forward pass", why=why, type_=type_):
            return loss(model)

    return guarded


def _batch_hint(batch: Any) -> str:
    if not isinstance(batch, tuple | list):
        return ""
    count = len(cast(Sequence[Any], batch))
    return (
        f"the batch was passed as model(*batch), with {count} arguments; if it holds a target too,\n"
        "return (model, loss), for example (model, lambda m: cross_entropy(m(x), y))"
    )


def _described(value: Any) -> str:
    if isinstance(value, tuple):
        inside = ", ".join(type(part).__name__ for part in value)  # pyright: ignore[reportUnknownVariableType,reportUnknownArgumentType]
        return f"a tuple of ({inside})"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
