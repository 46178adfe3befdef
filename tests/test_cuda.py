"""The CUDA kernels: executed on the CPU through the emulation, and compiled for three GPUs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, check_backend, copied, flat, results
from emulation import build
from emulation.build import Emulated, Kernel
from torch import Tensor

from ssah_kernels import backends, checks
from ssah_kernels.autograd import new_moments
from ssah_kernels.schema import KERNELS

OPS = tuple(op for op in KERNELS if (build.SOURCES / build.source_of(op)).exists())
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
needs_nvcc = pytest.mark.skipif(build.nvcc() is None, reason="nvcc is not installed")
needs_cuobjdump = pytest.mark.skipif(
    build.cuobjdump() is None, reason="cuobjdump is not installed (it comes with triton)"
)


def checked(library: Emulated, op: str) -> Callable[..., Any]:
    """The operator behind its argument checks, as the dispatcher calls it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return library.kernel(op)(*getattr(checks, op)(*args, **kwargs), **kwargs)

    return call


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The compiled parts of the emulated library."""
    directory = tmp_path_factory.mktemp("emulated")
    return build.in_parallel(build.emulation_jobs(OPS, "ssah_emulated", directory))


@pytest.fixture(scope="module")
def emulated(objects: list[Path]) -> Emulated:
    return build.load(objects, OPS, "ssah_emulated", objects[0].parent)


@pytest.fixture(autouse=True)
def poisoned_memory_and_one_thread() -> Iterator[None]:
    """New tensors, results and workspaces among them, start as NaN."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@needs_gxx
@pytest.mark.parametrize("op", OPS)
def test_equals_reference(op: str, emulated: Emulated) -> None:
    emulated.seed(1)
    assert check_backend(CASES[op], checked(emulated, op), backends.kernel("reference", op)) > 40


