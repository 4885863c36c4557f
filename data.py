"""Images and their label masks: from two files to a training batch.

    python data.py --data DIR      # what each split holds, and a sheet of augmented images to look at

Run it before you train: most bad scores on the desert set come from masks that were read wrongly.

    image, mask --- decode ---> one random affine map for both ---> uint8 crops, S x S pixels (worker)
                                bilinear for the image, nearest for the mask
    uint8 batch --- colour jitter ---> normalize ---> float32 batch                           (device)

Measured: all this takes 3.5 ms a 960x540 pair beyond decoding the two files at --size 256, 8.6 ms at 512
(one core of a server CPU, `python -m pytest -m slow -s -k bench test_all.py`).

Letters: B batch, C classes, N images of a split, H W sides of a stored image, S side of a training crop.
Label 255 means "ignore".
"""
import argparse
import contextlib
import hashlib
import json
import os
import re
import signal
import sys
import textwrap
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor
from tqdm.auto import tqdm

IGNORE = 255
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)      # ImageNet's: what pretrained encoders expect
ROOT_NAME = "Offroad_Segmentation_Training_Dataset"
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
MASK_SUFFIXES = {".png", ".bmp", ".tif", ".tiff"}             # lossless only: JPEG would blur labels
COLOR_MODES = ("RGB", "RGBA", "P")                            # Pillow's modes of masks that hold colours
MAX_COLORS = 100                                              # in a mask; more are not labels

# name, raw id in the 16-bit masks, colour for pictures; the position in this list is the class index
DESERT = [{"name": name, "id": raw_id, "color": list(color)} for name, raw_id, color in [
    ("Trees", 100, (34, 110, 34)), ("Lush Bushes", 200, (60, 190, 70)), ("Dry Grass", 300, (222, 196, 120)),
    ("Dry Bushes", 500, (150, 100, 50)), ("Ground Clutter", 550, (130, 130, 95)),
    ("Flowers", 600, (235, 80, 180)), ("Logs", 700, (96, 50, 20)), ("Rocks", 800, (128, 128, 140)),
    ("Landscape", 7100, (196, 140, 96)), ("Sky", 10000, (130, 190, 240))]]


# ------------------------------------------------------------ augmentation
def random_affine(rng, width, height, size):
    """One random map for a sample: (2, 3) float64, from crop coordinates to image coordinates.

    Flip, scale 0.5 to 2 (at 1 the shorter side is `size`), rotation of up to 10 degrees about the crop's
    centre, and the crop's place. Coordinates are pixels; the first pixel's centre is at (.5, .5)."""
    scale = rng.uniform(0.5, 2.0) * size / min(width, height)
    angle = np.deg2rad(rng.uniform(-10, 10))
    flip = rng.random() < 0.5
    # where the image is larger than the crop, the crop lies inside it; where smaller, the other way round
    spare = np.array([width, height]) * scale - size
    centre = size / 2 + np.minimum(spare, 0) + np.abs(spare) * rng.random(2)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    shift = centre / scale - rotation @ [size / 2, size / 2]
    if flip:
        rotation[0], shift[0] = -rotation[0], width - shift[0]
    return np.column_stack([rotation, shift])


def random_jitter(rng):
    """(4,): factors of brightness, contrast and saturation (0.6 to 1.4), hue shift in turns (-0.1 to 0.1)."""
    return np.array([*rng.uniform(0.6, 1.4, 3), rng.uniform(-0.1, 0.1)])


def color_jitter(image, jitter):
    """Brightness, contrast, saturation and hue, in this order, as one 3x3 matrix and one offset per image.

    image: (B, 3, H, W) in 0..1; jitter: (B, 4), see random_jitter. Contrast and saturation are torchvision's;
    hue is a rotation of the colour plane of YIQ, which keeps luminance. Clipped to 0..1 once, at the end."""
    # the small matrices are made on the CPU: a 3x3 inverse on a GPU makes the CPU wait for it
    brightness, contrast, saturation, hue = jitter.unbind(1)
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    luma, turn = to_yiq[0], 2 * torch.pi * hue
    rotate = torch.eye(3).repeat(len(image), 1, 1)
    rotate[:, 1, 1] = rotate[:, 2, 2] = turn.cos()
    rotate[:, 2, 1], rotate[:, 1, 2] = turn.sin(), -turn.sin()
    saturation = saturation[:, None, None]
    saturate = (1 - saturation) * luma.expand(3, 3) + saturation * torch.eye(3)
    colors = torch.linalg.inv(to_yiq) @ rotate @ to_yiq @ saturate * (contrast * brightness)[:, None, None]
    # contrast mixes with the image's mean grey, which is known on the device only
    grey_share = ((1 - contrast) * brightness)[:, None] * luma                       # (B, 3)
    colors = colors.to(image.device, non_blocking=True)
    grey_share = grey_share.to(image.device, non_blocking=True)
    grey = (image.mean((2, 3)) * grey_share).sum(1)                                  # (B,)
    return (torch.bmm(colors, image.flatten(2)) + grey[:, None, None]).clamp(0, 1).view_as(image)


def normalize(image):
    """uint8, or float in 0..1, (B, 3, H, W) -> normalized float32."""
    image = image.float() / 255 if image.dtype == torch.uint8 else image
    mean = torch.tensor(MEAN).view(3, 1, 1).to(image.device, non_blocking=True)
    std = torch.tensor(STD).view(3, 1, 1).to(image.device, non_blocking=True)
    return (image - mean) / std


