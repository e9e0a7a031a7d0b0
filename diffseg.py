"""DiffSeg: weakly supervised skin-lesion segmentation by diffusion difference.

Paper: DiffSeg, https://arxiv.org/abs/2404.16474. The idea in five lines: noise an image, let one
denoising network reconstruct it twice, as what it is ("lesion") and as its lesion-free counterpart
("healthy"), and take the difference: it shows the lesion. It learns the counterpart from tagged
tiles, not pixels: lesion tiles blended into healthy tiles. Other noise gives other outputs, as
other annotators would draw; their mean, variance and distance say how sure the result is.

    x0 --noise--> xt --+-- f(xt, t_n, lesion)  --> x0_lesion ---+
                       |                                        +-- difference, blend --> N masks
                       +-- f(xt, t_n, healthy) --> x0_healthy --+
    N masks --> mean: coherence; variance: ambiguity; distances: GED; dense CRF --> one mask

Commands:
    python diffseg.py                                     synthetic images on a CPU, minutes
    python diffseg.py --data isic2018                     downloads ISIC 2018 Task 1 (13 GB) first
    python diffseg.py --data folder --data-root mine      mine/<train|val|test>/{images,masks}/*
    python diffseg.py --data isic2018 --predict photo.jpg folder       with the trained network

Results: Dice 0.812 (DiffSeg + CRF) against 0.893 (U-Net on all masks) and 0.610 (Otsu), mean of
    seeds 0 and 1 on 300 test images of an ISIC subset at 64 x 48 px, 868 steps of 24, 8 minutes a
    network on one CPU core, torch 2.15; commands and records: README.md, docs/results.

Deviations from the paper (D) and its code, with reasons:
D1  One conditional network instead of two: half the memory. `--pair official` trains the two.
D2  The lesion-free counterparts come from implantation; the paper does not say where its do.
D3  Supervision is 48 tags an image, each of one random tile (healthy, lesion or neither); the masks
    of the training set only produce those tags. `--supervision border` reads none of them. Both
    choose checkpoint and threshold on the masks of the validation split.
D4  The healthy reconstruction carries a fourth channel, the blend weight of a lesion, known for
    implants and inside tagged tiles. The map is the geometric mean of it and of the difference:
    better than either alone early in training, as good as the blend weight at its end
    (`--map blend|signed|norm` give one alone).
D5  Small t (5..80 of 1000): in our trials on validation the maps got worse with growing t.
D6  Dice is the mean over images, GED compares with annotators and counts all pairs.
D7  The paper's CRF parameters lower Dice at this image size; ours were chosen on validation, at
    64 x 48. Scale --sxy-bilateral with --size yourself.
D8  The CRF's unary is calibrated: logits are shifted so that validation's threshold means 1/2.
"""

import argparse
import contextlib
import copy
import csv
import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads stall a busy CPU 10-50 x

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm import tqdm

from crf import DenseCRF, unary_from_softmax
from data import IMAGE_SUFFIXES, DataError, augment, load_segmentation, parse_size, read_image

# Equations are tagged G where the paper or its code gives them, O where they are ours.
LESION, HEALTHY = 0, 1  # the condition y of the network f(xt, t, y)
T = 1000  # diffusion steps: t runs from 0 (nearly clean) to T - 1 (nearly pure noise)
METRICS = ["dice", "iou", "precision", "recall", "thresholded_jaccard", "ged"]

# ==================================================================================================
# 1. Command line
# ==================================================================================================


def parse_args(argv=None):
    """Parse and check the command line; the defaults reproduce the results table."""
    p = argparse.ArgumentParser(
        description="DiffSeg: weakly supervised skin-lesion segmentation by diffusion difference",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, on_off = p.add_argument, argparse.BooleanOptionalAction
    add("--data", default="synthetic", choices=["synthetic", "isic2018", "folder"], help="data set")
    add("--data-root", default="data", help="folder that holds, or will receive, the data set")
    add("--size", type=parse_size, default="64x48", help="network input: N or WIDTHxHEIGHT, pixels")
    add("--epochs", type=int, help="passes over the training set; synthetic 18, others 14")
    add("--max-steps", type=int, help="at most this many steps; the schedule fits")
    add("--batch-size", type=int, default=24, help="images in a training step")
    add("--lr", type=float, default=1e-3, help="peak of AdamW's cosine schedule (ours)")
    add("--seed", type=int, default=0, help="seed of weights, batches and noise")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--amp", default="auto", choices=["auto", "on", "off"], help="bf16 autocast")
    add("--compile", action="store_true", help="torch.compile the networks in training")
    add("--num-workers", type=int, default=8, help="threads that decode images, first run only")
    add("--out", default="out", help="results go to OUT/diffseg/DATA/seedK")
    add("--resume", action="store_true", help="go on from the last checkpoint, exactly")
    add("--eval-only", action="store_true", help="no training: evaluate the best checkpoint")
    add("--checkpoint", help="file for --eval-only and --predict [best.pt in --out]")
    add("--predict", nargs="+", metavar="PATH", help="segment these images or folders of images")
    add("--quick", action="store_true", help="a few steps on a few images: does it run at all?")
    add("--compare", action=on_off, default=True, help="also train the supervised U-Net")
    add("--supervision", default="tags", choices=["tags", "border"], help="source of tile tags")
    add(
        "--pair",
        default="shared",
        choices=["shared", "official"],
        help="one net or two (paper)",
    )
    add("--width", type=int, default=32, help="channels of the first U-Net level (ours)")
    maps = ["product", "blend", "signed", "norm"]
    add("--map", default="product", choices=maps, help="what makes the lesion map (ours)")
    add("--blend-weight", type=float, default=0.5, help="weight of the blend loss (ours)")
    add("--t-train", type=int, nargs=2, default=[5, 250], help="range of t in training (ours)")
    add("--t-infer", type=int, nargs=2, default=[5, 80], help="range of t_n at inference (ours)")
    add("--outputs", type=int, default=8, help="N outputs an image, 2 N network calls (ours)")
    add("--crf-rounds", type=int, default=3, help="K CRF results are averaged (paper)")
    add("--crf-outputs", type=int, default=4, help="H random outputs averaged for each (paper)")
    add("--sxy-bilateral", type=float, default=5.0, help="CRF: pixels (ours; paper 80)")
    add("--srgb", type=float, default=8.0, help="CRF: grey levels (ours; paper 13)")
    add("--compat-bilateral", type=float, default=1.0, help="CRF: weight (ours; paper 10)")
    add("--sxy-gaussian", type=float, default=3.0, help="CRF: pixels (paper)")
    add("--compat-gaussian", type=float, default=0.0, help="CRF: weight (ours; paper 3)")
    add("--save-every", type=int, default=200, help="steps between checkpoints and validations")
    args = p.parse_args(argv)
    if args.epochs is None:
        args.epochs = 18 if args.data == "synthetic" else 14
    if args.quick:
        args.max_steps = args.max_steps or 6
        args.outputs, args.batch_size = min(4, args.outputs), min(8, args.batch_size)
    for name in ("epochs", "batch_size", "outputs", "crf_rounds", "crf_outputs", "save_every"):
        if getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("t_train", "t_infer"):
        if not 0 <= getattr(args, name)[0] <= getattr(args, name)[1] < T:
            p.error(f"--{name.replace('_', '-')} needs 0 <= LOW <= HIGH < {T}")
    if args.max_steps is not None and args.max_steps < 1:
        p.error("--max-steps must be at least 1")
    if args.width < 16 or args.width % 16:
        p.error(f"--width {args.width} must be a multiple of 16")
    args.crf_outputs = min(args.crf_outputs, args.outputs)
    if args.lr <= 0:
        p.error("--lr must be positive")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=args.device)
        if torch.device(args.device).index is not None and args.device.startswith("cuda"):
            torch.cuda.set_device(args.device)
    except (RuntimeError, AssertionError):
        p.error(f"--device {args.device} is not usable here; take --device cpu")
    bf16_cpu = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    args.bf16 = args.amp == "on" or (
        args.amp == "auto" and (args.device.startswith("cuda") or bf16_cpu)
    )
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


