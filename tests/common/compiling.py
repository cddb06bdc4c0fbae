"""Compiled blocks without a compiler: the graphs are made, split into forward and backward, and run operation by
operation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

from lrdint_tune.training import compilation

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default}


class Graphs:
    """What was compiled: the operations of every forward and backward graph, in the order they came."""

    def __init__(self) -> None:
        self.forward: list[list[Any]] = []
        self.backward: list[list[Any]] = []

    @property
    def count(self) -> int:
        """Graphs that dynamo made, one for each variant of a block."""
        return counters["stats"]["unique_graphs"]

    @property
    def products_in_backward(self) -> list[int]:
        """Matrix products in each backward graph."""
        return [sum(operation in PRODUCTS for operation in graph) for graph in self.backward]

    @property
    def breaks(self) -> dict[str, int]:
        return dict(counters["graph_break"])

    def keep(self, graphs: list[list[Any]]) -> Any:
        def compiler(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            graphs.append([node.target for node in module.graph.nodes if node.op == "call_function"])
            return make_boxed_func(module.forward)

        return compiler


@contextmanager
def without_inductor() -> Iterator[Graphs]:
    """Blocks compiled in this context run without inductor, which takes a minute for each."""
    graphs = Graphs()
    backend = aot_autograd(
        fw_compiler=graphs.keep(graphs.forward),
        bw_compiler=graphs.keep(graphs.backward),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch._dynamo.reset()
    counters.clear()
    before, compilation._BACKEND = compilation._BACKEND, backend
    try:
        yield graphs
    finally:
        compilation._BACKEND = before
        torch._dynamo.reset()


def skip_inductor() -> None:
    """The same for the rest of a process: ``prepare`` of a recipe's run."""
    compilation._BACKEND = "aot_eager"
