"""Published schemes for residual branches: the numbers that they give, where the model puts them, and that they learn."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gallery.nets import Shape, Transformer
from isograd.diagnosis import diagnose
from isograd.measure import measure
from isograd.prescription import Patient, Prescription, apply
from tests.families import FAMILIES, SEQUENCE
from tests.models import Built, Residual, classified

TOKENS = torch.randint(16, (2, 8), generator=torch.Generator().manual_seed(0))


def offered(name: str, built: Built) -> Iterator[Prescription]:
    model, loss = built
    patient = Patient(model, diagnose(measure(model, loss)), loss)
    return import_module(f"isograd.remedies.{name}").prescribe(patient)


def variant(name: str, built: Built, begins: str = "") -> Prescription:
    return next(rx for rx in offered(name, built) if rx.title.startswith(begins) and not rx.why_not)


def post_norm(layers: int = 3) -> Built:
    torch.manual_seed(0)
    model = Transformer(Shape(layers, width=16, heads=2, norm="post", vocabulary=16))
    return model, lambda m: functional.cross_entropy(m(TOKENS).flatten(0, 1), TOKENS.flatten())


def stream(blocks: int, layers: int = 2, bias: bool = True) -> Built:
    """Residual blocks of `layers` linear layers, without norms."""
    torch.manual_seed(0)
    body: list[nn.Module] = []
    for _ in range(blocks):
        parts = [part for _ in range(layers) for part in (nn.Linear(32, 32, bias=bias), nn.ReLU())]
        body.append(Residual(nn.Sequential(*parts[:-1])))
    return classified(nn.Sequential(nn.Linear(64, 32), *body, nn.Linear(32, 10)))


# -- DeepNorm --------------------------------------------------------------------------------------


def test_deep_norm_is_the_function_that_is_published() -> None:
    model, loss = post_norm()
    rx = variant("deep_norm", (model, loss))
    changed, renamed = apply(model, rx), rx.key_map(model)
    deep = Transformer(Shape(3, width=16, heads=2, norm="deep", vocabulary=16))  # norm(alpha h + f(h))
    deep.load_state_dict({key: changed.state_dict()[renamed.get(key, key)] for key in deep.state_dict()})
    torch.testing.assert_close(changed(TOKENS), deep(TOKENS), atol=1e-5, rtol=1e-5)
    ours, theirs = (torch.autograd.grad(loss(m), list(m.parameters())) for m in (changed, deep))
    sizes = [sorted(float(g.norm()) for g in found) for found in (ours, theirs)]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-4, abs=1e-6)


def test_beta_draws_values_outputs_and_feed_forward_and_1_queries_and_keys() -> None:
    rx = variant("deep_norm", post_norm())
    beta = pytest.approx((8 * 3) ** -0.25, rel=1e-5)
    gains = {(e.place.split(".", 2)[2], e.rows): e.arguments["gain"] for e in rx.edits if e.verb == "fill"}
    assert gains == {
        ("attention.query_key_value.weight", (0, 16)): 1.0,
        ("attention.query_key_value.weight", (16, 32)): 1.0,
        ("attention.query_key_value.weight", (32, 48)): beta,
        ("attention.out.weight", None): beta,
        ("feed_forward.0.weight", None): beta,
        ("feed_forward.2.weight", None): beta,
    }
    assert {e.of for e in rx.edits if e.verb == "fill"} == {"nn.init.xavier_normal_"}
    (factor,) = {e.arguments["value"] for e in rx.edits if e.verb == "alter"}
    assert factor == pytest.approx((2 * 3) ** -0.25, rel=1e-5)


@pytest.mark.skipif("bert" not in FAMILIES, reason="transformers is not installed")
def test_queries_and_keys_with_projections_of_their_own_get_1() -> None:
    torch.manual_seed(0)
    rx = variant("deep_norm", FAMILIES["bert"]())
    gains = {e.place.rsplit(".", 2)[1]: e.arguments["gain"] for e in rx.edits if e.verb == "fill"}
    assert gains["query"] == gains["key"] == 1.0
    assert gains["value"] == gains["dense"] == pytest.approx((8 * 3) ** -0.25, rel=1e-5)


def test_two_stacks_are_told_their_four_numbers() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.head = nn.Linear(5, 16), nn.Linear(16, 4)
            self.core = nn.Transformer(16, 2, 2, 2, 32, 0.0, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            h = self.enter(x)
            return self.head(self.core(h, h[:, :3]))

    (rx,) = offered("deep_norm", (Both(), lambda m: m(SEQUENCE).square().mean()))
    assert "encoder and decoder" in rx.why_not
    assert "0.81 (N^4 M)^(1/16)" in rx.advice[0]


# -- the end of a branch ---------------------------------------------------------------------------


def test_the_attention_of_torch_ends_with_its_output_projection() -> None:
    torch.manual_seed(0)
    model, loss = FAMILIES["transformer encoder of torch"]()
    rx = variant("scale_residual_branches", (model, loss))
    assert "6 residual branches scaled by 1/sqrt(6)" in rx.title
    ends = {e.place.split(".", 3)[3] for e in rx.edits}
    assert ends == {"self_attn.out_proj.weight", "self_attn.out_proj.bias", "linear2.weight", "linear2.bias"}


@pytest.mark.parametrize("name", ["deep_norm", "complete_p", "identity_blocks", "leaky_activation"])
def test_the_fused_kernel_of_torch_s_encoder_layers_computes_the_same_in_eval(name: str) -> None:
    torch.manual_seed(0)
    model, loss = FAMILIES["transformer encoder of torch"]()
    tried = [rx for rx in offered(name, (model, loss)) if rx.applicable]
    assert tried
    for rx in tried:
        changed = apply(model, rx)
        plain = float(loss(changed.train()).detach())  # there is no dropout
        with torch.no_grad():
            assert float(loss(changed.eval())) == pytest.approx(plain, rel=1e-5), rx.title


def test_one_branch_is_not_scaled_by_1() -> None:
    assert [rx.title for rx in offered("scale_residual_branches", stream(1))] == [
        "the last weights of 1 residual branch start at 0"
    ]


@pytest.mark.parametrize("name", ["scale_residual_branches", "identity_blocks", "complete_p"])
@pytest.mark.parametrize("skip", [0.0, 0.3])
def test_branches_are_not_made_smaller_where_the_skips_pass_too_little(name: str, skip: float) -> None:
    class Damped(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return skip * x + self.branch(x)

    torch.manual_seed(0)
    body = (Damped(nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))) for _ in range(4))
    built = classified(nn.Sequential(nn.Linear(64, 32), *body, nn.Linear(32, 10)))
    (rx,) = offered(name, built)
    assert f"let only {skip:.2g} of the signal by" in rx.why_not


# -- factors that stay in the model ----------------------------------------------------------------


def test_complete_p_multiplies_each_branch_by_1_over_the_depth_and_divides_the_epsilon_by_it() -> None:
    model, loss = stream(8)
    rx = variant("complete_p", (model, loss))
    x = torch.randn(4, 64)
    h = model[0](x)
    for block in model[1:-1]:
        h = h + block.branch(h) / 8
    torch.testing.assert_close(apply(model, rx)(x), model[-1](h))
    assert rx.configuration == {"eps": 1.25e-9}


@pytest.mark.parametrize(("blocks", "start"), [(18, 0.1), (24, 1e-5), (25, 1e-6)])
def test_layer_scale_starts_where_it_is_published(blocks: int, start: float) -> None:
    model, loss = stream(blocks, layers=1)
    changed = apply(model, variant("identity_blocks", (model, loss), "LayerScale"))
    learned = [p for name, p in changed.named_parameters() if name.endswith(".value")]
    assert len(learned) == blocks
    for factor in learned:
        assert torch.equal(factor, torch.full((32,), start))


class Transposed(nn.Module):
    """x @ w + b, as transformers' Conv1D."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(inputs, outputs))
        self.bias = nn.Parameter(0.1 * torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def test_each_feature_of_the_output_has_its_factor_wherever_the_weight_keeps_it() -> None:
    torch.manual_seed(0)
    ends = [nn.Linear(24, 32), Transposed(24, 32)]
    blocks = [Residual(nn.Sequential(nn.Linear(32, 24), nn.ReLU(), end)) for end in ends]
    model, loss = classified(nn.Sequential(nn.Linear(64, 32), *blocks, nn.Linear(32, 10)))
    changed = apply(model, variant("identity_blocks", (model, loss), "LayerScale"))
    for i, end in enumerate(ends, 1):
        new, x, factor = changed[i].branch[2], torch.randn(4, 24), torch.rand(32)  # pyright: ignore[reportIndexIssue]
        with torch.no_grad():
            new.parametrizations.weight[0].value.copy_(factor)
        torch.testing.assert_close(new(x), factor * end(x))


def test_rezero_starts_as_the_identity_and_its_factor_learns() -> None:
    model, loss = stream(6)
    rx = variant("identity_blocks", (model, loss), "ReZero")
    changed, x = apply(model, rx), torch.randn(4, 64)
    torch.testing.assert_close(changed(x), model[-1](model[0](x)))
    factors = [p for name, p in changed.named_parameters() if name.endswith(".value")]
    assert [p.shape for p in factors] == [torch.Size([])] * 6
    optimizer = torch.optim.SGD(changed.parameters(), 0.1)
    before = float(loss(changed).detach())
    for _ in range(20):
        optimizer.zero_grad()
        loss(changed).backward()
        optimizer.step()
    assert all(float(p.detach()) != 0 for p in factors)
    assert float(loss(changed).detach()) < before
    assert torch.equal(copy.deepcopy(changed)(x), changed(x))


@pytest.mark.parametrize("layers", [2, 3])
def test_fixup_draws_what_its_three_rules_say(layers: int) -> None:
    model, loss = stream(10, layers)
    changed = apply(model, variant("identity_blocks", (model, loss), "Fixup"))
    drawn = changed[3].branch  # pyright: ignore[reportIndexIssue]
    he = math.sqrt(2 / 32) * 10 ** (-1 / (2 * layers - 2))
    assert float(drawn[0].weight.std()) == pytest.approx(he, rel=0.1)
    assert not drawn[2 * layers - 2].weight.any()
    assert float(drawn[2 * layers - 2].parametrizations.weight[0].value) == 1.0
    assert not changed[-1].weight.any()  # pyright: ignore[reportIndexIssue]
    assert float(changed[0].weight.std()) == pytest.approx(math.sqrt(2 / 64), rel=0.1)  # pyright: ignore[reportIndexIssue]


def test_fixup_adds_a_scalar_only_where_no_bias_can_say_it_and_is_not_for_normalised_networks() -> None:
    model, loss = stream(4, bias=False)
    rx = variant("identity_blocks", (model, loss), "Fixup")
    wrapped = [e.place for e in rx.edits if e.of == "modules.Offset"]
    assert wrapped == [f"{i}.branch.{j}" for i in range(1, 5) for j in (0, 2)]
    changed = apply(model, rx)
    assert len([n for n, _ in changed.named_parameters() if n.endswith("offset")]) == 8
    assert [rx.why_not for rx in offered("identity_blocks", post_norm())][-1].startswith("Fixup is for")


def test_an_optimizer_follows_to_the_weights_behind_the_factors_and_takes_the_learned_ones() -> None:
    model, loss = stream(4)
    optimizer = torch.optim.Adam(model.parameters())
    loss(model).backward()
    optimizer.step()
    changed = apply(model, variant("identity_blocks", (model, loss), "ReZero"), optimizer=optimizer)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in changed.parameters()}
    for name, p in changed.named_parameters():
        assert (p in optimizer.state) == (not name.endswith(".value")), name
