"""Every remedy beside a case that needs it: what theory expects of it, and what is measured.

python -m gallery.cures            the table, in about two minutes of one core
python -m gallery.cures insert     rows whose remedy begins so
"""

from __future__ import annotations

import copy
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.nn import functional

from gallery.case import Built, Loss
from gallery.nets import (
    HE,
    Initialise,
    Residual,
    Shape,
    Transformer,
    initialised,
    mlp,
    orthogonal,
    scaled_normal,
    without_head,
)
from gallery.training import copying, cross_entropy, digits
from isograd.diagnosis import diagnose
from isograd.edit import Value
from isograd.measure import measure
from isograd.prescription import Patient, Prescription, apply, not_applicable
from isograd.recurrent.along import horizon

Configuration = dict[str, Value]
Effect = Callable[[nn.Module, Loss, Configuration], float]
XAVIER, LECUN = nn.init.xavier_uniform_, scaled_normal(1.0)


@dataclass(frozen=True)
class Cure:
    """A remedy, a case that needs it, and how the effect is measured."""

    remedy: str
    """File in `isograd.remedies`."""
    case: str
    build: Callable[[], Built]
    effect: Effect
    unit: str
    low: float
    high: float
    """The case is cured between these."""
    variant: str = ""
    """What the title of the prescription must contain, where a remedy has several."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    cure: Cure
    rx: Prescription
    before: float
    after: float

    @property
    def sick(self) -> bool:
        return not self.cure.low <= self.before <= self.cure.high

    @property
    def cured(self) -> bool:
        return self.cure.low <= self.after <= self.cure.high

    @property
    def expected(self) -> str:
        if math.isfinite(self.rx.decades) and self.cure.unit == DECADES:
            return f"{self.rx.decades:+.1f}"
        return self.rx.expected


def measured(cure: Cure) -> Row:
    """Build the case, prescribe, apply to a copy, and measure both."""
    torch.manual_seed(0)
    model, loss = cure.build()
    patient = Patient(model, diagnose(measure(model, loss)), loss)
    offered = list(import_module(f"isograd.remedies.{cure.remedy}").prescribe(patient))
    rx = next((rx for rx in offered if not rx.why_not and cure.variant in rx.title), None)
    before = cure.effect(copy.deepcopy(model), loss, {})
    if rx is None:
        return Row(
            cure, next(iter(offered), not_applicable(cure.remedy, "nothing was said")), before, math.nan
        )
    return Row(cure, rx, before, cure.effect(apply(model, rx), loss, rx.configuration))


# -- effects ---------------------------------------------------------------------------------------

DECADES = "decades along depth"
GROWTH = -math.inf
"""Lower bound of a remedy that treats growth only: what is left may fade."""


def depth(model: nn.Module, loss: Loss, _: Configuration) -> float:
    """Decades between the head and the first hidden layer."""
    return measure(model, loss).lost


def time(inputs: Tensor) -> Effect:
    """log10 of what the last step's gradient leaves at the first input, over its most at any."""

    def effect(model: nn.Module, loss: Loss, asked: Configuration) -> float:
        curve = horizon(model, inputs).curve
        reached = int(value) if isinstance(value := asked.get("truncate"), int) else len(curve)
        return float(curve[reached - 1] - curve[0])

    return effect


def trained(optimizer: str, lr: float, steps: int = 100) -> Effect:
    """Loss of the batch after so many steps, with what the prescription asks of the training."""

    def effect(model: nn.Module, loss: Loss, asked: Configuration) -> float:
        asked = {"optimizer": optimizer, "lr": lr, "warmup": 1} | asked
        rate, clip = _number(asked["lr"]), _number(asked.get("clip_grad_norm", math.inf))
        warm = max(min(_number(asked["warmup"]), steps / 20), 1)  # a twentieth of a short run
        scale = _number(asked.get("loss_scale", 1.0))
        if asked["optimizer"] == "SGD":
            stepper: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        else:
            stepper = torch.optim.AdamW(model.parameters(), lr=rate, eps=_number(asked.get("eps", 1e-8)))
        for step in range(steps):
            for group in stepper.param_groups:
                group["lr"] = rate * min((step + 1) / warm, 1.0)
            stepper.zero_grad()
            (loss(model) * scale).backward()
            if scale != 1:
                for p in model.parameters():
                    p.grad = None if p.grad is None else p.grad / scale
            if clip < math.inf:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            stepper.step()
        return float(loss(model).detach())

    return effect


def _number(value: Value) -> float:
    assert isinstance(value, int | float)
    return float(value)


