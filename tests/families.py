"""One small model of every family that a remedy may meet, each with a loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.models import HE, Built, Loss, Tied, classified, mlp

Family = Callable[[], Built]

TOKENS = torch.randint(5, 60, (2, 8), generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
SEQUENCE = torch.randn(6, 12, 5, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(8) % 4


class Functional(nn.Module):
    """A hand-written chain that calls its activation as a function."""

    def __init__(self, activation: Callable[[Tensor], Tensor], layers: int = 4) -> None:
        super().__init__()
        self.activation = activation
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(layers))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.activation(layer(x))
        return self.head(x)


class Recurrent(nn.Module):
    """A recurrent layer and a head on its last step; uses both results."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(5, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        steps, state = self.rnn(x)
        last = state[0] if isinstance(state, tuple) else state
        return self.head(steps[:, -1] + last[-1])


class Unrolled(nn.Module):
    """A recurrent cell in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(5, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 8)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.head(h)


class Attending(nn.Module):
    """A hand-written post-norm block with projections of its own."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class PostNorm(nn.Module):
    """norm(h + f(h)), written by hand."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.attention, self.norm_1 = Attending(width), nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
        self.norm_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_1(x + self.attention(x))
        return self.norm_2(x + self.feed_forward(x))


def convolutions(normalised: bool) -> nn.Sequential:
    """Six convolutions, one of which changes the channels and one the resolution."""
    body: list[nn.Module] = []
    for fan_in, fan_out, stride in ((3, 8, 1), (8, 8, 1), (8, 16, 1), (16, 16, 2), (16, 16, 1), (16, 16, 1)):
        layers: list[nn.Module] = [nn.Conv2d(fan_in, fan_out, 3, stride, 1)]
        layers += [nn.BatchNorm2d(fan_out)] if normalised else []
        body.append(nn.Sequential(*layers, nn.ReLU()))
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def _images(model: nn.Module) -> Built:
    return model, lambda m: functional.cross_entropy(m(IMAGES), LABELS)


def _sequence(model: nn.Module) -> Built:
    return model, lambda m: functional.cross_entropy(m(SEQUENCE), LABELS[: len(SEQUENCE)])


def _tokens(model: nn.Module) -> Built:
    return model, lambda m: functional.cross_entropy(m(TOKENS).flatten(0, 1), TOKENS.flatten())


def _stack() -> Built:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Linear(5, 16), nn.TransformerEncoder(layer, 3), nn.Linear(16, 4))
    return model, lambda m: functional.cross_entropy(m(SEQUENCE)[:, -1], LABELS[: len(SEQUENCE)])


def _written() -> Built:
    model = nn.Sequential(nn.Embedding(60, 16), *(PostNorm() for _ in range(3)), nn.Linear(16, 60))
    return _tokens(model)


def _frozen() -> Built:
    model = mlp(nn.Tanh, 5, 0.5)
    model[0].requires_grad_(False)
    return classified(model)


def _shared() -> Built:
    layer, act = nn.Linear(64, 64), nn.Tanh()
    return classified(nn.Sequential(layer, act, layer, act, layer, act, nn.Linear(64, 10)))


def _log_softmax() -> Built:
    model = mlp(nn.ReLU, 2, HE).append(nn.Softmax(-1))
    return classified(model)


HANDMADE: dict[str, Family] = {
    "sigmoid mlp": lambda: classified(mlp(nn.Sigmoid, 6, 1.0)),
    "tanh mlp": lambda: classified(mlp(nn.Tanh, 6, 2.0)),
    "functional relu": lambda: classified(Functional(torch.relu), inputs=16, classes=4),
    "functional sigmoid": lambda: classified(Functional(torch.sigmoid), inputs=16, classes=4),
    "convolutions": lambda: _images(convolutions(False)),
    "batch-normalised convolutions": lambda: _images(convolutions(True)),
    "rnn": lambda: _sequence(Recurrent(nn.RNN)),
    "lstm": lambda: _sequence(Recurrent(nn.LSTM)),
    "gru": lambda: _sequence(Recurrent(nn.GRU)),
    "rnn cell": lambda: _sequence(Unrolled()),
    "transformer encoder of torch": _stack,
    "post-norm written by hand": _written,
    "tied weights": lambda: _tokens(Tied(3, 16, 60)),
    "frozen first layer": _frozen,
    "shared layers": _shared,
    "softmax before cross-entropy": _log_softmax,
}


def shipped() -> dict[str, Family]:
    """Families of `transformers`; empty where it is not installed."""
    try:
        import transformers as hf
    except ImportError:
        return {}
    hf.logging.set_verbosity_error()
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    text, image = {**sizes, "vocab_size": 60}, {**sizes, "image_size": 16, "patch_size": 8, "num_labels": 4}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

    def language(make: Callable[[], nn.Module]) -> Family:
        loss: Loss = lambda m: m(input_ids=TOKENS, labels=TOKENS).loss  # noqa: E731
        return lambda: (make(), loss)

    def vision(make: Callable[[], nn.Module]) -> Family:
        loss: Loss = lambda m: m(pixel_values=IMAGES, labels=LABELS).loss  # noqa: E731
        return lambda: (make(), loss)

    gpt2 = {"vocab_size": 60, "n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 16}
    resnet = {
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [2, 2],
        "layer_type": "basic",
        "num_labels": 4,
    }
    return {
        "gpt2": language(lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2, **ids))),
        "llama": language(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**text, **ids))),
        "bert": language(lambda: hf.BertForMaskedLM(hf.BertConfig(**text))),
        "albert": language(lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(**text, embedding_size=16, **ids))),
        "vit": vision(lambda: hf.ViTForImageClassification(hf.ViTConfig(**image))),
        "resnet": vision(lambda: hf.ResNetForImageClassification(hf.ResNetConfig(**resnet))),
    }


FAMILIES: dict[str, Family] = {**HANDMADE, **shipped()}
