# ruff: noqa: RUF009 - option() declares a field
"""Options of image generation: what is drawn, how, and where the pictures go."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from library.options.base import OptionGroup, option
from library.options.saving import Sampler


@dataclass(frozen=True, kw_only=True)
class GenModelOptions(OptionGroup):
    """The model and the precision it runs in."""

    title: ClassVar[str] = "Model"

    ckpt: str | None = option(None, help="checkpoint file, Diffusers folder, hub id, or a pattern that one file fits")
    sdxl: bool = option(False, help="the model is SDXL; found out from the file when no kind is named")
    v1: bool = option(False, help="the model is of the SD 1.x family")
    v2: bool = option(False, help="the model is of the SD 2.x family")
    v_parameterization: bool = option(False, help="the model predicts velocity; taken from the file when it says so")
    zero_terminal_snr: bool = option(False, help="noise schedule that ends in pure noise; taken from the file too")
    vae: str | None = option(None, help="VAE file, folder or hub id in place of the model's own", metavar="MODEL")
    tokenizer_cache_dir: str | None = option(
        None, help="folder with a saved tokenizer to use instead of the built-in one", metavar="DIR"
    )
    fp16: bool = option(False, help="compute in float16; wins over bf16")
    bf16: bool = option(False, help="compute in bfloat16")
    no_half_vae: bool = option(False, help="run the VAE in float32 all the same")
    sdpa: bool = option(False, help="torch's scaled dot product attention; it is the default anyway")
    xformers: bool = option(False, help="attention of the xformers package; refused if it cannot work here")
    diffusers_xformers: bool = option(False, help="the same as xformers")
    opt_channels_last: bool = option(False, help="channels-last memory layout, faster on some graphics cards")
    torch_compile: bool = option(False, help="compile the U-Net's blocks; the first step of each size takes longer")
    lowram: bool = option(False, help="keep the text encoders and the VAE off the device while they are not at work")


@dataclass(frozen=True, kw_only=True)
class PromptOptions(OptionGroup):
    """Where prompts come from and how text is read."""

    title: ClassVar[str] = "Prompts"

    prompt: str | None = option(None, help="one prompt, with in-line options", metavar="TEXT")
    from_file: str | None = option(None, help="text file with one prompt in each line", metavar="FILE")
    from_module: str | None = option(
        None, help="Python file that makes prompts: get_prompter(args, pipe, networks)", metavar="FILE"
    )
    prompter_module_args: str | None = option(None, help="text handed to the prompt module", metavar="TEXT")
    from_image: list[str] | None = option(
        None, help="repeat pictures that this program drew, from what is written in them", metavar="FILE"
    )
    interactive: bool = option(False, help="read prompts from the keyboard until the end of input")
    no_preview: bool = option(False, help="open no window with the picture in interactive mode")
    images_per_prompt: int = option(1, ge=1, help="pictures of each prompt")
    n_iter: int = option(1, ge=1, help="how often the whole list of prompts is gone through")
    shuffle_prompts: bool = option(False, help="bring the prompts in a new order in each iteration")
    seed: int | None = option(
        None, ge=0, lt=2**63, help="seed of the one picture, or of the row of seeds when several are asked for"
    )
    iter_same_seed: bool = option(False, help="one seed for all pictures of an iteration that name none themselves")
    clip_skip: int | None = option(None, ge=1, help="layer of the text encoder, counted from the end")
    max_embeddings_multiples: int | None = option(
        None, ge=1, le=20, help="prompts may have 75 tokens times this", metavar="N"
    )
    emb_normalize_mode: Literal["original", "none", "abs"] = option(
        "original", help="how the mean is kept when weights change a text: by mean, by mean of sizes, not at all"
    )
    textual_inversion_embeddings: list[str] | None = option(
        None, help="embedding files; the file's name is the word that calls it", metavar="FILE"
    )
    XTI_embeddings: list[str] | None = option(
        None, help="embedding files with one embedding for each layer", metavar="FILE"
    )
    dry_run: bool = option(False, help="print the pictures that would be drawn, and stop")


@dataclass(frozen=True, kw_only=True)
class DrawOptions(OptionGroup):
    """Size, steps and sampler of pictures that say nothing else themselves."""

    title: ClassVar[str] = "Drawing"

    W: int | None = option(None, ge=64, le=16384, help="width in pixels; the model's usual size when absent")
    H: int | None = option(None, ge=64, le=16384, help="height in pixels")
    steps: int = option(50, ge=1, le=1000, help="sampling steps")
    sampler: Sampler = option("ddim", help="sampler")
    scale: float = option(7.5, help="guidance scale; 1 or less draws without guidance")
    negative_scale: float | None = option(None, help="guidance scale of the negative prompt by itself")
    original_width: int | None = option(None, ge=0, help="SDXL: width that the picture pretends to be made from")
    original_height: int | None = option(None, ge=0, help="SDXL: height that the picture pretends to be made from")
    original_width_negative: int | None = option(None, ge=0, help="SDXL: the same width for the negative prompt")
    original_height_negative: int | None = option(None, ge=0, help="SDXL: the same height for the negative prompt")
    crop_top: int | None = option(None, ge=0, help="SDXL: rows cut off at the top, as the picture pretends")
    crop_left: int | None = option(None, ge=0, help="SDXL: columns cut off at the left, as the picture pretends")
    batch_size: int = option(1, ge=1, help="pictures drawn together")
    vae_batch_size: float | None = option(
        None, gt=0, help="pictures that the VAE takes at a time; below 1 a share of the batch"
    )
    vae_slices: int | None = option(None, ge=1, help="the VAE works in this many horizontal slices, to save memory")
    vae_tiling: bool = option(False, help="the VAE works tile by tile, to save memory at large sizes")


@dataclass(frozen=True, kw_only=True)
class PictureOptions(OptionGroup):
    """Pictures to begin from."""

    title: ClassVar[str] = "Image to image"

    image_path: str | None = option(
        None, aliases=("img_path",), help="picture, or folder of pictures, to begin from", metavar="PATH"
    )
    mask_path: str | None = option(
        None,
        aliases=("mask_image",),
        help="mask, or folder of masks: white is drawn anew; with networks and AND the regions of the sub-prompts",
        metavar="PATH",
    )
    strength: float | None = option(
        None, ge=0, le=1, help="how far a given picture is changed: 0 not at all, 1 wholly; 0.8 when absent"
    )
    clip_vision_strength: float | None = option(
        None, help="SDXL: the picture's CLIP vector, times this, takes the place of the prompt's pooled one"
    )
    clip_vision_model: str = option(
        "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", help="CLIP image model for clip_vision_strength", metavar="MODEL"
    )


@dataclass(frozen=True, kw_only=True)
class OutputOptions(OptionGroup):
    """Where pictures go and what they are called."""

    title: ClassVar[str] = "Output"

    outdir: str = option("outputs", help="folder of the pictures", metavar="DIR")
    sequential_file_name: bool = option(False, help="number the files instead of naming them by time and seed")
    use_original_file_name: bool = option(False, help="name files like the pictures that they began from")
    preview_every_n_steps: int | None = option(
        None, ge=1, help="write outdir/preview.png, a small picture of the present state, every N steps"
    )
    grid: bool = option(False, help="also write one labelled sheet of all pictures")
    grid_networks: list[str] | None = option(
        None, help="network files or patterns: a sheet of these files times grid_weights", metavar="FILE"
    )
    grid_weights: str | None = option(
        None, help="multipliers for grid_networks, separated by commas; 1 when absent", metavar="W,W,..."
    )


@dataclass(frozen=True, kw_only=True)
class HighresOptions(OptionGroup):
    """Large pictures."""

    title: ClassVar[str] = "High resolution"

    highres_fix_scale: float | None = option(
        None, gt=0, le=1, help="draw at this share of the size first, enlarge, and draw again"
    )
    highres_fix_steps: int = option(28, ge=1, le=1000, help="steps of the first stage")
    highres_fix_strength: float | None = option(
        None,
        ge=0,
        le=1,
        help="strength of the first stage if it begins from a picture; that of the picture when absent",
    )
    highres_fix_save_1st: bool = option(False, help="save the first stage's pictures too")
    highres_fix_latents_upscaling: bool = option(False, help="enlarge latents rather than pixels")
    highres_fix_upscaler: str | None = option(
        None, help="module that enlarges: tools.latent_upscaler", metavar="MODULE"
    )
    highres_fix_upscaler_args: str | None = option(
        None, help="arguments of the module: key=value;key=value", metavar="ARGS"
    )
    highres_fix_disable_control_net: bool = option(False, help="no ControlNet in the second stage")
    ds_depth_1: int | None = option(None, ge=0, le=8, help="Deep Shrink: block before which the picture is made small")
    ds_timesteps_1: int = option(650, ge=0, le=1000, help="Deep Shrink: down to this timestep")
    ds_depth_2: int | None = option(None, ge=0, le=8, help="Deep Shrink: second block, after the first timestep")
    ds_timesteps_2: int = option(650, ge=0, le=1000, help="Deep Shrink: second block down to this timestep")
    ds_ratio: float = option(0.5, gt=0, le=1, help="Deep Shrink: how small")
    gradual_latent_timesteps: int | None = option(
        None, ge=0, le=1000, help="Gradual Latent: grow from this timestep on; switches it on (euler_a)"
    )
    gradual_latent_ratio: float = option(0.5, gt=0, le=1, help="Gradual Latent: size at the start")
    gradual_latent_ratio_step: float = option(0.125, gt=0, le=1, help="Gradual Latent: growth each time")
    gradual_latent_every_n_steps: int = option(
        3,
        ge=1,
        aliases=("gradual_latent_ratio_every_n_steps",),
        help="Gradual Latent: steps from one growth to the next",
    )
    gradual_latent_s_noise: float = option(1.0, ge=0, help="Gradual Latent: strength of noise when growing")
    gradual_latent_unsharp_params: str | None = option(
        None, help="Gradual Latent: ksize,sigma,strength[,target_x] of a sharpening", metavar="NUMBERS"
    )


@dataclass(frozen=True, kw_only=True)
class GenNetworkOptions(OptionGroup):
    """Networks that change the model."""

    title: ClassVar[str] = "Networks"

    network_module: list[str] | None = option(
        None, help="module of each network; networks.lora when absent", metavar="MODULE"
    )
    network_weights: list[str] | None = option(None, help="file of each network", metavar="FILE")
    network_mul: list[float] | None = option(None, help="strength of each network; 1 when absent")
    network_args: list[str] | None = option(None, help="arguments of each network: key=value;key=value", metavar="ARGS")
    network_show_meta: bool = option(False, help="print the metadata of the network files")
    network_merge: bool = option(False, help="merge all networks into the model before drawing")
    network_merge_n_models: int | None = option(None, ge=1, help="merge the first N networks, keep the others live")
    network_pre_calc: bool = option(False, help="put networks into the weights before each batch, reversibly")
    network_regional_mask_max_color_codes: int | None = option(
        None, ge=1, le=8, help="the region mask has this many colour codes instead of three channels"
    )
    hypernetwork_weights: list[str] | None = option(None, help="hypernetwork files (.pt)", metavar="FILE")
    hypernetwork_mul: list[float] | None = option(None, help="strength of each hypernetwork; 1 when absent")


@dataclass(frozen=True, kw_only=True)
class ControlOptions(OptionGroup):
    """ControlNet, ControlNet-LLLite, and guidance by pictures and texts."""

    title: ClassVar[str] = "Control"

    guide_image_path: list[str] | None = option(None, help="guide pictures or folders of them", metavar="PATH")
    control_net_models: list[str] | None = option(None, help="ControlNet files or folders", metavar="FILE")
    control_net_lllite_models: list[str] | None = option(None, help="ControlNet-LLLite files (SDXL)", metavar="FILE")
    control_net_preps: list[str] | None = option(
        None,
        help="what is done to the guide picture of each net: none, canny, canny_LOW_HIGH, lineart, scribble, invert, "
        "gray, recolor, blur_SIGMA, tile_FACTOR, threshold_LEVEL; none when absent",
        metavar="NAME",
    )
    control_net_multipliers: list[float] | None = option(
        None, aliases=("control_net_weights",), help="strength of each ControlNet; 1 when absent"
    )
    control_net_ratios: list[float] | None = option(
        None, ge=0, le=1, help="share of the steps, from the first, in which each ControlNet acts; 1 when absent"
    )
    clip_guidance_scale: float = option(
        0.0, help="strength of guidance by a text through CLIP; all guidance needs ddim, pndm, lms"
    )
    clip_image_guidance_scale: float = option(0.0, help="strength of guidance by a picture through CLIP")
    clip_guidance_model: str = option(
        "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", help="CLIP model of the guidance", metavar="MODEL"
    )
    vgg16_guidance_scale: float = option(0.0, help="strength of guidance by a picture through VGG16")
    vgg16_guidance_layer: int = option(20, ge=0, le=30, help="layer of VGG16 whose features are compared")
    vgg16_weights: str | None = option(
        None, help="torchvision's file with VGG16's weights (vgg16-397923af.pth)", metavar="FILE"
    )


@dataclass(frozen=True, kw_only=True)
class UpscaleToolOptions(OptionGroup):
    """Enlarging picture files with the latent upscaler."""

    title: ClassVar[str] = "Latent upscaler"

    vae_path: str | None = option(None, help="VAE: file, its folder, or a Diffusers model's folder", metavar="PATH")
    weights: str | None = option(None, help="weights of the latent upscaler", metavar="FILE")
    image_pattern: str | None = option(None, help="picture file, or a pattern of several", metavar="PATTERN")
    output_dir: str = option(".", help="folder of the enlarged pictures", metavar="DIR")
    batch_size: int = option(4, ge=1, help="pictures of one size that are enlarged together")
    vae_batch_size: int = option(1, ge=1, help="pictures that the VAE takes at a time")
    debug: bool = option(False, help="also save what plain Lanczos scaling gives")
