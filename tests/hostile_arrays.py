"""More content made to hurt: arrays, images, JSON and what lies beside a checkpoint; see `hostile_content`."""

import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from tests.fuzzing import in_zip, saved
from tests.hostile_content import ESCAPE, Case, Place, inspect
from tests.parts import DDCONFIG, UNET_PARAMS, VQ_PARAMS, randomised
from tests.run_folders import finished


def npz(member: bytes, method: int = zipfile.ZIP_STORED, flag: int = 0) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("arr_0.npy", member)
    content = bytearray(buffer.getvalue())
    content[6] = content[content.find(b"PK\x01\x02") + 8] = flag
    return bytes(content)


def npy(array: np.ndarray | None = None, shape: str = "") -> bytes:
    """An array as a member of an .npz, or the header of one that is not there."""
    buffer = BytesIO()
    if array is not None:
        np.lib.format.write_array(buffer, array)
        return buffer.getvalue()
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def bomb() -> bytes:
    """A few bytes that claim to be 4 GB, and an array of 8 GB."""
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", npy(shape="(8192,1024,1024)"))
    content = bytearray(buffer.getvalue())
    claimed = struct.pack("<I", 2**32 - 2)
    content[22:26] = claimed
    place = content.find(b"PK\x01\x02") + 24
    content[place : place + 4] = claimed
    return bytes(content)


def other(content: bytes, method: int) -> bytes:
    """A zip whose member claims another compression."""
    changed = bytearray(content)
    changed[8] = changed[content.find(b"PK\x01\x02") + 10] = method
    return bytes(changed)


def decode(content: bytes, *flags: str) -> Callable[[Place], list[str]]:
    return lambda p: ["decode", p.new("x.npz", content), "--first_stage", str(p.stage), "-o", "out", *flags]


LATENTS = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype("f4")
BROKEN = npz(npy(LATENTS), zipfile.ZIP_DEFLATED)
CASES: dict[str, Case] = {
    "shape": (decode(npz(npy(shape="(1000000000,1000000,3)"))), "claims the shape"),
    "images": (lambda p: p.training(p.new("x.npz", npz(npy(shape="(10000000000,)")))), "claims the shape"),
    "zeros": (decode(bomb()), "claims the shape"),
    "encrypted": (decode(npz(npy(LATENTS), flag=1)), "is encrypted"),
    "compression": (decode(other(npz(npy(LATENTS)), 99)), "compression"),
    "broken": (decode(BROKEN[:80] + bytes(60) + BROKEN[140:]), "not an .npz"),
    "text": (decode(npz(npy(LATENTS.astype("U3")))), "not numbers of up to 64 bits"),
    "dates": (decode(npz(npy(LATENTS.astype("M8[s]")))), "not numbers of up to 64 bits"),
    "long double": (decode(npz(npy(LATENTS.astype(np.longdouble)))), "not numbers of up to 64 bits"),
    "whole numbers": (decode(npz(npy(LATENTS.astype("i4")))), "floating-point"),
    "no number": (decode(npz(npy(LATENTS * np.nan))), "not finite"),
    "no side": (decode(npz(npy(LATENTS[..., :0]))), "none of them 0"),
    "sides": (decode(npz(npy(np.zeros((1, 3, 2048, 2048), "f4")))), "times as many positions"),
    "header of brackets": (decode(npz(b"\x93NUMPY\x02\x00" + struct.pack("<I", 9000) + b"(" * 9000)), "not an .npz"),
    **{
        f"scale {value}": (decode(npz(npy(LATENTS)), "--scale_factor", value), "--scale_factor: must be")
        for value in ("nan", "inf", "1e-320", "0")
    },
    "labels": (lambda p: p.training(labelled(p, np.array([-1, 2**62]))), "which are no classes"),
}


def labelled(place: Place, labels: np.ndarray) -> str:
    buffer = BytesIO()
    np.savez(buffer, arr_0=np.zeros((2, 32, 32, 3), np.uint8), arr_1=labels)
    return place.new("x.npz", buffer.getvalue())


def image_file(content: bytes, name: str = "a.png") -> Callable[[Place], list[str]]:
    return lambda p: p.training(str(Path(p.new(name, content)).parent))


def pipe(place: Place) -> list[str]:
    folder = Path(place.new("b.png", b"")).parent
    (folder / "b.png").unlink()
    os.mkfifo(folder / "a.png")
    return place.training(str(folder))


