"""Images as training data: sets, shares, labels, encoding once or when drawn."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm_dkdm import UserError
from ldm_dkdm.config.schema import DiffusionDataConfig, SamplingConfig
from ldm_dkdm.distillation.image_data import CachedStates, EncodedStates, ImageSet, encode_sets, open_images, open_sets
from ldm_dkdm.evaluation.opening import open_images as open_set
from ldm_dkdm.images import find_images, load_images
from ldm_dkdm.npz import npz_writer, save_npz
from ldm_dkdm.pixel import PixelCodec
from tests.test_image_files import image


def numbered(count: int, first: int = 0) -> Tensor:
    """Images uint8 (count,4,4,3): image i is first + i everywhere but in its first column, which is 0."""
    images = torch.arange(first, first + count, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 4, 4, 3)
    images[:, :, 0] = 0
    return images


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def number_of(states: Tensor) -> list[int]:
    return ((states[:, 0, 0, 2] + 1) * 127.5).round().int().tolist()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of PNG files: cats 0 ... 2, dogs 3 ... 6."""
    for i, pixels in enumerate(numbered(7)):
        path = tmp_path / "images" / ("cat" if i < 3 else "dog") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(path)
    return tmp_path / "images"


def test_a_folder_is_read_when_asked_for_and_its_subfolders_are_classes(folder: Path) -> None:
    images = open_images(folder, 4)
    assert len(images) == 7 and images.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert torch.equal(images.take(torch.tensor([5, 0])), numbered(7)[[5, 0]])


def _labels(folder: Path, names: Sequence[str]) -> dict[str, int] | str:
    """The label of each folder, or why there are none."""
    for name in names:
        image(folder / name / "a.png")
    images = open_images(folder, 8)
    if images.labels is None:
        return images.unclear
    files = [str(file.parent.relative_to(folder)) for file in images.images]
    return dict(zip(files, images.labels.tolist(), strict=True))


@pytest.mark.parametrize(
    "names",
    [
        {"0/images": 0, "1/images": 1, "2/images": 2, "10/images": 10},
        {"train/2/a": 2, "train/10/b": 10},
        {"2024/2": 2, "2024/10": 10},  # the same number everywhere
        {"train/2": 2, "10": 10},
        {"5/images": 5},
        {"2/images": 1, "10/images": 0, "owl/images": 2},  # not all are numbers
    ],
)
def test_numbers_at_any_level_of_folders_are_the_classes(names: dict[str, int], tmp_path: Path) -> None:
    assert _labels(tmp_path, list(names)) == names


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["0/5", "1/6"], "{0}/0/5 may be class 0 or 5"),
        (["3/a", "3/b"], "{0}/3/a and {0}/3/b are both class 3"),
        (["12345678901234567890", "2"], "{0}/12345678901234567890 is named by a number too large for a class"),
    ],
)
def test_unclear_numbers_of_folders_give_no_labels_and_a_reason(names: list[str], reason: str, tmp_path: Path) -> None:
    found = _labels(tmp_path, names)
    assert isinstance(found, str) and found.startswith(reason.format(tmp_path))


def test_hidden_folders_are_no_classes(folder: Path) -> None:
    hidden = folder / "cat" / ".ipynb_checkpoints" / "0.png"
    hidden.parent.mkdir()
    hidden.write_bytes((folder / "cat" / "0.png").read_bytes())
    assert open_images(folder, 4).labels.tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_an_npz_gives_its_images_and_labels(tmp_path: Path) -> None:
    save_npz(numbered(5), tmp_path / "x.npz", torch.tensor([4, 3, 2, 1, 0]))
    images = open_images(tmp_path / "x.npz", 4)
    assert torch.equal(images.take(torch.arange(5)), numbered(5))
    assert images.labels.tolist() == [4, 3, 2, 1, 0]
    np.savez(tmp_path / "y.npz", arr_0=numbered(2).numpy())
    assert open_images(tmp_path / "y.npz", 4).labels is None


