# ruff: noqa: RUF009 - option() declares a field
"""Options of the base model, of how captions become tokens, and of precision and memory."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from library.options.base import OptionGroup, option

DynamoBackend = Literal[
    "no",
    "eager",
    "aot_eager",
    "inductor",
    "aot_ts_nvfuser",
    "nvprims_nvfuser",
    "cudagraphs",
    "ofi",
    "fx2trt",
    "onnxrt",
]


@dataclass(frozen=True, kw_only=True)
class ModelOptions(OptionGroup):
    """The base model and how text enters it."""

    title: ClassVar[str] = "Base model"

    pretrained_model_name_or_path: str | None = option(
        None, help="base model: a checkpoint file, a Diffusers folder or a hub id", metavar="MODEL"
    )
    v2: bool = option(False, help="the base model is of the SD 2.x family; must agree with the file")
    v_parameterization: bool = option(False, help="the model predicts velocity v rather than noise")
    vae: str | None = option(None, help="VAE file, folder or hub id in place of the base model's own", metavar="MODEL")
    tokenizer_cache_dir: str | None = option(
        None, help="folder with a saved tokenizer to use instead of the built-in one", metavar="DIR"
    )
    max_token_length: Literal[75, 150, 225] | None = option(
        None, help="how many tokens of a caption are used; 75 when absent"
    )
    clip_skip: int | None = option(
        None, ge=1, help="take the n-th hidden layer from the end of the text encoder, followed by its final norm"
    )
    weighted_captions: bool = option(False, help="understand (word:1.2) weights in captions; SD 1.x and 2.x only")


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions(OptionGroup):
    """Number formats, attention, memory and compilation."""

    title: ClassVar[str] = "Precision and memory"

    mixed_precision: Literal["no", "fp16", "bf16"] = option(
        "no", help="type of the frozen weights and of the computation; no is float32"
    )
    full_fp16: bool = option(False, help="keep trained weights and gradients in fp16 too; needs mixed_precision fp16")
    full_bf16: bool = option(False, help="keep trained weights and gradients in bf16 too; needs mixed_precision bf16")
    fp8_base: bool = option(False, help="hold the frozen base model in float8 e4m3; needs mixed_precision fp16 or bf16")
    no_half_vae: bool = option(False, help="run the VAE in float32 whatever mixed_precision says")
    gradient_checkpointing: bool = option(
        False, help="recompute activations in the backward pass: less memory, more time"
    )
    sdpa: bool = option(False, help="torch's scaled dot product attention; it is the default anyway")
    xformers: bool = option(False, help="attention of the xformers package; refused if it cannot work here")
    mem_eff_attn: bool = option(False, help="sliced attention: least memory, slow; wins over xformers and sdpa")
    lowram: bool = option(False, help="load models straight onto the device, one process after the other")
    highvram: bool = option(False, help="do not empty the device's cache between pieces of work")
    torch_compile: bool = option(False, help="compile the models with torch.compile")
    dynamo_backend: DynamoBackend = option("inductor", help="compiler used with torch_compile; no switches it off")
    deterministic: bool = option(
        False, help="use only algorithms whose result is the same every time; may be slower on a GPU"
    )
