"""Batches: contents, the split over ranks, the end of an epoch, and exact resuming."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lrdint_tune.errors import ConfigError
from lrdint_tune.training.data import Batch, BatchLoader, TokenisedDataset
from tests.unit.data.byte_tokenizer import BOS, EOS, PAD, ByteTokenizer, ids

Build = Callable[..., TokenisedDataset]
LENGTHS = [3, 9, 5, 1, 7, 2, 8, 4, 6, 1, 12, 3, 10, 5, 2, 6, 7, 1, 9, 4, 11, 2, 3, 8, 5, 6, 1, 4, 7, 10]


@pytest.fixture
def data(build: Build) -> TokenisedDataset:
    """Thirty rows; row i has LENGTHS[i] response tokens, and its text tells its number."""
    return build([(f"{i:02d}", chr(ord("A") + i) * n) for i, n in enumerate(LENGTHS)])


def loader(dataset: TokenisedDataset, **options: Any) -> BatchLoader:
    return BatchLoader(
        dataset,
        **{
            "batch_size": 1,
            "dp_rank": 0,
            "dp_size": 1,
            "max_seq_len": 24,
            "packed": True,
            "shuffle": True,
            "seed": 0,
            "pad_id": PAD,
            **options,
        },
    )


def steps(dataset: TokenisedDataset, batch_size: int, dp_size: int, accumulation: int, **options: Any) -> list[Any]:
    """Sequences of every optimizer step of two epochs, in the order micro-batch, rank, sequence."""
    ranks = [loader(dataset, batch_size=batch_size, dp_rank=r, dp_size=dp_size, **options) for r in range(dp_size)]
    found = []
    for epoch in range(2):
        for rank in ranks:
            rank.start_epoch(epoch)
        for _ in range(ranks[0].steps_per_epoch(batch_size * dp_size * accumulation)):
            batches = [rank.next_batch() for _ in range(accumulation) for rank in ranks]
            found.append([sequence for batch in batches for sequence in sequences(batch)])
    return found


def sequences(batch: Batch) -> list[Any]:
    """(documents, labels) of each sequence, without its padding."""
    found = []
    for tokens, labels, lengths in zip(batch.tokens.tolist(), batch.labels.tolist(), batch.lengths, strict=True):
        real = [i for i in range(len(tokens)) if tokens[i] != PAD]
        found.append((tokens[: len(real)], labels[: len(real)], lengths[: sum(t == BOS for t in tokens)]))
    return found


# ---------------------------------------------------------------- contents


def test_a_packed_batch_in_full(build: Build) -> None:
    batch = loader(build([("a", "bc"), ("d", "e")]), shuffle=False, max_seq_len=12).next_batch()
    first, second = [BOS, *ids("abc"), EOS], [BOS, *ids("de"), EOS]
    assert batch.tokens.tolist() == [first + second + [PAD] * 3]
    # EOS of the first document does not predict BOS of the second.
    assert batch.labels.tolist() == [[-100, *ids("bc"), EOS, -100] + [-100, ord("e"), EOS, -100] + [-100] * 3]
    assert batch.input_pos.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]]
    assert batch.lengths == [[5, 4, 3]]
    assert batch.row_ids == [0, 1]
    assert (batch.num_input_tokens, batch.num_label_tokens) == (9, 5)
    assert all(tensor.dtype == torch.int64 for tensor in (batch.tokens, batch.labels, batch.input_pos))


def test_no_document_predicts_the_next_one(data: TokenisedDataset) -> None:
    for batch in loader(data, batch_size=3, drop_last=False).epoch_batches():
        for row, lengths in enumerate(batch.lengths):
            ends = torch.tensor(lengths).cumsum(0) - 1
            assert (batch.labels[row, ends] == -100).all()
            starts = torch.tensor([0, *(ends[:-1] + 1).tolist()])
            assert (batch.input_pos[row, starts] == 0).all()
            inside = [j for j in range(batch.labels.shape[1]) if batch.labels[row, j] != -100]
            assert all(batch.labels[row, j] == batch.tokens[row, j + 1] for j in inside)


def test_a_full_sequence_has_no_padding_document(build: Build) -> None:
    batch = loader(build([("a", "bc"), ("a", "bc")]), max_seq_len=10).next_batch()
    assert batch.lengths == [[5, 5]] and PAD not in batch.tokens.tolist()[0]


@pytest.mark.parametrize("packed", [True, False])
def test_counts_and_lengths_of_every_batch(data: TokenisedDataset, packed: bool) -> None:
    seen = []
    for batch in loader(data, batch_size=4, packed=packed, drop_last=False).epoch_batches():
        assert batch.tokens.shape == batch.labels.shape == batch.input_pos.shape
        assert [sum(lengths) for lengths in batch.lengths] == [batch.tokens.shape[1]] * 4
        assert all(length > 0 for lengths in batch.lengths for length in lengths)
        assert batch.num_input_tokens == int((batch.tokens != PAD).sum())
        assert batch.num_label_tokens == int((batch.labels != -100).sum())
        for lengths, positions in zip(batch.lengths, batch.input_pos.tolist(), strict=True):
            assert positions == [position for length in lengths for position in range(length)]
        seen += batch.row_ids
    assert sorted(seen) == list(range(30))


def test_row_ids_are_rows_of_the_source(build: Build) -> None:
    """Also when rows were left out, and in the order of the tokens."""
    rows = [("x" * 30, "y")] + [(f"{i:02d}", "y") for i in range(1, 9)]
    dataset = build(rows, max_seq_len=12, long_rows="truncate")
    for batch in loader(dataset, max_seq_len=12, batch_size=2).epoch_batches():
        texts = bytes(t for t in batch.tokens.flatten().tolist() if t < 256).decode().split("y")
        assert [int(text) for text in texts if text] == batch.row_ids


def test_width_of_unpacked_batches(build: Build) -> None:
    dataset = build([("a", "b" * n) for n in (1, 6, 20)])  # 4, 9 and 23 tokens
    options: dict[str, Any] = {"packed": False, "shuffle": False, "max_seq_len": 64}
    widths = [batch.tokens.shape[1] for batch in loader(dataset, **options).epoch_batches()]
    assert widths == [16, 16, 32]
    batch = loader(dataset, batch_size=3, **options).next_batch()
    assert batch.lengths == [[4, 28], [9, 23], [23, 9]]
    # Not beyond max_seq_len, where RoPE tables and the model end.
    assert loader(dataset, batch_size=3, **{**options, "max_seq_len": 23}).next_batch().lengths == [
        [4, 19],
        [9, 14],
        [23],
    ]


# ---------------------------------------------------------------- ranks and epochs


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("layout", [(4, 1, 1), (1, 4, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)])
def test_same_sequences_per_step_for_every_layout(
    data: TokenisedDataset, packed: bool, layout: tuple[int, int, int]
) -> None:
    """(batch size, ranks, accumulation) with a global batch of 4: the same sequences in the same order."""
    reference = steps(data, 1, 1, 4, packed=packed)
    assert len(reference) == 2 * ((14 if packed else 30) // 4)
    assert steps(data, *layout, packed=packed) == reference


@pytest.mark.parametrize("packed", [True, False])
def test_an_epoch_is_shuffled_anew(data: TokenisedDataset, packed: bool) -> None:
    found = steps(data, 1, 1, 1, packed=packed)
    first, second = found[: len(found) // 2], found[len(found) // 2 :]
    assert sorted(first) == sorted(second) and first != second


def test_order_without_shuffling(data: TokenisedDataset) -> None:
    rows = [batch.row_ids for batch in loader(data, packed=False, shuffle=False).epoch_batches()]
    assert rows == [[i] for i in range(30)]


def test_training_drops_what_does_not_fill_a_batch(data: TokenisedDataset) -> None:
    ranks = [loader(data, packed=False, batch_size=2, dp_rank=r, dp_size=4) for r in range(4)]
    assert [rank.steps_per_epoch(8) for rank in ranks] == [3] * 4
    assert [len(list(rank.epoch_batches())) for rank in ranks] == [3] * 4
    for _ in range(3):
        ranks[0].next_batch()
    with pytest.raises(RuntimeError, match="epoch 0 is over: 24 of 30 sequences were used"):
        ranks[0].next_batch()


@pytest.mark.parametrize("packed", [True, False])
def test_validation_uses_every_row_once_and_all_ranks_do_as_many_forwards(data: TokenisedDataset, packed: bool) -> None:
    options: dict[str, Any] = {"packed": packed, "shuffle": False, "drop_last": False, "batch_size": 3, "dp_size": 4}
    ranks = [list(loader(data, dp_rank=r, **options).epoch_batches()) for r in range(4)]
    assert len({len(batches) for batches in ranks}) == 1
    rows = [row for batches in ranks for batch in batches for row in batch.row_ids]
    assert sorted(rows) == list(range(30))
    batches = [batch for rank in ranks for batch in rank]
    assert sum(batch.num_label_tokens for batch in batches) == data.num_labels
    assert sum(batch.num_input_tokens for batch in batches) == data.num_tokens
    filler = ranks[3][-1]
    assert filler.row_ids == [] and (filler.labels == -100).all() and (filler.tokens == PAD).all()
    assert filler.lengths == [[24 if packed else 16]] * 3
    assert loader(data, **options).steps_per_epoch(12) == len(ranks[0])


def test_validation_leaves_the_position_alone(data: TokenisedDataset) -> None:
    one = loader(data)
    one.next_batch()
    state = one.state_dict()
    assert len(list(one.epoch_batches())) == one.steps_per_epoch(1)
    assert one.state_dict() == state


def test_too_few_sequences_for_one_step(data: TokenisedDataset) -> None:
    with pytest.raises(ConfigError, match="30 sequences, fewer than one global batch of 32; lower batch_size or"):
        loader(data, packed=False).steps_per_epoch(32)


def test_bad_batch_size_and_length(data: TokenisedDataset) -> None:
    with pytest.raises(ConfigError, match="batch_size=0: must be at least 1"):
        loader(data, batch_size=0)
    with pytest.raises(ConfigError, match=r"row 10 of .*: 16 tokens, more than max_seq_len=15; give dataset"):
        loader(data, max_seq_len=15)


def test_vocabulary_check_includes_the_padding(data: TokenisedDataset) -> None:
    loader(data).check_vocabulary(259)
    with pytest.raises(ConfigError, match="token id 257 is outside the model's vocabulary of 257"):
        loader(data).check_vocabulary(257)
    with pytest.raises(ConfigError, match="pad_id=258: outside the model's vocabulary of 258"):
        loader(data).check_vocabulary(258)


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("layout", [(4, 1, 1), (2, 2, 1), (1, 2, 2)])
@pytest.mark.parametrize("stop", [(0, 0), (0, 2), (1, 1)])
def test_resuming_at_any_step_continues_exactly(
    data: TokenisedDataset, packed: bool, layout: tuple[int, int, int], stop: tuple[int, int]
) -> None:
    """Stop after `step` steps of 4 sequences in `epoch`, and resume with another layout of the same global batch."""
    epoch, step = stop
    before = loader(data, packed=packed, batch_size=4)
    before.start_epoch(epoch)
    for _ in range(step):
        before.next_batch()
    state = json.loads(json.dumps(before.state_dict()))
    rest = [sequences(before.next_batch()) for _ in range(before.steps_per_epoch(4) - step)]

    batch_size, dp_size, accumulation = layout
    ranks = [loader(data, packed=packed, batch_size=batch_size, dp_rank=r, dp_size=dp_size) for r in range(dp_size)]
    for rank in ranks:
        rank.load_state_dict(state)
        assert (rank.epoch, rank.position) == (epoch, 4 * step)
        assert rank.state_dict() == state
    for expected in rest:
        batches = [rank.next_batch() for _ in range(accumulation) for rank in ranks]
        assert [sequence for batch in batches for sequence in sequences(batch)] == expected


def test_state_is_the_same_on_all_ranks(data: TokenisedDataset) -> None:
    ranks = [loader(data, dp_rank=r, dp_size=2) for r in range(2)]
    for rank in ranks:
        rank.next_batch()
    assert ranks[0].state_dict() == ranks[1].state_dict()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"seed": 1}, r"the checkpoint has seed 0, this run has 1"),
        ({"packed": False}, r"the checkpoint has packed True, this run has False"),
        ({"shuffle": False}, r"the checkpoint has shuffle True, this run has False"),
        ({"max_seq_len": 32}, r"the checkpoint has max_seq_len 24, this run has 32"),
    ],
)
def test_state_of_other_settings_is_refused(data: TokenisedDataset, change: dict[str, Any], expected: str) -> None:
    other = loader(data, **change)
    with pytest.raises(ConfigError, match=rf"^resume: {expected}; restore .*, or start without resuming$"):
        other.load_state_dict(loader(data).state_dict())
    assert (other.epoch, other.position) == (0, 0)


def test_state_of_another_dataset_is_refused(build: Build, data: TokenisedDataset) -> None:
    state = loader(data).state_dict()
    rows = [(f"{i:02d}", chr(ord("A") + i) * n) for i, n in enumerate(LENGTHS)]
    with pytest.raises(ConfigError, match=r"the checkpoint has data of dataset .* \(rows\) 30, this run has 29"):
        loader(build(rows[:-1])).load_state_dict(state)
    changed = [*rows[:-1], (rows[-1][0], "x" + rows[-1][1])]
    with pytest.raises(ConfigError, match=r"\(tokens\)"):
        loader(build(changed)).load_state_dict(state)
    same_lengths = [*rows[:-1], (rows[-1][0], "x" + rows[-1][1][1:])]
    with pytest.raises(ConfigError, match=r"\(digest\)"):
        loader(build(same_lengths)).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"\(digest\)"):
        loader(build(rows, train_on_input=True)).load_state_dict(state)
    loader(build(rows)).load_state_dict(state)


def test_state_of_another_plan_is_refused(data: TokenisedDataset) -> None:
    state = {**loader(data).state_dict(), "plan": 1}
    with pytest.raises(ConfigError, match="resume: the checkpoint has pack plan 1, this run computes"):
        loader(data).load_state_dict(state)


def test_equal_text_in_another_file_is_the_same_data(build: Build) -> None:
    rows = [("a", "b"), ("c", "d")]
    first = build(rows, ByteTokenizer())
    assert build(rows, num_rows=2).digest == first.digest
