"""ENet in 2D and 3D: a small, fast segmentation network with dilated and asymmetric convolutions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Conv, Dropout, Norm, Pool
from torch import Tensor, nn

__all__ = ["ENet"]

# A bottleneck works with a fourth of its output channels.
_REDUCTION = 4
# Three halvings: initial block, stage 1, stage 2.
_STRIDE = 8
# Batch norm of the authors' code. Late layers of a small image have few values per channel, a larger eps calms them.
_NORM_EPS = 1e-3
# Stages 2 and 3, in this order: regular, dilated by 2, 4, 8 and 16, and asymmetric convolutions.
_CONTEXT = ("regular", 2, "asymmetric", 4, "regular", 8, "asymmetric", 16)
_ASYMMETRIC_SIZE = 5


class ENet(nn.Module):
    """ENet (Paszke 2016, arXiv:1606.02147, table 1) for 2D images and 3D volumes.

    ===================== ======== ============== ==========================================================
    part                  scale    channels       what
    ===================== ======== ============== ==========================================================
    `initial`             1 / 2    `channels[0]`  3x3 convolution with stride 2, concatenated with a max pool
    `down1`, `stage1`     1 / 4    `channels[1]`  max pool, its positions kept; 4 regular bottlenecks
    `down2`, `stage2`     1 / 8    `channels[2]`  the same; 8 bottlenecks: regular, dilated 2, asymmetric 5,
                                                  dilated 4, regular, dilated 8, asymmetric 5, dilated 16
    `stage3`              1 / 8    `channels[2]`  as stage 2
    `up4`, `stage4`       1 / 4    `channels[1]`  max unpool at the positions of `down2`; 2 regular bottlenecks
    `up5`, `stage5`       1 / 2    `channels[0]`  max unpool at the positions of `down1`; 1 regular bottleneck
    `head`                1        `out_channels` transposed 3x3 convolution with stride 2 and bias
    ===================== ======== ============== ==========================================================

    A bottleneck adds to its input the output of an extension: 1x1 convolution to a fourth of its output channels (2x2
    with stride 2 in `down`), the main convolution, 1x1 convolution, each followed by batch norm, with PReLU (one slope
    per channel) between them and after the sum, and spatial dropout at the end of the extension. In 3D every kernel has
    a third axis, and the asymmetric convolution is 5x1x1, 1x5x1, 1x1x5 instead of 5x1, 1x5.

    Where the paper leaves a choice, this follows the authors' code: batch norm with eps 1e-3 and none between the parts
    of an asymmetric convolution, and a 3x3 transposed convolution in `up`. It differs from that code by PReLU and
    dropout in the decoder too, as the paper writes, by 3x3 instead of 2x2 in `head`, and in that no convolution but the
    last has a bias (batch norm would remove it). 2D with 3 input channels and 12 classes has 0.364 million parameters
    (published: 0.37); 3D with 1 input channel and 3 classes has 0.671 million, 2.7 MB in float32. Smaller `channels`
    shrink both.

    Any spatial size is accepted: the image is extended at the end of each axis, by repeating its border, to a multiple
    of 8 (the last axis to at least 16, so that batch norm can be trained on a single tiny image), and the result is cut
    back to the size of the input. Sizes that are multiples of 8 waste nothing.

    `torch.use_deterministic_algorithms(True)` is no obstacle on a CPU, where torch's own max unpool would refuse it. On
    CUDA the pools of a 3D network are one: torch has no deterministic gradient of a 3D max pool there.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: classes, background included; the output is logits.
        channels: width at scale 1/2, 1/4 and 1/8; multiples of 4, the first larger than `in_channels`.
        dropout: probability of spatial dropout in `down1` and `stage1`, and in all later bottlenecks; in [0, 1).
        upsampling: "transposed", as published, or "interpolated": each transposed convolution becomes a 3x3 convolution
            and linear interpolation, and the max unpool linear interpolation too. The kernel of a transposed
            convolution treats even and odd pixels differently, and a constraint on the whole image, such as a size,
            does not tell them apart: without voxel labels the prediction becomes a checkerboard, or stripes.

    Shape:
        Input (B, in_channels, *S), output (B, out_channels, *S), with `spatial_dims` axes S of any size >= 1.

    Raises:
        ValueError: an argument is outside its range, or an input does not have `spatial_dims` spatial axes.

    Example:
        >>> network = ENet(2, in_channels=1, out_channels=3)
        >>> network(torch.zeros(2, 1, 50, 61)).shape
        torch.Size([2, 3, 50, 61])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int] = (16, 64, 128),
        dropout: Sequence[float] = (0.01, 0.1),
        upsampling: str = "transposed",
    ) -> None:
        super().__init__()
        _check_arguments(spatial_dims, in_channels, out_channels, channels, dropout, upsampling)
        self.spatial_dims = spatial_dims
        dims, (fine, middle, coarse), (early, late) = spatial_dims, channels, dropout

        self.initial = _Initial(dims, in_channels, fine)
        self.down1 = _Down(dims, fine, middle, early)
        self.stage1 = nn.Sequential(*(_Bottleneck(dims, middle, "regular", early) for _ in range(4)))
        self.down2 = _Down(dims, middle, coarse, late)
        self.stage2 = nn.Sequential(*(_Bottleneck(dims, coarse, kind, late) for kind in _CONTEXT))
        self.stage3 = nn.Sequential(*(_Bottleneck(dims, coarse, kind, late) for kind in _CONTEXT))
        self.up4 = _Up(dims, coarse, middle, late, upsampling)
        self.stage4 = nn.Sequential(*(_Bottleneck(dims, middle, "regular", late) for _ in range(2)))
        self.up5 = _Up(dims, middle, fine, late, upsampling)
        self.stage5 = nn.Sequential(_Bottleneck(dims, fine, "regular", late))
        self.head: nn.Module = Conv["convtrans", dims](fine, out_channels, 3, stride=2, padding=1, output_padding=1)
        if upsampling == "interpolated":
            self.head = nn.Sequential(Conv["conv", dims](fine, out_channels, 3, padding=1), _doubled(dims))
        if dims == 2:
            # The layout of the weights becomes that of all features, which makes a training step on a CPU faster. In 3D
            # it makes no difference.
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, out_channels, *S) of images (B, in_channels, *S)."""
        if x.dim() != self.spatial_dims + 2:
            raise ValueError(
                f"x: expected (B, C, *S) with {self.spatial_dims} spatial axes, got shape {list(x.shape)}; "
                "add the missing axes or build the network with another spatial_dims."
            )
        size = x.shape[2:]
        x = _extended(x)
        x = self.initial(x)
        x, positions1 = self.down1(x)
        x = self.stage1(x)
        x, positions2 = self.down2(x)
        x = self.stage3(self.stage2(x))
        x = self.stage4(self.up4(x, positions2))
        x = self.stage5(self.up5(x, positions1))
        x = self.head(x)
        for axis, n in enumerate(size):
            x = x.narrow(axis + 2, 0, n)
        # Neither the cut nor channels_last shows outside: what follows may call `view`.
        return x.contiguous()


class _Initial(nn.Module):
    """Strided 3x3 convolution and max pool of the image, concatenated (figure 2a)."""

    def __init__(self, dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = Conv["conv", dims](in_channels, out_channels - in_channels, 3, stride=2, padding=1, bias=False)
        self.pool = Pool["max", dims](2)
        self.norm = Norm["batch", dims](out_channels, eps=_NORM_EPS)
        self.act = _PReLU(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) to (B, out_channels, *S / 2)."""
        return self.act(self.norm(torch.cat([self.conv(x), self.pool(x)], dim=1)))


