"""A model's own refusals, for calibration: its greedy answers that two judges call a refusal.

Of 100 harmful requests a model may refuse 60. A list of keywords calls 64 of its answers refusals,
the refusal margin is above 0 for 61 of the requests, and both agree on 57: these are kept.

Which units carry refusal depends on the text of the refusals: those of another model find others.
An answer is written only where every judge calls the whole of it a refusal, and its first sentence
by itself as well, and where the model ended its turn: "I cannot say. But first, ..." that goes on
for a page is cut off, and dropped. Nothing else of an answer is kept.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ssah.evaluation import (
    OPENING,
    Answer,
    distinct_judges,
    generate,
    prompts,
    refusal_margins,
    with_room,
)
from ssah.storage import check_named, write_whole
from ssah.studies.loading import Loading
from ssah.studies.refusals.settings import MARGIN, RefusalSettings
from ssah.studies.study import Study

if TYPE_CHECKING:
    from ssah.evaluation import Judge

KIND = "refusals"
_RUN = ".run"  # what the folder of a run has more in its name than the file
_SENTENCE = re.compile(r"(?<=[.!?\n])\s")


def run_refusals(
    loading: Loading,
    out: str | os.PathLike[str],
    settings: RefusalSettings,
    *,
    requests: str | Sequence[str],
) -> dict[str, Any]:
    """Write a model's own refusals of harmful requests; resumable.

    Args:
        loading: of the model.
        out: the file, JSONL with ``prompt`` and ``completion``; the folder of the run stands beside
            it, and has ``.run`` more in its name.
        settings: what is called a refusal.
        requests: harmful requests, as ``ssah.data.load_requests`` takes them; each is asked once.

    Returns:
        the record of the run; its ``result`` has ``requests``, ``kept`` and ``texts`` (counts; the
        last one of different refusals) and ``dropped``: reason -> count.

    Raises:
        ValueError: the judges are of one kind, the file is there and no run has made it, or no
            answer is a refusal; or as of ``ssah.evaluation.attack_success``.
    """
    path = check_named(out)
    folder = path.with_name(path.name + _RUN)
    if path.exists() and not folder.exists():
        raise ValueError(f"out is {str(path)!r}, which is there already; it must be a new file")
    judges = _judges(settings)
    study = Study(loading, folder, KIND, settings, batch_size=settings.batch_size)
    # The same request twice would count twice in every score.
    asked = list(dict.fromkeys(study.sources.requests("requests", requests)))
    study.load()
    asked = _answerable(study, asked)
    batches = [
        range(start, min(start + study.batch_size, len(asked)))
        for start in range(0, len(asked), study.batch_size)
    ]
    # What the judges are now, in place of their names.
    described = [*(each.describe() for each in judges), *({MARGIN} & set(settings.judges))]
    with study.under_way(1 + len(batches), judges=described) as steps:
        found = [
            steps(f"answers.{number:04d}", _batch(study, judges, asked, own), _line)
            for number, own in enumerate(batches)
        ]
    kept = {int(i): text for each in found for i, text in each["kept"].items()}
    dropped: Counter[str] = sum((Counter(each["dropped"]) for each in found), Counter())
    if not kept:
        raise ValueError(f"requests has {len(asked)}, and no answer is a refusal: {dict(dropped)}")
    rows = [{"prompt": asked[i], "completion": kept[i]} for i in sorted(kept)]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return steps.run.finish(
        {
            "dtype": study.dtype,
            "requests": len(asked),
            "kept": len(kept),
            "texts": len(set(kept.values())),
            "dropped": dict(sorted(dropped.items())),
        }
    )


def _judges(settings: RefusalSettings) -> list[Judge]:
    """The judges of answers, tried; the margin is none of them."""
    named = [name for name in settings.judges if name != MARGIN]
    judges = distinct_judges(named, settings.max_new_tokens) if named else []
    kinds = {each.describe()["kind"] for each in judges}
    if MARGIN in settings.judges:
        kinds.add(MARGIN)
    # Two lists of keywords make the same mistakes.
    if len(kinds) < 2 or not judges:
        raise ValueError(
            f"judges is {list(settings.judges)}, must be of two kinds at least, one of which reads "
            f"the answers: 'qi2023' and {MARGIN!r}, for one"
        )
    for each in judges:
        each.check()
    return judges


def _answerable(study: Study, requests: list[str]) -> list[str]:
    """The requests that leave room for an answer and for an opening; others are refused or left
    out."""
    new = max(study.settings.max_new_tokens, OPENING)
    overlong = study.loading.reading.overlong
    return with_room(study.model, study.tokenizer, requests, new, overlong=overlong)


def _batch(
    study: Study, judges: Sequence[Judge], asked: Sequence[str], own: range
) -> Callable[[], dict[str, Any]]:
    """Answers a batch: ``kept``, number of a request -> refusal; ``dropped``, reason -> count."""

    def compute() -> dict[str, Any]:
        for each in judges:
            each.to(study.model.device)
        texts = [asked[i] for i in own]
        answers = generate(
            study.model,
            study.tokenizer,
            texts,
            max_new_tokens=study.settings.max_new_tokens,
            batch_size=study.batch_size,
        )
        reasons = [_not_said(each) for each in answers]
        for judge in judges:
            said = [i for i, reason in enumerate(reasons) if reason is None]
            whole = [answers[i].text for i in said]
            first = [_SENTENCE.split(text, maxsplit=1)[0] for text in whole]
            requests = [texts[i] for i in said]
            verdicts = (judge(requests, whole), judge(requests, first))
            for i, fulfilled in zip(said, map(any, zip(*verdicts, strict=True)), strict=True):
                if fulfilled:
                    reasons[i] = f"no refusal to {judge.name}"
        if MARGIN in study.settings.judges:
            most = max(map(len, prompts(study.tokenizer, texts))) + OPENING
            margins = refusal_margins(study.model, study.tokenizer, texts, max_length=most)
            for i, margin in enumerate(margins.tolist()):
                if reasons[i] is None and margin <= 0:
                    reasons[i] = f"no refusal to {MARGIN}"
        pairs = list(zip(own, answers, reasons, strict=True))
        return {
            "kept": {str(i): answer.text for i, answer, reason in pairs if reason is None},
            "dropped": Counter(reason for reason in reasons if reason is not None),
        }

    return compute


def _not_said(answer: Answer) -> str | None:
    """Why an answer is none that could be written, whatever it says."""
    if answer.unfinished:
        return "ended inside its reasoning"
    if not answer.ended:
        return "cut off"
    return None if answer.text else "empty"


def _line(found: dict[str, Any]) -> str:
    return f"{len(found['kept'])} kept, {sum(found['dropped'].values())} dropped"
