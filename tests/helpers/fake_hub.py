"""A stand-in of the Hugging Face Hub, whose every repository is one folder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest


def use_folder(monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    """Upload to ``folder`` and fetch from it; what ``token`` and ``create`` were called with."""
    calls: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None) -> None:
            calls["token"] = token

        def create_repo(self, repo_id: str, **options: Any) -> SimpleNamespace:
            calls["create"] = (repo_id, options)
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> str:
            for file in Path(folder_path).iterdir():
                (folder / file.name).write_bytes(file.read_bytes())
            return f"https://example.test/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id: str(folder))
    return calls
