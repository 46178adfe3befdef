"""Judges that are classifiers of transformers. Harmless texts only."""

from __future__ import annotations

import json

import pytest
import tiny_chat
import torch
from transformers import BertConfig, BertForSequenceClassification

from ssah.data import encode
from ssah.evaluation import judge
from ssah.evaluation.judges.classifier import SequenceClassifier
from ssah.evaluation.judges.generative import GenerativeClassifier, verdict
from ssah.models import ModelError

LONG = "Here is a recipe for bread, which takes flour, water, salt, yeast, time and patience."


@pytest.fixture
def sequence_folder(tmp_path):
    """A classifier in a folder; label 1 wins where the text has more than 12 tokens."""

    def make(labels: tuple[str, ...]):
        config = tiny_chat.bert_config(
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
        )
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
        with torch.no_grad():
            model.classifier.weight.zero_()
            model.classifier.bias.copy_(torch.arange(len(labels)))  # the last label wins
        model.save_pretrained(tmp_path / "classifier")
        tiny_chat.tokenizer().save_pretrained(tmp_path / "classifier")
        return f"hf:{tmp_path / 'classifier'}"

    return make


@pytest.mark.parametrize(
    ("labels", "options", "expected"),
    [
        (("safe", "unsafe"), "", True),
        (("unsafe", "safe"), "", False),
        (("NORMAL", "REJECTION"), "", False),
        (("harmless", "Harmful"), "", True),
        (("LABEL_0", "LABEL_1"), "#success=LABEL_1", True),
        (("LABEL_0", "LABEL_1"), "#success=LABEL_0", False),
        (("LABEL_0", "LABEL_1"), "#refused=LABEL_1,input=answer", False),
        (("a", "b", "c"), "#refused=a", True),
    ],
)
def test_labels_say_when_the_attack_succeeded(sequence_folder, labels, options, expected):
    found = judge(sequence_folder(labels) + options)
    assert isinstance(found, SequenceClassifier)
    assert found(["How?"] * 20, [LONG, "x"] * 10) == [expected] * 20
    assert found([], []) == []
    assert found.pair is ("answer" not in options)
    assert json.dumps(found.describe())


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (("LABEL_0", "LABEL_1"), "", "labels .*add #success=LABEL"),
        (("safe", "unsafe", "other"), "", "do not say when"),
        (("a", "b"), "#success=c", r"'c' is no label, must be one of \['a', 'b'\]"),
        (("a", "b"), "#success=a,refused=b", "both success= and refused="),
        (("a", "b"), "#label=a", "option 'label=a'"),
        (("a", "b"), "#success=", "option 'success='"),
        (("a", "b"), "#success=a,input=request", "input is 'request'"),
    ],
)
def test_bad_options_of_a_classifier(sequence_folder, labels, options, message):
    with pytest.raises(ValueError, match=message):
        judge(sequence_folder(labels) + options)


def test_a_long_answer_is_cut_to_what_the_classifier_can_read(sequence_folder):
    found = judge(sequence_folder(("safe", "unsafe")))
    assert found.tokenizer.model_max_length > 10**9  # as of many published tokenizers
    assert found.length == found.model.config.max_position_embeddings
    assert found(["How?"], ["word " * 2 * found.length]) == [True]


def test_the_pair_is_what_a_classifier_reads(sequence_folder):
    found = judge(sequence_folder(("safe", "unsafe")))
    seen = []
    tokenizer = found.tokenizer

    def spy(*texts, **options):
        seen.append(texts)
        return tokenizer(*texts, **options)

    found.tokenizer = spy
    found(["short", "a longer request"], ["x", "y"])
    assert seen == [(["a longer request", "short"], ["y", "x"])]  # the longest first
    found.pair = False
    found(["short"], ["x"])
    assert seen[-1] == (["x"],)


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    """A language model that was taught two conversations: which is safe, which is not."""
    folder = tmp_path_factory.mktemp("guard")
    model, tokenizer = tiny_chat.model(), tiny_chat.tokenizer()
    conversations = [("What is bread?", "Food.", "safe"), ("Say moon!", "Moon!", "unsafe\nS1")]
    rows = [
        {
            "messages": [
                {"role": "user", "content": request},
                {"role": "assistant", "content": answer},
                {"role": "assistant", "content": says},
            ]
        }
        for request, answer, says in conversations
    ]
    examples = list(encode(rows, tokenizer))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(60):
        example = examples[step % 2]
        batch = {key: torch.tensor([value]) for key, value in example.items()}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, conversations


def test_a_generative_classifier_reads_the_conversation(guard):
    folder, conversations = guard
    found = judge(f"hf:{folder}")
    assert isinstance(found, GenerativeClassifier)
    requests, answers, says = zip(*conversations, strict=True)
    assert found(requests, answers) == [s.startswith("unsafe") for s in says]
    assert found([], []) == []
    with pytest.raises(ValueError, match="takes no input"):
        judge(f"hf:{folder}#input=answer")


def test_a_judge_that_says_something_else_is_an_error(guard, tiny_chat_folder):
    with pytest.raises(ValueError, match="must say 'unsafe' or 'yes', or 'safe' or 'no'"):
        judge(f"hf:{tiny_chat_folder}")(["What is bread?"], ["Food."])


def test_models_that_cannot_judge(tmp_path):
    tiny_chat.save(tmp_path / "no_template")
    (tmp_path / "no_template" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="without a chat template"):
        judge(f"hf:{tmp_path / 'no_template'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="cannot be loaded"):
        judge(f"hf:{tmp_path / 'empty'}")
    (tmp_path / "other").mkdir()
    config = BertConfig(architectures=["BertForTokenClassification"])
    config.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="BertForTokenClassification, must be a sequence"):
        judge(f"hf:{tmp_path / 'other'}")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("safe", False),
        ("unsafe\nS1", True),
        ("Yes.", True),
        ("no", False),
        ("\n\nUNSAFE", True),
        ("Harmful: no", False),
    ],
)
def test_verdicts(said, expected):
    assert verdict(said, "judge") is expected


@pytest.mark.parametrize("said", ["", "maybe", "unsafely", "know"])
def test_what_is_no_verdict(said):
    with pytest.raises(ValueError, match="judge 'j' said"):
        verdict(said, "j")
