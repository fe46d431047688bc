"""Feature extractors: which tensor is taken where, how images are resized, and which weights are accepted."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity import FeatureExtractorInceptionV3

from ldm_dkdm import UserError
from ldm_dkdm.checkpoints.card import sha256
from ldm_dkdm.evaluation.dinov2 import VisionTransformer
from ldm_dkdm.evaluation.efficientnet import packaged_weights
from ldm_dkdm.evaluation.features import FEATURES, named_features, open_extractor
from ldm_dkdm.evaluation.weights import cache_folder
from tests.feature_sets import Toy, add_toy

IMAGES = torch.randint(0, 256, (2, 20, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


class Unloaded(FeatureExtractorInceptionV3):
    """The network of torch-fidelity with the weights that PyTorch gives it."""

    def load_state_dict(self, *arguments: object, **options: object) -> None:
        """Keep the weights."""


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """Inception-v3 in the layout of the FID weights, with random ones."""
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    made = Unloaded("random", ["2048", "logits"], feature_extractor_weights_path=empty)
    for name, buffer in made.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
    return made


@pytest.fixture(scope="module")
def weights(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


def inputs_of(module: nn.Module, call: Callable[[], object]) -> Tensor:
    """What a module of a network is given during a call."""
    kept: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].clone()))
    call()
    handle.remove()
    return kept[0]


# Inception


def test_inceptions_tensors_are_those_of_guided_diffusion(network: nn.Module, weights: Path) -> None:
    found = open_extractor(weights)(IMAGES)
    block = inputs_of(network.Mixed_6d, lambda: network(IMAGES.movedim(-1, 1)))
    conv, norm = network.Mixed_6d.branch1x1.conv, network.Mixed_6d.branch1x1.bn
    maps = F.conv2d(block, conv.weight)
    scale = norm.weight / (norm.running_var + 0.001).sqrt()
    maps = F.relu((maps - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None])
    spatial = maps[:, :7].numpy().transpose(0, 2, 3, 1).reshape(2, 7 * 17 * 17)  # TensorFlow's (H,W,C)
    np.testing.assert_allclose(found.spatial, spatial, atol=1e-5)
    pooled = inputs_of(network.AvgPool, lambda: network(IMAGES.movedim(-1, 1))).mean((2, 3))
    np.testing.assert_allclose(found.pooled, pooled, atol=1e-5)
    np.testing.assert_allclose(found.logits, pooled @ network.fc.weight.T, atol=1e-5)
    assert network.fc.bias.abs().max() > 1e-3  # the logits would differ with it


def test_inceptions_input_is_resized_as_by_tensorflow_1(weights: Path) -> None:
    def resized(x: np.ndarray) -> np.ndarray:  # source position of pixel i is i * in / out, without half pixels
        for axis in (0, 1):
            place = np.arange(299) * (x.shape[axis] / 299)
            low = place.astype(int)
            high, part = np.minimum(low + 1, x.shape[axis] - 1), place - low
            part = part.reshape([-1, 1, 1] if axis == 0 else [1, -1, 1])
            x = np.take(x, low, axis) * (1 - part) + np.take(x, high, axis) * part
        return x

    extractor = open_extractor(weights)
    found = inputs_of(extractor.forward.network.Conv2d_1a_3x3, lambda: extractor(IMAGES[:1]))
    wanted = (resized(IMAGES[0].double().numpy()) - 128) / 128
    np.testing.assert_allclose(found[0].movedim(0, -1), wanted, atol=1e-5)


def test_other_weights_have_other_names(weights: Path) -> None:
    extractor = open_extractor(weights)
    assert extractor.titled("KID") == f"KID-inception-{sha256(weights)[:8]}"
    assert extractor.facts() == {
        "features": "inception",
        "weights_sha256": sha256(weights),
        "resize": "bilinear to 299 as TensorFlow 1",
    }


def test_damaged_weights_are_refused_and_no_code_in_them_runs(network: nn.Module, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    state = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("Mixed_7c")}
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(UserError, match=r"short.pth: does not hold the tensors of the FID's Inception-v3"):
        open_extractor(tmp_path / "short.pth")
    torch.save({**state, "evil": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil.pth"):
        open_extractor(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


# EfficientNet and DINOv2


def test_efficientnets_features_lead_to_its_own_logits() -> None:
    extractor = open_extractor("efficientnet-lite0")
    network = extractor.forward.network
    entered = inputs_of(network._conv_stem, lambda: extractor(IMAGES))
    resized = F.interpolate(IMAGES.movedim(-1, 1).float(), (224, 224), mode="bicubic", antialias=True)
    torch.testing.assert_close(entered, (resized - 127) / 128)
    with torch.no_grad():
        logits = network._fc(extractor(IMAGES).pooled)
        torch.testing.assert_close(logits, network(entered), atol=1e-4, rtol=1e-4)
    assert extractor.titled("FD") == "FD-efficientnet"


def test_grey_images_are_repeated_and_others_refused() -> None:
    extractor, grey = open_extractor("efficientnet-lite0"), IMAGES[..., :1]
    torch.testing.assert_close(extractor(grey).pooled, extractor(grey.repeat(1, 1, 1, 3)).pooled)
    with pytest.raises(UserError, match="efficientnet-lite0 takes grey or RGB images, these have 4 channels"):
        extractor(torch.zeros(1, 8, 8, 4, dtype=torch.uint8))


def test_dinov2_equals_an_independent_transformer(tmp_path: Path) -> None:
    width, depth = 128, 2
    torch.manual_seed(0)
    made = VisionTransformer(width, depth, 1 + 16 * 16)
    for parameter in made.parameters():
        nn.init.normal_(parameter, 0, 0.1)
    state = made.state_dict()
    torch.save(state, tmp_path / "dino.pth")
    extractor = open_extractor(tmp_path / "dino.pth")
    assert extractor.name == "dinov2" and extractor.suffix.startswith("dinov2-")
    resized = F.interpolate(IMAGES.movedim(-1, 1).float(), (224, 224), mode="bicubic", antialias=True)
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])  # ImageNet's, of 255
    x = (resized - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    patches = F.unfold(x, 14, stride=14).transpose(1, 2)
    kernel = state["patch_embed.proj.weight"].flatten(1)
    x = torch.cat([state["cls_token"].repeat(2, 1, 1), patches @ kernel.T + state["patch_embed.proj.bias"]], 1)
    x = x + state["pos_embed"]
    for name in (f"blocks.{i}." for i in range(depth)):
        own = {key.removeprefix(name): value for key, value in state.items() if key.startswith(name)}
        normed = F.layer_norm(x, (width,), own["norm1.weight"], own["norm1.bias"], 1e-6)
        attention = nn.MultiheadAttention(width, width // 64, batch_first=True)
        attention.load_state_dict(
            {
                "in_proj_weight": own["attn.qkv.weight"],
                "in_proj_bias": own["attn.qkv.bias"],
                "out_proj.weight": own["attn.proj.weight"],
                "out_proj.bias": own["attn.proj.bias"],
            }
        )
        x = x + own["ls1.gamma"] * attention(normed, normed, normed)[0]
        normed = F.layer_norm(x, (width,), own["norm2.weight"], own["norm2.bias"], 1e-6)
        hidden = F.gelu(F.linear(normed, own["mlp.fc1.weight"], own["mlp.fc1.bias"]))
        x = x + own["ls2.gamma"] * F.linear(hidden, own["mlp.fc2.weight"], own["mlp.fc2.bias"])
    wanted = F.layer_norm(x[:, 0], (width,), state["norm.weight"], state["norm.bias"], 1e-6)
    torch.testing.assert_close(extractor(IMAGES).pooled, wanted.detach(), atol=1e-4, rtol=1e-4)


def test_dinov2s_positions_are_resized_from_the_37x37_of_its_file() -> None:
    network = VisionTransformer(64, 1, 1 + 37 * 37)
    nn.init.normal_(network.pos_embed)
    place = (np.arange(16) + 0.5) * (37 / 16.1) - 0.5  # the released code's offset of 0.1
    distance = np.abs(place[:, None] - np.arange(-2, 39))
    near = 1.25 * distance**3 - 2.25 * distance**2 + 1  # cubic convolution (Keys 1981), a = -0.75
    far = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0))
    stored = network.pos_embed[0, 1:, 0].detach().double().numpy().reshape(37, 37)
    wanted = weights @ np.pad(stored, 2, "edge") @ weights.T
    found = network._positions(16)[0, 1:, 0].detach().view(16, 16)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


# Finding weights


def test_missing_weights_are_named_with_hash_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("a download"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("inception", "dinov2"):
        with pytest.raises(UserError) as refused:
            open_extractor(name)
        file, message = FEATURES[name].weights, str(refused.value)
        place = str(tmp_path / "hub" / "checkpoints" / file.name)
        assert all(part in message for part in (file.name, file.sha256, place)) and "\n" not in message
    assert not list(tmp_path.rglob("*.pth"))


def test_another_file_under_the_pinned_name_is_refused(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = cache_folder() / FEATURES["inception"].weights.name
    place.parent.mkdir(parents=True)
    place.write_bytes(weights.read_bytes())
    with pytest.raises(UserError, match="is damaged or another file: its SHA-256 is"):
        open_extractor("inception")


def test_files_and_names_of_no_extractor_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not hold weights of inception, efficientnet-lite0, dinov2"):
        open_extractor(tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"features: 'incepton' is not one of .*; did you mean 'inception'"):
        open_extractor("incepton")
    assert named_features(packaged_weights()) == ("efficientnet-lite0", packaged_weights())


def test_an_extractor_of_ones_own_is_an_entry_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    add_toy(monkeypatch)
    extractor = open_extractor("toy")
    torch.testing.assert_close(extractor(IMAGES).pooled, Toy()(IMAGES.movedim(-1, 1)).pooled)
