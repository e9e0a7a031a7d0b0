"""DiffSeg: weakly supervised skin-lesion segmentation by diffusion difference.

Paper: DiffSeg, https://arxiv.org/abs/2404.16474. A denoising network reconstructs a noised image
twice: as it is, with its lesion, and as its lesion-free counterpart. The difference shows the
lesion. Several noises and thresholds give several masks, like those of several annotators; where
the masks disagree, the segmentation is uncertain. A dense CRF integrates them into one mask.

No masks are needed for training. Somebody tags a few tiles of each image, that is, rectangles, as
healthy, mixed or lesion. Lesion tiles blended into healthy tiles give images whose lesion-free
counterpart is known, and from these the network learns what skin looks like without the lesion.

    x0 --noise--> xt --+-- f(xt, t, AS_IT_IS)    --> x0_lesion ---+
                       |                                          +-- difference, blend --> N masks
                       +-- f(xt, t, LESION_FREE) --> x0_healthy --+
    N masks --> mean: coherence; variance: ambiguity; distances: GED; dense CRF --> one mask

    python diffseg.py                                     synthetic images on a CPU, minutes
    python diffseg.py --data isic2018                     downloads ISIC 2018 Task 1 (13 GB) first
    python diffseg.py --data folder --data-root mine      mine/<train|val|test>/{images,masks}/*
    python diffseg.py --predict photo.jpg --checkpoint out/diffseg/isic2018/seed0/best.pt

RESULTS

Deviations from the paper (docs/diffseg.md gives more detail):
D1  One conditional network instead of two: half the memory.
D2  The lesion-free counterparts come from implants; the paper does not say where its own come from.
D3  Supervision is tagged tiles. If there is no tags.csv, the masks of the training images are used
    to compute the tags, and for nothing else.
D4  The network has a fourth output channel, "blend": the probability of a lesion, known in implants
    and in tagged tiles. The map is the geometric mean of the blend and the difference.
D5  The difference counts only where the lesion is darker than the skin: clamp(min=0).
D6  Steps t are small: 5..80 of 1000 at inference, 5..250 in training.
D7  Each output has its own threshold, like annotators who draw tighter or looser outlines. The
    thresholds are chosen on the masks of the validation images; without masks, on the tags.
D8  The CRF has no spatial kernel, and its parameters were chosen on validation images.
"""

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
from torchvision.ops import roi_align

import data
from crf import DenseCRF, unary_from_softmax
from data import DataError, parse_size, whole

# "Eq. n" refers to the table in docs/diffseg.md. [paper]: given by the paper or its code.
METHOD = "diffseg"
STAGES = ["unet", "tags_unet", "tags_student", "diffseg", "diffseg_student"]  # networks to train
ROWS = ["unet", "tags_unet", "tags_unet_crf", "tags_student", "difference", "blend"]
ROWS += ["diffseg", "diffseg_crf", "diffseg_student", "diffseg_student_crf"]  # of the table
METRICS = ["dice", "iou", "precision", "recall", "ged"]
HEALTHY, MIXED, LESION, NO_TAG = 0, 1, 2, -1  # tags of a tile
TAG_NAMES = ["healthy", "mixed", "lesion"]  # in tags.csv
TILES = 48  # tiles of a training image that are tagged from its mask
LESION_SHARE = 0.9  # a tile is tagged LESION if at least this share of it is lesion
LESION_FREE, AS_IT_IS = 0, 1  # y of f: what it reconstructs
T = 1000  # diffusion steps: t runs from 0 (nearly clean) to T - 1 (nearly pure noise)
T_TRAIN, T_INFER = (5, 250), (5, 80)  # ranges of t
LEVELS = torch.linspace(-6, 6, 121)  # logits tried as thresholds
SPREADS = [0, 0.5, 1, 1.5, 2, 3, 4, 6]  # logits from the middle threshold to the highest one
TAG_SPREAD = 1.5  # the same without masks, from which it could be chosen
CRF_RESULTS, CRF_OUTPUTS = 3, 4  # K results are averaged, each from H random outputs [paper]
CRF_SXY = 5.0  # std of the CRF's kernel in space: pixels if the image is 64 wide
CRF_SRGB, CRF_WEIGHT = 8.0, 2.0  # std in colour, grey levels; weight of its message

# ==================================================================================================
# 1. Command line
# ==================================================================================================


def parse_args(argv=None):
    """Parse and check the command line."""
    p = data.make_parser("diffseg.py", __doc__)
    add = p.add_argument
    add("--data", default="synthetic", choices=["synthetic", "isic2018", "folder"], help="data set")
    add("--size", type=parse_size, default="64x48", help="network input: N or WIDTHxHEIGHT, pixels")
    steps = "training steps of each network; by default 190 on synthetic images, else 1860"
    add("--steps", type=whole(1), help=steps)
    add("--batch-size", type=whole(3), default=24, help="images in a training step")
    add("--lr", type=data.number(1e-9, 10), default=1e-3, help="peak learning rate of AdamW")
    method = "train and compare these; by default all but tags_student, and unet only if training "
    method += "images have masks and are not synthetic"
    add("--method", nargs="+", choices=STAGES, help=method)
    tags = "use the first K tags of each training image; by default all"
    add("--tags", type=whole(1), metavar="K", help=tags)
    write = "write the tags computed from the training masks to this file (CSV), and stop"
    add("--write-tags", metavar="FILE", help=write)
    add("--width", type=int, default=32, choices=[16, 32, 48, 64], help="channels of the U-Nets")
    outputs = "outputs of an image; by default 8 on synthetic images, else 16"
    add("--outputs", type=whole(1), help=outputs)
    args = p.parse_args(argv)
    if args.write_tags:
        return args
    synthetic = args.data == "synthetic"
    p.set_defaults(steps=190 if synthetic else 1860, outputs=8 if synthetic else 16)
    p.set_defaults(method=["tags_unet", "diffseg", "diffseg_student"])
    if not synthetic and data.has_masks(args.data, args.data_root, "train"):
        p.set_defaults(method=["unet", "tags_unet", "diffseg", "diffseg_student"])
    if args.quick:
        p.set_defaults(steps=6, batch_size=8, outputs=6)
    return data.parse_flags(p, argv, METHOD)


