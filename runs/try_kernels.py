"""Tries the installed `ssah_kernels` in this Python with this torch; no GPU is needed.

Every operator is compared with the reference on the cases of the tests. The CUDA library, where it
is built, is loaded as it is: its kernels must be registered, and it must find the current stream
if this torch has CUDA. Needs torch alone: run it with the Python of any environment.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import torch

import ssah_kernels
from ssah_kernels import backends
from ssah_kernels.backends import cpu, cuda, native
from ssah_kernels.schema import KERNELS


def cpu_row() -> str:
    """Compares the CPU kernels with the reference; raises where they differ."""
    if cpu.missing() is not None:
        sys.exit(cpu.missing())
    tests = Path(__file__).parents[1] / "tests"
    sys.path += [str(tests), str(tests / "helpers")]
    from cases import CASES, check_backend

    compared = 0
    for op in KERNELS:
        function = getattr(torch.ops.ssah, op)
        compared += check_backend(CASES[op], function, backends.kernel("reference", op))
    return (
        f"{len(KERNELS)} operators equal the reference in {compared} cases ({cpu.facts()['isa']})"
    )


def cuda_row() -> str:
    """Loads the CUDA library and asks it for the stream; exits where either fails."""
    path = cuda.built()
    if path is None:
        return "not built"
    library = native.load(path)
    if isinstance(library, str):
        sys.exit(library)
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    registered = [op for op in KERNELS if has(f"ssah_cuda::{op}", "CUDA")]
    finds_stream = bool(library.ssah_cuda_finds_stream())
    if registered != list(KERNELS) or finds_stream != (torch.version.cuda is not None):
        sys.exit(f"{path} registers {registered}; it finds the current stream: {finds_stream}")
    stream = "finds the current stream" if finds_stream else "no stream, as this torch has no CUDA"
    return f"loads; {len(registered)} operators; {stream}"


if __name__ == "__main__":
    torch.set_num_threads(
        1
    )  # the tensors are tiny, and threads wait for each other on a busy machine
    print("python        ", platform.python_version())
    print("torch         ", torch.__version__)
    print("ssah_kernels  ", Path(ssah_kernels.__file__).parent)
    print("cuda library  ", cuda_row())
    print("cpu library   ", cpu_row())
