"""benchmarks/gpu.py: its variants, the public code's step beside them, what it leaves out, and its table."""

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_dkdm import DiffusionModel, UserError
from ldm_dkdm.config.load import load_config
from ldm_dkdm.device import resolve_precision
from tests import fake_public
from tests.conftest import Replays
from tests.fake_public import fake_clone
from tests.streams import new_teacher
from tests.test_benchmarks import ROOT, benchmark

LATE = "slow: the time is up"
SLOW = ("quickstart, bf16", "quickstart, bf16, teacher stored")  # where bf16 is simulated


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def pair_of(space: str, num_classes: int | None = None) -> Any:
    """A pair of small UNets."""
    from common import Pair

    network = new_teacher(num_classes).network
    teacher = DiffusionModel(network, schedule=new_teacher().schedule, space=space).frozen()
    student = teacher.student(teacher.node)
    return Pair(load_config("cifar10"), teacher, student, None, torch.device("cpu"))  # type: ignore[arg-type]


def test_a_device_is_measured_by_variant_beside_the_public_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("quickstart=2", "--rounds", 1, "--images", 2, "-c", 2, "--rho", 0.1)
    clone = fake_clone(tmp_path / "clone")
    printed = benchmark("gpu.py", *words, "--baseline", clone, "-o", tmp_path / "gpu.json")
    found = json.loads((tmp_path / "gpu.json").read_text())
    rows = {row["variant"]: row for row in found["rows"]}
    fast = resolve_precision("auto", "cpu") == "bf16"
    assert list(rows)[:2] == ["float32", "bf16" if fast else "as shipped"] and list(rows)[-1] == "public code"
    assert found["left_out"] == ({} if fast else dict.fromkeys(SLOW, "the device has no fast bf16"))
    for row in found["rows"]:
        peak = found["peak_flops"][row["precision"]]
        operations = row["MFU"] * peak * row["ms a step"] / 1e3
        assert operations == pytest.approx(2 * (0.79e9 + 3 * 0.590e9), rel=0.03)  # GFLOPs of docs/performance.md
        ratio = rows["public code"]["ms a step"] / row["ms a step"]
        assert row["public / this"] == pytest.approx(ratio) and f"{ratio:.3g}" in printed
    (data,) = found["tab9"]
    assert data["without data"] == pytest.approx(rows["as shipped"]["ms a step"] / 10)
    assert data["without / on data"] == pytest.approx(data["without data"] / data["on data, encoding"])
    assert [row["rho"] for row in found["memory"]] == ["on data", 0.1]
    assert found["memory"][1]["pool GB"] == pytest.approx(0.1 * 1000 * 2 * 3 * 16 * 16 * 2 / 1e9)
    assert found["sampling"][0]["student, images/s"] > 0
    assert sum(row["share"] for row in found["kernels"]) == pytest.approx(1)
    assert max(found["kernels"], key=lambda row: row["share"])["kind"] in ("convolutions", "matrix products")
    assert [row["t"] for row in found["bf16"]][::9] == ["0 to 99", "900 to 999"]
    for row in found["bf16"]:  # stored weights are those that autocast casts
        assert row["weights stored in bf16"] == row["bf16 autocast"] and 0 < row["bf16 autocast"] < 0.05
    assert "the pool is drawn\n" * 2 in printed  # in each step, not while it was made
    import pages

    monkeypatch.setattr(pages, "FIGURES", tmp_path)
    page = pages.filled("a\n<!-- figures: gpu -->\n<!-- end -->\nb")
    assert (
        "| public code" in page
        and "(Tab. 9):" in page
        and ("Without figures" in page) is not fast
        and "nothing is compiled" in page
    )
    (tmp_path / "gpu.json").unlink()
    assert "No figure of a GPU" in pages.filled(page)


def test_the_public_step_trains_on_latents_in_its_order(tmp_path: Path) -> None:
    from public_code import public_step

    pair, before = pair_of("latent"), (list(sys.path), set(sys.modules))
    step = public_step(fake_clone(tmp_path), pair, 3)
    made = fake_public.MADE[-1]
    first = [weight.clone() for weight in made.model.parameters()]
    assert all(map(torch.equal, first, made.model_ema.first))
    made.calls.clear()
    step()
    step()
    assert made.calls == ["teacher", "student", "average"] * 2
    theirs, ours = made.teacher_model.diffusion_model.state_dict(), pair.teacher.network.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert sys.path == before[0]
    left = {name.partition(".")[0] for name in set(sys.modules) - before[1]}
    assert not left & {"ldm", "guided_diffusion", "mpi4py", "blobfile"}
    with pytest.raises(ImportError):
        import mpi4py  # noqa: F401


def test_the_public_step_trains_on_pixels(tmp_path: Path) -> None:
    from public_code import public_step

    step = public_step(fake_clone(tmp_path), pair_of("pixel"), 3)
    step()
    step()
    made = fake_public.MADE[-1]
    assert made.steps == 2 and made.keys["teacher_batch_size"] == 3


