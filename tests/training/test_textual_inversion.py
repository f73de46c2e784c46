"""Textual inversion on toy models: only the new vectors learn, all of them, and every arrangement gives the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.training import loop
from tests.toy import toy_modules
from tests.training import runs
from tests.training.runs import metadata, state, stop_after, tensors
from tests.words_fixtures import SGD, Trainer, distance, vocabulary, write_pictures

GOLDEN = Path(__file__).parents[1] / "golden" / "data" / "textual_inversion_sd1_narrow.safetensors"
SHAPES = {
    "sd1": {"emb_params": (2, 32)},
    "sd2": {"emb_params": (2, 64)},
    "sdxl": {"clip_l": (2, 32), "clip_g": (2, 64)},
}
ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
}
TWO = ("--num_vectors_per_token", "2")
CUTE_CAT = (*TWO, "--init_word", "cute cat")
CUTE_CAT_IDS = [2242, 2368]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def fit(
    tmp_path: Path, model: Path, model_sd2: Path, model_sdxl: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> Trainer:
    models = {"sd1": model, "sd2": model_sd2, "sdxl": model_sdxl}
    return Trainer(tmp_path, models, pictures, monkeypatch)


def beginnings(fit: Trainer, kind: str) -> dict[str, torch.Tensor]:
    """What the vectors of the last run began as: "cute cat"."""
    assert fit.loaded is not None
    return dict(zip(SHAPES[kind], (table[CUTE_CAT_IDS] for table in vocabulary(fit.loaded)), strict=True))


# ---- what learns


@pytest.mark.parametrize("kind", SHAPES)
def test_only_the_new_vectors_move(fit: Trainer, kind: str) -> None:
    status, out = fit.run(kind, *CUTE_CAT, "--metadata_author", "me")
    assert status == 0
    saved = tensors(out / "toy.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in saved.items()} == SHAPES[kind]
    assert fit.loaded is not None
    for key, began in beginnings(fit, kind).items():
        assert bool(((saved[key] - began).abs().amax(dim=1) > 1e-3).all())  # every vector of every encoder
    for name, fresh in toy_modules(kind).items():
        now = fit.loaded.parts.by_name()[name].state_dict()
        assert now.keys() == fresh.state_dict().keys()
        assert all(torch.equal(now[key], tensor) for key, tensor in fresh.state_dict().items()), name
    said = metadata(out / "toy.safetensors")
    assert said["modelspec.architecture"] == ARCHITECTURES[kind] + "/textual-inversion"
    assert said["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"
    assert said["modelspec.author"] == "me"
    assert (said["ss_token_string"], said["ss_num_vectors_per_token"], said["ss_steps"]) == ('["sksx"]', "2", "4")
    owned = sum(parameter.numel() for parameter in fit.loaded.trainable.trained_parameters())
    assert owned == sum(tensor.numel() for tensor in saved.values())


def test_an_optimizer_that_divides_by_gradients_of_zero_is_one_line(
    fit: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Empty captions reach no new vector."""
    pytest.importorskip("dadaptation")
    options = ("--optimizer_type", "DAdaptSGD", "--learning_rate", "1", "--caption_dropout_rate", "1")
    assert fit.run("sd1", *TWO, *options)[0] == 1
    (line,) = capsys.readouterr().err.partition("error: ")[2].strip().splitlines()
    assert "the optimizer cannot make this step (float division by zero)" in line


