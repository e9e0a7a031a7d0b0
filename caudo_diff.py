"""Caudo-Diff: medical segmentation from one labelled image, by diffusion-calibrated labels.

Paper: Caudo-Diff, Pattern Recognition 170, 112007, 2025; only its abstract is public. One image is
labelled (the exemplar), the others are not. A segmenter trained on variations of the exemplar
labels the others, badly. A deterministic diffusion in the latent space of masks, guided by each
image, calibrates these labels; the segmenter learns from them where both agree; and so on.

    exemplar --> 1 expansion --> 2 segmenter f --> labels p0, features h of the unlabelled images
                     |                  ^                          |
                     |                  | 6 retrain, weights:      | 3 z_p = E(p0)
                     |                  |   p0 and p1 agree        v
                     +--> 3 masks E, G  +--- p1 = G(z_0) <-- 5 DDIM: z_p -> t* -> z_0
                     +--> 4 denoiser g(z_t, t, c), c = [E(p0), h, pixels, contrast] ----^

Commands:
    python caudo_diff.py                                  synthetic images on a CPU, minutes
    python caudo_diff.py --data isic2018                  downloads ISIC 2018 Task 1 (13 GB) first
    python caudo_diff.py --data folder --data-root mine   mine/<train|test>/{images,masks}/*
    python caudo_diff.py --exemplar auto:3                three exemplars: mean and deviation
    python caudo_diff.py --predict photo.jpg folder       with the trained network

Results: Dice, mean of three exemplars (`--exemplar auto:3`), seed 0, 64 x 48 px, torch 2.15, two
CPU cores; one exemplar with all rows takes 6 minutes; records in docs/results, more in README.md.
                               exemplar only  self-training  Caudo-Diff  + CRF  full supervision
    synthetic, n = 128                 0.824          0.846       0.887  0.889             0.920
    ISIC subset, n = 300               0.776          0.788       0.802  0.808             0.877
    polyps, n = 153 (fails)            0.395          0.343       0.302  0.298             0.601

Deviations. Beyond its outline nothing of the paper is public, so all details are ours; above all:
D1  "Guided" means three things here: classifier-free guidance by c (Eq. 7); c also holds the pixels
    and a contrast map, a colour discriminant fitted to each image, as features learned from one
    exemplar do not carry over; and each predicted mask is moved to the colour edges of its image
    (Eq. 4), as far as the exemplar's own colours find its own mask (colour_share). In our trials on
    validation images the last made most of the difference between calibrated and initial labels.
D2  t* = 900 of 1000 by four steps of DDIM inversion. They are inexact (there_and_back says by how
    much), but calibration is not meant to return what it was given.
D3  The denoiser learns from corrupted masks and from the segmenter's own errors on strongly changed
    views, corrupted too: its errors on the pairs it was trained with are too small.
D4  An image counts by the Dice of p0 and p1 to the sixth power (Eq. 5).
D5  No validation set: one mask leaves none. Fixed steps, EMA weights, threshold 1/2. Settings were
    chosen on masks of synthetic images, of ISIC's training and 100 validation images and of some
    validation frames of the polyps, never of test images; the method itself needs none of them.
"""

import argparse
import contextlib
import copy
import csv
import hashlib
import itertools
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads stall a busy CPU 10-50 x

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm import tqdm

from crf import DenseCRF, unary_from_softmax
from data import (
    IMAGE_SUFFIXES,
    DataError,
    augment,
    load_mask,
    load_segmentation,
    parse_size,
    read_image,
)

METHOD = "caudo_diff"
T = 1000  # diffusion steps: t runs from 0 (nearly clean) to T - 1 (nearly pure noise)
METRICS = ["dice", "iou", "precision", "recall"]
ROWS = {
    "exemplar_only": "exemplar only",
    "self_training": "self-training",
    "caudo_diff_unguided": "Caudo-Diff, unguided",
    "caudo_diff": "Caudo-Diff",
    "caudo_diff_crf": "Caudo-Diff + CRF",
    "full_supervision": "full supervision",
}
# What --predict, --eval-only and --resume must find as it was when the networks were trained.
MODEL_FLAGS = ["width", "size"]
EVAL_FLAGS = [*MODEL_FLAGS, "latent_factor", "steps", "round_steps", "rounds"]
TRAIN_FLAGS = [*EVAL_FLAGS, "data_root", "pool", "lr", "batch_size", "bf16", "t_star", "guidance",
               "kappa", "ddim_steps"]  # fmt: skip

# ==================================================================================================
# 1. Command line
# ==================================================================================================