def flushed(model: nn.Module, loss: Loss, asked: Configuration) -> float:
    """Share of the gradient's elements that half precision makes exactly 0."""
    found = torch.autograd.grad(loss(model) * _number(asked.get("loss_scale", 1.0)), list(model.parameters()))
    return float(torch.cat([g.flatten() == 0 for g in found]).float().mean())


def finite(model: nn.Module, loss: Loss, _: Configuration) -> float:
    """Share of the gradient's elements that are finite."""
    found = torch.autograd.grad(loss(model), list(model.parameters()))
    return float(torch.cat([g.flatten().isfinite() for g in found]).float().mean())


def logits(model: nn.Module, loss: Loss, _: Configuration) -> float:
    """Root mean square of the logits of attention."""
    taken: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj")):
            module.register_forward_hook(
                lambda m, args, out, name=name[-6:]: taken.__setitem__(name, out.detach())
            )
    loss(model)
    heads = model.get_submodule("1").num_heads
    q, k = (taken[name].unflatten(-1, (heads, -1)).transpose(1, 2) for name in ("q_proj", "k_proj"))
    return float((q @ k.mT / q.shape[-1] ** 0.5).square().mean().sqrt())


def dead(model: nn.Module, loss: Loss, _: Configuration) -> float:
    """Share of units whose derivative is 0 for every sample, in the worst layer."""
    return max(seen.dead for seen in measure(model, loss).activations)


# -- cases -----------------------------------------------------------------------------------------


def batch(
    model: nn.Module, rows: int = 64, shift: float = 0.0, scale: float = 1.0, unit: float = 1.0
) -> Built:
    """The model with the cross-entropy of one batch of digits."""
    x, y = digits(rows).batch(torch.Generator().manual_seed(0))
    return model, lambda m: cross_entropy(m, x * scale + shift, y) * unit


def chain(
    activation: Callable[[], nn.Module], layers: int, weights: Initialise | None, **options: float
) -> Callable[[], Built]:
    return lambda: batch(mlp(activation, layers, 64, weights), **options)  # pyright: ignore[reportArgumentType]


def normalised(layers: int) -> Built:
    """Linear, BatchNorm, ReLU, without skips."""
    body: list[nn.Module] = []
    for _ in range(layers):
        body += [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()]
    return batch(nn.Sequential(*body, nn.Linear(64, 10)))


def outdated(layers: int) -> Built:
    """Batch normalisations in eval mode, whose running variances are those of a signal ten times as large."""
    model, loss = normalised(layers)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d) and module.running_var is not None:
            module.running_var.fill_(100.0)
    return model.eval(), loss


def images(activation: Callable[[], nn.Module], layers: int) -> Built:
    """3x3 convolutions as torch draws them."""
    x, y = digits(32, image=True).batch(torch.Generator().manual_seed(0))
    body: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1), activation()]
    for _ in range(layers - 1):
        body += [nn.Conv2d(16, 16, 3, padding=1), activation()]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return model, lambda m: cross_entropy(m, x, y)


def language(shape: Shape, change: Callable[[nn.Module], object] = lambda m: None) -> Callable[[], Built]:
    def build() -> Built:
        model = Transformer(shape)
        change(model)
        x, y = copying().batch(torch.Generator().manual_seed(0))
        return model, lambda m: cross_entropy(m, x, y)

    return build


