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
    training images: the masks that fit their tags --> teach a plain U-Net, the student

    python diffseg.py                                     synthetic images on a CPU, minutes
    python diffseg.py --data isic2018                     downloads ISIC 2018 Task 1 (13 GB) first
    python diffseg.py --data folder --data-root mine      mine/<train|val|test>/{images,masks}/*
    python diffseg.py --predict photo.jpg --checkpoint out/diffseg/isic2018/seed0/best.pt

Results on ISIC (300 test images, 64 x 48 px, 1,860 steps of 24 images, mean of three seeds), Dice:
student 0.885, DiffSeg + CRF 0.828, the same U-Net trained on all masks 0.900. Training took 91 to
93 minutes a seed, three at a time on a two-core CPU.

Deviations from the paper, with reasons (docs/diffseg.md says more):
D1  One conditional network instead of two: half the memory.
D2  The lesion-free counterparts come from implants; the paper does not say where its do.
D3  Supervision is 48 tags an image, each of one random tile (healthy, lesion or partly lesion); the
    masks of the training set serve those tags alone (who has tags and no masks replaces tag_tiles).
    The validation split, with masks, chooses thresholds and the row that --predict uses.
D4  The healthy reconstruction has a fourth channel, "blend", the presence of a lesion, known in
    implants and tagged tiles. The map is the geometric mean of it and of the difference.
D5  Small t, 5..80 of 1000, 5..250 in training: maps got worse with growing t.
D6  Each output has its own threshold, evenly spread as tighter and looser annotators would draw.
D7  The paper's CRF parameters lower Dice at this size; ours were chosen on validation.
D8  The student is ours: tags tell the right level of a training image's map, not of a new image's.
    It is trained twice: from the masks of DiffSeg, then from its own, which fit the tags better.
"""

import argparse
import copy
import math
import os
import time
from functools import partial
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads stall a busy CPU 10-50 x

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import roi_align

import data
from crf import DenseCRF
from data import DataError, parse_size, whole

# Eq. n is row n of the table in docs/diffseg.md; G: given by the paper or its code, O: ours.
METHOD = "diffseg"
METRICS = ("dice", "iou", "precision", "recall", "thresholded_jaccard", "ged")
HEALTHY, MIXED, LESION = 0, 1, 2  # tags of a tile
AS_IT_IS, LESION_FREE = 0, 1  # y of f: what it shall reconstruct
TAGS, MOSTLY = 48, 0.9  # tagged tiles of an image; share of lesion from which a tile is LESION
LEVELS = torch.linspace(-6, 6, 121)  # logits tried as the level of a training image's map
T = 1000  # diffusion steps: t runs from 0 (nearly clean) to T - 1 (nearly pure noise)
T_TRAIN, T_INFER = (5, 250), (5, 80)  # ranges of t (ours)
CRF_ROUNDS, CRF_OUTPUTS = 3, 4  # K results are averaged, each from H random outputs (paper)
# Pixels at a width of 64, grey levels, weight; the paper: 80, 13, 10 at its size.
CRF_SXY, CRF_SRGB, CRF_WEIGHT = 5.0, 8.0, 2.0

# ==================================================================================================
# 1. Command line
# ==================================================================================================


def parse_args(argv=None):
    """Parse and check the command line."""
    p = data.make_parser("diffseg.py", __doc__)
    add, on_off = p.add_argument, argparse.BooleanOptionalAction
    add("--data", default="synthetic", choices=["synthetic", "isic2018", "folder"], help="data set")
    add("--size", type=parse_size, default="64x48", help="network input: N or WIDTHxHEIGHT, pixels")
    steps = "training steps of a network; by default 190 on synthetic images, else 1860"
    add("--steps", type=whole(1), help=steps)
    add("--batch-size", type=whole(3), default=24, help="images in a training step")
    add("--lr", type=data.number(1e-9, 10), default=1e-3, help="peak learning rate of AdamW (ours)")
    add("--compare", action=on_off, default=True, help="also train the supervised U-Net")
    add("--width", type=int, default=32, choices=[16, 32, 48, 64], help="channels of the U-Nets")
    outputs = "N outputs an image; by default 8 on synthetic images, else 16 (ours)"
    add("--outputs", type=whole(1), help=outputs)
    args = p.parse_args(argv)
    synthetic = args.data == "synthetic"
    p.set_defaults(steps=190 if synthetic else 1860, outputs=8 if synthetic else 16)
    if args.quick:
        p.set_defaults(steps=6, batch_size=8, outputs=6)
    return data.parse_flags(p, argv, METHOD)


# ==================================================================================================
# 2. The method's mathematics: pure functions on tensors
# ==================================================================================================

# Linear betas 1e-4 .. 0.02; ALPHA_BAR[t] is the share of signal variance left after step t.
ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0).float()


def add_noise(x0, t, eps):
    """Noise x0 by eps, both (B, C, H, W), to step t, (B,) int64 in 0..T-1. Returns xt."""
    a = ALPHA_BAR.to(x0.device)[t][:, None, None, None]  # (B, 1, 1, 1)
    return a.sqrt() * x0 + (1 - a).sqrt() * eps  # Eq. 1 [G]


def diffusion_difference(x0_healthy, x0_lesion):
    """Where two reconstructions (B, 3, H, W) differ, from min to max of an image: (B, 1, H, W).

    The paper's difference of pseudo-noises eps~ = (xt - sqrt(a) x0_hat) / sqrt(1 - a) (Eq. 3) is
    this, times sqrt(a) / sqrt(1 - a): xt cancels. Where the lesion is lighter (< 0) it counts 0.
    """
    d = (x0_healthy - x0_lesion).mean(1, keepdim=True).clamp(min=0)  # Eq. 4 [G; scaling O]
    low, high = d.amin((1, 2, 3), keepdim=True), d.amax((1, 2, 3), keepdim=True)
    return (d - low) / (high - low).clamp(min=1e-6)


def iou_distance(a, b):
    """1 - IoU of all pairs of masks (B, N, H, W), (B, R, H, W): (B, N, R); of two empty ones 0."""
    a, b = a.flatten(2).float(), b.flatten(2).float()
    inter = a @ b.transpose(1, 2)  # (B, N, R)
    union = a.sum(2)[:, :, None] + b.sum(2)[:, None] - inter
    return torch.where(union > 0, 1 - inter / union.clamp(min=1), torch.zeros_like(union))


def ged(samples, raters):
    """Squared generalized energy distance over all pairs, (B, N, H, W), (B, R, H, W) -> (B,)."""
    cross = iou_distance(samples, raters).mean((1, 2))
    within = [iou_distance(s, s).mean((1, 2)) for s in (samples, raters)]
    return 2 * cross - within[0] - within[1]  # Eq. 7 [G; with annotators: O]


def overlap_metrics(pred, mask):
    """Per-image metrics of binary pred and mask (B, 1, H, W): {metric: (B,)}; both empty: all 1."""
    pred, mask = pred.flatten(1).float(), mask.flatten(1).float()
    inter, p, m = (pred * mask).sum(1), pred.sum(1), mask.sum(1)

    def ratio(x, y):
        return torch.where(y > 0, x / y.clamp(min=1), (p + m == 0).float())

    out = {"dice": ratio(2 * inter, p + m), "iou": ratio(inter, p + m - inter)}
    return out | {"precision": ratio(inter, p), "recall": ratio(inter, m)}


def thresholded_jaccard(iou):
    """The ISIC challenge's score of IoUs (B,): those below 0.65 count as 0."""
    return iou * (iou >= 0.65)


def ambiguity(samples):
    """Variance of N binary masks (B, N, H, W) in each pixel, (B, H, W) in 0..0.25."""
    coherence = samples.float().mean(1)
    return coherence * (1 - coherence)  # Eq. 6 [G]


def correlation(a, b):
    """Pearson's correlation of two maps (B, H, W), per image (B,); 0 where either is constant."""
    a, b = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (a, b))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-9)


def otsu_threshold(x, bins=256):
    """Otsu's threshold of each row of x (B, P) in [0, 1]: (B, 1); the object lies above it."""
    index = (x * (bins - 1)).round().long()
    hist = torch.zeros(len(x), bins, dtype=torch.float64)
    hist.scatter_add_(1, index, torch.ones_like(x, dtype=torch.float64))
    below, total = hist.cumsum(1), x.shape[1]  # pixels at or below each level
    moment = (hist * torch.arange(bins)).cumsum(1)
    between = (moment[:, -1:] * below / total - moment) ** 2 / (below * (total - below)).clamp(1)
    return (between.argmax(1, keepdim=True) + 0.5) / (bins - 1)


def random_blobs(b, size):
    """Random soft blobs (b, 1, H, W) in [0, 1]: radius 5 to 60 % of the width."""
    h, w = size

    def u(low, high):
        return low + (high - low) * torch.rand(b, 1, 1, 1)

    y = (torch.arange(h) + 0.5)[:, None] / w - u(0.15, 0.85) * h / w  # (b, 1, H, 1)
    x = (torch.arange(w) + 0.5) / w - u(0.15, 0.85)  # (b, 1, 1, W)
    radius = 0.05 + 0.55 * u(0, 1) ** 1.3
    noise = sum(F.interpolate(torch.randn(b, 1, k, k) / k, size, mode="bicubic") for k in (3, 5, 9))
    inside = radius * (1 + noise) - torch.hypot(x, y)
    return torch.sigmoid(2 * inside / (0.008 + u(0.02, 0.27) * radius))  # sharp to a quarter radius


# ==================================================================================================
# 3. Model
# ==================================================================================================


class Block(nn.Module):
    """Two 3 x 3 convolutions with a skip, scaled and shifted by an embedding (B, c_emb)."""

    def __init__(self, c_in, c_out, c_emb, dropout=0.1):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.film = nn.Linear(c_emb, 2 * c_out)
        self.norm2, self.conv2 = nn.GroupNorm(8, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # a block starts near its skip

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, 1)  # (B, C, 1, 1) each
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return self.skip(x) + self.conv2(self.dropout(h))


class UNet(nn.Module):
    """U-Net f(x, t, y) of four levels: x (B, 3, H, W), t and y (B,) -> (B, c_out, H, W) float32.

    As denoiser c_out = 4: the reconstruction of x0 and one logit, the presence of a lesion (blend).
    As segmenter, supervised or student, c_out = 1, with t = 0 and y = 0. H, W: multiples of 8.
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
            halve = nn.Conv2d(c_next, c_next, 3, 2, padding=1) if level < 3 else nn.Identity()
            self.shrink.append(halve)
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
            h = block(h, emb)  # (B, C_level, H / 2^level, W / 2^level)
            skips.append(h)
            h = shrink(h)
        h = self.middle(h, emb)
        for i, block in enumerate(self.up):
            h = F.interpolate(h, scale_factor=2.0) if i else h
            h = block(torch.cat([h, skips.pop()], 1), emb)
        return self.head(h).float()


# ==================================================================================================
# 4. Inference
# ==================================================================================================
# A stage gives N outputs as logits (B, N, H, W), each with a threshold of its own. A margin is how
# far one lies above its own: logit - threshold; q - 1/2 after a CRF, brightness for Otsu. The mask
# of an output is margin > 0, the one mask of all is mean margin > 0.


def build(stage, args):
    """The network of a stage, on the device: "diffseg" is the denoiser, others are segmenters."""
    net = UNet(4 if stage == "diffseg" else 1, args.width)
    return net.to(args.device, memory_format=torch.channels_last)


def autocast(args):
    """bf16 autocast on the run's device where --amp says so."""
    return torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.amp == "on")


def chunk(args):
    """Images in a chunk at inference, so that memory is bounded: 64 at 64 x 48 pixels."""
    return max(1, 64 * 64 * 48 // math.prod(args.size))


def consensus(masks):
    """Majority of raters, (B, R, H, W) -> (B, 1, H, W) bool; a tie counts as lesion."""
    return masks.float().mean(1, keepdim=True) >= 0.5


@torch.no_grad()
def diffseg_maps(net, img, n, args):
    """n differences and n blends, (B, n, H, W) in [0, 1], of images uint8 (B, 3, H, W).

    Each has its own noise and step t, the same for all images: so no image depends on its batch.
    """
    g = torch.Generator().manual_seed(args.seed)
    x0, differences, blends = img.to(args.device).float() / 127.5 - 1, [], []
    for t_n in torch.linspace(*T_INFER, n).long().tolist():
        eps = torch.randn(1, *x0.shape[1:], generator=g).to(x0).expand_as(x0)
        t = torch.full((len(x0),), t_n, device=x0.device)
        xt = add_noise(x0, t, eps)
        with autocast(args):
            healthy = net(xt, t, torch.full_like(t, LESION_FREE))  # (B, 4, H, W)
            lesion = net(xt, t, torch.full_like(t, AS_IT_IS))
        differences.append(diffusion_difference(healthy[:, :3], lesion[:, :3]))
        blends.append(healthy[:, 3:].sigmoid())  # (B, 1, H, W)
    return torch.cat(differences, 1), torch.cat(blends, 1)


@torch.no_grad()
def outputs(stage, net, img, n, args):
    """n outputs of a stage's network, logits (B, n, H, W), for images uint8 (B, 3, H, W).

    Those of "diffseg" differ by noise, the others by dropout: there an image in another batch gets
    other outputs.
    """
    if stage == "diffseg":
        difference, blend = diffseg_maps(net, img, n, args)
        # Blend knows what a lesion is, the difference where it ends: their geometric mean.
        return torch.logit((blend * difference).sqrt(), 1e-4)  # Eq. 5 [O]
    x = img.to(args.device).float() / 127.5 - 1
    zero = torch.zeros(len(x), dtype=torch.long, device=x.device)
    net.train()  # MC-dropout; other layers do not differ in training
    torch.manual_seed(args.seed)
    with autocast(args):
        p = torch.cat([net(x, zero, zero).sigmoid() for _ in range(n)], 1)
    net.eval()
    return torch.logit(p, 1e-4)


def one_mask(margin):
    """The one mask (B, 1, H, W) bool of N outputs' margins (B, N, H, W)."""
    return margin.mean(1, keepdim=True) > 0


def mask_dice(margin, raters):
    """Dice (B,) of the one mask with the majority of raters (B, R, H, W)."""
    return overlap_metrics(one_mask(margin), consensus(raters))["dice"]


def calibrate(stage, net, val, args):
    """Thresholds (N, 1, 1), logits, evenly from level - spread to level + spread: on the split val
    the level maximises Dice, then the spread minimises GED."""
    n, chunks = args.outputs, val.images.split(chunk(args))
    logits = torch.cat([outputs(stage, net, img, n, args).cpu() for img in chunks])
    # Shuffled: else outputs of more noise would always be the tighter ones.
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))

    def thresholds(level, spread):
        return level + torch.linspace(-spread, spread, n)[order, None, None]

    levels = [math.log(k / (50 - k)) for k in range(2, 49)]  # at 0.04 to 0.96
    level = max(levels, key=lambda x: mask_dice(logits - x, val.masks).mean())
    spreads = [0, 0.5, 1, 1.5, 2, 3, 4, 6] if n > 1 else [0]
    spread = min(spreads, key=lambda x: ged(logits > thresholds(level, x), val.masks).mean())
    return thresholds(level, spread)


def crf_integrate(margin, img, args):
    """Integrate outputs: margins (B, N, H, W), img uint8 (B, 3, H, W) -> margins (B, K, H, W).

    K dense CRFs of an image on one lattice, each from H random outputs. With two labels, q and
    1 - q, the log odds change by message(q) - message(1 - q), which is message(2 q - 1), since
    messages are linear; else it is the mean field of crf.py.
    """
    g, p = torch.Generator().manual_seed(args.seed), margin.sigmoid()
    chosen = [torch.randperm(p.shape[1], generator=g)[:CRF_OUTPUTS] for _ in range(CRF_ROUNDS)]
    starts = torch.stack([p[:, k.to(p.device)].mean(1) for k in chosen], 1)  # (B, K, H, W)
    sxy = CRF_SXY * args.size[1] / 64
    crf = DenseCRF(sxy_bilateral=sxy, srgb=CRF_SRGB, compat_bilateral=CRF_WEIGHT, compat_gaussian=0)
    [(weight, message)] = crf.messages(img.to(p).float())
    logits = torch.logit(starts, 1e-6)
    q = logits.sigmoid()
    for _ in range(crf.iterations):
        q = (logits + weight * message(2 * q - 1)).sigmoid()
    return q - 0.5  # Eq. 8 [G]


def segment(nets, img, args):
    """Margins {row: (B, N, H, W)} of images uint8 (B, 3, H, W); nets {stage: (net, thresholds)}."""
    dark = 1 - img[:, 1].flatten(1).float() / 255  # in green, where skin and lesion differ most
    rows = {"otsu": (dark - otsu_threshold(dark)).view(len(img), 1, *img.shape[2:])}
    for stage, (net, thresholds) in nets.items():
        logits = outputs(stage, net, img, args.outputs, args)
        rows[stage] = logits - thresholds.to(logits)
        if stage != "unet":
            rows[f"{stage}_crf"] = crf_integrate(rows[stage], img, args)
    return {row: margin.cpu() for row, margin in rows.items()}


# ==================================================================================================
# 5. Evaluation and figures
# ==================================================================================================


def evaluate(nets, split, args):
    """Metrics {row: {metric: (n,)}} of a split's images; of a chunk only these numbers are kept."""
    rows, n = {}, chunk(args)
    for img, raters in zip(split.images.split(n), split.masks.split(n), strict=True):
        for row, margin in segment(nets, img, args).items():
            samples, variance = margin > 0, ambiguity(margin > 0)
            values = overlap_metrics(one_mask(margin), consensus(raters))
            values["thresholded_jaccard"] = thresholded_jaccard(values["iou"])
            values["ged"] = ged(samples, raters)
            if raters.shape[1] > 1:
                values["correlation"] = correlation(variance, ambiguity(raters))
            area = samples.float().mean((1, 2, 3)).clamp(min=1e-3)  # mean lesion, may be empty
            values["doubt"] = variance.mean((1, 2)) / area  # one number an image
            for metric, value in values.items():
                rows.setdefault(row, {}).setdefault(metric, []).append(value)
    return {row: {m: torch.cat(v) for m, v in values.items()} for row, values in rows.items()}


def worth_of_ambiguity(values):
    """Is Dice higher in the half of the images of less doubt? Do raters differ where it says?"""
    dice = values["dice"][values["doubt"].argsort()]
    half = (len(dice) + 1) // 2
    worth = {"dice_less_ambiguous": dice[:half], "dice_more_ambiguous": dice[-half:]}
    worth |= {m: v for m, v in values.items() if m == "correlation"}  # of several raters only
    return {metric: value.mean().item() for metric, value in worth.items()}


def draw_panel(nets, split, rows, args, path):
    """Write the panel of the best, median and worst images of a split by Dice of the last row."""
    *_, last = rows
    order = rows[last]["dice"].argsort(descending=True).tolist()
    middle = max(0, (len(split) - 1) // 2)
    places = {"best": order[:2], "median": order[middle : middle + 2], "worst": order[-2:]}
    shown = range(0, args.outputs, (args.outputs + 2) // 3)
    titles = ["image + truth", "difference", *(f"output {k + 1}" for k in shown)]
    titles += ["coherence", "ambiguity", "diffseg_crf", "student", "ambiguity", "student_crf"]
    sheet = []
    for place, i in ((place, i) for place, images in places.items() for i in images):
        img, raters = split.images[i : i + 1], split.masks[i : i + 1]
        photo, margin = img[0].permute(1, 2, 0).numpy(), segment(nets, img, args)
        difference, _ = diffseg_maps(nets["diffseg"][0], img, args.outputs, args)
        tiles = [(data.outline(photo, consensus(raters)[0, 0]), "")]
        tiles.append((data.colour_map(difference[0].mean(0).cpu()), ""))
        for k in shown:
            tiles.append((data.colour_map(margin["diffseg"][0, k] > 0), ""))
        for row in ("diffseg", "diffseg_student"):
            samples, crf = margin[row] > 0, margin[f"{row}_crf"]
            tiles.append((data.colour_map(samples[0].float().mean(0)), ""))
            tiles.append((data.colour_map(4 * ambiguity(samples)[0]), ""))
            caption = f"Dice {mask_dice(crf, raters).item():.2f}"
            tiles.append((data.outline(photo, one_mask(crf)[0, 0], (255, 230, 0)), caption))
        sheet.append((f"{place}\n{split.ids[i][-7:]}", tiles))
    data.draw_sheet(titles, sheet, path)


def segment_photo(photo, nets, row, args):
    """Segment a photo by a row of the table: pictures in its own size, and the mask's share."""
    margin = segment(nets, photo.small[None], args)[row][0]  # (N, H, W)
    total, coherence = torch.zeros(2, *photo.img.shape[1:])
    for output in margin.split(1):  # one at a time: photographs are large
        z = data.enlarge(output, photo)[0]  # (h, w)
        total, coherence = total + z, coherence + (z > 0) / len(margin)
    mask, variance = total > 0, coherence * (1 - coherence)  # Eq. 6 [G]
    pictures = {
        "mask": mask.byte().numpy() * 255,
        "overlay": data.outline(photo.img.permute(1, 2, 0).numpy(), mask, (255, 230, 0)),
        "coherence": data.colour_map(coherence),
        "ambiguity": data.colour_map(4 * variance),
    }
    return pictures, {"share of the image": f"{mask.float().mean():.4f}"}


# ==================================================================================================
# 6. Tiles, batches, losses and training
# ==================================================================================================


def tag(share):
    """Tags of tiles by their share of lesion: none HEALTHY, at least 90 % LESION, else MIXED."""
    return (share > 0).long() + (share >= MOSTLY)


def tag_tiles(masks, seed):
    """Random windows (n, K, 4), left, top, width, height, and their tags (n, K), from the masks.

    masks: uint8 (n, R, H, W), read here and nowhere else in the training of DiffSeg and student.
    """
    g, (n, _, h, w) = torch.Generator().manual_seed(seed), masks.shape
    side = 0.1 + 0.5 * torch.rand(n, TAGS, generator=g) ** 1.5  # 10 to 60 %, small ones more often
    ww, hh = (side * w).long(), (side * h).long()
    left = (torch.rand(n, TAGS, generator=g) * (w - ww + 1)).long()
    top = (torch.rand(n, TAGS, generator=g) * (h - hh + 1)).long()
    windows, share = torch.stack([left, top, ww, hh], 2), torch.empty(n, TAGS)
    for i in range(n):  # one at a time: float copies of large images take memory
        rows, columns = spans(windows[i], (h, w))
        mask = consensus(masks[i : i + 1])[0, 0].float()
        share[i] = torch.einsum("kh,hw,kw->k", rows, mask, columns) / (ww[i] * hh[i])
    return windows, tag(share)


def spans(windows, size):
    """How much of each row (..., H) and column (..., W) lies in windows (..., 4): 0 to 1, float."""
    left, top, w, h = windows.float()[..., None].unbind(-2)  # (..., 1)
    y, x = (torch.arange(side, device=windows.device) for side in size)
    rows = (top + h - y).clamp(0, 1) - (top - y).clamp(0, 1)
    return rows, (left + w - x).clamp(0, 1) - (left - x).clamp(0, 1)


class Batch(NamedTuple):
    """What one step of DiffSeg sees: B images, first the implants, then whole images."""

    x: torch.Tensor  # (B, 3, H, W) in [-1, 1]: x0, to be noised
    y: torch.Tensor  # (B,) int64: what f is asked for, AS_IT_IS or LESION_FREE
    target: torch.Tensor  # (B, 3, H, W): x itself, or its lesion-free counterpart
    known: torch.Tensor  # (B, 1, H, W) in {0, 1}: pixels where the target is known
    blend: torch.Tensor  # (B, 1, H, W) in [0, 1]: presence of a lesion
    blend_known: torch.Tensor  # (B, 1, H, W) in {0, 1}: pixels where that is known


class Tiles:
    """Training images at twice the network's size with tagged tiles; draws training batches."""

    def __init__(self, train, args):
        self.images, self.size, self.device = train.images, args.size, args.device
        self.windows, self.tags = tag_tiles(train.masks, args.seed)
        self.lesion, self.healthy = ((self.tags == y).nonzero() for y in (LESION, HEALTHY))
        if not len(self.lesion) or not len(self.healthy):
            why = "no tile of the training images is healthy, or none at least 90 % lesion"
            raise DataError(f"{train.name}: {why}; add images with smaller or larger lesions")

    def known(self, i):
        """Pixels of images i (B,) in lesion and in healthy tiles, {0, 1}: (B, 2, 2H, 2W)."""
        rows, columns = spans(self.windows[i].to(self.device), self.images.shape[2:])  # (B, K, .)
        tagged = torch.stack([self.tags[i] == y for y in (LESION, HEALTHY)], 1).to(rows)
        lesion, healthy = torch.einsum("btk,bkh,bkw->tbhw", tagged, rows, columns) > 0
        # A lesion tile may be 10 % healthy: where both claim a pixel, healthy wins.
        return torch.stack([lesion & ~healthy, healthy], 1).float()

    def crop(self, i, windows):
        """Resize windows (B, 4) of images i to the network's size, half of them mirrored."""
        left, top, w, h = windows.unbind(1)
        boxes = torch.stack([torch.arange(len(i)), left, top, left + w, top + h], 1)
        x = self.images[i].to(self.device).float() / 127.5 - 1  # (B, 3, 2H, 2W)
        x = roi_align(x, boxes.to(x), self.size, sampling_ratio=2, aligned=True)  # (B, 3, H, W)
        mirrored = torch.rand(len(i), 1, 1, 1).to(x) < 0.5
        return torch.where(mirrored, x.flip(3), x)

    def implant(self, b):
        """b implanted tiles, their lesion-free counterparts (b, 3, H, W) and blobs (b, 1, H, W).

        Four of five pairs, where possible, come from one image: then skin, light and camera agree,
        and the implant differs by the lesion alone. One blob in ten is empty.
        """
        donor, tile = self.lesion[torch.randint(len(self.lesion), (b,))].unbind(1)
        own = self.tags[donor] == HEALTHY  # (b, K)
        own_skin = torch.multinomial(own + 1e-9, 1)[:, 0]
        stranger, skin = self.healthy[torch.randint(len(self.healthy), (b,))].unbind(1)
        within = own.any(1) & (torch.rand(b) < 0.8)
        host, skin = torch.where(within, donor, stranger), torch.where(within, own_skin, skin)
        lesion = self.crop(donor, self.windows[donor, tile])
        healthy = self.crop(host, self.windows[host, skin])

        def u(low, high, channels=1):
            return (low + (high - low) * torch.rand(b, channels, 1, 1)).to(healthy)

        blob = random_blobs(b, self.size).to(healthy) * (u(0, 1) > 0.1)
        weight = blob * u(0.6, 1)  # faint lesions too
        gain = u(0.85, 1.15) + u(-0.05, 0.05, 3)  # brightness and tint
        implanted = weight * lesion + (1 - weight) * healthy
        implanted, healthy = ((gain * (x + 1) - 1).clamp(-1, 1) for x in (implanted, healthy))
        return implanted, healthy, blob

    def batch(self, b):
        """Draw a Batch of b images, a third of them implants."""
        implanted, healthy, blob = self.implant(b // 3)
        i = torch.randint(len(self.images), (b - b // 3,))
        images, tiles = data.augment(self.images[i].to(self.device).float() / 255, self.known(i))
        images = F.avg_pool2d(images, 2) * 2 - 1  # (b - b / 3, 3, H, W)
        lesion_tiles, healthy_tiles = (F.avg_pool2d(tiles, 2) == 1).float().split(1, 1)
        # One in eight is asked for itself: mere denoising, easy to learn.
        as_it_is = torch.rand(b, 1, 1, 1).to(self.device) < 0.125
        x, counterpart = torch.cat([implanted, images]), torch.cat([healthy, images])
        # An implant is known everywhere. A whole image tells its lesion-free counterpart only where
        # its tiles are tagged healthy, and presence or absence of a lesion in tagged tiles.
        known = torch.cat([torch.ones_like(blob), healthy_tiles])
        blend_known = torch.cat([torch.ones_like(blob), torch.maximum(lesion_tiles, healthy_tiles)])
        return Batch(
            x=x,
            y=torch.where(as_it_is.flatten(), AS_IT_IS, LESION_FREE),
            target=torch.where(as_it_is, x, counterpart),
            known=torch.where(as_it_is, 1, known),
            blend=torch.cat([blob, lesion_tiles]),
            blend_known=blend_known * ~as_it_is,
        )


def in_parts(net, x, t, y, args):
    """net(x, t, y) for training. Large images go in parts, of each of which backward computes the
    activations again: 24 images of 512 x 384 px would take 12 GB to keep them all."""
    n = 8 * chunk(args)
    if len(x) <= n:
        return net(x, t, y)
    parts = zip(x.split(n), t.split(n), y.split(n), strict=True)
    return torch.cat([checkpoint(net, *part, use_reentrant=False) for part in parts])


def reconstruction_loss(x0_hat, batch):
    """Squared error where the target is known; its mean is over all pixels, known or not, so that
    images that tell little weigh little."""
    return (batch.known * (x0_hat - batch.target) ** 2).mean()  # Eq. 2 [O]


def blend_loss(logits, batch):
    """Cross-entropy of the blend: the blob of an implant, 0 or 1 in healthy or lesion tiles."""
    known = batch.blend_known
    total = F.binary_cross_entropy_with_logits(logits, batch.blend, known, reduction="sum")
    return total / known.sum().clamp(min=1)


def diffseg_loss(net, tiles, args):
    """The loss of one batch: reconstructions of x0 and, where y = LESION_FREE, the blend."""
    batch = tiles.batch(args.batch_size)
    t = torch.randint(T_TRAIN[0], T_TRAIN[1] + 1, batch.y.shape).to(batch.y.device)
    with autocast(args):
        xt = add_noise(batch.x, t, torch.randn_like(batch.x))
        out = in_parts(net, xt, t, batch.y, args)  # (B, 4, H, W)
    x0_hat, logits = out[:, :3], out[:, 3:]
    return reconstruction_loss(x0_hat, batch) + 0.5 * blend_loss(logits, batch)  # 0.5: ours


def unet_loss(net, images, masks, args, nested=1):
    """Cross-entropy plus soft Dice of a segmenter, each image with one of its masks at random.

    images (N, 3, 2H, 2W), masks (N, R, 2H, 2W), both uint8; masks hold 0 or 1, or how many of so
    many nested masks contain a pixel.
    """
    i = torch.randint(len(images), (args.batch_size,))
    raters = masks.shape[1]
    k = torch.randint(raters * nested, (args.batch_size,))
    mask = masks[i, k % raters] > (k // raters)[:, None, None]  # (B, 2H, 2W)
    img = images[i].to(args.device).float() / 255
    img, mask = data.augment(img, mask[:, None].to(args.device).float())
    x, mask = F.avg_pool2d(img, 2) * 2 - 1, (F.avg_pool2d(mask, 2) >= 0.5).float()
    zero = torch.zeros(len(x), dtype=torch.long, device=x.device)
    with autocast(args):
        logits = in_parts(net, x, zero, zero, args)  # (B, 1, H, W)
    p = logits.sigmoid()
    overlap = (2 * (p * mask).sum((1, 2, 3)) + 1) / (p.sum((1, 2, 3)) + mask.sum((1, 2, 3)) + 1)
    return F.binary_cross_entropy_with_logits(logits, mask) + 1 - overlap.mean()


def fit_level(logit, windows, tags):
    """The level at which an image's mask, logit (H, W) > level, contradicts fewest of its K tags,
    the middle one of many. windows (K, 4): in pixels of the image, twice as large."""
    rows, columns = spans(windows / 2, logit.shape)  # (K, H), (K, W)
    above = (logit > LEVELS[:, None, None]).float()  # (L, H, W)
    share = torch.einsum("kh,lhw,kw->lk", rows, above, columns) / (rows.sum(1) * columns.sum(1))
    wrong = (tag(share) != tags).sum(1)  # (L,)
    best = LEVELS[wrong == wrong.min()]
    return best[len(best) // 2]


@torch.no_grad()
def update_ema(ema, net, decay):
    """Move the weights of ema towards net's; buffers, such as running means, are copied."""
    for old, new in zip(ema.parameters(), net.parameters(), strict=True):
        old.lerp_(new, 1 - decay)
    for old, new in zip(ema.buffers(), net.buffers(), strict=True):
        old.copy_(new)


@torch.no_grad()
def student_masks(stage, net, offsets, tiles, args):
    """Masks to teach the student, from a teacher's outputs and tags alone.

    Each image's level is fitted to its tags; the masks lie offsets (R,) above it: looser, tighter.
    Returns uint8 (N, 1, 2H, 2W): how many of these R nested masks contain a pixel.
    """
    n, _, h, w = tiles.images.shape
    masks = torch.empty(n, 1, h, w, dtype=torch.uint8)
    chunks = torch.arange(n).split(chunk(args))
    for i in data.progress(chunks, "masks for the student", len(chunks), unit="chunk"):
        img = F.avg_pool2d(tiles.images[i].float(), 2).round().to(torch.uint8)  # (B, 3, H, W)
        some = max(1, args.outputs // 4)  # of the outputs are enough here
        logit = outputs(stage, net, img, some, args).mean(1).cpu()  # (B, H, W)
        levels = [fit_level(*x) for x in zip(logit, tiles.windows[i], tiles.tags[i], strict=True)]
        margin = logit[:, None] - torch.stack(levels)[:, None, None, None] - offsets[:, None, None]
        margin = F.interpolate(margin, scale_factor=2.0, mode="bilinear")  # (B, R, 2H, 2W)
        lesion, healthy = tiles.known(i).cpu().bool().split(1, 1)
        masks[i] = (((margin > 0) | lesion) & ~healthy).sum(1, keepdim=True).to(masks)
    return masks


def train(stage, start, steps, loss_function, fingerprints, args, folder):
    """Train one network, the loop of all stages: returns its EMA and the seconds it took.

    start: the network to start from, or None. loss_function(net) draws a batch and returns its
    loss. fingerprints: of the data. last_*.pt, written every --save-every steps, is all that
    --resume needs.
    """
    torch.manual_seed(args.seed)
    net = copy.deepcopy(start).requires_grad_(True).train() if start else build(stage, args)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    opt = torch.optim.AdamW(net.parameters(), args.lr, weight_decay=1e-4)

    def schedule(step):  # warm-up, then half a cosine
        return min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, schedule)
    parts = {"net": net, "ema": ema, "opt": opt, "scheduler": scheduler}
    last = folder / f"last_{stage}.pt"
    saved = data.resume(last, METHOD, args, fingerprints, parts)
    first, seconds = saved.get("step", 0), saved.get("seconds", 0.0)
    forward = torch.compile(net) if args.compile else net
    began, losses = time.time() - seconds, []
    bar = data.progress(range(first, steps), f"train {stage}", steps, first)
    for step in bar:
        loss = loss_function(forward)
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
        if not math.isfinite(losses[-1]):
            todo = f"try --lr {args.lr / 3:.0e} or --amp off"
            raise DataError(f"{stage}: loss is {losses[-1]} at step {step}: {todo}")
        opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        scheduler.step()
        update_ema(ema, net, min(0.995, (step + 1) / (step + 11)))  # short memory at the start
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            mean, losses, seconds = sum(losses) / len(losses), [], time.time() - began
            more = {"step": step + 1, "seconds": seconds}
            data.save_checkpoint(last, METHOD, args, fingerprints, parts, **more)
            with open(folder / "log.csv", "a", **data.TEXT) as file:
                file.write(f"{stage},{step + 1},{mean:.5f}\n")
    return ema, seconds


# ==================================================================================================
# 7. Main
# ==================================================================================================


def load(split, size, args):
    """A split at size = (H, W), with --quick its first 24 images."""
    root, limit = args.data_root, 24 if args.quick else None
    return data.load_segmentation(args.data, root, split, size, limit, workers=args.num_workers)


def train_all(train_set, val, fingerprints, args, folder):
    """Train all networks, choose their thresholds and the row for --predict; writes best.pt."""
    images, tiles = train_set.images, Tiles(train_set, args)
    if not args.resume:
        data.prepare_folder(folder)
    nets, seconds = {}, {}

    def stage(name, steps, loss, start=None):
        net, seconds[name] = train(name, start, steps, loss, fingerprints, args, folder)
        nets[name] = (net, calibrate(name, net, val, args))

    teach, half = partial(unet_loss, images=images, args=args), (args.steps + 1) // 2
    if args.compare:
        stage("unet", args.steps, partial(teach, masks=train_set.masks))
    stage("diffseg", args.steps, partial(diffseg_loss, tiles=tiles, args=args))
    masks = student_masks("diffseg", nets["diffseg"][0], torch.zeros(1), tiles, args)
    stage("first_student", half, partial(teach, masks=masks))
    del masks  # two sets of large masks would not fit
    # The first student's masks are better: it learns on from them, tight and loose as its outputs.
    first, thresholds = nets.pop("first_student")
    offsets = (thresholds.max() - thresholds.mean()) * torch.linspace(-1, 1, 4)
    masks = student_masks("first_student", first, offsets, tiles, args)
    stage("diffseg_student", half, partial(teach, masks=masks, nested=len(offsets)), first)
    rows = evaluate({name: pair for name, pair in nets.items() if name != "unet"}, val, args)
    ours = ("diffseg_crf", "diffseg_student", "diffseg_student_crf")
    more = {"row": max(ours, key=lambda row: rows[row]["dice"].mean()), "seconds": seconds}
    more["nets"] = {name: net.state_dict() for name, (net, _) in nets.items()}
    more["thresholds"] = {name: thresholds for name, (_, thresholds) in nets.items()}
    data.save_checkpoint(folder / "best.pt", METHOD, args, fingerprints, **more)


def run(args):
    """Train, then evaluate and draw; or predict."""
    folder, fingerprints = data.run_folder(METHOD, args), {}
    if not args.predict:
        test = load("test", args.size, args)
        fingerprints["test"] = test.fingerprint
    if not (args.predict or args.eval_only):
        train_set = load("train", [2 * side for side in args.size], args)  # tiles need detail
        val = load("val", args.size, args)
        fingerprints |= {"train": train_set.fingerprint, "val": val.fingerprint}
        train_all(train_set, val, fingerprints, args, folder)
    best = args.checkpoint or folder / "best.pt"
    state, nets = data.load_checkpoint(best, METHOD, fingerprints), {}
    for stage, weights in state["nets"].items():
        nets[stage] = (build(stage, args).eval(), state["thresholds"][stage])
        nets[stage][0].load_state_dict(weights)
    if args.predict:
        row, folder = state["row"], folder / "predictions"
        print(f"{row} is the best on validation; its predictions go to {folder}")
        stage = row.removesuffix("_crf")
        segment_one = partial(segment_photo, nets={stage: nets[stage]}, row=row, args=args)
        return data.predict_images(args.predict, args.size, folder, best, segment_one)
    rows = evaluate(nets, test, args)
    figure = folder / "figures" / "panel.png"
    table = {row: {m: v[m].mean().item() for m in METRICS} for row, v in rows.items()}
    more = {"n_images": len(test), "seconds": state["seconds"], "predict": state["row"]}
    more["ambiguity"] = {row: worth_of_ambiguity(rows[row]) for row in rows if row != "otsu"}
    draw_panel(nets, test, rows, args, figure)
    data.write_result(folder / "result.json", METHOD, args, table, **more)
    data.print_table(table)
    print(f"\n{len(test)} test images of {args.data}; means over images. Open {figure}")


def main(argv=None):
    """Run the command line; foreseeable errors are one line each and exit status 2."""
    with data.one_line_errors("diffseg.py"):
        run(parse_args(argv))


if __name__ == "__main__":
    main()
