"""Let a trained BDH write: bytes stream to the terminal as they are drawn.

    python generate.py checkpoints_mlx/full                      # a session: type, read, go on
    python generate.py checkpoints_mlx/full --prompt "### Instruction:\\nExplain" --top-p 0.9
    cat question.txt | python generate.py weights.safetensors --temperature 0
    python generate.py checkpoints_mlx/full --prompts asked.jsonl --out answered.jsonl
    python generate.py checkpoints_mlx/full --evaluate held_out.jsonl

A run folder means its best checkpoint, else its last. The model keeps a state of fixed size, so
each byte takes the same time, however long the text has become.
"""

if __name__ == "__main__":  # it imports this file anew, ready for Ctrl-C meanwhile
    import cli

    cli.run("generate")

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import bdh_mlx  # before mlx.core, to which it gives a fast BLAS on Linux

# isort: split
import mlx.core as mx
from tqdm import tqdm

import chat
import cli
import data
import evaluation
import export
import formats
import neurons
from errors import UserError, visible
from flags import Parser
from memory import compute_for
from sampling import WINDOW, Sampling
from state import PARTS, State
from writing import Stops, Terminal, as_text, complete, outgrown, read, rows, unescaped, write

PROMPTS = """a prompt in each line: {"prompt": text}, read as it is, or a record, in the format of
the mode"""
STOP = r"""end before this text, \n in it a line break; may be repeated (in mode full a line ---)"""
LOAD = (
    "go on from a saved state, with a --prompt of a byte or more: an empty one starts a new record"
)
DTYPES = ("bfloat16", "float32")
PENALTY = f"above 1: fewer of the bytes in the last {WINDOW}; letters recur, so keep it near 1 (1)"

ALONE = {"evaluate": ["mode", "dtype"], "trace": [], "export": []}  # what else acts beside these
TRACE = "no text but what fires on TEXT (@FILE: on its lines); several times: what tells them apart"
EXPORT = "no text but weights, config and a model card for others, in FOLDER"


def flags(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)

    def group(title: str, one: bool = False):
        of = parser.add_argument_group(title)
        of = of.add_mutually_exclusive_group() if one else of
        return lambda flag, text, **how: of.add_argument(flag, help=text, **how)

    add = parser.add_argument
    add("model", help="run folder, checkpoint folder or .safetensors file")
    add("--mode", choices=formats.NEEDED, help="training mode (the one the checkpoint names)")

    add = group("what to go on with (stdin where it is piped, a session on a terminal)", one=True)
    add("--prompt", r"text, \n in it a line break; an empty one starts a new record")
    add("--prompt-file", "a file's bytes", type=Path, metavar="FILE")
    add("--prompts", PROMPTS, type=Path, metavar="JSONL")
    add("--evaluate", "no text but the loss on a file or data set, by field", metavar="DATA")
    add("--trace", TRACE, action="append", metavar="TEXT")
    add("--export", EXPORT, type=Path, metavar="FOLDER")

    add = group("what was read before it, and how much is remembered")
    add("--load-state", LOAD, type=Path, metavar="FILE.safetensors")
    add("--window", "forget what is older than W bytes (all is remembered)", type=int, metavar="W")
    add("--dtype", "of the products (bfloat16 on a GPU, else float32)", choices=DTYPES)

    add = group("what ends a text", one=True)
    add("--stop", STOP, action="append", metavar="TEXT")
    add("--no-stop", "end at --max-new-tokens alone", action="store_true")

    add = group("what comes out")
    budget = formats.BUDGET
    add("--max-new-tokens", f"bytes at most ({budget})", type=int, default=budget, metavar="N")
    add("--samples", "texts for each prompt (1)", type=int, default=1, metavar="N")
    add("--batch-size", "texts written at once (8)", type=int, default=8, metavar="N")
    add("--out", "file for the texts of --prompts (stdout)", type=Path, metavar="JSONL")
    add("--save-state", "keep what was read and written", type=Path, metavar="FILE.safetensors")
    add("--raw", "bytes as they are, also those unsafe on a terminal", action="store_true")

    add = group("how a byte is drawn; these act in this order")
    add("--utf8", "only bytes that continue valid UTF-8", action="store_true")
    add("--repetition-penalty", PENALTY, type=float, default=1.0, metavar="X")
    add("--temperature", "0: the likeliest byte (0.8)", type=float, default=0.8, metavar="X")
    add("--top-k", "among the K likeliest bytes (all)", type=int, metavar="K")
    add("--top-p", "among the fewest that hold a share P (all)", type=float, metavar="P")
    add("--min-p", "at least P times as likely as the likeliest", type=float, metavar="P")
    add("--seed", "same seed, same bytes, on one machine (random)", type=int)

    args = parser.parse_args(argv)
    for name, least in (
        ("max_new_tokens", 1),
        ("samples", 1),
        ("batch_size", 1),
        ("window", PARTS),
    ):
        if (value := getattr(args, name)) is not None and value < least:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} is {value}; it must be at least {least}")
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    for alone in ALONE.keys() & given:
        idle = [name for name in given if name not in ("model", alone, *ALONE[alone])]
        if idle:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
            raise UserError(f"{names}: no effect beside --{alone}; leave out what does not act")
    if "batch_size" in given and not (args.prompts or args.samples > 1):
        raise UserError("--batch-size: no effect on one text; give it with --prompts or --samples")
    if args.save_state and (args.prompts or args.samples > 1):
        raise UserError("--save-state keeps the state of one text; leave out what makes several")
    if args.seed is not None and not 0 <= args.seed < 2**64:
        raise UserError(f"--seed is {args.seed}; it must be at least 0 and below 2^64")
    if args.out and not args.prompts:
        raise UserError("--out is for the texts of --prompts; give both")
    if args.raw and (args.prompts or args.samples > 1):
        raise UserError("--raw writes one text; leave out --prompts and --samples")
    return args


