"""The form of docs/log.md: short entries, each with its date, that an editor shows whole."""

import re
from collections import Counter

from helpers import ROOT

LOG = (ROOT / "docs/log.md").read_text()
EXAMPLES = {"cblas_sgemm", "COOLDOWN_ITERS"}  # a name of another library, one that a user adds
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
    sources = [*ROOT.glob("*.py"), *(ROOT / "bdh_lib").rglob("*.py"), *ROOT.glob("bench/*.py")]
    words = Counter(re.findall(r"\w+", " ".join(file.read_text() for file in sources)))
    pages = [file for file in ROOT.glob("docs/*.md") if file.name != "log.md"]
    for file in [ROOT / "README.md", *pages, *sources]:
        least = 2 if file in sources else 1  # a docstring is part of the source itself
        names = re.findall(r"`([A-Za-z_]\w*_\w*|[A-Z]{4,})(?:\(\))?`", file.read_text())
        unknown = {name for name in names if words[name] < least} - EXAMPLES
        assert not unknown, f"{file.name}: {unknown}"
