"""Plain text: the machine, tables, progress."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import isograd
from benchmarks.workloads import Setting

RESULTS = Path(__file__).parent / "results"


def machine(setting: Setting) -> str:
    """What the figures depend on."""
    parts = [
        f"isograd {isograd.__version__}",
        f"torch {torch.__version__}",
        f"Python {platform.python_version()}",
        f"{platform.system()} {platform.machine()}",
        f"{os.cpu_count()} CPUs, {setting.threads} torch threads",
        f"load {os.getloadavg()[0]:.1f} at the start",
        f"{datetime.date.today():%Y-%m-%d}",
    ]
    if setting.device == "cuda":
        parts.insert(2, torch.cuda.get_device_name())
    return ", ".join(parts)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; all but the first are right-aligned."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *rest = (
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        return "| " + " | ".join((first, *rest)) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join((line(header), rule, *map(line, rows)))


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def save(name: str, setting: Setting, text: str) -> Path:
    """`results/flow-2026-01-31-cuda.md`."""
    path = RESULTS / f"{name}-{datetime.date.today():%Y-%m-%d}-{setting.kind}.md"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
