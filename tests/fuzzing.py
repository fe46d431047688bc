"""Properties of the readers of files: any content is read or refused by a `UserError`, within limits.

`python -m tests.fuzzing FOLDER [EXAMPLES]` runs them, each in a process of its own, and prints the outcomes.
"""

import io
import json
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from ldm_dkdm.checkpoints.pickles import TORCH_MAGIC, asked_globals
from ldm_dkdm.checkpoints.pools import read_own_pool, read_reference_pool
from ldm_dkdm.checkpoints.reading import read_tensors
from ldm_dkdm.checkpoints.source import read_json
from ldm_dkdm.commands.decode import read_latents
from ldm_dkdm.config.load import load_config, read_overrides
from ldm_dkdm.config.schema import ModelCard
from ldm_dkdm.distillation.walk import read_walk
from ldm_dkdm.errors import UserError
from ldm_dkdm.images import FORMATS, read_image
from ldm_dkdm.npz import read_npz
from ldm_dkdm.training.warmup_shares import warmups_of
from tests.limited import Outcome, limited

EXAMPLES = 60
Property = Callable[[Path], Callable[[], None]]
READERS: dict[str, tuple[st.SearchStrategy[bytes], str, Callable[[Path], object]]] = {}

YAML = ["[", "]", "{", "}", "a: ", "b", "- ", "\n", " ", ",", "&a ", "*a", "<<: *a", "!!int ", "!!set ", "!x ", "10:30"]
YAML += ["1_0_", "0x1f", "1e999", ".nan", "'", '"', "\\e", "|\n", "? ", "${a}", "${oc.env:HOME}", "${", "}", "---\n"]
YAML += [
    "%TAG",
    "\x00",
    "é",
    "\ud7ff",
    "9" * 50,
    "trainer: {max_steps: ",
    "network:\n  params:\n",
    "weights: x\n",
    "~",
    "#",
]
JSON = [
    "[",
    "]",
    "{",
    "}",
    '"a": ',
    "1",
    "1e999",
    "NaN",
    "null",
    '"',
    "\\u0000",
    "\\ud800",
    ",",
    " ",
    "9" * 5000,
    "true",
]
CLASSES = [b"collections OrderedDict", b"torch._utils _rebuild_tensor_v2", b"torch FloatStorage", b"builtins eval"]
CLASSES += [b"numpy dtype", b"numpy ndarray", b"numpy.core.multiarray _reconstruct", b"own.code Thing", b"torch Tensor"]
OPCODES = [bytes([code]) for code in b"(.0123NI}])laetuosbRQ\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x93\x94"]
OPCODES += [b"q" + bytes([i]) for i in range(3)] + [b"h" + bytes([i]) for i in range(3)]
OPCODES += [b"K\x07", b"M\xff\xff", b"X\x01\x00\x00\x00a", b"X\xff\xff\xff\x7fa", b"\x8c\x01b", b"C\x02ab", b"U\x01c"]
OPCODES += [b"c" + name.replace(b" ", b"\n") + b"\n" for name in CLASSES]
OPCODES += [b"j\xff\xff\xff\x7f", b"r\xff\xff\xff\x7f", b"\x8a\x09" + b"\xff" * 9, b"h\x00h\x00\x86q\x00" * 50]


