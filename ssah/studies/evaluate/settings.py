"""What changes the result of an evaluation: the settings of ``ssah evaluate``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ssah.settings import check_settings, setting

_measuring = partial(setting, panel="Measuring")

# How long a judged answer is, in every command that has answers judged.
answer_tokens = partial(setting, 64, "Of an answer; `wei2024` needs 40.", min=1)


@dataclass(frozen=True)
class EvaluateSettings:
    """What changes the result of an evaluation, beside model and data."""

    judges: tuple[str, ...] = _measuring(
        ("wei2024",),
        "`qi2023`, [`wei2024`], `zou2023`, FILE.json, `hf:MODEL`, `openai:URL#MODEL` or "
        "`python:module.function`; may be repeated.",
        option="--judge",
    )
    # None: no system message but the one that the chat template has.
    system_prompts: tuple[str | None, ...] = _measuring(
        (None,),
        "A text, a .txt file, or [`none`]: what the chat template says by itself; may be repeated.",
        option="--system-prompt",
    )
    ablations: tuple[str, ...] = _measuring(
        (),
        "Also without these units; `DIR:ru:0.01`: those most like the group, as a fraction of all "
        "units. Or without a selection: `heads:2.26`, `layers:6-12`. `...:random`: as many random "
        "ones. May be repeated.",
        option="--ablate",
        metavar="DIR:GROUP",
    )
    tasks: tuple[str, ...] = _measuring(
        (), "Multiple-choice task of lm-eval; may be repeated.", option="--task"
    )
    task_folder: str | None = _measuring(None, "YAML files of further tasks.", metavar="DIR")
    max_new_tokens: int = answer_tokens(panel="Measuring")
    level: float = _measuring(0.95, "Of the intervals.", above=0, below=1)
    seed: int = setting(0, "Of random units and the bootstrap.")
    batch_size: int = setting(16, "Sequences run at a time.", min=1)
    max_length: int = setting(512, "Tokens kept of a row.", min=2)

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("system_prompts", "ablations", "tasks"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has {list(values)}, must have each once")
        if self.task_folder is not None and not self.tasks:
            raise ValueError(f"task_folder is {self.task_folder!r} without tasks, must have some")
