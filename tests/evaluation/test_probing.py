"""The probe against a loop over tokens in float64, and ``ssah probe`` on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tiny_chat
import tiny_models
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from typer.testing import CliRunner

import ssah
from ssah.cli import app
from ssah.evaluation import Probe
from ssah.storage import load_tensors, save_tensors
from ssah.studies.run_folder import read_run

REQUESTS = (
    "Name a tree.",
    "Write two lines about the sea, and then two about the land.",
    "Why is the sky blue?",
)
REFUSAL, COMPLIANCE = "I cannot help with that.", "Sure, here it is."
TOKENIZER = tiny_chat.tokenizer()


def build(family: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A tiny model that knows the tokens of ``TOKENIZER``."""
    config = tiny_models.FAMILIES[family]()
    config.vocab_size = len(TOKENIZER)
    config.max_position_embeddings = 256
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None
    return model.eval()


def run(model: PreTrainedModel, tokens: int = 4, **options: object) -> Probe:
    return ssah.probe(
        model,
        TOKENIZER,
        REQUESTS,
        tokens=tokens,
        refusal=REFUSAL,
        compliance=COMPLIANCE,
        **options,  # type: ignore[arg-type]
    )


def states(model: PreTrainedModel, text: str, tokens: int) -> list[Tensor]:
    """Per layer: hidden states [tokens, hidden], by running the whole text for each token."""
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    steps = []
    with torch.no_grad():
        for _ in range(tokens):
            out = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
            steps.append([layer[0, -1].double() for layer in out.hidden_states])
            logits = out.logits[0, -1].clone()
            logits[TOKENIZER.eos_token_id] = -torch.inf
            ids = [*ids, int(logits.argmax())]
    return [torch.stack(layer) for layer in zip(*steps, strict=True)]


def distance(a: Tensor, b: Tensor) -> float:
    return 1 - float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "opt", "gpt_neox"])
def test_equals_a_loop_over_tokens(family: str) -> None:
    # eager attention of transformers, which Gemma 2 has, does not pad in float64
    dtype, near = (torch.float32, 1e-5) if family == "gemma2" else (torch.float64, 1e-9)
    model, tokens = build(family, dtype), 4
    found = run(model, tokens, batch_size=2)
    versions = []
    for opening in ("", REFUSAL, COMPLIANCE):
        texts = [
            f"<|start|>user\n{request}<|end|>\n<|start|>assistant\n{opening}"
            for request in REQUESTS
        ]
        versions.append([states(model, text, tokens) for text in texts])
    plain, refusing, complying = versions
    n, layers = len(REQUESTS), len(plain[0])
    assert found.refusal_distances.shape == (n, tokens, layers)
    for layer in range(layers):
        for k in range(1, tokens + 1):
            means = [
                [each[layer][:k].mean(0) for each in version]
                for version in (plain, refusing, complying)
            ]
            pairs = [
                distance(means[0][i], means[0][j]) for i in range(n) for j in range(n) if i != j
            ]
            assert float(found.baselines[k - 1, layer]) == pytest.approx(
                sum(pairs) / len(pairs), abs=near
            )
            for distances, version in (
                (found.refusal_distances, means[1]),
                (found.compliance_distances, means[2]),
            ):
                expected = [distance(a, b) for a, b in zip(means[0], version, strict=True)]
                assert distances[:, k - 1, layer].tolist() == pytest.approx(expected, abs=near)
    baseline = found.baselines[-1]
    torch.testing.assert_close(found.refusal, found.refusal_distances[:, -1].mean(0) - baseline)
    torch.testing.assert_close(found.difference, found.compliance - found.refusal)
    assert found.difference.dtype == torch.float64


def test_batches_change_nothing() -> None:
    model = build("llama")
    one, all_ = run(model, batch_size=1), run(model, batch_size=8)
    torch.testing.assert_close(one.refusal_distances, all_.refusal_distances)
    torch.testing.assert_close(one.compliance_distances, all_.compliance_distances)
    torch.testing.assert_close(one.baselines, all_.baselines)


def test_fewer_tokens_are_the_first_of_more() -> None:
    model = build("llama")
    few, many = run(model, 2), run(model, 5)
    torch.testing.assert_close(few.refusal_distances, many.refusal_distances[:, :2])
    torch.testing.assert_close(few.baselines, many.baselines[:2])


def test_the_model_is_left_as_it_was_and_its_settings_do_not_enter() -> None:
    model = build("llama")
    expected = run(model)
    own = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, no_repeat_ngram_size=1,
        eos_token_id=None, max_new_tokens=1,
    )  # fmt: skip
    model.generation_config = own
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    frozen = next(model.parameters()).requires_grad_(False)
    done: list[int] = []
    found = run(model, batch_size=2, advance=done.append)
    torch.testing.assert_close(found.compliance_distances, expected.compliance_distances)
    assert done == [2, 3]
    assert model.generation_config is own
    assert own.to_dict()["max_new_tokens"] == 1
    assert [module.training for module in model.modules()] == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in list(model.parameters())[1:])


