"""DiffSeg: weakly supervised skin-lesion segmentation by diffusion difference.

Paper: DiffSeg, https://arxiv.org/abs/2404.16474. The idea in five lines: noise an image, let one
denoising network reconstruct it twice, as what it is ("lesion") and as its lesion-free counterpart
("healthy"), and take the difference: it shows the lesion. It learns the counterpart from tagged
tiles, not pixels: lesion tiles blended into healthy tiles. Other noise and a tighter or looser
threshold give other outputs, as of other annotators; where these differ the result is unsure.

    x0 --noise--> xt --+-- f(xt, t_n, lesion)  --> x0_lesion ---+
                       |                                        +-- difference, blend --> N masks
                       +-- f(xt, t_n, healthy) --> x0_healthy --+
    N masks --> mean: coherence; variance: ambiguity; distances: GED; dense CRF --> one mask

Commands:
    python diffseg.py                                     synthetic images on a CPU, minutes
    python diffseg.py --data isic2018                     downloads ISIC 2018 Task 1 (13 GB) first
    python diffseg.py --data folder --data-root mine      mine/<train|val|test>/{images,masks}/*
    python diffseg.py --data isic2018 --predict photo.jpg folder       with the trained network

Results: Dice 0.849 (DiffSeg + CRF) against 0.900 (U-Net on all masks) and 0.610 (Otsu), mean of
    seeds 0 and 1 on 300 test images of an ISIC subset at 64 x 48 px, 1,860 steps of 24, 17 minutes
    of one CPU core a seed (U-Net: 13), torch 2.15; commands and records: README.md, docs/results.

Deviations from the paper (D) and its code, with reasons:
D1  One conditional network instead of two: half the memory. `--pair official` trains the two.
D2  The lesion-free counterparts come from implantation; the paper does not say where its do.
D3  Supervision is 48 tags an image, each of one random tile (healthy, lesion or partly lesion); the
    masks of the training set only produce those tags. `--supervision border` uses none of them
    (with --no-compare none is opened). Both choose checkpoint, threshold and spread on the masks of
    the validation split.
D4  The healthy reconstruction carries a fourth channel, "blend", presence of a lesion, known for
    implants and inside tagged tiles; of a partly lesion tile the maximum and minimum are known. The
    map is the geometric mean of it and of the difference (`--map blend|signed|norm`: one alone).
D5  Small t at inference (5..80 of 1000; 5..250 in training): maps got worse with growing t.
D6  Dice is the mean over images, GED compares with annotators and counts all pairs.
D7  Each output has its own threshold, evenly spread around the common one as tighter and looser
    annotators would draw: outputs of one network at one threshold hardly differ. The spread is
    chosen on validation by GED; the U-Net's samples get theirs in the same way.
D8  The paper's CRF parameters lower Dice at this image size; ours were chosen on validation, at
    64 x 48. Scale --sxy-bilateral with --size yourself. The CRF's unary is calibrated: logits are
    shifted so that an output's threshold means 1/2.
"""

