"""Fine-tuning with rows that are not the task's: refusals, or ordinary answers as the control."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from ssah.data import Encoded, encoded_rows
from ssah.methods.drawing import random_numbers
from ssah.methods.inputs import Inputs
from ssah.methods.outcomes import Procedure, RowOrder, TrainingSetup

if TYPE_CHECKING:
    from ssah.compat.trainer import TrainerCallback


def with_added_rows(
    inputs: Inputs,
    order: Callable[[list[Encoded]], RowOrder],
    callbacks: Callable[[], tuple[TrainerCallback, ...]] = tuple,
    **facts: Any,
) -> Procedure:
    """A fine-tune of the whole model in which the safety set has a part.

    The control has as many rows of the utility set, drawn at random, or all if there are fewer.

    Args:
        inputs: with both sets.
        order: given the added rows, says how they stand among those of a task.
        callbacks: gives further ones for a trainer; they are made anew for each.
        **facts: of the outcome, beside the number of rows.

    Raises:
        ValueError: a set has no row, or its batches have no labels.
    """
    refusals, ordinary = map(encoded_rows, inputs.loaders)

    def setup(rows: list[Encoded]) -> Callable[[PreTrainedModel, int], TrainingSetup]:
        return lambda model, _: TrainingSetup(
            model, None, lambda: model, order=order(rows), callbacks=callbacks()
        )

    def drawn(seed: int) -> list[Encoded]:
        return [ordinary[i] for i in random_numbers(len(refusals), len(ordinary), seed)]

    return Procedure(
        setup(refusals), lambda seed: setup(drawn(seed)), facts={"rows": len(refusals), **facts}
    )
