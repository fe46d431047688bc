"""Building blocks of the UNet, with the parameter names that CompVis and guided-diffusion share."""

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

SMALL_CPU_ATTENTION = 256  # tokens up to which plain matmuls train faster on a CPU (benchmarks/attention.py)
Layer = TypeVar("Layer", bound=nn.Module)


def timestep_embedding(
    t: Tensor, dim: int, max_period: float = 10000, freq_shift: float = 0, cosines_first: bool = True
) -> Tensor:
    """Sinusoids (B,dim) of timesteps t (B,) (Vaswani et al. 2017; Ho et al. 2020, whose code has shift 1, sines first).

    The lowest frequency is 1 / max_period ^ ((half - 1) / (half - freq_shift)), half = dim // 2.
    """
    half = dim // 2
    freqs = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    )
    args = t[:, None].float() * freqs
    embedding = torch.cat([args.cos(), args.sin()] if cosines_first else [args.sin(), args.cos()], dim=-1)
    return F.pad(embedding, (0, dim % 2))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(c)) v for contiguous (B,heads,L,c) tensors."""
    if q.device.type == "cpu" and q.requires_grad and q.shape[-2] <= SMALL_CPU_ATTENTION:
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return weights.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


def zero_init(module: Layer) -> Layer:
    """Zero a module's parameters, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def group_norm(channels: int, groups: int = 32) -> nn.GroupNorm:
    """GroupNorm; its statistics are float32 whatever the input's type."""
    return nn.GroupNorm(groups, channels)


class Upsample(nn.Module):
    """Nearest-neighbour 2x, then a 3x3 convolution if `use_conv`."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Downsample(nn.Module):
    """2x smaller, by a strided 3x3 convolution if `use_conv`, else by averaging.

    The convolution pads all sides by `padding` 1; with 0 the right and the lower side alone (DDPM's code).
    """

    def __init__(self, channels: int, use_conv: bool, padding: int = 1) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=padding) if use_conv else nn.AvgPool2d(2)
        self.pad = (0, 1, 0, 1) if use_conv and padding == 0 else None

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x if self.pad is None else F.pad(x, self.pad))


class ResBlock(nn.Module):
    """Residual block conditioned on the timestep embedding (ADM, Sec. 3).

    Args:
        channels, out_channels: channels of x (B,channels,H,W) and of the result.
        emb_channels: width of the embedding (B,emb_channels).
        dropout: probability.
        scale_shift: condition by FiLM after the second norm instead of by addition.
        resample: `up` or `down` for BigGAN's resampling blocks.
        groups: number of groups of a norm.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        out_channels: int,
        dropout: float = 0.0,
        scale_shift: bool = False,
        resample: str | None = None,
        groups: int = 32,
    ) -> None:
        super().__init__()
        self.channels, self.out_channels, self.scale_shift = channels, out_channels, scale_shift
        conv = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.in_layers = nn.Sequential(group_norm(channels, groups), nn.SiLU(), conv)
        resamplers = {"up": Upsample, "down": Downsample}
        self.resample = resamplers[resample](channels, use_conv=False) if resample else nn.Identity()
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels * (1 + scale_shift)))
        self.out_layers = nn.Sequential(
            group_norm(out_channels, groups),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, conv = self.in_layers
        h = conv(self.resample(activation(norm(x))))
        condition = self.emb_layers(emb)[..., None, None].to(h.dtype)
        if self.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + condition)
        return self.skip_connection(self.resample(x)) + h


class AttentionBlock(nn.Module):
    """Self-attention over the H*W positions of x (B,C,H,W).

    Args:
        channels: C.
        heads: number of heads.
        new_order: qkv is laid out [q of all heads, k ..., v ...] instead of CompVis's
            [q, k, v of the first head, ...].
        groups: number of groups of the norm.
    """

    def __init__(self, channels: int, heads: int, new_order: bool = False, groups: int = 32) -> None:
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = group_norm(channels, groups)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_init(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        order = "(three heads c)" if self.new_order else "(heads three c)"
        qkv = self.qkv(self.norm(x).flatten(2))
        q, k, v = rearrange(qkv, f"b {order} l -> three b heads l c", three=3, heads=self.heads).contiguous()
        h = rearrange(attend(q, k, v), "b heads l c -> b (heads c) l")
        return x + self.proj_out(h).view(x.shape)