import argparse
import contextlib
import copy
import csv
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
METHOD = "diffseg"
LESION, HEALTHY, MIXED, UNKNOWN = 0, 1, 2, 3  # tags of a tile; the first two also condition f
# Flags that must be as they were in training to load a network, to use its threshold, to resume:
MODEL_FLAGS = ["width", "pair", "size"]
PREDICT_FLAGS = [*MODEL_FLAGS, "map", "t_infer"]
RESUME_FLAGS = [*PREDICT_FLAGS, "steps", "lr", "batch_size", "supervision", "t_train", "bf16"]
RESUME_FLAGS += ["blend_weight", "outputs", "data_root", "save_every"]
CRF_FLAGS = ["sxy_gaussian", "compat_gaussian", "sxy_bilateral", "srgb", "compat_bilateral"]
T = 1000  # diffusion steps: t runs from 0 (nearly clean) to T - 1 (nearly pure noise)

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
    formatter = argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=formatter)
    add = p.add_argument
    add("--data", default="synthetic", choices=["synthetic", "isic2018", "folder"], help="data set")
    add("--data-root", default="data", help="folder that holds, or will receive, the data set")
    add("--size", type=parse_size, default="64x48", help="network input: N or WIDTHxHEIGHT, pixels")
    add("--epochs", type=positive, help="passes over the training set [synthetic 14, others 30]")
    add("--max-steps", type=positive, help="at most this many steps; the schedule fits")
    add("--batch-size", type=positive, default=24, help="images in a training step")
    add("--lr", type=float, default=1e-3, help="peak of AdamW's cosine schedule (ours)")
    add("--seed", type=int, default=0, help="seed of weights, batches and noise")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--amp", default="auto", choices=["auto", "on", "off"], help="bf16 autocast")
    add("--compile", action="store_true", help="torch.compile the networks in training")
    add("--num-workers", type=positive, default=8, help="threads that decode images, once")
    add("--out", default="out", help="results go to OUT/diffseg/DATA/seedK")
    add("--resume", action="store_true", help="go on from the last checkpoint, exactly")
    add("--eval-only", action="store_true", help="no training: evaluate the best checkpoint")
    add("--checkpoint", help="file for --eval-only and --predict [best.pt in --out]")
    add("--predict", nargs="+", metavar="PATH", help="segment these images or folders of images")
    add("--quick", action="store_true", help="a few steps on a few images: does it run at all?")
    on_off = argparse.BooleanOptionalAction
    add("--compare", action=on_off, default=True, help="also train the supervised U-Net")
    add("--supervision", default="tags", choices=["tags", "border"], help="source of tile tags")
    pairs = ["shared", "official"]
    add("--pair", default="shared", choices=pairs, help="one network, or two (paper)")
    add("--width", type=int, default=32, help="channels of the first U-Net level (ours)")
    maps = ["product", "blend", "signed", "norm"]
    add("--map", default="product", choices=maps, help="what makes the lesion map (ours)")
    add("--blend-weight", type=float, default=0.5, help="weight of the blend loss (ours)")
    add("--t-train", type=int, nargs=2, default=[5, 250], help="range of t in training (ours)")
    add("--t-infer", type=int, nargs=2, default=[5, 80], help="range of t_n at inference (ours)")
    add("--outputs", type=positive, default=8, help="N outputs an image, 2 N network calls (ours)")
    add("--crf-rounds", type=positive, default=3, help="K CRF results are averaged (paper)")
    add("--crf-outputs", type=positive, default=4, help="H random outputs for each (paper)")
    add("--sxy-bilateral", type=float, default=5.0, help="CRF: pixels (ours; paper 80)")
    add("--srgb", type=float, default=8.0, help="CRF: grey levels (ours; paper 13)")
    add("--compat-bilateral", type=float, default=2.0, help="CRF: weight (ours; paper 10)")
    add("--sxy-gaussian", type=float, default=3.0, help="CRF: pixels (paper)")
    add("--compat-gaussian", type=float, default=0.0, help="CRF: weight (ours; paper 3)")
    add("--save-every", type=positive, default=200, help="steps between checkpoints")
    args = p.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    args.epochs = args.epochs or (14 if args.data == "synthetic" else 30)
    if args.quick:
        args.max_steps = args.max_steps or 6
        args.outputs, args.batch_size = min(4, args.outputs), min(8, args.batch_size)
    for name in ("t_train", "t_infer"):
        if not 0 <= getattr(args, name)[0] <= getattr(args, name)[1] < T:
            p.error(f"--{name.replace('_', '-')} needs 0 <= LOW <= HIGH < {T}")
    if args.batch_size < 3:
        p.error("--batch-size must be at least 3: a batch holds implants and whole images")
    if args.width < 16 or args.width % 16:
        p.error(f"--width {args.width} must be a multiple of 16")
    if not args.lr > 0:
        p.error("--lr must be positive")
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


def diffusion_difference(x0_healthy, x0_lesion):
    """Signed diffusion difference (B, C, H, W) of two reconstructions; > 0: the lesion is darker.

    The paper subtracts pseudo-noises, eps~ = (xt - sqrt(a) x0_hat) / sqrt(1 - a) (Eq. 3, a is
    alpha_bar_t). In eps~_lesion - eps~_healthy the noised image xt cancels, and scaled by
    sqrt(1 - a) / sqrt(a), so that its size does not depend on t, what is left is this.
    """
    return x0_healthy - x0_lesion  # Eq. 4 [DiffSeg, G; scaling O]


def difference_score(difference, kind):
    """One score per pixel, (B, C, H, W) -> (B, 1, H, W) in [0, 1], from min to max of each image.

    kind "norm": length over the channels; any other: mean over them, negative parts cut.
    """
    d = difference.mean(1, keepdim=True).clamp(min=0)
    d = difference.norm(dim=1, keepdim=True) if kind == "norm" else d
    low, high = d.amin((1, 2, 3), keepdim=True), d.amax((1, 2, 3), keepdim=True)
    return (d - low) / (high - low).clamp(min=1e-6)  # Eq. 5 [DiffSeg, G]


def random_blobs(b, size):
    """Random soft star-convex blobs (B, 1, H, W) in [0, 1], drawn from torch's CPU generator.

    Radius 5 to 60 % of the width, outline a Fourier series, edge from sharp to a quarter radius.
    """
    h, w = size

    def u(low, high):
        return low + (high - low) * torch.rand(b, 1, 1)

    y = (torch.arange(h) + 0.5)[:, None] / w - u(0.15, 0.85) * h / w  # (B, H, 1)
    x = (torch.arange(w) + 0.5) / w - u(0.15, 0.85)  # (B, 1, W)
    turn, squeeze, radius = u(0, math.pi), u(0.6, 1), 0.05 + 0.55 * u(0, 1) ** 1.3
    x, y = x * turn.cos() + y * turn.sin(), (y * turn.cos() - x * turn.sin()) / squeeze  # (B, H, W)
    angle, outline = torch.atan2(y, x), torch.ones_like(x)
    for k in range(2, 7):
        outline = outline + 0.25 / k**0.9 * torch.randn(b, 1, 1) * torch.cos(k * angle + u(0, 6.3))
    distance = radius * outline.clamp(min=0.3) - torch.hypot(x, y)  # > 0 inside
    return torch.sigmoid(2 * distance / (0.008 + u(0.02, 0.27) * radius))[:, None]


