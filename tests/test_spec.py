"""What config.json says, against what transformers makes of the same file; and what cannot work, refused by name."""

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    Idefics3Config,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings

from export.spec import CheckpointError, ModelSpec, position_ids, read_spec, tensor_shapes
from tests.checkpoints import make_checkpoint

# As published for the 2.2B: the numbers of text heads are left out.
PUBLISHED: dict[str, Any] = {
    "architectures": ["SmolVLMForConditionalGeneration"],
    "image_token_id": 49190,
    "model_type": "smolvlm",
    "scale_factor": 3,
    "text_config": {
        "architectures": ["VLlama3ForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_hidden_layers": 24,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 130000,
        "vocab_size": 49280,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "model_type": "smolvlm_vision",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    },
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """PUBLISHED with the field at a dotted path set; ... removes it."""
    config: dict[str, Any] = json.loads(json.dumps(PUBLISHED))
    *folders, key = path.split(".")
    table = config
    for folder in folders:
        table = table[folder]
    if value is ...:
        del table[key]
    else:
        table[key] = value
    return config


def write(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def of_transformers(folder: Path) -> dict[str, Any]:
    """The same facts, from transformers' own reading of the folder."""
    config = AutoConfig.from_pretrained(folder)
    text, vision = config.text_config, config.vision_config
    return {
        "vision": (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads, vision.intermediate_size),
        "tile": (vision.image_size, vision.patch_size, vision.layer_norm_eps),
        "text": (text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads),
        "widths": (text.head_dim, text.intermediate_size, text.vocab_size, text.max_position_embeddings),
        "rope": text.rope_parameters["rope_theta"],
        "eps": text.rms_norm_eps,
        "tied": config.tie_word_embeddings,
        "image": (config.scale_factor, config.image_token_id),
    }


def of_spec(spec: ModelSpec) -> dict[str, Any]:
    text, vision = spec.text, spec.vision
    return {
        "vision": (vision.hidden, vision.layers, vision.heads, vision.ffn),
        "tile": (vision.image_size, vision.patch_size, vision.norm_eps),
        "text": (text.hidden, text.layers, text.heads, text.kv_heads),
        "widths": (text.head_dim, text.ffn, text.vocab, text.max_positions),
        "rope": text.rope_theta,
        "eps": text.norm_eps,
        "tied": text.tied,
        "image": (spec.scale_factor, spec.image_token_id),
    }


def test_the_published_2b_has_32_heads_and_81_tokens_a_tile(tmp_path: Path) -> None:
    spec = read_spec(write(tmp_path, PUBLISHED, {"bos_token_id": 0, "eos_token_id": 49279, "pad_token_id": 2}))
    assert (spec.text.heads, spec.text.kv_heads, spec.text.head_dim) == (32, 32, 64)
    assert (spec.vision.grid, spec.vision.patches, spec.vision.head_dim) == (27, 729, 72)
    assert spec.tokens_per_tile == 81
    assert (spec.bos_id, spec.eos_ids, spec.pad_id) == (0, (49279,), 2)


def test_its_tensors_have_the_published_number_of_parameters(tmp_path: Path) -> None:
    shapes = tensor_shapes(read_spec(write(tmp_path, PUBLISHED)))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 2_246_784_880


@pytest.mark.parametrize("model_type", ["smolvlm", "idefics3"])
def test_every_key_left_out_gets_the_default_of_transformers(model_type: str, tmp_path: Path) -> None:
    # The default image token is beyond the default vocabulary, so that one is given.
    config = {"model_type": model_type, "image_token_id": 7, "text_config": {}, "vision_config": {}}
    config["scale_factor"] = 1  # 2 does not divide the default grid of 7
    assert of_spec(read_spec(write(tmp_path, config))) == of_transformers(tmp_path)
    defaults = {"smolvlm": SmolVLMConfig, "idefics3": Idefics3Config}[model_type]()
    assert defaults.image_token_id == 128257
    assert defaults.scale_factor == 2


@pytest.mark.parametrize("absent", ["text_config", "vision_config"])
@pytest.mark.parametrize("value", [None, ..., {}])
def test_a_part_that_is_absent_gets_the_defaults_of_transformers(absent: str, value: Any, tmp_path: Path) -> None:
    config = changed(absent, value) | {"image_token_id": 7, "scale_factor": 1}
    assert of_spec(read_spec(write(tmp_path, config))) == of_transformers(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("text_config.num_attention_heads", 16),
        ("text_config.num_key_value_heads", None),
        ("text_config.num_key_value_heads", 8),
        ("text_config.head_dim", None),
        ("text_config.head_dim", 48),
        ("text_config.rms_norm_eps", ...),
        ("text_config.rope_theta", ...),
        ("text_config.rope_parameters", {"rope_theta": 7.0}),
        ("text_config.rope_parameters", {"rope_type": "default", "rope_theta": 7.0}),
        ("text_config.rope_scaling", {"type": "default", "rope_theta": 9.0}),
        ("text_config.rope_scaling", {"rope_type": "default"}),
        ("text_config.tie_word_embeddings", True),
        ("tie_word_embeddings", True),
        ("tie_word_embeddings", ...),
        ("vision_config.layer_norm_eps", 1e-5),
        ("vision_config.image_size", 392),
        ("some_new_key", {"of": "no concern"}),
    ],
)
def test_a_config_means_what_transformers_takes_it_to_mean(path: str, value: Any, tmp_path: Path) -> None:
    write(tmp_path, changed(path, value))
    if "image_size" in path:
        write(tmp_path, changed(path, value) | {"scale_factor": 4})
    assert of_spec(read_spec(tmp_path)) == of_transformers(tmp_path)


@pytest.mark.parametrize("top", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_the_head_is_tied_where_from_pretrained_ties_it(top: bool, inner: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c")
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"] = top, inner
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForImageTextToText.from_pretrained(folder)
    tied = model.lm_head.weight is model.model.text_model.embed_tokens.weight
    assert read_spec(folder).text.tied == tied == top


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["smolvlm", "idefics3"])
def test_tensor_shapes_are_those_of_hugging_faces_model(architecture: str, tied: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", architecture=architecture, tied=tied, head_dim=24, scale_factor=4)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert tensor_shapes(read_spec(folder)) == wanted
    assert ("lm_head.weight" in wanted) == (not tied)


@pytest.mark.parametrize(
    ("top", "text", "generation"),
    [
        ({}, {}, {"bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": 8}),
        ({}, {}, {"eos_token_id": 6}),
        ({}, {}, None),
        ({}, {"eos_token_id": [3, 4], "bos_token_id": None}, None),
        ({}, {"eos_token_id": ..., "bos_token_id": ..., "pad_token_id": ...}, None),
        ({"eos_token_id": 9, "bos_token_id": 10, "pad_token_id": 11}, {}, None),
    ],
)
def test_special_ids_are_those_that_generate_uses(
    top: dict[str, Any], text: dict[str, Any], generation: dict[str, Any] | None, tmp_path: Path
) -> None:
    config = json.loads(json.dumps(PUBLISHED)) | top
    config["text_config"] = {k: v for k, v in (config["text_config"] | text).items() if v is not ...}
    spec = read_spec(write(tmp_path, config, generation))
    if generation is None:
        wanted = GenerationConfig.from_model_config(AutoConfig.from_pretrained(tmp_path))
    else:
        wanted = GenerationConfig.from_pretrained(tmp_path)
    eos = wanted.eos_token_id if isinstance(wanted.eos_token_id, list) else [wanted.eos_token_id]
    assert spec.eos_ids == tuple(eos)
    if generation is None or "pad_token_id" in generation:
        assert (spec.bos_id, spec.pad_id) == (wanted.bos_token_id, wanted.pad_token_id)


def test_a_generation_config_without_stop_tokens_falls_back_on_the_text_model(tmp_path: Path) -> None:
    assert read_spec(write(tmp_path, changed("text_config.eos_token_id", 17), {"bos_token_id": 1})).eos_ids == (17,)


REFUSED: list[tuple[str, Any, str]] = [
    ("model_type", "llava", "model_type is 'llava', want one of smolvlm, idefics3"),
    ("model_type", ..., "model_type is None"),
    ("model_type", ["smolvlm"], "model_type is"),
    ("text_config.model_type", "mistral", "text_config.model_type is 'mistral'"),
    ("text_config", [], "text_config is list, want an object"),
    ("vision_config", "siglip", "vision_config is str, want an object"),
    ("quantization_config", {"bits": 4}, "has quantization_config"),
    ("text_config.quantization_config", {"bits": 4}, "text_config: has quantization_config"),
    ("text_config.attention_bias", True, "attention_bias is True"),
    ("text_config.mlp_bias", True, "mlp_bias is True"),
    ("text_config.hidden_act", "gelu", "hidden_act is 'gelu', the only activation supported is silu"),
    ("vision_config.hidden_act", "relu", "hidden_act is 'relu', want one of gelu_pytorch_tanh, gelu"),
    ("vision_config.hidden_act", {}, "hidden_act is {}"),
    ("vision_config.num_channels", 4, "num_channels is 4"),
    ("text_config.rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling is of type 'linear'"),
    ("text_config.rope_parameters", {"rope_type": "yarn", "rope_theta": 1.0}, "rope_parameters is of type 'yarn'"),
    ("text_config.rope_parameters", {"full_attention": {"rope_theta": 1.0}}, "has full_attention"),
    ("text_config.rope_parameters", {"rope_theta": "x"}, "rope_parameters.rope_theta is 'x'"),
    ("text_config.rope_theta", None, "rope_theta is None"),
    ("text_config.rope_theta", 0, "rope_theta is 0"),
    ("text_config.rope_theta", float("nan"), "rope_theta is nan"),
    ("text_config.rope_theta", float("inf"), "rope_theta is inf"),
    ("text_config.partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5"),
    ("text_config.hidden_size", 2049, "hidden_size is 2049, no multiple of num_attention_heads 32"),
    ("text_config.num_key_value_heads", 5, "num_attention_heads is 32, no multiple of num_key_value_heads 5"),
    ("text_config.num_key_value_heads", 0, "num_key_value_heads is 0"),
    ("text_config.head_dim", 63, "head_dim is 63, want an even number"),
    ("text_config.vocab_size", 100, "image_token_id is 49190, want a whole number from 0 to 99"),
    ("text_config.rms_norm_eps", -1e-5, "rms_norm_eps is -1e-05"),
    ("text_config.rms_norm_eps", True, "rms_norm_eps is True"),
    ("text_config.hidden_size", None, "hidden_size is None"),
    ("vision_config.hidden_size", 1150, "hidden_size is 1150, no multiple of num_attention_heads 16"),
    ("vision_config.patch_size", 400, "image_size is 384 and patch_size 400: 0 patches a side"),
    ("vision_config.patch_size", 1, "384 patches a side, want 1 to 256"),
    ("vision_config.image_size", [384, 384], r"image_size is \[384, 384\]"),
    ("scale_factor", 4, "scale_factor is 4, but a tile has 27 patches a side"),
    ("scale_factor", 0, "scale_factor is 0"),
    ("image_token_id", -1, "image_token_id is -1"),
    ("image_token_id", ..., "image_token_id is left out, so 128257"),
    ("tie_word_embeddings", None, "tie_word_embeddings is None"),
    ("tie_word_embeddings", 1, "tie_word_embeddings is 1"),
    ("text_config.eos_token_id", 49280, "eos_token_id is 49280, want a token id below 49280"),
    ("text_config.eos_token_id", ["</s>"], "eos_token_id is '</s>'"),
    ("text_config.pad_token_id", True, "pad_token_id is True"),
]


@pytest.mark.parametrize(("path", "value", "message"), REFUSED)
def test_what_cannot_work_is_refused_by_name(path: str, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_spec(write(tmp_path, changed(path, value)))
    assert "config.json" in str(caught.value)


SIZES = [
    *(f"text_config.{k}" for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")),
    *(f"text_config.{k}" for k in ("vocab_size", "max_position_embeddings", "head_dim", "num_key_value_heads")),
    *(f"vision_config.{k}" for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")),
    *("vision_config.image_size", "vision_config.patch_size", "scale_factor", "image_token_id"),
]


@pytest.mark.parametrize("path", SIZES)
@pytest.mark.parametrize("value", [-1, True, "64", 64.0, 10**12, 10**4000, [64], float("nan")])
def test_hostile_numbers_are_refused_by_name(path: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=path.rsplit(".", maxsplit=1)[-1]):
        read_spec(write(tmp_path, changed(path, value)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", "holds list"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"model_type": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_a_config_that_is_no_object_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config.json: .*{message}"):
        read_spec(tmp_path)


def test_a_missing_config_and_a_lone_adapter_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json: is missing"):
        read_spec(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="LoRA adapter"):
        read_spec(tmp_path)


def reference_ids(grid: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The ids that the untouched SmolVLMVisionEmbeddings looks up for a full tile."""
    embeddings = SmolVLMVisionEmbeddings(
        SmolVLMVisionConfig(hidden_size=1, num_attention_heads=1, image_size=grid, patch_size=1)
    )
    embeddings.patch_embedding.weight.data.zero_()
    assert embeddings.patch_embedding.bias is not None
    embeddings.patch_embedding.bias.data.zero_()
    embeddings.position_embedding.weight.data[:, 0] = torch.arange(grid * grid)
    found = embeddings(torch.zeros(1, 3, grid, grid), torch.ones(1, grid, grid, dtype=torch.bool))
    ids: np.ndarray[Any, np.dtype[np.int64]] = found[0, :, 0].long().numpy()
    return ids


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="PyTorch rounds differently elsewhere")
def test_position_ids_are_those_of_the_reference_for_every_grid() -> None:
    differ = [grid for grid in range(2, 65) if not np.array_equal(position_ids(grid), reference_ids(grid))]
    assert differ == []


def test_position_ids_count_up_only_where_the_reference_does() -> None:
    for grid in (1, 4, 26, 27, 32):
        assert np.array_equal(position_ids(grid), np.arange(grid * grid)), grid
    for grid in (19, 25, 29, 31, 40, 41):
        ids = position_ids(grid)
        assert not np.array_equal(ids, np.arange(grid * grid)), grid
        assert ids.dtype == np.int64
        assert 0 <= ids.min() <= ids.max() < grid * grid


def test_the_reference_looks_at_whole_patches_only(tmp_path: Path) -> None:
    """384 = 27 * 14 + 6: the last pixels of a row and a column change nothing, so no multiple is asked for."""
    folder = make_checkpoint(tmp_path / "c")  # 60 = 4 * 14 + 4
    model = SmolVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    pixels = torch.randn(1, 1, 3, 60, 60, generator=torch.Generator().manual_seed(0))
    changed = pixels.clone()
    changed[..., 56:, :] = 0
    changed[..., :, 56:] = 0
    with torch.no_grad():
        a, b = (torch.cat(model.get_image_features(p).pooler_output) for p in (pixels, changed))
    spec = read_spec(folder)
    assert a.shape == (spec.tokens_per_tile, spec.text.hidden)
    assert torch.equal(a, b)
