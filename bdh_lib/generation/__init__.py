"""What a trained model is used for."""

import bdh_lib.compute  # noqa: F401  before mlx.core
