"""``ssah bench``: every operator and ``attribute`` on this machine, beside PyTorch.

Every operator is timed in each backend that is there, beside the same formula in eager PyTorch and
under ``torch.compile``: calls are interleaved and inputs rotate, so that no cache answers. Rates
are bytes that the formula must move (read each input once, write each output once) per second.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from ssah.attribution import METRICS, attribute
from ssah.models import move
from ssah.report import SCORING
from ssah.report.pictures import plot_throughput
from ssah.report.terminal.tables import new_table
from ssah.units import find_modules
from ssah_kernels import backends, ops, timing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CASES", "Case", "run"]

_VOCABULARY = 32_000
_TRAINED = 0.2  # share of the rows that the masked operators update
_BETA1, _BETA2, _EPS, _DECAY = 0.9, 0.999, 1e-8, 0.01

Args = tuple[Any, ...]
Make = Callable[[int, int, torch.dtype, torch.device], Args]


@dataclass(frozen=True)
class Case:
    """One operator.

    Attributes:
        op: its name.
        tensors: how many tensors of the first argument's size a call reads and writes.
        make: [rows, columns, dtype, device] -> arguments of both functions.
        ours: the operator.
        plain: the same in PyTorch, sums in float32.
    """

    op: str
    tensors: int
    make: Make
    ours: Callable[..., Any]
    plain: Callable[..., Any]


# ------------------------------------------------------------------------------------ operators


def _activations(n: int) -> Make:
    def make(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Args:
        shape = (rows, columns)
        return tuple(torch.randn(shape, device=device).to(dtype) for _ in range(n))

    return make


def _sums(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.float()
    return y.sum(0), (y * y).sum(0)


def _gated_plain(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    product = F.silu(gate) * up
    return product, *_sums(product)


def _gated_backward_plain(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    sigmoid = torch.sigmoid(gate)
    return grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid


def _update_arguments(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Args:
    """grad, two states (compact), parameter, index of the trained rows, lr and step."""
    n = round(_TRAINED * rows)
    index = torch.randperm(rows, device=device)[:n].sort().values
    grad = torch.randn(n, columns, device=device).to(dtype)
    state = [torch.zeros_like(grad), torch.zeros_like(grad)]
    param = torch.randn(rows, columns, device=device).to(dtype)
    scalars = [torch.tensor(value, device=device) for value in (1e-5, 10.0)]
    return grad, *state, param, index, *scalars


def _adamw(g: Tensor, m: Tensor, v: Tensor, p: Tensor, i: Tensor, lr: Tensor, t: Tensor) -> None:
    ops.masked_adamw_([p], [g], [m], [v], [i], [0], lr, t, weight_decay=_DECAY)


def _adamw_plain(
    g: Tensor, m: Tensor, v: Tensor, p: Tensor, i: Tensor, lr: Tensor, t: Tensor
) -> None:
    grad, weight = g.float(), p.index_select(0, i).float()
    mean = torch.lerp(m.float(), grad, 1 - _BETA1)
    square = _BETA2 * v.float() + (1 - _BETA2) * grad * grad
    weight = weight * (1 - lr * _DECAY)
    size = square.sqrt() / (1 - _BETA2**t).sqrt() + _EPS
    weight = weight - lr / (1 - _BETA1**t) * mean / size
    m.copy_(mean)
    v.copy_(square)
    p.index_copy_(0, i, weight.to(p.dtype))


def _sgd(g: Tensor, m: Tensor, _: Tensor, p: Tensor, i: Tensor, lr: Tensor, t: Tensor) -> None:
    ops.masked_sgd_([p], [g], [m], [i], [0], lr, t, momentum=_BETA1)


def _sgd_plain(
    g: Tensor, m: Tensor, _: Tensor, p: Tensor, i: Tensor, lr: Tensor, t: Tensor
) -> None:
    mean = _BETA1 * m.float() + g.float()
    weight = p.index_select(0, i).float() - lr * mean
    m.copy_(mean)
    p.index_copy_(0, i, weight.to(p.dtype))


def _moments(x: Tensor) -> None:
    ops.channel_moments_(x, *ops.new_moments(x))


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return ops.gated_moments(gate, up, *ops.new_moments(gate))


def _taylor(x: Tensor, grad: Tensor) -> None:
    signed = x.new_zeros(x.shape[-1], dtype=torch.float64)
    ops.taylor_moments_(x, grad, signed, torch.zeros_like(signed))


def _norm(g: Tensor) -> Tensor:
    return ops.masked_grad_norm([g], [None], [0])


CASES: dict[str, Case] = {
    case.op: case
    for case in (
        Case("channel_moments_", 1, _activations(1), _moments, _sums),
        Case("gated_moments", 3, _activations(2), _gated, _gated_plain),
        Case(
            "gated_moments_backward",
            5,
            _activations(3),
            torch.ops.ssah.gated_moments_backward,
            _gated_backward_plain,
        ),
        Case("taylor_moments_", 2, _activations(2), _taylor, lambda x, g: _sums(x * g)),
        Case(
            "column_sq_norms",
            1,
            _activations(1),
            ops.column_sq_norms,
            lambda w: w.float().square().sum(0),
        ),
        Case("masked_adamw_", 7, _update_arguments, _adamw, _adamw_plain),
        Case("masked_sgd_", 5, _update_arguments, _sgd, _sgd_plain),
        Case(
            "masked_grad_norm",
            1,
            _activations(1),
            _norm,
            lambda g: torch.linalg.vector_norm(g, dtype=torch.float32),
        ),
    )
}


@dataclass(frozen=True)
class Settings:
    """What is measured: shapes, types, rounds, and how much a cache may hold (bytes)."""

    rows: int
    columns: int
    dtypes: tuple[torch.dtype, ...]
    rounds: int
    layers: int
    hidden: int
    length: int
    scoring_rounds: int
    cache_bytes: int = 64 << 20


FULL = Settings(4096, 4096, (torch.bfloat16, torch.float32), 11, 8, 1024, 256, 7)
QUICK = Settings(1024, 4096, (torch.bfloat16,), 5, 4, 512, 64, 3)
_BATCH = 8  # rows of the batches that are scored


def measure_op(
    case: Case, settings: Settings, dtype: torch.dtype, device: torch.device, compiled: bool
) -> dict[str, Any]:
    """One row: gigabytes per second of every implementation, and ratios of time."""
    torch.manual_seed(0)
    shape = settings.rows, settings.columns
    first = case.make(*shape, dtype, device)[0]
    n_bytes = case.tensors * first.numel() * first.element_size()
    inputs = timing.rotating(
        lambda: case.make(*shape, dtype, device), n_bytes, settings.cache_bytes
    )

    def timed(function: Callable[..., Any], backend: str | None = None) -> Callable[[int], None]:
        def run(i: int) -> None:
            with ExitStack() as stack:
                if backend is not None:
                    stack.enter_context(backends.use(backend))
                function(*inputs[i % len(inputs)])
                _synchronize(device)

        return run

    calls = {name: timed(case.ours, name) for name in _usable(case.op, device)}
    calls["eager"] = timed(case.plain)
    if compiled:
        calls["compile"] = timed(torch.compile(case.plain, dynamic=False))
    with torch.no_grad():
        times = timing.interleave(calls, repeats=settings.rounds, warmup=1)
    chosen = backends.choose(device)
    seconds = {name: timing.percentiles(values) for name, values in times.items()}
    return {
        "op": case.op,
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": n_bytes,
        "seconds": seconds,
        "gigabytes_per_second": {name: n_bytes / s["p50"] / 1e9 for name, s in seconds.items()},
        "faster_than": {
            name: timing.ratio(times, name, chosen) for name in times if name != chosen
        },
    }


def _usable(op: str, device: torch.device) -> list[str]:
    """Backends that run ``op`` on tensors of this device, the one that serves them first."""
    chosen = backends.choose(device)
    served = {"cpu": ["cpu"], "cuda": ["cuda", "triton"]}.get(device.type, ["triton"])
    names = [chosen, *served, "reference"]
    return [name for name in dict.fromkeys(names) if backends.missing(name) is None]


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# ------------------------------------------------------------------------------------ attribute


def build_model(layers: int, hidden: int) -> PreTrainedModel:
    """A Llama with random weights in bfloat16; heads of 64, two for each key/value head."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def _scores_by_hooks(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> None:
    """Eager scoring: sums of the input of every B, by hooks on the backbone's forward."""

    def hook(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        _sums(args[0].flatten(0, -2))

    handles = [
        module.down.register_forward_pre_hook(hook) for module in find_modules(model).values()
    ]
    model.base_model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()


def measure_attribute(settings: Settings, device: torch.device, compiled: bool) -> dict[str, Any]:
    """Tokens per second of ``attribute`` under every metric, beside the backbone's own forward."""
    model = move(build_model(settings.layers, settings.hidden), device)
    ids = torch.randint(0, _VOCABULARY, (3, _BATCH, settings.length), device=device)
    n_tokens = _BATCH * settings.length
    batches = [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]
    backbone = torch.compile(model.base_model, dynamic=False) if compiled else None

    def timed(function: Callable[[dict[str, Tensor]], Any]) -> Callable[[int], None]:
        def run(i: int) -> None:
            function(batches[i % len(batches)])
            _synchronize(device)

        return run

    def scored(metric: str) -> Callable[[int], None]:
        return timed(lambda batch: attribute(model, [batch], metric=metric))

    calls = {metric: scored(metric) for metric in METRICS}
    calls["hooks"] = timed(lambda batch: _scores_by_hooks(model, batch))
    calls["eager"] = timed(lambda batch: model.base_model(**batch, use_cache=False))
    if backbone is not None:
        calls["compile"] = timed(lambda batch: backbone(**batch, use_cache=False))
    with torch.inference_mode():
        times = timing.interleave(calls, repeats=settings.scoring_rounds, warmup=1)
    seconds = {name: timing.percentiles(values) for name, values in times.items()}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": n_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "seconds": seconds,
        "tokens_per_second": {name: n_tokens / s["p50"] for name, s in seconds.items()},
        "time_over_eager": {name: timing.ratio(times, name, "eager") for name in times},
    }