def positive(text):
    """argparse type: a whole number of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


def parse_args(argv=None):
    """Parse and check the command line; the defaults reproduce the results table."""
    p = argparse.ArgumentParser(
        description="Caudo-Diff: segmentation from one labelled exemplar by calibrated labels",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, on_off = p.add_argument, argparse.BooleanOptionalAction
    add("--data", default="synthetic", choices=["synthetic", "isic2018", "folder"], help="data set")
    add("--data-root", default="data", help="folder that holds, or will receive, the data set")
    add("--size", type=parse_size, default="64x48", help="network input; kernels suit 64x48")
    add("--steps", type=positive, default=300, help="of the segmenter and denoiser (ours)")
    add("--round-steps", type=positive, default=100, help="of every round (ours)")
    add("--epochs", type=positive, help="sets --steps by passes over the training images")
    add("--max-steps", type=positive, help="at most this many steps in every stage")
    add("--batch-size", type=positive, default=24, help="images in a training step")
    add("--lr", type=float, default=2e-3, help="peak of AdamW's cosine schedule (ours)")
    add("--seed", type=int, default=0, help="seed of weights, batches and noise")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--amp", default="auto", choices=["auto", "on", "off"], help="bf16 autocast")
    add("--compile", action="store_true", help="torch.compile the networks in training")
    add("--num-workers", type=positive, default=8, help="threads that decode, first run only")
    add("--out", default="out", help="results go to OUT/caudo_diff/DATA/seedK")
    add("--resume", action="store_true", help="go on from the last checkpoints, exactly")
    add("--eval-only", action="store_true", help="no training: evaluate what was trained")
    add("--checkpoint", help="file for --predict [best.pt in --out]")
    add("--predict", nargs="+", metavar="PATH", help="segment these images or folders of images")
    add("--quick", action="store_true", help="a few steps on a few images: does it run at all?")
    add("--compare", action=on_off, default=True, help="also train what it is compared with")
    add("--exemplar", nargs="+", default=["auto"], metavar="ID", help="ids, or auto, or auto:N")
    add("--rounds", type=positive, default=3, help="rounds of calibration and retraining (ours)")
    add("--pool", type=positive, default=600, help="at most so many images labelled a round (ours)")
    add("--t-star", type=int, default=900, help="the step t* that calibration starts from (ours)")
    add("--guidance", type=float, default=0.8, help="classifier-free guidance weight w (ours)")
    add("--kappa", type=float, default=4.0, help="weight of the image's own colour edges (ours)")
    add("--ddim-steps", type=positive, default=4, help="DDIM steps from 0 to t* and back (ours)")
    add("--latent-factor", type=int, default=4, choices=[4, 8], help="pixels per latent (ours)")
    add("--width", type=int, default=16, help="channels of the first U-Net level (ours)")
    add("--sxy-bilateral", type=float, default=10.0, help="CRF: pixels (ours)")
    add("--srgb", type=float, default=8.0, help="CRF: grey levels (ours)")
    add("--compat-bilateral", type=float, default=3.0, help="CRF: weight (ours)")
    add("--save-every", type=positive, default=200, help="steps between checkpoints")
    args = p.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    if args.quick:
        args.max_steps, args.batch_size = args.max_steps or 6, min(8, args.batch_size)
    if not args.ddim_steps <= args.t_star < T:
        p.error(f"--t-star {args.t_star} must be at least --ddim-steps and below {T}")
    if args.width < 16 or args.width % 16:
        p.error(f"--width {args.width} must be a multiple of 16")
    if args.batch_size < 8:
        p.error("--batch-size must be at least 8: a sixth of it are pairs made from the exemplar")
    if not 0 < args.lr < math.inf:
        p.error("--lr must be positive")
    if not (math.isfinite(args.guidance) and math.isfinite(args.kappa)):
        p.error("--guidance and --kappa must be finite numbers")
    if args.checkpoint and not args.predict:
        p.error("--checkpoint goes with --predict")
    try:
        DenseCRF(5, 3, 0, args.sxy_bilateral, args.srgb, args.compat_bilateral)
    except ValueError as error:
        p.error(f"CRF: {error}")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError):
        p.error(f"--device {args.device} is not usable here; take --device cpu")
    bf16_cpu = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    fast = args.device.startswith("cuda") or bf16_cpu
    args.bf16 = args.amp == "on" or (args.amp == "auto" and fast)
    return args


# ==================================================================================================
# 2. The method's mathematics: pure functions on tensors
# ==================================================================================================

# Linear betas 1e-4 .. 0.02; ALPHA_BAR[t] is the share of signal variance left after step t.
ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0).float()


def add_noise(x0, t, eps):
    """Noise images: x0, eps (B, C, H, W), x0 in [-1, 1]; t (B,) int64 in 0..T-1. Returns xt."""
    a = ALPHA_BAR.to(x0.device)[t][:, None, None, None]  # (B, 1, 1, 1)
    return a.sqrt() * x0 + (1 - a).sqrt() * eps  # Eq. 1 [DiffSeg, G]


def ddim_step(zt, x0_hat, t, t_next):
    """One deterministic DDIM step (eta = 0) of latents zt (B, C, h, w) from t to t_next, ints.

    Up (inversion, t_next > t) or down; the next latent keeps the noise that x0_hat implies.
    """
    a, a_next = ALPHA_BAR[t].item(), ALPHA_BAR[t_next].item()
    eps_hat = (zt - math.sqrt(a) * x0_hat) / math.sqrt(1 - a)
    return math.sqrt(a_next) * x0_hat + math.sqrt(1 - a_next) * eps_hat  # Eq. 2 [Caudo, O]


def ddim_times(args):
    """The steps [0, ..., t*] of the way up; calibration takes them back."""
    return torch.linspace(0, args.t_star, args.ddim_steps + 1).round().long().tolist()


def there_and_back(z, up, down, times):
    """Latents z (B, C, h, w) at times[0] to times[-1] and back: the list of states on the way back.

    up, down: functions (zt, t) -> x0_hat of DDIM inversion and of DDIM, both deterministic.
    With up = down the end differs from z by the error of the discrete steps alone. Measured on a
    trained denoiser under its guide, as a share of the latents' deviation, for 4, 10, 30, 100, 300
    steps: 4.0, 1.8, 0.6, 0.2, 0.1 % from t* = 300, and 27, 17, 12, 6, 3 % from t* = 900.
    """
    for t, t_next in itertools.pairwise(times):
        z = ddim_step(z, up(z, t), t, t_next)
    way = [z]
    for t, t_next in itertools.pairwise(times[::-1]):
        way.append(ddim_step(way[-1], down(way[-1], t), t, t_next))
    return way


def opponent(x):
    """Log colours of x (B, 3, H, W) in [0, 1]: brightness, blue-yellow, red-green, orthonormal.

    They vary nearly independently. No matrix product: bf16 autocast would round it.
    """
    r, g, b = (x + 0.05).log().unbind(1)
    return torch.stack([(r + g + b) / 3**0.5, (r + g - 2 * b) / 6**0.5, (r - g) / 2**0.5], 1)


def from_opponent(y):
    """The inverse of opponent, clamped to [0, 1]."""
    light, blue, red = y[:, 0] / 3**0.5, y[:, 1] / 6**0.5, y[:, 2] / 2**0.5
    x = torch.stack([light + blue + red, light + blue - red, light - 2 * blue], 1)
    return (x.exp() - 0.05).clamp(0, 1)


def colour_statistics(x):
    """Mean and std (B, 3, 1, 1) of the log colours of x (B, 3, H, W) where it is lit.

    Dark corners and black frames are left out: lit (B, 1, H, W) in [0, 1] is also returned.
    """
    y, lit = opponent(x), torch.sigmoid((x.mean(1, keepdim=True) - 0.15) / 0.03)
    n = lit.sum((2, 3), keepdim=True) + 1
    mean = (y * lit).sum((2, 3), keepdim=True) / n
    std = ((y - mean).square() * lit).sum((2, 3), keepdim=True).div(n).sqrt()
    return mean, std, lit


def contrast_map(x, p):
    """How far each pixel's colour is that of the inside of p: x (B, 3, H, W), p (B, 1, H, W).

    Fisher's linear discriminant of the colours inside and outside, fitted to each image alone:
    (B, 1, H, W), 1 at the mean colour inside, -1 at that outside, near 0 if they do not differ.
    """
    y, inside = opponent(x.float()).flatten(2), p.float().flatten(2)  # (B, 3, N), (B, 1, N)
    mean, cov = [], 1e-3 * torch.eye(3, device=y.device)
    for w in (inside + 1e-4, 1 - inside + 1e-4):
        mean.append((y * w).sum(2, keepdim=True) / w.sum(2, keepdim=True))  # (B, 3, 1)
        d = (y - mean[-1]) * w.sqrt()
        cov = cov + (d[:, :, None] * d[:, None]).mean(3)  # (B, 3, 3) within the classes
    normal = torch.linalg.solve(cov, mean[0] - mean[1])  # (B, 3, 1)
    far = ((mean[0] - mean[1]) * normal).sum(1, keepdim=True)  # (B, 1, 1) Mahalanobis, squared
    score = (normal * (y - (mean[0] + mean[1]) / 2)).sum(1, keepdim=True)  # (B, 1, N)
    return (2 * score / (far + 0.3)).clamp(-3, 3).view_as(p)  # Eq. 3 [Caudo, O]


def follow_image(x, logits, kappa):
    """Move a mask (logits (B, 1, H, W)) to the colour edges of its image: probabilities.

    ours: the guide in the latent space that a segmenter trained on one exemplar lacks: what is
    inside and outside differs by other colours in each image, and the image itself tells by which.
    """
    evidence = F.avg_pool2d(contrast_map(x, logits.sigmoid()), 3, 1, 1, count_include_pad=False)
    return torch.sigmoid(logits.clamp(-6, 6) + kappa * evidence)  # Eq. 4 [Caudo, O]


def colour_share(exemplar):
    """How far colours alone find the object of the exemplar (1, 4, H, W), its mask last: 0 to 1.

    ours: 0 up to a Dice of 0.6, 1 from 0.75. Below, colours mislead (polyps, which have the colour
    of the gut); lesions lie above.
    """
    found = contrast_map(exemplar[:, :3], exemplar[:, 3:])
    found = F.avg_pool2d(found, 3, 1, 1, count_include_pad=False) > 0
    dice = overlap_metrics(found, exemplar[:, 3:] > 0.5)["dice"].item()
    return min(1.0, max(0.0, (dice - 0.6) / 0.15))


def uniform(low, high, b, *shape):
    """Random numbers in [low, high] from torch's global CPU generator: (b, *shape or (1, 1, 1))."""
    return low + (high - low) * torch.rand(b, *(shape or (1, 1, 1)))


