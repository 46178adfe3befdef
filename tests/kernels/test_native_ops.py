"""The operators of the CPU library, called directly: anybody may call ``torch.ops.ssah_cpu.*``."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest
from native_calls import call_of, leaked

from ssah_kernels.backends import cpu
from ssah_kernels.schema import KERNELS

TESTS = Path(__file__).parents[1]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="no mallinfo2 (glibc 2.33)")
@pytest.mark.parametrize("op", KERNELS)
def test_the_heap_is_flat(op: str) -> None:
    """A leak of 48 bytes a call would be 48,000; threads of other tests take some kilobytes."""
    assert cpu.missing() is None
    args, kwargs = call_of(op)
    assert leaked(lambda: cpu.kernel(op)(*args, **kwargs)) < 24_000


def test_what_would_harm_memory_is_refused() -> None:
    """In a process of its own, which a wrong access may end: the operator after the last line."""
    path = [str(TESTS.parent), str(TESTS), str(TESTS / "helpers")]
    code = (
        f"import sys; sys.path[:0] = {path}\n"
        "import json, torch, native_calls\n"
        "from ssah_kernels.backends import cpu\n"
        "assert cpu.missing() is None\n"
        f"for op in {KERNELS}:\n"
        "    call = getattr(torch.ops.ssah_cpu, op).default\n"
        "    print(json.dumps([op, native_calls.outcomes(op, call)]), flush=True)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    found = dict(json.loads(line) for line in run.stdout.splitlines())
    assert run.returncode == 0, (list(found), run.stderr[-2000:])
    assert tuple(found) == KERNELS
    for op, outcomes in found.items():
        assert len(outcomes) >= 4, op
        assert [name for name, what in outcomes.items() if what == "accepted"] == [], op
