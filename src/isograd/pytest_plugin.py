"""A pytest plugin: `assert_healthy_gradients(model, loss)` fails with the findings as its message."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pytest

# Loaded into every pytest run of everybody who has isograd installed: torch only when it is used.
if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from isograd.diagnosis import Diagnosis


def assert_healthy_gradients(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    *,
    optimizer: Optimizer | None = None,
    select: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
) -> Diagnosis:
    """Fail the test if `isograd.check` finds an error in the model; its arguments are those of `check`.

    Returns:
        The diagnosis of the healthy model, for further assertions.
    """
    __tracebackhide__ = True
    import isograd

    diagnosis = isograd.check(model, loss, optimizer=optimizer, select=select, ignore=ignore)
    if diagnosis.errors:
        raise AssertionError(f"the gradients of {type(model).__name__} are not healthy\n\n{diagnosis}")
    return diagnosis


@pytest.fixture(name="assert_healthy_gradients")
def _fixture() -> Callable[..., Diagnosis]:  # pyright: ignore[reportUnusedFunction]
    """The function itself, so that a test needs no import."""
    return assert_healthy_gradients
