"""A part of the page: a heading that says what was found, a few words, a figure. *Local.*"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

from unisono.report.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Section:
    """One card on the page."""

    key: str
    """Its id in the page, the same in every version of the page."""
    kicker: str
    """What it is about, in a word or two."""
    title: str
    """What it shows, as plain text."""
    text: str = ""
    """A sentence or two below the title, as plain text."""
    body: str = ""
    """HTML below the figure."""
    figure: Figure | None = None
    half: bool = False
    """Whether two such cards stand beside each other where there is room."""

    def words(self) -> str:
        """The part above the figure, as HTML."""
        legend = "".join(
            f'<li><i style="background:var({escape(colour)})"></i>{escape(label)}</li>'
            for colour, label in (self.figure.legend() if self.figure else ())
        )
        return (
            f'<p class="kicker">{escape(self.kicker)}</p><h2>{escape(self.title)}</h2>'
            + (f"<p>{escape(self.text)}</p>" if self.text else "")
            + (f'<ul class="legend">{legend}</ul>' if legend else "")
        )


def paired(sections: Iterable[Section]) -> tuple[Section, ...]:
    """The sections, in order; a half one that would stand alone in its row is made a whole one."""
    result: list[Section] = []
    open_half = False
    for section in sections:
        if open_half and not section.half:
            result[-1] = replace(result[-1], half=False)
        open_half = section.half and not open_half
        result.append(section)
    if open_half:
        result[-1] = replace(result[-1], half=False)
    return tuple(result)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, numeric: Sequence[bool] = ()) -> str:
    """A table as HTML that scrolls by itself where it is too wide.

    Args:
        columns: Headings.
        rows: Cells; what is no text is shown as ``str`` has it.
        numeric: For each column whether it is set to the right.
    """

    def row(tag: str, values: Sequence[object]) -> str:
        right = [' class="number"' if number else "" for number in [*numeric, *[False] * (len(values) - len(numeric))]]
        cells = (f"<{tag}{align}>{escape(str(value))}</{tag}>" for align, value in zip(right, values, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    body = "".join(row("td", values) for values in rows)
    return f'<div class="scroll"><table><thead>{row("th", columns)}</thead><tbody>{body}</tbody></table></div>'


def bullets(items: Iterable[str]) -> str:
    """Items, each HTML already, as a list; nothing if there is none."""
    listed = "".join(f"<li>{item}</li>" for item in items)
    return f'<ul class="events">{listed}</ul>' if listed else ""


def definitions(values: Mapping[str, object]) -> str:
    """Names and values as HTML."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in values.items())
    return f'<dl class="settings">{items}</dl>'


def command(text: str) -> str:
    """A line to copy, as HTML."""
    return f'<div class="copy"><code>{escape(text)}</code><button type="button" aria-label="copy">copy</button></div>'
