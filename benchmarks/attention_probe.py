"""What the attention probe costs: the mean step with one every 10 steps beside one without, and its memory against N.

    python -m benchmarks.attention_probe [--repeats 5] [--tokens 256]

Random weights of SmolLM2's shape, method ``dint``; a step is forward and backward of ``--rows`` sequences (its
optimizer would only lower the ratio). Sequences and looks take turns in one process, and the seconds are those of the
CPU, so what else runs on the machine changes little. The memory is that of live tensors, of the look at one layer.
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
    """Of the CPU, added up over threads."""
    start = time.process_time()
    action()
    return time.process_time() - start


def times(model: LlamaDecoder, *, tokens: int, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of forward and backward of one sequence, and of a look at one."""
    text = torch.randint(model.spec.vocab_size, (1, tokens))

    def train() -> None:
        (model(text, labels=text.roll(-1, 1)) / text.numel()).backward()

    def probe() -> None:
        look(model, text, top_k=8, heads_shown=4)

    train()
    probe()
    pairs = [(seconds(train), seconds(probe)) for _ in range(repeats)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def peak_megabytes(model: LlamaDecoder, tokens: int) -> float:
    """Of a look at one layer's maps."""
    x = torch.randn(1, tokens, model.spec.embed_dim)
    with torch.no_grad(), LiveBytes() as watch:
        layer_statistics(model.attention(0), x, Layout(None, None, num_queries=tokens), 8, [0, 1, 2, 3])
    return watch.peak / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rows", type=int, default=4, help="sequences of a step; configs/quickstart.yaml has 4")
    parser.add_argument("--every", type=int, default=10, help="steps from one look to the next")
    options = parser.parse_args()
    model = smollm2_135m(method="dint")
    for tokens in (512, 1024, 2048, 4096):
        print(f"memory of a look at one layer, N = {tokens}: {peak_megabytes(model, tokens):.0f} MB", flush=True)
    trained, looked = times(model, tokens=options.tokens, repeats=options.repeats)
    step, probe = options.rows * statistics.mean(trained), statistics.mean(looked)
    print(f"step of {options.rows} x {options.tokens} tokens: {step:.2f} CPU seconds")
    print(f"look at {options.tokens} tokens: {probe:.2f} CPU seconds, {options.repeats} of them")
    print(f"one every {options.every} steps: {100 * probe / options.every / step:.1f} % of the mean step")


if __name__ == "__main__":
    main()
