"""Signals that end a run at a whole step."""

import signal
import threading


class StopSignals:
    """Context in which SIGINT and SIGTERM set `received`, so that a loop can end at a whole step.

    A second signal ends a single process at once. Launchers forward signals to processes that already had them, so
    several processes ignore repeats.
    """

    def __init__(self, several_processes: bool):
        self.received, self.several_processes, self._handlers = 0, several_processes, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number, frame):
        if self.received and not self.several_processes:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(self, *_):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
