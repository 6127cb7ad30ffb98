"""Trainings to watch: clean recipes of many kinds, and the same with a fault from a known step on.

Each is a small network that trains in seconds. What a monitor would read of every step is computed here by
hand, in the plainest way, so that detectors are judged on readings that no monitor of ours has touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from isograd.monitor.reading import Reading

Batch = Callable[[int, torch.Generator], tuple[Tensor, ...]]
Loss = Callable[[nn.Module, tuple[Tensor, ...], torch.Generator], Tensor]


@dataclass
class Session:
    """One training that is ready to start; a fault changes it while it runs."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Batch
    loss: Loss
    steps: int = 400
    rate: Callable[[int], float] = lambda _: 1.0
    """Factor of the learning rate at a step: the schedule."""
    clip: float = math.inf
    accumulate: int = 1
    before: Callable[[Session, int], None] = lambda _session, _step: None
    """Called before each step: where a fault acts."""
    factor: float = 1.0
    """What a fault multiplies the learning rate by."""
    spoil: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda batch: batch
    """What a fault does to the data."""


@dataclass(frozen=True)
class Watched:
    """A named training: `start(seed)` makes its session."""

    name: str
    start: Callable[[int], Session]
    onset: int | None = None
    """Step from which on the fault acts; None: a clean training."""
    expected: frozenset[str] = field(default_factory=frozenset[str])
    """Codes that name the fault rightly."""


def backwards(session: Session, seed: int) -> Iterator[tuple[int, float]]:
    """Each step of a training up to where it is made: its number and its loss; the gradients are there."""
    model, optimizer = session.model, session.optimizer
    generator = torch.Generator().manual_seed(1000 + seed)
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(session.steps):
        session.before(session, step)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * session.rate(step) * session.factor
        optimizer.zero_grad()
        total = 0.0
        for _ in range(session.accumulate):
            value = session.loss(model, session.spoil(session.batch(step, generator)), generator)
            (value / session.accumulate).backward()
            total += value.item() / session.accumulate
        yield step, total


def readings(session: Session, seed: int) -> Iterator[Reading]:
    """Train, and yield what each step showed."""
    model, optimizer = session.model, session.optimizer
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    sites = tuple(name for name, _ in named)
    shapes = tuple(tuple(p.shape) for _, p in named)
    for step, total in backwards(session, seed):
        columns = _gradients([p for _, p in named])
        grad_norm = math.sqrt(float(columns["grad_norm"].nan_to_num(0.0, posinf=0.0).square().sum()))
        if math.isfinite(session.clip):
            torch.nn.utils.clip_grad_norm_([p for _, p in named], session.clip)
        old = [p.detach().clone() for _, p in named]
        optimizer.step()
        columns["weight_norm"] = torch.stack([w.norm() for w in old])
        columns["update_norm"] = torch.stack(
            [(p.detach() - w).norm() for (_, p), w in zip(named, old, strict=True)]
        )
        scalars = {"loss": total, "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"]}
        yield Reading(step, sites, columns, scalars, time=float(step), shapes=shapes)


def _gradients(parameters: list[nn.Parameter]) -> dict[str, Tensor]:
    """Statistics of the gradients; nan where there is none."""
    found: list[list[float]] = []
    for p in parameters:
        if p.grad is None:
            found.append([math.nan] * 4)
            continue
        grad = p.grad.coalesce().values() if p.grad.is_sparse else p.grad
        zeros = int((grad == 0).sum()) + p.numel() - grad.numel()
        bad = int((~grad.isfinite()).sum())
        found.append([grad.norm().item(), grad.abs().max().item() if grad.numel() else 0.0, bad, zeros])
    names = ("grad_norm", "grad_max", "nonfinite", "zeros")
    return dict(zip(names, torch.tensor(found, dtype=torch.float32).T, strict=True))


# -- data -------------------------------------------------------------------------------------------------


@cache
def _digits() -> tuple[Tensor, Tensor]:
    raw, labels = load_digits(return_X_y=True)
    x = torch.tensor(raw, dtype=torch.float32)
    return (x - x.mean()) / x.std(), torch.tensor(labels)


