"""Generate text with a trained BDH: bytes stream to the terminal as they are drawn.

    python generate.py checkpoints_mlx/full                      # a session: type, read, go on
    python generate.py checkpoints_mlx/full --prompt "### Instruction:\\nExplain" --top-p 0.9
    cat question.txt | python generate.py weights.safetensors --temperature 0
    python generate.py checkpoints_mlx/full --prompts asked.jsonl --out answered.jsonl
    python generate.py checkpoints_mlx/full --evaluate held_out.jsonl

A run folder stands for its best checkpoint, else its last. The model has a state of fixed size, so
each byte takes the same time, however long the text is.
"""

if __name__ == "__main__":
    # start.run imports this file as a module and calls its main(): Ctrl-C and errors are one line
    from bdh_lib.script import start

    start.run(__file__)

import argparse
import math
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import bdh_mlx  # before mlx.core, to which it gives a fast BLAS on Linux

# isort: split
import mlx.core as mx

from bdh_lib import runs
from bdh_lib.compute.memory import compute_for, keep_float32_exact, limit_cache
from bdh_lib.compute.state import State, fitting_window
from bdh_lib.data import formats, hub
from bdh_lib.data.questions import load_questions, question_numbers
from bdh_lib.errors import UserError, escape_controls
from bdh_lib.files import read_input, read_stream
from bdh_lib.generation import answers, chat, evaluation, export, state_files, trace
from bdh_lib.generation.arguments import AUTO, parse_args
from bdh_lib.generation.decoding import (
    Decoding,
    StopMatcher,
    Terminal,
    context_length_warning,
    decode_text,
    pad_batch,
    parse_escapes,
    read_prompt,
    stream,
)
from bdh_lib.generation.jobs import (
    Job,
    Results,
    complete_jobs,
    print_line,
    read_jobs,
    remaining_jobs,
    sample_jobs,
    source_digest,
    write_results,
)
from bdh_lib.generation.sampling import Sampling
from bdh_lib.loss import compile_evaluation, evaluate
from bdh_lib.progress import heartbeat
from bdh_lib.script import compiler

DEFAULT_BLOCK_SIZE = 4096  # of --evaluate where the checkpoint does not say its own
LONG_PROMPT = 1000  # bytes of a prompt that the default model reads in seconds on a CPU


class Checkpoint(NamedTuple):
    """The weights that generate, and what is known of their training."""

    weights: Path
    mode: str | None  # --mode, else that of the training; None if it is not known
    batch_size: int  # blocks, of the training; 1 if it is not known


def load_prompt(args: argparse.Namespace) -> bytes:
    """Read the prompt as bytes from --prompt, --prompt-file or stdin. Raises UserError."""
    if args.prompt is not None:
        return parse_escapes(args.prompt)
    if args.prompt_file is None:
        if sys.stdin.isatty():  # stdout is not a terminal, or a session would run
            print("the prompt is what is typed here, up to Ctrl-D", file=sys.stderr)
            return read_stream(sys.stdin.buffer, "the prompt on stdin")
        with redirect_stdout(sys.stderr), heartbeat("waiting for the prompt on stdin"):
            prompt = read_stream(sys.stdin.buffer, "the prompt on stdin")
        if not prompt:
            print("note: stdin is empty, so there is no prompt", file=sys.stderr)
        return prompt
    with redirect_stdout(sys.stderr), heartbeat(f"reading {args.prompt_file}"):
        prompt = read_input(args.prompt_file, "--prompt-file")
    if not prompt:
        raise UserError(f'--prompt-file {args.prompt_file} is empty; --prompt "" begins a record')
    return prompt


def stop_strings(args: argparse.Namespace, mode: str | None) -> list[bytes]:
    """Return the stop strings: --stop, else what ends a response of mode full."""
    if args.no_stop:
        return []
    if args.stop is None:
        return [stop.encode() for stop in formats.END_OF_RESPONSE] if mode == "full" else []
    return [parse_escapes(text) for text in args.stop]


def complete_prompts_file(
    decoding: Decoding, checkpoint: Checkpoint, args: argparse.Namespace
) -> None:
    """Write the completions of --prompts to --out, or to stdout, after those that it holds."""
    jobs = read_jobs(args.prompts, checkpoint.mode, args.samples, args.columns)
    write_results(pending_results(jobs, decoding, checkpoint, args), args.out)


