"""A study: train a model in several ways to equal training loss, and measure every result alike."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssah.data import DataError, Encoded, Overlong, Row, encode
from ssah.models import SMOLLM2, move, quiet, weights_hash
from ssah.storage import check_free
from ssah.studies.inputs import READING, Loading, Sources, score
from ssah.studies.measuring import Evaluation, attack_line, intact_coherence, measured_line
from ssah.studies.run import Run
from ssah.studies.steps import Steps
from ssah.studies.training.arms import Arm
from ssah.studies.training.results import BEFORE
from ssah.studies.training.settings import StudySettings
from ssah.studies.training.to_loss import Recipe, spread, train, training_loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ssah.attribution import Attribution
    from ssah.evaluation import Coherence

__all__ = ["Study", "open_study"]

MODELS = "models"  # folder of a run


@dataclass(frozen=True)
class Study:
    """A study that is under way.

    Attributes:
        steps: of the run.
        loading: of the model that every arm starts from.
        settings: of the study.
        tokenizer: the model's.
        pools: encoded rows to train on, as ``ssah.studies.training.to_loss.train`` takes them.
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
        model, _ = self.loading(self.dtype)
        return intact_coherence(self.steps, model, self.tokenizer, self.evaluation.batch_size)

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
            return self.evaluation.attack(self.steps, f"attack-{key}", model, self.coherent)

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
    check_free(out)
    model, tokenizer = loading("auto")
    pools = [
        _encoded(rows, tokenizer, settings.train_max_length, loading.reading.overlong, role)
        for role, rows in trained.items()
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
        overlong=loading.reading.overlong,
    )
    run = Run(
        out,
        kind,
        {**loading.settings(), "weights": weights_hash(model), **asdict(settings)},
        sources.record,
    )
    with Steps(run, 8 + 3 * arms * len(settings.seeds)) as steps:
        dtype, bf16 = loading.precision(steps, model.device, settings.bf16)
        scores = score(
            steps,
            move(model, getattr(torch, dtype)),
            tokenizer,
            scored,
            tokens=settings.tokens,
            batch_size=settings.eval_batch_size,
            max_length=settings.max_length,
            overlong=loading.reading.overlong,
        )
        del model
        # The tokenizer above has the template that was chosen; that of a copy is not used.
        base = replace(_quick_to_load(loading, steps), reading=READING)
        yield Study(steps, base, settings, tokenizer, pools, evaluation, scores, dtype, bf16, keep)
        if base.name != loading.name:
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
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    overlong: Overlong,
    role: str,
) -> list[Encoded]:
    """Rows to train on."""
    examples = list(encode(rows, tokenizer, max_length=max_length, overlong=overlong))
    if not examples:
        raise DataError(f"{role}: every prompt has {max_length} tokens or more")
    return examples


def _training_line(found: Mapping[str, Any]) -> str:
    short = "" if found["reached"] in (True, None) else ", target not reached"
    return f"{found['steps']} updates, training loss {found['loss']:.3f}{short}"
