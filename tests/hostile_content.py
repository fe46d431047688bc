"""Files whose content is made to hurt: name -> a function that writes one and gives the command line, and words."""

import json
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.fuzzing import in_legacy, in_zip, saved
from tests.parts import UNET_PARAMS, distill_config, first_stage_folder, model_folder

ESCAPE = "\x1b]0;title\x07\x1b[31mred"
HINTS = ["image_size=8", "num_head_channels=32", "schedule=cosine", "num_timesteps=20", "space=pixel"]
SAMPLE = ["-n", "1", "-c", "2", "-l", "out"]


@dataclass
class Place:
    """A folder with a first stage and a model, where hostile files are written."""

    path: Path

    def __post_init__(self) -> None:
        self.stage = first_stage_folder(self.path / "stage")
        self.model = model_folder(self.path / "model", self.stage)
        self.marker = self.path / "marker"
        self.count = 0

    def new(self, name: str, content: bytes | str) -> str:
        """A file in a folder of its own."""
        self.count += 1
        file = self.path / str(self.count) / name
        file.parent.mkdir(parents=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(file)

    def copy(self, folder: Path, card: object) -> str:
        """A model or first-stage folder with another card: a text, or changes of dotted keys."""
        text = card if isinstance(card, str) else (folder / "config.yaml").read_text()
        if isinstance(card, dict):
            text = yaml.safe_dump(changed(yaml.safe_load(text), card))
        copy = Path(self.new("config.yaml", text)).parent
        (copy / "model.safetensors").symlink_to(folder / "model.safetensors")
        return str(copy)

    def base(self, **sections: dict[str, object]) -> str:
        """The config of a distillation."""
        return self.new("base.yaml", yaml.safe_dump(distill_config(self.model, self.path / "logs", **sections)))

    def training(self, data: str) -> list[str]:
        """A training on images."""
        network = {"target": "ldm_dkdm.networks.UNet", "params": {**UNET_PARAMS, "image_size": 32}}
        config = {
            "model": network,
            "diffusion": {"num_timesteps": 20, "space": "pixel", "schedule": "cosine"},
            "data": {"path": data, "image_size": 32, "batch_size": 2},
            "trainer": {"max_steps": 1, "learning_rate": 1e-3, "accelerator": "cpu", "precision": "32"},
            "logging": {"dir": str(self.path / "logs"), "name": str(self.count)},
        }
        return ["train", "--base", self.new("train.yaml", yaml.safe_dump(config))]


Case = tuple[Callable[[Place], list[str]], str]
CASES: dict[str, Case] = {}


def changed(tree: dict[str, Any], edits: dict[str, object]) -> dict[str, Any]:
    for key, value in edits.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[name] = value
    return tree


def base(text: str) -> Callable[[Place], list[str]]:
    return lambda place: ["distill", "--base", place.new("x.yaml", text)]


def card(edits: object) -> Callable[[Place], list[str]]:
    return lambda place: ["sample", "-r", place.copy(place.model, edits), *SAMPLE]


def stage(edits: object) -> Callable[[Place], list[str]]:
    return lambda place: ["inspect", place.copy(place.stage, edits)]


def override(*items: str) -> Callable[[Place], list[str]]:
    return lambda place: ["distill", "--base", place.base(), *items]


def inspect(name: str, content: Callable[[], bytes]) -> Callable[[Place], list[str]]:
    return lambda place: ["inspect", place.new(name, content())]


DEEP = "a: " + "[" * 100_000
DOUBLING = "".join(f"a{i}: {f'${{a{i - 1}}}' * 2}\n" for i in range(1, 60)) + "a0: x\n"
CASES |= {
    "deep YAML": (base(DEEP), "nests more than 40"),
    "deep card": (card(DEEP), "nests more than 40"),
    "deep run": (lambda p: ["distill", "--resume", str(Path(p.new("config.yaml", DEEP)).parent)], "nests more than 40"),
    "deep override": (override(f"trainer.max_steps={'[' * 100_000}"), "nests more than 40"),
    "long YAML": (base("a: " + "x" * 30_000_000), "longer than 4 MB"),
    "many keys": (base("".join(f"k{i}: 1\n" for i in range(60_000))), "more than 10000 keys"),
    "aliases": (base("a0: &a0 x\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))), "10000"),
    "alias of itself": (base("a: &a [*a]"), "alias of what holds it"),
    "references": (base(DOUBLING), "expand to more than"),
    "resolver": (base("teacher: {ckpt: '${oc.create:${oc.env:HOME}}'}"), "reference in a reference"),
    "long number": (base(f"trainer: {{max_steps: {'1' * 5000}}}"), "too long for a number"),
    "tag": (base("trainer: {max_steps: !!int x}"), "a value has no type of its own"),
    "timestamp": (card("weights: !!timestamp x"), "a value has no type of its own"),
    "escape": (base(json.dumps({ESCAPE: 1})), "unknown key"),
    "missing value": (override("trainer.max_steps=???"), "trainer.max_steps: ??? stands for a missing value"),
    "sexagesimal": (override("trainer.max_steps=10:30"), "10:30 is not plainly a number, YAML reads 630"),
    "underscore": (override("trainer.max_steps=1_000_"), "1_000_ is not plainly a number"),
    "octal": (base("trainer: {max_steps: 010}"), "010 is not plainly a number, YAML reads 8"),
    "no minutes": (override("trainer.max_minutes=1e-9"), "no run takes its first step in less"),
    "learning rate": (override("trainer.learning_rate=1e38"), "at most 100, got 1e+38; Adam moves every weight"),
    "unknown reference": (lambda p: ["sample", "-r", str(p.model), *SAMPLE, "a=${b}"], "a: ${b} names a key that no"),
    "many timesteps": (card({"diffusion.num_timesteps": 10**9}), "num_timesteps: must be at most 100000"),
    "no noise": (card({"diffusion.beta_start": 1e-300, "diffusion.beta_end": 1e-300}), "alphas_cumprod goes from"),
    "large side": (card({"network.params.image_size": 131072}), "image_size: 131072 is not between"),
    "dropout": (card({"network.params.dropout": float("nan")}), "dropout: must be a finite number"),
    "mult": (card({"network.params.channel_mult": [float("inf"), 2]}), "cannot be built"),
    "scale": (card({"first_stage.scale_factor": 1e-320}), "scale_factor: must be at least"),
    "class": (card({"first_stage.target": "os.system"}), "'os.system' is not one of"),
    "class hint": (lambda p: ["sample", "-r", str(p.model), *SAMPLE, "first_stage.target=os.system"], "'os.system'"),
    "unread key": (stage({"params.ddconfig.bogus": 1}), "ddconfig.bogus: unknown key"),
    "no channels": (stage({"params.ddconfig.ch": 0}), "ddconfig.ch: expected a whole number from 1"),
    "no levels": (stage({"params.ddconfig.ch_mult": []}), "ddconfig.ch_mult: expected one entry per level"),
    "levels": (stage({"params.ddconfig.ch_mult": [1] * 7}), "7 levels cannot halve resolution 32"),
    "stage dropout": (stage({"params.ddconfig.dropout": float("nan")}), "ddconfig.dropout: expected a number from 0"),
    "many blocks": (stage({"params.ddconfig.num_res_blocks": 10**9}), "num_res_blocks: expected a whole number"),
    "meta device": (lambda p: ["sample", "-r", str(p.model), *SAMPLE, "--device", "meta"], "--device: 'meta'"),
    "batch": (lambda p: ["sample", "-r", str(p.model), *SAMPLE, "--batch_size", "9" * 12], "--batch_size: must be"),
}


def shared_key() -> bytes:
    """A dictionary whose key is 60 nested pairs that share their halves: hashing it takes 2^60 steps."""
    pairs = b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(60))  # the pair on the stack, and the same from the memo
    return b"\x80\x02})q\x00" + pairs + b"K\x01s."


def shared_dictionaries() -> bytes:
    """Dictionaries that hold another 40 times, 8 deep: a search for tensors would visit 40^8."""
    names = [b"X\x02\x00\x00\x00%02d" % i for i in range(40)]
    levels = b"".join(b"}q%c(" % (i + 1) + b"".join(name + b"h%c" % i for name in names) + b"u" for i in range(8))
    return b"\x80\x02}q\x00" + levels + b"."


def two_pickles() -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("b/data.pkl", shared_key())
    return buffer.getvalue()


class Shadowed:
    """A tensor that a pickle gives an attribute of its own."""

    def __init__(self, tensor: torch.Tensor, state: dict[str, object]) -> None:
        self.tensor, self.state = tensor, state

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments = self.tensor.__reduce_ex__(2)[:2]
        return torch._tensor._rebuild_from_type_v2, (rebuild, torch.Tensor, arguments, self.state)


def header(entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
NAMES = b"\x80\x02(" + b"".join(b"ca.b%d\nX\n" % i for i in range(20_000)) + b"l."
METADATA = {"target": "x", "parameterization": "eps", "params": "[" * 99_999}
MARKS = b"\x80\x02" + b"(" * 30_000_000
CASES |= {
    "shared key": (inspect("x.pkl", shared_key), "share their content"),
    "shared key in a zip": (inspect("x.pt", lambda: in_zip(shared_key())), "share their content"),
    "shared key, legacy": (inspect("x.pt", lambda: in_legacy(shared_key())), "share their content"),
    "shared dictionaries": (inspect("x.pt", lambda: in_zip(shared_dictionaries())), "share their content"),
    "shared key in a pool": (
        lambda p: ["distill", "--base", p.base(distill={"pool_from": p.new("x.pkl", shared_key())})],
        "share their content",
    ),
    "dictionary in itself": (inspect("x.pkl", lambda: b"\x80\x02}q\x00K\x01h\x00s."), "holds itself"),
    "marks": (inspect("x.pkl", lambda: MARKS), "more than 1000000 objects"),
    "marks in a zip": (inspect("x.pt", lambda: in_zip(MARKS)), "more than 1000000 objects"),
    "classes": (inspect("x.pkl", lambda: NAMES), "10000 classes"),
    "classes in a zip": (inspect("x.pt", lambda: in_zip(NAMES)), "10000 classes"),
    "two pickles": (inspect("x.pt", two_pickles), "2 pickles called data.pkl"),
    "shadowed": (inspect("x.pt", lambda: saved({"a": Shadowed(torch.zeros(2), {"numel": 3})})), "no known diffusion"),
    "header": (inspect("x.safetensors", lambda: header({f"t{i}": EMPTY for i in range(200_000)})), "header of"),
    "escape in a name": (inspect("x.safetensors", lambda: header({ESCAPE: EMPTY})), "no known diffusion"),
    "long name": (inspect("x.safetensors", lambda: header({"x" * 9_000_000: EMPTY})), "characters) ..."),
    "deep metadata": (
        inspect(
            "x.safetensors",
            lambda: header({"__metadata__": {"target": "x", "parameterization": "eps", "params": "[" * 99999}}),
        ),
        "not a readable safetensors",
    ),
}
