"""``ssah evaluate`` refuses what cannot be evaluated, in one line and before it writes anything."""

from __future__ import annotations

import pytest
import tiny_chat
from evaluations import SMALL, refused
from transformers import BertLMHeadModel

from ssah.studies.evaluate.ablations import Ablation
from ssah.studies.evaluate.settings import EvaluateSettings

pytestmark = pytest.mark.xdist_group("evaluate")  # its fixture is made once


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--requests", "none.txt"), "none.txt"),
        (("--requests", "{tmp}/empty.txt"), "has no requests"),
        (("--requests", "{tmp}/bad.jsonl"), "bad.jsonl:2: invalid JSON"),
        (("--requests", "{tmp}/long.txt"), "requests[0] has"),
        (("--benign", "builtin:nothing"), "builtin:nothing"),
        (("--over-refusal", "{tmp}"), "was the folder"),
        (("--utility", "{tmp}/asked.jsonl"), "no response"),
        (("--judge", "gpt"), "judge is 'gpt', must be one of"),
        (("--judge", "zou2023"), "'zou2023' more than once"),
        (("--judge", "wei2024"), "max_new_tokens is 8"),
        (("--judge", "hf:{tmp}"), "cannot be loaded"),
        (("--judge", "openai:nowhere"), "must be 'openai:http"),
        (("--judge", "python:os.nothing"), "has no function 'nothing'"),
        (("--judge", "mine.json"), "which is no file"),
        (("--ablate", "{tmp}:scu"), "no meta.json"),
        (("--ablate", "scu"), "must be 'DIR:GROUP'"),
        (("--ablate", "hf:me/groups"), "must be 'DIR:GROUP'"),
        (("--ablate", "{groups}:ru:few"), "'few' must be a fraction of all units"),
        (("--ablate", "{groups}:ru:0.5"), "fraction is 0.5; the group ru is 0.2"),
        (("--ablate", "{groups}:ru:0.001:random"), "that share has no unit"),
        (("--ablate", "{groups}:safe"), "has no group 'safe', it has scu"),
        (("--ablate", "{groups}:scu", "--ablate", "{groups}:scu"), "must have each once"),
        (("--ablate", "{safety}:scu"), "it must hold"),
        (("--system-prompt", "prompt.txt"), "system prompt is 'prompt.txt', which is no file"),
        (("--intact", "{tmp}/no_model"), "no_model"),
        (("--level", "95"), "level is 95"),
        (("--by", "a", "--by", "a"), "by is 'a a'; it must have each column once"),
        (("--task-folder", "{tmp}"), "without tasks"),
        (("--judge", "python:textwrap.indent"), "returned a str, must return a bool"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_no_folder(runs, tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "Why?"}\n{\n')
    (tmp_path / "asked.jsonl").write_text('{"prompt": "Why?"}\n')
    (tmp_path / "long.txt").write_text("Why? " * 1000)
    places = {"tmp": tmp_path, "groups": runs / "groups", "safety": runs / "safety"}
    given = [argument.format(**places) for argument in arguments]
    rest = SMALL
    if given[0] in ("--requests", "--benign", "--over-refusal", "--utility"):
        place = SMALL.index(given[0])
        rest = SMALL[:place] + SMALL[place + 2 :]
    out = tmp_path / "out"
    assert message in refused(runs / "model", "--out", out, *rest, *given)
    assert not out.exists()


def test_groups_of_another_model_are_refused(runs, tmp_path):
    model = tiny_chat.model()
    del model.model.layers[1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(tmp_path / "other")
    tiny_chat.tokenizer().save_pretrained(tmp_path / "other")
    ablate = ("--ablate", f"{runs / 'groups'}:scu")
    line = refused(tmp_path / "other", "--out", tmp_path / "out", *SMALL, *ablate)
    assert "so that its units are others" in line


def test_an_unknown_architecture_is_refused_at_once(tmp_path):
    BertLMHeadModel(tiny_chat.bert_config(is_decoder=True)).save_pretrained(tmp_path / "model")
    tiny_chat.tokenizer().save_pretrained(tmp_path / "model")
    line = refused(tmp_path / "model", "--out", tmp_path / "out", *SMALL)
    assert "unknown architecture 'bert'" in line
    assert not (tmp_path / "out").exists()


def test_ablations_have_names(runs):
    groups = str(runs / "groups")
    assert Ablation.parse(f"{groups}:scu") == Ablation(groups, "scu")
    assert Ablation.parse(f"{groups}:scu:random") == Ablation(groups, "scu", True)
    assert Ablation.parse(f"{groups}:ru:5e-2") == Ablation(groups, "ru", share=0.05)
    for name in (f"{groups}:scu:random", f"{groups}:ru:0.05:random"):
        assert str(Ablation.parse(name)) == name
    with pytest.raises(ValueError, match=r"system_prompts has .* each once"):
        EvaluateSettings(system_prompts=("a", "a"))
