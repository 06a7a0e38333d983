"""Run train.py's loop on several ranks as a cell.

A page of its own: importing it takes memory, which would count in runs with one process.
"""
import os
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from .runs import Workload, measure_run
from .tables import OutOfMemory, run_within_memory

OUT_OF_MEMORY = 3                                    # exit code of a rank
KILLED = -9


def measure_on_ranks(workload: Workload) -> dict:
    """Run `measure_run` on all ranks, started as torchrun does; return the first one's result.

    Each has one thread unless OMP_NUM_THREADS says otherwise.  Raises OutOfMemory, or ValueError
    if a rank fails for another reason.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = LaunchConfig(1, 1, workload.ranks, run_id="benchmark", rdzv_backend="c10d",
                          rdzv_endpoint="localhost:0", start_method="spawn")
    try:
        results = elastic_launch(config, measure_on_rank)(workload)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        if OUT_OF_MEMORY in codes or KILLED in codes:
            raise OutOfMemory(f"{workload.ranks} ranks ran out of memory") from None
        raise ValueError(f"one of {workload.ranks} ranks failed, see its error above") from None
    return results[0]


def measure_on_rank(workload: Workload) -> dict | None:
    try:
        return run_within_memory(measure_run, workload)
    except OutOfMemory:
        sys.exit(OUT_OF_MEMORY)
