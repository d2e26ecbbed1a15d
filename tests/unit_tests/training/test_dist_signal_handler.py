"""A signal is recorded, and its former handler comes back."""

import os
import signal

import torch

from megatron.training import dist_signal_handler


def test_signal_is_recorded_and_the_handler_restored():
    before = signal.getsignal(signal.SIGUSR1)
    with dist_signal_handler.DistributedSignalHandler(signal.SIGUSR1) as handler:
        assert handler.signals_received() == [False]
        os.kill(os.getpid(), signal.SIGUSR1)
        assert handler.signals_received() == [True]
        assert signal.getsignal(signal.SIGUSR1) != before
    assert signal.getsignal(signal.SIGUSR1) == before
    assert handler.release() is False


def test_single_process_is_a_world_of_one():
    assert dist_signal_handler.get_world_size() == 1
    assert dist_signal_handler.get_device() == torch.device("cpu")
    assert dist_signal_handler.all_gather_item(3, dtype=torch.int64) == [3]
