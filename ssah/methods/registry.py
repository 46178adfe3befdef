"""The methods by name: a new one is a file in this folder and a line here."""

from __future__ import annotations

from importlib import import_module
from typing import Any, get_type_hints

from ssah.choices import check_choice
from ssah.methods.frame import Method
from ssah.methods.inputs import NEEDS
from ssah.settings import HELP, declared

# Name -> file and class. The order is that of tables: our own, the trivial ones, then by stage.
_METHODS = {
    "ssah-freezing": "ssah_groups:Freezing",
    "ssah-budget": "ssah_groups:Budget",
    "ssah-ablation": "ssah_groups:Ablation",
    "random-freezing": "random_units:RandomFreezing",
    "interpolation": "interpolation:Interpolation",
    "rewinding": "ssah_groups:Rewinding",
    "set-difference-removal": "set_difference:Removal",
    "set-difference-freezing": "set_difference:WeightFreezing",
    "set-difference-rewinding": "set_difference:WeightRewinding",
    "safety-ranks": "safety_ranks:RankRemoval",
    "lora": "low_rank_adapters:LoRA",
    "mixed-refusals": "mixed_refusals:MixedRefusals",
    "lisa": "lisa:Lisa",
    "sppft": "sppft:SPPFT",
    "sn-tune": "consistent_units:SNTune",
    "rsn-tune": "consistent_units:RSNTune",
    "safe-neuron": "safe_neuron:SafeNeuron",
    "ships": "heads:Ships",
    "sahara": "heads:Sahara",
    "single-neuron": "single_neuron:SingleNeuron",
    "refusal-direction": "refusal_direction:RefusalAblation",
    "refusal-orthogonalisation": "refusal_direction:RefusalOrthogonalisation",
    "scans": "scans:SCANS",
    "lox": "low_rank_safety:LoX",
    "safe-lora": "low_rank_safety:SafeLoRA",
    "resta": "resta:RESTA",
    "safe-delta": "safe_delta:SafeDelta",
    "somf": "somf:SOMF",
    "safe-patching": "safe_patching:SafePatching",
    "antidote": "antidote:Antidote",
    "neurostrike": "neurostrike:NeuroStrike",
}


def names() -> tuple[str, ...]:
    """The methods that there are."""
    return tuple(_METHODS)


def method(name: str, **settings: Any) -> Method:
    """A method with its settings, those of its paper where nothing else is said.

    Args:
        name: of `names`.
        settings: fields of the method; ``ssah methods NAME`` lists them.

    Raises:
        ValueError: there is no such method or setting, a setting is out of its bounds, or two of
            them say how much is done.
    """
    of = _class(name)
    # Here, since Python's own error would not list the settings that there are.
    known = [field.name for field, _, _ in declared(of)]
    for given in settings:
        check_choice(f"setting of {name!r}", given, known)
    for other in of.instead:
        # The one would be overruled without a word.
        if other in settings and settings.get(of.strength or "") is not None:
            raise ValueError(
                f"{of.strength} of {name!r} is {settings[of.strength or '']}, and stands in the "
                f"place of {other}, which is {settings[other]}; give one of them"
            )
    return of(**settings)


def describe(name: str) -> dict[str, Any]:
    """What there is to know of a method, as plain data: paper, equation, needs, settings.

    Raises:
        ValueError: there is no such method.
    """
    of = _class(name)
    return {
        "name": name,
        "does": (of.__doc__ or "").partition("\n")[0],
        "paper": of.paper,
        "equation": of.equation,
        "stage": of.stage,
        "aim": of.aim,
        "gives": get_type_hints(of._find)["return"].__name__,
        "needs": {need: NEEDS[need] for need in of.needs},
        "packages": list(of.packages),
        "departures": list(of.departures),
        "control": of.against,
        "published": of.published,
        "strength": of.strength,
        "strengths": list(of.strengths),
        "instead": list(of.instead),
        "settings": [
            # Defaults as they are: a table and JSON both show numbers and None.
            {"name": field.name, "default": field.default, "help": about[HELP]}
            for field, _, about in declared(of)
        ],
    }


def setting_types(name: str) -> dict[str, Any]:
    """Name of each setting of a method -> its type.

    Raises:
        ValueError: there is no such method.
    """
    return {field.name: hint for field, hint, _ in declared(_class(name))}


def _class(name: str) -> type[Method]:
    check_choice("method", name, names())
    # When it is asked for: the list of names needs no method's file.
    file, _, wanted = _METHODS[name].partition(":")
    found: type[Method] = getattr(import_module(f"ssah.methods.{file}"), wanted)
    return found