def otsu_threshold(x, bins=256):
    """Otsu's threshold of each row of x (B, P) in [0, 1]: (B, 1); the object lies above it."""
    index = (x * (bins - 1)).round().long()
    hist = torch.zeros(len(x), bins).scatter_add_(1, index, torch.ones_like(x))
    below, total = hist.cumsum(1), x.shape[1]  # pixels at or below each level
    moment = (hist * torch.arange(bins)).cumsum(1)
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

    As denoiser c_out = 4: the reconstruction of x0 and one logit, the presence of a lesion (blend).
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
        is_lesion = (y == LESION)[:, None, None, None]
        return torch.where(is_lesion, self.have(x, t, y), self.no(x, t, y))


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
def lesion_scores(net, img, args, kind=None):
    """N outputs of DiffSeg for images (B, 3, H, W) uint8: scores (B, N, H, W) in [0, 1].

    The n-th output has its own noise and step t_n, the same for every image, so that the result
    does not depend on the batch. It costs 2 N network calls (4 N with --pair official).
    """
    g, kind = torch.Generator().manual_seed(args.seed), kind or args.map
    x0, scores = img.to(args.device).float() / 127.5 - 1, []
    for t_n in torch.linspace(*args.t_infer, args.outputs).long().tolist():
        eps = torch.randn(1, *x0.shape[1:], generator=g).to(x0).expand_as(x0)
        t = torch.full((len(x0),), t_n, device=x0.device)
        xt = add_noise(x0, t, eps)
        with autocast(args):
            healthy = net(xt, t, torch.full_like(t, HEALTHY))  # (B, 4, H, W)
            lesion = net(xt, t, torch.full_like(t, LESION))
        score = difference_score(diffusion_difference(healthy[:, :3], lesion[:, :3]), kind)
        blend = healthy[:, 3:].sigmoid()  # (B, 1, H, W)
        # ours: blend knows what a lesion is, the difference where it ends: their geometric mean
        scores.append({"blend": blend, "product": (blend * score).sqrt()}.get(kind, score))
    return torch.cat(scores, 1)


@torch.no_grad()
def unet_scores(net, img, args):
    """N MC-dropout samples of the U-Net's probabilities, (B, 3, H, W) uint8 -> (B, N, H, W)."""
    x = img.to(args.device).float() / 127.5 - 1
    zero = torch.zeros(len(x), dtype=torch.long, device=x.device)
    net.train()  # of its layers only dropout behaves differently in training
    with autocast(args), torch.random.fork_rng():  # validation must not disturb the training
        torch.manual_seed(args.seed)
        p = torch.cat([net(x, zero, zero).sigmoid() for _ in range(args.outputs)], 1)
    net.eval()
    return p


SCORES = {"diffseg": lesion_scores, "unet": unet_scores}


def batched(function, *tensors, size=64):
    """Apply function to chunks of tensors (N, ...); its outputs, concatenated on the CPU."""
    chunks = zip(*(x.split(size) for x in tensors), strict=True)
    return torch.cat([function(*chunk).cpu() for chunk in chunks])


def consensus(masks):
    """Majority of raters, (B, R, H, W) -> (B, 1, H, W) bool; a tie counts as lesion."""
    return masks.float().mean(1, keepdim=True) >= 0.5


def relative(scores, calibration):
    """Scores (B, N, H, W) as logits over each output's own threshold; > 0 is lesion.

    calibration = (threshold, spread): the outputs' thresholds lie evenly, as logits, within
    `spread` of the common one: annotators that draw tighter and looser. One output has just it.
    """
    threshold, spread = calibration
    n = scores.shape[1]
    offset = torch.linspace(-spread, spread, n) if n > 1 else torch.zeros(1)
    offset = offset[torch.randperm(n, generator=torch.Generator().manual_seed(n))]  # not by t_n
    level = math.log(threshold / (1 - threshold)) + offset
    return torch.logit(scores, 1e-4) - level[:, None, None].to(scores)


def fuse(logits):
    """One mask (B, 1, H, W) bool from the outputs' relative logits (B, N, H, W), by their mean."""
    return logits.mean(1, keepdim=True) > 0


