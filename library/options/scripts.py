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
    DreamBoothOptions,
    EmaOptions,
    EmbeddingOptions,
    FineTuneOptions,
    HubOptions,
    LLLiteOptions,
    LogOptions,
    LoopOptions,
    LossOptions,
    MaskOptions,
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
from library.options.model_tools import ConvertModelOptions, MergeModelsOptions
from library.options.network_tools import (
    CheckOptions,
    ConvertOptions,
    DyloraSplitOptions,
    ExtractOptions,
    InterrogatorOptions,
    MergeFilesOptions,
    MergeOptions,
    MetadataToolOptions,
    ResizeOptions,
    SecondVersionOptions,
    SvdMergeOptions,
)
from library.options.preparation_scripts import PREPARATION_SCRIPTS, check_dataset_row
from library.options.scenes import MAKE_SCENES, SCORE_TINY
from library.options.settings import ScriptOptions

IMAGES = ("train_data_dir", "in_json", "dataset_config", "dataset_class")
PAIRS = ("train_data_dir", "dataset_config", "dataset_class")

TRAINING_GROUPS = (
    ConfigOptions,
    ModelOptions,
    DataOptions,
    MaskOptions,
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

TRAIN_CONTROLNET = ScriptOptions(
    name="train_controlnet.py",
    groups=with_text_cache(
        (
            *TRAINING_GROUPS[:2],
            ControlNetOptions,
            DataOptions,
            ConditioningOptions,
            *TRAINING_GROUPS[4:],
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
            *TRAINING_GROUPS[4:],
            NetworkFileOptions,
        )
    ),
    defaults=SDXL_DEFAULTS,
    required=("pretrained_model_name_or_path", "output_dir", PAIRS),
    summary="Train a ControlNet-LLLite on SDXL: a small net that draws after edges, lines or other pictures.",
    family="sdxl",
)

TRAIN_TEXTUAL_INVERSION = ScriptOptions(
    name="train_textual_inversion.py",
    groups=(*TRAINING_GROUPS[:2], EmbeddingOptions, *TRAINING_GROUPS[2:]),
    required=("pretrained_model_name_or_path", "token_string", "output_dir", IMAGES),
    summary="Teach Stable Diffusion 1.x or 2.x new words by the vectors that they stand for.",
)

SDXL_TRAIN_TEXTUAL_INVERSION = ScriptOptions(
    name="sdxl_train_textual_inversion.py",
    groups=TRAIN_TEXTUAL_INVERSION.groups,
    defaults=SDXL_DEFAULTS,
    required=TRAIN_TEXTUAL_INVERSION.required,
    summary="Teach SDXL new words by the vectors that they stand for in both text encoders.",
    family="sdxl",
)

TRAIN_TEXTUAL_INVERSION_XTI = ScriptOptions(
    name="train_textual_inversion_XTI.py",
    groups=TRAIN_TEXTUAL_INVERSION.groups,
    required=TRAIN_TEXTUAL_INVERSION.required,
    summary="Teach Stable Diffusion 1.x or 2.x new words, with other vectors for each cross-attention layer.",
)

# The caching tools take the command line and the file of any training; how models are saved is not their business.
_CACHE_GROUPS = tuple(group for group in SDXL_TRAIN_NETWORK.groups if group not in (NetworkFileOptions, MaskOptions))
_NOT_FOR_CACHES = frozenset({"cond_emb_dim", "controlnet_model_name_or_path"}).union(
    name
    for group in (DreamBoothOptions, FineTuneOptions, SdxlFullOptions, ModelFileOptions, EmbeddingOptions)
    for name in specs_by_name((group,))
)

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

MERGE_LORA = ScriptOptions(
    name="networks/merge_lora.py",
    groups=(SecondVersionOptions, MergeFilesOptions, MergeOptions, ConsoleOptions),
    required=("save_to", "models"),
    summary="Merge networks into a model, or networks with each other.",
)

SDXL_MERGE_LORA = ScriptOptions(
    name="networks/sdxl_merge_lora.py",
    groups=(MergeFilesOptions, MergeOptions, ConsoleOptions),
    required=MERGE_LORA.required,
    summary="Merge networks into an SDXL model, or networks for SDXL with each other.",
    family="sdxl",
)

SVD_MERGE_LORA = ScriptOptions(
    name="networks/svd_merge_lora.py",
    groups=(MergeFilesOptions, SvdMergeOptions, ConsoleOptions),
    required=MERGE_LORA.required,
    summary="Merge networks with each other into one of a chosen rank.",
)

CONVERT_LORA = ScriptOptions(
    name="networks/convert_lora.py",
    groups=(ConvertOptions, ConsoleOptions),
    required=("model", "save_to"),
    summary="Convert a network file between the names of this program, of Diffusers and PEFT, and of SDXL's blocks.",
)

SHOW_METADATA = ScriptOptions(
    name="tools/show_metadata.py",
    groups=(MetadataToolOptions, ConsoleOptions),
    required=("model",),
    summary="Show the metadata of a safetensors file, or change them without touching its tensors.",
)

RESIZE_LORA = ScriptOptions(
    name="networks/resize_lora.py",
    groups=(ResizeOptions, ConsoleOptions),
    required=("model", "save_to"),
    summary="Change the rank of a LoRA (or of another network that can be written as one).",
)

EXTRACT_LORA_FROM_DYLORA = ScriptOptions(
    name="networks/extract_lora_from_dylora.py",
    groups=(DyloraSplitOptions, ConsoleOptions),
    required=("unit", "save_to", "model"),
    summary="Cut a DyLoRA into LoRA files of fixed ranks.",
)

CHECK_LORA_WEIGHTS = ScriptOptions(
    name="networks/check_lora_weights.py",
    groups=(CheckOptions, ConsoleOptions),
    required=("file",),
    summary="Show what is in a network file.",
)

LORA_INTERROGATOR = ScriptOptions(
    name="networks/lora_interrogator.py",
    groups=(InterrogatorOptions, ConsoleOptions),
    required=("sd_model", "model"),
    summary="Show which tokens the text encoder part of a network changes most.",
)

EXTRACT_LORA_FROM_MODELS = ScriptOptions(
    name="networks/extract_lora_from_models.py",
    groups=(ExtractOptions, ConsoleOptions),
    required=("model_org", "model_tuned", "save_to"),
    summary="Make a LoRA of what distinguishes a tuned model from the original one.",
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
CHECK_DATASET = check_dataset_row(frozenset(specs_by_name((*_CACHE_GROUPS, SdxlFullOptions, ModelFileOptions))))

SCRIPTS = (
    TRAIN_NETWORK,
    SDXL_TRAIN_NETWORK,
    TRAIN_DB,
    FINE_TUNE,
    SDXL_TRAIN,
    TRAIN_CONTROLNET,
    SDXL_TRAIN_LLLITE,
    TRAIN_TEXTUAL_INVERSION,
    SDXL_TRAIN_TEXTUAL_INVERSION,
    TRAIN_TEXTUAL_INVERSION_XTI,
    CACHE_LATENTS,
    CACHE_TEXT,
    GEN_IMG,
    SDXL_GEN_IMG,
    LATENT_UPSCALER,
    MERGE_LORA,
    SDXL_MERGE_LORA,
    SVD_MERGE_LORA,
    CONVERT_LORA,
    SHOW_METADATA,
    RESIZE_LORA,
    EXTRACT_LORA_FROM_DYLORA,
    CHECK_LORA_WEIGHTS,
    LORA_INTERROGATOR,
    EXTRACT_LORA_FROM_MODELS,
    MERGE_MODELS,
    CONVERT_MODEL,
    *PREPARATION_SCRIPTS,
    CHECK_DATASET,
    MAKE_SCENES,
    SCORE_TINY,
)
