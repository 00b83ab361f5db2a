"""The ``adpa`` command, also as ``python -m adpa``. It imports the rest while a Ctrl-C is already one line."""

import os
import sys


def main() -> None:
    """The entry point."""
    try:
        from adpa.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("adpa: interrupted\n")
        os._exit(130)  # threads of libraries that it caught at work abort an orderly end


if __name__ == "__main__":
    main()
