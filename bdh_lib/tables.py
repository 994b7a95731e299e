"""Tables as text."""

from collections.abc import Sequence


def format_table(rows: Sequence[Sequence], indent: str = "") -> str:
    """Format rows of cells, the first of headings; columns of numbers are aligned to the right."""
    columns = []
    for head, *cells in zip(*([str(cell) for cell in row] for row in rows), strict=True):
        width = max(map(len, [head, *cells]))
        is_numeric = all(cell[:1].isdigit() for cell in cells)
        columns.append([c.rjust(width) if is_numeric else c.ljust(width) for c in (head, *cells)])
    return "\n".join(indent + "  ".join(row).rstrip() for row in zip(*columns, strict=True))
