"""A checkpoint's tokenizer and processor files -> those of a bundle, in the layout of transformers.js.

Read is what any version of transformers has saved: image settings in preprocessor_config.json or nested in
processor_config.json, the chat template in a file of its own, in processor_config.json or in the tokenizer's.
What the runtime would do otherwise than the checkpoint's own processor is refused.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from export.chat_template import TemplateError, render
from export.spec import CheckpointError, ModelSpec, read_json
from runtimes.preprocess import ImageSettings, settings_from_config
from runtimes.prompt import (
    END,
    FAKE,
    GLOBAL,
    IMAGE,
    START,
    ImagePart,
    Message,
    PromptEncoder,
    chat_string,
    image_string,
)
from runtimes.video import video_settings

# architecture -> the names of its classes in transformers and transformers.js
PROCESSORS = {"smolvlm": "SmolVLMProcessor", "idefics3": "Idefics3Processor"}
IMAGE_PROCESSORS = {"smolvlm": "SmolVLMImageProcessor", "idefics3": "Idefics3ImageProcessor"}
# What transformers assumes where a file is silent.
IMAGE_DEFAULTS: dict[str, Any] = {
    "size": {"longest_edge": 1456},
    "max_image_size": {"longest_edge": 364},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
# The tokens of the prompt as a tokenizer may name them.
NAMED_TOKENS = {"image_token": IMAGE, "fake_image_token": FAKE, "global_image_token": GLOBAL}
# The named tokens that transformers gives to a chat template.
TEMPLATE_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Keys of tokenizer_config.json that are paths of the machine that saved it, or name code to run.
LEFT_OUT = {
    "_name_or_path",
    "auto_map",
    "cache_dir",
    "is_local",
    "local_files_only",
    "merges_file",
    "name_or_path",
    "special_tokens_map_file",
    "tokenizer_file",
    "vocab_file",
}
TEMPLATE_BYTES = 1 << 20
# The chat format of runtimes/prompt.py, for checkpoints that bring no template.
DEFAULT_TEMPLATE = (
    START + "{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'][0]['type'] != 'image' %}{{ ' ' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '" + IMAGE + "' }}"
    "{% elif part['type'] == 'video' %}{{ '<video>' }}{% endif %}"
    "{% endfor %}{{ '" + END + "\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

PICTURE = ImagePart(0, 0)
# With white space and signs that a template may touch.
QUESTION = " What is this?\n\tTotal  12.80 \u20ac \u7dcf\u984d {{ x }} <b>&amp;'\"</b> "
ASKED = Message("user", (PICTURE, QUESTION))
ANSWERED = Message("assistant", (" A receipt. ",))
# What every template must write as the runtime does: name -> messages.
SAMPLES: dict[str, tuple[Message, ...]] = {
    "a question": (Message("user", (QUESTION,)),),
    "a question on an image": (ASKED,),
    "a question before its image": (Message("user", (QUESTION, PICTURE)),),
    "an image alone": (Message("user", (PICTURE,)),),
    "several images": (Message("user", (PICTURE, PICTURE, "First", "Then", PICTURE, "Last")),),
    "several turns": (ASKED, ANSWERED, Message("user", ("Sure?",)), ANSWERED, ASKED),
    "a last word of the assistant": (ASKED, ANSWERED),
    "a system message": (Message("system", ("Be brief. ",)), ASKED, ANSWERED, ASKED),
}

Table = dict[str, Any]


def write_processor_files(folder: Path, spec: ModelSpec, out: Path, max_tiles: int | None) -> None:
    """Writes tokenizer.json, tokenizer_config.json, preprocessor_config.json, processor_config.json and
    generation_config.json.

    Args:
        folder: the checkpoint.
        spec: its sizes and token ids, which the files must agree with.
        out: an existing folder.
        max_tiles: the token budget (1, 5, 10 or 17 tiles an image); None keeps the checkpoint's.

    Raises:
        CheckpointError: naming file and field, before anything is written.
    """
    processor = _optional(folder / "processor_config.json")
    settings = image_settings(folder, processor, spec, max_tiles)
    check_seq_len(folder / "processor_config.json", processor, spec)
    tokenizer = _optional(folder / "tokenizer_config.json")
    check_tokenizer(folder, tokenizer, spec)
    template, where = chat_template(folder, processor, tokenizer)
    check_template(template, where, tokenizer)
    generation = _optional(folder / "generation_config.json")
    files = {
        "preprocessor_config.json": _image_config(settings, spec) | video_sampling(folder, processor, settings),
        "processor_config.json": {
            "image_seq_len": spec.tokens_per_tile,
            "processor_class": PROCESSORS[spec.architecture],
        },
        "tokenizer_config.json": {k: v for k, v in tokenizer.items() if k not in LEFT_OUT}
        | {"chat_template": template},
        "generation_config.json": {k: v for k, v in generation.items() if not k.startswith("_")}
        | _generation_ids(folder, spec),
    }
    texts = {name: _json(content, folder / name) for name, content in files.items()}
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    shutil.copyfile(folder / "tokenizer.json", out / "tokenizer.json")


def image_settings(folder: Path, processor: Table, spec: ModelSpec, max_tiles: int | None) -> ImageSettings:
    """How the checkpoint's images become tiles, within the token budget.

    Args:
        folder: the checkpoint.
        processor: its processor_config.json, whose image_processor goes before preprocessor_config.json.
        spec: gives the tile size, which the settings must have.
        max_tiles: the token budget, or None.
    """
    if "image_processor" in processor:
        where, config = f"{folder / 'processor_config.json'}: image_processor", processor["image_processor"]
        if not isinstance(config, dict):
            raise CheckpointError(f"{where} is {type(config).__name__}, want an object")
    else:
        where, config = str(folder / "preprocessor_config.json"), read_json(folder / "preprocessor_config.json")
    for key, known, table in (
        ("image_processor_type", IMAGE_PROCESSORS, config),
        ("processor_class", PROCESSORS, config),
        ("processor_class", PROCESSORS, processor),
    ):
        kind = table.get(key)
        if kind is not None and str(kind).removesuffix("Fast").removesuffix("Pil") not in known.values():
            named = where if table is config else str(folder / "processor_config.json")
            raise CheckpointError(f"{named}: {key} is {kind!r}, want {' or '.join(known.values())}")
    try:
        settings = settings_from_config(IMAGE_DEFAULTS | config, where)
        if settings.tile_size != spec.vision.image_size:
            raise CheckpointError(
                f"{where}: max_image_size.longest_edge is {settings.tile_size}, "
                f"but config.json says that a tile is {spec.vision.image_size} pixels (vision_config.image_size)"
            )
        if max_tiles is not None:
            settings = settings.with_budget(max_tiles)
        elif settings.split and not settings.resize:
            raise CheckpointError(f"{where}: do_resize is false: an image has no limit of tiles; give one (--tiles)")
    except CheckpointError:
        raise
    except ValueError as exc:
        raise CheckpointError(str(exc)) from exc
    return settings


def video_sampling(folder: Path, processor: Table, images: ImageSettings) -> Table:
    """What a bundle's preprocessor_config.json says of videos; nothing if the checkpoint says nothing.

    transformers takes the files in this order, and where one has a `size` it goes before `video_size`.

    Args:
        folder: the checkpoint.
        processor: its processor_config.json.
        images: how its images become tiles, which has to hold for frames too.
    """
    if "video_processor" in processor:
        where, config = f"{folder / 'processor_config.json'}: video_processor", processor["video_processor"]
    else:
        names = ("video_preprocessor_config.json", "preprocessor_config.json")
        path = next((folder / name for name in names if (folder / name).exists()), folder / names[-1])
        where, config = str(path), _optional(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{where} is {type(config).__name__}, want an object")
    sampling = config.get("video_sampling")
    if sampling is None:
        return {}
    if isinstance(sampling, dict) and "size" in config:
        sampling = sampling | {"video_size": config["size"]}
    try:
        found = video_settings(IMAGE_DEFAULTS | config | {"video_sampling": sampling}, where)
    except ValueError as exc:
        raise CheckpointError(str(exc)) from exc
    for name in ("tile_size", "resample", "rescale_factor", "mean", "std"):
        video, image = getattr(found.image, name), getattr(images, name)
        if video != image:
            raise CheckpointError(f"{where}: {name} of a video is {video}, of an image {image}: the runtime has one")
    fps = int(found.fps) if found.fps.is_integer() else found.fps
    edge = {"longest_edge": found.longest_edge}
    return {"video_sampling": {"fps": fps, "max_frames": found.max_frames, "video_size": edge}}


def check_seq_len(path: Path, processor: Table, spec: ModelSpec) -> None:
    """Raises CheckpointError unless image_seq_len is what the model makes of a tile, or left out."""
    found = processor.get("image_seq_len", spec.tokens_per_tile)
    if found != spec.tokens_per_tile or isinstance(found, bool):
        raise CheckpointError(
            f"{path}: image_seq_len is {found!r}, but config.json's sizes make {spec.tokens_per_tile} tokens of a tile"
        )


def check_tokenizer(folder: Path, config: Table, spec: ModelSpec) -> None:
    """Raises CheckpointError unless tokenizer.json alone gives what transformers makes of all the files.

    Args:
        folder: the checkpoint.
        config: its tokenizer_config.json.
        spec: gives the id of the image token and the number of embeddings.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise CheckpointError(f"{path}: is missing; AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it")
    try:
        tokenizer = PromptEncoder(_tokenizer(path), spec.tokens_per_tile, str(path)).tokenizer
    except ValueError as exc:
        raise CheckpointError(str(exc)) from exc
    found = tokenizer.token_to_id(IMAGE)
    if found != spec.image_token_id:
        raise CheckpointError(
            f"{path}: {IMAGE} is token {found}, config.json's image_token_id is {spec.image_token_id}"
        )
    most = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if most >= spec.text.vocab:
        raise CheckpointError(f"{path}: has token {most}, but the model has only {spec.text.vocab} (vocab_size)")
    where = folder / "tokenizer_config.json"
    for name, token, wanted in _declared(config, where):
        found = tokenizer.token_to_id(token)
        if found is None or (wanted is not None and found != wanted):
            number = "missing" if found is None else f"token {found}"
            raise CheckpointError(f"{where}: {name} is {token!r}, which is {number} in tokenizer.json")
        if token != NAMED_TOKENS.get(name, token):
            raise CheckpointError(f"{where}: {name} is {token!r}, the runtime's is {NAMED_TOKENS[name]}")


