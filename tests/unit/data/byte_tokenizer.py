"""A tokenizer whose ids can be computed by eye: UTF-8 bytes, BOS 256, EOS 257, padding 258."""

BOS, EOS, PAD = 256, 257, 258


class ByteTokenizer:
    """``encode`` as torchtune's tokenizers have it. ``shift`` changes the vocabulary, ``forced`` adds BOS always."""

    def __init__(self, shift: int = 0, forced: bool = False) -> None:
        self.bos_id, self.eos_id, self.pad_id = BOS, EOS, PAD
        self.vocab_size = 259
        self.shift, self.forced = shift, forced
        if forced:
            self.hf_adds_bos = True

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        ids = [(byte + self.shift) % 256 for byte in text.encode()]
        return [BOS] * (add_bos or self.forced) + ids + [EOS] * add_eos


def ids(text: str) -> list[int]:
    return list(text.encode())
