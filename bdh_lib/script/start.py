"""Start a script: Ctrl-C ends it without a traceback from here on."""

# The C module: `signal` itself imports enum, which takes longer than all else before cli.run.
import _signal


def quiet_interrupts() -> None:
    """Let Ctrl-C end the process without a traceback, unless it is ignored, as by nohup."""
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)


def run(file: str) -> None:
    """Run the script `file` by cli.run, and let Ctrl-C end the import of cli without a traceback.

    This module imports nothing else, since Ctrl-C before this call is a traceback.
    """
    quiet_interrupts()
    from bdh_lib.script import cli

    cli.run(file)