def handmade(differences: Sequence[float]) -> Probe:
    """Four requests that differ a little, with these differences by layer."""
    spread = torch.linspace(-0.01, 0.01, 4, dtype=torch.float64)[:, None, None]
    compliance = 0.5 + torch.tensor(differences, dtype=torch.float64)[None, None, :] + spread
    return Probe(
        refusal_distances=torch.full_like(compliance, 0.5),
        compliance_distances=compliance,
        baselines=torch.full((1, len(differences)), 0.3, dtype=torch.float64),
        metadata={},
    )


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([0.1, 0.1, 0.1], 0),
        ([0.1, 0.0, 0.1], 2),
        ([0.1, -0.1, 0.1], 2),
        ([0.1, 0.1, 0.0], None),
        ([-0.1, -0.1, -0.1], None),
    ],
)
def test_the_layer_from_which_on_refusal_is_nearer(
    differences: Sequence[float], expected: int | None
) -> None:
    found = handmade(differences)
    assert found.safe_from() == expected
    assert found.difference.tolist() == pytest.approx(list(differences))
    assert found.refusal.tolist() == pytest.approx([0.2] * 3)
    low, high = found.intervals(found.differences[:, -1]).unbind(1)
    assert bool((low <= found.difference).all())
    assert bool((found.difference <= high).all())


def test_saved_and_read(tmp_path: Path) -> None:
    found = run(build("llama"))
    found.save(tmp_path)
    again = Probe.load(tmp_path)
    for name in ("refusal_distances", "compliance_distances", "baselines"):
        assert torch.equal(getattr(again, name), getattr(found, name))
    assert again.metadata == found.metadata
    assert again.metadata["refusal_opening"] == REFUSAL
    tensors, meta = load_tensors(tmp_path)
    save_tensors(tmp_path / "other", tensors, {**meta, "content": "something"})
    with pytest.raises(ValueError, match="holds 'something'; it must hold 'ssah probe'"):
        Probe.load(tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens is 0, must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0, must be at least 1"),
        ({"refusal": " "}, "refusal is ' ', must be a non-empty string"),
        ({"queries": ["Name a tree."]}, "queries has 1 requests, must have at least 2"),
        ({"max_length": 9}, "max_length must be"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, object], message: str) -> None:
    arguments = {"queries": REQUESTS, "tokens": 2, **options}
    with pytest.raises(ValueError, match=message):
        ssah.probe(tiny_chat.model(), TOKENIZER, **arguments)  # type: ignore[arg-type]


def test_states_that_are_not_finite_are_refused() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="hidden states of layer 2"):
        run(model)


# ------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and requests."""
    path = tmp_path_factory.mktemp("probe")
    for seed, name in enumerate(("model", "other")):
        tiny_chat.model(seed).save_pretrained(path / name)
        TOKENIZER.save_pretrained(path / name)
    (path / "requests.txt").write_text("\n".join(REQUESTS))
    return path


@pytest.fixture
def command(folder: Path, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    def call(*more: object) -> tuple[int, str]:
        arguments = (
            "probe", folder / "model", "--beside", folder / "other", "--tokens", 3,
            "--requests", folder / "requests.txt", "--out", tmp_path / "run", "--json", *more,
        )  # fmt: skip
        result = CliRunner().invoke(app, [str(each) for each in arguments])
        return result.exit_code, result.stdout if result.exit_code == 0 else result.stderr

    return call


def test_the_command(command: Callable[..., tuple[int, str]], folder: Path, tmp_path: Path) -> None:
    code, output = command()
    assert code == 0, output
    found = json.loads(output)
    assert [row["role"] for row in found["models"]] == ["model", "beside"]
    for row in found["models"]:
        layers = row["by_layer"]
        assert len(layers["difference"]) == len(layers["difference_intervals"]) == 3
        assert len(row["by_tokens"]["difference"]) == 3
        for value, (low, high) in zip(
            layers["difference"], layers["difference_intervals"], strict=True
        ):
            assert low - 1e-12 <= value <= high + 1e-12
    assert len(found["claims"]) == 3
    assert all(claim["holds"] in (True, False, None) for claim in found["claims"])
    record = read_run(tmp_path / "run")
    assert record["finished"]
    assert record["data"]["requests"]["rows"] == 3
    assert (tmp_path / "run" / record["pictures"][0]).read_bytes().startswith(b"\x89PNG")
    kept = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*.*"))
    assert not any(request.encode() in kept for request in REQUESTS)
    first = Probe.load(tmp_path / "run" / "model")
    assert first.difference.tolist() == found["models"][0]["by_layer"]["difference"]

    # What is done is not computed again; other settings are refused.
    before = (tmp_path / "run" / "steps" / "probe-model.json").stat().st_mtime_ns
    (tmp_path / "run" / "steps" / "probe-beside.json").unlink()
    code, output = command()
    assert code == 0
    assert json.loads(output) == found
    assert (tmp_path / "run" / "steps" / "probe-model.json").stat().st_mtime_ns == before
    code, output = command("--tokens", 2)
    assert code == 2
    assert "tokens 3, not 2" in output


def test_the_model_beside_itself_is_refused(
    command: Callable[..., tuple[int, str]], folder: Path
) -> None:
    code, output = command("--beside", folder / "model")
    assert code == 2
    assert "must be another one" in output
