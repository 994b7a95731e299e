"""Files are written whole, and reach the disk."""

import errno

import pytest

from bdh_lib import files


@pytest.mark.parametrize("supported", [True, False])
def test_where_a_full_flush_is_refused_fsync_flushes(tmp_path, monkeypatch, supported):
    calls = []

    def fcntl(descriptor, command):  # as on a Mac, with a drive of its own or of the network
        calls.append(command)
        if not supported:
            raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "F_FULLFSYNC", "full", raising=False)
    monkeypatch.setattr(files.fcntl, "fcntl", fcntl)
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: calls.append("fsync"))
    files.atomic_write_text(tmp_path / "file", "text")
    assert calls == 2 * (["full"] if supported else ["full", "fsync"])  # the file, its folder
    assert (tmp_path / "file").read_text() == "text"
