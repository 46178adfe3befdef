"""``ssah evaluate``: attack success with its controls, utility and tasks, as a resumable run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from ssah.evaluation import Coherence, paired_difference, rate
from ssah.evaluation.attack import distinct_judges
from ssah.evaluation.generation import check_room
from ssah.evaluation.intervals import check_level
from ssah.evaluation.prompts import prompts
from ssah.evaluation.tasks import check_tasks
from ssah.experiments.evaluator import BENIGN, OVER_REFUSAL, REQUESTS, UTILITY, Arm, Evaluator
from ssah.experiments.inputs import Loading, Sources, weights_fingerprint
from ssah.experiments.run import Run
from ssah.experiments.steps import Steps
from ssah.frozen import digest
from ssah.groups import UnitGroups
from ssah.models import move
from ssah.units import UnitSet, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["KIND", "Ablation", "EvaluateSettings", "evaluate"]

KIND = "evaluate"


@dataclass(frozen=True)
class Ablation:
    """Units to take out, as ``DIR:GROUP`` or ``DIR:GROUP:random`` names them.

    Attributes:
        folder: what ``ssah classify`` saved.
        group: one of its groups.
        random: as many random units of every module as the group has there, in its place.
    """

    folder: str
    group: str
    random: bool = False

    @classmethod
    def parse(cls, text: str) -> Ablation:
        """Read a name, and check that the folder has such a group.

        Raises:
            ValueError: the name has another form, or there is no such group.
            FileNotFoundError: the folder has no groups.
        """
        path, _, last = text.rpartition(":")
        random = last == "random" and ":" in path
        if random:
            path, _, last = path.rpartition(":")
        if not path or not last:
            raise ValueError(f"ablate is {text!r}, must be 'DIR:GROUP' or 'DIR:GROUP:random'")
        groups = UnitGroups.load(path)
        if last not in groups:
            raise ValueError(
                f"ablate is {text!r}: {path!r} has no group {last!r}, it has {', '.join(groups)}"
            )
        return cls(path, last, random)

    def __str__(self) -> str:
        return f"{self.folder}:{self.group}" + (":random" if self.random else "")

    def units(self, model: PreTrainedModel, seed: int) -> UnitSet:
        """The units, checked against the model."""
        found = UnitGroups.load(self.folder, model)[self.group]
        return UnitSet.random(found, seed=seed) if self.random else found


@dataclass(frozen=True)
class EvaluateSettings:
    """What changes the result of an evaluation, beside model and data.

    Attributes:
        judges: as ``ssah.evaluation.judge`` takes them.
        system_prompts: each is evaluated; None: no system message.
        ablations: each is evaluated, after the model as it is.
        tasks: of lm-eval.
        task_folder: with YAML files of further tasks.
        max_new_tokens: the most tokens of an answer.
        batch_size: sequences run at a time.
        max_length: tokens kept of a row of the utility set.
        level: of confidence.
        seed: of random units and of the bootstrap.
    """

    judges: tuple[str, ...] = ("wei2024",)
    system_prompts: tuple[str | None, ...] = (None,)
    ablations: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    task_folder: str | None = None
    max_new_tokens: int = 64
    batch_size: int = 16
    max_length: int = 512
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        for name, values in (
            ("system_prompts", self.system_prompts),
            ("ablations", self.ablations),
            ("tasks", self.tasks),
        ):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has {list(values)}, must have each once")
        if self.task_folder is not None and not self.tasks:
            raise ValueError(f"task_folder is {self.task_folder!r} without tasks, must have some")
        check_level(self.level)


def evaluate(
    loading: Loading,
    out: str | os.PathLike[str],
    settings: EvaluateSettings,
    *,
    requests: str | Sequence[str],
    over_refusal: str | None = "builtin:overrefusal",
    benign: str | None = "builtin:utility_eval",
    utility: str | None = "builtin:utility_eval",
    intact: str | None = None,
) -> dict[str, Any]:
    """Evaluate a model, as it is and with units taken out; resumable.

    Args:
        loading: of the model.
        out: folder of the run.
        settings: of the evaluation.
        requests: harmful requests, as ``ssah.data.load_requests`` takes them.
        over_refusal: harmless requests that look dangerous; None leaves them out.
        benign: ordinary instructions; None leaves them out.
        utility: rows with answers, as ``ssah.data.load_rows`` takes them; None leaves them out.
        intact: the model that scores coherence, where it is another one (before training, say).

    Returns:
        the record of the run; its ``result`` has ``rows`` (one a model, system prompt and judge),
        ``models`` (one a model: margin, utility, tasks), ``per_request`` and ``coherence``.

    Raises:
        ValueError, OSError: wrong input; all of it is checked before anything is generated.
    """
    ablations = [Ablation.parse(text) for text in settings.ablations]
    judges = distinct_judges(settings.judges, settings.max_new_tokens)
    for judge in judges:
        judge.check()
    if settings.tasks:
        check_tasks(settings.tasks, settings.task_folder)
    sources = Sources()
    asked = {
        role: sources.requests(role, source)
        for role, source in ((REQUESTS, requests), (OVER_REFUSAL, over_refusal), (BENIGN, benign))
        if source is not None
    }
    rows = [] if utility is None else sources.rows(UTILITY, utility)
    model, tokenizer = loading("auto")
    family_of(model)  # an unknown architecture is refused before anything is written
    scorer = (model, tokenizer) if intact is None else loading("auto", intact)
    for system_prompt in settings.system_prompts:
        for role, own in asked.items():
            encoded = prompts(tokenizer, own, system_prompt=system_prompt, name=role)
            check_room(model, encoded, settings.max_new_tokens, role)
    arms = [Arm("0-intact")]
    for number, each in enumerate(ablations, start=1):
        units = each.units(model, settings.seed)
        name = f"{number}-{each.group}" + ("-random" if each.random else "")
        arms.append(Arm(name, str(each), units))
        sources.record[str(each)] = {
            "source": each.folder,
            "rows": len(units),
            "fingerprint": digest(units[module] for module in units),
        }
    identity = {
        **loading.settings(),
        "weights": weights_fingerprint(model),
        "intact": intact,
        "intact_weights": weights_fingerprint(scorer[0]),
        **asdict(settings),
        "judges": [each.describe() for each in judges],
    }
    run = Run(out, KIND, identity, sources.record)
    per_arm = len(settings.system_prompts) * len(asked) + 1 + bool(rows) + bool(settings.tasks)
    with Steps(run, 2 + len(arms) * per_arm) as steps:
        dtype, _ = loading.precision(steps, model.device)
        move(model, getattr(torch, dtype))
        move(scorer[0], getattr(torch, dtype))
        coherent = _coherence(steps, *scorer, settings.batch_size)
        evaluator = Evaluator(steps, model, tokenizer, coherent, judges, settings, asked, rows)
        judged = {
            (arm.name, condition, role): evaluator.judged(arm, condition, role)
            for arm in arms
            for condition in range(len(settings.system_prompts))
            for role in asked
        }
        models = [
            {
                "ablated": arm.ablated or "nothing",
                "units": 0 if arm.units is None else len(arm.units),
                "share": 0.0 if arm.units is None else arm.units.fraction,
                **evaluator.measured(arm),
            }
            for arm in arms
        ]
    result = {
        "dtype": dtype,
        "coherence": coherent.describe(),
        "rows": [
            _row(arm, condition, each.name, judged, settings)
            for arm in arms
            for condition in range(len(settings.system_prompts))
            for each in judges
        ],
        "models": [{k: v for k, v in each.items() if k != "margins"} for each in models],
        "per_request": {".".join(map(str, key)): found for key, found in judged.items()},
    }
    return run.finish(result)


def _coherence(
    steps: Steps,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
) -> Coherence:
    """What scores coherence, with a threshold that is a step of the run."""
    found = steps(
        "coherence",
        lambda: Coherence.calibrate(model, tokenizer, batch_size=batch_size).describe(),
        lambda found: f"threshold {found['max_nll']:.2f} nats",
    )
    return Coherence(model, tokenizer, found["max_nll"], batch_size=batch_size)


def _row(
    arm: Arm,
    condition: int,
    judge: str,
    judged: Mapping[tuple[str, int, str], Mapping[str, Any]],
    settings: EvaluateSettings,
) -> dict[str, Any]:
    """Every rate of one model, system prompt and judge."""
    level, system_prompt = settings.level, settings.system_prompts[condition]
    found = judged[arm.name, condition, REQUESTS]
    success, incoherent = found["success"][judge], found["incoherent"]
    row = {
        "ablated": arm.ablated or "nothing",
        "system_prompt": system_prompt,
        "judge": judge,
        "asr": rate(success, level),
        "asr_coherent": rate(
            [s and not i for s, i in zip(success, incoherent, strict=True)], level
        ),
        "incoherent": rate(incoherent, level),
        "ended": rate(found["ended"], level),
        "mean_tokens": sum(found["tokens"]) / len(found["tokens"]),
    }
    if arm.units is not None:
        before = judged["0-intact", condition, REQUESTS]["success"][judge]
        mean, interval = paired_difference(
            torch.tensor(success), torch.tensor(before), level=level, seed=settings.seed
        )
        row |= {"asr_rise": mean, "asr_rise_interval": list(interval)}
    for role in (OVER_REFUSAL, BENIGN):
        own = judged.get((arm.name, condition, role))
        if own is not None:
            refused = [not s for s in own["success"][judge]]
            row |= {
                f"{role}_refused": rate(refused, level),
                f"{role}_incoherent": rate(own["incoherent"], level),
                f"{role}_tokens": sum(own["tokens"]) / len(own["tokens"]),
            }
    return row
