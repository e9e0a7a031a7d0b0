"""Caudo-Diff: medical segmentation from one labelled image, by diffusion-calibrated labels.

Paper: Caudo-Diff, Pattern Recognition 170, 112007, 2025; only its abstract is public. The idea:
one image is labelled, the exemplar. A segmenter trained on variations of it labels the others,
badly. A deterministic diffusion in a latent space of masks, guided by each image, calibrates these
labels, at several sizes of the image. The segmenter learns from them, most where label and
calibrated label agree, and labels again.

    exemplar --> 1 Expansion --> 2 Segmenter f ------> labels p0 of the unlabelled images
                     |                  ^                          |
                     |                  | 6 train further:         | 3 z_p = E(p0)
                     |                  |   p0 and p1 agree        v
                     +--> 3 masks E, G  +--- p1 = G(z_0) <-- 5 DDIM: z_p -> t* -> z_0
                     +--> 4 Denoiser g(z_t, t, c), guide c = [p0, pixels, features] --^

    python caudo_diff.py                                  synthetic images on a CPU, minutes
    python caudo_diff.py --data folder --data-root mine --exemplar img_017 --no-compare
    python caudo_diff.py --data isic2018                  downloads ISIC 2018 Task 1 (13 GB) first
    python caudo_diff.py --predict photo.jpg --checkpoint out/caudo_diff/mine/seed0-img_017/best.pt

mine/ holds <train|test>/{images,masks}/*. Dice on test images, on a CPU, seed 0: synthetic (128
images, one exemplar, four minutes) 0.898, self-training 0.869, all masks 0.921; a subset of ISIC,
128 x 96 px, pretrained features (300 images, three exemplars, 16 minutes each) 0.860, 0.793, 0.891.

Deviations, or what we chose where no details are public (docs/caudo_diff.md says more):
D1  "Guided" is: classifier-free guidance (Eq. 7) by pixels, label and the features of a pretrained
    encoder, if there is one; and each predicted mask moves to its image's colour edges (Eq. 4; not
    with --anatomy).
D2  t* = 400 of 1000 by four steps of DDIM inversion: inexact, but nothing need come back as it was.
D3  The denoiser learns from the segmenter's errors on strongly changed views, half of them made
    worse: its errors on the pairs it was trained with are too small.
D4  In the first round an image is labelled and calibrated at five sizes, as objects differ more in
    size than variations of one exemplar; the label counts that calibration changes least. (Not
    with --anatomy; self-training has one size.)
D5  Later rounds do not calibrate: the denoiser knows the first segmenter's errors alone.
D6  An image counts by the Dice of p0 and p1 to the sixth power (Eq. 5); from round 2 on by 1.
D7  No validation set: one mask leaves none. Fixed steps, EMA weights. Settings were chosen with
    training and validation masks, never on test: so that is not quite one-shot.
D8  Colours of the unlabelled images set the final level of masks (Eq. 9; not with --anatomy).
D9  If the exemplar's object is one convex piece, final masks are so too (Eq. 10).
"""

import argparse
import copy
import itertools
import math
import os
import re
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads stall a busy CPU 10-50 x

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models
from torchvision.ops.misc import Conv2dNormActivation
from torchvision.transforms.functional import resize

import data
from crf import DenseCRF, unary_from_softmax
from data import DataError, number, whole

METHOD = "caudo_diff"
T = 1000  # diffusion steps: t runs from 0 (nearly clean) to T - 1 (nearly pure noise)
TIMES = [0, 100, 200, 300, 400]  # of DDIM inversion, up to t*; calibration takes them back (ours)
KAPPA = 4.0  # weight of each image's own colour edges (ours)
GUIDANCE = 0.8  # weight w of classifier-free guidance; below 1 trusts the prior of shapes (ours)
FACTOR, LATENT = 4, 8  # pixels per latent, a side, and a latent's channels (ours)
SIZES = (1, 1.5, 2 / 3, 1 / 2, 1 / 3)  # of an image, at which it is labelled and calibrated (ours)
GUIDES = (4, 8, 16)  # strides of a pretrained encoder whose features guide the diffusion (ours)
LEVELS = [k / 2 for k in range(-8, 9)]  # logits, -4 to 4, at which masks may end (ours)
WIDE = 0.97  # share of the most variance that masks, widened, shall still explain (ours)
POOL = 600  # at most so many images are labelled in a round or set a level: bounds time (ours)
ROWS = ["exemplar_copied", "exemplar_only", "self_training", "colour_edges"]
ROWS += ["caudo_diff", "caudo_diff_crf", "full_supervision"]

# ==================================================================================================
# 1. Command line
# ==================================================================================================


def parse_args(argv=None):
    """Parse and check the command line."""
    p = data.make_parser("caudo_diff.py", __doc__)
    add, on_off = p.add_argument, argparse.BooleanOptionalAction
    add("--data", default="synthetic", choices=["synthetic", "isic2018", "folder"], help="data set")
    add("--size", type=data.parse_size, default="64x48", help="network input: N or WIDTHxHEIGHT")
    add("--steps", type=whole(1), default=300, help="steps of first stages; autoencoder: twice")
    add("--batch-size", type=whole(8), default=24, help="images in a training step")
    add("--lr", type=number(1e-9, 10), default=2e-3, help="learning rate of AdamW, along a cosine")
    add("--exemplar", default="auto", help="a training image's id; auto:K is the K-th most typical")
    add("--encoder", default="scratch", help="scratch, efficientnet_lite0, resnet18 ...")
    add("--rounds", type=whole(1), default=3, help="rounds of labelling and retraining")
    add("--round-steps", type=whole(1), default=100, help="training steps of every round")
    add("--anatomy", action="store_true", help="the object is known by its place, not its colour")
    add("--compare", action=on_off, default=True, help="also train what it is compared with")
    if p.parse_args(argv).quick:
        p.set_defaults(steps=6, round_steps=6, batch_size=8)
    return data.parse_flags(p, argv, METHOD)


# ==================================================================================================
# 2. The method's mathematics: pure functions ([G], [paper]: given by others, [O]: ours)
# ==================================================================================================

# Linear betas 1e-4 .. 0.02; ALPHA_BAR[t] is the share of signal variance left after step t.
ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0).float()


def add_noise(x0, t, eps):
    """Add noise eps to x0, both (B, C, H, W), at step t, int64 (B,) in 0..T-1. Returns xt."""
    a = ALPHA_BAR.to(x0.device)[t][:, None, None, None]  # (B, 1, 1, 1)
    return a.sqrt() * x0 + (1 - a).sqrt() * eps  # Eq. 1 [paper]


def ddim_step(zt, x0_hat, t, t_next):
    """One deterministic DDIM step of latents zt (B, C, h, w) from t up or down to t_next, ints."""
    a, a_next = ALPHA_BAR[t].item(), ALPHA_BAR[t_next].item()
    eps_hat = (zt - math.sqrt(a) * x0_hat) / math.sqrt(1 - a)
    return math.sqrt(a_next) * x0_hat + math.sqrt(1 - a_next) * eps_hat  # Eq. 2 [G]


