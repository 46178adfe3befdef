"""What every test has: one thread, a process that is left as it was, models that many share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Two workers of two threads each would wait for each other. Torch reads this when it is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from filelock import FileLock
from isolation import process_as_it_was

torch.set_num_threads(1)
pytest.register_assert_rewrite(
    "commands", "family_checks", "matrix", "plans", "ranks", "scores", "streamed"
)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.config.option.markexpr == "not exhaustive":
        terminalreporter.write_line(
            "Exhaustive tests were left out: `make test-all` (pytest -m '') runs them too."
        )


@pytest.fixture(autouse=True)
def _process_as_it_was() -> Iterator[None]:
    with process_as_it_was():
        yield


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
