"""``python -m adpa`` is the ``adpa`` command."""

from adpa.cli import main

if __name__ == "__main__":
    main()
