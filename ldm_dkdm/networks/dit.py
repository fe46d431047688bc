"""The diffusion transformer (Peebles & Xie 2023), with the parameter names of its public code."""

from collections import OrderedDict

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm_dkdm.errors import UserError
from ldm_dkdm.networks.arguments import remembers_arguments
from ldm_dkdm.networks.layers import attend, timestep_embedding, zero_init

MAX_DEPTH = 1000
MAX_SIDE = 2048  # largest input_size; files are not trusted
FREQUENCIES = 256  # width of the sinusoids that the timestep's MLP reads


@remembers_arguments
class DiT(nn.Module):
    """A ViT over the patches of x, conditioned by adaLN-Zero (Peebles & Xie 2023, Sec. 3.2).

    The conditioning is the timestep's embedding, plus the label's where `num_classes` is given. While
    training, each label becomes `null_label` with probability `class_dropout_prob`, drawn from torch's
    global generator, so that one network learns both branches of classifier-free guidance.

    Args:
        input_size: side of x in pixels or latent positions.
        patch_size: side of a patch; (input_size / patch_size)^2 tokens.
        in_channels: channels of x.
        hidden_size: width of a token. depth: number of blocks. num_heads: heads per block.
        mlp_ratio: hidden width of a block's MLP in units of `hidden_size`.
        class_dropout_prob: see above; 0 leaves the null label out of the table. Unused without labels.
        num_classes: None for an unconditional network, which has no label table.
        learn_sigma: the output has twice `in_channels`, the second half for the variance.
        use_checkpoint: recompute activations in the backward pass to save memory.
        freq_shift: of the timestep's sinusoids, see `timestep_embedding`; diffusers has 1.
        norm_eps: of the layer norm before the MLP; diffusers has 1e-5.
        own_embedders: every block embeds timestep and label itself, as in diffusers; the first one's serve the output.

    Attributes:
        image_size: `input_size`. out_channels: channels of the output. num_classes: as given.
        null_label: the label for no class, `num_classes`; None without one.
        fixed: names of the weights that are never trained.
    """

    fixed = ("pos_embed",)

    def __init__(
        self,
        input_size: int,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int | None = None,
        learn_sigma: bool = True,
        use_checkpoint: bool = False,
        freq_shift: int = 0,
        norm_eps: float = 1e-6,
        own_embedders: bool = False,
    ) -> None:
        super().__init__()
        _check_positive(input_size=input_size, patch_size=patch_size, in_channels=in_channels, depth=depth)
        if depth > MAX_DEPTH:  # files are not trusted
            raise UserError(f"depth: {depth} is more than {MAX_DEPTH} blocks")
        if input_size > MAX_SIDE:
            raise UserError(f"input_size: {input_size} is more than {MAX_SIDE}")
        if not 0 <= class_dropout_prob <= 1:
            raise UserError(f"class_dropout_prob: {class_dropout_prob} is not between 0 and 1")
        _check_widths(hidden_size, num_heads, mlp_ratio)
        if input_size % patch_size:
            raise UserError(f"patch_size: {patch_size} does not divide input_size {input_size}")
        self.image_size, self.in_channels, self.patch_size = input_size, in_channels, patch_size
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.num_classes, self.null_label = num_classes, None
        self.use_checkpoint = use_checkpoint
        self.x_embedder = PatchEmbedding(in_channels, hidden_size, patch_size)
        positions = grid_positions(input_size // patch_size, hidden_size).float()[None]
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.t_embedder = TimestepEmbedder(hidden_size, freq_shift)
        if num_classes is not None:
            self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
            self.null_label = self.y_embedder.null_label
        hidden = int(hidden_size * mlp_ratio + 1e-6)  # a ratio of whole widths gives them back
        self.blocks = nn.ModuleList([Block(hidden_size, num_heads, hidden, norm_eps) for _ in range(depth)])
        labels = None if num_classes is None else (num_classes, class_dropout_prob)
        further = range(depth - 1 if own_embedders else 0)
        self.embedders = nn.ModuleList([Embedders(hidden_size, freq_shift, labels) for _ in further])
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """x (B,in_channels,H,W), timesteps t (B,), labels (B,) -> (B,out_channels,H,W), H = W = input_size."""
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise UserError(f"input_size: the network takes {self.image_size}, not states of shape {tuple(x.shape)}")
        if self.num_classes is not None and label is not None:
            label = self.y_embedder.dropped(label)  # once, whatever blocks embed it
        condition = _condition(self, t, label, x.dtype)
        tokens = self.x_embedder(x) + self.pos_embed
        for i, block in enumerate(self.blocks):
            recompute = self.use_checkpoint and torch.is_grad_enabled()
            own = i and len(self.embedders)
            args = (tokens, _condition(self.embedders[i - 1], t, label, x.dtype) if own else condition)
            tokens = checkpoint(block, *args, use_reentrant=False) if recompute else block(*args)
        return self._unpatchify(self.final_layer(tokens, condition))

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        """(B,N,p*p*C), channels last within a patch -> (B,C,H,W)."""
        p, side = self.patch_size, self.image_size // self.patch_size
        return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=side, w=side, p=p, q=p)


