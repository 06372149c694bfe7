"""Chat messages to token ids, with the placeholders of pictures expanded."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ovr_fast.batch import Picture
from ovr_fast.data.vision import PictureProcessor
from ovr_fast.torchvision_ops import declare_if_broken


class ChatEncoder:
    """The model folder's tokenizer, chat template and image processor.

    Raises:
        ValueError: the folder has no tokenizer or no chat template.
    """

    def __init__(self, folder: str | Path, *, image_token_id: int) -> None:
        declare_if_broken()
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        template = Path(folder) / "chat_template.jinja"
        if not self.tokenizer.chat_template and template.is_file():
            self.tokenizer.chat_template = template.read_text()
        if not self.tokenizer.chat_template:
            raise ValueError(f"{folder} has no chat template (tokenizer_config.json or .jinja)")
        self.pictures = PictureProcessor(folder)
        self.image_token_id = image_token_id
        self.end_token_id = self.tokenizer.convert_tokens_to_ids("<|im_end|>")

    def encode(
        self,
        messages: tuple[dict, ...] | list[dict],
        pictures: tuple[Picture, ...],
        *,
        generation_prompt: bool,
    ) -> np.ndarray:
        """Token ids [n] int64 of the rendered conversation.

        Raises:
            ValueError: the conversation has another number of picture places than pictures.
        """
        text = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation_prompt
        )
        return self.expand(self.tokenizer.encode(text, add_special_tokens=False), pictures)

    def expand(self, token_ids: list[int], pictures: tuple[Picture, ...]) -> np.ndarray:
        """Replace each placeholder by as many as its picture has visual tokens."""
        tokens = np.asarray(token_ids, dtype=np.int64)
        holes = tokens == self.image_token_id
        if int(holes.sum()) != len(pictures):
            raise ValueError(f"{int(holes.sum())} picture places for {len(pictures)} pictures")
        repeats = np.ones(len(tokens), dtype=np.int64)
        repeats[holes] = [self.pictures.visual_tokens(picture) for picture in pictures]
        return np.repeat(tokens, repeats)

    def encode_text(self, text: str) -> np.ndarray:
        """Token ids [n] int64 of plain text; special tokens in it are recognised."""
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)

    def decode(self, tokens: np.ndarray) -> str:
        """Text of token ids, without special tokens."""
        return str(self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True))
