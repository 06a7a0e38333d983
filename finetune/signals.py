"""Signals: a run that is told to stop ends after its step, saved, and never waits for ever."""
import os
import signal
import threading
import time
from contextlib import contextmanager

from .errors import BAD_INPUT, RANK_FAILED, end_process

# Seconds that a rank waits for the others once it was told to stop; torchrun kills after 30.
GRACE = 20


class StopRequest:
    """Whether this process has been told to stop, and when: the handler of SIGTERM and SIGINT."""

    def __init__(self, ranks):
        self.ranks = ranks
        self.received_at = None

    def handle(self, number, frame):
        """Note the signal.  A second Ctrl-C ends a process that is alone at once.

        Some shells pass one Ctrl-C on twice, so the second counts after a second or more.
        """
        now = time.monotonic()
        if self.received_at is None:
            self.received_at = now
            if self.ranks.is_first:                  # os.write, for print may be at work right now.
                os.write(2, b"train.py: told to stop: this step is finished and saved first\n")
        elif number == signal.SIGINT and self.ranks.size == 1 and now - self.received_at > 1:
            raise KeyboardInterrupt


@contextmanager
def stop_after_step_on_signals(run):
    """In the block, let SIGTERM and SIGINT end the run after its step.

    A file that cannot be written ends it in one line and exit code 2.
    """
    handlers = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        handlers[number] = signal.signal(number, run.stop_request.handle)
    if run.ranks.size > 1:
        leave_when_others_hang()
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        end_process(f"train.py: {' '.join(str(error).split())}; what was saved is whole: --resume "
                    "goes on from there", BAD_INPUT)
    finally:
        if run.ranks.is_first:
            run.metrics.close()
        signal.set_wakeup_fd(-1)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def leave_when_others_hang():
    """From now on leave GRACE seconds after a signal, come what may.

    Where another rank is gone NCCL waits for it, and then no handler runs in the main thread.  But
    the signal's number still arrives in a pipe, which a thread reads.
    """
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    signal.set_wakeup_fd(writes)

    def watch():
        os.read(reads, 1)
        time.sleep(GRACE)
        os.write(2, b"train.py: told to stop, but the step does not end, as if another rank were "
                    b"gone: nothing more is saved\n")
        os._exit(RANK_FAILED)

    threading.Thread(target=watch, daemon=True).start()
