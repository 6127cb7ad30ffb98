"""Find out why gradients vanish or explode in a PyTorch model, repair it, and prove the repair."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isograd import theory as theory
    from isograd.check import check as check
    from isograd.diagnosis import Diagnosis as Diagnosis
    from isograd.diagnosis import Finding as Finding
    from isograd.diagnosis import Severity as Severity
    from isograd.diagnosis import diagnose as diagnose
    from isograd.extrapolation import extrapolate as extrapolate
    from isograd.flow import Flow as Flow
    from isograd.horizon import Horizon as Horizon
    from isograd.measure import measure as measure
    from isograd.monitor import AdaptiveClip as AdaptiveClip
    from isograd.monitor import Guard as Guard
    from isograd.monitor import Monitor as Monitor
    from isograd.monitor import Reading as Reading
    from isograd.monitor import watch as watch
    from isograd.nonfinite import find_nonfinite as find_nonfinite
    from isograd.pages import explain as explain
    from isograd.prescription import Prescription as Prescription
    from isograd.prescription import apply as apply
    from isograd.prescription import prescribe as prescribe
    from isograd.proof import Proof as Proof
    from isograd.proof import prove as prove
    from isograd.recurrent.along import horizon as horizon
    from isograd.repair import Repair as Repair
    from isograd.repair import repair as repair
    from isograd.spectrum import Spectrum as Spectrum
    from isograd.spectrum import spectrum as spectrum
    from isograd.statistics import Site as Site
    from isograd.trainability import trainability as trainability

__version__ = "0.1.0"

# Loaded when first used, so that `isograd --help` and `isograd explain` need not wait for torch.
_HOME = {
    "check": "isograd.check",
    "measure": "isograd.measure",
    "diagnose": "isograd.diagnosis",
    "prescribe": "isograd.prescription",
    "apply": "isograd.prescription",
    "repair": "isograd.repair",
    "explain": "isograd.pages",
    "spectrum": "isograd.spectrum",
    "trainability": "isograd.trainability",
    "extrapolate": "isograd.extrapolation",
    "horizon": "isograd.recurrent.along",
    "watch": "isograd.monitor",
    "find_nonfinite": "isograd.nonfinite",
    "prove": "isograd.proof",
    "AdaptiveClip": "isograd.monitor",
    "Guard": "isograd.monitor",
    "Proof": "isograd.proof",
    "Diagnosis": "isograd.diagnosis",
    "Finding": "isograd.diagnosis",
    "Flow": "isograd.flow",
    "Horizon": "isograd.horizon",
    "Monitor": "isograd.monitor",
    "Reading": "isograd.monitor",
    "Prescription": "isograd.prescription",
    "Repair": "isograd.repair",
    "Severity": "isograd.diagnosis",
    "Site": "isograd.statistics",
    "Spectrum": "isograd.spectrum",
}

__all__ = [*_HOME, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "theory":  # a module of its own: theory.critical("gelu")
        return import_module("isograd.theory")
    if name not in _HOME:
        raise AttributeError(f"module 'isograd' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps `isograd.measure` the verb: importing the file of that name would bind the module to it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
