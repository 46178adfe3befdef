"""For which GPUs a CUDA library was compiled, and whether it serves a given one.

A library with sm_80, sm_90 and ptx_90 serves an A100 (8.0) and an RTX 4090 (8.9) with the first, an
H100 (9.0) with the second, and a B200 (10.0) with PTX that the driver compiles at its first use. A
V100 (7.0) is older than all of them. Source: NVIDIA, "CUDA Compiler Driver NVCC", GPU compilation.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

_MAGIC = struct.pack("<I", 0xBA55ED50)
_PTX, _ELF = 1, 2


def architectures(library: Path) -> list[str]:
    """What a CUDA library was compiled for, e.g. ``["sm_80", "sm_90", "ptx_90"]``.

    Read from the headers of its fat binaries, which needs no GPU and no CUDA tool: a container
    (magic, version, size of header, size) of entries (kind, version, size of header, size, ...,
    architecture at byte 28).
    """
    content = library.read_bytes()
    found: set[tuple[bool, int]] = set()
    at = content.find(_MAGIC)
    while 0 <= at <= len(content) - 16:
        _, _, header, size = struct.unpack_from("<IHHQ", content, at)
        entry, end = at + header, min(at + header + size, len(content))
        while entry + 32 <= end:  # an entry has its architecture in its bytes 28 to 31
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", content, entry)
            (architecture,) = struct.unpack_from("<I", content, entry + 28)
            if kind in (_PTX, _ELF):  # what a driver can run
                found.add((kind == _PTX, architecture))
            entry += entry_header + entry_size
        at = content.find(_MAGIC, end)  # one container for each source file
    return [f"{'ptx' if ptx else 'sm'}_{architecture}" for ptx, architecture in sorted(found)]


def serves(built: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability runs what was built.

    Machine code (sm) runs on its own generation, from its own minor version on. The driver
    compiles PTX for its own version and for everything newer.
    """
    for architecture in built:
        kind, _, number = architecture.partition("_")
        major, minor = divmod(int(number), 10)  # sm_100 is 10.0
        same_generation = capability[0] == major and capability[1] >= minor
        if same_generation or (kind == "ptx" and capability >= (major, minor)):
            return True
    return False
