"""Image files of every kind: read right, or refused by name; nothing is passed over without a word."""

import logging
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_dkdm import DiffusionModel, NoiseSchedule
from ldm_dkdm.config.schema import DiffusionDataConfig
from ldm_dkdm.distillation.image_data import open_images
from ldm_dkdm.errors import UserError
from ldm_dkdm.images import find_images, load_images, read_image
from ldm_dkdm.networks import DiT
from ldm_dkdm.npz import save_npz
from ldm_dkdm.training.from_images import require_fitting_labels

RAMP = np.linspace(0, 65535, 16 * 16).astype(np.uint16).reshape(16, 16)
GREY = torch.from_numpy((RAMP / 257).round().astype(np.uint8))
RED, BLUE = (255, 0, 0), (0, 0, 255)


def image(
    path: Path, color: object = RED, mode: str = "RGB", size: tuple[int, int] = (8, 8), **options: object
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_16_bit_grey_is_divided_by_257(name: str, tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / name)
    assert torch.equal(read_image(tmp_path / name, 16, 1)[..., 0], GREY)
    assert torch.equal(read_image(tmp_path / name, 16), GREY[..., None].expand(-1, -1, 3))


def test_a_tiff_of_big_endian_numbers_where_0_is_white_is_read_as_it_looks(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "a.tif", tiffinfo={262: 0})
    with Image.open(tmp_path / "a.tif") as stored:
        assert stored.tag_v2[262] == 0
    assert torch.equal(read_image(tmp_path / "a.tif", 16, 1)[..., 0], 255 - GREY)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_numbers_of_unknown_range_are_refused_by_name(kind: type, tmp_path: Path) -> None:
    Image.fromarray(RAMP.astype(kind)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif: .* no known range; write it with 8 or 16 bits"):
        read_image(tmp_path / "a.tif", 16)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_an_image_upright(suffix: str, orientation: int, tmp_path: Path) -> None:
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # orientation -> Pillow's transposition that undoes it
    quarters = Image.new("RGB", (32, 32), "white")
    quarters.paste(RED, (0, 0, 16, 16))
    quarters.paste(BLUE, (16, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    quarters.save(tmp_path / f"a.{suffix}", exif=exif)
    upright = quarters if orientation == 1 else quarters.transpose(Image.Transpose(turns[orientation]))
    found = read_image(tmp_path / f"a.{suffix}", 32).int()
    assert (found - torch.from_numpy(np.asarray(upright).copy()).int()).abs()[[4, 4, 27, 27], [4, 27, 4, 27]].max() < 8


def test_channels_are_what_the_reader_asks_for(tmp_path: Path) -> None:
    clear = image(tmp_path / "clear.png", (10, 20, 30, 0), "RGBA")
    assert (read_image(clear, 8) == 255).all()
    assert read_image(clear, 8, 1).shape == (8, 8, 1)
    levels = torch.arange(256, dtype=torch.uint8).view(16, 16)
    Image.fromarray(levels.numpy()).save(tmp_path / "grey.png")
    assert torch.equal(read_image(tmp_path / "grey.png", 16, 1)[..., 0], levels)
    for mode, color in (("1", 1), ("LA", (255, 255)), ("P", 0), ("CMYK", (0, 0, 0, 0))):
        file = image(tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}", color, mode)
        assert read_image(file, 8).shape == (8, 8, 3)


def test_other_numbers_of_channels_come_from_an_npz(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"grey or RGB; images of 4 channels are read from an \.npz"):
        load_images(tmp_path, 8, 4)
    images = torch.randint(256, (3, 8, 8, 4), dtype=torch.uint8)
    save_npz(images, tmp_path / "x.npz")
    assert torch.equal(load_images(tmp_path / "x.npz", 8, 4), images)
    with pytest.raises(UserError, match=r"x\.npz: arr_0 is uint8 \(3, 8, 8, 4\), expected uint8 \(N,8,8,1\)"):
        load_images(tmp_path / "x.npz", 8, 1)


def test_grey_images_may_be_stored_without_an_axis_of_channels(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((2, 8, 8), np.uint8))
    assert open_images(tmp_path / "x.npz", 8, 1).take(torch.arange(2)).shape == (2, 8, 8, 1)


def test_a_huge_image_is_refused_by_name_and_a_large_one_read_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    image(tmp_path / "large.png", size=(12, 12))
    image(tmp_path / "huge.png", size=(20, 20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "large.png", 8).shape == (8, 8, 3)
        with pytest.raises(UserError, match=r"huge\.png: has too many pixels to be read safely; scale it down"):
            read_image(tmp_path / "huge.png", 8)


@pytest.mark.parametrize("content", [b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", b"GIF89a", b"II*\0"])
def test_what_is_no_image_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.png: not a readable image: "):
        read_image(tmp_path / "a.png", 8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif", "gif"])
def test_a_truncated_image_is_refused_by_name(suffix: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    file = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"a\.{suffix}: not a readable image"):
        read_image(file, 8)


def test_a_post_script_file_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen", started)
    monkeypatch.setattr("subprocess.check_call", started)
    image(tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png: not a readable image: cannot identify"):
        read_image(tmp_path / "a.png", 8)


def test_an_animation_gives_its_first_frame_and_a_tiff_of_pages_is_refused(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, BLUE)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.gif", 8)[0, 0].tolist() == list(RED)
    with pytest.raises(UserError, match=r"a\.tif: .*it has several pages"):
        read_image(tmp_path / "a.tif", 8)


def test_what_is_not_read_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.png", "b.tif", "c.gif", "d.JPEG", "._a.png"):
        image(tmp_path / name, format="PNG")
    for name in ("a.heic", "b.heic", "a.txt", ".DS_Store"):
        (tmp_path / name).touch()
    with caplog.at_level(logging.WARNING, "ldm_dkdm"):
        assert len(find_images(tmp_path)) == 4
    assert "4 images; 4 other files are not read (2 .heic, " in caplog.text
    assert "1 .txt" in caplog.text and "1 hidden" in caplog.text
    with pytest.raises(UserError, match=r"holds no images .*, but 2 \.heic"):
        find_images(_only(tmp_path / "heic"))


def _only(folder: Path) -> Path:
    folder.mkdir()
    for name in ("a.heic", "b.heic"):
        (folder / name).touch()
    return folder


def test_linked_class_folders_are_followed_and_a_loop_ends(tmp_path: Path) -> None:
    for name in ("cat", "dog", "owl"):
        image(tmp_path / "real" / name / "a.png")
    (tmp_path / "data").mkdir()
    for name in ("cat", "dog", "owl"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "real/cat/loop").symlink_to(tmp_path / "data")
    images = open_images(tmp_path / "data", 8)
    assert images.labels is not None
    assert images.classes == ["0 cat", "1 dog", "2 owl"]
    assert all(file.is_file() for file in images.images)


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image(tmp_path / "a/a.png")
    image(tmp_path / "b/a.png")
    scan = os.scandir

    def refusing(folder: Path) -> object:
        if Path(folder).name == "b":
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    with monkeypatch.context() as patched:  # before pytest removes the folder
        patched.setattr(os, "scandir", refusing)
        with pytest.raises(PermissionError, match="b'"):
            find_images(tmp_path)


@pytest.mark.parametrize("names", [[str(n) for n in range(12)], ["00", "03", "11"], ["7"]])
def test_folders_named_by_numbers_are_these_classes(names: list[str], tmp_path: Path) -> None:
    for name in names:
        image(tmp_path / name / "a.png")
    images = open_images(tmp_path, 8)
    assert [(file.parent.name, int(label)) for file, label in zip(images.images, images.labels, strict=True)] == [
        (name, int(name)) for name in sorted(names)
    ]


def test_images_beside_class_folders_have_no_labels_and_one_is_named(tmp_path: Path) -> None:
    image(tmp_path / "cat/a.png")
    image(tmp_path / "stray.png")
    images = open_images(tmp_path, 8)
    assert images.labels is None and images.loose == tmp_path / "stray.png"
    (tmp_path / "stray.png").unlink()
    assert open_images(tmp_path, 8).classes == ["0 cat"]


@pytest.mark.parametrize("names", [("train/0", "train/1", "val/0"), ("0", "00", "1")])
def test_class_folders_of_one_number_are_not_merged(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        image(tmp_path / name / "a.png")
    images = open_images(tmp_path, 8)
    assert len(images) == 3 and images.labels is None  # a training without labels takes all
    data = DiffusionDataConfig(image_size=8, batch_size=1, path=str(tmp_path))
    network = DiT(8, in_channels=3, hidden_size=32, depth=1, num_heads=2, num_classes=2, learn_sigma=False)
    first, second = sorted(tmp_path / name for name in names if int(Path(name).name) == 0)
    with pytest.raises(UserError, match=rf"data.path: {first} and {second} are both class 0; move the images"):
        require_fitting_labels(DiffusionModel(network, schedule=NoiseSchedule()), data, {"path": images})


def test_a_class_folder_without_images_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image(tmp_path / "cat/deep/a.png")
    (tmp_path / "ant").mkdir()
    with caplog.at_level(logging.WARNING, "ldm_dkdm"):
        assert open_images(tmp_path, 8).classes == ["0 cat/deep"]
    assert f"{tmp_path}: 1 sub-folders hold no images: ant" in caplog.text


@pytest.mark.parametrize(("channels", "kind"), [(1, 0), (2, 4), (3, 2), (4, 6)])
def test_16_bit_png_of_every_kind_keeps_its_levels(channels: int, kind: int, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(65536, size=(16, 16, channels))
    if channels in (2, 4):
        values[..., -1] = 65535
    _write_png(tmp_path / "a.png", values, kind)
    expected = (values[..., :3] if channels > 2 else values[..., :1]) / 257
    assert np.abs(read_image(tmp_path / "a.png", 16).numpy() - expected).max() < 1


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_level_of_a_png_is_white(bits: int, tmp_path: Path) -> None:
    most = 2**bits - 1
    key, other = (0, 1) if bits == 1 else (most // 3, most // 5)  # without alpha, neither would be white
    values = np.full((16, 16, 1), other)
    values[:, :8] = key
    _write_png(tmp_path / "a.png", values, 0, bits, struct.pack(">H", key))
    found = read_image(tmp_path / "a.png", 16, 1)[..., 0]
    assert (found[:, :8] == 255).all() and (found[:, 8:] == round(other * 255 / most)).all()


def test_a_transparent_colour_of_16_bits_is_refused(tmp_path: Path) -> None:
    _write_png(tmp_path / "a.png", np.full((8, 8, 3), 40000), 2, 16, struct.pack(">3H", *[40000] * 3))
    with pytest.raises(UserError, match=r"a\.png: .* a colour of 16 bits is transparent, .* with an alpha channel"):
        read_image(tmp_path / "a.png", 8)


def _write_png(path: Path, values: np.ndarray, kind: int, bits: int = 16, clear: bytes | None = None) -> None:
    """Pillow reads 16-bit colour but does not write it, nor a transparent level of another depth than 8."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = values.shape
    digits = (values.reshape(height, -1, 1) >> np.arange(bits)[::-1]) & 1
    rows = b"".join(b"\0" + np.packbits(row.astype(np.uint8)).tobytes() for row in digits)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    header += b"" if clear is None else chunk(b"tRNS", clear)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_the_tags_of_a_damaged_tiff_bring_no_warnings(tmp_path: Path) -> None:
    outside = b"".join(struct.pack("<HHII", 1000 + tag, 2, 20_000_000, 8) for tag in range(100))
    path = tmp_path / "a.tif"
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, 100) + outside + struct.pack("<I", 0))
    with pytest.raises(UserError, match="not a readable image: cannot identify image file"):
        read_image(path, 8)
