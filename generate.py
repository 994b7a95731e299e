"""Let a trained BDH write: bytes stream to the terminal as they are drawn.

    python generate.py checkpoints_mlx/full --prompt "### Instruction:\\nExplain"
    python generate.py checkpoints_mlx/full/step-000500 --prompt-file question.txt --temperature 0
    echo "### Response:" | python generate.py weights.safetensors --top-k 50 --seed 1

A run folder means its best checkpoint, else its last. The model keeps a state of fixed size, so
each byte takes the same time, however long the text has become.
"""

import argparse
import codecs
import os
import sys
import time
from itertools import islice
from pathlib import Path

import bdh_mlx  # before mlx.core, to which it gives a fast BLAS on Linux

# isort: split
import mlx.core as mx

import export
import neurons
from bdh_mlx import UserError

TRACE = "no text but what fires on TEXT (@FILE: on its lines); several times: what tells them apart"
EXPORT = "no text but weights, config and a model card for others, in FOLDER"


def flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="run folder, checkpoint folder or .safetensors file")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help=r"text to continue; \n in it is a line break")
    source.add_argument("--prompt-file", type=Path, help="file to continue (default: stdin)")
    source.add_argument("--trace", action="append", metavar="TEXT", help=TRACE)
    source.add_argument("--export", type=Path, metavar="FOLDER", help=EXPORT)
    parser.add_argument("--max-new-tokens", type=int, default=500, help="bytes to write (500)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: likeliest byte (0.8)")
    parser.add_argument("--top-k", type=int, help="draw among the k likeliest bytes (all)")
    parser.add_argument("--seed", type=int, help="same seed, same text, on one machine (random)")
    return parser.parse_args(argv)


def read_prompt(args: argparse.Namespace) -> bytes:
    """The prompt as bytes, from --prompt, --prompt-file or stdin. Raises UserError if empty."""
    if args.prompt is not None:
        prompt = args.prompt.replace("\\n", "\n").encode(errors="surrogateescape")
    elif args.prompt_file:
        try:
            prompt = args.prompt_file.read_bytes()
        except OSError as error:
            raise UserError(f"--prompt-file {args.prompt_file}: {error.strerror}") from None
    else:
        prompt = sys.stdin.buffer.read()
    if not prompt:
        raise UserError("the prompt is empty; give at least one byte with --prompt")
    return prompt


class Terminal:
    """Writes bytes as text: characters appear once complete, broken UTF-8 and controls escaped."""

    def __init__(self):
        self.decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")

    def write(self, piece: bytes, final: bool = False) -> None:
        sys.stdout.write(bdh_mlx.visible(self.decoder.decode(piece, final)))
        sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    """Print the prompt and what the model makes of it. Raises UserError."""
    args = flags(argv)
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {args.max_new_tokens}; it must be at least 1")
    if args.export:
        return export.tell(args.model, args.export)
    model = bdh_mlx.load_model(args.model)
    if args.trace:
        return neurons.tell(model, args.trace)
    prompt = read_prompt(args)
    seed = args.seed if args.seed is not None else time.time_ns()
    stream = model.stream(
        mx.array([list(prompt)]), args.temperature, args.top_k, mx.random.key(seed)
    )
    terminal = Terminal()
    terminal.write(prompt)
    for token in islice(stream, args.max_new_tokens):
        terminal.write(bytes(token.tolist()))
    terminal.write(b"", final=True)
    print()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(print(f"error: {bdh_mlx.visible(str(error))}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as `head`, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
