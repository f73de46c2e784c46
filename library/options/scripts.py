"""The option rows of the scripts: which groups each has, what it cannot do without."""

from library.options import (
    CacheOptions,
    CacheToolOptions,
    ConfigOptions,
    ConsoleOptions,
    DataOptions,
    DreamBoothOptions,
    EmaOptions,
    FineTuneOptions,
    HubOptions,
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
    ValidationOptions,
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
from library.options.settings import ScriptOptions

IMAGES = ("train_data_dir", "in_json", "dataset_config", "dataset_class")

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
    ValidationOptions,
    EmaOptions,
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

MODEL_REQUIRED = ("pretrained_model_name_or_path", "output_dir", IMAGES)


def full_groups(own: type[OptionGroup]) -> tuple[type[OptionGroup], ...]:
    """The groups of a script that trains the model itself; ``own`` is the group of its parts and rates."""
    return (*TRAINING_GROUPS[:2], own, *TRAINING_GROUPS[2:], ModelFileOptions)


TRAIN_DB = ScriptOptions(
    name="train_db.py",
    groups=full_groups(DreamBoothOptions),
    required=MODEL_REQUIRED,
    summary="Train Stable Diffusion 1.x or 2.x itself on folders of images (DreamBooth).",
)

FINE_TUNE = ScriptOptions(
    name="fine_tune.py",
    groups=full_groups(FineTuneOptions),
    required=MODEL_REQUIRED,
    summary="Train Stable Diffusion 1.x or 2.x itself on captioned images.",
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
    groups=with_text_cache(full_groups(SdxlFullOptions)),
    defaults=SDXL_DEFAULTS,
    required=MODEL_REQUIRED,
    summary="Train the U-Net and the text encoders of SDXL themselves.",
    family="sdxl",
)

# The caching tools take the command line and the file of any training; how models are saved is not their business.
_CACHE_GROUPS = tuple(group for group in SDXL_TRAIN_NETWORK.groups if group is not NetworkFileOptions)
_NOT_FOR_CACHES = frozenset(
    name
    for group in (DreamBoothOptions, FineTuneOptions, SdxlFullOptions, ModelFileOptions)
    for name in specs_by_name((group,))
)

CACHE_LATENTS = ScriptOptions(
    name="tools/cache_latents.py",
    groups=(*_CACHE_GROUPS, CacheToolOptions),
    passes_over=_NOT_FOR_CACHES,
    defaults={"cache_latents": True, "cache_latents_to_disk": True},
    required=("pretrained_model_name_or_path", IMAGES),
    summary="Encode training images ahead of time into .npz files. Takes the options (and the file) of the training.",
)

CACHE_TEXT = ScriptOptions(
    name="tools/cache_text_encoder_outputs.py",
    groups=(*_CACHE_GROUPS, CacheToolOptions),
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

SCRIPTS = (
    TRAIN_NETWORK,
    SDXL_TRAIN_NETWORK,
    TRAIN_DB,
    FINE_TUNE,
    SDXL_TRAIN,
    CACHE_LATENTS,
    CACHE_TEXT,
    GEN_IMG,
    SDXL_GEN_IMG,
    LATENT_UPSCALER,
)
