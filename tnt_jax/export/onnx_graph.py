"""An ONNX graph in the operators that runtimes know as one: MatMul, LayerNormalization, Gelu.

JAX has no such primitives, so that a converter writes each as a dozen nodes, which runtimes compute one after the other
and quantisers do not recognise. What does not look as expected stays as it is.
"""

from collections.abc import Callable

import numpy as np

GELU_OPSET = 20  # in an older one its parts stay, which runtimes join by themselves
SHAPES = ("Expand", "Reshape")
"""Operators between a sum and what it is subtracted from."""


def simplify(proto) -> None:
    """Rewrites products, layer norms and GELUs in place, and leaves out the nodes that nobody needs then."""
    import onnx_ir
    from onnx_ir.passes import common

    _use_matrix_products(proto.graph)
    view = _View(proto.graph)
    view.replace("Add", _layer_norm)
    if proto.opset_import[0].version >= GELU_OPSET:
        view.replace("Mul", _gelu)
    model = onnx_ir.from_proto(proto)
    for each in (common.IdentityEliminationPass(), common.RemoveUnusedNodesPass()):
        model = each(model).model
    proto.CopyFrom(onnx_ir.to_proto(model))


def _use_matrix_products(graph) -> None:
    for node in graph.node:
        if node.op_type == "Einsum":
            given, result = node.attribute[0].s.decode().replace(" ", "").split("->")
            left, right = given.split(",")
            if len(right) == 2 and left[-1] == right[0] and result == left[:-1] + right[1]:
                node.op_type = "MatMul"
                del node.attribute[:]


class _View:
    """A graph seen from its tensors: which node makes each, and which are constants."""

    def __init__(self, graph):
        import onnx

        self.onnx, self.graph = onnx, graph
        self.makers = {name: node for node in graph.node for name in node.output}
        self.constants = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}

    def replace(self, last: str, pattern: Callable) -> None:
        """Each node of kind `last` that ends a pattern becomes the operator and inputs which that returns."""
        for node in self.graph.node:
            if node.op_type == last and (found := pattern(self, node)):
                kind, inputs, attributes = found
                node.CopyFrom(self.onnx.helper.make_node(kind, inputs, node.output, node.name, **attributes))

    def with_constant(self, name: str, kind: str) -> tuple[str, np.ndarray] | None:
        """The computed and the constant input of the node of this kind that makes a tensor."""
        node = self.makers.get(name)
        if node is None or node.op_type != kind:
            return None
        for computed, constant in (tuple(node.input), tuple(node.input)[::-1]):
            if constant in self.constants and computed not in self.constants:
                return computed, self.constants[constant]
        return None

    def made_by(self, name: str, *kinds: str):
        """The node that makes a tensor, if it is of one of these kinds."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type in kinds else None

    def mean_of(self, name: str, kind: str) -> tuple[str, int] | None:
        """The tensor whose mean over the last axis this one is, and its width; `kind` is the operator that sums."""
        divided = self.with_constant(name, "Div")
        if divided is None or divided[1].ndim:
            return None
        name = divided[0]
        while between := self.made_by(name, *SHAPES):
            name = between.input[0]
        total = self.made_by(name, kind)
        return (total.input[0], int(divided[1])) if total is not None else None

    def vector(self, value: np.ndarray) -> str:
        """A constant with one axis."""
        name = f"vector_{len(self.constants)}"
        self.constants[name] = np.ascontiguousarray(value.reshape(-1))
        self.graph.initializer.append(self.onnx.numpy_helper.from_array(self.constants[name], name))
        return name


def _layer_norm(view: _View, end) -> tuple | None:
    """(x - mean) * (scale / sqrt(mean of (x - mean)^2 + epsilon)) + bias, the last axis being normalised."""
    biased = view.with_constant(end.output[0], "Add")
    product = view.made_by(biased[0], "Mul") if biased else None
    if product is None:
        return None
    for centred, factor in (tuple(product.input), tuple(product.input)[::-1]):
        minus, scaled = view.made_by(centred, "Sub"), view.with_constant(factor, "Mul")
        inverse = view.with_constant(scaled[0], "Div") if scaled else None
        root = view.made_by(inverse[0], "Sqrt") if inverse and inverse[1] == 1 else None
        raised = view.with_constant(root.input[0], "Add") if root is not None else None
        variance = view.mean_of(raised[0], "ReduceSumSquare") if raised else None
        mean = view.mean_of(minus.input[1], "ReduceSum") if minus is not None else None
        if variance is None or mean is None:
            continue
        x, size = minus.input[0], scaled[1].size
        if variance == (centred, size) and mean == (x, size) and size == biased[1].size == scaled[1].shape[-1]:
            inputs = [x, view.vector(scaled[1]), view.vector(biased[1])]
            return "LayerNormalization", inputs, {"axis": -1, "epsilon": float(raised[1])}
    return None


def _gelu(view: _View, end) -> tuple | None:
    """x * (0.5 + 0.5 * erf(x / sqrt(2)))."""
    for x, factor in (tuple(end.input), tuple(end.input)[::-1]):
        raised = view.with_constant(factor, "Add")
        halved = view.with_constant(raised[0], "Mul") if raised else None
        erf = view.made_by(halved[0], "Erf") if halved else None
        scaled = view.with_constant(erf.input[0], "Mul") if erf is not None else None
        if scaled and scaled[0] == x and np.allclose([raised[1], halved[1], scaled[1]], [0.5, 0.5, 0.5**0.5]):
            return "Gelu", [x], {}
    return None
