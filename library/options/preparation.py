# ruff: noqa: RUF009 - option() declares a field
"""Options of the tools that prepare a data set: captions, tags, metadata, latents, picture files, checks."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from library.options.base import OptionGroup, option
from library.options.values import file_suffix, pixel_sizes, ratio_pair, training_size, whole_size

_FOLDER = "folder with the images"
_RECURSIVE = "go into subfolders too"
_WORKERS = "threads that read images ahead; 4 when absent"


@dataclass(frozen=True, kw_only=True)
class MergeTextOptions(OptionGroup):
    """Gathering texts of a folder into a metadata file."""

    title: ClassVar[str] = "Merging into metadata"

    train_data_dir: str | None = option(None, positional=True, help=_FOLDER, metavar="DIR")
    out_json: str | None = option(None, positional=True, help="metadata file to write", metavar="FILE")
    in_json: str | None = option(
        None, help="metadata file to extend; when absent out_json is extended if it exists", metavar="FILE"
    )
    caption_extension: str = option(
        ".caption",
        convert=file_suffix,
        aliases=("caption_extention",),
        help="suffix of the text files to read",
        metavar="EXT",
    )
    full_path: bool = option(False, help="the whole path is an image's key, not its name without suffix")
    recursive: bool = option(False, help=f"{_RECURSIVE}; needs full_path")
    debug: bool = option(False, help="print each text")


@dataclass(frozen=True, kw_only=True)
class CleanOptions(OptionGroup):
    """Cleaning captions and tags of a metadata file."""

    title: ClassVar[str] = "Cleaning metadata"

    in_json: str | None = option(None, positional=True, help="metadata file to read", metavar="FILE")
    out_json: str | None = option(
        None, positional=True, help="metadata file to write; may be left out with dry_run", metavar="FILE"
    )
    third_word: str | None = option(
        None,
        positional=True,
        help="accepted for old command lines: of three words the first, a folder, is passed over",
        metavar="FILE",
    )
    legacy_rules: bool = option(
        False,
        help="exactly the rules of the original script: parts of words are replaced too, what follows a rating is lost",
    )
    dry_run: bool = option(False, help="show what would change, and write nothing")
    debug: bool = option(False, help="print each text before and after")


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(OptionGroup):
    """Training sizes and latents for the images of a metadata file."""

    title: ClassVar[str] = "Sizes and latents for metadata"

    train_data_dir: str | None = option(None, positional=True, help=_FOLDER, metavar="DIR")
    in_json: str | None = option(None, positional=True, help="metadata file to read", metavar="FILE")
    out_json: str | None = option(None, positional=True, help="metadata file to write", metavar="FILE")
    model_name_or_path: str | None = option(
        None, positional=True, help="VAE, or a model with one: file, folder or hub id", metavar="MODEL"
    )
    v2: bool = option(False, help="accepted for old command lines; has no effect")
    sdxl: bool = option(False, help="the latents are for SDXL: marked so in the files, bucket sides must suit it")
    batch_size: int = option(1, ge=1, help="images that the VAE takes at a time")
    max_data_loader_n_workers: int | None = option(None, ge=0, help=_WORKERS)
    max_resolution: tuple[int, int] = option(
        "512,512", convert=training_size, help="side, or width,height, whose area bounds the sizes", metavar="W,H"
    )
    min_bucket_reso: int = option(256, ge=8, help="shortest bucket side in pixels")
    max_bucket_reso: int = option(1024, ge=8, help="longest bucket side in pixels")
    bucket_reso_steps: int = option(
        64, ge=8, multiple_of=8, help="bucket sides are multiples of this many pixels; 32, 64, ... for SDXL"
    )
    bucket_no_upscale: bool = option(False, help="make buckets from the images' own sizes; shrink, never enlarge")
    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", help="number type in which the VAE computes")
    full_path: bool = option(False, help="the whole path is an image's key, not its name without suffix")
    flip_aug: bool = option(False, help="store the latents of the mirrored image too")
    skip_existing: bool = option(False, help="accepted for old command lines: latents that fit are never made again")
    recursive: bool = option(False, help=_RECURSIVE)


@dataclass(frozen=True, kw_only=True)
class TextToolOptions(OptionGroup):
    """What all tools have that look at images and write a text file beside each."""

    train_data_dir: str | None = option(None, positional=True, help=_FOLDER, metavar="DIR")
    caption_extension: str = option(
        ".caption",
        convert=file_suffix,
        aliases=("caption_extention",),
        help="suffix of the text files to write",
        metavar="EXT",
    )
    recursive: bool = option(False, help=_RECURSIVE)
    skip_existing: bool = option(False, help="leave images alone that have a file with this suffix already")
    batch_size: int = option(1, ge=1, help="images looked at together; does not change the texts")
    max_data_loader_n_workers: int | None = option(None, ge=0, help=_WORKERS)
    debug: bool = option(False, help="print each text")


@dataclass(frozen=True, kw_only=True)
class BlipCaptionOptions(TextToolOptions):
    """Captions by BLIP."""

    title: ClassVar[str] = "Captions by BLIP"

    caption_weights: str = option(
        "Salesforce/blip-image-captioning-large",
        help="BLIP model for captions in the form of transformers: folder or hub id",
        metavar="MODEL",
    )
    beam_search: bool = option(False, help="take the likeliest caption by beam search instead of drawing one")
    num_beams: int = option(1, ge=1, help="beams of the search")
    top_p: float = option(0.9, gt=0, le=1, help="words are drawn from the likeliest ones that have this probability")
    max_length: int = option(75, ge=1, help="longest caption in tokens, with the prompt")
    min_length: int = option(5, ge=0, help="shortest caption in tokens, with the prompt")
    seed: int = option(42, ge=0, help="another seed draws other captions")


@dataclass(frozen=True, kw_only=True)
class GitCaptionOptions(TextToolOptions):
    """Captions by GIT."""

    title: ClassVar[str] = "Captions by GIT"

    model_id: str = option("microsoft/git-large-textcaps", help="GIT model: folder or hub id", metavar="MODEL")
    max_length: int = option(50, ge=1, help="longest caption in tokens")
    remove_words: bool = option(False, help="take out what the model reads in pictures, such as: with the words ...")


@dataclass(frozen=True, kw_only=True)
class TagOptions(TextToolOptions):
    """Tags by a WD14 tagger."""

    title: ClassVar[str] = "Tags by WD14"

    repo_id: str = option(
        "SmilingWolf/wd-v1-4-convnext-tagger-v2", help="hub id of the tagger (v2 and v3 ones)", metavar="REPO"
    )
    model_dir: str = option(
        "wd14_tagger_model",
        help="folder of model.onnx and selected_tags.csv; what is missing is fetched",
        metavar="DIR",
    )
    force_download: bool = option(False, help="fetch the tagger again although it is there")
    batch_size: int = option(1, ge=1, help="images tagged together, if the model does not fix it")
    caption_extension: str = option(
        ".txt",
        convert=file_suffix,
        aliases=("caption_extention",),
        help="suffix of the tag files to write",
        metavar="EXT",
    )
    thresh: float = option(0.35, ge=0, le=1, help="least confidence of a tag")
    general_threshold: float | None = option(None, ge=0, le=1, help="of general tags; thresh when absent")
    character_threshold: float | None = option(None, ge=0, le=1, help="of characters' names; thresh when absent")
    remove_underscore: bool = option(False, help="write blanks for underscores in tags of over 3 characters")
    undesired_tags: str = option("", help="tags never written, between separators", metavar="TAGS")
    frequency_tags: bool = option(False, help="print how often each tag was given")
    onnx: bool = option(False, help="accepted for old command lines: the ONNX model is always used")
    append_tags: bool = option(False, help="keep the tags of an existing file and add the new ones")
    use_rating_tags: bool = option(False, help="write the likeliest rating as the first tag")
    character_tags_first: bool = option(False, help="write characters' names before the general tags")
    caption_separator: str = option(", ", help="what stands between tags", metavar="TEXT")


@dataclass(frozen=True, kw_only=True)
class ResizeImagesOptions(OptionGroup):
    """Smaller copies of a folder of pictures."""

    title: ClassVar[str] = "Resizing pictures"

    src_img_folder: str | None = option(None, positional=True, help="folder with the pictures", metavar="DIR")
    dst_img_folder: str | None = option(None, positional=True, help="folder of the results", metavar="DIR")
    max_resolution: tuple[tuple[int, int], ...] = option(
        "512x512,384x384,256x256,128x128",
        convert=pixel_sizes,
        help="sizes whose areas bound the results: one result of each picture for each of them",
        metavar="WxH,...",
    )
    divisible_by: int = option(1, ge=1, help="cut the results so that their sides are multiples of this")
    interpolation: Literal["area", "cubic", "lanczos4"] = option("area", help="how pixels are computed")
    save_as_png: bool = option(False, help="write PNG files instead of JPEG of quality 100")
    copy_associated_files: bool = option(False, help="copy captions and other files of a picture for each result")


@dataclass(frozen=True, kw_only=True)
class FaceOptions(OptionGroup):
    """Pictures cut and turned by the faces in them."""

    title: ClassVar[str] = "Faces"

    src_dir: str | None = option(None, help="folder with the pictures", metavar="DIR")
    dst_dir: str | None = option(None, help="folder of the results", metavar="DIR")
    rotate: bool = option(False, help="turn each picture so that the eyes are level")
    resize_fit: bool = option(False, help="scale so that the picture just covers crop_size")
    resize_face_size: int | None = option(None, ge=1, help="scale so that the face has this size in pixels")
    crop_size: tuple[int, int] | None = option(
        None, convert=whole_size, help="size of the cut around the face", metavar="W,H"
    )
    crop_ratio: tuple[float, float] | None = option(
        None, convert=ratio_pair, help="size of the cut as multiples of the face's size", metavar="H,V"
    )
    min_size: int | None = option(None, ge=1, help="pass over faces smaller than this")
    max_size: int | None = option(None, ge=1, help="pass over faces of this size or larger")
    multiple_faces: bool = option(False, help="number the results: there may be several faces in a picture")
    debug: bool = option(False, help="draw the box of the face")


@dataclass(frozen=True, kw_only=True)
class CannyOptions(OptionGroup):
    """Edges of pictures."""

    title: ClassVar[str] = "Edges"

    input: str | None = option(None, help="picture, or folder of pictures", metavar="PATH")
    output: str | None = option(None, help="picture to write, or folder for those of a folder", metavar="PATH")
    thres1: float = option(32, ge=0, help="lower threshold of the gradient")
    thres2: float = option(224, ge=0, help="upper threshold of the gradient")


@dataclass(frozen=True, kw_only=True)
class CheckDatasetOptions(OptionGroup):
    """Checking a data set before it is trained on."""

    title: ClassVar[str] = "Checking a data set"

    folder: str | None = option(
        None,
        positional=True,
        help="folder of images, or of N_name folders; instead of train_data_dir, in_json or dataset_config",
        metavar="DIR",
    )
    html: str | None = option("dataset_report.html", help="page to write; empty for none", metavar="FILE")
    max_token_length: Literal[75, 150, 225] = option(75, help="captions over this many tokens are reported")
    min_side: int | None = option(
        None, ge=1, help="images with a shorter side than this are tiny; default: 256, or the resolution if it is less"
    )
    max_megabytes: float = option(20, gt=0, help="larger files are reported")
    duplicate_distance: int = option(
        4, ge=0, le=8, help="images whose 64-bit hashes differ in at most this many bits are near duplicates"
    )
    thumbnails: int = option(60, ge=0, help="pictures shown for each kind of finding at most")
    quarantine: Path | None = option(
        None, help="move bad images, with captions and caches, to this folder", metavar="DIR"
    )
    quarantine_kinds: list[Literal["unreadable", "tiny", "duplicate", "near_duplicate"]] = option(
        ("unreadable", "tiny", "duplicate"), help="findings whose images are moved; of duplicates the largest stays"
    )
    dry_run: bool = option(False, help="say what quarantine would move, and move nothing")
