"""The models that are measured, at the sizes people train and at sizes that run in a second."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from gallery.nets import HE, Shape, Transformer, mlp
from isograd.graph.traced import Loss

transformers.logging.set_verbosity_error()


@dataclass(frozen=True)
class Setting:
    """How the benchmarks run."""

    quick: bool
    device: str
    threads: int
    only: str = ""
    """A pattern that the models' descriptions must match."""

    def chosen(self, models: Iterable[Workload]) -> list[Workload]:
        """Those of the models that are asked for."""
        return [model for model in models if re.search(self.only, model.describe)]

    @property
    def kind(self) -> str:
        """What results are filed under."""
        place = "cuda" if self.device == "cuda" else f"cpu-{self.threads}-threads"
        return f"{place}-quick" if self.quick else place


@dataclass(frozen=True)
class Workload:
    """A model in training mode with the loss of one batch."""

    name: str
    describe: str
    build: Callable[[Setting], tuple[nn.Module, Loss]]
    rounds: int
    """Pairs that are timed for each method."""

    def built(self, setting: Setting) -> tuple[nn.Module, Loss]:
        """The model on its device, the same each time."""
        torch.manual_seed(0)
        model, loss = self.build(setting)
        return model.to(setting.device).train(), loss


def gpt2(setting: Setting) -> tuple[nn.Module, Loss]:
    """GPT-2 124M with labels given, dropout on."""
    config = transformers.GPT2Config()
    if setting.quick:
        config = transformers.GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=512)
    time = 32 if setting.quick else 256
    tokens = torch.randint(min(config.vocab_size, 50_000), (4, time), device=setting.device)
    return transformers.GPT2LMHeadModel(config), lambda m: m(input_ids=tokens, labels=tokens).loss


def resnet50(setting: Setting) -> tuple[nn.Module, Loss]:
    """ResNet-50 with 1,000 classes."""
    config = transformers.ResNetConfig()
    if setting.quick:
        config = transformers.ResNetConfig(depths=[1, 1], hidden_sizes=[32, 64], embedding_size=16)
    config.num_labels = 1000
    images = torch.randn(4, 3, 64, 64, device=setting.device)
    labels = torch.randint(1000, (4,), device=setting.device)
    model = transformers.ResNetForImageClassification(config)
    return model, lambda m: functional.cross_entropy(m(pixel_values=images).logits, labels)


def mlp50(setting: Setting) -> tuple[nn.Module, Loss]:
    """ReLU layers with He's initialisation."""
    depth, width, batch = (5, 32, 16) if setting.quick else (50, 512, 256)
    x = torch.randn(batch, 64, device=setting.device)
    y = torch.randint(10, (batch,), device=setting.device)
    return mlp(nn.ReLU, depth, width, HE), lambda m: functional.cross_entropy(m(x), y)


def small_gpt(setting: Setting) -> tuple[nn.Module, Loss]:
    """The shape of GPT-2 124M, its 12 layers and 148 parameters, at a width of 64."""
    config = transformers.GPT2Config(
        n_layer=12, n_embd=64, n_head=4, vocab_size=512, bos_token_id=0, eos_token_id=0
    )
    tokens = torch.randint(512, (4, 64), device=setting.device)
    return transformers.GPT2LMHeadModel(config), lambda m: m(input_ids=tokens, labels=tokens).loss


def transformer(layers: int) -> Workload:
    """A pre-norm decoder of width 32: 16 tokens, batch 4."""

    def build(setting: Setting) -> tuple[nn.Module, Loss]:
        tokens = torch.randint(64, (4, 16), device=setting.device)

        def loss(model: nn.Module) -> Tensor:
            return functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())

        return Transformer(Shape(layers, width=32)), loss

    return Workload(f"transformer-{layers}", f"pre-norm transformer, {layers} layers of width 32", build, 5)


FLOW = (
    Workload("gpt2", "GPT-2 124M, 12 layers, 256 tokens, batch 4", gpt2, 7),
    Workload("resnet50", "ResNet-50, 64 x 64 pixels, batch 4", resnet50, 15),
    Workload("mlp", "MLP, 50 layers of width 512, batch 256", mlp50, 15),
)


SMALL_GPT = Workload("small-gpt", "GPT-2 at width 64, 12 layers, 64 tokens, batch 4", small_gpt, 9)


def workload(name: str) -> Workload:
    """A workload by its name, as a fresh process is told it."""
    if name.startswith("transformer-"):
        return transformer(int(name.removeprefix("transformer-")))
    return next(w for w in (SMALL_GPT, *FLOW) if w.name == name)
