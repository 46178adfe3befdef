"""Tokens and labels of rows: the chat template applied, everything but the response ignored.

``{"prompt": "Hi", "completion": "Hello."}`` under a template of ChatML, a word a token:

    input_ids   <|im_start|> user Hi <|im_end|> <|im_start|> assistant | Hello . <|im_end|>
    labels              -100 -100 -100     -100         -100      -100 | Hello . <|im_end|>

What stands before the bar is what the model is given when it answers; both lists are [length].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from ssah.choices import Overlong
from ssah.data.counts import Counts
from ssah.data.fields import DataError, Message, Row, check_count, check_row
from ssah.data.templates import Template, check_turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100  # the label of a position that is not to be predicted, as in transformers
_PLACEHOLDER = "ssah-response-placeholder"  # stands in no template and in no row


class Encoded(TypedDict):
    """One row as tokens: two lists of equal length, unpadded."""

    input_ids: list[int]
    labels: list[int]


def encode(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 512,
    overlong: Overlong = "cut",
    counts: Counts | None = None,
) -> Iterator[Encoded]:
    """Tokenise rows lazily, one by one.

    With a chat template, the prompt is what the model is given when it generates (the turns before
    the response and the generation prompt), and the response is the rest up to the end-of-turn
    token; white space that the template puts after that token is left out. Without a template, the
    text is the turns joined by blank lines, after the BOS token where the tokenizer adds one and
    followed by EOS.

    A label is the token itself on the response, end of turn included, and -100 elsewhere; models
    of `transformers` shift labels themselves. The first response token is exactly the first that
    would be generated: where tokenising prompt and response together would merge a token across
    their boundary, they are tokenised apart.

    Args:
        rows: as `load_rows` returns or takes them; a generator serves too.
        tokenizer: a tokenizer of `transformers`.
        max_length: the most tokens of a row.
        overlong: what to do with a longer row. `"cut"`: the end of its response is cut off; a
            prompt that leaves no room for a response is an error. `"skip"`: likewise, but a row
            with such a prompt is left out. `"error"`: every longer row is an error.
        counts: what is cut and left out is counted here.

    Yields:
        `input_ids` and `labels`, lists of at most `max_length` integers.

    Raises:
        ValueError: an argument is out of range, or the tokenizer has neither template nor EOS.
        DataError: naming the row's index: it is invalid (see `load_rows`), overlong, refused by
            the template (or changed by it, see `ssah.data.templates`), or no boundary between
            prompt and response can be found.

    Warns:
        UserWarning: once, at the end: how many rows were cut or left out.
    """
    checked = (check_row(row, f"rows[{index}]") for index, row in enumerate(rows))
    counts = Counts() if counts is None else counts
    return encode_checked(checked, tokenizer, max_length, overlong, counts)


def encode_checked(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    overlong: Overlong,
    counts: Counts,
) -> Iterator[Encoded]:
    """What `encode` does, for rows that `load_rows` has checked already; errors as of it."""
    check_count("max_length", max_length, least=2)
    if overlong not in ("cut", "skip", "error"):
        raise ValueError(f"overlong must be 'cut', 'skip' or 'error', was {overlong!r}")
    # Made here, not in the generator, so that a bad tokenizer is refused before the first row.
    return _encode(rows, Encoder(tokenizer), max_length, overlong, counts)


def _encode(
    rows: Iterable[Row], encoder: Encoder, max_length: int, overlong: Overlong, counts: Counts
) -> Iterator[Encoded]:
    # Anew at each pass: a stream is encoded once an epoch, and its counts are those of the last.
    counts.rows = counts.overlong = counts.cut_rows = counts.cut_tokens = 0
    for index, row in enumerate(rows):
        where = f"rows[{index}]"
        prompt, response = encoder(row, where)
        length = len(prompt) + len(response)
        if len(prompt) >= max_length:
            if overlong == "skip":
                counts.overlong += 1
                continue
            raise DataError(
                f"{where} ({row['prompt'][:40]!r}...): the prompt has {len(prompt)} tokens and "
                f"leaves no room for the response: max_length must be more, was {max_length}; or "
                "leave such rows out (--overlong skip, overlong='skip')"
            )
        if length > max_length and overlong == "error":
            raise DataError(
                f"{where} ({row['prompt'][:40]!r}...): has {length} tokens, must have at most "
                f"max_length, {max_length}; or have the end of its response cut off (--overlong "
                "cut, overlong='cut')"
            )
        counts.rows += 1
        counts.cut_rows += length > max_length
        counts.cut_tokens += max(length - max_length, 0)
        yield {
            "input_ids": (prompt + response)[:max_length],
            "labels": ([IGNORE_INDEX] * len(prompt) + response)[:max_length],
        }
    counts.warn_of_length(max_length)


class Encoder:
    """Turns one row into the tokens of its prompt and those of its response.

    Args:
        tokenizer: with a chat template, or at least an EOS token (else ValueError).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.template = None if tokenizer.chat_template is None else Template(tokenizer)
        if self.template is None and tokenizer.eos_token_id is None:
            raise ValueError(
                "tokenizer must have a chat template or an EOS token, had neither: set "
                "tokenizer.chat_template or tokenizer.eos_token"
            )
        added = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        # What may end a turn. Some tokenizers have added tokens of white space, which end none.
        self.markers = tuple(token for token in added if token.strip())

    def __call__(self, row: Row, where: str) -> tuple[list[int], list[int]]:
        turns: Sequence[Message] = row.get("messages") or (
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        )
        check_turns(turns, self.tokenizer, where)
        if self.template is not None:
            prompt, response = self.split_tokens(*self.render_turns(turns, where), where)
            return self.one_bos(prompt, where), response
        # No template: a base model, for which a blank line is the usual end of a paragraph.
        context = "".join(turn["content"] + "\n\n" for turn in turns[:-1])
        prompt, response = self.split_tokens(context, turns[-1]["content"], where)
        prompt = self.one_bos(self.bos(context) + prompt, where)
        return prompt, [*response, self.tokenizer.eos_token_id]

    def prompt(self, turns: Sequence[Message], where: str) -> list[int]:
        """The tokens that a model is given to answer ``turns``: before every response, and alone.

        Raises:
            DataError: beginning with ``where``, as `encode` describes.
        """
        check_turns(turns, self.tokenizer, where)
        if self.template is not None:
            ids = self.tokenize(self.template.render(turns, where, add_generation_prompt=True))
            return self.one_bos(ids, where)
        text = "".join(turn["content"] + "\n\n" for turn in turns)
        return self.one_bos(self.bos(text) + self.tokenize(text), where)

    def render_turns(self, turns: Sequence[Message], where: str) -> tuple[str, str]:
        """The texts of prompt and response under the chat template.

        Raises:
            DataError: the template does not let the beginning of the response be found.
        """
        assert self.template is not None
        prompt = self.template.render(turns[:-1], where, add_generation_prompt=True)
        full = self.template.render(turns, where)
        start = len(prompt)  # where the response begins in ``full``
        bare = prompt.rstrip()
        if not full.startswith(prompt) and full.startswith(bare):
            start = len(bare)  # a block of reasoning that opens on a line of its own, or does not
        elif not full.startswith(prompt):
            # The generation prompt opens a block of reasoning that a finished turn does not have.
            # It stands before the response all the same: the model is given it when it answers.
            placeholder: Message = {"role": "assistant", "content": _PLACEHOLDER}
            finished = self.template.render([*turns[:-1], placeholder], where)
            before = finished.partition(_PLACEHOLDER)[0]
            if not (prompt.startswith(before) and full.startswith(before)):
                raise DataError(
                    f"{where}: the chat template renders the turns before the response differently "
                    "once there is a response, so that its first token cannot be found. Where it "
                    "has an option for reasoning, set it as the rows are (--template-option "
                    "enable_thinking=false); or choose another template"
                )
            start = len(before)
        response = full[start:]
        # A line break behind the end of the turn is never generated: generation stops before it.
        if response.rstrip().endswith(self.markers):
            response = response.rstrip()
        return prompt, response

    def split_tokens(self, prompt: str, response: str, where: str) -> tuple[list[int], list[int]]:
        """Tokens of both, such that together they are those of the whole text where possible.

        Raises:
            DataError: tokenised apart, they read differently.
        """
        prompt_ids = self.tokenize(prompt)
        full_ids = self.tokenize(prompt + response)
        if full_ids[: len(prompt_ids)] == prompt_ids:
            return prompt_ids, full_ids[len(prompt_ids) :]
        # "user: " and "Yes" may share the token " Yes". Apart they must read the same.
        response_ids = self.tokenize(response)
        if self.decode(prompt_ids + response_ids) != self.decode(full_ids):
            raise DataError(
                f"{where}: the tokenizer merges the end of the prompt {prompt[-20:]!r} with the "
                f"start of the response {response[:20]!r} and writes them differently when they "
                "are tokenised apart, so that the response's first token cannot be found"
            )
        return prompt_ids, response_ids

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a text, without any that the tokenizer would put around it."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, special ones included, spaces as they are."""
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def bos(self, text: str) -> list[int]:
        """The BOS token, where this tokenizer puts one before a text."""
        # Asked of a text, because a configuration's add_bos_token is not what every tokenizer does.
        first = self.tokenizer(text, verbose=False)["input_ids"][:1]
        return list(first) if first == [self.tokenizer.bos_token_id] else []

    def one_bos(self, ids: list[int], where: str) -> list[int]:
        """``ids``, unless they begin with BOS twice: then DataError."""
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise DataError(
                f"{where}: the prompt begins with the token {self.tokenizer.bos_token!r} twice: "
                "the chat template writes it more than once, or the tokenizer adds another. Choose "
                "another template (--template FILE, ssah.data.use_template)"
            )
        return ids