def chat_template(folder: Path, processor: Table, tokenizer: Table) -> tuple[str, str]:
    """The checkpoint's chat template and where it stands; the family's own if there is none.

    Args:
        folder: the checkpoint.
        processor: its processor_config.json.
        tokenizer: its tokenizer_config.json, looked at last: there may be the text model's own.
    """
    legacy = _optional(folder / "chat_template.json")
    file = folder / "chat_template.jinja"
    for where, found in (
        (f"{folder / 'processor_config.json'}: chat_template", processor.get("chat_template")),
        (f"{folder / 'chat_template.json'}: chat_template", legacy.get("chat_template")),
        (str(file), _text(file) if file.exists() else None),
        (f"{folder / 'tokenizer_config.json'}: chat_template", tokenizer.get("chat_template")),
    ):
        template = found
        if isinstance(template, list):  # several, by name
            template = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        if isinstance(template, dict):
            template = template.get("default")
        if isinstance(template, str):
            return template, where
        if found is not None:
            raise CheckpointError(f"{where} is {type(found).__name__} without a default template")
    return DEFAULT_TEMPLATE, "the default chat template"


def check_template(template: str, where: str, tokenizer: Table) -> None:
    """Raises CheckpointError, with the first difference, unless the template writes every sample as the
    runtime does.

    Args:
        template: Jinja source.
        where: the file it is from.
        tokenizer: tokenizer_config.json, whose named tokens a template may use.
    """
    if len(template) > TEMPLATE_BYTES:
        raise CheckpointError(f"{where}: {len(template):,} characters, want at most {TEMPLATE_BYTES:,}")
    tokens = {k: _content(tokenizer[k], k, where) for k in TEMPLATE_TOKENS if tokenizer.get(k) is not None}
    chats = [(name, messages, reply) for name, messages in SAMPLES.items() for reply in (True, False)]
    variables = [
        tokens | {"messages": _conversation(m), "add_generation_prompt": r, "tools": None, "documents": None}
        for _, m, r in chats
    ]
    try:
        texts = render(template, variables)
    except TemplateError as exc:
        raise CheckpointError(f"{where}: cannot be rendered: {exc}") from exc
    whole = image_string(PICTURE, 1)
    for (name, messages, reply), found in zip(chats, texts, strict=True):
        wanted = chat_string(messages, 1, reply=reply).replace(whole, IMAGE)
        if found != wanted:
            at = next(i for i, (a, b) in enumerate(zip_longest(found, wanted)) if a != b)
            begin = max(at - 20, 0)
            raise CheckpointError(
                f"{where}: writes {name} otherwise than the runtime, from character {at} on: "
                f"{found[begin : at + 40]!r}, want {wanted[begin : at + 40]!r}"
            )


