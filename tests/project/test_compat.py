"""What is private or moving in other libraries: where it is used, and what is said when it is gone.

Each name is taken away in turn; what needs it says so or does without, and nothing else notices.
"""

from __future__ import annotations

import ast
import copy
import importlib
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bnb_layouts
import pytest
import torch
from attribution import test_streaming
from attribution.test_attribution import ragged
from tiny_models import _LLAMA, build
from transformers import AutoModelForCausalLM, LlamaConfig

import ssah
from ssah.attribution import attribute
from ssah.compat import LibraryError, accelerate, bitsandbytes, gguf, trainer, transformers
from ssah.models import load_model
from ssah.units import find_modules

ROOT = Path(ssah.__file__).parent
# Modules of other libraries that are their public face.
PUBLIC = {
    "transformers",
    "transformers.pytorch_utils",
    "transformers.utils",
    *("lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks", "peft"),
    # Its guide to models registers by the first; its command is the second.
    *("lm_eval.api.registry", "lm_eval.__main__"),
}
LIBRARIES = ("transformers", "accelerate", "bitsandbytes", "peft", "torchao", "trl", "lm_eval")
# Private, of torch.nn.Module and hashlib, and the same for years.
STABLE = {"_Hash", "_apply", "_buffers", "_non_persistent_buffers_set", "_parameters"}
# Of the objects of other libraries.
MOVING = {
    *("packing_format_for_cpu", "quant_state", "support_avx512bf16_for_cpu", "SCB"),
    *("all_tied_weights_keys", "tie_weights", "train_sampling_strategy"),
}


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        yield path, ast.parse(path.read_text())


def test_what_is_private_elsewhere_is_used_in_one_room() -> None:
    own: set[str] = set()  # private names that this library gives
    names: list[tuple[str, str]] = []
    modules: list[tuple[str, str]] = []
    for path, tree in sources():
        place = str(path.relative_to(ROOT))
        for node in ast.walk(tree):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    own.add(name)
                case ast.AnnAssign(target=ast.Name(name)):
                    own.add(name)
                case ast.Attribute(ctx=ast.Store(), value=ast.Name("self" | "cls"), attr=name):
                    own.add(name)
                case ast.Attribute(attr=name):
                    names.append((place, name))
                case ast.Import(names=imported):
                    modules += [(place, each.name) for each in imported]
                case ast.ImportFrom(module=str(module)):
                    modules.append((place, module))
    private = {
        (place, name)
        for place, name in names
        if name in MOVING or (name[0] == "_" and name[:2] != "__" and name not in own | STABLE)
    }
    hidden = {
        (place, module)
        for place, module in modules
        if module.split(".")[0] in LIBRARIES and module not in PUBLIC
    }
    found = {place.partition("/")[0]: name for place, name in private | hidden}
    assert found.keys() == {"compat"}, found
    # The search finds what is known to be there.
    assert {name for _, name in private} >= {"_n_gpu", "_apply_gate", "quant_state", "tie_weights"}
    assert ("compat/trainer.py", "transformers.trainer_utils") in hidden


# ------------------------------------------------------------------- names that are taken away


def stream(folder: Path) -> None:
    test_streaming.saved(folder, "llama")
    ssah.stream(folder, test_streaming.batches())


