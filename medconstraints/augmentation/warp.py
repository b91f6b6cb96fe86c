"""Affine and elastic maps of images and label maps, differentiable with respect to what they are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["affine_matrix", "sampling_grid", "warp"]


def affine_matrix(rotation_deg: Tensor, log_scale: Tensor, shear: Tensor) -> Tensor:
    """Matrix (B, D, D) `exp(G)`: G has the logarithms of the scales on its diagonal, and shear -+ rotation beside it.

    All zeros are the identity, opposite values its inverse, rotation alone a rotation by this angle.

    Args:
        rotation_deg: degrees in each plane (B, D (D - 1) / 2): (0, 1) in 2D; (0, 1), (0, 2), (1, 2) in 3D.
        log_scale: along each axis (B, D).
        shear: in each plane, as the rotation.

    Example:
        >>> turn = affine_matrix(torch.tensor([[90.0]]), torch.zeros(1, 2), torch.zeros(1, 1))
        >>> turn[0].round(decimals=4).tolist()
        [[0.0, -1.0], [1.0, 0.0]]
    """
    dims = log_scale.shape[1]
    row, column = torch.triu_indices(dims, dims, 1, device=log_scale.device)
    turn = torch.deg2rad(rotation_deg)
    generator = torch.diag_embed(log_scale)
    generator = generator.index_put((_all(generator), row, column), shear - turn, accumulate=True)
    return torch.linalg.matrix_exp(generator.index_put((_all(generator), column, row), shear + turn, accumulate=True))


def _all(batch: Tensor) -> Tensor:
    return torch.arange(len(batch), device=batch.device)[:, None]


def sampling_grid(
    shape: Sequence[int],
    spacing_mm: Tensor,
    *,
    matrix: Tensor,
    translation_mm: Tensor,
    displacement_mm: Tensor | None = None,
) -> Tensor:
    """Grid (B, *S, D) for `warp`: where each voxel of the result is read, `matrix p + translation + displacement(p)`.

    Positions p are in mm from the centre of the image, along the axes of the array.

    Args:
        shape: S, spatial.
        spacing_mm: (B, D).
        matrix: (B, D, D).
        translation_mm: (B, D).
        displacement_mm: at the nodes of a coarse grid that spans the image (B, D, *nodes), linear between them.
    """
    sizes = torch.tensor(shape, dtype=spacing_mm.dtype, device=spacing_mm.device)
    half_mm = spacing_mm * (sizes - 1).clamp(min=1) / 2
    linear = matrix * half_mm[:, None, :] / half_mm[:, :, None]
    theta = torch.cat([linear.flip(1, 2), (translation_mm / half_mm).flip(1)[..., None]], dim=2)
    grid = F.affine_grid(theta, [len(theta), 1, *shape], align_corners=True)
    if displacement_mm is not None:
        mode = "bilinear" if len(shape) == 2 else "trilinear"
        fine = F.interpolate(displacement_mm, size=list(shape), mode=mode, align_corners=True)
        scale = half_mm.reshape(*half_mm.shape, *[1] * len(shape))
        grid = grid + (fine / scale).flip(1).movedim(1, -1)
    return grid


def warp(volume: Tensor, grid: Tensor, *, mode: str = "bilinear") -> Tensor:
    """A batch (B, C, *S) read at a grid of `sampling_grid`; what lies outside is the nearest voxel of the border.

    Label maps go through it one-hot: linear interpolation of them is differentiable and stays a distribution.
    """
    return F.grid_sample(volume, grid.to(volume.dtype), mode=mode, padding_mode="border", align_corners=True)
