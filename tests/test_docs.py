"""The form of docs/log.md: short entries, each with its date, that an editor shows whole."""

import re

from conftest import ROOT

LOG = (ROOT / "docs/log.md").read_text()
LINES, WIDTH = 25, 140  # of an entry, headings and tables counted; of a line outside tables


def test_entries_of_the_log_are_short_and_dated():
    _, *entries = re.split(r"^## ", LOG, flags=re.M)
    assert entries
    for heading, *text in (entry.rstrip().splitlines() for entry in entries):
        assert re.match(r"\d{4}-\d\d-\d\d\b", heading), heading
        assert 1 + len(text) <= LINES, f"{heading}: {1 + len(text)} lines"
    for line in LOG.splitlines():
        assert line.startswith("|") or len(line) <= WIDTH, line
