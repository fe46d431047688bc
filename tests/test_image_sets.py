"""Sets of images: folders, .npz files of images and statistics, models, first stages."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_dkdm import DiffusionModel, NoiseSchedule, UserError, load_model
from ldm_dkdm.config.schema import SamplingConfig
from ldm_dkdm.evaluation.moments import SplitScores
from ldm_dkdm.evaluation.npz import NpzFile
from ldm_dkdm.evaluation.opening import open_images
from ldm_dkdm.evaluation.samples import sampled
from ldm_dkdm.evaluation.sources import FolderImages, image_files
from ldm_dkdm.evaluation.statistics import Statistics
from ldm_dkdm.images import save_image, to_image
from ldm_dkdm.networks import DiT
from ldm_dkdm.npz import save_npz
from tests.parts import randomised

IMAGES = torch.randint(0, 256, (9, 6, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CONFIG = SamplingConfig(5, 2, 7, 3)


def all_of(source: object, first: int = 0, batch_size: int = 4) -> torch.Tensor:
    return torch.cat(list(source.batches(first, batch_size)))


def folder(path: Path, images: torch.Tensor = IMAGES, suffix: str = ".png") -> Path:
    path.mkdir()
    for i, image in enumerate(images.numpy()):
        Image.fromarray(image).save(path / f"{i:03d}{suffix}")
    return path


# Images


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_an_npz_is_read_in_batches_from_any_image_on(write: object, tmp_path: Path) -> None:
    write(tmp_path / "a.npz", IMAGES.numpy())
    source = image_files(tmp_path / "a.npz")
    assert source.count == 9
    assert all(torch.equal(all_of(source, first, size), IMAGES[first:]) for first in (0, 3, 8) for size in (1, 4, 20))


def test_what_dkdm_sample_writes_and_grey_images_are_read(tmp_path: Path) -> None:
    save_npz(IMAGES, tmp_path / "ours.npz", torch.arange(9))
    assert torch.equal(all_of(image_files(tmp_path / "ours.npz")), IMAGES)
    np.savez(tmp_path / "grey.npz", IMAGES[..., 0].numpy())
    assert torch.equal(all_of(image_files(tmp_path / "grey.npz")), IMAGES[..., :1])


def test_a_folder_gives_its_images_as_they_are(tmp_path: Path) -> None:
    source = image_files(folder(tmp_path / "a"))
    assert torch.equal(all_of(source), IMAGES) and source.facts()["lossy"] == 0
    assert source.identity() == image_files(folder(tmp_path / "b")).identity()
    assert source.identity() != image_files(folder(tmp_path / "c", IMAGES.flip(0))).identity()
    assert all_of(FolderImages(tmp_path / "a", "a", size=3)).shape == (9, 3, 3, 3)


def test_images_of_other_sizes_need_a_size(tmp_path: Path) -> None:
    path = folder(tmp_path / "a")
    Image.new("RGB", (7, 7)).save(path / "z.png")
    with pytest.raises(UserError, match=r"size: .*z.png is not 6x6 as the first image; give a size"):
        all_of(image_files(path))
    assert all_of(image_files(path, 6)).shape == (10, 6, 6, 3)
    Image.new("RGB", (7, 5)).save(path / "0.png")
    with pytest.raises(UserError, match=r"size: .*0.png is 7x5; give a size"):
        all_of(image_files(path))


def test_lossy_files_are_known_by_their_content(tmp_path: Path) -> None:
    image = Image.fromarray(IMAGES[0].numpy()).resize((40, 40))
    profile = {"icc_profile": b"p" * 5001}
    kinds = {
        "a.png": ("JPEG", {}, 1),
        "b.jpg": ("PNG", {}, 0),
        "c.webp": ("WEBP", {"lossless": True, **profile}, 0),
        "d.webp": ("WEBP", {"lossless": False, **profile}, 1),
        "e.gif": ("GIF", {}, 0),
    }
    for name, (kind, options, lossy) in kinds.items():
        file = tmp_path / name[0] / name
        file.parent.mkdir()
        image.save(file, format=kind, **options)
        assert FolderImages(file.parent, "a").facts()["lossy"] == lossy, name
    assert FolderImages(tmp_path, "all").facts()["lossy"] == 2
    (tmp_path / "a" / "a.png").write_bytes(b"RIFF\xff\xff\xff\xffWEBPabcd\0\0")  # breaks off in a chunk
    assert FolderImages(tmp_path, "all", size=4).digest


def test_a_folder_is_grey_only_if_all_its_images_are(tmp_path: Path) -> None:
    for number, image in enumerate(IMAGES):
        save_image(to_image(image[..., :1]), tmp_path / f"{number}.png")
    assert torch.equal(all_of(FolderImages(tmp_path, "a")), IMAGES[..., :1])
    save_image(to_image(IMAGES[0]), tmp_path / "z.png")
    assert all_of(FolderImages(tmp_path, "a")).shape == (10, 6, 6, 3)


def test_a_resize_is_a_fact_only_where_it_changes_an_image(tmp_path: Path) -> None:
    path = folder(tmp_path / "a")
    assert FolderImages(path, "a", size=6).facts()["resized"] == "none"
    Image.new("RGB", (6, 7)).save(path / "z.png")
    assert FolderImages(path, "a", size=6).facts()["resized"] == "centred square to 6, Lanczos"


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"arr_0": np.zeros((2, 3, 3, 3), np.float32)}, "arr_0 is float32"),
        ({"arr_0": np.zeros((2, 3), np.uint8)}, "arr_0 is uint8"),
        ({"arr_0": np.array([{"a": 1}], dtype=object)}, "images in arr_0 .*holds object"),
        ({"latents": np.zeros(3)}, "holds latents; images are in arr_0"),
        ({"mu": np.zeros(3)}, "mu and sigma .* come in pairs"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, r"sigma \(2, 2\) does not fit mu \(3,\)"),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "mu holds values that are not finite"),
        ({"mu": np.zeros(2, int), "sigma": np.eye(2)}, "mu is int64"),
        ({"mu": np.array(["a"]), "sigma": np.eye(1)}, "array mu: it holds str32"),
    ],
)
def test_other_npz_files_are_refused(arrays: dict[str, np.ndarray], reason: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=reason):
        image_files(tmp_path / "a.npz").facts()


NESTED = np.moveaxis(IMAGES.numpy(), -1, 1)


@pytest.mark.parametrize(
    ("name", "array", "how"),
    [
        ("images", IMAGES.numpy(), "images"),
        ("arr_0", IMAGES.numpy().astype(int), "images.astype('uint8')"),
        ("arr_0", IMAGES.numpy().astype(np.float32), "images.round().astype('uint8')"),
        ("arr_0", IMAGES.numpy() / 255, "(255 * images).round().astype('uint8')"),
        ("x", (NESTED / 127.5 - 1).astype(np.float32), "(127.5 * (numpy.moveaxis(images, 1, -1) + 1)).round()"),
        ("arr_0", IMAGES.numpy() > 127, "255 * images.astype('uint8')"),
        ("arr_0", 9.0 * IMAGES.numpy(), None),
        ("arr_0", np.full((2, 3, 3, 3), np.nan), None),
        ("labels", np.zeros(9, int), None),
        ("arr_0", np.repeat(np.float32([[[[0]]], [[[255]]]]), 1 << 20, axis=2), "images.round().astype('uint8')"),
        ("masks", np.arange(27).reshape(3, 3, 3) % 2, None),
        ("arr_0", (IMAGES.numpy() > 127).astype(np.float32), None),
        ("latents", (NESTED / 127.5 - 1) * 0.8, None),
    ],
)
def test_arrays_of_other_types_are_answered_with_what_makes_them_some(
    name: str, array: np.ndarray, how: str | None, tmp_path: Path
) -> None:
    np.savez(tmp_path / "a.npz", **{name: array})
    np.save(tmp_path / "a.npy", array)
    lines = [refusal(tmp_path / "a.npz"), refusal(tmp_path / "a.npy")]
    assert [" writes one" in text for text in lines] == [how is not None] * 2
    if how is None:
        return
    given = [re.search(r"with images = (.*), numpy.savez\('FILE.npz', (.*)\) writes one$", text) for text in lines]
    assert given[0][2].startswith(how) and given[1][2] == given[0][2]
    for match in given:
        images = eval(match[1], {"numpy": np})  # what the line says, as a user would type it
        np.savez(tmp_path / "b.npz", eval(match[2], {"numpy": np, "images": images}))
        made = all_of(image_files(tmp_path / "b.npz"))
        if len(array) == 2:
            assert made[0].max() == 0 and made[1].min() == 255
            continue
        assert torch.equal(made, IMAGES if array.dtype != bool else 255 * (IMAGES > 127).byte())


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as refused:
        open_images(path, CONFIG).facts()
    return str(refused.value)


@pytest.mark.parametrize("grey", [False, True])
def test_images_in_fortran_order_are_read_as_those_in_c_order(grey: bool, tmp_path: Path) -> None:
    images = IMAGES[..., 0] if grey else IMAGES
    np.savez(tmp_path / "f.npz", np.asfortranarray(images.numpy()))
    found = NpzFile(tmp_path / "f.npz")
    assert found.shape == (*images.shape, *([1] if grey else []))
    assert torch.equal(torch.cat(list(found.batches(1, len(images), 4))), images[1:].reshape(-1, *found.shape[1:]))


def test_damaged_npz_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(UserError, match=r"a.npz: no such file"):
        NpzFile(path)
    np.savez(path, IMAGES.numpy())
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError, match=r"a.npz: is not an .npz"):
        NpzFile(path)
    content = Path(tmp_path / "b.npz")
    np.savez_compressed(content, IMAGES.numpy())
    damaged = bytearray(content.read_bytes())
    damaged[300:340] = bytes(40)
    content.write_bytes(damaged)
    with pytest.raises(UserError, match=r"b.npz"):
        all_of(image_files(content))


# Statistics


def test_guided_diffusions_statistics_are_read(tmp_path: Path) -> None:
    arrays = {"mu": np.arange(4, dtype=np.float32), "sigma": np.eye(4), "mu_s": np.ones(3), "sigma_s": 2 * np.eye(3)}
    np.savez(tmp_path / "VIRTUAL_x.npz", arr_0=IMAGES.numpy(), **arrays)
    source = image_files(tmp_path / "VIRTUAL_x.npz")
    found = source.stored()
    assert (found.count, found.facts) == (None, {}) and found.features is None
    assert all(np.array_equal(getattr(found, name), array) for name, array in arrays.items())
    assert found.mu.dtype == np.float64
    assert torch.equal(all_of(source), IMAGES)


def test_our_statistics_come_back_with_their_provenance(tmp_path: Path) -> None:
    scores = SplitScores()
    scores.add(np.random.default_rng(0).normal(size=(9, 3)), 0)
    facts = {"features": "toy", "source": {"images": 9, "size": 6}}
    mu, sigma = np.zeros(2), np.eye(2)
    Statistics(9, mu, sigma, None, None, scores, np.ones((9, 2), np.float32), facts).write(tmp_path / "a.npz")
    found = Statistics.read(tmp_path / "a.npz", features=True)
    assert (found.count, dict(found.facts), found.mu_s) == (9, facts, None)
    assert np.array_equal(found.features, np.ones((9, 2))) and np.array_equal(found.scores.scores(), scores.scores())
    assert Statistics.read(tmp_path / "a.npz").features is None
    assert image_files(tmp_path / "a.npz").facts()["size"] == 6


# Models


def test_a_models_samples_are_those_of_its_seeds(teacher_folder: Path) -> None:
    model = load_model(teacher_folder)
    source = sampled(model, CONFIG)
    # bit for bit in batches of one size; a processor may round those of other sizes otherwise
    wanted = {count: model.sample(count, steps=3, seed=seed) for count, seed in ((4, 7), (1, 11), (3, 9))}
    assert torch.equal(all_of(source), torch.cat([wanted[4], wanted[1]]))
    assert torch.equal(all_of(source, 2, 3), wanted[3])
    assert (all_of(source)[2:].float() - wanted[3].float()).abs().mean() < 0.05  # of other seeds it is 3.5
    facts = source.facts()
    assert {name: facts[name] for name in ("images", "seeds", "sampler", "steps", "eta", "size")} == {
        "images": 5,
        "seeds": "7 ... 11",
        "sampler": "ddim",
        "steps": 3,
        "eta": 0.0,
        "size": 32,
    }


def test_labels_keep_their_turn() -> None:
    network = randomised(DiT(8, in_channels=3, num_classes=5, hidden_size=32, depth=1, num_heads=2, learn_sigma=False))
    model = DiffusionModel(network, schedule=NoiseSchedule(num_timesteps=20), space="pixel")
    config = SamplingConfig(5, 2, 7, 2, labels=[3, 1, 4])
    wanted = model.sample(5, steps=2, seed=7, labels=[3, 1, 4])
    assert torch.equal(all_of(sampled(model, config), 2), wanted[2:])
    assert not torch.equal(model.sample(5, steps=2, seed=7, labels=[1, 4, 3]), wanted)


def test_the_identity_of_samples_follows_weights_and_sampling(teacher_folder: Path) -> None:
    model = load_model(teacher_folder)
    known = [sampled(model, CONFIG).identity()]
    for changes in ({"seed": 8}, {"steps": 4}, {"eta": 0.5}, {"count": 6}, {"sampler": "ddpm"}):
        known.append(sampled(model, SamplingConfig(**{"count": 5, "seed": 7, "steps": 3, **changes})).identity())
    with torch.no_grad():
        next(model.network.parameters()).view(-1)[0] += 1e-3
    known.append(sampled(model, CONFIG).identity())
    with torch.no_grad():
        next(model.codec().autoencoder.parameters()).view(-1)[0] += 1e-3
    known.append(sampled(model, CONFIG).identity())
    assert all(known[i] != known[j] for i in range(len(known)) for j in range(i))
    again, other = sampled(load_model(teacher_folder), CONFIG), SamplingConfig(5, 4, 7, 3)
    other_scale = sampled(model, CONFIG)
    before = other_scale.identity()
    model.codec().scale_factor *= 2  # as the first samples may decide
    assert other_scale.identity() == before != sampled(model, CONFIG).identity()
    assert again.identity() == known[0] == sampled(load_model(teacher_folder), other).identity()


def test_paths_are_opened_as_what_they_are(teacher_folder: Path, first_stage: Path, tmp_path: Path) -> None:
    images = open_images(folder(tmp_path / "a"), CONFIG)
    assert images.facts()["kind"] == "folder"
    assert open_images(teacher_folder, CONFIG).facts()["kind"] == "model"
    assert open_images(IMAGES, CONFIG).facts()["kind"] == "tensor"
    assert open_images(first_stage, CONFIG, reconstructed=images).facts()["kind"] == "reconstructions"
    assert open_images(folder(tmp_path / "named.npy"), CONFIG).facts()["kind"] == "folder"
    with pytest.raises(UserError, match="is a first stage; name the images"):
        open_images(first_stage, CONFIG)
    with pytest.raises(UserError, match="nowhere: no such file or folder; the path of a set of images is a model"):
        open_images(tmp_path / "nowhere", CONFIG)
    with pytest.raises(UserError, match=r"images are uint8 \(N,H,W,C\), N > 0; got torch.float32"):
        open_images(torch.zeros(2, 3, 3, 3), CONFIG)
