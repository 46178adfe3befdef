"""The operators under another name, as the kernels hub loads them, beside the installed package."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import ssah_kernels
from ssah_kernels.schema import KERNELS

ROOT = Path(__file__).parents[2]
# The folder of this file has the name of that package, so that looking for a module would find it.
KERNELS_PACKAGE = any(importlib.metadata.distributions(name="kernels"))
pytestmark = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="no git checkout"
)
# A process of its own: Triton reads TRITON_INTERPRET when it is imported.
INTERPRETED = """
import sys
import torch
from test_hub import load
from ssah_kernels import ops
copy = load("interpreted_copy", sys.argv[1])
weight = torch.randn(40, 24)
with copy.use("triton"):
    found = copy.ops.column_sq_norms(weight)
torch.testing.assert_close(found, ops.column_sq_norms(weight), rtol=1e-6, atol=0)
assert "interpreted_copy.backends.triton.column_sq_norms" in sys.modules
assert "ssah_kernels.backends.triton" not in sys.modules
"""


def load(name: str, folder: Path | str) -> ModuleType:
    """The package in ``folder``, under another name."""
    spec = importlib.util.spec_from_file_location(name, Path(folder) / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "ssah-kernels"
    subprocess.run([sys.executable, ROOT / "runs" / "hub.py", folder], check=True)
    return folder


@pytest.fixture(scope="module")
def build(repository: Path) -> Path:
    return repository / "build" / "torch-cpu"


@pytest.fixture(scope="module")
def copies(build: Path) -> list[ModuleType]:
    """One build, loaded as the hub does and as a part of another package."""
    sys.modules["a_stack"] = ModuleType("a_stack")
    return [load(name, build) for name in ("_ssah_kernels_cpu_1f3a", "a_stack.operators")]


def agrees(copy: ModuleType) -> None:
    """Several operators of a copy equal the installed ones, gradients and optimiser included."""
    given = torch.randn(2, 6, 16)
    found, wanted = [], []
    for package, results in ((copy, found), (ssah_kernels, wanted)):
        gate, up = (given[i].clone().requires_grad_() for i in range(2))
        state = package.ops.new_moments(gate)
        optim = importlib.import_module(".optim", package.__name__)
        parameter = torch.nn.Parameter(given[0].clone())
        parameter.grad = given[1].clone()
        with package.use("reference"):
            h = package.ops.gated_moments(gate, up, *state)
            norms = package.ops.column_sq_norms(up)
            (h.square().sum() + norms.sum()).backward()
            optim.MaskedAdamW([parameter], lr=0.1).step()
        results += [h.detach(), *state, norms.detach(), gate.grad, up.grad, parameter.detach()]
    assert len(found) == 8
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(found[-1], given[0])


def test_copies_serve_one_process_with_the_installed_package(copies: list[ModuleType]) -> None:
    for copy in copies:
        agrees(copy)
        namespace = getattr(torch.ops, copy.__name__.replace(".", "_"))
        for op in KERNELS:
            assert getattr(namespace, op) is not getattr(torch.ops.ssah, op)


def test_a_copy_compiles(copies: list[ModuleType]) -> None:
    copy = copies[0]

    def norms(weight: torch.Tensor) -> torch.Tensor:
        return copy.ops.column_sq_norms(weight).sum()

    weight = torch.randn(6, 16, requires_grad=True)
    with copy.use("reference"):
        torch.compile(norms, fullgraph=True, backend="aot_eager")(weight).backward()
    torch.testing.assert_close(weight.grad, 2 * weight.detach())


def test_a_copy_has_no_compiled_kernels_and_says_so(copies: list[ModuleType]) -> None:
    for backend in ("cpu", "cuda"):
        with (
            copies[0].use(backend),
            pytest.raises(RuntimeError, match="this copy of ssah_kernels has no compiled kernels"),
        ):
            copies[0].ops.column_sq_norms(torch.ones(2, 2))
    # The package itself, libraries included, under another name: they are not its own either.
    whole = load("the_package_again", ROOT / "ssah_kernels")
    with pytest.raises(RuntimeError, match="pip install ssah-kernels"):
        whole.ops.column_sq_norms(torch.ones(2, 2))


def test_triton_serves_a_copy(build: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    path = os.pathsep.join(map(str, (ROOT, Path(__file__).parent)))
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", INTERPRETED, build], env=environment, check=True)


def test_the_place_of_older_versions_gives_the_same_package(build: Path) -> None:
    name = json.loads((build / "metadata.json").read_text())["id"]
    already = name in sys.modules
    old = load("older", build / "ssah_kernels")
    assert old.ops is sys.modules[name].ops
    if not already:
        agrees(sys.modules[name])


def test_a_package_imports_itself_by_relative_imports_alone() -> None:
    absolute = re.compile(r"^\s*(?:from|import) ssah_kernels\b", re.MULTILINE)
    files = list((ROOT / "ssah_kernels").rglob("*.py"))
    assert len(files) > 50
    assert not [path for path in files if absolute.search(path.read_text())]


def test_a_folder_of_others_is_left_alone(tmp_path: Path) -> None:
    kept = tmp_path / "benchmarks" / "mine.py"
    kept.parent.mkdir()
    kept.touch()
    command = [sys.executable, ROOT / "runs" / "hub.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{tmp_path} has files of others: name a new folder" in done.stderr
    assert kept.exists()


def test_a_folder_is_written_again(repository: Path) -> None:
    stale = repository / "build" / "torch-cpu" / "stale.py"
    stale.touch()
    subprocess.run([sys.executable, ROOT / "runs" / "hub.py", repository], check=True)
    assert not stale.exists()


def test_every_backend_has_a_build_of_its_own(repository: Path) -> None:
    found = [json.loads(path.read_text()) for path in repository.glob("build/*/metadata.json")]
    assert {each["backend"]["type"] for each in found} == {"cpu", "cuda", "rocm", "xpu"}
    assert len({each["id"] for each in found}) == 4
    assert {each["id"].isidentifier() for each in found} == {True}


@pytest.mark.skipif(not KERNELS_PACKAGE, reason="kernels is not installed: pip install kernels")
def test_kernels_loads_the_repository(repository: Path, build: Path) -> None:
    from kernels import get_local_kernel
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    kernel = get_local_kernel(repository, backend="cpu")
    agrees(kernel)
    assert kernel.__name__.startswith("_ssah_kernels_cpu_")
    actual = Digest.hash_variant(DigestAlgorithm.SHA256, build)
    Metadata.read_from_file(build / "metadata.json").digest.validate(actual)
