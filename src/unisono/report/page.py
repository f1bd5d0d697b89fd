"""A page as HTML: one file that needs no network, or the beginning of a live page. *Local.*"""

from __future__ import annotations

import base64
import functools
import gzip
import json
from html import escape
from importlib.resources import files
from typing import Any

from unisono.errors import ConfigurationError
from unisono.report.run_page import Page
from unisono.report.section import Section
from unisono.version import __version__


def report_html(page: Page) -> str:
    """The page as one self-contained file.

    Raises:
        ConfigurationError: Plotly is not installed; the message says how to install it.
    """
    return _html(page, scripts=f'<script type="text/plain" id="plotly">{_packed_plotly()}</script>', live="")


def live_html(page: Page, *, version: str) -> str:
    """The page as the server of ``unisono watch`` sends it; it asks that server for ``plotly.js`` and for news."""
    return _html(page, scripts='<script src="plotly.js"></script>', live=version)


def news(page: Page, *, version: str) -> dict[str, Any]:
    """What changes on a live page, for its script."""
    return {
        "version": version,
        "ended": page.ended,
        "title": page.title,
        "head": page.head,
        "sections": [
            {
                "key": section.key,
                "half": section.half,
                "words": section.words(),
                "body": section.body,
                "figure": section.figure.as_json() if section.figure else None,
            }
            for section in page.sections
        ],
    }


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


def _html(page: Page, *, scripts: str, live: str) -> str:
    resources = files("unisono.report")
    style = resources.joinpath("page.css").read_text(encoding="utf-8")
    script = resources.joinpath("page.js").read_text(encoding="utf-8")
    figures = {section.key: section.figure.as_json() for section in page.sections if section.figure}
    switch = (
        '<div class="switch" role="group" aria-label="what runs along the axes"><button type="button" value="steps" '
        'aria-pressed="true">steps</button><button type="button" value="seconds" aria-pressed="false">seconds</button></div>'
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(page.title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f'<body{f" data-live={json.dumps(escape(live))}" if live else ""}>\n<div class="page">\n'
        f'<header><div class="brand"><b>unisono</b>{switch}</div>'
        "<noscript>The figures need JavaScript. Everything else is here.</noscript>"
        f'<div id="head">{page.head}</div></header>\n'
        f"<main>\n{''.join(map(_card, page.sections))}</main>\n"
        f"<footer>Made by unisono {escape(__version__)}. Drag in a figure to look closer, double-click to go back.</footer>\n"
        f'</div>\n<script type="application/json" id="figures">{_embedded(figures)}</script>\n'
        f"{scripts}\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _card(section: Section) -> str:
    height = section.figure.height if section.figure else 0
    place = f'<div class="figure" id="figure-{escape(section.key)}" style="height:{height}px"{"" if height else " hidden"}></div>'
    half = ' class="half"' if section.half else ""
    return (
        f'<section id="{escape(section.key)}"{half}><div class="words">{section.words()}</div>{place}'
        f'<div class="body">{section.body}</div></section>\n'
    )


def _embedded(value: object) -> str:
    """JSON that cannot end the script element in which it stands."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