def _conversation(messages: Sequence[Message]) -> list[Table]:
    return [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in message.parts
            ],
        }
        for message in messages
    ]


def _image_config(settings: ImageSettings, spec: ModelSpec) -> Table:
    return {
        "do_convert_rgb": True,
        "do_image_splitting": settings.split,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": settings.resize,
        "image_mean": list(settings.mean),
        "image_processor_type": IMAGE_PROCESSORS[spec.architecture],
        "image_std": list(settings.std),
        "max_image_size": {"longest_edge": settings.tile_size},
        "processor_class": PROCESSORS[spec.architecture],
        "resample": settings.resample,
        "rescale_factor": settings.rescale_factor,
        "size": {"longest_edge": settings.longest_edge},
    }


def _generation_ids(folder: Path, spec: ModelSpec) -> Table:
    if not spec.eos_ids:
        raise CheckpointError(f"{folder / 'generation_config.json'}: has no eos_token_id: no answer would ever end")
    eos = spec.eos_ids[0] if len(spec.eos_ids) == 1 else list(spec.eos_ids)
    ids = {"bos_token_id": spec.bos_id, "eos_token_id": eos, "pad_token_id": spec.pad_id}
    return {key: value for key, value in ids.items() if value is not None}


def _declared(config: Table, where: Path) -> Iterator[tuple[str, str, int | None]]:
    """Every special token that tokenizer_config.json speaks of: (field, token, its id if given)."""
    for key, value in config.items():
        if key.endswith("_token") and value not in (None, "") and not isinstance(value, bool):
            yield key, _content(value, key, where), None
    for key in ("extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens"):
        value = config.get(key) or []
        if not isinstance(value, (dict, list)):
            raise CheckpointError(f"{where}: {key} is {value!r:.80}, want a list or an object of tokens")
        for name, token in value.items() if isinstance(value, dict) else ((key, token) for token in value):
            yield name, _content(token, name, where), None
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict) or not all(k.isdecimal() for k in decoder):
        raise CheckpointError(f"{where}: added_tokens_decoder is no object of ids and tokens")
    for number, token in decoder.items():
        yield f"added_tokens_decoder.{number}", _content(token, "added_tokens_decoder", where), int(number)


def _content(token: Any, name: str, where: Path | str) -> str:
    """A token's text, which stands alone or in an object with its rules."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise CheckpointError(f"{where}: {name} is {token!r:.80}, want a token")
    return content


def _tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(_text(path, limit=1 << 28))
    except CheckpointError:
        raise
    except Exception as exc:  # the library raises bare Exception on a bad file
        raise CheckpointError(f"{path}: cannot be read as a tokenizer: {exc}") from exc


def _text(path: Path, limit: int = TEMPLATE_BYTES) -> str:
    try:
        size = path.stat().st_size
        if size > limit:
            raise CheckpointError(f"{path}: {size:,} bytes, want at most {limit:,}")
        return path.read_text(encoding="utf-8")
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise CheckpointError(f"{path}: is not UTF-8: {exc}") from exc


def _optional(path: Path) -> Table:
    """The object in a JSON file; empty if there is no such file."""
    return read_json(path) if path.exists() else {}


def _json(content: Table, path: Path) -> str:
    try:
        return json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except ValueError as exc:
        raise CheckpointError(f"{path}: holds NaN or infinity, which is not JSON") from exc
