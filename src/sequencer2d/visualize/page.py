"""Parts of an HTML page that needs nothing but itself: no script, font, style or picture from elsewhere."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files

import numpy as np
from PIL import Image

from sequencer2d.visualize.curves import percent

CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # the browser refuses outside requests


def page(title: str, body: str) -> str:
    """The HTML document around the sections."""
    style = files("sequencer2d.visualize").joinpath("page.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)} · Sequencer2D</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def section(heading: str, content: str) -> str:
    """Content under a heading of the page."""
    return f"<section>\n<h2>{heading}</h2>\n{content}\n</section>"


def folded(label: str, content: str) -> str:
    """Content that opens on a click; on paper it is open."""
    return f"<details>\n<summary>{label}</summary>\n{content}\n</details>"


def scrollable(content: str, label: str) -> str:
    """Wide content that scrolls by itself, with the keyboard too."""
    return f'<div class="scrollable" role="region" aria-label="{label}" tabindex="0">\n{content}\n</div>'


def definitions(texts: Mapping[str, str]) -> str:
    """Labels with their texts."""
    items = "\n".join(f"<div><dt>{escape(label)}</dt><dd>{escape(text)}</dd></div>" for label, text in texts.items())
    return f"<dl>\n{items}\n</dl>"


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str | int | float]]) -> str:
    """A table whose first column names the row; an `int` is a count, a `float` a share, drawn with a bar."""

    def cell(value: str | int | float) -> str:
        if isinstance(value, float):
            bar = f' style="--share:{value:.3f}"' if np.isfinite(value) else ""
            return f'<td class="share"{bar}>{percent(value)}</td>'
        return f"<td>{value:,}</td>" if isinstance(value, int) else f'<th scope="row">{escape(value)}</th>'

    head_cells = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = "\n".join(f"<tr>{''.join(cell(value) for value in row)}</tr>" for row in rows)
    return scrollable(
        f'<table class="numbers">\n<caption>{caption}</caption>\n<thead><tr>{head_cells}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table>",
        label=caption,
    )


def data_uri(picture: Image.Image, file_format: str) -> str:
    """The picture as a `data:` URI in PNG or JPEG."""
    file = io.BytesIO()
    picture.save(file, file_format, optimize=True)
    return f"data:image/{file_format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
