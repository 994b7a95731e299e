"""Many texts at once: prompts from a JSONL file, their completions as lines of JSON.

A job is a text to generate. Each result is written as soon as its text ends. An interrupted command
continues its file, which with --seed ends in the same bytes as without the interruption.
"""

import fcntl
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
from tqdm import tqdm

from bdh_lib import files
from bdh_lib.data import columns, formats
from bdh_lib.data.chats import is_chat
from bdh_lib.data.parsers import parse_exactly
from bdh_lib.errors import UserError
from bdh_lib.generation.decoding import Decoding, decode_text, generate_batch
from bdh_lib.progress import Progress

MAX_TEXTS = 10**6  # of one command
INPUTS = ("model", "mode", "prompts", "evaluate", "out")  # flags that name what is in the results


class Job(NamedTuple):
    """A text to generate: its prompt, and where the prompt comes from."""

    line: int  # of the prompt in its file
    sample: int | None  # number of the text among those of its prompt; None: it is the only one
    record: dict  # the line's JSON
    prompt: bytes

    result_names = ("completion", "stopped")  # what the text of a result decides, itself first

    def result(self, text: str, stopped: bool, source: str) -> dict:
        """Return the job's record and what it gave.

        Added are `line`, `prompt`, `completion`, `stopped`, `sample` if there are several, and
        `by`, the digest of the `source`. Fields of the record with these names go to `given`.
        """
        result = {"prompt": decode_text(self.prompt), "completion": text, "stopped": stopped}
        result |= {"line": self.line, "by": source}
        if self.sample is not None:
            result["sample"] = self.sample
        clashing = {k: self.record[k] for k in result if k in self.record and k != "prompt"}
        return self.record | result | ({"given": clashing} if clashing else {})


# ---------------------------------------------------------------------------- prompts and batches


def read_jobs(
    file: Path, mode: str | None, samples: int, columns_setting: str | None = None
) -> list[Job]:
    """Read a JSONL file: a job for each sample of each line. Raises UserError naming the line."""
    try:
        text = files.read_input(file, "--prompts").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {file} is not UTF-8: {error.reason}") from None
    jobs = []
    for number, line in enumerate(io.StringIO(text, newline=None), 1):  # any line end is a line's
        if not line.strip():
            continue
        try:
            record, prompt = parse_line(line, mode, columns_setting)
        except ValueError as error:
            reason = "not JSON" if isinstance(error, json.JSONDecodeError) else error
            raise UserError(f"--prompts {file} line {number}: {reason}") from None
        if len(jobs) + samples > MAX_TEXTS:
            demand = f"--prompts {file} with --samples {samples} asks"
            raise UserError(f"{demand} for more than {MAX_TEXTS:,} texts; ask for fewer at once")
        jobs += sample_jobs(number, record, prompt, samples)
    if not jobs:
        raise UserError(f"--prompts {file} holds no prompt")
    return jobs


def parse_line(line: str, mode: str | None, columns_setting: str | None) -> tuple[dict, bytes]:
    """Return the record of a line and its prompt. Raises ValueError for what is not JSON."""
    record = files.parse_json(line)
    check_json(record)
    if isinstance(record, dict) and ("prompt" not in record or columns_setting):
        # as in training, with numbers as they stand in the line
        return record, prompt_of_record(parse_exactly(line), mode, columns_setting)
    return record, prompt_of_record(record, mode)


def sample_jobs(line: int, record: dict, prompt: bytes, samples: int) -> list[Job]:
    """Return a job for each of the `samples` texts of one prompt."""
    numbers = range(1, samples + 1) if samples > 1 else [None]
    return [Job(line, sample, record, prompt) for sample in numbers]


def check_json(record) -> None:
    """Raise UserError if JSON cannot hold the record: Python also reads NaN."""
    try:
        json.dumps(record, allow_nan=False)
    except RecursionError:
        raise UserError("its brackets are nested too deep") from None
    except ValueError:
        raise UserError("it holds a number that JSON cannot (NaN, or above 1.8e308)") from None


def prompt_of_record(record: dict, mode: str | None, columns_setting: str | None = None) -> bytes:
    """Return a record's `prompt` unchanged; without one, its text of `mode` up to the answer.

    Where COLUMNS is set, `prompt` is a column as any other. Raises UserError.
    """
    if not isinstance(record, dict):
        raise UserError("not a JSON object")
    prompt = record.get("prompt")
    if isinstance(prompt, str) and not columns_setting:
        return prompt.encode(errors="surrogatepass")
    if prompt is not None and not isinstance(prompt, str) and not is_chat(prompt):
        raise UserError(f"prompt is {type(prompt).__name__}, not text")
    if mode is None:
        raise UserError("no `prompt`, and the checkpoint names no mode to format a record: --mode")
    parsed = columns.parse_record(record, columns_setting)
    columns.check_read(columns_setting, parsed.columns, columns.unused_values(record, parsed))
    is_text = parsed.kind == "text"
    needed = "text" if is_text else "system" if mode == "system" else "instruction"
    if needed not in dict(parsed.turns):
        raise UserError(parsed.reason(needed))
    if mode in ("both", "full") and parsed.is_broken("system"):
        raise UserError(parsed.reason("system"))
    return formats.format_prompt(parsed.turns, mode).encode()


