"""Transformers of 100 layers, diagnosed: published schemes read as published, in no more memory than a step."""

from __future__ import annotations

import math
import statistics

import pytest

import isograd
from benchmarks import deep
from benchmarks.workloads import Setting
from isograd.diagnosis import Diagnosis

LAYERS = 100


@pytest.fixture(scope="module")
def diagnosed() -> dict[str, Diagnosis]:
    found: dict[str, Diagnosis] = {}
    for scheme in deep.SCHEMES:
        model, loss, optimizer = deep.built(scheme, LAYERS)
        found[scheme] = isograd.check(model, loss, optimizer=optimizer)
    return found


def codes(diagnosis: Diagnosis) -> set[str]:
    return {finding.code for finding in diagnosis.findings}


def total(diagnosis: Diagnosis) -> float:
    """Gain of all sublayers together."""
    return math.prod(deep.sublayer_gains(diagnosis.flow))


def test_deepnorm_has_gain_one(diagnosed: dict[str, Diagnosis]) -> None:
    gains = deep.sublayer_gains(diagnosed["DeepNorm"].flow)
    assert len(gains) == 2 * LAYERS
    assert all(0.96 < gain < 1.04 for gain in gains)
    assert total(diagnosed["DeepNorm"]) == pytest.approx(1.0, abs=0.05)
    assert diagnosed["DeepNorm"].verdict == "healthy"


def test_the_growth_of_pre_norm_by_a_root_of_depth_is_no_finding(diagnosed: dict[str, Diagnosis]) -> None:
    assert diagnosed["pre-norm"].verdict == "healthy"
    assert not codes(diagnosed["pre-norm"]) & {"VG101", "EG201", "EG202"}
    assert 0.4 * math.sqrt(LAYERS) < total(diagnosed["pre-norm"]) < 2.5 * math.sqrt(LAYERS)


def test_without_norm_it_explodes(diagnosed: dict[str, Diagnosis]) -> None:
    assert diagnosed["no norm"].verdict == "exploding"
    assert {"EG201", "EG202"} <= codes(diagnosed["no norm"])


def test_the_trouble_of_post_norm_is_its_first_update(diagnosed: dict[str, Diagnosis]) -> None:
    assert diagnosed["post-norm"].verdict == "healthy"  # at initialisation its gradient is well
    assert codes(diagnosed["post-norm"]) == {"UP502", "VG105"}  # and its tokens start alike: warnings both
    assert "UP502" not in codes(diagnosed["pre-norm"]) | codes(diagnosed["DeepNorm"])


def test_the_weight_of_each_branch_stands_beside_its_gain(diagnosed: dict[str, Diagnosis]) -> None:
    ratios = {
        scheme: statistics.median(split.forward_ratio for split in diagnosis.flow.splits.values())
        for scheme, diagnosis in diagnosed.items()
    }
    assert ratios["DeepNorm"] < 0.05 < ratios["pre-norm"] < ratios["post-norm"]
    assert "rms vs stream" in repr(diagnosed["DeepNorm"])
    assert '"branch_ratio": 0.' in diagnosed["DeepNorm"].to_json()


@pytest.mark.parametrize("scheme", ["pre-norm", "post-norm", "DeepNorm"])
def test_theory_says_the_same(diagnosed: dict[str, Diagnosis], scheme: str) -> None:
    flow = diagnosed[scheme].flow
    part = flow.expected.over(slice(1, len(flow.sites)))
    assert part is not None
    assert part.whole
    assert abs(part.measured - part.decades) < 3 * part.spread


def test_a_diagnosis_needs_no_more_memory_than_a_training_step() -> None:
    setting = Setting(quick=True, device="cpu", threads=1)
    step, checked = (deep.cost("pre-norm", LAYERS, method, setting) for method in ("step", "check"))
    assert checked.megabytes < 1.2 * step.megabytes
