"""--trace shows what the model computes: its numbers are those of the model itself."""

import errno
import json
from importlib import import_module
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import random_model

import bdh_mlx
import generate
from bdh_lib.compute.rope import rotate
from bdh_lib.generation import trace
from bdh_mlx import UserError

TEXT = b"The king moves\n\xff\x00"


def test_the_layers_traced_are_those_of_the_model():
    model = random_model()
    *_, last = trace.layers(model, TEXT)
    v = (last.y @ model.decoder.reshape(2, 64, 16)).sum(0)
    logits = trace.ln(last.v + trace.ln(v)) @ model.lm_head
    expected = model(mx.array([list(TEXT)]))[0][0]
    assert mx.max(mx.abs(logits - expected)).item() < 1e-4 * mx.max(mx.abs(expected)).item()


def test_synapses_are_what_the_last_byte_reads():
    """The shares of pairs of neurons in the gate of a neuron that fired add up to the gate."""
    model = random_model()
    layer = list(trace.layers(model, TEXT))[1]
    found = trace.synapses(model, layer)["read"]
    a = bdh_mlx.attention_quadratic(layer.q, layer.v)
    gate = trace.ln(a) @ model.encoder_v  # (H, T, N)
    h, j = found[0]["head"], found[0]["to"]
    assert layer.y[h, -1, j].item() > 0
    q = layer.q[h, -1]
    S = layer.q[h, :-1].T @ layer.v[:-1]
    part = (q[:, None] * S) @ model.encoder_v[h][:, j] / mx.sqrt(mx.var(a[h, -1]) + 1e-5)
    assert part.sum().item() == pytest.approx(gate[h, -1, j].item(), rel=1e-4)
    i = found[0]["from"]
    assert part[i[0]].item() + part[i[1]].item() == pytest.approx(found[0]["strength"], rel=1e-4)
    largest = max(part.reshape(-1, 2).sum(1).tolist())
    assert found[0]["strength"] >= largest - 1e-4 * abs(largest)


def test_strength_written_does_not_turn_with_the_position_of_the_reader():
    model = random_model()
    layer = next(trace.layers(model, TEXT))
    strongest = trace.synapses(model, layer)["written"][0]
    h, pair, j = strongest["head"], strongest["from"], strongest["to"]
    for turned in (0, 5, 100):
        q = rotate(layer.x[:, None], turned)[:, 0]
        ends = ((q[h].T @ layer.v) @ model.encoder_v[h])[np.array(pair).tolist(), j]
        assert mx.linalg.norm(ends).item() == pytest.approx(strongest["strength"], rel=1e-3)


def test_selective_neurons_fire_here_and_not_elsewhere():
    model = random_model()
    one, two = trace.selective_neurons(model, [b"aaaa aaaa", b"zzzz9zzzz"])
    assert one[0]["here"] > one[0]["elsewhere"] and two[0]["here"] > two[0]["elsewhere"]
    gaps = [n["here"] - n["elsewhere"] for n in one]
    assert gaps == sorted(gaps, reverse=True)


def test_trace_from_the_command_line(tmp_path, monkeypatch, capsys):
    bdh_mlx.save_model(random_model(), tmp_path / "model.safetensors")
    (tmp_path / "texts.txt").write_text("cost $5 <b>\nsecond line\n")
    monkeypatch.chdir(tmp_path)
    assert generate.main(["model.safetensors", "--trace", "@texts.txt", "--trace", "third"]) == 0
    output = json.loads((tmp_path / "trace.json").read_text())
    assert output["text"] == "cost $5 <b>" and len(output["texts"]) == len(output["selective"]) == 3
    assert len(output["layers"]) == 2 and len(output["layers"][0]["fires"]) == len(output["text"])
    assert output["layers"][0]["fires"][0] == []  # the first byte has nothing to read
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")
    captured = capsys.readouterr()
    assert "strongest synapses read" in captured.out and "longer" not in captured.err
    (tmp_path / "texts.txt").write_text("\n")
    with pytest.raises(UserError, match="no text"):
        generate.main(["model.safetensors", "--trace", "@texts.txt"])
    assert generate.main(["model.safetensors", "--trace", "again"]) == 0  # its own are made anew
    assert json.loads((tmp_path / "trace.json").read_text())["text"] == "again"
    generate.main(["model.safetensors", "--trace", "a" * (trace.LONGEST + 1)])
    assert f"1 of 1 texts are cut to {trace.LONGEST} bytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "made"),
    [
        ("other", "other"),
        ("o.png", "o"),
        ("o.json", "o"),
        ("v1.2", "v1.2"),
        ("folder", "folder/trace"),
        ("~/home", "home"),
    ],
)
def test_out_names_the_files_of_a_trace(out, made, tmp_path, monkeypatch):
    bdh_mlx.save_model(random_model(), tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    import_module("matplotlib.font_manager")  # its first import writes a cache into HOME
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "folder").mkdir()
    assert generate.main(["model.safetensors", "--trace", "text", "--out", out]) == 0
    found = {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()}
    assert found == {"model.safetensors", f"{made}.png", f"{made}.json"}


@pytest.mark.parametrize("name", ["trace.png", "trace.json"])
@pytest.mark.parametrize("content", [b"mine", b'{"text": 1}', b"\x89PNG of another", b"# BDH-MLX"])
def test_a_trace_replaces_no_file_of_the_users(name, content, tmp_path, monkeypatch):
    bdh_mlx.save_model(random_model(), tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} was not written by BDH-MLX; .* --out"):
        generate.main(["model.safetensors", "--trace", "text"])
    assert (tmp_path / name).read_bytes() == content and len([*tmp_path.iterdir()]) == 2


def test_a_trace_that_cannot_be_written_leaves_nothing_and_names_the_file(tmp_path, monkeypatch):
    bdh_mlx.save_model(random_model(), tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)

    def full(self, _):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"^trace.json cannot be written: No space left"):
        generate.main(["model.safetensors", "--trace", "text"])
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(UserError, match=r"--out none/x\.png: none is not a folder that can be"):
        generate.main(["model.safetensors", "--trace", "text", "--out", "none/x"])