def test_another_network_or_a_changed_clone_is_one_error(tmp_path: Path) -> None:
    from public_code import public_step, why_not

    clone = fake_clone(tmp_path)
    pair = pair_of("pixel")
    pair.teacher.network.register_parameter("more", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(UserError, match=r"(?s)--baseline: its network is not ours: .*more"):
        public_step(clone, pair, 3)
    (clone / "guided-diffusion/guided_diffusion/script_util.py").write_text("")
    with pytest.raises(UserError, match=r"--baseline: .*guided-diffusion cannot be used: .*create_gaussian_diffusion"):
        public_step(clone, pair_of("pixel"), 3)
    with pytest.raises(UserError, match="no class-conditional distillation"):
        public_step(fake_clone(tmp_path), pair_of("pixel", 4), 2)
    assert why_not(pair_of("pixel")) is None and "class-conditional" in str(why_not(pair_of("pixel", 4)))


def test_what_is_tried_on_a_gpu_makes_steps_of_the_same_networks(
    replays: Replays, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_steps import BOTH, FORCED, GRAPHS, LAST, Training, on_a_gpu, stream_of

    compiled: list[object] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, *, dynamic, options: compiled.append(options))
    pair = pair_of("pixel")
    training = Training(pair, stream_of(pair, 3, pair.device))
    with ExitStack() as stack:
        makers = on_a_gpu(pair, 3, lambda: training, stack)
        found = {name: make() for name, make in makers.items()}
        made = dict.fromkeys(found, (0, 0))  # replays of teacher and student
        shipped = []
        for name, variant in found.items():
            before, count, gradients = training.weights[-1].clone(), len(replays), replays.training
            variant.step()
            made[name] = len(replays) - count - (replays.training - gradients), replays.training - gradients
            if not torch.equal(before, training.weights[-1]):
                shipped.append(name)
    assert made == {LAST: (0, 0), FORCED: (0, 0), GRAPHS: (1, 0), BOTH: (1, 1)}
    assert compiled == [{"force_layout_optimization": True}] * 2  # a name of the compiler's, which it has:
    assert torch._inductor.config.force_layout_optimization is False
    assert shipped == [GRAPHS]  # it trains the shipped student
    assert set(replays) == {3}
    assert pair.teacher.network._compiled_call_impl is None


def test_a_folder_that_is_not_a_clone_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu

    monkeypatch.setattr(sys, "argv", ["gpu.py", "--baseline", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        gpu.guarded(gpu.main)
    captured = capsys.readouterr()
    assert end.value.code == 2 and captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"error: --baseline: {tmp_path} is not a clone of https://github.com/qianlong0502/DKDM")


def test_processes_compile_ahead_until_their_time_is_up(tmp_path: Path) -> None:
    from compile_ahead import compile_ahead

    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, sys, time\n"
        "here = pathlib.Path(__file__).parent\n"
        "(here / f'{sys.argv[1]} {sys.argv[-1]}.txt').write_text(' '.join(sys.argv[2:]))\n"
        "sys.argv[-1] == 'slow' and time.sleep(600)\n"
        "sys.argv[-1] == 'bad' and sys.exit('out of memory')\n"
    )
    started = time.monotonic()
    found = compile_ahead(script, ["one", "two=4"], ["good", "bad", "slow"], ["--compile", "true"], started + 8)
    assert time.monotonic() - started < 60
    assert found == [f"{recipe}, {why}" for recipe in ("one", "two=4") for why in ("bad: out of memory", LATE)]
    words = {file.stem: file.read_text() for file in tmp_path.glob("*.txt")}
    assert words["one good"] == "--parts steps --rounds 1 --ahead 0 --compile true --variants good"
    assert "two=4 bad" in words


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("triton_poi_fused__to_copy_convolution_silu_12", "compiled"),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16>", "changes"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<32, 128>>", "attention"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolutions"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTN", "matrix"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::distribution_elementwise_grid_stride_kernel", "everything else"),
    ],
)
def test_kernels_have_their_kinds(name: str, kind: str) -> None:
    from gpu_parts import KERNELS
    from step_profile import kind_of

    assert kind_of(name, KERNELS).startswith(kind)


def test_a_variant_that_fails_or_comes_too_late_is_named_and_the_others_are_timed() -> None:
    from gpu_steps import Variant
    from gpu_timing import measure

    def fails() -> None:
        raise ValueError("no kernel\nfor this card")

    made = {name: Variant(step, "32") for name, step in (("good", lambda: None), ("bad", fails), ("late", pytest.fail))}
    times = iter([False, False, True])
    found = measure(made, 1, torch.device("cpu"), lambda: next(times))
    assert list(found.seconds) == ["good"] == list(found.first)
    assert found.left_out == {"bad": "no kernel", "late": "the time is up"}


def test_a_part_that_fails_or_comes_too_late_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gpu import Report

    def fails() -> dict[str, list[dict[str, Any]]]:
        raise torch.OutOfMemoryError("too large")

    report = Report(tmp_path / "gpu.json", 10, torch.device("cpu"), compiled=False)
    report.part("one", lambda: {"rows": [{"a": 1}]})
    report.part("two", fails)
    report.end = 0.0
    report.part("three", lambda: pytest.fail("begun"))
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["rows"] == [{"a": 1}] and found["left_out"] == {"two": "too large", "three": "the time is up"}
    assert "two: left out, too large" in capsys.readouterr().out
