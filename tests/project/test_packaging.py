"""What is installed and how: the two libraries, source distributions, and what setup.py refuses."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from setuptools import Distribution, Extension

from ssah_kernels.backends import cpu, cuda
from ssah_kernels.schema import KERNELS

ROOT = Path(__file__).parents[2]
LIBRARIES = [path for path in (cpu.LIBRARY, cuda.LIBRARY) if path.exists()]
needs_readelf = pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf (binutils)")
by_name = pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)


def readelf(option: str, library: Path) -> str:
    command = ["readelf", "--wide", option, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def needed(library: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.*)\]", readelf("--dynamic", library))


def imported(library: Path) -> list[str]:
    """The names of undefined symbols, without their versions."""
    return re.findall(r" UND (\w+)", readelf("--dyn-syms", library))


# ------------------------------------------------------------------------------- the libraries


@needs_readelf
@by_name
def test_a_library_holds_no_python_symbol(library: Path) -> None:
    names = imported(library)
    assert len(names) > 40
    assert [name for name in names if re.match("_?Py", name)] == []
    assert not {"libtorch_python.so", "libtorch.so.2"} & set(needed(library))
    assert not [name for name in needed(library) if name.startswith("libpython")]


@needs_readelf
@by_name
def test_a_library_takes_no_more_of_torch_than_2_10_has(library: Path) -> None:
    lines = (ROOT / "tests/helpers/torch_2_10_exports.txt").read_text().splitlines()
    exported = {line for line in lines if not line.startswith("#")}
    stream = {"aoti_torch_get_current_cuda_stream"} if library == cuda.LIBRARY else set()
    names = {
        name
        for name in imported(library)
        if re.match("(aoti_)?torch_|_ZN?K?(2at|3c10|5torch)", name)
    }
    assert len(names) > 40
    assert names - exported == stream


@needs_readelf
@pytest.mark.skipif(cuda.built() is None, reason="the CUDA library is not built")
def test_the_cuda_library_brings_libtorch() -> None:
    """Through it alone the library finds the stream, which is in libtorch_cuda."""
    assert "libtorch.so" in needed(cuda.LIBRARY)


@pytest.mark.skipif(cuda.built() is None, reason="the CUDA library is not built")
def test_the_cuda_library_loads_and_finds_the_stream_of_a_cuda_torch() -> None:
    code = "import try_kernels; print(try_kernels.cuda_row())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "runs", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    stream = "finds the current stream" if torch.version.cuda else "no stream"
    assert done.stdout.startswith(f"loads; {len(KERNELS)} operators; {stream}")


# ---------------------------------------------------------------------- source distributions

GENERATED = re.compile(r"PKG-INFO|setup\.cfg|pyproject\.toml|ssah(_kernels)?\.egg-info/")

needs_git = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="not a git checkout"
)


@pytest.fixture(scope="module")
def checkout() -> set[str]:
    """What a commit of this tree would hold."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}


@pytest.fixture
def staged(distributions: ModuleType, checkout: set[str], tmp_path: Path) -> Path:
    """The sources of both, and a built library in each place where one may lie."""
    distributions.stage(tmp_path, checkout)
    for stale in ("ssah_kernels/_C.abi3.so", "ssah_kernels/_C.cpython-39.so", "csrc/old.so"):
        (tmp_path / "ssah-kernels" / stale).write_bytes(b"built elsewhere")
    return tmp_path


def build(command: str, source: Path, **environment: str) -> Path:
    """The archive that pip makes of these sources: ``sdist`` or ``wheel``."""
    code = f"from setuptools import build_meta; build_meta.build_{command}('out')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=source, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (archive,) = (source / "out").iterdir()
    return archive


