"""What the command lines outside train_gpt.py share: one error, one parser, one way to end.

It needs Python alone, so that data/ and most of records/logbook.py do without PyTorch.
"""

import argparse
import os
import shlex
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


def missing(package: str, requirements: str = "requirements.txt") -> UserError:
    """What to say where a package is missing: the command that installs it, as it works from here."""
    file = os.path.relpath(Path(__file__).resolve().parent / requirements)
    command = [sys.executable, "-m", "pip", "install", "-r", file]
    return UserError(f"{package} is missing: {shlex.join(command)}")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others."""

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args=None, namespace=None):
        for text in sys.argv[1:] if args is None else args:
            if text.startswith("--") and text.endswith("=--"):
                self.error(f"{text}: a value is missing")  # argparse would take it for an empty list
        return super().parse_known_args(args, namespace)


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
    """Prints a line on stderr, after the program's name."""
    line = " ".join(str(message).splitlines())  # a name of a file may hold more
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)


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


def on_interrupt(action) -> None:
    """Sets what Ctrl-C does, except where a shell has started the program in the background."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, action)


def catch_interrupts(name: str) -> None:
    """For a program's first lines, with its `__name__`: from here on Ctrl-C prints no traceback.

    The imports that follow may take seconds, and `run` comes after them.
    """
    if name == "__main__":
        on_interrupt(lambda number, _: os._exit(128 + number))


class Output:
    """stdout or stderr, whose reader may go away before the program is done.

    Programs that work for long outlive it: what they go on to print is dropped. Others end.
    """

    def __init__(self, stream, outlived: bool):
        # A character that the terminal does not have must not end a program, either.
        stream.reconfigure(errors="backslashreplace")
        self.stream = stream
        self.outlived = outlived

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self.attempt(self.stream.write, text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, function, *arguments):
        try:
            return function(*arguments)
        except OSError as error:
            # What has been printed but not written yet, and all that follows, goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if self.outlived:
                return None
            if isinstance(error, BrokenPipeError):  # `head`, say, has enough
                raise Stopped(signal.SIGPIPE) from None
            raise UserError(f"the output cannot be written: {error.strerror}") from None


def open_closed_streams() -> None:
    """Where the caller has closed stdin, stdout or stderr, they are as if it had said /dev/null.

    Else the next file that is opened takes their number, and what is printed goes into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
            setattr(sys, name, open(number, "r" if name == "stdin" else "w", closefd=False))


def run(
    main: Callable[[], int | None], *others: type[Exception], outlives_reader: bool = False
) -> None:
    """Calls `main()`, a program's whole work, and ends the process with the status it returns.

    `others` are exceptions that are a user's mistakes, too, such as train_gpt.UserError.
    `outlives_reader`: it works for long, and goes on when nobody reads any more what it prints.
    Exit status: 0 done, 1 a negative verdict, 2 a user's mistake, 128 + the number of a signal:
    130 SIGINT, 143 SIGTERM, 141 where the reader of stdout has gone away.
    """
    signal.signal(signal.SIGTERM, stop)
    on_interrupt(stop)
    open_closed_streams()
    sys.stdout = Output(sys.stdout, outlives_reader)
    sys.stderr = Output(sys.stderr, outlived=True)
    try:
        try:
            status = main()
        finally:
            sys.stdout.flush()  # now, and not at exit, so that it is seen if nobody reads
    except (UserError, OSError, *others) as error:  # an OSError names the file: no permission, say
        report(error)
        status = getattr(error, "status", 2)
    except Stopped as stopped:
        if stopped.number != signal.SIGPIPE:
            report("interrupted")
        status = 128 + stopped.number
    sys.exit(status)