def opponent(x):
    """Log colours (B, 3, H, W) of x in [0, 1]: brightness, yellow-blue, red-green, orthonormal."""
    r, g, b = (x + 0.05).log().unbind(1)  # 0.05: black is not minus infinity
    # no matrix product, as bf16 autocast would round it
    return torch.stack([(r + g + b) / 3**0.5, (r + g - 2 * b) / 6**0.5, (r - g) / 2**0.5], 1)


def from_opponent(y):
    """The inverse of opponent, clamped to [0, 1]: (B, 3, H, W)."""
    light, yellow, red = y[:, 0] / 3**0.5, y[:, 1] / 6**0.5, y[:, 2] / 2**0.5
    x = torch.stack([light + yellow + red, light + yellow - red, light - 2 * yellow], 1)
    return (x.exp() - 0.05).clamp(0, 1)


def contrast_map(x, p):
    """Fisher's discriminant of colours in and outside of p (B, 1, H, W) in each x (B, 3, H, W).

    Returns (B, 1, H, W) in -3..3: towards 1 at the mean colour inside, -1 at that outside.
    """
    y, inside = opponent(x.float()).flatten(2), p.float().flatten(2)  # (B, 3, N), (B, 1, N)
    mean, cov = [], 1e-3 * torch.eye(3, device=y.device)  # 3 % colour noise: grey images too
    for w in (inside + 1e-4, 1 - inside + 1e-4):
        mean.append((y * w).sum(2, keepdim=True) / w.sum(2, keepdim=True))  # (B, 3, 1)
        d = (y - mean[-1]) * w.sqrt()
        cov = cov + (d[:, :, None] * d[:, None]).mean(3)  # (B, 3, 3) within the classes
    normal = torch.linalg.solve(cov, mean[0] - mean[1])  # (B, 3, 1)
    far = ((mean[0] - mean[1]) * normal).sum(1, keepdim=True)  # (B, 1, 1) Mahalanobis, squared
    score = (normal * (y - (mean[0] + mean[1]) / 2)).sum(1, keepdim=True)  # (B, 1, N)
    return (2 * score / (far + 0.3)).clamp(-3, 3).view_as(p)  # Eq. 3 [O]; 0.3: near 0 if alike


def follow_image(x, logits):
    """Move a mask (logits (B, 1, H, W)) to the colour edges of its image x: probabilities."""
    evidence = F.avg_pool2d(contrast_map(x, logits.sigmoid()), 3, 1, 1, count_include_pad=False)
    # colour counts up to 12, the mask up to 6
    return torch.sigmoid(logits.clamp(-6, 6) + KAPPA * evidence)  # Eq. 4 [O]


def variance_explained(x, mask):
    """Share of the variance of x's log colours that mask explains, Otsu's criterion: (B,).

    x (B, 3, H, W) in [0, 1], mask (B, 1, H, W) bool; 0 where it is empty or full.
    """
    y, inside = opponent(x).flatten(2), mask.flatten(2).float()  # (B, 3, N), (B, 1, N)
    y, share = y - y.mean(2, keepdim=True), inside.mean(2)  # (B, 3, N), (B, 1)
    apart = (y * inside).mean(2)  # (B, 3): covariance of colour and mask
    between = apart.square().sum(1) / (share * (1 - share)).clamp(min=1e-9)[:, 0]
    return between / y.square().mean(2).sum(1).clamp(min=1e-9)  # Eq. 9 [G]


