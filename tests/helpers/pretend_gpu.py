"""A GPU that is not there: tensors on ``cuda`` with values on the host, and who waits for them.

A wait is a place where the host cannot go on before the GPU has done all that it was given:

    x.item(), bool(x), x.tolist()      the host reads a value
    x.nonzero(), x[mask], bincount     the size of a result depends on values
    x.to("cuda")                       of memory that is not pinned: the copy is awaited
    x.cpu()                            a result is brought back

Every operator runs on the values, so that what is computed can be compared with the CPU's own. Of
an operator of ssah all that comes before its kernel runs as on a GPU (the checks of arguments, of
memory and of indices), and then the kernel of the CPU.

    with PretendGPU() as gpu:
        x = torch.ones(3).to("cuda:0")
        float(x.sum())
    print(gpu.said())  # the copy and the sum, each with its line

A backward pass needs streams that a torch without a GPU does not have, unless the device is of
another kind: ``PretendGPU("lazy")`` has one, and no autocast.
"""

from __future__ import annotations

import ctypes
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from ssah_kernels import backends

aten = torch.ops.aten
_KINDS = {"cuda": 1, "meta": 14, "lazy": 17}  # of c10::DeviceType
_N_KINDS = 21
KERNEL = backends.kernel
_ROOT = Path(__file__).parents[2]
_OURS = tuple(str(_ROOT / room) for room in ("ssah", "ssah_kernels"))
# The host must know their values to know the size of what comes out.
_SIZED_BY_VALUES = {
    "nonzero",
    "masked_select",
    "bincount",
    "unique_consecutive",
    "unique_dim",
    "_unique2",
    "repeat_interleave",
    "equal",  # one value, which the host reads
}


class OnDevice(torch.Tensor):
    """A tensor [...] on the GPU; ``inner`` has its values, on the host."""

    inner: Tensor
    gpu: PretendGPU

    @staticmethod
    def __new__(cls, inner: Tensor, gpu: PretendGPU) -> OnDevice:
        shape, strides = inner.shape, inner.stride()
        # One that is made in inference mode could be no view of a parameter, made outside.
        with torch.inference_mode(False):
            made = torch.Tensor._make_wrapper_subclass(
                cls,
                shape,
                strides=strides,
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=gpu.device,
            )
        made.inner, made.gpu = inner, gpu
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A thread of its own, such as one that hashes weights, has no mode.
        gpu = next(x.gpu for x in tree_leaves((args, kwargs)) if isinstance(x, OnDevice))
        return gpu.__torch_dispatch__(func, types, args, kwargs)

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"OnDevice({self.inner!r})"


@contextmanager
def guarded(device: torch.device) -> Iterator[None]:
    """torch switches devices by a guard, which a build for the CPU alone has none of for a GPU:
    inside the block it has that of ``meta``, which switches nothing."""
    torch._C._ensureCUDADeviceGuardSet()  # of a build for CUDA, where there is no GPU
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * _N_KINDS).in_dll(
        library, "_ZN3c104impl26device_guard_impl_registryE"
    )
    kind = _KINDS[device.type]
    before = guards[kind]
    guards[kind] = before or guards[_KINDS["meta"]]
    try:
        yield
    finally:
        guards[kind] = before


@dataclass(frozen=True)
class Wait:
    """One wait: what it was for, and the line of ssah (else of the test) that asked for it."""

    what: str
    where: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, OnDevice) else x


def _where() -> str:
    """The innermost line of ssah, or else of this project, on the stack."""
    frames = traceback.extract_stack()
    for own in (_OURS, (str(_ROOT / "tests"),)):
        for frame in reversed(frames):
            if frame.filename.startswith(own) and frame.filename != __file__:
                return f"{Path(frame.filename).relative_to(_ROOT)}:{frame.lineno}"
    return "outside"


def replace_tensors(model: nn.Module, there: Callable[[Tensor], Tensor]) -> None:
    """``there(x)`` in place of every parameter and buffer x of ``model``; what is tied stays so."""
    moved: dict[int, Tensor] = {}

    def replaced(x: Tensor) -> Tensor:
        if id(x) not in moved:
            is_parameter = isinstance(x, nn.Parameter)
            moved[id(x)] = nn.Parameter(there(x), x.requires_grad) if is_parameter else there(x)
        return moved[id(x)]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            held.update({name: x if x is None else replaced(x) for name, x in held.items()})


