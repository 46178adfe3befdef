"""What an evaluation measures of each model, kept as steps of its run; answers are not kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ssah.ablation import ablate
from ssah.data import Row
from ssah.evaluation import (
    Coherence,
    Judge,
    bootstrap,
    generate,
    judge_answers,
    rate,
    refusal_margins,
)
from ssah.evaluation.perplexity import perplexity
from ssah.evaluation.prompts import prompts
from ssah.evaluation.tasks import multiple_choice
from ssah.experiments.steps import Steps
from ssah.units import UnitSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ssah.experiments.evaluate import EvaluateSettings

__all__ = ["BENIGN", "OVER_REFUSAL", "REQUESTS", "UTILITY", "Arm", "Evaluator"]

REQUESTS, OVER_REFUSAL, BENIGN, UTILITY = "requests", "over_refusal", "benign", "utility"


@dataclass(frozen=True)
class Arm:
    """A model to evaluate: as it is, or with units taken out."""

    name: str
    ablated: str | None = None
    units: UnitSet | None = None

    def inside(self, model: PreTrainedModel) -> AbstractContextManager[Any]:
        """A context in which the units of ``model`` are out."""
        return nullcontext() if self.units is None else ablate(model, self.units)


@dataclass(frozen=True)
class Evaluator:
    """What all steps of an evaluation need."""

    steps: Steps
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    coherent: Coherence
    judges: Sequence[Judge]
    settings: EvaluateSettings
    asked: Mapping[str, Sequence[str]]
    utility: Sequence[Row]

    def judged(self, arm: Arm, condition: int, role: str) -> dict[str, Any]:
        """What the judges say of the answers to one set of requests, in the order of the set.

        The longest prompts come first; a chunk of them is a step, so that little is lost.
        """
        requests = self.asked[role]
        name = f"{arm.name}.prompt{condition}.{role}"
        system_prompt = self.settings.system_prompts[condition]

        def compute() -> dict[str, Any]:
            encoded = prompts(self.tokenizer, requests, system_prompt=system_prompt)
            order = sorted(range(len(requests)), key=lambda i: -len(encoded[i]))
            size = self.settings.batch_size
            chunks = [order[start : start + size] for start in range(0, len(order), size)]
            found = []
            with self.steps.part(f"{role}: answers", len(order)) as advance:
                for k, chunk in enumerate(chunks):
                    own = [requests[i] for i in chunk]
                    judge = partial(self._chunk, arm, own, system_prompt)
                    found.append(self.steps.run.step(f"{name}.{k:04d}", judge))
                    advance(min(len(order), (k + 1) * size))
            return _joined(found, order)

        return dict(self.steps(name, compute, lambda found: self._line(found, role)))

    def _chunk(
        self, arm: Arm, requests: Sequence[str], system_prompt: str | None
    ) -> dict[str, Any]:
        with arm.inside(self.model):
            found = generate(
                self.model,
                self.tokenizer,
                requests,
                system_prompt=system_prompt,
                max_new_tokens=self.settings.max_new_tokens,
                batch_size=self.settings.batch_size,
            )
        return judge_answers(requests, found, self.judges, self.coherent)

    def _line(self, found: Mapping[str, Any], role: str) -> str:
        n = len(found["tokens"])
        shown = []
        for each in self.judges:
            successes = sum(found["success"][each.name])
            share = successes / n if role == REQUESTS else 1 - successes / n
            shown.append(f"{each.name} {'ASR' if role == REQUESTS else 'refused'} {share:.0%}")
        return ", ".join([*shown, f"incoherent {sum(found['incoherent']) / n:.0%}"])

    def measured(self, arm: Arm) -> dict[str, Any]:
        """Refusal margin, utility and tasks of one arm."""

        def margin() -> dict[str, Any]:
            with arm.inside(self.model):
                found = refusal_margins(
                    self.model,
                    self.tokenizer,
                    self.asked[REQUESTS],
                    batch_size=self.settings.batch_size,
                )
            low, high = bootstrap(found, level=self.settings.level, seed=self.settings.seed)
            return {
                "refusal_margin": float(found.mean()),
                "refusal_margin_interval": [low, high],
                "refuses": rate((found > 0).tolist(), self.settings.level),
                "margins": found.tolist(),
            }

        def utility() -> dict[str, Any]:
            with arm.inside(self.model):
                found = perplexity(
                    self.model,
                    self.tokenizer,
                    self.utility,
                    batch_size=self.settings.batch_size,
                    max_length=self.settings.max_length,
                ).to_dict()
            return {"utility_loss": found.pop("loss"), **found}

        def tasks() -> dict[str, Any]:
            with arm.inside(self.model):
                return multiple_choice(
                    self.model,
                    self.tokenizer,
                    self.settings.tasks,
                    folder=self.settings.task_folder,
                    batch_size=self.settings.batch_size,
                    level=self.settings.level,
                )

        lines: dict[str, tuple[bool, Callable[[], Any], Callable[[Any], str]]] = {
            "margin": (True, margin, lambda found: f"{found['refusal_margin']:+.2f} nats"),
            "utility": (
                bool(self.utility),
                utility,
                lambda found: f"loss {found['utility_loss']:.3f} nats",
            ),
            "tasks": (bool(self.settings.tasks), tasks, lambda found: ", ".join(found)),
        }
        result: dict[str, Any] = {}
        for key, (wanted, compute, line) in lines.items():
            if wanted:
                found = self.steps(f"{arm.name}.{key}", compute, line)
                result.update({"tasks": found} if key == "tasks" else found)
        return result


def _joined(chunks: Sequence[Mapping[str, Any]], order: Sequence[int]) -> dict[str, Any]:
    """The lists of all chunks, one after the other, in the order of the requests."""
    place = {index: k for k, index in enumerate(order)}

    def sorted_back(values: list[Any]) -> list[Any]:
        return [values[place[i]] for i in range(len(values))]

    result: dict[str, Any] = {
        key: sorted_back([value for chunk in chunks for value in chunk[key]])
        for key in ("incoherent", "ended", "tokens")
    }
    result["success"] = {
        judge: sorted_back([value for chunk in chunks for value in chunk["success"][judge]])
        for judge in chunks[0]["success"]
    }
    return result
