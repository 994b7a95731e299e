"""Data sets of the hub: what they cost to ask for, and each trouble with it."""

import errno
import json
import os
import ssl
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import Mock

import datasets
import huggingface_hub
import pytest
from helpers import RECORD, ROOT, numbered, prepare, prepared_folder, write_jsonl

from bdh_lib.data import hub as hub_access
from bdh_lib.data import prepare as preparing
from bdh_lib.data import sources
from bdh_lib.data.describe import describe
from bdh_lib.data.prepare import DataSettings
from bdh_mlx import UserError


class Hub(BaseHTTPRequestHandler):
    """A hub on 127.0.0.1 that knows the commit of one data set; `answer`: a commit or a status."""

    answer, requests = "", []

    def do_GET(self):
        self.requests.append(self.path)
        body = json.dumps({"id": "user/name", "sha": self.answer}).encode()
        self.send_response(self.answer if isinstance(self.answer, int) else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    """The stub as the hub, as a process that starts finds it: call it to start another one."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    constants = huggingface_hub.constants
    monkeypatch.setattr(Hub, "requests", [])
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)

    def begin(output, rows=20):
        hub_access._ask.cache_clear()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", output == "offline")
        monkeypatch.setattr(Hub, "answer", output)
        port = 9 if output == "silent" else server.server_port
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        split = lambda revision: [r | {"system": revision} for r in numbered(rows)]  # noqa: E731
        load = lambda *a, revision, **k: {"train": split(revision)}  # noqa: E731
        monkeypatch.setattr(datasets, "load_dataset", load)

    yield begin
    hub_access._ask.cache_clear()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("raised", "complaint"),
    [
        (datasets.exceptions.DatasetNotFoundError("x is a gated dataset on the Hub."), "is gated"),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset x doesn't exist"),
            "not a file or folder here, and not on the hub",
        ),
        (ConnectionError("Couldn't reach x"), "not a file or folder here.*out of reach"),
        (ValueError('Unknown split "tset". Should be one of [train]'), "Unknown split"),
    ],
)
def test_each_trouble_with_the_hub_is_one_message_with_the_ways_on(
    hub, monkeypatch, raised, complaint
):
    hub("silent")

    def load_dataset(*args, **kwargs):
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=complaint) as error:
        list(sources.read_records("user/name"))
    for way in ("hf auth login", "--dataset FILE", "--dataset sample"):
        assert way in str(error.value)


@pytest.mark.parametrize("name", ["-", "user/a--b", "a.git", "a" * 97])
def test_a_name_that_no_hub_allows_is_one_line_of_ours(hub, monkeypatch, name):
    hub("silent")
    check = huggingface_hub.utils.validate_repo_id
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *args, **kwargs: check(name))
    with pytest.raises(UserError, match="neither a file nor a hub name") as error:
        list(sources.read_records(name))
    assert ".." not in str(error.value) and "epo" not in str(error.value)


def test_a_hub_name_carries_configuration_revision_and_split(hub, monkeypatch):
    hub("silent")
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return [RECORD] if kwargs["split"] else {"train": [RECORD], "other": [RECORD] * 5}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("user/name", "name:cfg", "user/name:cfg@v1.0#test[:10%]", "user/name@refs/pr/1"):
        assert list(sources.read_records(name)) == [RECORD]
    assert [(*a, k["revision"], k["split"]) for a, k in asked] == [
        ("user/name", None, None, None),
        ("name", "cfg", None, None),
        ("user/name", "cfg", "v1.0", "test[:10%]"),
        ("user/name", None, "refs/pr/1", None),
    ]


@pytest.mark.parametrize(
    ("error", "complaint"),
    [
        (OSError(errno.ENOTDIR, "Not a directory", "/x/hf"), "/x/hf cannot be written: Not a dir"),
        (OSError(errno.ENOSPC, "No space left on device"), "sends cannot be written: No space"),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), "the hub is out of reach"),
    ],
)
def test_a_cache_of_downloads_that_cannot_be_written_is_no_silent_hub(
    hub, monkeypatch, error, complaint
):
    hub(OLD)

    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fails)
    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(UserError, match=complaint) as result:
        list(sources.read_records("user/name"))
    assert ("set HF_HOME" in str(result.value)) == ("written" in complaint)
    assert ("out of reach" in complaint) == huggingface_hub.constants.HF_HUB_OFFLINE


UNTRUSTED = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"


@pytest.mark.parametrize(
    ("asked", "loaded"),
    [
        (RuntimeError(UNTRUSTED), ConnectionError("Couldn't reach user/name")),  # wrapped by httpx2
        (ssl.SSLCertVerificationError(1, UNTRUSTED),) * 2,
    ],
)
def test_a_certificate_that_is_not_trusted_is_named_with_the_way_on(
    hub, monkeypatch, asked, loaded
):
    hub(OLD)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", Mock(side_effect=asked))
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=loaded))
    with pytest.raises(UserError, match=r"out of reach \(\[SSL: CERT.*failed; .*SSL_CERT_FILE"):
        list(sources.read_records("user/name"))


OLD, NEW = "a" * 40, "b" * 40


def test_new_rows_on_the_hub_are_read_and_old_ones_not_twice(hub, tmp_path, monkeypatch):
    hub(OLD)
    report, train, _ = prepare("user/name", tmp_path)
    assert report["commit"] == OLD and OLD.encode() in train  # that commit is what is read
    assert f"data: user/name (commit {OLD}), 20 records" in describe(report)
    hub(NEW, rows=30)
    report, train, _ = prepare("user/name", tmp_path)
    assert (report["commit"], report["records"]) == (NEW, 30) and NEW.encode() in train
    assert Hub.requests == ["/api/datasets/user/name"] * 2  # once by each process
    monkeypatch.setattr(preparing, "_make", lambda *a: pytest.fail("prepared again"))
    for output, there in ((OLD, OLD), (NEW, NEW)):
        hub(output)
        assert prepare("user/name", tmp_path)[0]["commit"] == there
    hub("silent")
    preparing.cache_key(DataSettings("user/name@v1.0", "full", 0.1, 1), None)
    hub(OLD)
    preparing.cache_key(DataSettings("user/name:cfg@v1.0#test", "full", 0.1, 1), None)
    assert Hub.requests[-1] == "/api/datasets/user/name/revision/v1.0"


@pytest.mark.parametrize("output", ["silent", "offline", 500, 404, 401, 429])
def test_a_hub_that_does_not_tell_leaves_the_newest_prepared_data(hub, tmp_path, capsys, output):
    for i, commit in enumerate((NEW, OLD)):
        hub(commit)
        folder = prepared_folder("user/name", tmp_path)
        os.utime(folder / "data.json", (1e9 - i * 1e6,) * 2)
        prepared_folder("user/name", tmp_path, seed=2)  # of another seed
        prepared_folder("user/other", tmp_path)
    hub(output)
    capsys.readouterr()
    assert prepare("user/name", tmp_path)[0]["commit"] == NEW
    assert capsys.readouterr().out == (
        "the hub does not answer for DATASET user/name; taking what was prepared on 2001-09-09 of "
        f"commit {NEW}\n"
    )


def test_a_commit_that_is_named_is_not_asked_for(hub, tmp_path, monkeypatch):
    hub(OLD)
    prepare("user/name", tmp_path)
    hub(NEW)
    monkeypatch.setattr(preparing, "_make", lambda *a: pytest.fail("prepared again"))
    assert prepare(f"user/name@{OLD}", tmp_path)[0]["commit"] == OLD  # how to go back
    hub("silent")
    assert prepare(f"user/name@{OLD}", tmp_path)[0]["commit"] == OLD


@pytest.mark.parametrize("local", [True, False])
def test_refreshed_data_are_prepared_anew_once(hub, tmp_path, monkeypatch, local):
    source = write_jsonl(tmp_path / "d.jsonl", numbered(20)) if local else "user/name"
    hub(OLD)
    settings = DataSettings(str(source), "full", 0.1, 1)
    cache = tmp_path / "cache"
    folder = preparing.prepare(settings, cache)
    made = folder.stat().st_ino
    again = partial(preparing.prepare, settings, cache, refresh=True)
    assert again().stat().st_ino == made  # by this process itself
    monkeypatch.setattr(preparing, "PROCESS_START", time.time() + 9)
    assert preparing.prepare(settings, cache).stat().st_ino == made
    read = sources.read_parts
    monkeypatch.setattr(sources, "read_parts", lambda *args: [("all", "not JSON")])
    with pytest.raises(UserError, match="no record"):
        again()
    assert preparing.is_intact(folder)  # a failure costs nothing
    calls = []
    monkeypatch.setattr(sources, "read_parts", lambda *args: calls.append(1) or read(*args))
    assert again() == folder and calls and preparing.is_intact(folder)


def test_without_a_network_the_script_says_so_and_exits_with_2(tmp_path):
    run = subprocess.run(
        [sys.executable, ROOT / "train_mlx.py", "--checkpoint-dir", tmp_path],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1 and "out of reach" in run.stderr
