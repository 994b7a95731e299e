"""How a script starts and ends: streams, signals, limits, and errors as one line."""
