"""RN604 mixed-samples: a recurrence or an attention runs over the samples of the batch, as if they were its steps.

What it means
    Sample by sample is read as one sequence, and each step of it as a sample of its own. The answer for one sample depends on
    the others that happen to be in its batch, most of its own steps are never seen together, and its gradient reaches the
    inputs of other samples. The loss falls, a little, and a model that is asked for one sample alone gives something else.

Why it happens
    nn.RNN, nn.LSTM, nn.GRU, nn.MultiheadAttention and nn.Transformer expect (step, sample, feature) unless they are made with
    batch_first=True, and take (sample, step, feature) without a word.

Evidence
    The head gives one answer for each row of the input, so that the rows are the samples, and the axis along which a recurrent
    kernel or an attention runs is as long as they are many, while its axis of samples is not. Exact facts of the shapes rather
    than thresholds: in a batch that is as large as the sequence is long they cannot be told. GRUs and LSTMs of digits have 0.47
    to 0.56 of a batch right after 300 steps, of samples given one by one 0.40 to 0.49, and with the axes in order 0.86 to 0.97;
    a transformer 0.81, 0.17 and 0.91.

What helps
    batch_first=True, or transpose(0, 1) before and after.

References
    PyTorch, nn.LSTM and nn.MultiheadAttention, batch_first; Karpathy 2019, A recipe for training neural networks: backprop to chart
    dependencies.
"""

from __future__ import annotations

from collections.abc import Iterator

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.statistics import Site
from isograd.symptoms import Healthy, Outcome

CODE = "RN604"
NAME = "mixed-samples"

WORST = 3
"""Sites that are named."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """What runs along an axis, beside the number of samples."""
    along = mixing(flow)
    if not along:
        yield Healthy("nothing that runs along time is seen to run over the samples")
        return
    samples, steps = _layout(along[0])
    yield Finding(
        CODE,
        NAME,
        Severity.ERROR,
        f"{along[0].name} runs over the {samples} samples as if they were steps, and takes the {steps} steps for samples",
        cause="it expects (step, sample, feature), and is given (sample, step, feature)",
        sites=tuple(site.place for site in along[:WORST]),
        evidence={"samples": samples, "steps": steps, "cause": "layout"},
        remedies=("batch-first",),
    )


def mixing(flow: Flow) -> list[Site]:
    """Recurrent kernels and attentions of torch's own that run along the axis of the samples."""
    samples = next(iter(flow.sites[0].shape), 0) if flow.sites else 0
    running = [s for s in flow.sites if s.kind == "recurrent"] + [a.site for a in flow.attentions]
    layouts = [(site, *_layout(site)) for site in running]
    return [
        site
        for site, steps, other in layouts
        if steps == samples == _answers(flow, other) and other not in (1, samples)
    ]


def _answers(flow: Flow, other: int) -> int:
    """Rows that the loss is asked about, one answer each; 0 where they may be steps: then each has one for the other axis."""
    rows = next((c.rows for c in flow.losses if c.function in ("cross_entropy", "nll_loss")), 0)
    out = next((site.shape for site in reversed(flow.sites) if site.kind != "loss"), ())
    return rows or (next(iter(out), 0) if len(out) < 3 and out[1:] != (other,) else 0)


def _layout(site: Site) -> tuple[int, int]:
    """Length of the axis that it runs along, and of the other; (0, 0) where its call does not tell."""
    # An attention is (step, sample, feature) whatever its module was given; the last argument of a kernel is batch_first.
    last = next((value for _, value in reversed(site.settings)), None)
    known = site.operation == "multi_head_attention_forward" or (site.kind == "recurrent" and last is False)
    steps, samples, *_ = site.shape if known and len(site.shape) == 3 else (0, 0)
    return steps, samples
