"""Sampling, decoding, jobs of many prompts, sessions, traces and export."""

import bdh_lib.compute  # noqa: F401  before mlx.core
