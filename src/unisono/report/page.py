"""A page as HTML: one file that needs no network, or the beginning of a live page. *Local.*"""

from __future__ import annotations

import base64
import functools
import gzip
import json
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from unisono.checkpoint.format import digest
from unisono.errors import ConfigurationError
from unisono.report.run_page import Page
from unisono.report.section import Section
from unisono.version import __version__

POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
"""Content security policy: whatever an application's figure says, the page asks no other host for anything.

Plotly compiles its WebGL shaders' callers with ``eval``."""


def report_html(page: Page) -> str:
    """The page as one self-contained file.

    Raises:
        ConfigurationError: Plotly is not installed; the message says how to install it.
    """
    return _html(page, plotly=f'<script type="text/plain" id="plotly">{_packed_plotly()}</script>')


def live_html(page: Page) -> str:
    """The page as the server of ``unisono watch`` sends it; it asks that server for ``plotly.js`` and for news."""
    return _html(page, plotly='<script src="plotly.js"></script>', live=f' data-live="{news(page)["version"]}"')


def news(page: Page) -> dict[str, Any]:
    """What a live page shows, for its script; ``version`` changes with everything else."""
    sections = [
        {
            "key": section.key,
            "half": section.half,
            "words": section.words(),
            "body": section.body,
            "figure": section.figure.as_json() if section.figure else None,
        }
        for section in page.sections
    ]
    shown = {"ended": page.ended, "title": page.title, "head": page.head, "sections": sections}
    return {"version": digest(json.dumps(shown, allow_nan=False).encode())[:16], **shown}


@functools.cache
def plotly_js() -> str:
    """Plotly's code for browsers.

    Raises:
        ConfigurationError: Plotly is not installed; the message says how to install it.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ConfigurationError(
            f"the figures are drawn by Plotly, which cannot be imported ({error}). Install it: pip install 'unisono[report]'"
        ) from error
    return str(get_plotlyjs())


@functools.cache
def _packed_plotly() -> str:
    """A third of its size. The time stamp is left out, so that equal runs give equal pages."""
    return base64.b64encode(gzip.compress(plotly_js().encode(), mtime=0)).decode()


def _html(page: Page, *, plotly: str, live: str = "") -> str:
    resources = {
        name: files("unisono.report").joinpath(f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")
    }
    figures = {section.key: section.figure.as_json() for section in page.sections if section.figure}
    return Template(resources["html"]).substitute(
        policy=POLICY,
        title=escape(page.title),
        style=resources["css"],
        live=live,
        head=page.head,
        sections="".join(map(_card, page.sections)),
        version=escape(__version__),
        # It must not end the script element in which it stands.
        figures=json.dumps(figures, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        plotly=plotly,
        script=resources["js"],
    )


def _card(section: Section) -> str:
    height = section.figure.height if section.figure else 0
    place = f'<div class="figure" id="figure-{escape(section.key)}" style="height:{height}px"{"" if height else " hidden"}></div>'
    half = ' class="half"' if section.half else ""
    return (
        f'<section id="{escape(section.key)}"{half}><div class="words">{section.words()}</div>{place}'
        f'<div class="body">{section.body}</div></section>\n'
    )
