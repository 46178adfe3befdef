"""One batch forward and back, without what a gradient of activations does not need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ssah.attribution.batches import IGNORED, Batch
from ssah.attribution.causal_attention import FastCausalBackward
from ssah.attribution.watch import Watch
from ssah.compat.modules import without_hooks
from ssah.models import swapped

__all__ = ["forward_backward"]

_LOGITS_AT_ONCE = 2**23  # elements: 32 MiB in float32


def forward_backward(model: PreTrainedModel, batch: Batch, watch: Watch) -> int:
    """Run one batch through backbone, loss and back; the number of tokens predicted."""
    with torch.inference_mode(False), torch.enable_grad(), FastCausalBackward():
        output = model.base_model(**batch.inputs, use_cache=False, return_dict=True)
        hidden = output.last_hidden_state  # [rows, length, hidden]
        targets = batch.targets().to(hidden.device)
        n_targets = int((targets != IGNORED).sum())
        if n_targets:
            slope = _loss_gradient(model, output, targets)
            with watch.backward():
                torch.autograd.backward(hidden, slope)
    return n_targets


def _loss_gradient(model: PreTrainedModel, output: ModelOutput, targets: Tensor) -> Tensor:
    """d(summed next-token loss) / d(last hidden state), ``[rows, length, hidden]``.

    Only the positions that predict something pass through the vocabulary projection, a chunk at a
    time. dL/dlogits is softmax(logits) - onehot(target); the loss itself is never needed.
    """
    states = output["last_hidden_state"].detach().flatten(0, 1)  # [tokens, hidden]
    gradient = torch.zeros_like(states)
    positions = (targets.flatten() != IGNORED).nonzero()[:, 0]
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    with _head(model, output) as head:
        for chunk in positions.split(max(1, _LOGITS_AT_ONCE // vocabulary)):
            state = states[chunk][None].requires_grad_()  # [1, tokens, hidden]
            logits = head(state)  # [1, tokens, vocabulary]
            slope = torch.softmax(logits.detach(), dim=-1, dtype=torch.float32)
            slope[0, torch.arange(len(chunk), device=slope.device), targets.flatten()[chunk]] -= 1
            (state_gradient,) = torch.autograd.grad(logits, state, slope.to(logits.dtype))
            gradient[chunk] = state_gradient[0]
    return gradient.view_as(output["last_hidden_state"])


@contextmanager
def _head(model: PreTrainedModel, output: ModelOutput) -> Iterator[Any]:
    """What the model does with its backbone's output: a function from states to logits.

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