# ------------------------------------------------------------ batches
class Batch(NamedTuple):
    """What the loader yields; the scripts' prepare() adds the last three on the device."""
    image: torch.Tensor                      # (B, 3, S, S) uint8; normalized float32 on the device
    target: torch.Tensor                     # (B, S, S) class indices, 255 = ignore; uint8, then int64
    affine: torch.Tensor                     # (B, 2, 3) float32: crop -> image coordinates
    jitter: torch.Tensor                     # (B, 4) float32, see random_jitter
    indices: torch.Tensor                    # (B,) which images of the split, see Split.images
    weights: dict | None = None              # {"hard": (B, S, S), "soft": (B, S/4, S/4), ..} pixel weights
    teacher: torch.Tensor | None = None      # (B, C, S/4, S/4) float32 logits of the ensemble
    teacher_stages: list | None = None       # for each teacher its list of stages


class TrainDataset(Dataset):
    """Augmented crops by key (epoch, position in the epoch, index): the same for any number of workers."""

    def __init__(self, split, size, seed):
        self.split, self.size, self.seed = split, size, seed

    def __getitem__(self, key):
        epoch, position, index = key
        rng = np.random.default_rng(seed_for("crop", self.seed, epoch, position))
        affine = random_affine(rng, *self.split.sizes[index], self.size)
        jitter = random_jitter(rng)
        try:
            image, target = self.split.crop(index, self.size, affine)
        except InputError as error:
            return error                     # returned, not raised: DataLoader would wrap it in a traceback
        return (image, target, torch.from_numpy(affine).float(), torch.from_numpy(jitter).float(),
                torch.tensor(index))


def augment_on_device(batch, device):
    """Moves a batch to `device`; colour jitter and normalization happen there, for all images at once."""
    image = batch.image.to(device, non_blocking=True).float() / 255
    return batch._replace(image=normalize(color_jitter(image, batch.jitter)),
                          target=batch.target.to(device, non_blocking=True).long(),
                          affine=batch.affine.to(device, non_blocking=True))


class BatchSampler:
    """Which images make up which batch: lists of (epoch, position, index) from step `start` to `stop`.

    Each epoch is a new permutation of the n pairs, or with `odds` (N,) a draw with replacement; the last
    partial batch is dropped. A step takes `accumulate` batches in each of `world` processes. unlabelled: (how
    many of each batch have no label, how many such images there are); they have the indices from n on."""

    def __init__(self, n, batch, seed, start, stop, accumulate=1, rank=0, world=1, odds=None,
                 unlabelled=(0, 0)):
        self.n, self.batch, self.seed, self.start, self.stop = n, batch, seed, start, stop
        self.accumulate, self.rank, self.world, self.odds = accumulate, rank, world, odds
        self.unlabelled, self.unlabelled_images = unlabelled
        if self.unlabelled and not self.unlabelled_images:
            raise ValueError(f"{self.unlabelled} unlabelled images per batch, but the split has none")
        self.labelled = batch - self.unlabelled
        self.steps_per_epoch = n // (self.labelled * accumulate * world)

    def order(self, epoch):
        generator = torch.Generator().manual_seed(seed_for("order", self.seed, epoch))
        if self.odds is None:
            return torch.randperm(self.n, generator=generator).tolist()
        return torch.multinomial(self.odds, self.n, replacement=True, generator=generator).tolist()

    def unlabelled_order(self, epoch):
        """One permutation after the other, as many as the epoch needs."""
        generator = torch.Generator().manual_seed(seed_for("unlabelled", self.seed, epoch))
        need = self.steps_per_epoch * self.accumulate * self.world * self.unlabelled
        order: list[int] = []
        while len(order) < need:
            order += (self.n + torch.randperm(self.unlabelled_images, generator=generator)).tolist()
        return order

    def __iter__(self):
        order, unlabelled_order, order_epoch = [], [], None
        for step in range(self.start, self.stop):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, unlabelled_order, order_epoch = self.order(epoch), self.unlabelled_order(epoch), epoch
            for micro in range(self.accumulate):
                n = (step_in_epoch * self.accumulate + micro) * self.world + self.rank  # batch in the epoch
                yield [*((epoch, position, order[position])
                         for position in range(n * self.labelled, (n + 1) * self.labelled)),
                       *((epoch, self.n + position, unlabelled_order[position])
                         for position in range(n * self.unlabelled, (n + 1) * self.unlabelled))]


class EvalDataset(Dataset):
    """Whole images by index: (index, [uint8 (1, 3, h, w) for each of `sizes`], (H, W) target as stored)."""

    def __init__(self, split, sizes):
        self.split, self.sizes = split, sizes

    def __getitem__(self, index):
        try:
            image, target = self.split.read(index)
        except InputError as error:
            return error
        return index, [eval_image(image, size) for size in self.sizes], torch.from_numpy(target)


def eval_size(width, height, size):
    """(w, h) of a whole image at scale 1: shorter side `size`, both rounded to the nearest multiple of 32."""
    scale = size / min(width, height)
    return tuple(max(32, int(v * scale / 32 + 0.5) * 32) for v in (width, height))


def eval_image(image, size):
    """PIL RGB -> uint8 (1, 3, h, w) at scale 1: what networks see in validation and inference."""
    return resized_image(image, *eval_size(*image.size, size))


def resized_image(image, width, height):
    """PIL RGB -> uint8 (1, 3, height, width), smoothed where it shrinks."""
    return pil_to_tensor(image.resize((width, height), Image.Resampling.BILINEAR)).contiguous()[None]


def load(dataset, order, workers, pin_memory):
    """Yields batches in the order of a BatchSampler, or single samples in the order of a list of indices."""
    if isinstance(order, BatchSampler):
        how = {"batch_sampler": order, "collate_fn": collate}
    else:
        how = {"sampler": order, "batch_size": None}
    # with a generator of its own: DataLoader would otherwise draw the workers' seeds from torch's
    loader = DataLoader(dataset, num_workers=workers, pin_memory=pin_memory, worker_init_fn=ignore_signals,
                        generator=torch.Generator().manual_seed(0), **how)
    try:
        for item in loader:
            if isinstance(item, InputError):
                raise item
            yield item
    except RuntimeError as error:
        if "worker" not in str(error):
            raise
        raise RunError(f"a data worker died ({brief(error)}); usually memory is short, "
                       f"use fewer than --workers {workers}") from None


