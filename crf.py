"""Dense conditional random field with Gaussian edge potentials, in pure PyTorch.

Mean-field inference of Kraehenbuehl & Koltun, "Efficient inference in fully connected CRFs with
Gaussian edge potentials", NeurIPS 2011 [KK11], in linear time on the lattice of Adams, Baek and
Davis, "Fast high-dimensional filtering using the permutohedral lattice", Eurographics 2010 [ABD10].

    unary = unary_from_softmax(probs)  # (B, L, H, W)
    q = DenseCRF()(unary, image)       # (B, L, H, W), image (B, C, H, W) in 0..255
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn


def unary_from_softmax(p, eps=1e-6):
    """Unary -log p of class probabilities, clamped so that no label is ruled out.

    p: (B, L, H, W) float in [0, 1], L on axis 1. eps: smallest probability, in (0, 1).
    Returns (B, L, H, W) in 0..-log(eps). Raises ValueError for NaN, p outside [0, 1] or a bad eps.
    """
    if not 0 < eps < 1 or not ((p >= 0) & (p <= 1.001)).all():  # .001: rounding of averages
        raise ValueError(f"need eps in (0, 1), got {eps}, and p in [0, 1] without NaN, not logits")
    return -p.to(torch.promote_types(p.dtype, torch.float32)).clamp(eps, 1).log()  # (B, L, H, W)


def unary_from_labels(labels, n, confidence=0.7):
    """Unary of a hard label map: p = confidence for the given label, the rest shared evenly.

    labels: (B, H, W) integers; a value outside 0..n-1 (such as 255) means unknown and gets the
    uniform p = 1/n. n: number of labels, 1 or more. confidence: probability in (0, 1).
    Returns (B, n, H, W) float32. Raises ValueError for other shapes, types or ranges.
    """
    if labels.ndim != 3 or labels.is_floating_point():
        raise ValueError(f"labels must be integers (B, H, W), got {labels.dtype}, {labels.shape}")
    if n < 1 or not 0 < confidence < 1:
        raise ValueError(f"need n >= 1 and confidence in (0, 1), got {n} and {confidence}")
    given = labels[:, None] == torch.arange(n, device=labels.device).view(1, n, 1, 1)
    p = torch.where(given, confidence, (1 - confidence) / max(n - 1, 1))  # (B, n, H, W)
    return -torch.where(given.any(1, keepdim=True), p, 1 / n).float().log()  # (B, n, H, W)


class DenseCRF(nn.Module):
    """Fully connected CRF with a Potts model, a spatial and a bilateral Gaussian kernel [KK11].

    iterations: mean-field updates; 0 returns softmax(-unary).
    sxy_gaussian, sxy_bilateral: std of either kernel in space, in pixels of the image given: when
        images are resized, scale both with them. The defaults suit photographs 300-500 pixels wide.
    srgb: std of the bilateral kernel in each image channel, in grey levels (of 0..255).
    compat_gaussian, compat_bilateral: weights of the two messages, in nats, against -log p; 0
        switches a kernel off, unless it is trainable.
    kernel: "lattice", linear time, bilateral messages within 2-3 %; or "exact", all pairs of
        pixels, quadratic time, bounded memory, for checks and small images.
    trainable: make both weights nn.Parameters.
    Raises ValueError for an unknown kernel, a sigma not above 0, negative weights or iterations.
    """

    def __init__(
        self,
        iterations=5,
        sxy_gaussian=3.0,
        compat_gaussian=3.0,
        sxy_bilateral=80.0,
        srgb=13.0,
        compat_bilateral=10.0,
        kernel="lattice",
        trainable=False,
    ):
        super().__init__()
        if kernel not in ("lattice", "exact") or iterations not in range(2**31):
            raise ValueError(f"bad kernel {kernel!r} (lattice, exact) or iterations {iterations}")
        sigmas = {"sxy_gaussian": sxy_gaussian, "sxy_bilateral": sxy_bilateral, "srgb": srgb}
        weights = {"compat_gaussian": compat_gaussian, "compat_bilateral": compat_bilateral}
        for name, value in {**sigmas, **weights}.items():
            if not 0 <= value < math.inf or (name in sigmas and value == 0):
                raise ValueError(f"{name} must be positive (compat: or 0), finite, got {value}")
            as_parameter = trainable and name in weights
            setattr(self, name, nn.Parameter(torch.tensor(float(value))) if as_parameter else value)
        self.iterations, self.kernel, self.trainable = int(iterations), kernel, trainable

    def forward(self, unary, image):
        """Refine class probabilities so that near and alike pixels agree.

        unary: (B, L, H, W) float, -log p. image: (B, C, H, W) in 0..255, uint8 or float, any C.
        Returns Q (B, L, H, W), summing to 1 over L: float64 for a float64 unary, else float32,
        also under autocast. Differentiable in unary and in trainable weights, not in image.
        Raises ValueError for mismatched shapes, a non-finite unary, an image outside 0..255. Warns
        of a floating image in [0, 1], whose colours would hardly differ at srgb grey levels, and of
        a single label, which has probability 1 everywhere: give background a label of its own.
        """
        u, i = (*unary.shape,), (*image.shape,)
        if len(u) != 4 or len(i) != 4 or 0 in u + i or (u[0], u[2:]) != (i[0], i[2:]):
            raise ValueError(f"need unary (B, L, H, W) and image (B, C, H, W), got {u} and {i}")
        if not unary.is_floating_point() or not unary.isfinite().all():
            raise ValueError("unary must be floating, without NaN or infinity: unary_from_softmax")
        if not (image.min() >= 0 and image.max() <= 255):
            raise ValueError("image must lie in 0..255, without NaN")
        if image.is_floating_point() and 0 < image.max() <= 1:
            warnings.warn(
                "image lies in [0, 1], DenseCRF expects 0..255: give 255 * image", stacklevel=2
            )
        if u[1] == 1:
            warnings.warn("a single label: Q is 1 everywhere; add a background label", stacklevel=2)
        with torch.autocast(unary.device.type, enabled=False):
            unary = unary.to(torch.promote_types(unary.dtype, torch.float32))  # float64 stays
            messages = self.messages(image.detach().to(unary.dtype))
            q = F.softmax(-unary, dim=1)  # (B, L, H, W)
            for _ in range(self.iterations):
                logits = sum((weight * message(q) for weight, message in messages), -unary)
                q = F.softmax(logits, dim=1)  # Alg. 1 [KK11], all pixels at once
        return q

    def messages(self, image):
        """The kernels switched on, as [(weight, function)], the spatial one first.

        image: (B, C, H, W) float in 0..255. The functions map Q (B, L, H, W) of the same dtype to
        D^-1/2 K D^-1/2 Q, where D = K 1, each pixel's own Q included. K is prepared here, once.
        """
        b, _, h, w = image.shape
        x, y = (torch.arange(n, device=image.device, dtype=image.dtype) for n in (w, h))
        messages = []
        if self.trainable or self.compat_gaussian:
            axes = [(-0.5 * ((t - t[:, None]) / self.sxy_gaussian).square()).exp() for t in (y, x)]
            ky, kx = (k / k.sum(0).outer(k.sum(1)).sqrt() for k in axes)  # D^-1/2 K D^-1/2
            messages.append((self.compat_gaussian, lambda q: ky @ q @ kx))  # separable, so exact
        if self.trainable or self.compat_bilateral:
            position = torch.stack(torch.meshgrid(y, x, indexing="ij")).expand(b, 2, h, w)
            f = torch.cat([position / self.sxy_bilateral, image / self.srgb], 1)  # (B, 2+C, H, W)
            f = f.flatten(2).transpose(1, 2).contiguous()  # (B, N = H * W, d = 2 + C)
            kernel = _Lattice(f) if self.kernel == "lattice" else lambda v, _: _all_pairs(f, v)
            d = _Message.apply(torch.ones_like(image[:, :1]), kernel).rsqrt()  # D^-1/2
            messages.append((self.compat_bilateral, lambda q: d * _Message.apply(d * q, kernel)))
        return messages


class _Message(torch.autograd.Function):
    """A linear kernel applied to q (B, L, H, W); the gradient is the transposed kernel, so that
    autograd keeps neither the steps of the lattice nor the N x N matrix of all pairs."""

    @staticmethod
    def forward(ctx, q, kernel, transposed=False):
        ctx.kernel, ctx.transposed = kernel, transposed
        values = q.flatten(2).transpose(1, 2).contiguous()  # (B, N, L)
        return kernel(values, transposed).transpose(1, 2).reshape(q.shape)  # (B, L, H, W)

    @staticmethod
    def backward(ctx, grad):
        return _Message.apply(grad, ctx.kernel, not ctx.transposed), None, None


def _all_pairs(f, values):
    """K values (B, N, L), K = exp(-|f_i - f_j|^2 / 2) (symmetric) in blocks of rows of 16 MiB."""
    blocks = f.split(max(1, 2**22 // f[..., 0].numel()), 1)  # (B, rows, d)
    # True differences: |f_i|^2 - 2 f_i f_j + |f_j|^2 would cancel in float32.
    k = (torch.cdist(block, f, compute_mode="donot_use_mm_for_euclid_dist") for block in blocks)
    return torch.cat([dist.square_().mul_(-0.5).exp_() @ values for dist in k], 1)


class _Lattice:
    """Gaussian of unit std over features (B, N, d) on the permutohedral lattice [ABD10].

    The lattice lies in the hyperplane sum(x) = 0 of R^(d+1) and is spanned by the d + 1 directions
    u_i = (1, .., 1) - (d + 1) e_i, which add up to 0. The vertex sum a_i u_i of image k has the
    int64 key sum a_i step_i + k step_image, modulo 2^64, with random steps that add up to 0 too:
    as the key is linear, a neighbour's key is the key plus or minus a step.
    Two vertices share a key, and blend, with probability 2^(v - 64), where 2^v divides their
    difference (mostly v = 0). Only differences matter, some 10^7 in a photograph of 512 pixels at
    the default widths: the chance of any collision is about 10^-12.
    """

    def __init__(self, features):
        b, n, d = features.shape
        random = torch.Generator().manual_seed(0)  # fixed: the same image gives the same result
        steps = torch.randint(-(2**63), 2**63 - 1, (d + 1,), generator=random).to(features.device)
        step_image, steps = steps[d], torch.cat([steps[:d], -steps[:d].sum(0, keepdim=True)])

        # Elevate to the hyperplane, in units of d + 1; at a scale of sqrt(2/3) one blur in every
        # direction has unit std. Slices of that kernel are 4-6 % too wide (measured): so, 1.05.
        i = torch.arange(1, d + 1, device=features.device, dtype=torch.float64)  # not TF32
        basis = torch.ones(d + 1, d).to(i).triu() - torch.diag(i, -1)[:, :d]
        basis *= 1.05 * math.sqrt(2 / 3) / (i * (i + 1)).sqrt()
        x = (basis @ features.view(-1, d).T.to(i)).to(features)  # (d + 1, B * N)

        # Nearest vertex with whole coordinates; rank of the rests from it, 0 the largest.
        whole, rest = x.round(), x - x.round()
        rank = [(rest > r).sum(0) + (rest[:p] == r).sum(0) for p, r in enumerate(rest)]
        rank = torch.stack(rank) + whole.sum(0).long()  # off the plane: move the extremes back
        back = (rank < 0).long() - (rank > d).long()
        rank, whole = rank + back * (d + 1), whole + back

        # Corners of the simplex around x: from that vertex one step each, smallest rest first.
        rest = torch.empty_like(x).scatter_(0, d - rank, x - whole)  # ascending
        weight = rest - torch.cat([rest[-1:] - 1, rest[:-1]])  # barycentric
        move = torch.empty_like(rank).scatter_(0, -rank % (d + 1), steps[:, None].expand_as(rank))
        move[0] = torch.arange(b, device=x.device).repeat_interleave(n) * step_image
        move[0] -= (whole.long() * steps[:, None]).sum(0)  # as (d + 1) e_i = (1, .., 1) - u_i
        key, weight = move.cumsum(0).T.flatten(), weight.T.flatten()  # (B * N * (d + 1),)

        # Vertices: the corners and, empty, all their neighbours: else the blur loses mass in holes.
        ordered, order = key.sort(stable=True)
        own = ordered.unique_consecutive()
        vertex = torch.cat([own, *(own + step for step in (*steps, *-steps))]).unique()  # (M,)

        # Sparse matrices as (column, value, start of row): sum pixels into vertices, blur by
        # (1/4, 1/2, 1/4) in every direction (no neighbour: value 0), sum vertices into pixels.
        self.splat = (order // (d + 1), weight[order], torch.searchsorted(ordered, vertex))
        self.blurs, here = [], torch.arange(len(vertex), device=x.device)
        for step in steps:
            after = torch.searchsorted(vertex, vertex + step).clamp_(max=len(vertex) - 1)
            found = vertex[after] == vertex + step
            low, high = here[found], after[found]  # all pairs of neighbours
            slot, value = here[:, None].repeat(1, 3), x.new_tensor([0.5, 0, 0]).repeat(len(here), 1)
            slot[low, 1], value[low, 1] = high, 0.25
            slot[high, 2], value[high, 2] = low, 0.25
            self.blurs.append((slot, value, None))  # (M, 3)
        slot = torch.empty_like(order).scatter_(0, order, torch.searchsorted(vertex, ordered))
        self.slice = (slot.view(-1, d + 1), weight.view(-1, d + 1), None)

    def __call__(self, values, transposed):
        """values (B, N, L) -> (B, N, L). Slice is splat transposed and every blur is symmetric: the
        transposed filter is the blurs in the opposite order."""
        table = values.view(-1, values.shape[-1])  # (B * N, L), contiguous: 20 times faster
        for i, v, start in (self.splat, *self.blurs[:: -1 if transposed else 1], self.slice):
            table = F.embedding_bag(i, table, start, mode="sum", per_sample_weights=v)
        return table.view(values.shape)