class _Bottleneck(nn.Module):
    """Bottleneck without change of shape; its main convolution is "regular", "asymmetric", or dilated by a number."""

    def __init__(self, dims: int, channels: int, kind: str | int, dropout: float) -> None:
        super().__init__()
        width = channels // _REDUCTION
        reduce = Conv["conv", dims](channels, width, 1, bias=False)
        self.extension = _extension(dims, reduce, _main_conv(dims, width, kind), width, channels, dropout)
        self.act = _PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, *S) to the same shape."""
        return self.act(x + self.extension(x))


class _Down(nn.Module):
    """Bottleneck that halves every axis; also returns the positions of the maxima for `_Up`."""

    def __init__(self, dims: int, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        width = out_channels // _REDUCTION
        reduce = Conv["conv", dims](in_channels, width, 2, stride=2, bias=False)
        self.extension = _extension(dims, reduce, _main_conv(dims, width, "regular"), width, out_channels, dropout)
        self.pool = Pool["max", dims](2, return_indices=True)
        self.act = _PReLU(out_channels)
        self.missing = [0, 0] * dims + [0, out_channels - in_channels]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, in_channels, *S) to (B, out_channels, *S / 2), and the positions (B, in_channels, *S / 2)."""
        pooled, positions = self.pool(x)
        return self.act(self.extension(x) + F.pad(pooled, self.missing)), positions


class _Up(nn.Module):
    """Bottleneck that doubles every axis, putting values back at the positions that a `_Down` has found."""

    def __init__(self, dims: int, in_channels: int, out_channels: int, dropout: float, upsampling: str) -> None:
        super().__init__()
        width = out_channels // _REDUCTION
        reduce = Conv["conv", dims](in_channels, width, 1, bias=False)
        main = Conv["convtrans", dims](width, width, 3, stride=2, padding=1, output_padding=1, bias=False)
        self.interpolate: nn.Module | None = None
        if upsampling == "interpolated":
            self.interpolate = _doubled(dims)
            main = nn.Sequential(_main_conv(dims, width, "regular"), _doubled(dims))
        self.extension = _extension(dims, reduce, main, width, out_channels, dropout)
        self.conv = Conv["conv", dims](in_channels, out_channels, 1, bias=False)
        self.norm = Norm["batch", dims](out_channels, eps=_NORM_EPS)
        self.act = _PReLU(out_channels)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """(B, in_channels, *S) and positions (B, out_channels, *S) to (B, out_channels, 2 S)."""
        values, extension = self.norm(self.conv(x)), self.extension(x)
        if self.interpolate is not None:
            return self.act(extension + self.interpolate(values))
        # As max_unpool, which refuses to run under use_deterministic_algorithms(True), because positions of overlapping
        # windows may coincide. These windows do not overlap.
        unpooled = torch.zeros_like(extension).flatten(2).scatter(2, positions.flatten(2), values.flatten(2))
        # The extension first: a sum takes the memory format of its first operand, and scatter loses channels_last.
        return self.act(extension + unpooled.view(extension.shape))