def read_prompt(args: argparse.Namespace) -> bytes:
    """The prompt as bytes, from --prompt, --prompt-file or stdin. Raises UserError."""
    if args.prompt is not None:
        return unescaped(args.prompt)
    if args.prompt_file is None:
        if sys.stdin.isatty():  # as stdout is not: a session would have begun
            print("the prompt is what is typed here, up to Ctrl-D", file=sys.stderr)
        return sys.stdin.buffer.read()
    try:
        return args.prompt_file.read_bytes()
    except OSError as error:
        raise UserError(f"--prompt-file {args.prompt_file}: {error.strerror}") from None


def stop_strings(args: argparse.Namespace, mode: str | None) -> list[bytes]:
    """What ends a text: --stop, else the line that ends a record of mode full."""
    if args.no_stop:
        return []
    if args.stop is None:
        return [f"{formats.STOP}\n".encode()] if mode == "full" else []
    if "" in args.stop:
        raise UserError("--stop is empty; it must have at least one character")
    return [unescaped(text) for text in args.stop]


class Job(NamedTuple):
    """One text to write: the line of its prompt, which sample of it, the record, the prompt."""

    line: int
    sample: int
    record: dict
    prompt: bytes


def read_jobs(file: Path, mode: str | None, samples: int) -> list[Job]:
    """A job for each sample of each prompt in a JSONL file. Raises UserError naming the line."""
    try:
        lines = file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except OSError as error:
        raise UserError(f"--prompts {file}: {error.strerror}; name a JSONL file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {file} is no UTF-8: {error.reason}") from None
    jobs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            prompts = prompts_of(record, mode)
        except (ValueError, RecursionError) as error:
            reason = error if isinstance(error, UserError) else "not JSON"
            raise UserError(f"--prompts {file} line {number}: {reason}") from None
        jobs += [Job(number, i, record, p) for p in prompts for i in range(1, samples + 1)]
    if not jobs:
        raise UserError(f"--prompts {file} holds no prompt")
    return jobs


def prompts_of(record: dict, mode: str | None) -> list[bytes]:
    """A record's `prompt` as it is; without one its training text as far as a model goes on."""
    if not isinstance(record, dict):
        raise UserError("not a JSON object")
    if isinstance(record.get("prompt"), str):
        return [record["prompt"].encode(errors="surrogatepass")]
    if "prompt" in record:
        raise UserError(f"prompt is {type(record['prompt']).__name__}, not text")
    if mode is None:
        raise UserError("no `prompt`, and the checkpoint names no mode to format a record: --mode")
    structure, contents = data.detect(record, questions=True)
    needed = "text" if structure == "text" else "system" if mode == "system" else "instruction"
    for content in contents:
        given = ("system",) if content.get("system") else ()
        if reason := data.fault(content, (needed, *given)):
            raise UserError(reason)
    return [formats.opening(data.sound(content), mode).encode() for content in contents]


def batches(jobs: list[Job], size: int, spread: int) -> Iterator[list[Job]]:
    """Jobs by length of prompt, `size` at once; in a batch lengths differ by at most `spread`."""
    batch = []
    for job in sorted(jobs, key=lambda job: len(job.prompt)):
        if batch and (len(batch) == size or len(job.prompt) - len(batch[0].prompt) > spread):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def write_jobs(
    jobs: list[Job], model, sampling, key, stops, args, state
) -> Iterator[tuple[Job, str, bool]]:
    """Each job with its text and whether a stop string ended it, as they are done."""
    for batch in batches(jobs, args.batch_size, args.max_new_tokens):
        key, draw = mx.random.split(key)
        prompts = [job.prompt or formats.SEPARATOR.encode() for job in batch]
        done = complete(model, prompts, sampling, draw, stops, args.max_new_tokens, state)
        for row, text, stopped in done:
            yield batch[row], as_text(text, whole=sampling.utf8), stopped


