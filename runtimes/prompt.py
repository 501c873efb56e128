"""Chat -> token ids, equal token for token to Hugging Face's SmolVLMProcessor.

Only the `tokenizers` library is needed. The chat format is the family's own and is written here, not
rendered from the template: export compares a checkpoint's template with it and refuses one that differs.

Special tokens come from the format alone. Text of a message that spells one (`<end_of_utterance>`) is
encoded as the characters that it consists of, so that no text can end a turn, open another or pretend to be
an image; Hugging Face does the same if `apply_chat_template` is told to `sanitize_control_tokens`, and by
default does not. `<image>` in a text is an error: whoever writes it means an image.

Not covered: text that merely looks like a turn ("\\nAssistant: ..."), which is a matter for the model.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

FAKE, IMAGE, GLOBAL = "<fake_token_around_image>", "<image>", "<global-img>"
START, END = "<|im_start|>", "<end_of_utterance>"
ROLES = ("user", "assistant", "system")


def _byte_alphabet() -> dict[str, int]:
    """The characters by which a byte-level BPE spells bytes: printable ones stand for themselves."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in kept]
    return {chr(b): b for b in kept} | {chr(256 + i): b for i, b in enumerate(others)}


BYTES = _byte_alphabet()


@dataclass(frozen=True)
class ImagePart:
    """The place of an image in a message; `rows` and `cols` are its `Tiles` grid (0, 0: not split)."""

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if (self.rows, self.cols) != (0, 0) and min(self.rows, self.cols) < 1:
            raise ValueError(f"an image of {self.rows} rows and {self.cols} columns of tiles")

    @property
    def tiles(self) -> int:
        """Tiles of the image, the whole image as one tile included."""
        return self.rows * self.cols + 1


@dataclass(frozen=True)
class VideoPart:
    """The place of a video in a message, each frame a tile: its length, and each frame's time, in whole seconds."""

    seconds: int
    at: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.at) < 1000 or min(self.seconds, *self.at) < 0:
            raise ValueError(f"a video of {len(self.at)} frames and {self.seconds} s, want 1 to 999 frames")

    @property
    def tiles(self) -> int:
        """One a frame."""
        return len(self.at)


@dataclass(frozen=True)
class Message:
    """One turn: `role` is "user", "assistant" or "system"; parts are text, images and videos in order."""

    role: str
    parts: tuple[str | ImagePart | VideoPart, ...]


def image_string(part: ImagePart, seq_len: int) -> str:
    """The special tokens that stand for an image whose tiles are `seq_len` tokens each."""
    whole = f"{FAKE}{GLOBAL}{IMAGE * seq_len}{FAKE}"
    if part.rows == 0 and part.cols == 0:
        return whole
    lines = [
        "".join(f"{FAKE}<row_{r}_col_{c}>{IMAGE * seq_len}" for c in range(1, part.cols + 1))
        for r in range(1, part.rows + 1)
    ]
    return "".join(f"{line}\n" for line in lines) + "\n" + whole


ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def number_words(number: int) -> str:
    """A number from 0 to 999 in English: "three hundred and twenty-one"."""
    hundreds, rest = divmod(number, 100)
    tens, ones = divmod(rest, 10)
    words = ONES[rest] if rest < 20 else TENS[tens] + (f"-{ONES[ones]}" if ones else "")
    if not hundreds:
        return words
    return f"{ONES[hundreds]} hundred" + (f" and {words}" if rest else "")


def video_string(part: VideoPart, seq_len: int) -> str:
    """What stands for a video whose frames are `seq_len` tokens each: length, and each frame with its time."""
    frame = image_string(ImagePart(0, 0), seq_len)
    intro = (
        f"You are provided the following series of {number_words(part.tiles)} frames "
        f"from a {timedelta(seconds=part.seconds)} [H:MM:SS] video.\n"
    )
    return intro + "".join(f"\nFrame from {s // 60:02d}:{s % 60:02d}:{frame}" for s in part.at) + "\n\n"


def chat_string(messages: Sequence[Message], seq_len: int, *, reply: bool = True, start: bool = True) -> str:
    """The text of a chat with images expanded.

    Args:
        messages: the turns.
        seq_len: image tokens a tile.
        reply: end with the opening of the assistant's turn.
        start: begin with the token that opens a chat; False continues one that is in the cache.

    Raises:
        ValueError: for no message, a message without parts, or an unknown role.
    """
    return "".join(text for text, _ in _pieces(messages, seq_len, reply, start))


def _pieces(messages: Sequence[Message], seq_len: int, reply: bool, start: bool) -> Iterator[tuple[str, bool]]:
    """The chat in pieces: (text, whether it is a message's own text rather than the format's)."""
    if not messages:
        raise ValueError("a chat without messages")
    if start:
        yield START, False
    for message in messages:
        if message.role not in ROLES:
            raise ValueError(f"a message's role is {message.role!r}, want one of {', '.join(ROLES)}")
        if not message.parts:
            raise ValueError(f"a {message.role} message without content")
        yield message.role.capitalize() + (":" if isinstance(message.parts[0], ImagePart) else ": "), False
        text = ""  # neighbouring texts are one: together they may spell what neither does
        for part in message.parts:
            if isinstance(part, str):
                text += part
                continue
            yield text, True
            yield image_string(part, seq_len) if isinstance(part, ImagePart) else video_string(part, seq_len), False
            text = ""
        yield text, True
        yield f"{END}\n", False
    if reply:
        yield "Assistant:", False