def collate(samples):
    error = next((sample for sample in samples if isinstance(sample, InputError)), None)
    return error or Batch(*(torch.stack(column) for column in zip(*samples, strict=True)))


def ignore_signals(worker):
    """Ctrl-C and SIGTERM reach every process of a group; the main process alone decides what they mean."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def seed_for(purpose, *key):
    """A 63-bit seed from a purpose and whole numbers: the same in every process and version of Python."""
    sequence = np.random.SeedSequence([zlib.crc32(purpose.encode()), *key])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


# ------------------------------------------------------------ a split
class Split:
    """The checked pairs of one split, how to read them, and the pixels of each class in each of them.

    images: all image files, first those of the pairs, then those of the folders `unlabelled`, which have no
    mask; sizes: [(width, height)] of them; counts: (N, C) pixels; label_format: see find_label_format;
    unknown: {value, or (r, g, b), that is in no class: pixels}; digest: of names, sizes and label counts,
    wherever the folder lies. Raises InputError for files that do not fit. `out`: a folder that keeps the
    scan, see scan_pairs. `val_share`: "train" and "val" are parts of train/, see divide_pairs."""

    def __init__(self, root, name, classes, masks=None, out=None, unlabelled=(), val_share=None):
        self.classes, self.name, self.val_share = classes, name, val_share
        in_folder = find_pairs(root, "train" if val_share else name)
        self.pairs = divide_pairs(in_folder, root, name, val_share) if val_share else in_folder
        without_mask = [(image, None) for image in find_unlabelled(unlabelled, in_folder)]
        self.images = [image for image, _ in (*self.pairs, *without_mask)]
        self.unlabelled = len(without_mask)

        scan_file = Path(out) / f"scan_{(Path(root) / name).absolute().name}.json" if out else None
        found = scan_pairs(self.pairs, scan_file)
        others = scan_pairs(without_mask, scan_file and scan_file.with_name("scan_unlabelled.json"))
        self.sizes = [size for size, _, _ in (*found, *others)]
        content = list(zip((image.stem for image in self.images), (*found, *others), strict=True))
        self.digest = hashlib.sha256(repr(content).encode()).hexdigest()[:16]

        numbers, colors = [set(row[1]) for row in found], [set(row[2]) for row in found]
        paths = [mask for _, mask in self.pairs]
        self.label_format = find_label_format(numbers, paths, classes, masks, colors)
        self.lookup = lookup_table(classes, self.label_format)
        self.count_labels(found, masks)

    def count_labels(self, found, masks):
        """Sets counts and unknown. found: see scan_pairs; masks: --masks."""
        self.counts = torch.zeros(len(found), len(self.classes), dtype=torch.int64)
        self.unknown: dict = {}
        in_colors = self.label_format == "colors"
        for n, (_, numbers, colors) in enumerate(found):
            for value, pixels in (colors if in_colors else numbers).items():
                index = int(self.lookup[value])
                if index != IGNORE:
                    self.counts[n, index] += pixels
                elif value != IGNORE or in_colors:
                    value = tuple(value.to_bytes(3, "big")) if in_colors else value
                    self.unknown[value] = self.unknown.get(value, 0) + pixels
            read_as_numbers = bool(colors) and masks is None and not in_colors
            if read_as_numbers and palette_differs(self.counts[n], colors, self.classes):
                raise InputError(f"{self.pairs[n][1]}: its numbers and its palette's colours name different "
                                 f"classes; say --masks {self.label_format} or --masks colors")

    def __len__(self):
        return len(self.pairs)

    def describe(self):
        """One line, and a second one where labels are unknown."""
        kinds = {"ids": "raw ids", "indices": "class indices", "colors": "colours"}
        text = f"{self.name}: {len(self)} pairs, masks hold {kinds[self.label_format]}"
        if self.val_share:
            runs = Counter(run_of(image) for image, _ in self.pairs)
            listed = ", ".join(f"{run} {count}" for run, count in runs.most_common(8))
            text += f"; of train/ by --val-share {self.val_share}, pairs by run of names: {listed}"
        if self.unlabelled:
            text += f"; {self.unlabelled} images without labels"
        if self.unknown:
            total = sum(width * height for width, height in self.sizes[:len(self)])
            most = sorted(self.unknown.items(), key=lambda item: -item[1])[:8]
            shares = ", ".join(f"{value} ({100 * pixels / total:.2g} %)" for value, pixels in most)
            text += f"\n{self.name}: {len(self.unknown)} labels outside the class table are ignored: {shares}"
        return text

    def read(self, n, shrink=1):
        """(PIL RGB image, (H, W) uint8 target at the stored size), not augmented; `shrink`: see read_image.

        The target of an unlabelled image is 0 everywhere; a crop of it is 255 outside the image only."""
        image = read_image(self.images[n], shrink)
        if n >= len(self):                   # not 255 yet: crop() marks what is outside the image with it
            return image, np.zeros(self.sizes[n][::-1], np.uint8)
        return image, self.lookup[read_mask(self.pairs[n][1], self.label_format == "colors")]

    def crop(self, n, size, affine):
        """The n-th pair under a (2, 3) map, see random_affine: uint8 (3, S, S) image, (S, S) target."""
        width, _ = self.sizes[n]
        shrink = np.sqrt(abs(np.linalg.det(affine[:, :2])))   # image pixels per crop pixel
        image, target = self.read(n, int(shrink))
        # Pillow's affine transform does not smooth; reduce first, so that crops are as sharp as whole images
        decoded = round(width / image.width)                  # the JPEG decoder's part of it
        factor = max(1, round(shrink / decoded))
        if factor > 1:
            image = image.reduce(factor)
        # not image.width / width: both round sides up, and their last pixels lie partly outside
        to_reduced = affine / (decoded * factor)
        image = image.transform((size, size), Image.Transform.AFFINE, tuple(to_reduced.ravel()),
                                Image.Resampling.BILINEAR, fillcolor=tuple(round(255 * m) for m in MEAN))
        mask = Image.fromarray(target).transform((size, size), Image.Transform.AFFINE, tuple(affine.ravel()),
                                                 Image.Resampling.NEAREST, fillcolor=IGNORE)
        return pil_to_tensor(image).contiguous(), torch.from_numpy(np.array(mask))


def lookup_table(classes, label_format):
    """(65536,) uint8, or (2^24,) for colours: stored mask value -> class index; all unknown becomes 255."""
    table = np.full(1 << 24 if label_format == "colors" else 65536, IGNORE, np.uint8)
    keys = {"ids": [entry["id"] for entry in classes], "indices": range(len(classes)),
            "colors": packed_colors(classes)}
    for index, key in enumerate(keys[label_format]):
        table[key] = index
    return table


def packed_colors(classes):
    """The colour of each class as read_mask gives it."""
    return [r << 16 | g << 8 | b for r, g, b in (entry["color"] for entry in classes)]


def read_image(path, shrink=1):
    """Any image that Pillow reads, upright, as 8-bit RGB.

    A JPEG may be decoded up to `shrink` times smaller, which its decoder does well and fast."""
    with open_image(path) as image:
        width, height = image.size
        if min(width, height) < 16 or max(width, height) > 8 * min(width, height):
            raise InputError(f"{path}: {width}x{height} pixels; sides must be at least 16 and the aspect at "
                             "most 8, cut or remove it")
        with damaged_file_error(path, "image"):
            if shrink >= 2:
                image.draft("RGB", (width // shrink, height // shrink))
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):                    # 16 bit: Pillow's own conversion clips it
                image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
            return image.convert("RGB")


def read_mask(path, colors=False):
    """The values of a mask exactly as stored, (H, W) uint16: a conversion to 8 bit would fold 16-bit ids.

    colors: those of an RGB, RGBA or palette mask instead, packed as r << 16 | g << 8 | b, (H, W) uint32."""
    with open_image(path) as image:
        if image.mode not in (COLOR_MODES if colors else ("I;16", "I;16B", "I;16L", "I", "L", "P", "1")):
            raise InputError(f"{path}: mode {image.mode}; a mask holds one number per pixel, "
                             "export it as 8- or 16-bit greyscale, or one colour, export it as RGB")
        if colors:
            with damaged_file_error(path, "mask"):
                transparent = image.mode == "RGBA" and image.getextrema()[3][0] < 255
                rgb = np.asarray(image.convert("RGB"), np.uint32)
            if transparent:
                raise InputError(f"{path}: has transparent pixels; export it as RGB")
            return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
        if image.tile and image.tile[0][3] in ("L;2", "L;4"):
            raise InputError(f"{path}: greyscale of 2 or 4 bits, which Pillow scales; "
                             "export it as 8- or 16-bit greyscale")
        with damaged_file_error(path, "mask"):
            values = np.asarray(image)
    if values.dtype not in (np.uint8, np.uint16) and (values.min() < 0 or values.max() > 65535):
        raise InputError(f"{path}: values {values.min()}..{values.max()}; labels must lie in 0..65535")
    return values.astype(np.uint16)


# ------------------------------------------------------------ class balance
def class_weights(counts, mode="median"):
    """(C,) weights for the hard loss from raw pixel counts (N, C).

    "median": median frequency / frequency over the classes that occur, clipped to [0.1, 10] (Eigen and Fergus
    2015, section 6.3.2; theirs counts only images that hold the class). "sqrt": square roots of these.
    "none": ones. A class without a pixel weighs 1."""
    totals = counts.sum(0).double()
    seen = totals > 0
    weights = torch.ones(len(totals), dtype=torch.float64)
    if mode != "none" and seen.any():
        weights[seen] = (totals[seen].quantile(0.5) / totals[seen]).clamp(0.1, 10)
    return (weights.sqrt() if mode == "sqrt" else weights).float()


def sampling_odds(counts):
    """(N,) odds of each image under rare class sampling (DAFormer, Hoyer et al. 2022, section 3.3).

    First a class is drawn with odds exp((1 - its share) / 0.1), then an image that holds it. Their
    temperature is a sharper 0.01."""
    share = counts.sum(0).double() / counts.sum().clamp(min=1)
    holds = (counts > 0).double()                                                    # (N, C)
    class_odds = ((1 - share) / 0.1).softmax(0) * (holds.sum(0) > 0)
    return (holds / holds.sum(0).clamp(min=1)) @ class_odds + 1e-12


# ------------------------------------------------------------ pictures
def palette(classes):
    """(256, 3) uint8 colours by class index; black for everything else."""
    colors = np.zeros((256, 3), np.uint8)
    colors[:len(classes)] = [entry["color"] for entry in classes]
    return colors


def index_image(pred, classes):
    """(H, W) class indices -> a palette image: viewers show colours, np.asarray gives the indices."""
    image = Image.fromarray(np.asarray(pred, np.uint8))
    image.putpalette(palette(classes).tobytes())
    return image


def overlay(image, labels, classes, legend=True):
    """A PIL RGB image with (H, W) class indices in colour over it, and a legend of the classes present.

    No legend on images under 200 pixels."""
    labels = np.asarray(labels)
    mixed = Image.blend(image, Image.fromarray(palette(classes)[labels]), 0.5)
    if not legend or min(image.size) < 200:
        return mixed
    counts = np.bincount(labels.ravel(), minlength=256)[:len(classes)]
    rows = []
    for c in np.argsort(-counts, kind="stable"):
        if counts[c]:
            text = f"{classes[c]['name']}  {percent(counts[c] / counts.sum())}"
            rows.append((tuple(classes[c]["color"]), text))
    line = max(9, min(image.height // 30, image.width // 24))                        # pixels
    fitting = int(image.height / (1.3 * line)) - 2
    if len(rows) > fitting:
        rows[fitting:] = [((0, 0, 0), f"{len(rows) - fitting} more")]
    draw, font = ImageDraw.Draw(mixed, "RGBA"), ImageFont.load_default(line)
    width = max([draw.textlength(text, font) for _, text in rows], default=0) + 3 * line
    draw.rectangle((0, 0, width, (len(rows) + 0.5) * 1.3 * line), fill=(0, 0, 0, 150))
    for n, (color, text) in enumerate(rows):
        top = (0.35 + 1.3 * n) * line
        draw.rectangle((0.5 * line, top, 1.5 * line, top + line), fill=color)
        draw.text((2 * line, top), text, (255, 255, 255), font)
    return mixed


def percent(share):
    """A share in 0..1 as text."""
    return "< 0.1 %" if share < 0.001 else f"{100 * share:.1f} %"


def augmented_sheet(split, size):
    """12 random training crops, each beside its labels in colour: a person sees whether they fit."""
    sheet, rng = Image.new("RGB", (6 * size, 4 * size)), np.random.default_rng(0)
    for n in range(12):
        index = n * len(split) // 12
        crop, target = split.crop(index, size, random_affine(rng, *split.sizes[index], size))
        jitter = torch.from_numpy(random_jitter(rng)).float()
        jittered = color_jitter(crop[None].float() / 255, jitter[None])[0]
        image = Image.fromarray((255 * jittered).byte().permute(1, 2, 0).numpy())
        row, column = divmod(n, 3)
        x, y = 2 * column * size, row * size
        sheet.paste(image, (x, y))
        sheet.paste(overlay(image, target, split.classes, legend=False), (x + size, y))
    return sheet


# ------------------------------------------------------------ checks of the data
def find_data(flag=None):
    """The data set's root: --data, else ROOT_NAME here, else anywhere under /kaggle/input."""
    if flag is not None:
        if not Path(flag).is_dir():
            raise InputError(f"--data {flag}: no such folder; name the folder that holds train/ and val/")
        return Path(flag)
    if (Path(ROOT_NAME) / "train").is_dir():
        return Path(ROOT_NAME)
    for root in sorted(Path("/kaggle/input").rglob(ROOT_NAME)):      # last: it walks every attached data set
        if (root / "train").is_dir():
            return root
    raise InputError(f"no data set: looked for {ROOT_NAME}/train here and under /kaggle/input; name its "
                     "folder with --data DIR, or try `python distill.py --demo`, which draws its own")


