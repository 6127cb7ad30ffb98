"""The gradient along time of what people read sequences with: docs/horizon.svg and the tables of docs/horizon.md.

python -m gallery.horizon             curves over 100 and 1,000 steps: a few minutes of one core
python -m gallery.horizon --recall    is a model able to learn what lies behind its horizon? some minutes more
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from isograd.horizon import LEFT, Horizon
from isograd.recurrent.along import horizon
from isograd.render.horizon import svg

WIDTH = 128
SEEDS = 3
LENGTHS = (100, 1000)
PICTURE = Path(__file__).parents[1] / "docs" / "horizon.svg"

Build = Callable[[int], tuple[nn.Module, Tensor]]
"""Length of the sequence -> the model, and its input."""


def kernel(kind: type[nn.RNNBase], initialise: Callable[[nn.RNNBase, int], None] | None = None) -> Build:
    def build(length: int) -> tuple[nn.Module, Tensor]:
        model = kind(32, WIDTH, batch_first=True)
        if initialise is not None:
            with torch.no_grad():
                initialise(model, length)
        return model, torch.randn(2, length, 32)

    return build


def forget_bias(model: nn.RNNBase, length: int) -> None:
    """1 in one of the two biases that torch adds (Jozefowicz et al. 2015)."""
    size = model.hidden_size
    model.bias_hh_l0[size : 2 * size] = 0  # pyright: ignore
    model.bias_ih_l0[size : 2 * size] = 1  # pyright: ignore


def chrono(model: nn.RNNBase, length: int) -> None:
    """b_f = log(uniform(1, T - 1)), b_i = -b_f (Tallec and Ollivier 2018)."""
    size = model.hidden_size
    drawn = torch.empty(size).uniform_(1, length - 1).log()
    model.bias_hh_l0.zero_()  # pyright: ignore
    model.bias_ih_l0[size : 2 * size] = drawn  # pyright: ignore
    model.bias_ih_l0[:size] = -drawn  # pyright: ignore


def orthogonal(model: nn.RNNBase, length: int) -> None:
    nn.init.orthogonal_(model.weight_hh_l0)  # pyright: ignore


def mamba(length: int) -> tuple[nn.Module, Tensor]:
    import transformers

    transformers.logging.set_verbosity_error()  # it says that its kernel for the GPU is missing
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8)
    return transformers.MambaForCausalLM(config), torch.randint(64, (1, length))


def gpt2(length: int) -> tuple[nn.Module, Tensor]:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=64, n_positions=length, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval(), torch.randint(64, (2, length))


class CausalConvolutions(nn.Module):
    """Kernels of 2 at dilations 1, 2, 4 … 32: a receptive field of 64 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 2, dilation=2**i) for i in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x + layer(functional.pad(x, (2**i, 0))).relu()
        return x


def convolutions(length: int) -> tuple[nn.Module, Tensor]:
    return CausalConvolutions(), torch.randn(2, WIDTH, length)


MODELS: dict[str, Build] = {
    "RNN": kernel(nn.RNN),
    "RNN, orthogonal": kernel(nn.RNN, orthogonal),
    "GRU": kernel(nn.GRU),
    "LSTM": kernel(nn.LSTM),
    "LSTM, forget bias 1": kernel(nn.LSTM, forget_bias),
    "LSTM, chrono": kernel(nn.LSTM, chrono),
    "causal convolutions": convolutions,
    "Mamba, 2 layers": mamba,
    "GPT-2, 2 layers": gpt2,
}


def curves() -> None:
    """The table and, of the longest sequences, the picture."""
    print("| model | steps | factor per step | 1% left after | 0.1% left after | first step receives |")
    print("|---|---|---|---|---|---|")
    drawn: dict[str, Horizon] = {}
    for length in LENGTHS:
        for name, build in MODELS.items():
            found: list[Horizon] = []
            for seed in range(SEEDS):
                say(f"{name}, {length} steps, seed {seed}")
                torch.manual_seed(seed)
                model, x = build(length)
                found.append(horizon(model, x, probes=2, seed=seed))
            say("")
            shown = (_factors(found), _steps(found), _steps(found, 1e-3), _first(found))
            print(f"| {name} | {length} | {' | '.join(shown)} |")
            drawn[name] = found[0]
    PICTURE.write_text(
        svg(drawn, "The gradient of the last of 1,000 steps, at initialisation"), encoding="utf-8"
    )


def _factors(found: list[Horizon]) -> str:
    values = [one.factor for one in found]
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def _steps(found: list[Horizon], left: float = LEFT) -> str:
    """The lags from which on less than this share is left, smallest and largest of the seeds."""
    lags = sorted(int((h.curve >= h.reference + math.log10(left)).nonzero()[-1]) + 1 for h in found)
    said = [f"> {found[0].at}" if lag > found[0].at else f"{lag}" for lag in (lags[0], lags[-1])]
    return " … ".join(dict.fromkeys(said))


def _first(found: list[Horizon]) -> str:
    decades = statistics.mean(one.decades for one in found)
    return "exactly 0" if decades == -math.inf else f"10^{decades:.1f}"


# -- what lies behind the horizon -----------------------------------------------------------------------

CLASSES = 8
TRAINED = {name: MODELS[name] for name in ("RNN", "GRU", "LSTM", "LSTM, forget bias 1", "LSTM, chrono")}


class Recall(nn.Module):
    """Says at the last step what was shown at the first."""

    def __init__(self, kernel: nn.Module) -> None:
        super().__init__()
        self.kernel, self.head = kernel, nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.kernel(x)[0][:, -1])


def batches(length: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Noise, with one of eight patterns at the first step."""
    generator = torch.Generator().manual_seed(seed)
    patterns = 2 * torch.randn(CLASSES, 32, generator=generator)
    while True:
        y = torch.randint(CLASSES, (32,), generator=generator)
        x = 0.3 * torch.randn(32, length, 32, generator=generator)
        x[:, 0] += patterns[y]
        yield x, y


def recall(updates: int = 300) -> None:
    """Accuracy after training against the share of the sequence that the horizon covers."""
    print("| model | steps | horizon | covers | accuracy |\n|---|---|---|---|---|")
    for length in (10, 20, 40, 80, 160):
        for name, build in TRAINED.items():
            torch.manual_seed(0)
            model = Recall(build(length)[0])
            data = batches(length, 0)
            x, y = next(data)
            found = horizon(model, x[:4], probes=2)
            optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
            right: list[float] = []
            for step in range(updates):
                say(f"{name}, {length} steps, update {step}")
                out = model(x)
                right.append(float((out.argmax(1) == y).float().mean()))
                optimizer.zero_grad()
                functional.cross_entropy(out, y).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                x, y = next(data)
            say("")
            covers = min(found.steps, length) / length
            print(
                f"| {name} | {length} | {_steps([found])} | {covers:.0%} | {statistics.mean(right[-30:]):.0%} |"
            )


def say(words: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{words}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recall", action="store_true", help="train on what lies behind the horizon")
    recall() if parser.parse_args().recall else curves()