@pytest.mark.parametrize(
    "place",
    [
        "core_model_loading:rename_source_key",
        "core_model_loading:convert_and_load_state_dict_in_model",
        "core_model_loading:WeightRenaming",
        "core_model_loading:WeightConverter",
        "conversion_mapping:get_model_conversion_mapping",
        "modeling_utils:LoadStateDictConfig",
        "modeling_utils:PreTrainedModel._get_dtype_plan",
    ],
)
def test_streaming_says_what_is_gone(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, path = place.partition(":")
    owner = importlib.import_module(f"transformers.{module}")
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    stream(tmp_path / "before")
    test_streaming.saved(tmp_path / "model", "llama")
    with monkeypatch.context() as patch:
        patch.delattr(owner, name)
        with pytest.raises(LibraryError, match=rf"^transformers \d.* has no .*{name}.*pip install"):
            ssah.stream(tmp_path / "model", test_streaming.batches())


def test_weights_that_are_tied_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    transformers.tie_weights(model, set())
    monkeypatch.setattr(type(model), "tie_weights", lambda self, missing_keys: None)
    with pytest.raises(LibraryError, match=r"LlamaForCausalLM\.tie_weights\(missing_keys, recom"):
        transformers.tie_weights(model, set())
    with pytest.raises(LibraryError, match=r"Linear\.all_tied_weights_keys"):
        transformers.tied_weights(torch.nn.Linear(2, 2))


def test_a_gguf_file_needs_what_no_other_model_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    import tiny_chat
    import tiny_gguf
    from transformers.integrations.gguf import dequant, kernels

    tiny_gguf.write(tmp_path / "tiny.gguf")
    build("llama").save_pretrained(tmp_path / "plain")
    tiny_chat.tokenizer().save_pretrained(tmp_path / "plain")
    packed = load_model(str(tmp_path / "tiny.gguf"), packed=True)[0]
    import transformers as theirs

    monkeypatch.delitem(theirs._class_to_module, "GgufConfig")
    monkeypatch.delitem(vars(theirs), "GgufConfig", raising=False)
    monkeypatch.delattr(dequant, "dequantize")
    model, _ = load_model(str(tmp_path / "plain"))
    attribute(model, ragged())
    with pytest.raises(ValueError, match=r"has no transformers\.GgufConfig, which ssah needs to l"):
        load_model(str(tmp_path / "tiny.gguf"))
    with pytest.raises(LibraryError, match=r"dequant\.dequantize, which ssah needs to unpack"):
        attribute(packed, ragged())
    monkeypatch.delattr(dequant, "GGML_BLOCK")
    with pytest.raises(LibraryError, match=r"dequant\.GGML_BLOCK"):
        gguf.TorchKernel().supports(2)
    monkeypatch.delattr(kernels, "_gguf_kernel")
    monkeypatch.setattr(kernels, "get_gguf_kernel", lambda: None)
    with pytest.raises(LibraryError, match=r"kernels\._gguf_kernel, which ssah needs to keep"):
        gguf.keep_blocks()


@pytest.mark.parametrize("flag", ["has_post_expert_norm", "is_transposed", "_apply_gate"])
def test_experts_that_say_another_thing_are_not_called_quantised(
    flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("mixtral")
    experts = model.model.layers[0].mlp.experts
    if flag in vars(experts):
        for layer in model.model.layers:
            delattr(layer.mlp.experts, flag)
    else:
        monkeypatch.delattr(type(experts), flag)
    with pytest.raises(LibraryError, match=rf"^transformers \d.*MixtralExperts\.{flag}") as error:
        find_modules(model)
    assert "dequantise" not in str(error.value)


def test_experts_are_scored_where_their_usual_gate_is_not_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("mixtral", dtype=torch.float64)
    experts = model.model.layers[0].mlp.experts
    known = attribute(model, ragged()).scores
    assert transformers.has_usual_gate(experts)
    monkeypatch.delattr("transformers.integrations.moe._default_apply_gate")
    assert not transformers.has_usual_gate(experts)
    for name, score in attribute(model, ragged()).scores.items():
        torch.testing.assert_close(score, known[name], rtol=1e-12, atol=0)


def test_a_gate_of_the_usual_name_is_not_the_usual_gate() -> None:
    model = build("mixtral")
    experts = model.model.layers[0].mlp.experts

    def _default_apply_gate(gate_up: torch.Tensor) -> torch.Tensor:
        return gate_up[..., : gate_up.shape[-1] // 2]

    experts._apply_gate = _default_apply_gate
    assert not transformers.has_usual_gate(experts)


def test_which_attention_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a run that may go on later needs to know."""
    model = build("llama")
    assert transformers.attention_implementation(model) == "sdpa"
    other = copy.copy(model)

    class Config:
        pass

    other.config = Config()
    with pytest.raises(LibraryError, match=r"Config\._attn_implementation, which ssah needs to t"):
        transformers.attention_implementation(other)


@pytest.mark.parametrize(
    "moved",
    ["_hf_hook", "_old_forward", "offload", "execution_device", "hooks", "AlignDevicesHook"],
)
def test_hooks_of_accelerate(moved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import hooks

    accelerate._check.cache_clear()
    accelerate._check()
    module = torch.nn.Linear(2, 2)
    assert accelerate.hook_of(module) is None
    module.forward = module.forward
    if moved == "AlignDevicesHook":
        monkeypatch.delattr(hooks, moved)
    elif moved == "hooks":
        monkeypatch.setattr(hooks.SequentialHook, "__init__", lambda self: None)
    else:
        own = hooks.add_hook_to_module

        def elsewhere(module: Any, hook: Any) -> Any:
            hooked = own(module, hook)
            del vars(hooked if moved[0] == "_" else hook)[moved]
            return hooked

        monkeypatch.setattr(hooks, "add_hook_to_module", elsewhere)
    accelerate._check.cache_clear()
    try:
        with pytest.raises(LibraryError, match=rf"^accelerate \d.*{moved}.*pip install 'accel"):
            accelerate.hook_of(module)
    finally:
        accelerate._check.cache_clear()


@pytest.mark.parametrize(
    "name",
    [
        "_convert_weight_packed_for_cpu",
        "_convert_weight_packed_for_cpu_inverse",
        "dequantize_4bit",
        "dequantize_blockwise",
    ],
)
def test_4_bit_weights_say_what_is_gone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    from bitsandbytes.nn import Linear4bit

    def made(*, lays_out: bool) -> Any:
        with bnb_layouts.processor(lays_out=lays_out):
            module = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32)
            return module.to("cpu").eval()

    plain, laid_out = made(lays_out=False), made(lays_out=True)
    with bnb_layouts.kernel():
        bnb_layouts.run_once(laid_out)
    uses: dict[str, Callable[[], Any]] = {
        "_convert_weight_packed_for_cpu": bitsandbytes.differentiable(laid_out).__enter__,
        "_convert_weight_packed_for_cpu_inverse": lambda: bitsandbytes.weight_4bit(laid_out),
        "dequantize_4bit": lambda: bitsandbytes.weight_4bit(plain),
        "dequantize_blockwise": lambda: bitsandbytes.identity_4bit(plain),
    }
    monkeypatch.delattr(functional, name)
    with pytest.raises(LibraryError, match=rf"^bitsandbytes \d.* has no bitsandbytes.*\.{name}, "):
        uses[name]()


@pytest.mark.parametrize("name", ["train_sampling_strategy", "warmup_steps"])
def test_training_arguments_that_are_gone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"output_dir": str(tmp_path), "warmup_steps": 0.5, "use_cpu": True}
    assert trainer.training_arguments(in_order=True, **options).get_warmup_steps(10) == 5
    left = [f for f in trainer.fields(trainer.TrainingArguments) if f.name != name]
    monkeypatch.setattr(trainer, "fields", lambda _: left)
    with pytest.raises(LibraryError, match=rf"^transformers \d.* has no TrainingArguments\.{name}"):
        trainer.training_arguments(in_order=True, **options)


def test_gradient_checkpointing_has_had_two_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, old = "activation_checkpointing", "gradient_checkpointing"

    def is_on() -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the old name is deprecated
            args = trainer.training_arguments(
                output_dir=str(tmp_path), use_cpu=True, gradient_checkpointing=True
            )
        return bool(getattr(args, new, False) or getattr(args, old, False))

    assert is_on()
    left = [field for field in trainer.fields(trainer.TrainingArguments) if field.name != new]
    monkeypatch.setattr(trainer, "fields", lambda _: left)
    assert is_on()


def test_a_trainer_of_ours_uses_one_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are several, Trainer would take DataParallel, which copies what a plan shares."""
    monkeypatch.setattr(trainer.TrainingArguments, "n_gpu", property(lambda self: 4))
    args = trainer.training_arguments(output_dir=str(tmp_path), use_cpu=True)
    assert args._n_gpu == 1


# --------------------------------------------------------------------------------- what is said


def run(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=True
    )


_LOADED = "print(*sorted({'peft', 'bitsandbytes', 'trl', 'matplotlib'} & set(sys.modules)))"


@pytest.mark.parametrize(
    "code",
    [
        "import ssah",
        "import ssah; [getattr(ssah, name) for name in ssah.__all__]\n"
        "import ssah.training, ssah.studies.training.arms, ssah.cli",
    ],
)
def test_importing_says_nothing(code: str) -> None:
    """Nor does it import what is not used: bitsandbytes has something to say on some CPUs."""
    found = run(f"import sys\n{code}\n{_LOADED}")
    assert (found.stdout.strip(), found.stderr) == ("", "")


@pytest.mark.exhaustive  # importing says nothing, above; a command imports no more
def test_a_command_says_nothing_of_other_libraries(tmp_path: Path) -> None:
    import tiny_chat

    config = LlamaConfig(**{**_LLAMA, "vocab_size": 800})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tiny_chat.tokenizer().save_pretrained(tmp_path / "model")
    code = f"import sys\nfrom ssah.cli import app\napp(standalone_mode=False)\n{_LOADED}"
    data = ("--data", "builtin:safety", "--limit", "2", "--out", str(tmp_path / "scores"))
    found = run(code, "attribute", str(tmp_path / "model"), *data)
    assert found.stdout.splitlines()[-1] == ""
    said = found.stderr.replace("\r", "\n").splitlines()
    assert [line for line in said if "loading" not in line and "scoring units" not in line] == []


@pytest.mark.exhaustive  # that nothing is said when Trainer is imported is tested above
def test_the_note_on_4_bit_weights_is_left_out_alone() -> None:
    """Of what bitsandbytes says while Trainer is imported: nothing that is trained is packed."""
    # In the place of Trainer's module, which imports all of peft: one that has the name alone.
    code = """
import logging, sys
from importlib.machinery import ModuleSpec
class Finder:
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name == "transformers.trainer" else None
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no")
        logger.warning("something else")
        module.Trainer = object
sys.meta_path.insert(0, Finder())
import ssah.compat.trainer
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("gemm_4bit_forward, later")
"""
    said = run(code).stderr
    assert "gemm_4bit_forward from" not in said
    assert "something else" in said
    assert "gemm_4bit_forward, later" in said
    assert logging.getLogger("bitsandbytes.backends.cpu.ops").filters == []