def field(b, cells, size):
    """Smooth random fields (b, 1, *size) of standard deviation about 1, cells bumps a side."""
    z = 1.3 * torch.randn(b, 1, cells, cells)
    return F.interpolate(z, size, mode="bicubic", align_corners=True)


def corrupt(p):
    """Give masks or predictions p (B, 1, H, W) in [0, 1] the errors of a bad segmenter.

    Borders move in, out and sideways, holes open, blobs appear, confidence changes.
    """
    b, size = len(p), p.shape[2:]
    soft = F.avg_pool2d(p, 7, 1, 3, count_include_pad=False)
    soft = F.avg_pool2d(soft, 7, 1, 3, count_include_pad=False)
    level = uniform(-0.7, 0.7, b) + uniform(0, 0.6, b) * field(b, 4, size)
    level = 2 * soft - 1 + (level + uniform(0, 0.45, b) * field(b, 8, size)).to(p)
    add = (uniform(-3, 1.2, b).clamp(min=0) * (1.3 * field(b, 6, size) - 0.8)).to(p)
    drop = (uniform(-3, 1.5, b).clamp(min=0) * (1.3 * field(b, 5, size) - 0.6)).to(p)
    level = torch.where(add > 0, torch.maximum(level, add), level)
    level = torch.where(drop > 0, torch.minimum(level, -drop), level)
    return torch.sigmoid(level * uniform(2, 12, b).to(p))


def reliability(p0, p1, power=6):
    """Weight of each pixel of labels p1, all (B, 1, H, W) in [0, 1]: sure, and agreed with p0.

    A whole image counts by the Dice of p0 and p1: where calibration changes much, both are wrong
    more often. Two empty labels agree: what holds no object for both is learned as background.
    """
    agreement = overlap_metrics(p0 > 0.5, p1 > 0.5)["dice"].view(-1, 1, 1, 1)
    return agreement**power * (1 - (p0 - p1).abs()) * (2 * p1 - 1).abs()  # Eq. 5 [Caudo, O]


def overlap_metrics(pred, mask):
    """Per-image metrics of binary pred and mask, both (B, 1, H, W): a dict of (B,) tensors.

    An empty prediction of an empty mask scores 1 throughout. thresholded_jaccard is the ISIC
    challenge's: IoU, counted as 0 below 0.65.
    """
    pred, mask = pred.flatten(1).float(), mask.flatten(1).float()
    inter, p, m = (pred * mask).sum(1), pred.sum(1), mask.sum(1)

    def ratio(x, y):
        return torch.where(y > 0, x / y.clamp(min=1), (p + m == 0).float())

    iou = ratio(inter, p + m - inter)
    out = {"dice": ratio(2 * inter, p + m), "iou": iou}
    out |= {"precision": ratio(inter, p), "recall": ratio(inter, m)}
    return out | {"thresholded_jaccard": torch.where(iou < 0.65, torch.zeros_like(iou), iou)}


def segmenter_loss(net, x, mask, weight=None):
    """Weighted cross-entropy plus soft Dice of net's mask of x: mask, weight (B, 1, H, W)."""
    logits, weight = net(x)[0], torch.ones_like(mask) if weight is None else weight
    bce = F.binary_cross_entropy_with_logits(logits, mask, weight, reduction="sum")
    p, m = logits.sigmoid() * weight, mask * weight
    overlap = (2 * (p * mask).sum((1, 2, 3)) + 1) / (p.sum((1, 2, 3)) + m.sum((1, 2, 3)) + 1)
    return bce / weight.sum().clamp(min=1) + 1 - overlap.mean()


# ==================================================================================================
# 3. Model
# ==================================================================================================


class Block(nn.Module):
    """Two 3 x 3 convolutions with a skip, scaled and shifted by the embedding of (t, y)."""

    def __init__(self, c_in, c_out, c_emb, dropout=0.1):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.film = nn.Linear(c_emb, 2 * c_out)
        self.norm2, self.conv2 = nn.GroupNorm(8, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # each block starts as its skip

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, 1)  # (B, C, 1, 1) each
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return self.skip(x) + self.conv2(self.dropout(h))


class UNet(nn.Module):
    """Segmenter f: x (B, 3, H, W) in [0, 1] -> logits (B, 1, H, W), h (B, 2 width, H/8, W/8)."""

    def __init__(self, width=32):
        super().__init__()
        widths, c = [width, width * 3 // 2, width * 2], width
        self.stem = nn.Conv2d(12, c, 3, padding=1)
        self.down, self.shrink, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for c_next in widths:
            self.down.append(Block(c, c_next, 1))
            halve = c_next < widths[-1]  # all levels but the last
            self.shrink.append(nn.Conv2d(c_next, c_next, 3, 2, 1) if halve else nn.Identity())
            c = c_next
        self.middle = Block(c, c, 1)
        for c_next in reversed(widths):
            self.up.append(Block(c + c_next, c_next, 1))
            c = c_next
        self.head = nn.Sequential(nn.GroupNorm(8, c), nn.SiLU(), nn.Conv2d(c, 4, 3, padding=1))

    def forward(self, x):
        emb = x.new_zeros(len(x), 1)  # no time here: each block learns a constant instead
        x = F.pixel_unshuffle(4 * x - 2, 2)  # (B, 12, H/2, W/2): a quarter of the cost
        h, skips = self.stem(x.contiguous(memory_format=torch.channels_last)), []
        for block, shrink in zip(self.down, self.shrink, strict=True):
            h = block(h, emb)
            skips.append(h)
            h = shrink(h)
        h = bottleneck = self.middle(h, emb)
        for i, block in enumerate(self.up):
            h = F.interpolate(h, scale_factor=2.0) if i else h
            h = block(torch.cat([h, skips.pop()], 1), emb)
        return F.pixel_shuffle(self.head(h), 2).float(), bottleneck.float()


class Autoencoder(nn.Module):
    """Mask encoder E: (B, 1, H, W) in [0, 1] -> latent (B, 8, H/f, W/f); decoder G: to logits."""

    def __init__(self, factor, channels=8, width=48):
        super().__init__()
        up, down, c = nn.PixelShuffle(factor), nn.PixelUnshuffle(factor), factor**2

        def convs(*widths):  # 3 x 3 convolutions with SiLU between them
            layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths)]
            return [y for layer in layers for y in (layer, nn.SiLU())][:-1]

        self.encoder = nn.Sequential(down, *convs(c, width, channels))
        self.decoder = nn.Sequential(*convs(channels, width, width, c), up)

    def encode(self, mask):
        return self.encoder(2 * mask - 1).float()

    def decode(self, z):
        return self.decoder(z).float()


