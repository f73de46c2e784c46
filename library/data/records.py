"""The plain data that pass between the rooms of the data side, and what follows from them alone. No heavy imports.

Sizes are ``(width, height)`` in pixels unless a name ends in ``_hw``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Size = tuple[int, int]
OnBad = Literal["skip", "error"]
"""What is done with a file that cannot be used: left out and named, or the run is refused."""

LATENT_STRIDE = 8
"""Pixels per latent, in both directions: every training side is a multiple of it."""


class DatasetKind(Enum):
    """Where captions and sizes come from."""

    DREAMBOOTH = "dreambooth"  # a folder of images with caption files
    FINETUNE = "finetune"  # a metadata JSON
    CONTROL = "controlnet"  # a folder of images with caption files, and a folder with a conditioning picture for each


@dataclass(frozen=True, slots=True)
class CaptionRules:
    """What is done to a caption at training time; the fields are the options of the same names.

    ``templates``: sentences of which each visit takes one in place of the caption (they follow from options that a run
    records).
    """

    caption_separator: str = ","
    caption_prefix: str = ""
    caption_suffix: str = ""
    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str = ""
    enable_wildcard: bool = False
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    token_warmup_step: float = 0.0
    templates: tuple[str, ...] = field(default=(), repr=False)

    @property
    def is_random(self) -> bool:
        """True if the rendered caption may differ from one visit of an image to the next."""
        return self.is_varied or self.can_drop or self.token_warmup_step > 0

    @property
    def can_drop(self) -> bool:
        """True if a visit may leave the whole caption empty."""
        return self.caption_dropout_rate > 0 or self.caption_dropout_every_n_epochs > 0

    @property
    def is_varied(self) -> bool:
        """True if draws may give a caption that is not dropped another text from one visit to the next."""
        return bool(self.varying or self.templates)

    @property
    def varying(self) -> tuple[str, ...]:
        """The names of the options that are on and make draws change the text of a caption."""
        names = ("shuffle_caption", "enable_wildcard", "caption_tag_dropout_rate")
        return tuple(name for name in names if getattr(self, name))


@dataclass(frozen=True, slots=True)
class CaptionClock:
    """The moment of the run that captions depend on: epoch from 1, optimizer step from 0, planned steps."""

    epoch: int
    step: int
    max_train_steps: int


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What is done to an image at training time."""

    flip_aug: bool = False
    color_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class BucketRules:
    """How image sizes become training sizes."""

    resolution: Size
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False


@dataclass(frozen=True, slots=True)
class SubsetSpec:
    """One folder or metadata file with its rules. ``caption_extension`` None: .caption, then .txt is looked for.

    ``conditioning_data_dir``: the folder of the conditioning pictures. ``mask_dir``: the folder of the masks of the
    loss; ``alpha_mask``: the images' transparency is their mask where there is no such folder. What both do to a run
    is recorded with the images, so they are not shown here.
    """

    image_dir: str | None = None
    metadata_file: str | None = None
    conditioning_data_dir: str | None = None
    mask_dir: str | None = field(default=None, repr=False)
    alpha_mask: bool = field(default=False, repr=False)
    num_repeats: int = 1
    is_reg: bool = False
    class_tokens: str | None = None
    caption_extension: str | None = None
    captions: CaptionRules = field(default_factory=CaptionRules)
    augmentation: Augmentation = field(default_factory=Augmentation)

    @property
    def name(self) -> str:
        """Folder or metadata file as the user wrote it."""
        return str(self.metadata_file or self.image_dir)

    @property
    def uses_alpha(self) -> bool:
        """True if masks come from the images' transparency."""
        return self.alpha_mask and self.mask_dir is None


