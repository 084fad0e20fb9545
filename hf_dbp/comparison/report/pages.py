"""A report's blocks (headings, paragraphs, tables, figures) as Markdown with files beside it and as one HTML page.

The HTML page is self-contained: figures are embedded as SVG, styles are in the page, and there is no script.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

__all__ = ["Block", "Code", "Heading", "Items", "Paragraph", "Picture", "Table", "write_html", "write_markdown"]

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; font-size: .85rem; display: block; overflow-x: auto; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0 2rem; }
figure img { max-width: 100%; }
figcaption, .caption { color: #444; font-size: .9rem; }
pre { background: #f4f4f4; padding: .7rem; white-space: pre-wrap; }
"""


@dataclass
class Heading:
    text: str
    level: int = 2


@dataclass
class Paragraph:
    text: str


@dataclass
class Items:
    """A list of sentences."""

    texts: Sequence[str]


@dataclass
class Code:
    """Commands."""

    text: str


@dataclass
class Table:
    """A table with its caption; cells are text."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Picture:
    """A figure; ``name`` is the name of its files."""

    name: str
    caption: str
    figure: Figure
    files: dict[str, bytes] = field(default_factory=dict, repr=False)

    def file(self, kind: str) -> bytes:
        """The figure as PNG or SVG, rendered once."""
        if kind not in self.files:
            self.files[kind] = rendered(self.figure, kind)
        return self.files[kind]


Block = Heading | Paragraph | Items | Code | Table | Picture


def rendered(figure: Figure, kind: str) -> bytes:
    """The figure as PNG or SVG, with the same bytes at every call."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "hf_dbp", "svg.fonttype": "path"}):
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(file, format=kind, dpi=110, metadata=metadata)
    return file.getvalue()


def write_markdown(path: Path, blocks: Sequence[Block]) -> None:
    """Write the page, and each figure as PNG and SVG beside it."""
    parts = []
    for block in blocks:
        match block:
            case Heading(text, level):
                parts.append(f"{'#' * level} {text}")
            case Paragraph(text):
                parts.append(text)
            case Items(texts):
                parts.append("\n".join(f"- {text}" for text in texts))
            case Code(text):
                parts.append(f"```bash\n{text}\n```")
            case Table(caption, header, rows):
                parts.append(f"**{caption}**")
                lines = [header, ["---", *(["---:"] * (len(header) - 1))], *rows]
                parts.append(
                    "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in r)} |" for r in lines)
                )
            case Picture(name, caption):
                for kind in ("png", "svg"):
                    (path.parent / f"{name}.{kind}").write_bytes(block.file(kind))
                parts.append(f"![{caption}]({name}.png)\n\n{caption} ([SVG]({name}.svg))")
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def write_html(path: Path, title: str, blocks: Sequence[Block]) -> None:
    """Write the page as one file."""
    body = "\n".join(html_block(block) for block in blocks)
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""
    path.write_text(page, encoding="utf-8")


def html_block(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Items(texts):
            return "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in texts) + "</ul>"
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Table(caption, header, rows):
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
            body = "".join(f"<tr>{line}</tr>" for line in lines)
            caption = html.escape(caption)
            return f'<p class="caption">{caption}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        case Picture(_, caption):
            data = base64.b64encode(block.file("svg")).decode("ascii")
            caption = html.escape(caption)
            image = f'<img alt="{caption}" src="data:image/svg+xml;base64,{data}">'
            return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
