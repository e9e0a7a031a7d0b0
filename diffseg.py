"""DiffSeg: weakly supervised skin-lesion segmentation by diffusion difference.

Paper: DiffSeg, https://arxiv.org/abs/2404.16474. A noised image is denoised twice: to the image as
it is, and to its lesion-free counterpart. The two reconstructions differ at the lesion. Different
noise gives different masks, like those of several annotators; where they disagree, the segmentation
is uncertain. A dense CRF integrates the masks into one.

Here, no masks are needed for training (D1-D3, ours). An annotator tags rectangles ("tiles") of each
image as healthy, mixed or lesion. Lesion tiles blended into healthy tiles give images whose
lesion-free counterpart is known. From these and from the tagged tiles of whole images, one network
f(xt, t, y) learns to predict the clean image x0 as it is or without its lesion, whichever y asks.

    x0 --noise--> xt --+-- f(xt, t, AS_IT_IS)    --> x0_lesion -----------+
                       |                                                  +-- map --> N masks
                       +-- f(xt, t, LESION_FREE) --> x0_healthy, blend ---+
    N masks --> mean: coherence; variance: ambiguity; distances: GED; dense CRF --> one mask

    python diffseg.py                                     synthetic images; minutes on a CPU
    python diffseg.py --data isic2018                     downloads ISIC 2018 Task 1 first (13 GB)
    python diffseg.py --data folder --data-root mine      mine/<train|val|test>/{images,masks}/*
    python diffseg.py --predict photo.jpg --checkpoint out/diffseg/isic2018/seed0/best.pt

Test Dice on ISIC (300 images, our own split, 12 tags on each training image, 64 x 48 px, mean of
seeds 0, 1 and 2): DiffSeg + CRF 0.809, its student 0.853. The control, the same U-Net trained on
the same tags, + CRF 0.806, its student 0.883. The same U-Net trained on all masks 0.899.

Deviations from the paper:
D1  One conditional network instead of two: half the parameters.
D2  The lesion-free counterparts come from implants; the paper does not say where its own come from.
D3  The supervision is tagged tiles. Without tags.csv, the tags are computed from the training
    masks; DiffSeg and its student use these masks for nothing else.
D4  A fourth output channel, "blend", predicts where the lesion is; its targets are the blobs of the
    implants and the tagged tiles. A map is the geometric mean of blend and difference.
D5  The difference counts only where the lesion is darker than the skin: clamp(min=0).
D6  Steps t are small: 5..80 of 1000 at inference, 5..250 in training.
D7  Each output has its own threshold, like annotators who draw tighter or looser outlines. The
    thresholds are chosen on the masks of the validation images; without masks, on the tags.
D8  The CRF has the bilateral kernel only; its parameters were chosen on validation images.
"""

import copy
import math
import os
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads stall a busy CPU 10-50 x

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import roi_align

import data
from crf import DenseCRF, unary_from_softmax
from data import DataError, parse_size, whole

# "Eq. n": our numbering, as in docs/diffseg.md. [paper]: from the paper or its code. [ours]: added.
METHOD = "diffseg"
# Networks, in the order of training. unet: trained on all masks. tags_unet: the control, trained on
# the tags without diffusion. *_student: a U-Net trained on pseudo-labels from the network that
# stands before it.
STAGES = ["unet", "tags_unet", "tags_student", "diffseg", "diffseg_student"]
ROWS = {  # row of the table: the network it uses
    "unet": "unet",
    "tags_unet": "tags_unet",
    "tags_unet_crf": "tags_unet",
    "tags_student": "tags_student",
    "difference": "diffseg",
    "blend": "diffseg",
    "diffseg": "diffseg",
    "diffseg_crf": "diffseg",
    "diffseg_student": "diffseg_student",
    "diffseg_student_crf": "diffseg_student",
}
SHOWN = ["unet", "tags_unet_crf", "tags_student", "diffseg_crf", "diffseg_student"]  # in the figure
METRICS = ["dice", "iou", "precision", "recall", "ged"]
HEALTHY, MIXED, LESION, NO_TAG = 0, 1, 2, -1  # tags of a tile
TAG_NAMES = ["healthy", "mixed", "lesion"]  # in tags.csv
TILES = 48  # tiles of an image that are tagged from its masks if there is no tags.csv
TAGS = 12  # how many of these are used by default; all on synthetic images
LESION_SHARE = 0.9  # a tile is tagged LESION if at least this share of it is lesion
LESION_FREE, AS_IT_IS = 0, 1  # y of the network f(xt, t, y): which image it reconstructs
T = 1000  # diffusion steps: t runs from 0 (nearly clean) to T - 1 (nearly pure noise)
T_TRAIN, T_INFER = (5, 250), (5, 80)  # ranges of t
LEVELS = torch.linspace(-6, 6, 121)  # candidate thresholds, in logits
SPREADS = [0, 0.5, 1, 1.5, 2, 3, 4, 6]  # half-widths of the range of thresholds, in logits
TAG_SPREAD = 1.5  # the half-width if there are no masks on which to choose it
CRF_RESULTS = 3  # runs of the CRF [paper]
CRF_OUTPUTS = 4  # random outputs whose mean is the input of one run [paper]
CRF_SXY = 5.0  # std of the bilateral kernel in space, in pixels of an image 64 wide
CRF_SRGB, CRF_WEIGHT = 8.0, 2.0  # its std in colour, in grey levels; weight of its message

# ==================================================================================================
# 1. Command line
# ==================================================================================================


