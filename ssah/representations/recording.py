"""Hidden states of a pass: what layer l leaves in the residual stream, before the final norm.

Layers count from 0, as in `ssah.intervene`. Hooks read the states at a few positions of each row as
a layer puts them out, so that those of all tokens are never kept. Example: 8 rows of 500 tokens at
one position keep ``[8, hidden]`` a layer, and not ``[8, 500, hidden]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssah.attribution import Batch, BatchReader, counted_tokens
from ssah.distributed import check_not_sharded
from ssah.models import as_it_was, check_backbone, check_bare, check_whole
from ssah.representations.positions import Position, Positions, StatePositions, check_positions
from ssah.units import layers_path


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of ``model``, in their order."""
    return list(check_bare(model).get_submodule(layers_path(model)).children())


def batches_at(
    model: PreTrainedModel, loader: Iterable[Mapping[str, Any]], positions: Sequence[Position]
) -> Iterator[tuple[Batch, StatePositions]]:
    """The batches of ``loader``, read for ``model``, and where their states are.

    A batch ends with the last of these: responses need not run for the states of prompts. Whether
    batches have labels is said by the first one.

    Raises:
        TypeError, ValueError: a batch is not of this form, or lacks a position.
    """
    reader = None
    for number, raw in enumerate(loader):
        if reader is None:
            reader = BatchReader(model, tokens=counted_tokens(raw))
        batch = reader.read(raw, number)
        where = StatePositions.of(batch, positions, number)
        cut = batch.up_to(int(where.mask.any(1).any(0).nonzero().max()) + 1)
        yield cut, StatePositions(where.mask[..., : cut.input_ids.shape[1]])


@contextmanager
def recorded(
    layers: Sequence[nn.Module], where: StatePositions
) -> Iterator[dict[nn.Module, Tensor]]:
    """Inside, a pass leaves the states of ``layers`` in the mapping that is yielded.

    They are on the CPU, float64 ``[copies, rows, positions, hidden]``; a later pass replaces them.
    Hooks of others, such as those of `ssah.intervene`, have been at work on them.

    Args:
        layers: of `layers_of`.
        where: of the batch that passes.

    Raises:
        ValueError: as a pass runs, a layer puts out states of another form.
    """
    states: dict[nn.Module, Tensor] = {}

    def read(layer: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        h = output[0] if isinstance(output, tuple) else output
        if h.dim() != 3:
            raise ValueError(
                f"a {type(layer).__name__} puts out {list(h.shape)}; must be [rows, length, "
                "hidden] for its hidden states to be read"
            )
        states[layer] = where.take(h.detach()).cpu()

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(read).remove)
        yield states


def hidden_states(
    model: nn.Module, loader: Iterable[Mapping[str, Any]], *, positions: Positions = ("last",)
) -> Iterator[Tensor]:
    """The hidden states of every row, a batch at a time: for other reductions than `represent`'s.

    The backbone runs in evaluation mode, and the model is left as it was after each batch.

    Args:
        model, loader, positions: as of `represent`.

    Returns:
        Of each batch float64 ``[rows, positions, layers, hidden]``, on the CPU.

    Raises:
        TypeError, ValueError, FloatingPointError: as of `represent`.
    """
    where = check_positions(positions)
    whole = check_whole(model)
    check_not_sharded(whole)
    check_backbone(whole)
    return _states(whole, loader, where, layers_of(whole))


def _states(
    model: PreTrainedModel,
    loader: Iterable[Mapping[str, Any]],
    positions: Sequence[Position],
    layers: Sequence[nn.Module],
) -> Iterator[Tensor]:
    for batch, where in batches_at(model, loader, positions):
        with as_it_was(model), recorded(layers, where) as states, torch.inference_mode():
            model.base_model(**batch.inputs, use_cache=False)
            for number, layer in enumerate(layers):
                if not bool(states[layer].isfinite().all()):
                    raise FloatingPointError(f"hidden states of layer {number} are NaN or infinite")
        # One copy of the batch, and no tensor of inference mode: whose they are may change them.
        yield torch.stack([states[layer][0] for layer in layers], 2)
