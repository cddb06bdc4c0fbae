"""Log-likelihoods of continuations, tokenised and cut as EleutherAI's lm-eval does: the numbers are the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lrdint_tune.errors import ConfigError
from lrdint_tune.evaluation.nll import plan_batches
from lrdint_tune.models.decoder import LlamaDecoder
from lrdint_tune.models.loss import IGNORE_INDEX
from lrdint_tune.training.data.encode import Encoder

MAX_TOKENS = 4096  # of a forward, padding included
Pair = tuple[str, str]
TokenPair = tuple[list[int], list[int]]


class Score(NamedTuple):
    """Of one continuation.

    Attributes:
        log_likelihood: of its tokens given all before them, in nats.
        is_greedy: each of its tokens is the most likely one.
        num_tokens: how many it has.
    """

    log_likelihood: float
    is_greedy: bool
    num_tokens: int


class Scorer:
    """Scores continuations with one model.

    Args:
        model: on ``device``.
        tokenizer: a torchtune tokenizer. BOS is put before a context if the tokenizer does so by itself.
        max_seq_len: the most tokens that the model is given at once; None: the model's limit.
        max_tokens: of a forward, padding included; a longer single sequence goes alone.
        progress: called after each forward with the number of sequences it had.
    """

    def __init__(
        self,
        model: LlamaDecoder,
        tokenizer: Any,
        *,
        device: torch.device,
        max_seq_len: int | None = None,
        max_tokens: int = MAX_TOKENS,
        progress: Callable[[int], object] = lambda _: None,
    ) -> None:
        limit = model.spec.max_seq_len
        if max_seq_len is not None and not 1 < max_seq_len <= limit:
            raise ConfigError(f"max_seq_len={max_seq_len}: must be from 2 to the model's limit, {limit}")
        self.model, self.device, self.progress = model, device, progress
        self.max_seq_len, self.max_tokens = max_seq_len or limit, max_tokens
        self.tokenizer = tokenizer
        self._encoder = Encoder(tokenizer, add_bos=None, add_eos=False)
        # What padding would change is computed without: rows of one length only.
        self._padding_matters = model.spec.leaks_future or any(m.needs_document_ends for m in model.methods())

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, with BOS if the tokenizer adds it by itself."""
        return self._encoder.prefix + self._encoder.piece(text)

    def encode_more(self, text: str) -> list[int]:
        """Token ids of ``text`` where something stands before it."""
        return self._encoder.piece(text)

    @property
    def prefix(self) -> list[int]:
        """What the tokenizer by itself puts before a text: BOS or nothing."""
        return self._encoder.prefix

    def encode_pair(self, context: str, continuation: str) -> TokenPair:
        """Token ids of both parts of ``context + continuation``.

        Spaces at the end of the context go to the continuation, as they do inside the tokens of most tokenizers; the
        whole is then encoded and cut where the context's own encoding ends. An empty context becomes BOS (EOS, if the
        tokenizer has none), or the continuation's first token if it is that.

        Raises:
            ConfigError: an empty continuation, or an empty context and a tokenizer without BOS and EOS.
        """
        kept = context.rstrip()
        if not context:
            ids = self._encoder.piece(continuation)
            start = self.start_id
            pair = ([start], ids) if ids[:1] != [start] else (ids[:1], ids[1:])
        else:
            before = self.encode(kept)
            pair = (before, self.encode(context + continuation)[len(before) :])
            if not before:  # a context of spaces only, and no BOS
                pair = ([self.start_id], pair[1])
        if not pair[1]:
            raise ConfigError(f"continuation {continuation!r} after {context[-40:]!r}: has no token; correct the item")
        return pair

    @property
    def start_id(self) -> int:
        """What stands before a text that has nothing before it: BOS, otherwise EOS. Raises ConfigError."""
        for name in ("bos_id", "eos_id"):
            value = getattr(self.tokenizer, name, None)
            if value is not None and value >= 0:
                return int(value)
        raise ConfigError("tokenizer: has neither BOS nor EOS, which an empty context needs; use one that has")

    def score(self, pairs: Sequence[Pair]) -> list[Score]:
        """Score each (context, continuation), see :meth:`encode_pair`."""
        return self.score_tokens([self.encode_pair(*pair) for pair in pairs])

    def score_tokens(self, pairs: Sequence[TokenPair]) -> list[Score]:
        """Score token ids. What is too long loses tokens on the left.

        Raises:
            ConfigError: a continuation that is itself too long.
        """
        rows = [self._row(*pair) for pair in pairs]
        scores: dict[int, Score] = {}
        for indices in self._batches([len(tokens) for tokens, _ in rows]):
            losses, most_likely = self._forward([rows[i] for i in indices])
            for at, index in enumerate(indices):
                count = len(pairs[index][1])
                last = slice(len(rows[index][0]) - count, len(rows[index][0]))
                scores[index] = Score(-float(losses[at, last].double().sum()), bool(most_likely[at, last].all()), count)
            self.progress(len(indices))
        return [scores[i] for i in range(len(pairs))]

    def rolling_windows(self, ids: Sequence[int], window: int | None = None) -> list[TokenPair]:
        """A long text cut into windows so that each of its tokens is predicted once.

        The first window starts from :attr:`start_id`, each later one from the last token of the window before it;
        the last window is filled up with context on its left. These are lm-eval's windows.

        Args:
            window: tokens that the model sees at once; None: ``max_seq_len``.

        Raises:
            ConfigError: more than ``max_seq_len``.
        """
        size, windows = window or self.max_seq_len, []
        if size > self.max_seq_len:
            raise ConfigError(f"window={size}: more than max_seq_len={self.max_seq_len}; lower it")
        given = [self.start_id, *ids]  # given[i] stands before ids[i]
        for begin in range(0, len(ids), size):
            end = min(begin + size, len(ids))
            first = max(0, end - size) if begin else 0
            windows.append((given[first : begin + 1], list(ids[begin:end])))
        return windows

    def _row(self, context: list[int], continuation: list[int]) -> tuple[Tensor, Tensor]:
        """Tokens and shifted labels, -100 but for the continuation."""
        if len(continuation) > self.max_seq_len:
            raise ConfigError(
                f"max_seq_len={self.max_seq_len}: a continuation has {len(continuation)} tokens; raise it"
            )
        whole = torch.tensor([*context, *continuation][-(self.max_seq_len + 1) :])
        labels = whole[1:].clone()
        labels[: len(labels) - len(continuation)] = IGNORE_INDEX
        return whole[:-1], labels

    def _batches(self, lengths: list[int]) -> list[list[int]]:
        if not self._padding_matters:
            return plan_batches(lengths, self.max_tokens)
        batches = []
        for length in sorted(set(lengths), reverse=True):
            same = [i for i, n in enumerate(lengths) if n == length]
            batches += [[same[i] for i in part] for part in plan_batches([length] * len(same), self.max_tokens)]
        return batches

    @torch.no_grad()
    def _forward(self, rows: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Losses and whether the label is the most likely token, both ``[B, N]`` on the CPU."""
        tokens = pad_sequence([tokens for tokens, _ in rows], batch_first=True)
        labels = pad_sequence([labels for _, labels in rows], batch_first=True, padding_value=IGNORE_INDEX)
        # No mask: what comes before the padding on the right cannot see it.
        losses, most_likely = self.model(tokens.to(self.device), labels=labels.to(self.device), per_token=True)
        return losses.cpu(), most_likely.cpu()
