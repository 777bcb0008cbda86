"""What the command lines outside train_gpt.py share: one error, one parser, one way to end.

It needs Python alone, so that data/ and most of records/logbook.py do without PyTorch.
"""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path


class UserError(Exception):
    """Something the user can put right: one line says what is wrong and what to do.

    It ends the program with an exit status.
    """

    def __init__(self, text: str, status: int = 2):
        super().__init__(text)
        self.status = status


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others."""

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def between(low: int, high: int) -> Callable[[str], int]:
    """An argparse `type`: a whole number from `low` to `high`."""

    def parse(text):
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not low <= number <= high:
            expected = f"expected a whole number from {low:,} to {high:,}, found {text}"
            raise argparse.ArgumentTypeError(expected)
        return number

    return parse


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its type where it has none.

    Libraries write whole paragraphs.
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def report(message: object) -> None:
    """Prints a line on stderr, after the program's name, if there is still somebody to read it."""
    with contextlib.suppress(OSError):
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)


class Stopped(KeyboardInterrupt):
    """A signal came. As an exception, it lets every `with` and `finally` clean up."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def stop(number: int, _frame) -> None:
    """What a signal does that ends a program."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the clean-up
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second SIGTERM may
    raise Stopped(number)


def run(main: Callable[[], int | None], *others: type[Exception]) -> None:
    """Calls `main()`, a program's whole work, and ends the process with the status it returns.

    `others` are exceptions that are a user's mistakes, too, such as train_gpt.UserError.
    Exit status: 0 done, 1 a negative verdict, 2 a user's mistake, 128 + the number of a signal:
    130 SIGINT, 143 SIGTERM, 141 where the reader of stdout has gone away.
    """
    signal.signal(signal.SIGTERM, stop)
    # A shell starts what it puts in the background with SIGINT ignored.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, stop)
    try:
        try:
            status = main()
        finally:
            print(end="", flush=True)  # now, and not at exit, so that it is seen if nobody reads
    except BrokenPipeError:
        # `head`, say, has enough. What is left to write goes nowhere, at exit, too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except (UserError, OSError, *others) as error:  # an OSError names the file: no permission, say
        report(error)
        status = getattr(error, "status", 2)
    except Stopped as stopped:
        report("interrupted")
        status = 128 + stopped.number
    sys.exit(status)
