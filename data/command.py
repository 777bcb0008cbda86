"""What the scripts of this folder share: one type for a user's mistakes, one way to parse options, one way to end."""

import argparse
import signal
import sys
from pathlib import Path


class DataError(ValueError):
    """Something the user can put right; the message says what is wrong and what to do."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others."""

    def error(self, message):
        raise DataError(f"{message} (see --help)")


def between(low, high):
    """An argparse `type`: a whole number from `low` to `high`."""

    def parse(text):
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not low <= number <= high:
            raise argparse.ArgumentTypeError(f"expected a whole number from {low:,} to {high:,}, found {text}")
        return number

    return parse


def first_line(error):
    """The first line of an exception's message, or its type where it has none: libraries write whole paragraphs."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM came. As an exception, either lets every `with` and `finally` clean up."""


def stop(number, _frame):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the cleaning up
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second SIGTERM may
    raise Stopped(number)


def run(main):
    """Call `main()`, a script's whole work. Exit status: 0 done, 2 a user's mistake, 130 SIGINT, 143 SIGTERM."""
    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell starts background jobs with SIGINT ignored
        signal.signal(signal.SIGINT, stop)
    name = Path(sys.argv[0]).name
    try:
        main()
    except (DataError, OSError) as error:  # OSError: no permission, disk full; its message names the file
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(128 + stopped.args[0])