@pytest.mark.parametrize("files", [False, True])
def test_a_share_is_random_without_repetition_and_follows_from_the_seed(files: bool, folder: Path) -> None:
    images = open_images(folder, 4) if files else ImageSet(numbered(7), 4, torch.tensor([0, 0, 0, 1, 1, 1, 1]))
    part, again, other = (images.part(0.4, seed) for seed in (0, 0, 1))
    numbers = part.take(torch.arange(len(part)))[:, 0, 1, 0].tolist()
    assert len(set(numbers)) == len(part) == 3
    assert part.labels.tolist() == [int(n > 2) for n in numbers]
    assert numbers == again.take(torch.arange(3))[:, 0, 1, 0].tolist()
    assert numbers != other.take(torch.arange(3))[:, 0, 1, 0].tolist()
    assert len(images.part(0.001, 0)) == 1


def test_data_limited_is_a_share_of_the_real_images_and_all_synthetic_ones(tmp_path: Path, folder: Path) -> None:
    save_npz(numbered(10, 100), tmp_path / "s.npz")
    config = DiffusionDataConfig(
        path=str(folder), fraction=0.3, synthetic=str(tmp_path / "s.npz"), image_size=4, batch_size=2
    )
    assert {key: len(images) for key, images in open_sets(config, 0).items()} == {"path": 2, "synthetic": 10}


@pytest.mark.parametrize(
    ("fraction", "samples", "wanted"),
    [
        (0.3, 10, {"path": 3, "synthetic": 7}),
        (0.01, 10, {"path": 1, "synthetic": 9}),
        (1.0, 5, {"path": 5}),
        (1.0, 8, "data.path: holds 7 images, 8 are to replace samples"),
    ],
)
def test_real_images_replace_as_many_samples_and_a_set_that_is_left_has_its_key(
    fraction: float, samples: int, wanted: dict[str, int] | str, tmp_path: Path, folder: Path
) -> None:
    save_npz(numbered(samples, 100), tmp_path / "s.npz")
    config = DiffusionDataConfig(
        path=str(folder),
        fraction=fraction,
        synthetic=str(tmp_path / "s.npz"),
        mix="replace",
        image_size=4,
        batch_size=2,
    )
    if isinstance(wanted, str):
        with pytest.raises(UserError, match=wanted):
            open_sets(config, 0)
        return
    sets = open_sets(config, 0)
    assert {key: len(images) for key, images in sets.items()} == wanted
    for key, images in sets.items():
        numbers = images.take(torch.arange(len(images)))[:, 0, 1, 0]
        assert (numbers >= 100).all() == (key == "synthetic") and len(numbers.unique()) == len(numbers)


@pytest.mark.parametrize("keys", [{}, {"synthetic": "x.npz", "fraction": 0.5}])
def test_no_images_or_a_share_of_none_is_refused(keys: dict[str, object]) -> None:
    with pytest.raises(UserError, match="data"):
        open_sets(DiffusionDataConfig(image_size=4, batch_size=2, **keys), 0)


def test_draws_cover_all_sets_evenly_with_their_labels_and_half_of_them_mirrored() -> None:
    sets = [ImageSet(numbered(3), 4, torch.arange(3)), ImageSet(numbered(2, 3), 4, torch.arange(3, 5))]
    states, labels = EncodedStates(sets, PixelCodec(), flip=True, labeled=True).draw(4000, generator())
    assert number_of(states) == labels.tolist()
    assert (labels.bincount() / 4000 - 0.2).abs().max() < 0.03
    mirrored = states[:, 0, 0, 0] != -1
    assert mirrored[labels > 0].float().mean().item() == pytest.approx(0.5, abs=0.04)


def test_encoding_once_gives_the_states_that_encoding_in_every_draw_gives() -> None:
    sets = [ImageSet(numbered(3), 4, torch.arange(3)), ImageSet(numbered(2, 3), 4, torch.arange(3, 5))]
    cached = encode_sets(sets, PixelCodec(), flip=True, labeled=True)
    assert torch.equal(cached.x_0[:5], PixelCodec().encode(numbered(5)))
    assert torch.equal(cached.x_0[5:], PixelCodec().encode(numbered(5)).flip(3))
    assert cached.labels.tolist() == [0, 1, 2, 3, 4] * 2
    plain = encode_sets(sets, PixelCodec(), flip=False, labeled=True)
    once, _ = plain.draw(64, generator(3))
    every_time, _ = EncodedStates(sets, PixelCodec(), flip=False, labeled=False).draw(64, generator(3))
    assert torch.equal(once, every_time)


