"""What runs/release.sh is made of: the check of archives, and linking for an older glibc."""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from pages import ROOT

import ssah

PIN = f"ssah-kernels=={ssah.__version__}"


def wheel(
    folder: Path, name: str, *, files: dict[str, bytes], without: str = "", pin: str = PIN
) -> Path:
    """A wheel as it should be, with these files more and this one less."""
    package = name.replace("-", "_")
    facts = f"Name: {name}\nVersion: {ssah.__version__}\nLicense-File: LICENSE\n"
    facts += f"Requires-Dist: {pin}\n" if name == "ssah" else ""
    described = f"{package}-{ssah.__version__}.dist-info"
    held = {
        f"{package}/__init__.py": b"",
        f"{package}/py.typed": b"",
        f"{described}/METADATA": facts.encode(),
        f"{described}/licenses/LICENSE": b"Apache",
        **({} if name == "ssah" else {"ssah_kernels/_C.abi3.so": b"code"}),
        **files,
    }
    path = folder / f"{package}-{ssah.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for each, content in held.items():
            if not without or not each.endswith(without):
                archive.writestr(each, content)
    return path


@pytest.mark.parametrize("name", ["ssah", "ssah-kernels"])
def test_a_whole_wheel_has_no_fault(name: str, distributions: ModuleType, tmp_path: Path) -> None:
    assert distributions.faults(wheel(tmp_path, name, files={})) == []


@pytest.mark.parametrize(
    ("name", "files", "without", "fault"),
    [
        ("ssah", {"tests/test_a.py": b""}, "", "has tests/test_a.py, which is not of ssah/"),
        ("ssah", {"ssah_kernels/ops.py": b""}, "", "has ssah_kernels/ops.py, which is not of"),
        ("ssah", {"ssah/old.so": b""}, "", r"has compiled files: \['ssah/old.so'\]"),
        ("ssah", {"ssah/a.py": b"'/home/me/models/x'"}, "", "has the path /home/me/models/x in"),
        ("ssah", {}, "licenses/LICENSE", "lacks LICENSE"),
        ("ssah", {}, "py.typed", "lacks ssah/ or its py.typed"),
        ("ssah-kernels", {}, ".so", "has no library"),
        ("ssah-kernels", {}, "METADATA", "is neither an sdist nor a wheel"),
    ],
)
def test_a_fault_of_a_wheel_is_named(
    name: str,
    files: dict[str, bytes],
    without: str,
    fault: str,
    distributions: ModuleType,
    tmp_path: Path,
) -> None:
    (found,) = distributions.faults(wheel(tmp_path, name, files=files, without=without))
    assert re.search(fault, found)


def test_kernels_of_another_release_are_named(distributions: ModuleType, tmp_path: Path) -> None:
    (found,) = distributions.faults(wheel(tmp_path, "ssah", files={}, pin="ssah-kernels==0.0.1"))
    assert found.endswith(f"does not need {PIN}")


def test_the_citation_names_this_release() -> None:
    assert f"\nversion: {ssah.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {ssah.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_ssah_without_its_kernels_says_what_to_install() -> None:
    hide = "import importlib.util as u; f = u.find_spec; "
    hide += "u.find_spec = lambda name, *a: None if name == 'ssah_kernels' else f(name, *a)"
    done = subprocess.run(
        [sys.executable, "-c", f"{hide}\nimport ssah"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"pip install {PIN}" in done.stderr.splitlines()[-1]


SOURCE = """
#include <dlfcn.h>
#include <pthread.h>
#include <cmath>
#include <memory>
extern "C" double power(double x) {
  auto shared = std::make_shared<double>(x);  // asks whether there is one thread
  auto again = shared;
  pthread_rwlock_t lock;
  pthread_rwlock_init(&lock, nullptr);
  return dlopen("libm.so.6", RTLD_NOW) ? std::pow(std::exp(*again), x) : 0;
}
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not all(map(shutil.which, ("cc", "c++", "readelf"))),
    reason="needs glibc, a C++ compiler and readelf",
)
def test_a_library_is_linked_for_an_older_glibc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "runs")
    old_glibc = import_module("old_glibc")
    (tmp_path / "power.cpp").write_text(SOURCE)
    made = str(tmp_path / "power.so")
    flags = old_glibc.linker_flags(tmp_path / "flags", "2.28").split()
    command = ["c++", "-O2", "-fPIC", "-shared", *flags, "-o", made, str(tmp_path / "power.cpp")]
    subprocess.run(command, check=True)
    shown = old_glibc.run("readelf", "--wide", "--version-info", made)
    asked = {old_glibc.numbers(found) for found in re.findall(r"Name: GLIBC_([\d.]+)", shown)}
    assert asked
    assert max(asked) <= (2, 28)
    power = ctypes.CDLL(made).power
    power.restype, power.argtypes = ctypes.c_double, [ctypes.c_double]
    assert power(1.0) == pytest.approx(2.718281828459045)