def find_pairs(root, split):
    """[(image path, mask path)] of `root/split`, in order of their stems."""
    folder = Path(root) / split
    if split == "val" and not folder.exists():
        raise InputError(f"{folder}: No such file or directory; --val-share 0.15 validates on a part of "
                         "train/ instead")
    images = list_files(folder / "Color_Images", IMAGE_SUFFIXES)
    masks = list_files(folder / "Segmentation", MASK_SUFFIXES)
    if not images and not masks:
        raise InputError(f"{folder}: holds no images; Color_Images/ takes "
                         f"{' '.join(sorted(IMAGE_SUFFIXES))}, Segmentation/ "
                         f"{' '.join(sorted(MASK_SUFFIXES))}")
    for stem in sorted(images.keys() ^ masks.keys()):
        path, other = (images[stem], "Segmentation") if stem in images else (masks[stem], "Color_Images")
        raise InputError(f"{path}: no partner named {stem}.* in {folder / other}; add it or remove this file")
    return [(images[stem], masks[stem]) for stem in sorted(images)]


def divide_pairs(pairs, root, name, share):
    """The part `name`, "train" or "val", of the `pairs` of train/: the last `share` of each run validates.

    A run is a drive: names with the same letters before the first digit, in order of their numbers. It gives
    one block, since neighbouring frames are nearly equal; at least one pair of two."""
    if name not in ("train", "val"):
        raise InputError(f"--split {name}: --val-share {share} divides train/ into train and val; name one")
    if (Path(root) / "val").exists():
        raise InputError(f"--val-share {share}: divides {Path(root) / 'train'}, but {Path(root) / 'val'} "
                         "exists too; leave out the flag, or move that folder away")
    runs: dict[str, list] = {}
    for image, mask in pairs:
        runs.setdefault(run_of(image), []).append((image, mask))
    held = set()
    for run in runs.values():
        # by numbers: cc9 comes before cc10
        run.sort(key=lambda pair: [int(part) if part.isdecimal() else part
                                   for part in re.split(r"(\d+)", pair[0].stem)])
        if len(run) > 1:
            held.update(run[-max(1, int(share * len(run) + 0.5)):])
    if not held:
        raise InputError(f"--val-share {share}: {Path(root) / 'train'} holds no runs of names, such as cc1 "
                         "cc2, to take the last part of; make val/ by hand")
    return [pair for pair in pairs if (pair in held) == (name == "val")]