def parse_args(argv=None):
    """Parse and check the command line."""
    p = data.make_parser("diffseg.py", __doc__)
    add = p.add_argument
    add("--data", default="synthetic", choices=["synthetic", "isic2018", "folder"], help="data set")
    size = "network input: N or WIDTHxHEIGHT, pixels; by default 64x48, but 128x96 on a GPU if "
    add("--size", type=parse_size, help=size + "images are not synthetic")
    steps = "training steps of each network; by default 210 on synthetic images, else 1860"
    add("--steps", type=whole(1), help=steps)
    add("--batch-size", type=whole(3), default=24, help="images in a training step")
    add("--lr", type=data.number(1e-9, 10), default=1e-3, help="peak learning rate of AdamW")
    method = "train and compare these; by default all but tags_student, and unet only if training "
    method += "images have masks and are not synthetic"
    add("--method", nargs="+", choices=STAGES, help=method)
    tags = "use the first K tags of each training image; by default all of tags.csv; without it, "
    tags += f"{TAGS}, on synthetic images {TILES}"
    add("--tags", type=whole(1), metavar="K", help=tags)
    write = "write the tags computed from the training masks to this file (CSV), and stop"
    add("--write-tags", metavar="FILE", help=write)
    add("--width", type=int, default=32, choices=[16, 32, 48, 64], help="channels of the U-Nets")
    outputs = "outputs of an image; by default 8 on synthetic images, else 16"
    add("--outputs", type=whole(1), help=outputs)
    args = p.parse_args(argv)
    synthetic = args.data == "synthetic"
    p.set_defaults(steps=1860, outputs=16)
    if synthetic:
        p.set_defaults(steps=210, outputs=8, tags=TILES)
    on_gpu = args.device.startswith("cuda")
    p.set_defaults(size="128x96" if on_gpu and not synthetic else "64x48")
    rows = ["unet", "tags_unet", "diffseg", "diffseg_student"]
    if synthetic or not data.has_masks(args.data, args.data_root, "train"):
        rows.remove("unet")
    p.set_defaults(method=rows)
    if args.quick:
        p.set_defaults(steps=6, batch_size=6, outputs=4)
    if args.write_tags:
        if synthetic:
            p.error("--write-tags: synthetic images are not files; use --data isic2018 or folder")
        return p.parse_args(argv)
    return data.parse_flags(p, argv, METHOD)


# ==================================================================================================
# 2. Supervision: tagged tiles
# ==================================================================================================
# A tile is a rectangle of an image: left, top, width and height, as fractions of the image's
# size. An image has at most K tiles; missing ones are padded with the tag NO_TAG. A mixed tile
# takes no part in the losses; it only helps to choose thresholds.


def tag_tiles(masks, k, seed):
    """Draw random tiles and tag them from masks.

    masks: uint8 (N, R, H, W) of R raters. Nothing else in DiffSeg's training reads masks.
    Returns tiles (N, K, 4), with sides of about 10 to 60 % of the image's, and tags (N, K).
    """
    n, _, h, w = masks.shape
    g = torch.Generator().manual_seed(seed)
    most = max(k, TILES)  # so that a smaller k gives the first k of the same tiles
    side = 0.1 + 0.5 * torch.rand(n, most, generator=g) ** 1.5  # small ones more often
    width, height = (side * w).long(), (side * h).long()
    left = (torch.rand(n, most, generator=g) * (w - width + 1)).long()
    top = (torch.rand(n, most, generator=g) * (h - height + 1)).long()
    tiles = torch.stack([left / w, top / h, width / w, height / h], 2)[:, :k]
    parts = zip(masks.split(64), tiles.split(64), strict=True)  # to save memory
    share = torch.cat([lesion_share(majority(m).float(), t) for m, t in parts])[:, 0]  # (N, K)
    return tiles, tag_of(share)


def majority(masks):
    """Majority of raters, (B, R, H, W) -> (B, 1, H, W) bool; a tie counts as lesion."""
    return masks.float().mean(1, keepdim=True) >= 0.5


def tag_of(share):
    """Tags of tiles from their share of lesion: HEALTHY if 0, LESION from LESION_SHARE on."""
    return (share > 0).long() + (share >= LESION_SHARE)


def inside(tiles, size):
    """Rows (..., H) and columns (..., W) whose pixel centres lie in tiles (..., 4), as 0 or 1."""
    left, top, width, height = tiles[..., None].unbind(-2)  # (..., 1)
    y, x = ((torch.arange(n, device=tiles.device) + 0.5) / n for n in size)
    in_y = (y >= top) & (y < top + height)
    in_x = (x >= left) & (x < left + width)
    return in_y.float(), in_x.float()


def lesion_share(masks, tiles):
    """Share of lesion in each tile (B, K, 4), for L masks, float (B, L, H, W): (B, L, K)."""
    in_y, in_x = inside(tiles, masks.shape[2:])  # (B, K, H), (B, K, W)
    area = in_y.sum(2) * in_x.sum(2)  # (B, K)
    lesion = torch.einsum("bkh,blhw,bkw->blk", in_y, masks, in_x)
    return lesion / area[:, None].clamp(min=1)


