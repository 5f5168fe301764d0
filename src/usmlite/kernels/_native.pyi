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
    frequencies: tuple[int, int],
    out: tuple[int, int],
) -> None: ...

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
        whole: bool,
        path: int,
        threads: int,
    ) -> None: ...
    def gather(
        self, ids: tuple[int, int], count: int, out: tuple[int, int], path: int, threads: int
    ) -> None: ...
    def expand(self, out: tuple[int, int], path: int, threads: int) -> None: ...
