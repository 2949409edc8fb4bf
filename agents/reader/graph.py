"""The reader's layers on one core: whole numbers of eight bits in ONNX Runtime.

Weights have one scale a column, inputs one a text, found as it comes (dynamic quantisation); before that each input is
divided by its own constant (`agents.reader.ranges`). The runtime's own rewriting of the graph is off: it would put a
fused norm in the place of two quick operations and cost a seventh.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from agents.reader.source import EPSILON, HEADS, WIDTH, Floats

OPSET: Final = 20
IR_VERSION: Final = 10
MICROSOFT: Final = "com.microsoft"


@dataclass(frozen=True, slots=True)
class Layer:
    """The matrices of a layer, one row an input: mix (384 x 1152), out, first and second, their biases, two norms.

    `divisors` has a number for each input of each matrix; none where the inputs are taken as they are.
    """

    matrices: tuple[Floats, ...]
    biases: tuple[Floats, ...]
    norms: tuple[Floats, ...]
    divisors: tuple[Floats | None, ...]


class Layers:
    """Layers that run: the vectors of a text's pieces in, their states out."""

    def __init__(self, layers: list[Layer]) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_cpu_mem_arena = False
        self._session = ort.InferenceSession(_graph(layers), options, providers=["CPUExecutionProvider"])

    def run(self, vectors: Floats) -> Floats:
        """The state of each piece, as many rows of `WIDTH` as there are in `vectors`."""
        (states,) = self._session.run(None, {"vectors": vectors[None]})
        result: Floats = np.asarray(states, np.float32)[0]
        return result


class _Writer:
    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, name: str, values: NDArray[np.generic]) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def add(self, kind: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def product(self, x: str, name: str, matrix: Floats, bias: Floats, divisor: Floats | None) -> str:
        if divisor is not None:
            x = self.add("Mul", [x, self.constant(f"{name}.d", 1 / divisor)], [f"{name}.x"])
            matrix = matrix * divisor[:, None]
        scales = np.maximum(np.abs(matrix).max(0) / 127, 1e-9).astype(np.float32)
        whole = np.clip(np.round(matrix / scales), -127, 127).astype(np.int8)
        inputs = [x, self.constant(f"{name}.w", whole), self.constant(f"{name}.s", scales), ""]
        inputs.append(self.constant(f"{name}.b", bias))
        return self.add("DynamicQuantizeMatMul", inputs, [f"{name}.y"], MICROSOFT)

    def norm(self, x: str, y: str, name: str, weight: Floats, bias: Floats) -> str:
        total = self.add("Add", [x, y], [f"{name}.t"])
        inputs = [total, self.constant(f"{name}.w", weight), self.constant(f"{name}.b", bias)]
        return self.add("LayerNormalization", inputs, [f"{name}.y"], epsilon=EPSILON)


def _graph(layers: list[Layer]) -> bytes:
    writer, x = _Writer(), "vectors"
    writer.constant("thirds", np.full(3, WIDTH, np.int64))
    for number, layer in enumerate(layers):
        at = f"l{number}."
        matrices = list(zip(layer.matrices, layer.biases, layer.divisors, strict=True))
        norms = layer.norms
        mixed = writer.product(x, f"{at}mix", *matrices[0])
        parts = [f"{at}q", f"{at}k", f"{at}v"]
        writer.add("Split", [mixed, "thirds"], parts, axis=2)
        heard = writer.add("MultiHeadAttention", parts, [f"{at}heard"], MICROSOFT, num_heads=HEADS)
        said = writer.product(heard, f"{at}out", *matrices[1])
        x = writer.norm(x, said, f"{at}n1", norms[0], norms[1])
        inner = writer.product(x, f"{at}first", *matrices[2])
        bent = writer.add("FastGelu", [inner], [f"{at}bent"], MICROSOFT)
        said = writer.product(bent, f"{at}second", *matrices[3])
        x = writer.norm(x, said, f"{at}n2", norms[2], norms[3])
    shape = [1, "pieces", WIDTH]
    graph = helper.make_graph(
        writer.nodes,
        "reader",
        [helper.make_tensor_value_info("vectors", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, shape)],
        writer.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)])
    model.ir_version = IR_VERSION
    raw: bytes = model.SerializeToString()
    return raw
