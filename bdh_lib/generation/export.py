"""`python generate.py RUN --export FOLDER`: a model for publication, with the official names.

The folder holds model.safetensors, config.json and README.md, a model card without a licence, which
the user fills in. `hf upload NAME FOLDER` puts it on the hub.
"""

import json
import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import bdh_mlx
from bdh_lib import files, runs
from bdh_lib.data.describe import count_text
from bdh_lib.data.formats import REQUIRED_FIELDS
from bdh_lib.errors import UserError, escape_controls
from bdh_lib.script.flags import flag_of
from bdh_lib.units import bits_per_byte
from bdh_mlx import BDHConfig

CARD = """---
license: other  # fill in: the licence you give, which that of the data must allow
library_name: mlx
tags: [bdh, byte-level]
---

# {name}

A BDH ("Baby Dragon Hatchling", [arXiv 2509.26507](https://arxiv.org/abs/2509.26507)), a byte-level
language model of {parameters:,} parameters, trained with BDH-MLX.

| | |
|---|---|
{facts}

```
{command}
```

With BDH-MLX: `python generate.py model.safetensors{mode} --prompt "..."`. The official PyTorch code
(pathwaycom/bdh) takes the weights as they are, but for `attn.freqs`, which it computes itself:

```python
import torch, bdh
from safetensors.torch import load_file

config = bdh.BDHConfig(**{config})
model = bdh.BDH(config)
model.load_state_dict(load_file("model.safetensors"), strict=False)
```
"""
CELL = {ord("|"): r"\|", ord("\n"): " ", ord("<"): "&lt;"}  # text in a table


def official_config(config: BDHConfig) -> dict:
    """Return the fields of the official configuration, which lacks dropout_v."""
    return {name: value for name, value in asdict(config).items() if name != "dropout_v"}


LOCAL = ("CHECKPOINT_DIR", "RUN_NAME", "IGNORE_MEMORY_CHECK", "PROCESSES", "PHASES")


def without_folders(name: str) -> str:
    """Return the last part of an absolute path, which names local folders; other names whole."""
    return Path(name).name if name.startswith(("/", "~")) else name


def training_command(settings: dict) -> str:
    """Return the command with the settings of the run, but for those that are LOCAL."""
    words = ["python", "train_mlx.py"]
    for name, value in settings.items():
        flag = flag_of(name)
        if isinstance(value, bool) and name not in LOCAL:
            words.append(flag if value else f"--no-{flag[2:]}")
        elif name not in LOCAL:
            is_path = name in ("DATASET", "INIT_FROM") and value
            shown = without_folders(str(value)) if is_path else value
            words += [flag, "none" if shown is None else str(shown)]
    return escape_controls(shlex.join(words))


def facts(checkpoint: Path) -> tuple[dict, dict]:
    """Return rows of the card's table, and settings, of a checkpoint; empty for a bare file."""
    about = {}
    with suppress(UserError):
        about = files.read_json_object(checkpoint / "config.json")
    if not runs.is_checkpoint_config(about):
        return {}, {}
    settings = runs.valid_settings(about["settings"])
    train = about["data"]["train"]
    if not settings.keys() >= {"DATASET", "TRAINING_MODE", "LOSS_ON"}:
        return {}, {}
    rows = {
        "data": without_folders(settings["DATASET"]),
        "mode": settings["TRAINING_MODE"],
        "iterations": f"{about['step']:,}",
        "training data": f"{count_text(train['records'])}{train['bytes']:,} bytes",
    }
    with suppress(UserError):
        best = runs.read_best(checkpoint.parent)
        if best.get("step") == about["step"] and math.isfinite(best["monitored_loss"]):
            bits = bits_per_byte(best["monitored_loss"])
            rows["validation"] = f"{bits:.4f} bits per byte, of {settings['LOSS_ON']} bytes"
    own = about["own"] if isinstance(about.get("own"), list) else []  # others lack these flags
    return rows, {name: value for name, value in settings.items() if name not in own}


@contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """Make a folder; on an error, remove it and its new files. Raises UserError."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    existing = set(folder.iterdir()) if folder.is_dir() else set()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        with suppress(OSError):
            for path in set(folder.iterdir()) - existing:
                path.unlink()
        for path in new:
            with suppress(OSError):  # it does not exist yet
                path.rmdir()
        if isinstance(error, OSError) and not isinstance(error, UserError):
            reason = files.write_fault(error)
            raise UserError(f"--export {folder} cannot be written: {reason}") from None
        raise


def model_card(config: BDHConfig, checkpoint: Path, name: str) -> str:
    """Return the card of a model called `name`, from what is in the checkpoint's folder."""
    card_facts, settings = facts(checkpoint)
    card_facts["shape"] = ", ".join(f"{k} {v}" for k, v in asdict(config).items())
    rows = (f"| {k} | {escape_controls(str(v)).translate(CELL)} |" for k, v in card_facts.items())
    return CARD.format(
        name=escape_controls(name),
        parameters=config.n_parameters,
        facts="\n".join(rows),
        command=training_command(settings) if settings else "unknown: exported from weights alone",
        config=official_config(config),
        mode=f" --mode {card_facts['mode']}" if card_facts.get("mode") in REQUIRED_FIELDS else "",
    )


def export_model(source: str, folder: Path) -> int:
    """Export the model at `source` to `folder`; return the exit code, 0. Raises UserError."""
    weights = runs.find_weights(source)
    model = bdh_mlx.load_model(weights)
    name = files.absolute(folder).name
    card = model_card(model.config, weights.parent, name)
    with _new_folder(folder):
        if any(folder.iterdir()):
            raise UserError(f"--export {folder} is not empty; name a new folder")
        bdh_mlx.save_model(model, folder / "model.safetensors")
        config = json.dumps(official_config(model.config), indent=1)
        for file, text in (("config.json", config), ("README.md", card)):
            with files.atomic_writer(folder / file) as temporary:
                temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    print(f"written: {folder}; fill in the licence in {folder / 'README.md'}, then, to share it:")
    print(f"  hf upload YOUR_NAME/{shlex.join([name, str(folder)])}")
    return 0
