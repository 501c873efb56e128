"""export/processor.py and export/chat_template.py: every layout of a checkpoint's files, and every refusal."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE
from transformers.utils.chat_template_utils import render_jinja_template

from demo.tokenizer import CHAT_TEMPLATE, save_tokenizer
from export.chat_template import TemplateError, render
from export.processor import DEFAULT_TEMPLATE, PICTURE, SAMPLES, check_template, write_processor_files
from export.spec import CheckpointError, ModelSpec, TextSpec, VisionSpec
from runtimes.preprocess import TILE_BUDGETS, read_settings
from runtimes.prompt import IMAGE, ImagePart, Message, PromptEncoder
from runtimes.video import Clip, read_video_settings, sample_indices
from tests.checkpoints import tiny_tokenizer
from tests.hf_processor import hf_processor

TILE = 32
VOCAB = tiny_tokenizer().get_vocab_size()
IMAGE_ID, END_ID = (tiny_tokenizer().get_vocab()[token] for token in (IMAGE, "<end_of_utterance>"))
SPEC = ModelSpec(
    "smolvlm",
    VisionSpec(64, 2, 2, 32, 128, TILE, 8, 1e-6, "gelu_tanh"),
    TextSpec(64, 2, 4, 2, 16, 128, VOCAB, 512, 1e4, 1e-5, False),
    scale_factor=2,
    image_token_id=IMAGE_ID,
    bos_id=1,
    eos_ids=(END_ID,),
    pad_id=2,
)
IDEFICS3 = ModelSpec(**{**vars(SPEC), "architecture": "idefics3"})
IMAGES: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_image_splitting": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.25, 0.5],
    "image_processor_type": "SmolVLMImageProcessor",
    "image_std": [0.5, 0.5, 0.75],
    "max_image_size": {"longest_edge": TILE},
    "processor_class": "SmolVLMProcessor",
    "resample": 1,
    "rescale_factor": 0.00392156862745098,
    "size": {"longest_edge": 3 * TILE},
}

WHOLE_SAMPLING = {"fps": 1, "max_frames": 64, "video_size": IMAGES["size"]}


def edit(path: Path, change: dict[str, Any], *drop: str) -> None:
    """Changes a JSON file; makes it if there is none."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content = {k: v for k, v in (content | change).items() if k not in drop}
    path.write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of a checkpoint that transformers 4 saved, without its model."""
    folder = tmp_path / "checkpoint"
    save_tokenizer(tiny_tokenizer(), folder)
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", {"name_or_path": str(tmp_path), "processor_class": "SmolVLMProcessor"})
    edit(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    edit(folder / "preprocessor_config.json", IMAGES | {"video_sampling": {"fps": 1}})
    edit(folder / "processor_config.json", {"image_seq_len": 4, "processor_class": "SmolVLMProcessor"})
    edit(folder / "generation_config.json", {"_from_model_config": True, "bos_token_id": 1, "use_cache": True})
    edit(folder / "config.json", {"model_type": "smolvlm"})
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    out = tmp_path / "bundle"
    out.mkdir()
    return out


def written(folder: Path, out: Path, spec: ModelSpec = SPEC, tiles: int | None = None) -> dict[str, Any]:
    write_processor_files(folder, spec, out, tiles)
    return {f.name: json.loads(f.read_text()) for f in out.iterdir()}


# ---- layouts


def test_the_files_are_those_that_transformers_js_reads(folder: Path, out: Path) -> None:
    files = written(folder, out)
    assert sorted(files) == [
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert files["preprocessor_config.json"] == IMAGES | {"video_sampling": WHOLE_SAMPLING}
    assert files["processor_config.json"] == {"image_seq_len": 4, "processor_class": "SmolVLMProcessor"}
    assert files["tokenizer_config.json"]["chat_template"] == CHAT_TEMPLATE
    assert files["tokenizer_config.json"]["eos_token"] == "<end_of_utterance>"
    assert files["generation_config.json"] == {
        "bos_token_id": 1,
        "eos_token_id": END_ID,
        "pad_token_id": 2,
        "use_cache": True,
    }
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_the_same_files_give_the_same_bytes_and_no_path_of_the_machine(folder: Path, out: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    written(folder, out)
    written(folder, again)
    for file in out.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes()
        assert str(tmp_path) not in file.read_text()


def test_what_transformers_5_saves_gives_the_same_files(folder: Path, out: Path, tmp_path: Path) -> None:
    edit(folder / "preprocessor_config.json", {}, "video_sampling")
    saved, second = tmp_path / "saved", tmp_path / "second"
    second.mkdir()
    hf_processor().save(folder, saved)
    assert not (saved / "preprocessor_config.json").exists()
    assert "image_processor" in json.loads((saved / "processor_config.json").read_text())
    shutil.copy(folder / "generation_config.json", saved)
    first, files = written(folder, out), written(saved, second)
    assert first.keys() == files.keys()
    for name in first.keys() - {"tokenizer_config.json", "tokenizer.json"}:
        assert first[name] == files[name]
    assert files["tokenizer_config.json"]["chat_template"] == CHAT_TEMPLATE


def in_file(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def in_tokenizer(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", {"chat_template": CHAT_TEMPLATE})


def by_name(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "other"}, {"name": "default", "template": CHAT_TEMPLATE}]
    edit(folder / "tokenizer_config.json", {"chat_template": named})


def in_processor(folder: Path) -> None:
    edit(folder / "processor_config.json", {"chat_template": CHAT_TEMPLATE})


@pytest.mark.parametrize("place", [in_file, in_tokenizer, by_name, in_processor])
def test_the_chat_template_is_found_wherever_it_stands(folder: Path, out: Path, place: Callable[[Path], None]) -> None:
    (folder / "chat_template.json").unlink()
    place(folder)
    assert written(folder, out)["tokenizer_config.json"]["chat_template"] == CHAT_TEMPLATE


def test_the_processors_template_goes_before_the_tokenizers(folder: Path, out: Path) -> None:
    edit(folder / "tokenizer_config.json", {"chat_template": "{{ messages }}"})
    assert written(folder, out)["tokenizer_config.json"]["chat_template"] == CHAT_TEMPLATE


def test_without_a_template_the_familys_own_is_written(folder: Path, out: Path) -> None:
    (folder / "chat_template.json").unlink()
    assert written(folder, out)["tokenizer_config.json"]["chat_template"] == DEFAULT_TEMPLATE


def test_an_image_processor_in_processor_config_goes_before_preprocessor_config(folder: Path, out: Path) -> None:
    edit(folder / "processor_config.json", {"image_processor": IMAGES | {"resample": 3}})
    edit(folder / "preprocessor_config.json", {}, "video_sampling")
    assert written(folder, out)["preprocessor_config.json"]["resample"] == 3


def test_settings_that_are_left_out_are_those_that_transformers_assumes(folder: Path, out: Path) -> None:
    stated = {"max_image_size", "processor_class"}
    edit(folder / "preprocessor_config.json", {}, "video_sampling", *(IMAGES.keys() - stated))
    edit(folder / "processor_config.json", {}, "image_seq_len", "processor_class")
    assert written(folder, out)["processor_config.json"]["image_seq_len"] == SPEC.tokens_per_tile
    theirs, ours = (SmolVLMImageProcessorPil.from_pretrained(f).to_dict() for f in (folder, out))
    assert ours == theirs
    edit(folder / "preprocessor_config.json", {}, *IMAGES)
    with pytest.raises(CheckpointError, match="longest_edge is 364"):
        write_processor_files(folder, SPEC, out, None)


def test_transformers_reads_the_bundles_files_as_the_checkpoints(folder: Path, out: Path) -> None:
    written(folder, out)
    theirs, ours = (SmolVLMImageProcessorPil.from_pretrained(f).to_dict() for f in (folder, out))
    assert ours == theirs | {"video_sampling": WHOLE_SAMPLING}
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.image_token == IMAGE


SAMPLING = {"fps": 2, "max_frames": 5, "video_size": {"longest_edge": 100}}


def in_preprocessor(folder: Path) -> None:
    edit(folder / "preprocessor_config.json", {"video_sampling": SAMPLING})


def in_a_file_for_videos(folder: Path) -> None:
    config = json.loads((folder / "preprocessor_config.json").read_text())
    edit(folder / "video_preprocessor_config.json", config | {"video_sampling": SAMPLING})


def as_transformers_5_saves(folder: Path) -> None:
    in_preprocessor(folder)
    saved = folder / "saved"
    hf_processor().save(folder, saved)
    (folder / "preprocessor_config.json").unlink()
    shutil.copy(saved / "processor_config.json", folder)


@pytest.mark.parametrize("place", [in_preprocessor, in_a_file_for_videos, as_transformers_5_saves])
def test_videos_are_sampled_as_the_checkpoint_says(folder: Path, out: Path, place: Callable[[Path], None]) -> None:
    place(folder)
    edge = IMAGES["size"]["longest_edge"]
    wanted = SAMPLING | {"video_size": {"longest_edge": edge}}  # transformers lets size go before it
    assert written(folder, out)["preprocessor_config.json"]["video_sampling"] == wanted
    theirs, ours = (hf_processor().ask_video(f, "What?", (90, 4, 6), 30.0, 3.0) for f in (folder, out))
    assert theirs == ours
    assert len(theirs["indices"]) == 5
    settings = read_video_settings(out / "preprocessor_config.json")
    assert list(sample_indices(Clip(90, 30.0, 3.0), settings)) == theirs["indices"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video_sampling": 1}, "video_sampling is 1"),
        ({"video_sampling": {"fps": -1}}, "video_sampling.fps is -1"),
        ({"video_sampling": SAMPLING, "image_mean": [0.1, 0.2, 0.3]}, "mean of a video is"),
        ({"video_sampling": SAMPLING, "resample": 3}, "resample of a video is 3, of an image 1"),
    ],
)
def test_settings_of_videos_that_the_runtime_cannot_follow_are_refused(
    folder: Path, out: Path, change: dict[str, Any], message: str
) -> None:
    config = json.loads((folder / "preprocessor_config.json").read_text())
    edit(folder / "video_preprocessor_config.json", config | change)
    with pytest.raises(CheckpointError, match=message):
        write_processor_files(folder, SPEC, out, None)
    assert list(out.iterdir()) == []


def test_transformers_processor_of_the_bundle_gives_the_runtimes_tokens(folder: Path, out: Path) -> None:
    written(folder, out)
    shutil.copy(folder / "config.json", out)
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)  # transformers' processor looks only here
    theirs = hf_processor().ask(out, [("user", ((90, 90), "What is it?"))])
    ids = PromptEncoder.from_folder(out).encode([Message("user", (ImagePart(3, 3), "What is it?"))])
    assert ids == theirs["ids"] == theirs["ids_of_text"]


def test_the_first_smolvlm_keeps_its_class_names(folder: Path, out: Path) -> None:
    edit(folder / "preprocessor_config.json", {"image_processor_type": "Idefics3ImageProcessorFast"})
    files = written(folder, out, IDEFICS3)
    assert files["preprocessor_config.json"]["image_processor_type"] == "Idefics3ImageProcessor"
    assert files["preprocessor_config.json"]["processor_class"] == "Idefics3Processor"
    assert files["processor_config.json"]["processor_class"] == "Idefics3Processor"


def test_several_end_tokens_are_all_written(folder: Path, out: Path) -> None:
    files = written(folder, out, ModelSpec(**{**vars(SPEC), "eos_ids": (END_ID, 0), "pad_id": None}))
    assert files["generation_config.json"]["eos_token_id"] == [END_ID, 0]
    assert "pad_token_id" not in files["generation_config.json"]


# ---- the token budget


@pytest.mark.parametrize("tiles", TILE_BUDGETS)
def test_the_token_budget_sets_the_longest_edge(folder: Path, out: Path, tiles: int) -> None:
    size = written(folder, out, tiles=tiles)["preprocessor_config.json"]["size"]
    assert size == {"longest_edge": TILE_BUDGETS[tiles] * TILE}
    assert read_settings(out / "preprocessor_config.json").max_tiles == tiles


def test_without_a_budget_the_checkpoints_size_is_kept(folder: Path, out: Path) -> None:
    assert written(folder, out)["preprocessor_config.json"]["size"] == IMAGES["size"]


def test_images_that_are_not_resized_need_a_budget(folder: Path, out: Path) -> None:
    edit(folder / "preprocessor_config.json", {"do_resize": False})
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: do_resize is false.*--tiles"):
        write_processor_files(folder, SPEC, out, None)
    assert written(folder, out, tiles=5)["preprocessor_config.json"]["do_resize"] is True


def test_another_budget_is_refused(folder: Path, out: Path) -> None:
    with pytest.raises(CheckpointError, match="7 tiles, want one of"):
        write_processor_files(folder, SPEC, out, 7)


# ---- refusals


IMAGE_FILE, PROCESSOR_FILE, TOKENIZER_FILE = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
)
REFUSED: list[tuple[str, str, dict[str, Any]]] = [
    (IMAGE_FILE, "image_std", {"image_std": [0, 1, 1]}),
    (IMAGE_FILE, "do_rescale", {"do_rescale": False}),
    (IMAGE_FILE, "image_processor_type is 'CLIPImage", {"image_processor_type": "CLIPImageProcessor"}),
    (IMAGE_FILE, "processor_class is 'ColIdefics3Processor'", {"processor_class": "ColIdefics3Processor"}),
    (IMAGE_FILE, r"max_image_size.longest_edge is 364.*32 pixels", {"max_image_size": {"longest_edge": 364}}),
    (PROCESSOR_FILE, "processor_class is 'LlavaProcessor'", {"processor_class": "LlavaProcessor"}),
    (PROCESSOR_FILE, "image_seq_len is 5.* 4 tokens", {"image_seq_len": 5}),
    (PROCESSOR_FILE, "image_seq_len is '4'", {"image_seq_len": "4"}),
    (PROCESSOR_FILE, "image_seq_len is None", {"image_seq_len": None}),
    (PROCESSOR_FILE, "image_processor is list", {"image_processor": []}),
    (PROCESSOR_FILE, "image_processor: size is None", {"image_processor": IMAGES | {"size": None}}),
    (PROCESSOR_FILE, "chat_template is int", {"chat_template": 5}),
    ("chat_template.json", "chat_template is list without a default", {"chat_template": [{"name": "rag"}]}),
    (TOKENIZER_FILE, "eos_token is '<stop>', which is missing", {"eos_token": "<stop>"}),
    (TOKENIZER_FILE, "eos_token is 5, want a token", {"eos_token": 5}),
    (TOKENIZER_FILE, "which is missing", {"additional_special_tokens": ["<image>", {"content": "<new>"}]}),
    (TOKENIZER_FILE, "extra_special_tokens is 'a'", {"extra_special_tokens": "a"}),
    (TOKENIZER_FILE, r"added_tokens_decoder\.7 is", {"added_tokens_decoder": {"7": {"content": "<image>"}}}),
    (TOKENIZER_FILE, "added_tokens_decoder", {"added_tokens_decoder": [1]}),
    (TOKENIZER_FILE, "image_token is '<global-img>', the runtime's is", {"image_token": "<global-img>"}),
    (TOKENIZER_FILE, "NaN", {"weight": float("nan")}),
]


@pytest.mark.parametrize(("file", "complaint", "change"), REFUSED)
def test_a_wrong_field_is_refused_by_file_and_field_and_nothing_is_written(
    folder: Path, out: Path, file: str, complaint: str, change: dict[str, Any]
) -> None:
    edit(folder / file, change)
    with pytest.raises(CheckpointError, match=complaint) as error:
        write_processor_files(folder, SPEC, out, None)
    assert file in str(error.value)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
@pytest.mark.parametrize(
    "file",
    [
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer_config.json",
        "tokenizer.json",
        "generation_config.json",
        "chat_template.json",
    ],
)
def test_a_damaged_file_is_refused_by_name(folder: Path, out: Path, file: str, content: bytes) -> None:
    (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=file):
        write_processor_files(folder, SPEC, out, None)


@pytest.mark.parametrize("file", ["preprocessor_config.json", "tokenizer.json"])
def test_a_missing_file_is_refused_by_name(folder: Path, out: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=f"{file}: is missing"):
        write_processor_files(folder, SPEC, out, None)


@pytest.mark.parametrize("content", [b"\xff", b" " * (1 << 21)])
def test_a_template_file_that_is_no_text_is_refused_by_name(folder: Path, out: Path, content: bytes) -> None:
    (folder / "chat_template.json").unlink()
    (folder / "chat_template.jinja").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        write_processor_files(folder, SPEC, out, None)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"image_token_id": 0}, f"<image> is token {IMAGE_ID}, config.json's image_token_id is 0"),
        ({"text": TextSpec(64, 2, 4, 2, 16, 128, VOCAB - 1, 512, 1e4, 1e-5, False)}, f"has token {VOCAB - 1}, but"),
        ({"eos_ids": ()}, "no eos_token_id"),
        ({"scale_factor": 4}, "image_seq_len is 4"),
    ],
)
def test_files_that_disagree_with_the_model_are_refused(
    folder: Path, out: Path, change: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        write_processor_files(folder, ModelSpec(**{**vars(SPEC), **change}), out, None)


def test_a_tokenizer_without_the_formats_tokens_is_refused(folder: Path, out: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<fake_token_around_image>", "<other>"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: has no token <fake_token_around_image>"):
        write_processor_files(folder, SPEC, out, None)


# ---- templates: A is the family's format, and small changes of it

A = DEFAULT_CHAT_TEMPLATE
LINES = """<|im_start|>
{%- for message in messages %}
    {#- a comment #}
    {{- message['role'].title() + ':' }}
    {%- if (message['content'] | first).type == 'text' %}{{ ' ' }}{% endif %}
    {%- set ns = namespace(images=0) %}
    {%- for part in message.content %}
        {%- if part.type == 'image' %}
            {%- set ns.images = ns.images + 1 %}
            {{- '<image>' }}
            {%- continue %}
        {%- endif %}
        {%- generation %}{{- part.text }}{% endgeneration %}
    {%- endfor %}
    {{- '<end_of_utterance>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:' }}
{%- endif %}
"""


@pytest.mark.parametrize("template", [A, A + "\n", CHAT_TEMPLATE, DEFAULT_TEMPLATE, LINES])
def test_a_template_of_the_familys_format_passes_however_it_is_written(template: str) -> None:
    check_template(template, "it", {})


def test_a_template_may_use_the_tokenizers_named_tokens() -> None:
    template = A.replace("<|im_start|>", "{{ bos_token }}").replace("<end_of_utterance>", "{{ eos_token }}")
    tokens = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<end_of_utterance>", "pad_token": None}
    check_template(template, "it", tokens)
    with pytest.raises(CheckpointError, match="from character 0"):
        check_template(template, "it", {})


PARTS = "{% for line in message['content'] %}"  # opens the loop over a message's parts
ROLE = "{{message['role']"
OTHERS: dict[str, tuple[str, str]] = {
    "nothing": ("", "writes a question otherwise than the runtime, from character 0 on: '', want '<|im_start|>User: "),
    "no-start": (A.removeprefix("<|im_start|>"), "a question .* from character 0 on: 'User: "),
    "trimmed": (A.replace("line['text']", "line['text'] | trim"), "a question .* from character 18"),
    "html": (A.replace("line['text']", "line['text'] | escape"), "a question .* '.*&lt;b&gt;"),
    "space-after-image": (A.replace("':'}}{% else %}", "': '}}{% else %}"), "a question on an image"),
    "no-space-after-role": (A.replace("': '", "':'"), "a question "),
    "lower-case-roles": (A.replace(" | capitalize", ""), "'<|im_start.>user"),
    "images-first": (
        A.replace(PARTS, PARTS.replace(" %}", " if line.type == 'image' %}<image>{% endfor %}") + PARTS).replace(
            "{{ '<image>' }}", ""
        ),
        "a question before its image",
    ),
    "no-late-images": (
        A.replace(PARTS, PARTS + "{% if loop.index > 1 and line.type == 'image' %}{% continue %}{% endif %}"),
        "a question before its image",
    ),
    "last-turn-only": (A.replace("in messages", "in messages[-1:]"), "several turns"),
    "answers-without-end": (
        A.replace("<end_of_utterance>\n", "{% if message.role == 'user' %}{{ '<end_of_utterance>\n' }}{% endif %}"),
        "several turns",
    ),
    "default-system": ("{% if messages[0]['role'] != 'system' %}System: Help.{% endif %}" + A, "a question"),
    "no-system": (A.replace("in messages", "in messages if message['role'] != 'system'"), "a system message"),
    "refuses-system": (
        A.replace(ROLE, "{% if message.role == 'system' %}{{ raise_exception('no system!') }}{% endif %}" + ROLE),
        "cannot be rendered: TemplateError: no system!",
    ),
    "always-replies": (A.replace("{% if add_generation_prompt %}", "{% if true %}"), "Assistant:', want '"),
    "chat-ml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}",
        "from character 12",
    ),
    "syntax": ("{% for m in messages %}", "cannot be rendered: TemplateSyntaxError"),
    "wrong-key": ("{{ messages[0]['content']['nothing']['there'] }}", "cannot be rendered: UndefinedError"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_template_that_writes_something_else_is_refused_with_the_first_difference(name: str) -> None:
    template, complaint = OTHERS[name]
    with pytest.raises(CheckpointError, match=complaint) as error:
        check_template(template, "chat_template.jinja", {})
    assert str(error.value).startswith("chat_template.jinja: ")


def test_a_checkpoint_with_another_format_is_refused_and_nothing_is_written(folder: Path, out: Path) -> None:
    edit(folder / "chat_template.json", {"chat_template": A.replace("Assistant:", "Bot:")})
    with pytest.raises(
        CheckpointError, match=r"chat_template\.json: chat_template: writes a question .*Bot:.*Assistant:"
    ):
        write_processor_files(folder, SPEC, out, None)
    assert list(out.iterdir()) == []


EVERYTHING = """  {% for m in messages %}
  {{ m | tojson(indent=2) }}{% if loop.index > 2 %}{% break %}{% endif %}
  {% endfor %}
{% set ns = namespace(self=1, n=0) %}{% for m in messages %}
    {% set ns.n = ns.n + 1 %}{% generation %}{% set n = 7 %}{{ m.role }}{% endgeneration %}{{ n }}
{% endfor %}{{ ns.n }} {{ dict(a=1) | tojson }}{{ bos_token }}{{ missing }}{{ 'é<&>' | tojson }}

"""


@pytest.mark.parametrize("template", [A, CHAT_TEMPLATE, DEFAULT_TEMPLATE, LINES, EVERYTHING])
def test_templates_are_rendered_as_transformers_renders_them(template: str) -> None:
    conversations: list[list[dict[str, Any]]] = [
        [
            {
                "role": m.role,
                "content": [{"type": "text", "text": p} if p != PICTURE else {"type": "image"} for p in m.parts],
            }
            for m in messages
        ]
        for messages in SAMPLES.values()
    ]
    variables: dict[str, Any] = {"add_generation_prompt": True, "bos_token": "<|im_start|>"}
    theirs: Any = render_jinja_template(conversations, chat_template=template, **variables)
    assert render(template, [{"messages": c} | variables for c in conversations]) == theirs[0]


HOSTILE: dict[str, tuple[str, str]] = {
    "endless": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "exceeds 1 s"),
    "huge-text": ("{{ 'a' * 4000000000 }}", "MemoryError"),
    "long-text": ("{% for a in range(99999) %}{{ 'a' * 99 }}{% endfor %}", "more than 1,048,576 characters"),
    "huge-number": ("{{ 10 ** (10 ** 9) }}", "exceeds 1 s|MemoryError"),
    "python": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "globals": ("{{ cycler.__init__.__globals__.os.system('true') }}", "SecurityError"),
    "format": ("{{ '{0.__class__.__mro__}'.format('') }}", "SecurityError"),
    "namespace": ("{% set ns = namespace(_Namespace__attrs=1) %}", "SecurityError"),
    "namespace-set": ("{% set ns = namespace() %}{% set ns.__init__ = 1 %}", "SecurityError"),
    "file": ("{% include '/etc/hostname' %}", "TypeError|TemplateNotFound|no loader"),
    "mutation": ("{{ messages.append(1) }}", "SecurityError"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    "deep": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "RecursionError|exceeds"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_stopped(name: str) -> None:
    template, complaint = HOSTILE[name]
    with pytest.raises(TemplateError, match=complaint):
        render(template, [{"messages": []}], cpu_seconds=1)
