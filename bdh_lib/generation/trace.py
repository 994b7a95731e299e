"""Trace a BDH: which neurons fire on a byte, which synapses it writes and reads.

    python generate.py checkpoints_mlx/full --trace "The king moves"   # trace.png and trace.json
    python generate.py checkpoints_mlx/full --trace "chess" --trace "bread"  # how they differ

A byte excites the neurons x = relu(v Dx) of a layer. Those that agree with the memory a = q S fire:
y = x * relu(ln(a) Dy) (equations: bdh_mlx.py). S, the sum of q_s^T v_s over earlier bytes, is
neurons by n_embd; Dy maps its columns to neurons. So a synapse here is an entry of S Dy, from a
neuron excited earlier to a neuron that it makes fire. The rotation mixes the two neurons of a pair,
so a synapse starts at a pair. Its strength is the norm of the pair's two entries, the most that a
later byte can read. `read` is what the last byte read: the pair's part of the sum ln(a) Dy of a
neuron that fired. Each v has mean 0, so ln subtracts no mean here and only divides.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

import bdh_mlx
from bdh_lib.compute.layer import forward_segment, ln
from bdh_lib.errors import UserError, escape_controls, warn
from bdh_lib.files import MADE_BY, atomic_writer, check_replaceable, expand_user, read_input
from bdh_lib.generation.decoding import decode_text, parse_escapes

LONGEST = 512  # bytes traced of a text; all their neurons are in memory
TOP = 10  # neurons and synapses listed


class LayerTrace(NamedTuple):
    """What one layer computed of T bytes: x, y (H, T, N); q rotated x; v (T, D)."""

    x: mx.array
    y: mx.array
    q: mx.array
    v: mx.array


def layers(model: bdh_mlx.BDH, text: bytes) -> Iterator[LayerTrace]:
    """Yield the LayerTrace of each layer for a text."""
    v = ln(model.embed(mx.array([list(text)])))
    for _ in range(model.config.n_layer):
        out, _, neurons = forward_segment(v, None, model.weights(), 0, len(text))
        yield LayerTrace(neurons.x, neurons.y, neurons.q, v[0])
        v = out


# ---------------------------------------------------------------------------------------- one text


def top_entries(values: mx.array, count: int = TOP) -> list[tuple[list[int], float]]:
    """Return index and value of the largest positive entries, largest first."""
    flat = values.reshape(-1)
    count = min(count, flat.size)
    places = np.array(mx.argpartition(-flat, count - 1)[:count])
    largest = np.array(flat[mx.array(places)])
    order = np.argsort(-largest)
    shaped = np.stack(np.unravel_index(places[order], values.shape), -1).tolist()
    return [(p, f) for p, f in zip(shaped, largest[order].tolist(), strict=True) if f > 0]


def synapses(model: bdh_mlx.BDH, layer: LayerTrace) -> dict[str, list[dict]]:
    """Find the strongest synapses after the last byte, and the synapses that it read most."""
    written, read = [], []
    for h in range(model.config.n_head):  # a head at a time: neurons by neurons is large
        S = layer.q[h, :-1].T @ layer.v[:-1]
        previous = S @ model.encoder_v[h]  # (N, N)
        last = layer.q[h, -1:].T @ layer.v[-1:] @ model.encoder_v[h]
        pairs = mx.linalg.norm((previous + last).reshape(-1, 2, last.shape[1]), axis=1)
        written += [(h, place, value) for place, value in top_entries(pairs)]
        scale = mx.rsqrt(mx.var(layer.q[h, -1] @ S) + 1e-5)  # of ln
        parts = (layer.q[h, -1][:, None] * previous).reshape(-1, 2, last.shape[1]).sum(1) * scale
        parts = mx.where(layer.y[h, -1] > 0, parts, 0)
        read += [(h, place, value) for place, value in top_entries(parts)]
    strongest = {}
    for name, entries in (("written", written), ("read", read)):
        strongest[name] = [
            {"head": h, "from": [2 * i, 2 * i + 1], "to": j, "strength": value}
            for h, (i, j), value in sorted(entries, key=lambda entry: -entry[2])[:TOP]
        ]
    return strongest


def trace(model: bdh_mlx.BDH, text: bytes) -> tuple[dict, np.ndarray, np.ndarray]:
    """Summarize a text for JSON; return also two arrays.

    They are the share of neurons that fire (L, T), and y summed over the layers (T, H*N). A head
    and an index identify a neuron, since the layers share their neurons.
    """
    summaries, shares = [], []
    summed = 0
    for layer in layers(model, text):
        fires = mx.mean(layer.y > 0, (0, 2))
        shares.append(np.array(fires))
        y = layer.y.swapaxes(0, 1)  # (T, H, N)
        summed = summed + y.reshape(len(text), -1)
        summaries.append(
            {
                "share_x": mx.mean(layer.x > 0).item(),
                "share_y": mx.mean(layer.y > 0).item(),
                "fires": [
                    [{"head": h, "neuron": n, "y": value} for (h, n), value in top_entries(row)]
                    for row in y
                ],
                "synapses": synapses(model, layer),
            }
        )
    return (
        {"text": escape_controls(decode_text(text)), "layers": summaries},
        np.array(shares),
        np.array(summed),
    )


# ----------------------------------------------------------------------------------- several texts


def selective_neurons(model: bdh_mlx.BDH, texts: list[bytes]) -> list[list[dict]]:
    """Find for each text the neurons that fire more on it than on the others.

    Their firing rates are per byte and layer: on it (`here`), and on the other text where they
    fire most (`elsewhere`).
    """
    rates = []
    for text in texts:
        layer_rates = [mx.mean(layer.y > 0, 1) for layer in layers(model, text)]
        rates.append(np.array(sum(layer_rates) / len(layer_rates)))  # (H, N)
    selected = []
    for i, rate in enumerate(rates):
        other = np.max([r for j, r in enumerate(rates) if j != i], 0)
        best = top_entries(mx.array(rate - other))
        selected.append(
            [
                {"head": h, "neuron": n, "here": float(rate[h, n]), "elsewhere": float(other[h, n])}
                for (h, n), _ in best
            ]
        )
    return selected


# -------------------------------------------------------------------------------------- the output


def picture(text: bytes, shares: np.ndarray, summed: np.ndarray, N: int):
    """Draw the share of neurons that fire by byte and layer; below it, the top 40 neurons."""
    from bdh_lib.plots import INK, canvas, panel  # late: it takes a second

    neurons = np.argsort(-summed.sum(0))[:40]
    figure = canvas(max(7, min(24, 0.16 * len(text))), 8)
    above, below = figure.subplots(2, 1, height_ratios=[1, 3.2], sharex=True)
    panel(above, "share of neurons that fire (y > 0), by layer")
    bar = figure.colorbar(above.imshow(shares * 100, aspect="auto", cmap="Blues"), ax=above)
    bar.set_label("%", color=INK)
    panel(below, "the neurons that fire most: y over the layers, by head.neuron")
    activations = summed[:, neurons].T
    bar = figure.colorbar(below.imshow(activations, aspect="auto", cmap="Oranges"), ax=below)
    for axes in figure.axes:
        axes.grid(False)
        axes.tick_params(colors=INK, labelsize=7)
    above.set_yticks(range(len(shares)))
    below.set_yticks(range(len(neurons)), [f"{n // N}.{n % N}" for n in neurons.tolist()])
    if len(text) <= 160:
        letters = [chr(b) if 32 <= b < 127 else f"{b:02x}" for b in text]
        below.set_xticks(range(len(text)), [s.replace("$", r"\$") for s in letters], fontsize=7)
    return figure


def output_paths(out: Path | None) -> tuple[Path, Path]:
    """Return the paths of the picture and the JSON file.

    They are trace.png and trace.json in the folder `out`, or `out` with these suffixes. Raises
    UserError if that would replace another file.
    """
    stem = out or Path()
    if stem.is_dir():
        stem = stem / "trace"
    stem = stem.with_suffix("") if stem.suffix in (".png", ".json") else stem
    paths = [stem.with_name(stem.name + suffix) for suffix in (".png", ".json")]
    for path in paths:
        check_replaceable(path, "--out")
    return tuple(paths)


def trace_texts(model: bdh_mlx.BDH, texts: list[str], out: Path | None = None) -> int:
    """Write a picture and a JSON file of the first text; for several texts, also their selective
    neurons. A text @FILE stands for the lines of a file.

    Returns the exit code, 0. Raises UserError if there is no text, a file cannot be read, or
    `out` cannot be written or would replace another file.
    """
    drawing, listing = output_paths(out)
    traced = [line for text in texts for line in _lines(text)]
    if not traced:
        raise UserError("--trace has no text; give at least one byte")
    if cut := sum(len(text) > LONGEST for text in traced):
        warn(f"{cut:,} of {len(traced):,} texts are cut to {LONGEST} bytes")
    traced = [text[:LONGEST] for text in traced]
    summary, shares, summed = trace(model, traced[0])
    if len(traced) > 1:
        summary["texts"] = [escape_controls(decode_text(text)) for text in traced]
        summary["selective"] = selective_neurons(model, traced)
    print_summary(summary)
    from bdh_lib.plots import render

    figure = render(picture(traced[0], shares, summed, model.config.neurons_per_head), "png")
    with atomic_writer(drawing) as png, atomic_writer(listing) as text:
        png.write_bytes(figure)
        text.write_text(json.dumps({"made_by": MADE_BY} | summary))
    print(f"written: {drawing}, {listing}")
    return 0


def print_summary(summary: dict) -> None:
    """Print how many neurons each layer used, its synapses, and the selective neurons, if any."""
    for i, layer in enumerate(summary["layers"]):
        print(f"layer {i}: x {layer['share_x']:.1%}, y {layer['share_y']:.1%} of neurons active")
        for name, entries in layer["synapses"].items():
            ends = (f"{s['head']}.{s['from'][0]}+1 -> {s['head']}.{s['to']}" for s in entries[:3])
            print(f"  strongest synapses {name}: {', '.join(ends) or 'none'}")
    for text, entries in zip(summary.get("texts", ()), summary.get("selective", ()), strict=True):
        names = (f"{n['head']}.{n['neuron']} ({n['here']:.0%})" for n in entries[:5])
        print(f"only on {text[:40]!r}: {', '.join(names) or 'none'}")


def _lines(text: str) -> list[bytes]:
    if text.startswith("@"):
        content = read_input(expand_user(text[1:], "--trace @FILE"), "--trace @FILE")
        return [line for line in content.splitlines() if line]
    return [parse_escapes(text)] if text else []
