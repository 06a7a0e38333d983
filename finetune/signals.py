"""Stop signals: finish and save the current step, and never hang on another rank."""
import os
import signal
import threading
import time
from contextlib import contextmanager

from .console import write_error
from .errors import BAD_INPUT, exit_with_line
from .resume import what_is_left
from .watchdog import BETWEEN

# A rank waits so long for the others after a stop signal; torchrun sends SIGKILL after 30 s.
GRACE_SECONDS = 20


class StopRequest:
    """The handler of the stop signals, which notes when the first one came."""

    def __init__(self, ranks):
        self.ranks = ranks
        self.received_at = None

    def handle(self, number, frame):
        """Note the signal.  In a single-process run a second Ctrl-C exits at once.

        Some shells send one Ctrl-C twice; a repeat within one second is ignored.
        """
        now = time.monotonic()
        if self.received_at is None:
            self.received_at = now
            # torchrun sends the signal to all ranks also when one has died, and then no step ends.
            if self.ranks.size == 1:
                # Not by print: the signal may have interrupted one.
                write_error("train.py: told to stop: finishing and saving this step first\n")
        elif number == signal.SIGINT and self.ranks.size == 1 and now - self.received_at > 1:
            raise KeyboardInterrupt


@contextmanager
def stop_after_step_on_signals(run):
    """In the block, let SIGTERM, SIGINT and SIGHUP end the run after the current step.

    A file that cannot be written ends the run in one line and exit code 2; a rank that is gone, in
    one line and exit code 1.
    """
    handlers = {}
    for number in stop_signals():
        handlers[number] = signal.signal(number, run.stop_request.handle)
    has_ended = threading.Event()
    if run.ranks.size > 1:
        start_exit_timer_on_signal(run.ranks.watchdog, has_ended)
    try:
        yield
    except OSError as error:
        message = " ".join(str(error).split())
        exit_with_line(f"train.py: {message}; {what_is_left(run.out)}", BAD_INPUT)
    except RuntimeError as error:                    # of a collective, if another rank is gone
        run.ranks.watchdog.leave_if_a_rank_is_dead(error)
        raise
    finally:
        has_ended.set()
        if run.ranks.is_first:
            run.metrics.close()
        signal.set_wakeup_fd(-1)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def stop_signals() -> list:
    """Return the signals that end a run.

    SIGHUP says that the terminal or the SSH session has ended.  It is left out where it was ignored
    at the start, as nohup does, and on Windows, which lacks it.
    """
    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


def start_exit_timer_on_signal(watchdog, has_ended: threading.Event):
    """Start a thread that exits the process if a step does not end GRACE_SECONDS after a signal.

    A save may take longer.  If another rank is gone, NCCL blocks the main thread and no handler
    runs there.  The signal's number still arrives in this pipe.
    """
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    signal.set_wakeup_fd(write_fd)

    def wait():
        os.read(read_fd, 1)
        leave_if_a_step_hangs(watchdog, has_ended)

    threading.Thread(target=wait, daemon=True).start()


def leave_if_a_step_hangs(watchdog, has_ended: threading.Event):
    """Leave if a step runs for GRACE_SECONDS from now on, or another rank is dead by then.

    Return when the run has ended.
    """
    seconds = 0                                      # from now on
    in_step = 0                                      # of these, in the step that runs
    step = None                                      # that runs; None: it evaluates or saves
    while not has_ended.wait(1):
        before = step
        step = None if watchdog.now.state == BETWEEN else watchdog.now.step
        seconds += 1
        in_step = in_step + 1 if step is not None and step == before else 0
        is_dead = seconds >= GRACE_SECONDS and watchdog.silent_ranks(GRACE_SECONDS // 2)
        if in_step >= GRACE_SECONDS or is_dead:
            watchdog.leave(f"told to stop, but step {watchdog.now.step} does not end: "
                           f"{watchdog.suspects()}")
