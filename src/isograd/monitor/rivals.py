"""Networks that are trained against each other, or on each other: the loss of one runs through weights that another
optimizer trains on a loss of its own, as a generator's through its critic and an actor's through its value network.

Neither loss has a level of its own then: it stands where the other network puts it. Two things tell, without a look at a
graph. A backward reaches a network, another optimizer steps with what it left, and what it left in this network is thrown
away before its own next backward. Or its parameters are frozen while the other steps, and trained again afterwards.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

from torch import Tensor

LEAST = 2
"""Times that it must be seen: once may be a batch that a script has left out, or a stage of a training that begins."""


class Rivals:
    """What the gradients of one optimizer's parameters tell of the others in this process."""

    def __init__(self) -> None:
        self._seen = 0
        self._stepped_with = -1
        """The backward whose gradients its last step was made with."""
        self._last: weakref.ref[Tensor] | None = None
        """A parameter that has got a gradient, and"""
        self._left: tuple[weakref.ref[Tensor], int] | None = None
        """that gradient with its version, as the last backward has left it; None: a step was made with it."""
        self._frozen_for: weakref.WeakSet[Rivals] = weakref.WeakSet()
        """Those that stepped while these parameters were frozen."""
        self._others: weakref.WeakSet[Rivals] = weakref.WeakSet()
        """Those that were seen."""
        self.broke = False
        """Its last step was made with gradients that are not finite, as far as that is known without waiting for a device."""
        _all.add(self)

    def close(self) -> None:
        """Count no longer: nothing more is heard of these parameters."""
        _all.discard(self)

    @property
    def found(self) -> bool:
        """There is one."""
        return self._seen >= LEAST

    def began(self, reached: Tensor, before: int) -> None:
        """Another backward has left its first gradient; `before`: the number of the last."""
        rivals = {other for other in self._frozen_for if other in _all}
        if self._thrown_away(reached):
            rivals |= {other for other in _all if other is not self and other._stepped_with == before}
        self._seen += bool(rivals)
        for rival in rivals:
            rival._seen += 1
            rival._others.add(self)
            self._others.add(rival)
        self._left = None
        self._frozen_for.clear()

    def ended(self, listened: Sequence[Tensor]) -> None:
        """A backward has ended."""
        last = next((p for p in reversed(listened) if p.grad is not None), None)
        if last is not None and last.grad is not None:
            self._last, self._left = weakref.ref(last), (weakref.ref(last.grad), last.grad._version)

    def stepped(self, backward: int) -> None:
        """The optimizer has stepped with the gradients of this backward."""
        self._left, self._stepped_with = None, backward
        for other in () if self.found else _all:
            last = None if other is self or other._last is None else other._last()
            if last is not None and not last.requires_grad:
                other._frozen_for.add(self)

    def _thrown_away(self, reached: Tensor) -> bool:
        """The gradient of the last backward was not there any more when this one came, or was zero: in place it changes
        once more than by what is added."""
        last = None if self._last is None else self._last()
        if self._left is None or last is None:
            return False
        gradient, version = self._left
        now = last.grad
        return now is None or now is not gradient() or now._version > version + (last is reached)


def broke(networks: Iterable[Rivals]) -> bool:
    """Has one that these are trained against, and that is none of them, made its last step with gradients that are not finite,
    and they have not? Then its weights are no numbers, nor is what comes through them."""
    mine = set(networks)
    well = [one for one in mine if one.found and not one.broke]
    return any(other.broke for one in well for other in one._others if other not in mine)


_all: weakref.WeakSet[Rivals] = weakref.WeakSet()
