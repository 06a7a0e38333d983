"""How a table is measured: in processes of their own, and each cell is saved as soon as it ends."""
import hashlib
import json
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from finetune.arguments import number
from finetune.errors import in_one_line
from finetune.pictures import Panel, draw
from llama.files import read_object, write_json

ROOT = Path(__file__).resolve().parents[1]
# Every figure depends on these files, and on the table's own page and examples.
CODE = ("train.py", "generate.py", "llama/**/*.py", "lora/**/*.py", "finetune/**/*.py",
        "finetune/demo/*.json", "benchmarks/measure.py", "benchmarks/runs.py",
        "benchmarks/launch.py", "benchmarks/training.py")


class OutOfMemory(ValueError):
    """Memory was not enough, or something else killed the process."""


@dataclass(frozen=True)
class Table:
    """A table that is being measured.

    out: its folder, which gets NAME.json, NAME.md and NAME.png.  conditions: machine and code;
    under other conditions each cell is measured again.  command: the command line and the
    conditions, which are printed above the table.
    """
    name: str
    out: Path
    conditions: str
    command: str

    def cell(self, settings: dict, compute: Callable[[], dict]) -> dict:
        """Return the result of compute(), or the saved one of the same settings and conditions.

        The result, of whatever type JSON knows, is saved at once.
        Raises ValueError if NAME.json does not hold cells.
        """
        for cell in read_cells(self.path):
            if cell["settings"] == self.key(settings):
                return cell["result"]
        result = compute()
        cell = {"command": self.command, "settings": self.key(settings), "result": result}
        write_json(self.path, {"cells": [*read_cells(self.path), cell]})
        return result

    def is_saved(self, settings: dict) -> bool:
        """Return whether there is a saved cell of these settings.  Raises ValueError."""
        return any(cell["settings"] == self.key(settings) for cell in read_cells(self.path))

    @property
    def path(self) -> Path:
        """The file of the saved cells."""
        return self.out / f"{self.name}.json"

    def key(self, settings: dict) -> dict:
        """Return what a saved cell is found by."""
        # Through JSON, because a tuple comes back from the file as a list.
        return json.loads(json.dumps(settings | {"conditions": self.conditions}))

    def draw(self, panels: list):
        """Draw the panels as NAME.png where matplotlib is installed.

        If that fails, print why: the table must not get lost with its picture.
        """
        if not find_spec("matplotlib"):
            return
        try:
            draw(self.out / f"{self.name}.png", panels, self.command)
        except Exception as error:                   # Packages of unlike versions raise anything.
            report(f"picture skipped: {in_one_line(error)}")


class FailedLines(list):
    """Lines of a table in which something has failed: they are printed, and the exit code is 1."""


def read_cells(path: Path) -> list:
    """Return the cells in a table's file, none if there is no file.  Raises ValueError."""
    cells = read_object(path).get("cells") if path.exists() else []
    if not isinstance(cells, list) or not all(map(is_cell, cells)):
        raise ValueError(f"{path} does not hold finished cells; delete it, or name another --out")
    return cells


def is_cell(value) -> bool:
    return isinstance(value, dict) and {"settings", "result"} <= value.keys()


def run_fresh(function: Callable, *args):
    """Return function(*args), computed in a new process.

    Nothing of an earlier cell is left there in memory or caches.  Raises OutOfMemory.
    """
    with worker_processes(1) as pool:
        return pool.submit(run_within_memory, function, *args).result()


@contextmanager
def worker_processes(n: int):
    """Give a pool of n processes for `submit(run_within_memory, function, *args)`.

    Raises OutOfMemory if one is killed: then what the others compute is lost too.  After an
    exception nothing that waits is begun, and after Ctrl-C nothing goes on.
    """
    context = multiprocessing.get_context("spawn")
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.SIG_IGN:                # as of a script's command in the background
        signal.signal(signal.SIGINT, interrupt_once)
    try:
        pool = ProcessPoolExecutor(n, context, initializer=begin_process)
        try:
            yield pool
        except BrokenProcessPool:
            raise OutOfMemory("a cell's process was killed: out of memory?") from None
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():    # The signal may be ours alone.
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    finally:
        signal.signal(signal.SIGINT, handler)