class PatchEmbedding(nn.Module):
    """Linear map of non-overlapping patches: (B,C,H,W) -> (B,N,width), row by row."""

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.data.flatten(1))  # a view: the fans are those of a linear layer
        assert self.proj.bias is not None  # the default of Conv2d
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Timesteps (B,) -> (B,width): sinusoids through two layers."""

    def __init__(self, width: int, freq_shift: int = 0) -> None:
        super().__init__()
        self.freq_shift = freq_shift
        self.mlp = nn.Sequential(_linear(FREQUENCIES, width, 0.02), nn.SiLU(), _linear(width, width, 0.02))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        sinusoids = timestep_embedding(t, FREQUENCIES, freq_shift=self.freq_shift)
        return self.mlp(sinusoids.to(dtype))


class LabelEmbedder(nn.Module):
    """Labels (B,) -> (B,width); while training, the network replaces some by the null label (Ho & Salimans 2022).

    Args:
        classes: labels are 0..classes-1, and `null_label` = classes if it exists.
        width: width of the embedding.
        dropout: probability of the replacement; with 0 the table lacks the null label.
    """

    def __init__(self, classes: int, width: int, dropout: float) -> None:
        super().__init__()
        _check_positive(num_classes=classes)
        if not 0 <= dropout <= 1:
            raise UserError(f"class_dropout_prob: must be between 0 and 1, got {dropout}")
        self.dropout, self.null_label = dropout, classes if dropout > 0 else None
        self.embedding_table = nn.Embedding(classes + (dropout > 0), width)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def dropped(self, label: Tensor) -> Tensor:
        """Labels (B,), of which some are the null label while training."""
        if not self.training or self.null_label is None:
            return label
        dropped = torch.rand(label.shape, dtype=torch.float32, device=label.device) < self.dropout
        return torch.where(dropped, self.null_label, label)

    def forward(self, label: Tensor) -> Tensor:
        return self.embedding_table(label)


class Embedders(nn.Module):
    """The timestep's and, where `labels` gives classes and dropout, the label's embedding of one block."""

    def __init__(self, width: int, freq_shift: int, labels: tuple[int, float] | None) -> None:
        super().__init__()
        self.t_embedder = TimestepEmbedder(width, freq_shift)
        if labels is not None:
            self.y_embedder = LabelEmbedder(labels[0], width, labels[1])


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B,N,width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = _linear(width, 3 * width)
        self.proj = _linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = rearrange(
            self.qkv(tokens), "b n (three heads c) -> three b heads n c", three=3, heads=self.heads
        ).contiguous()
        return self.proj(rearrange(attend(q, k, v), "b heads n c -> b n (heads c)"))


class Block(nn.Module):
    """Attention and an MLP on tokens (B,N,width), shifted, scaled and gated by a condition (B,width).

    All three modulations start at zero, so that the block starts as the identity (adaLN-Zero).
    """

    def __init__(self, width: int, heads: int, hidden: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1, self.norm2 = _layer_norm(width), _layer_norm(width, norm_eps)
        self.attn = Attention(width, heads)
        layers = {"fc1": _linear(width, hidden), "act": nn.GELU(approximate="tanh"), "fc2": _linear(hidden, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.adaLN_modulation = _modulation(width, 6)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(condition).to(tokens.dtype)[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        tokens = tokens + gate1 * self.attn(self.norm1(tokens) * (1 + scale1) + shift1)
        return tokens + gate2 * self.mlp(self.norm2(tokens) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    """Tokens (B,N,width) and a condition (B,width) -> (B,N,outputs); zero at the start."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = _layer_norm(width)
        self.linear = zero_init(nn.Linear(width, outputs))
        self.adaLN_modulation = _modulation(width, 2)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).to(tokens.dtype)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(tokens) * (1 + scale) + shift)


def grid_positions(side: int, width: int) -> Tensor:
    """Fixed embeddings (side*side,width), float64, of a grid's positions, row by row.

    The first half of the features encodes the column, the second the row; in each half the sines come
    first, of frequencies 10000^(-i / (width/4)) (He et al. 2022, MAE; used unchanged by DiT).
    """
    steps = torch.arange(side, dtype=torch.float64)
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.outer(steps, frequencies)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side,width/2)
    return torch.cat([axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)], dim=1)


def _linear(inputs: int, outputs: int, std: float | None = None) -> nn.Linear:
    """Zero bias; weights Xavier-uniform, or normal where `std` is given."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.bias)
    if std is None:
        nn.init.xavier_uniform_(layer.weight)
    else:
        nn.init.normal_(layer.weight, std=std)
    return layer


def _condition(embedders: nn.Module, t: Tensor, label: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(B,width): the timestep's embedding, plus the label's where there is one."""
    assert isinstance(embedders, (DiT, Embedders))
    condition: Tensor = embedders.t_embedder(t, dtype)
    return condition + embedders.y_embedder(label) if hasattr(embedders, "y_embedder") else condition


def _layer_norm(width: int, eps: float = 1e-6) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=eps, elementwise_affine=False)


def _modulation(width: int, vectors: int) -> nn.Sequential:
    """(B,width) -> (B,vectors*width), zero at the start."""
    return nn.Sequential(nn.SiLU(), zero_init(nn.Linear(width, vectors * width)))


def _check_positive(**values: int) -> None:
    for key, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{key}: must be a positive whole number, got {value!r}")


def _check_widths(width: int, heads: int, mlp_ratio: float) -> None:
    _check_positive(hidden_size=width, num_heads=heads)
    if width % 4:
        raise UserError(f"hidden_size: {width} is not a multiple of 4 (sines and cosines of two coordinates)")
    if width % heads:
        raise UserError(f"num_heads: {heads} heads do not divide hidden_size {width}")
    if int(width * mlp_ratio) < 1:
        raise UserError(f"mlp_ratio: {mlp_ratio} x hidden_size {width} leaves the MLP no units")
