"""finetune/hardware.py: threads and kernels of a run on a CPU."""
import os
import subprocess
import sys

import pytest
import torch

from finetune import hardware
from finetune.hardware import KERNEL_CACHES, SMALL_MODEL, fit_to_cpu

from .helpers import ROOT

PLAN = [(0.5, [[[0, 1, 2], [3]], [[4], []]]), (1.0, [[[5]], [[6]]])]
PRODUCTS = """
import torch
from finetune.hardware import limit_kernel_caches
limit_kernel_caches([])
for n in (*range(2, {n} + 2), 2):
    torch.ones(n, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)
"""


@pytest.fixture
def threads(monkeypatch):
    """Return the list of the numbers of threads that are set."""
    numbers = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    monkeypatch.setattr(hardware, "DEFAULT_THREADS", 8)
    for name in ("OMP_NUM_THREADS", *KERNEL_CACHES):
        monkeypatch.setenv(name, "")                 # so that monkeypatch removes it afterwards
        monkeypatch.delenv(name)
    return numbers


def model_of(n_parameters):
    return torch.nn.Linear(n_parameters, 1, bias=False, device="meta")


def test_threads_depend_on_the_model_alone(threads, monkeypatch):
    for n_parameters in (SMALL_MODEL - 1, SMALL_MODEL):
        fit_to_cpu(model_of(n_parameters), PLAN)
    assert threads == [1, 8]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    fit_to_cpu(model_of(1), PLAN)
    assert threads == [1, 8]


def test_kernels_are_those_of_the_largest_micro_batch(threads, monkeypatch):
    monkeypatch.setenv(KERNEL_CACHES[1], "7")
    fit_to_cpu(model_of(1), PLAN)
    assert [os.environ[name] for name in KERNEL_CACHES] == [str(64 + 8 * 3), "7"]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available()
                    or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
                    reason="oneDNN computes no bf16 products on this CPU")
@pytest.mark.parametrize("n, n_compiled", [(64, 64), (65, 66)])
def test_onednn_keeps_64_kernels_after_torch_was_imported(n, n_compiled):
    """n shapes, and the first of them again: it is compiled twice if it was dropped."""
    environment = {name: value for name, value in os.environ.items() if name not in KERNEL_CACHES}
    environment |= {"ONEDNN_VERBOSE": "profile_create", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", PRODUCTS.format(n=n)], cwd=ROOT, env=environment,
                         capture_output=True, text=True, check=True)
    assert run.stdout.count("create:cache_miss") == n_compiled
