"""What a method is: its settings, and what a table says of it.

A method is a frozen dataclass. Its fields are its settings, with the paper's defaults; what is said
of it are class variables. Example::

    @dataclass(frozen=True)
    class Interpolation(Method):
        \"\"\"A part of the way back to the weights before fine-tuning.\"\"\"

        name: ClassVar[str] = "interpolation"
        ...
        alpha: float = setting(0.5, "How far towards the tuned model.", min=0, max=1)

        def _find(self, inputs: Inputs) -> Edited: ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar, Literal, TypeAlias

from ssah.methods.inputs import Inputs, Need
from ssah.methods.outcomes import Outcome
from ssah.settings import check_settings

# When it acts: it finds a part (and takes it out to show it), or changes the weights before, during
# or after fine-tuning, or how the model runs.
Stage: TypeAlias = Literal["locate", "before", "during", "after", "inference"]
# What it is for: refusals are kept through fine-tuning, or put back; they are found and taken out;
# or fewer harmless requests are refused.
Aim: TypeAlias = Literal["keep", "remove", "relax"]


@dataclass(frozen=True)
class Method(ABC):
    """One published method with its settings. The first line of the docstring says what it does.

    Attributes:
        name: by which the registry and ``ssah methods`` know it.
        paper: authors, title, year; with the arXiv id where there is one.
        equation: what is computed, as the paper has it, in one or two lines.
        stage: when it acts.
        needs: which fields of `Inputs`.
        packages: that it needs beside those of every fine-tune, of the extra ``ssah[train]``.
        departures: in what it is not as published, each a sentence; none where it is.
        against: what its control is, in a sentence.
        published: what the paper found, as a direction to compare one's own results with.
        aim: what it is for.
        strength: the setting that says how much is done, where a comparison should try several.
        strengths: the values of it that are tried.
        instead: settings in whose place the strength stands: they say how much is done where it is
            None. Who gives one of them gives no strength, and none is tried.

    Raises:
        ValueError: a setting is out of its bounds.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    equation: ClassVar[str]
    stage: ClassVar[Stage]
    needs: ClassVar[tuple[Need, ...]]
    packages: ClassVar[tuple[str, ...]] = ()
    departures: ClassVar[tuple[str, ...]] = ()
    against: ClassVar[str]
    published: ClassVar[str]
    aim: ClassVar[Aim] = "keep"
    strength: ClassVar[str | None] = None
    strengths: ClassVar[tuple[float, ...]] = ()
    instead: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_settings(self)  # as it is made, long before a model is loaded

    @property
    def needed(self) -> tuple[Need, ...]:
        """`needs`, and what the method needs beside them with the settings that it has."""
        return self.needs

    def lacking_package(self) -> str | None:
        """A package that it needs and that is not installed, with what to do; None: all are."""
        for name in self.packages:
            if find_spec(name) is None:
                return f"the package {name}: pip install 'ssah[train]'"
        return None

    def find(self, inputs: Inputs) -> Outcome:
        """Do what comes before anything is trained, run or written.

        The models of ``inputs`` stay as they are.

        Raises:
            ValueError: ``inputs`` lack what `needed` names, or what they have does not fit.
            TypeError: the method runs the model, and it is not in memory.
            FloatingPointError: activations, gradients or weights are NaN or infinite.
            ImportError: a package is not installed.
        """
        lacking = self.lacking_package()
        if lacking is not None:
            raise ImportError(f"method {self.name!r} needs {lacking}")
        inputs.check(self.name, self.needed)
        return self._find(inputs)

    @abstractmethod
    def _find(self, inputs: Inputs) -> Outcome:
        """`find`, with inputs that have what the method needs."""
