"""A real Chromium for the page tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import Page, sync_playwright

# As root and without a display; and nothing that a browser would fetch of its own accord.
_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_VARIABLE = "CTRSTREAM_CHROMIUM"


@dataclass(frozen=True)
class BrowserPage:
    """An open page, and what went on in it.

    Attributes
    ----------
    page : Page
    problems : list of str
        Messages of level error or warning on the console, uncaught exceptions, failed requests.
    requests : list of str
        Addresses that were asked for; data URIs are not requests.
    """

    page: Page
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def find_chromium() -> str:
    """Path of a Chromium; the test fails where there is none: a page that nobody looked at is not tested."""
    named = os.environ.get(_VARIABLE)
    found = named or next((path for path in map(shutil.which, _NAMES) if path), None)
    if found is None or not os.path.exists(found):
        pytest.fail(
            f"the page tests need a Chromium. Looked for {named or ', '.join(_NAMES)}. "
            f"Run `make setup-test` to install one, or set {_VARIABLE} to its path."
        )
    return found


@contextmanager
def browser_page(*, width: int = 1280, height: int = 900, javascript: bool = True) -> Iterator[BrowserPage]:
    """Open a blank page in a headless Chromium; closed at the end."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=_ARGUMENTS)
        try:
            page = browser.new_page(
                viewport={"width": width, "height": height}, java_script_enabled=javascript
            )
            opened = BrowserPage(page)
            page.on(
                "console",
                lambda message: (
                    opened.problems.append(message.text) if message.type in ("error", "warning") else None
                ),
            )
            page.on("pageerror", lambda error: opened.problems.append(str(error)))
            page.on("requestfailed", lambda request: opened.problems.append(f"failed: {request.url}"))
            page.on(
                "request",
                lambda request: (
                    None if request.url.startswith("data:") else opened.requests.append(request.url)
                ),
            )
            yield opened
        finally:
            browser.close()