class Recurrent(nn.Module):
    """A recurrent layer and a head on its last step."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(rnn.hidden_size, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])[:, -1]


SEQUENCE = torch.randn(8, 100, 8, generator=torch.Generator().manual_seed(0))


def sequence(
    rnn: Callable[[], nn.RNNBase], gain: float = 1.0, inputs: Tensor = SEQUENCE
) -> Callable[[], Built]:
    """A recurrence, its recurrent weights times a gain, on a sequence of noise."""

    def build() -> Built:
        model = Recurrent(rnn())
        with torch.no_grad():
            for name, p in model.rnn.named_parameters():
                if "weight_hh" in name:
                    p.mul_(gain)
        return model, lambda m: functional.cross_entropy(m(inputs), torch.arange(8) % 4)

    return build


class Attention(nn.Module):
    """Self-attention with projections of its own, on a residual stream."""

    def __init__(self, width: int, heads: int, gain: float) -> None:
        super().__init__()
        self.num_heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        with torch.no_grad():
            self.q_proj.weight.mul_(gain)
            self.k_proj.weight.mul_(gain)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return x + self.out_proj(mixed.transpose(1, 2).flatten(2))


def attending(gain: float) -> Built:
    x, y = copying().batch(torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Embedding(16, 64), Attention(64, 4, gain), nn.Linear(64, 16))
    return model, lambda m: cross_entropy(m, x, y)


class Logarithm(nn.Module):
    """A classifier that takes the logarithm of its softmax, with logits in the hundreds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        nn.init.normal_(self.layer.weight, 0.0, 20.0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(torch.softmax(self.layer(x), -1))


def logarithm() -> Built:
    x, y = digits().batch(torch.Generator().manual_seed(0))
    return Logarithm(), lambda m: functional.nll_loss(m(x), y)


class Odds(Logarithm):
    """Binary cross-entropy written out, with the sigmoid's logarithm taken inside of the model."""

    def forward(self, x: Tensor) -> Tensor:
        p = torch.sigmoid(self.layer(x))
        return torch.log(p)


def odds() -> Built:
    x, y = digits().batch(torch.Generator().manual_seed(0))
    return Odds(), lambda m: -(m(x) * functional.one_hot(y, 10)).mean()


class Cold(nn.Sequential):
    """Layers whose logits are divided by a temperature that leaves nothing of them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 1000


def tapering(layers: int) -> Built:
    """tanh layers that change their width one after another."""
    widths = [64 - 2 * i for i in range(layers + 1)]
    body = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in itertools.pairwise(widths)]
    return batch(nn.Sequential(*body, nn.Linear(widths[-1], 10)))


def half() -> Built:
    x, y = digits().batch(torch.Generator().manual_seed(0))
    model = mlp(nn.ReLU, 4, 64, HE).half()
    return model, lambda m: functional.cross_entropy(m(x.half()).float(), y) * 1e-6


def shifted(bias: float) -> Built:
    """Every hidden ReLU closed by its bias."""
    model = mlp(nn.ReLU, 4, 64, HE)
    for layer in without_head(model):
        if isinstance(layer, nn.Linear):
            nn.init.constant_(layer.bias, bias)
    return batch(model)


def dropped(p: float) -> Built:
    """A dropout behind every hidden layer."""
    body = [m for _ in range(4) for m in (nn.Linear(64, 64), nn.ReLU(), nn.Dropout(p))]
    return batch(nn.Sequential(*body, nn.Linear(64, 10)))


def loud(blocks: int) -> Built:
    """A residual stream without norms, branches at He's gain."""
    body = [
        Residual(initialised(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), HE))
        for _ in range(blocks)
    ]
    return batch(nn.Sequential(nn.Linear(64, 64), *body, nn.Linear(64, 10)))