def tile_masks(tiles, tags, size):
    """Pixels in lesion tiles and in healthy tiles: two masks (B, 1, H, W) in {0, 1}.

    tiles: (B, K, 4). tags: (B, K). A lesion tile may be 10 % healthy, so where the two overlap,
    the healthy tile wins.
    """
    in_y, in_x = inside(tiles, size)
    is_tag = torch.stack([tags == LESION, tags == HEALTHY], 1).float()  # (B, 2, K)
    lesion, healthy = (torch.einsum("btk,bkh,bkw->bthw", is_tag, in_y, in_x) > 0).split(1, 1)
    return (lesion & ~healthy).float(), healthy.float()


class TaggedImages(NamedTuple):
    """The training set of DiffSeg."""

    images: torch.Tensor  # uint8 (N, 3, 2H, 2W): twice the input size, so that tiles keep detail
    tiles: torch.Tensor  # (N, K, 4)
    tags: torch.Tensor  # int64 (N, K)


# ==================================================================================================
# 3. Training batches: implants and whole images
# ==================================================================================================


class Batch(NamedTuple):
    """A training batch: images, and what is known about them."""

    x: torch.Tensor  # (B, 3, H, W) in [-1, 1]: x0
    y: torch.Tensor  # int64 (B,): which reconstruction is asked for, LESION_FREE or AS_IT_IS
    target: torch.Tensor  # (B, 3, H, W) in [-1, 1]: its correct result
    known: torch.Tensor  # (B, 1, H, W) in {0, 1}: where the target is known
    lesion: torch.Tensor  # (B, 1, H, W) in [0, 1]: presence of a lesion, the target of the blend
    lesion_known: torch.Tensor  # (B, 1, H, W) in {0, 1}: where that is known


def uniform(low, high, b, channels=1):
    """Random numbers (b, channels, 1, 1), drawn on the CPU: the same on every device."""
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
    """Draw b lesion tiles, and a healthy tile for each: two tensors (b, 2) of (image, tile).

    Four of five pairs come from one image, if it has both. Then skin, light and camera match, and
    the implant looks natural.
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


def crop_tiles(tagged, chosen, device):
    """Crop the tiles chosen (b, 2) = (image, tile) and resize them to the network's input, (b, 3,
    H, W) in [-1, 1]; half of them are mirrored."""
    h, w = tagged.images.shape[2:]
    left, top, width, height = tagged.tiles[chosen[:, 0], chosen[:, 1]].unbind(1)
    corners = [left * w, top * h, (left + width) * w, (top + height) * h]
    boxes = torch.stack([torch.arange(len(chosen)), *corners], 1).to(device)
    x = tagged.images[chosen[:, 0]].to(device).float() / 127.5 - 1  # (b, 3, 2H, 2W)
    x = roi_align(x, boxes, (h // 2, w // 2), sampling_ratio=2, aligned=True)  # (b, 3, H, W)
    return torch.where(uniform(0, 1, len(x)).to(device) < 0.5, x.flip(3), x)


def implant_batch(tagged, b, device):
    """b implants: a lesion tile, blended by a random blob into a healthy tile.

    Everything about them is known: the target is the healthy tile, the lesion is the blob.
    """
    lesion_tiles, healthy_tiles = draw_tile_pairs(tagged.tags, b)
    lesion = crop_tiles(tagged, lesion_tiles, device)
    healthy = crop_tiles(tagged, healthy_tiles, device)
    blob = random_blobs(b, healthy.shape[2:], device)
    blob = blob * (uniform(0, 1, b) > 0.1).to(device)  # one in ten is empty
    weight = blob * uniform(0.6, 1, b).to(device)  # some lesions are faint
    implanted = weight * lesion + (1 - weight) * healthy
    gain = (uniform(0.85, 1.15, b) + uniform(-0.05, 0.05, b, 3)).to(device)  # brightness, tint
    implanted, healthy = ((gain * (x + 1) - 1).clamp(-1, 1) for x in (implanted, healthy))
    y = torch.full((b,), LESION_FREE, device=device)
    everywhere = torch.ones_like(blob)
    return Batch(implanted, y, healthy, known=everywhere, lesion=blob, lesion_known=everywhere)


def image_batch(tagged, b, device):
    """b whole images, augmented. In healthy tiles, the lesion-free counterpart is the image itself;
    elsewhere it is unknown. The lesion is known in healthy and in lesion tiles."""
    i = torch.randint(len(tagged.images), (b,))
    img = tagged.images[i].to(device).float() / 255  # (b, 3, 2H, 2W)
    tiles, tags = tagged.tiles[i].to(device), tagged.tags[i].to(device)
    masks = torch.cat(tile_masks(tiles, tags, img.shape[2:]), 1)  # (b, 2, 2H, 2W)
    img, masks = data.augment(img, masks)
    x = F.avg_pool2d(img, 2) * 2 - 1  # (b, 3, H, W)
    lesion, healthy = (F.avg_pool2d(masks, 2) == 1).float().split(1, 1)  # (b, 1, H, W) each
    y = torch.full((b,), LESION_FREE, device=device)
    lesion_known = torch.maximum(lesion, healthy)
    return Batch(x, y, x, known=healthy, lesion=lesion, lesion_known=lesion_known)


def diffseg_batch(tagged, b, device):
    """A training batch of DiffSeg, a third implants and the rest whole images."""
    implants = implant_batch(tagged, b // 3, device)
    images = image_batch(tagged, b - b // 3, device)
    batch = Batch(*(torch.cat(fields) for fields in zip(implants, images, strict=True)))
    # Only one in eight is reconstructed as it is: that is easy to learn.
    as_it_is = (uniform(0, 1, b) < 0.125).to(device)  # (B, 1, 1, 1)
    return batch._replace(
        y=torch.where(as_it_is.flatten(), AS_IT_IS, LESION_FREE),
        target=torch.where(as_it_is, batch.x, batch.target),
        known=torch.where(as_it_is, 1, batch.known),
        lesion_known=torch.where(as_it_is, 0, batch.lesion_known),
    )


def mask_batch(images, masks, b, device):
    """b images, each with one of its masks, augmented: (b, 3, H, W) in [-1, 1] and (b, 1, H, W).

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
    """Add noise eps to x0, both (B, C, H, W), at step t, int64 (B,) in 0..T-1. Returns xt."""
    a = ALPHA_BAR.to(x0.device)[t][:, None, None, None]  # (B, 1, 1, 1)
    return a.sqrt() * x0 + (1 - a).sqrt() * eps  # Eq. 1 [Ho 2020]


