"""Questions of a benchmark that stand in training data: pictures by their pixels, text by words.

A picture is the same where its decoded pixels are; a candidate where the difference hash (64 bits)
is near. A text is found where half of its sequences of 13 words are; a question of fewer words
where the whole text is equal and so is its picture.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable
from collections.abc import Sequence as List
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from ovr_fast.config import DataSource
from ovr_fast.data.messages import question_of
from ovr_fast.data.prompts import read_source
from ovr_fast.evaluation.question import Question
from ovr_fast.records import ImageFile

WORDS = 13
SHARE = 0.5
NEAR_BITS = 6
_WORD = re.compile(r"\w+")


@dataclass(slots=True)
class Training:
    """What training data holds."""

    pixels: set[str] = field(default_factory=set)
    hashes: list[int] = field(default_factory=list)
    sequences: set[int] = field(default_factory=set)  # of WORDS words
    texts: set[str] = field(default_factory=set)
    rows: int = 0

    def add(self, text: str, images: Iterable[ImageFile]) -> None:
        """One more row."""
        self.rows += 1
        words = words_of(text)
        self.texts.add(" ".join(words))
        self.sequences.update(_sequences(words))
        for image in images:
            pixels, near = fingerprints(image)
            if pixels not in self.pixels:
                self.pixels.add(pixels)
                self.hashes.append(near)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Why a question counts as seen."""

    question: str
    picture: str  # "same", "near" (a candidate, to be looked at), or ""
    text_share: float  # of its sequences of words; 1 of a short text that is equal

    @property
    def seen(self) -> bool:
        """Whether it is left out of the clean questions: a near picture alone is not enough."""
        return self.picture == "same" or self.text_share >= SHARE


def read_training(paths: List[str]) -> Training:
    """The rows of training files, as the trainer reads them.

    Raises:
        DataError: a file cannot be read.
    """
    training = Training()
    for path in paths:
        for prompt in read_source(DataSource(path=path), need=None):
            training.add(question_of(prompt.messages), prompt.images)
    return training


def find(questions: List[Question], training: Training) -> list[Found]:
    """The questions that training data holds, or may."""
    hashes = np.array(training.hashes, dtype=np.uint64)
    found = []
    for question in questions:
        picture = ""
        for image in question.images:
            pixels, near = fingerprints(image)
            if pixels in training.pixels:
                picture = "same"
            elif not picture and len(hashes):
                distance = np.bitwise_count(hashes ^ np.uint64(near))
                picture = "near" if int(distance.min()) <= NEAR_BITS else ""
        words = words_of(question.text)
        sequences = _sequences(words)
        if sequences:
            share = sum(s in training.sequences for s in sequences) / len(sequences)
        else:
            equal = bool(words) and " ".join(words) in training.texts
            share = 1.0 if equal and (picture == "same" or not question.images) else 0.0
        if picture or share >= SHARE:
            found.append(Found(question=question.id, picture=picture, text_share=share))
    return found


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers."""
    return _WORD.findall(text.lower())


def _sequences(words: List[str]) -> list[int]:
    spans = (" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1))
    return [int.from_bytes(hashlib.blake2b(s.encode(), digest_size=8).digest()) for s in spans]


def fingerprints(image: ImageFile) -> tuple[str, int]:
    """SHA-256 of the decoded pixels, and the 64-bit difference hash: whether each of 8 x 8 parts is
    brighter than its left neighbour."""
    with Image.open(io.BytesIO(image.data)) as opened:
        rgb = opened.convert("RGB")
    exact = hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).hexdigest()
    small = np.asarray(rgb.convert("L").resize((9, 8), Image.Resampling.BILINEAR), dtype=int)
    bits = (small[:, 1:] > small[:, :-1]).ravel()
    return exact, int("".join("1" if bit else "0" for bit in bits), 2)
