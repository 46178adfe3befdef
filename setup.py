"""Builds the extensions: CPU kernels (one object per instruction set) and, with nvcc, CUDA kernels.

Environment:
    SSAH_NO_EXTENSION=1  install the pure-Python part alone (reference and Triton)
    SSAH_CUDA=0|1        leave the CUDA kernels out, or insist on them; default: if nvcc is there
    MAX_JOBS             compilations at a time
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of torch 2.10
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++17",
    "-ffp-contract=off",  # a kernel says where a product and a sum are fused
    "-fno-math-errno",
    "-fvisibility=hidden",
]
CUDA_ARCHS = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",
]


def cuda_home() -> Path | None:
    nvcc = shutil.which("nvcc")
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and Path(nvcc).parents[1]):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return Path(home)
    return None


def want_cuda() -> bool:
    wanted = os.environ.get("SSAH_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"ssah: SSAH_CUDA is {wanted!r}; it must be 0 or 1")
    if wanted == "1" and cuda_home() is None:
        sys.exit(
            "ssah: SSAH_CUDA=1 but nvcc was not found: install the CUDA toolkit or set CUDA_HOME"
        )
    return wanted != "0" and cuda_home() is not None


def options() -> dict[str, Any]:
    """What setup() gets for the extensions."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        sys.exit(
            f"ssah: no C++ compiler ({compiler}). Install one (Debian: apt-get install g++), or "
            "set SSAH_NO_EXTENSION=1 to install the pure-Python part (reference and Triton)"
        )
    import torch
    from torch.utils import cpp_extension

    built_with = f'-DSSAH_TORCH_VERSION="{torch.__version__}"'
    result = [
        cpp_extension.CppExtension(
            "ssah_kernels._C",
            ["csrc/register.cpp", *sorted(map(str, Path("csrc/cpu").rglob("*.cpp")))],
            depends=sorted(map(str, Path("csrc/cpu").rglob("*.h"))),
            extra_compile_args=[
                *CXX_FLAGS,
                "-Wno-psabi",
                "-Wno-maybe-uninitialized",
                STABLE_ABI,
                built_with,
            ],
            py_limited_api=True,  # no Python symbol is used: one build for every Python
        )
    ]
    if want_cuda():
        home = cuda_home()
        cpp_extension.CUDA_HOME = str(home)  # a CPU-only torch does not look for it
        result.append(
            Extension(
                "ssah_kernels._C_cuda",
                sorted(map(str, Path("csrc/cuda").glob("*.cu"))),
                depends=sorted(map(str, Path("csrc/cuda").glob("*.*h"))),
                include_dirs=[*cpp_extension.include_paths(), str(home / "include")],
                library_dirs=[str(home / "lib64"), str(Path(torch.__file__).parent / "lib")],
                libraries=["torch", "torch_cpu", "c10", "cudart_static", "rt", "dl", "pthread"],
                extra_compile_args={
                    "cxx": CXX_FLAGS,
                    "nvcc": ["-O3", "-std=c++17", "-DUSE_CUDA", STABLE_ABI, *CUDA_ARCHS],
                },
                # libtorch is named by a weak symbol alone: the linker must not drop it.
                extra_link_args=["-Wl,--no-as-needed"],
                language="c++",
            )
        )
    return {"ext_modules": result, "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


setup(**({} if os.environ.get("SSAH_NO_EXTENSION") == "1" else options()))
