"""What a command and its terminal do to each other: closed pipes, odd characters, Ctrl-C.

Import this module before torch: then Ctrl-C ends the command without a traceback, also while torch
is still loading.
"""
import io
import os
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

OUTPUT_CLOSED = 1                                    # the reader of standard output has gone
OUTPUT_FAILED = 2                                    # as for any file that cannot be written
INTERRUPTED = 130                                    # stopped by a signal


def exit_quietly_on_ctrl_c(kind: type, error: BaseException, traceback):
    """Exit with INTERRUPTED for a Ctrl-C, and print any other error as Python does."""
    if issubclass(kind, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    sys.__excepthook__(kind, error, traceback)


sys.excepthook = exit_quietly_on_ctrl_c


class Outlet(io.RawIOBase):
    """A raw output that writes to another one, and drops everything after its first failure.

    program: named in the message when standard output fails.  stops: whether the failure is raised
    (once), so that the command ends; if not, the command goes on without this output.
    """

    def __init__(self, raw: io.RawIOBase | None, program: str, stops: bool):
        self.raw = raw
        self.program = program
        self.stops = stops

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self.raw is not None and self.raw.isatty()

    def fileno(self) -> int:
        return self.raw.fileno() if self.raw else super().fileno()

    def write(self, data) -> int | None:
        if self.raw is None:
            return len(data)
        try:
            n_bytes = self.raw.write(data)
            while n_bytes is None:                   # Another program has made it non-blocking.
                select.select([], [self.raw], [])
                n_bytes = self.raw.write(data)
            return n_bytes
        except OSError as error:
            is_standard_output = self.raw.fileno() == 1
            self.raw = None                          # Python flushes at exit, and must not fail.
            if self.stops and isinstance(error, BrokenPipeError):
                raise
            if self.stops:
                raise OSError(f"standard output cannot be written: {error.strerror}") from error
            if is_standard_output:
                write_error(f"{self.program}: standard output cannot be written any more "
                            f"({error.strerror}); the run goes on without printing\n")
            return len(data)


def write_error(text: str):
    """Write to standard error at once, also from a signal handler; do nothing if it is closed."""
    with suppress(OSError):
        os.write(2, text.encode())


def through_outlet(stream: io.TextIOWrapper | None, program: str, stops: bool):
    """Return a text stream like this one that shows every character and survives its reader.

    A character that the encoding lacks is written as its escape, such as \\u20ac.  None, which
    Python has for a closed stream, becomes a stream that drops everything.
    """
    if stream is None:
        return io.TextIOWrapper(Outlet(None, program, stops), encoding="utf-8")
    raw = getattr(stream.buffer, "raw", stream.buffer)           # python -u has no buffer.
    return io.TextIOWrapper(io.BufferedWriter(Outlet(raw, program, stops)),
                            encoding=stream.encoding, errors="backslashreplace",
                            line_buffering=stream.line_buffering or stream.write_through)


def reserve_standard_files():
    """Open /dev/null for standard files that are closed: a file of the run would get their number.

    Then what C code or a signal handler writes to standard error would land in that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)           # This takes the lowest free number.


def run_command(main: Callable, program: str, interrupted: str = "interrupted",
                outlives_output: bool = False):
    """Run a command's main(); whatever happens to its terminal, it ends without a traceback.

    interrupted: what Ctrl-C prints.  outlives_output: whether the command goes on when nobody reads
    its standard output any more, as a training run must.  Otherwise it ends: with OUTPUT_CLOSED and
    no message if a pipe was closed (`| head`), or in one line if, say, the disk is full.
    """
    reserve_standard_files()
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")
    sys.stdout = through_outlet(sys.stdout, program, not outlives_output)
    sys.stderr = through_outlet(sys.stderr, program, False)
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(f"{program}: {interrupted}", file=sys.stderr)
        # Another Ctrl-C ends the process at once, without a traceback from Python's own exit.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.exit(OUTPUT_CLOSED)
    except OSError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(OUTPUT_FAILED)