def pseudo_noise(xt, t, x0_hat):
    """The noise that a reconstruction x0_hat (B, C, H, W) implies: eps~ of the same shape."""
    a = ALPHA_BAR.to(xt.device)[t][:, None, None, None]
    return (xt - a.sqrt() * x0_hat) / (1 - a).sqrt()  # Eq. 3 [DiffSeg, G]


def diffusion_difference(xt, t, x0_healthy, x0_lesion):
    """Signed difference of the two pseudo-noises in units of x0, (B, C, H, W); > 0: lesion darker.

    The paper takes eps~_no minus eps~_have, here negated. Scaled by sqrt(1 - a) / sqrt(a) that is
    the difference of the two reconstructions, whose size does not depend on t.
    """
    a = ALPHA_BAR.to(xt.device)[t][:, None, None, None]
    eps_diff = pseudo_noise(xt, t, x0_lesion) - pseudo_noise(xt, t, x0_healthy)
    return eps_diff * (1 - a).sqrt() / a.sqrt()  # Eq. 4 [DiffSeg, G; scaling O]


def difference_score(difference, kind):
    """One score per pixel, (B, C, H, W) -> (B, 1, H, W) in [0, 1], from min to max of each image.

    kind "norm": length over the channels; any other: mean over them, negative parts cut.
    """
    d = difference.mean(1, keepdim=True).clamp(min=0)
    d = difference.norm(dim=1, keepdim=True) if kind == "norm" else d
    low, high = d.amin((1, 2, 3), keepdim=True), d.amax((1, 2, 3), keepdim=True)
    return (d - low) / (high - low).clamp(min=1e-6)  # Eq. 5 [DiffSeg, G]


def random_blobs(b, size, device="cpu"):
    """Random soft star-convex blobs (B, 1, H, W) in [0, 1], drawn from torch's global CPU RNG.

    Radius 5 to 60 % of the width, outline a Fourier series, edge from sharp to a quarter radius.
    """
    h, w = size

    def u(low, high):
        return low + (high - low) * torch.rand(b, 1, 1, device="cpu").to(device)

    y = (torch.arange(h, device=device) + 0.5)[:, None] / w - u(0.15, 0.85) * h / w  # (B, H, 1)
    x = (torch.arange(w, device=device) + 0.5) / w - u(0.15, 0.85)  # (B, 1, W)
    turn, squeeze, radius = u(0, math.pi), u(0.6, 1), 0.05 + 0.55 * u(0, 1) ** 1.3
    x, y = x * turn.cos() + y * turn.sin(), (y * turn.cos() - x * turn.sin()) / squeeze  # (B, H, W)
    angle, outline = torch.atan2(y, x), torch.ones_like(x)
    for k in range(2, 7):
        wave = torch.randn(b, 1, 1).to(device) * torch.cos(k * angle + u(0, 2 * math.pi))
        outline = outline + 0.25 / k**0.9 * wave
    edge = 0.008 + u(0.02, 0.27) * radius
    distance = radius * outline.clamp(min=0.3) - (x * x + y * y).sqrt()  # > 0 inside
    return torch.sigmoid(2 * distance / edge)[:, None]


def otsu_threshold(x, bins=256):
    """Otsu's threshold of each row of x (B, P) in [0, 1]: (B, 1); the object lies above it."""
    index = (x * (bins - 1)).round().long()
    hist = torch.zeros(len(x), bins, device=x.device).scatter_add_(1, index, torch.ones_like(x))
    level = torch.arange(bins, device=x.device)
    below, total = hist.cumsum(1), x.shape[1]  # pixels at or below each level
    moment = (hist * level).cumsum(1)
    between = (moment[:, -1:] * below / total - moment) ** 2 / (below * (total - below)).clamp(1)
    return (between.argmax(1, keepdim=True) + 0.5) / (bins - 1)


