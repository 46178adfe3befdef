"""The tensors of a model by name, read one at a time: from a folder, or from memory.

Names are those of the model, whatever its files call them. GPT-2's files on the Hub, for example,
have ``h.0.attn.c_attn.weight`` for ``transformer.h.0.attn.c_attn.weight``. Where files keep a
tensor of the model in several pieces, as Mixtral's do with experts, the pieces keep the names that
they have there. Of tied weights there is one, under the name of the one that others are tied to.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah.compat.transformers import WeightReader, in_checkpoint_layout, tied_weights
from ssah.models import (
    COPIED,
    Checkpoint,
    ModelError,
    check_bare,
    check_plain,
    check_whole,
    empty_model,
    load_weights,
    locate,
    quiet,
    weights_folder,
)
from ssah_kernels.sharded import is_sharded

# What a function of this room takes for a model: a folder or hub id, a model, or its state.
WeightsOf: TypeAlias = "str | os.PathLike[str] | nn.Module | Mapping[str, Tensor]"


class Weights(ABC):
    """The tensors of one model.

    Attributes:
        about: what messages and records call it.
        shapes: of its tensors, by name, in the order of its files.
        tied: name of a tensor that is another one -> the name of that one.
    """

    about: str
    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """Of its tensors."""
        return tuple(self.shapes)

    @property
    @abstractmethod
    def model(self) -> PreTrainedModel:
        """The model, perhaps without weights: it says which units there are.

        Raises:
            TypeError: it is not known.
        """

    @abstractmethod
    def key(self, name: str) -> str:
        """What the place that it is read from calls the tensor ``name``."""

    @abstractmethod
    def param(self, name: str) -> str:
        """The parameter of the model that the tensor ``name`` is, or is a piece of."""

    @abstractmethod
    def in_pieces(self, param: str, values: Tensor) -> dict[str, Tensor]:
        """``values`` for the elements of a parameter, ``[...]``, taken apart as its tensors are.

        Returns:
            Name of each tensor that the parameter is kept in -> what is of its elements, ``[...]``.

        Raises:
            ValueError: the files keep the parameter in pieces that saving would not make.
        """

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Of the tensor ``name``."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor ``[...]`` on the CPU; it is not to be written to."""


class FolderWeights(Weights):
    """The tensors of a folder of safetensors, sharded or not; see `Weights`.

    Attributes:
        folder: where it is.
        checkpoint: reads it.
    """

    def __init__(self, name: str) -> None:
        """Read the configuration and the headers of the weights.

        Raises:
            ModelError: nothing of that name, or quantised weights.
            ValueError, FileNotFoundError: a file is damaged, or missing.
        """
        self.about = name
        source, _, local = locate(name)
        self._model = empty_model(name)
        if getattr(self._model.config, "quantization_config", None) is not None:
            raise ModelError(f"model {name!r} is quantised, must be plain weights: dequantise it")
        # With what a result is copied beside: a hub id is fetched once.
        self.folder = weights_folder(source, local, beside=COPIED)
        self.checkpoint = Checkpoint.in_folder(self.folder)
        self.tied = tied_weights(self._model)
        self._keys: dict[str, str] = {}  # name -> key in the files
        self._params: dict[str, str] = {}  # name -> parameter
        self._name_all()
        self.shapes = {name: self.checkpoint.shape(key) for name, key in self._keys.items()}

    @property
    def model(self) -> PreTrainedModel:
        return self._model

    def _name_all(self) -> None:
        """Give every tensor its name, in the order of the files.

        What the model has no place for is left out, as loading leaves it out.
        """
        reader = WeightReader(self.model, self.model.dtype, torch.device("cpu"))
        places = self.model.state_dict()
        targets = {key: reader.target(key, places) for key in self.checkpoint.names}
        # Experts: many keys go into one place.
        pieces = Counter(targets.values())
        for file in self.checkpoint.files:
            for key in self.checkpoint.in_file(file):
                target = targets[key]
                if target not in places:
                    continue
                # One key for a place of its shape is the whole tensor, however it is called.
                same = tuple(places[target].shape) == self.checkpoint.shape(key)
                name = target if same and pieces[target] == 1 else key
                self._keys[name], self._params[name] = key, target
        for name, owner in self.tied.items():
            if name in self._keys:  # the copy of a tied weight, or the only one under another name
                self._keys.setdefault(owner, self._keys.pop(name))
                self._params[owner] = owner

    def key(self, name: str) -> str:
        return self._keys[name]

    def param(self, name: str) -> str:
        return self._params[name]

    def in_pieces(self, param: str, values: Tensor) -> dict[str, Tensor]:
        pieces = in_checkpoint_layout(self.model, {param: values})
        if param in self.shapes:
            # Under another name perhaps. Where saving makes several, the file has it undivided.
            return {param: next(iter(pieces.values())) if len(pieces) == 1 else values}
        for name, piece in pieces.items():
            if self.shapes.get(name) != piece.shape:
                raise ValueError(
                    f"{self.about!r} has no tensor {name!r} of shape {list(piece.shape)}, in "
                    f"which saving keeps a part of {param!r}: load it and write it anew with "
                    "save_pretrained"
                )
        return pieces

    def dtype(self, name: str) -> torch.dtype:
        return self.checkpoint.dtype_of(self._keys[name])

    def read(self, name: str) -> Tensor:
        key = self._keys[name]
        return self.checkpoint.read([key])[key]


