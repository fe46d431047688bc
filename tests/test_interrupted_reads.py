"""Ctrl-C inside a C reader is an interrupt, whatever the reader makes of it."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm_dkdm import UserError
from ldm_dkdm.checkpoints import Source, read_tensors, reading
from ldm_dkdm.commands.main import guarded
from ldm_dkdm.errors import Stopped, interruptible


@pytest.fixture(autouse=True)
def as_in_a_terminal() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where the tests run as a background job, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pressed(*args: object, **kwargs: object) -> None:
    """A C reader that turns Ctrl-C into an error of its own."""
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise RuntimeError("could not determine the shape of object") from None


def swallowed(*args: object, **kwargs: object) -> dict[str, torch.Tensor]:
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    return {"a": torch.zeros(1)}


@pytest.mark.parametrize("reader", [pressed, swallowed])
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_ctrl_c_in_a_reader_is_no_damage(
    reader: Callable[..., object], ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"x.{ending}"
    if ending == "pt":
        torch.save({"a": torch.zeros(1)}, path)
    else:
        save_file({"a": torch.zeros(1)}, path)
    monkeypatch.setattr(reading, "read_safetensors", lambda *given: (reader(*given), {}))
    monkeypatch.setattr(torch, "load", reader)
    before = signal.getsignal(signal.SIGINT)
    for read in (read_tensors, lambda path: Source(path).tensors):
        with pytest.raises(KeyboardInterrupt):
            read(path)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_command_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        guarded(pressed)
    assert end.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_errors_without_ctrl_c_and_what_is_saved_pass() -> None:
    with pytest.raises(UserError), interruptible():
        raise UserError("x: is damaged")
    with pytest.raises(Stopped), interruptible():
        raise Stopped(str(swallowed()))


def test_a_handler_that_only_takes_note_is_called_and_the_work_goes_on() -> None:
    noted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        with interruptible():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert noted == [signal.SIGINT]


def test_other_threads_leave_the_handler_alone() -> None:
    handlers: list[object] = []

    def work() -> None:
        with interruptible():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]
