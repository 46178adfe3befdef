"""The model of all studies here."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import prepare

from ssah.studies.loading import Loading


@pytest.fixture(scope="module")
def model_folder(tiny_chat_folder) -> Path:
    return tiny_chat_folder


@pytest.fixture(scope="module")
def loading(model_folder) -> Loading:
    return Loading(str(model_folder), dtype="float32")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a model and groups of its units."""
    return prepare(tmp_path_factory.mktemp("runs"), 16)
