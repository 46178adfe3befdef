"""Chat templates: which one is used, with which options and date, and whether it keeps the text.

A template of the Hub may read content as a list of parts, leave the system message out, or cut an
answer. So each rendering is compared with the turns that were asked for.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from datetime import date, datetime, time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssah.data.fields import DataError, Message, check_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATE = date(2024, 7, 26)  # what Llama 3.2's template says where it knows no date
_NOW = "strftime_now"  # the function that templates ask for today's date
_DIRECTIVES = [*"aAbBcdfGHIjmMpSuUVwWxXyYZz", "-d", "-m", "-H", "-I", "-M", "-S", "-j"]
_OPTIONS = "ssah_template_options"  # attribute of a tokenizer; a copy of the tokenizer has it too
_OWN = frozenset({"messages", "tools", "documents", "chat_template", "add_generation_prompt"})
_END_OF_REASONING = "</think>"


def use_template(
    tokenizer: PreTrainedTokenizerBase, template: str | None = None, **options: Any
) -> PreTrainedTokenizerBase:
    """Choose how ``tokenizer`` renders conversations, wherever this library uses it.

    ``use_template(tokenizer, enable_thinking=False)`` switches Qwen3's reasoning off.

    Args:
        tokenizer: changed in place. What it had before is replaced.
        template: a file with a Jinja template, or the name of one of the tokenizer's own (where it
            has several); None keeps its template.
        options: variables of the template (``chat_template_kwargs`` elsewhere), plain data.
            ``strftime_now="2026-01-31"`` is the date that a template is told, `DATE` by default, so
            that the same rows give the same tokens tomorrow.

    Returns:
        ``tokenizer``.

    Raises:
        ValueError: there is no such template, or the template does not read one of the options.
    """
    text = _text(tokenizer) if template is None else _named(tokenizer, template)
    for key, value in options.items():
        if key in _OWN:
            raise ValueError(f"template option {key!r} is set by ssah itself: leave it out")
        if text is None or not re.search(rf"\b{re.escape(key)}\b", text):
            raise ValueError(
                f"template option {key!r} does nothing: the chat template does not read it"
                + (" (the tokenizer has no chat template)" if text is None else "")
            )
        if key == _NOW:
            _date(value)
    if template is not None:  # else others that the tokenizer has by name stay
        tokenizer.chat_template = text
    setattr(tokenizer, _OPTIONS, dict(options))
    return tokenizer


def template_record(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Plain data that says how a tokenizer renders: for the record of a result.

    Returns:
        ``sha256`` of the template (None without one), ``options``, and ``date``: the one that the
        template is told (None where it asks for none).
    """
    text = _text(tokenizer)
    options = dict(getattr(tokenizer, _OPTIONS, {}))
    told = str(_date(options.pop(_NOW, DATE))) if text is not None and _NOW in text else None
    digest = None if text is None else hashlib.sha256(text.encode()).hexdigest()
    return {"sha256": digest, "options": options, "date": told}


