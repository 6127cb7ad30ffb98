"""Published training problems, translated to PyTorch: what their state before training must be called.

Learning rates, epochs and labels leave the flow before training healthy; a head, a loss and data that do
not fit are to be named as such, and nothing else may be called a gradient problem.
"""

from __future__ import annotations

from gallery.atlas import atlas
from gallery.autotrainer import autotrainer
from gallery.case import Case
from gallery.forum import programs


def published() -> tuple[Case, ...]:
    """Every published case."""
    return (*autotrainer(), *programs(), *atlas())
