"""Running a model that ``torch.distributed.fsdp.fully_shard`` has sharded, to score it.

Its weights are gathered by hooks of the modules that were sharded, so that the model runs from its
outermost one, and every rank runs as many batches as the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah.attribution.batches import IGNORED, Batch
from ssah.attribution.causal_attention import FastCausalBackward
from ssah.attribution.watch import Watch
from ssah.distributed import Ranks
from ssah.units import DepthTwoModule

__all__ = ["check_sharded", "nothing", "run_sharded"]


def check_sharded(
    model: nn.Module, modules: Mapping[str, DepthTwoModule], ranks: Ranks, over: Ranks
) -> None:
    """Refuse what cannot run in step.

    Args:
        model: sharded.
        modules: what is scored.
        ranks: those that score together.
        over: those that the model is sharded over.

    Raises:
        ValueError: they are not the same, or a projection was sharded by itself.
    """
    if over.size != ranks.size:
        raise ValueError(
            f"group has {ranks.size} ranks, must be the {over.size} that the model is sharded over"
        )
    from torch.distributed.fsdp import FSDPModule

    for name, module in modules.items():
        for owned in (*module.inputs, module.output):
            owner = owned.param.rpartition(".")[0]
            if isinstance(model.get_submodule(owner), FSDPModule):
                raise ValueError(
                    f"module {owner!r} of {name!r} is sharded by itself; apply fully_shard to "
                    "layers and to the model"
                )


def nothing(device: torch.device) -> Batch:
    """A batch of one position that does not count, for a rank that has no more."""
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    none = torch.zeros(1, 1, dtype=torch.bool, device=device)
    return Batch({"input_ids": ids}, ids, None, none, none, none, False)


def run_sharded(model: PreTrainedModel, batch: Batch, watch: Watch) -> int:
    """Run one batch, where gradients are watched through the loss and back; the number of tokens
    predicted.

    The vocabulary projection runs on all positions at once where the loss is needed, and on the
    last one alone where it is not.
    """
    from torch.distributed.fsdp import FSDPModule

    if not watch.gradient:
        # Weights gathered in inference mode could not be trained later.
        with torch.no_grad():
            if not isinstance(model, FSDPModule):
                model.base_model(**batch.inputs, use_cache=False)
            elif "logits_to_keep" in inspect.signature(type(model).forward).parameters:
                # A number would let Gemma 4 leave positions out of some layers too.
                last = torch.tensor([-1], device=batch.input_ids.device)
                model(**batch.inputs, use_cache=False, logits_to_keep=last)
            else:
                model(**batch.inputs, use_cache=False)
        return 0
    with torch.inference_mode(False), torch.enable_grad(), FastCausalBackward():
        logits: Tensor = model(**batch.inputs, use_cache=False, return_dict=True).logits
        targets = batch.targets().to(logits.device)
        # Backward on every rank, whether it has a token to predict or not: it gathers weights too.
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        with watch.backward():
            loss.backward()
    return int((targets != IGNORED).sum())