def diffseg_loss(net, batch):
    """Loss of f on a Batch: reconstruction plus half the cross-entropy of the blend."""
    t = torch.randint(T_TRAIN[0], T_TRAIN[1] + 1, (len(batch.x),)).to(batch.x.device)
    xt = add_noise(batch.x, t, torch.randn_like(batch.x))
    out = net(xt, t, batch.y)  # (B, 4, H, W)
    # The mean is over all pixels, so that an image of which little is known has little weight.
    reconstruction = (batch.known * (out[:, :3] - batch.target) ** 2).mean()  # Eq. 2 [ours]
    blend = known_cross_entropy(out[:, 3:], batch.lesion, batch.lesion_known)
    return reconstruction + 0.5 * blend


def tags_loss(net, batch):
    """Loss of the control: a segmenter that learns from the tiles of a Batch, without diffusion."""
    return known_cross_entropy(net(batch.x), batch.lesion, batch.lesion_known)


def known_cross_entropy(logits, target, known):
    """Binary cross-entropy, mean over the known pixels; all (B, 1, H, W), target in [0, 1]."""
    total = F.binary_cross_entropy_with_logits(logits, target, weight=known, reduction="sum")
    return total / known.sum().clamp(min=1)


def mask_loss(net, batch):
    """Loss of a segmenter on images and masks, true or pseudo-labels: cross-entropy, soft Dice."""
    x, mask = batch
    logits = net(x)  # (B, 1, H, W)
    p = logits.sigmoid()
    dice = (2 * (p * mask).sum((1, 2, 3)) + 1) / (p.sum((1, 2, 3)) + mask.sum((1, 2, 3)) + 1)
    return F.binary_cross_entropy_with_logits(logits, mask) + 1 - dice.mean()


# ==================================================================================================
# 5. Network
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


class UNet(nn.Module):
    """U-Net f(x, t, y) of four levels: x (B, 3, H, W), t and y int64 (B,) -> (B, c_out, H, W).

    As denoiser c_out = 4: the reconstruction of x0, and the logit of the blend. As segmenter
    c_out = 1, the logit of a lesion, without t and y. H and W are multiples of 8, width of 16.
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

    The paper subtracts the pseudo-noises eps~ = (xt - sqrt(a) x0_hat) / sqrt(1 - a) (Eq. 3) of the
    two. As xt cancels, eps~_lesion - eps~_healthy = sqrt(a / (1 - a)) d, with the d below. Every
    image gets a maximum of 1, also one without a lesion.
    """
    d = (x0_healthy - x0_lesion).mean(1, keepdim=True)  # Eqs. 3, 4 [paper]
    d = d.clamp(min=0)  # [ours]: pixels that are lighter with the lesion count as 0
    low, high = d.amin((1, 2, 3), keepdim=True), d.amax((1, 2, 3), keepdim=True)
    return (d - low) / (high - low).clamp(min=1e-6)


@torch.no_grad()
def diffseg_maps(net, x0, n, seed):
    """n differences and n blends, (B, n, H, W) in [0, 1], of images x0 (B, 3, H, W) in [-1, 1].

    net(xt, t, y) returns (B, 4, H, W). Each map has its own noise and step t, the same for all
    images, so that the maps of an image do not depend on the other images in the batch.
    """
    g = torch.Generator().manual_seed(seed)
    differences, blends = [], []
    for t_n in torch.linspace(*T_INFER, n).long().tolist():
        eps = torch.randn(1, *x0.shape[1:], generator=g).to(x0).expand_as(x0)
        t = torch.full((len(x0),), t_n, device=x0.device)
        xt = add_noise(x0, t, eps)
        lesion_free = net(xt, t, torch.full_like(t, LESION_FREE))  # (B, 4, H, W)
        as_it_is = net(xt, t, torch.full_like(t, AS_IT_IS))
        differences.append(diffusion_difference(lesion_free[:, :3], as_it_is[:, :3]))
        blends.append(lesion_free[:, 3:].sigmoid())  # (B, 1, H, W)
    return torch.cat(differences, 1), torch.cat(blends, 1)


@torch.no_grad()
def dropout_outputs(net, x, n, seed):
    """n outputs of a segmenter, logits (B, n, H, W), by MC dropout (arXiv 1506.02142).

    x: (B, 3, H, W) in [-1, 1]. The outputs of an image depend on its place in the batch.
    """
    torch.manual_seed(seed)
    net.train()  # dropout is the only layer that behaves differently in training mode
    p = torch.cat([net(x).sigmoid() for _ in range(n)], 1)
    net.eval()
    return torch.logit(p, 1e-4)


