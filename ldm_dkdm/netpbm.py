"""Refuse .ppm and .pgm files whose comments Pillow would read for minutes."""

import re
from pathlib import Path

HEADER = 1 << 16  # most bytes of a header; Pillow reads them one by one
COMMENTS = 10_000  # most comments in a plain file; Pillow copies a block of numbers for each
PLAIN = (b"P1", b"P2", b"P3")  # files whose pixels are numbers in ASCII
BLOCK = 1 << 20


def require_few_comments(path: Path) -> None:
    """Let an image pass unless it is a PPM or PGM of very long or very many comments.

    Raises:
        ValueError: its size does not stand in its first 64 KiB, or a plain file has more than 10,000 comments.
    """
    with path.open("rb") as file:
        head = file.read(HEADER)
        if head[:1] != b"P":
            return
        numbers = re.sub(rb"#[^\r\n]*", b"", head).split(maxsplit=3)
        if len(head) == HEADER and len(numbers) < 4:  # the kind, width, height, and what follows
            raise ValueError(f"a header of more than {HEADER} bytes")
        if head[:2] in PLAIN:
            file.seek(0)
            if sum(block.count(b"#") for block in iter(lambda: file.read(BLOCK), b"")) > COMMENTS:
                raise ValueError(f"more than {COMMENTS} comments")
