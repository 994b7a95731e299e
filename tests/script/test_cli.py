"""How the scripts start and end: interrupts, closed and full streams, encodings, exit codes."""

import io
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from helpers import ROOT

import bdh_mlx
from bdh_lib import files
from bdh_lib.compute import memory
from bdh_lib.data import prepare
from bdh_lib.script import cli, compiler, limits
from bdh_lib.training import summary

DEV_FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="a Mac has no /dev/full")
SMALL = "--preset tiny --n-layer 1 --n-embd 32 --block-size 64 --batch-size 1 --max-iters 2"
SMALL = [*SMALL.split(), "--eval-bytes", "500", "--sample-bytes", "0", "--dataset", "sample"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a small finished run."""
    folder = tmp_path_factory.mktemp("checkpoints")
    assert script("train_mlx.py", *SMALL, "--checkpoint-dir", folder).returncode == 0
    return folder / "full"


def script(name, *args, shell="", env=None, **how):
    """Run a script of the project through a shell, with redirections."""
    command = ["sh", "-c", f'"$@" {shell}', "sh", sys.executable, name]
    how = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "cwd": ROOT} | how
    return subprocess.run([*command, *map(str, args)], env=os.environ | (env or {}), **how)


def commands(run):
    return {
        "train": ("train_mlx.py", *SMALL, "--checkpoint-dir", run.parent),
        "plan": ("train_mlx.py", *SMALL, "--plan", "--checkpoint-dir", run.parent),
        "selfcheck": ("train_mlx.py", "--selfcheck"),
        "generate": ("generate.py", run, "--prompt", "Hi", "--max-new-tokens", 3),
        "report": ("-m", "bdh_lib.training.report", run),
        "help": ("train_mlx.py", "--help"),
    }


@pytest.mark.parametrize("name", ["plan", "selfcheck", "generate", "report", "help"])
@pytest.mark.parametrize("how", [pytest.param(">/dev/full", marks=DEV_FULL), ">&-"])
def test_lost_output_is_told_and_no_success(run, name, how):
    done = script(*commands(run)[name], shell=how)
    assert done.returncode == 2 and done.stderr.count("error: the output: ") == 1
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    "how",
    [
        *(pytest.param(f"{n}>/dev/full", marks=DEV_FULL) for n in (1, 2)),
        *(">&-", "<&- >&- 2>&-", "| head -1"),
    ],
)
def test_a_training_run_does_not_need_its_output(tmp_path, how):
    done = script("train_mlx.py", *SMALL, "--checkpoint-dir", tmp_path, shell=how)
    assert done.returncode == 0 and (tmp_path / "full" / "step-000002").is_dir()
    assert done.stderr.count("warning: the output is lost") == (how in ("1>/dev/full", ">&-"))


@DEV_FULL
@pytest.mark.parametrize("name", ["generate", "prompts"])
def test_notes_that_cannot_be_written_cost_nothing(run, tmp_path, name):
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hi"}\n')
    command = {"generate": commands(run)["generate"]}
    command["prompts"] = ("generate.py", run, "--prompts", tmp_path / "p.jsonl")
    done = script(*command[name], shell="2>/dev/full")
    assert done.returncode == 0 and "Hi" in done.stdout


def test_a_reader_that_is_gone_is_no_error(run):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, ROOT / "generate.py", run, "--prompt", "Hi"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 141 and "rror" not in done.stderr


@pytest.mark.parametrize("name", ["train", "plan", "selfcheck", "generate", "report"])
def test_ctrl_c_while_a_script_is_imported_is_no_traceback(run, name):
    """`mlx.core` sends the signal: it stands for any library that is being imported."""
    code = (
        "import os, runpy, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'mlx.core': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "*module, sys.argv[0] = sys.argv[1:3] if sys.argv[1] == '-m' else sys.argv[1:2]\n"
        "runner = runpy.run_module if module else runpy.run_path\n"
        "runner(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, *map(str, commands(run)[name])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_while_a_package_is_imported_for_its_module_is_no_traceback(run, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'bdh_lib.compute': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    command = [sys.executable, *map(str, commands(run)["report"])]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize(("name", "called"), [("plan", "print_plan"), ("selfcheck", "run_checks")])
def test_ctrl_c_later_is_one_line(run, name, called):
    code = (
        f"import os, signal, sys; sys.argv = sys.argv[1:]\n"
        f"from bdh_lib.script import cli; import train_mlx; from bdh_lib.training import {name}\n"
        f"{name}.{called} = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "cli.run_main(train_mlx.main, 'train_mlx.py')\n"
    )
    command = [sys.executable, "-c", code, *map(str, commands(run)[name])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (130, "stopped\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_encoding_cannot_show_is_escaped(run, encoding):
    args = ("generate.py", run, "--prompt", "Grüße 😀", "--max-new-tokens", 3)
    done = script(*args, env={"PYTHONIOENCODING": encoding}, encoding="latin-1")
    assert done.returncode == 0 and "\\U0001f600" in done.stdout


@pytest.mark.parametrize("name", ["train", "plan", "generate"])
def test_a_temporary_folder_that_cannot_be_written_is_told_before_anything_is_made(
    run, tmp_path, name
):
    command = [*commands(run)[name], *(["--run-name", "other"] if name == "train" else [])]
    done = script(*command, env={"TMPDIR": str(tmp_path / "none")})
    assert done.returncode == 2 and done.stderr.startswith("error: TMPDIR is ")
    assert done.stderr.count("\n") == 1 and not (run.parent / "other").exists()


def test_an_empty_temporary_folder_is_no_value(run):
    done = script(*commands(run)["generate"], env={"TMPDIR": "", "TMP": ""})
    assert done.returncode == 0 and not done.stderr


def test_a_temporary_folder_that_is_full_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    compiler.check()
    resource.setrlimit(resource.RLIMIT_FSIZE, (compiler.TEMPORARY_SPACE - 1, before[1]))
    try:
        with pytest.raises(
            bdh_mlx.UserError, match=r"TMPDIR is .* cannot be written .*; set TMPDIR"
        ):
            compiler.check()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_temporary_folder_is_only_warned_of_where_all_may_be_compiled(
    tmp_path, capsys, monkeypatch
):
    (tmp_path / "mlx" / mx.__version__ / "cpu").mkdir(parents=True)
    monkeypatch.setattr(compiler, "temporary_folder_fault", lambda: "TMPDIR is full")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(bdh_mlx.UserError, match="TMPDIR is full; set TMPDIR"):
        compiler.check()
    (tmp_path / "mlx" / mx.__version__ / "cpu" / "a.so").touch()
    compiler.check()
    assert capsys.readouterr().err.startswith("warning: TMPDIR is full; what MLX compiled there")


@pytest.mark.skipif(sys.platform != "linux", reason="a Mac compiles for its GPU without g++")
def test_a_missing_compiler_is_told_with_the_cure(run, tmp_path):
    (tmp_path / "sh").symlink_to("/bin/sh")
    env = {"PATH": str(tmp_path), "TMPDIR": str(tmp_path / "none")}  # nothing is written there
    done = script(*commands(run)["generate"], env=env)
    assert done.returncode == 0 and done.stderr.count("\n") == 1
    assert "warning: without the compiler g++" in done.stderr and "apt install" in done.stderr


NOT_COMPILED = "[Compile::eval_cpu] Failed to compile function f"


@pytest.mark.parametrize(
    ("text", "cure"),
    [
        (f"{NOT_COMPILED}\nNo space left on device", "set TMPDIR"),
        ("Could not load C++ shared library f: failed to map segment", "set TMPDIR"),
        (f"{NOT_COMPILED}\ng++: fatal error: cannot execute cc1plus", "apt install g++"),
    ],
)
def test_a_failed_compile_is_one_line_in_every_script(text, cure, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "error", None, raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert cli.report_error(RuntimeError(text), "generate.py") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: MLX cannot compile: {text[:30]}") and err.count("\n") == 1
    assert cure in err and err.count("set TMPDIR") == ("TMPDIR" in cure)


@pytest.mark.skipif(sys.platform != "linux", reason="a Mac does not enforce the limits")
@pytest.mark.parametrize("how", ["-v 50000", "-v 300000", "-v 1400000", "-d 500000"])
@pytest.mark.parametrize("name", ["train", "generate"])
def test_a_limit_on_memory_is_told_before_a_library_ends_the_process(run, name, how):
    command = ["sh", "-c", f'ulimit {how}; "$@"', "sh", sys.executable, *commands(run)[name]]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: memory is out: ")
    assert done.stderr.count("\n") == 1 and f"`ulimit {how[:2]}` allows" in done.stderr


def test_a_limit_on_memory_counts_in_what_a_run_may_use(monkeypatch):
    monkeypatch.setattr(limits, "memory_limits", lambda: [("ulimit -v", 3000, 1000)])
    assert memory.available_bytes() == 0.9 * 2000


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        ImportError("x.so: failed to map segment from shared object"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory"),
        RuntimeError("[malloc] Unable to allocate 99 bytes."),
    ],
)
def test_memory_that_is_out_is_one_line_in_every_script(error, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "error", None, raising=False)
    assert cli.report_error(error, "generate.py") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: memory is out") and err.count("\n") == 1
    assert "close other programs" in err and str(error) in err


def test_ctrl_c_ends_a_script_within_a_call_that_does_not_return(run):
    """A lock of C that is taken twice stands for MLX, which computes without the interpreter's."""
    code = (
        "import ctypes, sys; sys.argv = sys.argv[1:]\n"
        "import generate; from bdh_lib.script import cli, interrupts\n"
        "c, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)\n"
        "c.pthread_mutex_init(lock, None); c.pthread_mutex_lock(lock)\n"
        "interrupts.TIMEOUT = 0.2\n"
        "hold = lambda *_: (print('held', flush=True), c.pthread_mutex_lock(lock))\n"
        "generate.read_prompt = hold\n"
        "interrupts.install_handler(); cli.run_main(generate.main, 'generate.py')\n"
    )
    command = [sys.executable, "-c", code, *map(str, commands(run)["generate"])]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert any("held" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1].endswith("stopped\n")
    assert process.returncode == 130


def test_several_interrupts_within_one_call_are_one(tmp_path):
    """Python calls one handler for both: the process that received it must not be ended later."""
    (tmp_path / "deaf.py").write_text(
        "import os, signal, time\n"
        "def main():\n"
        "    try:\n"
        "        for _ in range(2): signal.raise_signal(signal.SIGINT)\n"
        "    except KeyboardInterrupt: pass\n"
        "    time.sleep(0.6); print('it goes on'); return 0\n"
    )
    code = "from bdh_lib.script import cli, interrupts; interrupts.TIMEOUT = 0.1; "
    code += f"cli.run({str(tmp_path / 'deaf.py')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "it goes on\n")


@pytest.mark.parametrize("ignores_errors", [True, False])
def test_flushing_endures_as_writing_does(ignores_errors):
    read, write = os.pipe()
    os.close(read)
    out = cli.Output(io.FileIO(write, "wb"), line_buffering=True)
    out.ignores_errors = ignores_errors
    out.write("abc")
    if ignores_errors:
        out.flush()
    else:
        with pytest.raises(BrokenPipeError):
            out.flush()
        cli.redirect_to_devnull(write)
    out.close()


def test_lost_output_is_known_behind_the_error_that_others_made_of_it(tmp_path, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", cli.Output(io.FileIO(write, "wb"), write_through=True))
    with pytest.raises(bdh_mlx.UserError) as error, prepare._writing(tmp_path):
        print("reading")
    assert isinstance(cli.lost_output(error.value), BrokenPipeError)
    assert cli.lost_output(bdh_mlx.UserError("another")) is None
    cli.redirect_to_devnull(write)
    sys.stdout.close()


def test_on_windows_one_sentence_says_where_it_runs():
    code = "import sys; sys.modules['fcntl'] = None; import bdh_mlx"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.splitlines()[-1] == (
        "ImportError: BDH-MLX runs on macOS and Linux; on Windows it runs in WSL"
    )
    code = (
        "import sys; sys.platform = 'win32'; from bdh_lib.script import cli; cli.run('train_mlx')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == "error: BDH-MLX runs on macOS and Linux; on Windows it runs in WSL\n"


@pytest.fixture
def project(tmp_path):
    """A folder with the scripts of the project, whose files a test may change."""
    for name in ("train_mlx.py", "generate.py", "bdh_mlx.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bdh_lib").symlink_to(ROOT / "bdh_lib")
    return tmp_path


def test_generation_needs_no_trainer_that_python_can_read(run, project):
    (project / "train_mlx.py").write_text("BATCH_SIZE: int = = 2\n")
    done = script("train_mlx.py", cwd=project)  # docs/reliability.md promises what it shows
    assert done.returncode == 1 and "line 1\n" in done.stderr and "SyntaxError" in done.stderr
    done = script(*commands(run)["generate"], cwd=project)
    assert done.returncode == 0 and done.stdout.startswith("Hi") and not done.stderr


def test_the_users_own_files_beside_the_scripts_are_not_taken_for_the_projects(run, project):
    for name in ("cli", "config", "errors", "files", "settings", "split", "start"):
        (project / f"{name}.py").write_text("raise SystemExit('imported')\n")
    for name in ("train", "generate"):
        done = script(*commands(run)[name], cwd=project)
        assert done.returncode == 0 and "imported" not in done.stderr


@pytest.mark.parametrize("prompt", [[], ["--prompt", "Hi"]])
def test_generation_needs_no_input(run, prompt):
    done = script("generate.py", run, *prompt, "--max-new-tokens", 3, shell="<&-", stdin=None)
    assert done.returncode == 0 and done.stdout.startswith("Hi" if prompt else "")
    assert done.stderr == ("" if prompt else "note: stdin is empty, so there is no prompt\n")


@pytest.mark.parametrize("name", ["train", "plan", "generate"])
def test_a_folder_whose_name_is_not_utf_8_is_refused_in_one_line(run, name):
    args = [str(arg).replace(str(run.parent), "/tmp/\udcff") for arg in commands(run)[name]]
    done = script(*args)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "/tmp/\\xff" in done.stderr
    assert "not UTF-8; rename it" in done.stderr


def test_an_error_of_this_project_keeps_its_traceback(tmp_path):
    (tmp_path / "broken.py").write_text("def main(): return [][0]\n")
    code = f"from bdh_lib.script import cli; cli.run({str(tmp_path / 'broken.py')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "IndexError" in done.stderr
    assert bdh_mlx.UserError.exit_code == 2


def test_a_deleted_current_folder_is_told_where_it_is_needed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "error", None, raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    assert summary.from_here(tmp_path) == tmp_path  # the last lines of a run do without it
    with pytest.raises(FileNotFoundError) as error:
        files.absolute("run")
    assert cli.report_error(error.value, "generate.py") == 2
    assert capsys.readouterr().err.startswith("error: the current folder has been deleted; ")


@pytest.mark.parametrize(
    "text",
    [
        "[METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002).",
        "[metal::malloc] Resource limit (499000) exceeded.",
    ],
)
def test_a_fault_of_a_macs_gpu_is_one_line_in_every_script(text, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "error", None, raising=False)
    assert cli.report_error(RuntimeError(text), "generate.py") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {text}") and err.count("\n") == 1 and "docs/mac.md" in err
