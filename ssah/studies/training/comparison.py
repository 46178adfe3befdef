"""Training a model in several ways to equal training loss, and measuring every result alike.

The first arm takes the steps that it is given, and its training loss is the target of the others.
Arms that trained to different losses would differ in how much they learned, and a smaller loss of
safety would show no more than that less was learned.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssah.data import Row, spread
from ssah.models import SMOLLM2, quiet
from ssah.studies.loading import READING, Loading
from ssah.studies.measured_values import attack_line, measured_line
from ssah.studies.paired_measures import Evaluation, checked_judges, intact_coherence
from ssah.studies.study import Study, grouped
from ssah.studies.training.arms import Arm, freezes
from ssah.studies.training.results import BEFORE
from ssah.studies.training.settings import StudySettings, TrainingSettings
from ssah.studies.training.to_loss import Recipe, train, training_loss

if TYPE_CHECKING:
    from ssah.attribution import Attribution
    from ssah.data import Encoded
    from ssah.evaluation import Coherence
    from ssah.groups import UnitGroups
    from ssah.studies.step_bars import Steps

MODELS = "models"  # folder of a run


class Comparison(Study):
    """A study that trains. Inside `training` the units of its model are scored.

    Attributes:
        base: loads the model that every arm starts from.
        pools: encoded rows to train on, as ``ssah.studies.training.to_loss.train`` takes them.
        measured: what is measured of every arm.
        of_units: scores of the model, on the ``"safety"`` and on the ``"utility"`` rows.

    Args:
        loading, out, kind, settings: as of `Study`.
        keep: whether trained models stay in the folder of the run.

    Raises:
        ModelError: the model would be dealt to several devices, where a plan would refuse it.
    """

    settings: TrainingSettings
    base: Loading
    pools: Sequence[Sequence[Encoded]]
    measured: Evaluation
    of_units: Mapping[str, Attribution]

    def __init__(
        self, loading: Loading, out: Path, kind: str, settings: TrainingSettings, *, keep: bool
    ) -> None:
        loading.check_on_one_device("a model that trains")  # a plan would refuse it minutes later
        super().__init__(loading, out, kind, settings, batch_size=settings.eval_batch_size)
        self.keep = keep

    @contextmanager
    def training(
        self,
        *,
        scored: Mapping[str, Sequence[Row]],
        trained: Mapping[str, Sequence[Row]],
        requests: Sequence[str],
        held_out: Mapping[str, Sequence[Row]],
        arms: int,
    ) -> Iterator[None]:
        """Begin the study, or go on with it, and score the units of its model.

        Args:
            scored: ``"safety"`` and ``"utility"`` rows, to score units on.
            trained: role -> rows to train on; a batch has as many of each.
            requests: harmful requests.
            held_out: name -> rows whose loss is measured.
            arms: how many there are.

        Errors as of `read`.
        """
        self.read(trained, requests, held_out)
        # Precision, two scores, coherence, a copy and three of the model before.
        with self.copies(8 + 3 * arms * len(self.settings.seeds), scored):
            yield

    def read(
        self,
        trained: Mapping[str, Sequence[Row]],
        requests: Sequence[str],
        held_out: Mapping[str, Sequence[Row]],
    ) -> None:
        """Load the model and encode what is trained on and measured; arguments as of `training`.

        Raises:
            ValueError: a batch cannot have as many rows of each of the roles.
            Exception: a judge cannot work, as of `checked_judges`; nothing was loaded then.
        """
        settings = self.settings
        judges = checked_judges(settings)
        self.load()
        self.pools = [
            self.encoded(role, rows, settings.train_max_length) for role, rows in trained.items()
        ]
        if settings.batch_size % len(self.pools):
            raise ValueError(
                f"batch_size is {settings.batch_size}; it must be a multiple of "
                f"{len(self.pools)}: a batch has as many rows of {' and of '.join(trained)}"
            )
        self.measured = Evaluation(self, requests, held_out, asked=settings.asr, judges=judges)

    @contextmanager
    def copies(
        self, total: int, scored: Mapping[str, Sequence[Row]], **more: Any
    ) -> Iterator[Steps]:
        """Open the folder once everything was read; inside, `base` loads the model.

        Args:
            total, more: as `Study.under_way` takes them.
            scored: as of `training`; empty: no unit is scored.
        """
        with self.under_way(total, bf16=self.settings.bf16, **more) as steps:
            if scored:
                self.of_units = self.scores(scored)
            del self.model  # every arm loads a copy of its own, and two may not fit
            # The tokenizer here has the template that was chosen; that of a copy is not used.
            self.base = replace(self._quick_to_load(), reading=READING)
            yield steps
            if self.base.name != self.loading.name:
                shutil.rmtree(self.base.name, ignore_errors=True)

    def groups(self, **shares: float) -> UnitGroups:
        """The groups of these shares of all units, kept in the folder of the run."""
        assert isinstance(self.settings, StudySettings)
        groups = grouped(self.settings, self.of_units, **shares)
        groups.save(self.out / "groups")
        return groups

    @cached_property
    def sample(self) -> list[Encoded]:
        """Rows of the first pool whose loss is the training loss."""
        return spread(self.pools[0], self.settings.sample)

    @cached_property
    def coherent(self) -> Coherence:
        """Says what is incoherent: the model before training does."""
        model, _ = self.base(self.dtype)
        return intact_coherence(self, model, self.tokenizer)

    def compare(self, arms: Mapping[str, Arm]) -> dict[str, dict[int, dict[str, Any]]]:
        """Train and measure every arm with every seed; training and measuring are steps.

        The first arm takes the steps of the settings, and the training loss that it reaches is the
        target of the others; all have the target of the settings, where there is one.

        Returns:
            arm -> seed -> ``training`` (what ``train`` returned, with the ``target``),
            ``measured`` and ``attack``; ``"before"`` is an arm that was not trained.
        """
        seeds = self.settings.seeds
        # The model before training has no seed: it is measured once, and stands beside every seed.
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
        found = self._measured(BEFORE, self.base.name)

        def measure() -> float:
            model, _ = self.base("float32")
            return training_loss(model, self.tokenizer, self.sample, bf16=self.bf16)

        name = f"{BEFORE}-training-loss"
        loss = self.steps(name, measure, lambda loss: f"{loss:.3f} nats")
        return {"training": {"loss": loss, "steps": 0}, **found}

    def _arm(self, name: str, seed: int, arm: Arm, target: float | None) -> dict[str, Any]:
        key = f"{name}-{seed}"
        training, folder = self.trained(key, seed, arm, target)
        found = self._measured(key, str(folder))
        # Not before: the steps above may have to load it once more when a run goes on.
        if not self.keep:
            shutil.rmtree(folder, ignore_errors=True)
        return {"training": training, **found}

    def trained(
        self, key: str, seed: int, arm: Arm, target: float | None
    ) -> tuple[dict[str, Any], Path]:
        """Train one arm: a step. The model stays in the folder until that is removed.

        Args:
            key: of the arm and its seed.
            seed: of the order of rows, adapters and random units.
            arm: how it is trained.
            target: training loss; None: all steps of the settings are taken.

        Returns:
            what ``train`` returned, with ``lr``, ``target`` and ``verified`` (whether frozen
            weights were compared bit for bit); and the folder of the model.
        """
        folder = self.out / MODELS / key
        training = self.steps(
            f"train-{key}", lambda: self._train(key, seed, arm, target, folder), _training_line
        )
        return training, folder

    def _train(
        self, key: str, seed: int, arm: Arm, target: float | None, folder: Path
    ) -> dict[str, Any]:
        """Train one arm, and leave the model in ``folder`` until it is measured."""
        settings = self.settings
        steps = settings.steps(self.pools)
        if target is not None:
            # More than the first arm took: an arm with fewer free weights learns more slowly.
            steps = math.ceil(settings.patience * steps)
        # Small updates of bfloat16 weights round to nothing, so that all arms train in float32.
        model, _ = self.base("float32")
        setup = arm.prepare(model, seed)
        verified = freezes(setup.plan)  # `finish` raises where a frozen weight moved
        with self.steps.part(key, steps) as advance:
            result = train(
                setup,
                model,
                self.tokenizer,
                self.pools,
                self.sample,
                Recipe(arm.lr, settings.batch_size, self.bf16, seed, settings.check_every),
                steps=steps,
                target=target,
                advance=advance,
            )
        # What a call that was killed left there may be half a model.
        shutil.rmtree(folder, ignore_errors=True)
        with quiet():
            setup.finish().save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        return {**result, "lr": arm.lr, "target": target, "verified": verified, **arm.told}

    def _measured(self, key: str, name: str) -> dict[str, Any]:
        """Of the model in a folder; it is loaded only for a step that is not done yet."""

        def measure() -> dict[str, Any]:
            model, _ = self.base(self.dtype, name)
            return self.measured.measure(model)

        def attack() -> dict[str, Any]:
            model, _ = self.base(self.dtype, name)
            return self.measured.attacks([f"attack-{key}"], model, self.coherent)[0]

        return {
            "measured": self.steps(f"measure-{key}", measure, measured_line),
            "attack": self.steps(f"attack-{key}", attack, attack_line),
        }

    def _quick_to_load(self) -> Loading:
        """The same model from a folder: every arm loads it anew, and reading GGUF takes a while."""
        name = Path(self.loading.name)
        packed = name.suffix == ".gguf" or any(name.glob("*.gguf"))
        if self.loading.name != SMOLLM2 and not packed:
            return self.loading
        folder = self.out / MODELS / BEFORE

        def copy() -> dict[str, Any]:
            model, tokenizer = self.loading("auto")
            with quiet():
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
            return {}

        self.steps("copy", copy)
        return replace(self.loading, name=str(folder))


def _training_line(found: Mapping[str, Any]) -> str:
    short = "" if found["reached"] in (True, None) else ", target not reached"
    return f"{found['steps']} updates, training loss {found['loss']:.3f}{short}"
