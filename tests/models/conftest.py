"""What the tests of models share."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import bnb_layouts
import pytest
import torch
from packed_models import FOUR_BIT, SCHEMES, Build
from tiny_models import _LLAMA
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from ssah.models import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model in ``plain``, whose sizes every scheme takes, and a GGUF file beside it."""
    path = tmp_path_factory.mktemp("quantised")
    sizes = {"vocab_size": 800, "hidden_size": 64, "intermediate_size": 128}
    config = LlamaConfig(**{**_LLAMA, **sizes}, mlp_bias=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path / "plain")
    if importlib.util.find_spec("gguf") is not None:
        import tiny_gguf

        tiny_gguf.write(path / "tiny.gguf")
    return path


@pytest.fixture(scope="module")
def build(folder: Path) -> Iterator[Build]:
    """Makes a quantised model anew."""

    def made(scheme: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        config = SCHEMES[scheme][1]()
        if scheme == "gguf":
            return load_model(str(folder / "tiny.gguf"), packed=True)[0]
        name, _, layout = scheme.partition(" ")
        four_bit = name in FOUR_BIT
        with bnb_layouts.processor(lays_out=bool(layout)) if four_bit else nullcontext():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                folder / "plain", quantization_config=config, dtype=dtype
            ).eval()
        if layout == "has run":
            bnb_layouts.run_once(model)
        return model

    bnb = importlib.util.find_spec("bitsandbytes") is not None
    with bnb_layouts.kernel() if bnb else nullcontext():
        yield made
