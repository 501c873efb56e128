"""Hugging Face's own SmolVLMProcessor, as an oracle for tests, in a process of its own.

It imports torchvision, for its video half. torchvision has no build that fits every torch, so `make setup`
puts it beside the environment (.venv/oracle) and here, in the child, the two operators that it wants to find
in its missing library are declared. In any other process `import transformers` stays as users have it.
"""

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

ORACLE = Path(sys.prefix) / "oracle"

Size = tuple[int, int]  # width and height of a blank image
Turn = tuple[str, tuple[str | Size, ...]]  # a role, and texts and images in order


class HfProcessor:
    """The processors of checkpoint folders; `AutoProcessor.from_pretrained` loads each on first use."""

    def __init__(self) -> None:
        if not ORACLE.is_dir():
            raise RuntimeError(f"{ORACLE}: is missing; `make setup` installs torchvision there")
        self._child = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"},
            text=True,
            encoding="utf-8",
        )
        atexit.register(self.close)

    def ask(self, folder: Path, turns: Sequence[Turn], **options: Any) -> dict[str, Any]:
        """What the processor in `folder` makes of a conversation.

        Args:
            folder: the checkpoint.
            turns: the conversation.
            options: reply (end with the opening of an answer), sanitize (user text gives no special tokens),
                settings (of the image processor, for this call).

        Returns:
            `text` and `ids` as apply_chat_template gives them, and `ids_of_text`, the processor's for that
            text (absent with `sanitize`); or `error` alone.
        """
        return self._request({"folder": str(folder), "turns": turns} | options)

    def ask_video(
        self, folder: Path, question: str, frames: Sequence[int] | Path, fps: float, duration: float, **options: Any
    ) -> dict[str, Any]:
        """What the processor in `folder` makes of a question that follows a video.

        Args:
            folder: the checkpoint; its preprocessor_config.json has `video_sampling`.
            question: the text.
            frames: a file of u8 [N, H, W, 3], or N, H and W of a black video.
            fps: of the video.
            duration: of the video in seconds.
            options: num_frames (at most), before (a text in front of the video), pixels (file for f32 [N, 3, S, S]).

        Returns:
            `text` with the video expanded, its `ids`, and the frames' `indices`; or `error` alone.
        """
        given = str(frames) if isinstance(frames, Path) else list(frames)
        video = {"frames": given, "fps": fps, "duration": duration, "question": question} | options
        return self._request({"folder": str(folder), "video": video})

    def _request(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._child.stdin
        assert self._child.stdout
        self._child.stdin.write(json.dumps(request) + "\n")
        self._child.stdin.flush()
        answer = self._child.stdout.readline()
        if not answer:
            raise RuntimeError("Hugging Face's processor stopped: see its traceback")
        found: dict[str, Any] = json.loads(answer)
        return found

    def save(self, folder: Path, to: Path) -> None:
        """Has the processor in `folder` save itself as its version of transformers does."""
        found = self._request({"folder": str(folder), "save": str(to)})
        assert "error" not in found, found["error"]

    def close(self) -> None:
        """Ends the process."""
        self._child.communicate()


@cache
def hf_processor() -> HfProcessor:
    """The one process that all tests share."""
    return HfProcessor()


# ---- the child


def declare_operators() -> Any:
    """Gives torch the schemas that torchvision's library would bring; they last as long as the result."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


@cache
def load(folder: str) -> Any:
    """The processor of a checkpoint."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder, local_files_only=True)


def answer_video(processor: Any, video: dict[str, Any]) -> dict[str, Any]:
    """See HfProcessor.ask_video."""
    import numpy as np

    given = video["frames"]
    frames = np.load(given) if isinstance(given, str) else np.zeros((*given, 3), dtype=np.uint8)
    content = [{"type": "video"}, {"type": "text", "text": video["question"]}]
    if "before" in video:
        content.insert(0, {"type": "text", "text": video["before"]})
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    metadata = {"total_num_frames": len(frames), "fps": video["fps"], "duration": video["duration"]}
    found = processor.video_processor(
        [frames],
        video_metadata=[metadata],
        do_sample_frames=True,
        num_frames=video.get("num_frames"),
        return_metadata=True,
        return_tensors="pt",
    )
    if "pixels" in video:
        np.save(video["pixels"], found["pixel_values"][0].numpy())
    whole = processor(
        text=text,
        videos=[frames],
        return_tensors="pt",
        videos_kwargs={
            "video_metadata": [metadata],
            "do_sample_frames": True,
            "num_frames": video.get("num_frames", processor.video_processor.num_frames),
        },
    )
    return {
        "text": text.replace("<video>", processor.replace_video_token(found, 0)),
        "ids": whole["input_ids"][0].tolist(),
        "indices": [int(i) for i in found["video_metadata"][0].frames_indices],
    }


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """See HfProcessor.ask, ask_video and save."""
    from PIL import Image

    processor = load(request["folder"])
    if "video" in request:
        return answer_video(processor, request["video"])
    if "save" in request:
        processor.save_pretrained(request["save"])
        return {}
    conversation: list[dict[str, Any]] = []
    for role, parts in request["turns"]:
        content = [
            {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": Image.new("RGB", p)}
            for p in parts
        ]
        conversation.append({"role": role, "content": content})
    images = [part["image"] for message in conversation for part in message["content"] if part["type"] == "image"]
    reply, settings = request.get("reply", True), request.get("settings", {})
    text = processor.apply_chat_template(conversation, add_generation_prompt=reply)
    options: dict[str, Any] = {"sanitize_control_tokens": True} if request.get("sanitize") else {}
    ids = processor.apply_chat_template(
        conversation,
        add_generation_prompt=reply,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"images_kwargs": settings},
        **options,
    )["input_ids"][0]
    found = {"text": text, "ids": ids}
    if not options:
        found["ids_of_text"] = processor(text=text, images=images or None, images_kwargs=settings)["input_ids"][0]
    return found


def main() -> None:
    """Answers requests, one JSON object a line."""
    sys.path.append(str(ORACLE))
    _operators = declare_operators()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed goes to stderr
    for line in sys.stdin:
        try:
            found = answer(json.loads(line))
        except Exception as exc:  # noqa: BLE001  # the caller is told of every refusal
            found = {"error": f"{type(exc).__name__}: {exc}"}
        print(json.dumps(found), file=replies, flush=True)


if __name__ == "__main__":
    main()
