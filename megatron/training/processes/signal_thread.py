"""A second thread that receives every signal, and the end of the launcher, whatever the main thread does."""

import os
import select
import signal
import threading
from collections.abc import Callable

from megatron.training.processes import launcher
from megatron.training.processes.stop_report import LAUNCHER_GONE

# Seconds between two checks that no descriptor triggers.
POLL_S = 1.0


class SignalThread:
    """Reads the pipe into which Python's own handler writes the number of each signal.

    Started in the main thread, and before the handlers of signals are set.

    Args:
        receive: called in the thread with the number of each signal, and with ``LAUNCHER_GONE``.
        check: called in the thread after each event and each wait; returns how many seconds to wait next.
    """

    def __init__(self, receive: Callable[[int], None], check: Callable[[], float]):
        self._receive, self._check = receive, check
        reading, self._wakeup = map(launcher.above_standard_streams, os.pipe())
        os.set_blocking(self._wakeup, False)
        self._former_wakeup = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        watch = launcher.LauncherWatch()
        threading.Thread(target=self._run, args=(reading, watch), name="signals", daemon=True).start()

    def stop(self) -> None:
        """End the thread, and let signals wake whom they woke before."""
        if self._wakeup >= 0:
            signal.set_wakeup_fd(self._former_wakeup)
            os.close(self._wakeup)  # which ends the thread
            self._wakeup = -1

    def forget(self) -> None:
        """Detach a forked process, which has the pipe but not the thread."""
        signal.set_wakeup_fd(-1)
        self._wakeup = -1

    def _run(self, reading: int, launcher_watch: launcher.LauncherWatch) -> None:
        poll = select.poll()
        poll.register(reading, select.POLLIN)
        for descriptor in launcher_watch.descriptors:
            poll.register(descriptor, select.POLLIN)
        while True:
            ready = dict(poll.poll(self._check() * 1000))
            if reading in ready:
                numbers = os.read(reading, 4096)
                if not numbers:
                    os.close(reading)
                    return
                for number in numbers:
                    self._receive(number)
            if launcher_watch.is_gone():
                for descriptor in launcher_watch.descriptors:
                    poll.unregister(descriptor)
                launcher_watch.forget()
                self._receive(LAUNCHER_GONE)