class MemoryWeights(Weights):
    """The tensors of a model in memory, or of its state dict; see `Weights`.

    Attributes:
        state: all names that the model has, those of tied weights too.
    """

    def __init__(self, source: nn.Module | Mapping[str, Tensor], about: str) -> None:
        """Note names and tensors, ``[...]`` of any shape; nothing is copied.

        Raises:
            ValueError: weights are packed, on the disk, or in pieces of several processes.
            TypeError: ``source`` has something else than tensors.
        """
        self.about, self._model = about, None
        if isinstance(source, nn.Module):
            check_plain(source, "to have its change computed")
            if isinstance(source, PreTrainedModel):
                check_whole(source)
            self._model = source
            source = source.state_dict(keep_vars=True)
        self.state = dict(source)
        for name, tensor in self.state.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"{about} has a {type(tensor).__name__} under {name!r}, must have tensors"
                )
            if tensor.is_meta or is_sharded(tensor):
                raise ValueError(f"{about} has not all of {name!r} here: load it into memory whole")
        owners: dict[tuple[object, ...], str] = {}
        tied: dict[str, str] = {}
        for name, tensor in self.state.items():
            # Two names for one memory are tied, and a result must tie them again.
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device)
            if tensor.numel() and (owner := owners.setdefault(place, name)) != name:
                tied[name] = owner
        self.tied: Mapping[str, str] = tied
        own = ((name, tensor) for name, tensor in self.state.items() if name not in tied)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in own}

    @property
    def model(self) -> PreTrainedModel:
        if self._model is None:
            raise TypeError(
                f"{self.about} is a state dict, which does not say which units its model has: pass "
                "the model"
            )
        return check_bare(self._model)

    def key(self, name: str) -> str:
        return name

    def param(self, name: str) -> str:
        return name

    def in_pieces(self, param: str, values: Tensor) -> dict[str, Tensor]:
        return {param: values}

    def dtype(self, name: str) -> torch.dtype:
        return self.state[name].dtype

    def read(self, name: str) -> Tensor:
        return self.state[name].detach().cpu()


def open_weights(source: WeightsOf, about: str) -> FolderWeights | MemoryWeights:
    """The tensors of ``source``, which messages call ``about`` where it has no name of its own.

    A GGUF file, whose blocks are of the whole tensor, is loaded into memory, in float32.

    Raises:
        TypeError: it is none of what this room takes.
        ModelError: it cannot be found or read.
    """
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        if locate(name).gguf_file:
            with quiet():
                return MemoryWeights(load_weights(name, device="cpu"), name)
        return FolderWeights(name)
    if isinstance(source, nn.Module | Mapping):
        return MemoryWeights(source, about)
    raise TypeError(
        f"{about} is a {type(source).__name__}, must be a folder, a hub id, a model or a state dict"
    )
