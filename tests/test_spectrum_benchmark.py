"""The benchmark of spectra runs and prints figures; how large the figures are is not tested."""

from __future__ import annotations

import pytest

from benchmarks import spectrum
from benchmarks.workloads import Setting


@pytest.mark.slow
def test_every_method_finds_the_same_value() -> None:
    pytest.importorskip("scipy")
    parts = list(spectrum.run(Setting(quick=True, device="cpu", threads=1)))
    rows = [line.strip("|").split("|") for line in "\n".join(parts).splitlines() if line.startswith("| ")]
    found = {(row[0].strip(), row[2].strip()): float(row[5]) for row in rows if row[0].strip() != "case"}
    for case in spectrum.QUICK:
        exact = found[case.name, "jacrev + svdvals"]
        for method in spectrum.METHODS:
            assert found[case.name, method] == pytest.approx(exact, rel=spectrum.TOLERANCE)


def test_what_does_not_fit_is_not_tried() -> None:
    case = spectrum.SIZES[-1]
    told = spectrum.reading(case, "jacrev + svdvals", Setting(quick=False, device="cpu", threads=1))
    assert told.why == "needs 464 GB"
    assert told.seconds is None