def run_of(path):
    """The letters before the first digit of a file's name: "cc0000016.png" -> "cc"."""
    return re.split(r"\d", path.stem)[0]


def find_unlabelled(folders, pairs):
    """The image files of folders without masks, but for those of `pairs`, which have one."""
    known = {image.resolve() for image, _ in pairs}
    found = []
    for folder in folders:
        if not Path(folder).is_dir():
            raise InputError(f"--unlabelled {folder}: no such folder; name folders of images")
        images = list(list_files(folder, IMAGE_SUFFIXES).values())
        new = [path for path in images if path.resolve() not in known]
        if not new:
            what = "only images that have a mask in train/" if images else "no images"
            raise InputError(f"--unlabelled {folder}: holds {what}; name folders of other images "
                             f"({' '.join(sorted(IMAGE_SUFFIXES))})")
        found += new
    return found


def list_files(folder, suffixes):
    """{stem: path} of the files in `folder` with one of `suffixes`, without hidden ones."""
    files: dict[str, Path] = {}
    try:
        paths = sorted(Path(folder).iterdir())
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; a split holds Color_Images/, Segmentation/") from None
    for path in paths:
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        if path.stem in files:
            raise InputError(f"{path}: {files[path.stem].name} has the same stem; remove one of the two")
        files[path.stem] = path
    return files


