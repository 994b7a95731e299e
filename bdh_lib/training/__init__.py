"""Evaluation, checkpoints, logs, reports and several processes, for train_mlx.py."""

import sys

from bdh_lib.script import start

if sys.argv[0] == "-m":  # python -m imports this package before the module that calls start.run
    start.quiet_interrupts()

import bdh_lib.compute  # noqa: F401  before mlx.core
