"""Quantised models: scored and ablated as they are, never trained.

What a packed weight stands for is read from the module itself: its output on the identity.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import bnb_layouts
import pytest
import tiny_chat
import torch
from commands import call, fails
from plans import batch, draw
from scores import TOLERANCE, assert_close, expected, ragged
from tiny_models import _LLAMA
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import ssah
from ssah.attribution import METRICS, attribute, column_sq_norms
from ssah.models import ModelError, dequantised, load_model, locate, packed_modules, weights_hash
from ssah.models import packed as quantised
from ssah.units import find_modules

Build = Callable[..., PreTrainedModel]


def _missing(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")


def _bnb(**options: Any) -> Any:
    _missing("bitsandbytes", "accelerate")
    from transformers import BitsAndBytesConfig

    # It warns of every product that its input is cast.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return BitsAndBytesConfig(**options)


def _torchao(name: str, **options: Any) -> Any:
    _missing("torchao")
    from torchao import quantization
    from transformers import TorchAoConfig

    if "group" in options:
        options["granularity"] = quantization.PerGroup(options.pop("group"))
    return TorchAoConfig(getattr(quantization, name)(**options))


# What each scheme is called, and its configuration; some activations are over the threshold.
SCHEMES: dict[str, tuple[str, Callable[[], Any]]] = {
    "bnb-8bit": (
        "bitsandbytes 8-bit",
        lambda: _bnb(load_in_8bit=True, llm_int8_threshold=1.5),
    ),
    "bnb-fp4": ("bitsandbytes 4-bit", lambda: _bnb(load_in_4bit=True)),
    "bnb-nf4": (
        "bitsandbytes 4-bit",
        lambda: _bnb(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    ),
    "torchao-int8": ("torchao", lambda: _torchao("Int8WeightOnlyConfig")),
    "torchao-int8-dynamic": ("torchao", lambda: _torchao("Int8DynamicActivationInt8WeightConfig")),
    "torchao-int4": (
        "torchao",
        lambda: _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, group=32),
    ),
    "gguf": ("packed GGUF", lambda: _missing("gguf", "accelerate")),
}
FOUR_BIT = ("bnb-fp4", "bnb-nf4")
# 4-bit schemes on a CPU with AVX512-BF16, which computes with bfloat16: before a model has run,
# and after it.
LAID_OUT = tuple(f"{name} {layout}" for name in FOUR_BIT for layout in bnb_layouts.NEW)
SCHEMES |= {name: SCHEMES[name.split()[0]] for name in LAID_OUT}
# How far the product of value and scale moves at most when both are rounded to bfloat16.
ROUNDED = (1 + 2**-8) ** 2 - 1
# Those that round what enters a module; the first two by the largest of its channels.
ROUNDING = ("bnb-8bit", "torchao-int8-dynamic", *LAID_OUT)


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


def stands_for(module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight ``[out, in]`` that a packed module computes with, from what it puts out."""
    if getattr(module.weight, "act_quant_kwargs", None) is not None:
        return module.weight.qdata * module.weight.scale  # it rounds even the identity
    with torch.no_grad():
        out = module(torch.eye(module.in_features, dtype=dtype))
        out = out - module(torch.zeros(1, module.in_features, dtype=dtype))
    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        return bnb_layouts.computed(module)  # it rounds what it puts out
    return out.t()


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {n: stands_for(m.down, model.dtype) for n, m in find_modules(model).items()}


def passing(model: PreTrainedModel, metric: str) -> nn.Module:
    """``model``, or where it passes no gradient although the metric needs one, a copy that does."""
    states = [getattr(p, "quant_state", None) for p in model.parameters()]
    laid_out = any(getattr(state, "packing_format_for_cpu", False) for state in states)
    return bnb_layouts.differentiable(model) if laid_out and metric in METRICS[2:] else model