class PretendGPU(TorchDispatchMode):
    """Inside the block there is a GPU, whose waits are listed; see the top of this file."""

    def __init__(self, kind: str = "cuda") -> None:
        super().__init__()
        self.device = torch.device(kind, 0)
        self.waits: list[Wait] = []
        self._entered: list[ExitStack] = []
        self._pinned: set[int] = set()  # addresses of memory that copies need not wait for

    def __enter__(self) -> PretendGPU:
        stack = ExitStack()
        self._entered.append(stack)  # it is entered again within itself
        stack.enter_context(guarded(self.device))
        # torch would look for a driver as soon as a device is named.
        stack.enter_context(mock.patch("torch.cuda._lazy_init"))
        # torch.tensor(..., device="cuda") would go to a real one, unseen by any mode.
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._entered.pop().close()

    def take(self, model: nn.Module) -> None:
        """Move ``model`` here. (Its own ``to`` would keep parameters, and change their data.)"""
        replace_tensors(model, lambda x: x.detach().to(self.device))

    def said(self) -> str:
        """All waits, one a line."""
        return "\n".join(map(str, self.waits))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        on_device = any(isinstance(x, OnDevice) for x in tree_leaves((args, kwargs)))
        if func.namespace == "ssah" and on_device:
            return self._operator(func, args, kwargs)
        if func is aten.is_pinned.default:
            return args[0].data_ptr() in self._pinned
        if func in (aten._pin_memory.default, aten.pin_memory.default):
            return self._pin(args[0].clone())
        if kwargs.pop("pin_memory", False):
            return self._pin(func(*args, **kwargs))
        with self:  # what is composed of other operators, which inference mode brings here whole
            composed = func.decompose(*args, **kwargs)
        if composed is not NotImplemented:
            return composed
        self._note(func, args, kwargs)
        if func is aten._fused_sdp_choice.default:
            return 0  # attention in steps that any device has
        device = kwargs.get("device")
        if device is not None:
            on_device = torch.device(device).type != "cpu"
            kwargs["device"] = torch.device("cpu")
        if func is aten._to_copy.default:
            kwargs.pop("non_blocking", None)
            out = func(_inner(args[0]), **kwargs)
            return OnDevice(out, self) if on_device else out
        before = {id(_inner(x)): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))

        def outer(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            # What is changed in place is returned, and must be the same tensor.
            return before[id(x)] if id(x) in before else OnDevice(x, self) if on_device else x

        return tree_map(outer, out)

    def _pin(self, x: Tensor) -> Tensor:
        self._pinned.add(x.data_ptr())
        return x

    def _operator(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operator of ssah: its host side as on a GPU, and then the kernel of the CPU."""

        def kernel(_: str, op: str, __: Any = None) -> Callable[..., Any]:
            run = KERNEL("cpu", op)

            def on_values(*args: Any, **kwargs: Any) -> Any:
                with _disable_current_modes():
                    out = run(*tree_map(_inner, args), **kwargs)
                return tree_map(lambda x: OnDevice(x, self) if isinstance(x, Tensor) else x, out)

            return on_values

        with self, mock.patch.multiple(backends, kernel=kernel, choose=lambda _: "cuda"):
            below = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
            return func.redispatch(below, *args, **kwargs)

    # -------------------------------------------------------------------------------------- waits

    def _note(self, func: Any, args: Any, kwargs: Any) -> None:
        """Remember it where ``func`` waits for the GPU."""
        name = func.overloadpacket.__name__
        first = args[0] if args else None
        if func is aten._to_copy.default:
            to = kwargs.get("device")
            to_device = (
                isinstance(first, OnDevice) if to is None else torch.device(to).type != "cpu"
            )
            self._note_copy(first, to_device, kwargs.get("non_blocking", False), False)
        elif func is aten.copy_.default:
            target, source, *rest = args
            free = bool(rest and rest[0]) or kwargs.get("non_blocking", False)
            to_device = isinstance(target, OnDevice)
            self._note_copy(source, to_device, free, target.data_ptr() in self._pinned)
        elif not isinstance(first, OnDevice):
            return
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            self._note_index(name, args)
        elif name == "_local_scalar_dense":
            self._wait("a value is read")
        elif name in _SIZED_BY_VALUES and kwargs.get("output_size") is None:
            self._wait(f"{name}, whose result the host must know")

    def _note_index(self, name: str, args: Any) -> None:
        for index in args[1]:
            if isinstance(index, Tensor) and not isinstance(index, OnDevice):
                self._wait(f"an index {list(index.shape)} of the host, which is copied")
            # A single value is put where a mask has True without a look at how often that is.
            elif (
                isinstance(index, OnDevice)
                and index.dtype in (torch.bool, torch.uint8)
                and (name == "index" or args[2].numel() != 1)
            ):
                self._wait(f"a boolean index {list(index.shape)}")

    def _note_copy(self, source: Tensor, to_device: bool, free: bool, pinned: bool) -> None:
        from_device = isinstance(source, OnDevice)
        if from_device == to_device:
            return
        pinned = pinned if from_device else source.data_ptr() in self._pinned
        if not (free and pinned):
            kind = "to" if to_device else "from"
            self._wait(f"a copy {kind} the GPU, {source.dtype} {list(source.shape)}")

    def _wait(self, what: str) -> None:
        self.waits.append(Wait(what, _where()))
