"""Chat messages to token ids, with image placeholders expanded."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from ovr_fast.data.errors import DataError
from ovr_fast.data.images import ImageProcessor
from ovr_fast.data.positions import MRopeCache
from ovr_fast.errors import ModelError
from ovr_fast.records import ImageFile
from ovr_fast.torchvision_ops import declare_if_broken


class ChatTemplate:
    """The model folder's tokenizer, chat template and image processor.

    Raises:
        ModelError: the folder has no tokenizer, image processor or chat template.
    """

    def __init__(self, folder: str | Path, *, image_token_id: int) -> None:
        declare_if_broken()
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            self.image_processor = ImageProcessor(folder)
        except Exception as error:  # transformers raises many types for a folder without its files
            raise ModelError(
                f"{folder}: no tokenizer or image processor that transformers can load "
                f"({type(error).__name__}: {error})"
            ) from error
        template = Path(folder) / "chat_template.jinja"
        if not self.tokenizer.chat_template and template.is_file():
            self.tokenizer.chat_template = template.read_text()
        if not self.tokenizer.chat_template:
            raise ModelError(f"{folder} has no chat template (tokenizer_config.json or .jinja)")
        self._lock = threading.Lock()  # fast tokenizers fail where two threads meet in one
        self.folder, self.image_token_id = Path(folder), image_token_id
        self.end_token_id = self.tokenizer.convert_tokens_to_ids("<|im_end|>")

    def encode(
        self,
        messages: tuple[dict, ...] | list[dict],
        images: tuple[ImageFile, ...],
        *,
        generation_prompt: bool,
    ) -> np.ndarray:
        """Token ids [n] int64 of the rendered conversation.

        Raises:
            DataError: the conversation has another number of image parts than images.
        """
        return self.expand(self.render(messages, generation_prompt=generation_prompt), images)

    def render(
        self, messages: tuple[dict, ...] | list[dict], *, generation_prompt: bool
    ) -> list[int]:
        """Token ids of the rendered conversation, with one placeholder an image."""
        with self._lock:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt
            )
            return self.tokenizer.encode(text, add_special_tokens=False)

    def expand(self, token_ids: list[int], images: tuple[ImageFile, ...]) -> np.ndarray:
        """Repeat each image placeholder as often as its image has visual tokens."""
        tokens = np.asarray(token_ids, dtype=np.int64)
        placeholders = tokens == self.image_token_id
        if int(placeholders.sum()) != len(images):
            raise DataError(
                f"{int(placeholders.sum())} image placeholders for {len(images)} images"
            )
        repeats = np.ones(len(tokens), dtype=np.int64)
        repeats[placeholders] = [self.image_processor.visual_tokens(image) for image in images]
        return np.repeat(tokens, repeats)

    def encode_text(self, text: str) -> np.ndarray:
        """Token ids [n] int64 of plain text; special tokens in it are recognised."""
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)

    def decode(self, tokens: np.ndarray) -> str:
        """Text of token ids, without special tokens."""
        return str(self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True))

    def mrope_cache(self) -> MRopeCache:
        """An empty cache of M-RoPE positions, for one step's sequences."""
        return MRopeCache(self.image_processor, self.image_token_id)
