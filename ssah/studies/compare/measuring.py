"""What is measured of every model of a comparison, the same way, with its time and its memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ssah.evaluation import divergences, refused_requests
from ssah.studies.measured_values import attack_line, losses_of
from ssah.studies.paired_measures import UTILITY, Evaluation

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ssah.evaluation import Coherence
    from ssah.selections import Selection
    from ssah.units import UnitSet

TASK = "task"
# proc(5): 5 written to clear_refs sets the peak of the process back, which status has.
_RESET, _STATUS, _PEAK = Path("/proc/self/clear_refs"), Path("/proc/self/status"), "5"

# Makes a model for a while, with what there is to say of how: seconds, share of changed weights.
Made: TypeAlias = "Callable[[], AbstractContextManager[tuple[PreTrainedModel, dict[str, Any]]]]"


def measure(
    keys: Sequence[str],
    made: Made,
    evaluation: Evaluation,
    over_refusal: Sequence[str],
    coherent: Coherence,
    *,
    selections: Sequence[UnitSet | Selection | None] = (None,),
) -> list[dict[str, Any]]:
    """Measure one model, or one without each of several parts: these answer in the same batches.

    Args:
        keys: of each selection; what is answered are steps of the study, named after it.
        made: makes the model.
        evaluation: harmful requests, and rows for the losses.
        over_refusal: harmless requests.
        coherent: says what is incoherent; its model is the intact one.
        selections: what is out of the model; None: nothing.

    Returns:
        of each selection ``measured``, ``attack`` (as of `Evaluation`), ``refused`` (0 or 1 a
        harmless request, by the first judge), ``kl`` (nats, mean over positions of the utility
        rows), and ``made``: what there is to say of how the model was made.
    """
    with made() as (model, told):
        loader = evaluation.loaders[UTILITY]
        distances = divergences(model, loader, selections, intact=coherent.model)
        # The same pass has found the losses of these rows.
        measured = [
            evaluation.measure(model, out, known={UTILITY: losses_of(own.log_prob, own.tokens)})
            for out, own in zip(selections, distances, strict=True)
        ]
        names = [f"attack-{key}" for key in keys]
        attacks = evaluation.attacks(names, model, coherent, selections)
        names = [f"harmless-{key}" for key in keys]
        harmless = evaluation.judged(names, model, coherent, over_refusal, selections=selections)
    return [
        {
            "measured": own,
            "attack": attack,
            "refused": refused_requests(answers),
            "kl": float(kl.per_row.mean()),
            "made": told,
        }
        for own, attack, answers, kl in zip(measured, attacks, harmless, distances, strict=True)
    ]


def calibrate(
    key: str, made: Made, evaluation: Evaluation, coherent: Coherence
) -> dict[str, float]:
    """ASR (a fraction), task loss and utility loss (nats) by which a strength is chosen."""
    with made() as (model, _):
        losses = evaluation.losses(model)
        (attack,) = evaluation.attacks([f"calibrate-attack-{key}"], model, coherent)
    first = next(iter(attack["judges"].values()))
    return {
        "asr": first["asr"]["rate"],
        "task_loss": losses[TASK]["loss"],
        "utility_loss": losses[UTILITY]["loss"],
    }


def measured_in_short(found: Mapping[str, Any]) -> str:
    """In a line."""
    losses = (f"{name} {own['loss']:.3f}" for name, own in found["measured"]["losses"].items())
    harmless = sum(found["refused"]) / len(found["refused"])
    return (
        f"{attack_line(found['attack'])}, refuses {harmless:.0%} of harmless, {', '.join(losses)}"
    )


@contextmanager
def peak_memory() -> Iterator[Callable[[], int | None]]:
    """Yields what gives the most memory held since, bytes: of the GPU, or of the process.

    None where this system cannot tell: only Linux sets the peak of a process back.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield torch.cuda.max_memory_allocated
    elif _RESET.exists():
        _RESET.write_text(_PEAK)
        yield _process_peak
    else:
        yield lambda: None


def _process_peak() -> int:
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])  # VmHWM:  123456 kB


def pass_seconds(
    model: PreTrainedModel, input_ids: Tensor, n: int = 3, *, most: tuple[int, int] = (4, 64)
) -> tuple[float, int]:
    """The least time of ``n`` passes over the first rows and tokens of ``input_ids``.

    Args:
        model: runs.
        input_ids: ``[rows, tokens]``; padding counts as any token.
        n: passes.
        most: rows and tokens: more would take long, and say no more.

    Returns:
        Seconds, and the tokens of a pass.
    """
    ids = input_ids[: most[0], : most[1]].to(model.device)
    took = []
    with torch.inference_mode():
        for _ in range(n):
            start = time.perf_counter()
            model(input_ids=ids).logits[0, 0, 0].item()  # waits for a GPU
            took.append(time.perf_counter() - start)
    return min(took), ids.numel()
