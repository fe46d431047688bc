"""The UNet of latent diffusion and ADM: one class whose state dict fits both code bases' files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm_dkdm.errors import UserError
from ldm_dkdm.networks.arguments import remembers_arguments
from ldm_dkdm.networks.layers import (
    AttentionBlock,
    Downsample,
    ResBlock,
    Upsample,
    group_norm,
    timestep_embedding,
    zero_init,
)

MAX_BLOCKS = 100  # residual blocks per level
MAX_SIDE = 2048  # largest image_size: no diffusion model has more pixels, and a file could ask for any number


@remembers_arguments
class UNet(nn.Module):
    """CompVis's `UNetModel` without cross-attention and guided-diffusion's, name for name.

    Args:
        image_size: side of x in pixels or latent positions.
        in_channels, out_channels: channels of x and of the output; twice `in_channels` out for a learned variance.
        model_channels: base width.
        num_res_blocks: residual blocks per level.
        attention_resolutions: DOWNSAMPLING FACTORS at which attention acts (CompVis's convention); at least one
            of them must occur, others may not; [] leaves attention to the middle block, if there is one.
        channel_mult: width of each level in units of `model_channels`; fractions such as 1.5 are rounded down to
            whole channels, as in guided-diffusion.
        dropout: probability in the residual blocks.
        num_heads, num_head_channels: heads per attention block, or channels per head (which wins).
        conv_resample: convolve when resampling. resblock_updown: resample by residual blocks.
        use_scale_shift_norm: FiLM conditioning. use_new_attention_order: layout of qkv.
        num_classes: size of the label table; None for an unconditional network.
        use_checkpoint: recompute activations in the backward pass to save memory.
        freq_shift, cosines_first, downsample_padding, norm_eps: constants of layers; DDPM's code, and diffusers'
            google/ddpm-* models after it, have 1, False, 0 and 1e-6.
        middle_block: two residual blocks with attention between them at the deepest level; without them a student costs
            less and keeps its teacher's other blocks (BK-SDM, ECCV 2024). CompVis's and ADM's always have them.
        middle_attention: False leaves the two middle blocks without attention (diffusers' `add_attention`).
        norm_groups: groups of every GroupNorm; every level's width is a multiple of it. CompVis and ADM have 32.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        channel_mult: Sequence[float | int] = (1, 2, 4, 8),
        dropout: float = 0.0,
        num_heads: int = 1,
        num_head_channels: int = -1,
        conv_resample: bool = True,
        resblock_updown: bool = False,
        use_scale_shift_norm: bool = False,
        use_new_attention_order: bool = False,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        freq_shift: float = 0,
        cosines_first: bool = True,
        downsample_padding: int = 1,
        norm_eps: float = 1e-5,
        middle_block: bool = True,
        middle_attention: bool = True,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        _check_levels(image_size, channel_mult, attention_resolutions, num_res_blocks)
        _check_constants(dropout, downsample_padding, norm_eps, norm_groups)
        _check_heads(num_heads, num_head_channels)
        widths = level_widths(model_channels, channel_mult)
        attends = [2**level in attention_resolutions for level in range(len(widths))]
        in_middle = middle_block and middle_attention
        _check_widths(widths, [*attends[:-1], attends[-1] or in_middle], num_heads, num_head_channels, norm_groups)
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.model_channels, self.num_classes = model_channels, num_classes
        self.use_checkpoint, self.freq_shift, self.cosines_first = use_checkpoint, freq_shift, cosines_first
        self.multiple = 2 ** (len(widths) - 1)  # sides of x are multiples of it
        emb = 4 * model_channels
        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb)

        def res(channels: int, out: int, resample: str | None = None) -> ResBlock:
            return ResBlock(channels, emb, out, dropout, use_scale_shift_norm, resample, norm_groups)

        def attention(channels: int) -> AttentionBlock:
            heads = num_heads if num_head_channels == -1 else channels // num_head_channels
            return AttentionBlock(channels, heads, use_new_attention_order, norm_groups)

        plain = _resampler(conv_resample, downsample_padding)
        parts = _Parts(res, attention, (lambda c, direction: res(c, c, direction)) if resblock_updown else plain)
        stem = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.input_blocks, skips = _input_blocks(parts, stem, widths, attends, num_res_blocks)
        self.middle_block = _middle_block(parts, widths[-1], in_middle) if middle_block else nn.ModuleList()
        self.output_blocks = _output_blocks(parts, widths, attends, num_res_blocks, skips)
        last = zero_init(nn.Conv2d(widths[0], out_channels, 3, padding=1))
        self.out = nn.Sequential(group_norm(widths[0], norm_groups), nn.SiLU(), last)
        _set_eps(self, norm_eps)

    def embedding(self, t: Tensor) -> Tensor:
        """Sinusoids (B,model_channels) of timesteps t (B,)."""
        return timestep_embedding(t, self.model_channels, freq_shift=self.freq_shift, cosines_first=self.cosines_first)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """x (B,in_channels,H,W), timesteps t (B,), labels (B,) -> (B,out_channels,H,W)."""
        emb = self.time_embed(self.embedding(t).to(x.dtype))
        if self.num_classes is not None:
            emb = emb + self.label_emb(label)
        h, skips = x, []
        for block in self.input_blocks:
            h = self._run(block, h, emb)
            skips.append(h)
        h = self._run(self.middle_block, h, emb)
        for block in self.output_blocks:
            h = self._run(block, torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h)

    def _run(self, block: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
        for layer in block.children():
            args = (h, emb) if isinstance(layer, ResBlock) else (h,)
            recompute = self.use_checkpoint and torch.is_grad_enabled()
            h = checkpoint(layer, *args, use_reentrant=False) if recompute else layer(*args)
        return h


def _set_eps(network: nn.Module, eps: float) -> None:
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = eps


@dataclass(frozen=True)
class _Parts:
    """Makers of the layers, with the options that all of them share."""

    res: Callable[..., ResBlock]
    attention: Callable[[int], AttentionBlock]
    resampler: Callable[[int, str], nn.Module]


def _input_blocks(
    parts: _Parts, stem: nn.Conv2d, widths: Sequence[int], attends: Sequence[bool], num_res_blocks: int
) -> tuple[nn.ModuleList, list[int]]:
    """The encoder and the channels of its skip connections, in order."""
    blocks, channels, skips = nn.ModuleList([nn.ModuleList([stem])]), widths[0], [widths[0]]
    for level, width in enumerate(widths):
        for _ in range(num_res_blocks):
            layers = [parts.res(channels, width)] + ([parts.attention(width)] if attends[level] else [])
            blocks.append(nn.ModuleList(layers))
            channels = width
            skips.append(channels)
        if level < len(widths) - 1:
            blocks.append(nn.ModuleList([parts.resampler(channels, "down")]))
            skips.append(channels)
    return blocks, skips


def _output_blocks(
    parts: _Parts, widths: Sequence[int], attends: Sequence[bool], num_res_blocks: int, skips: list[int]
) -> nn.ModuleList:
    """The decoder; it takes the skip connections from the last to the first."""
    blocks, channels, skips = nn.ModuleList(), widths[-1], list(skips)
    for level, width in reversed(list(enumerate(widths))):
        for i in range(num_res_blocks + 1):
            layers: list[nn.Module] = [parts.res(channels + skips.pop(), width)]
            layers += [parts.attention(width)] if attends[level] else []
            layers += [parts.resampler(width, "up")] if level and i == num_res_blocks else []
            blocks.append(nn.ModuleList(layers))
            channels = width
    return blocks


def _resampler(convolves: bool, padding: int) -> Callable[[int, str], nn.Module]:
    """Makes layers without a residual block that double ("up") or halve the resolution, from their channels."""

    def resampler(channels: int, direction: str) -> nn.Module:
        return Upsample(channels, convolves) if direction == "up" else Downsample(channels, convolves, padding)

    return resampler


def _check_levels(size: int, mults: Sequence[float], attention: Sequence[int], blocks: int) -> None:
    if not 1 <= blocks <= MAX_BLOCKS:  # files are not trusted
        raise UserError(f"num_res_blocks: {blocks} is not between 1 and {MAX_BLOCKS}")
    if not 1 <= size <= MAX_SIDE:
        raise UserError(f"image_size: {size} is not between 1 and {MAX_SIDE}")
    if not mults or size % 2 ** (len(mults) - 1):
        raise UserError(f"channel_mult: {len(mults)} levels cannot halve image_size {size} that often")
    factors = [2**level for level in range(len(mults))]
    if attention and not set(attention) & set(factors):
        raise UserError(
            f"attention_resolutions: none of {list(attention)} is a downsampling factor of this network, which has "
            f"{', '.join(map(str, factors))}; they are factors, not sides; [] is for attention in no level"
        )


def _middle_block(parts: _Parts, width: int, attends: bool) -> nn.ModuleList:
    """Two residual blocks around attention, or around nothing, so that the names stay."""
    return nn.ModuleList(
        [parts.res(width, width), parts.attention(width) if attends else nn.Identity(), parts.res(width, width)]
    )


def _check_constants(dropout: float, downsample_padding: int, norm_eps: float, norm_groups: int) -> None:
    """Refuse numbers outside their bounds, which a NaN is too."""
    bounds = {
        "dropout": (dropout, 0, 1),
        "downsample_padding": (downsample_padding, 0, 1),
        "norm_eps": (norm_eps, 0, 1),
        "norm_groups": (norm_groups, 1, 4096),
    }
    _check_bounds(bounds)


def _check_heads(num_heads: int, num_head_channels: int) -> None:
    """Refuse numbers outside their bounds; where a head's width is given, the number of heads is not used."""
    if num_head_channels < 1 and num_head_channels != -1:
        raise UserError(f"num_head_channels: {num_head_channels} is not at least 1, nor -1 (num_heads decides)")
    _check_bounds({"num_heads": (num_heads, 1 if num_head_channels == -1 else -1, 4096)})


def _check_bounds(bounds: Mapping[str, tuple[float, float, float]]) -> None:
    for name, (value, least, most) in bounds.items():
        if not least <= value <= most:
            raise UserError(f"{name}: {value} is not between {least} and {most}")


def level_widths(model_channels: int, channel_mult: Sequence[float]) -> list[int]:
    """Channels of every level; a fraction of a channel is cut off."""
    return [int(mult * model_channels + 1e-6) for mult in channel_mult]  # 0.29 * 100 is 28.999999999999996


def _check_widths(widths: Sequence[int], attends: Sequence[bool], heads: int, head_channels: int, groups: int) -> None:
    """Refuse widths without whole norm groups, or whole heads where there is attention."""
    for level, channels in enumerate(widths):
        if channels < 1:
            raise UserError(f"model_channels: channel_mult leaves no channels at level {level}")
        if channels % groups:
            raise UserError(
                f"model_channels: channel_mult gives level {level} {channels} channels, no multiple of {groups} "
                "(GroupNorm); norm_groups sets another number"
            )
        if attends[level] and channels % (heads if head_channels == -1 else head_channels):
            name = "num_heads" if head_channels == -1 else "num_head_channels"
            raise UserError(f"{name}: {channels} channels of level {level} do not divide into the heads asked for")
