"""A warning that stays one."""

from __future__ import annotations

import sys
import warnings


def warn(words: str, stacklevel: int = 1) -> None:
    """Warn, and never raise: under `python -W error` a warning would end the training that it is about, or the
    thread that waits for nobody. It is said on standard error then.

    Args:
        words: what is wrong, and what follows from it.
        stacklevel: as of `warnings.warn`: 1 is the line that calls this.
    """
    try:
        warnings.warn(words, stacklevel=stacklevel + 1)
    except UserWarning:
        print(words, file=sys.stderr, flush=True)
