"""The text on which attention is looked at: always the same, so that runs and steps can be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrdint_tune.errors import ConfigError
from lrdint_tune.training.data.encode import Encoder

PROBE_TEXT = """\
The ferry left the harbour at seven in the morning with forty passengers, two bicycles and a crate of oranges. Clara
stood at the rail and watched the lighthouse become small. She had promised her brother to bring back the blue notebook
that their grandfather kept in the kitchen drawer, between the scissors and the old maps. Nobody had opened that drawer
for eleven years.

"You will not find it," the captain had said. "Houses by the sea forget what is put into them."

But Clara believed in drawers. When the island came into view, first as a grey line and then as a row of white walls,
she counted the chimneys until she found the crooked one. The path from the pier went past the school, the bakery and
the well. A dog followed her as far as the well and then thought better of it.

The key was still under the third stone. Inside, the kitchen smelled of salt and dust, and the clock above the stove had
stopped at twenty past four. She pulled at the drawer. It did not move. She pulled again, with both hands, and it came
out so suddenly that scissors, maps and spoons fell to the floor. Among them lay the notebook. It was not blue at all;
it was green, and someone had written on the first page: "For Clara, who will look for something blue."

She laughed, sat down on the floor and began to read. Her grandfather had written down everything that he had repaired
in fifty years: nets, radios, roofs, one piano. Beside each entry stood a date, a price and a short remark. "Piano of
the school, 12 March, no charge. It will never be in tune, but now it is out of tune everywhere by the same amount."

At five o'clock the ferry blew its horn. Clara put the notebook into her coat, the scissors and the maps back into the
drawer, and the key under the third stone. Then she walked past the well, the bakery and the school to the pier, where
the captain was waiting with the crate, which was empty now. "Well?" he asked. "Did you find the blue notebook?"

"No," said Clara. "I found the green one."
"""
MULTIPLE = 16  # float8 products want rows in sixteens


def probe_tokens(tokenizer: Any, *, max_tokens: int, text_file: str | None = None) -> Tensor:
    """int64 ``[1, N]``: the first tokens of the text, after BOS where the tokenizer has one; ``N`` is at most
    ``max_tokens``, and a multiple of 16 if it is not less than that.

    Args:
        tokenizer: a torchtune tokenizer.
        max_tokens: at least 1.
        text_file: UTF-8 text instead of the built-in one.

    Raises:
        ConfigError: the file cannot be read or has no token.
    """
    text, encoder = PROBE_TEXT, Encoder(tokenizer, None, False)
    if text_file is not None:
        try:
            text = Path(text_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise ConfigError(f"text_file={text_file!r}: cannot be read ({reason}); give a text file") from None
    ids = (encoder.prefix + encoder.piece(text))[:max_tokens]
    if not encoder.piece(text[:1000]):
        raise ConfigError(f"text_file={text_file!r}: holds no text; give a text file, or null for the built-in one")
    length = len(ids) // MULTIPLE * MULTIPLE or len(ids)
    return torch.tensor([ids[:length]])
