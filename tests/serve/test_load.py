"""Many clients at once: decoded side by side, within limits, and nobody for another's fault."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx2
import numpy as np
import openai
import pytest

from serve.serving import FILE, FORM_TYPE, GREEDY, Patient, Running, coded, form, hum, until
from usmlite.errors import ModelError
from usmlite.runtime import Passage, Recognizer
from usmlite.serve.batching import Batcher

SOUND = coded(hum(0.5))


def test_clients_are_decoded_side_by_side(server: Running, recognizer: Recognizer) -> None:
    sounds = [hum(0.5 + 0.1 * number, number) for number in range(6)]
    files = [coded(sound, "WAV", "FLOAT") for sound in sounds]
    expected = [recognizer.transcribe(sound, GREEDY).text for sound in sounds]
    server.model.steps.clear()
    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(lambda n: server.ask(files[n % 6]).text, range(24)))
    assert found == [expected[number % 6] for number in range(24)]
    assert sum(server.model.steps) == 24
    assert len(server.model.steps) < 20
    assert max(server.model.steps) <= 8


@pytest.fixture
def closed(narrow: Running) -> Iterator[Running]:
    """A server that takes two requests, and a model that waits."""
    narrow.model.gate.clear()
    yield narrow
    narrow.model.gate.set()
    until(lambda: narrow.service.admission.requests == 0)
    # Whatever was in the model's hands is done before this is.
    narrow.ask(SOUND, key="secret")


def test_a_full_queue(closed: Running) -> None:
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(closed.ask, SOUND, key="secret") for _ in range(2)]
        until(lambda: closed.service.admission.requests == 2)
        with pytest.raises(openai.RateLimitError) as caught:
            closed.ask(SOUND, key="secret")
        assert caught.value.code == "server_busy"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        closed.model.gate.set()
        assert [each.result().usage.seconds for each in waiting] == [1, 1]
    assert closed.ask(SOUND, key="secret").usage.seconds == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_late_answer(closed: Running, stream: bool) -> None:
    start = time.monotonic()
    with pytest.raises(openai.APIError) as caught:
        closed.ask(SOUND, key="secret", **({"stream": True} if stream else {}))
    assert time.monotonic() - start > 1.9
    if not stream:
        assert isinstance(caught.value, openai.InternalServerError)
        assert caught.value.status_code == 503
    assert "within 2 s" in str(caught.value)


def test_a_client_that_leaves_is_not_worked_for(closed: Running) -> None:
    content = form((FILE, SOUND))
    closed.model.steps.clear()
    # The first is in the model's hands, the second waits.
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(closed.ask, SOUND, key="secret")
        until(lambda: closed.service.admission.requests == 1 and closed.service.batcher.waiting == 0)
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(
                f"{closed.url}/v1/audio/transcriptions", content=content, timeout=0.5,
                headers={**FORM_TYPE, "Authorization": "Bearer secret"},
            )  # fmt: skip
        until(lambda: closed.service.admission.requests == 1)
        closed.model.gate.set()
        assert first.result().usage.seconds == 1
    until(lambda: closed.service.batcher.waiting == 0)
    assert sum(closed.model.steps) == 1


class Choosy(Patient):
    """Fails at what is longer than a second, and remembers what it decoded."""

    order: list[list[float]]

    def advance(self, passages: Sequence[Passage]) -> None:
        if any(passage.seconds == 1.5 for passage in passages):
            raise ModelError("not this one")
        self.order.append([passage.seconds for passage in passages])
        super().advance(passages)


@pytest.fixture
def choosy(recognizer: Recognizer) -> Choosy:
    found = Choosy.of(recognizer)
    assert isinstance(found, Choosy)
    found.order = []
    return found


def test_neighbours_of_a_failure_are_answered(choosy: Choosy) -> None:
    batcher = Batcher(choosy, gather_seconds=0.3)
    jobs = [batcher.submit(hum(seconds), GREEDY) for seconds in (0.5, 1.5, 1.0)]
    assert jobs[0].finished.result(30).done
    assert jobs[2].finished.result(30).done
    with pytest.raises(ModelError, match="not this one"):
        jobs[1].finished.result(30)
    batcher.close()
    assert choosy.order == [[0.5], [1.0]]


def test_long_audio_keeps_nobody_waiting(choosy: Choosy) -> None:
    choosy.gate.clear()
    batcher = Batcher(choosy, batch_size=1)
    long = batcher.submit(hum(70.0), GREEDY)
    until(lambda: len(choosy.order) == 1)
    short = [batcher.submit(hum(0.5), GREEDY) for _ in range(2)]
    gone = batcher.submit(hum(0.6), GREEDY)
    gone.cancel()
    live = threading.Thread(target=batcher.hear, args=(hum(0.7), GREEDY, ""))
    live.start()
    until(lambda: batcher.waiting == 4)
    choosy.gate.set()
    assert long.finished.result(60).done
    assert all(job.finished.result(1).done for job in short)
    live.join()
    # Live audio first, then everybody in turn.
    assert choosy.order[:5] == [[70.0], [0.7], [0.5], [0.5], [70.0]]
    assert [0.6] not in choosy.order
    batcher.close()


def test_what_is_in_line_is_decoded_before_the_end(choosy: Choosy) -> None:
    batcher = Batcher(choosy)
    jobs = [batcher.submit(hum(0.5, seed), GREEDY) for seed in range(12)]
    silent = batcher.submit(np.zeros(16_000, np.float32), GREEDY)
    assert silent.finished.done()
    batcher.close()
    assert all(job.finished.done() for job in jobs)
    with pytest.raises(RuntimeError, match="has ended"):
        batcher.submit(hum(0.5), GREEDY)
