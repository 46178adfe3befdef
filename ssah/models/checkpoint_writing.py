"""A checkpoint written tensor by tensor, for a model that need not fit in memory.

The header of a safetensors file has the type, the shape and the place of every tensor, and none of
their values. So it is written first, and then each tensor as it comes. Example: a file is to have
``a``, float32 [2, 3], and ``b``, bfloat16 [4]. Their 24 and 8 bytes are at [0, 24] and [24, 32]
behind the header, which is known before ``a`` has been computed.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from ssah.models.checkpoint import DTYPES, INDEX, Checkpoint
from ssah.storage import naming

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Configuration, tokenizer, templates, code and licence. What only a training run needs is not here.
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
_NOT_COPIED = ("*.index.json", "trainer_state.json", "adapter_config.json")
_TEMPLATES = "additional_chat_templates"


def write_checkpoint(
    folder: Path, like: Checkpoint, names: Sequence[str], make: Callable[[str], Tensor]
) -> None:
    """Write some tensors of a checkpoint with other values, in the files that it has them in.

    Args:
        folder: where to, existing; see `ssah.storage.whole_folder`.
        like: a checkpoint, sharded or not; its types and shapes are kept.
        names: which of its tensors. A file without any of them is not written.
        make: gives the tensor ``[...]`` of a name; called once for each, in the order of the files.

    Raises:
        ValueError: ``make`` gave another type or shape.
        OSError: the disk is full, or the like; the file is named.
    """
    wanted = frozenset(names)
    weight_map: dict[str, str] = {}  # tensor -> its file
    for file in like.files:
        own = [name for name in like.in_file(file) if name in wanted]
        if not own:
            continue
        path = folder / file.name
        with naming(path), path.open("wb") as handle:
            _write_header(handle, like, own)
            for name in own:
                tensor = make(name)
                if tensor.dtype != like.dtype_of(name) or tensor.shape != like.shape(name):
                    raise ValueError(
                        f"the tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, must be "
                        f"{like.dtype_of(name)} {list(like.shape(name))}"
                    )
                # A view of the bytes: nothing is copied, however large the tensor.
                handle.write(tensor.contiguous().flatten().view(DTYPES["U8"]).numpy().data)
        weight_map |= dict.fromkeys(own, file.name)
    if any((file.parent / INDEX).is_file() for file in like.files):
        metadata = {"total_size": like.n_bytes(weight_map)}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_header(handle: BinaryIO, like: Checkpoint, names: Sequence[str]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    start = 0
    for name in names:
        dtype, shape = like.dtype_of(name), like.shape(name)
        end = start + math.prod(shape) * dtype.itemsize
        about = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        header[name], start = about, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    handle.write(len(text).to_bytes(8, "little") + text)


def copy_beside(source: Path, folder: Path) -> None:
    """Copy what a checkpoint has beside its weights: configuration, tokenizer, templates, licence.

    Args:
        source: the folder of the checkpoint.
        folder: where to, existing.
    """
    kept = {path for pattern in COPIED for path in source.glob(pattern) if path.is_file()}
    kept -= {path for pattern in _NOT_COPIED for path in source.glob(pattern)}
    for path in sorted(kept):
        shutil.copyfile(path, folder / path.name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, folder / _TEMPLATES)