class Denoiser(nn.Module):
    """Guided denoiser g(zt, t, c) -> x0_hat: latents (B, C, h, w), t (B,), guide c or zeros."""

    def __init__(self, factor, c_h, channels=8, width=32):
        super().__init__()
        c_emb, self.factor = 4 * width, factor
        self.time = nn.Sequential(nn.Linear(64, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.project = nn.Conv2d(c_h, 16, 1)
        self.stem = nn.Conv2d(2 * channels + 16 + 5 * factor**2, width, 3, padding=1)
        self.fine = nn.ModuleList(Block(width, width, c_emb) for _ in range(2))
        self.coarse = nn.ModuleList(Block(width, width, c_emb) for _ in range(3))
        self.last = nn.ModuleList([Block(2 * width, width, c_emb), Block(width, width, c_emb)])
        self.head = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1)
        )
        nn.init.zeros_(self.head[-1].weight)

    def guide(self, x, p, h, z_p):
        """The guide c (B, C', h, w) of images x in [0, 1], labels p, features h and z_p = E(p).

        ours: beside h and E(p), the pixels themselves and their contrast_map; it needs no training
        to carry over from the exemplar to other images, as the features do.
        """
        pixels = torch.cat([4 * x - 2, 2 * p - 1, contrast_map(x, p)], 1)  # (B, 5, H, W)
        h = self.project(h / (h.square().mean((1, 2, 3), keepdim=True) + 1e-3).sqrt())
        h = F.interpolate(h.float(), z_p.shape[2:], mode="bilinear")
        return torch.cat([z_p, h, F.pixel_unshuffle(pixels, self.factor)], 1)

    def forward(self, zt, t, c):
        freq = torch.exp(-math.log(1e4) * torch.arange(32, device=zt.device) / 32)
        phase = t.float()[:, None] * freq  # (B, 32)
        emb = F.silu(self.time(torch.cat([phase.sin(), phase.cos()], 1)))
        h = self.stem(torch.cat([zt, c], 1).contiguous(memory_format=torch.channels_last))
        for block in self.fine:
            h = block(h, emb)  # (B, width, h, w)
        low = F.avg_pool2d(h, 2, ceil_mode=True)
        for block in self.coarse:
            low = block(low, emb)
        h = torch.cat([h, F.interpolate(low, h.shape[2:])], 1)
        for block in self.last:
            h = block(h, emb)
        a = ALPHA_BAR.to(zt.device)[t][:, None, None, None]
        # ours: the head predicts v, so that x0_hat tends to zt itself as t goes to 0 and inversion
        # may start there
        return a.sqrt() * zt - (1 - a).sqrt() * self.head(h).float()  # Eq. 6 [Caudo, O]


# ==================================================================================================
# 4. Inference
# ==================================================================================================


