"""Running one batch through a model whose modules are watched: forward, or forward and back.

A gradient metric needs dL/da of activations, and no gradient of a weight. The loss L is the summed
cross-entropy, whose gradient is known in closed form: dL/dlogits = softmax(logits) -
onehot(target). So L itself is never computed, and of all logits only those that predict something,
a chunk at a time.

Example: logits (0, 0, log 2) have the softmax (1/4, 1/4, 1/2); where the third token is the target,
dL/dlogits is (1/4, 1/4, -1/2).

A model that ``torch.distributed.fsdp.fully_shard`` has sharded gathers its weights by hooks of the
modules that were sharded. It therefore runs from its outermost module, and every rank runs as many
batches as the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ssah.attribution.batches import IGNORED, Batch
from ssah.attribution.causal_attention import FastCausalBackward
from ssah.attribution.watch import Watch
from ssah.compat.modules import without_hooks
from ssah.compat.transformers import unpacked_rows
from ssah.distributed import Ranks
from ssah.models import swapped, text_config, to_device
from ssah.units import DepthTwoModule

_LOGITS_AT_ONCE = 2**23  # elements: 32 MiB in float32


def run_batch(
    model: PreTrainedModel, batch: Batch, watch: Watch, *, sharded: bool, packed: bool
) -> None:
    """Run one batch through all that the watched modules need.

    Args:
        model: in evaluation mode, its modules watched.
        batch: as it is to run.
        watch: says whether gradients are watched.
        sharded: whether ranks hold shards of the weights; then they all call this at once.
        packed: whether there are packed weights.
    """
    watch.read(batch)
    with unpacked_rows() if _is_unpacked(batch) else nullcontext():
        _run_watched(model, batch, watch, sharded=sharded, packed=packed)


def _is_unpacked(batch: Batch) -> bool:
    """Whether the model will find positions that it made itself, and no mask: a document a row."""
    return batch.inputs.keys().isdisjoint({"position_ids", "attention_mask"})


def _run_watched(
    model: PreTrainedModel, batch: Batch, watch: Watch, *, sharded: bool, packed: bool
) -> None:
    if not watch.gradient:
        # Weights that are gathered in inference mode could not be trained later, and what packed
        # modules lay out anew as they first run must not be inference tensors either.
        with torch.no_grad() if sharded or packed else torch.inference_mode():
            _forward(model, batch, sharded)
        return
    # What it replaces is the CPU's attention: elsewhere it would look at every call in vain.
    on_cpu = batch.inputs["input_ids"].device.type == "cpu"
    faster = FastCausalBackward() if on_cpu else nullcontext()
    with torch.inference_mode(False), torch.enable_grad(), faster:
        backward = _backward_sharded if sharded else _backward
        backward(model, batch, watch)


def _forward(model: PreTrainedModel, batch: Batch, sharded: bool) -> None:
    """The backbone alone, whose last activations are the last thing that is watched."""
    if not sharded or not _gathers_itself(model):
        model.base_model(**batch.inputs, use_cache=False)
    elif "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        # The vocabulary projection runs on the last position alone. A number in place of this
        # tensor would let Gemma 4 leave positions out of some layers too.
        last = torch.full((1,), -1, device=batch.inputs["input_ids"].device)
        model(**batch.inputs, use_cache=False, logits_to_keep=last)
    else:
        model(**batch.inputs, use_cache=False)


def _gathers_itself(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def _backward_sharded(model: PreTrainedModel, batch: Batch, watch: Watch) -> None:
    """Through the loss and back; the vocabulary projection runs on all positions at once."""
    logits: Tensor = model(**batch.inputs, use_cache=False, return_dict=True).logits
    targets = to_device(batch.targets, logits.device)  # [rows, length]
    # Backward on every rank, whether it has a token to predict or not: it gathers weights too.
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(),  # [tokens, vocabulary]
        targets.flatten(),  # [tokens]
        ignore_index=IGNORED,
        reduction="sum",
    )
    with watch.backward():
        loss.backward()


def _backward(model: PreTrainedModel, batch: Batch, watch: Watch) -> None:
    """Through backbone and back, from the loss's gradient at the last hidden state."""
    output = model.base_model(**batch.inputs, use_cache=False, return_dict=True)
    targets = batch.targets.flatten()  # [tokens], where the batch lies: usually the host
    positions = (targets != IGNORED).nonzero()[:, 0]
    if len(positions):
        slope = _loss_gradient(model, output, positions, targets[positions])
        with watch.backward():
            torch.autograd.backward(output.last_hidden_state, slope)


def _loss_gradient(
    model: PreTrainedModel, output: ModelOutput, positions: Tensor, targets: Tensor
) -> Tensor:
    """d(summed next-token loss) / d(last hidden state), ``[rows, length, hidden]``.

    Only the positions that predict something, ``[predicting]`` among rows * length, pass through
    the vocabulary projection; ``targets``: what they are to predict, ``[predicting]``.
    """
    states = output["last_hidden_state"].detach().flatten(0, 1)  # [tokens, hidden]
    gradient = torch.zeros_like(states)
    size = max(1, _LOGITS_AT_ONCE // text_config(model).vocab_size)
    chunks, wanted = (to_device(each, states.device).split(size) for each in (positions, targets))
    with _head(model, output) as head:
        for chunk, target in zip(chunks, wanted, strict=True):
            state = states[chunk][None].requires_grad_()  # [1, tokens, hidden]
            logits = head(state)  # [1, tokens, vocabulary]
            slope = torch.softmax(logits.detach(), dim=-1, dtype=torch.float32)
            slope[0, torch.arange(len(chunk), device=slope.device), target] -= 1
            (state_gradient,) = torch.autograd.grad(logits, state, slope.to(logits.dtype))
            gradient[chunk] = state_gradient[0]
    return gradient.view_as(output["last_hidden_state"])


@contextmanager
def _head(model: PreTrainedModel, output: ModelOutput) -> Iterator[Any]:
    """What the model does with its backbone's output: a function from states ``[rows, n, hidden]``
    to logits ``[rows, n, vocabulary]``.

    The model's own forward with the backbone replaced: whatever it does to the logits (soft
    capping, scaling) is done here too.
    """
    fields = dict(output)

    def backbone(*_: Any, **__: Any) -> ModelOutput:
        return type(output)(**fields)

    def head(state: Tensor) -> Tensor:
        fields["last_hidden_state"] = state
        ids = torch.zeros(state.shape[:2], dtype=torch.int64, device=state.device)
        return model(input_ids=ids, use_cache=False, return_dict=True).logits

    with ExitStack() as stack:
        for module in {model.base_model, model.get_decoder()}:
            # What they return has been through the hooks on the backbone already.
            stack.enter_context(without_hooks(module))
            stack.enter_context(swapped(module, "forward", backbone))
        yield head


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
            f"process_group has {ranks.size} ranks, must be the {over.size} that the model is "
            "sharded over"
        )
    for name, module in modules.items():
        for owned in (*module.inputs, module.output):
            owner = owned.param.rpartition(".")[0]
            if _gathers_itself(model.get_submodule(owner)):
                raise ValueError(
                    f"module {owner!r} of {name!r} is sharded by itself; apply fully_shard to "
                    "layers and to the model"
                )


def nothing(device: torch.device) -> Batch:
    """A batch of one position that does not count, for a rank that has no more."""
    ids = torch.zeros(1, 1, dtype=torch.int64)
    none = torch.zeros(1, 1, dtype=torch.bool)
    there = torch.zeros(1, 1, dtype=torch.int64, device=device)
    return Batch({"input_ids": there}, ids, None, none, none, none, False)