# -------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scores(build: Build, scheme: str) -> None:
    """Every metric, from activations that hooks captured in the very same model."""
    model = build(scheme)
    assert {found.name for found in packed_modules(model).values()} == {SCHEMES[scheme][0]}
    results = {metric: attribute(model, ragged(), metric=metric) for metric in METRICS[:2]}
    assert {"taylor", "fisher"} == set(METRICS[2:])
    if scheme != "torchao-int8-dynamic":
        results |= {metric: attribute(model, ragged(), metric=metric) for metric in METRICS[2:]}
    else:
        for metric in METRICS[2:]:
            with pytest.raises(ValueError, match=r"o_proj' \(torchao\) passes no gradient"):
                attribute(model, ragged(), metric=metric)
    weights = weights_of(model)
    for metric, result in results.items():
        wanted = expected(passing(model, metric), ragged(), metric, "labels", weights=weights)
        assert_close(result, *wanted, 1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_unfinished_run_goes_on(build: Build, scheme: str, tmp_path: Path) -> None:
    model = build(scheme)
    whole = attribute(model, ragged())

    def broken() -> Iterator[dict[str, Tensor]]:
        yield from ragged()[:1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attribute(build(scheme), broken(), resume_dir=tmp_path, save_every_seconds=0)
    ran: list[int] = []
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda *_: ran.append(1))
    found = attribute(model, ragged(), resume_dir=tmp_path, save_every_seconds=0)
    handle.remove()
    assert len(ran) == len(ragged()) - 1
    assert all(torch.equal(found.scores[name], whole.scores[name]) for name in whole.scores)


@pytest.mark.parametrize("scheme", ["bnb-8bit", "bnb-nf4", "torchao-int8", *LAID_OUT])
def test_scores_in_bfloat16(build: Build, scheme: str) -> None:
    model = build(scheme, torch.bfloat16)
    for metric in ("variance", "fisher"):
        result = attribute(model, ragged(), metric=metric)
        weights = weights_of(model)
        wanted = expected(passing(model, metric), ragged(), metric, "labels", weights=weights)
        assert_close(result, *wanted, TOLERANCE[torch.bfloat16])


def test_the_padding_that_a_scheme_sees_is_the_models_own(build: Build) -> None:
    """LLM.int8 keeps a channel exact where any token of the batch, or padding, is large in it."""
    model = build("bnb-8bit")
    seen: list[Tensor] = []
    layer = model.model.layers[1].mlp.down_proj
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    attribute(model, ragged()[:1])
    with torch.no_grad():
        model(**{k: v for k, v in ragged()[0].items() if k != "labels"})
    assert torch.equal(*seen)
    assert bool((seen[0].abs() >= 1.5).any())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_is_what_its_module_computes_with(build: Build, scheme: str) -> None:
    model = build(scheme)
    for name in packed_modules(model):
        module = model.get_submodule(name)
        if hasattr(module, "in_features"):
            plain = dequantised(module)  # before it runs, and lays its weight out anew
            wanted = stands_for(module)
            if scheme in LAID_OUT:
                assert torch.equal(bnb_layouts.computed(module), plain)
                module.bias = None  # else it is added to what was rounded
                put_out = module(torch.eye(module.in_features))
                assert torch.equal(put_out.t(), plain.bfloat16().float())
            assert plain is not None
            assert plain.shape == (module.out_features, module.in_features)
            # bitsandbytes has 1 / 127**2 in its products to five digits.
            torch.testing.assert_close(plain, wanted, rtol=3e-5, atol=1e-6)
    assert dequantised(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_wrong_weight_is_noticed(
    build: Build, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above tells a dequantisation that is off by a hundredth in one column."""
    model = build(scheme)
    weights = weights_of(model)

    def wrong(module: nn.Module) -> Tensor | None:
        plain = dequantised(module)
        assert plain is not None
        return torch.cat([plain[:, :1] * 1.01, plain[:, 1:]], dim=1)

    monkeypatch.setattr("ssah.attribution.scores.dequantised", wrong)
    result = attribute(model, ragged())
    with pytest.raises(AssertionError, match="times the tolerance"):
        assert_close(
            result, *expected(model, ragged(), "variance", "labels", weights=weights), 1e-4
        )


@pytest.mark.parametrize("scheme", FOUR_BIT)
def test_identity_is_that_of_the_weight_in_every_layout(build: Build, scheme: str) -> None:
    """bitsandbytes rounds value and scale of a weight to bfloat16 as it lays it out anew."""
    models = [build(name) for name in (scheme, *LAID_OUT) if name.startswith(scheme)]
    hashes = [weights_hash(model) for model in models]
    bnb_layouts.run_once(models[1])
    assert {*hashes, weights_hash(models[1])} == {weights_hash(models[0])}
    plain, before, after = ([dequantised(m) for m in bnb_layouts.projections(x)] for x in models)
    for exact, first, second in zip(plain, before, after, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, exact, rtol=ROUNDED, atol=0)
    assert len({weights_hash(build(other)) for other in FOUR_BIT}) == 2
    for place in (0, -1):  # one code of one weight, one scale
        for model in models:
            module = bnb_layouts.projections(model)[0]
            module.weight.data.view(-1)[place] ^= 1
            assert weights_hash(model) != hashes[0]
            module.weight.data.view(-1)[place] ^= 1
    state = bnb_layouts.projections(models[2])[0].weight.quant_state
    state.absmax[0, 0] *= 1.01
    assert weights_hash(models[2]) != hashes[0]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scheme", FOUR_BIT)
def test_scores_do_not_depend_on_having_run(build: Build, scheme: str, metric: str) -> None:
    before, after = (build(name) for name in LAID_OUT if name.startswith(scheme))
    scores = attribute(before, ragged(), metric=metric).scores
    for name, score in attribute(after, ragged(), metric=metric).scores.items():
        assert torch.equal(scores[name], score)


def laid_out(module: Any) -> dict[str, Any]:
    """What bitsandbytes knows of the layout of a 4-bit weight, and its bytes."""
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        return {}
    return {**{name: repr(v) for name, v in vars(state).items()}, "": module.weight.data.tolist()}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_model_is_left_as_it_was(build: Build, scheme: str) -> None:
    model = build(scheme)
    inputs = {"input_ids": batch()["input_ids"]}
    with torch.no_grad():
        before = model(**inputs).logits
    weights = {n: dequantised(model.get_submodule(n)) for n in packed_modules(model) if "proj" in n}
    states = {n: laid_out(model.get_submodule(n)) for n in packed_modules(model)}
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    model.train()
    attribute(model, ragged())
    if scheme != "torchao-int8-dynamic":
        attribute(model, ragged(), metric="taylor")
    with ssah.ablate(model, draw(model)):
        pass
    assert model.training
    assert required == {n: p.requires_grad for n, p in model.named_parameters()}
    assert not any(p.is_inference() for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    for name, weight in weights.items():
        assert torch.equal(dequantised(model.get_submodule(name)), weight)
    for name, state in states.items():
        assert laid_out(model.get_submodule(name)) == state
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, before)


def test_groups_resemble_those_of_the_plain_model(build: Build, folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder / "plain").eval()

    def redundant(model: PreTrainedModel) -> ssah.UnitSet:
        safety, utility = (attribute(model, [part]) for part in ragged())
        return ssah.classify(safety, utility, scu=0.1, ucu=0.1, ru=0.2)["ru"]

    wanted = redundant(plain)
    for scheme, least in (("bnb-8bit", 0.9), ("torchao-int8", 0.9), ("torchao-int4", 0.5)):
        found = redundant(build(scheme))
        share = len(found & wanted) / len(wanted)
        assert share >= least, (scheme, share)  # 0.2 by chance
        assert found != wanted or scheme != "torchao-int4"


# ------------------------------------------------------------------------------------ ablation


@pytest.mark.parametrize("scheme", SCHEMES)
def test_ablation(build: Build, scheme: str) -> None:
    """The same as channels that a hook keeps from entering B, and as zero columns of B."""
    model = build(scheme)
    units = draw(model)
    dense = copy.deepcopy(model)
    for name in units:
        module = dense.get_submodule(name)
        kept = (~units.mask(name)).float()
        if scheme in ROUNDING:
            module.register_forward_pre_hook(lambda _, args, kept=kept: (args[0] * kept,))
            continue
        plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        plain.weight = nn.Parameter(stands_for(module) * kept)
        if module.bias is not None:
            plain.bias = module.bias
        dense.set_submodule(name, plain)
    with torch.no_grad():
        whole, without = model(**batch()).logits, dense(**batch()).logits
        with ssah.ablate(model, units):
            torch.testing.assert_close(model(**batch()).logits, without, rtol=1e-4, atol=1e-4)
            with ssah.ablate(model, units):
                pass
            torch.testing.assert_close(model(**batch()).logits, without, rtol=1e-4, atol=1e-4)
        with pytest.raises(KeyError), ssah.ablate(model, units):
            raise KeyError
        assert torch.equal(model(**batch()).logits, whole)
    assert not torch.allclose(whole, without, rtol=1e-3)


@pytest.mark.parametrize("scheme", ["bnb-nf4", *LAID_OUT])
def test_scores_of_ablated_units_are_zero(build: Build, scheme: str) -> None:
    model = build(scheme)
    units = draw(model)
    with ssah.ablate(model, units):
        scores = attribute(model, ragged()).scores
    for name, score in scores.items():
        assert torch.equal(score == 0, units.mask(name))


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_pruning_and_updates_are_refused(
    build: Build, scheme: str, folder: Path, tmp_path: Path
) -> None:
    model = build(scheme)
    units = draw(model)
    plain = AutoModelForCausalLM.from_pretrained(folder / "plain")
    ssah.freeze(plain, draw(plain)).save_pretrained(tmp_path)
    refused = (
        lambda: ssah.freeze(model, units),
        lambda: ssah.train_only(model, units),
        lambda: ssah.prune(model, units),
        lambda: ssah.load_update(model, tmp_path),
    )
    for attempt in refused:
        with pytest.raises(ValueError, match=rf"quantised \({SCHEMES[scheme][0]}\)") as error:
            attempt()
        assert str(error.value).endswith(quantised.scheme_of(first(model)).instead)


def first(model: PreTrainedModel) -> nn.Module:
    return model.get_submodule(next(iter(packed_modules(model))))


@pytest.mark.parametrize("scheme", ["bnb-8bit", *FOUR_BIT, *LAID_OUT[::2]])
def test_what_the_refusal_advises_works(build: Build, scheme: str) -> None:
    model = build(scheme)
    before = column_sq_norms(next(iter(find_modules(model).values())))
    model.dequantize()
    assert not packed_modules(model)
    after = column_sq_norms(next(iter(find_modules(model).values())))
    # There the module would have computed with values and scales rounded to bfloat16.
    rtol = (1 + ROUNDED) ** 2 - 1 if scheme in LAID_OUT else 1e-4
    torch.testing.assert_close(after, before, rtol=rtol, atol=0)
    ssah.freeze(model, draw(model)).close()


def test_a_weight_that_torchao_cannot_dequantise_is_refused() -> None:
    _missing("torchao")
    from torchao.utils import TorchAOBaseTensor

    class Opaque(TorchAOBaseTensor):
        pass

    module = nn.Linear(2, 2)
    del module.weight
    module.weight = torch.zeros(2, 2).as_subclass(Opaque)
    with pytest.raises(ValueError, match="Opaque, which torchao cannot dequantise"):
        dequantised(module)


# ----------------------------------------------------------------------------- loading, commands


@pytest.mark.parametrize("scheme", ["bnb-8bit", "bnb-nf4", "torchao-int8", *LAID_OUT[2:]])
def test_a_saved_model_loads_quantised_and_the_commands_take_it(
    build: Build, scheme: str, tmp_path: Path
) -> None:
    build(scheme).save_pretrained(tmp_path / "model")
    tiny_chat.tokenizer().save_pretrained(tmp_path / "model")
    model, tokenizer = load_model(str(tmp_path / "model"))
    assert {found.name for found in packed_modules(model).values()} == {SCHEMES[scheme][0]}
    data = ("--data", "builtin:safety", "--limit", 6)
    call("attribute", tmp_path / "model", *data, "--out", tmp_path / "run")
    loader = ssah.data.make_loader("builtin:safety", tokenizer, limit=6, batch_size=8)
    saved = ssah.Attribution.load(tmp_path / "run", model)
    for name, score in attribute(model, loader).scores.items():
        torch.testing.assert_close(saved.scores[name], score)
    about = json.loads(call("info", "--model", tmp_path / "model", "--json").stdout)["model"]
    assert about["quantised"] == SCHEMES[scheme][0].split()[0]
    loaded = ssah.info.describe_model(model, "loaded")
    assert loaded["quantised"] == SCHEMES[scheme][0]
    assert (loaded["parameters"], loaded["owned"]) == (about["parameters"], about["owned"])


def test_info_says_where_a_scheme_is_not_known(build: Build, folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "plain" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    about = json.loads(call("info", "--model", tmp_path, "--json").stdout)["model"]
    assert about["quantised"] == "gptq, which must be dequantised to be scored"
    assert "gptq" in call("info", "--model", tmp_path).output


# ---------------------------------------------------------------------------------------- GGUF


def test_gguf_blocks_are_what_the_package_says_they_are(build: Build, tmp_path: Path) -> None:
    """Beside gguf's own code, for several types; and the scores beside those of the whole model."""
    build("gguf")  # skips where it cannot be read
    import tiny_gguf
    from gguf import GGMLQuantizationType, GGUFReader, quants

    for kind in ("Q8_0", "Q4_0", "Q4_1"):
        file = tmp_path / kind / "tiny.gguf"
        file.parent.mkdir()
        tiny_gguf.write(file, GGMLQuantizationType[kind])
        model = load_model(str(file), packed=True)[0]
        tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
        tensor = tensors["blk.1.ffn_down.weight"]
        wanted = torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type))
        torch.testing.assert_close(dequantised(model.model.layers[1].mlp.down_proj), wanted)
        whole = attribute(load_model(str(file))[0], ragged()).scores
        for name, score in attribute(model, ragged()).scores.items():
            torch.testing.assert_close(score, whole[name], rtol=1e-4, atol=0)


def test_gguf_channels_that_a_module_gathers(build: Build) -> None:
    """Its blocks are as in the file, so that its input is brought into their order."""
    down = build("gguf").model.layers[0].mlp.down_proj
    down.input_permutation = torch.randperm(down.in_features)
    torch.testing.assert_close(dequantised(down), stands_for(down), rtol=1e-5, atol=1e-6)


def test_gguf_commands(build: Build, folder: Path, tmp_path: Path) -> None:
    build("gguf")
    file = folder / "tiny.gguf"
    data = ("--data", "builtin:safety", "--limit", 4)
    for name, options in (("packed", ("--packed",)), ("plain", ())):
        call("attribute", file, *data, "--out", tmp_path / name, *options)
    packed, plain = (ssah.Attribution.load(tmp_path / name) for name in ("packed", "plain"))
    assert packed.units_hash == plain.units_hash
    for name, score in plain.scores.items():
        torch.testing.assert_close(packed.scores[name], score, rtol=1e-4, atol=0)
    shares = ("--scu", 0.1, "--ucu", 0.1, "--ru", 0.2)
    other = ("--data", "builtin:utility", "--limit", 4, "--out", tmp_path / "utility")
    call("attribute", file, *other)
    call(
        "classify", tmp_path / "packed", tmp_path / "utility", *shares, "--out", tmp_path / "groups"
    )
    groups = ("--groups", tmp_path / "groups", "--group", "ru", "--limit", 2)
    rows = [
        json.loads(call("ablate", file, *groups, *options, "--json").stdout)["rows"]
        for options in ((), ("--packed",))
    ]
    for a, b in zip(*rows, strict=True):
        assert a["utility_loss"] == pytest.approx(b["utility_loss"], rel=1e-4)
    line = fails("attribute", file, *data, "--out", tmp_path / "no", "--packed", "--stream")
    assert "--packed is for a model in memory" in line


def test_packed_where_nothing_can_be(build: Build, folder: Path, tmp_path: Path) -> None:
    build("gguf")
    import tiny_gguf
    from gguf import GGMLQuantizationType

    with pytest.raises(ModelError, match="is no GGUF file"):
        load_model(str(folder / "plain"), packed=True)
    tiny_gguf.write(tmp_path / "plain.gguf", GGMLQuantizationType.F32)
    with pytest.raises(ModelError, match=r"no quantised weights.*qwen35"):
        load_model(str(tmp_path / "plain.gguf"), packed=True)


@pytest.mark.real
def test_real_blocks(smollm2: Path) -> None:
    """SmolLM2 with its FFNs and the outputs of attention as the blocks of its file.

    transformers unpacks files of this architecture, with gguf's code: what that gives is what the
    blocks are held against.
    """
    _missing("accelerate")
    from transformers.integrations.gguf.reader import GgufHeader, load_gguf_state_dict
    from transformers.integrations.gguf.utils import GgufLinear

    model, tokenizer = load_model(str(smollm2))
    loader = ssah.data.make_loader("builtin:safety", tokenizer, limit=2, max_length=64)
    whole = attribute(model, loader)
    source, file, _ = locate("smollm2")
    tensors = load_gguf_state_dict(GgufHeader.from_file(f"{source}/{file}"))
    for i, layer in enumerate(model.model.layers):
        for leaf, name in (
            ("ffn_down", "mlp.down_proj"),
            ("ffn_gate", "mlp.gate_proj"),
            ("ffn_up", "mlp.up_proj"),
            ("attn_output", "self_attn.o_proj"),
        ):
            plain, tensor = layer.get_submodule(name), tensors[f"blk.{i}.{leaf}.weight"]
            packed = GgufLinear(plain.in_features, plain.out_features, tensor.ggml_type)
            packed.weight.data = tensor[...]
            layer.set_submodule(name, packed)
            if i == 7:
                torch.testing.assert_close(dequantised(packed), plain.weight.detach())
    assert len(packed_modules(model)) == 30 * 4
    scores = attribute(model, loader).scores
    for name, score in whole.scores.items():
        assert (scores[name] - score).norm() <= 1e-4 * score.norm()
