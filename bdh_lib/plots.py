"""Pictures that matplotlib draws.

It is imported where the first one is drawn, which takes a second, and without pyplot, which would
look for a display.
"""

import io
import logging
import sys
from contextlib import suppress
from importlib import import_module

from bdh_lib import files
from bdh_lib.errors import escape_controls

INK = "#808080"
LINES = ["#3b7dd8", "#e07b39", "#3a9d6e", "#b35cc4", "#c9a227", "#d1495b"]


def find_fonts() -> None:
    """Let matplotlib search for fonts on a Mac; call it before MLX computes anything.

    The first search forks the process, which can hang once Metal is at work, and takes seconds.
    """
    if sys.platform == "darwin":
        with suppress(Exception):  # the first report says what is wrong
            import_module("matplotlib.font_manager")


def canvas(width: float, height: float):
    """Make an empty figure; sizes in inches."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # not that a HOME is lacking
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def panel(axes, title: str) -> None:
    """Set the title and the plain style of one panel of a figure."""
    axes.set_title(title, loc="left", fontsize=9, color=INK)
    axes.tick_params(colors=INK, labelsize=8, length=0)
    axes.grid(color=INK, alpha=0.2, linewidth=0.6)
    axes.margins(x=0.01)
    for side in axes.spines.values():
        side.set_visible(False)


def label(name) -> str:
    """Escape a name for matplotlib: a $ starts no formula and a leading _ hides no line."""
    text = escape_controls(str(name)).replace("$", r"\$")
    return f" {text}" if str(name).startswith("_") else text


def legend(axes) -> None:
    """Draw a legend without a frame."""
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)


def render(figure, kind: str) -> bytes:
    """Render the figure as a PNG on white, or as a transparent SVG in the font of its page."""
    import matplotlib

    file = io.BytesIO()
    options = {"dpi": 130, "facecolor": "white"}
    options |= {"metadata": {"Software": files.MADE_BY}}
    if kind == "svg":
        options = {"transparent": True, "metadata": {"Date": None}}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bdh"}):
        figure.savefig(file, format=kind, **options)
    return file.getvalue()
