"""What is used in a `with` block and closed at its end."""

from __future__ import annotations

from typing import Self


class Closing:
    """A context manager of its own: leaving the block closes it, however it is left."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