def one_object(p):
    """The piece of each mask p > 1/2 that is thick and central, made convex: (B, 1, H, W) bool.

    p (B, 1, H, W) in [0, 1]. About its convex hull: where 24 half-planes that hold the piece meet.
    """
    h, w = p.shape[2:]
    y = torch.linspace(-1, 1, h, device=p.device)[:, None]
    x = torch.linspace(-1, 1, w, device=p.device)
    mask, near = (p > 0.5).float(), torch.exp(-x * x - y * y)  # near the centre; 1/e at the sides
    thick = F.avg_pool2d(p, w // 24 * 2 + 1, 1, w // 24)  # in a window of a 12th of the width
    start = F.one_hot((thick * near * mask).flatten(1).argmax(1), h * w)
    piece, before = start.view_as(mask) * mask, torch.zeros_like(mask)
    while not piece.equal(before):  # it grows from its start as far as the mask does
        before, piece = piece, F.max_pool2d(piece, 3, 1, 1) * mask
    hull = torch.ones_like(mask, dtype=torch.bool)
    for angle in torch.arange(24) * (math.pi / 12):
        along = angle.cos() * x * (w / h) + angle.sin() * y  # (H, W)
        # (B, 1, 1, 1); -inf where p is empty: so is its hull
        far = along.where(piece > 0, -math.inf).amax((2, 3), keepdim=True)
        hull = hull & (along <= far)  # Eq. 10 [G]
    return hull


def guide(x, p, features):
    """The guide c (B, C', h, w): images x (B, 3, H, W) in [0, 1], their labels p (B, 1, H, W) and
    features {stride: (B, C, ., .)} of an Encoder, each set of these with mean 0 and deviation 1."""
    # The pixels of a patch become the channels of the latent that lies there.
    parts = [F.pixel_unshuffle(torch.cat([4 * x - 2, 2 * p - 1], 1), FACTOR)]  # (B, 64, h, w)
    for stride in GUIDES:
        if stride in features:
            h = F.interpolate(features[stride], parts[0].shape[2:], mode="bilinear")
            parts.append(F.group_norm(h, 1))
    return torch.cat(parts, 1).float()


def reliability(p0, p1):
    """Weight (B, 1, H, W) in [0, 1] of labels p1: sure, and agreed with p0, of the same shape."""
    # A whole image counts by its Dice: where calibration changes much, both are wrong more often.
    agreement = overlap_metrics(p0 > 0.5, p1 > 0.5)["dice"].view(-1, 1, 1, 1)
    return agreement**6 * (1 - (p0 - p1).abs()) * (2 * p1 - 1).abs()  # Eq. 5 [O]


def overlap_metrics(pred, mask):
    """Metrics of binary pred and mask (B, 1, H, W): {metric: (B,)}; 1 if both are empty."""
    pred, mask = pred.flatten(1).float(), mask.flatten(1).float()
    inter, p, m = (pred * mask).sum(1), pred.sum(1), mask.sum(1)

    def ratio(x, y):
        return torch.where(y > 0, x / y.clamp(min=1), (p + m == 0).float())

    out = {"dice": ratio(2 * inter, p + m), "iou": ratio(inter, p + m - inter)}
    return out | {"precision": ratio(inter, p), "recall": ratio(inter, m)}


# ==================================================================================================
# 3. Model
# ==================================================================================================


class Block(nn.Module):
    """Two 3 x 3 convolutions with a skip connection, modulated by an embedding (B, c_emb)."""

    def __init__(self, c_in, c_out, c_emb, dropout=0.1):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.film = nn.Linear(c_emb, 2 * c_out)
        self.norm2 = nn.GroupNorm(8, c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # at the start, a block is nearly its skip

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, 1)  # (B, C, 1, 1) each
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return self.skip(x) + self.conv2(self.dropout(h))


class Encoder(nn.Module):
    """A frozen ImageNet network: x (B, 3, H, W) in [0, 1] -> {stride: its last features}.

    name: efficientnet_lite0, scratch (none: {1: x}) or a network of torchvision, fetched when
    first used. Raises DataError for one without features of three strides.
    """

    def __init__(self, name, size, pretrained=True):
        super().__init__()
        lite0 = name == "efficientnet_lite0"  # made for [-1, 1]; torchvision's for mean 0, std 1
        self.mean, self.std = (0.5, 0.5) if lite0 else (0.449, 0.226)
        self.layers, self.channels = nn.ModuleList(), {}  # {stride: number of channels}
        if name == "scratch":
            return
        try:
            weights = "DEFAULT" if pretrained else None
            if lite0:
                net = data.efficientnet_lite0(pretrained)
            else:
                net = models.get_model(name, weights=weights)
            for i, layer in enumerate(getattr(net, "features", net.children())):
                if i and isinstance(layer, nn.AdaptiveAvgPool2d | Conv2dNormActivation):
                    break  # from here on it serves classification only
                self.layers.append(layer)
            self.eval().requires_grad_(False).to(memory_format=torch.channels_last)
            features = self(torch.zeros(1, 3, *size))
            self.channels = {stride: h.shape[1] for stride, h in features.items()}
            if len(self.channels) < 3:
                raise ValueError("it has no features of growing stride")
        except Exception as error:  # unknown, of another kind, no connection
            why = " ".join(str(error).split())
            raise DataError(f"--encoder {name}: {why}; or take a ResNet") from error

    def forward(self, x):
        if not self.layers:
            return {1: x}
        h, features = (x - self.mean) / self.std, {}
        h = h.contiguous(memory_format=torch.channels_last)
        for layer in self.layers:
            h = layer(h)
            stride = 2 ** math.ceil(math.log2(x.shape[3] / h.shape[3]))
            if stride > 1:
                features[stride] = h  # a later layer of this stride replaces it
        return features


def convs(c_in, c_out, stride=1):
    """Two 3 x 3 convolutions, each with GroupNorm and SiLU; the first one has the stride."""
    layers = []
    for c, s in ((c_in, stride), (c_out, 1)):
        layers += [nn.Conv2d(c, c_out, 3, s, padding=1), nn.GroupNorm(8, c_out), nn.SiLU()]
    return nn.Sequential(*layers)


class Segmenter(nn.Module):
    """f: what an Encoder returns -> logits (B, 1, H, W)."""

    def __init__(self, channels):
        super().__init__()
        self.down, self.up, widths = nn.ModuleList(), nn.ModuleList(), [64, 48, 32, 24]
        if not channels:  # from scratch: features of its own, at the strides 2, 4, 8, 16
            channels, widths = {2: 16, 4: 24, 8: 32, 16: 48}, [48, 32, 24]
            self.down.extend([convs(12, 16), convs(16, 24, 2), convs(24, 32, 2), convs(32, 48, 2)])
        *skips, c = channels.values()
        for skip, width in zip(reversed(skips), widths, strict=False):
            self.up.append(convs(c + skip, width))
            c = width
        self.stride = min(channels)
        self.head = nn.Conv2d(c, self.stride**2, 3, padding=1)

    def forward(self, features):
        if self.down:
            h, features = F.pixel_unshuffle(4 * features[1] - 2, 2), {}  # (B, 12, H/2, W/2)
            for i, layer in enumerate(self.down):
                h = features[i] = layer(h)
        *skips, h = features.values()
        for up, skip in zip(self.up, reversed(skips), strict=True):
            h = up(torch.cat([F.interpolate(h, skip.shape[2:]), skip], 1))
        return F.pixel_shuffle(self.head(h), self.stride).float()


class Autoencoder(nn.Module):
    """Mask encoder E: (B, 1, H, W) in [0, 1] -> latent (B, 8, H/4, W/4); decoder G: to logits."""

    def __init__(self, width=48):
        super().__init__()
        conv, act, c = partial(nn.Conv2d, kernel_size=3, padding=1), nn.SiLU(), FACTOR**2
        down, up = nn.PixelUnshuffle(FACTOR), nn.PixelShuffle(FACTOR)
        self.encoder = nn.Sequential(down, conv(c, width), act, conv(width, LATENT))
        layers = conv(LATENT, width), act, conv(width, width), act, conv(width, c), up
        self.decoder = nn.Sequential(*layers)

    def encode(self, mask):
        return self.encoder(2 * mask - 1).float()

    def decode(self, z):
        return self.decoder(z).float()

    def forward(self, mask):
        """The latent, and the logits of what G makes of it with noise: in training."""
        z = self.encode(mask)
        return z, self.decode(z + 0.05 * torch.randn(z.shape).to(z))


class Denoiser(nn.Module):
    """Guided denoiser g(zt, t, c) -> x0_hat: latents (B, C, h, w), t (B,), guide c or zeros."""

    def __init__(self, channels, width=32):
        super().__init__()
        c_emb, c_guide = 4 * width, 4 * FACTOR**2 + sum(channels.get(k, 0) for k in GUIDES)
        self.time = nn.Sequential(nn.Linear(64, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.stem = nn.Conv2d(LATENT + c_guide, width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(width, width, c_emb) for _ in range(4))
        self.norm, self.head = nn.GroupNorm(8, width), nn.Conv2d(width, LATENT, 3, padding=1)
        nn.init.zeros_(self.head.weight)

    def forward(self, zt, t, c):
        t = torch.as_tensor(t, device=zt.device).expand(len(zt))
        freq = torch.exp(-math.log(1e4) * torch.arange(32, device=zt.device) / 32)
        phase = t.float()[:, None] * freq  # (B, 32)
        emb = F.silu(self.time(torch.cat([phase.sin(), phase.cos()], 1)))
        h = self.stem(torch.cat([zt, c], 1).contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            h = block(h, emb)  # (B, width, h, w)
        v = self.head(F.silu(self.norm(h))).float()
        a = ALPHA_BAR.to(zt.device)[t][:, None, None, None]
        # ours: by v, x0_hat tends to zt as t goes to 0, where inversion starts
        return a.sqrt() * zt - (1 - a).sqrt() * v  # Eq. 6 [G]


# ==================================================================================================
# 4. Inference
# ==================================================================================================


class Context(NamedTuple):
    """What all stages share; a stage is the training of one network."""

    args: argparse.Namespace
    folder: Path
    fingerprints: dict  # of the data and the exemplar
    encoder: nn.Module  # frozen, or {1: x}
    nets: dict  # {stage: network}, of the finished stages
    seconds: dict  # {stage: seconds}
    labels: dict  # {method: what label returned in round 1}
    levels: dict  # {stage: logit at which its masks end}; 0 where nothing else is said
    convex: bool  # the exemplar's mask is one convex object: final masks are made so


def autocast(args):
    """bfloat16 autocast on the run's device if --amp is on."""
    return torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.amp == "on")


def batched(function, *tensors):
    """Apply function to chunks of tensors (N, ...); its outputs, concatenated on the CPU."""
    chunks = zip(*(x.split(64) for x in tensors), strict=True)
    return torch.cat([function(*chunk).cpu() for chunk in chunks])


def consensus(masks):
    """Majority of raters, (B, R, H, W) -> (B, 1, H, W) bool; a tie counts as lesion."""
    return masks.float().mean(1, keepdim=True) >= 0.5


@torch.no_grad()
def segment(ctx, stage, img):
    """Probabilities (B, 1, H, W) of images uint8 (B, 3, H, W) by the segmenter of a stage, shifted
    so that its masks end at 1/2."""
    features = ctx.encoder(img.to(ctx.args.device).float() / 255)  # float32
    with autocast(ctx.args):
        return (ctx.nets[stage](features) - ctx.levels.get(stage, 0)).sigmoid()


def choose_level(ctx, stage, images):
    """Choose the level of a stage's masks by the colours of unlabelled images, uint8 (N, 3, H, W).

    Annotators draw wider than the masks that explain most of the colours' variance: the lowest
    level counts that still explains WIDE of the most.
    """

    def explained(img):
        x = img.to(ctx.args.device).float() / 255
        logits = torch.logit(segment(ctx, stage, img), 1e-4)
        return torch.stack([variance_explained(x, logits > level) for level in LEVELS], 1)

    scores = batched(explained, images).mean(0)  # (levels,)
    if scores.max() > 0:  # something is found
        ctx.levels[stage] = LEVELS[(scores >= WIDE * scores.max()).nonzero()[0].item()]


@torch.no_grad()
def calibrate(ctx, img, p0):
    """Labels p0 (B, 1, H, W) of img uint8 -> states (B, len(TIMES), H, W), t* to 0, last is p1."""
    ae, g = ctx.nets["autoencoder"], ctx.nets["denoiser"]
    x, p0 = img.to(ctx.args.device).float() / 255, p0.to(ctx.args.device)
    c = guide(x, p0, ctx.encoder(x))
    with autocast(ctx.args):
        z = ae.encode(p0)  # (B, C, h, w)
        unguided = torch.zeros_like(c)
        for t, t_next in itertools.pairwise(TIMES):  # up: DDIM inversion
            z = ddim_step(z, g(z, t, unguided), t, t_next)
        way = [z]
        for t, t_next in itertools.pairwise(TIMES[::-1]):  # and down
            x0_hat = torch.lerp(g(z, t, unguided), g(z, t, c), GUIDANCE)  # Eq. 7 [G]
            if not ctx.args.anatomy:
                x0_hat = ae.encode(follow_image(x, ae.decode(x0_hat)))
            z = ddim_step(z, x0_hat, t, t_next)
            way.append(z)
        return torch.cat([ae.decode(z).sigmoid() for z in way], 1)


def label_sizes(ctx, img, method="caudo_diff"):
    """Steps 2, 3, 5 of images uint8 (B, 3, H, W): p0 and its way to p1, (B, 1 + len(TIMES), H, W).

    Of the labels at several sizes of an image that counts which calibration changes least (D4).
    The row colour_edges calibrates by Eq. 4 alone, to tell what diffusion is worth: p0 and p1.
    """
    size, ways, agreements = img.shape[2:], [], []
    sizes = [[round(side * factor / 8) * 8 for side in size] for factor in SIZES]
    least = 32 if ctx.encoder.layers else 16  # pixels a side; pretrained encoders divide by 32
    sizes = [size] if ctx.args.anatomy else [s for s in sizes if s == [*size] or min(s) >= least]
    for sides in sizes:
        resized = resize(img, sides)
        p0 = segment(ctx, "exemplar", resized)
        if method == "colour_edges":
            x = resized.to(p0.device).float() / 255
            way = torch.cat([p0, follow_image(x, torch.logit(p0, 1e-4))], 1)
        else:
            way = torch.cat([p0, calibrate(ctx, resized, p0)], 1)
        ways.append(F.interpolate(way, size, mode="bilinear"))
        agreement = overlap_metrics(p0 > 0.5, way[:, -1:] > 0.5)["dice"]  # (B,)
        agreements.append(agreement * (p0 > 0.5).flatten(1).any(1))  # 0 where nothing is found
    best = torch.stack(agreements).argmax(0)  # (B,)
    return torch.stack(ways)[best, torch.arange(len(img))]


def label(ctx, method, r, images):
    """Labels of up to POOL images in round r: indices, p0 and p1 (n, 1, H, W).

    They are by the segmenter of the round before; caudo_diff and colour_edges calibrate round 1.
    """
    if r == 1 and method in ctx.labels:
        return ctx.labels[method]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(ctx.args.seed + r))
    index = order[:POOL]  # drawn anew in every round
    if r == 1 and method in ("caudo_diff", "colour_edges"):
        ends = batched(lambda img: label_sizes(ctx, img, method)[:, [0, -1]], images[index])
        p0, p1 = ends.split(1, 1)
    else:
        before = "exemplar" if r == 1 else f"{method}_{r - 1}"
        p0 = p1 = batched(partial(segment, ctx, before), images[index])
    if r == 1:
        ctx.labels[method] = index, p0, p1  # for the table of pseudo-labels too
    return index, p0, p1


def crf_refine(p, img):
    """Refine probabilities p (B, 1, H, W) of images uint8 (B, 3, H, W) by the dense CRF."""
    sxy = 10 * img.shape[3] / 64  # the bilateral kernel alone; its widths and weight are ours
    crf = DenseCRF(sxy_bilateral=sxy, srgb=8, compat_bilateral=3, compat_gaussian=0)
    return crf(unary_from_softmax(torch.cat([1 - p, p], 1)), img)[:, 1:]


def segment_photo(photo, ctx):
    """Segment a photo: mask, overlay and probability in its own size, and the mask's share."""
    p = segment(ctx, f"caudo_diff_{ctx.args.rounds}", photo.small[None]).cpu()  # (1, 1, H, W)
    soft = p
    if ctx.convex:  # smoothed, or else its steps would be enlarged too
        soft = F.avg_pool2d(one_object(p).float(), 3, 1, 1, count_include_pad=False)
    p, soft = data.enlarge(torch.cat([p, soft], 1)[0], photo)  # (h, w)
    mask = soft > 0.5
    pictures = {
        "mask": mask.byte().numpy() * 255,
        "overlay": data.outline(photo.img.permute(1, 2, 0).numpy(), mask, (255, 230, 0)),
        "probability": data.colour_map(p),
    }
    return pictures, {"share of the image": f"{mask.float().mean():.4f}"}


# ==================================================================================================
# 5. Evaluation and figures
# ==================================================================================================


def means(pred, mask):
    """Metrics of bool pred and mask (N, 1, H, W), mean over the images: {metric: number}."""
    return {m: x.mean().item() for m, x in overlap_metrics(pred, mask).items()}


def evaluate(ctx, test, mask):
    """Test rows {row: {metric: number}} and Caudo-Diff's masks (N, 1, H, W); mask: exemplar's."""
    truth = consensus(test.masks)
    probs = {"exemplar_copied": mask.float().expand_as(truth)}
    for row in ROWS[1:]:
        stage = row if row == "full_supervision" else f"{row}_{ctx.args.rounds}"
        if stage in ctx.nets:
            probs[row] = batched(partial(segment, ctx, stage), test.images)
        elif row == "caudo_diff_crf":
            probs[row] = batched(crf_refine, probs["caudo_diff"], test.images)
    masks = {row: p > 0.5 for row, p in probs.items()}
    if ctx.convex:
        for row in probs.keys() - {"exemplar_copied", "full_supervision"}:  # of their own shapes
            masks[row] = batched(one_object, probs[row])
    return {row: means(pred, truth) for row, pred in masks.items()}, masks["caudo_diff"]


def draw_expansion(expansion, path):
    """Draw the exemplar and 15 pairs made from it, with the outlines of their masks."""
    torch.manual_seed(0)
    x, m = expansion(15)
    x, m = torch.cat([expansion.img, x]).cpu(), torch.cat([expansion.mask, m]).cpu() > 0.5
    x = (x * 255).byte().permute(0, 2, 3, 1).numpy()
    tiles = [(data.outline(a, b[0]), "") for a, b in zip(x, m, strict=True)]
    rows = [("exemplar,\nthen pairs\nmade of it", tiles[:8]), ("", tiles[8:])]
    data.draw_sheet([""] * 8, rows, path)


def draw_calibration(ctx, test, pred, path):
    """Draw the best, median and worst two test images by Dice of pred, the final masks."""
    truth = consensus(test.masks)
    order = overlap_metrics(pred, truth)["dice"].argsort(descending=True).tolist()
    half, rows = (len(order) - 1) // 2, []
    picks = [("best", i) for i in order[:2]]
    picks += [("median", i) for i in order[half : half + 2]]
    picks += [("worst", i) for i in order[-2:]]
    for name, i in picks:
        photo, way = test.images[i], label_sizes(ctx, test.images[i, None])[0].cpu()
        maps = torch.cat([way[[0, 1, 3, -1]], pred[i].float()])  # (5, H, W)
        dice = overlap_metrics(maps[:, None] > 0.5, truth[i, None])["dice"]
        photo = photo.permute(1, 2, 0).numpy()
        pictures = [data.outline(photo, truth[i, 0]), *(data.colour_map(p) for p in maps[:4])]
        pictures.append(data.outline(photo, pred[i, 0], (255, 230, 0)))
        captions = ["", *(f"Dice {d:.2f}" for d in dice)]
        rows.append((f"{name}\n{test.ids[i][-7:]}", list(zip(pictures, captions, strict=True))))
    titles = ["image + truth", "first label p0", f"t = {TIMES[-1]}", f"t = {TIMES[-3]}"]
    data.draw_sheet([*titles, "calibrated p1", "Caudo-Diff"], rows, path)


# ==================================================================================================
# 6. Exemplar expansion, batches, losses and training
# ==================================================================================================


def uniform(low, high, b, *shape):
    """Random numbers in [low, high] from torch's global CPU generator: (b, *shape or (1, 1, 1))."""
    return low + (high - low) * torch.rand(b, *(shape or (1, 1, 1)))


def field(b, cells, size):
    """Smooth random fields (b, 1, *size) of standard deviation about 1, cells bumps a side."""
    z = 1.3 * torch.randn(b, 1, cells, cells)
    return F.interpolate(z, size, mode="bicubic", align_corners=True)


class Expansion:
    """Step 1: draws labelled pairs, all from one exemplar; other images lend their skin."""

    def __init__(self, img, mask, images, args):  # uint8 (3, H, W), bool (1, H, W), (N, 3, H, W)
        self.images, self.mask = images.to(args.device), mask[None].to(args.device).float()
        self.img = img[None].to(args.device).float() / 255
        h, w = mask.shape[1:]
        y, x = mask[0].nonzero().float().mean(0).tolist()
        self.centre = torch.tensor([(2 * x + 1) / w - 1, (2 * y + 1) / h - 1])  # in [-1, 1]
        # An object lies anywhere, at any angle, 0.9 to 1.8 times as large.
        self.place, self.spread, self.turn, self.scale = torch.zeros(2), 0.5, math.pi, (0.9, 1.82)
        self.alone, self.flips = 1 / 3, True  # alone: share of pairs with nothing but the object
        if args.anatomy:  # near its place, turned by up to 15 degrees, 0.8 to 1.3 times as large
            self.place, self.spread, self.turn, self.scale = self.centre, 0.3, 0.26, (0.78, 1.28)
            self.alone, self.flips = 0.0, False
        # the object's radius, were it a disc, in sides of the image; colours 2 to 7 px around it
        self.radius = math.sqrt(self.mask.mean().item() / math.pi)
        ring = F.max_pool2d(self.mask, 15, 1, 7) - F.max_pool2d(self.mask, 3, 1, 1)
        self.around = (opponent(self.img) * ring).sum((2, 3), keepdim=True) / (ring.sum() + 1e-6)

    def warp(self, scale, spread, padding, elastic=1.0):
        """Turned, squeezed, elastic copies magnified by scale (n,): images, masks (n, C, H, W)."""
        n, (h, w) = len(scale), self.img.shape[2:]
        turn = self.turn * (2 * torch.rand(n) - 1)
        flip = torch.randint(0, 2, (n,)) * 2 - 1 if self.flips else 1  # mirrored or not
        squeeze = torch.exp(0.2 * torch.randn(n))  # narrower and higher by 22 % (deviation)
        cos, sin, ratio = turn.cos() / scale, turn.sin() / scale, w / h
        rows = [cos * squeeze * flip, -sin / ratio / squeeze, sin * ratio * squeeze * flip]
        matrix = torch.stack([*rows, cos / squeeze], 1).view(n, 2, 2)
        to = self.place[:, None] + spread * (2 * torch.rand(n, 2, 1) - 1)  # its centre, new
        theta = torch.cat([matrix, self.centre[:, None] - matrix @ to], 2)
        grid = F.affine_grid(theta, (n, 1, h, w), align_corners=False)
        # elastic: 4 and 7 bumps a side shift pixels by up to 8 and 4 % of the side (one deviation)
        for cells, size in ((4, 0.16), (7, 0.08)):
            z = torch.randn(n, 2, cells, cells) * uniform(0, size * elastic, n)
            z = F.interpolate(z / scale.clamp(min=0.5).view(n, 1, 1, 1), (h, w), mode="bicubic")
            grid = grid + z.permute(0, 2, 3, 1)
        copies = torch.cat([self.img, self.mask], 1).expand(n, -1, -1, -1)
        warped = F.grid_sample(copies, grid.to(copies), "bilinear", padding, align_corners=False)
        return warped[:, :3], warped[:, 3:]

    def warped(self, n):
        """n warps of the exemplar: log colours (n, 3, H, W) and masks (n, 1, H, W)."""
        low, high = self.scale
        scale = low * (high / low) ** torch.rand(n)
        x, mask = self.warp(scale, self.spread, "reflection")
        return opponent(x.clamp(0, 1)), mask

    def pasted(self, n):
        """As warped, the object alone, on windows at the border of random unlabelled images."""
        radius = 0.1 * 4.2 ** torch.rand(n)  # of the object: 0.1 to 0.42 of the side
        x, mask = self.warp(radius / self.radius, 0.6, "zeros", elastic=1.5)
        j = torch.randint(len(self.images), (n,))
        side = 0.25 + 0.2 * torch.rand(n, 1)  # of the window, in sides of the image
        place = torch.randint(0, 2, (n, 2)) * 2.0 - 1  # of the window's centre: a corner
        along = torch.randint(0, 2, (n,))  # and then anywhere along one of its sides
        place[torch.arange(n), along] = 2 * torch.rand(n) - 1
        theta = torch.cat([torch.eye(2) * side[:, :, None], (place * (1 - side))[:, :, None]], 2)
        grid = F.affine_grid(theta, (n, 1, *mask.shape[2:]), align_corners=False).to(x)
        # Its outer pixels fade to black, as at the rim of a dermatoscope, which helps.
        background = F.grid_sample(self.images[j].float() / 255, grid, align_corners=False)
        return opponent(background) + mask * (opponent(x) - self.around), mask

    def __call__(self, b):
        """Draw images (b, 3, H, W) in [0, 1] and masks (b, 1, H, W) in {0, 1}."""
        alone = round(b * self.alone)
        y, m = self.warped(b - alone)
        if alone:
            pairs = zip((y, m), self.pasted(alone), strict=True)
            y, m = (torch.cat(pair) for pair in pairs)
        # the object's contrast to the rest
        area, rest = (w.sum((2, 3), keepdim=True) + 1 for w in (m, 1 - m))
        contrast = (y * m).sum((2, 3), keepdim=True) / area
        contrast = contrast - (y * (1 - m)).sum((2, 3), keepdim=True) / rest
        # becomes 0.3 to 1.5 times what it is, in each colour +- 0.2 (one deviation), within a
        # border between sharp and 5 px wide
        soft = torch.lerp(m, F.avg_pool2d(m, 5, 1, 2), uniform(0, 1, b).to(m))
        gain = uniform(-0.7, 0.5, b) + 0.2 * torch.randn(b, 3, 1, 1)
        y = y + soft * gain.to(m) * contrast
        # and it has a texture of 7 bumps a side, up to 12 % brighter or darker (one deviation)
        y[:, :1] += soft * (uniform(0, 0.2, b) * field(b, 7, m.shape[2:])).to(m)
        return data.augment(from_opponent(y), (m > 0.5).float(), self.flips)


def strong_view(x):
    """Strong photometric changes of images x (B, 3, H, W) in [0, 1]: the same shape."""
    b, mean = len(x), x.mean((2, 3), keepdim=True)
    # light: up to 35 % more, 26 % less, in each colour 13 %, and uneven by up to 15 % (deviation)
    light = torch.exp(uniform(-0.3, 0.3, b) + uniform(-0.12, 0.12, b, 3, 1, 1))
    light = light * (1 + uniform(0, 0.15, b) * field(b, 3, x.shape[2:]))
    # contrast 0.6 to 1.5, gamma 0.74 to 1.35, grain up to 3 % (deviation)
    x = (mean + (x - mean) * torch.exp(uniform(-0.5, 0.4, b)).to(x)) * light.to(x)
    x = x.clamp(0, 1) ** torch.exp(uniform(-0.3, 0.3, b)).to(x)
    return (x + (torch.randn(x.shape) * uniform(0, 0.03, b)).to(x)).clamp(0, 1)


def corrupt(p):
    """Give masks or predictions p (B, 1, H, W) in [0, 1] the errors of a bad segmenter."""
    b, size, blur = len(p), p.shape[2:], nn.AvgPool2d(7, 1, 3, count_include_pad=False)
    # The border is a slope 13 px wide now, from level 1 inside over 0 to -1. A shift of the level
    # moves it: evenly by up to 3 px; in 4 and 8 waves a side by up to 3 and 2 px (one deviation).
    shift = uniform(-0.7, 0.7, b) + uniform(0, 0.6, b) * field(b, 4, size)
    shift = shift + uniform(0, 0.45, b) * field(b, 8, size)
    level = 2 * blur(blur(p)) - 1 + shift.to(p)
    # False blobs, in 29 % of the masks, and holes, in 33 %: where a field of 6 or 5 bumps is high.
    add = (uniform(-3, 1.2, b).clamp(min=0) * (1.3 * field(b, 6, size) - 0.8)).to(p)
    drop = (uniform(-3, 1.5, b).clamp(min=0) * (1.3 * field(b, 5, size) - 0.6)).to(p)
    level = torch.where(add > 0, torch.maximum(level, add), level)
    level = torch.where(drop > 0, torch.minimum(level, -drop), level)
    return torch.sigmoid(level * uniform(2, 12, b).to(p))  # from unsure to nearly hard


def draw_pairs(ctx, expansion, pool=None):
    """A batch of the segmenter, steps 2 and 6: its input, masks and weights (B, 1, H, W).

    With a pool (images uint8, labels, weights) only a sixth of the batch is of the expansion.
    """
    n = ctx.args.batch_size * 5 // 6 if pool else 0
    x, m = expansion(ctx.args.batch_size - n)
    w = torch.ones_like(m)
    if pool:
        i = torch.randint(len(pool[0]), (n,))
        img, y, weight = (tensor[i].to(x.device).float() for tensor in pool)
        img, both = data.augment(img / 255, torch.cat([y, weight], 1), expansion.flips)
        x, m, w = torch.cat([x, img]), torch.cat([m, both[:, :1]]), torch.cat([w, both[:, 1:]])
    return ctx.encoder(strong_view(x)), m, w


def draw_labelled(ctx, labelled):
    """A batch of full supervision, the ceiling: each image with the mask of one random rater."""
    i = torch.randint(len(labelled), (ctx.args.batch_size,))
    rater = torch.randint(labelled.masks.shape[1], (ctx.args.batch_size,))
    x, m = labelled.images[i], labelled.masks[i, rater][:, None]  # (B, 3, H, W), (B, 1, H, W)
    x, m = x.to(ctx.args.device).float() / 255, m.to(ctx.args.device).float()
    x, m = data.augment(x, m, not ctx.args.anatomy)
    return ctx.encoder(strong_view(x)), m, torch.ones_like(m)


def draw_masks(ctx, expansion):
    """A batch of the autoencoder, step 3: masks (2 B, 1, H, W), half of them bad."""
    m = expansion(ctx.args.batch_size)[1]
    return [torch.cat([m, corrupt(m)])]


@torch.no_grad()
def draw_latents(ctx, expansion):
    """A batch of the denoiser, step 4: inputs zt (B, 8, h, w), t (B,), guide c; the target z0."""
    b, ae = ctx.args.batch_size, ctx.nets["autoencoder"]
    x, m = expansion(b)
    x = torch.cat([x[: b // 4], strong_view(x[b // 4 :])])
    features = ctx.encoder(strong_view(strong_view(x)))  # so changed that the segmenter errs
    with autocast(ctx.args):
        p = ctx.nets["exemplar"](features).sigmoid()
        p = torch.where(uniform(0, 1, b).to(x) < 0.5, p, corrupt(p))
        z0 = ae.encode(m)
    c = guide(x, p, ctx.encoder(x)) * (uniform(0, 1, b) > 0.15).to(x)  # 15 % unguided, for Eq. 7
    t = torch.randint(T, (b,)).to(x.device)
    return (add_noise(z0, t, torch.randn(z0.shape).to(x)), t, c), z0


def segmenter_loss(net, features, mask, weight):
    """Weighted cross-entropy plus soft Dice: mask, weight (B, 1, H, W)."""
    logits = net(features)
    bce = F.binary_cross_entropy_with_logits(logits, mask, weight, reduction="sum")
    p, m = logits.sigmoid() * weight, mask * weight
    overlap = (2 * (p * mask).sum((1, 2, 3)) + 1) / (p.sum((1, 2, 3)) + m.sum((1, 2, 3)) + 1)
    return bce / weight.sum().clamp(min=1) + 1 - overlap.mean()


def autoencoder_loss(net, m):
    """Reconstruct masks m (B, 1, H, W) from latents with noise; keeps these at unit variance."""
    z, logits = net(m)
    unit = z.mean().square() + (z.std() - 1).square()
    return F.binary_cross_entropy_with_logits(logits, m) + 0.1 * unit


def denoiser_loss(net, inputs, z0):
    """Mean squared error of z0 over 1 - a: nearly that of v (Eq. 6). inputs: zt, t, c."""
    _, t, _ = inputs
    a = ALPHA_BAR.to(z0.device)[t][:, None, None, None]
    return ((net(*inputs) - z0).square() / (1 - a + 0.02)).mean()  # Eq. 8 [O]


@torch.no_grad()
def update_ema(ema, net, decay):
    """Move the weights of ema towards net's; buffers, such as running means, are copied."""
    for old, new in zip(ema.parameters(), net.parameters(), strict=True):
        old.lerp_(new, 1 - decay)
    for old, new in zip(ema.buffers(), net.buffers(), strict=True):
        old.copy_(new)


def build(ctx, stage):
    """A new network for a stage, on the run's device."""
    channels = ctx.encoder.channels
    nets = {"autoencoder": Autoencoder, "denoiser": partial(Denoiser, channels)}
    net = nets.get(stage, partial(Segmenter, channels))()
    return net.to(ctx.args.device, memory_format=torch.channels_last)


def train(ctx, stage, steps, draw, loss_function=segmenter_loss, start=None):
    """Train a new network, or on from start; the loop of all stages: its EMA goes into ctx.nets.

    draw() returns a batch, loss_function(net, *batch) its loss. last_<stage>.pt is all that
    --resume needs. Each stage has its own seed: it does not depend on what ran before it.
    """
    args, file = ctx.args, ctx.folder / f"last_{stage}.pt"
    torch.manual_seed(int(data.fingerprint(args.seed, stage)[:8], 16))
    net = (copy.deepcopy(start) if start else build(ctx, stage)).train()
    ema = copy.deepcopy(net).eval()
    opt = torch.optim.AdamW(net.parameters(), args.lr, weight_decay=1e-4)

    def rate(k):  # 50 steps of warm-up on half a cosine
        return min(1, (k + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * k / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(opt, rate)
    parts = {"net": net, "ema": ema, "opt": opt, "schedule": schedule}
    saved = data.resume(file, METHOD, args, ctx.fingerprints, parts)
    first, seconds = saved.get("step", 0), saved.get("seconds", 0.0)
    forward, begin = torch.compile(net) if args.compile else net, time.time() - seconds
    bar = data.progress(range(first, steps), stage, steps, first)
    for step in bar:
        batch = draw()  # in float32: bf16 would round the warps' grids by up to a quarter pixel
        with autocast(args):
            loss = loss_function(forward, *batch)
        if not loss.isfinite():
            raise DataError(f"{stage}: loss is {loss:g} at step {step}: lower --lr, or --amp off")
        opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        schedule.step()
        update_ema(ema, net, min(0.99, (step + 1) / (step + 11)))  # forgets the start early
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            seconds = time.time() - begin
            more = {"step": step + 1, "seconds": seconds}
            data.save_checkpoint(file, METHOD, args, ctx.fingerprints, parts, **more)
            with open(ctx.folder / "log.csv", "a", **data.TEXT) as log:
                log.write(f"{stage},{step + 1},{loss:.5f}\n")
    ctx.nets[stage], ctx.seconds[stage] = ema, round(seconds, 1)
    return ema


# ==================================================================================================
# 7. Main
# ==================================================================================================


def choose_exemplar(train_set, wanted):
    """Index of the exemplar by its id; auto:K has the K-th most typical colours, masks unseen."""
    if wanted in train_set.ids:
        return train_set.ids.index(wanted)
    auto, n = re.fullmatch(r"auto(?::(\d+))?", wanted), len(train_set)
    if not (auto and 1 <= int(auto[1] or 1) <= n):
        why = f"not auto, auto:K, nor one of the {n} training images, {train_set.ids[0]} .."
        raise DataError(f"--exemplar {wanted}: {why} (without val/ a tenth of them is set aside)")
    h, w = (side // 4 for side in train_set.images.shape[2:])

    def look(img):  # colours and contrast where it is lit, and what the centre differs by
        x = img.float() / 255
        y = opponent(x)
        lit = torch.sigmoid((x.mean(1, keepdim=True) - 0.15) / 0.03)  # 0 in black frames
        area = lit.sum((2, 3), keepdim=True) + 1
        mean = (y * lit).sum((2, 3), keepdim=True) / area
        std = ((y - mean).square() * lit).sum((2, 3), keepdim=True).div(area).sqrt()
        centre = y[:, :, h:-h, w:-w].mean((2, 3), keepdim=True)
        return torch.cat([mean, std, centre - mean], 1).flatten(1)  # (B, 9)

    looks = batched(look, train_set.images)
    off = (looks - looks.median(0).values).abs()  # (N, 9); then in median deviations
    order = (off / (off.median(0).values + 1e-6)).square().sum(1).argsort()
    return order[int(auto[1] or 1) - 1].item()


def train_all(ctx, expansion, labelled):
    """Train all stages, steps 2, 3, 4 and 6; labelled: the set with its masks, or None.

    All rows take as many steps; full supervision, the ceiling, with the masks of all images.
    """
    n, more, pairs = ctx.args.steps, ctx.args.round_steps, partial(draw_pairs, ctx, expansion)
    first = train(ctx, "exemplar", n, pairs)
    train(ctx, "autoencoder", 2 * n, partial(draw_masks, ctx, expansion), autoencoder_loss)
    train(ctx, "denoiser", n, partial(draw_latents, ctx, expansion), denoiser_loss)
    methods = ["caudo_diff"]
    if labelled:
        methods += ["self_training", "exemplar_only"]
        if not ctx.args.anatomy:
            methods.append("colour_edges")
    for method in methods:
        net, pool = first, None
        for r in range(1, ctx.args.rounds + 1):
            if method != "exemplar_only":
                index, p0, p1 = label(ctx, method, r, expansion.images)
                pool = expansion.images[index], (p1 > 0.5).float(), reliability(p0, p1)
            net = train(ctx, f"{method}_{r}", more, partial(pairs, pool), start=net)
        if not ctx.args.anatomy:
            choose_level(ctx, f"{method}_{ctx.args.rounds}", expansion.images[:POOL])
    if labelled:
        steps = n + ctx.args.rounds * more
        train(ctx, "full_supervision", steps, partial(draw_labelled, ctx, labelled))


def load_run(args, folder, best, fingerprints):
    """The networks of a finished run and its best.pt; fingerprints: of the data, to be checked."""
    state = data.load_checkpoint(best, METHOD, fingerprints)
    encoder = Encoder(args.encoder, args.size, pretrained=False).to(args.device)
    encoder.load_state_dict(state["encoder"])
    known = {name: state[name] for name in ("seconds", "levels", "convex")}
    ctx = Context(args, folder, fingerprints, encoder, nets={}, labels={}, **known)
    for stage, weights in state["nets"].items():
        ctx.nets[stage] = build(ctx, stage).eval()
        ctx.nets[stage].load_state_dict(weights)
    return ctx, state


def pseudo_labels(ctx, labelled, others):
    """Metrics of the labels of the first round, {labels: {metric: number}}.

    labelled: the training set with its masks; others: indices of the unlabelled images in it.
    """
    images = labelled.images[others]
    index, first, _ = label(ctx, "self_training", 1, images)
    _, p0, p1 = label(ctx, "caudo_diff", 1, images)
    labels = {"initial": first, "at_the_best_size": p0, "calibrated": p1}
    if ctx.args.anatomy:  # images are labelled at one size: that row would equal the first
        del labels["at_the_best_size"]
    else:
        labels["colour_edges"] = label(ctx, "colour_edges", 1, images)[2]
    truth = consensus(labelled.masks[others])[index]
    return {name: means(p > 0.5, truth) for name, p in labels.items()}


def load(split, args, images_only=False):
    """A split at --size, with --quick its first 24 images."""
    root, limit = args.data_root, 24 if args.quick else None
    more = {"images_only": images_only, "workers": args.num_workers}
    return data.load_segmentation(args.data, root, split, args.size, limit, **more)


def train_run(test, args, folder):
    """Load the training images, choose the exemplar, train all stages; writes best.pt."""
    train_set = load("train", args, images_only=not args.compare)
    i = choose_exemplar(train_set, args.exemplar)
    exemplar, others = train_set.ids[i], [k for k in range(len(train_set)) if k != i]
    if not others:
        raise DataError(f"{args.data_root}: no unlabelled image beside the exemplar; add some")
    mask = data.load_mask(args.data, args.data_root, "train", exemplar, args.size)  # (1, H, W)
    if mask.all():
        raise DataError(f"--exemplar {exemplar}: its mask covers the whole image; name another")
    fingerprints = {"train": train_set.fingerprint, "test": test.fingerprint}
    fingerprints["exemplar"] = data.fingerprint(exemplar, mask.tolist())
    encoder = Encoder(args.encoder, args.size).to(args.device)
    if not args.resume:
        data.prepare_folder(folder)
    convex = overlap_metrics(one_object(mask[None].float()), mask[None])["dice"] > 0.9
    ctx = Context(args, folder, fingerprints, encoder, {}, {}, {}, {}, convex.item())
    expansion = Expansion(train_set.images[i], mask, train_set.images[others], args)
    draw_expansion(expansion, folder / "figures" / "expansion.png")
    labelled = train_set if args.compare else None  # for the ceiling and the table alone
    train_all(ctx, expansion, labelled)
    more = {"exemplar": exemplar, "mask": mask, "n_unlabelled": len(others)}
    more |= {"encoder": encoder.state_dict(), "levels": ctx.levels, "convex": ctx.convex}
    more["pseudo_labels"] = pseudo_labels(ctx, labelled, others) if labelled else None
    more["nets"] = {stage: net.state_dict() for stage, net in ctx.nets.items()}
    more["seconds"] = ctx.seconds
    data.save_checkpoint(folder / "best.pt", METHOD, args, fingerprints, **more)


def run(args):
    """Train, then evaluate and draw; or only evaluate; or predict."""
    folder = data.run_folder(METHOD, args)
    best = args.checkpoint or folder / "best.pt"
    if args.predict:
        ctx, _ = load_run(args, folder, best, {})
        predictions = folder / "predictions"
        shape = ", each one convex object like the exemplar's" if ctx.convex else ""
        print(f"predictions go to {predictions}{shape}")
        segment_one = partial(segment_photo, ctx=ctx)
        return data.predict_images(args.predict, args.size, predictions, best, segment_one)
    test = load("test", args)
    if not args.eval_only:
        train_run(test, args, folder)
    ctx, state = load_run(args, folder, best, {"test": test.fingerprint})
    rows, pred = evaluate(ctx, test, state["mask"])
    data.print_table(rows)
    more = {"exemplar": state["exemplar"], "n_images": len(test)}
    more["n_unlabelled"] = state["n_unlabelled"]
    if state["pseudo_labels"]:
        more["pseudo_labels"] = state["pseudo_labels"]
        print("\nPseudo-labels of the first round:")
        data.print_table(state["pseudo_labels"])
    data.write_result(folder / "result.json", METHOD, args, rows, seconds=ctx.seconds, **more)
    figure = folder / "figures" / "calibration.png"
    draw_calibration(ctx, test, pred, figure)
    print(f"\n{len(test)} test images, exemplar {state['exemplar']}. Open {figure}")


def main(argv=None):
    """Run the command line; every foreseeable error is one line and exit status 2."""
    with data.one_line_errors("caudo_diff.py"):
        run(parse_args(argv))


if __name__ == "__main__":
    main()
