"""The option rows of the scripts: which groups each has, what it cannot do without."""

from library.options import (
    CacheOptions,
    CacheToolOptions,
    ConditioningOptions,
    ConfigOptions,
    ConsoleOptions,
    ControlFileOptions,
    ControlNetOptions,
    DataOptions,
    HubOptions,
    LLLiteOptions,
    LogOptions,
    LoopOptions,
    LossOptions,
    MetadataOptions,
    ModelFileOptions,
    ModelOptions,
    NetworkFileOptions,
    NetworkOptions,
    NoiseOptions,
    OptimizerOptions,
    PrecisionOptions,
    SampleOptions,
    SaveOptions,
    ScheduleOptions,
    SdxlFullOptions,
    TextCacheOptions,
)
from library.options.base import OptionGroup, specs_by_name
from library.options.generation import (
    ControlOptions,
    DrawOptions,
    GenModelOptions,
    GenNetworkOptions,
    HighresOptions,
    OutputOptions,
    PictureOptions,
    PromptOptions,
    UpscaleToolOptions,
)
from library.options.model_tools import ConvertModelOptions, MergeModelsOptions
from library.options.network_tools import MetadataToolOptions
from library.options.settings import ScriptOptions

IMAGES = ("train_data_dir", "in_json", "dataset_config", "dataset_class")
PAIRS = ("train_data_dir", "dataset_config", "dataset_class")

TRAINING_GROUPS = (
    ConfigOptions,
    ModelOptions,
    DataOptions,
    CacheOptions,
    LoopOptions,
    OptimizerOptions,
    ScheduleOptions,
    NoiseOptions,
    LossOptions,
    PrecisionOptions,
    SaveOptions,
    MetadataOptions,
    SampleOptions,
    LogOptions,
    ConsoleOptions,
    HubOptions,
)

TRAIN_NETWORK = ScriptOptions(
    name="train_network.py",
    groups=(*TRAINING_GROUPS[:2], NetworkOptions, *TRAINING_GROUPS[2:], NetworkFileOptions),
    required=("pretrained_model_name_or_path", "network_module", "output_dir", IMAGES),
    summary="Train a LoRA or another network on Stable Diffusion 1.x or 2.x.",
)

SDXL_DEFAULTS = {"bucket_reso_steps": 32, "sample_sampler": "euler_a"}


def with_text_cache(groups: tuple[type[OptionGroup], ...]) -> tuple[type[OptionGroup], ...]:
    """The groups of a script that can also cache text encoder outputs, which stand behind the latent cache."""
    place = groups.index(CacheOptions) + 1
    return (*groups[:place], TextCacheOptions, *groups[place:])


SDXL_TRAIN_NETWORK = ScriptOptions(
    name="sdxl_train_network.py",
    groups=with_text_cache(TRAIN_NETWORK.groups),
    defaults=SDXL_DEFAULTS,
    required=TRAIN_NETWORK.required,
    summary="Train a LoRA or another network on SDXL.",
    family="sdxl",
)

SDXL_TRAIN = ScriptOptions(
    name="sdxl_train.py",
    groups=with_text_cache((*TRAINING_GROUPS[:2], SdxlFullOptions, *TRAINING_GROUPS[2:], ModelFileOptions)),
    defaults=SDXL_DEFAULTS,
    required=("pretrained_model_name_or_path", "output_dir", IMAGES),
    summary="Train the U-Net and the text encoders of SDXL themselves.",
    family="sdxl",
)

TRAIN_CONTROLNET = ScriptOptions(
    name="train_controlnet.py",
    groups=with_text_cache(
        (
            *TRAINING_GROUPS[:2],
            ControlNetOptions,
            DataOptions,
            ConditioningOptions,
            *TRAINING_GROUPS[3:],
            ControlFileOptions,
        )
    ),
    required=("pretrained_model_name_or_path", "output_dir", PAIRS),
    summary="Train a ControlNet on Stable Diffusion 1.x, 2.x or SDXL: it draws after edges, lines or other pictures.",
)

