"""Tables as data, and how they are drawn: as text of a given width, and as HTML.

    wide enough     columns side by side
    narrower        closer together, and the widest columns of text break their lines, between words or parts of names
    narrower still  the columns that do not fit come below, in a table of their own that begins with the first column again

A number is never broken or cut.
"""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

GAPS = (2, 1)  # spaces between columns: where all fit in one line each, and where not
SHORT = 16  # columns of text that are no wider stay as they are
LONG = 24  # and the narrowest that wider ones become, unless their parts are shorter
BREAK = re.compile(r"(?<=\s)(?=\S)|(?<=[.,/=:;)\]}-])(?=[^\W\d_]|[{\[(<%])")
NUMBER = re.compile(r"\d[\d.,]*")
# legible on white and on black
CSS = {
    "green": "color:#2e9e4f", "red": "color:#d64545", "yellow": "color:#a67c00", "cyan": "color:#1c93a8",
    "dim": "opacity:.65", "bold": "font-weight:bold",
}  # fmt: skip


class Cell(NamedTuple):
    """Text and one of the styles of CSS, or "" for none."""

    text: str
    style: str = ""


@dataclass(frozen=True)
class Table:
    """columns: their heads; () for a table without. rows: cells, or texts. right: heads of the columns of numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    right: frozenset[str] = frozenset()

    def grid(self) -> list[list[Cell]]:
        """All rows as cells of printable text, the head first if there is one."""
        head = [[Cell(name, "dim") for name in self.columns]] if self.columns else []
        cells = [[Cell(*((c,) if isinstance(c, str) else c)) for c in row] for row in self.rows]
        return [[Cell(printable(text), style) for text, style in row] for row in head + cells]

    def is_right(self, position: int) -> bool:
        return bool(self.columns) and self.columns[position] in self.right


class Shown:
    """What a verb returns to be looked at: `parts`, paragraphs and tables, are its text and its HTML."""

    def parts(self) -> list[str | Table]:
        raise NotImplementedError

    def __str__(self) -> str:
        return text(self.parts())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return as_html(self.parts())


def counted(number: int, noun: str) -> str:
    """`1 target`, `1,000 targets`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def terminal_width() -> int:
    """Of the terminal, or of what COLUMNS says; 80 where there is none, as in files and notebooks."""
    return shutil.get_terminal_size().columns


def text(parts: Sequence[str | Table], width: int | None = None) -> str:
    """Paragraphs and tables below one another. width: the terminal's unless given."""
    width = width or terminal_width()
    blocks = []
    for part in parts:
        if isinstance(part, Table):
            lines = ["".join(cell.text for cell in line).rstrip() for line in drawn(part, width)]
        else:
            lines = wrapped(printable(part), width)
        blocks.append("\n".join(lines))
    return "\n\n".join(filter(None, blocks))


def as_html(parts: Sequence[str | Table]) -> str:
    """The same for a notebook: colours of text alone, which stand on its own background; everything is escaped."""
    return "\n".join(html_of(p) if isinstance(p, Table) else f"<p>{html.escape(printable(p))}</p>" for p in parts)


def html_of(table: Table) -> str:
    rows = table.grid()
    head = [f"<thead><tr>{html_cells(table, rows.pop(0), 'th')}</tr></thead>"] if table.columns else []
    body = [f"<tr>{html_cells(table, row, 'td')}</tr>" for row in rows]
    return "\n".join(["<table>", *head, "<tbody>", *body, "</tbody>", "</table>"])


def html_cells(table: Table, row: Sequence[Cell], tag: str) -> str:
    result = ""
    for i, (content, style) in enumerate(row):
        css = f"text-align:{'right' if table.is_right(i) else 'left'};{CSS.get(style, '')}"
        result += f'<{tag} style="{css}">{html.escape(content)}</{tag}>'
    return result