# ==================================================================================================
# 2. Supervision: tagged tiles
# ==================================================================================================
# A tile is a rectangle of an image: left, top, width and height, as shares of the image's width and
# height. An image has at most K tiles; where it has fewer, the tag is NO_TAG.


def tag_tiles(masks, k, seed):
    """Draw random tiles and tag them from masks.

    masks: uint8 (N, R, H, W) of R raters; nothing else in the training of DiffSeg reads them.
    Returns tiles (N, K, 4), 10 to 60 % of the image's sides, and tags (N, K).
    """
    n, _, h, w = masks.shape
    g = torch.Generator().manual_seed(seed)
    most = max(k, TILES)  # so that fewer tiles are the first of more
    side = 0.1 + 0.5 * torch.rand(n, most, generator=g) ** 1.5  # small ones more often
    width, height = (side * w).long(), (side * h).long()
    left = (torch.rand(n, most, generator=g) * (w - width + 1)).long()
    top = (torch.rand(n, most, generator=g) * (h - height + 1)).long()
    tiles = torch.stack([left / w, top / h, width / w, height / h], 2)[:, :k]
    chunks = zip(masks.split(64), tiles.split(64), strict=True)  # float copies take memory
    share = torch.cat([lesion_share(majority(m).float(), tile) for m, tile in chunks])[:, 0]
    return tiles, tag_of(share)


def majority(masks):
    """Majority of raters, (B, R, H, W) -> (B, 1, H, W) bool; a tie counts as lesion."""
    return masks.float().mean(1, keepdim=True) >= 0.5


def tag_of(share):
    """Tag of a tile from its share of lesion: HEALTHY if 0, LESION from 0.9 on, else MIXED."""
    return (share > 0).long() + (share >= LESION_SHARE)


def inside(tiles, size):
    """Pixels whose centres lie in tiles (..., 4): rows (..., H) and columns (..., W), 0 or 1."""
    left, top, width, height = tiles[..., None].unbind(-2)  # (..., 1)
    y, x = ((torch.arange(n, device=tiles.device) + 0.5) / n for n in size)
    rows, columns = (y >= top) & (y < top + height), (x >= left) & (x < left + width)
    return rows.float(), columns.float()


def lesion_share(masks, tiles):
    """Share of the pixels of tiles (B, K, 4) that lie in masks, float (B, L, H, W): (B, L, K)."""
    rows, columns = inside(tiles, masks.shape[2:])  # (B, K, H), (B, K, W)
    area = rows.sum(2) * columns.sum(2)  # (B, K)
    lesion = torch.einsum("bkh,blhw,bkw->blk", rows, masks, columns)
    return lesion / area[:, None].clamp(min=1)


def tile_masks(tiles, tags, size):
    """Pixels in lesion tiles and in healthy tiles: two masks (B, 1, H, W) in {0, 1}.

    tiles: (B, K, 4). tags: (B, K). A lesion tile may be 10 % healthy, so healthy tiles win.
    """
    rows, columns = inside(tiles, size)
    is_tag = torch.stack([tags == LESION, tags == HEALTHY], 1).float()  # (B, 2, K)
    lesion, healthy = (torch.einsum("btk,bkh,bkw->bthw", is_tag, rows, columns) > 0).split(1, 1)
    return (lesion & ~healthy).float(), healthy.float()


class TaggedImages(NamedTuple):
    """The training set of DiffSeg."""

    images: torch.Tensor  # uint8 (N, 3, 2H, 2W): twice the network's size, as tiles are enlarged
    tiles: torch.Tensor  # (N, K, 4)
    tags: torch.Tensor  # int64 (N, K)


# ==================================================================================================
# 3. Training batches: implants and whole images
# ==================================================================================================


class Batch(NamedTuple):
    """Images, and what is known of them."""

    x: torch.Tensor  # (B, 3, H, W) in [-1, 1]: x0
    y: torch.Tensor  # int64 (B,): what f has to reconstruct, LESION_FREE or AS_IT_IS
    target: torch.Tensor  # (B, 3, H, W) in [-1, 1]: that reconstruction
    known: torch.Tensor  # (B, 1, H, W) in {0, 1}: where the target is known
    lesion: torch.Tensor  # (B, 1, H, W) in [0, 1]: presence of a lesion, the target of the blend
    lesion_known: torch.Tensor  # (B, 1, H, W) in {0, 1}: where that is known


def uniform(low, high, b, channels=1):
    """Random numbers (b, channels, 1, 1); drawn on the CPU, so that --resume repeats them."""
    return low + (high - low) * torch.rand(b, channels, 1, 1)


def random_blobs(b, size, device="cpu"):
    """Random soft blobs (b, 1, H, W) in [0, 1]: radius 5 to 60 % of the width."""
    h, w = size
    center_y, center_x = uniform(0.15, 0.85, b).to(device), uniform(0.15, 0.85, b).to(device)
    y = (torch.arange(h, device=device)[:, None] + 0.5) / w - center_y * h / w  # (b, 1, H, 1)
    x = (torch.arange(w, device=device) + 0.5) / w - center_x  # (b, 1, 1, W)
    radius = 0.05 + 0.55 * uniform(0, 1, b).to(device) ** 1.3
    noise = 0  # smooth, makes the outline irregular
    for k in (3, 5, 9):
        grid = torch.randn(b, 1, k, k).to(device) / k
        noise = noise + F.interpolate(grid, size, mode="bicubic")
    softness = 0.008 + uniform(0.02, 0.27, b).to(device) * radius  # of the edge
    return torch.sigmoid(2 * (radius * (1 + noise) - torch.hypot(x, y)) / softness)


