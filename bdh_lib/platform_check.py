"""Say what keeps MLX from this Mac before anything is installed: `make` runs this file."""

import platform
import sys


def obstacle(system: str, machine: str, macos: str) -> str:
    """Return why MLX does not run on such a machine, and what helps; nothing if it does."""
    if system != "Darwin":
        return ""
    release = tuple(map(int, macos.split(".")[:2]))
    if machine != "arm64":
        return (
            f"this Python is built for {machine} (an Intel Mac, Rosetta, an old conda), and MLX "
            "needs arm64: on Apple silicon, brew install python@3.13 and "
            "make PYTHON=/opt/homebrew/bin/python3.13; there is no MLX for Intel Macs"
        )
    if release < (14,):
        return f"macOS is {macos}, and MLX needs 14 or newer; update macOS"
    if (26,) <= release < (26, 2) or (16,) <= release < (16, 2):  # 16: to an older Python
        return f"macOS is {macos}, and MLX's package for macOS 26 needs 26.2; update macOS"
    return ""


if __name__ == "__main__":
    if reason := obstacle(platform.system(), platform.machine(), platform.mac_ver()[0]):
        sys.exit(f"error: {reason}")