class _PReLU(nn.PReLU):
    """PReLU, one slope per channel, max(x, 0) + slope * min(x, 0), written for a fast gradient.

    The gradient of torch's own branches for every element on a CPU. Without gradients torch's own is the faster one.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Same shape as the input (B, C, *S)."""
        slope = self.weight.to(input.dtype)  # autocast leaves the weight in float32
        if not torch.is_grad_enabled():
            return torch.prelu(input, slope)
        return torch.lerp(torch.relu(input), input, slope.view([-1] + [1] * (input.dim() - 2)))


def _extension(
    dims: int, reduce: nn.Module, main: nn.Module, width: int, out_channels: int, dropout: float
) -> nn.Sequential:
    """The extension branch of a bottleneck (figure 2b)."""
    return nn.Sequential(
        OrderedDict(
            reduce=reduce,
            norm1=Norm["batch", dims](width, eps=_NORM_EPS),
            act1=_PReLU(width),
            main=main,
            norm2=Norm["batch", dims](width, eps=_NORM_EPS),
            act2=_PReLU(width),
            expand=Conv["conv", dims](width, out_channels, 1, bias=False),
            norm3=Norm["batch", dims](out_channels, eps=_NORM_EPS),
            dropout=Dropout["dropout", dims](dropout),
        )
    )


def _main_conv(dims: int, width: int, kind: str | int) -> nn.Module:
    """The main convolution: "regular" 3x3, "asymmetric" 5x1 and 1x5, or 3x3 dilated by a number."""
    conv = Conv["conv", dims]
    if kind == "asymmetric":
        kernels = [tuple(_ASYMMETRIC_SIZE if a == axis else 1 for a in range(dims)) for axis in range(dims)]
        return nn.Sequential(*(conv(width, width, k, padding=tuple(n // 2 for n in k), bias=False) for k in kernels))
    dilation = 1 if kind == "regular" else int(kind)
    return conv(width, width, 3, padding=dilation, dilation=dilation, bias=False)


def _doubled(dims: int) -> nn.Module:
    """Linear interpolation to twice the size."""
    return nn.Upsample(scale_factor=2, mode="bilinear" if dims == 2 else "trilinear", align_corners=False)


def _extended(x: Tensor) -> Tensor:
    """`x` with each axis extended to a multiple of 8, the last to at least 16, by repeating the border."""
    pad: list[int] = []
    for axis in range(x.dim() - 1, 1, -1):  # F.pad counts from the last axis
        size = x.shape[axis]
        whole = (size + 7) // 8 * 8
        if axis == x.dim() - 1:
            whole = max(whole, 16)
        pad += [0, whole - size]
    return F.pad(x, pad, mode="replicate") if sum(pad) > 0 else x


def _check_arguments(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    channels: Sequence[int],
    dropout: Sequence[float],
    upsampling: str,
) -> None:
    if not (_is_int(spatial_dims) and spatial_dims in (2, 3)):
        raise ValueError(f"spatial_dims: expected 2 or 3, got {spatial_dims!r}; ENet is for images and volumes.")
    for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
        if not (_is_int(value) and value >= 1):
            raise ValueError(f"{name}: expected an integer >= 1, got {value!r}.")
    if not (
        isinstance(channels, Sequence)
        and len(channels) == 3
        and all(_is_int(c) and c >= _REDUCTION and c % _REDUCTION == 0 for c in channels)
    ):
        raise ValueError(
            f"channels: expected three positive multiples of {_REDUCTION}, for the scales 1/2, 1/4 and 1/8, "
            f"got {channels!r}; the default is (16, 64, 128)."
        )
    if channels[0] <= in_channels:
        raise ValueError(
            f"channels: expected the first to be larger than in_channels = {in_channels}, got {channels!r}; "
            "the pooled image is a part of the first block's output."
        )
    if not channels[0] <= channels[1] <= channels[2]:
        raise ValueError(
            f"channels: expected them in ascending order, got {channels!r}; downsampling pads the missing channels "
            "with zeros."
        )
    if not (isinstance(dropout, Sequence) and len(dropout) == 2 and all(0 <= p < 1 for p in dropout)):
        raise ValueError(
            f"dropout: expected two probabilities in [0, 1), for stage 1 and for the later ones, got {dropout!r}."
        )
    if upsampling not in ("transposed", "interpolated"):
        raise ValueError(f'upsampling: expected "transposed" or "interpolated", got {upsampling!r}.')


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