def soup(tokens: list[str]) -> st.SearchStrategy[bytes]:
    """Texts of tokens in any order, some of them many times."""
    times = st.sampled_from([1, 1, 1, 3, 5000])
    token = st.builds(lambda text, count: text * min(count, 100_000 // len(text)), st.sampled_from(tokens), times)
    return st.lists(token, max_size=12).map(lambda parts: "".join(parts).encode("utf-8", "replace"))


def mutated(files: list[bytes]) -> st.SearchStrategy[bytes]:
    """Real files with some bytes changed, cut or repeated."""
    places = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6)

    def change(file: bytes, changes: list[tuple[int, int]], end: int, times: int) -> bytes:
        content = bytearray(file)
        for place, value in changes:
            content[place % len(content)] = value
        return bytes(content[: len(content) - end]) * times

    return st.builds(
        change, st.sampled_from(files), places, st.sampled_from([0, 0, 0, 1, 40]), st.sampled_from([1, 1, 3])
    )


def programs() -> st.SearchStrategy[bytes]:
    """Pickles of opcodes in any order, some of them many times."""
    part = st.tuples(st.sampled_from(OPCODES), st.sampled_from([1, 1, 1, 1, 2, 3000])).map(
        lambda pair: pair[0] * pair[1]
    )
    return st.lists(part, max_size=14).map(lambda parts: b"\x80\x02})q\x00" + b"".join(parts) + b".")


def in_zip(program: bytes, name: str = "archive/data.pkl", method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr(name, program)
        archive.writestr("archive/version", b"3\n")
    return buffer.getvalue()


def in_legacy(program: bytes) -> bytes:
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    return TORCH_MAGIC + pickle.dumps(1001, 2) + pickle.dumps(system, 2) + program + pickle.dumps([], 2)


def saved(content: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def headers() -> st.SearchStrategy[bytes]:
    """safetensors files of entries that make no sense."""
    number = st.sampled_from([0, 1, 4, 2**31, 2**62, -1, "x", None, 1.5])
    kind = st.sampled_from(["F32", "F64", "F8_E4M3", "BOOL", "I64", "X", 3])
    entry = st.fixed_dictionaries(
        {"dtype": kind, "shape": st.lists(number, max_size=3), "data_offsets": st.lists(number, max_size=3)}
    )
    names = st.sampled_from(["x", "t", "label", "\x1b[31m", "a" * 3000, ""])
    pool = {"step": 1, "filled": 1, "origin": "", "num_timesteps": 20}
    meta = st.sampled_from([{}, {"pool": "[" * 5000}, {"pool": "[1]"}, {"pool": json.dumps(pool)}, {"pool": 3}, None])
    tree = st.tuples(st.dictionaries(names, entry, max_size=3), meta).map(
        lambda both: both[0] | {"__metadata__": both[1]}
    )
    text = st.one_of(tree.map(lambda found: json.dumps(found).encode()), soup(JSON).map(lambda found: b"{" + found))
    return text.map(lambda header: struct.pack("<Q", len(header)) + header + bytes(16))


def archives() -> st.SearchStrategy[bytes]:
    """npz files whose headers lie."""
    shape = st.lists(st.sampled_from([0, 1, 2, 8, -1, 10**6, 2**40, 2**64]), max_size=5).map(tuple)
    kind = st.sampled_from(
        ["|u1", ">f4", "<f8", "<f16", "<c8", "|O", "<M8[s]", "<U3", "|S2", "|b1", "|V9999999", "x", 3]
    )

    def pack(descr: object, shape: object, fortran: object, body: int, method: int, extra: str, flag: int) -> bytes:
        head = f"{{'descr': {descr!r}, 'fortran_order': {fortran!r}, 'shape': {shape!r}, {extra}}}".encode()
        head += b" " * (63 - (len(head) + 10) % 64) + b"\n"
        content = bytearray(
            in_zip(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + bytes(body), "arr_0.npy", method)
        )
        content[6] = content[content.find(b"PK\x01\x02") + 8] = flag
        return bytes(content)

    fortran, extra = st.sampled_from([False, True, 1, "x"]), st.sampled_from(["", "'x': 1", "(" * 500])
    body, flag = st.sampled_from([0, 1, 64, 768, 10**6]), st.sampled_from([0, 0, 0, 1])
    return st.builds(pack, kind, shape, fortran, body, st.sampled_from([0, 8, 12, 14]), extra, flag)


def image_contents() -> list[bytes]:
    found = []
    for kind in FORMATS:
        for mode in ("RGB", "L", "I;16"):
            buffer = io.BytesIO()
            if mode != "I;16" or kind in ("PNG", "TIFF"):
                Image.new(mode, (9, 7)).save(buffer, kind)
                found.append(buffer.getvalue())
    return found


def latents() -> list[bytes]:
    found = []
    for kind in ("f4", ">f4", "f8", "f2", "i4", "?", "c8", "U2", "M8[s]", "g"):
        for value in (0, 1):
            buffer = io.BytesIO()
            np.savez(buffer, arr_0=np.full((1, 3, 4, 4), value).astype(kind))
            found.append(buffer.getvalue())
    return found


WEIGHTS = {"a": torch.zeros(2, 2), "b": torch.ones(3)}
CACHE = pickle.dumps({"total_t": np.zeros(2, np.int64), "total_x_t_1": np.zeros((2, 3, 4, 4), np.float32)}, 2)
FILES = [saved(WEIGHTS), saved(WEIGHTS, _use_new_zipfile_serialization=False), save(WEIGHTS), CACHE]
SHAPE, FACTS = (3, 4, 4), {"num_timesteps": 20}
READERS |= {
    "config": (soup(YAML), "x.yaml", load_config),
    "card": (soup(YAML), "config.yaml", lambda path: load_config(path, schema=ModelCard)),
    "override": (
        soup(YAML),
        "x",
        lambda path: read_overrides([f"trainer.max_steps={path.read_text(errors='replace')}"]),
    ),
    "json": (soup(JSON), "x.json", read_json),
    "torch zip": (programs().map(in_zip), "x.pt", read_tensors),
    "torch legacy": (programs().map(in_legacy), "x.pt", read_tensors),
    "plain pickle": (programs(), "x.pkl", read_tensors),
    "pool cache": (programs(), "x.pkl", lambda path: read_reference_pool(path, SHAPE, 20)),
    "own checkpoint": (programs().map(in_zip), "step=1.ckpt", asked_globals),
    "damaged weights": (mutated(FILES), "x.pt", read_tensors),
    "safetensors": (headers(), "x.safetensors", read_tensors),
    "pool": (
        headers(),
        "warmup.pool-rank0.safetensors",
        lambda path: read_own_pool(path, SHAPE, {"num_timesteps": 20}),
    ),
    "warm-up": (headers(), "warmup.pool-rank1.safetensors", lambda path: warmups_of(path.parent, 4, 2)),
    "walk": (headers(), "warmup.walk-rank0.safetensors", lambda path: read_walk(path, "", "cpu")),
    "npz": (archives(), "x.npz", read_npz),
    "image": (mutated(image_contents()), "x.png", lambda path: read_image(path, 8)),
    "latents": (st.one_of(mutated(latents()), archives()), "x.npz", read_latents),
}


def holds(reader: str, folder: Path, examples: int) -> None:
    """Check one reader's property on generated files.

    Raises:
        Exception: the reader's own, where it is not a `UserError`.
    """
    files, name, read = READERS[reader]

    @settings(
        deadline=None,
        derandomize=examples == EXAMPLES,
        max_examples=examples,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(content=files)
    def readable_or_refused(content: bytes) -> None:
        path = folder / name
        path.write_bytes(content)
        try:
            read(path)
        except UserError as error:
            message = str(error)
            assert message.isprintable() or "\n" in message, message
            assert len(message) < 3000

    readable_or_refused()


def readers(folder: Path, examples: int = EXAMPLES) -> list[Outcome]:
    """How the checks of all readers end, each in a process of its own, forked from one where Hypothesis is set up."""
    given(st.binary())(settings(database=None, max_examples=1)(lambda content: None))()
    return [limited(lambda reader=reader: holds(reader, folder, examples), folder / "printed") for reader in READERS]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for reader, outcome in zip(READERS, readers(Path(sys.argv[1]), int([*sys.argv, EXAMPLES][2])), strict=True):
        print(reader, outcome)
