"""Which files a name means, and files and folders that cannot be read."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import pytest
from helpers import RECORD, ROOT, numbered, prepare, write_jsonl

from bdh_lib.data import hub as hub_access
from bdh_lib.data import prepare as preparing
from bdh_lib.data import sources
from bdh_lib.data.prepare import load_unsplit
from bdh_mlx import UserError


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("missing.jsonl", "does not exist"),
        ("./missing", "does not exist"),
        ("~/missing", "does not exist"),
        ("my/data/missing", "does not exist"),
        ("missing/", "does not exist"),
        ("data/my records", "does not exist"),
        (
            "https://hub.test/datasets/user/name",
            "is a URL; download it and name the file, or name a data set",
        ),
        (
            "hf://datasets/user/name/d.jsonl",
            "is a URL; download it and name the file, or name a data set",
        ),
        ("strange name?", "neither a file nor a hub name"),
        ("https://x.y/z", "DATASET https://x.y/z is a URL; download it"),
        ("hf://x/y", "DATASET hf://x/y is a URL; .* user/name"),
        ("sample#test", "DATASET sample has no splits; leave out #test"),
        (f"{sources.SAMPLE}#test", r"sample\.jsonl has no splits; leave out #test"),
    ],
)
def test_names_that_mean_nothing_are_refused_without_asking_the_hub(name, complaint, monkeypatch):
    monkeypatch.setattr(hub_access, "_ask", lambda *name: pytest.fail("asked the hub"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=complaint):
        list(sources.read_records(name))


def test_folders_and_files_of_no_use_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"folder without.*files of data$"):
        list(sources.read_records(str(tmp_path)))
    for name, way in {
        "d.PDF": "save its text as .txt",
        "d.xlsx": "save it as CSV in UTF-8",
        "d.zip": "unpack it and name the folder",
        "d.tar.gz": "unpack it and name the folder",
        "data": "name it by what it holds, such as .jsonl",
    }.items():
        (tmp_path / name).write_text("x")
        with pytest.raises(UserError, match=f"ends in none of .*; {way}"):
            list(sources.read_records(str(tmp_path / name)))
    with pytest.raises(UserError, match=r"it holds d\.PDF, d\.tar\.gz, d\.xlsx and 2 others"):
        list(sources.read_records(str(tmp_path)))
    write_jsonl(tmp_path / "one.jsonl", [RECORD] * 3)
    with pytest.raises(UserError, match="1 distinct record"):
        prepare(tmp_path / "one.jsonl", tmp_path / "cache")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json cannot be read"):
        list(sources.read_records(str(tmp_path / "bad.json")))


def odd_path(folder, kind):
    """Something in `folder` that is not a data file although its name says so."""
    path = folder / "d.jsonl"
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as at:
            at.bind(str(path))
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to(os.devnull)
    elif kind == "link in a circle":
        path.symlink_to(path)
    elif kind == "link to nothing":
        path.symlink_to(folder / "gone")
    elif kind == "name that is not UTF-8":
        if sys.platform == "darwin":
            pytest.skip("a Mac's file system refuses such names")
        path = Path(os.fsdecode(os.fsencode(folder) + b"/\xff.jsonl"))
        write_jsonl(path, numbered(20))
    return path


ODD = {
    "socket": "is not a regular file",
    "fifo": "is not a regular file",
    "device": "is not a regular file",
    "link in a circle": "cannot be read: Too many levels of symbolic links",
    "link to nothing": "is a link to a file that does not exist",
    "name that is not UTF-8": "not UTF-8",
}


@pytest.mark.parametrize(("kind", "complaint"), ODD.items())
@pytest.mark.parametrize("where", ["alone", "in a folder", "in a ready split"])
def test_what_is_no_data_file_is_told_and_never_waited_for(kind, complaint, where):
    with tempfile.TemporaryDirectory() as folder:  # a socket's path must be short
        path = odd_path(Path(folder), kind)
        write_jsonl(Path(folder) / "other.jsonl", numbered(20))
        if where == "in a ready split" and kind != "name that is not UTF-8":
            path = path.rename(path.with_name("train.bin"))
            if kind == "link in a circle":
                path.unlink()
                path.symlink_to(path)
        if where == "in a folder" and kind.startswith("link"):
            report = prepare(folder, Path(folder) / ".cache")[0]
            assert report["not_read"] == ["1 links that lead nowhere: d.jsonl"]
            assert report["records"] == 20
            Path(folder, "other.jsonl").unlink()
            complaint = r"is a folder without .*; it holds d\.jsonl \(links that lead nowhere\)"
        with pytest.raises(UserError, match=complaint):
            prepare(path if where == "alone" else folder, Path(folder) / ".cache")


def test_nothing_is_no_name_of_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "d.jsonl", numbered(20))
    for name in ("", " "):
        with pytest.raises(UserError, match="DATASET is empty"):
            prepare(name, tmp_path / "cache")


@pytest.fixture
def another_user():
    """A folder of its own, and a user whom permissions bind: root is asked to be nobody."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        yield Path(folder)
        if root:
            os.seteuid(0)
        for path in Path(folder).rglob("*"):
            path.chmod(0o700)


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.json", "d.txt", "d.parquet", "val.bin"])
def test_a_file_that_may_not_be_read_is_named(another_user, name):
    (another_user / "in").mkdir()
    (another_user / "tmp").mkdir()
    file = write_jsonl(another_user / "in" / name, numbered(3))
    write_jsonl(another_user / "in" / ("train.bin" if name == "val.bin" else "a.jsonl"), [])
    file.chmod(0)
    for source in (another_user / "in", file)[: 1 if name == "val.bin" else 2]:
        with pytest.raises(UserError, match=rf"{name} cannot be read.*Permission denied"):
            prepare(source, another_user / "cache")
        with pytest.raises(UserError, match=rf"{name} cannot be read.*Permission denied"):
            load_unsplit(str(source), "full", another_user / "tmp")


