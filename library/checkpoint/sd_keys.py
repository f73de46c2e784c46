"""Key tables of Stable Diffusion files, generated from the block structure of an `ArchitectureSpec`.

Left: names in a Stability single file. Right: names in a Diffusers folder (the program's canonical names).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from library.checkpoint.keymap import ROWS, KeyMap, Operation, Row
from library.models.spec import ArchitectureSpec, TextEncoderSpec, UNetSpec, VaeSpec

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
HUGGINGFACE_PREFIX = "cond_stage_model.transformer."
OPENCLIP_PREFIX = "cond_stage_model.model."
TEXT_PREFIXES = {"huggingface": HUGGINGFACE_PREFIX, "openclip": OPENCLIP_PREFIX}

# Keys that are known and not needed: averaged copies, schedule tables, counters, markers, leftovers of training.
_IGNORABLE = (
    r"^model_ema\.",
    r"position_ids$",
    r"^(betas|logvar|scale_factor|lvlb_weights|global_step|epoch|v_pred|ztsnr|edm_vpred\.\w+|denoiser\.sigmas)$",
    r"^(alphas|sqrt|log_one_minus|posterior)\w*$",
    r"^model\.(betas|alphas|sqrt|log_one_minus|posterior)\w*$",
    r"^first_stage_model\.(loss|model_ema)\.",
    r"^cond_stage_model\.(logit_scale|text_projection|model\.logit_scale|model\.text_projection|model\.attn_mask)$",
    r"^cond_stage_model\.transformer\.(text_projection\.weight|logit_scale|visual_projection\.weight)$",
    r"^(cond_stage_model\.transformer\.vision_model|embedding_manager)\.",
)


def key_map(spec: ArchitectureSpec) -> KeyMap:
    """The table of an SD1 or SD2 model of any width."""
    if spec.family not in ("sd1", "sd2"):
        raise ValueError(f"there is no SD key table for {spec.family}")
    text = spec.text_encoders[0]
    rows = [
        *_prefixed("unet", UNET_PREFIX, unet_rows(spec.unet)),
        *_prefixed("text_encoder", TEXT_PREFIXES[text.layout], text_rows(text)),
        *_prefixed("vae", VAE_PREFIX, vae_rows(spec.vae)),
    ]
    ignorable: list[str] = [*_IGNORABLE]
    if text.layout == "openclip":  # the layers after the last one that is kept
        ignorable.append(rf"^{re.escape(OPENCLIP_PREFIX)}transformer\.resblocks\.{text.layers}\.")
    return KeyMap(tuple(rows), (UNET_PREFIX, TEXT_PREFIXES[text.layout], VAE_PREFIX), re.compile("|".join(ignorable)))


def aliases(file_keys: Iterable[str]) -> dict[str, str]:
    """Table key -> key that stands in the file instead: SD1 text encoders of an older naming lack ``text_model.``."""
    old = re.compile(rf"^{re.escape(HUGGINGFACE_PREFIX)}(embeddings|encoder|final_layer_norm)\.")
    found: dict[str, str] = {}
    for key in file_keys:
        if old.match(key):
            found[HUGGINGFACE_PREFIX + "text_model." + key[len(HUGGINGFACE_PREFIX) :]] = key
    return found


Pair = tuple[str, str, Operation]


def _prefixed(part: str, prefix: str, pairs: Iterable[Pair]) -> Iterator[Row]:
    for file_key, key, operation in pairs:
        yield Row(prefix + file_key, part, key, operation)


def _layer(file: str, canonical: str, bias: bool = True, operation: Operation = Operation.COPY) -> Iterator[Pair]:
    """Weight and bias of one layer; the operation concerns the weight."""
    yield f"{file}.weight", f"{canonical}.weight", operation
    if bias:
        yield f"{file}.bias", f"{canonical}.bias", Operation.COPY


# ---- U-Net


def unet_rows(spec: UNetSpec) -> Iterator[Pair]:
    """Names below ``model.diffusion_model.`` and in ``unet/``; also serves SDXL's levels and depths."""
    yield from _layer("time_embed.0", "time_embedding.linear_1")
    yield from _layer("time_embed.2", "time_embedding.linear_2")
    if spec.vector_width is not None:
        yield from _layer("label_emb.0.0", "add_embedding.linear_1")
        yield from _layer("label_emb.0.2", "add_embedding.linear_2")
    yield from _layer("input_blocks.0.0", "conv_in")
    yield from _down_rows(spec)
    yield from _unet_resnet("middle_block.0", "mid_block.resnets.0", shortcut=False)
    yield from _transformer("middle_block.1", "mid_block.attentions.0", spec.mid_depth)
    yield from _unet_resnet("middle_block.2", "mid_block.resnets.1", shortcut=False)
    yield from _up_rows(spec)
    yield from _layer("out.0", "conv_norm_out")
    yield from _layer("out.2", "conv_out")