def autocast(args):
    """bf16 autocast on the run's device where --amp says so."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16)


def batched(function, *tensors, size=64):
    """Apply function to chunks of tensors (N, ...); its outputs, concatenated on the CPU."""
    chunks = zip(*(x.split(size) for x in tensors), strict=True)
    return torch.cat([function(*chunk).cpu() for chunk in chunks])


def consensus(masks):
    """Majority of raters, (B, R, H, W) -> (B, 1, H, W) bool; a tie counts as lesion."""
    return masks.float().mean(1, keepdim=True) >= 0.5


@torch.no_grad()
def segment(net, img, args, features=False):
    """Probabilities (B, 1, H, W) of images uint8 (B, 3, H, W), or features h (B, C, H/8, W/8)."""
    with autocast(args):
        logits, h = net(img.to(args.device).float() / 255)
    return h if features else logits.sigmoid()


@torch.no_grad()
def calibrate(nets, img, p0, h, args, guided=True, whole_way=False):
    """Calibrate labels p0 (B, 1, H, W) of images uint8 (B, 3, H, W) with features h: p1.

    nets: the autoencoder, the denoiser and the weight kappa of colour edges.
    Unguided, the guide is empty; whole_way: all states from t* to 0, decoded, (B, steps + 1, H, W).
    Deterministic: the same input gives the same output, bit for bit.
    """
    ae, g, kappa = nets
    img, p0, h = img.to(args.device).float() / 255, p0.to(args.device), h.to(args.device)
    with autocast(args):
        z = ae.encode(p0)  # (B, C, h, w)
        c = g.guide(img, p0, h, z).float()

        def free(zt, t):
            return g(zt, torch.full((len(zt),), t, device=zt.device), torch.zeros_like(c))

        def guide(zt, t):  # classifier-free guidance; w < 1 trusts the prior of shapes more
            x0 = g(zt, torch.full((len(zt),), t, device=zt.device), c)
            x0 = torch.lerp(free(zt, t), x0, args.guidance)  # Eq. 7 [Caudo, O]
            return ae.encode(follow_image(img, ae.decode(x0), kappa))

        way = there_and_back(z, free, guide if guided else free, ddim_times(args))
        return torch.cat([ae.decode(z).sigmoid() for z in way[0 if whole_way else -1 :]], 1)


def crf_refine(p, img, args):
    """Refine probabilities p (B, 1, H, W) of images uint8 by the dense CRF: the same shape."""
    p, kernel = p.to(args.device), (args.sxy_bilateral, args.srgb, args.compat_bilateral)
    crf = DenseCRF(5, 3, 0, *kernel)  # no spatial kernel
    return crf(unary_from_softmax(torch.cat([1 - p, p], 1)), img.to(p.device))[:, 1:]


# ==================================================================================================
# 5. Evaluation and figures
# ==================================================================================================


def evaluate(segmenters, data, args):
    """Evaluate segmenters {row: net} on one split: per-image metrics {row: {metric: (N,)}}."""
    truth, rows = consensus(data.masks), {}
    for row, net in segmenters.items():
        p = batched(lambda x, net=net: segment(net, x, args), data.images)
        rows[row] = overlap_metrics(p > 0.5, truth)
        if row == "caudo_diff":
            p = batched(lambda *x: crf_refine(*x, args), p, data.images)
            rows["caudo_diff_crf"] = overlap_metrics(p > 0.5, truth)
    return {row: rows[row] for row in ROWS if row in rows}


def colour_map(x):
    """Map x (H, W) in [0, 1] to colours uint8 (H, W, 3), black over violet and orange to white."""
    stops = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 200]])
    table = [np.interp(np.linspace(0, 4, 256), np.arange(5), stops[:, c]) for c in range(3)]
    index = (np.asarray(x, dtype=np.float32).clip(0, 1) * 255).round().astype(np.uint8)
    return np.stack(table, -1).astype(np.uint8)[index]


def outline(img, mask, colour=(0, 255, 160)):
    """Draw the border of mask (H, W) bool on img uint8 (H, W, 3); returns a new array."""
    m = torch.as_tensor(mask).float()[None, None]
    edge = (F.max_pool2d(m, 3, 1, 1) != m)[0, 0].numpy()
    return np.where(edge[..., None], np.array(colour, dtype=np.uint8), img)


def draw_sheet(titles, rows, path, scale):
    """Write a picture: a row per (label, [(uint8 (H, W, 3) array, caption), ...]), under titles."""
    height, width = rows[0][1][0][0].shape[:2]
    w, h, top, bar = width * scale + 4, height * scale + 16, 16, 58
    sheet = Image.new("RGB", (bar + w * len(titles), top + h * len(rows)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for c, text in enumerate(titles):
        pen.text((bar + c * w + 2, 1), text, "black", font=font)
    for y, (label, tiles) in zip(range(top, sheet.height, h), rows, strict=True):
        pen.text((2, y + 4), label, "black", font=font)
        for x, (tile, caption) in zip(range(bar, sheet.width, w), tiles, strict=True):
            sheet.paste(Image.fromarray(tile).resize((w - 4, h - 16), 0), (x, y))
            pen.text((x + 2, y + h - 16), caption, "black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def draw_expansion(expansion, args, path):
    """Write the exemplar and 15 pairs made from it, with the outlines of their masks."""
    torch.manual_seed(args.seed)
    x, m = expansion(15)
    x = (torch.cat([expansion.exemplar[:, :3], x]) * 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    m = torch.cat([expansion.exemplar[:, 3:], m]).cpu() > 0.5
    tiles = [(outline(a, b[0]), "") for a, b in zip(x, m, strict=True)]
    rows = [("exemplar,\nthen pairs\nmade of it", tiles[:8]), ("", tiles[8:])]
    draw_sheet([""] * 8, rows, path, scale=max(1, round(128 / args.size[1])))


def draw_calibration(nets, first, final, test, args, path):
    """Write the best, median and worst test images by final Dice, with the way of calibration."""
    truth = consensus(test.masks)
    pred = batched(lambda x: segment(final, x, args), test.images)
    order = overlap_metrics(pred > 0.5, truth)["dice"].argsort(descending=True).tolist()
    mid = len(order) // 2
    picks = [("best", i) for i in order[:2]] + [("median", i) for i in order[mid : mid + 2]]
    picks += [("worst", i) for i in order[-2:]]
    index = torch.tensor([i for _, i in picks])
    img, truth, pred = test.images[index], truth[index], pred[index]
    p0 = segment(first, img, args)
    way = calibrate(nets, img, p0, segment(first, img, args, True), args, whole_way=True).cpu()
    times, rows = ddim_times(args)[::-1], []
    shown = sorted({0, len(times) // 3, 2 * len(times) // 3})
    for k, (name, i) in enumerate(picks):
        x = img[k].permute(1, 2, 0).numpy()
        stages = [p0[k, 0].cpu(), *(way[k, s] for s in shown), way[k, -1], pred[k, 0]]
        dice = [overlap_metrics(p[None, None] > 0.5, truth[k : k + 1])["dice"] for p in stages]
        tiles = [colour_map(p) for p in stages[:-1]] + [outline(x, pred[k, 0] > 0.5, (255, 230, 0))]
        tiles = [(t, f"Dice {d.item():.2f}") for t, d in zip(tiles, dice, strict=True)]
        tiles = [(outline(x, truth[k, 0]), ""), *tiles, (colour_map(truth[k, 0]), "")]
        rows.append((f"{name}\n{test.ids[i][-7:]}", tiles))
    titles = ["image + truth", "first label p0", *(f"t = {times[s]}" for s in shown)]
    titles += ["calibrated p1", "Caudo-Diff", "truth"]
    draw_sheet(titles, rows, path, scale=max(2, 128 // args.size[1]))


def predict(net, args, folder):
    """Segment --predict files; per image a mask, overlay and probability PNG and a json.

    All are in the image's own size. A file that cannot be read is reported and the others go on;
    returns the list of those errors.
    """
    files, errors, used = [], [], set()
    for path in map(Path, args.predict):
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        files += (found := [p for p in inside if p == path or p.suffix.lower() in IMAGE_SUFFIXES])
        errors += [] if found else [f"--predict {path}: no image in this folder"]
    folder.mkdir(parents=True, exist_ok=True)
    for path in tqdm(files, "predict", unit="image", disable=None):
        try:
            img = read_image(path)  # uint8 (3, H, W)
            size = img.shape[1:]
            if min(size) < 8:
                raise DataError(f"{path}: {size[1]} x {size[0]} px, smaller than 8 x 8")
        except DataError as error:
            errors.append(str(error))
            continue
        small = F.interpolate(img[None].float(), args.size, mode="bilinear", antialias=True)
        small = small.round().clamp(0, 255).to(torch.uint8)
        p = F.interpolate(segment(net, small, args).cpu(), size, mode="bilinear")[0, 0]  # (H, W)
        mask = p > 0.5
        stem, k = path.stem, 2
        while stem in used:
            stem, k = f"{path.stem}_{k}", k + 1
        used.add(stem)
        overlay = outline(img.permute(1, 2, 0).numpy(), mask, (255, 230, 0))
        pictures = {"mask": mask.numpy().astype(np.uint8) * 255, "overlay": overlay}
        pictures["probability"] = colour_map(p)
        for name, pixels in pictures.items():
            Image.fromarray(pixels).save(folder / f"{stem}_{name}.png")
        numbers = {"file": str(path), "width": size[1], "height": size[0]}
        numbers["share"] = mask.float().mean().item()
        (folder / f"{stem}.json").write_text(json.dumps(numbers, indent=2) + "\n")
    return errors


# ==================================================================================================
# 6. Exemplar expansion, losses and training
# ==================================================================================================


class Expansion:
    """Step 1: draws labelled pairs, all from one exemplar; other images lend colour and skin.

    img uint8 (3, H, W), mask bool (1, H, W); images uint8 (N, 3, H, W), unlabelled.
    """

    def __init__(self, img, mask, images, args):
        self.images, mask = images.to(args.device), mask[None].to(args.device).float()
        img = img[None].to(args.device).float() / 255
        self.exemplar = torch.cat([img, mask], 1)  # (1, 4, H, W)
        stats = batched(
            lambda i: torch.cat(colour_statistics(i.to(args.device).float() / 255)[:2], 3), images
        ).to(args.device)
        self.mean, self.std = stats.split(1, 3)  # (N, 3, 1, 1) each
        ring = F.max_pool2d(mask, 15, 1, 7) - F.max_pool2d(mask, 3, 1, 1)  # around the object
        self.around = (opponent(img) * ring).sum((2, 3), keepdim=True) / (ring.sum() + 1e-6)
        margin = torch.cat([images[:, :, 3:5], images[:, :, -5:-3]], 2).float().mean((1, 2, 3))
        # ours: an endoscope's frame is black in the rows next to the border, skin and gut are not
        self.inset = (margin / 60).clamp(0.6, 1)
        h, w = mask.shape[2:]
        y, x = mask[0, 0].nonzero().float().mean(0).tolist()
        self.centre = torch.tensor([(2 * x + 1) / w - 1, (2 * y + 1) / h - 1])
        self.radius = math.sqrt(mask.mean().item() / math.pi)  # of a disc of its share of the area

    def warp(self, scale, spread, padding, elastic=1.0):
        """Turned, squeezed, elastic copies magnified by scale (n,): (n, 4, H, W).

        spread: how far from the middle of the picture the object's centre may lie, in [0, 1].
        """
        n, (h, w) = len(scale), self.exemplar.shape[2:]
        turn, squeeze = 2 * math.pi * torch.rand(n), torch.exp(0.2 * torch.randn(n))
        flip, ratio = torch.randint(0, 2, (n,)) * 2 - 1, w / h
        cos, sin = turn.cos() / scale, turn.sin() / scale
        rows = [cos * squeeze * flip, -sin / ratio / squeeze, sin * ratio * squeeze * flip]
        matrix = torch.stack([*rows, cos / squeeze], 1).view(n, 2, 2)
        to = spread * (2 * torch.rand(n, 2, 1) - 1)
        theta = torch.cat([matrix, self.centre[:, None] - matrix @ to], 2)
        grid = F.affine_grid(theta, (n, 1, h, w), align_corners=False)
        for cells, size in ((4, 0.16), (7, 0.08)):
            z = torch.randn(n, 2, cells, cells) * torch.rand(n, 1, 1, 1) * size * elastic
            z = F.interpolate(z / scale.clamp(min=0.5).view(n, 1, 1, 1), (h, w), mode="bicubic")
            grid = grid + z.permute(0, 2, 3, 1)
        copies = self.exemplar.expand(n, -1, -1, -1)
        return F.grid_sample(copies, grid.to(copies), "bilinear", padding, align_corners=False)

    def recoloured(self, n):
        """Warps of the whole exemplar with the colours of random unlabelled images."""
        warped = self.warp(torch.exp(0.7 * torch.rand(n) - 0.1), 0.5, "reflection")
        x, mask = warped[:, :3].clamp(0, 1), warped[:, 3:]
        mean, std, lit = colour_statistics(x)
        j = torch.randint(len(self.images), (n,))
        gain = ((self.std[j] + 0.02) / (std + 0.02)).clamp(0.5, 2)
        y = opponent(x)
        return y + lit * ((y - mean) * gain + self.mean[j] - y), mask

    def pasted(self, n):
        """The exemplar's object alone, on windows at the border of random unlabelled images."""
        radius = 0.1 * 4.2 ** torch.rand(n)
        warped = self.warp(radius / self.radius, 0.6, "zeros", elastic=1.5)
        x, mask = warped[:, :3], warped[:, 3:]
        j = torch.randint(len(self.images), (n,))
        side = 0.25 + 0.2 * torch.rand(n, 1)
        place = torch.randint(0, 2, (n, 2)) * 2.0 - 1  # of the window's centre: a corner
        along = torch.randint(0, 2, (n,))  # and then anywhere along one of its sides
        place[torch.arange(n), along] = 2 * torch.rand(n) - 1
        place *= self.inset[j][:, None]
        theta = torch.cat([torch.eye(2) * side[:, :, None], (place * (1 - side))[:, :, None]], 2)
        grid = F.affine_grid(theta, (n, 1, *mask.shape[2:]), align_corners=False).to(x)
        background = F.grid_sample(self.images[j].float() / 255, grid, align_corners=False)
        return opponent(background) + mask * (opponent(x) - self.around), mask

    def __call__(self, b):
        """Draw images (b, 3, H, W) in [0, 1] and masks (b, 1, H, W) in {0, 1}."""
        k = max(1, b // 3)
        parts = zip(self.recoloured(b - k), self.pasted(k), strict=True)
        y, m = (torch.cat(part) for part in parts)
        # ours: other contrasts, tints, textures and softer borders of the object itself
        area = m.sum((2, 3), keepdim=True) + 1
        rest = (1 - m).sum((2, 3), keepdim=True) + 1
        contrast = (y * m).sum((2, 3), keepdim=True) / area
        contrast = contrast - (y * (1 - m)).sum((2, 3), keepdim=True) / rest
        soft = torch.lerp(m, F.avg_pool2d(m, 5, 1, 2), uniform(0, 1, b).to(m))
        gain = uniform(-0.7, 0.5, b) + 0.2 * torch.randn(b, 3, 1, 1)
        y = y + soft * gain.to(m) * contrast
        y[:, :1] += soft * (uniform(0, 0.2, b) * field(b, 7, m.shape[2:])).to(m)
        return augment(from_opponent(y), (m > 0.5).float())


def strong_view(x):
    """Photometric noise for the student, on images x (B, 3, H, W) in [0, 1]: the same shape."""
    b, mean = len(x), x.mean((2, 3), keepdim=True)
    gain = torch.exp(uniform(-0.3, 0.3, b) + uniform(-0.12, 0.12, b, 3, 1, 1))
    light = gain * (1 + uniform(0, 0.15, b) * field(b, 3, x.shape[2:]))
    x = (mean + (x - mean) * torch.exp(uniform(-0.5, 0.4, b)).to(x)) * light.to(x)
    x = x.clamp(0, 1) ** torch.exp(uniform(-0.3, 0.3, b)).to(x)
    return (x + (torch.randn(x.shape) * uniform(0, 0.03, b)).to(x)).clamp(0, 1)


def draw_pairs(expansion, labels, args):
    """A batch of the segmenter: x (B, 3, H, W), masks and weights (B, 1, H, W).

    Pairs of the expansion and, with labels, five times as many images. labels: None, or images
    uint8 (N, 3, H, W) and their masks and weights, float (N, 1, H, W).
    """
    n = args.batch_size * 5 // 6 if labels else 0
    x, m = expansion(args.batch_size - n)
    w = torch.ones_like(m)
    if labels:
        i = torch.randint(len(labels[0]), (n,))
        img, *rest = (y[i].to(args.device).float() for y in labels)
        img, rest = augment(img / 255, torch.cat(rest, 1))
        x, m, w = torch.cat([x, img]), torch.cat([m, rest[:, :1]]), torch.cat([w, rest[:, 1:]])
    return strong_view(x), m, w


def draw_labelled(labelled, args):
    """A batch of full supervision, the ceiling: each image with the mask of one random rater."""
    i = torch.randint(len(labelled), (args.batch_size,))
    rater = torch.randint(labelled.masks.shape[1], (args.batch_size,))
    x, m = labelled.images[i].to(args.device), labelled.masks[i, rater][:, None].to(args.device)
    x, m = augment(x.float() / 255, m.float())
    return strong_view(x), m


def draw_views(expansion, args):
    """A batch of the denoiser: x (B, 3, H, W), masks, and views so changed that f errs on them."""
    b, (x, m) = args.batch_size, expansion(args.batch_size)
    x = torch.cat([x[: b // 4], strong_view(x[b // 4 :])])
    return x, m, strong_view(strong_view(x))


def autoencoder_loss(net, m):
    """The loss of masks (B, 1, H, W), whole and corrupted; keeps latents at unit variance."""
    m = torch.cat([m, corrupt(m)])
    z = net.encode(m)
    logits = net.decode(z + 0.05 * torch.randn(z.shape).to(z))
    unit = z.mean().square() + (z.std() - 1).square()
    return F.binary_cross_entropy_with_logits(logits, m) + 0.1 * unit


def denoiser_loss(net, x, m, view, segmenter, ae):
    """The loss of a batch of draw_views: a corrupted mask guides, the true mask is the target."""
    keep = (torch.rand(2, len(x), 1, 1, 1) > torch.tensor([0.6, 0.15]).view(2, 1, 1, 1, 1)).to(x)
    with torch.no_grad():
        # the true mask, or what the segmenter makes of the view; then corrupted
        p = corrupt(torch.where(keep[0] > 0, m, segmenter(view)[0].sigmoid()))
        h, z0, z_p = segmenter(x)[1], ae.encode(m), ae.encode(p)
    c = net.guide(x, p, h, z_p) * keep[1]  # c = 0: unguided
    t = torch.randint(T, (len(x),)).to(x.device)
    a = ALPHA_BAR.to(x.device)[t][:, None, None, None]
    x0_hat = net(add_noise(z0, t, torch.randn(z0.shape).to(z0)), t, c)
    # an error of v is sqrt(1 - a) as large in x0_hat: divided by 1 - a, this is the MSE of v
    return ((x0_hat - z0).square() / (1 - a + 0.02)).mean()  # Eq. 8 [Caudo, O]


def save_checkpoint(state, path):
    """Write state to path so that either the old file or the whole new one is there, never half."""
    temp = path.with_suffix(".tmp")
    try:
        torch.save(state, temp)
        os.replace(temp, path)
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
        with contextlib.suppress(OSError):
            temp.unlink()
        raise DataError(f"cannot write {path} ({error}); older files are intact") from error


def load_checkpoint(path, kind, args, fixed):
    """Read a checkpoint of stage kind, trained with the flags `fixed` as they are now.

    Raises DataError if it is missing, broken, another method's or trained with other flags.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"no checkpoint {path}: train first, or name one by --checkpoint") from None
    except Exception as error:  # torch and zipfile raise all kinds
        raise DataError(f"{path} is not a readable checkpoint; train again") from error
    if not isinstance(state, dict) or (state.get("method"), state.get("kind")) != (METHOD, kind):
        raise DataError(f"{path} is a checkpoint of something else, not {METHOD}'s {kind}")
    for name in fixed:
        was, now = state["args"][name], getattr(args, name)
        if was != (list(now) if isinstance(now, tuple) else now):
            was, now = (f"{x[1]}x{x[0]}" if name == "size" else x for x in (was, now))
            flag = {"bf16": "amp"}.get(name, name).replace("_", "-")
            raise DataError(f"{path} was trained with --{flag} {was}, not {now}: keep it")
    return state


def train(stage, build, draw, loss_function, steps, args, folder):
    """Train one network, the loop of all stages: (EMA network, seconds).

    build() makes it, draw() returns a batch, loss_function(net, *batch) its loss. All that --resume
    needs is in <folder>/<stage>.pt; a finished stage is only loaded. Each stage has a seed of its
    own, so that it does not depend on what ran before it.
    """
    torch.manual_seed(int(hashlib.sha256(f"{args.seed}/{stage}".encode()).hexdigest()[:8], 16))
    net = build().to(args.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    opt = torch.optim.AdamW(net.parameters(), args.lr, weight_decay=1e-4)
    file, step, seconds, smooth = folder / f"{stage}.pt", 0, 0.0, None
    cuda = args.device.startswith("cuda")
    if args.eval_only or (args.resume and file.exists()):
        state = load_checkpoint(file, stage, args, EVAL_FLAGS if args.eval_only else TRAIN_FLAGS)
        ema.load_state_dict(state["ema"])
        step, seconds, smooth = (state[k] for k in ("step", "seconds", "smooth"))
        if step < steps and args.eval_only:
            raise DataError(f"{file}: stopped at step {step} of {steps}; --resume first")
        if step < steps:
            net.load_state_dict(state["net"])
            opt.load_state_dict(state["opt"])
            torch.set_rng_state(state["rng"])
            if cuda:
                torch.cuda.set_rng_state(state["cuda_rng"], args.device)
    forward = torch.compile(net) if args.compile else net
    stop = []  # filled by Ctrl-C: the running step is finished first, so that the state is whole
    handler = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    start = time.time() - seconds
    bar = tqdm(total=steps * args.batch_size, initial=step * args.batch_size, unit="img",
               desc=stage, smoothing=0.05, disable=step >= steps)  # fmt: skip
    while step < steps:
        net.train()
        warm, cosine = min(1, (step + 1) / 50), 0.5 + 0.5 * math.cos(math.pi * step / steps)
        for group in opt.param_groups:
            group["lr"] = args.lr * warm * cosine
        batch = draw()  # in float32: bf16 would round the warps' grids by up to a quarter pixel
        with autocast(args):
            loss = loss_function(forward, *batch)
        value = loss.item()
        if not math.isfinite(value):
            bar.close()
            raise DataError(f"loss is {value} at step {step}: lower --lr {args.lr}, or --amp off")
        opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        step += 1
        with torch.no_grad():
            decay = min(0.99, step / (step + 10))  # short memory first: the start is forgotten
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
        smooth = value if smooth is None else 0.98 * smooth + 0.02 * value
        bar.update(args.batch_size)
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if step % args.save_every and step < steps and not stop:
            continue
        seconds = time.time() - start
        state = {
            "method": METHOD, "kind": stage, "ema": ema.state_dict(), "step": step,
            "seconds": seconds, "smooth": smooth, "args": vars(args) | {"size": list(args.size)},
        }  # fmt: skip
        if step < steps:  # a finished stage needs no more
            state |= {"net": net.state_dict(), "opt": opt.state_dict()}
            state["rng"] = torch.get_rng_state()
            state["cuda_rng"] = torch.cuda.get_rng_state(args.device) if cuda else None
        save_checkpoint(state, file)
        with open(folder / "log.csv", "a", newline="") as table:
            csv.writer(table).writerow([stage, step, round(smooth, 6)])
        if stop:
            bar.close()
            print(f"stopped at step {step} of {stage}; add --resume to go on", file=sys.stderr)
            raise SystemExit(130)
    bar.close()
    signal.signal(signal.SIGINT, handler)
    return ema, seconds


def retrain(method, first, nets, expansion, images, args, folder):
    """Steps 5 and 6, R rounds: label images, calibrate, retrain: (segmenter, labels, seconds).

    method: "caudo_diff", "caudo_diff_unguided", "self_training" (p1 = p0) or "exemplar_only" (the
    images stay unlabelled). labels: of each round, the images' indices, p0 and p1 (n, 1, H, W).
    """
    segmenter, labels, seconds, guided = first, [], 0.0, method == "caudo_diff"
    for r in range(1, args.rounds + 1):
        given = None
        if method != "exemplar_only":
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(r))
            index = order[: args.pool]  # another part of a large set in every round
            img = images[index]
            p0 = p1 = batched(lambda x, net=segmenter: segment(net, x, args), img)
            if method != "self_training":
                # features of the first segmenter in every round: of them the denoiser learned
                h = batched(lambda x: segment(first, x, args, True), img)
                p1 = batched(lambda *x: calibrate(nets, *x, args, guided), img, p0, h)
            labels.append((index, p0, p1))
            given = img, (p1 > 0.5).float(), reliability(p0, p1)
        draw, student = partial(draw_pairs, expansion, given, args), copy.deepcopy(segmenter)
        how = partial(student.requires_grad_, True), draw, segmenter_loss, args.round_steps
        segmenter, s = train(f"{method}_{r}", *how, args, folder)
        seconds += s
    return segmenter, labels, seconds


# ==================================================================================================
# 7. Main
# ==================================================================================================


def choose_exemplars(data, wanted):
    """Indices of the exemplars: ids as given; auto:N are the N images nearest to the median.

    Nearest by colours, contrast and what the centre differs by, in median deviations; images only.
    Raises DataError for an unknown id.
    """
    h, w = data.images.shape[2:]

    def statistics(img):  # uint8 (B, 3, H, W) -> (B, 9)
        x = img.float() / 255
        mean, std, _ = colour_statistics(x)
        middle = opponent(x[:, :, h // 4 : -(h // 4), w // 4 : -(w // 4)])
        return torch.cat([mean, std, middle.mean((2, 3), keepdim=True) - mean], 1).flatten(1)

    stats = batched(statistics, data.images)  # (N, 9)
    off = (stats - stats.median(0).values).abs()
    typical = (off / (off.median(0).values + 1e-6)).square().sum(1).argsort().tolist()
    chosen = []
    for name in wanted:
        if name == "auto" or (name[:5] == "auto:" and name[5:].isdecimal() and int(name[5:])):
            chosen += typical[: int(name[5:] or 1)]
        elif name in data.ids:
            chosen.append(data.ids.index(name))
        else:
            why = f"neither auto:N nor one of the {len(data)} images trained on, {data.ids[0]} .."
            raise DataError(f"--exemplar {name}: {why} (without a val folder a tenth is set aside)")
    return list(dict.fromkeys(chosen))


def exemplar_mask(name, args):
    """The mask (1, H, W) bool of the training image `name`; no other mask file is opened."""
    if args.data == "synthetic":
        drawn = load_segmentation("synthetic", "", "train", args.size)
        i = drawn.ids.index(name)
        return consensus(drawn.masks[i : i + 1])[0]
    return load_mask(args.data, args.data_root, "train", name, args.size)


def load(args, split, images_only=False):
    """A split of the data set; its first 24 images with --quick."""
    found = load_segmentation(
        args.data, args.data_root, split, args.size, None, images_only, args.num_workers
    )
    cut = slice(24 if args.quick else None)
    return replace(found, ids=found.ids[cut], images=found.images[cut], masks=found.masks[cut])


def averages(rows):
    """Means and standard deviations over the images: {row: {metric: (N,)}} -> the same of dicts."""

    def of(v):
        return {"mean": v.mean().item(), "std": v.std(unbiased=False).item()}

    return {row: {m: of(v[m]) for m in METRICS} for row, v in rows.items()}


def over_exemplars(results):
    """Mean and standard deviation over exemplars of their means; of one exemplar, its own."""
    if len(results) == 1:
        return results[0]
    table = {row: {m: [r[row][m]["mean"] for r in results] for m in METRICS} for row in results[0]}
    return averages({row: {m: torch.tensor(v) for m, v in ms.items()} for row, ms in table.items()})


def print_table(rows):
    """Print mean metrics, a row per method."""
    print(f"\n{'':24}" + "".join(f"{m:>11}" for m in METRICS))
    for row, metrics in rows.items():
        cells = "".join(f"{metrics[m]['mean']:11.3f}" for m in METRICS)
        print(f"{ROWS.get(row, row):24}{cells}")


def run_exemplar(index, mask, train_set, test, full, args, folder):
    """Train, evaluate and draw all methods with one exemplar; (result, network Caudo-Diff)."""
    name, others = train_set.ids[index], [k for k in range(len(train_set)) if k != index]
    images, folder, seconds = train_set.images[others], folder / name, {}
    folder.mkdir(exist_ok=True)
    expansion = Expansion(train_set.images[index], mask, images, args)
    draw_expansion(expansion, args, folder / "figures" / "expansion.png")

    def stage(kind, steps, net, draw, loss):
        ema, seconds[kind] = train(kind, net, draw, loss, steps, args, folder)
        return ema

    n, factor, pairs = args.steps, args.latent_factor, partial(draw_pairs, expansion, None, args)
    views, masks = partial(draw_views, expansion, args), lambda: expansion(args.batch_size)[1:]
    first = stage("exemplar", n, partial(UNet, args.width), pairs, segmenter_loss)
    ae = stage("autoencoder", 2 * n, partial(Autoencoder, factor), masks, autoencoder_loss)
    loss = partial(denoiser_loss, segmenter=first, ae=ae)
    g = stage("denoiser", n, partial(Denoiser, factor, 2 * args.width), views, loss)
    nets = ae, g, args.kappa * colour_share(expansion.exemplar)
    methods = ["caudo_diff", "caudo_diff_unguided", "self_training", "exemplar_only"]
    segmenters, labels = {}, {}
    for method in methods if args.compare else methods[:1]:
        how = method, first, nets, expansion, images, args, folder
        segmenters[method], labels[method], seconds[method] = retrain(*how)
    final = segmenters["caudo_diff"]
    draw_calibration(nets, first, final, test, args, folder / "figures" / "calibration.png")
    rows = evaluate(segmenters | ({"full_supervision": full} if full else {}), test, args)
    result = {"exemplar": name, "seconds": seconds, "rows": averages(rows)}
    if args.compare:  # all training is done: only now the other masks may be looked at
        truth = consensus(load(args, "train").masks[others])
        rounds = [
            {"initial": overlap_metrics(p0 > 0.5, m), "calibrated": overlap_metrics(p1 > 0.5, m)}
            for m, p0, p1 in ((truth[i], p0, p1) for i, p0, p1 in labels["caudo_diff"])
        ]
        result["pseudo_labels"] = [averages(r) for r in rounds]
        rebuilt = batched(lambda m: ae.decode(ae.encode(m.to(args.device).float())), truth)
        result["autoencoder_dice"] = overlap_metrics(rebuilt > 0, truth)["dice"].mean().item()
    return result, final


def run(args):
    """Load, train, evaluate, draw; returns the exit status."""
    folder = Path(args.out) / METHOD / args.data / f"seed{args.seed}"
    if args.predict:
        path = Path(args.checkpoint or folder / "best.pt")
        state = load_checkpoint(path, "best", args, MODEL_FLAGS)
        net = UNet(args.width).to(args.device, memory_format=torch.channels_last).eval()
        net.load_state_dict(state["ema"])
        errors = predict(net, args, folder / "predictions")
        print(f"predictions in {folder / 'predictions'}")
        for error in errors:
            print(f"{METHOD}.py: error: {error}", file=sys.stderr)
        return 2 if errors else 0
    train_set, test = load(args, "train", images_only=True), load(args, "test")
    chosen = choose_exemplars(train_set, args.exemplar)
    masks = [exemplar_mask(train_set.ids[i], args) for i in chosen]
    if len(train_set) < 2:
        raise DataError(f"{args.data_root}: no unlabelled image beside the exemplar; add some")
    if args.epochs:
        args.steps = args.epochs * math.ceil(len(train_set) / args.batch_size)
    most = args.max_steps or math.inf
    args.steps, args.round_steps = min(args.steps, most), min(args.round_steps, most)
    folder.mkdir(parents=True, exist_ok=True)
    if not args.eval_only:
        (folder / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")
    if not args.resume and not args.eval_only:  # what an earlier run left must not be resumed
        for name in ("full_supervision.pt", "*/*.pt", "log.csv", "*/log.csv"):
            for file in folder.glob(name):
                file.unlink()
    full, seconds, start = None, {}, time.time()
    if args.compare:  # the ceiling; it is the same for all exemplars
        labelled = load(args, "train")
        how = partial(UNet, args.width), partial(draw_labelled, labelled, args), segmenter_loss
        steps = args.steps + args.rounds * args.round_steps
        full, seconds["full_supervision"] = train("full_supervision", *how, steps, args, folder)
    results = []
    for index, mask in zip(chosen, masks, strict=True):
        result, final = run_exemplar(index, mask, train_set, test, full, args, folder)
        if not results:  # for --predict
            state = {"method": METHOD, "kind": "best", "ema": final.state_dict()}
            state["args"] = vars(args) | {"size": list(args.size)}
            save_checkpoint(state, folder / "best.pt")
        results.append(result)
    commit = ""
    with contextlib.suppress(OSError):  # git is not installed
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB of main memory
    if args.device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated(args.device) / 2**20
    summary = {
        "method": METHOD, "data": args.data, "split": "test", "n_images": len(test),
        "n_unlabelled": len(train_set) - 1, "size": f"{args.size[1]}x{args.size[0]}",
        "seed": args.seed, "steps": args.steps, "rounds": args.rounds,
        "seconds": seconds | {r["exemplar"]: r["seconds"] for r in results},
        "wall_seconds": round(time.time() - start), "device": args.device,
        "peak_memory_mib": round(peak), "torch": torch.__version__,
        "git": commit or None, "command": " ".join([f"python {METHOD}.py", *args.argv]),
        "rows": over_exemplars([r["rows"] for r in results]), "exemplars": results,
    }  # fmt: skip
    if args.compare:
        summary["pseudo_labels"] = over_exemplars([r["pseudo_labels"][0] for r in results])
    (folder / "result.json").write_text(json.dumps(summary, indent=2) + "\n")
    print_table(summary["rows"])
    if args.compare:
        print("\nFirst pseudo-labels of the unlabelled images:")
        print_table(summary["pseudo_labels"])
    figures = folder / train_set.ids[chosen[0]] / "figures" / "calibration.png"
    print(f"\n{len(test)} test images of {args.data}, {len(chosen)} exemplar(s). Open {figures}")
    return 0


def main(argv=None):
    """Run the command line; every foreseeable error is one line and exit status 2."""
    args, previous = parse_args(argv), signal.getsignal(signal.SIGINT)
    try:
        status = run(args)
    except (DataError, OSError) as error:
        print(f"{METHOD}.py: error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:  # outside the training loop, which ends its step and saves first
        print("interrupted; what was trained is saved, --resume goes on", file=sys.stderr)
        status = 130
    finally:
        signal.signal(signal.SIGINT, previous)
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    main()
