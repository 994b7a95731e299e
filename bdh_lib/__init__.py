"""Library behind train_mlx.py and generate.py. Imports go one way (tests/test_imports.py)."""
