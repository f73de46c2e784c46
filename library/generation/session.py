"""A run of the generator from options to files: prompts, seeds, batches, pictures."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from library.checkpoint.io import WriteError
from library.checkpoint.privacy import without_folders
from library.generation.control import attach_control, check_control
from library.generation.deep_shrink import attach_deep_shrink
from library.generation.early import check_before_loading
from library.generation.embeddings import attach_embeddings
from library.generation.engine import USUAL_ROWS, Engine, EngineSettings
from library.generation.from_picture import attach_pictures
from library.generation.gradual_latent import attach_gradual_latent
from library.generation.grid import Sheet, with_grid_networks
from library.generation.guidance import attach_guidance
from library.generation.highres import TWO_STAGES, make_stages
from library.generation.hypernetworks import attach_hypernetworks
from library.generation.inputs import InputFiles, list_pictures
from library.generation.jobs import Defaults, Job, Seeds, batches, defaults_of, own_seed, settle
from library.generation.lines import parse_line
from library.generation.model import LoadedModel, load_model
from library.generation.networks import attach_networks
from library.generation.output import Place, Writer, now_text, text_entries, write_png
from library.generation.pictures import size_of_picture, to_picture
from library.generation.samplers import check_sampler
from library.generation.sources import (
    KeyboardLines,
    LineSource,
    ListedLines,
    ModuleLines,
    RawLine,
    load_prompt_module,
    prompts_of_pictures,
    read_prompt_file,
)
from library.generation.variants import expand
from library.generation.watch import Preview, Window
from library.interrupt import StopRequest, stop_on_signals
from library.log import UserError, is_out_of_memory, progress
from library.options.generation import (
    ControlOptions,
    DrawOptions,
    GenModelOptions,
    GenNetworkOptions,
    HighresOptions,
    OutputOptions,
    PictureOptions,
    PromptOptions,
)
from library.options.settings import DEFAULT, Settings
from library.rng import fresh_seed, stream

logger = logging.getLogger(__name__)

_NOT_OF_A_PICTURE = frozenset(vars(OutputOptions())) | {
    *("prompt", "from_file", "from_module", "prompter_module_args", "from_image", "interactive", "no_preview"),
    *("images_per_prompt", "n_iter", "shuffle_prompts", "seed", "iter_same_seed", "dry_run", "batch_size", "lowram"),
    *("image_path", "mask_path", "guide_image_path"),  # the jobs name the files
    *("config_file", "output_config", "console_log_level", "console_log_file", "console_log_simple"),
}


def run_session(settings: Settings) -> int:
    """Draw what the options ask for. Returns the exit status: 1 if a line or a picture could not be drawn."""
    files = input_files(settings)
    source, failed = make_source(settings, files)
    check_before_loading(settings)
    if failed and isinstance(source, ListedLines) and not source.all:
        return 1
    if settings[PromptOptions].dry_run:
        return _print_plan(source, settings[PromptOptions]) or min(failed, 1)
    writer = Writer(settings[OutputOptions])
    with stop_on_signals("stopping after this picture") as stop:
        model = load_model(settings[GenModelOptions], settings[DrawOptions])
        session = Session(settings, model, stop, files, writer)
        if isinstance(source, ListedLines) and not source.all and settings[PromptOptions].from_module:
            source = session.module_lines()
        return session.run(source) or min(failed, 1)


def make_source(settings: Settings, files: InputFiles) -> tuple[LineSource, int]:
    """Where the lines come from, and how many of them are wrong, told and left out already. Raises UserError."""
    options = settings[PromptOptions]
    is_listed = not options.interactive and (options.from_file or not options.from_module)
    if not is_listed:
        _check_steps({}, settings)
        return KeyboardLines() if options.interactive else ListedLines(()), 0
    if options.from_file:
        lines = read_prompt_file(options.from_file)
    elif not settings.given("prompt") and files.sources:
        lines = prompts_of_pictures(files.sources, files.masks)
    else:
        lines = [RawLine(options.prompt or "", "--prompt")]
    good = [line for line in lines if _is_good(line, settings)]
    seed = options.seed
    shuffle = None
    if options.shuffle_prompts:
        base = fresh_seed() if seed is None else seed
        shuffle = lambda iteration: stream(base, "order", iteration)  # noqa: E731
    return ListedLines(good, shuffle), len(lines) - len(good)


def _print_plan(source: LineSource, options: PromptOptions) -> int:
    """Print the lines of one iteration after their variants were chosen, each with the number of its pictures."""
    if not isinstance(source, ListedLines) or not source.all:
        raise UserError("--dry_run shows prompts of --prompt and --from_file, and those that stand in pictures")
    total = 0
    for index, line in enumerate(source.lines(0)):
        texts = expand(line.text, options.images_per_prompt, stream(options.seed or 0, "variants", 0, index))
        count = options.images_per_prompt if len(texts) == 1 else 1
        total += count * len(texts)
        for text in texts:
            parsed = parse_line(text)
            print(f"{count} x {parsed.raw}")
            for note in parsed.notes:
                print(f"    {note}")
    print(f"{total} pictures in each of {options.n_iter} iterations")
    return 0


def _is_good(line: RawLine, settings: Settings) -> bool:
    """False for a line with which nothing can be drawn, which is reported: before any model is loaded."""
    try:
        for text in expand(line.text, 1, stream(0, "check")):
            _check_steps(parse_line(text).options, settings)
    except UserError as error:
        logger.error("%s: %s; it is left out", line.where, error)
        return False
    return True


def _check_steps(given: Mapping[str, Any], settings: Settings) -> None:
    """Raise UserError if a line's options, or for what it does not say the command line's, are too few steps."""
    draw, highres = settings[DrawOptions], settings[HighresOptions]
    sampler = given.get("sampler", draw.sampler)
    check_sampler(sampler, given.get("steps", draw.steps))
    if highres.highres_fix_scale is not None:
        check_sampler(sampler, highres.highres_fix_steps)


def input_files(settings: Settings, repeating: bool = False) -> InputFiles:
    """The pictures that the options name. Raises UserError.

    ``repeating``: the jobs name their guides already, so that there need not be one for each net.
    """
    picture, control = settings[PictureOptions], settings[ControlOptions]
    check_control(control)
    nets = [*(control.control_net_models or ()), *(control.control_net_lllite_models or ())]
    return InputFiles(
        sources=list_pictures(picture.image_path, "image_path") if picture.image_path else (),
        masks=list_pictures(picture.mask_path, "mask_path") if picture.mask_path else (),
        guides=[file for name in control.guide_image_path or () for file in list_pictures(name, "guide_image_path")],
        nets=0 if repeating else len(nets),
    )


@dataclass
class Session:
    """Everything that lives as long as the run. ``failed`` counts what could not be drawn."""

    settings: Settings
    model: LoadedModel
    stop: StopRequest
    files: InputFiles
    writer: Writer
    failed: int = 0
    engine: Engine = field(init=False)
    seeds: Seeds = field(init=False)
    _iteration_seed: int | None = None
    _queued: int = 0  # pictures of this iteration so far
    _drawn: int = 0  # pictures of all batches before this one

    def __post_init__(self) -> None:
        self.settings, self.network_grid = with_grid_networks(self.settings)
        options, draw = self.settings[PromptOptions], self.settings[DrawOptions]
        self.engine = Engine(
            self.model.family,
            self.model.parts,
            EngineSettings(
                schedule=self.model.schedule,
                device=self.model.device,
                dtype=self.model.dtype,
                clip_skip=options.clip_skip,
                max_rows=options.max_embeddings_multiples or USUAL_ROWS,
                normalize=options.emb_normalize_mode,
                vae_batch=draw.vae_batch_size,
            ),
        )
        attach_control(self.engine, self.settings)
        attach_embeddings(self.engine, options)  # before what looks at the condition
        attach_guidance(self.engine, self.settings[ControlOptions])
        attach_hypernetworks(self.engine, self.settings[GenNetworkOptions])
        self.networks = attach_networks(self.engine, self.settings)
        usual = self.model.family.default_sample_size(self.model.parts)
        multipliers = [network.multiplier for network in self.networks]
        self.defaults: Defaults = defaults_of(self.settings, usual, self.model.family.picture_step, multipliers)
        output = self.settings[OutputOptions]
        self.sheet = Sheet() if output.grid or self.network_grid else None
        self.window = Window() if options.interactive and not options.no_preview else None
        attach_pictures(self.engine, self.settings[PictureOptions])
        attach_deep_shrink(self.engine)
        attach_gradual_latent(self.engine)
        self.stages = make_stages(self.engine, self.settings[HighresOptions])
        if output.preview_every_n_steps:
            self.engine.extensions.append(Preview(self.writer.folder, output.preview_every_n_steps, self.engine.decode))
        self._recipe, self._first_recipe = self._make_recipe(), self._make_recipe(TWO_STAGES)

    def module_lines(self) -> LineSource:
        """The prompts that ``--from_module`` makes."""
        options = self.settings[PromptOptions]
        args = SimpleNamespace(**self.settings.as_flat_dict())
        prompter = load_prompt_module(options, args, self.engine, [entry.network for entry in self.networks])

        def call(index: int) -> Any:
            return prompter(args, self.engine, self.seeds.source, self._iteration_seed, index, self._queued)

        return ModuleLines(str(options.from_module), call, prompter.shuffle if options.shuffle_prompts else None)

    # ---- from lines to batches

    def run(self, source: LineSource) -> int:
        """Draw all iterations. Returns the exit status."""
        options = self.settings[PromptOptions]
        size = self.settings[DrawOptions].batch_size
        self.seeds = Seeds(options.seed, alone=self._is_alone(source))
        for iteration in range(1 if options.interactive else options.n_iter):
            self._iteration_seed = self.seeds.next() if options.iter_same_seed else None
            jobs = self._jobs(source, iteration)
            if options.interactive:  # a line is drawn when it was typed, not when a batch is full
                for of_line in jobs:
                    self.draw(batches(of_line, size))
                    if self.stop.is_set:  # before the next line is asked for
                        break
            else:
                self.draw(batches((job for of_line in jobs for job in of_line), size))
            if self.stop.is_set:
                break
        if self.sheet is not None and self.sheet.cells:
            path = self.writer.free(f"grid_{now_text()}.png")
            logger.info("%s", write_png(self.sheet.draw(), path, {}))
        return 1 if self.failed else 0

    def _is_alone(self, source: LineSource) -> bool:
        """True if one picture is asked for in all, which then gets the given seed itself."""
        options = self.settings[PromptOptions]
        if not isinstance(source, ListedLines) or len(source.all) != 1 or options.n_iter > 1:
            return False
        return len(expand(source.all[0].text, 1, stream(0, "check"))) * options.images_per_prompt == 1

    def _jobs(self, source: LineSource, iteration: int) -> Iterator[list[Job]]:
        """The jobs of each line. A line that cannot be drawn is reported and counted."""
        self._queued = 0
        for index, line in enumerate(source.lines(iteration)):
            if self.stop.is_set:
                return
            try:
                jobs = list(self._jobs_of(line, (iteration, index), self._queued))
                if self.network_grid is not None:
                    jobs = self.network_grid.jobs(jobs, self._queued)
            except UserError as error:
                logger.error("%s: %s; it is left out", line.where, error)
                self.failed += 1
                continue
            self._queued += len(jobs)
            yield jobs

    def _jobs_of(self, line: RawLine, place: tuple[int, int], number: int) -> Iterator[Job]:
        options = self.settings[PromptOptions]
        base = fresh_seed() if options.seed is None else options.seed
        texts = expand(line.text, options.images_per_prompt, stream(base, "variants", *place))
        texts = texts * options.images_per_prompt if len(texts) == 1 else texts
        told: set[str] = set()
        for index, text in enumerate(texts):
            parsed = parse_line(text)
            source = line.source or self.files.source_of(number + index)
            shared, notes = settle(parsed, self.defaults, size_of_picture(source) if source else None)
            for note in notes:
                if note not in told:
                    logger.warning("%s: %s", line.where, note)
                    told.add(note)
            negative = str(parsed.options.get("negative_prompt", ""))
            yield Job(
                number=number + index,
                raw=parsed.raw,
                prompt=parsed.prompt,
                negative_prompt=negative,
                seed=self._seed(own_seed(parsed, index)),
                shared=self.engine.with_rows(shared, parsed.prompt, negative),
                clip_prompt=parsed.options.get("clip_prompt"),
                source=source,
                mask=line.mask or self.files.mask_of(number + index),
                guides=self.files.guides_of(number + index),
            )

    def _seed(self, own: int | None) -> int:
        """The picture's own seed, else that of the iteration, else the next of the row."""
        if own is not None:
            return own
        return self.seeds.next() if self._iteration_seed is None else self._iteration_seed

    # ---- from batches to files

    def draw(self, queue: Iterable[Sequence[Job]], only: int | None = None) -> int:
        """Draw and write batches until all are done or a stop is asked for. Returns the exit status.

        ``only``: of each batch just this picture is written.
        """
        for batch in queue:
            try:
                self._draw(batch, only)
            except WriteError:  # the next picture could not be written either
                raise
            except UserError as error:
                logger.error("%s: %s", batch[0].raw, error)
                self.failed += len(batch)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                shared = batch[0].shared
                logger.error("%s: out of memory at %dx%d pixels", batch[0].raw, shared.width, shared.height)
                self.failed += len(batch)
            if self.stop.is_set:
                break
        for path in self.writer.wait():
            logger.debug("written: %s", path)
        return 1 if self.failed else 0

    def _draw(self, batch: Sequence[Job], only: int | None) -> None:
        with progress(None, f"picture {batch[0].number + 1}") as bar:
            self.engine.on_progress = bar.advance
            drawn = list(self.stages.draw(batch))
        moment = now_text()
        for stage in drawn:
            for index, (job, picture) in enumerate(zip(stage.batch, stage.pictures_BCHW, strict=True)):
                if only in (None, index):
                    self._write(job, picture, Place(index, self._drawn, moment, stage.stage), len(batch))
        self._drawn += len(batch)

    def _write(self, job: Job, picture_CHW: Tensor, place: Place, batch_size: int) -> None:
        if not bool(picture_CHW.isfinite().all()):
            logger.error("%s: became nothing but NaN and is not written; try --bf16, or no --fp16", job.raw)
            self.failed += 1
            return
        recipe = {**(self._first_recipe if place.stage == "0" else self._recipe), "place": (place.index, batch_size)}
        entries = text_entries(job, job.shared.sampler, recipe, self.model.family.name == "sdxl")
        drawn = to_picture(picture_CHW[None])
        path = self.writer.write(drawn, job, place, entries)
        logger.info("%s (seed %d)", path, job.seed)
        if place.stage == "0":
            return
        if self.sheet is not None:
            labels = self.network_grid.labels(job) if self.network_grid else (job.prompt, f"seed {job.seed}")
            self.sheet.add(*labels, drawn)
        if self.window is not None:
            self.window.show(drawn, job.prompt)

    def _make_recipe(self, without: Collection[str] = ()) -> dict[str, Any]:
        """What decides a picture beside its job: the options that are not at their default, without folders."""
        values = self.settings.as_flat_dict()
        kept = {
            name: value
            for name, value in values.items()
            if name not in _NOT_OF_A_PICTURE and name not in without and self.settings.source_of(name) != DEFAULT
        }
        kept["ckpt"] = values["ckpt"]
        path = self.model.parts.source.path
        size = path.stat().st_size if path.is_file() else None
        return {"options": without_folders(kept), "model_bytes": size}
