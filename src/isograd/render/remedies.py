"""What each remedy is, in words that a user can act on."""

from __future__ import annotations

WORDS = {
    "attend-over-time": "read all steps at the output, by attention or pooling over time, not the last alone",
    "avoid-in-place": "replace the in-place operation by its plain form: x = x + y for x += y",
    "batch-statistics": "train batch normalisation in training mode: model.train()",
    "bfloat16": "train in bfloat16, which has the range of float32",
    "chrono-initialisation": "spread the gates over time scales up to T: b_f = log(uniform(1, T - 1)), "
    "b_i = -b_f, bias_hh at 0",
    "clip-gradients": "clip the gradient norm: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)",
    "critical-initialisation": "draw the weights at the critical gain of the activation: "
    "nn.init.orthogonal_(layer.weight, gain)",
    "exchange-activation": "put ReLU, GELU or SiLU in place of the saturating activation",
    "forget-bias": "start the forget gates open: 1 in the second quarter of bias_ih_l0, 0 in that of bias_hh_l0",
    "gated-recurrence": "put nn.LSTM or nn.GRU in place of the plain recurrence",
    "insert-normalisation": "put nn.LayerNorm (or nn.BatchNorm2d after convolutions) before each activation",
    "insert-residual": "add skip connections: x + f(x) around layers that keep their width",
    "leaky-activation": "put nn.LeakyReLU or nn.GELU in place of ReLU: no unit is then off for good",
    "loss-scale": "scale the loss in half precision: torch.amp.GradScaler",
    "lower-learning-rate": "lower the learning rate",
    "orthogonal-recurrence": "draw the recurrent matrix orthogonal: nn.init.orthogonal_(rnn.weight_hh_l0)",
    "pre-norm": "normalise the input of each branch, x + f(norm(x)), instead of the sum",
    "query-key-norm": "normalise queries and keys of each head before their product: functional.rms_norm",
    "recurrent-initialisation": "draw the recurrent matrix orthogonal, gate by gate: "
    "for gate in rnn.weight_hh_l0.data.chunk(4): nn.init.orthogonal_(gate)",
    "rescale-weights": "multiply the weights of the layer to the size of the others: std 1/sqrt(fan_in)",
    "batch-first": "tell it that the samples come first: nn.LSTM(…, batch_first=True)",
    "lower-dropout": "leave out less: nn.Dropout(0.1); p is the share that is left out",
    "reset-norm-epsilon": "set the normalisation's eps back to its default, 1e-5",
    "reset-norm-gain": "start the normalisation's weights at 1: nn.init.ones_(norm.weight)",
    "safe-derivative": "keep off the point where the derivative is infinite: sqrt(x + eps), x.clamp(min=eps)",
    "safe-loss": "pass logits to a loss that works in log space: cross_entropy, "
    "binary_cross_entropy_with_logits",
    "scale-embeddings": "draw or scale the embeddings to the size that the blocks behind them expect",
    "scale-residual-branches": "scale the last weights of each residual branch by 1/sqrt(number of blocks)",
    "standardise-input": "standardise the input: (x - mean) / std of each feature over the training set",
    "straight-through": "pass the gradient by the step: x + (x.round() - x).detach()",
    "use-or-freeze": "use the parameter in the forward, or freeze it: parameter.requires_grad_(False)",
    "warm-up": "raise the learning rate from near zero over the first steps",
    "zero-biases": "start the biases at 0: nn.init.zeros_(layer.bias)",
}


def in_words(remedy: str) -> str:
    """`warm-up: raise the learning rate …`; a remedy that is a sentence already stays as it is."""
    return f"{remedy}: {WORDS[remedy]}" if remedy in WORDS else remedy
