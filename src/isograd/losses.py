"""What a loss expects of the model, and what it is given: facts of its call, before any gradient.

Source: Wardat et al. 2021, DeepLocalize; Nikanjam et al. 2021, NeuraLint; PyTorch, torch.nn.functional.
"""

from __future__ import annotations

import math

from isograd.statistics import LossCall

BOUNDS = {
    "sigmoid": (0.0, 1.0),
    "softmax": (0.0, 1.0),
    "hardsigmoid": (0.0, 1.0),
    "tanh": (-1.0, 1.0),
    "softsign": (-1.0, 1.0),
    "hardtanh": (-1.0, 1.0),
    "relu": (0.0, math.inf),
    "relu6": (0.0, 6.0),
    "softplus": (0.0, math.inf),
    "exp": (0.0, math.inf),
    "log_softmax": (-math.inf, 0.0),
    "logsigmoid": (-math.inf, 0.0),
}
"""Range of the functions that end a model."""
REGRESSIONS = {"mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "subtraction"}
OF_LOGS = {
    "nll_loss": "use cross_entropy on the logits",
    "ctc_loss": "take log_softmax of the logits over the classes",
    "kl_div": "take log_softmax of the logits over the classes",
}
"""Losses of log-probabilities, and what to write for them."""
UNBOUNDED = {"linear", "conv1d", "conv2d", "conv3d"}
"""Layers that can make all classes likelier at once: a classifier of digits stays at chance in 300 steps."""
OF_LOGITS = {
    "cross_entropy",
    "binary_cross_entropy_with_logits",
    "soft_margin_loss",
    "multilabel_soft_margin_loss",
}
"""Losses that apply the softmax or sigmoid themselves."""
OF_CLASSES = OF_LOGITS | OF_LOGS.keys()
"""Losses in which one class wins over others, by as much as their logits differ: taken from them or from their logarithms."""
LOGARITHMS = {"log", "log2", "log10", "log1p", "xlogy", "binary_cross_entropy"}
NORMALISED_LOG = {"log_softmax", "logsigmoid", "log_sigmoid"}
SLACK = 0.05
"""Share of the target's own range by which it may overstep: noise on a target in [0, 1] is no fault."""


def oversteps(call: LossCall) -> bool:
    """Do the targets of a regression lie outside of the range of the function that made its input?"""
    if call.function not in REGRESSIONS or call.source not in BOUNDS:
        return False
    low, high = BOUNDS[call.source]
    slack = SLACK * (call.target_max - call.target_min)
    return call.target_max > high + slack or call.target_min < low - slack


def misfit(call: LossCall) -> tuple[str, str, str] | None:
    """What is wrong between this loss and its input: message, cause, remedy."""
    if call.pairs:
        return (
            f"{call.function} compares each of {call.rows} outputs with all targets: their shapes are broadcast",
            "outputs of shape (N, 1) beside targets of shape (N,): what is learned is the mean of the targets",
            "give both the same shape: output.squeeze(-1), or target.unsqueeze(-1)",
        )
    if call.over_samples:
        return (
            f"{call.source} before {call.function} sums to 1 over the {call.rows} samples, and not over the {call.width} classes",
            f"{call.source} along the wrong dimension: the samples of a batch share one answer",
            f"{call.source} over the classes: dim=-1",
        )
    if (call.function == "cross_entropy" and call.width == 1) or (
        call.source == "softmax" and call.width == 1
    ):
        return (
            "softmax over one unit is always 1, so that the loss is constant and its gradient exactly zero",
            "one output unit where each class needs its own",
            "use one unit with binary_cross_entropy_with_logits, or one unit per class",
        )
    probabilities = call.input_min >= 0 and call.input_max <= 1 and call.row_sum_error < 1e-3
    if call.function == "cross_entropy" and (call.source == "softmax" or (probabilities and call.width > 1)):
        return (
            "cross_entropy applies log_softmax itself, but is given probabilities: softmax acts twice",
            "a softmax before a loss that expects logits flattens its gradient",
            "pass logits: remove the softmax",
        )
    if call.function in ("cross_entropy", "binary_cross_entropy_with_logits") and call.source in (
        "sigmoid",
        "relu",
    ):
        return (
            f"{call.function} expects logits, but is given the output of {call.source}",
            f"a {call.source} before a loss that applies its own function",
            f"pass logits: remove the {call.source}",
        )
    if call.function in OF_LOGS and (
        call.source == "softmax"
        or (probabilities and call.width > 1 and call.function in ("nll_loss", "kl_div"))
    ):
        return (
            f"{call.function} expects log-probabilities, but is given probabilities",
            "a softmax where log_softmax is expected",
            OF_LOGS[call.function],
        )
    if call.function in OF_LOGS and call.source in UNBOUNDED:
        return (
            f"{call.function} expects log-probabilities, but is given the output of {call.source}: it falls for good while "
            "all classes grow together",
            "no log_softmax lies between the head and the loss",
            OF_LOGS[call.function],
        )
    if oversteps(call):
        low, high = BOUNDS[call.source]
        return (
            f"the output is bounded to [{low:g}, {high:g}] by {call.source}, but targets reach "
            f"from {call.target_min:.3g} to {call.target_max:.3g}",
            f"a {call.source} at the output cannot reach the targets and saturates on its way",
            "end the model with a linear layer, or scale the targets",
        )
    return None