def test_cached_states_are_drawn_with_their_labels() -> None:
    x_0 = torch.arange(6.0).view(6, 1, 1, 1)
    states, labels = CachedStates(x_0, torch.arange(6)).draw(50, generator())
    assert torch.equal(states.flatten(), labels.float())
    assert CachedStates(x_0).draw(3, generator())[1] is None


def test_an_npz_written_in_parts_is_what_numpy_reads_and_appears_only_whole(tmp_path: Path) -> None:
    images, labels = numbered(5), torch.tensor([3, 1, 2, 0, 1])
    with npz_writer(tmp_path / "parts.npz", 5) as writer:
        writer.add(images[:2], labels[:2])
        assert not (tmp_path / "parts.npz").exists()
        writer.add(images[2:], labels[2:])
    with np.load(tmp_path / "parts.npz", allow_pickle=False) as archive:
        assert np.array_equal(archive["arr_0"], images.numpy()) and np.array_equal(archive["arr_1"], labels.numpy())
    with pytest.raises(ValueError, match="2 of 5"), npz_writer(tmp_path / "short.npz", 5) as writer:
        writer.add(images[:3])
    assert [f.name for f in tmp_path.iterdir()] == ["parts.npz"]


# Folders and files that are named as data


@pytest.mark.parametrize("above", [True, False])
def test_the_grid_of_samples_is_not_one_of_them(above: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "a" / "samples" if above else tmp_path
    for name in ("grid.png", "img/000000.png", "img/000001.png"):
        image(out / name)
    found = find_images(tmp_path)
    assert [file.name for file in found] == ["000000.png", "000001.png"] and found == open_images(tmp_path, 8).images
    assert ("1 grid.png of samples" in caplog.text) == above
    if not above:
        assert open_images(tmp_path, 8).labels is None  # img is not a class
    assert "left out" not in caplog.text


def test_images_beside_those_of_a_sampling_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("grid.png", "img/000000.png", "mine.png", "cats/other.jpg", ".hidden/a.png"):
        image(tmp_path / name)
    for name in ("NAME/grid.png", "NAME/img/000000.png", "run/samples/step=00000002.png"):  # the package's own
        image(tmp_path / name)
    (tmp_path / "run" / "config.yaml").touch()
    for read in (find_images, lambda path: open_images(path, 8), lambda path: open_set(path, SamplingConfig()).count):
        caplog.clear()
        read(tmp_path)
        assert caplog.text.count("2 images outside img are left out") == 1


def test_a_grid_beside_an_npz_of_samples_is_no_set_of_images(tmp_path: Path) -> None:
    image(tmp_path / "grid.png")
    (tmp_path / "samples.npz").touch()
    with pytest.raises(UserError, match=r"holds no images .* but (?=.*1 grid\.png of samples).*1 \.npz"):
        find_images(tmp_path)


@pytest.mark.parametrize("name", ["a.npy", "a.png", "a.zip"])
def test_a_file_that_is_not_an_npz_is_not_called_missing(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder of images or \.npz file"):
        open_images(tmp_path / name, 8)
    (tmp_path / name).touch()
    for read in (open_images, load_images):
        with pytest.raises(UserError, match=rf"{name}: is neither a folder of images nor an \.npz"):
            read(tmp_path / name, 8)


def test_the_suffix_of_an_npz_has_any_letter_case(tmp_path: Path) -> None:
    save_npz(images := torch.randint(256, (3, 8, 8, 3), dtype=torch.uint8), tmp_path / "X.NPZ")
    assert torch.equal(open_images(tmp_path / "X.NPZ", 8).images, images)
    assert torch.equal(load_images(tmp_path / "X.NPZ", 8), images)
    assert torch.equal(next(open_set(tmp_path / "X.NPZ", SamplingConfig()).batches(0, 3)), images)
