"""Shows the GPU side on this machine within eight minutes; see runs/gpu.sh."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

from benchmarks.commit import commit
from benchmarks.gpu.page import page
from benchmarks.gpu.staged import Piece, Record, Stage, Stages, in_fork

# Its name, its seconds, and the function of a file beside this one that lists what it does.
STAGES = (
    ("install", 135, "installing", "install"),
    ("info", 15, "about", "info"),
    ("correctness", 100, "checks", "correctness"),
    ("operators", 80, "operators", "operators"),
    ("optimisers", 30, "optimisers", "optimisers"),
    ("attribute", 60, "models", "scoring"),
    ("training", 30, "models", "training"),
    ("sanitizer", 30, "checks", "sanitizer"),
)


def pieces(dry: bool, file: str, function: str, record: Record) -> Iterator[Piece]:
    """What a stage does. Only its own process imports the libraries, once they are there."""
    scope = importlib.import_module("benchmarks.gpu.scope")
    listed: Callable[..., Iterator[Piece]] = getattr(
        importlib.import_module(f"benchmarks.gpu.{file}"), function
    )
    return listed(scope.DRY if dry else scope.FULL, record)


def stages(dry: bool) -> list[Stage]:
    return [
        Stage(name, seconds, partial(pieces, dry, file, function))
        for name, seconds, file, function in STAGES
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="runs/gpu.sh", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of the record")
    parser.add_argument("--dry-run", action="store_true", help="a little of everything, on the CPU")
    options = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        parser.error(f"{sys.executable} has no torch: set PYTHON to one that has")
    facts = {
        "dry_run": options.dry_run,
        "commit": commit(),
        "torch": version("torch"),
        "python": platform.python_version(),
    }
    try:
        own = Stages(options.out / "gpu.json", facts)
    except ValueError as error:
        parser.error(str(error))
    # Whether there is a GPU is then asked without CUDA, which does not outlive a fork.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch  # once, here: the stages' processes then have it

    if options.dry_run:
        torch.set_num_threads(1)  # the tensors are tiny, and a pool of threads is lost in a fork
    elif not in_fork(torch.cuda.is_available):
        parser.error("torch sees no GPU here: --dry-run does a little of everything on the CPU")

    def between() -> None:
        (options.out / "gpu.md").write_text(page(own.record), encoding="utf-8")
        if options.dry_run:
            # What each stage would import. On a GPU it does: another library may begin CUDA.
            importlib.import_module("benchmarks.gpu.models")

    own.run(stages(options.dry_run), between)
    print(f"Written: {own.path}, {options.out / 'gpu.md'}")
    return int(any(each["status"] != "done" for each in own.record["stages"].values()))


if __name__ == "__main__":
    sys.exit(main())
