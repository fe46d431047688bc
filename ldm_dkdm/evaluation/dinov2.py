"""DINOv2's ViT-L/14 (Oquab et al. 2023), the features of FD-DINOv2 (Stein et al. 2023), with its file's names."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_dkdm.checkpoints import read_tensors
from ldm_dkdm.checkpoints.loading import load_strictly
from ldm_dkdm.errors import blaming
from ldm_dkdm.evaluation.extractor import Features

SIDE, PATCH, HEAD = 224, 14, 64  # input, patch, channels of a head
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


class _Scale(nn.Module):
    """LayerScale (Touvron et al. 2021)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Block(nn.Module):
    """Attention and MLP, each after a norm and scaled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.ls1, self.ls2 = _Scale(width), _Scale(width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
        x = x + self.ls1(self.attn["proj"](attended))
        return x + self.ls2(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))


class VisionTransformer(nn.Module):
    """Normalised images (B,3,224,224) -> class token (B,width) after the last norm.

    Args:
        width, depth: channels and blocks.
        positions: of the stored embedding, the class token's included.
    """

    def __init__(self, width: int, depth: int, positions: int) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, PATCH)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # used in training only, but stored
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, width))
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], 1) + self._positions(x.shape[-1] // PATCH)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]

    def _positions(self, side: int) -> Tensor:
        """The embedding (1,1+side*side,width), interpolated with the released code's offset of 0.1."""
        stored = round((self.pos_embed.shape[1] - 1) ** 0.5)
        if stored == side:
            return self.pos_embed
        patches = self.pos_embed[:, 1:].unflatten(1, (stored, stored)).permute(0, 3, 1, 2)
        factor = (side + 0.1) / stored
        resized = F.interpolate(patches, scale_factor=(factor, factor), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], resized.flatten(2).transpose(1, 2)], 1)


class DinoV2:
    """Images -> class token (1024): bicubic with antialiasing to 224, ImageNet's mean and deviation.

    Raises:
        UserError: a file whose tensors are not this network's.
    """

    def __init__(self, path: Path) -> None:
        tensors = read_tensors(path)
        with blaming(path, "does not hold the tensors of DINOv2"):
            _, positions, width = tensors["pos_embed"].shape
            depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
        self.network: nn.Module = VisionTransformer(width, depth, positions)
        load_strictly(self.network, tensors, path)
        self.network.eval().requires_grad_(False)

    def __call__(self, images: Tensor) -> Features:
        """Images uint8 (B,3,H,W) -> features."""
        x = F.interpolate(images.float(), (SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True)
        mean, std = (torch.tensor(values, dtype=torch.float32, device=x.device).view(3, 1, 1) for values in (MEAN, STD))
        return Features(self.network((x / 255 - mean) / std))
