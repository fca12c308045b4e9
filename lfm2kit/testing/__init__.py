"""The conformance suite that judges every backend, ours and anyone's.

    lfm2kit backends check mine                                  a table of verdicts
    pytest --pyargs lfm2kit.testing --lfm2kit-backend mine       the same, without code

    @lfm2kit.testing.parametrize_backend_checks("mine")          in a plugin's own tests
    def test_conformance(check):
        check()

    lfm2kit transports check mine                                the same for a transport
    @lfm2kit.testing.parametrize_transport_checks("mine")

    DeviceMemory(delay=1e-4)                                     a device that is a thread
    check_transport(transport)                                   on every rank of a job
    run_ranks(3, rank)                                           ranks as threads of one process

The checks are the functions of `lfm2kit.testing.checks`; their docstrings say what they guard.
docs/testing.md lists them, and describes all options.
"""

from __future__ import annotations

from lfm2kit.testing.checks import CHECKS, Check
from lfm2kit.testing.device import DeviceMemory
from lfm2kit.testing.parametrize import parametrize_backend_checks, parametrize_transport_checks
from lfm2kit.testing.random_inputs import random_batch, random_inputs
from lfm2kit.testing.random_weights import random_weights
from lfm2kit.testing.runner import Result, run_checks
from lfm2kit.testing.threads import ThreadTransport, run_ranks
from lfm2kit.testing.transports import check_exchange, check_transport
from lfm2kit.testing.trial import Trial
from lfm2kit.testing.verdicts import CheckFailed, Skipped
from lfm2kit.testing.version import SUITE_VERSION

__all__ = [
    "CHECKS",
    "SUITE_VERSION",
    "Check",
    "CheckFailed",
    "DeviceMemory",
    "Result",
    "Skipped",
    "ThreadTransport",
    "Trial",
    "check_exchange",
    "check_transport",
    "parametrize_backend_checks",
    "parametrize_transport_checks",
    "random_batch",
    "random_inputs",
    "random_weights",
    "run_checks",
    "run_ranks",
]
