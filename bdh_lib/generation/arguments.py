"""The flags of generate.py: their help, their limits, and which go together."""

import argparse
from collections.abc import Callable

from bdh_lib.compute.state import WINDOW_RULE
from bdh_lib.data import formats, hub
from bdh_lib.errors import UserError
from bdh_lib.files import expand_user
from bdh_lib.generation.jobs import MAX_TEXTS
from bdh_lib.generation.sampling import LIMITS, PENALTY_WINDOW
from bdh_lib.rules import integer
from bdh_lib.script import cli
from bdh_lib.script.flags import Parser, RecordTyped, flag_of, parse_value

DTYPES = ("bfloat16", "float32")
AUTO = "auto"  # --window where it is not typed
EXCLUSIVE_JOBS = {
    "evaluate": ["mode", "dtype", "columns"],
    "trace": ["out"],
    "export": [],
}  # their flags
OF_ANSWERS = ["answers", "out", "batch_size", "max_new_tokens", "window"]  # beside --evaluate's
NUMBERS = LIMITS | {  # of each flag that takes one
    "max_new_tokens": integer(1, 10**12),
    "samples": integer(1, MAX_TEXTS),
    "batch_size": integer(1, 65536),
    "answers": integer(1, MAX_TEXTS),
    "window": WINDOW_RULE,
    "seed": integer(0, 2**64 - 1),
}
PATHS = ("model", "prompt_file", "prompts", "export", "load_state", "save_state", "out")
TEXTS = ("evaluate", "trace", "stop", "columns")  # an empty --prompt begins a record


def make_parser(description: str) -> Parser:
    """Return the parser of the command line."""
    parser = Parser(description)
    parser.add_argument("--version", action="version", version=cli.version())
    add_model(parser.add_argument)
    group = parser.add_argument_group(
        "what to do; default: a session on a terminal, else a prompt from stdin"
    )
    add_jobs(group.add_mutually_exclusive_group().add_argument)
    group.add_argument(
        "--answers",
        metavar="N",
        help="answer N instructions of --evaluate instead, those that the run held out of its own "
        "data, at temperature 0, and compare with the true responses (mode full)",
    )
    add_state(parser.add_argument_group("state").add_argument)
    stop = parser.add_argument_group("end of a text").add_mutually_exclusive_group()
    add_stop(stop.add_argument)
    add_output(parser.add_argument_group("output").add_argument)
    add_sampling(parser.add_argument_group("sampling, in the order of its steps").add_argument)
    return parser


def add_model(add: Callable) -> None:
    """Add the model, and how it reads records and computes."""
    add("model", help="run folder, checkpoint folder, .safetensors file or hf:USER/NAME")
    modes = formats.REQUIRED_FIELDS
    add("--mode", choices=modes, help="training mode; default: the one that the checkpoint names")
    add(
        "--columns",
        metavar="FIELD=NAME,...",
        help="which column of --prompts or --evaluate is what, as COLUMNS of train_mlx.py",
    )
    add(
        "--dtype",
        choices=DTYPES,
        help="of products (on a CPU, when reading); default: bfloat16 on a GPU, else float32",
    )


def add_jobs(add: Callable) -> None:
    """Add the flags that say what the command does."""
    add(
        "--prompt",
        metavar="TEXT",
        help=r"continue TEXT, in which \n is a line break; an empty one starts a new record",
    )
    add("--prompt-file", metavar="FILE", help="continue the bytes of a file")
    add(
        "--prompts",
        metavar="JSONL",
        help='continue each line: {"prompt": text}, read as it is, or a record, in the format of '
        "the mode",
    )
    add("--evaluate", metavar="DATA", help="print the loss on a file or data set, by field")
    add(
        "--trace",
        metavar="TEXT",
        action="append",
        help="show the neurons that fire on TEXT, or on each line of a @FILE; of several texts, "
        "those that tell them apart",
    )
    add("--export", metavar="FOLDER", help="write weights, configuration and a model card")


def add_state(add: Callable) -> None:
    """Add the flags of the state that the model reads and writes."""
    add(
        "--load-state",
        metavar="FILE.safetensors",
        help="continue from a saved state, with a --prompt of at least one byte",
    )
    add("--save-state", metavar="FILE.safetensors", help="save the state at the end of the text")
    add(
        "--window",
        default=AUTO,
        metavar="W",
        help="forget bytes older than W; none: keep all; default: the length of the blocks that "
        "the model was trained on, where a session or a prompt's text may outgrow them, else none",
    )


def add_stop(add: Callable) -> None:
    """Add the flags that end a text before --max-new-tokens."""
    add(
        "--stop",
        metavar="TEXT",
        action="append",
        help=r"end before TEXT, in which \n is a line break; may be repeated; default in mode "
        "full: a line ---, or the next question",
    )
    add("--no-stop", action="store_true", help="end at --max-new-tokens alone")


