"""The binding of the native library (csrc/binding.cpp). `memory` is an address and a number of bytes."""

def paths() -> list[str]: ...
def thread_source() -> str: ...
def rans_decode(
    stream: tuple[int, int],
    bits: int,
    lowest: int,
    row_levels: tuple[int, int],
    column_levels: tuple[int, int],
    tables: int,
    states: int,
    frequencies: tuple[int, int],
    out: tuple[int, int],
) -> None: ...
def trellis_search(
    states: int,
    count: int,
    rows: int,
    steps: tuple[int, int],
    costs: tuple[int, int],
    tables: tuple[int, int],
    bits: tuple[int, int],
    table_count: int,
    out: tuple[int, int],
) -> None: ...
def attend(
    queries: tuple[int, int],
    keys: tuple[int, int],
    values: tuple[int, int],
    count: int,
    positions: int,
    heads: int,
    width: int,
    scale: float,
    out: tuple[int, int],
    path: int,
    threads: int,
) -> None: ...
def gelu(x: tuple[int, int], count: int, y: tuple[int, int], path: int, threads: int) -> None: ...
def normalize(
    x: tuple[int, int],
    count: int,
    weight: tuple[int, int],
    bias: tuple[int, int],
    width: int,
    epsilon: float,
    y: tuple[int, int],
    path: int,
) -> None: ...

_Norm = tuple[tuple[int, int], tuple[int, int], float]
_Block = tuple[_Norm, list[tuple[Weight, tuple[int, int]]]]

class Encoder:
    def __init__(
        self, layers: list[list[_Block]], last: _Norm, width: int, heads: int, path: int, owner: object
    ) -> None: ...
    def run(self, x: tuple[int, int], count: int, threads: int) -> None: ...

class Decoder:
    def __init__(
        self, layers: list[list[_Block]], last: _Norm, width: int, heads: int, path: int, owner: object
    ) -> None: ...
    def hear(self, encoded: tuple[int, int], batch: int, positions: int, threads: int) -> None: ...
    def step(self, x: tuple[int, int], rows: int, added: int, threads: int) -> None: ...
    def swap(self, a: int, b: int) -> None: ...
    def select(self, rows: list[int]) -> None: ...

class Weight:
    def __init__(
        self,
        rows: int,
        columns: int,
        group: int,
        bits: int,
        doubled_offset: int,
        pattern: tuple[int, int, int, int],
        codes: tuple[int, int],
        scale: tuple[int, int],
        zero: tuple[int, int],
        patterns: tuple[int, int],
        column_scale: tuple[int, int],
        owner: object,
    ) -> None: ...
    def linear(
        self,
        x: tuple[int, int],
        count: int,
        x_stride: int,
        bias: tuple[int, int],
        y: tuple[int, int],
        activations: int,
        path: int,
        threads: int,
        then: int,
    ) -> None: ...
    def gather(
        self, ids: tuple[int, int], count: int, out: tuple[int, int], path: int, threads: int
    ) -> None: ...
    def expand(self, out: tuple[int, int], path: int, threads: int) -> None: ...
