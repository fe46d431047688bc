"""Decisions of several hosts, beside their devices."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from ldm_dkdm.training import hosts


class Trainer(SimpleNamespace):
    """Lightning's, as far as it is asked."""

    __hash__ = object.__hash__


def test_hosts_of_gpus_have_connections_of_their_own_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = [], []

    def new_group(**options: object) -> str:
        made.append(options)
        return "hosts"

    def all_reduce(numbers: torch.Tensor, group: object) -> None:
        asked.append((numbers.device.type, group))
        numbers += torch.tensor([3.0, 0.0], dtype=numbers.dtype)[: len(numbers)]  # what the other rank has

    for name, replacement in (("get_backend", lambda: "nccl"), ("new_group", new_group), ("all_reduce", all_reduce)):
        monkeypatch.setattr(hosts.distributed, name, replacement)
    trainer = Trainer(world_size=2)
    hosts.wait_for_hosts(trainer, timedelta(minutes=7))
    assert hosts.mean_of_hosts(trainer, [1.0, 2.0]) == [2.0, 1.0]
    assert hosts.any_host(trainer, False)
    assert made == [{"timeout": timedelta(minutes=7), "backend": "gloo"}]
    assert asked == [("cpu", "hosts")] * 2
    monkeypatch.setattr(hosts.distributed, "get_backend", lambda: "gloo")
    hosts.mean_of_hosts(Trainer(world_size=2), [1.0])
    assert len(made) == 1 and asked[-1] == ("cpu", None)
    assert not hosts.any_host(Trainer(world_size=1), False) and len(asked) == 3
