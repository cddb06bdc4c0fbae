"""What the attention probe costs: the mean step with one every 10 steps beside one without, and its memory against N.

    python -m benchmarks.attention_probe [--steps 6] [--tokens 256]

Random weights of SmolLM2's shape, method ``dint``, forward and backward of one batch of ``--rows`` sequences (a step's
optimizer would only lower the ratio). Steps and looks take turns in one process, so what disturbs the machine disturbs
both. The memory is that of live tensors, of the look at one layer.
"""

from __future__ import annotations

import argparse
import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lrdint_tune.attention import Layout
from lrdint_tune.evaluation.attention_maps import layer_statistics
from lrdint_tune.evaluation.attention_record import look
from lrdint_tune.models import smollm2_135m
from lrdint_tune.models.decoder import LlamaDecoder


class LiveBytes(TorchDispatchMode):
    """The most that the tensors made inside hold at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        at, size = storage.data_ptr(), storage.nbytes()
        self.known.add(at)
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed() -> None:
            self.known.discard(at)
            self.live -= size

        weakref.finalize(storage, freed)


def seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def times(model: LlamaDecoder, *, rows: int, tokens: int, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of the steps, and of the looks between them."""
    batch = torch.randint(model.spec.vocab_size, (rows, tokens))
    text = torch.randint(model.spec.vocab_size, (1, tokens))

    def step() -> None:
        for row in batch:  # micro-batches of one sequence
            (model(row[None], labels=row[None].roll(-1, 1)) / batch.numel()).backward()
        model.zero_grad(set_to_none=True)

    def probe() -> None:
        look(model, text, top_k=8, heads_shown=4)

    step()
    probe()
    of_steps, of_looks = [], []
    for _ in range(steps):
        of_steps.append(seconds(step))
        of_looks.append(seconds(probe))  # more often than in a run, for the sake of the mean
    return of_steps, of_looks


def peak_megabytes(model: LlamaDecoder, tokens: int) -> float:
    """Of a look at one layer's maps."""
    x = torch.randn(1, tokens, model.spec.embed_dim)
    with torch.no_grad(), LiveBytes() as watch:
        layer_statistics(model.attention(0), x, Layout(None, None, num_queries=tokens), 8, [0, 1, 2, 3])
    return watch.peak / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rows", type=int, default=4, help="sequences of a step; configs/quickstart.yaml has 4")
    parser.add_argument("--every", type=int, default=10, help="steps from one look to the next")
    options = parser.parse_args()
    model = smollm2_135m(method="dint")
    of_steps, of_looks = times(model, rows=options.rows, tokens=options.tokens, steps=options.steps)
    step, probe = statistics.mean(of_steps), statistics.mean(of_looks)
    print(f"step of {options.rows} x {options.tokens} tokens: {step:.2f} s (median {statistics.median(of_steps):.2f})")
    print(f"look at {options.tokens} tokens: {probe:.2f} s (median {statistics.median(of_looks):.2f}, {len(of_looks)})")
    print(f"one every {options.every} steps: {100 * probe / options.every / step:.1f} % of the mean step")
    print(f"one plain forward: {seconds(lambda: forward(model, options.tokens)):.2f} s")
    for tokens in (512, 1024, 2048, 4096):
        print(f"memory of a look at one layer, N = {tokens}: {peak_megabytes(model, tokens):.0f} MB")


@torch.no_grad()
def forward(model: LlamaDecoder, tokens: int) -> None:
    probe = torch.randint(model.spec.vocab_size, (1, tokens))
    model(probe, labels=torch.where(torch.arange(tokens) == 0, probe, -100), per_token=True)


if __name__ == "__main__":
    main()
