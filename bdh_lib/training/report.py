"""The report of a run: samples.md, curves.png and report.html, from its folder alone.

    python -m bdh_lib.training.report RUN      # (re)draws the three in the run's folder
    python -m bdh_lib.training.report RUN RUN  # compares runs: a table and compare.png

The trainer redraws them at each evaluation. Losses are in bits per byte.
"""

if __name__ == "__main__":
    # start.run imports this file as a module and calls its main(): Ctrl-C and errors are one line
    from bdh_lib.script import start

    start.run(__file__)

import html
import math
from contextlib import ExitStack
from pathlib import Path

from bdh_lib import files, runs
from bdh_lib.data.describe import describe
from bdh_lib.errors import UserError, escape_controls, warn
from bdh_lib.plots import INK, LINES, canvas, label, legend, panel, render
from bdh_lib.script import cli, flags
from bdh_lib.tables import format_table
from bdh_lib.training import evaluator, runlog
from bdh_lib.units import bits_per_byte

POINTS = 1000  # of a curve, at most

# ------------------------------------------------------------------------------------------- a run


def read_run(run: Path) -> tuple[dict, list[dict]]:
    """Return config.json and the lines of metrics.jsonl. Raises UserError if there are none."""
    lines = [
        _drop_mistyped(m) for m in runlog.read_log(run / "metrics.jsonl") if type(m["step"]) is int
    ]
    if not lines:
        raise UserError(_no_run(run))
    return runs.read_config(run), lines


def _no_run(run: Path) -> str:
    if not run.exists():
        return f"{run} {files.absence(run)}; name the folder of a run"
    if (log := run / "metrics.jsonl").exists() and not log.stat().st_size:
        return f"{log} is empty: the run has not been evaluated yet"
    if log.exists():
        return f"{run / 'metrics.jsonl'} is damaged: it is not a log of a run"
    names = sorted(file.parent.name for file in run.glob("*/metrics.jsonl"))
    remedy = (
        f"one or more of the runs in it: {', '.join(names)}" if names else "the folder of a run"
    )
    return f"{run} holds no metrics.jsonl; name {remedy}"


def _drop_mistyped(m: dict) -> dict:
    """Return a line of the log without values of another type than the trainer writes."""
    others = ("val_bpb_fields", "advice", "samples", "answers", "active_x", "active_y")
    numbers = {k: value for k, value in m.items() if k not in others and _is_number(value)}
    fields, advice, samples, answers, x, y = map(m.get, others)
    if isinstance(fields, dict):
        numbers["val_bpb_fields"] = {f: bits for f, bits in fields.items() if _is_number(bits)}
    if isinstance(advice, dict):
        numbers["advice"] = advice
    if isinstance(samples, list):
        numbers["samples"] = [text for text in samples if isinstance(text, str)]
    if isinstance(answers, list):
        numbers["answers"] = [a for a in answers if _is_answer(a)]
    lists = isinstance(x, list) and isinstance(y, list) and len(x) == len(y)
    return numbers | (
        {"active_x": x, "active_y": y} if lists and all(map(_is_number, x + y)) else {}
    )


def _is_answer(value) -> bool:
    """Tell whether a value is a question, its true response and an answer."""
    names = ("prompt", "truth", "answer")
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in names)


def _is_number(value) -> bool:
    """Tell whether a value is a number that can be drawn."""
    right = isinstance(value, int | float) and not isinstance(value, bool)
    return right and abs(value) < 1e300


