# SPDX-License-Identifier: Apache-2.0
"""Text as tokens, cut into pieces."""
from dataclasses import dataclass

import torch

HELD_BACK_TOKENS = 2048       # to check plans on
TEXT_THAT_SPARES_THEM = 8192
TOKENS_MIN = 256


@dataclass(frozen=True)
class Text:
    tokens: torch.Tensor  # [n] i64
    opening: int | None   # token that opens a text where the model wants one

    def piece(self, first, n):
        """n tokens from `first` on, opened."""
        piece = self.tokens[first:first + n].clone()
        if self.opening is not None:
            piece[0] = self.opening
        return piece

    def spread(self, n_pieces, n):
        """n_pieces pieces of n tokens, evenly over the text from its first token to its last."""
        room = len(self.tokens) - n
        return [self.piece(room * i // max(n_pieces - 1, 1), n) for i in range(n_pieces)]


def read_text(tokenizer, texts):
    tokens = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    if len(tokens) < TOKENS_MIN:
        raise ValueError(f"the texts have {len(tokens)} tokens, at least {TOKENS_MIN} are needed")
    begins = tokenizer("a")["input_ids"][:1]
    bos = getattr(tokenizer, "bos_token_id", None)
    return Text(torch.tensor(tokens), bos if begins == [bos] else None)


def hold_back(text):
    """What calibration may see, and what plans are checked on: None where the text is too short to spare any."""
    if len(text.tokens) < TEXT_THAT_SPARES_THEM:
        return text, None
    return (Text(text.tokens[:-HELD_BACK_TOKENS], text.opening),
            Text(text.tokens[-HELD_BACK_TOKENS:], text.opening))