class Template:
    """The chat template of a tokenizer, whose renderings hold what was asked.

    Args:
        tokenizer: with a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.options = dict(getattr(tokenizer, _OPTIONS, {}))
        told = _date(self.options.pop(_NOW, DATE))
        text = _text(tokenizer) or ""
        if _NOW in text:
            self.options["chat_template"] = _dated(told) + text
        self._parts: dict[tuple[str, ...], bool] = {}

    def render(
        self, turns: Sequence[Message], where: str, *, add_generation_prompt: bool = False
    ) -> str:
        """The text of turns, in which the text of every turn stands.

        Content is given as a list of parts where the template wants that.

        Raises:
            DataError: beginning with ``where``: the template refuses the turns, leaves one of them
                out, or changes its text.
        """
        roles = tuple(turn["role"] for turn in turns)
        key = (*roles, "" if add_generation_prompt else "finished")
        if key not in self._parts:
            self._parts[key] = self._wants_parts(roles, where, add_generation_prompt)
        try:
            text = self._apply(turns, self._parts[key], add_generation_prompt)
        except Exception as error:
            raise _refused(roles, where, error) from error
        for number, turn in enumerate(turns):
            self._check_kept(turn, number, text, where, last=number + 1 == len(turns))
        return text

    def _wants_parts(self, roles: tuple[str, ...], where: str, add_generation_prompt: bool) -> bool:
        """Whether content must be a list of parts, tried on words that stand nowhere else."""
        marks = [f"ssah-turn-{number}-" for number in range(len(roles))]
        turns = [{"role": r, "content": mark} for r, mark in zip(roles, marks, strict=True)]
        outcomes: list[Exception | list[int]] = []  # why content of one form does not do
        for parts in (False, True):
            try:
                text = self._apply(turns, parts, add_generation_prompt)
            except Exception as error:  # of what Jinja evaluates: any kind; told below
                outcomes.append(error)
                continue
            lost = [number for number, mark in enumerate(marks) if mark not in text]
            if not lost:
                return parts
            outcomes.append(lost)
        reason = outcomes[0]  # of content as it usually is
        if isinstance(reason, Exception):
            raise _refused(roles, where, reason) from reason
        which = ", ".join(f"{roles[number]} (turn {number})" for number in reason)
        advice = (
            "leave the system prompt out, or put it into the request"
            if {roles[number] for number in reason} == {"system"}
            else "it does not fit this use"
        )
        raise DataError(
            f"{where}: the chat template leaves out the text of {which}, so that the model would "
            f"never see it: {advice}; or choose another template (--template FILE, "
            "ssah.data.use_template)"
        )

    def _apply(self, turns: Sequence[Message], parts: bool, add_generation_prompt: bool) -> str:
        given: list[dict[str, Any]] = [dict(turn) for turn in turns]
        if parts:
            given = [{**t, "content": [{"type": "text", "text": t["content"]}]} for t in given]
        return str(
            self.tokenizer.apply_chat_template(
                given,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.options,
            )
        )

    def _check_kept(self, turn: Message, number: int, text: str, where: str, *, last: bool) -> None:
        wanted = turn["content"].strip()
        if turn["role"] == "assistant" and not last:
            # Templates of reasoning models rightly leave the reasoning of earlier turns out.
            wanted = wanted.rpartition(_END_OF_REASONING)[2].strip()
        if wanted in text:
            return
        if _END_OF_REASONING in wanted and _packed(wanted) in _packed(text):
            return  # templates of reasoning models set the block on lines of its own
        advice = (
            f"it keeps what follows {_END_OF_REASONING} alone. Leave the reasoning out of the rows"
            if _END_OF_REASONING in wanted
            else "the model would be given another text than was asked for. Change the row"
        )
        raise DataError(
            f"{where}: the chat template cuts or changes the text of turn {number} "
            f"({turn['role']}): {advice}, or choose another template (--template FILE, "
            "ssah.data.use_template)"
        )


def check_turns(turns: Sequence[Message], tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse, with DataError, turns that are no text, or that were rendered already.

    A row that begins with BOS would have it twice: templates and tokenizers write their own.
    """
    bos = tokenizer.bos_token
    for number, turn in enumerate(turns):
        check_text(turn["content"], where, f"the text of turn {number} ({turn['role']})")
        if bos and turn["content"].lstrip().startswith(bos):
            raise DataError(
                f"{where}: the text of turn {number} ({turn['role']}) begins with the token "
                f"{bos!r}, which would stand there twice: rows are plain text, the chat template "
                "and BOS are added here. Remove it"
            )


def _packed(text: str) -> str:
    return "".join(text.split())


def _refused(roles: Sequence[str], where: str, error: Exception) -> DataError:
    kind = "" if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: "
    return DataError(f"{where}: the chat template refuses turns {', '.join(roles)}: {kind}{error}")


def _text(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template that conversations without tools get."""
    return None if tokenizer.chat_template is None else str(tokenizer.get_chat_template())


def _named(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    path = Path(template)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"template {template!r} is not UTF-8 text: {error}") from error
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if template in named:
        return str(named[template])
    own = f"one of the tokenizer's own: {', '.join(named)}" if named else "no other: it has one"
    raise ValueError(f"template is {template!r}, must be a file with a Jinja template, or {own}")


def _date(value: Any) -> date:
    if isinstance(value, date):
        return value
    try:
        return date.fromisoformat(str(value))
    except ValueError as error:
        raise ValueError(
            f"template option {_NOW!r} is {value!r}, must be a date such as {DATE}"
        ) from error


def _dated(told: date) -> str:
    """A Jinja macro in the place of ``strftime_now``: transformers lets no function be passed."""
    moment = datetime.combine(told, time())
    body = 'format.replace("%%", "\\u0001")'
    for directive in _DIRECTIVES:
        said = moment.strftime(f"%{directive}")
        body += f".replace({json.dumps(f'%{directive}')}, {json.dumps(said)})"
    body += '.replace("\\u0001", "%")'
    # `+%}` keeps a newline with which the template itself begins.
    return f"{{% macro {_NOW}(format) %}}{{{{ {body} }}}}{{% endmacro +%}}"
