"""What may attend to what: documents, padding and caches, normalised once per forward.

Every method asks the same two questions, "which keys may a row see" and "where does its document begin". They are
answered here, in one place, so that causality, packing and padding hold for all methods or for none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.utils.rnn import pad_sequence

from lrdint_tune.attention.lazy import cached_property
from lrdint_tune.attention.prefix_mean import PrefixMean
from lrdint_tune.attention.sequence_shard import SequenceShard


class DocumentMask:
    """Block-diagonal causal mask of a packed batch, kept as document lengths instead of an ``N x N`` tensor.

    Accepted wherever a ``mask`` is accepted. Token ``i`` may attend to token ``j`` iff ``j <= i`` and both lie in the
    same document.

    Args:
        lengths: for each of the ``B`` rows the lengths of its documents, in order; every row sums to the same ``N``.

    Raises:
        ValueError: if there is no row, a length is not positive, or the rows do not sum to the same ``N``.
    """

    def __init__(self, lengths: Sequence[Sequence[int]]) -> None:
        self.lengths = tuple(tuple(int(n) for n in row) for row in lengths)
        totals = {sum(row) for row in self.lengths}
        if len(totals) != 1 or any(n <= 0 for row in self.lengths for n in row):
            raise ValueError(f"document lengths must be positive and sum to one N in every row; got {self.lengths}")
        self.num_tokens = totals.pop()

    def __repr__(self) -> str:
        return f"DocumentMask(lengths={self.lengths})"

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def is_plain_causal(self) -> bool:
        """True when every row is one single document."""
        return all(len(row) == 1 for row in self.lengths)

    def spans(self) -> list[list[tuple[int, int]]]:
        """Per row the ``(begin, end)`` token span of each document."""
        rows = []
        for lengths in self.lengths:
            ends = torch.tensor(lengths).cumsum(0).tolist()
            rows.append([(end - n, end) for end, n in zip(ends, lengths, strict=True)])
        return rows

    def document_ids(self, device: torch.device | str = "cpu") -> Tensor:
        """int64 ``[B, N]``: the index of each token's document within its row."""
        rows = [torch.repeat_interleave(torch.arange(len(r)), torch.tensor(r)) for r in self.lengths]
        return torch.stack(rows).to(device)

    def input_pos(self, device: torch.device | str = "cpu") -> Tensor:
        """int64 ``[B, N]``: positions that restart at 0 with each document."""
        rows = [torch.cat([torch.arange(n) for n in r]) for r in self.lengths]
        return torch.stack(rows).to(device)

    def to_dense(self, device: torch.device | str = "cpu") -> Tensor:
        """bool ``[B, N, N]``, True where attention is allowed."""
        ids = self.document_ids(device)
        causal = torch.ones(self.num_tokens, self.num_tokens, dtype=torch.bool, device=device).tril()
        return (ids[:, :, None] == ids[:, None, :]) & causal


MaskType: TypeAlias = "Tensor | BlockMask | DocumentMask | None"


class Documents(NamedTuple):
    """The documents that the rows of a call belong to.

    of_row: int64 ``[B or 1, N]``, each row's document. begin, end: int64 ``[B or 1, docs]``, the document's first key
    and the key after its last.
    """

    of_row: Tensor
    begin: Tensor
    end: Tensor


class LengthGroup(NamedTuple):
    """``T`` documents of about one length.

    documents: int64 ``[T, 3]``, of each the row of the batch, its first key and the key after its last. positions: how
    many of a document's positions are looked at.
    """

    documents: Tensor
    positions: int


