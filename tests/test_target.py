"""TARGET in all its forms, and what is said about one that cannot be examined."""

from __future__ import annotations

import dataclasses
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from torch import Tensor, nn

from isograd.cli import losses
from isograd.cli.errors import TargetError
from isograd.cli.inputs import InputSpec, InputType, suggestion
from isograd.cli.target import load, resolve

NET = """
import torch
from torch import nn
import torch.nn.functional as F

class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.fc = nn.Linear(4, width)
    def forward(self, x):
        return self.fc(x)

class Sized(nn.Module):
    def __init__(self, width):
        super().__init__()

class Odd(Net):
    def forward(self, x):
        return helper(self.fc(x))

def helper(x):
    return x.no_such_method()

model = Net()
number = 3
def bare(): return Net()
def with_loss(): return Net(), lambda m: m(torch.ones(2, 4)).square().mean()
def with_tensor(): return Net(), torch.ones(2, 4)
def with_tuple(): return Net(), (torch.ones(2, 4),)
def with_mapping(): return Net(), {"x": torch.ones(2, 4)}
def with_labels(): return Net(), (torch.ones(2, 4), torch.zeros(2))
def with_criterion(): return Net(), F.mse_loss
def with_module(): return Net(), nn.MSELoss()
def three(): return Net(), 1, 2
def text(): return "net"
def raises(): raise KeyError("config")
def chained():
    try:
        raises()
    except KeyError as error:
        raise RuntimeError("no config") from error
"""
BARE = (InputSpec("", (2, 4), "", 0),)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder with `net.py`; what is imported from it is forgotten afterwards."""
    (tmp_path / "net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def said(error: pytest.ExceptionInfo[TargetError]) -> str:
    return error.value.format_message()


# -- what a target may be ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["with_loss", "with_tensor", "with_tuple", "with_mapping"])
def test_a_function_brings_its_own_loss_or_batch(folder: Path, name: str) -> None:
    target = load(f"net.py:{name}")
    assert type(target.model).__name__ == "Net"
    assert target.loss(target.model).shape == ()
    assert target.loss(target.model).requires_grad


@pytest.mark.parametrize("name", ["model", "bare", "Net"])
def test_a_bare_module_takes_the_described_input(folder: Path, name: str) -> None:
    target = load(f"net.py:{name}", BARE)
    loss = target.loss(target.model)
    assert loss.shape == ()
    assert torch.equal(loss, target.loss(target.model)), "the same weights at each call"
    assert not torch.equal(loss, load(f"net.py:{name}", BARE, seed=1).loss(target.model))


def test_a_module_of_a_package(folder: Path) -> None:
    package = folder / "pkg" / "inner"
    package.mkdir(parents=True)
    (folder / "pkg" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "layers.py").write_text("from torch import nn\ndef make(): return nn.Linear(4, 2)\n")
    (package / "net.py").write_text("from .layers import make\ndef build(): return make()\n")
    assert isinstance(load("pkg.inner.net:build", BARE).model, nn.Linear)
    assert isinstance(load("pkg/inner/net.py:build", BARE).model, nn.Linear), (
        "relative imports work by file too"
    )


def test_a_file_sees_its_neighbours(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "neighbour.py").write_text("from torch import nn\nmodel = nn.Linear(4, 2)\n")
    (folder / "uses.py").write_text("from neighbour import model\n")
    monkeypatch.chdir("/")
    assert isinstance(load(f"{folder}/uses.py:model", BARE).model, nn.Linear)


def test_a_file_called_like_a_loaded_module_does_not_replace_it(folder: Path) -> None:
    (folder / "random.py").write_text("from torch import nn\nmodel = nn.Linear(4, 2)\n")
    import random

    assert isinstance(load("random.py:model", BARE).model, nn.Linear)
    assert sys.modules["random"] is random


def test_an_attribute_of_an_attribute(folder: Path) -> None:
    assert isinstance(load("net.py:model.fc", BARE).model, nn.Linear)


def test_a_script_that_reads_its_options_finds_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["isograd", "check", "train.py:model"])
    (folder / "train.py").write_text(
        "import argparse\np = argparse.ArgumentParser()\np.add_argument('--width', type=int, default=2)\n"
        "from torch import nn\nmodel = nn.Linear(4, p.parse_args().width)\n"
    )
    assert load("train.py:model", BARE).model.out_features == 2
    assert sys.argv == ["isograd", "check", "train.py:model"]


def test_what_the_user_prints_stays_out_of_stdout(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "loud.py").write_text(
        "print('importing')\nfrom net import Net\ndef b():\n print('b')\n return Net()\n"
    )
    target = load("loud.py:b", BARE)
    target.loss(target.model)
    assert capsys.readouterr() == ("", "importing\nb\n")


# -- what is said about one that is none ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nett.py:model", ["there is no file nett.py; did you mean net?"]),
        (":model", [":model names no file and no module", "a target is file.py:name"]),
        (".:model", [".:model names no file and no module"]),
        ("nopackage.net:model", ["there is no module nopackage"]),
        ("net.py", ["net.py names no model", "try  isograd check net.py:Net"]),
        ("net.py:modell", ["has no name 'modell'; did you mean model?", "isograd check net.py:with_loss"]),
        ("net.py:number", ["net.py:number is an int", "an nn.Module, or a function"]),
        ("net.py:Sized", ["net.py:Sized needs arguments: width", "def build(): return Sized(…)"]),
        ("net.py:model", ["a model without data", "isograd check net.py:model --input 32,4"]),
        ("net.py:three", ["returned a tuple of (Net, int, int)", "(model, loss)"]),
        ("net.py:text", ["returned a str"]),
        ("net.py:with_criterion", ["called as loss(model)", "lambda m: criterion(m(x), y)"]),
        ("net.py:with_module", ["returned a MSELoss as its loss", "lambda m: criterion(m(x), y)"]),
        ("net.py:raises", ["raised while the model was built", "in raises", "KeyError: 'config'"]),
        ("net.py:chained", ["KeyError: 'config'", "direct cause", "RuntimeError: no config"]),
    ],
)
def test_a_target_that_is_none(folder: Path, text: str, words: list[str]) -> None:
    with pytest.raises(TargetError) as error:
        load(text)
    for word in words:
        assert word in said(error)
    assert "isograd/cli" not in said(error), "no frame of ours"
    assert "importlib" not in said(error)


def test_for_what_is_no_model_no_models_are_offered(folder: Path) -> None:
    with pytest.raises(TargetError) as error:
        resolve("net.py:trainn", model=False)
    assert "has no name 'trainn'" in said(error)
    assert "try" not in said(error)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = (\n", ["could not be imported", "line 1", "SyntaxError"]),
        ("import no_such_package\n", ["No module named 'no_such_package'", "line 1"]),
        ("raise SystemExit(3)\n", ["it called sys.exit", "if __name__ == '__main__':"]),
    ],
)
def test_a_file_that_cannot_be_imported(folder: Path, source: str, words: list[str]) -> None:
    (folder / "faulty.py").write_text(source)
    for text in ("faulty.py:model", "faulty:model"):
        with pytest.raises(TargetError) as error:
            load(text)
        for word in words:
            assert word in said(error)
        assert "isograd/cli" not in said(error)


def test_input_for_a_target_with_data_of_its_own(folder: Path) -> None:
    with pytest.raises(TargetError, match="brings its own data"):
        load("net.py:with_loss", BARE)


def test_an_input_of_the_wrong_shape(folder: Path) -> None:
    target = load("net.py:Net", (InputSpec("", (32, 100), "", 0),))
    with pytest.raises(TargetError) as error:
        target.loss(target.model)
    assert "shapes cannot be multiplied (32x100 and 4x8)" in said(error)
    assert "why  the data was --input 32,100" in said(error)
    assert "try  isograd check net.py:Net --input 32,4" in said(error)
    assert "torch/nn" not in said(error), "nobody can do anything about a frame of torch's"


def test_an_error_in_the_forward_shows_the_users_frames(folder: Path) -> None:
    target = load("net.py:Odd", BARE)
    with pytest.raises(TargetError) as error:
        target.loss(target.model)
    assert "in forward" in said(error)
    assert "in helper" in said(error)
    assert "isograd/" not in said(error)
    assert "try" not in said(error), "other data would not help"


def test_a_batch_with_labels_is_told_from_one_without(folder: Path) -> None:
    target = load("net.py:with_labels")
    with pytest.raises(TargetError) as error:
        target.loss(target.model)
    assert "model(*batch), with 2 arguments" in said(error)


# -- inputs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("32,64", InputSpec("", (32, 64), "", 0)),
        ("7", InputSpec("", (7,), "", 0)),
        ("x=2,3:float16", InputSpec("x", (2, 3), "float16", 0)),
        ("input_ids=2,128:int64:500", InputSpec("input_ids", (2, 128), "int64", 500)),
        ("attention_mask=2,128:bool", InputSpec("attention_mask", (2, 128), "bool", 0)),
    ],
)
def test_an_input_is_read_and_printed_alike(text: str, spec: InputSpec) -> None:
    assert InputType().convert(text, None, None) == spec
    assert str(spec) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("32x64", "type a shape as 32,64"),
        ("", "type a shape as 32,64"),
        ("2,3:float99", "'float99' is no dtype; there are bfloat16"),
        ("2,3:int64", "needs an upper bound for its integers, as 2,3:int64:500"),
        ("2,3:float32:5", "only integers have a bound"),
        ("2,3:500", "only integers have a bound, and their dtype has to be named"),
    ],
)
def test_an_input_that_is_none(text: str, words: str) -> None:
    with pytest.raises(click.BadParameter, match=words):
        InputType().convert(text, None, None)


def test_random_inputs_have_shape_dtype_and_bound() -> None:
    model = nn.Linear(4, 2, dtype=torch.bfloat16)
    specs = [InputType().convert(text, None, None) for text in ("3,4", "ids=5,6:int32:7", "mask=5:bool")]
    (x,), named = losses.random_inputs(model, specs, seed=0)
    assert (x.shape, x.dtype) == ((3, 4), torch.bfloat16)
    assert (named["ids"].shape, named["ids"].dtype) == ((5, 6), torch.int32)
    assert named["ids"].min() >= 0
    assert named["ids"].max() < 7
    assert named["mask"].dtype == torch.bool


@pytest.mark.parametrize(
    ("model", "offered"),
    [
        (nn.Sequential(nn.Linear(5, 2)), "--input 32,5"),
        (nn.Conv2d(3, 8, 3), "--input 8,3,32,32"),
        (nn.Conv1d(3, 8, 3), "--input 8,3,32"),
        (nn.Embedding(50, 8), "--input 4,16:int64:50"),
        (nn.LSTM(6, 8, batch_first=True), "--input input=8,32,6"),
        (nn.Bilinear(3, 4, 2), "--input input1=32,64"),
    ],
)
def test_the_offered_input_suits_the_first_layer(model: nn.Module, offered: str) -> None:
    assert suggestion(model) == offered


# -- the loss of a model that brings none --------------------------------------------------------------


@dataclasses.dataclass
class Output:
    first: Tensor
    second: Tensor | None = None
    loss: Tensor | None = None


class Returns(nn.Module):
    """Returns what `form` makes of two tensors that depend on its weight."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.form = form

    def forward(self) -> Any:
        return self.form(self.weight * 2, self.weight * 3)