# ==================================================================================================
# 7. Thresholds, uncertainty and CRF
# ==================================================================================================
# An output is a map of logits. Each output has its own threshold, and its margin is logit minus
# threshold. After the CRF, the margin is the probability of a lesion minus 1/2. The mask of an
# output is margin > 0; the one mask of an image is mean margin > 0.


def spread_thresholds(level, spread, n):
    """n thresholds (n, 1, 1), evenly from level - spread to level + spread.

    They are shuffled, the same way each time, because later outputs have more noise.
    """
    offsets = torch.linspace(-spread, spread, n) if n > 1 else torch.zeros(1)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    return level + offsets[order, None, None]


def choose_thresholds(logits, masks):
    """Thresholds (N, 1, 1) for outputs, logits (B, N, H, W), from masks (B, R, H, W).

    First their middle is chosen, by the best Dice, then their spread, by the lowest GED.
    """
    n = logits.shape[1]
    mean, truth = logits.mean(1, keepdim=True), majority(masks)
    level = max(LEVELS.tolist(), key=lambda x: overlap_metrics(mean > x, truth)["dice"].mean())
    candidates = [spread_thresholds(level, spread, n) for spread in SPREADS]
    return min(candidates, key=lambda x: ged(logits > x.to(logits), masks).mean())


def thresholds_from_tags(logits, tiles, tags):
    """Thresholds (N, 1, 1) for outputs, logits (B, N, H, W), without masks.

    tiles: (B, K, 4). tags: (B, K). The middle of the thresholds contradicts the fewest tags.
    """
    wrong = contradicted_tags(logits.mean(1), tiles, tags).sum(0, keepdim=True)  # (1, L)
    return spread_thresholds(best_level(wrong).cpu(), TAG_SPREAD, logits.shape[1])


def fit_threshold(logits, tiles, tags):
    """The threshold (B,) that contradicts the fewest tags of each image.

    logits: (B, H, W). tiles: (B, K, 4). tags: (B, K).
    """
    return best_level(contradicted_tags(logits, tiles, tags))


def contradicted_tags(logits, tiles, tags):
    """How many tags of an image each threshold in LEVELS contradicts: (B, L)."""
    wrong = []
    parts = (x.split(16) for x in (logits, tiles, tags))  # to save memory
    for some_logits, some_tiles, some_tags in zip(*parts, strict=True):
        masks = some_logits[:, None] > LEVELS.to(logits)[:, None, None]  # (16, L, H, W)
        found = tag_of(lesion_share(masks.float(), some_tiles))  # (16, L, K)
        is_wrong = (found != some_tags[:, None]) & (some_tags != NO_TAG)[:, None]
        wrong.append(is_wrong.sum(2))
    return torch.cat(wrong)


def best_level(wrong):
    """The level (B,) with the lowest count in wrong (B, L); of equal ones, the middle one."""
    best = (wrong == wrong.amin(1, keepdim=True)).int()
    middle = best.sum(1, keepdim=True) // 2 + 1  # its rank among the best
    return LEVELS.to(wrong.device)[(best.cumsum(1) >= middle).int().argmax(1)]


def overlap_metrics(pred, mask):
    """Metrics of binary pred and mask (B, 1, H, W): {metric: (B,)}; 1 if both are empty."""
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
    """1 - IoU of all pairs of masks (B, N, H, W), (B, R, H, W): (B, N, R); 0 if both are empty."""
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
    """CRF_RESULTS runs of a dense CRF, each on the mean of CRF_OUTPUTS random outputs.

    The runs are equal if there are no more outputs than that. margin: (B, N, H, W). img: (B, 3, H,
    W) in 0..255. Returns margins (B, CRF_RESULTS, H, W).
    """
    g = torch.Generator().manual_seed(seed)
    kernel = {"sxy_bilateral": CRF_SXY * img.shape[3] / 64, "srgb": CRF_SRGB}
    crf = DenseCRF(**kernel, compat_bilateral=CRF_WEIGHT, compat_gaussian=0)
    results = []
    for _ in range(CRF_RESULTS):
        chosen = torch.randperm(margin.shape[1], generator=g)[:CRF_OUTPUTS]
        p = margin[:, chosen.to(margin.device)].sigmoid().mean(1, keepdim=True)  # Eq. 8 [paper]
        q = crf(unary_from_softmax(torch.cat([1 - p, p], 1)), img)  # (B, 2, H, W)
        results.append(q[:, 1:] - 0.5)
    return torch.cat(results, 1)


# ==================================================================================================
# 8. Evaluation and predictions
# ==================================================================================================


