"""Which model and data a result came from, and how results are written and read.

A result is a folder with ``meta.json`` and one safetensors file that it names. The JSON is
replaced last and in one step, so that a folder holds either the whole old result or the whole new
one, whatever happens in between.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from ssah.folder_lock import one_writer
from ssah.records import read_sealed, sealed, write_whole
from ssah.units import find_modules

__all__ = [
    "check_kind",
    "check_same_model",
    "config_hash",
    "load_tensors",
    "model_name",
    "save_tensors",
    "units_hash",
]

META = "meta.json"
_OWN = "meta_sha256"  # key of the checksum of everything else in that file

# Settings that change neither the units nor what the model computes: not part of what a run
# that goes on must have kept.
_VOLATILE = frozenset(
    {
        "_name_or_path",
        "_attn_implementation",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "quantization_config",
        "return_dict",
        "sep_token_id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def _stable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _stable(item) for key, item in value.items() if str(key) not in _VOLATILE}
    if isinstance(value, list | tuple):
        return [_stable(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


def config_hash(model: nn.Module) -> str:
    """SHA-256 (hex) of the model's configuration, without what does not shape the model.

    A run that was interrupted goes on only with the same. Left out: the name, the dtype, the
    attention implementation, special token ids, library versions.
    """
    text = json.dumps(_stable(model.config.to_dict()), sort_keys=True)  # type: ignore[union-attr, operator]
    return hashlib.sha256(text.encode()).hexdigest()


FORMAT = 2  # of meta.json; 1 had config_hash, a hash of every setting, in place of units_hash


def units_hash(model: nn.Module) -> str:
    """SHA-256 (hex) of what makes the units of a model: what a result belongs to.

    That is the type of its text model, the hidden size, and of each depth-2 module the name, the
    kind and the number of units. A fine-tuned, quantised, converted or resized copy has the same
    units, under every release of transformers.

    Raises:
        TypeError, ValueError: `find_modules` does not know the model.
    """
    found = find_modules(model)
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    parts = [[name, module.kind, module.n_units] for name, module in found.items()]
    text = json.dumps([config.model_type, config.hidden_size, parts])
    return hashlib.sha256(text.encode()).hexdigest()


def model_name(model: nn.Module) -> str:
    """Hub id or path that the model was loaded from, or its class name."""
    return getattr(model.config, "name_or_path", "") or type(model).__name__


def check_same_model(
    model: nn.Module, expected_hash: str | None, *, expected_name: str, what: str
) -> None:
    """Refuse a result that was made on a model with other units.

    Args:
        model: the model that the result is to be used with.
        expected_hash: :func:`units_hash` stored with the result; of an older file, None: then the
            caller compares names and sizes of modules.
        expected_name: :func:`model_name` stored with the result.
        what: what the result is, for the message, e.g. ``"attribution"``.

    Raises:
        ValueError: the units differ.
    """
    if expected_hash is not None and (actual := units_hash(model)) != expected_hash:
        raise ValueError(
            f"{what} was made on {expected_name!r} (units {expected_hash[:12]}), but the model "
            f"given is {model_name(model)!r} (units {actual[:12]}): its architecture, its hidden "
            "size or its depth-2 modules differ, so that its units are others"
        )


def save_tensors(
    directory: str | os.PathLike[str], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Write ``tensors`` and ``meta`` (JSON types only) to ``directory``: whole, or not at all.

    An earlier result of the same kind in the folder is replaced, and what a killed process left of
    one is removed. The kind is ``meta["content"]``. Of several processes that save to one folder,
    the last one's result stays.

    Raises:
        ValueError: ``meta`` has a reserved key, ``"tensors"``, ``"sha256"`` or ``"meta_sha256"``;
            the folder holds a result of another kind.
        OSError: the disk is full, or the like; an earlier result is still there.
    """
    reserved = {"tensors", "sha256", _OWN} & set(meta)
    if reserved:
        raise ValueError(f"meta has the reserved keys {sorted(reserved)}")
    folder = Path(directory)
    content = safetensors.torch.save({key: value.contiguous() for key, value in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    name = f"tensors-{digest[:12]}.safetensors"
    record = {**meta, "tensors": name, "sha256": digest}
    folder.mkdir(parents=True, exist_ok=True)
    with one_writer(folder):
        check_kind(folder, meta.get("content"))
        for half in (*folder.glob(".tensors-*.tmp"), *folder.glob(f".{META}.*.tmp")):
            half.unlink()
        write_whole(folder / name, content)
        write_whole(folder / META, sealed(record, _OWN))
        for old in folder.glob("tensors-*.safetensors"):
            if old.name != name:
                old.unlink()


def check_kind(folder: Path, content: object) -> None:
    """Refuse to replace scores by groups, groups by an update, and so on.

    Raises:
        ValueError: the folder holds a result of another kind; what cannot be read back may go.
    """
    try:
        there = json.loads((folder / META).read_bytes())["content"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return
    if there != content:
        raise ValueError(
            f"directory {str(folder)!r} holds {there!r}, which {content!r} must not replace: "
            "choose another directory, or remove that one"
        )


def load_tensors(directory: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote: the tensors (on the CPU) and the metadata.

    Raises:
        FileNotFoundError: the folder has no ``meta.json``, or not the tensors that it names.
        ValueError: a file was cut off or edited; it is named.
    """
    folder = Path(directory)
    while True:
        meta = _read_meta(folder)
        file = folder / meta["tensors"]
        try:
            content = file.read_bytes()
            break
        except FileNotFoundError:
            if _read_meta(folder) == meta:
                raise  # and not replaced by another process between the two files
    del meta["tensors"]
    digest = hashlib.sha256(content).hexdigest()
    if digest != meta.pop("sha256"):
        raise ValueError(f"file {str(file)!r} is damaged: its tensors are not those of {META}")
    try:
        return safetensors.torch.load(content), meta
    except safetensors.SafetensorError as error:
        raise ValueError(f"file {str(file)!r} is damaged: {error}") from error


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / META
    if not path.is_file():
        raise FileNotFoundError(f"directory {str(folder)!r} has no {META}: nothing was saved there")
    meta = read_sealed(path, {"tensors": str, "sha256": str}, _OWN)
    if Path(meta["tensors"]).name != meta["tensors"]:
        raise ValueError(f"file {str(path)!r} is damaged: it names tensors outside its folder")
    return meta
