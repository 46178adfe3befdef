"""A new architecture is one entry: one is made up here, and the whole library takes it.

The recipe is the fixture below: describe where a layer keeps its projections, and register it. The
model itself has names, a layout and a forward that no other one has. It comes from a module that is
not of transformers, as code that a checkpoint brings along does.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import family_checks
import pytest
import tiny_models
import torch
from commands import as_json
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

import ssah
from ssah.units import families

NAME = "made_up"


class MadeUpConfig(PreTrainedConfig):
    model_type = NAME
    attribute_map: ClassVar = {"hidden_size": "width", "num_attention_heads": "heads"}

    def __init__(
        self, width: int = 48, inner: int = 40, depth: int = 2, heads: int = 4, **options: Any
    ) -> None:
        self.width, self.inner, self.num_hidden_layers = width, inner, depth
        self.heads, self.vocab_size = heads, tiny_models.VOCABULARY
        super().__init__(**{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **options})


class Think(nn.Module):
    """A gated FFN, whose one projection ``widen`` gives gate and up."""

    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__()
        self.widen = nn.Linear(config.hidden_size, 2 * config.inner)
        self.narrow = nn.Linear(config.inner, config.hidden_size)
        self.squash = ACT2FN["silu"]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.widen(x).chunk(2, dim=-1)
        return self.narrow(self.squash(gate) * up)


class Look(nn.Module):
    """Attention of 4 query heads over 2 key/value heads, from one projection ``all_in_one``."""

    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.num_attention_heads, 16
        width = self.heads * self.head_dim
        self.all_in_one = nn.Linear(config.hidden_size, 2 * width)
        self.put_back = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        parts = self.all_in_one(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        n = self.heads
        q, k, v = parts[:, :n], parts[:, n : n + n // 2], parts[:, n + n // 2 :]
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.put_back(out.transpose(1, 2).flatten(2))


class Floor(nn.Module):
    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__()
        self.look, self.think = Look(config), Think(config)
        self.before_look, self.before_think = (nn.LayerNorm(config.hidden_size) for _ in "12")

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.look(self.before_look(x), mask)
        return x + self.think(self.before_think(x))


class MadeUpModel(PreTrainedModel):
    config_class = MadeUpConfig
    base_model_prefix = "tower"

    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.floors = nn.ModuleList([Floor(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> BaseModelOutput:
        n = input_ids.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool).tril()[None, None]  # [1, 1, length, length]
        if attention_mask is not None:
            # A padded position sees itself, so that its row of the softmax is not empty.
            mask = mask & attention_mask[:, None, None].bool() | torch.eye(n, dtype=torch.bool)
        x = self.words(input_ids)
        for floor in self.floors:
            x = floor(x, mask)
        return BaseModelOutput(last_hidden_state=x)


class MadeUpForCausalLM(PreTrainedModel):
    config_class = MadeUpConfig
    base_model_prefix = "tower"

    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__(config)
        self.tower = MadeUpModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tower.words

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kw: Any) -> CausalLMOutput:
        logits = self.lm_head(self.tower(input_ids, **kw).last_hidden_state)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The recipe, and what transformers and these tests need to build the model by name."""
    AutoConfig.register(NAME, MadeUpConfig, exist_ok=True)
    AutoModelForCausalLM.register(MadeUpConfig, MadeUpForCausalLM, exist_ok=True)
    monkeypatch.setitem(tiny_models.FAMILIES, NAME, lambda: MadeUpConfig(initializer_range=0.15))
    ssah.register_family(
        NAME,
        ssah.Family(
            layers="floors",
            ffn=ssah.FFN(
                "think.narrow", "think.widen", fused=True, module="think", act="think.squash"
            ),
            attention=ssah.Attention("look.put_back", "look.all_in_one", layout="qkv"),
        ),
    )
    yield
    del families.FAMILIES[NAME]


COLUMNS = [column for column in family_checks.CHECKS if column != "FSDP2"]  # other processes


@pytest.mark.parametrize("column", COLUMNS)
def test_everything_that_holds_for_a_family_holds_for_it(column: str) -> None:
    family_checks.CHECKS[column](NAME)


def test_an_entry_that_does_not_fit_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build(NAME)
    entry = families.FAMILIES[NAME]
    assert entry.ffn is not None
    fusion = replace(entry.ffn, fused=False, module=None, act=None)
    for wrong, message in (
        (replace(entry, layers="layers"), "no module 'tower.layers'.*MadeUpModel.*register"),
        (replace(entry, ffn=fusion), "widen' has 80 outputs, twice .*narrow'.*fused=True"),
    ):
        monkeypatch.setitem(families.FAMILIES, NAME, wrong)
        with pytest.raises(ValueError, match=message):
            ssah.find_modules(model)
    monkeypatch.setitem(families.FAMILIES, NAME, entry)
    monkeypatch.setattr(MadeUpConfig, "attribute_map", {"hidden_size": "width"})
    with pytest.raises(ValueError, match=r"no 'num_attention_heads'.*MadeUpConfig\.attribute_map"):
        ssah.find_modules(model)


def test_commands_know_it(tmp_path: Path) -> None:
    model = tiny_models.build(NAME)
    model.config.save_pretrained(tmp_path)
    found = as_json("info", "--model", tmp_path)["model"]
    assert (found["class"], found["units"]) == ("MadeUpForCausalLM", 2 * (40 + 64))
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_its_gated_product_runs_through_the_fused_operator() -> None:
    """Although its module is not of transformers: it came with the model's class."""
    found = ssah.find_modules(tiny_models.build(NAME), "mlp")
    assert [module.gated is not None for module in found.values()] == [True, True]


def test_no_other_room_names_an_architecture() -> None:
    """Or a new entry would have to be repeated there."""
    known = {*families.FAMILIES, *families.WITHOUT_MODULES}
    package = Path(ssah.__file__).parent
    named = {}
    for path in package.rglob("*.py"):
        if path.parent.name != "units":
            nodes = ast.walk(ast.parse(path.read_text()))
            texts = {node.value for node in nodes if isinstance(node, ast.Constant)}
            if known & texts:
                named[str(path.relative_to(package))] = known & texts
    assert not named
