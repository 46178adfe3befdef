"""The catalogue: every operator of ``torch.ops.ssah`` and its schema."""

SCHEMAS: dict[str, str] = {
    "channel_moments_": (
        "(Tensor x, Tensor(a!) count, Tensor(b!) mean, Tensor(c!) m2, Tensor? token_mask=None)"
        " -> ()"
    ),
    "gated_moments": (
        "(Tensor gate, Tensor up, Tensor(a!) count, Tensor(b!) mean, Tensor(c!) m2,"
        " Tensor? token_mask=None, *, str act='silu') -> Tensor"
    ),
    "gated_moments_functional": (
        "(Tensor gate, Tensor up, Tensor? token_mask=None, *, str act='silu')"
        " -> (Tensor output, Tensor count, Tensor mean, Tensor m2)"
    ),
    "gated_moments_backward": (
        "(Tensor grad, Tensor gate, Tensor up, *, str act='silu')"
        " -> (Tensor grad_gate, Tensor grad_up)"
    ),
    "taylor_moments_": (
        "(Tensor x, Tensor grad, Tensor(a!) signed, Tensor(b!) squared, Tensor? token_mask=None)"
        " -> ()"
    ),
    "column_sq_norms": "(Tensor weight) -> Tensor",
}

# What a backend implements; a *_functional operator is composed of these (see autograd.py).
KERNELS: tuple[str, ...] = tuple(op for op in SCHEMAS if not op.endswith("_functional"))
