"""The ``adpa`` command, also as ``python -m adpa``. It imports the rest while a Ctrl-C is already one line."""

import os
import signal
import sys
from threading import Timer
from typing import Any

SOON = 0.05  # seconds
ERRORS = 2  # the number of standard error, the last of the standard streams


def main() -> None:
    """The entry point."""
    _open_closed_streams()
    sys.unraisablehook = _send_again
    try:
        from adpa.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("adpa: interrupted\n")
        os._exit(130)  # threads of libraries that it caught at work abort an orderly end


def _open_closed_streams() -> None:
    """Keeps the next files that are opened from getting the numbers of closed streams, to which libraries write."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= ERRORS:
        os.set_inheritable(number, True)
    os.close(number)
    if sys.stderr is None:
        sys.stderr = os.fdopen(ERRORS, "w")


def _send_again(caught: Any) -> None:
    """Sends a signal once more if Python dropped the exception of it, as it does in a destructor or a callback."""
    if not issubclass(caught.exc_type, KeyboardInterrupt | SystemExit):
        sys.__unraisablehook__(caught)
        return
    again = Timer(SOON, os.kill, (os.getpid(), getattr(caught.exc_value, "number", signal.SIGINT)))
    again.daemon = True
    again.start()


if __name__ == "__main__":
    main()
