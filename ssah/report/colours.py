"""Names and colours of groups and of implementations, the same in tables and in pictures."""

from __future__ import annotations

# Told apart by people with any kind of colour vision (after Okabe and Ito).
COLOURS = {
    "scu": "#d55e00",
    "ucu": "#0072b2",
    "cu": "#009e73",
    "ru": "#8c8c8c",
    "random": "#b07aa1",
}
NAMES = {
    "scu": "safety-critical (SCU)",
    "ucu": "utility-critical (UCU)",
    "cu": "complex (CU)",
    "ru": "redundant (RU)",
    "random": "random",
}

# What `ssah bench` compares: backends of the operators, then PyTorch.
IMPLEMENTATIONS = {
    "cpu": "#0072b2",
    "cuda": "#117733",
    "triton": "#56b4e9",
    "reference": "#bdbdbd",
    "eager": "#e69f00",
    "compile": "#cc79a7",
}
SCORING = {
    "variance": "attribute, variance",
    "norm": "attribute, norm",
    "taylor": "attribute, taylor",
    "fisher": "attribute, fisher",
    "hooks": "eager hooks, sums alone",
    "eager": "forward of the backbone",
    "compile": "forward, torch.compile",
}
