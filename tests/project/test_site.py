"""The site: every page has one place in it, and what is made from the code is whole.

``make docs`` checks the rest when it builds it: links, anchors, and that nothing is loaded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from commands import call
from pages import ROOT
from reference import api_page, api_pages, commands_page

import ssah.groups

MADE = {"reference/commands.md"}  # beside the page of each public module, which no nav has to list


class _Loader(yaml.SafeLoader):
    """It passes over the names of Python functions, which only mkdocs can call."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def places(nav: Any) -> Iterator[str]:
    """Each page of the nav, as often as it stands there."""
    if isinstance(nav, str):
        yield nav
    else:
        for each in nav.values() if isinstance(nav, dict) else nav:
            yield from places(each)


def test_every_page_has_one_place_in_the_site() -> None:
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)
    counted = Counter(place for place in places(config["nav"]) if place.endswith(".md"))
    pages = {str(path.relative_to(ROOT / "docs")) for path in ROOT.glob("docs/**/*.md")}
    assert {place for place, n in counted.items() if n > 1} == set()
    lacking = (pages | MADE) - set(counted)
    assert not lacking, "add them to the nav of mkdocs.yml"
    outside = set(counted) - pages - MADE
    assert all((ROOT / place).is_file() for place in outside), outside


def test_the_page_of_commands_has_every_option_that_help_has() -> None:
    page = commands_page()
    for command in ("attribute", "study freeze", "compare"):
        text = page.partition(f"## `ssah {command}`\n")[2].partition("\n## ")[0]
        cells = " ".join(re.findall(r"^\| `([^`]*)`", text, flags=re.MULTILINE))
        shown = call(*command.split(), "--help").output
        # In the table of --help an option stands at the left edge, behind a box and maybe a star.
        options = set(re.findall(r"^\W*(--[a-z][a-z0-9-]+)", shown, flags=re.MULTILINE)) - {
            "--help"
        }
        assert len(options) > 10
        assert options <= set(re.findall(r"--[a-z][a-z0-9-]+", cells)), command
    metrics = page.partition("| `--metric`")[2].partition("\n")[0]
    assert "`variance`, `norm`, `taylor`, `fisher`" in metrics
    assert metrics.endswith("| `variance` |")


def test_a_public_module_has_a_page_with_all_its_names() -> None:
    assert api_pages()["ssah.groups"] == "reference/ssah.groups.md"
    shown = re.findall(r"^::: ssah\.groups\.(\w+)$", api_page("ssah.groups"), flags=re.MULTILINE)
    assert shown == sorted(ssah.groups.__all__)


@pytest.mark.parametrize(
    "form", sorted(ROOT.glob(".github/ISSUE_TEMPLATE/[0-9]*.yml")), ids=lambda f: f.stem
)
def test_an_issue_form_is_one_that_github_takes(form: Any) -> None:
    """By GitHub's syntax for issue forms: these keys, and an id for each field, once."""
    found = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert (
        {"name", "description", "body"} <= found.keys() <= {"name", "description", "body", "labels"}
    )
    fields = [each for each in found["body"] if each["type"] != "markdown"]
    assert len({each["id"] for each in fields}) == len(fields) > 0
    for each in found["body"]:
        assert each["type"] in {"markdown", "textarea", "input", "dropdown", "checkboxes"}
        assert each["attributes"]["value" if each["type"] == "markdown" else "label"]
        assert each["type"] not in {"dropdown", "checkboxes"} or each["attributes"]["options"]