def write_file(jobs: list[Job], samples: int, out, texts) -> None:
    """One JSON line per text: its record, `line`, `prompt`, `completion`, `stopped`.

    What the record had under these names itself is `given`.
    """
    done = 0
    try:
        for job, text, stopped in tqdm(texts, total=len(jobs), disable=None, unit="text"):
            which = {"line": job.line} | ({"sample": job.sample} if samples > 1 else {})
            result = {"prompt": as_text(job.prompt), "completion": text, "stopped": stopped} | which
            given = {k: job.record[k] for k in result if k in job.record and k != "prompt"}
            given = {"given": given} if given else {}
            print(json.dumps(job.record | result | given), file=out, flush=True)
            done += 1
    except KeyboardInterrupt:
        print(f"stopped: {done} of {len(jobs)} texts are written", file=sys.stderr)
        raise


def stream(prompt: bytes, model, sampling, key, stops, args, state) -> None:
    """Print the prompt, and what the model makes of it as it comes."""
    terminal, stop = Terminal(args.raw), Stops(stops, prompt)
    terminal.write(prompt)
    idx = rows([prompt or formats.SEPARATOR.encode()])
    written = write(model, *read(model, idx, state), sampling, key, idx)
    try:
        for i, (token, state) in enumerate(written, 1):  # noqa: B007  the last state is saved
            terminal.write(stop.feed(bytes(token)))
            if stop.found or i == args.max_new_tokens:
                break
        terminal.write(stop.end(), final=not sampling.utf8)
        if not args.raw:
            print()
    finally:  # after Ctrl-C, too
        if args.save_state:
            bdh_mlx.save_state(args.save_state, model, state)


def start(model, args: argparse.Namespace) -> State:
    """What was read before: --load-state, else nothing; with --window. Raises UserError."""
    if not args.load_state:
        return State(window=args.window)
    state = bdh_mlx.load_state(args.load_state, model)
    if state.batch > 1:
        raise UserError(f"{args.load_state} holds {state.batch} texts; --load-state takes one")
    if args.window and args.window != state.window:
        raise UserError(
            f"--window is {args.window}, and the state in {args.load_state} was read with "
            f"{state.window or 'none'}; leave it out"
        )
    return state


def main(argv: list[str] | None = None) -> int:
    """Do as the flags say. Raises UserError."""
    args = flags(argv)
    cli.check_temporary_folder()
    if args.export:
        return export.tell(args.model, args.export)
    if args.trace:
        return neurons.tell(bdh_mlx.load_model(args.model), args.trace)
    if args.save_state:
        bdh_mlx.state_file(args.save_state)  # now, not once all is written
    sampling = Sampling(**{field.name: getattr(args, field.name) for field in fields(Sampling)})
    weights = bdh_mlx.find_weights(args.model)
    model, trained = bdh_mlx.load_model(weights), bdh_mlx.settings_of(weights)
    if model.config.vocab_size != 256:
        raise UserError(f"{weights} has a vocabulary of {model.config.vocab_size}; bytes are 256")
    model.compute = compute_for(model.config, "small", args.dtype or "auto")
    mode = args.mode or trained.get("TRAINING_MODE")
    mode = mode if mode in formats.NEEDED else None
    key = mx.random.key(time.time_ns() if args.seed is None else args.seed)
    stops = stop_strings(args, mode)
    state = start(model, args)
    how = (model, sampling, key, stops, args, state)
    if args.evaluate is not None:
        print(evaluation.report(model, args.evaluate, mode, trained))
    elif args.prompts is not None:
        jobs = read_jobs(args.prompts, mode, args.samples)
        tell_outgrown(max(len(job.prompt) for job in jobs), model, state, args)
        with open_out(args.out) as out:
            write_file(jobs, args.samples, out, write_jobs(jobs, *how))
    elif args.prompt is args.prompt_file is None and sys.stdin.isatty() and sys.stdout.isatty():
        if args.save_state or args.raw or args.samples > 1:
            raise UserError("a session takes no --save-state (type /save), --raw or --samples")
        chat.Session(model, sampling, key, stops, args.max_new_tokens, mode, state).run()
    else:
        prompt = read_prompt(args)
        tell_outgrown(len(prompt), model, state, args)
        if args.samples == 1:
            stream(prompt, *how)
        else:
            jobs = [Job(1, i, {}, prompt) for i in range(1, args.samples + 1)]
            for job, text, _ in write_jobs(jobs, *how):
                print(f"--- sample {job.sample}\n{visible(as_text(prompt) + text)}")
    return 0


def tell_outgrown(prompt: int, model, state: State, args: argparse.Namespace) -> None:
    """Say on stderr when a text with a prompt of so many bytes may pass the trained blocks."""
    length = state.position + prompt + args.max_new_tokens
    if note := outgrown(model, state.window, length, args.load_state is not None):
        print(note, file=sys.stderr)


def open_out(file: Path | None):
    """The file to write, or stdout. Raises UserError."""
    if file and file.is_file():
        raise UserError(f"--out {file} exists; name another file, or remove it")
    try:
        return open(file or sys.stdout.fileno(), "w", encoding="utf-8", closefd=file is not None)
    except OSError as error:
        raise UserError(f"--out {file} cannot be written: {error.strerror}") from None
