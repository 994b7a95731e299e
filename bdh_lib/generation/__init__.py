"""Sampling, decoding, sessions, traces and export."""

import bdh_lib.compute  # noqa: F401  before mlx.core
