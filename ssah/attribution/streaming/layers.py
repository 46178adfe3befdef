"""A model in a folder of safetensors whose decoder layers are in memory one at a time."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ssah.attribution.streaming.resuming import Hidden
from ssah.compat.transformers import WeightReader, tie_weights, tied_weights
from ssah.models import (
    Checkpoint,
    ModelError,
    check_options,
    loading_errors,
    put_tensor,
    quiet,
    replaced_forward,
    text_config,
    weights_folder,
)
from ssah.units import layers_path

_REST = -1  # in the place of a layer's index: embeddings, norms, what is in no layer


class LayeredModel:
    """A causal language model on the meta device, whose layers come and go.

    What is computed with a layer that is there has the bits of :func:`ssah.models.load_model`'s:
    names, types and conversions of weights are left to transformers.

    Attributes:
        name: what it was loaded from.
        model: without weights, except those that were loaded.
        layers: its decoder layers.
        path: their name in the model, e.g. ``"model.layers"``.
        dtype: of its weights.
        device: where weights are put.
        checkpoint: where they are read from.
    """

    def __init__(
        self,
        name: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        """Read the configuration and the headers of the weights. Arguments as of ``load_model``.

        Raises:
            ModelError: nothing of that name, no safetensors, or quantised weights.
            ValueError: the architecture is unknown, or its layers cannot run one by one.
        """
        self.name = name
        (source, gguf_file, local), self.device = check_options(name, dtype, device)
        if gguf_file:
            raise ModelError(
                f"model is {name!r}, a GGUF file, must be safetensors to be streamed: load it and "
                "write it anew with save_pretrained"
            )
        with loading_errors(name):
            config = AutoConfig.from_pretrained(
                source, local_files_only=local, trust_remote_code=trust_remote_code
            )
            self.checkpoint = Checkpoint.in_folder(weights_folder(source, local))
        if getattr(config, "quantization_config", None) is not None:
            raise ModelError(f"model {name!r} is quantised, must be plain weights to be streamed")
        stored = config.dtype or self.checkpoint.dtype
        self.dtype = stored if dtype == "auto" else getattr(torch, dtype)
        config.name_or_path = source  # what a loaded model has: the result's `model_name`
        with torch.device("meta"), loading_errors(name):
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=self.dtype, trust_remote_code=trust_remote_code
            )
        self.model.eval()
        _fill_buffers(self.model, self.device)
        self.path = layers_path(self.model)
        layers = self.model.get_submodule(self.path)
        assert isinstance(layers, nn.ModuleList)
        self.layers = layers
        _check_separable(self.model)
        self._empty = self._state()  # on the meta device: what `unload` puts back
        base = next(name for name, m in self.model.named_modules() if m is self.model.base_model)
        self._rest = [
            name
            for name in self._empty
            if name.startswith(f"{base}." if base else "") and not name.startswith(f"{self.path}.")
        ]
        self._reader = WeightReader(self.model, self.dtype, self.device)
        self._keys = self._sort_keys()

    @property
    def bytes_needed(self) -> int:
        """Size in the files of all layers and the rest of the backbone."""
        return self.checkpoint.n_bytes(key for keys in self._keys.values() for key in keys)

    def read(self, index: int) -> dict[str, Tensor]:
        """Layer ``index`` by name, each ``[...]`` as in the files. May run in its own thread."""
        return self.checkpoint.read(self._keys[index])

    def load(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Put what `read` gave into layer ``index``; ``tensors`` is emptied, to free memory.

        Each is ``[...]`` as in the files, and is converted to the shape that the model has.

        Raises:
            ModelError: a weight is missing or has the wrong shape.
        """
        self._load(tensors)
        tensors.clear()
        self._check_whole(self._names(index))

    def unload(self, index: int) -> None:
        """Free the weights of layer ``index``."""
        for name in self._names(index):
            put_tensor(self.model, name, self._empty[name])
        _trim_heap()

    def load_rest(self) -> None:
        """Read and put in place what the backbone has beside its layers: embeddings, norms.

        Raises:
            ModelError: as of `load`.
        """
        self._load(self.checkpoint.read(self._keys[_REST]))
        missing = {name for name, tensor in self._state().items() if tensor.is_meta}
        # A checkpoint with tied weights may have them under the name of the vocabulary projection.
        tie_weights(self.model, missing)
        self._check_whole(self._rest)

    def _sort_keys(self) -> dict[int, list[str]]:
        """Layer (or ``_REST``) -> its names in the checkpoint; what nothing needs is in none."""
        owner = dict.fromkeys(self._rest, _REST)
        tied = tied_weights(self.model)
        # A checkpoint may have a tied weight under either name, so both belong to its owner.
        for target, source in tied.items():
            if source in owner:
                owner.setdefault(target, owner[source])
        for index in range(len(self.layers)):
            owner |= dict.fromkeys(self._names(index), index)
        keys: dict[int, list[str]] = {index: [] for index in (_REST, *range(len(self.layers)))}
        targets = {key: self._reader.target(key, self._empty) for key in self.checkpoint.names}
        present = set(targets.values())
        for key, target in targets.items():
            # Where the source is there as well, its copy under the other name is not read.
            if target in owner and tied.get(target) not in present:
                keys[owner[target]].append(key)
        return keys

    def _load(self, tensors: dict[str, Tensor]) -> None:
        # transformers holds all that it was given until all is converted: two copies of a layer.
        # To widen is exact whatever it makes of a weight, and is done one weight at a time.
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and tensor.dtype.itemsize < self.dtype.itemsize:
                tensors[key] = tensor.to(self.dtype)
        with quiet():
            misfits = self._reader.put(tensors)
        for name, stored, expected in misfits:
            raise ModelError(
                f"model {self.name!r}: the weight {name!r} has shape {tuple(stored)}, must have "
                f"{tuple(expected)}"
            )

    def _state(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict(keep_vars=True))

    def _names(self, index: int) -> list[str]:
        """Parameters and buffers of a layer."""
        return [name for name in self._empty if name.startswith(f"{self.path}.{index}.")]

    def _check_whole(self, names: Iterable[str]) -> None:
        state = self._state()
        for name in names:
            if state[name].is_meta:
                raise ModelError(f"model {self.name!r} has no weight {name!r} in its files")