def iou_distance(a, b):
    """1 - IoU of all pairs of masks a (B, N, H, W) and b (B, R, H, W): (B, N, R) in [0, 1].

    Two empty masks have distance 0, an empty and a non-empty one have 1.
    """
    a, b = a.flatten(2).float(), b.flatten(2).float()
    inter = a @ b.transpose(1, 2)  # (B, N, R)
    union = a.sum(2)[:, :, None] + b.sum(2)[:, None] - inter
    return torch.where(union > 0, 1 - inter / union.clamp(min=1), torch.zeros_like(union))


def ged(samples, raters):
    """Squared generalized energy distance of masks (B, N, H, W) and raters (B, R, H, W): (B,).

    All pairs count, a mask with itself too, so that identical sets have distance 0.
    """
    cross = iou_distance(samples, raters).mean((1, 2))
    within = [iou_distance(s, s).mean((1, 2)) for s in (samples, raters)]
    return 2 * cross - within[0] - within[1]  # Eq. 7 [DiffSeg, G with annotators]


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
    """U-Net f(x, t, y) of four levels: x (B, 3, H, W), t and y (B,) -> (B, c_out, H, W) float32.

    As denoiser c_out = 4: the reconstruction of x0 and one logit, the blend weight of a lesion.
    As supervised baseline c_out = 1, with t = 0 and y = 0. H and W are multiples of 8.
    """

    def __init__(self, c_out, width=32):
        super().__init__()
        widths, c_emb, c = [width, width * 3 // 2, width * 2, width * 3], 4 * width, width
        self.time = nn.Sequential(nn.Linear(64, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.label = nn.Embedding(2, c_emb)
        self.stem = nn.Conv2d(3, c, 3, padding=1)
        self.down, self.shrink, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, c_next in enumerate(widths):
            self.down.append(Block(c, c_next, c_emb))
            last = level == len(widths) - 1
            self.shrink.append(
                nn.Identity() if last else nn.Conv2d(c_next, c_next, 3, stride=2, padding=1)
            )
            c = c_next
        self.middle = Block(c, c, c_emb)
        for c_next in reversed(widths):
            self.up.append(Block(c + c_next, c_next, c_emb))
            c = c_next
        self.head = nn.Sequential(nn.GroupNorm(8, c), nn.SiLU(), nn.Conv2d(c, c_out, 3, padding=1))
        nn.init.zeros_(self.head[-1].weight)

    def forward(self, x, t, y):
        freq = torch.exp(-math.log(1e4) * torch.arange(32, device=x.device) / 32)
        phase = t.float()[:, None] * freq  # (B, 32)
        emb = F.silu(self.time(torch.cat([phase.sin(), phase.cos()], 1)) + self.label(y))
        h, skips = self.stem(x.contiguous(memory_format=torch.channels_last)), []
        for block, shrink in zip(self.down, self.shrink, strict=True):
            h = block(h, emb)
            skips.append(h)
            h = shrink(h)  # (B, C_level, H / 2^level, W / 2^level)
        h = self.middle(h, emb)
        for i, block in enumerate(self.up):
            h = F.interpolate(h, scale_factor=2.0) if i else h
            h = block(torch.cat([h, skips.pop()], 1), emb)
        return self.head(h).float()


class OfficialPair(nn.Module):
    """The two networks of the paper's code as f(xt, t, y): `have` for lesion, `no` for healthy."""

    def __init__(self, c_out, width=32):
        super().__init__()
        self.have, self.no = UNet(c_out, width), UNet(c_out, width)

    def forward(self, x, t, y):
        out = x.new_empty(len(x), self.no.head[-1].out_channels, *x.shape[2:], dtype=torch.float32)
        for net, label in ((self.have, LESION), (self.no, HEALTHY)):
            rows = (y == label).nonzero()[:, 0]
            if len(rows):
                out[rows] = net(x[rows], t[rows], y[rows])
        return out


def build(kind, args):
    """The network of stage `kind`, "diffseg" or "unet", on the device."""
    if kind == "unet":
        net = UNet(1, args.width)
    else:
        net = (OfficialPair if args.pair == "official" else UNet)(4, args.width)
    return net.to(args.device, memory_format=torch.channels_last)


# ==================================================================================================
# 4. Inference
# ==================================================================================================


def autocast(args):
    """bf16 autocast on the run's device where --amp says so."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16)


@torch.no_grad()
def lesion_scores(net, img, args):
    """N outputs for images (B, 3, H, W) uint8: scores (B, N, H, W) in [0, 1], difference (B, H, W).

    The n-th output has its own noise and step t_n, the same for every image, so that the result
    does not depend on the batch. It costs 2 N network calls, and no 1,000-step chain.
    """
    n, g = args.outputs, torch.Generator().manual_seed(args.seed)
    x0 = img.to(args.device).float() / 127.5 - 1
    scores, mean_difference = [], 0
    for t_n in torch.linspace(*args.t_infer, n).long().tolist():
        eps = torch.randn(1, *x0.shape[1:], generator=g).to(x0).expand_as(x0)
        t = torch.full((len(x0),), t_n, device=x0.device)
        xt = add_noise(x0, t, eps)
        with autocast(args):
            healthy = net(xt, t, torch.full_like(t, HEALTHY))
            lesion = net(xt, t, torch.full_like(t, LESION))
        d = diffusion_difference(xt, t, healthy[:, :3], lesion[:, :3])
        blend = healthy[:, 3:].sigmoid()  # (B, 1, H, W)
        score = blend if args.map == "blend" else difference_score(d, args.map)
        # ours: blend knows what a lesion is, the difference where it ends: their geometric mean
        scores.append((blend * score).sqrt() if args.map == "product" else score)
        mean_difference = mean_difference + d.mean(1) / n
    return torch.cat(scores, 1), mean_difference


@torch.no_grad()
def unet_scores(net, img, args, outputs=0):
    """Probabilities (B, 1, H, W) of the U-Net, or (B, N, H, W) of N MC-dropout samples."""
    x = img.to(args.device).float() / 127.5 - 1
    zero = torch.zeros(len(x), dtype=torch.long, device=x.device)
    net.train(outputs > 0)  # of its layers only dropout behaves differently in training
    with autocast(args):
        p = torch.cat([net(x, zero, zero).sigmoid() for _ in range(max(1, outputs))], 1)
    net.eval()
    return p


def batched(function, images, *rest, size=64):
    """Apply function to chunks of images (N, ...); its outputs, concatenated on the CPU."""
    parts = [
        function(*chunk) for chunk in zip(*(x.split(size) for x in (images, *rest)), strict=True)
    ]
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(x).cpu() for x in zip(*parts, strict=True))
    return torch.cat(parts).cpu()


def consensus(masks):
    """Majority of raters or outputs, (B, N, H, W) -> (B, 1, H, W) bool; a tie counts as lesion."""
    return masks.float().mean(1, keepdim=True) >= 0.5


def choose_threshold(scores, masks):
    """The threshold of scores (B, N, H, W) whose majority vote has the best mean Dice, and that."""
    grid = torch.linspace(0.05, 0.95, 46).tolist()
    truth = consensus(masks)
    dice = [overlap_metrics(consensus(scores > th), truth)["dice"].mean().item() for th in grid]
    best = int(np.argmax(dice))
    return grid[best], dice[best]


def calibrate(kind, net, val, args):
    """Choose the threshold of a network, "diffseg" or "unet", on val: (threshold, mean Dice)."""
    function = lesion_scores if kind == "diffseg" else unet_scores
    scores = batched(lambda x: function(net, x, args), val.images)
    return choose_threshold(scores[0] if kind == "diffseg" else scores, val.masks)


def crf_integrate(scores, img, threshold, args):
    """Integrate outputs by the dense CRF: scores (B, N, H, W), img uint8 -> (B, K, H, W) in [0, 1].

    Each of the K results starts from the average of H random outputs. The unary is calibrated:
    logits are shifted so that the threshold chosen on validation means probability one half.
    """
    crf = DenseCRF(
        sxy_gaussian=args.sxy_gaussian,
        compat_gaussian=args.compat_gaussian,
        sxy_bilateral=args.sxy_bilateral,
        srgb=args.srgb,
        compat_bilateral=args.compat_bilateral,
    )
    g, results = torch.Generator().manual_seed(args.seed), []
    shift = math.log(threshold / (1 - threshold))
    p = torch.sigmoid(torch.logit(scores.to(args.device), 1e-4) - shift)
    for _ in range(args.crf_rounds):
        chosen = torch.randperm(scores.shape[1], generator=g)[: args.crf_outputs]
        mean = p[:, chosen.to(p.device)].mean(1, keepdim=True)  # (B, 1, H, W)
        q = crf(unary_from_softmax(torch.cat([1 - mean, mean], 1)), img.to(p.device))
        results.append(q[:, 1:])  # Eq. 8 [DiffSeg, G]
    return torch.cat(results, 1)


def otsu_green(img):
    """Baseline without learning: green channel below Otsu's threshold, (B, 1, H, W) bool."""
    x = 1 - img[:, 1].flatten(1).float() / 255
    return (x > otsu_threshold(x)).view(len(img), 1, *img.shape[2:])


# ==================================================================================================
# 5. Evaluation and figures
# ==================================================================================================


def evaluate(nets, calibration, data, args):
    """Evaluate every method on one split: (rows of per-image metrics, arrays for the figures).

    nets: {"diffseg": net, "unet": net or absent}; calibration: their thresholds from validation.
    """
    torch.manual_seed(args.seed)  # of the U-Net's dropout
    img, truth = data.images, consensus(data.masks)
    th = calibration["diffseg"]
    scores, difference = batched(lambda x: lesion_scores(nets["diffseg"], x, args), img)
    crf = batched(lambda s, x: crf_integrate(s, x, th, args), scores, img)
    results = {"otsu": (otsu_green(img),) * 2}  # row: (prediction, samples for GED)
    if "unet" in nets:
        samples = batched(lambda x: unet_scores(nets["unet"], x, args, args.outputs), img)
        p = batched(lambda x: unet_scores(nets["unet"], x, args), img)
        results["unet"] = p > calibration["unet"], samples > calibration["unet"]
    results["diffseg"] = consensus(scores > th), scores > th
    results["diffseg_crf"] = crf.mean(1, keepdim=True) > 0.5, crf > 0.5
    rows = {
        name: overlap_metrics(pred, truth) | {"ged": ged(samples, data.masks)}
        for name, (pred, samples) in results.items()
    }
    return rows, {"scores": scores, "difference": difference, "pred": results["diffseg_crf"][0]}


def colour_map(x):
    """Map x (H, W) in [0, 1] to colours uint8 (H, W, 3), black over violet and orange to white."""
    stops = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 200]])
    x = np.asarray(x, dtype=float).clip(0, 1)
    channels = [np.interp(x, np.linspace(0, 1, 5), stops[:, c]) for c in range(3)]
    return np.stack(channels, -1).astype(np.uint8)