def digits(size: int | Callable[[int], int] = 64, *, image: bool = False, noise: float = 0.0) -> Batch:
    """scikit-learn's digits; `size` may change with the step, `noise` is the share of wrong labels."""
    x, y = _digits()
    y = torch.where(
        torch.rand(len(y), generator=torch.Generator().manual_seed(5)) < noise, (y * 7 + 3) % 10, y
    )

    def batch(step: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        rows = torch.randint(len(x), (size(step) if callable(size) else size,), generator=generator)
        return (x[rows].view(-1, 1, 8, 8) if image else x[rows]), y[rows]

    return batch


def text(size: int = 16, length: int = 16, vocabulary: int = 20) -> Batch:
    """Sequences of a Markov chain with few likely successors: tokens, and the same one later."""
    logits = 3 * torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(3))
    chances = logits.softmax(-1)

    def batch(_step: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        rows = [torch.randint(vocabulary, (size,), generator=generator)]
        for _ in range(length):
            rows.append(torch.multinomial(chances[rows[-1]], 1, generator=generator).squeeze(1))
        tokens = torch.stack(rows, 1)
        return tokens[:, :-1], tokens[:, 1:]

    return batch


def regression(size: int = 64, *, heavy: bool = False) -> Batch:
    """A smooth function of 16 inputs; with `heavy`, noise whose variance is infinite."""
    matrix = torch.randn(16, 4, generator=torch.Generator().manual_seed(4)) / 4

    def batch(_step: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        x = torch.randn(size, 16, generator=generator)
        noise = torch.randn(size, 4, generator=generator)
        if heavy:
            noise = noise / (torch.rand(size, 1, generator=generator) + 0.01).sqrt()
        return x, torch.sin(2 * x @ matrix) + 0.1 * noise

    return batch


def ratings(size: int = 128, count: int = 500) -> Batch:
    """Users and items, a few of them often and most seldom, and how one likes the other."""
    generator = torch.Generator().manual_seed(6)
    users, items = torch.randn(2, count, 4, generator=generator)
    weights = 1 / torch.arange(1, count + 1, dtype=torch.float32)

    def batch(_step: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        u, i = (torch.multinomial(weights, size, replacement=True, generator=generator) for _ in range(2))
        return u, i, (users[u] * items[i]).sum(-1).tanh()

    return batch


# -- networks -----------------------------------------------------------------------------------------------


def mlp(
    depth: int = 3,
    width: int = 64,
    activation: type[nn.Module] = nn.ReLU,
    *,
    inputs: int = 64,
    outputs: int = 10,
    norm: type[nn.Module] | None = None,
    dropout: float = 0.0,
    gain: float = 1.0,
) -> nn.Sequential:
    """`depth` hidden layers; weights as torch draws them, times `gain`."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers.append(nn.Linear(inputs if i == 0 else width, width))
        if norm is not None:
            layers.append(norm(width))
        layers.append(activation())
        if dropout:
            layers.append(nn.Dropout(dropout))
    layers.append(nn.Linear(width, outputs))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight) if activation is nn.ReLU else nn.init.xavier_normal_(
                layer.weight
            )
            nn.init.zeros_(layer.bias)
            layer.weight.data *= gain
    return nn.Sequential(*layers)


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def residual(blocks: int = 12, width: int = 64) -> nn.Sequential:
    """Pre-normalised residual blocks."""
    inner = [
        Residual(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        )
        for _ in range(blocks)
    ]
    return nn.Sequential(nn.Linear(64, width), *inner, nn.LayerNorm(width), nn.Linear(width, 10))


def convolutional() -> nn.Sequential:
    """Three convolutions with batch normalisation."""
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


class Transformer(nn.Module):
    """A small language model, normalised before each sublayer or after it."""

    def __init__(self, layers: int = 4, width: int = 32, *, first: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, width)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 4 * width, dropout, batch_first=True, norm_first=first)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 20)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions[: x.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        for block in self.blocks:
            h = block(h, src_mask=mask, is_causal=True)
        return self.head(self.norm(h))


class Experts(nn.Module):
    """A mixture of experts of which each token sees one."""

    def __init__(self, experts: int = 6, width: int = 64) -> None:
        super().__init__()
        self.entry = nn.Linear(64, width)
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(mlp(1, width, inputs=width, outputs=width) for _ in range(experts))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.entry(x).relu()
        weight, chosen = self.router(h).softmax(-1).max(-1)
        out = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero().squeeze(1)
            if len(rows):
                out = out.index_add(0, rows, weight[rows, None] * expert(h[rows]))
        return self.head(h + out)


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.RNNBase] = nn.LSTM, width: int = 32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, width)
        self.rnn = cell(width, width, batch_first=True)
        self.head = nn.Linear(width, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.tokens(x))[0])


class Factors(nn.Module):
    """Collaborative filtering with sparse gradients."""

    def __init__(self, count: int = 500, width: int = 8, *, sparse: bool = True) -> None:
        super().__init__()
        self.users = nn.Embedding(count, width, sparse=sparse)
        self.items = nn.Embedding(count, width, sparse=sparse)

    def forward(self, u: Tensor, i: Tensor) -> Tensor:
        return (self.users(u) * self.items(i)).sum(-1)


class Autoencoder(nn.Module):
    """Variational where `random`."""

    def __init__(self, random: bool = False) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(2, outputs=16), mlp(2, inputs=8, outputs=64)
        self.random = random

    def forward(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_var = self.encoder(x).chunk(2, -1)
        noise = torch.randn(mean.shape, generator=generator) if self.random else torch.zeros_like(mean)
        return self.decoder(mean + noise * (log_var / 2).exp()), mean, log_var


# -- losses -------------------------------------------------------------------------------------------------


def classify(model: nn.Module, batch: tuple[Tensor, ...], _: torch.Generator) -> Tensor:
    """Cross-entropy, the classes in the last dimension."""
    return functional.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def smoothed(model: nn.Module, batch: tuple[Tensor, ...], _: torch.Generator) -> Tensor:
    """Cross-entropy with smoothed labels."""
    return functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1)


def squares(model: nn.Module, batch: tuple[Tensor, ...], _: torch.Generator) -> Tensor:
    """Mean squared error; the last of the batch is the target."""
    return (model(*batch[:-1]) - batch[-1]).square().mean()


def huber(model: nn.Module, batch: tuple[Tensor, ...], _: torch.Generator) -> Tensor:
    return functional.smooth_l1_loss(model(batch[0]), batch[1])


def reconstruct(model: nn.Module, batch: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
    """Reconstruction error, and the divergence from the prior where the autoencoder is variational."""
    decoded, mean, log_var = model(batch[0], generator)
    error = (decoded - batch[0]).square().mean()
    return error + 1e-2 * (mean.square() + log_var.exp() - log_var - 1).mean() if model.random else error


def contrast(model: nn.Module, batch: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
    """Two noisy views of a sample belong together (InfoNCE)."""
    views = [batch[0] + 0.3 * torch.randn(batch[0].shape, generator=generator) for _ in range(2)]
    a, b = (functional.normalize(model(view), dim=-1) for view in views)
    return functional.cross_entropy(10 * a @ b.T, torch.arange(len(a)))


def reinforce(model: nn.Module, batch: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
    """Policy gradient: the label's action is paid 1, with much noise, and no other; no baseline."""
    policy = model(batch[0]).log_softmax(-1)
    action = torch.multinomial(policy.exp(), 1, generator=generator).squeeze(1)
    reward = (action == batch[1]).float() + torch.randn(len(action), generator=generator)
    return -(reward * policy.gather(1, action[:, None]).squeeze(1)).mean()


class Bootstrapped(nn.Module):
    """A value network and the older copy of itself that gives its targets, renewed now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.target, self.calls = mlp(2), mlp(2).requires_grad_(False), 0

    def forward(self, x: Tensor) -> Tensor:
        if self.calls % 50 == 0:
            self.target.load_state_dict(self.value.state_dict())
        self.calls += 1
        return self.value(x)


def bootstrap(model: nn.Module, batch: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
    """Temporal differences on a chain of random digits: paid where the action is the digit."""
    x, y = batch
    action = torch.randint(10, (len(x),), generator=generator)
    values = model(x).gather(1, action[:, None]).squeeze(1)
    after = model.target(x.roll(1, 0)).max(-1).values
    target = (action == y).float() + 0.5 * torch.randn(len(x), generator=generator) + 0.9 * after
    return functional.smooth_l1_loss(values, target.detach())


# -- schedules ------------------------------------------------------------------------------------------------


def warm(steps: int, then: Callable[[int], float] = lambda _: 1.0) -> Callable[[int], float]:
    """Linear warm-up."""
    return lambda step: min(1.0, (step + 1) / steps) * then(step)


def cosine(period: int, low: float = 0.0) -> Callable[[int], float]:
    """Cosine from 1 to `low`, and from the top again: warm restarts."""
    return lambda step: low + (1 - low) * (1 + math.cos(math.pi * (step % period) / period)) / 2


def stairs(*at: int) -> Callable[[int], float]:
    """A tenth at each of the steps."""
    return lambda step: 0.1 ** sum(step >= s for s in at)


def triangle(peak: int, end: int) -> Callable[[int], float]:
    """One cycle: up to `peak`, down to `end`."""
    return lambda step: max(min((step + 1) / peak, (end - step) / (end - peak)), 1e-3)


Rule = Callable[[nn.Module], torch.optim.Optimizer]


def sgd(lr: float, momentum: float = 0.9, **others: float) -> Rule:
    return lambda model: torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, **others)


def adam(lr: float, **others: float) -> Rule:
    return lambda model: torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, **others
    )


def recipe(
    name: str,
    model: Callable[[], nn.Module],
    rule: Rule,
    batch: Batch | None = None,
    loss: Loss = classify,
    **others: object,
) -> Watched:
    """A clean training."""

    def start(seed: int) -> Session:
        torch.manual_seed(seed)
        net = model()
        return replace(Session(net, rule(net), batch or digits(), loss), **others)  # type: ignore[arg-type]

    return Watched(name, start)


def _two(model: nn.Module) -> torch.optim.Optimizer:
    """The head learns ten times as fast as the body: discriminative fine-tuning."""
    *body, head = model.children()
    groups = [{"params": nn.Sequential(*body).parameters(), "lr": 5e-3}, {"params": head.parameters()}]
    return torch.optim.SGD(groups, lr=5e-2, momentum=0.9)


IMAGE = digits(image=True)
TEXT = text()

CLEAN: tuple[Watched, ...] = (
    recipe("mlp sgd", mlp, sgd(0.05)),
    recipe("mlp adam", mlp, adam(1e-3)),
    recipe("mlp adam fast", mlp, adam(1e-2)),
    recipe("mlp plain sgd", mlp, sgd(0.1, 0.0)),
    recipe("mlp nesterov decay", mlp, sgd(0.05, weight_decay=1e-2), rate=stairs(200, 300)),
    recipe("mlp warm-up cosine", mlp, sgd(0.1), rate=warm(100, cosine(400))),
    recipe("mlp long warm-up", mlp, adam(3e-3), rate=warm(300), steps=600),
    recipe("mlp restarts", mlp, sgd(0.1), rate=cosine(100), steps=600),
    recipe("adam restarts", mlp, adam(5e-3), rate=cosine(120), steps=600),
    recipe("one cycle", mlp, sgd(0.12), rate=triangle(120, 400)),
    recipe("batch grows", mlp, sgd(0.05), digits(lambda s: 16 if s < 250 else 256), steps=500),
    recipe("batch shrinks", mlp, sgd(0.03), digits(lambda s: 256 if s < 250 else 32), steps=500),
    recipe("tiny batch", mlp, sgd(0.01), digits(4), steps=800),
    recipe("dropout", lambda: mlp(dropout=0.5, width=128), sgd(0.05)),
    recipe("heavy dropout adam", lambda: mlp(2, 128, dropout=0.6), adam(2e-3), steps=600),
    recipe("label noise", mlp, sgd(0.05), digits(noise=0.5), steps=600),
    recipe("label smoothing", mlp, adam(2e-3), loss=smoothed, rate=warm(50, cosine(400))),
    recipe("clipped", mlp, sgd(0.1), clip=0.5),
    recipe("accumulation", mlp, adam(2e-3), digits(16), accumulate=4, steps=250),
    recipe("deep he", lambda: mlp(10), sgd(0.01), steps=600),
    recipe("deep tanh", lambda: mlp(8, activation=nn.Tanh), sgd(0.03), steps=500),
    recipe("gelu layer norm", lambda: mlp(6, activation=nn.GELU, norm=nn.LayerNorm), adam(1e-3)),
    recipe("selu", lambda: mlp(6, activation=nn.SELU), sgd(0.02)),
    recipe("shallow sigmoid", lambda: mlp(1, activation=nn.Sigmoid), sgd(0.3), steps=600),
    recipe("batch norm mlp", lambda: mlp(4, norm=nn.BatchNorm1d), sgd(0.1)),
    recipe("residual sgd", residual, sgd(0.03), rate=warm(40)),
    recipe("residual adam", residual, adam(1e-3), rate=warm(50, cosine(500)), steps=500),
    recipe("deep residual", lambda: residual(30), adam(5e-4), rate=warm(60), steps=300),
    recipe("cnn sgd", convolutional, sgd(0.1), IMAGE, rate=cosine(300), steps=300),
    recipe("cnn adam", convolutional, adam(3e-3), IMAGE, steps=300),
    recipe("cnn stairs", convolutional, sgd(0.1, weight_decay=5e-4), IMAGE, rate=stairs(150, 225), steps=300),
    recipe("transformer", Transformer, adam(2e-3), TEXT, rate=warm(50, cosine(400))),
    recipe("transformer clip", Transformer, adam(1e-3), TEXT, clip=1.0, steps=500),
    recipe("transformer dropout", lambda: Transformer(dropout=0.2), adam(2e-3), TEXT, rate=warm(100)),
    recipe(
        "post-norm warm-up", lambda: Transformer(first=False), adam(1e-3), TEXT, rate=warm(150), steps=500
    ),
    recipe("transformer sgd", Transformer, sgd(0.1), TEXT, rate=warm(50), clip=1.0),
    recipe("lstm", Recurrent, adam(5e-3), TEXT),
    recipe("gru sgd clip", lambda: Recurrent(nn.GRU), sgd(0.5), TEXT, clip=0.25),
    recipe("rnn", lambda: Recurrent(nn.RNN), adam(3e-3), TEXT, clip=1.0),
    recipe("experts", Experts, adam(2e-3), steps=500),
    recipe("experts sgd", lambda: Experts(12), sgd(0.05), steps=500),
    recipe("sparse sgd", Factors, sgd(2.0, 0.0), ratings(), squares, steps=600),
    recipe(
        "sparse adam",
        Factors,
        lambda m: torch.optim.SparseAdam(m.parameters(), lr=0.02),
        ratings(),
        squares,
        steps=600,
    ),
    recipe("embeddings adam", lambda: Factors(sparse=False), adam(0.02), ratings(), squares, steps=600),
    recipe("regression", lambda: mlp(inputs=16, outputs=4), adam(2e-3), regression(), squares, steps=600),
    recipe(
        "heavy tails", lambda: mlp(inputs=16, outputs=4), adam(2e-3), regression(heavy=True), huber, steps=600
    ),
    recipe("heavy tails sgd", lambda: mlp(inputs=16, outputs=4), sgd(0.02), regression(heavy=True), huber),
    recipe("autoencoder", Autoencoder, adam(1e-3), loss=reconstruct, steps=500),
    recipe("variational", lambda: Autoencoder(True), adam(2e-3), loss=reconstruct, steps=500),
    recipe("contrastive", lambda: mlp(outputs=32), adam(1e-3), loss=contrast),
    recipe("policy gradient", mlp, adam(1e-3), loss=reinforce, steps=800),
    recipe("policy gradient sgd", mlp, sgd(0.02), loss=reinforce, steps=800),
    recipe("bootstrapped", Bootstrapped, adam(1e-3), loss=bootstrap, steps=600),
    recipe("fine-tuning groups", mlp, _two),
    recipe("rmsprop", mlp, lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3)),
    recipe("adagrad", mlp, lambda m: torch.optim.Adagrad(m.parameters(), lr=2e-2)),
    recipe("interpolation", lambda: mlp(2, 256), adam(3e-3), steps=800),
    recipe("large batch", mlp, sgd(0.3), digits(512), rate=warm(30), steps=250),
    recipe("small gradients", mlp, sgd(0.05 * 1e8), loss=lambda m, b, g: 1e-8 * classify(m, b, g)),
    recipe("large gradients", mlp, sgd(0.05 / 65536), loss=lambda m, b, g: 65536 * classify(m, b, g)),
)


# -- faults -------------------------------------------------------------------------------------------------

VANISHING = frozenset({"VG103", "UP505"})
DEAD = frozenset({"SA303", "VG103"})
TOO_LARGE = frozenset({"UP506", "EG203", "TR702", "TR703"})
BROKEN = TOO_LARGE | {"NF405", "EG204"}
GROWING = frozenset({"UP508", "EG204", "EG203"})


def faulty(
    name: str, clean: Watched, onset: int, expected: frozenset[str], act: Callable[[Session, int], None]
) -> Watched:
    """A clean training in which `act` is called before each step from `onset` on."""

    def start(seed: int) -> Session:
        def before(session: Session, step: int) -> None:
            if step >= onset:
                act(session, step)

        return replace(clean.start(seed), before=before)

    return Watched(name, start, onset, expected)


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """Weights of two dimensions and more, input side first."""
    return [p for p in model.parameters() if p.dim() > 1]


def rate(factor: float) -> Callable[[Session, int], None]:
    """The learning rate is `factor` times what it should be."""

    def act(session: Session, _step: int) -> None:
        session.factor = factor

    return act


def climbing(growth: float) -> Callable[[Session, int], None]:
    """The learning rate grows by this factor at each step."""

    def act(session: Session, _step: int) -> None:
        session.factor *= growth

    return act


@torch.no_grad()
def bias(session: Session, _step: int) -> None:
    """Something pushes the units of the first layers below zero, a little more each step."""
    for p in list(session.model.parameters())[:-2]:
        if p.dim() == 1:
            p -= 0.1


def swell(which: slice, growth: float = 1.03) -> Callable[[Session, int], None]:
    """Some weights grow by a factor at each step."""

    @torch.no_grad()
    def act(session: Session, _step: int) -> None:
        for p in matrices(session.model)[which]:
            p *= growth

    return act


def shrink(growth: float) -> Callable[[Session, int], None]:
    """All weights but the head's shrink by a factor at each step: too much weight decay."""

    @torch.no_grad()
    def act(session: Session, _step: int) -> None:
        for p in matrices(session.model)[:-1]:
            p *= growth

    return act


def data(spoil: Callable[[Tensor], Tensor]) -> Callable[[Session, int], None]:
    """The inputs come spoiled."""

    def act(session: Session, _step: int) -> None:
        session.spoil = lambda batch: (spoil(batch[0]), *batch[1:])

    return act


def poisoned(x: Tensor) -> Tensor:
    """One element that is no number."""
    return x.index_fill(0, torch.tensor([0]), math.nan)


@torch.no_grad()
def redraw(session: Session, _step: int) -> None:
    """Once: all weights five times as large."""
    if session.factor == 1.0:
        for p in matrices(session.model):
            p *= 5
    session.factor = 1.0 + 1e-9


def _clean(name: str) -> Watched:
    return next(watched for watched in CLEAN if watched.name == name)


def _sick(name: str, expected: frozenset[str], *others: object, **more: object) -> Watched:
    return replace(recipe(name, *others, **more), onset=0, expected=expected)  # type: ignore[arg-type]


SICK: tuple[Watched, ...] = (
    faulty("mlp rate x30", _clean("mlp sgd"), 200, BROKEN, rate(30)),
    faulty("mlp rate x100", _clean("mlp plain sgd"), 150, BROKEN, rate(100)),
    faulty("adam rate x300", _clean("mlp adam"), 200, BROKEN, rate(300)),
    faulty("transformer rate x100", _clean("transformer clip"), 250, BROKEN, rate(100)),
    faulty("residual rate x100", _clean("residual adam"), 250, BROKEN, rate(100)),
    faulty("cnn rate x300", _clean("cnn sgd"), 100, BROKEN, rate(300)),
    faulty("lstm rate x200", _clean("lstm"), 200, BROKEN, rate(200)),
    faulty("mlp rate climbs", _clean("mlp sgd"), 200, BROKEN, climbing(1.03)),
    faulty("residual rate climbs", _clean("residual sgd"), 200, BROKEN, climbing(1.05)),
    faulty("transformer rate climbs", _clean("transformer"), 150, BROKEN, climbing(1.05)),
    faulty("tanh rate climbs", _clean("deep tanh"), 200, BROKEN, climbing(1.03)),
    faulty("rmsprop rate climbs", _clean("rmsprop"), 150, BROKEN, climbing(1.05)),
    faulty("mlp swells", _clean("mlp sgd"), 150, BROKEN | GROWING, swell(slice(None), 1.02)),
    faulty("one layer swells", _clean("mlp plain sgd"), 200, BROKEN | GROWING, swell(slice(1, 2), 1.05)),
    faulty("head swells", _clean("mlp adam"), 200, BROKEN | GROWING, swell(slice(-1, None), 1.05)),
    faulty("rnn swells", _clean("rnn"), 150, BROKEN | GROWING, swell(slice(2, 3), 1.03)),
    faulty("deep he swells", _clean("deep he"), 150, BROKEN | GROWING, swell(slice(None), 1.01)),
    faulty("residual swells", _clean("deep residual"), 100, BROKEN | GROWING, swell(slice(None), 1.03)),
    faulty("not a number", _clean("mlp sgd"), 250, frozenset({"NF405"}), data(poisoned)),
    faulty("not a number cnn", _clean("cnn adam"), 150, frozenset({"NF405"}), data(poisoned)),
    faulty("infinite input", _clean("regression"), 300, frozenset({"NF405"}), data(lambda x: x / 0)),
    faulty("inputs x1000", _clean("mlp sgd"), 200, BROKEN, data(lambda x: 1000 * x)),
    faulty("inputs x100 adam", _clean("mlp adam"), 200, BROKEN, data(lambda x: 100 * x)),
    faulty("weights x5", _clean("deep he"), 300, BROKEN, redraw),
    faulty("units die", _clean("mlp sgd"), 150, DEAD, bias),
    faulty("units die deep", _clean("deep he"), 200, DEAD, bias),
    faulty("units die plain", _clean("mlp plain sgd"), 150, DEAD, bias),
    faulty("decay kills", _clean("deep tanh"), 150, VANISHING | DEAD, shrink(0.97)),
    faulty("decay kills he", _clean("deep he"), 150, VANISHING | DEAD, shrink(0.97)),
    _sick("sigmoid", VANISHING, lambda: mlp(8, activation=nn.Sigmoid), sgd(0.05)),
    _sick("sigmoid adam", VANISHING, lambda: mlp(10, activation=nn.Sigmoid), adam(1e-3)),
    _sick("small tanh", VANISHING, lambda: mlp(10, activation=nn.Tanh, gain=0.2), sgd(0.05)),
    _sick("tanhshrink", VANISHING | DEAD, lambda: mlp(8, activation=nn.Tanhshrink), sgd(0.05)),
    _sick("large relu", BROKEN, lambda: mlp(8, gain=3.0), sgd(0.05)),
    _sick("large deep relu", BROKEN, lambda: mlp(12, gain=2.5), sgd(0.01)),
    _sick("large tanh", BROKEN | VANISHING, lambda: mlp(12, activation=nn.Tanh, gain=4.0), sgd(0.05)),
    _sick("rate too high", BROKEN | DEAD, mlp, sgd(3.0)),
    _sick("rate too high plain", BROKEN | DEAD, mlp, sgd(10.0, 0.0)),
    _sick("rate too high adam", BROKEN | DEAD, lambda: mlp(4), adam(1.0)),
    _sick("rate too high cnn", BROKEN, convolutional, adam(3.0), IMAGE, steps=200),
    _sick("rate too high transformer", BROKEN, Transformer, adam(0.3), TEXT, steps=250),
    _sick(
        "post-norm without warm-up",
        BROKEN | VANISHING,
        lambda: Transformer(12, first=False),
        adam(1e-2),
        TEXT,
        steps=200,
    ),
    _sick("raw inputs", BROKEN, mlp, sgd(0.05), digits(), spoil=lambda b: (300 * b[0], *b[1:])),
    _sick("rate too low", frozenset({"UP507"}), mlp, sgd(1e-5)),
    _sick("rate too low adam", frozenset({"UP507"}), mlp, adam(1e-7), steps=500),
    _sick("dead from the start", DEAD, lambda: _biased(mlp(3), -10.0), sgd(0.05)),
)


@torch.no_grad()
def _biased(model: nn.Sequential, value: float) -> nn.Sequential:
    for layer in list(model)[:-1]:
        if isinstance(layer, nn.Linear):
            layer.bias.fill_(value)
    return model
