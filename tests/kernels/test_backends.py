"""Which backend serves which device, where a library is missing, broken or for another GPU."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ssah_kernels import backends
from ssah_kernels.backends import cpu, cuda, fatbin, native

GPU = torch.device("cuda", 0)


class Library:
    """Stands in for a CUDA library that loaded: what it answers to backends/cuda.py."""

    def __init__(self, stream: int = 1, runtime: int = 13000, driver: int = 13010) -> None:
        self.ssah_cuda_finds_stream = lambda: stream
        self.ssah_cuda_runtime_version = lambda: runtime
        self.ssah_cuda_driver_version = lambda: driver


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Pretends that this is a machine with GPUs, and an installation with CUDA kernels."""

    def pretend(
        *capabilities: tuple[int, int],
        built: tuple[str, ...] = ("sm_80", "sm_90", "ptx_90"),
        library: object = None,
        torch_cuda: str | None = "13.0",
    ) -> None:
        (tmp_path / "_C_cuda.abi3.so").write_bytes(b"not a library")
        monkeypatch.setattr(cuda, "LIBRARY", tmp_path / "_C_cuda.abi3.so")
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capabilities[gpu])
        monkeypatch.setattr(fatbin, "architectures", lambda _: list(built))
        if library is not None:
            monkeypatch.setattr(native, "load", lambda _: library)
        for cached in (cuda._library, cuda._unserved):
            cached.cache_clear()

    yield pretend
    for cached in (cuda._library, cuda._unserved):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("built", "capability", "served"),
    [
        (["sm_80"], (8, 0), True),
        (["sm_80"], (8, 9), True),  # machine code runs on later minor versions of its generation
        (["sm_86"], (8, 0), False),
        (["sm_80"], (7, 5), False),
        (["sm_80"], (9, 0), False),  # and on no other generation
        (["ptx_90"], (8, 9), False),
        (["ptx_90"], (9, 0), True),
        (["ptx_90"], (10, 0), True),  # the driver compiles PTX for everything newer
        (["ptx_90"], (12, 1), True),
        (["sm_80", "sm_120"], (12, 0), True),
        ([], (8, 0), False),
    ],
)
def test_which_gpu_is_served(built: list[str], capability: tuple[int, int], served: bool) -> None:
    assert fatbin.serves(built, capability) is served


def test_architectures_are_read_from_the_library() -> None:
    library = cuda.built()
    if library is None:
        pytest.skip("the CUDA library is not built")
    assert fatbin.architectures(library) == ["sm_80", "sm_90", "ptx_90"]


def test_a_truncated_library_has_the_architectures_that_are_left(tmp_path: Path) -> None:
    library = cuda.built()
    if library is None:
        pytest.skip("the CUDA library is not built")
    content = library.read_bytes()
    start = content.index(fatbin._MAGIC)
    for size in (start + 3, start + 10, start + 40, start + 90):
        (tmp_path / "part.so").write_bytes(content[:size])
        assert set(fatbin.architectures(tmp_path / "part.so")) <= {"sm_80", "sm_90", "ptx_90"}


def test_cuda_serves_a_gpu_that_it_was_built_for(machine: Callable[..., None]) -> None:
    machine((9, 0), library=Library())
    assert backends.missing("cuda") is None
    assert backends.choose(GPU) == "cuda"


def test_triton_serves_a_gpu_that_cuda_was_not_built_for(machine: Callable[..., None]) -> None:
    machine((7, 5), library=Library())
    assert backends.choose(GPU) == "triton"
    why = backends.missing("cuda") or ""
    assert "built for sm_80, sm_90, ptx_90, and cuda:0 is sm_75" in why
    assert "pip install triton" in why
    with pytest.raises(backends.MissingBackendError, match="cuda:0 is sm_75"):
        backends.kernel("cuda", "channel_moments_", GPU)


def test_each_gpu_of_a_machine_is_asked_about(machine: Callable[..., None]) -> None:
    """The current GPU cannot run the kernels, another one can: its tensors are served by them."""
    machine((7, 5), (8, 6), library=Library())
    second = torch.device("cuda", 1)
    assert backends.choose(GPU) == "triton"
    assert backends.choose(second) == "cuda"
    assert backends.kernel("cuda", "channel_moments_", second) is not None