def batches(jobs: list[Job], size: int, spread: int) -> Iterator[list[Job]]:
    """Group up to `size` jobs of similar prompts: lengths differ by at most `spread` bytes."""
    batch = []
    for job in sorted(jobs, key=lambda job: len(job.prompt)):
        if batch and (len(batch) == size or len(job.prompt) - len(batch[0].prompt) > spread):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def complete_jobs(
    jobs: list[Job],
    decoding: Decoding,
    batch_size: int,
    remaining: list[Job] | None = None,
    stop=None,
) -> Iterator[tuple[Job, str, bool]]:
    """Yield each job, its text and whether a stop string ended it, in the order they end.

    It yields only `remaining` jobs, but batches and draws are those of all jobs. It ends once
    `stop`, a StopSignal, has received one.
    """
    key = decoding.key
    whole = decoding.sampling.utf8
    remaining = set(map(id, jobs if remaining is None else remaining))
    for batch in batches(jobs, batch_size, decoding.max_new_tokens):
        key, batch_key = mx.random.split(key)
        if remaining.isdisjoint(map(id, batch)):
            continue
        prompts = [job.prompt or formats.SEPARATOR.encode() for job in batch]
        for row, text, stopped in generate_batch(decoding._replace(key=batch_key), prompts, stop):
            if id(batch[row]) in remaining:
                yield batch[row], decode_text(text, whole), stopped


# ------------------------------------------------------------------------------------- the results


def source_digest(weights: Path, mode: str | None, flags: dict) -> str:
    """Return a short digest of all that determines the texts: the weights and the flags."""
    flags = {k: str(v) for k, v in flags.items() if k not in INPUTS}
    identity = json.dumps([files.sha256_file(weights), mode, flags])
    return files.sha256_text(identity)[:12]


def result_line(job: Job, source: str, text: str = "", stopped: bool = False) -> str:
    """Format the result of a job as a line of JSON."""
    return json.dumps(job.result(text, stopped, source))


def result_key(line: str | bytes, result_names: Sequence[str]) -> str:
    """Return a line of results without the fields `result_names`, as a key.

    Raises an error for another line.
    """
    result = files.parse_json(line)
    for name in result_names:
        del result[name]
    return json.dumps(result, sort_keys=True)


def line_start(job: Job, source: str) -> bytes:
    """Return a job's line of results up to its text."""
    before, mark, _ = result_line(job, source).partition(f'"{job.result_names[0]}": "')
    return f"{before}{mark}".encode()


def remaining_jobs(jobs: list[Job], out: Path | None, source: str) -> list[Job]:
    """Return the jobs whose texts are not in the file `out`.

    It removes an incomplete last line, which a full disk leaves. Raises UserError if the file holds
    anything but results of these jobs.
    """
    if not (out and os.path.isfile(out)):  # noqa: PTH113  which raises nothing
        return jobs
    *lines, partial = out.read_bytes().split(b"\n")
    result_names = jobs[0].result_names
    remaining = {id(job): job for job in jobs}
    jobs_by_key = {}
    for job in jobs:
        jobs_by_key.setdefault(result_key(result_line(job, source), result_names), []).append(job)
    for number, line in enumerate(lines, 1):
        try:
            del remaining[id(jobs_by_key[result_key(line, result_names)].pop(0))]
        except (ValueError, RecursionError, LookupError, TypeError):
            raise UserError(
                f"--out {out} exists, and its line {number} is not an answer of this command to "
                "these prompts; name another file, or remove it"
            ) from None
    if partial:
        starts = (line_start(job, source) for job in remaining.values())
        if not any(start.startswith(partial) or partial.startswith(start) for start in starts):
            raise UserError(f"--out {out} exists; name another file, or remove it")
        os.truncate(out, sum(len(line) + 1 for line in lines))
    return list(remaining.values())


def print_line(line: str) -> None:
    """Print a line, clear of the bars that are drawn."""
    tqdm.write(line)
    sys.stdout.flush()


class Results(NamedTuple):
    """The results of the jobs of a command, as they end, after those that --out holds already."""

    # a job, its text, and whether a stop string ended it
    completed: Iterator[tuple[Job, str, bool]]
    source: str  # digest of what determines the texts
    done: int  # texts that were written before
    total: int


def write_results(
    results: Results, out: Path | None, show: Callable[[str], None] = print_line
) -> None:
    """Write a line to `out` for each result as soon as it is there; without `out`, `show` it."""
    completed, source, done, total = results
    if done:
        status = "the others follow" if done < total else "none is left to write"
        print(f"{out} holds {done} of {total} texts; {status}", file=sys.stderr)
    try:
        with (
            open_output(out, show) as put,
            Progress("writing", total, "texts", done, sys.stderr) as progress,
        ):
            for job, text, stopped in completed:
                put(result_line(job, source, text, stopped))
                done += 1
                progress.update()
    except KeyboardInterrupt:
        hint = " are written; the same command continues" if out else ""
        print(f"stopped: {done} of {total} texts{hint}", file=sys.stderr)
        raise


@contextmanager
def open_output(file: Path | None, show: Callable) -> Iterator[Callable[[str], None]]:
    """Yield a function that appends a line to a file; `show` if `file` is None.

    Raises UserError. It removes a new file that stays empty.
    """
    if not file:
        yield show
        return
    is_new = not os.path.exists(file)  # noqa: PTH110  which raises nothing
    try:
        with file.open("ab", buffering=0) as out:  # unbuffered: nothing stays behind on a full disk
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield lambda line: write_line(out, line)
    except BlockingIOError:
        raise UserError(f"--out {file} is being written by another process") from None
    except OSError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--out {file} cannot be written: {files.write_fault(error)}") from None
    finally:
        if is_new and os.path.isfile(file) and not file.stat().st_size:  # noqa: PTH113
            file.unlink()


def write_line(out, line: str) -> None:
    """Write a line to an unbuffered file, which may take only a part of it at once."""
    unwritten = f"{line}\n".encode()
    while unwritten:
        unwritten = unwritten[out.write(unwritten) :]
