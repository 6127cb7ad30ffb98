"""What the published cases share: their files, and what may rightly be said of them."""

from __future__ import annotations

import json
from pathlib import Path

from gallery.keras_net import Spec

DATA = Path(__file__).with_name("data")
SEEDS = 3

ABOUT_DATA = frozenset({"UP504", "SA301", "SA302", "VG102"})
"""What may rightly be said of a network whose fault lies in its data or its head."""


def facts(name: str) -> list[Spec]:
    """The lines of one file of cases."""
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
