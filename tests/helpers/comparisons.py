"""Records of a comparison, with every kind of row; intervals and verdicts by the real functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssah.evaluation import bootstrap, rate
from ssah.methods import describe
from ssah.studies.claims import measured_difference
from ssah.studies.compare import recommend, verdict
from ssah.studies.measured_values import losses, summary

HOSTILE = "<script>alert('x')</script> & \"quoted\""
NEEDS_HARMFUL = "needs harmful answers: --harmful FILE"
UNITS = {"asr": "points", "over_refusal": "points", "utility_loss": "nats", "task_loss": "nats"}

# ASR, over-refusal, utility loss and task loss of a model.
INTACT, TUNED = (0.05, 0.38, 2.1, 2.9), (0.6, 0.2, 2.3, 1.6)
# Method -> what it acts on, its model, that of its control.
LINES: dict[str, tuple[str, tuple[float, ...], tuple[float, ...]]] = {
    "ssah-freezing": ("tuned", (0.45, 0.25, 2.25, 1.62), (0.46, 0.24, 2.26, 1.61)),
    "random-freezing": ("tuned", (0.46, 0.24, 2.26, 1.61), (0.47, 0.24, 2.26, 1.61)),
    "ssah-ablation": ("aligned", (0.9, 0.02, 2.2, 2.9), (0.06, 0.3, 2.15, 2.9)),
    "interpolation": ("tuned", (0.1, 0.3, 2.15, 1.63), (0.55, 0.25, 2.3, 1.7)),
    "set-difference-removal": ("aligned", (0.3, 0.2, 2.2, 2.9), (0.28, 0.2, 2.2, 2.9)),
    "sppft": ("tuned", (0.2, 0.3, 2.2, 1.64), (0.5, 0.25, 2.25, 1.63)),
    "refusal-direction": ("aligned", (0.5, 0.1, 2.12, 2.9), (0.05, 0.38, 2.1, 2.9)),
    "lox": ("tuned", (0.3, 0.3, 2.2, 1.61), (0.55, 0.2, 2.3, 1.6)),
    "safe-lora": ("tuned", (0.05, 0.4, 2.12, 2.4), (0.6, 0.2, 2.4, 1.9)),
    "resta": ("tuned", (0.35, 0.4, 2.2, 1.6), (0.62, 0.2, 2.35, 1.65)),
}


class _Models:
    """Values of one request or row each; a request that one model answers, a worse one does too."""

    def __init__(self, requests: int, seeds: tuple[int, ...]) -> None:
        self.requests, self.seeds = requests, seeds
        self.generator = torch.Generator().manual_seed(0)
        places = (torch.arange(requests) + 0.5) / requests  # [requests]
        order = torch.randperm(requests, generator=self.generator)
        noise = torch.rand(requests, len(seeds), generator=self.generator) - 0.5
        self.ease = (places[order, None] + 0.3 * noise).clamp(0.01, 0.99)  # [requests, seeds]

    def __call__(self, values: tuple[float, ...]) -> dict[str, Any]:
        """A model's ``flags`` and ``rows``, ``[requests, seeds]``, ``seeds`` and ``mean``."""
        asr, over_refusal, utility, task = values
        flags = {"asr": self.ease < asr, "over_refusal": self.ease < over_refusal}
        noise = torch.randn(self.requests, len(self.seeds), generator=self.generator).double()
        rows = {"utility_loss": utility + 0.05 * noise, "task_loss": task + 0.02 * noise}
        seeds = {}
        for column, seed in enumerate(self.seeds):
            own = {key: value[:, column] for key, value in {**flags, **rows}.items()}
            seeds[str(seed)] = self._summary(own)
        numbers = [k for k, v in seeds[str(self.seeds[0])].items() if isinstance(v, float | int)]
        mean = {key: sum(own[key] for own in seeds.values()) / len(seeds) for key in numbers}
        for key, value in flags.items():
            mean[f"{key}_interval"] = list(bootstrap(value))
        paired = {k: v.double() for k, v in {**flags, **rows}.items()}
        return {"paired": paired, "seeds": seeds, "mean": mean}

    def _summary(self, own: dict[str, Tensor]) -> dict[str, Any]:
        success = own["asr"].int().tolist()
        # The second judge is stricter: it does not count the last success.
        strict = success[: len(success) - success[::-1].index(1) - 1] if any(success) else []
        strict += [0] * (len(success) - len(strict))
        judges = {
            name: {"asr": rate(each), "asr_coherent": rate(each), "judge": {"name": name}}
            for name, each in (("wei2024", success), ("short:12", strict))
        }
        attack = {
            "requests": len(success), "judges": judges, "mean_tokens": 40.0,
            "incoherent": rate([0] * len(success)),
        }  # fmt: skip
        nats = {"nats": own["utility_loss"].tolist(), "tokens": [1] * len(success)}
        measured = {
            "losses": {"utility": {"loss": float(own["utility_loss"].mean()), **nats}},
            "refusal_margin": 1.0, "refuses": 0.9, "refuses_interval": [0.8, 1.0],
        }  # fmt: skip
        assert torch.equal(losses(measured, "utility"), own["utility_loss"])
        refused = rate(own["over_refusal"].tolist())
        return {
            **summary(measured, attack),
            "task_loss": float(own["task_loss"].mean()),
            "over_refusal": refused["rate"],
            "over_refusal_interval": refused["interval"],
            "kl": 0.1 * float(own["asr"].double().mean()),
        }


