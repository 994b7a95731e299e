"""What surrounds the loop of train_mlx.py."""

import bdh_lib.compute  # noqa: F401  before mlx.core