def test_a_folder_is_walked_no_more_than_needed(tmp_path, monkeypatch):
    """Before it is read, while it is, and after it, to see changes; a resume walks once."""
    walks = []
    walk = os.walk
    monkeypatch.setattr(sources.os, "walk", lambda *a, **k: walks.append(a) or walk(*a, **k))
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "d.jsonl", numbered(20))
    for most in (3, 1):
        prepare(tmp_path / "in", tmp_path / "cache")
        assert len(walks) <= most
        walks.clear()


def test_a_folder_that_may_not_be_read_is_named(another_user):
    write_jsonl(another_user / "d.jsonl", numbered(20))
    (another_user / "sub").mkdir()
    for mode in (0o100, 0o400, 0):
        (another_user / "sub").chmod(mode)
        with pytest.raises(UserError, match="sub cannot be read: Permission denied"):
            prepare(another_user / "sub", another_user / "cache")
    with pytest.raises(UserError, match="sub cannot be read: Permission denied"):
        prepare(another_user, another_user / "cache")
    with pytest.raises(UserError, match=r"sub/d\.jsonl cannot be read: Permission denied"):
        prepare(another_user / "sub" / "d.jsonl", another_user / "cache")


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("name", ["checkpoints_mlx", "runs"])
def test_runs_and_hidden_files_in_a_folder_are_no_data(tmp_path, monkeypatch, name, linked):
    (here := tmp_path / "my data").mkdir()
    write_jsonl(here / "d.jsonl", numbered(20))
    (here / "sub").mkdir()
    write_jsonl(here / "sub" / "e.jsonl", numbered(9, response="More."))
    monkeypatch.chdir(here)
    if linked:
        (tmp_path / "elsewhere").mkdir()
        (here / name).symlink_to(tmp_path / "elsewhere")
    first = prepare(".", Path(name) / ".data")
    assert first[0]["records"] == 29
    for run, files in {
        f"{name}/full": ("config.json", "metrics.jsonl", "modes.json"),
        "copied run": ("config.json", "metrics.jsonl", "best.json"),
        "copied run/step-000001": ("config.json", "manifest.json", "model.safetensors"),
        "shared": ("config.json", "model.safetensors"),
        ".git": ("a.json",),
    }.items():
        (here / run).mkdir()
        for file in files:
            (here / run / file).write_text('{"text": "no data"}\n')
    write_jsonl(here / ".hidden.jsonl", numbered(40))
    assert prepare(".", Path(name) / ".data") == first
    monkeypatch.setattr(preparing, "_make", lambda *a: pytest.fail("prepared again"))
    assert prepare(".", Path(name) / ".data") == first
    assert load_unsplit(".", "full", tmp_path)[0]["records"] == 29  # for an evaluation


HOMES = {
    "HOME=": {"HOME": ""},
    "no HOME": {"HOME": None},
    "HOME a file": {"HOME": os.devnull},
    "HOME not to be made": {"HOME": f"{os.devnull}/home"},
}


@pytest.mark.parametrize("variables", HOMES.values(), ids=HOMES)
@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_local_files_need_no_home(tmp_path, variables, kind):
    datasets.Dataset.from_list(numbered(20)).to_parquet(tmp_path / "d.parquet")
    (tmp_path / "d.json").write_text(json.dumps(numbered(20)))
    script = (
        "from bdh_lib.data import sources\n"
        f"print(len(list(sources.read_records({str(tmp_path / f'd.{kind}')!r}))))"
    )
    env = {k: v for k, v in (os.environ | variables).items() if v is not None}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert (run.stdout, run.stderr) == ("20\n", "")