SDXL_TRAIN_LLLITE = ScriptOptions(
    name="sdxl_train_control_net_lllite.py",
    groups=with_text_cache(
        (
            *TRAINING_GROUPS[:2],
            LLLiteOptions,
            DataOptions,
            ConditioningOptions,
            *TRAINING_GROUPS[3:],
            NetworkFileOptions,
        )
    ),
    defaults=SDXL_DEFAULTS,
    required=("pretrained_model_name_or_path", "output_dir", PAIRS),
    summary="Train a ControlNet-LLLite on SDXL: a small net that draws after edges, lines or other pictures.",
    family="sdxl",
)

# The caching tools take the command line and the file of any training; how models are saved is not their business.
_CACHE_GROUPS = tuple(group for group in SDXL_TRAIN_NETWORK.groups if group is not NetworkFileOptions)
_NOT_FOR_CACHES = frozenset(specs_by_name((SdxlFullOptions, ModelFileOptions))) | {
    "cond_emb_dim",
    "controlnet_model_name_or_path",
}

CACHE_LATENTS = ScriptOptions(
    name="tools/cache_latents.py",
    groups=(*_CACHE_GROUPS, ConditioningOptions, CacheToolOptions),
    passes_over=_NOT_FOR_CACHES,
    defaults={"cache_latents": True, "cache_latents_to_disk": True},
    required=("pretrained_model_name_or_path", IMAGES),
    summary="Encode training images ahead of time into .npz files. Takes the options (and the file) of the training.",
)

CACHE_TEXT = ScriptOptions(
    name="tools/cache_text_encoder_outputs.py",
    groups=(*_CACHE_GROUPS, ConditioningOptions, CacheToolOptions),
    passes_over=_NOT_FOR_CACHES,
    defaults={**SDXL_DEFAULTS, "cache_text_encoder_outputs": True, "cache_text_encoder_outputs_to_disk": True},
    required=("pretrained_model_name_or_path", IMAGES),
    summary="Encode captions ahead of time into .npz files (SDXL). Takes the options (and the file) of the training.",
    family="sdxl",
)

GENERATION_GROUPS = (
    ConfigOptions,
    GenModelOptions,
    PromptOptions,
    DrawOptions,
    PictureOptions,
    HighresOptions,
    GenNetworkOptions,
    ControlOptions,
    OutputOptions,
    ConsoleOptions,
)

GEN_IMG = ScriptOptions(
    name="gen_img.py",
    groups=GENERATION_GROUPS,
    required=(("prompt", "from_file", "from_module", "from_image", "interactive", "image_path"),),
    summary="Draw pictures with Stable Diffusion 1.x, 2.x or SDXL.",
)

SDXL_GEN_IMG = ScriptOptions(
    name="sdxl_gen_img.py",
    groups=GENERATION_GROUPS,
    defaults={"sdxl": True},
    required=GEN_IMG.required,
    summary="Draw pictures with SDXL: gen_img.py with --sdxl.",
)

LATENT_UPSCALER = ScriptOptions(
    name="tools/latent_upscaler.py",
    groups=(UpscaleToolOptions, ConsoleOptions),
    required=("vae_path", "weights", "image_pattern"),
    summary="Enlarge picture files to twice their size with the latent upscaler of highres fix.",
)

SHOW_METADATA = ScriptOptions(
    name="tools/show_metadata.py",
    groups=(MetadataToolOptions, ConsoleOptions),
    required=("model",),
    summary="Show the metadata of a safetensors file, or change them without touching its tensors.",
)

MERGE_MODELS = ScriptOptions(
    name="tools/merge_models.py",
    groups=(MergeModelsOptions, ConsoleOptions),
    required=("models", "output"),
    summary="Merge checkpoint files of one family: each tensor is the weighted mean of the models'.",
)

CONVERT_MODEL = ScriptOptions(
    name="tools/convert_diffusers20_original_sd.py",
    groups=(ConvertModelOptions, ConsoleOptions),
    required=("model_to_load", "model_to_save"),
    summary="Convert a model between a checkpoint file and a Diffusers folder (SD 1.x, SD 2.x, SDXL).",
)

SCRIPTS = (
    TRAIN_NETWORK,
    SDXL_TRAIN_NETWORK,
    SDXL_TRAIN,
    TRAIN_CONTROLNET,
    SDXL_TRAIN_LLLITE,
    CACHE_LATENTS,
    CACHE_TEXT,
    GEN_IMG,
    SDXL_GEN_IMG,
    LATENT_UPSCALER,
    SHOW_METADATA,
    MERGE_MODELS,
    CONVERT_MODEL,
)
