"""Seventy files that hold no usable model: each ends in one line, and none runs code."""

import argparse
import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from ldm_dkdm import UserError
from ldm_dkdm.commands.distill import open_teacher
from ldm_dkdm.config.schema import DiffusionConfig
from ldm_dkdm.networks import UNet
from tests.parts import UNET_PARAMS, randomised
from tests.test_foreign import run_with

GIVEN = {"image_size": 8, "num_head_channels": 32, "use_new_attention_order": False}
PIXEL = DiffusionConfig("cosine", 20, space="pixel")


class Hostile:
    """Unpickling it writes the marker."""

    def __init__(self, marker: Path, call: Callable[[str], object] = os.system) -> None:
        self.marker, self.call = marker, call

    def __reduce__(self) -> tuple[object, tuple[str]]:
        if self.call is os.system:
            return os.system, (f"touch {self.marker}",)
        return self.call, (f"open({str(self.marker)!r}, 'w').close()",)


class Call:
    """Unpickling it calls a function with arguments."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.function, self.arguments


def pointer() -> Call:
    """An array of one object, at an address of the file's choice: NumPy would follow it."""
    return Call(np.ndarray, Call(np.ndarray, (1,), Call(np.dtype, "O"), b"A" * 8))


def script() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, its files are not gone
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def compressed(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return buffer.getvalue()


def deep_key() -> bytes:
    """A dictionary whose key is a tuple 300,000 deep: hashing it would end the interpreter."""
    return b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s."


def torch_zip(pickled: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", b"3\n")
    return buffer.getvalue()


def shadowed() -> OrderedDict[str, torch.Tensor]:
    """Weights whose dictionary has its methods replaced by numbers."""
    weights = OrderedDict(unet())
    weights.get = weights.keys = weights.values = 3
    return weights


def broken_directory() -> bytes:
    return zipped(unet()).replace(b"PK\x01\x02", b"PK\x01\x09")


def unet() -> dict[str, torch.Tensor]:
    return dict(randomised(UNet(**UNET_PARAMS)).state_dict())


def zipped(content: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def legacy(content: object) -> bytes:
    return zipped(content, _use_new_zipfile_serialization=False)


def archive(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(name, b"something")
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.addfile(tarfile.TarInfo("model.ckpt"), io.BytesIO())
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    return buffer.getvalue()


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """A UNet's tensors with one changed, or without it."""
    tensors = unet()
    value = change(tensors.pop(name))
    return tensors if value is None else {**tensors, name: value}


def compvis(extra: dict[str, object]) -> dict[str, object]:
    state = {f"model.diffusion_model.{name}": value for name, value in unet().items()}
    return {"state_dict": {**state, **extra}, "epoch": 1}


OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1.0}]}
RESNET = {"conv1.weight": torch.zeros(4, 3, 7, 7), "fc.weight": torch.zeros(10, 4)}
FOLDED = OrderedDict(a=torch.zeros(2))

# name -> (content for a marker, what the message must say)
CORPUS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "system_zip.ckpt": (lambda m: zipped({"state_dict": unet(), "x": Hostile(m)}), "posix.system"),
    "system_legacy.ckpt": (lambda m: legacy({"state_dict": unet(), "x": Hostile(m)}), "posix.system"),
    "system_optimizer.ckpt": (lambda m: zipped({**compvis({}), "optimizer_states": [Hostile(m)]}), "posix.system"),
    "system_callback_key.ckpt": (lambda m: zipped({**compvis({}), "callbacks": {"a": [Hostile(m)]}}), "posix.system"),
    "system_plain.pt": (lambda m: pickle.dumps({"a": Hostile(m)}), "posix.system"),
    "system_plain_protocol_2.pt": (lambda m: pickle.dumps({"a": Hostile(m)}, 2), "posix.system"),
    "system_cache.pkl": (lambda m: pickle.dumps(defaultdict(None, total_t=Hostile(m))), "posix.system"),
    "system.safetensors": (lambda m: zipped({"x": Hostile(m)}), "posix.system"),
    "eval_zip.pt": (lambda m: zipped({"x": Hostile(m, eval)}), "builtin"),
    "exec_legacy.pt": (lambda m: legacy({"x": Hostile(m, exec)}), "builtin"),
    "exec_plain.pkl": (lambda m: pickle.dumps([Hostile(m, exec)]), "builtins.exec"),
    "protocol_4.pt": (lambda m: zipped({"x": Hostile(m)}, pickle_protocol=4), "posix.system"),
    "unknown_class.pt": (
        lambda m: zipped({"a": torch.zeros(1), "b": argparse.ArgumentParser}),
        "argparse.ArgumentParser",
    ),
    "empty.ckpt": (lambda m: b"", "is empty"),
    "page.ckpt": (lambda m: b"<!DOCTYPE html><html><title>Sign in</title></html>", "is a web page"),
    "page_of_xml.pt": (lambda m: b'<?xml version="1.0"?><Error>AccessDenied</Error>', "is a web page"),
    "pointer.safetensors": (lambda m: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "config.pt": (lambda m: json.dumps({"model": "x"}).encode(), "is text"),
    "half.ckpt": (lambda m: zipped(unet())[:200_000], "is truncated"),
    "half_legacy.pt": (lambda m: legacy(unet())[:200_000], "not a readable checkpoint"),
    "half.safetensors": (lambda m: save(unet())[:200_000], "not a readable safetensors"),
    "half_header.safetensors": (lambda m: save(unet())[:100], "its header is truncated"),
    "long_header.safetensors": (lambda m: struct.pack("<Q", 1 << 60) + b"{}", "not in a known checkpoint format"),
    "half.pkl": (lambda m: pickle.dumps({"total_t": np.zeros(100)})[:-30], "not a readable pickle of arrays"),
    "noise.ckpt": (lambda m: bytes(range(256)) * 4, "not in a known checkpoint format"),
    "release.ckpt": (lambda m: archive("ffhq/model.ckpt"), "unpack it first"),
    "release.tar": (lambda m: tar(), "tar archive"),
    "weights.pt.gz": (lambda m: gzip.compress(zipped(FOLDED)), "gzip archive"),
    "images.npz": (lambda m: npz(), "is an .npz"),
    "keras.h5": (lambda m: b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "model.gguf": (lambda m: b"GGUF" + bytes(100), "GGUF"),
    "image.pt": (lambda m: b"\x89PNG\r\n\x1a\n" + bytes(100), "is an image"),
    "opt010000.pt": (lambda m: zipped(OPTIMIZER), "optimizer's state"),
    "lora.safetensors": (lambda m: save({"unet.down.lora_A.weight": torch.zeros(2, 2)}), "LoRA"),
    "resnet.pth": (lambda m: zipped(RESNET), "no known diffusion network"),
    "vqgan.ckpt": (
        lambda m: zipped({"state_dict": {"encoder.a": torch.zeros(1), "decoder.a": torch.zeros(1)}}),
        "first_stage.ckpt",
    ),
    "classifier.pt": (
        lambda m: zipped({k: v for k, v in unet().items() if not k.startswith("output_blocks")}),
        "classifier",
    ),
    "tensor.pt": (lambda m: zipped(torch.zeros(4)), "one tensor"),
    "list.pt": (lambda m: zipped([torch.zeros(4)]), "a list"),
    "numbers.pt": (lambda m: zipped({"epoch": 3}), "no weights"),
    "nan.pt": (lambda m: zipped(changed("out.2.bias", lambda v: v * float("nan"))), "not finite"),
    "overflow_fp16.pt": (lambda m: zipped(changed("out.2.bias", lambda v: (v * 1e9).half())), "not finite"),
    "quantised.pt": (lambda m: zipped(changed("out.2.weight", lambda v: v.to(torch.int8))), "not weights"),
    "missing_tensor.pt": (lambda m: zipped(changed("out.0.weight", lambda v: None)), "missing: out.0.weight"),
    "half_a_unet.pt": (
        lambda m: zipped(changed("input_blocks.1.0.out_layers.3.weight", lambda v: None)),
        "incomplete or of another kind",
    ),
    "flat_unet.pt": (lambda m: zipped(changed("time_embed.0.weight", lambda v: v[0])), "incomplete or of another kind"),
    "pointer.pkl": (lambda m: pickle.dumps({"total_t": pointer()}), "not a numeric type"),
    "pointer_protocol_2.pkl": (lambda m: pickle.dumps({"total_t": pointer()}, 2), "not a numeric type"),
    "pointer_zip.ckpt": (lambda m: zipped({**compvis({}), "x": pointer()}), "not a numeric type"),
    "pointer_legacy.pt": (lambda m: legacy({**unet(), "x": pointer()}), "not a numeric type"),
    "objects.pkl": (lambda m: pickle.dumps({"total_t": np.array([Hostile(m)])}), "not a numeric type"),
    "whole_network.pt": (lambda m: zipped(torch.nn.Linear(2, 2)), "save its state_dict()"),
    "script.pt": (lambda m: script(), "TorchScript"),
    "compressed.pt": (lambda m: compressed(zipped(unet())), "is compressed"),
    "no_device.pt": (lambda m: zipped(changed("out.2.bias", lambda v: v.to("meta"))), "meta device"),
    "sparse.pt": (lambda m: zipped(changed("out.2.bias", lambda v: v.to_sparse())), "another kind (sparse)"),
    "repeated.pt": (lambda m: zipped(changed("out.2.bias", lambda v: torch.zeros(1).expand(3))), "repeats"),
    "block_of_many.pt": (lambda m: zipped({**unet(), "output_blocks.99999999.0.x": torch.zeros(1)}), "lacks blocks"),
    "numpy_module.pkl": (
        lambda m: b"\x80\x04cnumpy.dtypes\n__builtins__\n.",
        "numpy.dtypes.__builtins__, which no array needs",
    ),
    "deep_key.pkl": (lambda m: deep_key(), "nested more than 1000 deep"),
    "deep_key.pt": (lambda m: torch_zip(deep_key()), "nested more than 1000 deep"),
    "far_memo.pkl": (lambda m: b"\x80\x02}r\xff\xff\xff\x7f.", "numbers its objects up to 2147483647"),
    "bytes_on_demand.pt": (lambda m: zipped({"x": Call(bytearray, 3 * 10**9)}), "builtin"),
    "number_as_name.pt": (lambda m: zipped({**unet(), 3: torch.zeros(1)}), "under 3, which is not a name"),
    "shadowed.pt": (lambda m: zipped(shadowed()), "is damaged"),
    "broken_directory.pt": (lambda m: broken_directory(), "is damaged"),
    "flat_schedule.ckpt": (lambda m: zipped(compvis({"alphas_cumprod": torch.zeros(2, 2)})), "which is not a schedule"),
    "wrong_shape.pt": (lambda m: zipped(changed("out.0.weight", lambda v: v[:16])), "of another shape"),
    "more_tensors.pt": (lambda m: zipped({**unet(), "extra.weight": torch.zeros(1)}), "unexpected: extra.weight"),
    "text_to_image.ckpt": (
        lambda m: zipped(compvis({"model.diffusion_model.a.transformer_blocks.0.x": torch.zeros(1)})),
        "text-conditional",
    ),
}


def test_there_are_seventy() -> None:
    assert len(CORPUS) >= 70


@pytest.mark.parametrize("name", CORPUS)
def test_each_ends_in_one_line_and_none_runs_code(name: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / name
    content, words = CORPUS[name]
    path.write_bytes(content(marker))
    with pytest.raises(UserError) as error:
        open_teacher(run_with(path, None if name == "text_to_image.ckpt" else PIXEL, params=GIVEN))
    message = str(error.value)
    assert words in message and name in message and "\n" not in message
    assert "weights_only" not in message
    assert not marker.exists()
    print(f"{name} | {message.replace(str(tmp_path) + '/', '')}")  # shown by pytest -s


def test_the_same_unet_loads_when_nothing_is_wrong_with_it(tmp_path: Path) -> None:
    for name, content in (("zip.pt", zipped(unet())), ("legacy.pt", legacy(unet())), ("x.safetensors", save(unet()))):
        (tmp_path / name).write_bytes(content)
        open_teacher(run_with(tmp_path / name, PIXEL, params=GIVEN))
    (tmp_path / "half_precision.pt").write_bytes(zipped({k: v.half() for k, v in unet().items()}))
    network = open_teacher(run_with(tmp_path / "half_precision.pt", PIXEL, params=GIVEN)).network
    assert torch.equal(network.out[2].weight, unet()["out.2.weight"].half().float())


def test_a_legacy_file_with_the_end_of_a_zip_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "both.pt"
    end = b"PK\x05\x06" + bytes(18)
    path.write_bytes(legacy(unet()) + end)
    open_teacher(run_with(path, PIXEL, params=GIVEN))
    path.write_bytes(legacy({**unet(), "x": Hostile(marker)}) + end)
    with pytest.raises(UserError, match=r"posix\.system"):
        open_teacher(run_with(path, PIXEL, params=GIVEN))
    assert not marker.exists()