def draw_tile_pairs(tags, b):
    """Draw b lesion tiles, and a healthy tile for each: two lists of (image, tile), each (b, 2).

    Four of five pairs come from one image, if it has both. Then skin, light and camera are the
    same, and an implant differs from its counterpart by the lesion alone.
    """
    lesion_tiles, healthy_tiles = (tags == LESION).nonzero(), (tags == HEALTHY).nonzero()
    chosen = lesion_tiles[torch.randint(len(lesion_tiles), (b,))]
    partners = []
    for image in chosen[:, 0]:
        candidates = healthy_tiles[healthy_tiles[:, 0] == image]
        if len(candidates) == 0 or torch.rand(()) > 0.8:
            candidates = healthy_tiles
        partners.append(candidates[torch.randint(len(candidates), ())])
    return chosen, torch.stack(partners)


def crop_tiles(tagged, chosen, size, device):
    """Resize tiles, chosen as (image, tile) (b, 2), to (b, 3, H, W) in [-1, 1]; half mirrored."""
    images, (h, w) = tagged.images[chosen[:, 0]].to(device), tagged.images.shape[2:]
    left, top, width, height = tagged.tiles[chosen[:, 0], chosen[:, 1]].unbind(1)
    corners = [left * w, top * h, (left + width) * w, (top + height) * h]
    boxes = torch.stack([torch.arange(len(chosen)), *corners], 1).to(device)
    x = images.float() / 127.5 - 1
    x = roi_align(x, boxes, size, sampling_ratio=2, aligned=True)  # (b, 3, H, W)
    return torch.where(uniform(0, 1, len(x)).to(device) < 0.5, x.flip(3), x)


def implant_batch(tagged, b, size, device):
    """b implants: a lesion tile, blended by a random blob into a healthy tile.

    Everything is known of them: the target is the healthy tile, the lesion is the blob.
    """
    lesion_tiles, healthy_tiles = draw_tile_pairs(tagged.tags, b)
    lesion = crop_tiles(tagged, lesion_tiles, size, device)
    healthy = crop_tiles(tagged, healthy_tiles, size, device)
    blob = random_blobs(b, size, device) * (uniform(0, 1, b) > 0.1).to(device)  # 1 in 10 is empty
    weight = blob * uniform(0.6, 1, b).to(device)  # some lesions are faint
    implanted = weight * lesion + (1 - weight) * healthy
    gain = (uniform(0.85, 1.15, b) + uniform(-0.05, 0.05, b, 3)).to(device)  # brightness, tint
    return Batch(
        x=(gain * (implanted + 1) - 1).clamp(-1, 1),
        y=torch.full((b,), LESION_FREE, device=device),
        target=(gain * (healthy + 1) - 1).clamp(-1, 1),
        known=torch.ones_like(blob),
        lesion=blob,
        lesion_known=torch.ones_like(blob),
    )


def image_batch(tagged, b, size, device):
    """b whole images, augmented. Their lesion-free counterpart is known only in healthy tiles,
    where it is the image itself; presence or absence of a lesion in lesion and healthy tiles."""
    i = torch.randint(len(tagged.images), (b,))
    img = tagged.images[i].to(device).float() / 255  # (b, 3, 2H, 2W)
    tiles, tags = tagged.tiles[i].to(device), tagged.tags[i].to(device)
    masks = torch.cat(tile_masks(tiles, tags, img.shape[2:]), 1)  # (b, 2, 2H, 2W)
    img, masks = data.augment(img, masks)
    x = F.avg_pool2d(img, 2) * 2 - 1  # (b, 3, H, W)
    lesion, healthy = (F.avg_pool2d(masks, 2) == 1).float().split(1, 1)  # (b, 1, H, W) each
    y = torch.full((b,), LESION_FREE, device=device)
    return Batch(x, y, x, healthy, lesion, torch.maximum(lesion, healthy))


def diffseg_batch(tagged, b, size, device):
    """A training batch of DiffSeg, a third implants and the rest whole images."""
    implants = implant_batch(tagged, b // 3, size, device)
    images = image_batch(tagged, b - b // 3, size, device)
    batch = Batch(*(torch.cat(fields) for fields in zip(implants, images, strict=True)))
    # f shall reconstruct one in eight as it is; that is known everywhere, without a blend.
    as_it_is = (uniform(0, 1, b) < 0.125).to(device)  # (B, 1, 1, 1)
    return batch._replace(
        y=torch.where(as_it_is.flatten(), AS_IT_IS, LESION_FREE),
        target=torch.where(as_it_is, batch.x, batch.target),
        known=torch.where(as_it_is, 1, batch.known),
        lesion_known=torch.where(as_it_is, 0, batch.lesion_known),
    )


def mask_batch(images, masks, b, device):
    """b images with one of their masks each, augmented: x (b, 3, H, W) in [-1, 1], (b, 1, H, W).

    images: uint8 (N, 3, 2H, 2W). masks: uint8 (N, R, 2H, 2W) in {0, 1}.
    """
    i, rater = torch.randint(len(images), (b,)), torch.randint(masks.shape[1], (b,))
    img, mask = images[i].to(device).float() / 255, masks[i, rater].to(device).float()
    img, mask = data.augment(img, mask[:, None])
    return F.avg_pool2d(img, 2) * 2 - 1, (F.avg_pool2d(mask, 2) >= 0.5).float()


# ==================================================================================================
# 4. Equations and losses
# ==================================================================================================

# Linear betas 1e-4 .. 0.02; ALPHA_BAR[t] is the share of signal variance left after step t.
ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0).float()


def add_noise(x0, t, eps):
    """Noise x0 by eps, both (B, C, H, W), to step t, int64 (B,) in 0..T-1. Returns xt."""
    a = ALPHA_BAR.to(x0.device)[t][:, None, None, None]  # (B, 1, 1, 1)
    return a.sqrt() * x0 + (1 - a).sqrt() * eps  # Eq. 1 [paper]


def diffseg_loss(net, tagged, args):
    """The loss of one batch: reconstruction, and half the blend's cross-entropy."""
    batch = diffseg_batch(tagged, args.batch_size, args.size, args.device)
    t = torch.randint(T_TRAIN[0], T_TRAIN[1] + 1, (len(batch.x),)).to(args.device)
    xt = add_noise(batch.x, t, torch.randn_like(batch.x))
    with autocast(args):
        out = net(xt, t, batch.y)  # (B, 4, H, W)
    x0_hat, logits = out[:, :3], out[:, 3:]
    return reconstruction_loss(x0_hat, batch.target, batch.known) + 0.5 * known_cross_entropy(
        logits, batch.lesion, batch.lesion_known
    )


def reconstruction_loss(x0_hat, target, known):
    """Squared error where the target is known. Its mean is over all pixels, known or not, so that
    an image of which little is known has little weight."""
    return (known * (x0_hat - target) ** 2).mean()  # Eq. 2 [ours]


def known_cross_entropy(logits, target, known):
    """Binary cross-entropy, mean over the known pixels; all (B, 1, H, W), target in [0, 1]."""
    total = F.binary_cross_entropy_with_logits(logits, target, known, reduction="sum")
    return total / known.sum().clamp(min=1)


def tags_loss(net, tagged, args):
    """The control: a U-Net that learns from the same tagged images, without any diffusion."""
    batch = image_batch(tagged, args.batch_size, args.size, args.device)
    with autocast(args):
        logits = net(batch.x)  # (B, 1, H, W)
    return known_cross_entropy(logits, batch.lesion, batch.lesion_known)


def mask_loss(net, images, masks, args):
    """A U-Net that learns from masks, true or pseudo-labels: cross-entropy plus soft Dice."""
    x, mask = mask_batch(images, masks, args.batch_size, args.device)
    with autocast(args):
        logits = net(x)  # (B, 1, H, W)
    p = logits.sigmoid()
    overlap = (2 * (p * mask).sum((1, 2, 3)) + 1) / (p.sum((1, 2, 3)) + mask.sum((1, 2, 3)) + 1)
    return F.binary_cross_entropy_with_logits(logits, mask) + 1 - overlap.mean()


def autocast(args):
    """bf16 autocast on the run's device where --amp says so."""
    return torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.amp == "on")