def drawn(table: Table, width: int) -> Iterator[list[Cell]]:
    """Lines, as pieces of text with their styles."""
    rows = table.grid()
    if not rows or not rows[0]:
        return
    columns = list(zip(*rows, strict=True))
    natural = [max(len(line) for cell in column for line in cell.text.split("\n")) for column in columns]
    least = [
        n if table.is_right(i) else narrowest(column, n)
        for i, (column, n) in enumerate(zip(columns, natural, strict=True))
    ]
    least[0] = min(least[0], max(width // 2, longest_number(columns[0])))
    numbers = [longest_number(column) for column in columns]
    gap = GAPS[sum(natural) + GAPS[0] * (len(natural) - 1) > width]
    for i, band in enumerate(bands(least, width, gap)):
        if i:
            yield []
        room = width - gap * (len(band) - 1)
        floors = ([least[j] for j in band], [numbers[j] for j in band])
        widths = fitted([natural[j] for j in band], floors, room)
        right = [table.is_right(j) for j in band]
        for number, row in enumerate(rows):
            yield from row_lines([row[j] for j in band], widths, right, gap)
            if table.columns and not number:
                yield [Cell((" " * gap).join("─" * w for w in widths), "dim")]


def row_lines(row: Sequence[Cell], widths: Sequence[int], right: Sequence[bool], gap: int) -> Iterator[list[Cell]]:
    """The lines of one row: as many as its longest cell needs."""
    broken = [wrapped(cell.text, w) for cell, w in zip(row, widths, strict=True)]
    for k in range(max(map(len, broken))):
        line = []
        for i, lines in enumerate(broken):
            content = lines[k] if k < len(lines) else ""
            padded = content.rjust(widths[i]) if right[i] else content.ljust(widths[i])
            line += [Cell(" " * gap)] * bool(i) + [Cell(padded, row[i].style)]
        yield line


def narrowest(column: Sequence[Cell], natural: int) -> int:
    """How narrow a column of text may become."""
    part = max((len(p.rstrip()) for cell in column for p in BREAK.split(cell.text)), default=0)
    return min(natural, max(min(max(part, SHORT), LONG), longest_number(column)))


def longest_number(column: Sequence[Cell]) -> int:
    return max((len(n) for cell in column for n in NUMBER.findall(cell.text)), default=0)


def bands(least: Sequence[int], width: int, gap: int) -> list[list[int]]:
    """Positions of the columns that fit beside one another; the first column is in every band."""
    result = [[0]]
    for i in range(1, len(least)):
        band = result[-1]
        if len(band) > 1 and sum(least[j] + gap for j in band) + least[i] > width:
            result.append([0])
        result[-1].append(i)
    return result


def fitted(natural: Sequence[int], floors: Sequence[Sequence[int]], room: int) -> list[int]:
    """Widths of columns: the widest ones are made narrower until all fit, down to one floor, then to the next."""
    widths = list(natural)
    for floor in floors:
        while sum(widths) > room and (wide := [i for i in range(len(widths)) if widths[i] > max(floor[i], 1)]):
            widths[max(wide, key=widths.__getitem__)] -= 1
    return widths


def wrapped(content: str, width: int) -> list[str]:
    """Lines of at most `width` characters, but for a number that is longer."""
    result = []
    for paragraph in content.split("\n"):
        line = ""
        for part in (p for whole in BREAK.split(paragraph) for p in parts_of(whole, width)):
            if line and len(line) + len(part.rstrip()) > width:
                result.append(line.rstrip())
                line = ""
            line += part
        result.append(line.rstrip())
    return result


def parts_of(word: str, width: int) -> Iterator[str]:
    """A word that is too long in parts, its numbers whole."""
    while len(word.rstrip()) > width:
        number = next((m for m in NUMBER.finditer(word) if m.start() < width < m.end()), None)
        cut = width if number is None else number.start() or number.end()
        yield word[:cut]
        word = word[cut:]
    yield word


def printable(content: str) -> str:
    """No control characters: names come from files."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in content)
