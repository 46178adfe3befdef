"""The two distributions of this repository, ssah-kernels and ssah, for runs/release.sh.

    distributions.py stage DIR            their sources, in DIR/ssah-kernels and DIR/ssah
    distributions.py check FILE...        sdists and wheels: what they hold and what they must not

A checkout installs both at once (`pip install -e .`). Apart they are released: the pure part then
needs the kernels of its own release.
"""

from __future__ import annotations

import email
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = re.compile(r"csrc/|ssah_kernels/|setup\.py$")
SHARED = re.compile(r"(LICENSE|MANIFEST\.in)$")
TOP = {"ssah-kernels": "ssah_kernels", "ssah": "ssah"}  # a distribution and its package
# Where a machine keeps checkouts, homes and temporary files; "somebody" is the user of examples.
OWN_PATH = re.compile(rb"/(?:home|root|tmp|work|Users)/(?!somebody/)[\w.-]+/[\w./-]*")


def version() -> str:
    return str(runpy.run_path(str(ROOT / "ssah" / "version.py"))["__version__"])


def tracked(root: Path = ROOT) -> list[str]:
    """What git knows of and is there."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True
    )
    return [name for name in listed.stdout.splitlines() if (root / name).is_file()]


def replaced(text: str, old: str, new: str) -> str:
    if text.count(old) != 1:
        sys.exit(f"pyproject.toml must have this text once: {old}")
    return text.replace(old, new)


def without_kernels(pyproject: str) -> str:
    """The pyproject.toml of ssah alone: nothing to compile, and the kernels of its release."""
    requires = re.search(r"^requires = .*$", pyproject, re.MULTILINE)
    assert requires is not None
    pyproject = replaced(pyproject, requires[0], 'requires = ["setuptools>=77"]')
    first = "\ndependencies = [\n"
    return replaced(pyproject, first, f'{first}  "ssah-kernels=={version()}",\n')


def stage(folder: Path, names: Iterable[str]) -> None:
    """Put the sources of each distribution into a folder of its name."""
    for name in names:
        owners = ["ssah-kernels"] if KERNELS.match(name) else ["ssah"]
        for owner in TOP if SHARED.match(name) else owners:
            (folder / owner / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / owner / name)
    pyproject = folder / "ssah" / "pyproject.toml"
    pyproject.write_text(without_kernels(pyproject.read_text()))
    kernels = (ROOT / "csrc" / "kernels.toml").read_text()
    (folder / "ssah-kernels" / "pyproject.toml").write_text(
        replaced(kernels, "@VERSION@", version())
    )


def contents(archive: Path) -> dict[str, bytes]:
    """The files of an sdist, without its top folder, or of a wheel."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist() if name[-1] != "/"}
    with tarfile.open(archive) as sdist:
        files = [(member, sdist.extractfile(member)) for member in sdist if member.isfile()]
        return {member.name.split("/", 1)[1]: file.read() for member, file in files if file}


def faults(archive: Path) -> list[str]:
    """What is wrong with an sdist or a wheel, a line each."""
    files = contents(archive)
    wheel = archive.suffix == ".whl"
    described = [name for name in files if re.fullmatch(r"(PKG-INFO|[^/]*/METADATA)", name)]
    if len(described) != 1:
        return [f"{archive.name} is neither an sdist nor a wheel"]
    facts = email.message_from_bytes(files[described[0]])
    package = TOP[facts["Name"]]
    found = []
    if facts["Version"] != version():
        found.append(f"is of release {facts['Version']}, not {version()}")
    for licence in facts.get_all("License-File", []):
        place = described[0].replace("METADATA", "licenses/") if wheel else ""
        if place + licence not in files:
            found.append(f"lacks {licence}")
    if "LICENSE" not in facts.get_all("License-File", []):
        found.append("names no LICENSE")
    if f"{package}/__init__.py" not in files or f"{package}/py.typed" not in files:
        found.append(f"lacks {package}/ or its py.typed")
    pin = f"ssah-kernels=={version()}"
    if package == "ssah" and pin not in facts.get_all("Requires-Dist", []):
        found.append(f"does not need {pin}")
    compiled = sorted(name for name in files if name.endswith((".so", ".o", ".pyc")))
    expected = wheel and package == "ssah_kernels"
    if bool(compiled) != expected:
        found.append(f"has compiled files: {compiled}" if compiled else "has no library")
    if wheel:
        found += [
            f"has {name}, which is not of {package}/"
            for name in files
            if not re.match(rf"{package}/|[^/]*\.dist-info/", name)
        ]
        found += [
            f"has the path {path.decode()} in {name}"
            for name, content in files.items()
            for path in sorted(set(OWN_PATH.findall(content)))
        ]
    return [f"{archive.name} {fault}" for fault in found]


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "stage":
        stage(Path(sys.argv[2]), tracked())
    elif len(sys.argv) > 2 and sys.argv[1] == "check":
        if found := [line for name in sys.argv[2:] for line in faults(Path(name))]:
            sys.exit("\n".join(found))
    else:
        sys.exit(__doc__)
