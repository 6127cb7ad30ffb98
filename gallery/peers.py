"""What other tools say of the same models: python -m gallery.peers torchlens|torchmortem

Runs in an environment that has the tool (torchlens 2.36.1, torchmortem 0.1.1); the answers are kept in
peers.json, beside which gallery.zoo prints its own. Each tool watches ten steps of AdamW at 1e-3 on the
case's batch, which is what it needs; its own thresholds are left as they are. Only what it says of
gradients, dead or saturated units and values that are not finite counts.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import transformers
from torch import nn

from gallery.case import Case, Loss
from gallery.cases import published
from gallery.healthy import healthy
from gallery.sick import harmless, sick

PEERS = Path(__file__).with_name("peers.json")
STEPS = 10

Watch = Callable[[nn.Module, Loss, torch.optim.Optimizer], str]


def steps(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer) -> Iterable[float]:
    """Ten steps of training; yields each loss before the next."""
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        yield value.item()


def torchlens(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer) -> str:
    """TorchLens's training checks: gradient magnitude and values that are not finite, both collected."""
    from torchlens.checks import ChecksSession  # type: ignore[import-not-found]

    session = ChecksSession(model, optimizer)
    session.register_magnitude_check()
    session.register_nonfinite_gradient_check(action="collect")
    with session:
        for _ in steps(model, loss, optimizer):
            pass
    said = " ".join(finding.message for finding in session.report().findings)
    for verdict in ("nonfinite", "exploding", "vanishing"):
        if verdict in said:
            return verdict
    return "healthy"


def torchmortem(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer) -> str:
    """torchmortem's postmortem: its warnings and critical findings about gradients and units."""
    from torchmortem import Autopsy  # type: ignore[import-not-found]
    from torchmortem.types import Severity  # type: ignore[import-not-found]

    autopsy = Autopsy(model, optimizer=optimizer)
    with autopsy:
        for value in steps(model, loss, optimizer):
            autopsy.step(loss=value)
    report = autopsy.get_report()
    found = {
        (finding.category, finding.title.lower())
        for finding in (report.findings if report is not None else [])
        if finding.severity >= Severity.WARNING
    }
    for verdict in ("exploding", "vanishing"):
        if any(verdict in title for _, title in found):
            return verdict
    if any(category == "gradient_flow" for category, _ in found):
        return "gradient"
    return next((category for category, _ in found if category in ("dead_units", "saturation")), "healthy")


TOOLS: dict[str, Watch] = {"torchlens": torchlens, "torchmortem": torchmortem}


def asked(case: Case, watch: Watch) -> str:
    """What a tool says of a case; 'crash: ErrorName' where it or the training it watches raises."""
    model, loss = case.build()
    parameters = [p for p in model.parameters() if p.requires_grad]
    try:
        return watch(model, loss, torch.optim.AdamW(parameters, 1e-3))
    except Exception as error:
        return f"crash: {type(error).__name__}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tool", choices=TOOLS)
    tool: str = parser.parse_args().tool
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for case in (*healthy(), *harmless(), *sick(), *published()):
        said: dict[str, dict[str, str]] = json.loads(PEERS.read_text()) if PEERS.exists() else {}
        answers = said.setdefault(tool, {})
        if case.name in answers:
            continue
        answer = asked(case, TOOLS[tool])
        said = json.loads(PEERS.read_text()) if PEERS.exists() else {}
        said.setdefault(tool, {})[case.name] = answer
        PEERS.write_text(json.dumps(said, indent=1, sort_keys=True))
        print(f"{case.name:46} {case.verdict:10} {answer}", flush=True)


if __name__ == "__main__":
    main()
