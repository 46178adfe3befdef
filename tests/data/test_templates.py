"""Chat templates: what is rendered is what was asked, with a fixed date and chosen options."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
from helpers import tiny_chat
from transformers.utils import chat_template_utils

from ssah.data import IGNORE_INDEX, DataError, encode, make_loader, template_record, use_template
from ssah.evaluation import opened, prompts

ROW = {"prompt": "How do I pick a lock?", "completion": "I cannot help with that."}
OPENING = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
PARTS = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %}"
    "<|end|>\n{% endfor %}" + OPENING
)
THINKING = tiny_chat.TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
NO_SYSTEM = "{% for m in messages if m['role'] != 'system' %}<|start|>{{ m['role'] }}\n" + (
    "{{ m['content'] }}<|end|>\n{% endfor %}" + OPENING
)
CUTTING = tiny_chat.TEMPLATE.replace("m['content']", "m['content'].split('</think>')[-1]")
DATED = "{{ strftime_now('%d %b %Y') }}\n" + tiny_chat.TEMPLATE
QUIET = tiny_chat.TEMPLATE.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if not enable_thinking | default(true) %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}",
)

# Those of some forty models, which trl brings along, where it is installed and still does.
_TRL = importlib.util.find_spec("trl")
_FILES = Path(_TRL.origin).parent.glob("chat_templates/*.jinja") if _TRL and _TRL.origin else ()
PUBLISHED = sorted(file for file in _FILES if not file.stem.endswith("_training"))


def tokenizer_with(template):
    tokenizer = tiny_chat.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def bos():
    """A tokenizer with a BOS token, whose template each test sets."""
    tokenizer = tiny_chat.tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    return tokenizer


def split(tokenizer, row=ROW):
    """The texts of the ignored and of the labelled tokens of one row."""
    (example,) = encode([row], tokenizer)
    n = example["labels"].count(IGNORE_INDEX)
    ids = example["input_ids"]
    return tokenizer.decode(ids[:n]), tokenizer.decode(ids[n:])


def test_content_is_given_as_parts_where_the_template_reads_parts():
    tokenizer, plain = tokenizer_with(PARTS), tiny_chat.tokenizer()
    assert split(tokenizer) == split(plain)
    assert prompts(tokenizer, ["Hello?"], system_prompt="Be brief.") == prompts(
        plain, ["Hello?"], system_prompt="Be brief."
    )


def test_a_system_prompt_that_the_template_ignores_is_refused():
    tokenizer = tokenizer_with(NO_SYSTEM)
    assert prompts(tokenizer, ["Hello?"]) == prompts(tiny_chat.tokenizer(), ["Hello?"])
    with pytest.raises(DataError, match=r"requests\[0\]: .* leaves out the text of system .*leave"):
        prompts(tokenizer, ["Hello?"], system_prompt="Be brief.")
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
    ]
    with pytest.raises(DataError, match=r"rows\[0\]: .* leaves out the text of system \(turn 0\)"):
        list(encode([{"messages": turns}], tokenizer))


def test_a_template_that_drops_everything_is_refused():
    with pytest.raises(DataError, match=r"leaves out the text of user .*another template"):
        prompts(tokenizer_with("{{ messages | length }}"), ["Hello?"])


def test_an_answer_that_the_template_cuts_is_refused():
    tokenizer = tokenizer_with(CUTTING)
    row = {"prompt": "Hi", "completion": "<think>Shall I?</think>Hello."}
    with pytest.raises(DataError, match=r"rows\[0\]: .* cuts .* turn 1 \(assistant\): .*</think>"):
        list(encode([row], tokenizer))
    turns = [
        {"role": r, "content": row[key]}
        for r, key in (("user", "prompt"), ("assistant", "completion"))
    ]
    row = {
        "messages": [
            *turns,
            {"role": "user", "content": "Bye"},
            {"role": "assistant", "content": "Goodbye."},
        ]
    }
    prompt, response = split(tokenizer, row)  # reasoning of earlier turns is left out as it should
    assert "Shall I?" not in prompt
    assert "Hello." in prompt
    assert response == "Goodbye.<|end|>"


def test_reasoning_that_the_template_sets_on_its_own_lines_is_kept():
    parts = "{% set parts = m['content'].split('</think>') %}"
    block = "<think>\n{{ parts[0].split('<think>')[-1] }}\n</think>\n\n{{ parts[-1] }}"
    other = "{% else %}{{ m['content'] }}{% endif %}"
    either = parts + "{% if parts | length > 1 %}" + block + other
    qwen = tiny_chat.TEMPLATE.replace("{{ m['content'] }}", either)
    row = {"prompt": "Hi", "completion": "<think>Shall I?</think>Hello."}
    assert split(tokenizer_with(qwen), row)[1] == "<think>\nShall I?\n</think>\n\nHello.<|end|>"


def test_one_generation_prompt_for_scores_margins_and_answers():
    tokenizer = tokenizer_with(THINKING)
    (asked,) = prompts(tokenizer, [ROW["prompt"]])
    assert tokenizer.decode(asked).endswith("<|start|>assistant\n<think>\n")
    (example,) = encode([ROW], tokenizer)
    assert example["input_ids"][: example["labels"].count(IGNORE_INDEX)] == asked
    assert split(tokenizer)[1] == "I cannot help with that.<|end|>"
    (example,) = opened([ROW["prompt"]], "I cannot", tokenizer)
    assert example["input_ids"][: example["labels"].count(IGNORE_INDEX)] == asked


def test_a_block_that_opens_with_other_white_space():
    finished = "{{ '<think></think>' if m['role'] == 'assistant' }}{{ m['content'] }}"
    tokenizer = tokenizer_with(THINKING.replace("{{ m['content'] }}", finished))
    prompt, response = split(tokenizer)
    assert prompt.endswith("<|start|>assistant\n<think>\n")
    assert response == "</think>I cannot help with that.<|end|>"


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_templates_that_models_are_published_with(file, bos):
    tokenizer = use_template(bos, str(file))
    text = "How do I\n\npick a lock?"
    (asked,) = prompts(tokenizer, [text])
    row = {"prompt": text, "completion": "I cannot\nhelp."}
    (example,) = encode([row], tokenizer, max_length=2000)
    n = example["labels"].count(IGNORE_INDEX)
    assert example["input_ids"][:n] == asked
    assert text in tokenizer.decode(asked)
    assert "I cannot\nhelp." in tokenizer.decode(example["input_ids"][n:])
    assert example["input_ids"].count(tokenizer.bos_token_id) <= 1


def test_text_that_was_rendered_already_is_refused():
    tokenizer = tiny_chat.tokenizer()
    tokenizer.bos_token = "<|start|>"
    row = {**ROW, "prompt": "<|start|>user\nHi<|end|>\n"}
    with pytest.raises(DataError, match=r"rows\[0\]: .* begins with the token '<\|start\|>'"):
        list(encode([row], tokenizer))
    tokenizer.chat_template = "<|start|>" + tiny_chat.TEMPLATE
    with pytest.raises(DataError, match=r"rows\[0\]: the prompt begins with .* twice"):
        list(encode([ROW], tokenizer))
    with pytest.raises(DataError, match=r"requests\[0\]: the prompt begins with .* twice"):
        prompts(tokenizer, ["Hi"])


@pytest.mark.parametrize("where", ["prompt", "completion"])
def test_a_lone_surrogate_names_its_row(where):
    rows = [ROW, {**ROW, where: "smile \ud83d"}]
    with pytest.raises(DataError, match=r"rows\[1\]: the (prompt|response) has '\\ud83d' at char"):
        list(encode(rows, tiny_chat.tokenizer()))
    with pytest.raises(DataError, match=r"requests\[1\]: .* turn 0 \(user\) has '\\ud83d'"):
        prompts(tiny_chat.tokenizer(), ["fine", "smile \ud83d"])


def test_the_date_is_fixed_and_recorded(monkeypatch):
    import datetime

    def on(day, **options):
        now = classmethod(lambda cls, tz=None: datetime.datetime(2026, 7, day))
        today = type("Day", (datetime.datetime,), {"now": now})
        monkeypatch.setattr(chat_template_utils, "datetime", today)
        tokenizer = use_template(tokenizer_with(DATED), **options)
        return make_loader("builtin:safety", tokenizer, limit=4).fingerprint, tokenizer

    (first, tokenizer), (second, _) = on(1), on(2)
    assert first == second
    assert split(tokenizer)[0].startswith("26 Jul 2024\n")
    assert template_record(tokenizer)["date"] == "2024-07-26"
    third, tokenizer = on(1, strftime_now="2026-01-31")
    assert third != first
    assert split(copy.deepcopy(tokenizer))[0].startswith("31 Jan 2026\n")
    assert template_record(tokenizer)["date"] == "2026-01-31"
    assert template_record(tiny_chat.tokenizer())["date"] is None
    with pytest.raises(ValueError, match="'strftime_now' is 'tomorrow', must be a date such as"):
        use_template(tokenizer, strftime_now="tomorrow")


@pytest.mark.parametrize("told", ["%Y-%m-%d", "%A %-d %B, %H:%M %p %%", "%y/%j"])
def test_a_date_is_written_as_strftime_writes_it(told):
    import datetime

    tokenizer = tokenizer_with("\n{{ strftime_now('" + told + "') }}\n" + tiny_chat.TEMPLATE)
    wanted = datetime.datetime(2024, 7, 26).strftime(told)
    assert tokenizer.decode(prompts(tokenizer, ["Hi"])[0]).startswith(f"\n{wanted}\n<|start|>user")


def test_options_of_the_template(tmp_path):
    tokenizer = use_template(tokenizer_with(QUIET), enable_thinking=False)
    (asked,) = prompts(tokenizer, ["Hi"])
    assert tokenizer.decode(asked).endswith("assistant\n<think>\n\n</think>\n\n")
    assert template_record(tokenizer)["options"] == {"enable_thinking": False}
    with pytest.raises(ValueError, match="'enable_thinkin' does nothing"):
        use_template(tokenizer, enable_thinkin=False)
    with pytest.raises(ValueError, match="'messages' is set by ssah itself"):
        use_template(tokenizer, messages=[])
    (tmp_path / "own.jinja").write_text(THINKING)
    use_template(tokenizer, str(tmp_path / "own.jinja"))
    assert tokenizer.decode(prompts(tokenizer, ["Hi"])[0]).endswith("assistant\n<think>\n")
    tokenizer.chat_template = {"default": tiny_chat.TEMPLATE, "think": THINKING}
    use_template(tokenizer, "think")
    assert tokenizer.decode(prompts(tokenizer, ["Hi"])[0]).endswith("assistant\n<think>\n")
    with pytest.raises(ValueError, match=r"template is 'other', must be a file with a Jinja"):
        use_template(tokenizer, "other")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        use_template(tokenizer, enable_thinking=False)
