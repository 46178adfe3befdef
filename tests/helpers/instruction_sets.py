"""The instruction sets that the CPU kernels were built for, each tried in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssah_kernels.backends import cpu

TESTS = Path(__file__).parents[1]
BUILT = cpu.facts()["isa_built"].split(", ")


def python_with(isa: str, *arguments: str) -> str:
    """What Python prints where the kernels are those of ``isa``. The test that calls this is
    skipped if ``isa`` is what this process uses anyway, or if the processor lacks it."""
    if isa == cpu.facts()["isa"]:
        pytest.skip("compared in this process already")
    run = subprocess.run(
        [sys.executable, *arguments],
        cwd=TESTS,
        env={**os.environ, "SSAH_CPU_CAPABILITY": isa, "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    output = run.stdout + run.stderr
    if "must be one of" in output:
        pytest.skip(f"this processor has no {isa}")
    assert run.returncode == 0, output
    return output