def scan_pairs(pairs, scan_file=None):
    """[(size, {number: pixels}, {colour: pixels})], see scan_pair: decodes every file once, so that a damaged
    one is found before training and not in hour three. `scan_file` keeps the results of files that have not
    changed."""
    known = {}
    if scan_file is not None and scan_file.is_file():
        with contextlib.suppress(ValueError, TypeError):      # a damaged scan file: scan again
            known = dict(json.loads(scan_file.read_text(encoding="utf-8")))
    keys = []
    for image, mask in pairs:
        files = [image, mask] if mask else [image]
        stamps = [f"{path.stat().st_size},{path.stat().st_mtime_ns}" for path in files]
        keys.append(f"{image.resolve()}|{':'.join(stamps)}")
    # results of two parts are of an older version, without colours
    missing = [n for n, key in enumerate(keys) if len(known.get(key, ())) < 3]
    pool = ThreadPoolExecutor(min(8, count_cores()))          # Pillow decodes without holding Python's lock
    try:
        results = pool.map(scan_pair, [pairs[n] for n in missing])
        for n, result in zip(missing, progress_bar(results, "reading all files", len(missing)), strict=True):
            known[keys[n]] = result
    finally:
        pool.shutdown(cancel_futures=True)                    # after Ctrl-C nobody waits for the other files
    if scan_file is not None and missing:
        write_atomic(scan_file, json.dumps({key: known[key] for key in keys}).encode())
    return [(tuple(size), *({int(v): n for v, n in counts.items()} for counts in counts_of_both))
            for size, *counts_of_both in (known[key] for key in keys)]


def scan_pair(pair):
    """((width, height), {number: pixels}, {colour: pixels}) of one pair; InputError where the two files do
    not fit.

    A palette mask holds both, others one kind only. The mask of an unlabelled image is None."""
    image, mask = pair
    if mask is None:
        return read_image(image).size, {}, {}
    with open_image(mask) as opened:
        mode, mask_size = opened.mode, opened.size
    size, numbers, colors = read_image(image).size, {}, {}
    if mask_size != size:
        with open_image(image) as opened:
            turned = " after its EXIF rotation" if opened.getexif().get(0x0112, 1) > 1 else ""
        raise InputError(f"{mask}: {mask_size[0]}x{mask_size[1]} pixels, but {image.name} has "
                         f"{size[0]}x{size[1]}{turned}; they must match")
    if mode not in ("RGB", "RGBA"):
        counts = np.bincount(read_mask(mask).ravel())
        numbers = {int(v): int(counts[v]) for v in np.flatnonzero(counts)}
    if mode in COLOR_MODES:
        found, counts = np.unique(read_mask(mask, colors=True), return_counts=True)
        colors = dict(zip(found[:256].tolist(), counts.tolist(), strict=False))      # a palette has no more
    return size, numbers, colors


def find_label_format(values, paths, classes, flag=None, colors=()):
    """Decides once for a split what its masks hold: "ids", class "indices", or the table's "colors".

    values: a set of mask values for each of `paths`, empty for an RGB mask; colors: a set of packed colours
    for each; flag: --masks, believed where the split can be read so. Refuses 8-bit copies of 16-bit masks,
    mixtures of formats, and splits without one known label."""
    ids = {entry["id"] for entry in classes}
    indices = {*range(len(classes)), IGNORE}
    union = set().union(*values)
    masks = list(zip(values, paths, strict=True))
    # first: colours or numbers?
    without_numbers = next((path for own, path in masks if not own), None)
    if without_numbers and flag not in (None, "colors"):
        raise InputError(f"{without_numbers}: holds colours, no numbers as --masks {flag} says; say --masks "
                         "colors")
    unknown_numbers = not union & ids and not union <= indices
    in_colors = without_numbers or (unknown_numbers and set().union(*colors) & {*packed_colors(classes)})
    if flag == "colors" or (flag is None and in_colors):
        check_colors(values, colors, paths, classes)
        return "colors"
    # then: are the numbers whole?
    refuse_8_bit_copies(union, paths[0], ids, indices)
    for own, path in masks if flag is None else ():
        refuse_8_bit_copies(own, path, ids, indices, ", or say --masks ids if these are its labels")
    # last: ids or indices? Ids where one value can be nothing else
    with_ids = [path for own, path in masks if own & (ids - indices)]
    with_indices = [path for own, path in masks
                    if own <= indices and not own <= ids | {IGNORE} and not own & ids]
    in_both = [v for v in sorted(union & ids) if v < len(classes) and classes[v]["id"] != v]
    if flag is not None:
        label_format = flag
    elif with_ids and with_indices:
        raise InputError(f"{with_indices[0]}: holds class indices where {Path(with_ids[0]).name} holds raw "
                         "ids; a split must not mix them. If these are ids too, say --masks ids")
    elif in_both and not with_ids:
        raise InputError(f"{paths[0]}: the labels {in_both} are both ids and indices of the class table; say "
                         "--masks ids or --masks indices")
    else:                                                     # ids perhaps unknown to the table
        label_format = "indices" if union <= indices and not union <= ids else "ids"
    if not union & (ids if label_format == "ids" else indices - {IGNORE}):
        strange = max(union - {IGNORE} or union)
        path = next(path for own, path in masks if strange in own)
        raise InputError(f"{path}: label {strange} is in no class table entry, neither as id nor as index "
                         f"(0 to {len(classes) - 1}); name the right table with --classes FILE")
    return label_format