class PromptEncoder:
    """The tokenizer of a bundle and the number of image tokens a tile.

    Raises:
        ValueError: if the tokenizer lacks a token of the chat format. `<global-img>` and `<row_1_col_1>` may
            be missing: the first SmolVLM spells them in ordinary tokens.
    """

    def __init__(self, tokenizer: Tokenizer, seq_len: int, where: str = "tokenizer") -> None:
        self.tokenizer, self.seq_len = tokenizer, seq_len
        tokenizer.no_padding()
        tokenizer.no_truncation()
        ids = {}
        for token in (FAKE, IMAGE, START, END):
            found = tokenizer.token_to_id(token)
            if found is None:
                raise ValueError(f"{where}: has no token {token}, which SmolVLM prompts need")
            ids[token] = found
        self.image_id: int = ids[IMAGE]
        self.end_id: int = ids[END]
        self._added = tokenizer.get_added_tokens_decoder()
        added = self._added.values()
        special = {t.content for t in added if t.special and t.content} | set(ids)
        self._special_ids = frozenset(tokenizer.token_to_id(t) for t in special)
        self._special = re.compile("|".join(re.escape(t) for t in sorted(special, key=len, reverse=True)))

    @classmethod
    def from_folder(cls, folder: Path) -> "PromptEncoder":
        """Reads tokenizer.json and processor_config.json (image_seq_len). Raises ValueError naming the file."""
        path = folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as exc:  # the library raises bare Exception on a bad file
            raise ValueError(f"{path}: cannot be read as a tokenizer: {exc}") from exc
        config_path = folder / "processor_config.json"
        try:
            seq_len = json.loads(config_path.read_text(encoding="utf-8"))["image_seq_len"]
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise ValueError(f"{config_path}: cannot read image_seq_len: {exc!r}") from exc
        if not isinstance(seq_len, int) or isinstance(seq_len, bool) or not 1 <= seq_len <= 1 << 16:
            raise ValueError(f"{config_path}: image_seq_len is {seq_len!r}, want 1 to {1 << 16}")
        return cls(tokenizer, seq_len, str(path))

    def encode(self, messages: Sequence[Message], *, reply: bool = True, start: bool = True) -> list[int]:
        """Token ids of a chat; see `chat_string`.

        Raises:
            ValueError: as `chat_string`; if a text spells the image token, holds half a character (a lone
                surrogate), or gives a special token that this tokenizer cannot encode as plain text.
        """
        pieces = list(_pieces(messages, self.seq_len, reply, start))
        ids: list[int] = []
        run = ""
        for text, given in pieces:
            if not given:
                run += text
                continue
            if IMAGE in text:
                raise ValueError(f"a message spells the token {IMAGE}; give the image as a part")
            done = 0
            for spelled in self._special.finditer(text):
                ids += self._encode(self.tokenizer, run + text[done : spelled.start()])
                ids += self._encode(self._plain, spelled.group())
                run, done = "", spelled.end()
            run += text[done:]
        ids += self._encode(self.tokenizer, run)
        # Whatever the tokenizer's rules for added tokens are: no special token beyond those of the format.
        wanted = self._count(self._encode(self.tokenizer, "".join(text for text, given in pieces if not given)))
        found = self._count(ids)
        if found != wanted:
            wrong = min(i for i in found | wanted if found[i] != wanted[i])
            token = self.tokenizer.id_to_token(wrong)
            raise ValueError(f"texts give {found[wrong]} tokens {token} where the chat has {wanted[wrong]}")
        return ids

    @cached_property
    def _plain(self) -> Tokenizer:
        """The same tokenizer, blind to special tokens."""
        plain = Tokenizer.from_str(self.tokenizer.to_str())
        plain.encode_special_tokens = True
        return plain

    @staticmethod
    def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
        try:
            return list(tokenizer.encode(text, add_special_tokens=False).ids)
        except (UnicodeError, TypeError) as exc:  # Python's lone surrogates have no UTF-8
            raise ValueError(f"a message's text cannot be encoded as UTF-8: {exc}") from exc

    def _count(self, ids: list[int]) -> Counter[int]:
        return Counter(i for i in ids if i in self._special_ids)

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token that text gives: n tokens are at most n times as many bytes of text."""
        return max(len(self.token_bytes(i) or b"") for i in range(self.tokenizer.get_vocab_size()))

    def token_bytes(self, token: int) -> bytes | None:
        """What a token adds to a text; None for a special token, and for an id beyond the tokenizer."""
        name = self.tokenizer.id_to_token(token)
        if name is None or token in self._special_ids:
            return None
        if token not in self._added and BYTES.keys() >= set(name):
            return bytes(BYTES[c] for c in name)
        return str(name).encode()

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