@needs_git
@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"SSAH_NO_EXTENSION": "1"}, id="no extension"),
        pytest.param(
            {"SSAH_CUDA": "0", "CXX": "no-compiler"},
            id="no compiler",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_source_distributions_hold_everything(
    environment: dict[str, str], staged: Path, distributions: ModuleType, checkout: set[str]
) -> None:
    """Whatever the machine can compile that makes them, and nothing that was compiled."""
    held: set[str] = set()
    for name in distributions.TOP:
        archive = build("sdist", staged / name, **environment)
        assert distributions.faults(archive) == []
        names = {each for each in distributions.contents(archive) if not GENERATED.match(each)}
        assert held & names <= {"LICENSE", "MANIFEST.in"}
        held |= names
    assert held == checkout - {"pyproject.toml"}


@needs_git
def test_wheels_that_need_no_compiler(staged: Path, distributions: ModuleType) -> None:
    """ssah has none of the kernels' files, and its wheel is one for all machines."""
    pure = build("wheel", staged / "ssah")
    assert pure.name.endswith("-py3-none-any.whl")
    assert distributions.faults(pure) == []
    assert {
        "ssah/py.typed",
        "ssah/report/html/report.html.j2",
        "ssah/report/html/comparison.html.j2",
        "ssah/report/html/sorting.js",
        "ssah/data/builtin/README.md",
    } <= set(distributions.contents(pure))
    kernels = build("wheel", staged / "ssah-kernels", SSAH_NO_EXTENSION="1")
    assert distributions.faults(kernels) == [f"{kernels.name} has no library"]


# ------------------------------------------------------------------------- what setup.py says


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module; it builds nothing when it is imported."""
    spec = importlib.util.spec_from_file_location("ssah_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path])  # setup.py adds csrc/ to it
    spec.loader.exec_module(module)
    for name in ("SSAH_CUDA", "CUDA_HOME", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes a CUDA toolkit whose nvcc is this shell script, and names it in CUDA_HOME."""

    def make(script: str) -> Path:
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir()
        nvcc.write_text(f"#!/bin/sh\n{script}\n")
        nvcc.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        return tmp_path

    return make


RELEASE_13 = 'echo "Cuda compilation tools, release 13.0, V13.0.88"'


def test_a_toolkit_that_fits_is_taken(setup: ModuleType, toolkit: Callable[[str], Path]) -> None:
    home = toolkit(RELEASE_13)
    assert setup.toolchain.find_cuda("13.2") == (home, "")  # minor versions are compatible
    assert setup.toolchain.find_cuda(None) == (home, "")  # a torch without CUDA fits any


@pytest.mark.parametrize(
    ("script", "torch_cuda", "hip", "why"),
    [
        (RELEASE_13, "12.6", None, r"nvcc is of CUDA 13 .* and torch 12\.6: install a CUDA 12"),
        (RELEASE_13, None, "6.4", "built for ROCm"),
        ("echo 'libfoo.so: not found' >&2; exit 127", None, None, "libfoo.so: not found"),
        ("exit 3", None, None, "exit status 3"),
        (
            f"{RELEASE_13}; test $# = 1 || {{ echo 'gcc is too new' >&2; exit 1; }}",
            None,
            None,
            "too new",
        ),
        ("echo something else", None, None, "names no release"),
    ],
)
def test_a_toolkit_that_does_not_fit_is_left_out_in_one_line(
    script: str,
    torch_cuda: str | None,
    hip: str | None,
    why: str,
    setup: ModuleType,
    toolkit: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    toolkit(script)
    assert setup.toolchain.wanted_cuda(torch_cuda, hip) is None
    said = capsys.readouterr().err
    assert re.search(why, said)
    assert said.startswith("ssah: the CUDA kernels are left out: ")
    assert said.count("\n") == 1
    monkeypatch.setenv("SSAH_CUDA", "1")  # insists, and then fails with the same reason
    with pytest.raises(SystemExit, match=why):
        setup.toolchain.wanted_cuda(torch_cuda, hip)
    monkeypatch.setenv("SSAH_CUDA", "0")
    assert setup.toolchain.wanted_cuda(torch_cuda, hip) is None
    assert capsys.readouterr().err == ""


def test_the_build_goes_on_without_cuda(
    setup: ModuleType,
    toolkit: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a toolkit that fits both libraries are built, otherwise the first, in the same call."""

    def built() -> list[Extension]:
        command = setup.Build(Distribution({"ext_modules": setup.extensions()}))
        command.ensure_finalized()
        command.run()
        return command.extensions

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setup.Base, "run", lambda self: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    home = toolkit(RELEASE_13)
    both = built()
    assert [extension.name for extension in both] == ["ssah_kernels._C", "ssah_kernels._C_cuda"]
    assert str(home / "lib64") in both[1].library_dirs
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert [extension.name for extension in built()] == ["ssah_kernels._C"]
    assert capsys.readouterr().err.count("the CUDA kernels are left out") == 1
    monkeypatch.setattr(setup, "torch", None)
    with pytest.raises(SystemExit, match="torch is not installed here: pip install"):
        built()


def test_a_wrong_cuda_home_is_named(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The toolkit in another place is not taken in silence."""
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert setup.toolchain.wanted_cuda(None) is None
    assert "CUDA_HOME is /nowhere, which has no bin/nvcc" in capsys.readouterr().err


def test_wrong_settings_are_named(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSAH_CUDA", "yes")
    with pytest.raises(SystemExit, match="SSAH_CUDA is 'yes'; it must be 0 or 1"):
        setup.toolchain.wanted_cuda(None)
    monkeypatch.setenv("CXX", "no-compiler -O2")
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler \(no-compiler -O2\). Install one"):
        setup.toolchain.check_compiler()


def test_old_versions_are_refused(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.toolchain.check_torch("2.10.0a0+git1234")
    setup.toolchain.check_torch("3.0")
    with pytest.raises(SystemExit, match=r"needs torch >= 2\.10; this is 2\.9\.1: pip install"):
        setup.toolchain.check_torch("2.9.1")
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    with pytest.raises(SystemExit, match=r"needs Python >= 3\.10"):
        setup.toolchain.check_python()


def test_sources_that_lack_a_folder_are_refused(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "csrc").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"there is no csrc/cuda/\*\.cu here: these sources are"):
        setup.sources("csrc/cuda/*.cu")
