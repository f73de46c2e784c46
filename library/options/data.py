# ruff: noqa: RUF009 - option() declares a field
"""Options of the training images, their captions and the caches.

Options that may also stand in a data set file say at which levels; that file's reader takes types and ranges from here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from library.options.base import DATASET_LEVELS, SUBSET_LEVELS, OptionGroup, option
from library.options.values import ascending_pair, file_suffix, not_empty, training_size


@dataclass(frozen=True, kw_only=True)
class CaptionOptions(OptionGroup):
    """Where captions come from and how they vary."""

    caption_extension: str | None = option(
        None,
        convert=file_suffix,
        scope=SUBSET_LEVELS,
        aliases=("caption_extention",),
        help="suffix of the caption file beside an image; when absent .caption, then .txt is looked for",
        metavar="EXT",
    )
    caption_separator: str = option(
        ",", convert=not_empty, scope=SUBSET_LEVELS, help="what stands between the tags of a caption"
    )
    caption_prefix: str | None = option(None, scope=SUBSET_LEVELS, help="text put before every caption")
    caption_suffix: str | None = option(None, scope=SUBSET_LEVELS, help="text put after every caption")
    shuffle_caption: bool = option(False, scope=SUBSET_LEVELS, help="put the tags in a new random order each time")
    keep_tokens: int = option(
        0, ge=0, scope=SUBSET_LEVELS, help="this many leading tags are never shuffled, dropped or held back"
    )
    keep_tokens_separator: str = option(
        "",
        scope=SUBSET_LEVELS,
        help="mark in a caption that ends the fixed head; a second one starts a fixed tail",
        metavar="TEXT",
    )
    secondary_separator: str | None = option(
        None,
        scope=SUBSET_LEVELS,
        help="separator of tags that stay together when shuffled or dropped; becomes the normal one afterwards",
        metavar="TEXT",
    )
    enable_wildcard: bool = option(False, scope=SUBSET_LEVELS, help="choose one of {a|b|c} at random")
    caption_dropout_rate: float = option(
        0.0, ge=0, le=1, scope=SUBSET_LEVELS, help="probability that a caption is left empty"
    )
    caption_dropout_every_n_epochs: int = option(
        0, ge=0, scope=SUBSET_LEVELS, help="leave all captions empty in every N-th epoch; 0 never"
    )
    caption_tag_dropout_rate: float = option(
        0.0, ge=0, le=1, scope=SUBSET_LEVELS, help="probability that a tag outside the fixed ones is left out"
    )
    token_warmup_min: int = option(
        1, ge=0, scope=SUBSET_LEVELS, help="number of tags used at the start of the tag warm-up"
    )
    token_warmup_step: float = option(
        0, ge=0, scope=SUBSET_LEVELS, help="step from which all tags are used; below 1 a share of all steps"
    )


@dataclass(frozen=True, kw_only=True)
class DataOptions(CaptionOptions):
    """Where images come from and what is done to them, with their captions."""

    title: ClassVar[str] = "Data set"

    train_data_dir: str | None = option(
        None,
        help="parent folder of the N_class image folders; with in_json or pairs of pictures the folder of the images",
        metavar="DIR",
    )
    reg_data_dir: str | None = option(
        None, help="parent folder of the N_class folders of regularisation images", metavar="DIR"
    )
    in_json: str | None = option(None, help="metadata JSON that lists images and captions", metavar="FILE")
    dataset_config: Path | None = option(
        None, help="TOML or JSON file that describes data sets and subsets", metavar="FILE"
    )
    dataset_class: str | None = option(
        None, help="dotted path of a data set class of your own, instead of the built-in ones", metavar="CLASS"
    )
    dataset_repeats: int = option(
        1, ge=1, scope=SUBSET_LEVELS, dataset_key="num_repeats", help="default repeats of each image in an epoch"
    )
    train_batch_size: int = option(
        1, ge=1, scope=DATASET_LEVELS, dataset_key="batch_size", help="images in a batch of one process"
    )
    resolution: tuple[int, int] | None = option(
        None,
        convert=training_size,
        scope=DATASET_LEVELS,
        help="training size in pixels: one side, or width,height",
        metavar="W[,H]",
    )
    enable_bucket: bool = option(
        False,
        scope=DATASET_LEVELS,
        help="sort images into buckets of similar aspect ratio instead of cropping to one size",
    )
    min_bucket_reso: int = option(256, ge=8, scope=DATASET_LEVELS, help="shortest bucket side in pixels")
    max_bucket_reso: int = option(1024, ge=8, scope=DATASET_LEVELS, help="longest bucket side in pixels")
    bucket_reso_steps: int = option(
        64, ge=8, multiple_of=8, scope=DATASET_LEVELS, help="bucket sides are multiples of this many pixels"
    )
    bucket_no_upscale: bool = option(
        False, scope=DATASET_LEVELS, help="make buckets from the images' own sizes; shrink, never enlarge"
    )
    color_aug: bool = option(False, scope=SUBSET_LEVELS, help="small random changes of hue and brightness")
    flip_aug: bool = option(False, scope=SUBSET_LEVELS, help="mirror half of the samples left to right")
    random_crop: bool = option(False, scope=SUBSET_LEVELS, help="crop at a random place instead of the centre")
    face_crop_aug_range: tuple[float, float] | None = option(
        None,
        convert=ascending_pair,
        scope=SUBSET_LEVELS,
        help="crop around the face that the file name tells, at a random scale between two factors",
        metavar="LOW,HIGH",
    )
    alpha_mask: bool = option(
        False, scope=SUBSET_LEVELS, help="what is transparent in an image counts less in the loss, or not at all"
    )
    prior_loss_weight: float = option(1.0, ge=0, help="loss weight of regularisation images")
    max_data_loader_n_workers: int = option(
        8, ge=0, help="at most this many threads read images ahead; 0 reads in the main thread"
    )
    persistent_data_loader_workers: bool = option(
        False, help="accepted and without effect: images are read by threads, which are there at once in each epoch"
    )
    on_bad_image: Literal["skip", "error"] = option("error", help="what to do with images that cannot be read")
    on_bad_caption: Literal["skip", "error"] = option("error", help="what to do with captions that cannot be read")
    allow_captionless: bool = option(False, help="train although no image has a caption")
    debug_dataset: bool = option(
        False, help="save a sheet of what the model would see to output_dir/debug_dataset, and stop"
    )


@dataclass(frozen=True, kw_only=True)
class MaskOptions(OptionGroup):
    """Masks of a data set that stands on the command line; masked_loss switches them on."""

    title: ClassVar[str] = "Masks"

    conditioning_data_dir: str | None = option(
        None,
        help="folder of the masks for masked_loss: with a folder of the name of each folder of train_data_dir,"
        " or the masks themselves if there is only one such",
        metavar="DIR",
    )


@dataclass(frozen=True, kw_only=True)
class CacheOptions(OptionGroup):
    """Latents computed once and kept."""

    title: ClassVar[str] = "Latent cache"

    cache_latents: bool = option(False, help="encode all images once and keep their latents in memory")
    cache_latents_to_disk: bool = option(
        False, help="keep latents in .npz files beside the images; switches cache_latents on"
    )
    vae_batch_size: int = option(1, ge=1, help="images encoded together while caching")


@dataclass(frozen=True, kw_only=True)
class TextCacheOptions(OptionGroup):
    """Outputs of the text encoders computed once and kept."""

    title: ClassVar[str] = "Text encoder cache"

    cache_text_encoder_outputs: bool = option(
        False, help="encode all captions once, keep the outputs in memory and the text encoders off the device"
    )
    cache_text_encoder_outputs_to_disk: bool = option(
        False,
        help="keep them in _te_outputs.npz files beside the images; switches cache_text_encoder_outputs on",
    )
    cache_text_encoder_outputs_variants: int | None = option(
        None,
        ge=1,
        help="captions that vary (shuffle, tag dropout, wildcards): prepare this many forms of each image's caption,"
        " of which each visit takes one",
    )


@dataclass(frozen=True, kw_only=True)
class CacheToolOptions(OptionGroup):
    """What only the caching tools have."""

    title: ClassVar[str] = "Caching tools"

    skip_existing: bool = option(
        False, help="accepted for old command lines: a cache file that fits is never made again"
    )
    sdxl: bool = option(False, help="the base model is SDXL: caches for sdxl_train_network.py")
