"""Lets this machine's linker make libraries that an older glibc can load.

    runs/old_glibc.py FOLDER [2.28]      writes into FOLDER, and prints what to set LDFLAGS to

A linker takes the newest version of each function, as exp of glibc 2.29, and then the library loads
nowhere without it. The glibc of this machine still has the older versions. So the linker is given
stand-ins of libc and libm whose functions have the newest version that the older glibc has.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

# The headers of libstdc++ ask glibc 2.32 whether there is one thread alone. "No" is always right:
# counts of references are then atomic.
SINGLE_THREADED = """
    .data
    .globl __libc_single_threaded
    .hidden __libc_single_threaded
    .type __libc_single_threaded, %object
    .size __libc_single_threaded, 1
__libc_single_threaded:
    .byte 0
    .section .note.GNU-stack, "", %progbits
"""
# Up to glibc 2.33 these held what libc holds today.
JOINED = ("libpthread.so.0", "libdl.so.2", "librt.so.1")


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def versions(library: str, newest: str) -> dict[str, str]:
    """Each function and variable of ``library``, with its last version up to ``newest``."""
    found: dict[str, str] = {}
    for line in run("readelf", "--wide", "--dyn-syms", library).splitlines():
        entry = re.search(r" (?:FUNC|IFUNC|OBJECT) .* \d+ (\w+)@@?GLIBC_([\d.]+)$", line)
        if entry is None:
            continue
        name, version = entry.groups()
        if numbers(found.get(name, "0")) < numbers(version) <= numbers(newest):
            found[name] = version
    return found


def stand_in(soname: str, folder: Path, newest: str) -> Path:
    """A library that has the names and versions of ``soname``, and no code."""
    names = versions(run("cc", f"-print-file-name={soname}").strip(), newest)
    nodes: dict[str, list[str]] = {}
    for name, version in names.items():
        nodes.setdefault(version, []).append(name)
    code, script, made = (folder / f"{soname}{end}" for end in (".s", ".map", ""))
    code.write_text(
        "    .text\n"
        + "".join(f"    .globl {name}\n    .type {name}, %function\n{name}:\n" for name in names)
        + '    .byte 0\n    .section .note.GNU-stack, "", %progbits\n'
    )
    script.write_text(
        "".join(
            f"GLIBC_{version} {{ {'; '.join(nodes[version])}; }};\n"
            for version in sorted(nodes, key=numbers)
        )
    )
    run(
        *("cc", "-shared", "-nostdlib", f"-Wl,-soname,{soname}"),
        *(f"-Wl,--version-script,{script}", "-o", str(made), str(code)),
    )
    return made


def linker_flags(folder: Path, newest: str = "2.28") -> str:
    """What to link with, so that a library asks for no glibc later than ``newest``."""
    folder.mkdir(parents=True, exist_ok=True)
    code, made = folder / "single_threaded.s", folder / "single_threaded.o"
    code.write_text(SINGLE_THREADED)
    run("cc", "-c", "-o", str(made), str(code))
    stand_ins = [stand_in(soname, folder, newest) for soname in ("libm.so.6", "libc.so.6")]
    libraries = [*map(str, stand_ins), *(f"-l:{name}" for name in JOINED)]
    # They stand before the files that use them, where --as-needed would drop them.
    kept = ["-Wl,--push-state,--no-as-needed", *libraries, "-Wl,--pop-state"]
    return " ".join([*kept, str(made)])


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    print(linker_flags(Path(sys.argv[1]).resolve(), *sys.argv[2:]))
