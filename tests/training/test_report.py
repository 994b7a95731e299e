"""What a run leaves to look at: made from its folder alone, escaped, never the end of a run."""

import errno
import json
import math
import os
import re
import stat
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers import metrics, train

import train_mlx
from bdh_lib import plots
from bdh_lib.training import report
from bdh_mlx import UserError

EVIL = '<script>alert("x")</script>\x1b[31m```\n# no heading'


LN2 = math.log(2)


def evaluation(step, bpb, loss=None):
    return [
        {"step": step, "val_loss": bpb * LN2, "val_bpb": bpb, "monitored_loss": (loss or bpb) * LN2,
         "advice": {"sign": EVIL},
         "val_bpb_fields": {"headers": bpb / 2, "system": bpb},
         "active_x": [0.4], "active_y": [0.1]},
        {"step": step, "samples": [EVIL, f"said at {step}"],
         "answers": [{"prompt": EVIL, "truth": "the true one", "answer": f"answered at {step}"},
                     {"prompt": "asked", "truth": EVIL, "answer": EVIL}]},
    ]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run folder with what the trainer writes, of a data set with a hostile name."""
    lines = evaluation(0, 8.0)
    for step in range(1, 3001):
        lines.append({"step": step, "loss": 2 + 1 / step, "lr": 1e-3, "grad_norm": 0.5,
                      "bytes_per_s": 1000 + step, "peak_gb": 0.5, "seconds_left": 1})  # fmt: skip
    lines += evaluation(2000, 3.5) + evaluation(3000, 3.6) + [{"step": 3001, "loss": float("nan")}]
    folder = tmp_path / "run & co"
    folder.mkdir()
    text = "".join(json.dumps(m) + "\n" for m in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 9, "lo')
    settings = {"DATASET": EVIL, "TRAINING_MODE": "full", "BLOCK_SIZE": 64, "BATCH_SIZE": 2}
    (folder / "config.json").write_text(json.dumps({"settings": settings, "parameters": 1234}))
    return folder


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.names = set()
        self.text = []
        self.links = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_shows_everything_and_runs_nothing(run):
    report.write_report(run)
    page = (run / "report.html").read_text()
    seen = Tags(page)
    assert "script" not in seen.names and "svg" in seen.names and "\x1b" not in page
    assert all(link.startswith("#") for link in seen.links)  # self-contained
    words = " ".join(seen.text)
    for needed in ("3.500", "said at 2000", "bits per byte", 'alert("x")', "layer 0", "learning"):
        assert needed in words, needed
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(page) < 200_000  # curves are thinned
    assert not list(run.glob(".*"))


def test_samples_stand_under_their_iteration_in_fences_they_cannot_leave(run):
    report.write_report(run)
    text = (run / "samples.md").read_text()
    assert re.findall(r"^## Iteration (\S+),.*?(\d\.\d+) bits", text, re.M) == [
        ("0", "8.0000"), ("2,000", "3.5000"), ("3,000", "3.6000")
    ]  # fmt: skip
    assert "````text\n" in text and text.count("said at") == 3


def test_answers_stand_side_by_side_below_what_was_asked_the_newest_first(run):
    report.write_report(run)
    rows = re.findall(r"<tr>(.*?)</tr>", (run / "report.html").read_text(), re.S)
    cells = [re.findall(r"<td>(.*?)</td>", row, re.S) for row in rows]
    at = next(i for i, row in enumerate(cells) if row and row[0] == "asked")
    assert [row[0] for row in cells[at : at + 5]] == [
        "asked", "true", "iteration 3,000", "iteration 2,000", "iteration 0"
    ]  # fmt: skip
    assert [row[1] for row in cells[at + 1 : at + 4]] == [
        "the true one", "answered at 3000", "answered at 2000"
    ]  # fmt: skip
    assert cells[at][2] == "asked" and all(len(row) == 3 for row in cells[at : at + 5])
    text = (run / "samples.md").read_text()
    after = text[text.index("## Held-out record 1") :]
    assert after.index("the true one") < after.index("answered at 3000") < after.index("at 2000")
    assert "## Held-out record 2" in after


def test_best_leaves_the_untrained_model_aside():
    lines = [
        {"step": s, "monitored_loss": v} for s, v in ((0, 1.0), (5, 3.0), (10, 2.0), (15, 2.5))
    ]
    assert report.best_evaluation(lines)["step"] == 10
    assert report.best_evaluation(lines[:1]) == {}


def test_the_best_is_that_of_the_bytes_which_judge_and_the_report_says_which(run, tmp_path):
    lines = evaluation(0, 8, 8) + evaluation(5, 3, 4.25) + evaluation(10, 3.5, 4.125)
    (run / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    settings = {"settings": {"LOSS_ON": "response"}}
    (run / "config.json").write_text(json.dumps(settings))
    report.write_report(run)
    words = " ".join(Tags((run / "report.html").read_text()).text)
    assert "best bits per byte, response bytes 4.125 at iteration 10" in words
    assert "validation, response bytes, best 4.125" in words
    assert re.search(r"4\.1250 +response bytes", report.compare([run], tmp_path / "x.png"))


def test_a_run_makes_its_report_and_names_its_settings(tmp_path):
    train(tmp_path, "--max-iters", 5, "--sample-bytes", 1)
    run = tmp_path / "full"
    assert {f.name for f in run.iterdir()} >= {"samples.md", "curves.png", "report.html"}
    config = json.loads((run / "config.json").read_text())
    assert config["settings"]["BLOCK_SIZE"] == 64 and config["parameters"] > 1000
    best = json.loads((run / "best.json").read_text())["step"]
    assert f"neurons are dead at iteration {best}, the best" in (run / "report.html").read_text()
    output = [m["samples"] for m in metrics(tmp_path) if "samples" in m]
    assert len(output) == 1 and "### Response" in output[0][2]  # none of random weights
    assert output[-1][0].split("\n")[0] in (run / "samples.md").read_text()


def test_a_report_that_fails_ends_no_run_and_is_told_once(tmp_path, monkeypatch, capsys):
    def broken(config, lines):
        raise ValueError("no ink")

    monkeypatch.setattr(report, "curves", broken)
    assert train(tmp_path, "--max-iters", 6) == 0
    assert capsys.readouterr().err.count("warning: no report") == 1
    assert not (tmp_path / "full" / "report.html").exists()


def test_runs_are_compared_in_one_picture(run, tmp_path, capsys):
    out = tmp_path / "both.png"
    assert report.main([str(run), str(run), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    result = capsys.readouterr().out
    assert result.count("3.5000") == 2 and "1,234" in result


def test_a_folder_without_a_run_is_named(tmp_path, run):
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name, complaint in (
        ("empty", "holds no metrics.jsonl; name the folder of a run"),
        (".", "holds no metrics.jsonl; name one or more of the runs in it: run & co$"),
        ("absent", "does not exist"),
        ("loop", "is a link that leads to nothing; name the folder of a run"),
    ):
        with pytest.raises(UserError, match=complaint):
            report.main([f"{tmp_path}/{name}"])
    for args in ([""], [str(run), str(run), "--out", ""], ["\udcff"]):
        with pytest.raises(UserError, match=r"is empty|not UTF-8"):
            report.main(args)


def test_a_curve_of_many_points_keeps_the_last():
    for count in (1, 999, 1000, 1001, 1500, 2000, 2001, 12345):
        lines = [{"step": step, "loss": float(step)} for step in range(count)]
        steps, values = report.series(lines, "loss")
        assert steps[-1] == count - 1 == values[-1] and len(steps) <= 1001
        assert steps == sorted(set(steps))


def test_a_comparison_replaces_its_own_picture_alone(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    twice = [str(run), str(run)]
    assert report.main(twice) == report.main(twice) == 0
    (tmp_path / "README.md").write_text("# BDH-MLX")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG of another")
    for name in ("README.md", "photo.png"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(UserError, match=f"{name} was not written by BDH-MLX"):
            report.main([*twice, "--out", name])
        assert (tmp_path / name).read_bytes() == before
    with pytest.raises(UserError, match="none is not a folder that can be written to"):
        report.main([*twice, "--out", "none/x.png"])
    with pytest.raises(UserError, match="--out is for a comparison"):
        report.main([str(run), "--out", "only.png"])


def test_a_device_is_written_to_and_not_replaced(run, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDWR)  # and not /dev/null, lest it be replaced
    monkeypatch.setattr(report, "render", lambda *_: b"picture")
    report.compare([run, run], tmp_path / "pipe")
    assert os.read(pipe, 20) == b"picture" and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_full_disk_leaves_the_report_as_it_was(run, monkeypatch):
    report.write_report(run)
    before = {f.name: f.read_bytes() for f in run.iterdir()}
    write = Path.write_bytes

    def full(self, content):
        write(self, content[:10])
        if "report" in self.name:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"report.html cannot be written: No space left"):
        report.write_report(run)
    assert {f.name: f.read_bytes() for f in run.iterdir()} == before


CONFIGS = [
    b"{}", b"not json", b"\xff\xfe", b"[1]", b"null", b"{" * 10**5, b"[" * 10**5,
    b'{"settings": 5, "data": null}', b'{"data": {"train": 3}}', b'{"data": [1]}',
    b'{"parameters": "many", "versions": 3}', b'{"versions": ["x"]}', b'{"parameters": true}',
    b'{"data": {"sha256": "0"}}',
]  # fmt: skip


@pytest.fixture
def unpainted(monkeypatch):
    """The figure is made, not painted, which takes a second."""
    monkeypatch.setattr(report, "render", lambda figure, kind: b"<svg/>")


@pytest.mark.parametrize("config", CONFIGS)
def test_a_damaged_config_is_told_and_the_rest_shown(config, run, unpainted, capsys):
    (run / "config.json").write_bytes(config)
    assert report.main([str(run)]) == 0
    output = capsys.readouterr().err
    assert output.count("\n") == 1 and "config.json is damaged" in output
    assert "said at 3000" in (run / "report.html").read_text()


@pytest.mark.parametrize("wrong", ["2", None, True, -1, [2], 10**400])
def test_settings_of_a_wrong_type_are_taken_as_unknown(wrong, run, unpainted, tmp_path):
    names = ("BLOCK_SIZE", "BATCH_SIZE", "GRAD_ACCUM", "PROCESSES", "LOSS_ON", "DATASET")
    settings = dict.fromkeys((*names, "TRAINING_MODE"), wrong)
    (run / "config.json").write_text(json.dumps({"settings": settings}))
    assert report.main([str(run), str(run), "--out", str(tmp_path / "c.png")]) == 0
    assert report.main([str(run)]) == 0


def test_a_log_with_values_of_a_wrong_type_is_shown_without_them(run, tmp_path):
    wrong = ["2", None, True, [2], [], {}, {"a": "b"}, 10**400, -1]
    known = json.loads((run / "metrics.jsonl").read_text().splitlines()[2]) | evaluation(1, 3)[0]
    known |= {"samples": ["a"], "answers": [{"prompt": "p"}], "dead": 3, "step": 4}
    names = [name for name in known if name != "step"]
    lines = [known, *(known | {name: value} for value in wrong for name in names)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    assert report.main([str(run)]) == 0
    assert report.main([str(run), str(run), "--out", str(tmp_path / "c.png")]) == 0


@pytest.mark.parametrize("line", ["[" * 10**5, '{"step": NaN}', '{"step": "1"}', "\0", "null"])
def test_a_log_that_is_none_is_one_line(line, run):
    (run / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl"):
        report.main([str(run)])


def test_names_are_no_formulas(run, tmp_path):
    other = run.rename(tmp_path / r"_$\frac$ $x^$")
    lines = evaluation(5, 3.0)
    lines[0]["val_bpb_fields"] = {r"$\bad$": 1.0}
    (other / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    assert report.main([str(other)]) == 0
    assert report.main([str(other), str(other), "--out", str(tmp_path / "c.png")]) == 0


@pytest.mark.parametrize("platform", ["darwin", "linux"])
def test_on_a_mac_fonts_are_found_before_mlx_is_used(tmp_path, monkeypatch, platform):
    found = []

    def find(name):
        found.append(name)
        raise ImportError("No module named 'matplotlib'")  # a run does not need it

    monkeypatch.setattr(plots, "import_module", find)
    monkeypatch.setattr(plots.sys, "platform", platform)
    monkeypatch.setattr(train_mlx, "World", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path)
    assert found == (["matplotlib.font_manager"] if platform == "darwin" else [])
