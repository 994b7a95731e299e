"""Evaluation, checkpoints, logs, reports and several processes, for train_mlx.py."""

import bdh_lib.compute  # noqa: F401  before mlx.core
