"""The operators as a repository of the kernels hub, for the package `kernels`.

    python runs/hub.py FOLDER

FOLDER then has `build/torch-cpu`, `-cuda`, `-rocm` and `-xpu`. These are what a repository on the
hub holds, and `kernels.get_local_kernel` loads them. FOLDER also has what `kernel-builder` builds
from: `build.toml`, `flake.nix`, `torch-ext/` and the card. All builds have the same files: the
reference and Triton's kernels, in Python alone. A build is named by a hash of them, so that two
states of the sources can be loaded into one process.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
from pathlib import Path

from distributions import ROOT, tracked

NAME = "ssah-kernels"
PACKAGE = NAME.replace("-", "_")
LICENSE = "Apache-2.0"
VERSION = 0  # what the hub calls the first: names may still change
BACKENDS = ("cpu", "cuda", "rocm", "xpu")

BUILD = f"""\
[general]
name = "{NAME}"
version = {VERSION}
edition = 6
license = "{LICENSE}"
backends = {json.dumps(BACKENDS)}

[torch-noarch]
"""
FLAKE = """\
{
  description = "Operators of ssah";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""
# Versions of `kernels` that do not look for `__init__.py` in the folder of a build load this one.
OLD_PLACE = '''\
"""The package in the folder above, for versions of `kernels` that look for it here."""

import importlib.util
import json
import sys
from pathlib import Path

_folder = Path(__file__).resolve().parents[1]
_name = json.loads((_folder / "metadata.json").read_text())["id"]
if _name not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_name, _folder / "__init__.py")
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])
globals().update({k: v for k, v in vars(sys.modules[_name]).items() if not k.startswith("__")})
'''
CARD = f"""\
---
library_name: kernels
license: {LICENSE.lower()}
tags:
- kernels
---

{{about}}
## From the kernels hub

```python
from kernels import get_local_kernel

kernel = get_local_kernel("FOLDER")  # or get_kernel("OWNER/{NAME}", version={VERSION})
state = kernel.ops.new_moments(gate)
h = kernel.ops.gated_moments(gate, up, *state)  # gate, up and h are [..., channels]
```

This build is in Python alone. Triton's kernels serve GPUs. On CPU tensors it has the float64
reference, which you choose by `with kernel.use("reference"):`; the compiled kernels are in the
package `{NAME}` of an index. The operators of this build are in `torch.ops`, under its own
name (`kernel.__name__`), so it can be loaded beside that package.
"""


def write(folder: Path, root: Path = ROOT) -> None:
    """Write the repository into ``folder``; what is there of an earlier call is replaced.

    Raises:
        FileExistsError: the folder has other files.
    """
    used, toml = folder.exists() and any(folder.iterdir()), folder / "build.toml"
    if used and not (toml.exists() and f'name = "{NAME}"' in toml.read_text()):
        raise FileExistsError(f"{folder} has files of others: name a new folder")
    files = {
        str(Path(file).relative_to(PACKAGE)): (root / file).read_bytes()
        for file in tracked(root)
        if file.startswith(f"{PACKAGE}/") and file.endswith(".py")
    }
    mark = hashlib.sha256(json.dumps(digests(files)).encode()).hexdigest()[:10]
    for part in ("build", "torch-ext", "benchmarks"):
        shutil.rmtree(folder / part, ignore_errors=True)
    _write(folder / "torch-ext" / PACKAGE, files)
    built = {**files, f"{PACKAGE}/__init__.py": OLD_PLACE.encode()}
    for backend in BACKENDS:
        metadata = {
            "name": NAME,
            "id": f"_{PACKAGE}_{backend}_{mark}",
            "version": VERSION,
            "license": LICENSE,
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": digests(built)},
        }
        text = json.dumps(metadata, indent=2) + "\n"
        _write(folder / "build" / f"torch-{backend}", {**built, "metadata.json": text.encode()})
    card = CARD.format(about=(root / "csrc" / "kernels.md").read_text())
    texts = {"build.toml": BUILD, "flake.nix": FLAKE, "CARD.md": card, "README.md": card}
    script = (root / "benchmarks" / "benchmark_hub.py").read_bytes()
    licence = (root / "LICENSE").read_bytes()
    _write(folder, {name: text.encode() for name, text in texts.items()})
    _write(folder, {"benchmarks/benchmark_hub.py": script, "LICENSE": licence})


def digests(files: dict[str, bytes]) -> dict[str, str]:
    """SHA-256 of each file in base64, as `metadata.json` has them."""
    return {
        name: base64.b64encode(hashlib.sha256(data).digest()).decode()
        for name, data in sorted(files.items())
    }


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="new, or of an earlier call")
    arguments = parser.parse_args()
    try:
        write(arguments.folder)
    except FileExistsError as error:
        parser.error(str(error))
