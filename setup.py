"""Builds the extensions: CPU kernels (one object per instruction set) and, with nvcc, CUDA kernels.

Both use the stable ABI of torch and no Python symbol: one build serves later versions of both.

Environment:
    SSAH_NO_EXTENSION=1  install the pure-Python part alone (reference and Triton)
    SSAH_CUDA=0|1        leave the CUDA kernels out, or insist on them; default: if nvcc fits
    CUDA_HOME            the CUDA toolkit; default: /usr/local/cuda, or that of nvcc on the PATH
    CXX                  the C++ compiler; default: c++
    MAX_JOBS             compilations at a time
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# An isolated build leaves the folder of setup.py out of the path.
sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))
import toolchain

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of torch 2.10
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++17",
    "-ffp-contract=off",  # a kernel says where a product and a sum are fused
    "-fno-math-errno",
    "-fvisibility=hidden",  # another library's symbols may have the same names
]
# The last is for clang, which does not know the second.
QUIET = ["-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
CUDA_ARCHS = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",
]
# The one symbol of libtorch's that the CUDA library needs is weak, for which the linker would not
# keep libtorch: the flag holds for the libraries named after it, so the name stands inside.
KEEP_LIBTORCH = "-Wl,--push-state,--no-as-needed,-ltorch,--pop-state"


def sources(*patterns: str) -> list[str]:
    """The files that match, of which each pattern must have some."""
    found = []
    for pattern in patterns:
        files = sorted(map(str, Path().glob(pattern)))
        if not files:
            sys.exit(
                f"ssah: there is no {pattern} here: these sources are incomplete. Take them from "
                f"the repository or a whole source distribution; {toolchain.PURE}"
            )
        found += files
    return found


try:
    import torch
    from torch.utils import cpp_extension

    Base = cpp_extension.BuildExtension
except ImportError:  # enough for a source distribution; `run` below says what is missing
    torch, Base = None, build_ext  # type: ignore[assignment, misc]


class Build(Base):  # type: ignore[misc, valid-type]
    """Looks for torch and compilers only when it builds: a source distribution takes neither."""

    def run(self) -> None:
        if torch is None:
            sys.exit("ssah: torch is not installed here: pip install 'torch>=2.10' first")
        toolchain.check_torch(torch.__version__)
        toolchain.check_compiler()
        home = toolchain.wanted_cuda(torch.version.cuda, torch.version.hip)
        cpu, *cuda = self.extensions
        cpu.extra_compile_args.append(f'-DSSAH_TORCH_VERSION="{torch.__version__}"')
        # Messages name files as the repository does, and not where this machine keeps them.
        headers = [f"-ffile-prefix-map={path}/=" for path in cpp_extension.include_paths()]
        names = [f"-ffile-prefix-map={Path.cwd()}/=", *headers]
        cpu.extra_compile_args += names
        if home is None:
            self.extensions = [cpu]
        else:
            cpp_extension.CUDA_HOME = str(home)  # a CPU-only torch does not look for it
            cuda[0].extra_compile_args["nvcc"] += [f"-Xcompiler={name}" for name in names]
            cuda[0].include_dirs.append(str(home / "include"))
            cuda[0].library_dirs.append(str(home / "lib64"))
        for extension in self.extensions:
            extension.include_dirs += cpp_extension.include_paths()
            extension.library_dirs.append(str(Path(torch.__file__).parent / "lib"))
        super().run()


def extensions() -> list[Extension]:
    """Both libraries; `Build.run` adds where torch and CUDA are, or leaves the second out."""
    cpu = Extension(
        "ssah_kernels._C",
        sources("csrc/register.cpp", "csrc/cpu/*.cpp", "csrc/cpu/isa/*.cpp"),
        depends=sources("csrc/*.h", "csrc/cpu/*.h", "csrc/cpu/isa/*.h"),
        libraries=["torch_cpu", "c10"],
        extra_compile_args=[*CXX_FLAGS, *QUIET, STABLE_ABI],
        language="c++",
        py_limited_api=True,
    )
    if os.environ.get("SSAH_CUDA") == "0":
        return [cpu]
    cuda = Extension(
        "ssah_kernels._C_cuda",
        sources("csrc/cuda/*.cu"),
        depends=sources("csrc/*.h", "csrc/cuda/*.*h"),
        libraries=["torch_cpu", "c10", "cudart_static", "rt", "dl", "pthread"],
        extra_compile_args={
            "cxx": CXX_FLAGS,
            "nvcc": [
                *("-O3", "-std=c++17", "-Xcompiler=-fvisibility=hidden"),
                *("-DUSE_CUDA", STABLE_ABI, *CUDA_ARCHS),
            ],
        },
        extra_link_args=[KEEP_LIBTORCH],
        language="c++",
        py_limited_api=True,
    )
    return [cpu, cuda]


if __name__ == "__main__":
    toolchain.check_python()
    if os.environ.get("SSAH_NO_EXTENSION") == "1":
        setup()
    else:
        setup(
            ext_modules=extensions(),
            cmdclass={"build_ext": Build},
            options={"bdist_wheel": {"py_limited_api": "cp310"}},
        )
