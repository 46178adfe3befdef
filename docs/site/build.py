"""What the site has beside the pages of docs/, and what stops its build (hooks of mkdocs).

The repository is laid out as a site with docs/ as its root: `docs/cli.md` is the page `cli.md`, and
`csrc/README.md`, which lies outside, is `csrc/README.md`. So a link of `docs/architecture.md` to
`../csrc/README.md` becomes one to `csrc/README.md`, and a link of `csrc/README.md` to
`../docs/cli.md` becomes `../cli.md`.
"""

from __future__ import annotations

import posixpath
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from reference import api_page, api_pages, commands_page  # noqa: E402

OUTSIDE = ("README.md", "csrc/README.md", "CONTRIBUTING.md", "CHANGELOG.md")  # beside docs/
FROM_CODE = "from the code"  # in the nav: pages that are made here
_LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)")
# Code is no link: `x](y)` in it stays as it is.
_CODE = re.compile(r"(^ *```.*?^ *```$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
_LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?(?:https?:)?//[^\s\">]+"
    r"|<link\b[^>]*\brel=\"?(?:stylesheet|preconnect|preload)\b[^>]*\bhref=\"?(?:https?:)?//[^\s\">]+"
    r"|url\(['\"]?(?:https?:)?//[^)]+"
)
# "query, key: paths" of a docstring: mkdocstrings takes the second name for the type of the first.
_TWO_NAMES = re.compile(r"<code>(?:<[^>]*>)?(\w+),(?:<[^>]*>)?</code></b>\s*\(<code>(.*?)</code>\)")
# ":func:`ssah.attribute`" of a docstring: a link to that name, where the site shows it.
_ROLE = re.compile(r":(?:class|func|meth|mod):<code>~?([\w.]+)</code>")
_SHAPE = re.compile(r"<(li|pre|table|blockquote|h[1-6])\b")


def on_config(config: Any) -> Any:
    """Put a page for each public module where the nav says so."""
    [reference] = [each["Reference"] for each in config.nav if "Reference" in each]
    at = reference.index({"Python": FROM_CODE})
    reference[at] = {"Python": [{module: page} for module, page in api_pages().items()]}
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/."""
    made = {page: api_page(module) for module, page in api_pages().items()}
    made["reference/commands.md"] = commands_page()
    made |= {page: (ROOT / page).read_text(encoding="utf-8") for page in OUTSIDE}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links that lead from one place of the repository to another lead so within the site."""
    here = page.file.src_uri
    parts = _CODE.split(markdown)
    parts[::2] = [
        _LINK.sub(lambda found: f"]({site_link(here, found[1])}", each) for each in parts[::2]
    ]
    return "".join(parts)


def site_link(page: str, link: str) -> str:
    """The link of the site for one of the repository; the head of this file has examples."""
    folder = posixpath.dirname(page if page in OUTSIDE else f"docs/{page}")
    target = posixpath.normpath(posixpath.join(folder, link))
    return posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(page) or ".")


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Stop where this Markdown reads a page otherwise than GitHub's does.

    Of what belongs to a list item, GitHub asks for an indent of two or three spaces, and this one
    for four. With fewer, a table or a block of code would end the list.
    """
    if "::: " in page.markdown:  # mkdocstrings has filled it in
        link = r'<autoref identifier="\1" optional><code>\1</code></autoref>'
        return _ROLE.sub(link, _TWO_NAMES.sub(_both, html))
    here = _shapes(html)
    there = _shapes(MarkdownIt("commonmark").enable("table").render(page.markdown))
    if here != there:
        raise PluginError(
            f"{page.file.src_uri} has {dict(here)} here, but {dict(there)} on GitHub. Indent what "
            "belongs to an item of a list by four spaces, with an empty line before the next item"
        )
    return html


def _both(found: re.Match[str]) -> str:
    return f"<code>{found[1]}, {re.sub('<[^>]*>', '', found[2])}</code></b>"


def _shapes(html: str) -> Counter[str]:
    return Counter(_SHAPE.findall(html))


def on_post_build(config: Any) -> None:
    """Stop where a page would load something from elsewhere: the site works without a network."""
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix in {".html", ".css"}:
            loaded = _LOADED.findall(path.read_text(encoding="utf-8"))
            if loaded:
                raise PluginError(f"{path} loads {loaded[0]}: keep a copy of it in docs/")
