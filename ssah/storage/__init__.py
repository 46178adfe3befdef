"""What is written to disk: whole or not at all, checked when read, by one process at a time."""

from __future__ import annotations

from ssah.lazy import submodules_of
from ssah.storage.files import (
    RECORD,
    TEXT,
    Fields,
    check_fields,
    check_replaceable,
    file_hash,
    naming,
    read_record,
    read_sealed,
    sealed,
    sync,
    write_whole,
)
from ssah.storage.folder_lock import LOCK, check_free, one_run
from ssah.storage.hub import HUB, hub_folder, public_name, result_card, upload
from ssah.storage.lazy_tensors import LazyTensors
from ssah.storage.results import (
    FORMAT,
    META,
    Stored,
    check_kind,
    kind_in,
    load_tensors,
    read_meta,
    save_tensors,
)
from ssah.storage.whole_folders import check_named, check_new, whole_folder

__all__ = [
    "FORMAT",
    "HUB",
    "LOCK",
    "META",
    "RECORD",
    "TEXT",
    "Fields",
    "LazyTensors",
    "Stored",
    "check_fields",
    "check_free",
    "check_kind",
    "check_named",
    "check_new",
    "check_replaceable",
    "file_hash",
    "hub_folder",
    "kind_in",
    "load_tensors",
    "naming",
    "one_run",
    "public_name",
    "read_meta",
    "read_record",
    "read_sealed",
    "result_card",
    "save_tensors",
    "sealed",
    "sync",
    "upload",
    "whole_folder",
    "write_whole",
]

__getattr__ = submodules_of(__name__)
