"""Requests decoded side by side: one thread that holds the model, and gathers what is waiting.

Every request is a `Passage` of windows. A step decodes one window of up to `batch_size` of them; those that
are not done go to the end of the line, so that an hour of audio does not keep a second of it waiting.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from usmlite.audio import SILENCE
from usmlite.models import Options
from usmlite.runtime import Heard, Passage, Recognizer

Listener = Callable[[Sequence[Heard]], None]
"""Is told, in the model's thread, what each window brought."""


@dataclass
class Job:
    """A passage on its way.

    Attributes:
        passage: what is decoded.
        finished: gets the passage once it is done, or why there is nothing.
        listener: is told of new segments.
        once: whether one window is enough, and soon: live audio.
        waiting_since: of `time.perf_counter`.
    """

    passage: Passage
    finished: Future[Passage] = field(default_factory=Future)
    listener: Listener | None = None
    once: bool = False
    waiting_since: float = field(default_factory=time.perf_counter)

    def cancel(self) -> None:
        """Nobody waits for it any more: it is dropped before its next window."""
        self.finished.cancel()


@dataclass(frozen=True)
class Step:
    """What one step did.

    Attributes:
        windows: decoded side by side.
        seconds: that took.
    """

    windows: int
    seconds: float


class Batcher:
    """The model's thread.

    Args:
        recognizer: the model.
        batch_size: the most windows in a step.
        gather_seconds: to wait for more requests once one has come and the model is idle.
        observe: is told of every step.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        *,
        batch_size: int = 8,
        gather_seconds: float = 0.005,
        observe: Callable[[Step], None] = lambda step: None,
    ) -> None:
        self._recognizer = recognizer
        self._batch_size = batch_size
        self._gather_seconds = gather_seconds
        self._observe = observe
        self._line: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many passages are in line, those in the running step left out."""
        return len(self._line)

    def submit(
        self,
        samples: np.ndarray,
        options: Options,
        *,
        listener: Listener | None = None,
        conditioned: bool = False,
    ) -> Job:
        """Puts a recording in line.

        Args:
            samples: float32 `[samples]`, mono, 16 kHz.
            options: what is asked for.
            listener: is told of new segments, in the model's thread.
            conditioned: whether windows are told what was said before them.

        Raises:
            AudioError: too short for the model to hear anything.
            ModelError: the model does not know the language.
        """
        passage = self._recognizer.begin(samples, options, condition_on_previous_text=conditioned)
        job = Job(passage, listener=listener)
        if np.abs(samples).max() <= SILENCE:
            job.finished.set_result(passage)  # nothing is said in silence, and nothing made up
        else:
            self._enqueue(job)
        return job

    def hear(self, samples: np.ndarray, options: Options, said: str) -> Sequence[Heard]:
        """The segments of one window, next in line; waits for them. Not for the event loop's thread.

        Args:
            samples: float32 `[samples]`, at most 30 seconds.
            options: what is asked for.
            said: what the model is told was said before.
        """
        job = Job(self._recognizer.begin(samples, options, said=said), once=True)
        self._enqueue(job)
        return job.finished.result().heard

    def close(self) -> None:
        """Decodes what is in line, and ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _enqueue(self, job: Job) -> None:
        with self._changed:
            if self._closed:
                raise RuntimeError("the model's thread has ended")
            if job.once:
                self._line.appendleft(job)
            else:
                self._line.append(job)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                idle = not self._line
                while not self._line and not self._closed:
                    self._changed.wait()
                if not self._line:
                    return
            if idle:
                time.sleep(self._gather_seconds)
            with self._changed:
                jobs = [self._line.popleft() for _ in range(min(self._batch_size, len(self._line)))]
            unfinished = self._step([job for job in jobs if not job.finished.cancelled()])
            with self._changed:
                self._line.extend(unfinished)

    def _step(self, jobs: list[Job]) -> list[Job]:
        """Decodes a window of each; returns those that go on."""
        start = time.perf_counter()
        before = [len(job.passage.heard) for job in jobs]
        failed = self._advance(jobs)
        self._observe(Step(len(jobs), time.perf_counter() - start))
        unfinished = []
        for job, count in zip(jobs, before, strict=True):
            error = failed.get(id(job))
            if error is None and job.listener is not None and len(job.passage.heard) > count:
                job.listener(job.passage.heard[count:])
            if error is None and not (job.once or job.passage.done):
                unfinished.append(job)
            elif job.finished.set_running_or_notify_cancel():
                if error is None:
                    job.finished.set_result(job.passage)
                else:
                    job.finished.set_exception(error)
        return unfinished

    def _advance(self, jobs: Sequence[Job]) -> dict[int, Exception]:
        """Decodes a window of each; returns errors by the jobs' ids."""
        groups: dict[Options, list[Job]] = {}
        for job in jobs:
            groups.setdefault(job.passage.asked, []).append(job)
        failed: dict[int, Exception] = {}
        for group in groups.values():
            try:
                self._recognizer.advance([job.passage for job in group])
            except Exception as error:
                if len(group) == 1:
                    failed[id(group[0])] = error
                    continue
                # One of them is at fault, or all together are too much: each by itself.
                for job in group:
                    failed |= self._advance([job])
        return failed
