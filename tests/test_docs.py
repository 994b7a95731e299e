"""The form of docs/log.md, and that names in README and docs are where they are said to be."""

import ast
import re
from collections import Counter

from helpers import ROOT

LOG = (ROOT / "docs/log.md").read_text()
EXAMPLES = {"cblas_sgemm", "COOLDOWN_ITERS"}  # a name of another library, one that a user adds
SOURCES = [*ROOT.glob("*.py"), *(ROOT / "bdh_lib").rglob("*.py"), *ROOT.glob("bench/*.py")]
PAGES = [ROOT / "README.md", *(p for p in ROOT.glob("docs/*.md") if p.name != "log.md")]
LINES, WIDTH = 25, 140  # of an entry, headings and tables counted; of a line outside tables


def test_entries_of_the_log_are_short_and_dated():
    _, *entries = re.split(r"^## ", LOG, flags=re.M)
    assert entries
    for heading, *text in (entry.rstrip().splitlines() for entry in entries):
        assert re.match(r"\d{4}-\d\d-\d\d\b", heading), heading
        assert 1 + len(text) <= LINES, f"{heading}: {1 + len(text)} lines"
    for line in LOG.splitlines():
        assert line.startswith("|") or len(line) <= WIDTH, line


def test_names_in_docs_and_docstrings_are_names_of_the_source():
    words = Counter(re.findall(r"\w+", " ".join(file.read_text() for file in SOURCES)))
    for file in [*PAGES, *SOURCES]:
        least = 2 if file in SOURCES else 1  # a docstring is part of the source itself
        names = re.findall(r"`([A-Za-z_]\w*_\w*|[A-Z]{4,})(?:\(\))?`", file.read_text())
        unknown = {name for name in names if words[name] < least} - EXAMPLES
        assert not unknown, f"{file.name}: {unknown}"


def defined(file):
    """The functions, classes and variables that a file defines, at any depth."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    blocks = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    variables = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return variables | {node.name for node in nodes if isinstance(node, blocks)}


def test_a_file_that_a_page_names_defines_what_is_said_to_be_in_it():
    name = r"`[A-Za-z_][\w.]*(?:\(\))?`"
    phrase = rf"({name}(?:(?:,| and|, and)\s+{name})*)\s+in\s+`([\w/]+\.py)`"
    places = [place for page in PAGES for place in re.findall(phrase, page.read_text())]
    assert places
    for names, path in places:
        files = [file for file in SOURCES if file.as_posix().endswith(f"/{path}")]
        words = {word for name in re.findall(r"`([\w.]+)", names) for word in name.split(".")}
        missing = words - set().union(*map(defined, files))
        assert not missing, f"{path} does not define {missing}"