def batch_limit(args):
    """Images in a batch at inference, to bound the memory: 85 of 64 x 48 px on a CPU."""
    pixels = 2**18 if args.device == "cpu" else 2**20
    return max(1, pixels // math.prod(args.size))


def all_outputs(nets, img, n, args):
    """n outputs of networks {stage: network}, for images (B, 3, H, W) in 0..255.

    Returns {row: logits (B, n, H, W)}. The network of DiffSeg gives three rows: the difference
    alone, the blend alone, and "diffseg", both together.
    """
    x = img.to(args.device).float() / 127.5 - 1
    outputs = {}
    segmenters = {stage: net for stage, net in nets.items() if stage != "diffseg"}
    with autocast(args):
        for stage, net in segmenters.items():
            outputs[stage] = dropout_outputs(net, x, n, args.seed)
        if "diffseg" in nets:
            difference, blend = diffseg_maps(nets["diffseg"], x, n, args.seed)
            outputs["difference"] = torch.logit(difference, 1e-4)
            outputs["blend"] = torch.logit(blend, 1e-4)
            outputs["diffseg"] = torch.logit((blend * difference).sqrt(), 1e-4)  # Eq. 5 [ours]
    return outputs


def segment(nets, thresholds, img, rows, args):
    """Margins {row: (B, N, H, W)} of images uint8 (B, 3, H, W), for the rows that nets have."""
    img, margins = img.to(args.device), {}
    for row, logits in all_outputs(nets, img, args.outputs, args).items():
        margins[row] = logits - thresholds[row].to(logits)
        if f"{row}_crf" in rows:
            margins[f"{row}_crf"] = crf_integrate(margins[row], img, args.seed)
    return {row: margins[row] for row in rows if row in margins}


def one_mask(margin):
    """The one mask of an image, (B, 1, H, W) bool, from the margins (B, N, H, W) of its outputs."""
    return margin.mean(1, keepdim=True) > 0


def evaluate(nets, thresholds, split, args):
    """Metrics {row: {metric: (n,)}} of the images of a split."""
    rows = {}
    n = batch_limit(args)
    for img, masks in zip(split.images.split(n), split.masks.split(n), strict=True):
        masks = masks.to(args.device)
        for row, margin in segment(nets, thresholds, img, ROWS, args).items():
            samples = margin > 0
            values = overlap_metrics(one_mask(margin), majority(masks))
            values["ged"] = ged(samples, masks)
            area = samples.float().mean((1, 2, 3)).clamp(min=1e-3)  # of the lesion; it may be empty
            values["ambiguity"] = ambiguity(samples).mean((1, 2)) / area  # one number per image
            for metric, value in values.items():
                rows.setdefault(row, {}).setdefault(metric, []).append(value.cpu())
    return {row: {m: torch.cat(v) for m, v in values.items()} for row, values in rows.items()}


def dice_by_ambiguity(values):
    """Mean Dice of the half of the images with less ambiguity, and of the other half."""
    dice = values["dice"][values["ambiguity"].argsort()]
    half = (len(dice) + 1) // 2
    less, more = dice[:half].mean().item(), dice[-half:].mean().item()
    return {"dice_less_ambiguous": less, "dice_more_ambiguous": more}


def draw_panel(nets, thresholds, split, rows, args, path):
    """Write a figure of the best, median and worst images by Dice of the last row in SHOWN."""
    *_, last = (row for row in SHOWN if row in rows)
    order = rows[last]["dice"].argsort(descending=True).tolist()
    middle = max(0, (len(order) - 1) // 2)
    places = {"best": order[:2], "median": order[middle : middle + 2], "worst": order[-2:]}
    shown = [(place, i) for place, images in places.items() for i in images]
    img = split.images[[i for _, i in shown]]
    margins = segment(nets, thresholds, img, ROWS, args)
    margins = {row: margin.cpu() for row, margin in margins.items()}
    titles, sheet = [], []
    for k, (place, i) in enumerate(shown):
        photo, truth = img[k].permute(1, 2, 0).numpy(), majority(split.masks[i : i + 1])
        tiles = {"image + truth": (data.outline(photo, truth[0, 0]), "")}
        if "diffseg" in margins:
            for title in ("difference", "blend"):
                map_ = (margins[title] + thresholds[title]).sigmoid()[k].mean(0)
                tiles[title] = data.colour_map(map_), ""
            samples = margins["diffseg"][k : k + 1] > 0
            for n in range(0, args.outputs, math.ceil(args.outputs / 3)):  # up to three
                tiles[f"output {n + 1}"] = data.colour_map(samples[0, n]), ""
            tiles["coherence"] = data.colour_map(samples[0].float().mean(0)), ""
            tiles["ambiguity"] = data.colour_map(4 * ambiguity(samples)[0]), ""  # at most 1/4
        for row in (row for row in SHOWN if row in margins):
            mask = one_mask(margins[row][k : k + 1])
            caption = f"Dice {overlap_metrics(mask, truth)['dice'].item():.2f}"
            tiles[row.replace("_", " ")] = data.outline(photo, mask[0, 0], (255, 230, 0)), caption
        titles = list(tiles)
        sheet.append((f"{place}\n{split.ids[i][-7:]}", list(tiles.values())))
    data.draw_sheet(titles, sheet, path)


def segment_photo(photo, nets, thresholds, row, args):
    """Segment a photo by a row of the table: pictures of its own size, and the lesion's share."""
    margin = segment(nets, thresholds, photo.small[None], [row], args)[row][0].cpu()  # (N, H, W)
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
    """Move the weights of ema towards net's; buffers, such as running means, are copied."""
    for old, new in zip(ema.parameters(), net.parameters(), strict=True):
        old.lerp_(new, 1 - decay)
    for old, new in zip(ema.buffers(), net.buffers(), strict=True):
        old.copy_(new)


def learning_rate(step, steps):
    """Share of --lr at a step: linear warm-up over a tenth of the steps, at most 100, then half a
    cosine to 0."""
    warm_up = min(100, max(1, steps // 10))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))


def autocast(args):
    """bfloat16 autocast on the run's device if --amp is on."""
    return torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.amp == "on")


def train(stage, c_out, draw_batch, loss_function, fingerprints, args, folder):
    """Train one network of c_out channels; returns the EMA of its weights and the seconds it took.

    The loss of a step is loss_function(net, draw_batch()). fingerprints: of the data.
    last_<stage>.pt, written every --save-every steps, holds all that --resume needs.
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
        batch = draw_batch()
        with autocast(args):
            loss = loss_function(forward, batch)
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if not loss.isfinite():
            todo = f"try --lr {args.lr / 3:.0e} or --amp off"
            raise DataError(f"{stage}: loss is {loss.item()} at step {step}: {todo}")
        opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        scheduler.step()
        decay = min(0.995, (step + 1) / (step + 11))  # average over fewer steps at the start
        update_ema(ema, net, decay)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            seconds = time.time() - began
            more = {"step": step + 1, "seconds": seconds}
            data.save_checkpoint(last, METHOD, args, fingerprints, parts, **more)
    return ema, seconds


# ==================================================================================================
# 10. Beyond the paper: the student
# ==================================================================================================
# On a training image, the tags tell which threshold of the map is right: the one that contradicts
# the fewest of them. The mask at that threshold, corrected inside the tagged tiles, is a
# pseudo-label. A plain U-Net, the student, is trained on these as if they were masks. It needs one
# network call per output, DiffSeg two.


@torch.no_grad()
def pseudo_labels(stage, net, tagged, args):
    """Pseudo-labels of the tagged images, uint8 (N, 1, 2H, 2W), from the network of a stage."""
    size = tagged.images.shape[2:]
    masks = []
    parts = torch.arange(len(tagged.images)).split(batch_limit(args))
    some = max(1, args.outputs // 4)  # a quarter of the outputs is enough here
    for i in data.progress(parts, "pseudo-labels", len(parts), unit="batch"):
        tiles, tags = tagged.tiles[i].to(args.device), tagged.tags[i].to(args.device)
        img = F.avg_pool2d(tagged.images[i].float(), 2)  # (B, 3, H, W)
        logits = all_outputs({stage: net}, img, some, args)[stage].mean(1)  # (B, H, W)
        margin = logits - fit_threshold(logits, tiles, tags)[:, None, None]
        margin = F.interpolate(margin[:, None], size, mode="bilinear")  # (B, 1, 2H, 2W)
        lesion, healthy = tile_masks(tiles, tags, size)
        masks.append((((margin > 0) | (lesion > 0)) & (healthy == 0)).byte().cpu())
    return data.to_device_if_it_fits(torch.cat(masks), args.device)


# ==================================================================================================
# 11. Main
# ==================================================================================================


def load(split, size, args, images_only=False):
    """A split at size = (H, W), with --quick its first 12 images."""
    options = {"limit": 12 if args.quick else None, "workers": args.num_workers}
    options["images_only"] = images_only
    return data.load_segmentation(args.data, args.data_root, split, size, **options)


def load_if_masks(split, args):
    """A split for validation or test; None if it has no masks but training images have tags."""
    if data.has_masks(args.data, args.data_root, split):
        return load(split, args.size, args)
    if not data.find_tags(args.data, args.data_root):
        todo = "add masks, or tags.csv beside the training images"
        raise DataError(f"{args.data_root}: no masks of {split} images and no tags.csv; {todo}")
    return None


def load_training(args):
    """Load the tagged training images, their masks (N, R, 2H, 2W), R = 0 if tags.csv is all that
    --method needs, and the fingerprints of both."""
    tags_file = data.find_tags(args.data, args.data_root)
    size = [2 * side for side in args.size]  # tiles need detail
    train_set = load("train", size, args, images_only=tags_file is not None)
    images, masks = train_set.images, train_set.masks
    fingerprints = {"train": train_set.fingerprint}
    if tags_file:
        tiles, tags = data.read_tags(tags_file, train_set.files, TAG_NAMES)
        tiles, tags = tiles[:, : args.tags], tags[:, : args.tags]
        fingerprints["tags"] = data.fingerprint(tiles.tolist(), tags.tolist())
        if "unet" in args.method:  # the only network that needs masks
            if not data.has_masks(args.data, args.data_root, "train"):
                raise DataError(f"{tags_file.parent}: --method unet needs masks; add them")
            with_masks = load("train", size, args)
            masks, fingerprints["masks"] = with_masks.masks, with_masks.fingerprint
        has_tags = (tags != NO_TAG).any(1)  # (N,)
        if not has_tags.all():
            print(f"{tags_file}: {(~has_tags).sum()} of {len(tags)} images have no tag, not used")
            images, masks, tiles, tags = (x[has_tags] for x in (images, masks, tiles, tags))
    else:
        tiles, tags = tag_tiles(masks, args.tags or TAGS, args.seed)
    for tag in (HEALTHY, LESION):
        if not (tags == tag).any():
            why = f"no tile of {len(images)} training images is tagged {TAG_NAMES[tag]}"
            raise DataError(f"{tags_file or train_set.name}: {why}; use more tags or images")
    images, masks = (data.to_device_if_it_fits(x, args.device) for x in (images, masks))
    return TaggedImages(images, tiles, tags), masks, fingerprints


def write_tags(args):
    """Compute tags from the training masks and write them in the format of tags.csv."""
    path = Path(args.write_tags).resolve()
    if path.exists() or not path.parent.is_dir():
        raise DataError(f"{path}: exists, or its folder does not; choose another name")
    if not data.has_masks(args.data, args.data_root, "train"):
        raise DataError(f"{args.data_root}: no masks of training images to compute tags from")
    train_set = load("train", [2 * side for side in args.size], args)
    tiles, tags = tag_tiles(train_set.masks, args.tags or TAGS, args.seed)
    data.write_tags(path, train_set.folder, train_set.files, tiles, tags, TAG_NAMES)


def train_all(tagged, masks, fingerprints, args, folder):
    """Train the networks of --method and those that they build on: {stage: (network, seconds)}.

    tagged: TaggedImages. masks: of the same images, for the stage "unet" alone.
    """
    train_stage = partial(train, fingerprints=fingerprints, args=args, folder=folder)
    wanted = set(args.method)
    trained = {}
    b, device = args.batch_size, args.device
    if "unet" in wanted:
        draw = partial(mask_batch, tagged.images, masks, b, device)
        trained["unet"] = train_stage("unet", 1, draw, mask_loss)
    if wanted & {"tags_unet", "tags_student"}:
        draw = partial(image_batch, tagged, b, device)
        trained["tags_unet"] = train_stage("tags_unet", 1, draw, tags_loss)
    if "tags_student" in wanted:
        pseudo = pseudo_labels("tags_unet", trained["tags_unet"][0], tagged, args)
        draw = partial(mask_batch, tagged.images, pseudo, b, device)
        trained["tags_student"] = train_stage("tags_student", 1, draw, mask_loss)
    if wanted & {"diffseg", "diffseg_student"}:
        draw = partial(diffseg_batch, tagged, b, device)
        trained["diffseg"] = train_stage("diffseg", 4, draw, diffseg_loss)
    if "diffseg_student" in wanted:
        pseudo = pseudo_labels("diffseg", trained["diffseg"][0], tagged, args)
        draw = partial(mask_batch, tagged.images, pseudo, b, device)
        trained["diffseg_student"] = train_stage("diffseg_student", 1, draw, mask_loss)
    return trained


def calibrate(nets, img, choose, args):
    """Thresholds {row: (N, 1, 1)} of networks {stage: network}: choose(logits), of all images."""
    thresholds = {}
    for stage, net in nets.items():  # one at a time, to save memory
        batches = img.split(batch_limit(args))
        parts = [all_outputs({stage: net}, x, args.outputs, args) for x in batches]
        for row in parts[0]:
            thresholds[row] = choose(torch.cat([part[row] for part in parts])).cpu()
    return thresholds


def fit(test, args, folder):
    """Train, choose the thresholds and the row for --predict, write best.pt."""
    tagged, masks, fingerprints = load_training(args)
    val = load_if_masks("val", args)
    splits = {"val": val, "test": test}
    fingerprints |= {name: split.fingerprint for name, split in splits.items() if split}
    if not args.resume:
        data.prepare_folder(folder)
    for last in folder.glob("last_*.pt"):  # fail now if the data changed, not hours later
        data.load_checkpoint(last, METHOD, fingerprints)
    trained = train_all(tagged, masks, fingerprints, args, folder)
    nets = {stage: net for stage, (net, _) in trained.items()}
    if val:
        choose = partial(choose_thresholds, masks=val.masks.to(args.device))
        thresholds = calibrate(nets, val.images, choose, args)
        rows = evaluate(nets, thresholds, val, args)
        dice = {row: values["dice"].mean().item() for row, values in rows.items()}
        row = max((row for row in dice if row != "unet"), key=dice.get, default="unet")
    else:
        img = F.avg_pool2d(tagged.images[:200].float(), 2)  # 200 training images are enough
        tiles, tags = (x[:200].to(args.device) for x in (tagged.tiles, tagged.tags))
        choose = partial(thresholds_from_tags, tiles=tiles, tags=tags)
        thresholds = calibrate(nets, img, choose, args)
        row = list(thresholds)[-1]
    more = {"row": row, "thresholds": thresholds}
    more["seconds"] = {stage: seconds for stage, (_, seconds) in trained.items()}
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
        return write_tags(args)
    folder = data.run_folder(METHOD, args)
    fingerprints = {}
    if not args.predict:
        test = load_if_masks("test", args)
        if test:
            fingerprints["test"] = test.fingerprint
    if not (args.predict or args.eval_only):
        fit(test, args, folder)
    best = args.checkpoint or folder / "best.pt"
    state = data.load_checkpoint(best, METHOD, fingerprints)
    masks_added = args.eval_only and test and "test" not in state["fingerprints"]
    if masks_added and data.is_drawn(args.data, args.data_root, "test"):
        why = "was trained on all images, also on those that are drawn for testing now"
        raise DataError(f"{best}: {why}; train again with --overwrite")
    nets = {}
    for stage, weights in state["nets"].items():
        c_out = 4 if stage == "diffseg" else 1
        nets[stage] = UNet(c_out, args.width).to(args.device).eval()
        nets[stage].load_state_dict(weights)
    if args.predict:
        row, folder = state["row"], folder / "predictions"
        print(f"predictions of {row} go to {folder}")
        nets = {ROWS[row]: nets[ROWS[row]]}
        options = {"thresholds": state["thresholds"], "row": row, "args": args}
        segment_one = partial(segment_photo, nets=nets, **options)
        return data.predict_images(args.predict, args.size, folder, best, segment_one)
    if test:
        report(nets, test, state, args, folder)
    else:
        print(f"{args.data_root}: no masks of test images, so there is no table.")
        print(f"To segment images: --predict PATH --checkpoint {best}")


def main(argv=None):
    """Run the command line; foreseeable errors are one line each and exit status 2."""
    with data.one_line_errors("diffseg.py"):
        run(parse_args(argv))


if __name__ == "__main__":
    main()
