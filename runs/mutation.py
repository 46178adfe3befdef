"""What a mutation is, and the checks that must fail for it."""

from __future__ import annotations

from dataclasses import dataclass

CPU, UPDATE, OPS = (
    "kernels/test_cpu_kernels.py",
    "kernels/test_masked_update.py",
    "kernels/test_ops.py",
)
OPTIM = "kernels/test_optim.py"
NOISE = "noise_of_elements_beyond_32_bits"


@dataclass(frozen=True)
class Mutation:
    """``old`` stands once in ``file``; with ``new`` in its place, ``check`` fails.

    A check is what follows ``python`` in the root of the checkout.
    """

    file: str
    old: str
    new: str
    check: str

    @property
    def rebuilds(self) -> bool:
        """Whether the extension has to be built again for the check to see it."""
        return self.file.startswith("csrc/cpu/") and "32_bits" not in self.check


def pytest(file: str, tests: str) -> str:
    return f"-m pytest -q -x -m 'not exhaustive' tests/{file} -k '{tests}'"


def cpu_near(op: str) -> str:
    return pytest(CPU, f"test_equals_reference and {op} and not beyond")


def cpu_far(op: str) -> str:
    return pytest(CPU, f"beyond_the_first_tile and {op}")


def cuda(tests: str) -> str:
    return pytest("kernels/test_cuda_emulated.py", tests)


def near(op: str) -> str:
    return cuda(f"test_equals_reference and {op} and not beyond")


def far(op: str) -> str:
    return cuda(f"beyond_the_first_tile and {op}")


def triton(op: str) -> str:
    return f"tests/helpers/triton_interpret.py {op}"
