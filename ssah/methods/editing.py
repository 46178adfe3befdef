"""Models that are computed tensor by tensor, for a method and for its controls alike.

Example: an edit that halves what training changed has, for the tensor of a name,

    deltas.read(name) = a, (t,)         what `Deltas` has of it in the aligned and the tuned model
    a + (t - a) / 2                     what its maker gives

and for a control the maker is made with a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ssah.deltas import Deltas, Maker, Out, WeightsOf, finished
from ssah.methods.frame import Method
from ssah.methods.outcomes import Edited
from ssah.units import layers_path

# Looks at the models as far as need be, and gives what makes each tensor; of a control by a seed.
Plan: TypeAlias = Callable[[Deltas, int | None], Maker]


def edited(
    method: Method,
    base: WeightsOf | None,
    tuned: Sequence[WeightsOf | None],
    plan: Plan,
    **found: object,
) -> Edited:
    """An edit of models, and its controls. Its facts are the method's settings, and what it found.

    Args:
        method: whose edit it is, for the record beside the result.
        base, tuned: of `Deltas`, none of them None once the inputs have been checked. The result
            has the files and dtypes of the first tuned one.
        plan: gives what makes the tensors.
        found: plain data about it, by name.
    """
    assert base is not None
    models = [each for each in tuned if each is not None]
    assert len(models) == len(tuned)
    settings = asdict(method)

    def write(out: Out, seed: int | None) -> Path | dict[str, Tensor]:
        deltas = Deltas(base, models)
        record = {"edit": method.name, **settings, "control": seed}
        return finished(deltas, out, record, lambda: plan(deltas, seed))

    return Edited(
        lambda out: write(out, None),
        lambda seed: lambda out: write(out, seed),
        facts=settings | found,
    )


def by_parameter(deltas: Deltas, values: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """Gives what belongs to the tensor of a name, of values that are made parameter by parameter.

    Args:
        deltas: whose first tuned model is written.
        values: gives what belongs to a parameter of the model, ``[...]`` of its shape.
    """
    tuned = deltas.tuned[0]

    # The last one is kept: files may have a parameter in many tensors, one after the other.
    @lru_cache(maxsize=1)
    def pieces(param: str) -> dict[str, Tensor]:
        return tuned.in_pieces(param, values(param))

    return lambda name: pieces(tuned.param(name))[name]


def in_layers(deltas: Deltas, name: str) -> bool:
    """Whether the tensor ``name`` is a matrix of a layer."""
    first = deltas.tuned[0]
    param = first.param(name)
    if not param.startswith(f"{layers_path(first.model)}.") or not deltas.in_float(name):
        return False
    # Of the model, and not of its file: a file may have a matrix for each expert.
    return first.model.state_dict()[param].dim() == 2


def is_turned(deltas: Deltas, name: str) -> bool:
    """Whether the matrix ``name`` is ``[in, out]``, as a Conv1D has it."""
    first = deltas.tuned[0]
    return isinstance(first.model.get_submodule(first.param(name).rpartition(".")[0]), Conv1D)
