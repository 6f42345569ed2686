"""The shell of a page that needs nothing else: no network, no script, no font of its own."""

import html
from collections.abc import Callable, Sequence
from importlib import resources

from fleet_console.drawing import PALETTE, Frame

# A chart is drawn once for wide pages and once for phones, whose text would be too small otherwise.
_FULL_PX = 1000
_HALF_PX = 476
_PHONE_PX = 336


def page(title: str, body: str) -> str:
    """Return a whole page; the body is HTML already."""
    return _PAGE.format(title=escape(title), css=_css(), body=body)


def escape(value: object) -> str:
    return html.escape(str(value))


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, css: str) -> str:
    """Cells are HTML already. A table wider than the page scrolls by itself."""
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{css}"><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def figure(
    name: str, title: str, text: str, draw: Callable[[Frame], str], heights_px: tuple[int, int], *, full: bool = False
) -> str:
    wide = draw(Frame(f"{name}-wide", _FULL_PX if full else _HALF_PX, heights_px[0]))
    phone = draw(Frame(f"{name}-phone", _PHONE_PX, heights_px[1]))
    return (
        f'<figure class="{"full" if full else "half"}">'
        f"<figcaption><h2>{escape(title)}</h2><p>{escape(text)}</p></figcaption>"
        f'<div class="wide">{wide}</div><div class="phone">{phone}</div></figure>'
    )


def _css() -> str:
    light, dark = ("".join(f"--{name}:{colours[i]};" for name, colours in PALETTE.items()) for i in (0, 1))
    style = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    return f":root{{{light}}}@media (prefers-color-scheme: dark){{:root{{{dark}}}}}\n{style}"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