def test_the_loss_falls_by_what_the_vectors_learn(
    fit: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same noise at each step for vectors that learn and for vectors that stay: the difference is learned."""
    one = write_pictures(tmp_path / "one", 1)
    losses: list[float] = []
    original = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *given: [losses.append((r := original(*given)).loss), r][1])
    steps = ("--max_train_steps", "25", "--min_timestep", "600", "--num_vectors_per_token", "12", "--cache_latents")
    fit("sd1", *steps, "--learning_rate", "0.2", data=one)
    fit("sd1", *steps, "--learning_rate", "1e-12", data=one)
    learned, stayed = sum(losses[15:25]) / 10, sum(losses[40:50]) / 10
    print(f"loss {learned:.3f} with learning, {stayed:.3f} without")
    assert losses[0] == pytest.approx(losses[25])
    assert learned < 0.993 * stayed  # the toy, which was never trained, hardly listens to text


def test_both_encoders_are_clipped_together(fit: Trainer) -> None:
    """With plain SGD and rate 1 the way of all vectors together is the limit of the gradient's norm."""
    sgd = ("--optimizer_type", "SGD", "--learning_rate", "1", "--max_grad_norm", "0.001", "--max_train_steps", "1")
    saved = fit("sdxl", *CUTE_CAT, *sgd)
    began = beginnings(fit, "sdxl")
    assert distance(saved, began) == pytest.approx(0.001, rel=1e-3)
    for key, tensor in saved.items():
        assert float((tensor - began[key]).norm()) > 1e-5


def test_accumulation_and_processes_equal_the_big_batch(fit: Trainer, pictures: Path, tmp_path: Path) -> None:
    shared = (*CUTE_CAT, *SGD, "--learning_rate", "0.1", "--cache_latents_to_disk")
    one = fit("sdxl", "--train_batch_size", "2", *shared)
    parts = fit("sdxl", "--gradient_accumulation_steps", "2", *shared)
    began = beginnings(fit, "sdxl")
    done = runs.launch_two("sdxl_train_textual_inversion.py", fit.command("sdxl", tmp_path / "two", *shared))
    assert done.returncode == 0, done.stderr[-3000:]
    two = tensors(tmp_path / "two" / "toy.safetensors")
    way = distance(one, began)
    assert way > 1e-3
    assert distance(one, parts) < 1e-3 * way
    assert distance(one, two) < 1e-3 * way


@pytest.mark.parametrize("kind", ["sdxl", "xti"])
def test_resume_equals_an_unbroken_run(fit: Trainer, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    more = ("--token_string", "sksx", "sksy", *TWO, "--use_style_template", "--lr_scheduler", "cosine")
    status, whole = fit.run(kind, *more)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        broken_status, broken = fit.run(kind, *more)
    middle = broken / "toy-step00000002-state"
    assert (status, broken_status, state(middle)["step"]) == (0, 0, 2)
    assert fit.run(kind, *more, "--resume", str(middle), out=broken)[0] == 0
    for word in ("sksx", "sksy"):
        file = f"toy/{word}.safetensors"
        assert (whole / file).read_bytes() == (broken / file).read_bytes()
    assert not torch.equal(*(next(iter(tensors(whole / f"toy/{word}.safetensors").values())) for word in more[1:3]))


@pytest.mark.parametrize(
    "options",
    [
        ("--mixed_precision", "bf16", "--gradient_checkpointing"),
        ("--mixed_precision", "bf16", "--full_bf16"),
        ("--mixed_precision", "bf16", "--fp8_base"),
        ("--weighted_captions", "--clip_skip", "2", "--max_token_length", "150"),
        ("--optimizer_type", "AdaFactor", "--optimizer_args", "relative_step=False", "--max_grad_norm", "0"),
    ],
    ids=lambda options: " ".join(options[-2:]),
)
def test_vectors_learn_whatever_the_options(fit: Trainer, options: tuple[str, ...]) -> None:
    saved = fit("sd1", *CUTE_CAT, "--max_train_steps", "2", *options)["emb_params"]
    assert fit.loaded is not None
    assert saved.dtype == (torch.bfloat16 if "--full_bf16" in options else torch.float32)
    moved = (saved.float() - vocabulary(fit.loaded)[0][CUTE_CAT_IDS].float()).abs().amax(dim=1)
    assert bool((moved > 1e-3).all())


# ---- how words begin, and files


def test_every_form_of_file_goes_on(fit: Trainer, tmp_path: Path) -> None:
    """Without steps that count the vectors of a file come out as they went in, and their number is the file's."""
    still = ("--learning_rate", "1e-12", "--max_train_steps", "1")
    first = fit("sd1", "--num_vectors_per_token", "3", "--max_train_steps", "1")
    table = first["emb_params"]
    files = {
        "webui.pt": {"string_to_token": {"*": 265}, "string_to_param": {"*": table}, "name": "x"},
        "learned_embeds.bin": {"<x>": table},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        status, out = fit.run("sd1", *still, "--weights", str(tmp_path / name))
        assert status == 0
        assert torch.allclose(tensors(out / "toy.safetensors")["emb_params"], table, atol=1e-9)
    assert metadata(out / "toy.safetensors")["ss_num_vectors_per_token"] == "3"
    _, out = fit.run("sd2", *still, "--weights", str(GOLDEN))  # of SD2's toy width
    assert torch.allclose(tensors(out / "toy.safetensors")["emb_params"], tensors(GOLDEN)["emb_params"], atol=1e-9)
    others = {"modelspec.author", "modelspec.license", "modelspec.description", "modelspec.tags"}
    assert set(metadata(GOLDEN)) - others <= set(metadata(out / "toy.safetensors"))


def test_pickled_files_and_their_number_type(fit: Trainer) -> None:
    status, out = fit.run(
        "sdxl", *TWO, "--save_model_as", "pt", "--save_precision", "fp16", "--save_every_n_steps", "2", "--output_name",
        "word",
    )  # fmt: skip
    assert status == 0
    for name in ("word", "word-step00000002"):
        saved = torch.load(out / f"{name}.pt", weights_only=True)
        assert {key: tuple(tensor.shape) for key, tensor in saved.items()} == SHAPES["sdxl"]
        assert all(tensor.dtype == torch.float16 for tensor in saved.values())


def test_the_word_names_the_file(fit: Trainer, model: Path, pictures: Path, tmp_path: Path) -> None:
    words = fit.command("sd1", tmp_path / "out", "--max_train_steps", "1")
    words = [word for word in words if word not in ("--output_name", "toy")]
    from tests.words_fixtures import SD

    runs.AcceleratorState._reset_state(reset_partial_state=True)
    assert runs.run(SD, words) == 0
    assert (tmp_path / "out" / "sksx.safetensors").is_file()


def test_random_vectors_are_as_long_as_known_ones(fit: Trainer) -> None:
    still = ("--learning_rate", "1e-12", "--max_train_steps", "1", "--num_vectors_per_token", "20")
    saved = fit("sd1", *still)["emb_params"]
    assert fit.loaded is not None
    assert float(saved.std()) == pytest.approx(float(vocabulary(fit.loaded)[0].std()), rel=0.15)
    assert not torch.equal(saved, fit("sd1", *still, "--seed", "8")["emb_params"])


def test_an_init_word_of_another_length_warns(fit: Trainer, caplog: pytest.LogCaptureFixture) -> None:
    still = ("--learning_rate", "1e-12", "--max_train_steps", "1", "--num_vectors_per_token", "3")
    saved = fit("sd1", *still, "--init_word", "cute cat")["emb_params"]
    assert "2 tokens for 3 vectors" in caplog.text
    assert fit.loaded is not None
    ids = [CUTE_CAT_IDS[0], CUTE_CAT_IDS[1], CUTE_CAT_IDS[0]]
    assert torch.allclose(saved, vocabulary(fit.loaded)[0][ids], atol=1e-9)


REFUSED = [
    (("--token_string", "cat", "--use_object_template"), "cat is a word that the model knows; choose another word"),
    (("--token_string", "sksx", "sksx1", *TWO, "--use_object_template"), "the word sksx1 is that of"),
    (("--token_string", "sksy"), "no caption holds the word sksy"),
    (("--token_string", "ksx"), "no caption holds the word ksx;"),  # it stands only within another word
    (("--token_string", "(sksx)"), "must be words without brackets"),
    (("--token_string", "sksx sksx"), "must not have a word twice"),
    (("--learning_rate", "0"), "nothing to train"),
    (("--init_word", " "), "holds no word"),
    (("--token_string", "sksx", "photo7", "--init_word", "a", "b", "c"), "3 given for 2 words"),
    (("--weights", "{two}", "--num_vectors_per_token", "3"), "has 2 vectors, --num_vectors_per_token says 3"),
    (("--weights", "{two}", "{two}"), "--weights: 2 given for 1 words"),
    (("--weights", "{wide}"), "vectors of width 48 for a text encoder of width 32"),
    (("--weights", "{sdxl}"), "was made for SDXL"),
    (("--weights", "nowhere.pt"), "there is no such file"),
]


@pytest.mark.parametrize(("more", "said"), REFUSED, ids=[" ".join(more) for more, _ in REFUSED])
def test_refusals(
    fit: Trainer, tmp_path: Path, more: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"two": {"v": torch.zeros(2, 32)}, "wide": {"v": torch.zeros(1, 48)}}
    files["sdxl"] = {"clip_l": torch.zeros(1, 32), "clip_g": torch.zeros(1, 64)}
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pt")
    places = {name: str(tmp_path / f"{name}.pt") for name in files}
    photos = write_pictures(tmp_path / "photos", 2, "sksx photo7")
    assert fit.run("sd1", *(word.format(**places) for word in more), data=photos)[0] == 1
    assert said in capsys.readouterr().err


def test_captions_without_the_word_are_counted(fit: Trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    photos = write_pictures(tmp_path / "photos", 3)
    next(iter(photos.rglob("*.caption"))).write_text("sksxy")
    fit("sd1", "--max_train_steps", "1", data=photos)
    assert "1 of 3 captions hold no new word" in caplog.text


def test_the_plan_needs_no_weights(fit: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = fit.run("sdxl", *CUTE_CAT, "--dry_run")
    assert status == 0
    assert "embedding" in capsys.readouterr().out
    assert not list(out.glob("*.safetensors"))
