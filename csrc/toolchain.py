"""What there is to build with: Python, torch, a C++ compiler, a CUDA toolkit that fits.

An installation must not fail because of a compiler that it can do without. So what is missing ends
it, in one line, only where nothing serves in its place. nvcc is such a case only if SSAH_CUDA=1.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

PURE = "SSAH_NO_EXTENSION=1 installs the pure-Python part (reference and Triton)"


def check_python() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036 (pip asks too, but not everybody comes by pip)
        sys.exit(f"ssah needs Python >= 3.10; this is {sys.version.split()[0]}")


def check_torch(version: str) -> None:
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < (2, 10):
        sys.exit(f"ssah needs torch >= 2.10; this is {version}: pip install 'torch>=2.10'")


def check_compiler() -> None:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        sys.exit(
            f"ssah: no C++ compiler ({compiler}). Install one (Debian: apt-get install g++), or "
            f"set CXX; {PURE}"
        )


def run(*command: str) -> str:
    """What a compiler prints; RuntimeError with the first line of its complaint if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        complaint = (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"
        raise RuntimeError(complaint.splitlines()[0])
    return done.stdout


def find_cuda(torch_cuda: str | None, torch_hip: str | None = None) -> tuple[Path | None, str]:
    """The CUDA toolkit to build with, or None and why not ("" if there is just none)."""
    if torch_hip is not None:
        return None, f"this torch is built for ROCm ({torch_hip}), where Triton serves"
    found = shutil.which("nvcc")
    homes = [Path("/usr/local/cuda"), *([Path(found).resolve().parents[1]] if found else [])]
    if "CUDA_HOME" in os.environ:
        homes = [Path(os.environ["CUDA_HOME"])]
    home = next((home for home in homes if (home / "bin" / "nvcc").exists()), None)
    if home is None:
        if "CUDA_HOME" in os.environ:
            return None, f"CUDA_HOME is {homes[0]}, which has no bin/nvcc: correct it or unset it"
        return None, ""
    nvcc = str(home / "bin" / "nvcc")
    try:
        release = re.search(r"release (\d+)", run(nvcc, "--version"))
        # Compiling nothing shows what else can be wrong: no host compiler, or one that is too new.
        run(nvcc, "-x", "cu", "-c", os.devnull, "-o", os.devnull)
    except (OSError, RuntimeError) as error:
        return None, (
            f"{nvcc} does not work ({error}): install a whole CUDA toolkit, and a host compiler "
            "that it takes"
        )
    if release is None:
        return None, f"{nvcc} --version names no release: install a whole CUDA toolkit"
    if torch_cuda is not None and torch_cuda.split(".")[0] != release[1]:
        return None, (
            f"nvcc is of CUDA {release[1]} ({home}) and torch {torch_cuda}: install a CUDA "
            f"{torch_cuda.split('.')[0]} toolkit and set CUDA_HOME to it"
        )
    return home, ""


def wanted_cuda(torch_cuda: str | None, torch_hip: str | None = None) -> Path | None:
    """The CUDA toolkit, if the CUDA kernels are to be built. One line says if and why not."""
    wanted = os.environ.get("SSAH_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"ssah: SSAH_CUDA is {wanted!r}; it must be 0 or 1")
    if wanted == "0":
        return None
    home, why = find_cuda(torch_cuda, torch_hip)
    if wanted == "1" and home is None:
        why = why or "nvcc was not found: install the CUDA toolkit or set CUDA_HOME"
        sys.exit(f"ssah: SSAH_CUDA=1, but {why}")
    if why:
        print(f"ssah: the CUDA kernels are left out: {why}", file=sys.stderr)
    return home
