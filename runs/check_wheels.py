"""What may be in the wheels of a release: `python runs/check_wheels.py WHEELS CHECKOUT`.

Ends with 1 and the first file that may not be there, or with what is missing.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

# Package -> what its wheel may have beside it, and what must be there.
MUST = {
    "ssah_kernels": ("ssah_kernels/_C.abi3.so", "ssah_kernels/py.typed"),
    "ssah": ("ssah/py.typed", "ssah/report/html/report.html.j2", "ssah/data/builtin"),
}


def faults(wheel: Path, checkout: str) -> list[str]:
    """What is wrong with a wheel."""
    package = wheel.name.split("-")[0]
    found = []
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for name in names:
            own = name.startswith((f"{package}/", f"{package}-", f"{package}.libs/"))
            if not own or name.startswith((f"{package}/tests", f"{package}.libs/libtorch")):
                found.append(f"{name} is not of this package")
            if package == "ssah" and name.endswith(".so"):
                found.append(f"{name} is compiled")
            if checkout.encode() in archive.read(name):
                found.append(f"{name} holds the path of the checkout")
    found += [
        f"{each} is missing" for each in MUST[package] if not any(n.startswith(each) for n in names)
    ]
    if not any(name.endswith("/LICENSE") and ".dist-info/" in name for name in names):
        found.append("the licence is missing")
    return [f"{wheel.name}: {each}" for each in found]


if __name__ == "__main__":
    wheels = sorted(Path(sys.argv[1]).glob("*.whl"))
    packages = {wheel.name.split("-")[0] for wheel in wheels}
    if packages != set(MUST):
        sys.exit(f"{sys.argv[1]} has wheels of {sorted(packages)}, must have {sorted(MUST)}")
    wrong = [each for wheel in wheels for each in faults(wheel, sys.argv[2])]
    sys.exit("\n".join(wrong) or None)