class Layout:
    """A mask in normal form, shared by all layers of one forward.

    Notation: ``N`` query rows of this call, ``M`` keys they may see (``M = offset + N`` while decoding from a cache,
    else ``M = N``).

    Args:
        mask: None (causal), bool ``[B, N, M]`` (True = may attend), a ``BlockMask`` or a :class:`DocumentMask`.
        input_pos: int ``[B, N]`` or ``[N]`` or None. Needed with a ``BlockMask``, which does not show where documents
            begin.
        num_queries: ``N``.
        batch_size: ``B``; when given, the mask must have that many rows (a dense mask may have one for all).
        offset: tokens already in the KV cache.
        device: where masks are built.
        shard: None, or this process's part of the sequence. ``N`` is then the length of that part, and ``offset`` where
            it begins: the keys are those of this part and of all before it. ``mask`` is that of the whole sequence.

    A document begins at a row that may see no key before itself (dense mask) or whose ``input_pos`` is 0
    (``BlockMask``).

    Attributes:
        causal: False only in layouts of encoders, which the models of this package are not.

    Raises:
        ValueError: if the mask's shape does not fit ``N`` and the number of keys.
    """

    causal = True

    def __init__(
        self,
        mask: MaskType,
        input_pos: Tensor | None,
        *,
        num_queries: int,
        batch_size: int | None = None,
        offset: int = 0,
        device: torch.device | str = "cpu",
        shard: SequenceShard | None = None,
    ) -> None:
        whole = num_queries
        if shard is not None:
            offset, whole = shard.rank * num_queries, shard.size * num_queries
            if isinstance(mask, BlockMask):
                raise ValueError("a BlockMask cannot be split over context-parallel processes; pass a DocumentMask")
            if isinstance(mask, Tensor) and mask.dim() == 3 and mask.shape[1] == whole:
                mask = shard.take(mask, 1)
            if input_pos is None and not isinstance(mask, DocumentMask):
                input_pos = torch.arange(offset, offset + num_queries, device=device)[None]
        self.shard = shard
        self.num_queries = num_queries
        self.offset = offset
        self.num_keys = offset + num_queries
        self.device = torch.device(device)
        self.input_pos = input_pos
        self.documents: DocumentMask | None = None
        self._dense: Tensor | None = None  # bool [B or 1, N, M]
        self._block: BlockMask | None = None
        self._prefix_means: dict[torch.dtype, PrefixMean] = {}
        self.length_groups: dict[int, list[LengthGroup]] = {}  # by the longest group, see static_map.py

        rows = (
            mask.batch_size if isinstance(mask, DocumentMask) else mask.shape[0] if isinstance(mask, Tensor) else None
        )
        shared = rows == 1 and isinstance(mask, Tensor)
        if batch_size is not None and rows is not None and rows != batch_size and not shared:
            raise ValueError(f"mask has {rows} rows but the input has {batch_size}; give one per sequence")
        if isinstance(mask, DocumentMask):
            if mask.num_tokens != whole or (offset and shard is None):
                raise ValueError(
                    f"DocumentMask covers {mask.num_tokens} tokens but the input has {whole} (cached: {offset}); "
                    "pass a dense mask while decoding from a cache"
                )
            if input_pos is None:
                self.input_pos = self._own_rows(mask.input_pos(device))
            if not mask.is_plain_causal:
                self.documents = mask
        elif isinstance(mask, BlockMask):
            self._block = mask
        elif mask is not None:
            if mask.dtype != torch.bool or mask.dim() != 3 or mask.shape[1] != num_queries:
                raise ValueError(
                    f"mask must be bool [B, {num_queries}, keys], True where attention is allowed; "
                    f"got {mask.dtype} {list(mask.shape)}"
                )
            if mask.shape[2] < self.num_keys or (
                offset == 0 and mask.shape[2] != whole and bool(mask[..., num_queries:].any())
            ):
                raise ValueError(f"mask has {mask.shape[2]} key columns but {self.num_keys} keys exist")
            # Columns past the held keys carry nothing: a cache may be longer than what it holds, and of a sequence
            # shared by several processes these are the keys of later ones.
            self._dense = mask[:, :, : self.num_keys]
        elif offset and shard is None:
            positions = torch.arange(num_queries, device=device)[:, None] + offset
            self._dense = (torch.arange(self.num_keys, device=device)[None, :] <= positions)[None]

    def _own_rows(self, t: Tensor) -> Tensor:
        """Of ``[B, tokens, ...]`` of the whole sequence the rows of this call."""
        return t[:, self.offset : self.offset + self.num_queries]

    def part(self, begin: int, end: int) -> Layout:
        """Rows ``begin`` to ``end`` of a whole sequence, as a call sees them that has the earlier rows in its cache;
        beyond that it knows where each document ends.

        Raises:
            ValueError: of a ``BlockMask``, an encoder's layout, or one that is part of a sequence itself.
        """
        if self._block is not None or self.shard is not None or self.offset or not self.causal:
            raise ValueError("only whole causal sequences without a BlockMask can be taken apart")
        rows = slice(begin, end)
        documents = self.documents_of_rows
        if self._dense is not None:
            mask = self._dense[:, rows, :end]
        else:
            keys = torch.arange(end, device=self.device)
            first = documents.begin.gather(1, documents.of_row[:, rows])  # [B or 1, rows]
            mask = (keys >= first[..., None]) & (keys <= keys[rows, None])
        positions = torch.arange(begin, end, device=self.device)[None]
        if self.input_pos is not None:
            positions = self.input_pos.view(-1, self.num_queries)[:, rows]
        part = Layout(mask, positions, num_queries=end - begin, offset=begin, device=self.device)
        part.documents_of_rows = documents._replace(of_row=documents.of_row[:, rows])
        return part

    @property
    def is_plain_causal(self) -> bool:
        """True when a fused kernel's own causal flag says all there is to say."""
        return self._is_one_document and not self.offset

    @property
    def _is_one_document(self) -> bool:
        return self._dense is None and self._block is None and self.documents is None

    @property
    def is_block_mask(self) -> bool:
        return self._block is not None

    @cached_property
    def valid(self) -> Tensor | None:
        """bool ``[B or 1, N]``, False for rows that may see no key (padding); None when every row sees at least itself.

        A ``BlockMask`` is asked whether the row may see itself.
        """
        if self._dense is not None:
            return self._dense.any(-1)
        if self._block is None:
            return None
        allowed, head = self._block.mask_mod, torch.zeros((), dtype=torch.int64, device=self.device)
        see_itself = torch.vmap(torch.vmap(lambda b, i: allowed(b, head, i, i), (None, 0)), (0, None))
        rows = torch.arange(self.num_queries, device=self.device)
        return see_itself(torch.arange(self._block.shape[0], device=self.device), rows)

    @cached_property
    def counted(self) -> Tensor:
        """bool ``[B or 1, N]``, True for the rows of a document, False for padding."""
        if self.valid is not None:
            return self.valid
        return torch.ones(1, self.num_queries, dtype=torch.bool, device=self.device)

    @cached_property
    def document_starts(self) -> Tensor:
        """bool ``[B or 1, N]``, True where a document begins."""
        if self._dense is not None:
            first_key = self._dense.to(torch.uint8).argmax(-1)
            rows = torch.arange(self.num_queries, device=self._dense.device) + self.offset
            return (first_key == rows) & self._dense.any(-1)
        if self._block is not None:
            if self.input_pos is None:
                raise ValueError(
                    "mask is a BlockMask and input_pos is None: pass input_pos (restarting at 0 with each document), "
                    "a BlockMask alone does not show where documents begin"
                )
            return (self.input_pos == 0).view(-1, self.num_queries)
        if self.documents is not None:
            return self._own_rows(self.documents.input_pos(self.device)) == 0
        return (torch.arange(self.num_queries, device=self.device) + self.offset == 0)[None]

    def spans_of_rows(self) -> list[list[tuple[int, int, int, int]]]:
        """For a :class:`DocumentMask`: of each document that has rows in this call these rows, first and after the
        last, and the keys they may see, first of the document and after the last row's own."""
        assert self.documents is not None
        spans = []
        for row in self.documents.spans():
            own = ((begin, max(begin, self.offset), min(end, self.num_keys)) for begin, end in row)
            spans.append([(lo - self.offset, hi - self.offset, begin, hi) for begin, lo, hi in own if lo < hi])
        return spans

    @cached_property
    def documents_of_rows(self) -> Documents:
        """Where each row's document lies among the keys."""
        rows = torch.arange(self.num_queries, device=self.device)[None] + self.offset
        if self._is_one_document:
            limits = torch.tensor([[0], [self.num_keys]], device=self.device)
            return Documents(torch.zeros_like(rows), limits[:1], limits[1:])
        if self.documents is not None:
            lengths = pad_sequence([torch.tensor(row) for row in self.documents.lengths], batch_first=True)
            end = lengths.cumsum(1).to(self.device)
            begin = end - lengths.to(self.device)
            of_row = self._own_rows(self.documents.document_ids(self.device))
            return Documents(of_row, begin.clamp(max=self.num_keys), end.clamp(max=self.num_keys))
        index = self.document_starts.cumsum(1)  # 0: a document that began before this call
        if self._dense is not None:
            first = self._dense.to(torch.uint8).argmax(-1)
        else:  # it begins in this call: the last row that begins one
            first = torch.where(self.document_starts, rows, 0).cummax(1).values
        shape = (index.shape[0], max(int(index.max()), 1) + 1)  # never 1, which a compiler would take for a constant
        hidden = ~self.counted
        begin = torch.zeros(shape, dtype=torch.int64, device=self.device)
        begin = begin.scatter_reduce(1, index, first.masked_fill(hidden, 0), "amax")
        end = torch.zeros(shape, dtype=torch.int64, device=self.device)
        end = end.scatter_reduce(1, index, (rows + 1).expand_as(index).masked_fill(hidden, 0), "amax")
        return Documents(index, begin, end)

    def prefix_mean(self, dtype: torch.dtype) -> PrefixMean:
        """The prefix mean over the rows of each document, in float32 or float64; for calls without a cache."""
        if dtype not in self._prefix_means:
            self._prefix_means[dtype] = PrefixMean(self.document_starts, self.counted, dtype, self.shard)
        return self._prefix_means[dtype]

    @cached_property
    def dense(self) -> Tensor:
        """bool ``[B or 1, 1, N, M]``. A row without any allowed key sees key 0, to keep its softmax finite: its output
        is zeroed."""
        if self._block is not None:
            raise ValueError("a BlockMask needs attention_backend flex (or auto)")
        if self.documents is not None:
            return self._own_rows(self.documents.to_dense(self.device))[:, None, :, : self.num_keys]
        if self._dense is None:
            square = torch.ones(self.num_queries, self.num_keys, dtype=torch.bool, device=self.device)
            return square.tril(self.offset)[None, None]
        assert self.valid is not None
        column = torch.arange(self.num_keys, device=self._dense.device) == 0
        return (self._dense | (~self.valid[..., None] & column))[:, None]

    def prepare(self, dtype: torch.dtype, *, flex: bool, dense: bool) -> None:
        """Derive all that layers read from here now, as tensors, and forget the lengths of documents.

        For compiled layers: they would break the graph at what depends on the data, and be compiled again for each new
        set of lengths.

        Args:
            dtype: of the layers' input.
            flex: whether the mask goes to FlexAttention.
            dense: whether the dense mask is read even where a kernel's own causal flag would do.
        """
        for name in ("valid", "counted", "document_starts"):
            getattr(self, name)
        self.prefix_mean(torch.promote_types(dtype, torch.float32))
        _, *limits = self.documents_of_rows
        if not self.is_plain_causal:  # a number of documents that changes from batch to batch
            for limit in limits:
                torch._dynamo.maybe_mark_dynamic(limit, 1)
        if flex:
            self._block = self.block_mask
        elif dense or not self.is_plain_causal:
            mask = self.dense
            if self.documents is not None:
                self._dense = mask[:, 0]
        self.documents = None

    @cached_property
    def block_mask(self) -> BlockMask:
        """The mask as FlexAttention wants it, made once per forward (torch makes it from a dense one)."""
        if self._block is not None:
            return self._block
        if self.documents is not None:
            ids, offset = self.documents.document_ids(self.device), self.offset

            def same_document(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return (ids[b, i + offset] == ids[b, j]) & (j <= i + offset)

            return create_block_mask(
                same_document, ids.shape[0], None, self.num_queries, self.num_keys, device=str(self.device)
            )
        if self._dense is not None:
            dense = self.dense
            shared = dense.shape[0] == 1

            def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return dense[0 if shared else b, 0, i, j]

            batch = None if shared else dense.shape[0]
            return create_block_mask(allowed, batch, None, self.num_queries, self.num_keys, device=str(self.device))

        offset = self.offset

        def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return j <= i + offset

        return create_block_mask(causal, None, None, self.num_queries, self.num_keys, device=str(self.device))
