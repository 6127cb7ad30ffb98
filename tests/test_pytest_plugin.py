"""The plugin as users meet it: installed, in a test file of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest_plugins = ["pytester"]

TESTS = """
import pytest
import torch
from torch import nn
from isograd.pytest_plugin import assert_healthy_gradients as imported

def network(layers):
    torch.manual_seed(0)
    parts = [part for _ in range(layers) for part in (nn.Linear(16, 16), nn.Sigmoid())]
    x, y = torch.randn(32, 16), torch.randint(4, (32,))
    model = nn.Sequential(*parts, nn.Linear(16, 4))
    return model, lambda m: nn.functional.cross_entropy(m(x), y)

def test_healthy(assert_healthy_gradients):
    diagnosis = assert_healthy_gradients(*network(1))
    assert diagnosis.verdict == "healthy"

def test_sick(assert_healthy_gradients):
    assert_healthy_gradients(*network(10))

def test_sick_but_ignored():
    imported(*network(10), ignore=["vanishing-gradient"])
"""


def test_a_sick_model_fails_with_its_findings(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*assert_healthy_gradients(*network(10))",
            "E*AssertionError: the gradients of Sequential are not healthy",
            "E*VG101 vanishing-gradient  error*",
        ]
    )
    assert "pytest_plugin.py:" not in result.stdout.str(), "the failing line is the user's"


def test_a_run_that_does_not_use_it_pays_for_no_torch(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import sys\ndef test_it(): assert 'torch' not in sys.modules\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q"], cwd=pytester.path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