# ------------------------------------------------------------------------------------------ all


def run(out: Path, *, quick: bool, threads: int | None = None) -> dict[str, Any]:
    """Measure, print tables, and write ``bench.json`` and ``bench.png`` to ``out``.

    Args:
        out: a folder.
        quick: one small shape in bfloat16 and no ``torch.compile``: under a minute.
        threads: of torch; None leaves them as they are.

    Returns:
        What ``bench.json`` holds, as plain data.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console(highlight=False)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    no_compile = "left out by --quick" if quick else _compile_missing(device)
    compiled = no_compile is None
    settings = QUICK if quick else FULL
    measured: list[dict[str, Any]] = []
    columns_shown = (TextColumn("{task.description:24}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns_shown, console=console, transient=True) as bar:
        task = bar.add_task("", total=len(CASES) * len(settings.dtypes) + 1)
        for dtype in settings.dtypes:
            for case in CASES.values():
                bar.update(task, description=case.op)
                measured.append(measure_op(case, settings, dtype, device, compiled))
                bar.advance(task)
        bar.update(task, description="attribute")
        scoring = measure_attribute(settings, device, compiled)
        read = _read_bandwidth(device)
        bar.advance(task)
    result = {
        **timing.facts(),
        "device": str(device),
        "backend": backends.choose(device),
        "quick": quick,
        "compile": no_compile or "measured",
        "read_gigabytes_per_second": read,
        "operators": measured,
        "attribute": scoring,
    }
    for dtype in dict.fromkeys(row["dtype"] for row in measured):
        console.print(_op_table(result, dtype))
    console.print(_attribute_table(scoring))
    out.mkdir(parents=True, exist_ok=True)
    picture = plot_throughput(result, out / "bench.png")
    result["picture"] = str(picture)
    (out / "bench.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    console.print(f"Written: {out / 'bench.json'}, {picture}")
    return result


def _compile_missing(device: torch.device) -> str | None:
    """Why ``torch.compile`` cannot run here; None if it can."""
    if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "no C++ compiler"
    if device.type != "cpu" and backends.missing("triton") is not None:
        return "no triton"
    return None


def _read_bandwidth(device: torch.device) -> float | None:
    """Gigabytes per second that a loop of plain loads reaches; None without such a loop here."""
    if device.type != "cpu" or backends.missing("cpu") is not None:
        return None
    n_bytes = 256 << 20
    times = timing.interleave({"read": timing.read_bandwidth(n_bytes)}, repeats=5, warmup=1)
    return n_bytes / timing.percentiles(times["read"])["p50"] / 1e9


def _op_table(result: Mapping[str, Any], dtype: str) -> Table:
    measured = [row for row in result["operators"] if row["dtype"] == dtype]
    names = list(dict.fromkeys(name for row in measured for name in row["seconds"]))
    compared = [name for name in ("eager", "compile") if name in names]
    read = result["read_gigabytes_per_second"]
    rows, columns = measured[0]["shape"]
    limit = "" if read is None else f" (reading alone: {read:.1f})"
    table = new_table(
        f"Operators on {dtype} [{rows}, {columns}], GB/s{limit}",
        ("operator",),
        (*names, *(f"vs {name}" for name in compared)),
    )
    for row in measured:
        rates = row["gigabytes_per_second"]
        table.add_row(
            row["op"],
            *(f"{rates[name]:.3g}" if name in rates else "-" for name in names),
            *(f"{row['faster_than'][name]:.1f}x" for name in compared),
        )
    return table


def _attribute_table(scoring: Mapping[str, Any]) -> Table:
    table = new_table(
        f"attribute, Llama of {scoring['parameters'] / 1e6:.0f} M random parameters, "
        f"{scoring['dtype']}, {scoring['tokens']} tokens a batch",
        ("",),
        ("tokens/s", "time / forward"),
    )
    for name, rate in scoring["tokens_per_second"].items():
        ratio = scoring["time_over_eager"][name]
        table.add_row(SCORING[name], f"{rate:,.0f}", f"{ratio:.2f}x")
    return table
