"""The CUDA kernels as nvcc compiles them: spills, access to memory, and a library that loads."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import cuda_costs
import pytest
import torch
from emulation import nvcc
from emulation.build import SOURCES, run
from emulation.nvcc import ARCHS, Kernel

from ssah_kernels.schema import KERNELS

pytestmark = pytest.mark.xdist_group("nvcc")
needs_nvcc = pytest.mark.skipif(nvcc.nvcc() is None, reason="nvcc is not installed")
needs_cuobjdump = pytest.mark.skipif(
    nvcc.cuobjdump() is None, reason="cuobjdump is not installed (it comes with triton)"
)


@pytest.fixture(
    scope="module",
    params=[pytest.param(arch, id=f"sm_{arch}", marks=pytest.mark.exhaustive) for arch in ARCHS],
)
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[Path, list[Kernel]]:
    """Per file of machine code, its kernels, for one architecture."""
    return compile_all(tmp_path_factory.mktemp("compiled"), ".cubin", request.param)


def compile_all(directory: Path, suffix: str, arch: int) -> dict[Path, list[Kernel]]:
    sources = nvcc.units(directory)
    targets = [source.with_suffix(suffix) for source in sources]
    jobs = [partial(nvcc.compiled, *pair, arch) for pair in zip(sources, targets, strict=True)]
    return dict(zip(targets, nvcc.in_parallel(jobs), strict=True))


@pytest.fixture(scope="module")
def sass(compiled: dict[Path, list[Kernel]]) -> list[str]:
    """The machine code of every kernel."""
    codes = nvcc.in_parallel(partial(run, nvcc.cuobjdump(), "-sass", path) for path in compiled)
    return [kernel for code in codes for kernel in code.split("Function : ")[1:]]


def test_every_kernel_is_there() -> None:
    shared = {"register_cuda", "masked_host"}
    assert {file.stem for file in SOURCES.glob("*.cu")} - shared == {
        op.removesuffix("_") for op in KERNELS
    }


@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.label, marks=pytest.mark.exhaustive if number else [])
        for number, row in enumerate(cuda_costs.ROWS)
    ],
)
def test_instructions_of_the_main_loop(row: cuda_costs.Row, tmp_path: Path) -> None:
    """One kernel alone compiles in seconds; where every architecture is, all of them do."""
    kernel, cost = cuda_costs.compiled(row, tmp_path)
    assert kernel.spilled == 0
    assert cost.per_element(row.moved) <= row.limit
    assert cost.calls == 0 or "float," in row.arguments  # an exact root has a slow path
    page = (SOURCES.parents[1] / "docs" / "cuda.md").read_text().splitlines()
    if nvcc.release() == "13.0":  # another one may need an instruction more or less
        assert cuda_costs.line(row, kernel, cost) in page


@needs_nvcc
@pytest.mark.parametrize("op", KERNELS)
def test_compiles_without_spills(op: str, compiled: dict[Path, list[Kernel]]) -> None:
    name = f"{len(op.removesuffix('_')) + 7}{op.removesuffix('_')}_kernelI"
    mine = [k for kernels in compiled.values() for k in kernels if name in k.name]
    assert len(mine) >= 4
    assert [kernel for kernel in mine if kernel.spilled] == []


@needs_nvcc
def test_second_stages_compile_without_spills(compiled: dict[Path, list[Kernel]]) -> None:
    kernels = [kernel for kernels in compiled.values() for kernel in kernels]
    assert len(kernels) > 100
    assert [kernel for kernel in kernels if kernel.spilled] == []


# Element types, as mangled, and the elements of 16 bytes.
WIDE = {"13__nv_bfloat16": 8, "6__half": 8, "f": 4, "d": 2}
# 16-byte loads that are in flight together, and stores, of one lane.
ACCESSES = {
    "channel_moments": (4, 0),
    "gated_moments": (4, 2),
    "gated_moments_backward": (3, 2),
    "gated_product": (3, 1),
    "taylor_moments": (4, 0),
    "column_sq_norms": (4, 0),
    "masked_adamw": (2, 1),  # a bfloat16 state of a float32 parameter takes 8 bytes
    "masked_sgd": (2, 1),
    "masked_grad_norm": (1, 0),
}


@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize("stem", ACCESSES)
def test_memory_is_accessed_16_bytes_at_a_time(stem: str, sass: list[str]) -> None:
    loads, stores = ACCESSES[stem]
    seen = 0
    for text in sass:
        pattern = rf"\S*{len(stem) + 7}{stem}_kernelI({'|'.join(WIDE)})(?:Li(\d+)E)?"
        kernel = re.match(pattern, text)
        if kernel is None or int(kernel[2] or WIDE[kernel[1]]) != WIDE[kernel[1]]:
            continue  # another kernel, or the narrow form of this one
        seen += 1
        assert len(re.findall(r"LDG\.E\.128", text)) >= loads, kernel[0]
        assert len(re.findall(r"STG\.E\.128", text)) >= stores, kernel[0]
        if not stem.startswith("masked"):  # those hold both forms
            narrow = re.findall(r"LDG\.E(?!\.128)\S*CONSTANT", text)
            assert narrow == [], kernel[0]
    assert seen >= 4


def test_every_kernel_is_registered() -> None:
    text = (SOURCES / "register_cuda.cu").read_text()
    pairs = re.findall(r'm\.impl\("(\w+)", TORCH_BOX\(&ssah::(\w+)_cuda\)\);', text)
    assert pairs == [(op, op.removesuffix("_")) for op in KERNELS]


@needs_nvcc
@pytest.mark.exhaustive  # code for the host takes as long to compile as all kernels
def test_library_loads_without_a_gpu(tmp_path: Path) -> None:
    """It links against a torch without CUDA, and registers every kernel for CUDA tensors."""
    library = tmp_path / "cuda.so"
    cuda = Path(str(nvcc.nvcc())).resolve().parents[1]
    torch_lib = Path(torch.__file__).parent / "lib"
    run(
        nvcc.nvcc(), "-shared", "-cudart=static", *compile_all(tmp_path, ".o", 90),
        f"-L{torch_lib}", f"-L{cuda / 'lib64'}", "-ltorch", "-ltorch_cpu", "-o", library,
    )  # fmt: skip
    code = (
        "import sys, torch\n"
        "from ssah_kernels.backends.native import KERNELS, schema\n"
        "library = torch.library.Library('ssah_cuda', 'DEF')\n"
        "[library.define(schema(op)) for op in KERNELS]\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "print(*[op for op in KERNELS if has('ssah_cuda::' + op, 'CUDA')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(library)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert tuple(done.stdout.split()) == KERNELS
