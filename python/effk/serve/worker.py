"""The thread that decodes: takes sequences from the event loop, and tells it after every step what changed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from ..runtime.batch import Batch
from ..runtime.batch import Sequence as Running

_LOG = logging.getLogger(__name__)


class QueueFull(Exception):
    """Too many sequences are waiting; ``retry_after`` seconds from now there may be room."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} sequences are waiting, which is the limit; try again in {retry_after} s")
        self.retry_after = retry_after


class Stopped(Exception):
    """The server is stopping, or decoding has failed."""


class Worker:
    """Runs a batch in a thread of its own.

    Args:
        batch: nobody else may step it.
        rows: of the batch.
        queue: sequences that may wait beyond the free rows.
        deliver: called in the thread, between steps, with the sequences that got tokens or ended since the last call, and
            with those of them that ended (later, one may have ended that had not then).
        interval: seconds between two calls, unless a sequence had its first token or ended. Every call costs a switch to the
            event loop and back, and an event for each client: with 16 of them as much as a tenth of a step.
    """

    def __init__(
        self,
        batch: Batch,
        rows: int,
        queue: int,
        deliver: Callable[[list[Running], list[Running]], None],
        interval: float = 0.0,
    ) -> None:
        self.batch, self.rows, self.queue, self._deliver, self.interval = batch, rows, queue, deliver, interval
        self.failure: BaseException | None = None
        self._stopping = False
        self._seconds = 1.0  # that a sequence takes, a moving average
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name="effk-decode", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def submit(self, sequences: Sequence[Running]) -> None:
        """Queue all of several sequences, or none.

        Raises:
            QueueFull: no room.
            Stopped: nothing is decoded any more.
            ValueError: a prompt that cannot run.
        """
        with self._changed:
            if self._stopping or self.failure is not None:
                raise Stopped("the server is stopping" if self.failure is None else "decoding has failed")
            waiting = len(self.batch.waiting)
            free = max(0, self.rows - len(self.batch.running))
            if waiting + len(sequences) > self.queue + free:
                rounds = (waiting + len(sequences)) / self.rows
                raise QueueFull(waiting, min(60, max(1, round(rounds * self._seconds))))
            for sequence in sequences:
                self.batch.check(sequence)
            for sequence in sequences:
                self.batch.add(sequence)
            self._changed.notify()

    def cancel(self, sequences: Sequence[Running]) -> None:
        """End sequences before the next step."""
        with self._changed:
            for sequence in sequences:
                sequence.cancelled = True
            self._changed.notify()

    def stop(self) -> None:
        """Cancel what is left and wait for the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _loop(self) -> None:
        news: dict[Running, None] = {}  # what has not been delivered, in order
        due = 0.0
        try:
            while True:
                with self._changed:
                    while not (self._stopping or self.batch.waiting or self.batch.running):
                        self._changed.wait()
                    if self._stopping:
                        break
                changed = self.batch.step()
                ended = [sequence for sequence in changed if sequence.finish is not None]
                for sequence in ended:
                    if "first" in sequence.times:
                        self._seconds += 0.1 * (sequence.times["ended"] - sequence.times["first"] - self._seconds)
                news.update(dict.fromkeys(changed))
                now = time.perf_counter()
                if ended or (news and now >= due) or any(len(sequence.tokens) == 1 for sequence in changed):
                    self._deliver(list(news), ended)
                    news.clear()
                    due = now + self.interval
        except BaseException as error:  # a mistake in the batch: clients must not wait for ever
            _LOG.exception("decoding has failed")
            with self._changed:
                self.failure = error
        with self._changed:
            left = self.batch.close()
        self._deliver(left, left)
