"""A document as one HTML page that needs nothing else: no script, no request."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from importlib.resources import files

from guardtrain.evaluate.reporting.document import (
    Block,
    Bullets,
    Case,
    Cases,
    Cell,
    Document,
    Estimate,
    Facts,
    Paragraph,
    Picture,
    Pictures,
    Quote,
    Section,
    Table,
    Tile,
    Tiles,
    Warned,
)
from guardtrain.evaluate.reporting.text import visible

# Nothing may be fetched or run, whatever a prompt says: the second lock, should an escape ever be forgotten.
SECURITY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def render_html(document: Document) -> str:
    """The page."""
    css = files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    body = "\n".join(_section(number, section) for number, section in enumerate(document.sections))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{escape(SECURITY)}">
<title>{_text(document.title)}</title>
<style>
{css}</style>
</head>
<body>
<p class="status">{_text(document.status)}</p>
<main>
<h1>{_text(document.title)}</h1>
{_contents(document)}
{body}
</main>
</body>
</html>
"""


def _text(text: str) -> str:
    """Escaped; a figure and its per cent sign stay together."""
    return re.sub(r"(?<=\d) (?=%)", "\N{NO-BREAK SPACE}", escape(visible(text)))


def _contents(document: Document) -> str:
    links = [
        f'<li class="level-{section.level}"><a href="#part-{number}">{_text(section.title)}</a></li>'
        for number, section in enumerate(document.sections)
    ]
    return f'<nav aria-label="Contents"><ul>{"".join(links)}</ul></nav>'


def _section(number: int, section: Section) -> str:
    heading = f'<h{section.level} id="part-{number}">{_text(section.title)}</h{section.level}>'
    kind = "summary" if number == 0 else f"level-{section.level}"
    blocks = "\n".join(_block(block) for block in section.blocks)
    return f'<section class="{kind}" aria-labelledby="part-{number}">\n{heading}\n{blocks}\n</section>'


def _block(block: Block) -> str:
    match block:
        case Paragraph():
            return f"<p>{_paragraph(block)}</p>"
        case Bullets(items):
            return _list(map(_paragraph, items))
        case Warned(texts):
            return f'<div class="warning"><strong>Careful:</strong>{_list(_text(text) for text in texts)}</div>'
        case Quote(text):
            return f'<blockquote dir="auto">{_text(text)}</blockquote>'
        case Tiles(tiles):
            return f'<div class="tiles">{"".join(map(_tile, tiles))}</div>'
        case Table():
            return _table(block)
        case Facts(pairs):
            return f"<dl>{''.join(f'<div><dt>{_text(name)}</dt><dd>{_text(text)}</dd></div>' for name, text in pairs)}</dl>"
        case Pictures(pictures):
            return f'<div class="pictures">{"".join(map(_picture, pictures))}</div>'
        case Cases(cases):
            return f'<ol class="cases">{"".join(map(_case, cases))}</ol>'


def _list(items: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _paragraph(paragraph: Paragraph) -> str:
    lead = f"<strong>{_text(paragraph.lead)}</strong> " if paragraph.lead else ""
    return f"{lead}{_text(paragraph.text)}"


def _tile(tile: Tile) -> str:
    figures = "".join(
        f'<p class="figure"><span class="large">{_text(value.value)}</span> <span>{_text(name)}</span> {_interval(value)}</p>'
        for name, value in tile.figures
    )
    return f'<div class="tile"><h3>{_text(tile.title)}</h3>{figures}<p class="note">{_text(tile.note)}</p></div>'


def _interval(estimate: Estimate) -> str:
    return f'<span class="interval">{_text(estimate.interval)}</span>' if estimate.interval else ""


def _table(table: Table) -> str:
    kinds = ["text" if column in table.text_columns else "number" for column in range(len(table.header))]
    first, *others = table.header
    head = f'<th scope="col">{_text(first)}</th>' + "".join(
        f'<th scope="col" class="{kind}">{_text(name)}</th>' for name, kind in zip(others, kinds[1:], strict=True)
    )
    rows = "\n".join(f"<tr>{_row(row, kinds)}</tr>" for row in table.rows)
    caption = _text(table.caption)
    # A region that scrolls must be reached by keyboard, and named.
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}"><table><caption><span>{caption}</span></caption>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>"
    )


def _row(row: tuple[Cell, ...], kinds: list[str]) -> str:
    first, *others = row
    cells = (f'<td class="{kind}">{_cell(cell)}</td>' for cell, kind in zip(others, kinds[1:], strict=True))
    return f'<th scope="row">{_cell(first)}</th>{"".join(cells)}'


def _cell(cell: Cell) -> str:
    if isinstance(cell, Estimate):
        return f"<span>{_text(cell.value)}</span> {_interval(cell)}".rstrip()
    return f"<bdi>{_text(cell)}</bdi>"


def _picture(picture: Picture) -> str:
    svg = picture.svg.replace("<svg ", f'<svg role="img" aria-label="{_text(picture.described)}" ', 1)
    return f"<figure>{svg}<figcaption>{_text(picture.caption)}</figcaption></figure>"


def _case(case: Case) -> str:
    texts = "".join(f'<dt>{_text(name)}</dt><dd dir="auto">{_text(words)}</dd>' for name, words in case.texts)
    quoted = f'<dl class="texts">{texts}</dl>' if texts else ""
    return f'<li><p><strong>{_text(case.title)}</strong></p><p class="note"><bdi>{_text(case.facts)}</bdi></p>{quoted}</li>'
