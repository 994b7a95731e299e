"""Start a script: Ctrl-C ends it without a traceback from here on."""

# The C module: `signal` itself imports enum, which takes longer than all else before cli.run.
import _signal


def run(file: str) -> None:
    """Run the script `file` by cli.run, and let Ctrl-C end the import of cli without a traceback.

    This module imports nothing else, since Ctrl-C before this call is a traceback.
    """
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:  # not ignored: nohup's
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    from bdh_lib import cli

    cli.run(file)