# ==================================================================================================
# 5. Network
# ==================================================================================================


class Block(nn.Module):
    """Two 3 x 3 convolutions with a skip, scaled and shifted by an embedding (B, c_emb)."""

    def __init__(self, c_in, c_out, c_emb, dropout=0.1):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.film = nn.Linear(c_emb, 2 * c_out)
        self.norm2 = nn.GroupNorm(8, c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # a block starts near its skip

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, 1)  # (B, C, 1, 1) each
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return self.skip(x) + self.conv2(self.dropout(h))


class UNet(nn.Module):
    """U-Net f(x, t, y) of four levels: x (B, 3, H, W), t and y int64 (B,) -> (B, c_out, H, W).

    As denoiser c_out = 4: the reconstruction of x0, and the logit of the blend. As segmenter
    c_out = 1, the logit of a lesion, without t and y. H and W are multiples of 8.
    """

    def __init__(self, c_out, width=32):
        super().__init__()
        widths = [width, width * 3 // 2, width * 2, width * 3]
        c_emb, c = 4 * width, width
        self.time = nn.Sequential(nn.Linear(64, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.label = nn.Embedding(2, c_emb)
        self.stem = nn.Conv2d(3, c, 3, padding=1)
        self.down, self.shrink, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for c_next in widths:
            self.down.append(Block(c, c_next, c_emb))
            self.shrink.append(nn.Conv2d(c_next, c_next, 3, stride=2, padding=1))
            c = c_next
        self.shrink[-1] = nn.Identity()
        self.middle = Block(c, c, c_emb)
        for c_next in reversed(widths):
            self.up.append(Block(c + c_next, c_next, c_emb))
            c = c_next
        self.head = nn.Sequential(nn.GroupNorm(8, c), nn.SiLU(), nn.Conv2d(c, c_out, 3, padding=1))
        nn.init.zeros_(self.head[-1].weight)

    def forward(self, x, t=None, y=None):
        zero = torch.zeros(len(x), dtype=torch.long, device=x.device)
        t, y = zero if t is None else t, zero if y is None else y
        freq = torch.exp(-math.log(1e4) * torch.arange(32, device=x.device) / 32)
        phase = t.float()[:, None] * freq  # (B, 32)
        emb = F.silu(self.time(torch.cat([phase.sin(), phase.cos()], 1)) + self.label(y))
        h, skips = self.stem(x), []
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
# 6. Inference: maps and outputs
# ==================================================================================================


def diffusion_difference(x0_healthy, x0_lesion):
    """Where two reconstructions (B, 3, H, W) differ, scaled to 0..1 in each image: (B, 1, H, W).

    The paper's pseudo-noises are eps~ = (xt - sqrt(a) x0_hat) / sqrt(1 - a) (Eq. 3). Their
    difference is this one times sqrt(a) / sqrt(1 - a), as xt cancels.
    """
    d = (x0_healthy - x0_lesion).mean(1, keepdim=True).clamp(min=0)  # Eq. 4 [paper; scaling ours]
    low, high = d.amin((1, 2, 3), keepdim=True), d.amax((1, 2, 3), keepdim=True)
    return (d - low) / (high - low).clamp(min=1e-6)


@torch.no_grad()
def diffseg_maps(net, x0, n, seed):
    """n differences and n blends, (B, n, H, W) in [0, 1], of images x0 (B, 3, H, W) in [-1, 1].

    Each has its own noise and step t, the same for all images, so that the maps of an image do not
    depend on the other images in the batch.
    """
    g = torch.Generator().manual_seed(seed)
    differences, blends = [], []
    for t_n in torch.linspace(*T_INFER, n).long().tolist():
        eps = torch.randn(1, *x0.shape[1:], generator=g).to(x0).expand_as(x0)
        t = torch.full((len(x0),), t_n, device=x0.device)
        xt = add_noise(x0, t, eps)
        healthy = net(xt, t, torch.full_like(t, LESION_FREE))  # (B, 4, H, W)
        lesion = net(xt, t, torch.full_like(t, AS_IT_IS))
        differences.append(diffusion_difference(healthy[:, :3], lesion[:, :3]))
        blends.append(healthy[:, 3:].sigmoid())  # (B, 1, H, W)
    return torch.cat(differences, 1), torch.cat(blends, 1)


def diffseg_outputs(difference, blend):
    """DiffSeg's outputs, logits (B, N, H, W), from its maps in [0, 1].

    The blend knows what a lesion is, the difference where it ends: their geometric mean.
    """
    return torch.logit((blend * difference).sqrt(), 1e-4)  # Eq. 5 [ours]


@torch.no_grad()
def dropout_outputs(net, x, n, seed):
    """n outputs of a segmenter, logits (B, n, H, W): dropout stays on (MC dropout, arXiv
    1506.02142). x: (B, 3, H, W) in [-1, 1]."""
    torch.manual_seed(seed)
    net.train()  # no other layer than dropout differs in training
    p = torch.cat([net(x).sigmoid() for _ in range(n)], 1)
    net.eval()
    return torch.logit(p, 1e-4)


# ==================================================================================================
# 7. Thresholds, uncertainty and CRF
# ==================================================================================================
# Each output has its own threshold. The margin of an output is how far it lies above it: logit -
# threshold, or q - 1/2 after the CRF. Its mask is margin > 0; the one mask of an image is
# mean margin > 0.


def spread_thresholds(level, spread, n):
    """n thresholds (n, 1, 1), evenly from level - spread to level + spread, in random order.

    In order, outputs of more noise would always be the tighter ones.
    """
    offsets = torch.linspace(-spread, spread, n) if n > 1 else torch.zeros(1)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    return level + offsets[order, None, None]


def choose_thresholds(logits, masks):
    """Thresholds (N, 1, 1) for outputs, from masks of the same images.

    logits: (B, N, H, W). masks: (B, R, H, W). The level has the best Dice, then the spread the
    lowest GED.
    """
    n, mean = logits.shape[1], logits.mean(1, keepdim=True)
    truth = majority(masks)
    level = max(LEVELS.tolist(), key=lambda x: overlap_metrics(mean > x, truth)["dice"].mean())

    def distance(spread):
        thresholds = spread_thresholds(level, spread, n).to(logits)
        return ged(logits > thresholds, masks).mean()

    return spread_thresholds(level, min(SPREADS, key=distance), n)


def thresholds_from_tags(logits, tiles, tags):
    """Thresholds (N, 1, 1) without masks, from tags of the same images.

    logits: (B, N, H, W). tiles: (B, K, 4). tags: (B, K). The level contradicts the fewest tags.
    """
    few = (x.split(16) for x in (logits.mean(1), tiles, tags))  # images at a time
    wrong = sum(contradicted_tags(*x).sum(0) for x in zip(*few, strict=True))  # (L,)
    return spread_thresholds(LEVELS[wrong.argmin().item()], TAG_SPREAD, logits.shape[1])


def contradicted_tags(logits, tiles, tags):
    """How many tags of an image each threshold in LEVELS contradicts: (B, L).

    logits: (B, H, W). tiles: (B, K, 4). tags: (B, K).
    """
    masks = logits[:, None] > LEVELS.to(logits)[:, None, None]  # (B, L, H, W)
    found = tag_of(lesion_share(masks.float(), tiles))  # (B, L, K)
    return ((found != tags[:, None]) & (tags != NO_TAG)[:, None]).sum(2)


def overlap_metrics(pred, mask):
    """Metrics of each image, binary pred and mask (B, 1, H, W): {metric: (B,)}; both empty: 1."""
    pred, mask = pred.flatten(1).float(), mask.flatten(1).float()
    inter, p, m = (pred * mask).sum(1), pred.sum(1), mask.sum(1)

    def ratio(x, y):
        return torch.where(y > 0, x / y.clamp(min=1), (p + m == 0).float())

    out = {"dice": ratio(2 * inter, p + m), "iou": ratio(inter, p + m - inter)}
    return out | {"precision": ratio(inter, p), "recall": ratio(inter, m)}


def ambiguity(masks):
    """Variance of N binary masks (B, N, H, W) in each pixel, (B, H, W) in 0..0.25."""
    coherence = masks.float().mean(1)
    return coherence * (1 - coherence)  # Eq. 6 [paper]


def iou_distance(a, b):
    """1 - IoU of all pairs of masks (B, N, H, W), (B, R, H, W): (B, N, R); of two empty ones 0."""
    a, b = a.flatten(2).float(), b.flatten(2).float()
    inter = a @ b.transpose(1, 2)  # (B, N, R)
    union = a.sum(2)[:, :, None] + b.sum(2)[:, None] - inter
    return torch.where(union > 0, 1 - inter / union.clamp(min=1), torch.zeros_like(union))


def ged(samples, raters):
    """Squared generalized energy distance, masks (B, N, H, W) and (B, R, H, W) -> (B,)."""
    cross = iou_distance(samples, raters).mean((1, 2))
    within_samples = iou_distance(samples, samples).mean((1, 2))
    within_raters = iou_distance(raters, raters).mean((1, 2))
    return 2 * cross - within_samples - within_raters  # Eq. 7 [paper]


def crf_integrate(margin, img, seed):
    """K results of a dense CRF, each from the mean of H random outputs.

    margin: (B, N, H, W). img: (B, 3, H, W) in 0..255. Returns margins (B, K, H, W).
    """
    g = torch.Generator().manual_seed(seed)
    crf = DenseCRF(
        sxy_bilateral=CRF_SXY * img.shape[3] / 64,
        srgb=CRF_SRGB,
        compat_bilateral=CRF_WEIGHT,
        compat_gaussian=0,
    )
    results = []
    for _ in range(CRF_RESULTS):
        chosen = torch.randperm(margin.shape[1], generator=g)[:CRF_OUTPUTS]
        p = margin[:, chosen.to(margin.device)].sigmoid().mean(1, keepdim=True)  # (B, 1, H, W)
        q = crf(unary_from_softmax(torch.cat([1 - p, p], 1)), img)  # (B, 2, H, W)
        results.append(q[:, 1:] - 0.5)
    return torch.cat(results, 1)  # Eq. 8 [paper]


# ==================================================================================================
# 8. Evaluation and predictions
# ==================================================================================================


def chunk(args):
    """Images at a time in inference, so that memory is bounded: 64 of 64 x 48 px on a CPU."""
    pixels = 2**18 if args.device == "cpu" else 2**22
    return max(1, pixels // math.prod(args.size))


def all_outputs(nets, img, n, args):
    """n outputs of networks {stage: network}, for images (B, 3, H, W) in 0..255.

    Returns {row: logits (B, n, H, W)}. The network of DiffSeg gives three rows: the difference and
    the blend alone, and, last, both together.
    """
    x = img.to(args.device).float() / 127.5 - 1
    segmenters = {stage: net for stage, net in nets.items() if stage != "diffseg"}
    with autocast(args):
        rows = {stage: dropout_outputs(net, x, n, args.seed) for stage, net in segmenters.items()}
        if "diffseg" in nets:
            difference, blend = diffseg_maps(nets["diffseg"], x, n, args.seed)
            rows["difference"] = torch.logit(difference, 1e-4)
            rows["blend"] = torch.logit(blend, 1e-4)
            rows["diffseg"] = diffseg_outputs(difference, blend)
    return rows


def segment(nets, thresholds, img, args):
    """Margins {row: (B, N, H, W)} of images uint8 (B, 3, H, W), in the order of the table."""
    img = img.to(args.device)
    rows = {}
    for row, logits in all_outputs(nets, img, args.outputs, args).items():
        rows[row] = logits - thresholds[row].to(logits)
        if f"{row}_crf" in ROWS:
            rows[f"{row}_crf"] = crf_integrate(rows[row], img, args.seed)
    return {row: rows[row] for row in ROWS if row in rows}


def one_mask(margin):
    """The one mask (B, 1, H, W) bool of N outputs' margins (B, N, H, W)."""
    return margin.mean(1, keepdim=True) > 0


def evaluate(nets, thresholds, split, args):
    """Metrics {row: {metric: (n,)}} of the images of a split."""
    rows, n = {}, chunk(args)
    for img, masks in zip(split.images.split(n), split.masks.split(n), strict=True):
        masks = masks.to(args.device)
        for row, margin in segment(nets, thresholds, img, args).items():
            samples = margin > 0
            values = overlap_metrics(one_mask(margin), majority(masks))
            values["ged"] = ged(samples, masks)
            area = samples.float().mean((1, 2, 3)).clamp(min=1e-3)  # mean lesion, may be empty
            values["ambiguity"] = ambiguity(samples).mean((1, 2)) / area  # one number an image
            for metric, value in values.items():
                rows.setdefault(row, {}).setdefault(metric, []).append(value.cpu())
    return {row: {m: torch.cat(v) for m, v in values.items()} for row, values in rows.items()}


def dice_by_ambiguity(values):
    """Mean Dice of the half of the images with less ambiguity, and of the other half."""
    dice = values["dice"][values["ambiguity"].argsort()]
    half = (len(dice) + 1) // 2
    halves = {"dice_less_ambiguous": dice[:half], "dice_more_ambiguous": dice[-half:]}
    return {name: half.mean().item() for name, half in halves.items()}


def draw_panel(nets, thresholds, split, rows, args, path):
    """Write a figure of the best, median and worst images by Dice of the last row of the table."""
    last = list(rows)[-1]
    order = rows[last]["dice"].argsort(descending=True).tolist()
    middle = max(0, (len(order) - 1) // 2)
    places = {"best": order[:2], "median": order[middle : middle + 2], "worst": order[-2:]}
    shown = [(place, i) for place, images in places.items() for i in images]
    img = split.images[[i for _, i in shown]]
    margins = {row: m.cpu() for row, m in segment(nets, thresholds, img, args).items()}
    titles, sheet = [], []
    for k, (place, i) in enumerate(shown):
        photo, truth = img[k].permute(1, 2, 0).numpy(), majority(split.masks[i : i + 1])
        tiles = {"image + truth": (data.outline(photo, truth[0, 0]), "")}
        if "diffseg" in margins:
            for title in ("difference", "blend"):
                map_ = (margins[title] + thresholds[title]).sigmoid()[k].mean(0)
                tiles[title] = data.colour_map(map_), ""
            samples = margins["diffseg"][k : k + 1] > 0
            for n in range(0, args.outputs, (args.outputs + 2) // 3):
                tiles[f"output {n + 1}"] = data.colour_map(samples[0, n]), ""
            tiles["coherence"] = data.colour_map(samples[0].float().mean(0)), ""
            tiles["ambiguity"] = data.colour_map(4 * ambiguity(samples)[0]), ""
        for row in (row for row in margins if row not in ("difference", "blend", "diffseg")):
            mask = one_mask(margins[row][k : k + 1])
            caption = f"Dice {overlap_metrics(mask, truth)['dice'].item():.2f}"
            tiles[row.replace("_", " ")] = data.outline(photo, mask[0, 0], (255, 230, 0)), caption
        titles = list(tiles)
        sheet.append((f"{place}\n{split.ids[i][-7:]}", list(tiles.values())))
    data.draw_sheet(titles, sheet, path)


def segment_photo(photo, nets, thresholds, row, args):
    """Segment a photo by a row of the table: pictures in its own size, and the mask's share."""
    margin = segment(nets, thresholds, photo.small[None], args)[row][0].cpu()  # (N, H, W)
    total, coherence = torch.zeros(2, *photo.img.shape[1:])
    for output in margin.split(1):  # one at a time: photographs are large
        z = data.enlarge(output, photo)[0]  # (h, w)
        total += z
        coherence += (z > 0) / len(margin)
    mask, variance = total > 0, coherence * (1 - coherence)  # Eq. 6 [paper]
    pictures = {
        "mask": mask.byte().numpy() * 255,
        "overlay": data.outline(photo.img.permute(1, 2, 0).numpy(), mask, (255, 230, 0)),
        "coherence": data.colour_map(coherence),
        "ambiguity": data.colour_map(4 * variance),
    }
    return pictures, {"share of the image": f"{mask.float().mean():.4f}"}


# ==================================================================================================
# 9. Training
# ==================================================================================================


@torch.no_grad()
def update_ema(ema, net, decay):
    """Move the weights of ema towards those of net."""
    for old, new in zip(ema.parameters(), net.parameters(), strict=True):
        old.lerp_(new, 1 - decay)


def learning_rate(step, steps):
    """Share of --lr at a step: linear warm-up over a tenth of the steps, at most 100, then half a
    cosine to 0."""
    warm_up = min(100, max(1, steps // 10))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))


def train(stage, c_out, loss_function, fingerprints, args, folder):
    """Train one network of c_out channels; returns the EMA of its weights and the seconds it took.

    loss_function(net) draws a batch and returns its loss. fingerprints: of the data.
    last_<stage>.pt, written every --save-every steps, is all that --resume needs.
    """
    torch.manual_seed(args.seed)
    net = UNet(c_out, args.width).to(args.device)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    opt = torch.optim.AdamW(net.parameters(), args.lr, weight_decay=1e-4)
    schedule = partial(learning_rate, steps=args.steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, schedule)
    parts = {"net": net, "ema": ema, "opt": opt, "scheduler": scheduler}
    last = folder / f"last_{stage}.pt"
    saved = data.resume(last, METHOD, args, fingerprints, parts)
    first, seconds = saved.get("step", 0), saved.get("seconds", 0.0)
    forward = torch.compile(net) if args.compile else net
    began = time.time() - seconds
    bar = data.progress(range(first, args.steps), f"train {stage}", args.steps, first)
    for step in bar:
        loss = loss_function(forward)
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if not loss.isfinite():
            todo = f"try --lr {args.lr / 3:.0e} or --amp off"
            raise DataError(f"{stage}: loss is {loss.item()} at step {step}: {todo}")
        opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        scheduler.step()
        update_ema(ema, net, min(0.995, (step + 1) / (step + 11)))  # short memory at the start
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            seconds = time.time() - began
            more = {"step": step + 1, "seconds": seconds}
            data.save_checkpoint(last, METHOD, args, fingerprints, parts, **more)
    return ema, seconds


# ==================================================================================================
# 10. Beyond the paper: the student
# ==================================================================================================
# On a training image, the tags tell which threshold of the map is right: the one that contradicts
# fewest of them. The mask at that threshold is a pseudo-label, and a plain U-Net, the student,
# learns from these as if they were masks. It needs one network call for an output; DiffSeg two.


def fit_threshold(logits, tiles, tags):
    """The threshold (B,) that contradicts fewest tags of each image, the middle one of equals.

    logits: (B, H, W). tiles: (B, K, 4). tags: (B, K).
    """
    wrong = contradicted_tags(logits, tiles, tags)  # (B, L)
    best = wrong == wrong.amin(1, keepdim=True)
    middle = (best.sum(1) // 2 + 1)[:, None]  # rank of the middle one
    index = (best.cumsum(1) >= middle).int().argmax(1)
    return LEVELS.to(logits)[index]


@torch.no_grad()
def pseudo_labels(teacher, tagged, args):
    """Masks of the tagged images, uint8 (N, 1, 2H, 2W), from the outputs and the tags.

    teacher: {stage: network}; its last row is used.
    """
    size, masks = tagged.images.shape[2:], []
    chunks = torch.arange(len(tagged.images)).split(chunk(args))
    some = max(1, args.outputs // 4)  # a quarter of the outputs is enough here
    for i in data.progress(chunks, "pseudo-labels", len(chunks), unit="chunk"):
        tiles, tags = tagged.tiles[i].to(args.device), tagged.tags[i].to(args.device)
        img = F.avg_pool2d(tagged.images[i].float(), 2)  # (B, 3, H, W)
        *_, logits = all_outputs(teacher, img, some, args).values()  # (B, n, H, W)
        logits = logits.mean(1)  # (B, H, W)
        margin = logits - fit_threshold(logits, tiles, tags)[:, None, None]
        margin = F.interpolate(margin[:, None], size, mode="bilinear")  # (B, 1, 2H, 2W)
        lesion, healthy = tile_masks(tiles, tags, size)
        masks.append((((margin > 0) | (lesion > 0)) & (healthy == 0)).byte().cpu())
    return torch.cat(masks)


# ==================================================================================================
# 11. Main
# ==================================================================================================


def load(split, size, args, **options):
    """A split at size = (H, W), with --quick its first 24 images."""
    options |= {"limit": 24 if args.quick else None, "workers": args.num_workers}
    return data.load_segmentation(args.data, args.data_root, split, size, **options)


def load_if_masks(split, args):
    """A split for validation or test, or None where there are tags and no masks."""
    has_masks = data.has_masks(args.data, args.data_root, split)
    if not has_masks and data.find_tags(args.data, args.data_root):
        return None
    return load(split, args.size, args)


def load_training(args):
    """The tagged training images, their masks (N, R, 2H, 2W), R = 0 if none are needed, and the
    fingerprint of all this."""
    tags_file = data.find_tags(args.data, args.data_root)
    size = [2 * side for side in args.size]  # tiles need detail
    images_only = tags_file is not None and "unet" not in args.method
    train_set = load("train", size, args, images_only=images_only)
    images, masks, fingerprint = train_set.images, train_set.masks, train_set.fingerprint
    if tags_file:
        where = (tags_file, args.data, args.data_root, train_set.ids)
        tiles, tags = (x[:, : args.tags] for x in data.read_tags(*where, TAG_NAMES))
        fingerprint = data.fingerprint(fingerprint, tiles.tolist(), tags.tolist())
        tagged = (tags != NO_TAG).any(1)  # (N,)
        if not tagged.all():
            print(f"{tags_file}: {(~tagged).sum()} of {len(tagged)} images have no tag, not used")
            images, masks, tiles, tags = (x[tagged] for x in (images, masks, tiles, tags))
    else:
        tiles, tags = tag_tiles(masks, args.tags or TILES, args.seed)
    if not (tags == LESION).any() or not (tags == HEALTHY).any():
        why = "no tile of the training images is healthy, or none is lesion"
        raise DataError(f"{tags_file or train_set.name}: {why}; both are needed")
    images, masks = (data.to_device_if_it_fits(x, args.device) for x in (images, masks))
    return TaggedImages(images, tiles, tags), masks, fingerprint


def train_all(tagged, masks, fingerprints, args, folder):
    """Train the networks of --method and those that they build on.

    Returns networks {stage: network} and {stage: seconds}.
    """
    nets, seconds, wanted = {}, {}, set(args.method)

    def fit(stage, c_out, loss_function):
        options = (fingerprints, args, folder)
        nets[stage], seconds[stage] = train(stage, c_out, loss_function, *options)

    on_masks = partial(mask_loss, images=tagged.images, args=args)
    if "unet" in wanted:
        fit("unet", 1, partial(on_masks, masks=masks))
    if wanted & {"tags_unet", "tags_student"}:
        fit("tags_unet", 1, partial(tags_loss, tagged=tagged, args=args))
    if "tags_student" in wanted:
        pseudo = pseudo_labels({"tags_unet": nets["tags_unet"]}, tagged, args)
        fit("tags_student", 1, partial(on_masks, masks=pseudo))
    if wanted & {"diffseg", "diffseg_student"}:
        fit("diffseg", 4, partial(diffseg_loss, tagged=tagged, args=args))
    if "diffseg_student" in wanted:
        pseudo = pseudo_labels({"diffseg": nets["diffseg"]}, tagged, args)
        fit("diffseg_student", 1, partial(on_masks, masks=pseudo))
    return nets, seconds


def calibrate(nets, img, choose, args):
    """Thresholds {row: (N, 1, 1)} of networks {stage: network}; choose(logits) returns them."""
    thresholds = {}
    for stage, net in nets.items():  # one at a time, to save memory
        chunks = img.split(chunk(args))
        parts = [all_outputs({stage: net}, x, args.outputs, args) for x in chunks]
        for row in parts[0]:
            thresholds[row] = choose(torch.cat([part[row] for part in parts]))
    return thresholds


def fit(test, args, folder):
    """Train and choose thresholds and the row for --predict; writes best.pt."""
    tagged, masks, fingerprint = load_training(args)
    val = load_if_masks("val", args)
    fingerprints = {"train": fingerprint}
    if test:
        fingerprints["test"] = test.fingerprint
    if val:
        fingerprints["val"] = val.fingerprint
    if not args.resume:
        data.prepare_folder(folder)
    nets, seconds = train_all(tagged, masks, fingerprints, args, folder)
    if val:
        choose = partial(choose_thresholds, masks=val.masks.to(args.device))
        thresholds = calibrate(nets, val.images, choose, args)
        rows = evaluate(nets, thresholds, val, args)
        dice = {row: values["dice"].mean().item() for row, values in rows.items()}
        row = max((row for row in dice if row != "unet"), key=dice.get, default="unet")
    else:  # 200 training images are enough
        img = F.avg_pool2d(tagged.images[:200].float(), 2)
        tiles, tags = (x[:200].to(args.device) for x in (tagged.tiles, tagged.tags))
        choose = partial(thresholds_from_tags, tiles=tiles, tags=tags)
        thresholds = calibrate(nets, img, choose, args)
        row = list(thresholds)[-1]
    more = {"row": row, "seconds": seconds, "thresholds": thresholds}
    more["nets"] = {stage: net.state_dict() for stage, net in nets.items()}
    data.save_checkpoint(folder / "best.pt", METHOD, args, fingerprints, **more)


def report(nets, test, state, args, folder):
    """Evaluate on the test images: writes result.json and the figure, prints the table."""
    rows = evaluate(nets, state["thresholds"], test, args)
    figure = folder / "figures" / "panel.png"
    table = {row: {m: v[m].mean().item() for m in METRICS} for row, v in rows.items()}
    more = {"n_images": len(test), "seconds": state["seconds"], "predict": state["row"]}
    more["ambiguity"] = {row: dice_by_ambiguity(values) for row, values in rows.items()}
    draw_panel(nets, state["thresholds"], test, rows, args, figure)
    data.write_result(folder / "result.json", METHOD, args, table, **more)
    data.print_table(table)
    print(f"\n{len(test)} test images of {args.data}; means over images. Open {figure}")


def run(args):
    """Train and evaluate; or evaluate, predict or write tags.csv alone."""
    if args.write_tags:
        train_set = load("train", [2 * side for side in args.size], args)
        tagged = tag_tiles(train_set.masks, args.tags or TILES, args.seed)
        where = (args.write_tags, args.data, args.data_root, train_set.ids)
        return data.write_tags(*where, *tagged, TAG_NAMES)
    folder, fingerprints = data.run_folder(METHOD, args), {}
    if not args.predict:
        test = load_if_masks("test", args)
        if test:
            fingerprints["test"] = test.fingerprint
    if not (args.predict or args.eval_only):
        fit(test, args, folder)
    best = args.checkpoint or folder / "best.pt"
    state, nets = data.load_checkpoint(best, METHOD, fingerprints), {}
    for stage, weights in state["nets"].items():
        nets[stage] = UNet(len(weights["head.2.bias"]), args.width).to(args.device).eval()
        nets[stage].load_state_dict(weights)
    if args.predict:
        row, folder = state["row"], folder / "predictions"
        print(f"predictions of {row} go to {folder}")
        options = {"thresholds": state["thresholds"], "row": row, "args": args}
        segment_one = partial(segment_photo, nets=nets, **options)
        return data.predict_images(args.predict, args.size, folder, best, segment_one)
    if test:
        report(nets, test, state, args, folder)
    else:
        print(f"No masks of test images, so no table; --predict --checkpoint {best} segments.")


def main(argv=None):
    """Run the command line; foreseeable errors are one line each and exit status 2."""
    with data.one_line_errors("diffseg.py"):
        run(parse_args(argv))


if __name__ == "__main__":
    main()
