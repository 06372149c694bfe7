"""Chat messages, from every way in which files write them."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from typing import Any

from ovr_fast.data.errors import DataError

IMAGE_MARK = "<image>"
ROLES = ("system", "user", "assistant")
_FROM = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bot": "assistant", "system": "system",
}  # fmt: skip
_LIKE_TURNS = re.compile(r"\s*\[\s*\{")
_PYTHON_TURNS = re.compile(r"\s*\[\s*\{\s*'(?:role|content|from|value)'\s*:")
_NUMBERED_MARK = re.compile(r"<image[ _]?\d+>")
_UNREAD_KEYS = (
    "reasoning_content", "reasoning", "thinking", "images", "image", "videos", "video", "audio",
    "audios", "function_call", "tool_calls",
)  # fmt: skip
"""Of a turn: what nobody reads, and would be missed."""
_SWITCHES = ("loss", "weight", "train", "trainable")
"""Of a turn: whether others train it; only those that say yes are followed."""
_REFUSED = ("video", "audio", "input_audio", "tool_call", "tool_use", "tool_result", "function")
_REFUSED_MARK = re.compile(r"<(video|audio)>")
_SPECIAL = re.compile(
    r"<\|(?:im_start|im_end|endoftext|image_pad|video_pad|vision_start|vision_end|vision_pad)\|>"
)
"""Tokens by which the chat template and the vision encoder know where things begin and end."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order; content is text, or parts of which images are ``{"type": "image"}``."""

    messages: tuple[dict[str, Any], ...]
    images: tuple[Any, ...]  # as the file has them, in the order of their parts


def read_conversation(turns: Any, images: Any, *, system: Any = None) -> Conversation:
    """Messages with a place for each image, and the images.

    Args:
        turns: text; or messages with role and content, or from and value; either also as JSON text.
        images: the row's images: a list, one, or JSON text of a list; empty where parts of the
            messages hold them.
        system: text of a system message to put first.

    Raises:
        DataError: anything else; says what, without the place.
    """
    if isinstance(turns, str) and _LIKE_TURNS.match(turns):
        turns = _json_messages(turns)
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    if not isinstance(turns, list | tuple) or not turns:
        raise DataError(f"the prompt is {_kind(turns)}, neither text nor a list of chat messages")
    held = _listed(images)
    own: list[Any] = []  # images that stand in the messages
    messages = [_message(turn, own, bool(held)) for turn in turns]
    if system is not None:
        if not isinstance(system, str):
            raise DataError(f"the system message is {_kind(system)}, not text")
        if system and messages[0]["role"] == "system":
            raise DataError("two system messages, one of them in a column; leave one")
        if system:
            part = {"type": "text", "text": checked(system)}
            messages.insert(0, {"role": "system", "content": [part]})
    places = sum(part["type"] == "image" for m in messages for part in m["content"])
    given = [image for image in own if image is not None]
    if given and len(given) < len(own):
        raise DataError(f"{len(given)} of {len(own)} image parts hold an image; all or none must")
    if given and held:
        raise DataError(
            f"{len(given)} images in the messages and {len(held)} in a column; leave one of them"
        )
    held = given or held
    if places == 0 and held:
        user = next((m for m in messages if m["role"] == "user"), messages[0])
        user["content"] = [{"type": "image"}] * len(held) + user["content"]
        places = len(held)
    if places != len(held):
        raise DataError(f"{places} image places in the prompt for {len(held)} images")
    for message in messages:
        message["content"] = _plain_if_text(message["content"])
        if not message["content"]:
            raise DataError(f"an empty message of the {message['role']}")
    return Conversation(tuple(messages), tuple(held))


def question_of(messages: tuple[dict[str, Any], ...]) -> str:
    """The text of the user's turns."""
    turns = [message["content"] for message in messages if message["role"] == "user"]
    parts = [[{"text": turn}] if isinstance(turn, str) else turn for turn in turns]
    return "\n".join(part["text"] for turn in parts for part in turn if part.get("text"))


def text_of_response(value: Any) -> str | None:
    """A response's text: text, an assistant's message, or a list of one.

    Raises:
        DataError: anything else.
    """
    if value is None:
        return None
    if isinstance(value, list | tuple):
        if len(value) != 1:
            raise DataError(f"a list of {len(value)}, where one response is expected")
        return text_of_response(value[0])
    if isinstance(value, dict):
        role = value.get("role", "assistant")
        if "content" not in value or role != "assistant":
            raise DataError(
                f"a record with {sorted(map(str, value))}, not an assistant's message; name one of "
                "its columns with a dot"
            )
        return text_of_response(value["content"])
    if not isinstance(value, str):
        raise DataError(f"{_kind(value)}, not text")
    return checked(value)


