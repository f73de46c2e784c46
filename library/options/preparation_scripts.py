"""The option rows of the tools that prepare a data set."""

from library.options import ConfigOptions, ConsoleOptions, DataOptions, MaskOptions
from library.options.preparation import (
    BlipCaptionOptions,
    CannyOptions,
    CheckDatasetOptions,
    CleanOptions,
    FaceOptions,
    GitCaptionOptions,
    MergeTextOptions,
    PrepareOptions,
    ResizeImagesOptions,
    TagOptions,
)
from library.options.settings import ScriptOptions

MERGE_CAPTIONS = ScriptOptions(
    name="tools/merge_captions_to_metadata.py",
    groups=(MergeTextOptions, ConsoleOptions),
    required=("train_data_dir", "out_json"),
    summary="Gather the caption files of a folder into a metadata file.",
)

MERGE_TAGS = ScriptOptions(
    name="tools/merge_dd_tags_to_metadata.py",
    groups=(MergeTextOptions, ConsoleOptions),
    defaults={"caption_extension": ".txt"},
    required=("train_data_dir", "out_json"),
    summary="Gather the tag files of a folder into a metadata file.",
)

CLEAN_METADATA = ScriptOptions(
    name="tools/clean_captions_and_tags.py",
    groups=(CleanOptions, ConsoleOptions),
    required=("in_json", ("out_json", "dry_run")),
    summary="Clean the captions and tags of a metadata file.",
)

PREPARE_LATENTS = ScriptOptions(
    name="tools/prepare_buckets_latents.py",
    groups=(PrepareOptions, ConsoleOptions),
    required=("train_data_dir", "in_json", "out_json", "model_name_or_path"),
    summary="Give the images of a metadata file their training sizes, and encode them.",
)

MAKE_CAPTIONS = ScriptOptions(
    name="tools/make_captions.py",
    groups=(BlipCaptionOptions, ConsoleOptions),
    required=("train_data_dir",),
    summary="Write a caption file beside each image of a folder, by BLIP.",
)

MAKE_CAPTIONS_GIT = ScriptOptions(
    name="tools/make_captions_by_git.py",
    groups=(GitCaptionOptions, ConsoleOptions),
    required=("train_data_dir",),
    summary="Write a caption file beside each image of a folder, by GIT.",
)

TAG_IMAGES = ScriptOptions(
    name="tools/tag_images_by_wd14_tagger.py",
    groups=(TagOptions, ConsoleOptions),
    required=("train_data_dir",),
    summary="Write a tag file beside each image of a folder, by a WD14 tagger.",
)

RESIZE_IMAGES = ScriptOptions(
    name="tools/resize_images_to_resolution.py",
    groups=(ResizeImagesOptions, ConsoleOptions),
    required=("src_img_folder", "dst_img_folder"),
    summary="Write smaller copies of the pictures of a folder.",
)

DETECT_FACES = ScriptOptions(
    name="tools/detect_face_rotate.py",
    groups=(FaceOptions, ConsoleOptions),
    required=("src_dir", "dst_dir"),
    summary="Cut and turn pictures by the faces in them.",
)

CANNY = ScriptOptions(
    name="tools/canny.py",
    groups=(CannyOptions, ConsoleOptions),
    required=("input", "output"),
    summary="Draw the edges of pictures, white on black: guide pictures for ControlNets.",
)

CHECK_GROUPS = (CheckDatasetOptions, ConfigOptions, DataOptions, MaskOptions, ConsoleOptions)


def check_dataset_row(names_of_trainings: frozenset[str]) -> ScriptOptions:
    """The row of tools/check_dataset.py, which takes the file of any training and reads what is about the data."""
    return ScriptOptions(
        name="tools/check_dataset.py",
        groups=CHECK_GROUPS,
        required=(("folder", "train_data_dir", "in_json", "dataset_config"),),
        summary="Report what is wrong with a data set, in words and as a page; takes the file of a training too.",
        passes_over=names_of_trainings,
    )


PREPARATION_SCRIPTS = (
    MERGE_CAPTIONS,
    MERGE_TAGS,
    CLEAN_METADATA,
    PREPARE_LATENTS,
    MAKE_CAPTIONS,
    MAKE_CAPTIONS_GIT,
    TAG_IMAGES,
    RESIZE_IMAGES,
    DETECT_FACES,
    CANNY,
)
