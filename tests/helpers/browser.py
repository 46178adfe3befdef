"""What headless Chromium makes of a page, and what a parser finds in it."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

BROWSER = shutil.which("chromium")
# A window of Chromium has at least 500 pixels: the page is shown in a frame as wide as a phone.
_FRAME = """<!doctype html><meta name="color-scheme" content="light dark">
<body style="margin:0"><iframe src="{page}" style="border:0;display:block" width="{width}"
height="1200"></iframe><script>
addEventListener("load", () => {{
  const view = frames[0], root = view.document.documentElement, images = [...view.document.images];
  document.documentElement.dataset.found = JSON.stringify({{
    width: root.clientWidth,
    content: root.scrollWidth,
    images: images.length,
    loaded: images.filter((image) => image.complete && image.naturalWidth > 0).length,
    requests: view.performance.getEntriesByType("resource").map((entry) => entry.name)
      .filter((name) => !name.startsWith("data:")),
    dark: view.matchMedia("(prefers-color-scheme: dark)").matches,
    done: ((page) => {{ {script} }})(view.document) ?? null,
  }});
}});
</script>"""


class Page(HTMLParser):
    """Tags, their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def browse(
    page: Path, width: int, shot: Path, *, dark: bool = False, script: str = ""
) -> dict[str, Any]:
    """What headless Chromium makes of the page; takes a screenshot. Errors in the console fail.

    ``script`` is run beside the page, which it has as ``page``; what it returns is ``done``.
    """
    frame = shot.with_suffix(".html")
    frame.write_text(_FRAME.format(page=page.as_uri(), width=width, script=script))
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-extensions",
        "--disable-background-networking", "--disable-dev-shm-usage", "--no-first-run",
        "--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr", "--log-level=0", f"--user-data-dir={shot.parent / 'profile'}",
        f"--window-size={max(width, 500)},1200", f"--screenshot={shot}", "--dump-dom",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    ]  # fmt: skip
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, *options, frame.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    (root,) = Page(done.stdout).all("html")
    found: dict[str, Any] = json.loads(str(root["data-found"]))
    return found