@pytest.mark.parametrize(
    "form",
    [
        lambda a, b: (a, b),
        lambda a, b: [a, {"inner": b}],
        lambda a, b: OrderedDict(a=a, b=b, count=3, name="x", ids=torch.arange(2)),
        Output,
        lambda a, b: Output(a, b, loss=torch.zeros(3)),
    ],
)
def test_every_float_output_gets_random_weights(form: Callable[..., Any]) -> None:
    model = Returns(form)
    losses.of_call((), {}, 0)(model).backward()
    weights = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, generator=weights), torch.randn(3, generator=weights)
    assert model.weight.grad is not None
    assert model.weight.grad[:2] == pytest.approx((2 * a + 3 * b)[:2])


@pytest.mark.parametrize(
    "form", [lambda a, b: Output(a, b, loss=b.sum()), lambda a, b: {"loss": b.sum(), "logits": a}]
)
def test_a_loss_among_the_outputs_is_the_loss(form: Callable[..., Any]) -> None:
    assert losses.of_call((), {}, 0)(Returns(form)) == 9


@pytest.mark.parametrize("form", [lambda a, b: a.argmax(), lambda a, b: a.detach(), lambda a, b: None])
def test_an_output_without_a_gradient_is_named(form: Callable[..., Any]) -> None:
    with pytest.raises(TargetError, match="without a tensor that a gradient could start from"):
        losses.of_call((), {}, 0)(Returns(form))


def test_half_precision_outputs_do_not_overflow_in_the_loss() -> None:
    model = Returns(lambda a, b: (a * 1e4).half().expand(1000, 3))
    assert losses.of_call((), {}, 0)(model).isfinite()