def check_colors(values, colors, paths, classes):
    """InputError where masks cannot be read as the table's colours. Arguments: see find_label_format."""
    names: dict[int, str] = {}
    for color, entry in zip(packed_colors(classes), classes, strict=True):
        if color in names:
            raise InputError(f"class table: {names[color]} and {entry['name']} have one color, "
                             f"{entry['color']}, but masks hold colours; name another with --classes FILE")
        names[color] = entry["name"]
    for numbers, own, path in zip(values, colors, paths, strict=True):
        if len(own) > MAX_COLORS:
            raise InputError(f"{path}: holds more than {MAX_COLORS} colours, as smoothed edges or a JPEG do; "
                             "export it without either")
        if numbers and not own & names.keys():
            raise InputError(f"{path}: holds numbers and no colour of a class; a split must not mix numbers "
                             "and colours, export all masks alike")
    if not set().union(*colors) & names.keys():
        raise InputError(f"{paths[0]}: holds no colour of a class, nor does any other mask; name the right "
                         "table with --classes FILE, or export class indices as greyscale")


def palette_differs(counts, colors, classes):
    """Whether the colours of a palette mask are all the table's, but not those of its numbers' classes.

    counts: (C,) pixels by the numbers; colors: {packed colour: pixels}, more where an ignored number has the
    colour of a class, as black in a palette without it."""
    by_number: Counter = Counter()
    for color, pixels in zip(packed_colors(classes), counts.tolist(), strict=True):
        by_number[color] += pixels
    return colors.keys() <= by_number.keys() and bool(by_number - Counter(colors))


def refuse_8_bit_copies(values, path, ids, indices, otherwise=""):
    """An 8-bit copy holds what is left of 16-bit ids in one of three ways."""
    copies = {"the high byte": {i >> 8 for i in ids}, "clipped at 255": {min(i, 255) for i in ids},
              "modulo 256": {i & 255 for i in ids}}
    for how, copied in copies.items():
        if values <= copied and not values <= ids and not values <= indices:
            raise InputError(f"{path}: label {min(values - ids)} is no known id; the file looks like an "
                             f"8-bit copy of a 16-bit mask ({how}). Export it again with its depth "
                             f"unchanged{otherwise}")


def load_classes(path=None):
    """The class table, [{"name", "id", "color"}] in index order: the desert set's or a JSON file's."""
    if path is None:
        return DESERT
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--classes {path}: not a readable JSON file ({error})") from None
    return check_classes(table, f"--classes {path}")


def check_classes(table, where):
    """A class table reduced to its three keys; InputError says what is wrong with it."""
    if not isinstance(table, list) or not 2 <= len(table) <= 255:
        found = len(table) if isinstance(table, list) else "no list"
        raise InputError(f"{where}: holds {found}; it must be a list of 2 to 255 classes")
    seen: dict[str, list] = {"name": [], "id": []}
    for n, entry in enumerate(table):
        if not isinstance(entry, dict) or not {"name", "id", "color"} <= entry.keys():
            raise InputError(f'{where}: entry {n} is {str(entry)[:60]}; each needs "name", "id" and "color"')
        name, raw_id, color = entry["name"], entry["id"], entry["color"]
        if not (isinstance(name, str) and name.strip() and name.isprintable()):
            raise InputError(f"{where}: entry {n} has name {name!r}; a name is one line of text")
        if not is_int(raw_id, 0, 65535):
            raise InputError(f"{where}: entry {n} has id {raw_id!r}; an id is a whole number from 0 to 65535")
        if not (isinstance(color, list) and len(color) == 3 and all(is_int(v, 0, 255) for v in color)):
            raise InputError(f"{where}: entry {n} has color {color!r}; a color is three numbers in 0..255")
        for key in ("name", "id"):
            if entry[key] in seen[key]:
                raise InputError(f"{where}: {key} {entry[key]!r} occurs twice; every {key} must be unique")
            seen[key].append(entry[key])
    return [{key: entry[key] for key in ("name", "id", "color")} for entry in table]


def is_int(value, low, high):
    return type(value) is int and low <= value <= high


def class_names(classes):
    return [entry["name"] for entry in classes]


# ------------------------------------------------------------ errors and files
class CommandError(Exception):
    """What a user is told in one line; `status` is the exit status of a command that ends with it."""
    status = 1


class InputError(CommandError):
    """Something the user can correct: the file or flag, the value, what to do."""
    status = 2


class RunError(CommandError):
    """A run that started and could not go on: no memory, no disk space, no finite gradient."""


def brief(error):
    """What an exception says, as part of a line."""
    return textwrap.shorten(str(error), 90, placeholder=" ...")


def open_image(path):
    """A lazily read PIL image; InputError if it is no image or larger than Pillow's limit."""
    try:
        image = Image.open(path)
        too_large = image.width * image.height > (Image.MAX_IMAGE_PIXELS or float("inf"))
    except Image.DecompressionBombError:                      # from twice the limit on
        too_large = True
    except Exception as error:  # noqa: BLE001 -- Pillow's plugins raise errors of any kind for a damaged file
        raise InputError(f"{path}: cannot be read as an image ({brief(error)}); replace or remove it"
                         ) from None
    if too_large:
        raise InputError(f"{path}: more than {Image.MAX_IMAGE_PIXELS:,} pixels, above Pillow's limit; "
                         "cut or shrink it")
    return image