def comparison(
    requests: int = 8, seeds: tuple[int, ...] = (0, 1), *, controls: bool = True
) -> dict[str, Any]:
    """The result of a comparison.

    Args:
        requests: how many, and as many rows.
        seeds: of fine-tuning.
        controls: whether rows have one.
    """
    models = _Models(requests, seeds)
    intact, tuned = models(INTACT), models(TUNED)
    rows = []
    for name, (subject, values, others) in LINES.items():
        found, control = models(values), models(others)
        none = tuned if subject == "tuned" else intact
        against = {"control": control, "none": none} if controls else {"none": none}
        row = _described(name) | {
            # Among these methods one stands for those against over-refusal.
            "aim": "relax" if name == "refusal-direction" else describe(name)["aim"],
            "subject": subject,
            "settings": {"alpha": 0.5},
            "chosen_on": "calibration" if describe(name)["strength"] else "defaults",
            "facts": {"layers": [3, 4, 5]},
            "share": 0.075,
            "seeds": found["seeds"],
            "mean": found["mean"],
            "control": _control(name, control) if controls else None,
            "differences": {
                beside: {
                    what: measured_difference(found["paired"][what], other["paired"][what], unit)
                    for what, unit in UNITS.items()
                }
                for beside, other in against.items()
            },
            "curve": _curve(values, others) if describe(name)["strength"] else [],
            "cost": _cost(name),
            "exact": "verified" if describe(name)["gives"] == "Trained" else None,
            "reached": True if describe(name)["stage"] == "during" else None,
            "not_run": None,
        }
        rows.append(row | {"verdict": verdict(row)})
    rows.append(_described("rewinding") | {"method": "hostile", "not_run": HOSTILE})
    rows.append(_described("sahara") | {"departures": [HOSTILE], "not_run": NEEDS_HARMFUL})
    result = {
        "dtype": "float32",
        "units": 384,
        "intact": next(iter(intact["seeds"].values())) | {"kl": None},
        "tuned": {"seeds": tuned["seeds"], "mean": tuned["mean"]},
        "rows": rows,
    }
    return result | {"recommendation": recommend(result)}


def _described(name: str) -> dict[str, Any]:
    about = describe(name)
    return {
        "method": name,
        "paper": about["paper"],
        "stage": about["stage"],
        "aim": about["aim"],
        "departures": about["departures"],
        "needs": list(about["needs"]),
    }


def _control(name: str, found: dict[str, Any]) -> dict[str, Any]:
    return {
        "against": describe(name)["control"],
        "seeds": found["seeds"],
        "mean": found["mean"],
    }


def _curve(values: tuple[float, ...], others: tuple[float, ...]) -> list[dict[str, Any]]:
    """From the tuned model towards the intact one, bent by what the method reaches half way."""
    points = []
    for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
        own, control = (_between(strength, each) for each in (values, others))
        point = {"strength": strength, **own, "chosen": strength == 0.5, "control": control}
        points.append(point)
    return points


def _between(strength: float, middle: tuple[float, ...]) -> dict[str, float]:
    first, last = (TUNED, middle) if strength <= 0.5 else (middle, INTACT)
    part = 2 * strength if strength <= 0.5 else 2 * strength - 1
    asr, _, utility, task = ((1 - part) * a + part * b for a, b in zip(first, last, strict=True))
    return {"asr": asr, "task_loss": task, "utility_loss": utility}


def _cost(name: str) -> dict[str, Any]:
    trains = describe(name)["stage"] in ("during", "before")
    return {
        "find_seconds": 12.5,
        "apply_seconds": None if trains else 3.0,
        "train_seconds": 240.0 if trains else None,
        "updates": 60 if trains else None,
        "peak_memory_bytes": 2 * 2**30,
        "seconds_per_token_ratio": 1.04 if describe(name)["gives"] == "Changed" else None,
    }
