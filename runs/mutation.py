"""What a mutation is, and the checks that must fail for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

CPU, UPDATE, OPS = (
    "kernels/test_cpu_kernels.py",
    "kernels/test_masked_update.py",
    "kernels/test_ops.py",
)
OPTIM = "kernels/test_optim.py"
NOISE = "noise_of_elements_beyond_32_bits"


@dataclass(frozen=True)
class Check:
    """The tests of a file that ``chosen`` selects (-k), or the operator that a script compares."""

    file: str  # in tests/
    chosen: str


def command(file: str, chosen: Iterable[str]) -> list[str]:
    """What follows ``python`` in the root of the checkout, for some checks of one file."""
    if file.startswith("helpers/"):
        return [f"tests/{file}", *chosen]
    either = " or ".join(f"({tests})" for tests in chosen)
    # In the order of the file: a fault is not to be found in one order of the tests alone.
    pytest = ["-m", "pytest", "-q", "-x", "-p", "no:randomly", "-m", "not exhaustive"]
    return [*pytest, f"tests/{file}", "-k", either]


@dataclass(frozen=True)
class Mutation:
    """``old`` stands once in ``file``; with ``new`` in its place, ``check`` fails."""

    file: str
    old: str
    new: str
    check: Check

    @property
    def rebuilds(self) -> bool:
        """Whether the extension has to be built again for the check to see it."""
        return self.file.startswith("csrc/cpu/") and NOISE not in self.check.chosen

    @property
    def name(self) -> str:
        return f"{self.file}: {self.old.strip()} -> {self.new.strip()}"


def cpu_near(op: str) -> Check:
    return Check(CPU, f"test_equals_reference and {op} and not beyond")


def cpu_far(op: str) -> Check:
    return Check(CPU, f"beyond_the_first_tile and {op}")


def cuda(tests: str) -> Check:
    return Check("kernels/test_cuda_emulated.py", tests)


def near(op: str) -> Check:
    return cuda(f"test_equals_reference and {op} and not beyond")


def far(op: str) -> Check:
    return cuda(f"beyond_the_first_tile and {op}")


def triton(op: str) -> Check:
    return Check("helpers/triton_interpret.py", op)