def calibrate(kind, net, val, args):
    """Choose (threshold, spread) of a network on the split val; returns them and the mean Dice.

    The threshold has the best Dice of the mean logit, then the spread has the lowest GED.
    """
    scores = batched(lambda x: SCORES[kind](net, x, args), val.images)
    truth, grid = consensus(val.masks), [k / 50 for k in range(2, 49)]
    preds = (fuse(relative(scores, (g, 0.0))) for g in grid)
    dice = [overlap_metrics(pred, truth)["dice"].mean().item() for pred in preds]
    threshold, spreads = grid[int(np.argmax(dice))], [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    masks = (relative(scores, (threshold, s)) > 0 for s in spreads)
    distance = [ged(m, val.masks).mean().item() for m in masks]
    return (threshold, spreads[int(np.argmin(distance))]), max(dice)


def crf_integrate(logits, img, args):
    """Integrate outputs by the dense CRF: logits (B, N, H, W) -> (B, K, H, W) in [0, 1].

    Each of the K results starts from the average of H random outputs; img is (B, 3, H, W) uint8.
    """
    crf = DenseCRF(**{name: getattr(args, name) for name in CRF_FLAGS})
    g, results = torch.Generator().manual_seed(args.seed), []
    p, img = logits.to(args.device).sigmoid(), img.to(args.device)
    for _ in range(args.crf_rounds):
        chosen = torch.randperm(p.shape[1], generator=g)[: args.crf_outputs]
        mean = p[:, chosen.to(p.device)].mean(1, keepdim=True)  # (B, 1, H, W)
        results.append(crf(unary_from_softmax(torch.cat([1 - mean, mean], 1)), img)[:, 1:])
    return torch.cat(results, 1)  # Eq. 8 [DiffSeg, G]


def otsu_green(img):
    """Baseline without learning: green channel below Otsu's threshold, (B, 1, H, W) bool."""
    x = 1 - img[:, 1].flatten(1).float() / 255
    return (x > otsu_threshold(x)).view(len(img), 1, *img.shape[2:])


# ==================================================================================================
# 5. Evaluation and figures
# ==================================================================================================


def evaluate(nets, calibration, data, args):
    """Evaluate every method on one split: {row: {metric: (B,) tensor}} and masks for the figures.

    nets: {"diffseg": net, "unet": net or absent}; calibration: theirs, chosen on validation.
    """
    samples = {"otsu": otsu_green(data.images)}  # row: masks (B, N, H, W) bool
    preds = {"otsu": samples["otsu"]}  # row: one mask (B, 1, H, W)
    for kind in sorted(nets, reverse=True):
        scores = batched(lambda x, kind=kind: SCORES[kind](nets[kind], x, args), data.images)
        logits = relative(scores, calibration[kind])
        samples[kind], preds[kind] = logits > 0, fuse(logits)
    integrated = batched(lambda z, x: crf_integrate(z, x, args), logits, data.images)
    samples["diffseg_crf"] = integrated > 0.5
    preds["diffseg_crf"] = integrated.mean(1, keepdim=True) > 0.5
    truth = consensus(data.masks)
    rows = {
        row: overlap_metrics(preds[row], truth) | {"ged": ged(masks, data.masks)}
        for row, masks in samples.items()
    }
    return rows, {"samples": samples["diffseg"], "pred": preds["diffseg_crf"]}


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


def draw_panel(net, data, rows, masks, args, path):
    """Write the panel of the best, median and worst test images by Dice of DiffSeg + CRF."""
    order, n = rows["diffseg_crf"]["dice"].argsort(descending=True).tolist(), len(data)
    middle = max(0, (n - 1) // 2)
    places = {"best": order[:2], "median": order[middle : middle + 2], "worst": order[-2:]}
    shown = [0, args.outputs // 2, args.outputs - 1]
    titles = ["image + truth", "truth", "difference", *(f"output {k + 1}" for k in shown)]
    sheet = []
    for place, i in ((place, i) for place, indices in places.items() for i in indices):
        img, truth = data.images[i].permute(1, 2, 0).numpy(), consensus(data.masks[i : i + 1])[0]
        outputs = masks["samples"][i].float()  # (N, H, W)
        score = lesion_scores(net, data.images[i : i + 1], args, "signed")[0].mean(0).cpu()
        tiles = [(outline(img, truth[0]), ""), (colour_map(truth[0]), ""), (colour_map(score), "")]
        for mask in outputs[shown]:
            dice = overlap_metrics(mask[None, None], truth[None])["dice"].item()
            tiles.append((colour_map(mask), f"Dice {dice:.2f}"))
        variance = outputs.var(0, unbiased=False)  # Eq. 6 [DiffSeg, G]; at most 0.25
        tiles.append((colour_map(outputs.mean(0)), f"Dice {rows['diffseg']['dice'][i]:.2f}"))
        tiles.append((colour_map(4 * variance), f"mean {variance.mean():.3f}"))
        result = outline(img, masks["pred"][i, 0], (255, 230, 0))
        tiles.append((result, f"Dice {rows['diffseg_crf']['dice'][i]:.2f}"))
        sheet.append((f"{place}\n{data.ids[i][-7:]}", tiles))
    titles += ["coherence", "ambiguity", "DiffSeg + CRF"]
    draw_sheet(titles, sheet, path, scale=max(1, round(128 / args.size[1])))


def predict(net, calibration, args, folder):
    """Segment --predict files; per image a mask, overlay, coherence and ambiguity PNG and a json.

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
        logits = relative(lesion_scores(net, small, args), calibration)
        crf = crf_integrate(logits, small, args).mean(1, keepdim=True)
        mask = F.interpolate(crf.cpu(), size, mode="bilinear")[0, 0] > 0.5  # (H, W)
        coherence = torch.zeros(size)
        for z in logits.cpu().split(1, 1):  # one at a time: photographs are large
            coherence += (F.interpolate(z, size, mode="bilinear")[0, 0] > 0) / args.outputs
        ambiguity = coherence * (1 - coherence)  # Eq. 6: the variance of N binary masks
        stem, k = path.stem, 2
        while stem in used:
            stem, k = f"{path.stem}_{k}", k + 1
        used.add(stem)
        overlay = outline(img.permute(1, 2, 0).numpy(), mask, (255, 230, 0))
        pictures = {"mask": mask.numpy().astype(np.uint8) * 255, "overlay": overlay}
        pictures |= {"coherence": colour_map(coherence), "ambiguity": colour_map(4 * ambiguity)}
        for name, pixels in pictures.items():
            Image.fromarray(pixels).save(folder / f"{stem}_{name}.png")
        numbers = {
            "file": str(path), "width": size[1], "height": size[0], "outputs": args.outputs,
            "lesion_share": mask.float().mean().item(),
            "mean_coherence_in_mask": coherence[mask].mean().item() if mask.any() else None,
            "mean_ambiguity": ambiguity.mean().item(),
            "mean_distance_of_outputs": iou_distance(logits > 0, logits > 0).mean().item(),
        }  # fmt: skip
        (folder / f"{stem}.json").write_text(json.dumps(numbers, indent=2) + "\n")
    return errors


# ==================================================================================================
# 6. Tiles, losses and training
# ==================================================================================================


def tag_tiles(masks, n, size, supervision, seed, per_image=48):
    """Random windows of n images and the tag that a clinician would give to each.

    masks: uint8 (n, R, H, W), read here and nowhere else in DiffSeg's training, or not at all with
    supervision "border". Returns windows (n, K, 4) int64 = left, top, width, height in pixels and
    tags (n, K): HEALTHY no lesion pixel, LESION at least 90 % lesion, MIXED between, or UNKNOWN.
    """
    g, (h, w) = torch.Generator().manual_seed(seed), size
    side = 0.1 + 0.5 * torch.rand(n, per_image, generator=g) ** 1.5  # share of the image's sides
    ww, hh = (side * w).long(), (side * h).long()
    left = (torch.rand(n, per_image, generator=g) * (w - ww + 1)).long()
    top = (torch.rand(n, per_image, generator=g) * (h - hh + 1)).long()
    windows = torch.stack([left, top, ww, hh], 2)
    if supervision == "border":  # small windows at the border are healthy, central ones lesion
        margin = torch.stack([left, w - left - ww, top, h - top - hh]).amin(0)
        off_centre = ((left + ww / 2) / w - 0.5).abs() + ((top + hh / 2) / h - 0.5).abs()
        tags = torch.where((margin <= w // 50) & (side < 0.35), HEALTHY, UNKNOWN)
        return windows, torch.where((off_centre < 0.15) & (side < 0.35), LESION, tags)
    total = F.pad(consensus(masks)[:, 0].double().cumsum(1).cumsum(2), (1, 0, 1, 0))
    i, right, low = torch.arange(n)[:, None], left + ww, top + hh
    inside = total[i, low, right] - total[i, top, right] - total[i, low, left]
    share = (inside + total[i, top, left]) / (ww * hh)
    tags = torch.where(share >= 0.9, LESION, MIXED)
    return windows, torch.where(share == 0, HEALTHY, tags)


def boxes(windows, size):
    """Windows (..., 4) as masks (..., H, W) bool."""
    left, top, w, h = windows[..., None].unbind(-2)  # (..., 1)
    x, y = torch.arange(size[1]), torch.arange(size[0])
    columns, rows = (x >= left) & (x < left + w), (y >= top) & (y < top + h)
    return rows[..., :, None] & columns[..., None, :]


class Tiles:
    """Training images at twice the network's size, with tagged tiles; draws batches from them."""

    def __init__(self, train, args):
        n, self.size, big = len(train), args.size, train.images.shape[2:]
        self.windows, self.tags = tag_tiles(train.masks, n, big, args.supervision, args.seed)
        self.lesion, self.healthy = ((self.tags == y).nonzero() for y in (LESION, HEALTHY))
        if not len(self.lesion) or not len(self.healthy):
            raise DataError(f"{train.name}: no tile is healthy, or none mostly lesion")
        tag_map = torch.zeros(n, 2, *big, dtype=torch.uint8)  # pixels in tiles of tag y = channel
        for i in range(n):
            for y in (LESION, HEALTHY):
                tag_map[i, y] = boxes(self.windows[i][self.tags[i] == y], big).any(0)
        tag_map[:, LESION] *= 1 - tag_map[:, HEALTHY]  # a lesion tile may be 10 % healthy
        self.images, self.tag_map = train.images.to(args.device), tag_map.to(args.device)

    def draw(self, tag, i, k):
        """Random windows (B, k, 4) of that tag in images i (B,); whether they have any, (B,)."""
        match = self.tags[i] == tag  # (B, K)
        j = torch.multinomial(match + 1e-9, k, replacement=True)
        return self.windows[i[:, None], j], match.any(1)

    def crop(self, i, windows):
        """Resize windows (B, 4) of images i to the network's size, flipped at random, [-1, 1]."""
        left, top, w, h = windows.unbind(1)
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
        differs from its surroundings by the lesion alone. One blob in ten is empty.
        """
        i, j = self.lesion[torch.randint(len(self.lesion), (b,))].unbind(1)
        own, there = self.draw(HEALTHY, i, 1)
        other, k = self.healthy[torch.randint(len(self.healthy), (b,))].unbind(1)
        same = there & (torch.rand(b) < 0.8)
        host = torch.where(same, i, other)
        window = torch.where(same[:, None], own[:, 0], self.windows[other, k])
        lesion, healthy = self.crop(i, self.windows[i, j]), self.crop(host, window)

        def u(low, high, channels=1):
            return (low + (high - low) * torch.rand(b, channels, 1, 1)).to(healthy)

        blob = random_blobs(b, self.size).to(healthy) * (u(0, 1) > 0.1)
        weight = blob * u(0.6, 1)  # faint lesions too
        gain = u(0.85, 1.15) + u(-0.05, 0.05, 3)
        implanted = weight * lesion + (1 - weight) * healthy
        return *((gain * (x + 1) - 1).clamp(-1, 1) for x in (implanted, healthy)), blob

    def whole(self, b, k=8):
        """b whole images (b, 3, H, W) in [-1, 1] and what their tiles tell, (b, 2 + k, H, W).

        Channels in {0, 1}: pixels of lesion tiles, of healthy tiles, then k random mixed tiles.
        """
        i = torch.randint(len(self.images), (b,))
        mixed, there = self.draw(MIXED, i, k)
        mixed = boxes(mixed, self.images.shape[2:]) & there[:, None, None, None]
        i = i.to(self.images.device)
        known = torch.cat([self.tag_map[i], mixed.to(self.tag_map)], 1).float()
        x, known = augment(self.images[i].float() / 255, known)
        return F.avg_pool2d(x, 2) * 2 - 1, (F.avg_pool2d(known, 2) == 1).float()


def diffseg_loss(net, tiles, args):
    """The loss of one batch: reconstructions of x0 and, for y = healthy, the blend."""
    b = args.batch_size
    n_pairs = b // 3
    implanted, healthy, blob = tiles.implant(n_pairs)
    whole, tags = tiles.whole(b - n_pairs)
    x, counterpart = torch.cat([implanted, whole]), torch.cat([healthy, whole])
    # In one network few rows need be lesion, as those just denoise; two networks share equally.
    is_lesion = torch.rand(b, 1, 1, 1) < (0.5 if args.pair == "official" else 0.125)
    y = torch.where(is_lesion.flatten(), LESION, HEALTHY).to(x.device)
    t = torch.randint(args.t_train[0], args.t_train[1] + 1, (b,)).to(x.device)
    with autocast(args):
        out = net(add_noise(x, t, torch.randn_like(x)), t, y)  # (B, 4, H, W)
    is_lesion, logit = is_lesion.to(x.device), out[:, 3:]
    # A whole image tells its lesion-free counterpart only where its tiles are tagged healthy.
    known = torch.cat([torch.ones_like(blob), tags[:, HEALTHY : HEALTHY + 1]])
    target = torch.where(is_lesion, x, counterpart)
    known = torch.where(is_lesion, 1, known)
    loss_x0 = (known * (out[:, :3] - target) ** 2).mean()  # Eq. 2 [DiffSeg, O]
    # ours: the blend is the blob of an implant and 0 or 1 in healthy or lesion tiles ...
    blend = torch.cat([blob, tags[:, LESION : LESION + 1]])
    weight = torch.cat([torch.ones_like(blob), tags[:, :2].amax(1, keepdim=True)]) * ~is_lesion
    bce = F.binary_cross_entropy_with_logits(logit, blend, weight, reduction="sum")
    # ... and a mixed tile nearly always holds a lesion and a healthy pixel: maximum and minimum.
    box = (tags[:, 2:] > 0) & ~is_lesion[n_pairs:]  # (B', k, H, W)
    high = logit[n_pairs:].where(box, -torch.inf).flatten(2).amax(2)  # (B', k)
    low = logit[n_pairs:].where(box, torch.inf).flatten(2).amin(2)
    mixed = (F.softplus(-high) + F.softplus(low)).where(box.flatten(2).any(2), 0).sum()
    loss_blend = bce / weight.sum().clamp(min=1)
    loss_mixed = mixed / box.flatten(2).any(2).sum().clamp(min=1)
    return loss_x0 + args.blend_weight * (loss_blend + 0.3 * loss_mixed)


def unet_loss(net, train, args):
    """Cross-entropy plus soft Dice of the supervised U-Net, each image with one random rater."""
    i = torch.randint(len(train), (args.batch_size,))
    rater = torch.randint(train.masks.shape[1], (args.batch_size,))
    img = train.images[i].to(args.device).float() / 255
    img, mask = augment(img, train.masks[i, rater][:, None].to(args.device).float())
    x, mask = F.avg_pool2d(img, 2) * 2 - 1, (F.avg_pool2d(mask, 2) >= 0.5).float()
    zero = torch.zeros(len(x), dtype=torch.long, device=x.device)
    with autocast(args):
        logits = net(x, zero, zero)  # (B, 1, H, W)
    p = logits.sigmoid()
    overlap = (2 * (p * mask).sum((1, 2, 3)) + 1) / (p.sum((1, 2, 3)) + mask.sum((1, 2, 3)) + 1)
    return F.binary_cross_entropy_with_logits(logits, mask) + 1 - overlap.mean()


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


def train(kind, loss_function, val, args, folder):
    """Train one network, the loop of both stages: returns (best EMA network, calibration, seconds).

    kind: "diffseg" or "unet". loss_function(net) draws a batch and returns its loss; val, the
    validation split, chooses checkpoint and threshold. last_*.pt holds all that --resume needs.
    """
    torch.manual_seed(args.seed)
    net = build(kind, args)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    opt = torch.optim.AdamW(net.parameters(), args.lr, weight_decay=1e-4)
    last, best, step, best_dice = folder / f"last_{kind}.pt", folder / f"best_{kind}.pt", 0, -1.0
    smooth, seconds, log = None, 0.0, []
    if args.resume and last.exists():
        state = load_checkpoint(last, kind, args, RESUME_FLAGS)
        for part, name in ((net, "net"), (ema, "ema"), (opt, "opt")):
            part.load_state_dict(state[name])
        step, best_dice, smooth, seconds, log = (
            state[k] for k in ("step", "best", "smooth", "seconds", "log")
        )
        torch.set_rng_state(state["rng"])
        if args.device.startswith("cuda") and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], args.device)
    forward = torch.compile(net) if args.compile else net
    stop = []  # filled by Ctrl-C: the running step is finished first, so that the state is whole
    handler = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    start, b = time.time() - seconds, args.batch_size
    bar = tqdm(desc=f"train {kind}", total=args.steps * b, initial=step * b, unit="img")
    while step < args.steps:
        net.train()
        warm, cosine = min(1, (step + 1) / 100), 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
        for group in opt.param_groups:
            group["lr"] = args.lr * warm * cosine
        loss = loss_function(forward)
        if not math.isfinite(value := loss.item()):
            lr = f"--lr {args.lr / 3:.0e}"
            raise DataError(f"loss is {value} at step {step}: try {lr} or --amp off")
        opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        step += 1
        decay = min(0.995, step / (step + 10))  # short memory first: the start is forgotten
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
        smooth = value if smooth is None else 0.98 * smooth + 0.02 * value
        bar.update(b)
        bar.set_postfix(loss=f"{smooth:.4f}", **({"val_dice": f"{best_dice:.3f}"} if log else {}))
        if step % args.save_every and step < args.steps and not stop:
            continue
        flags = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(args).items()}
        state = {"method": METHOD, "kind": kind, "ema": ema.state_dict(), "args": flags}
        cuda_rng = torch.cuda.get_rng_state(args.device) if args.device.startswith("cuda") else None
        rng = {"rng": torch.get_rng_state(), "cuda_rng": cuda_rng}
        seconds = time.time() - start
        if step % args.save_every == 0 or step == args.steps:
            calibration, dice = calibrate(kind, ema, val, args)
            log.append([step, round(smooth, 5), round(dice, 5), *calibration])
            if dice > best_dice:
                best_dice = dice
                save_checkpoint(state | {"calibration": calibration}, best)
            with open(folder / f"log_{kind}.csv", "w", newline="") as file:
                header = ["step", "loss", "val_dice", "threshold", "spread"]
                csv.writer(file).writerows([header, *log])
        state |= {"net": net.state_dict(), "opt": opt.state_dict(), "step": step, "log": log, **rng}
        save_checkpoint(state | {"best": best_dice, "smooth": smooth, "seconds": seconds}, last)
        if stop:
            bar.close()
            print(f"stopped at step {step}; add --resume to go on", file=sys.stderr)
            raise SystemExit(130)
    bar.close()
    signal.signal(signal.SIGINT, handler)
    return *load_network(kind, best, args, MODEL_FLAGS), seconds


def load_network(kind, path, args, fixed):
    """The best EMA network of a stage and its calibration, from its checkpoint."""
    state, net = load_checkpoint(path, kind, args, fixed), build(kind, args).eval()
    net.load_state_dict(state["ema"])
    return net, state["calibration"]


# ==================================================================================================
# 7. Main
# ==================================================================================================


def print_table(rows):
    """Print mean metrics, a row per method."""
    names = {"otsu": "Otsu, green channel", "unet": "U-Net, all masks", "diffseg": "DiffSeg"}
    heads = [m.replace("thresholded_jaccard", "thr.Jacc") for m in rows["otsu"]]
    print(f"\n{'':20}" + "".join(f"{head:>12}" for head in heads))
    for row, metrics in rows.items():
        cells = "".join(f"{m['mean']:12.3f}" for m in metrics.values())
        print(f"{names.get(row, 'DiffSeg + CRF'):20}{cells}")


def record(args, rows, **more):
    """The content of result.json, rows as mean and standard deviation over the images."""
    commit = ""
    with contextlib.suppress(OSError):  # git is not installed
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB of main memory
    if args.device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated(args.device) / 2**20
    means = {
        row: {
            m: {"mean": v.mean().item(), "std": v.std(unbiased=False).item()} for m, v in ms.items()
        }
        for row, ms in rows.items()
    }
    return {
        "method": METHOD, "data": args.data, "split": "test", **more, "seed": args.seed,
        "size": f"{args.size[1]}x{args.size[0]}", "steps": args.steps, "device": args.device,
        "peak_memory_mib": round(peak), "torch": torch.__version__, "git": commit or None,
        "command": " ".join(["python diffseg.py", *args.argv]), "rows": means,
    }  # fmt: skip


def run(args):
    """Load, train, evaluate, draw; returns the exit status."""
    folder = Path(args.out) / METHOD / args.data / f"seed{args.seed}"
    best = {"diffseg": Path(args.checkpoint or folder / "best_diffseg.pt")}
    if args.predict:
        net, calibration = load_network("diffseg", best["diffseg"], args, PREDICT_FLAGS)
        errors = predict(net, calibration, args, folder / "predictions")
        print(f"predictions in {folder / 'predictions'}")
        for error in errors:
            print(f"diffseg.py: error: {error}", file=sys.stderr)
        return 2 if errors else 0
    folder.mkdir(parents=True, exist_ok=True)

    def load(split, size, images_only=False):
        root, workers, cut = args.data_root, args.num_workers, slice(24 if args.quick else None)
        found = load_segmentation(args.data, root, split, size, None, images_only, workers)
        images, masks = found.images[cut], found.masks[cut]
        return replace(found, ids=found.ids[cut], images=images, masks=masks)

    val, test = load("val", args.size), load("test", args.size)
    nets, calibration, seconds = {}, {}, {}
    result_file, trained_by = folder / "result.json", args.argv
    if args.eval_only:
        state = load_checkpoint(best["diffseg"], "diffseg", args, MODEL_FLAGS)
        args.steps, trained_by = state["args"]["steps"], state["args"]["argv"]
        if result_file.exists() and not args.checkpoint:  # the training's time is kept
            seconds = json.loads(result_file.read_text())["seconds"]
        if args.compare and not args.checkpoint and (folder / "best_unet.pt").exists():
            best["unet"] = folder / "best_unet.pt"
        for kind, path in best.items():
            nets[kind], _ = load_network(kind, path, args, MODEL_FLAGS)
            calibration[kind], _ = calibrate(kind, nets[kind], val, args)
    else:
        double = (2 * args.size[0], 2 * args.size[1])  # tiles need detail
        train_set = load("train", double, args.supervision == "border" and not args.compare)
        args.steps = args.epochs * math.ceil(len(train_set) / args.batch_size)
        args.steps = min(args.steps, args.max_steps or args.steps)
        tiles = Tiles(train_set, args)
        losses = {"diffseg": lambda net: diffseg_loss(net, tiles, args)}
        if args.compare:
            losses["unet"] = lambda net: unet_loss(net, train_set, args)
        for kind, loss in losses.items():
            nets[kind], calibration[kind], seconds[kind] = train(kind, loss, val, args, folder)
    rows, masks = evaluate(nets, calibration, test, args)
    figure = folder / "figures" / "panel.png"
    draw_panel(nets["diffseg"], test, rows, masks, args, figure)
    trained_by = " ".join(["python diffseg.py", *trained_by])
    result = record(args, rows, n_images=len(test), seconds=seconds, calibration=calibration,
                    trained_by=trained_by)  # fmt: skip
    result_file.write_text(json.dumps(result, indent=2) + "\n")
    print_table(result["rows"])
    print(f"\n{len(test)} test images of {args.data}; means over images. Open {figure}")
    return 0


def main(argv=None):
    """Run the command line; every foreseeable error is one line and exit status 2."""
    args, previous = parse_args(argv), signal.getsignal(signal.SIGINT)
    try:
        status = run(args)
    except (DataError, OSError) as error:
        print(f"diffseg.py: error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:  # outside the training loop, which ends its step and saves first
        print("interrupted; if it was training, --resume goes on", file=sys.stderr)
        status = 130
    finally:
        signal.signal(signal.SIGINT, previous)
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    main()
