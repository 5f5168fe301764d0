"""One server's work, from a request to its answer."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from usmlite.audio import SAMPLE_RATE
from usmlite.errors import AudioError, ModelError
from usmlite.models import Options
from usmlite.models.options import FALLBACK_TEMPERATURES
from usmlite.runtime import Heard, Passage, Recognizer
from usmlite.serve.answers import Tokens, answer, delta, done, event
from usmlite.serve.batching import Batcher, Job
from usmlite.serve.decoders import Decoders
from usmlite.serve.errors import ApiError, internal, invalid, of_model, unauthorized, unavailable
from usmlite.serve.limits import Admission, Limits
from usmlite.serve.live import LiveSession
from usmlite.serve.metrics import Metrics
from usmlite.serve.uploads import announced, read_upload
from usmlite.serve.wishes import Wish, parse_wish

_PING_SECONDS = 15.0  # of silence on a stream, after which a comment shows that it lives
_STOP_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Settings:
    """What a server is started with.

    Attributes:
        name: what clients call the model.
        options: for the model, where a request says nothing else.
        limits: what is taken on.
        keys: one of them must be sent, if there are any.
        batch_size: the most windows of audio decoded side by side.
        gather_seconds: how long an idle model waits for more requests once one has come.
        decoders: processes that decode audio files.
        conditioned: whether windows are told what was said in the ones before them.
        origins: web sites that may use the server from a browser, such as "https://example.org".
    """

    name: str = "model"
    options: Options = field(default_factory=lambda: Options(temperatures=FALLBACK_TEMPERATURES))
    limits: Limits = field(default_factory=Limits)
    keys: tuple[str, ...] = ()
    batch_size: int = 8
    gather_seconds: float = 0.005
    decoders: int = 1
    conditioned: bool = False
    origins: tuple[str, ...] = ()


class Service:
    """The model, the processes and the counters of one server.

    Args:
        recognizer: the model.
        settings: what it was started with.
    """

    def __init__(self, recognizer: Recognizer, settings: Settings) -> None:
        self.recognizer = recognizer
        self.settings = settings
        self.limits = settings.limits
        self.admission = Admission(settings.limits)
        self.metrics = Metrics()
        self.started = int(time.time())
        self.live: set[LiveSession] = set()
        self.decoders = Decoders(settings.limits, settings.decoders)
        self.batcher = Batcher(
            recognizer,
            batch_size=settings.batch_size,
            gather_seconds=settings.gather_seconds,
            observe=self.metrics.step,
        )
        self._keys = [_digest(key) for key in settings.keys]
        watch = self.metrics.watch
        watch("requests_in_work", "Requests in work or waiting.", lambda: self.admission.requests)
        watch("passages_waiting", "Recordings in line for the model.", lambda: self.batcher.waiting)
        watch("live_sessions", "Sessions of live audio.", lambda: self.admission.live)
        watch("decoders_broken", "Decoding processes that were replaced.", lambda: self.decoders.broken)

    async def start(self) -> None:
        """Starts what needs an event loop."""
        await self.decoders.start()

    async def stop(self) -> None:
        """Ends everything; all requests have been answered."""
        await asyncio.to_thread(self.batcher.close)
        await self.decoders.stop()

    async def drain(self) -> None:
        """Lets nobody in any more, and live sessions end with what was said so far."""
        self.admission.stopping = True
        for session in list(self.live):
            session.stop()
        while self.live:
            await asyncio.sleep(_STOP_POLL_SECONDS)

    @property
    def needs_key(self) -> bool:
        """Whether requests must have an API key."""
        return bool(self._keys)

    def check_key(self, key: str | None) -> None:
        """Compares a key with all of ours, in a time that says nothing about them.

        Raises:
            ApiError: 401.
        """
        if self._keys:
            given = _digest(key or "")
            # Every one is compared: the first that fits must not be told from the last.
            fits = [hmac.compare_digest(given, known) for known in self._keys]
            if key is None or not any(fits):
                raise unauthorized()

    def tokens(self, text: str) -> list[int]:
        """A segment's token ids; none for families without such tokens."""
        encode: Tokens | None = getattr(self.recognizer.adapter, "encode_text", None)
        return [] if encode is None else encode(f" {text}")

    async def transcribe(self, request: Request, task: str) -> Response:
        """Answers a request for a transcript.

        Args:
            request: with its body not read yet.
            task: "transcribe" or "translate".

        Raises:
            ApiError: whatever is wrong with it.
        """
        with ExitStack() as held:
            held.enter_context(self.admission.request(announced(request, self.limits)))
            upload = await read_upload(request, self.limits)
            wish = parse_wish(upload.fields, task, self.settings.name, self.settings.options)
            self.check_task(wish.options)
            deadline = time.monotonic() + self.limits.request_seconds
            samples = await self.decoders.decode(upload.file)
            del upload
            held.enter_context(self.admission.audio(len(samples) / SAMPLE_RATE))
            events: asyncio.Queue[Sequence[Heard]] = asyncio.Queue()
            loop = asyncio.get_running_loop()

            def listen(heard: Sequence[Heard]) -> None:
                loop.call_soon_threadsafe(events.put_nowait, heard)

            try:
                job = self.batcher.submit(
                    samples, wish.options, listener=listen if wish.stream else None,
                    conditioned=self.settings.conditioned,
                )  # fmt: skip
            except ModelError as error:
                raise of_model(error) from None
            except AudioError as error:
                raise invalid(f"{error.what.capitalize()}.", "file", "invalid_audio") from None
            held.callback(job.cancel)
            if wish.stream:
                return _Stream(self._events(job, events, wish, deadline), held.pop_all())
            passage = await self._finished(job, request, deadline)
            return answer(passage, wish, self.tokens)

    def check_task(self, options: Options) -> None:
        """Whether the model can do what is asked, before any audio is heard.

        Raises:
            ApiError: 422.
        """
        adapter = self.recognizer.adapter
        try:
            adapter.language_code(options.language)
        except ModelError as error:
            raise of_model(error) from None
        # A model of one language has nothing to translate.
        if options.task == "translate" and not adapter.tells_languages:
            raise invalid("This model does not translate; it knows one language.", code="unsupported")

    @contextmanager
    def booked(self, session: LiveSession) -> Iterator[None]:
        """Keeps a session in the books while it lasts."""
        self.live.add(session)
        try:
            yield
        finally:
            self.live.discard(session)
            self.metrics.audio_seconds.inc(session.seconds)

    def live_options(self, language: str | None, task: str) -> Options:
        """What live audio is heard with.

        Raises:
            ApiError: 422 for what the model cannot do.
        """
        options = replace(
            self.settings.options, language=language, task=task, timestamps=True, word_timestamps=True
        )
        self.check_task(options)
        code = self.recognizer.adapter.language_code(language or self.recognizer.adapter.only_language)
        return replace(options, language=code)

    async def _finished(self, job: Job, request: Request, deadline: float) -> Passage:
        """Waits for the model, as long as the client does."""
        result = asyncio.wrap_future(job.finished)
        gone = asyncio.create_task(_gone(request))
        try:
            await asyncio.wait(
                (result, gone),
                timeout=max(0.0, deadline - time.monotonic()),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not result.done():
                raise self._late() if not gone.done() else ApiError(499, "The client left.")
            return self._counted(result)
        finally:
            gone.cancel()

    async def _events(
        self, job: Job, events: asyncio.Queue[Sequence[Heard]], wish: Wish, deadline: float
    ) -> AsyncIterator[str]:
        """Segments as they come, then the whole."""
        result = asyncio.wrap_future(job.finished)
        sent = 0
        try:
            while not (result.done() and events.empty()):
                getting = asyncio.create_task(events.get())
                left = max(0.0, deadline - time.monotonic())
                await asyncio.wait(
                    (getting, result), timeout=min(_PING_SECONDS, left), return_when=asyncio.FIRST_COMPLETED
                )
                if getting.done():
                    heard = getting.result()
                    yield delta(heard, wish, self.tokens, first=sent)
                    sent += len(heard)
                    continue
                getting.cancel()
                if not result.done():
                    if time.monotonic() >= deadline:
                        raise self._late()
                    yield ": still listening\n\n"
            yield done(self._counted(result), wish, self.tokens)
        except ApiError as error:
            yield event(error.body())

    def _counted(self, result: asyncio.Future[Passage]) -> Passage:
        try:
            passage = result.result()
        except ModelError as error:
            raise of_model(error) from None
        except Exception as error:
            raise internal(error) from None
        self.metrics.audio_seconds.inc(passage.seconds)
        return passage

    def _late(self) -> ApiError:
        return unavailable(
            f"The audio was not transcribed within {self.limits.request_seconds:g} s.", "timeout"
        )


class _Stream(StreamingResponse):
    """Server-sent events; what the request holds is given back when they end, however they do."""

    def __init__(self, content: AsyncIterator[str], held: ExitStack) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            await super().__call__(scope, receive, send)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _digest(key: str) -> bytes:
    # Of equal lengths, so that comparing them does not tell how long a key is.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