@dataclass(frozen=True, slots=True)
class DatasetSpec:
    """Subsets that share a batch size and bucket rules. ``buckets`` is None until sizes come from the metadata."""

    kind: DatasetKind
    batch_size: int
    buckets: BucketRules | None
    subsets: tuple[SubsetSpec, ...]
    network_multiplier: float = 1.0
    prior_loss_weight: float = 1.0


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image of a data set. ``key`` is unique in the run; ``subset`` is the index in the data set's subsets.

    ``size`` is the true size in pixels after EXIF orientation. ``caption`` is the stored text, before any rule.
    ``caption_path`` is the file that it was read from, None if it is the folder's class tokens.
    ``train_resolution`` and ``npz_path`` come from a metadata JSON (latents prepared ahead). ``conditioning_path`` is
    the picture that the image is to be drawn after, for ControlNets. ``mask_path`` is the picture that says where the
    image counts in the loss.
    """

    key: str
    path: str
    size: Size
    caption: str
    repeats: int
    is_reg: bool
    subset: int
    has_caption: bool = True
    train_resolution: Size | None = None
    npz_path: str | None = None
    caption_path: str | None = None
    conditioning_path: str | None = None
    mask_path: str | None = None


@dataclass(frozen=True, slots=True)
class Fit:
    """How an image fills its bucket: scaled to ``resized`` (covers the bucket), then cropped to ``bucket``.

    ``crop_ltrb`` is the box that the reference records for the image (see the data set specification, crop box).
    """

    bucket: Size
    resized: Size
    crop_ltrb: tuple[float, float, float, float]
    ar_error: float

    @property
    def cut_share(self) -> float:
        """The share of the scaled image that is cut away."""
        return 1 - self.bucket[0] * self.bucket[1] / (self.resized[0] * self.resized[1])

    def enlargement(self, size: Size) -> float:
        """How many times as long the sides of an image of ``size`` are made."""
        return self.resized[0] / size[0]


@dataclass(frozen=True, slots=True)
class ImageProblem:
    """A file that cannot be used, and why. ``lacks_pair``: the file is whole, the picture that belongs to it is not.
    ``is_caption``: it is the text file of an image.
    """

    path: str
    reason: str
    lacks_pair: bool = False
    is_caption: bool = False


@dataclass(frozen=True, slots=True)
class ResolvedDataset:
    """A data set whose images were found and measured. ``records[i]`` fills its bucket as ``fits[i]``."""

    spec: DatasetSpec
    records: tuple[ImageRecord, ...]
    fits: tuple[Fit, ...]
    problems: tuple[ImageProblem, ...] = ()

    def subset_of(self, record: ImageRecord) -> SubsetSpec:
        """The rules that hold for an image: its own subset's."""
        return self.spec.subsets[record.subset]

    def records_of(self, subset: int) -> list[ImageRecord]:
        """The images of a subset, by its index."""
        return [record for record in self.records if record.subset == subset]

    @property
    def has_training_images(self) -> bool:
        """True if it has other images than those of regularisation, which are only dealt out beside these."""
        return any(not record.is_reg for record in self.records)

    @property
    def mean_ar_error(self) -> float:
        """The mean difference between the aspect ratios of images and buckets; 0 without images."""
        return sum(abs(fit.ar_error) for fit in self.fits) / max(1, len(self.fits))


@dataclass(frozen=True, slots=True)
class Sample:
    """One visit of an image in an epoch; ``repeat`` counts the visits of the same image from 0."""

    record: int
    repeat: int


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What all processes together take in one forward pass: samples of one bucket of one data set."""

    dataset: int
    samples: tuple[Sample, ...]

    def share(self, rank: int, processes: int) -> tuple[tuple[Sample, ...], bool]:
        """The samples of one process, and whether they count (a process left over repeats a sample at weight 0)."""
        mine = self.samples[rank::processes]
        return (mine, True) if mine else ((self.samples[0],), False)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The micro batches of one optimizer step."""

    micro_batches: tuple[MicroBatch, ...]

    @property
    def sample_count(self) -> int:
        """Samples of the whole step over all processes: what the loss is averaged over."""
        return sum(len(micro.samples) for micro in self.micro_batches)


@dataclass(frozen=True)
class Batch:
    """What one process takes in one forward pass. B = samples, C = channels, H and W = pixels (latents: an eighth).

    Exactly one of ``images_BCHW`` (RGB, -1..1, float32) and ``latents_BCHW`` (as the VAE gives them, not scaled) is
    set. ``seeds`` holds one seed per sample, a function of (run seed, epoch, image key, repeat): noise, timestep and
    posterior draws come from it, so no arrangement of batches changes them.

    ``conditioning_images_BCHW`` (RGB, -1..1, float32, of the training size) only in data sets for ControlNets:
    resized, cropped and mirrored as the images were. A net that wants another range converts.

    ``loss_masks_BHW`` (0..1, float32, of the latents' size): what each place counts in the loss; None if all count 1.
    """

    keys: tuple[str, ...]
    seeds: tuple[int, ...]
    captions: tuple[str, ...]
    loss_weights_B: Tensor
    original_sizes_hw_B2: Tensor
    crop_top_lefts_B2: Tensor
    target_sizes_hw_B2: Tensor
    flipped: tuple[bool, ...]
    images_BCHW: Tensor | None = None
    latents_BCHW: Tensor | None = None
    conditioning_images_BCHW: Tensor | None = None
    loss_masks_BHW: Tensor | None = None
    network_multiplier: float = 1.0
