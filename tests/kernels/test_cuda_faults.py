"""What the emulation of the CUDA kernels must notice, and what kernels do beyond its memory."""

from __future__ import annotations

import ctypes
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emulation import build
from emulation.build import Emulation
from emulation.compare import equals_reference, kept_in

from ssah_kernels.reference.masked_update import noise, noise_keys, round_stochastically
from ssah_kernels.schema import KERNELS

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
    pytest.mark.xdist_group("emulation"),
]


@pytest.fixture
def folder(pytestconfig: pytest.Config) -> Path:
    return kept_in(pytestconfig)


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


def altered(
    folder: Path, sources: Path, tag: str, file: str, change: Callable[[str], str]
) -> Emulation:
    """The emulation of a copy of the kernels in which ``change`` was made to ``file``."""
    shutil.copytree(build.SOURCES, sources)
    before = (sources / file).read_text()
    after = change(before)
    assert after != before
    (sources / file).write_text(after)
    return Emulation(folder, sources, tag, "-O0")


@pytest.mark.parametrize(
    ("file", "position"),
    [
        pytest.param(*barrier, id=f"{barrier[0]}-{barrier[1]}", marks=pytest.mark.exhaustive)
        if number
        else barrier
        for number, barrier in enumerate(barriers())
    ],
)
def test_no_barrier_is_idle(file: str, position: int, folder: Path, tmp_path: Path) -> None:
    """Without any one barrier every order of the threads gives a wrong result."""

    def without(text: str) -> str:
        return text[:position] + BARRIER.sub("", text[position:], count=1)

    op = USER_OF_HEADER.get(file) or next(op for op in KERNELS if build.source_of(op) == file)
    tag = f"without_{file.split('.')[0]}_{position}"
    library = altered(folder, tmp_path / tag, tag, file, without)[op]
    for seed in range(3):
        library.seed(seed)
        with pytest.raises(AssertionError):
            equals_reference(library)


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("launch.cuh", r"config\.stream = stream;", "not on the current stream"),
        ("column_sq_norms.cu", r"const \S+DeviceGuard guard\(.*\);", "not on the device"),
    ],
)
def test_a_launch_astray_is_seen(
    file: str, line: str, message: str, folder: Path, tmp_path: Path
) -> None:
    """The emulation knows on which stream and device the kernels of a call must run."""
    tag = file.split(".")[0]
    library = altered(folder, tmp_path / tag, tag, file, lambda text: re.sub(line, "", text))
    with pytest.raises(RuntimeError, match=message):
        library["column_sq_norms"](torch.ones(3, 4))


def functions_of(folder: Path, name: str, text: str) -> ctypes.CDLL:
    """Functions of the headers, by themselves."""
    emulated = Emulation(folder)
    exported = '#define EXPORTED extern "C" __attribute__((visibility("default")))\n'
    built = emulated.compiled(name, f"{exported}{text}uint3 threadIdx, blockIdx;\n")

    def link(target: Path) -> None:
        build.run("g++", "-shared", built, "-o", target)

    return ctypes.CDLL(str(build.once(emulated.folder, f"{name}.so", [built.name], link)))


def test_chunks_fill_whole_waves(folder: Path) -> None:
    """Beside every length of a chunk that makes at most four waves."""
    text = """
        #include "tiles.cuh"
        EXPORTED int64_t rows_of_chunk(int64_t rows, int64_t tiles, int64_t resident) {
          return ssah::rows_of_chunk(rows, tiles, resident);
        }
    """
    chosen = functions_of(folder, "chunks", text).rows_of_chunk
    chosen.restype = ctypes.c_int64

    def time(length: int, rows: int, tiles: int, resident: int) -> int:
        return -(-tiles * -(-rows // length) // resident) * (length + 32)

    for shape in (
        (4096, 43, 396),
        (16384, 56, 396),
        (16384, 56, 264),
        (100, 2, 528),
        (7, 900, 396),
    ):
        length = chosen(*map(ctypes.c_int64, shape))
        assert length % 32 == 0
        rows, tiles, resident = shape
        lengths = [n for n in range(32, rows + 64, 32) if tiles * -(-rows // n) <= 4 * resident]
        assert time(length, *shape) <= 1.03 * min(time(n, *shape) for n in lengths)
    assert chosen(*map(ctypes.c_int64, (4096, 43, 396))) == 480


@pytest.fixture
def noise_functions(folder: Path) -> ctypes.CDLL:
    """Noise by itself, of elements and values that no test could bring a kernel to."""
    text = """
        #include "masked_rounding.cuh"
        EXPORTED uint32_t noise_bits(int64_t seed, double step, unsigned number, int64_t element) {
          ssah::UpdateScalars scalars{};
          scalars.seed = &seed;
          scalars.step = &step;
          return ssah::Noise(scalars, number).bits(element);
        }
        EXPORTED uint32_t noisy(uint32_t word, uint32_t r) {
          return ssah::noisy(__uint_as_float(word), r);
        }
    """
    functions = functions_of(folder, "noise", text)
    functions.noise_bits.restype = functions.noisy.restype = ctypes.c_uint32
    return functions


def test_noise_of_elements_beyond_32_bits(noise_functions: ctypes.CDLL) -> None:
    """Kernels that reach such an element need 34 GB."""
    elements = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 3 * 2**32 + 1]
    seed, step, number = -(7**20), 41, 3
    low, high, _ = noise(noise_keys(seed, step, number), torch.tensor(elements))
    for element, expected in zip(elements, (high << 16 | low).tolist(), strict=True):
        arguments = ctypes.c_int64(seed), ctypes.c_double(step), number, ctypes.c_int64(element)
        assert noise_functions.noise_bits(*arguments) == expected, element


@pytest.mark.parametrize(
    "word", [0x7FFFFFFF, 0x7FC00000, 0x7F800000, 0xFF800000, 0x3F800001, 0xBF8000FF, 1, 0x80000000]
)
def test_noise_keeps_what_is_not_finite(word: int, noise_functions: ctypes.CDLL) -> None:
    """0x7fffffff, the NaN of a GPU's arithmetic, comes from no processor that runs this."""
    signed = word - (word >> 31 << 32)
    value = torch.tensor([signed], dtype=torch.int32).view(torch.float32)
    for r in (0, 1, 0x1234, 0xFFFF):
        upper = noise_functions.noisy(word, r) >> 16
        got = torch.tensor([upper - (upper >> 15 << 16)], dtype=torch.int16).view(torch.bfloat16)
        torch.testing.assert_close(
            got, round_stochastically(value, torch.tensor([r])), rtol=0, atol=0, equal_nan=True
        )