@contextlib.contextmanager
def damaged_file_error(path, what):
    try:
        yield
    except Exception as error:  # noqa: BLE001 -- a decoder may raise anything
        raise InputError(f"{path}: damaged {what} ({brief(error)}); replace or remove it") from None


def write_atomic(path, content):
    """Writes to a temporary file, then renames it, so that readers never see half a file.

    content: bytes, or a function that writes to an open file."""
    path, temporary = Path(path), Path(f"{path}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content) if isinstance(content, bytes) else content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                  # torch.save reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise RunError(f"{path}: cannot be written ({brief(error)}); free some space or choose another "
                       "place. What was there before is unchanged") from None


def save_image(path, image):
    write_atomic(path, lambda file: image.save(file, "PNG"))


def count_cores():
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def progress_bar(iterable, desc, total, **how):
    """A progress bar for work of more than a second; where stderr is a file it writes once a minute."""
    seconds = 0.5 if sys.stderr.isatty() or "ipykernel" in sys.modules else 60
    return tqdm(iterable, desc, total, **{"leave": False, "delay": 1, "mininterval": seconds, **how})


# ------------------------------------------------------------ flags
class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to each flag's help, where there is one."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=100)

    def _get_help_string(self, action):
        if action.default is False or action.default in (None, []):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, and without abbreviated flags, which would break when one is added."""

    def __init__(self, doc, example, usage="%(prog)s [flags]"):
        super().__init__(usage=usage, description=doc.split("\n\n")[0], epilog=f"example: {example}",
                         allow_abbrev=False, formatter_class=HelpFormatter)

    def error(self, message):
        raise InputError(f"{message} (see --help)")


def number(kind, low, high=1e9):
    """An argparse type: an int or float from `low` to `high`."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:                          # also refuses nan
            bound = f"at least {low:g}" + (f" and at most {high:g}" if high < 1e9 else "")
            raise argparse.ArgumentTypeError(f"{text} is not {bound}")
        return value
    parse.__name__ = "whole number" if kind is int else "number"             # argparse names it in its errors
    return parse


def image_side(text):
    """An argparse type: a multiple of 32, which every stride of the networks divides."""
    value = number(int, 32, 8192)(text)
    if value % 32:
        nearest = max(32, round(value / 32) * 32)
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 32; try {nearest}")
    return value


def add_data_flags(parser):
    group = parser.add_argument_group("data")
    group.add_argument("--data", metavar="DIR", help=f"folder with train/ and val/; without it, {ROOT_NAME} "
                                                     "is looked for here and under /kaggle/input")
    group.add_argument("--classes", metavar="FILE",
                       help='JSON list of {"name", "id", "color"}; without it, the ten desert classes')
    group.add_argument("--masks", choices=["ids", "indices", "colors"],
                       help="what masks hold; usually seen from their values")
    group.add_argument("--val-share", type=number(float, 0.01, 0.5), metavar="P",
                       help="without val/: this share of train/ validates, the last of each run of names "
                            "(cc1 cc2 .., mt1 mt2 ..)")
    return group


def run_command(main, argv=None):
    """Runs main(argv) as a command: an error is one line on stderr and an exit status, not a traceback."""
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)          # open_image says it in one line
    try:
        main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return
    except BrokenPipeError:                                   # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at the end
        message, status = "stopped: what read the output has closed it", 1
    except CommandError as error:
        message, status = f"error: {error}" if error.status < 128 else str(error), error.status
    except OSError as error:
        if error.filename is None:
            raise
        message, status = f"error: {str(error.filename)[:200]}: {error.strerror}; name another", 2
    except KeyboardInterrupt:
        message, status = "stopped; what was finished is kept", 130
    print(message, file=sys.stderr)
    raise SystemExit(status)


def main(argv=()):
    parser = Parser(__doc__, "python data.py --data Offroad_Segmentation_Training_Dataset")
    group = add_data_flags(parser)
    group.add_argument("--size", type=image_side, default=256, help="side of a crop as drawn, in pixels")
    group.add_argument("--out", metavar="DIR", default="outputs", help="where augmented.png goes")
    args = parser.parse_args(argv)
    classes, root = load_classes(args.classes), find_data(args.data)
    names = [name for name in ("train", "val") if (root / name).is_dir() or args.val_share]
    if not names:
        raise InputError(f"--data {root}: holds neither train/ nor val/; name the folder that does")
    for name in names:
        split = Split(root, name, classes, args.masks, args.out, val_share=args.val_share)
        print(split.describe())
        sizes = [f"{w}x{h} ({split.sizes.count((w, h))})" for w, h in sorted(set(split.sizes))]
        print(f"  sizes: {', '.join(sizes)}")
        print(f"  {'index':>5}  {'class':20} {'id':>6} {'pixels':>9} {'in pairs':>9} {'weight':>7}")
        share = 100 * split.counts.sum(0) / split.counts.sum()
        in_pairs = (split.counts > 0).sum(0).tolist()
        weights = class_weights(split.counts)
        for c, entry in enumerate(classes):
            note = "" if in_pairs[c] else "   no pixel: its score will be n/a"
            print(f"  {c:5}  {entry['name'][:20]:20} {entry['id']:6} {share[c]:7.3f} % {in_pairs[c]:9} "
                  f"{weights[c]:7.2f}{note}")
        if name == names[0]:
            path = Path(args.out) / "augmented.png"
            save_image(path, augmented_sheet(split, args.size))
            print(f"  look at {path}: augmented crops beside their labels")


if __name__ == "__main__":
    run_command(main)
