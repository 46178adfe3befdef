"""Ablated and updated models in lm-eval and inspect_ai."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from group_scores import attribution
from plans import draw
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import ssah
from ssah.evaluation import answers
from ssah.evaluation.harnesses import load_ablated
from ssah.models import empty_model
from ssah.units import units_hash

TASK = """
task: birds
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture(
    scope="module",
    params=[
        "tiny_chat_folder",
        pytest.param("smollm2", marks=[pytest.mark.real, pytest.mark.exhaustive]),
    ],
)
def folder(request: pytest.FixtureRequest) -> Path:
    """A model and its tokenizer."""
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def groups(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Groups of the model, of scores that were drawn."""
    model = empty_model(str(folder))
    generator = torch.Generator().manual_seed(0)
    scores = [
        attribution(
            {
                name: torch.rand(module.n_units, dtype=torch.float64, generator=generator)
                for name, module in ssah.find_modules(model).items()
            },
            units_hash=units_hash(model),
            data_fingerprint=data,
        )
        for data in ("safety", "utility")
    ]
    made = tmp_path_factory.mktemp("harness") / "groups"
    ssah.classify(*scores, scu=0.3, ucu=0.1, ru=0.1).save(made)
    return made


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_logits_that_are_nan_are_no_answer(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.inf
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="NaN or infinite"):
        loaded, _ = load_ablated(str(tmp_path), device="cpu")
    for run in (loaded, loaded.generate):
        with pytest.raises(FloatingPointError, match="the model's logits are NaN or infinite"):
            run(IDS)


def test_a_model_with_an_update_and_without_units(
    folder: Path, groups: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    intact = logits(model)
    scu = ssah.UnitGroups.load(groups)["scu"]
    with ssah.ablate(model, scu):
        expected = logits(model)
    assert not torch.equal(expected, intact)
    name = str(folder)
    ablated, tokenizer = load_ablated(name, groups=str(groups), ablate="scu", device="cpu")
    assert torch.equal(logits(ablated), expected)
    assert tokenizer.chat_template is not None
    assert torch.equal(logits(load_ablated(name, device="cpu")[0]), intact)

    with ssah.train_only(model, draw(model, 0.1)) as plan, torch.no_grad():
        for parameter in plan.parameters():
            parameter.mul_(1.5)
        plan.save_pretrained(tmp_path / "update")
    with ssah.ablate(model, scu), ssah.ablate(model, ssah.select(model, "heads:1.2")):
        expected = logits(model)
    both = ["scu", "heads:1.2"]
    update = str(tmp_path / "update")
    changed, _ = load_ablated(name, update=update, groups=str(groups), ablate=both, device="cpu")
    assert torch.equal(logits(changed), expected)
    with pytest.raises(ValueError, match=r"ablate is \['scu'\] and groups is None"):
        load_ablated("no model at all", ablate="scu")
    with pytest.raises(ValueError, match=r"ablate is \[\] and groups is"):
        load_ablated("no model at all", groups=str(groups))


@pytest.mark.parametrize(
    ("name", "file", "needs", "says"),
    [
        ("LmEvalModel", "lm_eval_model", "lm_eval", r"pip install 'ssah\[eval\]'"),
        ("InspectModel", "inspect_provider", "inspect_ai", r"pip install 'ssah\[inspect\]'"),
    ],
)
def test_who_lacks_a_harness_is_told_what_to_install(
    name: str, file: str, needs: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssah.evaluation import harnesses

    monkeypatch.delitem(sys.modules, f"{harnesses.__name__}.{file}", raising=False)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == needs else find(n))
    with pytest.raises(ImportError, match=says):
        getattr(harnesses, name)


@pytest.mark.exhaustive  # importing lm-eval takes long
@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: ssah[eval]"
)
def test_a_task_of_lm_eval(
    folder: Path,
    groups: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    from ssah.evaluation.harnesses import __main__ as command

    row = {"question": "Which bird cannot fly?", "choices": ["penguin", "a sparrow"], "answer": 0}
    (tmp_path / "birds.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "birds.yaml").write_text(TASK.format(data=tmp_path / "birds.jsonl"))
    options = f"pretrained={folder},groups={groups},ablate=scu,dtype=float32"
    words = ["lm_eval", "run", "--model", "ssah", "--model_args", options, "--tasks", "birds"]
    words += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    for given, message in (
        (f"pretrained={tmp_path / 'none'}", f"model is '{tmp_path / 'none'}': there is no such"),
        ("dtype=float32", "pretrained is missing: --model_args must have pretrained=MODEL"),
    ):
        monkeypatch.setattr("sys.argv", [given if each == options else each for each in words])
        with pytest.raises(SystemExit) as stopped:
            command.main()
        assert stopped.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")
    monkeypatch.setattr("sys.argv", [*words, "--log_samples"])
    command.main()
    (log,) = (tmp_path / "out").rglob("samples_birds_*.jsonl")
    found = [float(answer[0][0]) for answer in json.loads(log.read_text())["resps"]]

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = tokenizer("Question: Which bird cannot fly?\nAnswer:")["input_ids"]

    def log_likelihoods() -> list[float]:
        sums = []
        for choice in (" penguin", " a sparrow"):
            ids = tokenizer(choice)["input_ids"]
            with torch.no_grad():
                out = model(torch.tensor([question + ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(out[len(question) + k - 1, t]) for k, t in enumerate(ids)))
        return sums

    with ssah.ablate(model, ssah.UnitGroups.load(groups)["scu"]):
        assert found == pytest.approx(log_likelihoods(), rel=1e-5)
    assert found != pytest.approx(log_likelihoods(), rel=1e-2)


def test_a_task_of_inspect_ai(
    folder: Path, groups: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inspect_ai = pytest.importorskip("inspect_ai")
    monkeypatch.setenv("INSPECT_LOG_DIR", str(tmp_path))
    from inspect_ai.dataset import Sample
    from inspect_ai.model import (
        ChatMessageAssistant,
        ChatMessageUser,
        ContentImage,
        GenerateConfig,
        get_model,
    )
    from inspect_ai.scorer import match
    from inspect_ai.tool import ToolInfo

    from ssah.evaluation.harnesses import InspectModel  # noqa: F401 (registers the provider)

    questions = ["Which bird cannot fly?", "How do I bake bread?"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with ssah.ablate(model, ssah.UnitGroups.load(groups)["scu"]):
        expected = answers(model, tokenizer, questions, max_new_tokens=8)
    assert expected != answers(model, tokenizer, questions, max_new_tokens=8)
    assert all(expected)

    provider = get_model(f"ssah/{folder}", groups=str(groups), ablate="scu", device="cpu")
    samples = [
        Sample(input=question, target=answer)
        for question, answer in zip(questions, expected, strict=True)
    ]
    task = inspect_ai.Task(
        dataset=samples, scorer=match("exact"), config=GenerateConfig(max_tokens=8)
    )
    (log,) = inspect_ai.eval(task, model=provider, display="none")
    assert log.status == "success", log.error
    assert [sample.output.completion.strip() for sample in log.samples] == expected
    assert log.results.scores[0].metrics["accuracy"].value == 1
    assert {sample.output.stop_reason for sample in log.samples} == {"max_tokens"}
    assert log.samples[0].output.usage.output_tokens == 8

    import anyio

    asked = [ChatMessageUser(content=questions[0])]

    def ask(messages: list[Any], tools: Any = (), **config: Any) -> Any:
        options = GenerateConfig(**config)
        return anyio.run(provider.api.generate, messages, list(tools), "auto", options)

    stop = expected[0][4:6]
    cut = ask(asked, max_tokens=8, stop_seqs=[stop])
    assert cut.stop_reason == "stop"
    assert cut.completion.strip() == expected[0].split(stop)[0].strip()
    with pytest.raises(ValueError, match="the task asks for logprobs, which the provider ssah"):
        ask(asked, logprobs=True)
    with pytest.raises(ValueError, match=r"asks for tools \(search"):
        ask(asked, [ToolInfo(name="search", description="a search")])
    with pytest.raises(ValueError, match="role of the last message is assistant, must be user"):
        ask([*asked, ChatMessageAssistant(content="Sure")])
    with pytest.raises(
        ValueError, match=r"input\[0\] has \d+ tokens as a prompt; with max_new_tok"
    ):
        ask([ChatMessageUser(content="why " * 10_000)])
    with pytest.raises(ValueError, match="a message has image, must have text alone"):
        ask([ChatMessageUser(content=[ContentImage(image="data:image/png;base64,")])])
    sampled = [
        ask(asked, max_tokens=8, temperature=2.0, seed=seed).completion for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1]
    assert sampled[0] not in (sampled[2], cut.completion)