def outline(img, mask, colour=(0, 255, 160)):
    """Draw the border of mask (H, W) bool on img uint8 (H, W, 3); returns a new array."""
    m = torch.as_tensor(mask).float()[None, None]
    edge = (F.max_pool2d(m, 3, 1, 1) != m)[0, 0].numpy()
    return np.where(edge[..., None], np.array(colour, dtype=np.uint8), img)


def draw_panel(data, rows, maps, threshold, path):
    """Write the panel of the best, median and worst test images by Dice of DiffSeg + CRF."""
    order, n = rows["diffseg_crf"]["dice"].argsort(descending=True).tolist(), len(data)
    places = {"best": order[: min(2, n)], "median": order[n // 2 : n // 2 + 2], "worst": order[-2:]}
    height, width = data.images.shape[2:]
    scale = max(1, round(128 / width))
    n_out = maps["scores"].shape[1]
    shown = [0, n_out // 2, n_out - 1]
    title = ["image + truth", "truth", "difference", *(f"output {k + 1} of {n_out}" for k in shown)]
    title += ["coherence", "ambiguity", "DiffSeg + CRF"]
    picks = [(name, i) for name, indices in places.items() for i in indices]
    w, h, top, bar = width * scale + 4, height * scale + 16, 16, 58
    sheet = Image.new("RGB", (bar + w * len(title), top + h * len(picks)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for c, text in enumerate(title):
        pen.text((bar + c * w + 2, 1), text, "black", font=font)
    for r, (name, i) in enumerate(picks):
        img, truth = data.images[i].permute(1, 2, 0).numpy(), consensus(data.masks[i : i + 1])[0]
        outputs = (maps["scores"][i] > threshold).float()  # (N, H, W)
        d = maps["difference"][i].clamp(min=0)
        tiles = [(outline(img, truth[0]), ""), (colour_map(truth[0]), "")]
        tiles.append((colour_map(d / d.max().clamp(min=1e-6)), f"max {d.max() / 2:.2f}"))
        for mask in outputs[shown]:
            dice = overlap_metrics(mask[None, None], truth[None])["dice"].item()
            tiles.append((colour_map(mask), f"Dice {dice:.2f}"))
        tiles.append((colour_map(outputs.mean(0)), f"Dice {rows['diffseg']['dice'][i]:.2f}"))
        variance = outputs.var(0, unbiased=False)  # Eq. 6 [DiffSeg, G]; at most 0.25
        tiles.append((colour_map(4 * variance), f"mean {variance.mean():.3f}"))
        result = outline(img, maps["pred"][i, 0], (255, 230, 0))
        tiles.append((result, f"Dice {rows['diffseg_crf']['dice'][i]:.2f}"))
        pen.text((2, top + r * h + 4), f"{name}\n{data.ids[i][-7:]}", "black", font=font)
        for c, (tile, text) in enumerate(tiles):
            big = Image.fromarray(tile).resize((width * scale, height * scale), 0)
            sheet.paste(big, (bar + c * w, top + r * h))
            pen.text((bar + c * w + 2, top + r * h + height * scale), text, "black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def predict(net, calibration, args, folder):
    """Segment --predict files; per image a mask, overlay, coherence and ambiguity PNG and a json.

    All are in the image's own size. A file that cannot be read is reported and the others go on;
    the returned list holds those errors.
    """
    files, errors = [], []
    for path in map(Path, args.predict):
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        found = [p for p in inside if p == path or p.suffix.lower() in IMAGE_SUFFIXES]
        files += found
        if not found:
            errors.append(f"--predict {path}: no image in this folder")
    folder.mkdir(parents=True, exist_ok=True)
    used = set()
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
        scores, _ = lesion_scores(net, small, args)
        crf = crf_integrate(scores, small, calibration["diffseg"], args).mean(1, keepdim=True)
        scores, crf = (
            F.interpolate(x, size, mode="bilinear", align_corners=False).cpu()
            for x in (scores, crf)
        )
        outputs, mask = (scores[0] > calibration["diffseg"]).float(), crf[0, 0] > 0.5  # (N, H, W)
        coherence, ambiguity = outputs.mean(0), outputs.var(0, unbiased=False)  # Eq. 6
        stem, k = path.stem, 2
        while stem in used:
            stem, k = f"{path.stem}_{k}", k + 1
        used.add(stem)
        overlay = outline(img.permute(1, 2, 0).numpy(), mask, (255, 230, 0))
        pictures = {"mask": mask.numpy().astype(np.uint8) * 255, "overlay": overlay}
        pictures |= {"coherence": colour_map(coherence), "ambiguity": colour_map(4 * ambiguity)}
        for name, pixels in pictures.items():
            Image.fromarray(pixels).save(folder / f"{stem}_{name}.png")
        numbers = {"file": str(path), "width": size[1], "height": size[0]}
        numbers |= {"lesion_share": mask.float().mean().item(), "outputs": len(outputs)}
        numbers["mean_coherence_in_mask"] = coherence[mask].mean().item() if mask.any() else None
        numbers["mean_ambiguity"] = ambiguity.mean().item()
        numbers["mean_distance_of_outputs"] = (
            iou_distance(outputs[None], outputs[None]).mean().item()
        )
        (folder / f"{stem}.json").write_text(json.dumps(numbers, indent=2) + "\n")
    return errors


# ==================================================================================================
# 6. Tiles, losses and training
# ==================================================================================================


def tag_tiles(masks, n, size, supervision, seed, per_image=48):
    """Random windows of n images and the tag that a clinician would give to each.

    masks: uint8 (n, R, H, W), read here and nowhere else in DiffSeg's training, or not at all with
    supervision "border". Returns windows (n * K, 5) int64 = image, left, top, width, height and
    tags (n * K,): HEALTHY no lesion pixel, LESION at least 90 % lesion, -1 anything between.
    """
    g, (h, w) = torch.Generator().manual_seed(seed), size
    side = 0.1 + 0.5 * torch.rand(n, per_image, generator=g) ** 1.5  # share of the image's sides
    ww, hh = (side * w).long(), (side * h).long()
    left = (torch.rand(n, per_image, generator=g) * (w - ww + 1)).long()
    top = (torch.rand(n, per_image, generator=g) * (h - hh + 1)).long()
    i = torch.arange(n)[:, None].expand_as(left)
    if supervision == "border":  # small windows at the border are healthy, central ones lesion
        margin = torch.stack([left, w - left - ww, top, h - top - hh]).amin(0)
        off_centre = ((left + ww / 2) / w - 0.5).abs() + ((top + hh / 2) / h - 0.5).abs()
        share = torch.where((margin <= w // 50) & (side < 0.35), 0.0, 0.5)
        share = torch.where((off_centre < 0.15) & (side < 0.35), 1.0, share)
    else:
        total = F.pad((masks.float().mean(1) >= 0.5).double().cumsum(1).cumsum(2), (1, 0, 1, 0))
        right, low = left + ww, top + hh
        inside = total[i, low, right] - total[i, top, right] - total[i, low, left]
        share = (inside + total[i, top, left]) / (ww * hh)
    tags = torch.where(share == 0, HEALTHY, torch.where(share >= 0.9, LESION, -1))
    return torch.stack([i, left, top, ww, hh], 2).flatten(0, 1), tags.flatten()


class Tiles:
    """Training images at twice the network's size, with tagged tiles; draws batches from them."""

    def __init__(self, train, args):
        n, size = len(train), train.images.shape[2:]
        windows, tags = tag_tiles(train.masks, n, size, args.supervision, seed=args.seed)
        self.lesion, self.healthy = (windows[tags == y] for y in (LESION, HEALTHY))
        if not len(self.lesion) or not len(self.healthy):
            raise DataError(f"{train.name}: no tile is healthy, or none mostly lesion")
        self.count = torch.bincount(self.healthy[:, 0], minlength=n)  # healthy tiles of each image
        self.start = self.count.cumsum(0) - self.count
        tag_map = torch.zeros(n, 2, *size, dtype=torch.uint8)  # pixels in tiles of tag y = channel
        for y, group in ((LESION, self.lesion), (HEALTHY, self.healthy)):
            for i, left, top, w, h in group.tolist():
                tag_map[i, y, top : top + h, left : left + w] = 1
        self.images, self.tag_map = train.images.to(args.device), tag_map.to(args.device)
        self.size = args.size

    def crop(self, windows):
        """Resize windows (B, 5) of the images to the network's size, flipped at random, [-1, 1]."""
        i, left, top, w, h = windows.unbind(1)
        height, width = self.images.shape[2:]
        theta = torch.zeros(len(i), 2, 3)
        flip = torch.randint(0, 2, (2, len(i))) * 2 - 1
        theta[:, 0, 0], theta[:, 0, 2] = w / width * flip[0], (2 * left + w) / width - 1
        theta[:, 1, 1], theta[:, 1, 2] = h / height * flip[1], (2 * top + h) / height - 1
        x = self.images[i.to(self.images.device)].float() / 127.5 - 1  # (B, 3, 2H, 2W)
        grid = F.affine_grid(theta, [len(i), 3, *self.size], align_corners=False).to(x)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False)  # (B, 3, H, W)

    def implant(self, b):
        """b implanted tiles, their lesion-free counterparts (b, 3, H, W) and blobs (b, 1, H, W).

        Four of five pairs come from one image: then skin, light and camera agree, and the implant
        differs from its surroundings by the lesion alone.
        """
        lesion = self.lesion[torch.randint(len(self.lesion), (b,))]
        count, start = self.count[lesion[:, 0]], self.start[lesion[:, 0]]
        own = start + (torch.rand(b) * count).long()
        other = torch.randint(len(self.healthy), (b,))
        healthy = self.healthy[torch.where((torch.rand(b) < 0.8) & (count > 0), own, other)]
        lesion, healthy = self.crop(lesion), self.crop(healthy)
        blob = random_blobs(b, self.size, lesion.device)
        weight = blob * (1 - 0.4 * torch.rand(b, 1, 1, 1)).to(blob)  # faint lesions too
        gain = (1 + 0.3 * (torch.rand(b, 1, 1, 1) - 0.5) + 0.1 * (torch.rand(b, 3, 1, 1) - 0.5)).to(
            blob
        )
        implanted = weight * lesion + (1 - weight) * healthy
        return *((gain * (x + 1) - 1).clamp(-1, 1) for x in (implanted, healthy)), blob

    def whole(self, b):
        """b whole images (b, 3, H, W) in [-1, 1] and their tag maps (b, 2, H, W) in {0, 1}."""
        i = torch.randint(len(self.images), (b,)).to(self.images.device)
        x, tags = augment(self.images[i].float() / 255, self.tag_map[i].float())
        return F.avg_pool2d(x, 2) * 2 - 1, (F.avg_pool2d(tags, 2) == 1).float()


def diffseg_loss(net, tiles, args):
    """The loss of one batch: reconstructions of x0 and, for y = healthy, the blend weight."""
    b, device = args.batch_size, tiles.images.device
    n_whole, n_same = max(1, b // 2), max(1, b // 24)  # whole images; images that stay themselves
    n_pairs = max(1, b - n_whole - 4 * n_same)
    implanted, healthy, blob = tiles.implant(n_pairs + 2 * n_same)
    whole, tags = tiles.whole(n_whole + 2 * n_same)
    pairs, _, rest = implanted.split([n_pairs, n_same, n_same])
    x = torch.cat([pairs, healthy[n_pairs:-n_same], whole[:n_whole], rest, whole[n_whole:]])
    target = torch.cat([healthy[:-n_same], whole[:n_whole], rest, whole[n_whole:]])
    n_healthy = n_pairs + n_same + n_whole
    y = torch.where(torch.arange(len(x), device=device) < n_healthy, HEALTHY, LESION)
    t = torch.randint(args.t_train[0], args.t_train[1] + 1, (len(x),)).to(device)
    out = net(add_noise(x, t, torch.randn_like(x)), t, y)  # (B, 4, H, W)
    # A whole image tells its lesion-free counterpart only where its tiles are tagged healthy.
    on_whole = slice(n_pairs + n_same, n_healthy)
    known = torch.ones(len(x), 1, *args.size, device=device)
    known[on_whole] = tags[:n_whole, HEALTHY : HEALTHY + 1]
    loss_x0 = (known * (out[:, :3] - target) ** 2).mean()  # Eq. 2 [DiffSeg, O]
    # ours: the blend weight is known too: the blob of an implant, 0 / 1 in healthy / lesion tiles.
    blend = torch.cat([blob[:n_pairs], torch.zeros_like(blob[:n_same]), tags[:n_whole, :1]])
    weight = torch.ones_like(known[:n_healthy])
    weight[on_whole] = tags[:n_whole].amax(1, keepdim=True)
    bce = F.binary_cross_entropy_with_logits(out[:n_healthy, 3:], blend, weight, reduction="sum")
    return loss_x0 + args.blend_weight * bce / weight.sum()


def unet_loss(net, train, args):
    """Cross-entropy plus soft Dice of the supervised U-Net, each image with one random rater."""
    i = torch.randint(len(train), (args.batch_size,))
    rater = torch.randint(train.masks.shape[1], (args.batch_size,))
    img = train.images[i].to(args.device).float() / 255
    img, mask = augment(img, train.masks[i, rater][:, None].to(args.device).float())
    x, mask = F.avg_pool2d(img, 2) * 2 - 1, (F.avg_pool2d(mask, 2) >= 0.5).float()
    zero = torch.zeros(len(x), dtype=torch.long, device=x.device)
    logits = net(x, zero, zero)  # (B, 1, H, W)
    p = logits.sigmoid()
    overlap = (2 * (p * mask).sum((1, 2, 3)) + 1) / (p.sum((1, 2, 3)) + mask.sum((1, 2, 3)) + 1)
    return F.binary_cross_entropy_with_logits(logits, mask) + 1 - overlap.mean()


def save_checkpoint(state, path):
    """Write state to path so that either the old file or the whole new one is there, never half."""
    buffer, temp = io.BytesIO(), path.with_suffix(".tmp")
    torch.save(state, buffer)
    try:
        temp.write_bytes(buffer.getbuffer())
        os.replace(temp, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temp.unlink()
        raise DataError(
            f"cannot write {path} ({error.strerror}); older files are intact"
        ) from error


def load_checkpoint(path, kind, args, fixed=("width", "pair", "size", "map")):
    """Read a checkpoint of stage kind, trained with the flags `fixed` as they are now.

    Raises DataError if it is missing, broken, another method's or trained with other flags.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"no checkpoint {path}: train first, or name one by --checkpoint") from None
    except Exception as error:  # torch and zipfile raise all kinds
        raise DataError(f"{path} is not a readable checkpoint; train again") from error
    if not isinstance(state, dict) or state.get("method") != "diffseg" or state.get("kind") != kind:
        raise DataError(f"{path} is a checkpoint of something else, not of {kind} in diffseg.py")
    for name in fixed:
        was, now = state["args"][name], getattr(args, name)
        if was != (list(now) if isinstance(now, tuple) else now):
            flag = "x".join(map(str, was[::-1])) if name == "size" else was
            raise DataError(f"{path} was trained with --{name} {flag}: pass that flag")
    return state


def train(kind, net, loss_function, val, args, folder):
    """Train one network, the loop of both stages: returns (best EMA network, threshold, seconds).

    kind: "diffseg" or "unet". loss_function(net) draws a batch and returns its loss; val, the
    validation split, chooses checkpoint and threshold. last.pt holds all that --resume needs.
    """
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    opt = torch.optim.AdamW(net.parameters(), args.lr, weight_decay=1e-4)
    end = "" if kind == "diffseg" else f"_{kind}"
    last, best, log_file = (folder / n for n in (f"last{end}.pt", f"best{end}.pt", f"log{end}.csv"))
    step, best_dice, seconds, log, smooth = 0, -1.0, 0.0, [], None
    torch.manual_seed(args.seed)
    if args.resume and last.exists():
        state = load_checkpoint(last, kind, args)
        for name in ("steps", "lr", "batch_size", "supervision", "t_train", "blend_weight", "bf16"):
            if (was := state["args"][name]) != getattr(args, name):
                raise DataError(f"{last}: {name} was {was}, now {getattr(args, name)}; keep it")
        net.load_state_dict(state["net"])
        ema.load_state_dict(state["ema"])
        opt.load_state_dict(state["opt"])
        step, best_dice, seconds, log, smooth = (
            state[k] for k in ("step", "best", "seconds", "log", "smooth")
        )
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda_rng"])
    forward = torch.compile(net) if args.compile else net
    stop = []  # filled by Ctrl-C: the running step is finished first, so that the state is whole
    handler = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    start = time.time() - seconds
    bar = tqdm(total=args.steps * args.batch_size, initial=step * args.batch_size, unit="img",
               desc=f"train {kind}", smoothing=0.05)  # fmt: skip
    while step < args.steps:
        net.train()
        warm, cosine = min(1, (step + 1) / 100), 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
        for group in opt.param_groups:
            group["lr"] = args.lr * warm * cosine
        with autocast(args):
            loss = loss_function(forward)
        value = loss.item()
        if not math.isfinite(value):
            raise DataError(
                f"loss is {value} at step {step}: try --lr {args.lr / 3:.0e} or --amp off"
            )
        opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        step += 1
        with torch.no_grad():
            decay = min(0.995, step / (step + 10))  # short memory first: the start is forgotten
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
        smooth = value if smooth is None else 0.98 * smooth + 0.02 * value
        bar.update(args.batch_size)
        bar.set_postfix(loss=f"{smooth:.4f}", val_dice=f"{best_dice:.3f}")
        if step % args.save_every and step < args.steps and not stop:
            continue
        rng = torch.get_rng_state()
        seconds = time.time() - start
        state = {
            "method": "diffseg", "kind": kind, "net": net.state_dict(), "ema": ema.state_dict(),
            "opt": opt.state_dict(), "step": step, "rng": rng, "seconds": seconds,
            "cuda_rng": torch.cuda.get_rng_state() if args.device.startswith("cuda") else None,
            "args": {k: list(v) if isinstance(v, tuple) else v for k, v in vars(args).items()},
        }  # fmt: skip
        if step % args.save_every == 0 or step == args.steps:
            threshold, dice = calibrate(kind, ema, val, args)
            log.append([step, round(smooth, 6), round(dice, 5), round(threshold, 3)])
            if dice > best_dice:
                best_dice = dice
                shown = {k: state[k] for k in ("method", "kind", "ema", "step", "args")}
                save_checkpoint(shown | {"threshold": threshold, "dice": dice}, best)
            with open(log_file, "w", newline="") as file:
                csv.writer(file).writerows([["step", "loss", "val_dice", "threshold"], *log])
        save_checkpoint(state | {"best": best_dice, "log": log, "smooth": smooth}, last)
        if stop:
            bar.close()
            print(f"stopped at step {step}; add --resume to go on", file=sys.stderr)
            raise SystemExit(130)
    bar.close()
    signal.signal(signal.SIGINT, handler)
    state = load_checkpoint(best, kind, args)
    ema.load_state_dict(state["ema"])
    return ema, state["threshold"], seconds


# ==================================================================================================
# 7. Main
# ==================================================================================================


def print_table(rows):
    """Print mean metrics, a row per method."""
    names = {"otsu": "Otsu, green channel", "unet": "U-Net, supervised", "diffseg": "DiffSeg"}
    names["diffseg_crf"] = "DiffSeg + CRF"
    print(
        f"\n{'':22}"
        + "".join(f"{m.replace('thresholded_jaccard', 'thr.Jacc'):>11}" for m in METRICS)
    )
    for row, metrics in rows.items():
        print(f"{names[row]:20}" + "".join(f"{metrics[m]['mean']:12.3f}" for m in METRICS))


def run(args):
    """Load, train, evaluate, draw; returns the exit status."""
    folder = Path(args.out) / "diffseg" / args.data / f"seed{args.seed}"
    checkpoint = Path(args.checkpoint) if args.checkpoint else folder / "best.pt"
    nets, calibration = {}, {}
    if args.predict or args.eval_only:
        fixed = ["width", "pair", "size", *(["map"] if args.predict else [])]
        state = load_checkpoint(checkpoint, "diffseg", args, fixed)
        nets["diffseg"], calibration["diffseg"] = build("diffseg", args), state["threshold"]
        nets["diffseg"].load_state_dict(state["ema"])
        nets["diffseg"].eval()
    if args.predict:
        errors = predict(nets["diffseg"], calibration, args, folder / "predictions")
        print(f"predictions in {folder / 'predictions'}")
        for error in errors:
            print(f"diffseg.py: error: {error}", file=sys.stderr)
        return 2 if errors else 0
    folder.mkdir(parents=True, exist_ok=True)
    limit = 24 if args.quick else None
    double = (2 * args.size[0], 2 * args.size[1])  # tiles are cut from twice the resolution

    def load(split, size):
        found = load_segmentation(args.data, args.data_root, split, size, workers=args.num_workers)
        cut = {k: getattr(found, k)[:limit] for k in ("ids", "images", "masks")}
        return replace(found, **cut)

    val = load("val", args.size)
    test = load("test", args.size)
    result_file, seconds, trained_by = folder / "result.json", {}, args.argv
    if args.eval_only:
        trained_by, args.steps = state["args"]["argv"], state["args"]["steps"]
        if result_file.exists():  # the training's time is kept
            seconds = json.loads(result_file.read_text()).get("seconds", {})
        if args.compare and (folder / "best_unet.pt").exists():
            state = load_checkpoint(folder / "best_unet.pt", "unet", args, ["width", "size"])
            nets["unet"], calibration["unet"] = build("unet", args).eval(), state["threshold"]
            nets["unet"].load_state_dict(state["ema"])
        calibration = {kind: calibrate(kind, net, val, args)[0] for kind, net in nets.items()}
    else:
        train_set = load("train", double)
        args.steps = args.epochs * math.ceil(len(train_set) / args.batch_size)
        args.steps = min(args.steps, args.max_steps or args.steps)
        (folder / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")
        tiles = Tiles(train_set, args)
        stages = {"diffseg": lambda net: diffseg_loss(net, tiles, args)}
        if args.compare:
            stages["unet"] = lambda net: unet_loss(net, train_set, args)
        for kind, loss_function in stages.items():
            torch.manual_seed(args.seed)
            nets[kind], calibration[kind], seconds[kind] = train(
                kind, build(kind, args), loss_function, val, args, folder
            )
    rows, maps = evaluate(nets, calibration, test, args)
    figure = folder / "figures" / "panel.png"
    draw_panel(test, rows, maps, calibration["diffseg"], figure)
    commit = ""
    with contextlib.suppress(OSError):  # git is not installed
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False,
            cwd=Path(__file__).parent,
        ).stdout.strip()  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB of main memory
    if args.device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated() / 2**20
    result = {
        "method": "diffseg", "data": args.data, "split": "test", "n_images": len(test),
        "size": f"{args.size[1]}x{args.size[0]}", "seed": args.seed,
        "steps": args.steps, "seconds": seconds,
        "device": args.device, "peak_memory_mib": round(peak), "torch": torch.__version__,
        "git": commit or None, "command": " ".join(["python diffseg.py", *args.argv]),
        "trained_by": " ".join(["python diffseg.py", *trained_by]),
        "thresholds": calibration,
        "rows": {
            row: {
                m: {"mean": v.mean().item(), "std": v.std(unbiased=False).item()}
                for m, v in metrics.items()
            }
            for row, metrics in rows.items()
        },
    }  # fmt: skip
    result_file.write_text(json.dumps(result, indent=2) + "\n")
    print_table(result["rows"])
    print(f"\n{len(test)} test images of {args.data}; means over images. Open {figure}")
    return 0


def main(argv=None):
    """Run the command line; every foreseeable error is one line and exit status 2."""
    args = parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    previous = signal.getsignal(signal.SIGINT)
    try:
        status = run(args)
    except (DataError, OSError) as error:
        print(f"diffseg.py: error: {error}", file=sys.stderr)
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
