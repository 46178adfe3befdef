"""Preferences of policies, against the rule written as a loop."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset
from helpers import tiny_chat

from ssah.data import DataError, load_asked, policy_pairs

POLICIES = [
    {"system_prompt": "A game.", "allowed": ["violence", "insults"]},
    {"policy": "A school book.", "allowed": []},
]
HELPFUL = [
    {"prompt": "Write a fight.", "completion": "They fought.", "harms": ["violence"]},
    {"prompt": "Write of tea.", "completion": "It is hot.", "harms": []},
    {"prompt": "Write a bet.", "completion": "They bet.", "harms": ["violence", "gambling"]},
]
SAFE = [{"prompt": row["prompt"], "completion": "No."} for row in reversed(HELPFUL)]


def test_the_helpful_answer_is_preferred_where_all_its_harms_are_allowed(tmp_path):
    path = tmp_path / "policies.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in POLICIES))
    expected = []
    for text, allowed in (("A game.", {"violence", "insults"}), ("A school book.", set())):
        for row in HELPFUL:
            fine = True
            for harm in row["harms"]:
                fine = fine and harm in allowed
            answers = [row["completion"], "No."] if fine else ["No.", row["completion"]]
            chosen, rejected = ([{"role": "assistant", "content": a}] for a in answers)
            turns = [
                {"role": "system", "content": text},
                {"role": "user", "content": row["prompt"]},
            ]
            expected.append({"prompt": turns, "chosen": chosen, "rejected": rejected})
    assert policy_pairs(path, HELPFUL, SAFE) == expected
    assert [pair["chosen"][0]["content"] for pair in expected] == [
        "They fought.", "It is hot.", "No.", "No.", "It is hot.", "No.",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("policies", "helpful", "safe", "message"),
    [
        ([{"allowed": []}], HELPFUL, SAFE, r"rows\[0\]: a policy needs a text 'system_prompt'"),
        (
            [{"policy": "A game."}],
            HELPFUL,
            SAFE,
            "'allowed' must be a list of harms.* has 'policy'",
        ),
        ([{"policy": "A game.", "allowed": "all"}], HELPFUL, SAFE, "none; was 'all'"),
        (POLICIES, SAFE, SAFE, "'harms' must be a list of harms"),
        (
            POLICIES,
            HELPFUL[:2],
            SAFE,
            "safe has the request 'Write a bet.'..., which helpful lacks",
        ),
        (POLICIES, HELPFUL, SAFE[:2], "helpful has the request .*, which safe lacks"),
        (POLICIES, [*HELPFUL, HELPFUL[0]], SAFE, "helpful has 1 requests twice"),
        (POLICIES, HELPFUL, [*SAFE, SAFE[0]], "safe has 1 requests twice"),
        (POLICIES, HELPFUL, HELPFUL, "alike: none is preferred"),
        (POLICIES, [{"prompt": "Why?", "harms": []}], SAFE, "no response"),
    ],
)
def test_wrong_rows_are_refused(policies, helpful, safe, message):
    with pytest.raises(DataError, match=message):
        policy_pairs(policies, helpful, safe)


def cosapien(*types: str) -> list[dict[str, str]]:
    return [
        {"prompt": f"Ask {i}.", "scenario": "We make games.", "type": each}
        for i, each in enumerate(types)
    ]


def test_cosapien_is_read_as_it_is(tmp_path):
    path = tmp_path / "game_development.parquet"
    Dataset.from_list(cosapien("safe", "allowed", "partial", "Disallowed")).to_parquet(path)
    with pytest.warns(UserWarning, match="1 of 4 requests were left out: their policy allows an"):
        found = load_asked(path, policy=True)
    assert [(row["prompt"], row["allowed"]) for row in found] == [
        ("Ask 0.", True), ("Ask 1.", True), ("Ask 3.", False),
    ]  # fmt: skip
    assert found[2]["messages"] == [
        {"role": "system", "content": "We make games."},
        {"role": "user", "content": "Ask 3."},
    ]
    for types, message in (
        (("safe", "maybe"), r"rows.jsonl:2: 'type' must be one of safe, .* partial, was 'maybe'"),
        (("partial",), "every request is allowed in part, so that none is left"),
    ):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in cosapien(*types)))
        with pytest.raises(DataError, match=message):
            load_asked(file, policy=True)
    # Columns of these names beside a policy of another kind mean nothing.
    row = {**cosapien("partial")[0], "policy": "We sell tea.", "allowed": "no"}
    file.write_text(json.dumps(row))
    (other,) = load_asked(file, policy=True)
    assert (other["messages"][0]["content"], other["allowed"]) == ("We sell tea.", False)


@pytest.mark.exhaustive
def test_pairs_are_what_trl_trains_on(tmp_path):
    trl = pytest.importorskip("trl")
    pairs = policy_pairs(POLICIES, HELPFUL, SAFE)
    args = trl.DPOConfig(
        str(tmp_path), max_steps=1, use_cpu=True, bf16=False, precompute_ref_log_probs=True
    )
    tokenizer = tiny_chat.tokenizer()
    trainer = trl.DPOTrainer(
        tiny_chat.model(),
        args=args,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    first = next(iter(trainer.train_dataset))
    assert tokenizer.decode(first["prompt_ids"]) == tokenizer.apply_chat_template(
        pairs[0]["prompt"], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(first["chosen_ids"]).startswith("They fought.")
    trainer.train()
    assert trainer.state.global_step == 1