@pytest.mark.parametrize(
    ("pretended", "why"),
    [
        ({}, "_C_cuda.abi3.so does not load .*build it for this one"),
        ({"library": Library(stream=0)}, "do not find the current stream"),
        ({"library": Library(driver=12080)}, "driver of this machine serves CUDA 12: update"),
        ({"library": Library(), "torch_cuda": None}, "built for ROCm"),
    ],
)
def test_triton_serves_where_the_library_is_of_no_use(
    pretended: dict[str, Any], why: str, machine: Callable[..., None]
) -> None:
    machine((9, 0), **pretended)
    assert backends.choose(GPU) == "triton"
    with pytest.raises(backends.MissingBackendError, match=why):
        backends.kernel("cuda", "channel_moments_", GPU)


def test_a_broken_cpu_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """There is nothing to fall back to: `reference` is slow, and never chosen in silence."""
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "_C.abi3.so")
    monkeypatch.setattr(cpu, "missing", cpu.missing.__wrapped__)
    assert backends.choose(torch.device("cpu")) == "cpu"
    with pytest.raises(backends.MissingBackendError, match=r"_C\.abi3\.so does not load"):
        backends.kernel("cpu", "channel_moments_")


def test_the_bandwidth_is_read_from_a_tensor_alone() -> None:
    """No address from outside is read."""
    if cpu.missing() is not None:
        pytest.skip("the CPU library is not built")
    read_bytes = cpu.kernel("read_bytes")
    data = torch.randint(256, (64 * 5000,), dtype=torch.uint8)
    assert read_bytes(data) == data.view(torch.int32).sum().item() % 2**32
    for wrong in (data[:100], data[::2], data.view(torch.int32), data.view(2, -1)):
        with pytest.raises(
            RuntimeError, match=r"data must be a contiguous uint8 tensor \[n_bytes\]"
        ):
            read_bytes(wrong)


def test_the_bandwidth_is_the_first_thing_that_is_measured() -> None:
    if cpu.missing() is not None:
        pytest.skip("the CPU library is not built")
    code = "from ssah_kernels import timing; print(timing.read_bandwidth(6400)(0))"
    assert in_a_fresh_process(code) == f"{1600 * 0x01010101 % 2**32}\n"


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


THREADS = """
import threading, time
import torch
import ssah_kernels
from ssah_kernels import backends, ops

define = torch.library.Library.__init__

def slowly(self, *args, **kwargs):
    time.sleep(0.2)  # so that all threads would meet here
    define(self, *args, **kwargs)

torch.library.Library.__init__ = slowly
barrier = threading.Barrier(8)
failures = []

def first_use():
    barrier.wait()
    try:
        use()
    except Exception as error:
        failures.append(error)

def in_eight_threads():
    threads = [threading.Thread(target=first_use) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failures, failures
"""


def test_eight_threads_use_the_cpu_kernels_first() -> None:
    if cpu.missing() is not None:
        pytest.skip("the CPU library is not built")
    printed = in_a_fresh_process(
        THREADS
        + """
x = torch.arange(12.0).reshape(3, 4)
norms = []

def use():
    norms.append(ops.column_sq_norms(x).tolist())

in_eight_threads()
assert norms == [x.double().square().sum(0).tolist()] * 8, norms
print("good")
"""
    )
    assert printed == "good\n"


def test_eight_threads_use_the_cuda_kernels_first() -> None:
    """The library is real where it is built; what is asked of the GPU has stand-ins."""
    printed = in_a_fresh_process(
        THREADS
        + """
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.cuda.current_device = lambda: 0
torch.version.cuda = "13.0"

def use():
    backends.choose(torch.device("cuda", 0))
    assert torch.ops.ssah_cuda.column_sq_norms.default is not None

in_eight_threads()
print("good")
"""
    )
    assert printed == "good\n"


def test_a_torch_that_is_too_old_is_refused_in_one_line() -> None:
    code = "import torch; torch.__version__ = '2.9.1'; import ssah_kernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == (
        "ImportError: ssah_kernels needs torch >= 2.10; this is 2.9.1: pip install 'torch>=2.10'"
    )


def test_capture_into_a_graph_is_refused_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay would copy the table from memory that was freed."""
    pytest.importorskip("triton", reason="triton is not installed")
    from ssah_kernels.backends.triton.masked_list import device_table

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert device_table([1, 2], torch.device("cpu")).tolist() == [1, 2]
    with pytest.raises(RuntimeError, match=r"outside torch\.cuda\.graph"):
        device_table([1, 2], GPU)
