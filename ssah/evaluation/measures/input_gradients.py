"""How strongly the first token of an answer depends on the prompt: the norm of input gradients.

With y the largest logit at the last token of the prompt, and e_t what the embedding of token t puts
into the first layer:

    norm = sqrt(sum over tokens t of |dy/de_t|^2)

Example: y = 3 e_1 - 4 e_2 has the norm 5, wherever it is. It is how much y moves at most per length
that the embeddings move, to first order: a local Lipschitz constant.

Source: Jain et al. 2024, arXiv 2407.10264.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssah.attribution import Batch
from ssah.evaluation.measures.logits import logits_at
from ssah.models import as_it_was, check_whole, passing_gradients
from ssah.representations import batches_at

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def input_gradient_norms(model: PreTrainedModel, loader: Iterable[Mapping[str, Any]]) -> Tensor:
    """The norm of the gradient of the largest logit with respect to the embeddings of the prompt.

    The model is left as it was, and no weight gets a gradient.

    Args:
        model: a causal language model of transformers.
        loader: batches as of `ssah.attribute`; without labels a row is a prompt.

    Returns:
        float64 ``[rows]`` on the CPU, in the order of the loader.

    Raises:
        TypeError: a batch is not of this form.
        ValueError: no batch, a row without a response where there are labels, or packed weights
            that pass no gradient.
        FloatingPointError: a gradient is NaN or infinite.
    """
    found = []
    for batch, where in batches_at(check_whole(model), loader, ("last",)):
        with as_it_was(model), passing_gradients(model), torch.inference_mode(False):
            found.append(_of_batch(model, batch, where.mask[:, 0]))
    if not found:
        raise ValueError("loader is empty, must have at least one batch")
    norms = torch.cat(found)
    if not bool(norms.isfinite().all()):
        raise FloatingPointError("gradients at the embeddings are NaN or infinite")
    return norms


@torch.enable_grad()
def _of_batch(model: PreTrainedModel, batch: Batch, last: Tensor) -> Tensor:
    """Norms, float64 ``[rows]``; ``last``: bool ``[rows, length]``, True at one token of a row."""
    embedded: list[Tensor] = []

    def put_out(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        # A leaf: everything before it needs no gradient.
        embedded.append(output.detach().requires_grad_())  # [rows, length, hidden]
        return embedded[-1]

    hook = model.get_input_embeddings().register_forward_hook(put_out)
    try:
        logits = logits_at(model, batch.inputs, last)  # [rows, vocabulary]
    finally:
        hook.remove()
    # Rows do not touch each other, so the gradient of the sum is that of each row.
    (gradient,) = torch.autograd.grad(logits.amax(-1).sum(), embedded[0])
    attended = batch.attended.to(gradient.device)[..., None]
    gradient = gradient.double().masked_fill(~attended, 0)
    return gradient.norm(dim=(1, 2)).cpu()
