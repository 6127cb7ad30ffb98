"""A diagnosis as an HTML fragment: the text, with its styles."""

from __future__ import annotations

import io

from rich.console import Console

from isograd.diagnosis import Diagnosis
from isograd.render.text import document

PRE = (
    "<pre style=\"font-family:Menlo,Consolas,'DejaVu Sans Mono',monospace;"
    'line-height:1.35;white-space:pre;overflow-x:auto">{code}</pre>\n'
)


def fragment(diagnosis: Diagnosis) -> str:
    """A `<pre>` with inline styles, no script and no link; everything the user named is escaped."""
    text = document(diagnosis)
    width = max(line.cell_len for line in text.split())
    console = Console(record=True, file=io.StringIO(), width=width, force_jupyter=False)
    console.print(text, soft_wrap=True)
    return console.export_html(code_format=PRE, inline_styles=True)