def pending_results(
    jobs: list[Job], decoding: Decoding, checkpoint: Checkpoint, args: argparse.Namespace
) -> Results:
    """Return the Results of the jobs, which generate the texts that --out lacks as they are read.

    Warns where a text may exceed the training blocks. Raises UserError as remaining_jobs does.
    """
    warn_context_length(max(len(job.prompt) for job in jobs), decoding, args)
    flags = vars(args) | {"window": None if args.window == AUTO else args.window}
    source = source_digest(checkpoint.weights, checkpoint.mode, flags)
    remaining = remaining_jobs(jobs, args.out, source)
    completed = complete_jobs(jobs, decoding, args.batch_size, remaining)
    return Results(completed, source, len(jobs) - len(remaining), len(jobs))


def answer_records(decoding: Decoding, checkpoint: Checkpoint, args: argparse.Namespace) -> None:
    """Answer records of --evaluate, write the answers to --out, and print their scores.

    The scores say how near the answers come to the true responses. Raises UserError if the mode
    is not full, and where records or --out cannot be used.
    """
    if (mode := checkpoint.mode) != "full":
        raise UserError(f"--answers is for models of mode full, which have seen responses, and the "
                        f"mode is {mode or 'not known: give --mode full'}")  # fmt: skip
    # the table alone is on stdout, not that large data are being read
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        data = runs.load_data_report(checkpoint.weights)
        about, records = load_questions(args.evaluate, args.columns, data, Path(folder))
    jobs = answers.question_jobs(records, args.answers)
    results = pending_results(jobs, decoding, checkpoint, args)
    rows = answers.read_results(args.out)
    results = results._replace(completed=answers.collect_rows(results.completed, rows))
    write_results(results, args.out, show=lambda _line: None)
    print(f"{about}; {len(jobs):,} of {len(question_numbers(records)):,} answered")
    if cut := sum(len(job.question.truth.encode()) > args.max_new_tokens for job in jobs):
        print(f"true responses longer than --max-new-tokens {args.max_new_tokens}: {cut:,}")
    print(answers.answers_table(rows))


def evaluate_data(model: bdh_mlx.BDH, checkpoint: Checkpoint, args: argparse.Namespace) -> None:
    """Print the loss on the data of --evaluate, by field, in batches as in the training.

    Raises UserError if no mode is known, or the data cannot be used.
    """
    weights, mode, B = checkpoint
    if mode is None:
        raise UserError("the checkpoint names no training mode to format records in; give --mode")
    T = model.trained_length or DEFAULT_BLOCK_SIZE
    with redirect_stdout(sys.stderr):  # the table alone is on stdout
        print(f"reading {args.evaluate}")
        data = evaluation.read_data(
            args.evaluate, mode, args.columns, runs.load_data_report(weights)
        )
        print(f"evaluating {len(data.split.bytes):,} bytes")
    losses_fn = compile_evaluation(model, len(data.split.bytes), (B, T))
    with redirect_stdout(sys.stderr):
        whole, means = evaluate(losses_fn, data.split, (B, T))
    print(evaluation.describe_data(data, T))
    print(evaluation.loss_table(whole, means, data.split))


def complete_prompt(decoding: Decoding, prompt: bytes, args: argparse.Namespace) -> None:
    """Print the completion of one prompt, or --samples of them."""
    if args.samples == 1:  # the windows of several texts may not fit into the memory
        decoding = fit_window(decoding, args, len(prompt) + decoding.max_new_tokens)
    warn_context_length(len(prompt), decoding, args)
    print_prompt_length(len(prompt))
    if args.samples == 1:
        print_stream(decoding, prompt, args)
        return
    jobs = sample_jobs(1, {}, prompt, args.samples)
    for job, text, _ in complete_jobs(jobs, decoding, args.batch_size):
        print_line(f"--- sample {job.sample}\n{escape_controls(decode_text(prompt) + text)}")


def print_stream(decoding: Decoding, prompt: bytes, args: argparse.Namespace) -> None:
    """Print the prompt and, byte by byte, its completion."""
    model = decoding.model
    stop = StopMatcher(decoding.stops, prompt)
    terminal = Terminal(args.raw)
    terminal.write(prompt)
    idx = pad_batch([prompt or formats.SEPARATOR.encode()])
    logits, state = read_prompt(model, idx, decoding.start)
    tokens = stream(decoding, logits, state, idx)
    try:
        for i, (token, state) in enumerate(tokens, 1):  # noqa: B007  the last state is saved
            terminal.write(stop.feed(bytes(token)))
            if stop.matched or i == decoding.max_new_tokens:
                break
        terminal.write(stop.end(), final=not decoding.sampling.utf8)
        if not args.raw:
            print()
    finally:  # after Ctrl-C, too
        if args.save_state:
            state_files.save_state(args.save_state, model, state)