def _down_rows(spec: UNetSpec) -> Iterator[Pair]:
    per_level = spec.layers_per_level + 1  # ResNets and the downsampler
    for level, (width, depth) in enumerate(zip(spec.widths, spec.depths, strict=True)):
        for layer in range(spec.layers_per_level):
            file = f"input_blocks.{per_level * level + layer + 1}"
            widened = layer == 0 and level > 0 and spec.widths[level - 1] != width
            yield from _unet_resnet(f"{file}.0", f"down_blocks.{level}.resnets.{layer}", widened)
            yield from _transformer(f"{file}.1", f"down_blocks.{level}.attentions.{layer}", depth)
        if level < len(spec.widths) - 1:
            yield from _layer(
                f"input_blocks.{per_level * (level + 1)}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
            )


def _up_rows(spec: UNetSpec) -> Iterator[Pair]:
    per_level = spec.layers_per_level + 1
    for level, depth in enumerate(reversed(spec.depths)):
        for layer in range(per_level):
            file = f"output_blocks.{per_level * level + layer}"
            # the skip connection is concatenated, so the input is always wider than the output
            yield from _unet_resnet(f"{file}.0", f"up_blocks.{level}.resnets.{layer}", shortcut=True)
            yield from _transformer(f"{file}.1", f"up_blocks.{level}.attentions.{layer}", depth)
        if level < len(spec.widths) - 1:
            place = 2 if depth else 1
            file = f"output_blocks.{per_level * level + spec.layers_per_level}.{place}.conv"
            yield from _layer(file, f"up_blocks.{level}.upsamplers.0.conv")


def _unet_resnet(file: str, canonical: str, shortcut: bool) -> Iterator[Pair]:
    yield from _layer(f"{file}.in_layers.0", f"{canonical}.norm1")
    yield from _layer(f"{file}.in_layers.2", f"{canonical}.conv1")
    yield from _layer(f"{file}.emb_layers.1", f"{canonical}.time_emb_proj")
    yield from _layer(f"{file}.out_layers.0", f"{canonical}.norm2")
    yield from _layer(f"{file}.out_layers.3", f"{canonical}.conv2")
    if shortcut:
        yield from _layer(f"{file}.skip_connection", f"{canonical}.conv_shortcut")


def _transformer(file: str, canonical: str, depth: int) -> Iterator[Pair]:
    """Names inside a transformer are the same on both sides; nothing if ``depth`` is 0."""
    if not depth:
        return
    names = [("norm", True), ("proj_in", True)]
    for block in (f"transformer_blocks.{index}" for index in range(depth)):
        for attention in ("attn1", "attn2"):
            names += [(f"{block}.{attention}.{name}", False) for name in ("to_q", "to_k", "to_v")]
            names.append((f"{block}.{attention}.to_out.0", True))
        names += [(f"{block}.{name}", True) for name in ("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2")]
    names.append(("proj_out", True))
    for name, bias in names:
        yield from _layer(f"{file}.{name}", f"{canonical}.{name}", bias)


# ---- VAE


