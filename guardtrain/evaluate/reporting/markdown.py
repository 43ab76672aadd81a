"""A document as Markdown that reads well as plain text. Figures are in the HTML page alone."""

from __future__ import annotations

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
    Pictures,
    Quote,
    Section,
    Table,
    Tile,
    Tiles,
    Warned,
)
from guardtrain.evaluate.reporting.text import markdown


def render_markdown(document: Document) -> str:
    """The whole document; its first line is the status."""
    sections = "\n\n".join(_section(section, 0) for section in document.sections)
    return f"**{markdown(document.status)}**\n\n# {markdown(document.title)}\n\n{sections}\n"


def render_card(document: Document) -> str:
    """The sections for a model card, to stand under a heading of level 2; the first line is the status."""
    sections = "\n\n".join(_section(section, 1) for section in document.sections if section.is_for_card)
    return f"**{markdown(document.status)}**\n\n## Evaluation\n\n{sections}\n"


def _section(section: Section, deeper: int) -> str:
    blocks = [text for block in section.blocks if (text := _block(block))]
    return "\n\n".join([f"{'#' * (section.level + deeper)} {markdown(section.title)}", *blocks])


def _block(block: Block) -> str:
    match block:
        case Paragraph():
            return _paragraph(block)
        case Bullets(items):
            return "\n".join(f"- {_paragraph(item)}" for item in items)
        case Warned(texts):
            return "\n".join(["> **Careful:**", ">", *(f"> - {markdown(text)}" for text in texts)])
        case Quote(text):
            return f"> “{markdown(text)}”"
        case Tiles(tiles):
            return "\n".join(map(_tile, tiles))
        case Table():
            return _table(block)
        case Facts(pairs):
            return "\n".join(f"- **{markdown(name)}:** {markdown(text)}" for name, text in pairs)
        case Pictures():
            return ""
        case Cases(cases):
            return "\n".join(f"{number}. {_case(case)}" for number, case in enumerate(cases, start=1))


def _paragraph(paragraph: Paragraph) -> str:
    lead = f"**{markdown(paragraph.lead)}** " if paragraph.lead else ""
    return f"{lead}{markdown(paragraph.text)}"


def _tile(tile: Tile) -> str:
    figures = " and ".join(f"{_cell(estimate)} {markdown(name)}" for name, estimate in tile.figures)
    return f"- **{markdown(tile.title)}:** {figures} ({markdown(tile.note)})"


def _table(table: Table) -> str:
    aligned = ["---" if not column or column in table.text_columns else "---:" for column in range(len(table.header))]
    lines = [[markdown(name) for name in table.header], aligned, *([_cell(cell) for cell in row] for row in table.rows)]
    return "\n".join([f"**{markdown(table.caption)}**", "", *(f"| {' | '.join(cells)} |" for cells in lines)])


def _cell(cell: Cell) -> str:
    if isinstance(cell, Estimate):
        return markdown(f"{cell.value} {cell.interval}".rstrip())
    return markdown(cell)


def _case(case: Case) -> str:
    texts = "".join(f"\n   - {markdown(name)}: {markdown(words)}" for name, words in case.texts)
    return f"**{markdown(case.title)}** ({markdown(case.facts)}){texts}"
