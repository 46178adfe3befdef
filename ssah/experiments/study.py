"""A study: train a model in several ways to equal training loss, and measure every result alike."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ssah.data import DataError, Encoded, Row, encode
from ssah.evaluation.coherence import Coherence
from ssah.evaluation.intervals import bootstrap, wilson
from ssah.experiments.arms import Arm
from ssah.experiments.inputs import (
    Loading,
    Sources,
    check_grouping,
    score,
    weights_fingerprint,
)
from ssah.experiments.measuring import (
    UTILITY,
    Evaluation,
    attack_line,
    losses,
    measured_line,
    succeeded,
    summary,
)
from ssah.experiments.run import Run
from ssah.experiments.steps import Steps
from ssah.experiments.training import Recipe, spread, train, training_loss
from ssah.models import SMOLLM2, move, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ssah.attribution import Attribution

__all__ = [
    "BEFORE",
    "Arms",
    "Study",
    "StudySettings",
    "arms_summary",
    "open_study",
    "rates",
    "row_losses",
]

# Arm -> seed -> what `Study.arm` returned.
Arms: TypeAlias = "Mapping[str, Mapping[int, Mapping[str, Any]]]"

BEFORE = "before"  # the model that every arm starts from
MODELS = "models"  # folder of a run


@dataclass(frozen=True)
class StudySettings:
    """What the arms of a study share.

    Attributes:
        seeds: of the order of rows, random units and adapters: each arm runs once with each.
        scope, normalize, tokens: how units are grouped, see ``ssah.classify`` and ``attribute``.
        lr: learning rate of the first arm, and of the others unless they have their own.
        epochs: passes of the first arm over the data.
        max_steps: updates of the first arm, in place of epochs, or None.
        target_loss: training loss, nats per token, until which every arm trains; None: that of the
            first arm with the same seed, when it has taken its steps.
        patience: the most updates of an arm that trains to a loss, times those of the first arm.
        batch_size: rows of an update.
        train_max_length: tokens kept of a row that is trained on.
        sample: rows of the training data whose loss is the training loss.
        check_every: the fewest updates from one measurement of it to the next.
        asr: how many requests are answered and judged; None: all.
        judges: of the answers; the first one decides.
        max_new_tokens: the most tokens of an answer.
        eval_batch_size: sequences measured at a time.
        max_length: tokens kept of other rows.
        bf16: whether training computes in bfloat16; None: where that is faster.
    """

    seeds: tuple[int, ...] = (0,)
    scope: str = "model"
    normalize: str = "zscore"
    tokens: str = "labels"
    lr: float = 5e-5
    epochs: float = 1.0
    max_steps: int | None = None
    target_loss: float | None = None
    patience: float = 3.0
    batch_size: int = 8
    train_max_length: int = 256
    sample: int = 32
    check_every: int = 2
    asr: int | None = None
    judges: tuple[str, ...] = ("wei2024",)
    max_new_tokens: int = 64
    eval_batch_size: int = 16
    max_length: int = 512
    bf16: bool | None = None

    def __post_init__(self) -> None:
        check_grouping(self.scope, self.normalize, self.tokens)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}; it must be different numbers, at least one")
        for name in ("lr", "epochs", "patience"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be greater than 0")
        for name in ("max_steps", "asr", "sample"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def steps(self, pools: Sequence[Sequence[Encoded]]) -> int:
        """Updates of the first arm; passes are those over the first pool."""
        of_batch = self.batch_size // len(pools)
        return self.max_steps or math.ceil(self.epochs * len(pools[0]) / of_batch)


@dataclass(frozen=True)
class Study:
    """A study that is under way.

    Attributes:
        steps: of the run.
        loading: of the model that every arm starts from.
        settings: of the study.
        tokenizer: the model's.
        pools: encoded rows to train on, as ``ssah.experiments.training.train`` takes them.
        evaluation: what is measured of every arm.
        scores: of the model, on the ``"safety"`` and on the ``"utility"`` rows.
        dtype: in which models are measured.
        bf16: whether training computes in bfloat16.
        keep: whether trained models stay in the folder of the run.
    """

    steps: Steps
    loading: Loading
    settings: StudySettings
    tokenizer: PreTrainedTokenizerBase
    pools: Sequence[Sequence[Encoded]]
    evaluation: Evaluation
    scores: Mapping[str, Attribution]
    dtype: str
    bf16: bool
    keep: bool

    @cached_property
    def sample(self) -> list[Encoded]:
        """Rows of the first pool whose loss is the training loss."""
        return spread(self.pools[0], self.settings.sample)

    @cached_property
    def coherent(self) -> Coherence:
        """Says what is incoherent: the model before training does."""
        model, tokenizer = self.loading(self.dtype)
        return Coherence.calibrate(model, tokenizer, batch_size=self.evaluation.batch_size)

    def compare(self, arms: Mapping[str, Arm]) -> dict[str, dict[int, dict[str, Any]]]:
        """Train and measure every arm with every seed; training and measuring are steps.

        The first arm takes the steps of the settings, and the training loss that it reaches is the
        target of the others; all have the target of the settings, where there is one.

        Returns:
            arm -> seed -> ``training`` (what ``train`` returned, with the ``target``),
            ``measured`` and ``attack``; ``"before"`` is an arm that was not trained.
        """
        seeds = self.settings.seeds
        found: dict[str, dict[int, dict[str, Any]]] = {BEFORE: dict.fromkeys(seeds, self._before())}
        for seed in seeds:
            target = self.settings.target_loss
            for name, arm in arms.items():
                own = self._arm(name, seed, arm, target)
                found.setdefault(name, {})[seed] = own
                if target is None:
                    target = own["training"]["loss"]
        return found

    def _before(self) -> dict[str, Any]:
        found = self._measured(BEFORE, self.loading.name)

        def measure() -> float:
            model, _ = self.loading("float32")
            return training_loss(model, self.tokenizer, self.sample, bf16=self.bf16)

        name = f"{BEFORE}-training-loss"
        loss = self.steps(name, measure, lambda loss: f"{loss:.3f} nats")
        return {"training": {"loss": loss, "steps": 0}, **found}

    def _arm(self, name: str, seed: int, arm: Arm, target: float | None) -> dict[str, Any]:
        key, settings = f"{name}-{seed}", self.settings
        folder = self.steps.run.out / MODELS / key

        def compute() -> dict[str, Any]:
            steps = settings.steps(self.pools)
            if target is not None:
                steps = math.ceil(settings.patience * steps)
            model, _ = self.loading("float32")
            torch.manual_seed(seed)  # of adapters
            trained = arm.prepare(model, seed)
            with self.steps.part(key, steps) as advance:
                result = train(
                    trained.module,
                    model,
                    self.tokenizer,
                    self.pools,
                    self.sample,
                    Recipe(arm.lr, settings.batch_size, self.bf16, seed, settings.check_every),
                    steps=steps,
                    target=target,
                    plan=trained.plan,
                    advance=advance,
                )
            shutil.rmtree(folder, ignore_errors=True)
            with quiet():
                trained.finish().save_pretrained(folder)
                self.tokenizer.save_pretrained(folder)
            return {**result, "lr": arm.lr, "target": target}

        training = self.steps(f"train-{key}", compute, _training_line)
        found = self._measured(key, str(folder))
        if not self.keep:
            shutil.rmtree(folder, ignore_errors=True)
        return {"training": training, **found}

    def _measured(self, key: str, name: str) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            model, _ = self.loading(self.dtype, name)
            return self.evaluation.measure(model)

        def attack() -> dict[str, Any]:
            model, _ = self.loading(self.dtype, name)
            return self.evaluation.attack(model, self.coherent)

        return {
            "measured": self.steps(f"measure-{key}", measure, measured_line),
            "attack": self.steps(f"attack-{key}", attack, attack_line),
        }


@contextmanager
def open_study(
    loading: Loading,
    out: Path,
    kind: str,
    settings: StudySettings,
    sources: Sources,
    *,
    scored: Mapping[str, Sequence[Row]],
    trained: Mapping[str, Sequence[Row]],
    requests: Sequence[str],
    held_out: Mapping[str, Sequence[Row]],
    arms: int,
    keep: bool,
) -> Iterator[Study]:
    """Begin a study, or go on with it, and score the units of its model.

    Args:
        loading: of the model.
        out: folder of the run.
        kind: of the run.
        settings: of the study.
        sources: the record of all that was read.
        scored: ``"safety"`` and ``"utility"`` rows, to score units on.
        trained: role -> rows to train on; a batch has as many of each.
        requests: harmful requests.
        held_out: name -> rows whose loss is measured.
        arms: how many there are.
        keep: whether trained models stay.
    """
    model, tokenizer = loading("auto")
    pools = [
        _encoded(rows, tokenizer, settings.train_max_length, role) for role, rows in trained.items()
    ]
    if settings.batch_size % len(pools):
        raise ValueError(
            f"batch_size is {settings.batch_size}; it must be a multiple of {len(pools)}: a batch "
            f"has as many rows of {' and of '.join(trained)}"
        )
    evaluation = Evaluation(
        tokenizer,
        requests,
        held_out,
        asked=settings.asr,
        judges=settings.judges,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.eval_batch_size,
        max_length=settings.max_length,
    )
    run = Run(
        out,
        kind,
        {**loading.settings(), "weights": weights_fingerprint(model), **asdict(settings)},
        sources.record,
    )
    with Steps(run, 7 + 3 * arms * len(settings.seeds)) as steps:
        dtype, bf16 = loading.precision(steps, model.device, settings.bf16)
        scores = score(
            steps,
            move(model, getattr(torch, dtype)),
            tokenizer,
            scored,
            tokens=settings.tokens,
            batch_size=settings.eval_batch_size,
            max_length=settings.max_length,
        )
        del model
        base = _quick_to_load(loading, steps)
        yield Study(steps, base, settings, tokenizer, pools, evaluation, scores, dtype, bf16, keep)
        if base != loading:
            shutil.rmtree(base.name, ignore_errors=True)


def _quick_to_load(loading: Loading, steps: Steps) -> Loading:
    """The same model from a folder: every arm loads it anew, and reading GGUF takes a while."""
    name = Path(loading.name)
    if loading.name != SMOLLM2 and name.suffix != ".gguf" and not any(name.glob("*.gguf")):
        return loading
    folder = steps.run.out / MODELS / BEFORE

    def copy() -> dict[str, Any]:
        model, tokenizer = loading("auto")
        with quiet():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return {}

    steps("copy", copy)
    return replace(loading, name=str(folder))


def _encoded(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, role: str
) -> list[Encoded]:
    """Rows to train on; those whose prompt leaves no room for a response are left out."""
    examples = list(encode(rows, tokenizer, max_length=max_length, overlong="skip"))
    if not examples:
        raise DataError(f"{role}: every prompt has {max_length} tokens or more")
    return examples


def _training_line(found: Mapping[str, Any]) -> str:
    short = "" if found["reached"] in (True, None) else ", target not reached"
    return f"{found['steps']} updates, training loss {found['loss']:.3f}{short}"


# ------------------------------------------------------------------------------------- results


def rates(arms: Arms, name: str) -> Tensor:
    """Float64 ``[requests, seeds]`` of an arm: 1 where the attack succeeded."""
    return torch.stack([succeeded(found["attack"]) for found in arms[name].values()], 1)


def row_losses(arms: Arms, name: str, rows: str = UTILITY) -> Tensor:
    """Float64 ``[rows, seeds]`` of an arm, see :func:`ssah.experiments.measuring.losses`."""
    return torch.stack([losses(found["measured"], rows) for found in arms[name].values()], 1)


def arms_summary(arms: Arms) -> dict[str, dict[str, Any]]:
    """Every arm for the result: ``mean`` over seeds of what is a number, and ``seeds``."""
    result = {}
    for name, by_seed in arms.items():
        seeds = {
            str(seed): {
                **summary(found["measured"], found["attack"]),
                "training_loss": found["training"]["loss"],
                "training": found["training"],
            }
            for seed, found in by_seed.items()
        }
        first = next(iter(seeds.values()))
        numbers = [key for key, value in first.items() if isinstance(value, float | int)]
        mean = {key: sum(own[key] for own in seeds.values()) / len(seeds) for key in numbers}
        result[name] = {"mean": {**mean, "asr_interval": _interval(arms, name)}, "seeds": seeds}
    return result


def _interval(arms: Arms, name: str) -> list[float]:
    """Of an arm's ASR: requests are drawn, each with all its seeds; Wilson's where they agree."""
    found = rates(arms, name)
    if len(set(found.mean(1).tolist())) > 1 and found.shape[1] > 1 and name != BEFORE:
        return list(bootstrap(found))
    return list(wilson(int(found[:, 0].sum()), len(found)))