def interrupt_once(*_):
    """Raise KeyboardInterrupt.  A second Ctrl-C is ignored: it would break off the clean-up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def try_fresh(function: Callable, *args) -> dict:
    """Return run_fresh(function, *args), or an empty dict if memory is not enough."""
    try:
        return run_fresh(function, *args)
    except OutOfMemory:
        return {}


def run_within_memory(function: Callable, *args):
    """Return function(*args).  Raises OutOfMemory if torch, CUDA or Python cannot allocate."""
    is_idle = signal.getsignal(signal.SIGINT) is stay_idle
    if is_idle:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return function(*args)
    except (RuntimeError, MemoryError) as error:     # torch.OutOfMemoryError is a RuntimeError.
        text = str(error).lower()
        if isinstance(error, MemoryError) or "memory" in text or "bad_alloc" in text:
            raise OutOfMemory(f"{function.__name__} ran out of memory") from None
        raise
    finally:
        if is_idle:
            signal.signal(signal.SIGINT, stay_idle)


def begin_process():
    """Prepare a cell's process.

    If memory runs out, Linux kills it first; it also ends when its parent ends.  Ctrl-C ends a cell
    that runs.  An idle process ignores it: its parent would wait for it forever.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, stay_idle)
    be_killed_first()
    threading.Thread(target=exit_with_parent, daemon=True).start()


def stay_idle(*_):
    """Handle a Ctrl-C between cells by doing nothing."""


def add_processes_flag(parser):
    parser.add_argument("--processes", metavar="N", type=number(int, 1), default=1,
                        help="runs side by side (default: 1)")


@dataclass(frozen=True)
class CellRun:
    """A run of train.py as a cell: function(*arguments) returns its result, which has a "loss"."""
    title: str
    settings: dict
    function: Callable
    arguments: tuple


def measure_side_by_side(table: Table, runs: list, pool: ProcessPoolExecutor, n_processes: int):
    """Measure the runs that are not saved yet, n_processes at a time; save each as soon as it ends.

    After an error no further run is begun, and those that run are saved before it is raised.  No
    run waits in the pool: after an error or Ctrl-C the pool would still begin it.
    """
    waiting = [run for run in runs if not table.is_saved(run.settings)]
    running = {}                                     # {future: run}
    error = None
    while running or (waiting and not error):
        while waiting and not error and len(running) < n_processes:
            run = waiting.pop(0)
            running[pool.submit(run_within_memory, run.function, *run.arguments)] = run
        ended, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in ended:
            run = running.pop(future)
            if future.exception():
                error = error or named(future.exception(), run.title)
                continue
            loss = table.cell(run.settings, future.result)["loss"]
            report(f"{run.title}: " + ("diverged" if loss is None else f"held-out loss {loss:.4f}"))
    if error:
        raise error


def named(error: BaseException, title: str) -> BaseException:
    """Return an error about the input as one that names its run; any other error as it is."""
    if not isinstance(error, ValueError):
        return error
    kind = OutOfMemory if isinstance(error, OutOfMemory) else ValueError
    return kind(f"{title}: {error}")


def be_killed_first():
    """Ask Linux to end this process if memory ends, and not the one that waits for it."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def exit_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def machine() -> str:
    """Return one line about the hardware and software that figures depend on."""
    n_threads = torch.get_num_threads()
    parts = [processor(), f"{os.cpu_count()} cores",
             "1 thread" if n_threads == 1 else f"{n_threads} threads"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    parts += [platform.system(), f"Python {platform.python_version()}"]
    parts.append(f"torch {torch.__version__}")
    return ", ".join(parts)


def processor() -> str:
    """Return the CPU's name on Linux, elsewhere its kind."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def code_digest(*files) -> str:
    """Return 8 hex digits that change with the measured code and with these files."""
    paths = []
    for pattern in CODE:
        paths += sorted(ROOT.glob(pattern))
    digest = hashlib.sha256()
    for path in (*paths, *files):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:8]


def report(line: str):
    """Print a line on stderr: stdout is for the table."""
    print(line, file=sys.stderr, flush=True)


def list_of(kind: Callable) -> Callable:
    """Return a type for argparse: values of this kind, separated by commas."""
    def parse(value):
        return [kind(part.strip()) for part in value.split(",")]

    parse.__name__ = "list"                          # argparse names the type in its messages.
    return parse


def markdown(header: list, rows: list) -> list:
    """Return the lines of a Markdown table; all cells are text."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return lines


def spread(values: Iterable, form: str) -> str:
    """Return the mean and the largest distance from it, each as format(value, form)."""
    values = list(values)
    mean = statistics.mean(values)
    if len(values) == 1:
        return format(mean, form)
    distance = max(abs(value - mean) for value in values)
    return f"{format(mean, form)} ± {format(distance, form)}"


def panel(title: str, x: str, y: str, lines: dict) -> Panel:
    """Return a Panel whose y axis begins at 0, so that amounts can be compared."""
    return Panel(title, x, y, lines, from_zero=True)
