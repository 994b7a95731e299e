"""Faults, injected into the real trainer, and the table of what it survives.

    python tests/faults                    # every fault in full; exit code 1 if one is not survived
    python tests/faults --quick            # fewer tries of each, as `make test` runs it
    python tests/faults --only kill disk   # the faults whose name has one of these words
    python tests/faults --share 0 6        # every sixth fault from the first one on
    python tests/faults --gpu-difference   # the same 50 iterations twice: the largest difference

A try is a fork of this process, which has imported everything and computed nothing (MLX's threads
do not survive a fork; nor does Metal, so a Mac is refused), and runs train_mlx.py to its very end.
It is survived when what the user sees is right, and when the next start ends in the bits of a run
that met no fault, having lost at most one save interval, with no litter left. Each class of faults
also meets a trainer whose protection has been taken out (column `control`): there, tries must fail.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from itertools import chain
from unittest.mock import patch

from harness import DATA, FAULTS, FILES, RECORD, ROOM, WORST, reference, whole

# isort: split
import inputs  # noqa: F401  each of the three registers its faults
import mlx.core as mx
import resuming  # noqa: F401
import saving  # noqa: F401

import train_mlx
from bdh_lib.training import checkpoints


@contextmanager
def replaced(changes):
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(patch.object(*change))
        for known in (reference, whole):
            known.cache_clear()
        yield
    for known in (reference, whole):
        known.cache_clear()


def outcome(tries, n):
    """Tries, those survived, steps lost at most ("" where nothing can be), what went wrong."""
    found = list(tries(n))
    lost = [steps for _, steps in found if steps is not None]
    bad = [why for why, _ in found if why]
    return len(found), len(found) - len(bad), max(lost, default=""), bad


FIFTY = "--preset tiny --dataset sample --eval-bytes 2000 --sample-bytes 0 --lr-decay-iters 50"


def differences():
    """Print how far runs of 50 iterations differ on this device, one of them resumed."""
    runs = {"first": (50,), "again": (50,), "stopped at 25 and resumed": (25, 50)}
    arrays = {}
    for name, ends in runs.items():
        box = ROOM / name
        for last in ends:
            command = [sys.executable, train_mlx.__file__, *FIFTY.split(), "--max-iters", str(last)]
            command += ["--checkpoint-dir", str(box)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        arrays[name] = mx.load(str(box / "full/step-000050" / FILES[0]))
    print(f"{checkpoints.versions()}")
    for name in list(runs)[1:]:
        far = {k: mx.abs(a - arrays["first"][k]).max().item() for k, a in arrays[name].items()}
        print(f"{name}: largest difference of a parameter {max(far.values()):.1e}; {far}")
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer tries")
    parser.add_argument("--gpu-difference", action="store_true", help="three runs of 50 iterations")
    parser.add_argument("--only", nargs="+", default=[""], help="words of the faults to try")
    parser.add_argument("--share", nargs=2, type=int, default=(0, 1), help="every N-th from I on")
    options = parser.parse_args()
    if options.gpu_difference:
        return differences()
    if sys.platform == "darwin":
        sys.exit("error: a fork of a process that loaded Metal hangs or crashes; run this on Linux")
    DATA.write_text(
        "".join(json.dumps({k: f"{v} {i}" for k, v in RECORD.items()}) + "\n" for i in range(400))
    )
    failed = False
    print("| fault | tries | survived | lost steps at most | control: protection taken out |")
    print("|---|---|---|---|---|", flush=True)
    first, step = options.share
    for name, quick, full, controls, tries in FAULTS[first::step]:
        wanted = quick if options.quick else full
        if not wanted or not any(word in name for word in options.only):
            continue
        began = time.monotonic()
        n, survived, lost, bad = outcome(tries, wanted)
        seen = []
        for what, changes in controls.items() if n else ():
            with replaced(changes):
                found = chain(tries(wanted), tries(full))  # the few first: they lie further apart
                at = next((i for i, (why, _) in enumerate(found, 1) if why), None)
            seen.append(
                f"{what.replace('_', ' ')}: {f'fails at try {at}' if at else 'NOT SEEN TO FAIL'}"
            )
            failed |= at is None
        failed |= bool(bad) or (not n and "file system" not in name)  # that one needs to mount
        print(f"| {name} | {n} | {survived} | {lost} | {'; '.join(seen)} |", flush=True)
        print(f"{name}: {time.monotonic() - began:.1f} s", *bad[:5], sep="\n  ", file=sys.stderr)
    print(f"\n{', '.join(f'{what}: {worst}' for what, worst in WORST.items())}")
    return int(failed)


if __name__ == "__main__":
    try:
        code = main()
    finally:
        shutil.rmtree(ROOM)
    sys.exit(code)