def moments(library: Emulated, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
    state = new_moments(x)
    library.kernel("channel_moments_")(x, *state, mask)
    return state


def reference_moments(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
    state = new_moments(x)
    backends.kernel("reference", "channel_moments_")(x, *state, mask)
    return state


@needs_gxx
def test_same_bits_in_any_order(emulated: Emulated) -> None:
    x = torch.randn(300, 520, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = torch.arange(300) % 7 != 3
    runs = []
    for seed in range(4):
        emulated.seed(seed)
        runs.append(torch.cat([s.flatten() for s in moments(emulated, x, mask)]))
    assert all(torch.equal(run, runs[0]) for run in runs)


@needs_gxx
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_same_bits_from_unaligned_memory(dtype: torch.dtype, emulated: Emulated) -> None:
    x = torch.randn(200, 528, generator=torch.Generator().manual_seed(0)).to(dtype)
    for shift in (1, 3):
        padded = torch.full((200, 536), float("nan"), dtype=dtype)
        unaligned = padded[:, shift : shift + 528]
        unaligned.copy_(x)
        for a, b in zip(moments(emulated, x), moments(emulated, unaligned), strict=True):
            assert torch.equal(a, b)


@needs_gxx
def test_more_rows_than_one_chunk_holds_at_once(emulated: Emulated) -> None:
    """So many channels that one block takes every row, 256 at a time."""
    x = torch.randn(300, 64 * 530, dtype=torch.float64)
    for a, b in zip(moments(emulated, x), reference_moments(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@needs_gxx
def test_large_mean(emulated: Emulated) -> None:
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(1000, 40, generator=g, dtype=torch.float64) + 1e4).float()
    _, mean, m2 = moments(emulated, x)
    _, expected_mean, expected_m2 = reference_moments(x)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-9, atol=0)
    torch.testing.assert_close(m2, expected_m2, rtol=1e-5, atol=0)


@needs_gxx
@pytest.mark.parametrize("first", [0, 1, 5, 64])
def test_massive_first_token(first: int, emulated: Emulated) -> None:
    """A first row that dwarfs the others, as language models have, costs no digits."""
    x = torch.randn(512, 33, generator=torch.Generator().manual_seed(first))
    x[first] *= 1000
    mask = torch.arange(512) >= first
    _, mean, m2 = moments(emulated, x, mask)
    _, expected_mean, expected_m2 = reference_moments(x, mask)
    torch.testing.assert_close(m2, expected_m2, rtol=1e-6, atol=0)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-6, atol=1e-6)


@needs_gxx
def test_every_element_is_read_once(emulated: Emulated) -> None:
    x = torch.randn(100, 512).bfloat16()
    size = x.numel() * x.element_size()
    mask = torch.arange(100) % 4 == 0
    state = new_moments(x)
    sums = torch.zeros(2, 512, dtype=torch.float64)
    calls: list[tuple[str, tuple[Any, ...], float]] = [
        ("channel_moments_", (x, *state), 1),
        ("channel_moments_", (x, *state, mask), 0.25),
        ("gated_moments", (x, x, *state), 2),
        ("gated_moments", (x, x, *state, mask), 2),
        ("gated_moments_backward", (x, x, x), 3),
        ("taylor_moments_", (x, x, *sums), 2),
        ("taylor_moments_", (x, x, *sums, mask), 0.5),
        ("column_sq_norms", (x,), 1),
    ]
    for op, args, tensors in calls:
        emulated.take_bytes_read()
        emulated.kernel(op)(*args)
        assert emulated.take_bytes_read() == tensors * size, (op, args)


@needs_gxx
def test_host_functions_refuse_what_would_harm_memory(emulated: Emulated) -> None:
    x = torch.zeros(3, 8)
    count, mean, m2 = new_moments(x)
    call = emulated.kernel("channel_moments_")
    with pytest.raises(RuntimeError, match="mean must be contiguous float64 with 8 elements"):
        call(x, count, mean[:4], m2)
    with pytest.raises(RuntimeError, match="contiguous in its last dimension"):
        call(x.T, count, new_moments(x.T)[1], new_moments(x.T)[2])
    with pytest.raises(RuntimeError, match="token_mask"):
        call(x, count, mean, m2, torch.ones(4, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="act is tanh"):
        emulated.kernel("gated_moments")(x, x, count, mean, m2, act="tanh")


@needs_gxx
@pytest.mark.parametrize("op", ["masked_adamw_", "masked_sgd_"])
def test_nothing_but_the_trained_elements_is_written(op: str, emulated: Emulated) -> None:
    """Memory around a parameter, and its frozen elements, keep their bits."""
    for sample in CASES[op].samples(torch.bfloat16):
        args = [copied(a) if i in CASES[op].outputs else a for i, a in enumerate(sample.args)]
        checked(emulated, op)(*args, **sample.kwargs)
        lists = (sample.args[0], args[0], *(args[3:5] if op == "masked_sgd_" else args[4:6]))
        for before, after, index, dim in zip(*lists, strict=True):
            memory = [
                torch.empty(0, dtype=p.dtype).set_(p.untyped_storage()) for p in (before, after)
            ]
            trained = torch.zeros(memory[0].shape, dtype=torch.bool)
            view = trained.as_strided(before.shape, before.stride(), before.storage_offset())
            view.fill_(True) if index is None else view.index_fill_(dim, index, True)
            assert torch.equal(memory[0][~trained], memory[1][~trained])
            assert trained.sum() < 10 or not torch.equal(memory[0], memory[1])


@needs_gxx
@pytest.mark.parametrize("op", ["masked_adamw_", "masked_grad_norm"])
def test_lists_give_the_same_bits_in_any_order(op: str, emulated: Emulated) -> None:
    sample = next(islice(CASES[op].samples(torch.bfloat16), 1, None))  # noise and importance
    runs = []
    for seed in range(3):
        emulated.seed(seed)
        runs.append(results(CASES[op], checked(emulated, op), sample))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@needs_gxx
def test_an_index_beyond_the_parameter_stops_the_launch(emulated: Emulated) -> None:
    grad = torch.ones(4, 3)
    with pytest.raises(RuntimeError, match="trap"):
        checked(emulated, "masked_grad_norm")([grad], [torch.tensor([1, 4])], [0])


@needs_gxx
def test_large_gradients_do_not_overflow(emulated: Emulated) -> None:
    norm = checked(emulated, "masked_grad_norm")([torch.full((3, 50), 1e38)], [None], [0])
    assert norm.item() == pytest.approx(150**0.5 * 1e38, rel=1e-6)


# A barrier in a header is tried with the operator named here; one in an operator's file, with it.
USER_OF_HEADER = {
    "moments.cuh": "channel_moments_",
    "merge_moments.cuh": "channel_moments_",
    "sums.cuh": "taylor_moments_",
    "masked_update.cuh": "masked_sgd_",
}
BARRIER = re.compile(r"__sync(?:threads|warp)\(\);")


def barriers() -> list[tuple[str, int]]:
    """(file, position) of every barrier in the kernels."""
    return [
        (file.name, match.start())
        for file in sorted(build.SOURCES.glob("*.cu*"))
        for match in BARRIER.finditer(file.read_text())
    ]


def mutant_op(file: str) -> str:
    return USER_OF_HEADER.get(file) or next(op for op in OPS if build.source_of(op) == file)


@pytest.fixture(scope="module")
def mutants(
    objects: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int], Emulated]:
    """Per barrier, a library that lacks it."""
    shared = [path for path in objects if path.stem in ("runtime", "masked_host")]
    directory = tmp_path_factory.mktemp("mutants")
    names = {key: f"ssah_mutant_{number}" for number, key in enumerate(barriers())}
    jobs = []
    for (file, position), name in names.items():
        sources = Path(shutil.copytree(build.SOURCES, directory / name))
        text = (sources / file).read_text()
        (sources / file).write_text(text[:position] + BARRIER.sub("", text[position:], count=1))
        jobs.append(build.mutant_job(mutant_op(file), name, sources))
    return {
        (file, position): build.load([mutant, *shared], [mutant_op(file)], name, directory)
        for ((file, position), name), mutant in zip(
            names.items(), build.in_parallel(jobs), strict=True
        )
    }


@needs_gxx
def test_no_barrier_is_idle(mutants: dict[tuple[str, int], Emulated]) -> None:
    """Without any one barrier some order of the threads gives a wrong result."""
    assert len(mutants) >= 4
    for (file, position), library in mutants.items():
        op = mutant_op(file)
        wrong = 0
        for seed in range(3):
            library.seed(seed)
            try:
                check_backend(CASES[op], checked(library, op), backends.kernel("reference", op))
            except AssertionError:
                wrong += 1
        assert wrong == 3, f"{file} at {position}: {wrong} of 3 orders gave a wrong result"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, list[Kernel]]:
    """Per object, its kernels."""
    directory = tmp_path_factory.mktemp("compiled")
    sources = build.units(directory)
    objects = [source.with_suffix(".o") for source in sources]
    jobs = [partial(build.cuda_object, *pair) for pair in zip(sources, objects, strict=True)]
    return dict(zip(objects, build.in_parallel(jobs), strict=True))


@pytest.fixture(scope="module")
def sass(compiled: dict[Path, list[Kernel]]) -> list[str]:
    """The machine code of every kernel for every architecture."""
    codes = build.in_parallel(
        partial(build.run, build.cuobjdump(), "-sass", path) for path in compiled
    )
    return [kernel for code in codes for kernel in code.split("Function : ")[1:]]


def test_every_kernel_is_there() -> None:
    assert set(OPS) == set(KERNELS)
    shared = {"register_cuda", "masked_host"}
    assert {file.stem for file in build.SOURCES.glob("*.cu")} - shared == {
        op.removesuffix("_") for op in OPS
    }


@needs_nvcc
@pytest.mark.parametrize("op", OPS)
def test_compiles_without_spills(op: str, compiled: dict[Path, list[Kernel]]) -> None:
    name = f"{len(op.removesuffix('_')) + 7}{op.removesuffix('_')}_kernelI"
    mine = [k for kernels in compiled.values() for k in kernels if name in k.name]
    per_arch = Counter(kernel.arch for kernel in mine)
    assert set(per_arch) == set(build.ARCHS)
    assert min(per_arch.values()) >= 4
    assert [kernel for kernel in mine if kernel.spilled] == []


@needs_nvcc
def test_second_stages_compile_without_spills(compiled: dict[Path, list[Kernel]]) -> None:
    kernels = [kernel for kernels in compiled.values() for kernel in kernels]
    assert len(kernels) > 100 * len(build.ARCHS)
    assert [kernel for kernel in kernels if kernel.spilled] == []


# Element types, as mangled, and the elements of 16 bytes.
WIDE = {"13__nv_bfloat16": 8, "6__half": 8, "f": 4, "d": 2}
# 16-byte loads that are in flight together, and stores, of one lane.
ACCESSES = {
    "channel_moments": (4, 0),
    "gated_moments": (4, 2),
    "gated_moments_backward": (3, 2),
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
    assert seen >= 4 * len(build.ARCHS)


@needs_nvcc
def test_library_loads_without_a_gpu(compiled: dict[Path, list[Kernel]], tmp_path: Path) -> None:
    """It links against a torch without CUDA, and registers every kernel for CUDA tensors."""
    library = tmp_path / "cuda.so"
    cuda = Path(str(build.nvcc())).resolve().parents[1]
    torch_lib = Path(torch.__file__).parent / "lib"
    build.run(
        build.nvcc(), "-shared", "-cudart=static", *compiled,
        f"-L{torch_lib}", f"-L{cuda / 'lib64'}", "-ltorch", "-ltorch_cpu", "-o", library,
    )  # fmt: skip
    code = (
        "import sys, torch\n"
        "from ssah_kernels.schema import KERNELS, SCHEMAS\n"
        "library = torch.library.Library('ssah_cuda', 'DEF')\n"
        "[library.define(op + SCHEMAS[op]) for op in KERNELS]\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "print(*[op for op in KERNELS if has('ssah_cuda::' + op, 'CUDA')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(library)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert tuple(done.stdout.split()) == OPS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("op", OPS)
def test_on_gpu(op: str) -> None:
    def on_gpu(*args: Any, **kwargs: Any) -> list[Tensor]:
        moved = [copied(a, "cuda") for a in args]
        returned = getattr(torch.ops.ssah, op)(*moved, **kwargs)
        for i in CASES[op].outputs:
            for mine, theirs in zip(flat(args[i]), flat(moved[i]), strict=True):
                mine.copy_(theirs)
        return [r.cpu() for r in flat(returned)]

    with backends.use("cuda"):
        check_backend(CASES[op], on_gpu, backends.kernel("reference", op))
