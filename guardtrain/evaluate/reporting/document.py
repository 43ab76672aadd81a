"""A report as blocks of plain text, of which HTML and Markdown are two renderings. Renderers escape; blocks hold no markup."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its interval, both as they are read."""

    value: str
    interval: str = ""


Cell = str | Estimate


@dataclass(frozen=True, slots=True)
class Paragraph:
    """lead: words before the text that stand out."""

    text: str
    lead: str = ""


@dataclass(frozen=True, slots=True)
class Bullets:
    """Short paragraphs."""

    items: tuple[Paragraph, ...]


@dataclass(frozen=True, slots=True)
class Warned:
    """What the reader should know before trusting a figure."""

    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Quote:
    """A text of someone else in full."""

    text: str


@dataclass(frozen=True, slots=True)
class Tile:
    """A group of figures that must not be missed. figures: what each is of, with its value."""

    title: str
    figures: tuple[tuple[str, Estimate], ...]
    note: str


@dataclass(frozen=True, slots=True)
class Tiles:
    """Side by side where there is room."""

    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """The first column names its row. text_columns: the others that hold words, not figures."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    text_columns: frozenset[int] = field(default=frozenset())


@dataclass(frozen=True, slots=True)
class Facts:
    """Names and what they stand for."""

    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """svg: a whole element, made by us and free of foreign markup. described: for who cannot see it."""

    svg: str
    caption: str
    described: str


@dataclass(frozen=True, slots=True)
class Pictures:
    """Side by side where there is room; only in HTML."""

    pictures: tuple[Picture, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """One row that was judged wrongly. texts: a name and the words, none where texts are not to be shown."""

    title: str
    facts: str
    texts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Cases:
    """Numbered."""

    cases: tuple[Case, ...]


Block = Paragraph | Bullets | Warned | Quote | Tiles | Table | Facts | Pictures | Cases


@dataclass(frozen=True, slots=True)
class Section:
    """level: 2 or 3, as headings go. is_for_card: belongs into a model card too."""

    title: str
    blocks: tuple[Block, ...]
    level: int = 2
    is_for_card: bool = False


@dataclass(frozen=True, slots=True)
class Document:
    """status: the first line."""

    status: str
    title: str
    sections: tuple[Section, ...]