def initial_state(model, args: argparse.Namespace) -> State:
    """Load the state of --load-state, or make an empty one with --window. Raises UserError."""
    if not args.load_state:
        return State(window=None if args.window == AUTO else args.window)
    state = state_files.load_state(args.load_state, model)
    if state.batch > 1:
        raise UserError(f"{args.load_state} holds {state.batch} texts; --load-state takes one")
    if args.window not in (AUTO, state.window):
        raise UserError(
            f"--window is {args.window or 'none'}, and the state in {args.load_state} was read "
            f"with {state.window or 'none'}; leave it out"
        )
    return state


def fit_window(decoding: Decoding, args: argparse.Namespace, length: float = math.inf) -> Decoding:
    """Return the decoding, with the window that a text of `length` bytes needs.

    --window and a loaded state come first.
    """
    trained = decoding.model.trained_length
    if args.window != AUTO or args.load_state or not trained:
        return decoding
    return decoding._replace(start=State(window=fitting_window(length, trained)))


def main(argv: list[str] | None = None) -> int:
    """Run the command. Raises UserError."""
    args = parse_args(argv, __doc__)
    compiler.check()
    limit_cache()
    if hub.is_model(str(args.model)):
        args.model = hub.download_model(args.model)
    if args.export:
        return export.export_model(args.model, args.export)
    if args.trace:
        return trace.trace_texts(load_byte_model(args.model), args.trace, args.out)
    if args.save_state:
        state_files.check_state_file(args.save_state)  # before the text is generated
    weights = runs.find_weights(args.model)
    model = load_byte_model(weights)
    trained = settings_or_empty(weights)
    keep_float32_exact(args.dtype or "auto")
    model.compute = compute_for(model.config, "small", args.dtype or "auto")
    mode = args.mode or trained.get("TRAINING_MODE")
    mode = mode if mode in formats.REQUIRED_FIELDS else None
    checkpoint = Checkpoint(weights, mode, trained.get("BATCH_SIZE", 1))
    if args.evaluate is not None and args.answers is None:
        evaluate_data(model, checkpoint, args)
    else:
        generate_by_flags(make_decoding(model, mode, args), checkpoint, args)
    return 0


def load_byte_model(path: Path) -> bdh_mlx.BDH:
    """Load a model that reads bytes. Raises UserError."""
    model = bdh_mlx.load_model(path)
    if model.config.vocab_size != 256:
        raise UserError(f"{path} has a vocabulary of {model.config.vocab_size}; bytes are 256")
    return model


def make_decoding(model: bdh_mlx.BDH, mode: str | None, args: argparse.Namespace) -> Decoding:
    """Make the Decoding that the flags ask for. Raises UserError."""
    sampling = Sampling(**{field.name: getattr(args, field.name) for field in fields(Sampling)})
    key = mx.random.key(time.time_ns() if args.seed is None else args.seed)
    stops = stop_strings(args, mode)
    return Decoding(model, sampling, key, stops, args.max_new_tokens, initial_state(model, args))


def generate_by_flags(decoding: Decoding, checkpoint: Checkpoint, args: argparse.Namespace) -> None:
    """Generate what the flags ask for: answers, completions, a session, or one text."""
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if args.answers is not None:
        answer_records(decoding, checkpoint, args)
    elif args.prompts is not None:
        complete_prompts_file(decoding, checkpoint, args)
    elif args.prompt is args.prompt_file is None and on_terminal:
        if args.save_state or args.raw or args.samples > 1:
            raise UserError("a session takes no --save-state (type /save), --raw or --samples")
        has_chats = runs.trained_on_chats(checkpoint.weights)
        chat.Session(fit_window(decoding, args), checkpoint.mode, has_chats).run()
    else:
        complete_prompt(decoding, load_prompt(args), args)


def settings_or_empty(weights: Path) -> dict:
    """Return the settings of the training; {} if their file is damaged: load_model warns of it."""
    try:
        return runs.load_settings(weights)
    except UserError:
        return {}


def print_prompt_length(n_bytes: int) -> None:
    """Print to stderr that a long prompt is read, which takes a CPU seconds."""
    if n_bytes > LONG_PROMPT:
        print(f"reading a prompt of {n_bytes:,} bytes", file=sys.stderr)


def warn_context_length(n_bytes: int, decoding: Decoding, args: argparse.Namespace) -> None:
    """Warn on stderr if a text after a prompt of `n_bytes` may exceed the training blocks."""
    start = decoding.start
    loaded = args.load_state is not None
    length = start.position + n_bytes + decoding.max_new_tokens
    if note := context_length_warning(decoding.model, start.window, length, loaded):
        print(note, file=sys.stderr)