def vae_rows(spec: VaeSpec) -> Iterator[Pair]:
    """Names below ``first_stage_model.`` and in ``vae/``."""
    for half in ("encoder", "decoder"):
        yield from _layer(f"{half}.conv_in", f"{half}.conv_in")
        yield from _vae_resnet(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", shortcut=False)
        yield from _vae_attention(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0")
        yield from _vae_resnet(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", shortcut=False)
        yield from _layer(f"{half}.norm_out", f"{half}.conv_norm_out")
        yield from _layer(f"{half}.conv_out", f"{half}.conv_out")
    last = len(spec.widths) - 1
    for level, width in enumerate(spec.widths):
        for layer in range(spec.layers_per_level):
            widened = layer == 0 and level > 0 and spec.widths[level - 1] != width
            file = f"encoder.down.{level}.block.{layer}"
            yield from _vae_resnet(file, f"encoder.down_blocks.{level}.resnets.{layer}", widened)
        if level < last:
            file = f"encoder.down.{level}.downsample.conv"
            yield from _layer(file, f"encoder.down_blocks.{level}.downsamplers.0.conv")
    upwards = tuple(reversed(spec.widths))
    for level, width in enumerate(upwards):  # the file counts the decoder's levels the other way round
        for layer in range(spec.layers_per_level + 1):
            narrowed = layer == 0 and level > 0 and upwards[level - 1] != width
            file = f"decoder.up.{last - level}.block.{layer}"
            yield from _vae_resnet(file, f"decoder.up_blocks.{level}.resnets.{layer}", narrowed)
        if level < last:
            file = f"decoder.up.{last - level}.upsample.conv"
            yield from _layer(file, f"decoder.up_blocks.{level}.upsamplers.0.conv")
    yield from _layer("quant_conv", "quant_conv")
    yield from _layer("post_quant_conv", "post_quant_conv")


def _vae_resnet(file: str, canonical: str, shortcut: bool) -> Iterator[Pair]:
    for name in ("norm1", "conv1", "norm2", "conv2"):
        yield from _layer(f"{file}.{name}", f"{canonical}.{name}")
    if shortcut:
        yield from _layer(f"{file}.nin_shortcut", f"{canonical}.conv_shortcut")


def _vae_attention(file: str, canonical: str) -> Iterator[Pair]:
    yield from _layer(f"{file}.norm", f"{canonical}.group_norm")
    for ours, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        yield from _layer(f"{file}.{ours}", f"{canonical}.{theirs}", operation=Operation.SQUEEZE_HW)


# Names that early Diffusers versions gave to the VAE's attention.
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def modern_vae_key(key: str) -> str:
    """A Diffusers VAE key in today's naming."""
    for old, new in OLD_VAE_ATTENTION.items():
        key = re.sub(rf"(\.attentions\.\d+\.){old}\.", rf"\g<1>{new}.", key)
    return key


# ---- text encoders


def text_rows(spec: TextEncoderSpec) -> Iterator[Pair]:
    """Names below the text encoder's prefix and in ``text_encoder/``."""
    yield from _openclip_rows(spec) if spec.layout == "openclip" else _huggingface_rows(spec)


def _huggingface_rows(spec: TextEncoderSpec) -> Iterator[Pair]:
    names = ["embeddings.token_embedding.weight", "embeddings.position_embedding.weight"]
    for layer in (f"encoder.layers.{index}" for index in range(spec.layers)):
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            names += [f"{layer}.self_attn.{name}.weight", f"{layer}.self_attn.{name}.bias"]
        for name in ("layer_norm1", "mlp.fc1", "mlp.fc2", "layer_norm2"):
            names += [f"{layer}.{name}.weight", f"{layer}.{name}.bias"]
    names += ["final_layer_norm.weight", "final_layer_norm.bias"]
    for name in names:
        yield f"text_model.{name}", f"text_model.{name}", Operation.COPY


def _openclip_rows(spec: TextEncoderSpec) -> Iterator[Pair]:
    embeddings = "text_model.embeddings"
    yield "token_embedding.weight", f"{embeddings}.token_embedding.weight", Operation.COPY
    yield "positional_embedding", f"{embeddings}.position_embedding.weight", Operation.COPY
    for index in range(spec.layers):
        file, layer = f"transformer.resblocks.{index}", f"text_model.encoder.layers.{index}"
        for kind in ("weight", "bias"):
            for name, operation in zip(("q_proj", "k_proj", "v_proj"), ROWS, strict=True):
                yield f"{file}.attn.in_proj_{kind}", f"{layer}.self_attn.{name}.{kind}", operation
        yield from _layer(f"{file}.attn.out_proj", f"{layer}.self_attn.out_proj")
        yield from _layer(f"{file}.ln_1", f"{layer}.layer_norm1")
        yield from _layer(f"{file}.ln_2", f"{layer}.layer_norm2")
        yield from _layer(f"{file}.mlp.c_fc", f"{layer}.mlp.fc1")
        yield from _layer(f"{file}.mlp.c_proj", f"{layer}.mlp.fc2")
    yield from _layer("ln_final", "text_model.final_layer_norm")
    if spec.projection_width is not None:
        yield "text_projection", "text_projection.weight", Operation.TRANSPOSE
