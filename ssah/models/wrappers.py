"""Which model is taken: a transformers model itself, not what wraps it or holds its weights."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ssah.compat.modules import is_fsdp1, partitioned, wrapper_of


def check_bare(model: nn.Module) -> PreTrainedModel:
    """``model``, once it is known to be a transformers model.

    Raises:
        TypeError: it is not, or it wraps one (torch.compile, DataParallel, DDP, FSDP1, DeepSpeed,
            PEFT, a value head): the message says what to pass.
    """
    if isinstance(model, PreTrainedModel):
        return model
    # In a wrapper all names are longer: scores by such names would fit no other copy of the model.
    wrapped = wrapper_of(model, PreTrainedModel) if isinstance(model, nn.Module) else None
    raise TypeError(
        wrapped or f"model is a {type(model).__name__}, must be a transformers.PreTrainedModel"
    )


def check_whole(model: nn.Module) -> PreTrainedModel:
    """``model``, once it is known to be a transformers model that holds its own weights.

    Raises:
        TypeError: as of :func:`check_bare`.
        ValueError: FSDP1 or DeepSpeed's ZeRO stage 3 holds them.
    """
    bare = check_bare(model)
    # Both hold weights in pieces that have lost their shapes; fully_shard keeps rows and columns.
    if is_fsdp1(model):
        raise ValueError(
            f"model {type(model).__name__} is sharded by FSDP1 (FullyShardedDataParallel), which "
            "holds its weights in flat pieces: it must be whole, or sharded with "
            "torch.distributed.fsdp.fully_shard"
        )
    for name, parameter in model.named_parameters():
        if partitioned(parameter):
            raise ValueError(
                f"parameter {name!r} is partitioned by DeepSpeed's ZeRO stage 3: the model must be "
                "whole (ZeRO stage 2 or less, without zero.Init), or sharded with "
                "torch.distributed.fsdp.fully_shard"
            )
    return bare


def config_size(model: nn.Module, name: str) -> int:
    """A size of the text model by transformers' name for it, e.g. ``"hidden_size"``.

    Raises:
        TypeError: as of :func:`check_bare`.
        ValueError: its configuration has no such name; the message says how to add it.
    """
    config = text_config(model)
    found = getattr(config, name, None)
    if found is None:
        kind = type(config).__name__
        raise ValueError(
            f"the configuration of {type(model).__name__} has no {name!r}. If {kind} has another "
            f"name for it, it must say so: {kind}.attribute_map = {{{name!r}: 'its own name'}}"
        )
    return int(found)


def text_config(model: nn.Module) -> PreTrainedConfig:
    """The configuration of the text model: of one that also sees or hears, a part of the whole.

    Raises:
        TypeError: as of :func:`check_bare`.
    """
    return check_bare(model).config.get_text_config(decoder=True)
