"""What every test has: one thread, a process that is left as it was, models that many share."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, and by processes of tests

import pytest
import torch
from filelock import FileLock

torch.set_num_threads(1)
pytest.register_assert_rewrite("commands", "family_checks", "plans", "ranks", "scores", "streamed")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.config.option.markexpr == "not exhaustive":
        terminalreporter.write_line(
            "Exhaustive tests were left out: `make test-all` (pytest -m '') runs them too."
        )


@pytest.fixture(autouse=True)
def _process_as_it_was() -> Iterator[None]:
    """Puts back what a process has one of, so that no test depends on those before it."""
    environment, folder, path = dict(os.environ), Path.cwd(), list(sys.path)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch_state, state = torch.get_rng_state(), random.getstate()
    plans = set(_active_plans())
    yield
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:] = path
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.set_rng_state(torch_state)
    random.setstate(state)
    for plan in set(_active_plans()) - plans:
        _active_plans().discard(plan)


def _active_plans():  # type: ignore[no-untyped-def]
    """Plans in force. Tests of operators alone do not import the library."""
    module = sys.modules.get("ssah.plan_optimizer")
    return module.ACTIVE if module else set()


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in float32, as a folder: its GGUF file is unpacked once a run."""
    from ssah.models import ModelError, locate

    try:
        locate("smollm2")
    except ModelError as error:
        pytest.skip(str(error))
    return _once(
        tmp_path_factory, "smollm2", lambda folder: _save("smollm2", folder, dtype="float32")
    )


@pytest.fixture(scope="session")
def tiny_chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model and the tokenizer of ``tiny_chat``, as a folder that no test writes to."""
    import tiny_chat

    return _once(tmp_path_factory, "tiny-chat", tiny_chat.save)


def _save(name: str, folder: Path, dtype: str) -> None:
    from ssah.models import load_model

    for part in load_model(name, device="cpu", dtype=dtype):
        part.save_pretrained(folder)


def _once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first process to want it makes, and that all processes of a run share."""
    run = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        run = run.parent  # that of a worker is in that of the run
    folder, finished = run / name, run / f"{name}.finished"
    with FileLock(run / f"{name}.lock"):
        if not finished.exists():
            make(folder)
            finished.touch()
    return folder
