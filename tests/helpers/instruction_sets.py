"""The instruction sets that the CPU kernels were built for, each tried in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssah_kernels.backends import cpu

TESTS = Path(__file__).parents[1]
PATH = [str(TESTS.parent), str(TESTS), str(TESTS / "helpers")]
BUILT = cpu.facts()["isa_built"].split(", ")


def python_with(isa: str, *arguments: str) -> str:
    """What Python prints where the kernels are those of ``isa``. The test that calls this is
    skipped if ``isa`` is what this process uses anyway, or if the processor lacks it."""
    chosen = cpu.facts()["isa"]
    if isa == chosen:
        pytest.skip("compared in this process already")
    # They are built in order: the widest that the processor has is chosen, unless one is named.
    wider = BUILT.index(isa) > BUILT.index(chosen)
    if wider and not os.environ.get("SSAH_CPU_CAPABILITY"):
        pytest.skip(f"this processor has no {isa}")
    run = subprocess.run(
        [sys.executable, *arguments],
        cwd=TESTS,
        env={**os.environ, "SSAH_CPU_CAPABILITY": isa, "PYTHONPATH": os.pathsep.join(PATH)},
        capture_output=True,
        text=True,
        check=False,
    )
    output = run.stdout + run.stderr
    if "must be one of" in output:
        pytest.skip(f"this processor has no {isa}")
    assert run.returncode == 0, output
    return output