def series(lines: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of the lines that have a number under `key`.

    They are thinned to about POINTS; the last one stays.
    """
    points = [(m["step"], m[key]) for m in lines if _is_number(m.get(key))]
    step = math.ceil(len(points) / POINTS) or 1
    thin = points[::step] + (points[-1:] if (len(points) - 1) % step else [])
    steps, values = zip(*thin, strict=True) if thin else ((), ())
    return list(steps), list(values)


def bits(lines: list[dict]) -> list[dict]:
    """Return the lines with training and monitored loss in bits per byte, too."""
    names = (("loss", "bpb"), ("monitored_loss", "monitored_bpb"))
    return [m | {b: bits_per_byte(m[a]) for a, b in names if a in m} for m in lines]


def best_evaluation(lines: list[dict]) -> dict:
    """Return the evaluation of the lowest monitored loss, that of the untrained model aside."""
    evaluated = [m for m in bits(lines) if "monitored_loss" in m and m["step"]]
    return min(evaluated, key=lambda m: m["monitored_loss"], default={})


def monitored_name(config: dict) -> str:
    """Return which bytes the monitored loss counts: "all bytes" or "response bytes"."""
    return f"{config['settings'].get('LOSS_ON', 'all')} bytes"


# ------------------------------------------------------------------------------------------ curves


def curves(config: dict, lines: list[dict]):
    """Draw the loss above; learning rate, gradient norm and speed below; a matplotlib figure."""
    figure = canvas(9, 5.4)
    grid = figure.add_gridspec(2, 3, height_ratios=[1.7, 1])
    draw_losses(figure.add_subplot(grid[0, :]), config, lines)
    below = (("lr", "learning rate"), ("grad_norm", "gradient norm"), ("bytes_per_s", "bytes/s"))
    for i, (key, title) in enumerate(below):
        axes = figure.add_subplot(grid[1, i])
        panel(axes, title)
        axes.plot(*series(lines, key), color=LINES[0], linewidth=1)
        axes.ticklabel_format(axis="y", scilimits=(-3, 5))
        axes.yaxis.get_offset_text().set(color=INK, fontsize=7)
        axes.set_ylim(bottom=0)
    return figure


def draw_losses(axes, config: dict, lines: list[dict]) -> None:
    """Draw the losses of training and of validation, whole and by field, on axes of matplotlib."""
    panel(axes, "bits per byte")
    monitored = monitored_name(config)
    in_bits = bits(lines)
    axes.plot(*series(in_bits, "bpb"), color=LINES[0], linewidth=1, alpha=0.7,
              label=f"training, {monitored}")  # fmt: skip
    steps, values = series([m for m in in_bits if m["step"]] or in_bits, "monitored_bpb")
    lowest = (
        f", best {best_evaluation(lines)['monitored_bpb']:.3f}" if best_evaluation(lines) else ""
    )
    axes.plot(steps, values, color=LINES[1], linewidth=2, marker="o", markersize=3,
              label=f"validation, {monitored}{lowest}")  # fmt: skip
    fields = sorted({f for m in lines for f in m.get("val_bpb_fields", ())})
    for color, field in zip(LINES[2:], fields, strict=False):
        of_field = [m | {field: m.get("val_bpb_fields", {}).get(field)} for m in lines if m["step"]]
        axes.plot(*series(of_field, field), "--", color=color, linewidth=1, label=label(field))
    legend(axes)


# -------------------------------------------------------------------------------------------- page

STYLE = """
:root { color-scheme: light dark; --ink: #222; --dim: #6b7280; --line: #e3e5e8; --back: #fff;
  --box: #f6f7f8 }
@media (prefers-color-scheme: dark) { :root { --ink: #d8dade; --dim: #8d949e; --line: #33373d;
  --back: #16181b; --box: #1e2125 } }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 4rem; color: var(--ink);
  background: var(--back); font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.05rem; margin: 2.5rem 0 .6rem }
p { margin: .3rem 0 } .dim { color: var(--dim) } svg { width: 100%; height: auto }
svg text { font-family: inherit !important }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem;
  margin: 1.4rem 0 }
.tiles div { background: var(--box); border-radius: .5rem; padding: .6rem .9rem }
.tiles b { display: block; font-size: 1.25rem; font-weight: 600 }
pre { background: var(--box); border-radius: .5rem; padding: .8rem 1rem; margin: .5rem 0;
  font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 500; color: var(--dim) }
td, th { border-bottom: 1px solid var(--line); padding: .25rem .8rem .25rem 0;
  overflow-wrap: anywhere }
summary { cursor: pointer; padding: .3rem 0; border-bottom: 1px solid var(--line) }
.two tr { display: inline-flex; width: 50% } .two td { flex: 1 }
.texts td { vertical-align: top; white-space: pre-wrap; width: 30% }
.texts td:first-child { color: var(--dim); white-space: normal; width: 10% }
.bar { background: #3b7dd8; height: .5rem; border-radius: .25rem; min-width: 1px }
.note { border-left: 3px solid #e07b39; padding-left: .8rem; margin: .5rem 0 }
"""


def escaped(value) -> str:
    """Return any value as safe HTML text."""
    if isinstance(value, float):
        value = f"{value:.4g}"
    if type(value) is int:
        value = f"{value:,}"
    return html.escape(escape_controls(str(value)))


def html_table(rows: list, head: tuple = (), kind: str = "") -> str:
    """Return a table of class `kind`; "" without rows."""
    if not rows:
        return ""
    cells = [f"<tr>{''.join(f'<th>{escaped(c)}</th>' for c in head)}</tr>"] if head else []
    for row in rows:
        cells.append("<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>")
    return f'<table class="{kind}">{"".join(cells)}</table>'


def tiles(config: dict, lines: list[dict]) -> str:
    """Return the key figures of a run, as HTML."""
    last = lines[-1]
    lowest = best_evaluation(lines)
    speeds = sorted(series(lines, "bytes_per_s")[1])
    facts = [
        ("iterations", last["step"]),
        (f"best bits per byte, {monitored_name(config)}",
         f"{lowest['monitored_bpb']:.3f}" if lowest else "none yet"),
        ("at iteration", lowest.get("step", "none yet")),
        ("parameters", f"{config.get('parameters', 0) / 1e6:,.1f} M"),
        ("bytes/s, median", round(speeds[len(speeds) // 2]) if speeds else "none yet"),
        ("peak memory", f"{max(series(lines, 'peak_gb')[1], default=0):,.2f} GB"),
    ]  # fmt: skip
    boxes = (
        f'<div><span class="dim">{escaped(k)}</span><b>{escaped(v)}</b></div>' for k, v in facts
    )
    return f'<div class="tiles">{"".join(boxes)}</div>'


def samples_of(lines: list[dict]) -> list[tuple[int, list[str]]]:
    """Return the step and the samples of each line of the log that has any."""
    return [(m["step"], m["samples"]) for m in lines if m.get("samples")]


def answers_of(lines: list[dict]) -> list[list[str]]:
    """Return a table of the answers to held-out records, with a column for each record.

    It has the question, the true response, and the answer at each evaluation, the newest first.
    """
    answered = [
        (m["step"], {(a["prompt"], a["truth"]): a["answer"] for a in m["answers"]})
        for m in lines
        if m.get("answers")
    ]
    questions = list(dict.fromkeys(question for _, answers in answered for question in answers))
    if not questions:
        return []
    prompts, truths = zip(*questions, strict=True)
    rows = [["asked", *prompts], ["true", *truths]]
    for step, answers in answered[::-1]:
        rows.append([f"iteration {step:,}", *(answers.get(question, "") for question in questions)])
    return rows


def activity_html(lines: list[dict]) -> str:
    """Return the share of neurons that fire per layer, and how many never did in the best model."""
    shares = [(m["active_x"], m["active_y"]) for m in lines if "active_y" in m]
    rows = ""
    if shares:
        for i, (x, y) in enumerate(zip(*shares[-1], strict=True)):
            bars = "".join(
                f'<td>{share:.1%}</td><td style="width:33%"><div class="bar" '
                f'style="width:{min(1, share):.1%}"></div></td>'
                for share in (float(x), float(y))
            )
            rows += f"<tr><td>layer {i}</td>{bars}</tr>"
        titles = ("x: excited by the byte", "y: fire, given the memory")
        head = "<tr><th>" + "".join(f'<th colspan="2">{name}' for name in titles)
        rows = f"<table>{head}{rows}</table>"
    if "dead" in (lowest := best_evaluation(lines)):
        rows += (
            f'<p class="dim">{escaped(lowest["dead"])} neurons are dead at iteration '
            f"{escaped(lowest['step'])}, the best: no validation byte "
            f"of up to {evaluator.ACTIVITY_BYTES:,} excited them in any layer.</p>"
        )
    return rows


def advice_html(lines: list[dict]) -> str:
    """Return the advice of a run, the newest first, as HTML."""
    advice = [
        f"iteration {m['step']:,}: {note}"
        for m in lines[::-1]
        for note in (m.get("advice") or {}).values()
    ]
    return "".join(f'<p class="note">{escaped(n)}</p>' for n in dict.fromkeys(advice))


def samples_html(lines: list[dict]) -> str:
    """Return the samples of each evaluation, the newest first and open, as HTML."""
    return "".join(
        f"<details {'open' if i == 0 else ''}><summary>iteration {escaped(step)}</summary>"
        + "".join(f"<pre>{escaped(sample)}</pre>" for sample in texts)
        + "</details>"
        for i, (step, texts) in enumerate(samples_of(lines)[::-1])
    )


def page(run: Path, config: dict, lines: list[dict], svg: str) -> str:
    """Return report.html: one page that needs no other file."""
    settings, about = config["settings"], config["data"]
    evaluated = [m for m in lines if m.get("val_bpb_fields")]
    fields = list(evaluated[-1]["val_bpb_fields"].items()) if evaluated else []
    parts = {
        "Curves": svg[svg.index("<svg") :] if svg else "",
        "Advice": advice_html(lines),
        "Validation by field": html_table(fields, ("field", "bits per byte")),
        "Activity": activity_html(lines),
        "Samples": samples_html(lines),
        "Answers to held-out records": html_table(answers_of(lines), kind="texts"),
        "Data": f"<pre>{escaped(describe(about))}</pre>" if about else "",
        "Settings": f'<div class="two">{html_table(list(settings.items()))}</div>',
        "Machine": html_table(list(config["versions"].items())),
    }
    body = "".join(f"<h2>{name}</h2>{part}" for name, part in parts.items() if part)
    subtitle = f"mode {settings.get('TRAINING_MODE')}, data {settings.get('DATASET')}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escaped(run.name)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<style>{STYLE}</style><h1>{escaped(run.name)}</h1><p class="dim">{escaped(subtitle)}</p>'
        f"{tiles(config, lines)}{body}</html>\n"
    )


def transcript(lines: list[dict]) -> str:
    """Return samples.md: the samples of each evaluation, the newest last, and then the answers."""
    bpb = {m["step"]: m["val_bpb"] for m in lines if "val_bpb" in m}
    parts = ["# Samples\n"]
    for step, texts in samples_of(lines):
        loss = f", validation {bpb[step]:.4f} bits per byte" if step in bpb else ""
        parts.append(f"## Iteration {step:,}{loss}\n")
        parts += map(fenced, texts)
    names, *records = zip(*answers_of(lines), strict=True) if answers_of(lines) else [()]
    for i, record in enumerate(records, 1):
        parts.append(f"## Held-out record {i}, the newest answer first\n")
        for name, content in zip(names, record, strict=True):
            parts += [f"{name.capitalize()}:\n", fenced(content)]
    return "\n".join(parts)


def fenced(text: str) -> str:
    """Return a text as a block of Markdown that it cannot leave."""
    text = escape_controls(text)
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}\n"


# ------------------------------------------------------------------------------------ what is made


def write_report(run: Path) -> None:
    """Make samples.md, curves.png and report.html of a run anew. Raises UserError."""
    config, lines = read_run(run)
    figure = curves(config, lines)
    svg = render(figure, "svg").decode()
    made = {
        "samples.md": transcript(lines).encode(errors="backslashreplace"),
        "curves.png": render(figure, "png"),
        "report.html": page(run, config, lines, svg).encode(errors="backslashreplace"),
    }
    with ExitStack() as stack:  # a viewer finds the old or the new ones
        for name, content in made.items():
            stack.enter_context(files.atomic_writer(run / name)).write_bytes(content)


def redraw_report(log: runlog.RunLog) -> None:
    """Call `write_report` for the trainer: an error is one warning, and does not end the run."""
    try:
        write_report(log.run)
    except Exception as error:
        if not log.report_failed:
            warn(f"no report in {log.run}: {' '.join(str(error).split())[:200]}")
        log.report_failed = True


COMPARED = (
    *("run", "parameters", "iterations", "million bytes"),
    *("best bits/byte", "monitored on", "bytes/s"),
)


def compare(folders: list[Path], out: Path) -> str:
    """Draw the losses of runs over the bytes trained on into `out`, and return a table of them."""
    files.check_replaceable(out, "--out")
    figure = canvas(9, 4)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, title in zip(panels, ("validation", "training"), strict=True):
        panel(axes, f"{title}, bits per byte, over millions of bytes trained on")
    rows = [COMPARED]
    for i, run in enumerate(folders):
        config, lines = read_run(run)
        mb = megabytes_per_step(config)
        for axes, key in zip(panels, ("monitored_bpb", "bpb"), strict=True):
            steps, values = series([m for m in bits(lines) if m["step"]], key)
            style = {"color": LINES[i % len(LINES)], "linestyle": ("-", "--")[i // len(LINES) % 2]}
            axes.plot([n * mb for n in steps], values, label=label(run), linewidth=1.3, **style)
        rows.append(comparison_row(run, config, lines))
    legend(panels[0])
    with files.atomic_writer(out) as staging:
        staging.write_bytes(render(figure, "png"))
    return escape_controls(f"{format_table(rows)}\npicture: {out}")


def megabytes_per_step(config: dict) -> float:
    """Return the millions of bytes that a step reads; a setting that is not known counts as 1."""
    names = ("BLOCK_SIZE", "BATCH_SIZE", "GRAD_ACCUM", "PROCESSES")
    return math.prod(config["settings"].get(name, 1) for name in names) / 1e6


def comparison_row(run: Path, config: dict, lines: list[dict]) -> tuple[str, ...]:
    """Return the cells of a run under COMPARED."""
    step = lines[-1]["step"]
    lowest = best_evaluation(lines).get("monitored_bpb", math.nan)
    speeds = sorted(series(lines, "bytes_per_s")[1]) or [0]
    return (str(run), f"{config['parameters']:,}", f"{step:,}",
            f"{step * megabytes_per_step(config):,.2f}", f"{lowest:.4f}", monitored_name(config),
            f"{speeds[len(speeds) // 2]:,.0f}")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Write the report of one run, or compare several. Returns 0. Raises UserError."""
    parser = flags.Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="run", help="folder of a run")
    parser.add_argument("--out", help="picture of a comparison (compare.png)", metavar="PNG")
    parser.add_argument("--version", action="version", version=cli.version())
    args = parser.parse_args(argv)
    folders = [files.expand_user(run, "run") for run in args.runs]
    out = files.expand_user("compare.png" if args.out is None else args.out, "--out")
    if len(folders) > 1:
        print(compare(folders, out))
    elif args.out is not None:
        raise UserError("--out is for a comparison; name several runs, or leave it out")
    else:
        write_report(run := files.absolute(folders[0]))  # "." has no name
        print(f"report: {run / 'report.html'}")
    return 0
