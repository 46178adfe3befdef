"""What the report says of each kind of run: a name, a sentence, and the tables of its result.

To add a kind, write a function from its result to tables and put it into ``KINDS``. A result may
lack any field (an older version wrote it, say): what is not there is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ssah.report.html.comparison import comparison_tables
from ssah.report.html.evaluation import evaluate
from ssah.report.html.experiments import probe, scan, stability, study, transfer
from ssah.report.html.plain import Table
from ssah.report.html.records import generic, in_unit, list_of
from ssah.report.html.runs import demo, finetune

Tables = Callable[[Mapping[str, Any]], Sequence[Table]]


@dataclass(frozen=True)
class Kind:
    """How runs of one kind are shown."""

    title: str  # of the section
    about: str  # one plain sentence on what such a run shows
    tables: Tables = generic  # of a result
    # Stem of a picture's file -> what it shows, in words, for those who cannot see it.
    pictures: Mapping[str, str] = field(default_factory=dict)


# In the order of the page.
KINDS: dict[str, Kind] = {
    "demo": Kind(
        "Demonstration",
        "A small model is aligned, its units are scored and grouped, and each group is taken out "
        "beside as many random units.",
        demo,
        {
            "scores": "Safety and utility importance of every unit, by layer and against each "
            "other, coloured by group.",
            "ablation": "Bars of utility loss and refusal margin after each group, and as many "
            "random units, are ablated, beside those of the whole model.",
        },
    ),
    "evaluate": Kind(
        "Evaluation",
        "How often a model does not refuse harmful requests, how many of these answers are babble, "
        "and what it does with harmless ones.",
        evaluate,
    ),
    "refusals": Kind(
        "The model's own refusals",
        "How many harmful requests a model refuses in the eyes of two judges, and why its other "
        "answers were dropped.",
    ),
    "scan": Kind(
        "Group sizes",
        "What ablating a growing share of each group costs in safety and in utility, and which "
        "share is taken of each.",
        scan,
        {
            "scan": "Curves of safety and utility against the share of units ablated: "
            "safety-critical, utility-critical, redundant and random ones, with the points chosen.",
            "compare": "What is taken of safety against rise of the utility loss when "
            "safety-critical units are ablated, for every way of grouping.",
        },
    ),
    "stability": Kind(
        "Stability of the groups",
        "How much the groups change when they are found on other calibration prompts, and how many "
        "prompts suffice.",
        stability,
        {
            "stability": "Overlap of the groups of two disjoint draws of prompts against the "
            "number of prompts, and rank correlation of the scores. The tables below have the same "
            "numbers."
        },
    ),
    "freeze": Kind(
        "Freezing while fine-tuning",
        "How much safety a harmless fine-tuning takes away, with nothing frozen, with "
        "safety-critical units frozen, with as many random ones, and with LoRA.",
        study,
        {
            "freeze": "ASR of every way to train, with its interval and each seed, beside utility "
            "loss and training loss. The tables below have the same numbers."
        },
    ),
    "budget": Kind(
        "Redundant units as the budget of alignment",
        "What alignment costs in utility when all parameters are trained, and when redundant units "
        "alone are.",
        study,
        {
            "budget": "ASR before and after both alignments, beside what they cost in utility. The "
            "tables below have the same numbers."
        },
    ),
    "compare": Kind(
        "Methods compared",
        "Which published methods keep a model's refusals through fine-tuning, each beside a "
        "control of its size that has nothing of the method's choice.",
        comparison_tables,
        {
            "pareto": "ASR against task loss of every method, with a line to its control; below, "
            "for each method with a strength, the curve of its strengths beside that of its "
            "control (dashed). Down and left is better. The tables below have the same numbers."
        },
    ),
    "transfer": Kind(
        "Attribute transfer",
        "Which units changed their group when the model was trained.",
        transfer,
        {
            "transfer": "Ribbons from the four groups before to the four groups after, as wide as "
            "the share of units that went that way: all units, and without those that stayed "
            "complex. The table below has the same numbers."
        },
    ),
    "probe": Kind(
        "Which way the model reasons",
        "Whether hidden states after a harmful request alone are nearer to those after the start "
        "of a refusal or after the start of a compliance, layer by layer.",
        probe,
        {
            "probe": "Cosine distances to the refusing and the complying version by layer, and "
            "their difference by layer and by number of generated tokens, with intervals. The "
            "tables below have the same numbers."
        },
    ),
    "finetune": Kind(
        "Training run",
        "A model was trained with some of its units frozen, or with nothing but some of them.",
        finetune,
    ),
    "other": Kind("Experiment", "An experiment of a kind that this report has no words for."),
}


def kind_of(file: str, record: Mapping[str, Any]) -> str | None:
    """The kind of a record by its file (``experiment``, ``demo`` or ``run``); None: not ours."""
    if file == "experiment":
        if "kind" not in record or "settings" not in record:
            return None
        return str(record["kind"]) if record["kind"] in KINDS else "other"
    if file == "demo":
        return "demo" if "model" in record and "groups" in record else None
    return "finetune" if "identity" in record else None


_STATES = {"reproduces": "yes", "contradicted": "no", "undecided": "undecided"}


def claims_table(claims: Any) -> list[tuple[str, str, str, str]]:
    """Claim, state (``yes``, ``no`` or ``undecided``), value with interval, and the sentence."""
    rows = []
    for each in list_of({"claims": claims}, "claims"):
        claim = str(each.get("claim", ""))
        # Records from before there were verdicts say only whether a claim holds.
        holds = {True: "yes", False: "no"}.get(each.get("holds"), "undecided")  # type: ignore[arg-type]
        state = _STATES.get(str(each.get("verdict")), holds)
        sentence = str(each.get("sentence") or "").removeprefix(f"{claim}: ")
        rows.append((claim, state, in_unit(each)["shown"], sentence))
    return rows
