"""Where a checkpoint is: a folder, or a model on a Hugging Face hub, of which only what is needed is fetched."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError, of the client's own HTTP library
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)

from export.spec import CheckpointError

FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "model*.safetensors",
    "model.safetensors.index.json",
    "README.md",
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")
SUBFOLDERS = "*/*"  # onnx/ and the like; FILES' star would match their slash
HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII)
CARD_CHARACTERS = 1 << 16  # of README.md, looked through for the licence


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine."""

    folder: Path
    name: str  # the hub id, or the folder's name
    revision: str | None  # the commit that a hub's revision stood for
    license: str | None  # as the model card (README.md) gives it


def resolve(model: str, files: Sequence[str] = FILES, what: str = "a checkpoint") -> Checkpoint:
    """Finds a checkpoint: a folder, or a hub id `org/name` or `org/name@revision`, fetched if need be.

    `files` are what is fetched of it, by name; with ADAPTER_FILES and `what` = "an adapter" it is a LoRA adapter.
    Without a connection, what the hub client's cache holds of the revision is used, if it is whole.

    Raises:
        CheckpointError: naming the model, if it is neither, not there, not to be had, or cannot be stored.
    """
    folder = Path(model)
    if model and folder.is_dir():
        return Checkpoint(folder, folder.resolve().name, None, _license(folder))
    if model and folder.exists():
        raise CheckpointError(f"{model}: is a file, want {what}'s folder")
    match = HUB_ID.fullmatch(model)
    if not match or ".." in model:
        raise CheckpointError(
            f"{model or 'an empty name'}: is neither a folder nor a hub id (org/name or org/name@revision)"
        )
    name, revision = match["name"], match["revision"]
    try:
        fetched = Path(
            snapshot_download(name, revision=revision, allow_patterns=list(files), ignore_patterns=[SUBFOLDERS])
        )
    except GatedRepoError as exc:
        raise CheckpointError(
            f"{name}: is gated on {constants.ENDPOINT}: accept its terms there and log in (hf auth login)"
        ) from exc
    except RepositoryNotFoundError as exc:
        raise CheckpointError(
            f"{name}: there is no such folder, and {constants.ENDPOINT} has no such model "
            "or does not show it (a private one needs a login: hf auth login)"
        ) from exc
    except RevisionNotFoundError as exc:
        raise CheckpointError(f"{name}: has no revision {revision or 'main'} on {constants.ENDPOINT}") from exc
    except IncompleteSnapshotError as exc:
        raise CheckpointError(
            f"{model}: only a part of it is in the cache ({constants.HF_HUB_CACHE}), "
            f"and {constants.ENDPOINT} cannot be reached for the rest"
        ) from exc
    except LocalEntryNotFoundError as exc:
        answer = exc.__cause__
        state = f"answers {answer.response.status_code}" if isinstance(answer, HfHubHTTPError) else "cannot be reached"
        raise CheckpointError(
            f"{model}: there is no such folder, it is not in the cache ({constants.HF_HUB_CACHE}), and "
            f"{constants.ENDPOINT} {state}; "
            "`make demo` needs no hub: it uses the checkpoint that this repository carries"
        ) from exc
    except HFValidationError as exc:
        raise CheckpointError(f"{model}: is no hub id: {exc}") from exc
    except HfHubHTTPError as exc:
        login = " (log in: hf auth login)" if exc.response.status_code in (401, 403) else ""
        raise CheckpointError(f"{model}: {constants.ENDPOINT} answers {exc.response.status_code}{login}") from exc
    except (HTTPError, XetDownloadError) as exc:
        raise CheckpointError(f"{model}: cannot be fetched from {constants.ENDPOINT}: {exc}") from exc
    except OSError as exc:
        raise CheckpointError(f"{model}: cannot be stored in {constants.HF_HUB_CACHE}: {exc}") from exc
    return Checkpoint(fetched, name, fetched.name, _license(fetched))


def _license(folder: Path) -> str | None:
    """The licence in the front matter of README.md; None where there is none that can be read."""
    try:
        with (folder / "README.md").open(encoding="utf-8-sig") as file:
            card = file.read(CARD_CHARACTERS)
    except (OSError, ValueError):
        return None
    front = re.match(r"---[ \t]*\n(.*?\n)---[ \t]*(\n|$)", card, re.DOTALL)
    fields: dict[str, str] = dict(
        re.findall(r"^(license|license_name):[ \t]*['\"]?([^\s'\"#]+)", front[1] if front else "", re.MULTILINE)
    )
    if fields.get("license") == "other":
        return fields.get("license_name", "other")
    return fields.get("license")
