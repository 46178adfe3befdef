"""The catalogue: every operator of ``torch.ops.ssah`` and its schema.

A copy of this package that is loaded under another name, as the kernels hub loads it, has its
operators under that name: ``_ssah_kernels_cuda_1f3a`` in ``torch.ops._ssah_kernels_cuda_1f3a``. So
one process may hold several copies, the installed package among them.
"""

import torch

_PACKAGE = __name__.rpartition(".")[0]
NAMESPACE = "ssah" if _PACKAGE == "ssah_kernels" else _PACKAGE.replace(".", "_")
operators = getattr(torch.ops, NAMESPACE)

SCHEMAS: dict[str, str] = {
    "channel_moments_": (
        "(Tensor x, Tensor(a!) count, Tensor(b!) mean, Tensor(c!) m2, Tensor? token_mask=None)"
        " -> ()"
    ),
    "gated_moments": (
        "(Tensor gate, Tensor up, Tensor(a!) count, Tensor(b!) mean, Tensor(c!) m2,"
        " Tensor? token_mask=None, *, str act='silu') -> Tensor"
    ),
    "gated_moments_backward": (
        "(Tensor grad, Tensor gate, Tensor up, *, str act='silu')"
        " -> (Tensor grad_gate, Tensor grad_up)"
    ),
    "gated_product": (
        "(Tensor gate, Tensor up, Tensor factors, Tensor arm, *, str act='silu') -> Tensor"
    ),
    "taylor_moments_": (
        "(Tensor x, Tensor grad, Tensor(a!) signed, Tensor(b!) squared, Tensor? token_mask=None)"
        " -> ()"
    ),
    "column_sq_norms": "(Tensor weight) -> Tensor",
    "masked_adamw_": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
        " Tensor?[] indices, int[] dims, Tensor lr, Tensor step, Tensor? grad_scale=None,"
        " Tensor? clip_coef=None, Tensor? seed=None, Tensor(d!)[]? compensations=None,"
        " Tensor(e!)[]? signed=None, Tensor(f!)[]? squared=None,"
        " Tensor(g!)[]? exp_avg_scales=None, Tensor(h!)[]? exp_avg_sq_scales=None,"
        " Tensor? found_inf=None, *, float beta1=0.9,"
        " float beta2=0.999, float eps=1e-08, float weight_decay=0.01, bool maximize=False) -> ()"
    ),
    "bit_masked_adamw_": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
        " Tensor[] masks, Tensor[] offsets, Tensor lr, Tensor step, Tensor? grad_scale=None,"
        " Tensor? clip_coef=None, Tensor? seed=None, *, float beta1=0.9, float beta2=0.999,"
        " float eps=1e-08, float weight_decay=0.01, bool maximize=False) -> ()"
    ),
    "masked_sgd_": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[]? momentum_buffers,"
        " Tensor?[] indices, int[] dims, Tensor lr, Tensor step, Tensor? grad_scale=None,"
        " Tensor? clip_coef=None, Tensor? seed=None, Tensor(d!)[]? compensations=None,"
        " Tensor(e!)[]? signed=None, Tensor(f!)[]? squared=None,"
        " Tensor(g!)[]? momentum_scales=None, Tensor? found_inf=None, *, float momentum=0.0,"
        " float dampening=0.0, float weight_decay=0.0, bool nesterov=False, bool maximize=False)"
        " -> ()"
    ),
    "masked_grad_norm": (
        "(Tensor[] grads, Tensor?[] indices, int[] dims, Tensor? grad_scale=None) -> Tensor"
    ),
}

KERNELS: tuple[str, ...] = tuple(SCHEMAS)


def arguments(op: str) -> list[tuple[str, str]]:
    """(type, name) of every argument of ``op``, in order, as its schema has them."""
    listed = SCHEMAS[op].partition(" -> ")[0].strip("()").split(", ")
    typed = (argument.partition("=")[0].split(" ") for argument in listed if argument != "*")
    return [(kind, name) for kind, name in typed]