def add_output(add: Callable) -> None:
    """Add the flags of what is written, and where."""
    add(
        "--max-new-tokens",
        default=formats.MAX_NEW_TOKENS,
        metavar="N",
        help=f"bytes of a text at most; default: {formats.MAX_NEW_TOKENS}",
    )
    add("--samples", default=1, metavar="N", help="texts for each prompt; default: 1")
    add("--batch-size", default=8, metavar="N", help="texts generated at once; default: 8")
    add(
        "--out",
        metavar="FILE",
        help="file for the texts of --prompts (default: stdout) or the --answers (default: none), "
        "or name of the picture and JSON of --trace (default: trace)",
    )
    add(
        "--raw",
        action="store_true",
        help="write bytes as they are, also those that are unsafe on a terminal",
    )


def add_sampling(add: Callable) -> None:
    """Add the flags of how a byte is drawn."""
    add("--utf8", action="store_true", help="only bytes that continue valid UTF-8")
    add(
        "--repetition-penalty",
        default=1.0,
        metavar="X",
        help=f"above 1: fewer of the last {PENALTY_WINDOW} bytes; letters recur, so keep it near "
        "1; default: 1",
    )
    add("--temperature", default=0.8, metavar="X", help="0: the likeliest byte; default: 0.8")
    add("--top-k", metavar="K", help="among the K likeliest bytes; default: all")
    add(
        "--top-p",
        metavar="P",
        help="among the fewest bytes that hold a share P of the probability; default: all",
    )
    add(
        "--min-p",
        metavar="P",
        help="among bytes at least P times as likely as the likeliest; default: all",
    )
    add("--seed", help="same seed, same bytes, on one machine; default: random")


def parse_args(argv: list[str] | None, description: str = "") -> argparse.Namespace:
    """Parse and check the command line. Raises UserError."""
    args, typed = parse_typed(make_parser(description), argv)
    for name, rule in NUMBERS.items():
        if name in typed:
            rule = rule._replace(allow_none=name == "window")
            setattr(args, name, parse_value(flag_name(name), typed[name], rule))
    for name in PATHS:
        if name in typed and not hub.is_model(typed[name]):
            setattr(args, name, expand_user(typed[name], flag_name(name)))
    for name in TEXTS:
        texts = typed.get(name, [])
        if "" in (texts if isinstance(texts, list) else [texts]):
            raise UserError(f"{flag_name(name)} is empty; it must have at least one character")
    check_flags(args, typed)
    if args.answers:
        args.temperature = 0.0
    return args


class RefuseRepeated(RecordTyped):
    """Arguments of which none may be typed again with another value."""

    def on_repeat(self, text: str) -> None:
        several = ", or several texts by --prompts FILE" if text.startswith("--prompt ") else ""
        raise UserError(f"{text}; give one of them{several}")


def parse_typed(parser: Parser, argv: list[str] | None) -> tuple[argparse.Namespace, dict]:
    """Return the parsed arguments, and those that the user typed, even with a default's value."""
    args = parser.parse_args(argv)
    absent = {name: None for name in vars(args)}
    typed = vars(parser.parse_args(argv, RefuseRepeated(**absent)))
    return args, {name: value for name, value in typed.items() if value is not None}


def flag_name(argument: str) -> str:
    """Return an argument's name as it is typed: `model`, or a flag."""
    return argument if argument == "model" else flag_of(argument)


def check_flags(args: argparse.Namespace, typed: dict) -> None:
    """Raise UserError if a flag has no effect with the others."""
    if args.answers and not args.evaluate:
        raise UserError("--answers is for the questions of --evaluate DATA; give both")
    for job in EXCLUSIVE_JOBS.keys() & typed:
        effective = ("model", job, *EXCLUSIVE_JOBS[job], *(OF_ANSWERS if args.answers else ()))
        if idle := ", ".join(flag_name(name) for name in typed if name not in effective):
            raise UserError(f"{idle}: no effect beside --{job}; leave out what does not act")
    several = args.prompts or args.answers or args.samples > 1
    if "batch_size" in typed and not several:
        raise UserError(
            "--batch-size: no effect on one text; give it with --prompts, --samples or --answers"
        )
    if args.save_state and several:
        raise UserError("--save-state keeps the state of one text; leave out what makes several")
    if args.out and not (args.prompts or args.trace or args.answers):
        raise UserError("--out is for the texts of --prompts, --answers and --trace; give one")
    if args.columns and not (args.prompts or args.evaluate):
        raise UserError("--columns is for the records of --prompts and --evaluate; give one")
    if args.raw and several:
        raise UserError("--raw writes one text; leave out --prompts and --samples")
    if args.temperature == 0:
        names = ("top_k", "top_p", "min_p", "seed")
        if idle := ", ".join(flag_name(name) for name in names if name in typed):
            raise UserError(f"{idle}: no effect at --temperature 0, which takes the likeliest byte")
