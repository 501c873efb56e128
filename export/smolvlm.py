"""The SmolVLM architecture, written once against a small set of operations.

B batch, T tokens, P patches, H heads, G kv heads, D head width, C channels.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from export.spec import ModelSpec, TextSpec, VisionSpec

V = TypeVar("V")  # a value in the target's graph

VISION = "model.vision_model"
TEXT = "model.text_model"
CONNECTOR = "model.connector.modality_projection.proj.weight"
EMBED = f"{TEXT}.embed_tokens.weight"
HEAD = "lm_head.weight"


class Ops(Protocol[V]):
    """What a target implements. Weights are named as in the checkpoint; the recipe decides their format."""

    def linear(self, x: V, weights: Sequence[str], biases: Sequence[str] = ()) -> V:
        """x W^T + b; several matrices are stacked along their outputs."""

    def linears(self, x: V, weights: Sequence[str], biases: Sequence[str] = ()) -> list[V]:
        """Several projections of one x, each on its own."""

    def add(self, a: V, b: V) -> V: ...
    def layer_norm(self, x: V, name: str, eps: float) -> V: ...
    def rms_norm(self, x: V, weight: str, eps: float) -> V: ...
    def add_rms_norm(self, x: V, residual: V, weight: str, eps: float) -> tuple[V, V]:
        """(rms_norm(x + residual), x + residual)"""

    def gelu(self, x: V, kind: str) -> V: ...
    def silu_gate(self, gate: V, up: V) -> V:
        """silu(gate) * up"""

    def patch_embed(self, pixels: V, vision: VisionSpec) -> V:
        """[3, S, S] -> [1, P, C], patches row by row, positions added."""

    def attend_all(self, q: V, k: V, v: V, heads: int) -> V:
        """Attention without a mask over [1, P, H*D]."""

    def attend_cached(self, qkv: V, layer: int, text: TextSpec) -> V:
        """Causal attention with RoPE and a KV cache over [B, T, (H + 2G)*D]."""

    def pixel_shuffle(self, x: V, grid: int, factor: int) -> V:
        """[1, P, C] -> [1, P / factor^2, C * factor^2]"""

    def last_rows(self, x: V) -> V:
        """The rows of [B, T, C] whose logits are asked for."""


def vision_tower(ops: Ops[V], spec: ModelSpec, pixels: V) -> V:
    """One tile [3, S, S] -> its features [1, L, hidden], L = spec.tokens_per_tile."""
    vision = spec.vision
    x = ops.patch_embed(pixels, vision)  # [1, P, C]
    for i in range(vision.layers):
        at = f"{VISION}.encoder.layers.{i}"
        h = ops.layer_norm(x, f"{at}.layer_norm1", vision.norm_eps)
        names = [f"{at}.self_attn.{p}_proj" for p in "qkv"]
        q, k, v = ops.linears(h, [f"{n}.weight" for n in names], [f"{n}.bias" for n in names])
        h = ops.attend_all(q, k, v, vision.heads)
        h = ops.linear(h, [f"{at}.self_attn.out_proj.weight"], [f"{at}.self_attn.out_proj.bias"])
        x = ops.add(x, h)
        h = ops.layer_norm(x, f"{at}.layer_norm2", vision.norm_eps)
        h = ops.linear(h, [f"{at}.mlp.fc1.weight"], [f"{at}.mlp.fc1.bias"])
        h = ops.gelu(h, vision.activation)
        h = ops.linear(h, [f"{at}.mlp.fc2.weight"], [f"{at}.mlp.fc2.bias"])
        x = ops.add(x, h)
    x = ops.layer_norm(x, f"{VISION}.post_layernorm", vision.norm_eps)
    x = ops.pixel_shuffle(x, vision.grid, spec.scale_factor)  # [1, L, C * factor^2]
    return ops.linear(x, [CONNECTOR])


def decoder(ops: Ops[V], spec: ModelSpec, x: V) -> V:
    """Embeddings [B, T, hidden] -> logits of the rows asked for [B, rows, vocab]."""
    text = spec.text
    h = ops.rms_norm(x, f"{TEXT}.layers.0.input_layernorm.weight", text.norm_eps)
    for i in range(text.layers):
        at = f"{TEXT}.layers.{i}"
        h = ops.linear(h, [f"{at}.self_attn.{p}_proj.weight" for p in "qkv"])
        h = ops.attend_cached(h, i, text)  # [B, T, H*D]
        h = ops.linear(h, [f"{at}.self_attn.o_proj.weight"])
        h, x = ops.add_rms_norm(h, x, f"{at}.post_attention_layernorm.weight", text.norm_eps)
        gate, up = ops.linears(h, [f"{at}.mlp.gate_proj.weight", f"{at}.mlp.up_proj.weight"])
        h = ops.linear(ops.silu_gate(gate, up), [f"{at}.mlp.down_proj.weight"])
        if i + 1 < text.layers:
            h, x = ops.add_rms_norm(h, x, f"{TEXT}.layers.{i + 1}.input_layernorm.weight", text.norm_eps)
        else:
            x = ops.last_rows(ops.add(h, x))
    h = ops.rms_norm(x, f"{TEXT}.norm.weight", text.norm_eps)
    return ops.linear(h, [EMBED if text.tied else HEAD])


def stacked_name(weights: Sequence[str]) -> str:
    """The name of matrices that are stacked along their outputs: the first one's, and the projections of the others."""
    return "+".join([weights[0], *(name.split(".")[-2] for name in weights[1:])])


def matrices(spec: ModelSpec) -> Iterator[str]:
    """Names of the tensors that a recipe may quantize, in the order of the graphs."""
    yield EMBED
    for i in range(spec.vision.layers):
        at = f"{VISION}.encoder.layers.{i}"
        yield from (f"{at}.self_attn.{p}_proj.weight" for p in ("q", "k", "v", "out"))
        yield from (f"{at}.mlp.{p}.weight" for p in ("fc1", "fc2"))
    yield CONNECTOR
    for i in range(spec.text.layers):
        at = f"{TEXT}.layers.{i}"
        yield from (f"{at}.self_attn.{p}_proj.weight" for p in "qkvo")
        yield from (f"{at}.mlp.{p}_proj.weight" for p in ("gate", "up", "down"))
    if not spec.text.tied:
        yield HEAD