def gains(value: float) -> Callable[[nn.Module], object]:
    def change(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.constant_(module.weight, value)

    return change


def embedded(std: float) -> Callable[[nn.Module], object]:
    return lambda model: nn.init.normal_(model.get_parameter("token.weight"), 0.0, std)


def shape(layers: int, norm: str = "post", **changes: float) -> Shape:
    return Shape(layers, norm=norm, vocabulary=16, **changes)  # pyright: ignore[reportArgumentType]


def of_others(model: nn.Module, loss: Loss, _: Configuration) -> float:
    """Share of the gradient of the last sample's answer that reaches the inputs of others."""
    x = SEQUENCE.clone().requires_grad_()
    norms = torch.autograd.grad(model(x)[-1].sum(), x)[0].flatten(1).norm(dim=1)
    return float(norms[:-1].norm() / norms.norm())


def rnn() -> nn.RNNBase:
    return nn.RNN(8, 32, batch_first=True)


def unbiased() -> nn.RNNBase:
    return nn.RNN(8, 32, batch_first=True, bias=False)


def lstm() -> nn.RNNBase:
    return nn.LSTM(8, 32, batch_first=True)


# -- the table -------------------------------------------------------------------------------------


def cures() -> tuple[Cure, ...]:
    """One row a remedy at least; several where it has several kinds."""
    late, loss = trained("SGD", 0.1), "loss after 100 steps"
    quiet, short = 0.01 * SEQUENCE, SEQUENCE[:, :20]

    def deep(
        remedy: str, case: str, build: Callable[[], Built], variant: str = "", within: float = 1.5
    ) -> Cure:
        return Cure(remedy, case, build, depth, DECADES, -within, within, variant)

    def far(
        remedy: str,
        case: str,
        build: Callable[[], Built],
        variant: str = "",
        low: float = -2.0,
        x: Tensor = SEQUENCE,
    ) -> Cure:
        return Cure(remedy, case, build, time(x), f"decades along {x.shape[1]} steps", low, 2.0, variant)

    def fit(
        remedy: str, case: str, build: Callable[[], Built], effect: Effect, high: float, variant: str = ""
    ) -> Cure:
        return Cure(remedy, case, build, effect, loss, 0.0, high, variant)

    return (
        deep("classic_initialisation", "20 ReLU layers as torch draws them", chain(nn.ReLU, 20, None)),
        deep("classic_initialisation", "20 tanh layers as torch draws them", chain(nn.Tanh, 20, None), "Xavier"),
        deep("classic_initialisation", "30 SELU layers as torch draws them", chain(nn.SELU, 30, None), "LeCun"),
        deep("critical_initialisation", "20 ReLU layers as torch draws them", chain(nn.ReLU, 20, None)),
        deep("critical_initialisation", "20 GELU layers as torch draws them", chain(nn.GELU, 20, None)),
        deep("orthogonal_initialisation", "50 tanh layers as torch draws them", chain(nn.Tanh, 50, None)),
        deep("delta_orthogonal", "20 tanh convolutions as torch draws them", lambda: images(nn.Tanh, 20)),
        deep("lsuv", "20 ReLU layers as torch draws them", chain(nn.ReLU, 20, None)),
        deep("exchange_activation", "10 sigmoid layers, Xavier", chain(nn.Sigmoid, 10, XAVIER)),
        deep("exchange_activation", "10 sigmoid layers, Xavier", chain(nn.Sigmoid, 10, XAVIER), "SELU"),
        *(deep("exchange_activation", "10 sigmoid layers, He", chain(nn.Sigmoid, 10, HE), f"{called} in", 2.0)
          for called in ("ReLU", "GELU", "SiLU", "leaky ReLU")),
        deep("exchange_activation", "40 softplus layers, He", chain(nn.Softplus, 40, HE), "ELU in", 2.0),
        Cure("zero_biases", "4 ReLU layers, biases -10", lambda: shifted(-10.0), late, loss, 0.0, 1.0),
        Cure("leaky_activation", "4 ReLU layers, biases -10", lambda: shifted(-10.0), dead,
             "share of dead units", 0.0, 0.01),
        fit("lower_dropout", "4 ReLU layers, dropout 0.9", lambda: dropped(0.9), trained("AdamW", 4e-3), 0.8),
        Cure("batch_first", "GRU over the samples of the batch", sequence(lambda: nn.GRU(8, 32)), of_others,
             "gradient of others", 0.0, 0.0),
        deep("batch_statistics", "10 batch norms in eval mode, running variances 100", lambda: outdated(10)),
        deep("reset_norm_gain", "12 post-norm blocks, gains 0.02", language(shape(12), gains(0.02))),
        deep("reset_norm_epsilon", "12 post-norm blocks, epsilon 1e4", language(shape(12, eps=1e4))),
        deep("scale_residual_branches", "40 residual blocks without norms, He", lambda: loud(40), "1/sqrt", 2.0),
        deep("scale_residual_branches", "40 residual blocks without norms, He", lambda: loud(40), "start at 0", 2.0),
        deep("complete_p", "40 residual blocks without norms, He", lambda: loud(40), within=2.0),
        deep("identity_blocks", "40 residual blocks without norms, He", lambda: loud(40), "ReZero", 2.0),
        deep("identity_blocks", "40 residual blocks without norms, He", lambda: loud(40), "LayerScale", 2.0),
        fit("identity_blocks", "40 residual blocks without norms, He", lambda: loud(40), late, 1.0, "Fixup"),
        fit("scale_embeddings", "4 pre-norm blocks, embeddings of deviation 30", language(shape(4, "pre"), embedded(30.0)),
            trained("AdamW", 1e-3), 0.15),
        deep("rescale_weights", "20 ReLU layers, orthogonal of gain 0.4", chain(nn.ReLU, 20, orthogonal(0.4))),
        far("recurrent_initialisation", "tanh RNN as torch draws it", sequence(rnn), "inputs small"),
        far("recurrent_initialisation", "tanh RNN, weights x 6", sequence(rnn, 6.0), "scale of an orthogonal", GROWTH),
        far("recurrent_initialisation", "tanh RNN as torch draws it", sequence(rnn), "IRNN"),
        far("forget_bias", "LSTM as torch draws it", sequence(lstm, inputs=short), x=short),
        far("chrono_initialisation", "LSTM as torch draws it", sequence(lstm)),
        far("gated_recurrence", "tanh RNN as torch draws it", sequence(rnn), "GRU"),
        far("gated_recurrence", "tanh RNN as torch draws it", sequence(rnn), "LSTM"),
        far("orthogonal_recurrence", "tanh RNN without biases, small inputs", sequence(unbiased, inputs=quiet),
            "orthogonal", x=quiet),
        far("orthogonal_recurrence", "tanh RNN, weights x 6", sequence(rnn, 6.0), "spectral norm", GROWTH),
        deep("insert_normalisation", "20 sigmoid layers, Xavier", chain(nn.Sigmoid, 20, XAVIER), "BatchNorm"),
        deep("insert_normalisation", "20 tanh layers, gain 0.5", chain(nn.Tanh, 20, scaled_normal(0.5)), "LayerNorm"),
        deep("insert_normalisation", "20 ReLU layers as torch draws them", chain(nn.ReLU, 20, None), "RMSNorm"),
        deep("insert_normalisation", "20 ReLU convolutions as torch draws them", lambda: images(nn.ReLU, 20), "GroupNorm"),
        deep("insert_normalisation", "40 residual blocks without norms, He", lambda: loud(40), "LayerNorm", 2.0),
        deep("standardise_weights", "20 sigmoid layers, Xavier", chain(nn.Sigmoid, 20, XAVIER)),
        deep("insert_residual", "40 layers of BatchNorm and ReLU without skips", lambda: normalised(40)),
        deep("insert_residual", "50 tanh layers as torch draws them", chain(nn.Tanh, 50, None)),
        deep("insert_residual", "20 tanh layers, each 2 units narrower", lambda: tapering(20)),
        fit("deep_norm", "12 post-norm blocks, AdamW at 3e-3", language(shape(12)), trained("AdamW", 3e-3), 1.0),
        fit("pre_norm", "12 post-norm blocks, AdamW at 3e-3", language(shape(12)), trained("AdamW", 3e-3), 1.0),
        Cure("query_key_norm", "attention with queries and keys x 100", lambda: attending(100.0), logits,
             "rms of the logits", 0.3, 3.0),
        fit("standardise_input", "4 ReLU layers, inputs x 1e4", chain(nn.ReLU, 4, HE, scale=1e4), late, 1.0),
        fit("pass_logits", "softmax before cross-entropy",
            lambda: batch(mlp(nn.ReLU, 3, 64, HE).append(nn.Softmax(-1))), late, 1.0),
        fit("leave_out_factor", "3 ReLU layers, temperature 1000",
            lambda: batch(Cold(mlp(nn.ReLU, 3, 64, HE))), trained("AdamW", 1e-3), 1.0),
        Cure("safe_loss", "log of a softmax, logits in the hundreds", logarithm, finite,
             "finite share of the gradient", 1.0, 1.0),
        Cure("safe_loss", "log of a sigmoid, logits in the hundreds", odds, finite,
             "finite share of the gradient", 1.0, 1.0),
        fit("clip_gradients", "12 ReLU layers, 1.5 x He", chain(nn.ReLU, 12, scaled_normal(1.5 * math.sqrt(2))),
            trained("SGD", 0.1), 1.0),
        fit("lower_learning_rate", "4 ReLU layers, SGD at 10", chain(nn.ReLU, 4, HE), trained("SGD", 10.0), 1.0, "SGD"),
        fit("lower_learning_rate", "4 ReLU layers, AdamW at 1", chain(nn.ReLU, 4, HE), trained("AdamW", 1.0), 1.0, "AdamW"),
        fit("warm_up", "12 post-norm blocks, AdamW at 3e-3", language(shape(12)), trained("AdamW", 3e-3, 100), 2.0),
        fit("adam_epsilon", "20 tanh layers, loss x 1e-12", chain(nn.Tanh, 20, LECUN, unit=1e-12),
            trained("AdamW", 1e-3), 1e-12),
        Cure("loss_scale", "4 ReLU layers in float16, loss x 1e-6", half, flushed, "share of zero gradients", 0.0, 0.5),
        far("truncate_backpropagation", "tanh RNN, weights x 6", sequence(rnn, 6.0), low=GROWTH),
    )  # fmt: skip


def rows(begins: str = "") -> Iterator[Row]:
    """The table, row by row."""
    for cure in cures():
        if cure.remedy.startswith(begins):
            yield measured(cure)


def main() -> None:
    print("| remedy | case | prescription | unit | before | expected | measured | cured |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows(sys.argv[1] if len(sys.argv) > 1 else ""):
        said = f"not applicable: {row.rx.why_not}" if row.rx.why_not else row.rx.title
        cured = "yes" if row.sick and row.cured else "was not sick" if not row.sick else "NO"
        print(
            f"| {row.rx.remedy} | {row.cure.case} | {said} | {row.cure.unit} | {row.before:.3g} | {row.expected} | "
            f"{row.after:.3g} | {cured} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