def checked(text: str) -> str:
    """The text, if it can be one.

    Raises:
        DataError: it has a mark of a video or audio, a token that only templates may write, or half
            a character.
    """
    if found := _REFUSED_MARK.search(text):
        raise DataError(f"the mark {found.group()}: this project trains images and text alone")
    if found := _NUMBERED_MARK.search(text):
        raise DataError(f"the mark {found.group()}: marks are {IMAGE_MARK}, in the images' order")
    if found := _SPECIAL.search(text):
        raise DataError(
            f"the text holds {found.group()}, which is a token of the chat template; remove it"
        )
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"half a character (a lone surrogate) at {error.start}") from error
    return text


def _json_messages(text: str) -> Any:
    """Messages that were written as JSON text; any other text as it is."""
    try:
        turns = json.loads(text)
    except (ValueError, RecursionError) as error:
        if _PYTHON_TURNS.match(text):
            raise DataError(
                "the prompt is Python's text of a list of messages, not JSON; write the column as "
                "JSON, or in Parquet"
            ) from error
        return text
    is_turn = all(isinstance(t, dict) and ({"role", "from"} & t.keys()) for t in turns)
    return turns if is_turn else text


def _listed(images: Any) -> list[Any]:
    """A row's images as a list."""
    if isinstance(images, str) and images.lstrip()[:1] == "[":
        with contextlib.suppress(ValueError, RecursionError):  # a path may begin so
            images = json.loads(images)
    if images is None or (isinstance(images, str | bytes) and not images):
        return []
    if not isinstance(images, list | tuple):
        images = [images]
    if any(image is None for image in images):
        raise DataError(f"a list of {len(images)} images with an empty place in it")
    return list(images)


def _message(turn: Any, own: list[Any], marks_count: bool) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise DataError(f"a turn is {_kind(turn)}, not a message with role and content")
    if "from" in turn and "role" not in turn:
        role, content = turn["from"], turn.get("value")
        if not isinstance(role, str) or role not in _FROM:
            raise DataError(f"a turn from {role!r}; known are {', '.join(_FROM)}")
        role = _FROM[role]
    else:
        role, content = turn.get("role"), turn.get("content")
    if role in ("tool", "function") or turn.get("tool_calls") or turn.get("function_call"):
        raise DataError("tool calls, which this project does not train")
    for key in _UNREAD_KEYS:
        if turn.get(key):
            raise DataError(
                f"the {role}'s message has {key!r}, which is not read; move it into the content or "
                "a column, or remove it"
            )
    for key in _SWITCHES:
        if key in turn and turn[key] is not None and not turn[key]:
            raise DataError(
                f"the {role}'s message has {key}={turn[key]}; turns are switched by "
                "cold_start.turns alone; remove it, or the turn"
            )
    if role not in ROLES:
        raise DataError(f"a message of role {role!r}; roles are {', '.join(ROLES)}")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list | tuple):
        raise DataError(f"the content of the {role}'s message is {_kind(content)}")
    parts: list[dict[str, Any]] = []
    for part in content:
        parts += _parts(part, own)
    return {"role": role, "content": parts}


def _parts(part: Any, own: list[Any]) -> list[dict[str, Any]]:
    """A part of a message as text and image parts; images that it holds go to ``own``."""
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise DataError(f"a part of a message is {_kind(part)}")
    filled = {key for key, value in part.items() if value is not None}
    kind = part.get("type") or next(
        (key for key in ("text", "image", "image_url", *_REFUSED) if key in filled), None
    )
    if isinstance(kind, str) and kind.removesuffix("_url") in _REFUSED:
        raise DataError(f"a part of type {kind!r}: this project trains images and text alone")
    if kind in ("text", "input_text"):
        text = part.get("text")
        if not isinstance(text, str):
            raise DataError(f"a text part whose text is {_kind(text)}")
        if kept := filled & {"image", "image_url", "images", "video", "audio"}:
            raise DataError(f"a text part that also holds {sorted(kept)[0]!r}; make it two parts")
        return _split_marks(checked(text), own)
    if kind in ("image", "image_url", "input_image"):
        held = next(
            (
                part[key]
                for key in ("image", "image_url", "url", "path", "bytes", "source", "data")
                if key in filled
            ),
            None,
        )
        if isinstance(held, dict) and "url" in held:
            held = held["url"]
        own.append(held)
        return [{"type": "image"}]
    raise DataError(f"a part of type {kind!r}; known are text, image, image_url")


def _split_marks(text: str, own: list[Any]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(text.split(IMAGE_MARK)):
        if i:
            parts.append({"type": "image"})
            own.append(None)
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _plain_if_text(content: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    if all(part["type"] == "text" for part in content):
        return "".join(part["text"] for part in content)
    return content


def _kind(value: Any) -> str:
    """What a value is, for a message."""
    if value is None:
        return "empty"
    if isinstance(value, list | tuple | str | bytes | dict) and not value:
        return f"an empty {type(value).__name__}"
    return f"a {type(value).__name__}"
