"""The two distributions of this repository, each as a source tree of its own.

    python runs/distributions.py FOLDER

`ssah-kernels` has the operators, and needs torch alone. `ssah` is pure Python, and needs
`ssah-kernels` of its own version. FOLDER/ssah-kernels and FOLDER/ssah are what pip builds them of:
files that git knows, and a pyproject.toml that is made of this repository's. Both were one project
while they are developed: `pip install -e .` installs them together.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
KERNELS, LIBRARY = "ssah-kernels", "ssah"
# What each has of the repository, and the file that its page on an index shows.
FILES = {
    KERNELS: ("ssah_kernels", "csrc", "setup.py", "LICENSE"),
    LIBRARY: ("ssah", "LICENSE", "CHANGELOG.md"),
}
README = {KERNELS: "ssah_kernels/README.md", LIBRARY: "README.md"}
DESCRIPTION = "Fused operators for importance scores of units and masked optimiser steps."
FOR_DEVELOPMENT = ("dev", "docs")  # extras of the checkout alone


def described(project: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The table ``[project]`` of each distribution, of that of the repository."""
    version = project["version"]
    torch = [each for each in project["dependencies"] if each.startswith("torch")]
    others = [each for each in project["dependencies"] if each not in torch]
    extras = project["optional-dependencies"]
    shared = {k: project[k] for k in ("version", "license", "license-files", "requires-python")}
    return {
        KERNELS: {
            "name": KERNELS,
            **shared,
            "description": DESCRIPTION,
            "readme": "README.md",
            "keywords": ["triton", "cuda", "optimizer", "pruning", "fine-tuning"],
            "dependencies": torch,
            "optional-dependencies": {"triton": extras["triton"]},
        },
        LIBRARY: {
            **project,
            "dependencies": [f"{KERNELS}=={version}", *torch, *others],
            "optional-dependencies": {
                name: needs for name, needs in extras.items() if name not in FOR_DEVELOPMENT
            },
        },
    }


def toml(tables: dict[str, dict[str, Any]]) -> str:
    """A file of tables, whose values are texts, lists of texts, or tables of these."""
    parts = []
    for name, table in tables.items():
        # A text or a list of texts is written in TOML as in JSON.
        plain = [f"{json.dumps(k)} = {json.dumps(v)}" for k, v in table.items() if not _table(v)]
        parts.append("\n".join([f"[{name}]", *plain, ""]))
        parts += [toml({f"{name}.{json.dumps(k)}": v}) for k, v in table.items() if _table(v)]
    return "\n".join(parts)


def _table(value: Any) -> bool:
    return isinstance(value, dict)


def write(folder: Path, root: Path = ROOT) -> dict[str, Path]:
    """Write both source trees into ``folder``; what is there of an earlier call is replaced."""
    whole = tomllib.loads((root / "pyproject.toml").read_text())
    build, setuptools = whole["build-system"], whole["tool"]["setuptools"]
    of_kernels = {KERNELS: build["requires"], LIBRARY: build["requires"][:1]}
    trees = {}
    for name, project in described(whole["project"]).items():
        tree = trees[name] = folder / name
        shutil.rmtree(tree, ignore_errors=True)
        tree.mkdir(parents=True)
        for file in tracked(root, FILES[name]):
            (tree / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / file, tree / file)
        shutil.copy(root / README[name], tree / "README.md")
        package = FILES[name][0]
        tables = {
            "build-system": {**build, "requires": of_kernels[name]},
            "project": project,
            "tool.setuptools.packages.find": {"include": [f"{package}*"]},
            "tool.setuptools.package-data": setuptools["package-data"],
        }
        (tree / "pyproject.toml").write_text(toml(tables))
        if name == KERNELS:
            (tree / "MANIFEST.in").write_text("graft csrc\nglobal-exclude *.so *.py[cod]\n")
    return trees


def tracked(root: Path, paths: tuple[str, ...]) -> list[str]:
    """Files of these paths that git knows, or will know."""
    found = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "--", *paths],
        cwd=root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [line for line in found.stdout.splitlines() if (root / line).is_file()]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for tree in write(Path(sys.argv[1])).values():
        print(tree)