def png(width: int, height: int) -> bytes:
    def part(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", size) + part(b"IDAT", zlib.compress(b"")) + part(b"IEND", b"")


def postscript(place: Place) -> list[str]:
    text = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n({place.marker}) (w) file closefile\n"
    return image_file(text.encode())(place)


CASES |= {
    "PostScript": (postscript, "not a readable image"),
    "a billion pixels": (image_file(png(31623, 31623)), "too many pixels"),
    "67 million pixels": (image_file(png(9400, 9400)), "too many pixels"),
    "long comment": (image_file(b"P5\n#" + b"x" * 20_000_000, "a.ppm"), "a header of more than 65536 bytes"),
    "many spaces": (image_file(b"P5" + b" " * 20_000_000, "a.ppm"), "a header of more than"),
    "many comments": (image_file(b"P2 16 16 255 " + b"#\n" * 2_000_000, "a.pgm"), "more than 10000 comments"),
    "pipe": (pipe, "but a pipe or a device"),
    "escape in a file's name": (image_file(b"x", f"{ESCAPE[:4]}.png"), "not a readable image"),
}


def folder(name: str, content: bytes | str) -> Callable[[Place], list[str]]:
    """A diffusers folder with one other file in it."""

    def write(place: Place) -> list[str]:
        path = Path(place.new(name, content)).parent
        save_file({"a": torch.zeros(1)}, path / "diffusion_pytorch_model.safetensors")
        return ["inspect", str(path)]

    return write


def beside(**model: object) -> Callable[[Place], list[str]]:
    """A checkpoint of CompVis with a config beside it."""

    def write(place: Place) -> list[str]:
        from ldm_dkdm.networks import UNet

        weights = randomised(UNet(**UNET_PARAMS)).state_dict()
        file = place.new("x.ckpt", saved({"state_dict": {f"model.diffusion_model.{k}": v for k, v in weights.items()}}))
        config = {"model": {"params": {"unet_config": {"params": {"image_size": 8}}, **model}}}
        Path(file).with_suffix(".yaml").write_text(yaml.safe_dump(config))
        return ["inspect", file]

    return write


def training_stage(**edits: object) -> Callable[[Place], list[str]]:
    def write(place: Place) -> list[str]:
        first = {"target": "ldm_dkdm.first_stage.VQModel", "params": {**VQ_PARAMS, "ddconfig": {**DDCONFIG, **edits}}}
        data = {"path": "x.npz", "image_size": 32, "batch_size": 2}
        trainer = {"max_steps": 1, "learning_rate": 1e-3, "accelerator": "cpu", "precision": "32"}
        text = yaml.safe_dump({"first_stage": first, "data": data, "trainer": trainer})
        return ["train-first-stage", "--base", place.new("stage.yaml", text)]

    return write


CASES |= {
    "deep JSON": (folder("config.json", "[" * 1_000_000), "not readable JSON"),
    "long JSON": (folder("config.json", b" " * 30_000_000), "longer than 20 MB"),
    "beside: timesteps": (beside(timesteps=10**9), "x.yaml: num_timesteps: must be at most"),
    "beside: schedule": (beside(beta_schedule=["x"]), "x.yaml: beta_schedule: expected text"),
    "beside: scale": (beside(scale_factor={}), "x.yaml: scale_factor: expected a number"),
    "beside: prediction": (beside(parameterization=[]), "x.yaml: parameterization: expected text"),
    "stage to train": (training_stage(ch=0), "first_stage.params.ddconfig.ch: expected"),
    "stage to train, nan": (training_stage(dropout=float("nan")), "first_stage.params.ddconfig.dropout: expected"),
}


def results_pipe(place: Place) -> list[str]:
    pipe = Path(place.new("results.csv", b""))
    pipe.unlink()
    os.mkfifo(pipe)
    model = str(place.model)
    return ["evaluate", "-r", model, "--teacher", model, "-n", "0", "--chains", "2", "--results", str(pipe)]


def locked_by_a_pipe(place: Place) -> list[str]:
    (place.path / "logs" / "piped").mkdir(parents=True)
    os.mkfifo(place.path / "logs" / "piped" / ".lock")
    return ["distill", "--base", place.base(logging={"name": "piped"})]


def long_table(place: Place) -> list[str]:
    run = finished(place.path / "long")
    (run / "metrics.csv").write_text("step,loss\n" + "1,2\n" * 2_000_000)
    return ["report", str(run)]


CASES |= {
    "pipe of results": (results_pipe, "results.csv: is not a file, but a pipe or a device"),
    "pipe as lock": (locked_by_a_pipe, ".lock: is not a file, but a pipe or a device"),
    "long table": (long_table, "metrics.csv: has more than 500000 rows"),
    "PERSID": (inspect("x.pt", lambda: in_zip(b"Pcos.system\n.")), "refused"),
    "INST": (inspect("x.pt", lambda: in_zip(b"(S'touch x'\nios\nsystem\n.")), "refused, its pickle asks for os.system"),
}
