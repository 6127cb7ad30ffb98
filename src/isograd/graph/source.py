"""Where in the user's code torch was called from."""

from __future__ import annotations

import os
import sys
from functools import lru_cache

import torch

TORCH_FOLDER = os.path.dirname(torch.__file__) + os.sep
HERE = os.path.dirname(__file__)
OWN_FOLDER = os.path.dirname(os.path.abspath(HERE)) + os.sep
IN_MODELS = tuple(OWN_FOLDER + name for name in ("modules.py", "surgery.py", "calls.py"))
"""Our files that run inside a repaired model."""
WHERE_MADE = "where the layers are made"


def source() -> str:
    """`file:line` of the innermost frame of the user's that called torch; '' if none stands before ours."""
    frame = sys._getframe(1)
    while frame is not None and os.path.dirname(frame.f_code.co_filename) == HERE:
        frame = frame.f_back
    while frame is not None:
        path = shown(frame.f_code.co_filename)
        if path is None:
            return ""
        if path:
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def where_written(source: str) -> str:
    """Where the user would change what is called at this line: Keras calls for all layers from one line of its own."""
    return WHERE_MADE if source.startswith(("keras/", "keras\\")) else source


@lru_cache(maxsize=4096)
def shown(filename: str) -> str | None:
    """How a file is called to the user: relative to where they are, or inside its package.

    '' for torch's own, repaired modules and generated code, which is passed over; None for ours, behind which it is no
    longer the model that calls.
    """
    path = os.path.abspath(filename)
    if path in IN_MODELS:
        return ""
    if path.startswith(OWN_FOLDER) and not path.endswith("demo.py"):
        return None
    if path.startswith(TORCH_FOLDER) or filename.startswith("<frozen") or "contextlib" in path:
        return ""
    packages = os.sep + "site-packages" + os.sep
    if packages in path:
        return path.rsplit(packages, 1)[1]
    if path.startswith(OWN_FOLDER):
        return "isograd/" + path.removeprefix(OWN_FOLDER)
    here = os.getcwd() + os.sep
    return path.removeprefix(here) if path.startswith(here) else filename
