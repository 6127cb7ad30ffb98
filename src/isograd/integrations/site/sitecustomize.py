"""Runs at the start of each Python process below `isograd watch`: its folder is first on PYTHONPATH.

Nothing of isograd is imported here: it joins when the script itself imports torch.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

FOLDER = os.path.dirname(os.path.abspath(__file__))


class _After(MetaPathFinder):
    """Finds one module as Python would, and attaches once it has been imported."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenAttach(spec.loader)
        return spec


class _ThenAttach(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        try:
            from isograd.integrations import attach

            attach.after_import(module.__name__)
        except Exception as error:  # the training comes first
            print(f"isograd: this process is not watched: {type(error).__name__}: {error}", file=sys.stderr)


def _say_if_nothing_was_seen() -> None:
    """Silence must not look like health: what `isograd watch` started says so if nobody recorded anything."""
    import json

    settings = json.loads(os.environ["ISOGRAD_WATCH"])
    attach = sys.modules.get("isograd.integrations.attach")
    said = attach is not None and attach.has_told()
    if os.getpid() != settings["pid"] or settings["quiet"] or said or os.path.exists(settings["run"]):
        return
    why = "the script ended before it imported torch"
    if attach is not None and not attach.has_tried():
        why = "the script ended before it made an optimizer of torch, or called backward()"
    elif "torch" in sys.modules:
        why = (
            "no optimizer of torch took a step. A loop that updates the weights by itself is watched from inside: "
            "isograd.watch(model, None), and monitor.step() after each step"
        )
        if "torch._dynamo" in sys.modules:
            why += ". A step that is compiled as a whole runs no Python: leave loss.backward() and optimizer.step() out of it"
    if ended := getattr(sys, "last_type", None):
        why = f"the script ended with {ended.__name__} before an optimizer of torch took a step"
    print(f"isograd: nothing was recorded: {why}", file=sys.stderr)


def _end_as_interrupted() -> None:
    """Python ends a script that Ctrl-C has stopped by the signal itself, so that the shell stops its loop of scripts too; it
    forgets to where code is run from a string in between, as by a dataclass of what we import to tell the findings."""
    if getattr(sys, "last_type", None) is KeyboardInterrupt:
        with contextlib.suppress(KeyboardInterrupt):
            exec("raise KeyboardInterrupt")


def _run_the_one_we_hide() -> None:
    """Python runs one sitecustomize; the environment may have one of its own."""
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder or ".") != FOLDER]
    ours = sys.modules.pop("sitecustomize")
    try:
        importlib.import_module("sitecustomize")
    except ModuleNotFoundError as error:
        if error.name != "sitecustomize":
            raise
        sys.modules["sitecustomize"] = ours


if "ISOGRAD_WATCH" in os.environ:
    sys.meta_path[:0] = [_After("torch"), _After("keras")]
    atexit.register(_end_as_interrupted)  # runs after those that are registered later
    atexit.register(_say_if_nothing_was_seen)
_run_the_one_we_hide()
