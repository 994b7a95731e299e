"""What train_mlx.py needs beside the loop: data, step, evaluation, checkpoints, log and report.

docs/hacking.md has the modules in the order in which a run uses them.
"""

import sys

from bdh_lib.script import start

if sys.argv[0] == "-m":  # python -m imports this package before the module that calls start.run
    start.quiet_interrupts()

import bdh_lib.compute  # noqa: F401  before mlx.core