@dataclass
class LayerIO:
    """What goes into the one layer that runs, and what has come out of it."""

    input: Any = None
    output: Any = None


@contextmanager
def alone(layers: nn.ModuleList, index: int) -> Iterator[LayerIO]:
    """Inside the block, those before layer ``index`` return what goes into it, those after it what
    came out."""
    handed = LayerIO()
    own = layers[index].forward

    def run(*args: Any, **kwargs: Any) -> Any:
        handed.output = own(*args, **kwargs)
        return handed.output

    def earlier(*_: Any, **__: Any) -> Any:
        return handed.input

    def later(*_: Any, **__: Any) -> Any:
        return handed.output

    # The others have no weights now. They are called all the same: the model loops over all.
    with ExitStack() as stack:
        for i, layer in enumerate(layers):
            forward = run if i == index else earlier if i < index else later
            stack.enter_context(replaced_forward(layer, forward))
        yield handed


def on_device(output: Hidden, device: torch.device) -> Hidden:
    """What a layer returns, on ``device``: hidden states ``[rows, length, hidden]``, or a tuple
    that begins with them. Nothing else in it is handed on."""
    if isinstance(output, Tensor):
        return output.to(device)
    # Its length stays, as the model may unpack it.
    return (output[0].to(device), *[None] * (len(output) - 1))


def _trim_heap() -> None:
    """Give back what the C library (glibc; others do not keep it) holds of freed activations."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Give the buffers that no checkpoint holds (rotary frequencies) their values."""
    for name, buffer in list(model.named_non_persistent_buffers()):
        put_tensor(model, name, torch.empty_like(buffer, device="cpu"))
    model.initialize_weights()  # weights are on the meta device: nothing is drawn
    for name, buffer in list(model.named_non_persistent_buffers()):
        put_tensor(model, name, buffer.to(device))


def _check_separable(model: PreTrainedModel) -> None:
    config = text_config(model)
    shared = getattr(config, "num_kv_shared_layers", 0)
    if shared:
        raise ValueError(
            f"model {type(model).__name__} has {shared} layers that take keys and values from "
            "earlier ones: its layers cannot run one by one; score it in memory"
        )
