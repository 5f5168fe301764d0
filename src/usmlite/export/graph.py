"""ONNX graphs, operator by operator, with a model's weights as ONNX Runtime multiplies by them.

Operators are those of opset 20, and `MatMulNBits` and `MultiHeadAttention` of ONNX Runtime.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from usmlite.errors import SpecError
from usmlite.export import nbits
from usmlite.export.nbits import NBits
from usmlite.export.source import Source, as_float

RUNTIME = "com.microsoft"
OPSET, RUNTIME_OPSET = 20, 1
_IR_VERSION = 10  # the highest that older releases of ONNX Runtime read
_INT8_ARITHMETIC = 4  # `accuracy_level`
_MOST_INLINE = (1 << 31) - (1 << 24)  # protobuf's limit for one message, and room for the graph
_FLOATS = {"float16": np.float16, "float32": np.float32}


class Graph:
    """A graph that is being built. Values are known by their names.

    Args:
        source: whose weights it takes.
        form: one of `nbits.FORMS`.
        widths: bits that the runtime has `MatMulNBits` for.
        took: is called with the number of weights of each tensor that is taken.
    """

    FLOAT, INT64, BOOL = int(TensorProto.FLOAT), int(TensorProto.INT64), int(TensorProto.BOOL)
    """Types of elements."""

    def __init__(self, source: Source, form: str, widths: Sequence[int], took: Callable[[int], None]) -> None:
        self._source = source
        self._form = form
        self._widths = widths
        self._took = took
        self._nodes: list[Any] = []
        self._first: list[Any] = []
        self._weights: list[Any] = []
        self._held: dict[str, Any] = {}
        self._count = 0
        self.bytes = 0

    # Operators

    def op(self, kind: str, *inputs: str, count: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Adds an operator.

        Returns:
            The name of its output; a list of them if there are several.
        """
        outputs = [self._name(kind) for _ in range(count)]
        self._nodes.append(
            helper.make_node(kind, list(inputs), outputs, name=self._name(kind), domain=domain, **attributes)
        )
        return outputs[0] if count == 1 else outputs

    def rename(self, value: str, name: str) -> None:
        """Gives an output of the graph its name."""
        self._nodes.append(helper.make_node("Identity", [value], [name], name=self._name("Identity")))

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{kind.lower()}_{self._count}"

    @contextmanager
    def branch(self) -> Iterator[list[Any]]:
        """Operators that are added in this block are collected instead, for a branch of `If`."""
        outer, self._nodes = self._nodes, []
        inner = self._nodes
        try:
            yield inner
        finally:
            self._nodes = outer

    def choose(
        self, condition: str, yes: tuple[list[Any], list[str]], no: tuple[list[Any], list[str]]
    ) -> Any:
        """`If`, with the operators and the outputs of two branches."""
        graphs = []
        for label, (nodes, outputs) in (("yes", yes), ("no", no)):
            values = [helper.make_empty_tensor_value_info(name) for name in outputs]
            graphs.append(helper.make_graph(nodes, self._name(label), [], values))
        return self.op("If", condition, count=len(yes[1]), then_branch=graphs[0], else_branch=graphs[1])

    # Constants and weights

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """A constant; equal ones once."""
        array = np.asarray(value, dtype=dtype)
        key = f"constant_{array.dtype}_{'x'.join(map(str, array.shape))}_{array.tobytes().hex()}"
        if key not in self._held:
            self._held[key] = self.hold(f"constant_{len(self._held)}", array)
        return str(self._held[key])

    def hold(self, name: str, array: np.ndarray) -> str:
        """Keeps an array in the file under this name, which is given back."""
        self._weights.append(numpy_helper.from_array(array.copy(order="C"), name))
        self.bytes += array.nbytes
        return name

    def floats(self, name: str, change: Callable[[np.ndarray], np.ndarray] | None = None) -> str:
        """A tensor of the model as float32; what is stored as float16 is converted when it is loaded."""
        if name in self._held:
            return str(self._held[name])
        array = as_float(self._source.tensor(name)).numpy()
        self._took(array.size)
        form = nbits.float_form(self._source, self._source.tensors[name], self._form)
        stored = (array if change is None else change(array)).astype(_FLOATS[form])
        value = self.hold(name, stored)
        if form == "float16":
            # Before everything else, for branches see only what comes before them.
            value, half = f"{name}_float32", value
            self._first.append(helper.make_node("Cast", [half], [value], to=self.FLOAT))
        self._held[name] = value
        return value

    def linear(self, x: str, module: str, *, bias: bool = True) -> str:
        """A linear layer of the model: `[..., in]` to `[..., out]`."""
        name = f"{module}.weight"
        held = self._matrix(name)
        if isinstance(held, str):
            y = self.op("MatMul", x, held)
        else:
            weight, codes, steps, scale = held
            y = self._multiply(x, weight, codes, steps, scale)
        return str(self.op("Add", y, self.floats(f"{module}.bias")) if bias else y)

    def _multiply(self, x: str, weight: NBits, codes: str, steps: str, scale: str | None) -> Any:
        if scale is not None:
            x = self.op("Mul", x, scale)
        return self.op(
            "MatMulNBits", x, codes, steps, domain=RUNTIME, K=weight.columns, N=weight.rows, bits=weight.bits,
            block_size=weight.block, accuracy_level=_INT8_ARITHMETIC,
        )  # fmt: skip

    def _matrix(self, name: str) -> str | tuple[NBits, str, str, str | None]:
        """A matrix that inputs are multiplied by: float32 `[in, out]`, or the parts of `MatMulNBits`."""
        if name not in self._held or isinstance(self._held[name], str):
            weight = nbits.pack(self._source, self._source.tensors[name], self._form, self._widths)
            if weight is None:
                return self.floats(name, np.transpose)
            self._took(weight.levels.numel())
            scale = weight.column_scale
            self._held[name] = (
                weight,
                self.hold(f"{name}_codes", weight.codes()),
                self.hold(f"{name}_steps", weight.steps.contiguous().numpy()),
                None if scale is None else self.hold(f"{name}_columns", scale.numpy()),
            )
        held: tuple[NBits, str, str, str | None] = self._held[name]
        return held

    def tied(self, ids: str, name: str) -> tuple[str, Callable[[str], str]]:
        """A token embedding that is the output projection too.

        Returns:
            The rows of the token ids `[batch, tokens]`, and what makes logits of states.
        """
        held = self._matrix_of_rows(name)
        if isinstance(held, str):
            rows = self.op("Gather", held, ids)
            return rows, lambda x: str(self.op("MatMul", x, self.op("Transpose", held, perm=[1, 0])))
        weight, codes, steps, scale = held
        rows = self._dequantized(ids, weight, codes, steps, scale)
        return rows, lambda x: str(self._multiply(x, weight, codes, steps, scale))

    def _matrix_of_rows(self, name: str) -> str | tuple[NBits, str, str, str | None]:
        stored = self._source.tensors[name]
        if nbits.pack(self._source, stored, self._form, self._widths) is None:
            return self.floats(name)
        return self._matrix(name)

    def _dequantized(self, ids: str, weight: NBits, codes: str, steps: str, scale: str | None) -> str:
        """Rows of a quantized table, float32 `[batch, tokens, columns]`."""
        found = self.op("Gather", codes, ids)
        if weight.bits < 8:
            each = 8 // weight.bits
            mask = self.constant((1 << weight.bits) - 1, np.uint8)
            last = self.constant([-1])
            parts = []
            for index in range(each):
                shift = self.constant(weight.bits * index, np.uint8)
                part = self.op("BitwiseAnd", self.op("BitShift", found, shift, direction="RIGHT"), mask)
                parts.append(self.op("Unsqueeze", part, last))
            found = self.op("Concat", *parts, axis=-1)
        blocks = math.ceil(weight.columns / weight.block)
        found = self.op("Reshape", found, self.constant([0, 0, blocks, weight.block]))
        levels = self.op(
            "Sub",
            self.op("Cast", found, to=self.FLOAT),
            self.constant(1 << weight.bits - 1, np.float32),
        )
        step = self.op("Unsqueeze", self.op("Gather", steps, ids), self.constant([-1]))
        rows = self.op("Reshape", self.op("Mul", levels, step), self.constant([0, 0, blocks * weight.block]))
        if blocks * weight.block != weight.columns:
            rows = self.op(
                "Slice", rows, self.constant([0]), self.constant([weight.columns]), self.constant([2])
            )
        return str(rows if scale is None else self.op("Mul", rows, scale))

    # Layers

    def norm(self, x: str, module: str) -> str:
        """A layer norm over the last axis."""
        return str(
            self.op(
                "LayerNormalization",
                x,
                self.floats(f"{module}.weight"),
                self.floats(f"{module}.bias"),
                axis=-1,
            )
        )

    def convolve(self, x: str, module: str, *, stride: int) -> str:
        """A convolution of three frames, with GELU."""
        y = self.op(
            "Conv", x, self.floats(f"{module}.weight"), self.floats(f"{module}.bias"), kernel_shape=[3],
            pads=[1, 1], strides=[stride],
        )  # fmt: skip
        return str(self.op("Gelu", y))

    def attend(self, query: str, key: str, value: str, heads: int, mask: str = "") -> str:
        """Attention of a query `[batch, tokens, d]`.

        Keys and values are `[batch, frames, d]`, or `[batch, heads, frames, d / heads]`.
        """
        inputs = [query, key, value] + (["", "", mask] if mask else [])
        return str(self.op("MultiHeadAttention", *inputs, domain=RUNTIME, num_heads=heads))

    def split_heads(self, x: str, heads: int) -> str:
        """`[batch, tokens, d]` to `[batch, heads, tokens, d / heads]`."""
        return str(
            self.op("Transpose", self.op("Reshape", x, self.constant([0, 0, heads, -1])), perm=[0, 2, 1, 3])
        )

    # The file

    def save(
        self,
        path: Path,
        inputs: Mapping[str, tuple[int, Sequence[Any]]],
        outputs: Mapping[str, tuple[int, Sequence[Any]]],
        metadata: Mapping[str, str],
        *,
        alone: bool = False,
    ) -> None:
        """Writes the graph.

        Args:
            path: the file; weights beyond 2 GB go into `path`_data beside it.
            inputs: element type and shape by name; axes of any length have names.
            outputs: the same.
            metadata: for whoever reads the model.
            alone: whether the reader looks for no second file.

        Raises:
            SpecError: it would have to be alone, and has more than 2 GB.
        """
        if alone and self.bytes > _MOST_INLINE:
            raise SpecError(
                "the runtime reads no file of more than 2 GB", where=path.name,
                expected=f"at most {_MOST_INLINE:,} bytes of weights", found=f"{self.bytes:,}",
                remedy="Export with --dtype int8.",
            )  # fmt: skip
        graph = helper.make_graph(
            [*self._first, *self._nodes], path.stem,
            [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
            [helper.make_tensor_value_info(name, *kind) for name, kind in outputs.items()],
            self._weights,
        )  # fmt: skip
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(RUNTIME, RUNTIME_OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="usmlite")
        model.ir_version = _IR_VERSION
        helper.set_model_props(model, dict(metadata))
        if self.bytes > _MOST_INLINE:
            onnx.save_model(
                model, path, save_as_external_data=True, all_tensors_to_one_file=True,
                location=f"{path.name}_data", size_threshold=1024,
            )  # fmt: skip
        else:
            onnx.save_model(model, path)
