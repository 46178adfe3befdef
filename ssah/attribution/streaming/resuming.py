"""What a streamed run knows between two layers: hidden states, and sums of the layers done."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import safetensors.torch
from torch import Tensor

from ssah.attribution import partial_runs
from ssah.attribution.sums import Sums
from ssah.storage import META, check_fields, naming

# What a layer returns: hidden states, or a tuple that begins with them and else has None.
Hidden: TypeAlias = "Tensor | tuple[Any, ...]"


class MemoryState:
    """Hidden states of every batch in memory, and sums and norms of the layers that are done.

    Attributes:
        layer: index of the layer that runs now.
        sums: B's name -> sums, on the CPU.
        norms: B's name -> squared norms of B's columns, float64 ``[n_units]`` on the CPU.
    """

    def __init__(self) -> None:
        self.layer = 0
        self.sums: dict[str, Sums] = {}
        self.norms: dict[str, Tensor] = {}
        self._hidden: dict[int, Hidden] = {}

    def get(self, number: int) -> Hidden:
        """What batch ``number`` was after the layer before this one."""
        return self._hidden[number]

    def put(self, number: int, hidden: Hidden) -> None:
        """What batch ``number``, already gotten, is after this layer."""
        self._hidden[number] = hidden

    def finish_layer(self, sums: Mapping[str, Sums], norms: Mapping[str, Tensor]) -> None:
        """All batches have passed through this layer, whose modules have these sums and norms,
        ``[n_units]`` each."""
        self.sums |= sums
        self.norms |= norms
        self.layer += 1


class FileState(MemoryState):
    """The same in a folder, from which an interrupted run goes on.

    A folder per layer has the layer's sums and what every batch was after it. Its ``meta.json``,
    with the checksum of every file, is written last: until then the layer counts as not done. Only
    the last layer done keeps its hidden states. Files are read and written plainly: a mapped file
    would count as resident memory.

    Args:
        folder: made if need be.
        identity: plain data, everything that changes the result.

    Raises:
        ValueError: the folder is of a run with another identity, or was damaged.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        super().__init__()
        self.folder, self.identity = folder, dict(identity)
        self._digests: list[str] = []  # of the hidden states after the layer before this one
        self._written: list[str] = []  # of those after this one
        while (found := partial_runs.load(self._of(self.layer), self.identity)) is not None:
            sums, norms, reached = found
            check_fields(self._of(self.layer) / META, reached, {"hidden": list})
            super().finish_layer(sums, norms)
            self._digests = reached["hidden"]
        self._of(self.layer).mkdir(parents=True, exist_ok=True)

    def get(self, number: int) -> Hidden:
        # Checked here and not as the run began: each file is read once, when it is needed.
        path = self._hidden_file(self.layer - 1, number)
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != self._digests[number]:
            raise partial_runs.damaged(self.folder, f"file {str(path)!r} is damaged")
        ((key, hidden),) = safetensors.torch.load(content).items()
        length = int(key)
        return (hidden, *[None] * (length - 1)) if length else hidden

    def put(self, number: int, hidden: Hidden) -> None:
        # The key is the length of the tuple, 0 for a bare tensor.
        length, first = (len(hidden), hidden[0]) if isinstance(hidden, tuple) else (0, hidden)
        content = safetensors.torch.save({str(length): first.contiguous()})
        path = self._hidden_file(self.layer, number)
        with naming(path):
            path.write_bytes(content)
        self._written.append(hashlib.sha256(content).hexdigest())

    def finish_layer(self, sums: Mapping[str, Sums], norms: Mapping[str, Tensor]) -> None:
        partial_runs.keep(
            self._of(self.layer), self.identity, sums, norms=norms, hidden=self._written
        )
        super().finish_layer(sums, norms)
        self._digests, self._written = self._written, []
        self._of(self.layer).mkdir(exist_ok=True)
        for done in range(self.layer - 1):
            for file in self._of(done).glob("hidden-*"):
                file.unlink()

    def _of(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:04d}"

    def _hidden_file(self, layer: int, number: int) -> Path:
        return self._of(layer) / f"hidden-{number:06d}.safetensors"
