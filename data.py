"""Pairs of images and masks: finding, checking, reading, augmenting, colouring and drawing them.

    python data.py --data DIR      what each split holds, and an image of augmented pairs with their labels

Run it before training for hours: most bad scores on the desert set are masks read wrongly. Reading and augmenting
one 960x540 pair costs 3.5 ms more than decoding its two files at --size 256, 8.6 at 512 (`python distill.py --bench`).

Letters: B batch, C classes, H W sides of a stored image, S side of a training crop. Index 255 means "ignore".
"""
import argparse
import contextlib
import functools
import hashlib
import json
import os
import signal
import sys
import textwrap
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

IGNORE = 255
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)      # ImageNet's, what the pretrained encoders saw
ROOT_NAME = "Offroad_Segmentation_Training_Dataset"
IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
MASKS = {".png", ".bmp", ".tif", ".tiff"}                     # lossless only
DESERT = [{"name": n, "id": i, "color": list(c)} for n, i, c in [
    ("Trees", 100, (34, 110, 34)), ("Lush Bushes", 200, (60, 190, 70)), ("Dry Grass", 300, (222, 196, 120)),
    ("Dry Bushes", 500, (150, 100, 50)), ("Ground Clutter", 550, (130, 130, 95)), ("Flowers", 600, (235, 80, 180)),
    ("Logs", 700, (96, 50, 20)), ("Rocks", 800, (128, 128, 140)), ("Landscape", 7100, (196, 140, 96)),
    ("Sky", 10000, (130, 190, 240))]]


# ---------------------------------------------------------------------------------------------- faults and flags
class Fault(Exception):
    """What the user can mend, in one line: the file or flag, the value, the mend. `status` is the exit status:
    2 for input and flags, 1 for a run that failed, 130 and 143 for signals."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


def brief(error):
    """What an exception says, as part of a line."""
    return textwrap.shorten(str(error), 90, placeholder=" ...")


def command(main):
    """Decorates a main(argv): a Fault, an unusable file or Ctrl-C becomes one line and the exit status, not a traceback."""
    @functools.wraps(main)
    def run(argv=()):
        try:
            return main(list(argv))
        except Fault as fault:
            line, status = f"error: {fault}" if fault.status < 128 else str(fault), fault.status
        except OSError as error:
            if error.filename is None:
                raise
            line, status = f"error: {str(error.filename)[:200]}: {error.strerror}; name another", 2
        except KeyboardInterrupt:
            line, status = "stopped; what was finished is kept", 130
        print(line, file=sys.stderr)
        raise SystemExit(status)
    return run


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and no abbreviated flags; each help text ends with its default."""

    def __init__(self, doc, **kwargs):
        super().__init__(description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                         **kwargs)

    def error(self, message):
        raise Fault(f"{message} (see --help)")


def number(kind, low, high=float("inf"), open_low=False):
    """An argparse type: a finite int or float in [low, high], or (low, high] if `open_low`."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not (low < value <= high or (value == low and not open_low)) or value == float("inf"):
            bound = f"{'above' if open_low else 'at least'} {low}" + (f", at most {high}" if high < float("inf") else "")
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number {bound}")
        return value
    return parse


def side(text):
    """An argparse type: an image side that every stride of the networks divides."""
    value = number(int, 32, 8192)(text)
    if value % 32:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 32; try {max(32, round(value / 32) * 32)}")
    return value


def add_data_flags(parser):
    group = parser.add_argument_group("data")
    group.add_argument("--data", metavar="DIR", help=f"folder with train/ and val/ (default: {ROOT_NAME} here or "
                       "anywhere under /kaggle/input)")
    group.add_argument("--classes", metavar="FILE", help='JSON list of {"name", "id", "color"} (default: ten desert classes)')
    group.add_argument("--masks", choices=["ids", "indices"], help="what masks hold (seen from their values; needed where both fit)")
    return group


def cores():
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def progress(iterable, desc, **kwargs):
    """A tqdm bar on stderr: quiet for short work, rare lines where stderr is a file."""
    return tqdm(iterable, desc=desc, leave=False, delay=1, mininterval=0.5 if sys.stderr.isatty() else 60, **kwargs)


# ---------------------------------------------------------------------------------------------- the class table
def load_classes(path=None):
    """The class table, a list of {"name", "id", "color"} in index order: the desert set's, or that of a JSON file."""
    if path is None:
        return DESERT
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Fault(f"--classes {path}: not a readable JSON file ({error})") from None
    return check_classes(table, f"--classes {path}")


def check_classes(table, where):
    """A class table's entries with the three keys alone; a Fault says what is wrong with it."""
    if not isinstance(table, list) or not 2 <= len(table) <= 255:
        raise Fault(f"{where}: holds {len(table) if isinstance(table, list) else 'no list'}; it must be a list of 2 to 255 classes")
    for n, entry in enumerate(table):
        if not isinstance(entry, dict) or not {"name", "id", "color"} <= set(entry):
            raise Fault(f'{where}: entry {n} is {str(entry)[:60]}; each entry needs "name", "id" and "color"')
        name, label, color = entry["name"], entry["id"], entry["color"]
        named = isinstance(name, str) and name.strip() and name.isprintable()
        if not named or type(label) is not int or not 0 <= label <= 65535:
            raise Fault(f"{where}: entry {n} has name {name!r} and id {label!r}; a name is one line of text, an id a number in 0..65535")
        if not (isinstance(color, list) and len(color) == 3 and all(type(v) is int and 0 <= v <= 255 for v in color)):
            raise Fault(f"{where}: entry {n} has color {color!r}; a color is three numbers in 0..255")
    for key in ("name", "id"):
        values = [entry[key] for entry in table]
        twice = next((v for v in values if values.count(v) > 1), None)
        if twice is not None:
            raise Fault(f"{where}: {key} {twice!r} occurs twice; every {key} must be unique")
    return [{key: entry[key] for key in ("name", "id", "color")} for entry in table]


def class_names(classes):
    return [entry["name"] for entry in classes]


# ---------------------------------------------------------------------------------------------- finding pairs
def find_data(flag=None):
    """The data set's root: `flag` (--data), else ROOT_NAME in the working directory, else anywhere under /kaggle/input."""
    if flag is not None:
        if not Path(flag).is_dir():
            raise Fault(f"--data {flag}: no such folder; name the folder that holds train/ and val/")
        return Path(flag)
    candidates = [Path(ROOT_NAME), *sorted(Path("/kaggle/input").rglob(ROOT_NAME))]
    for root in candidates:
        if (root / "train").is_dir():
            return root
    raise Fault(f"no data set: looked for {ROOT_NAME}/train here and under /kaggle/input; name its folder with "
                "--data DIR, or try `python distill.py --demo`, which draws its own")


def list_files(folder, suffixes):
    """{stem: path} of the files in `folder` with one of `suffixes`; hidden files are passed over."""
    try:
        paths = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in suffixes and not p.name.startswith("."))
    except OSError as error:
        raise Fault(f"{folder}: {error.strerror}; a split holds Color_Images/ and Segmentation/") from None
    files = {p.stem: p for p in paths}
    if len(files) < len(paths):
        twice = next(p for p in paths if files[p.stem] != p)
        raise Fault(f"{twice}: {files[twice.stem].name} has the same stem; remove one of the two")
    return files


def find_pairs(root, split):
    """[(image path, mask path)] of `root/split`, in order of their stems."""
    folder = Path(root) / split
    images, masks = list_files(folder / "Color_Images", IMAGES), list_files(folder / "Segmentation", MASKS)
    if not images and not masks:
        raise Fault(f"{folder}: holds no images; Color_Images/ wants {' '.join(sorted(IMAGES))}, Segmentation/ {' '.join(sorted(MASKS))}")
    for stem in sorted(set(images) ^ set(masks)):
        found, other = (images[stem], "Segmentation") if stem in images else (masks[stem], "Color_Images")
        raise Fault(f"{found}: no partner named {stem}.* in {folder / other}; add it or remove this file")
    return [(images[stem], masks[stem]) for stem in sorted(images)]


# ---------------------------------------------------------------------------------------------- reading and writing files
def open_image(path):
    """A lazily loaded PIL image; a Fault if the file is no image or larger than Pillow's bomb limit."""
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    try:
        return Image.open(path)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Fault(f"{path}: more than {Image.MAX_IMAGE_PIXELS:,} pixels, above Pillow's limit; cut or shrink it") from None
    except Exception as error:  # noqa: BLE001 -- Pillow's plugins raise errors of any kind for a damaged file
        raise Fault(f"{path}: cannot be read as an image ({brief(error)}); replace or remove it") from None


def read_image(path, shrink=1):
    """Any image Pillow reads, as an upright 8-bit RGB image of (W, H).

    16-bit images are scaled (Pillow's own conversion clips them). A JPEG may be decoded up to `shrink` times
    smaller, by the decoder's own scaling. Refused: sides under 16 pixels, aspects above 8."""
    with open_image(path) as image:
        width, height = image.size
        if min(width, height) < 16 or max(width, height) > 8 * min(width, height):
            raise Fault(f"{path}: {width}x{height} pixels; sides must be at least 16 and the aspect at most 8, cut or remove it")
        try:
            if shrink >= 2:
                image.draft("RGB", (width // shrink, height // shrink))
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):                    # I;16, I;16B, and I, which 16-bit PNGs had before Pillow 10.4
                image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
            return image.convert("RGB")
        except Exception as error:  # noqa: BLE001
            raise Fault(f"{path}: damaged image ({brief(error)}); replace or remove it") from None


def read_mask(path):
    """The values of a mask as stored, (H, W) uint16; never converted, which would fold 16-bit ids."""
    with open_image(path) as image:
        if image.mode not in ("I;16", "I;16B", "I;16L", "I", "L", "P", "1"):
            raise Fault(f"{path}: mode {image.mode}; a mask holds one number a pixel, export it as 8- or 16-bit greyscale")
        if image.tile and image.tile[0][3] in ("L;2", "L;4"):
            raise Fault(f"{path}: greyscale of 2 or 4 bits, which Pillow scales; export it as 8- or 16-bit greyscale")
        try:
            values = np.asarray(image)
        except Exception as error:  # noqa: BLE001
            raise Fault(f"{path}: damaged mask ({brief(error)}); replace or remove it") from None
    if values.dtype not in (np.uint8, np.uint16) and (values.min() < 0 or values.max() > 65535):
        raise Fault(f"{path}: values {values.min()}..{values.max()}; labels lie in 0..65535")
    return values.astype(np.uint16)


def scan_pair(pair):
    """Decodes both files: ((W, H), {value: pixels}). So a damaged file is found before training, not in hour three."""
    image, mask = pair
    values, size = read_mask(mask), read_image(image).size
    if values.shape[::-1] != size:
        with open_image(image) as opened:
            turned = " after its EXIF rotation" if opened.getexif().get(0x0112, 1) > 1 else ""
        raise Fault(f"{mask}: {values.shape[1]}x{values.shape[0]} pixels, but {image.name} has {size[0]}x{size[1]}{turned}; "
                    "they must match")
    counts = np.bincount(values.ravel())
    return size, {int(v): int(counts[v]) for v in np.flatnonzero(counts)}


def scan(pairs, scan_file=None):
    """scan_pair of every pair, in threads; results stay in `scan_file` and are reused while files are unchanged."""
    stamps = [":".join(f"{s.st_size},{s.st_mtime_ns}" for s in map(os.stat, pair)) for pair in pairs]
    known = {}
    if scan_file is not None and Path(scan_file).is_file():
        try:
            known = dict(json.loads(Path(scan_file).read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            pass                                              # a torn file: scan again
    keys = [f"{image.resolve()}|{stamp}" for (image, _), stamp in zip(pairs, stamps, strict=True)]
    missing = [n for n, key in enumerate(keys) if key not in known]
    pool = ThreadPoolExecutor(min(8, cores()))    # Pillow decodes outside the interpreter lock
    try:
        results = pool.map(scan_pair, [pairs[n] for n in missing])
        for n, result in zip(missing, progress(results, "reading all files", total=len(missing)), strict=True):
            known[keys[n]] = result
    finally:
        pool.shutdown(cancel_futures=True)
    if scan_file is not None and missing:
        write_atomic(scan_file, lambda file: file.write(json.dumps({key: known[key] for key in keys}).encode()))
    return [(tuple(size), {int(v): n for v, n in values.items()}) for size, values in (known[key] for key in keys)]


def write_atomic(path, write):
    """Calls write(file) on a temporary name in the same folder, flushes, and renames: one whole file exists at any time."""
    path, temporary = Path(path), Path(f"{path}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                  # torch.save reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise Fault(f"{path}: cannot be written ({brief(error)}); free space or choose another "
                    "place, what was there before is untouched", status=1) from None


def save_image(path, image):
    write_atomic(path, lambda file: image.save(file, "PNG"))


# ---------------------------------------------------------------------------------------------- what masks hold
def mask_form(values, names, classes, flag=None):
    """Decides once for a split whether its masks hold raw ids or class indices: "ids" or "indices".

    `values`: a set of values for each mask; `names`: their paths, for the message; `flag`: --masks, believed unless
    the split as a whole cannot be that. Refused: 8-bit copies of 16-bit masks, mixtures, and splits without one known label."""
    ids, indices = {entry["id"] for entry in classes}, {*range(len(classes)), IGNORE}
    union = set().union(*values)
    copies = {"the high byte": {i >> 8 for i in ids}, "clipped at 255": {min(i, 255) for i in ids}, "modulo 256": {i & 255 for i in ids}}
    for how, copied in copies.items():
        for mine, name in [(union, names[0]), *([] if flag else zip(values, names, strict=True))]:
            if mine <= copied and not mine <= ids and not mine <= indices:
                raise Fault(f"{name}: label {min(mine - ids)} is no known id; the file looks like an 8-bit copy of a 16-bit mask "
                            f"({how}). Export it again with its depth unchanged")
    if flag is not None:
        form = flag
    elif not union <= indices:                                # raw ids, perhaps with some that the table does not know
        form = "ids"
        as_index = [n for n, v in enumerate(values) if v <= indices and not v <= ids | {IGNORE}]
        as_id = [n for n, v in enumerate(values) if v & (ids - indices)]
        if as_index and as_id:
            raise Fault(f"{names[as_index[0]]}: holds class indices where {Path(names[as_id[0]]).name} holds raw ids; "
                        "a split must not mix them")
    elif not union <= ids:
        form = "indices"
    else:
        form = "ids"
        if any(classes[v]["id"] != v for v in union if v < len(classes)):
            raise Fault(f"{names[0]}: the labels {sorted(union)} are both ids and indices of the class table; "
                        "say --masks ids or --masks indices")
    if not union & (ids if form == "ids" else indices - {IGNORE}):
        strange = max(union - {IGNORE} or union)
        where = next(name for mine, name in zip(values, names, strict=True) if strange in mine)
        raise Fault(f"{where}: label {strange} is in no class table entry, neither as id nor as index (0 to {len(classes) - 1}); "
                    "name the right table with --classes FILE")
    return form


def label_table(classes, form):
    """65,536 uint8 entries that turn stored values into class indices; everything unknown becomes 255."""
    table = np.full(65536, IGNORE, np.uint8)
    for index, entry in enumerate(classes):
        table[entry["id"] if form == "ids" else index] = index
    return table


class Pairs:
    """One split: checked pairs, how to read them, and how many pixels of each class each of them holds.

    Raises a Fault for anything that does not fit (see scan_pair and mask_form). `out`: where scan_SPLIT.json is kept, see scan."""

    def __init__(self, root, split, classes, masks=None, out=None):
        self.classes, self.split = classes, split
        self.pairs = find_pairs(root, split)
        found = scan(self.pairs, out and Path(out) / f"scan_{(Path(root) / split).absolute().name}.json")
        self.sizes = [size for size, _ in found]
        names = [str(mask) for _, mask in self.pairs]
        self.form = mask_form([set(values) for _, values in found], names, classes, masks)
        self.lookup = label_table(classes, self.form)
        self.counts = torch.zeros(len(found), len(classes), dtype=torch.int64)       # (N, C) pixels
        self.unknown: dict = {}                              # {value outside the class table: pixels}
        for n, (_, values) in enumerate(found):
            for value, pixels in values.items():
                index = int(self.lookup[value])
                if index != IGNORE:
                    self.counts[n, index] += pixels
                elif value != IGNORE:
                    self.unknown[value] = self.unknown.get(value, 0) + pixels
        digest = hashlib.sha256(repr([(p.stem, f) for (p, _), f in zip(self.pairs, found, strict=True)]).encode())
        self.digest = digest.hexdigest()[:16]                # identity of the listing and its labels, wherever it lies

    def __len__(self):
        return len(self.pairs)

    def describe(self):
        """One line, and a second where labels are unknown."""
        lines = [f"{self.split}: {len(self)} pairs, masks hold {'raw ids' if self.form == 'ids' else 'class indices'}"]
        if self.unknown:
            total = sum(w * h for w, h in self.sizes)
            seen = ", ".join(f"{v} ({100 * n / total:.2g} %)" for v, n in sorted(self.unknown.items())[:8])
            lines.append(f"{self.split}: {len(self.unknown)} labels outside the class table are ignored: {seen}")
        return "\n".join(lines)

    def read(self, n, shrink=1):
        """The n-th pair, not augmented: (PIL RGB, see read_image for `shrink`; (H, W) uint8 class indices at the stored size)."""
        return read_image(self.pairs[n][0], shrink), self.lookup[read_mask(self.pairs[n][1])]

    def crop(self, n, size, matrix):
        """The n-th pair under `matrix` (2, 3), see draw_affine: uint8 (3, S, S) image, (S, S) mask."""
        width, height = self.sizes[n]
        shrink = np.sqrt(abs(np.linalg.det(matrix[:, :2])))   # source pixels a target pixel
        image, mask = self.read(n, int(shrink))
        factor = max(1, round(shrink * image.width / width))  # an affine map does not smooth, so shrink beforehand
        if factor > 1:
            image = image.reduce(factor)
        scale = np.array([[image.width / width], [image.height / height]])
        image = image.transform((size, size), Image.Transform.AFFINE, tuple((matrix * scale).ravel()),
                                Image.Resampling.BILINEAR, fillcolor=tuple(round(255 * m) for m in MEAN))
        mask = Image.fromarray(mask).transform((size, size), Image.Transform.AFFINE, tuple(matrix.ravel()),
                                               Image.Resampling.NEAREST, fillcolor=IGNORE)
        return to_tensor(image), torch.from_numpy(np.array(mask))


def to_tensor(image):
    """PIL RGB -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def whole_size(width, height, size):
    """(w, h) of a whole image at scale 1: shorter side `size`, both rounded to the nearest multiple of 32."""
    scale = size / min(width, height)
    return tuple(max(32, int(v * scale / 32 + 0.5) * 32) for v in (width, height))


def whole_image(image, size):
    """PIL RGB -> uint8 (1, 3, h, w) at scale 1: what networks see in validation and inference."""
    return resized_image(image, *whole_size(*image.size, size))


def resized_image(image, width, height):
    """PIL RGB -> uint8 (1, 3, height, width), smoothed where it shrinks."""
    return to_tensor(image.resize((width, height), Image.Resampling.BILINEAR))[None]


# ---------------------------------------------------------------------------------------------- augmentation
def draw_affine(rng, width, height, size):
    """One random map for a sample, (2, 3) float64: crop coordinates -> image coordinates, both in pixels with
    the first pixel's centre at (.5, .5). Flip, scale 0.5 to 2 (1 = shorter side is `size`), rotation of up to 10
    degrees about the crop's centre, and the crop's place."""
    scale = rng.uniform(0.5, 2.0) * size / min(width, height)
    angle, flip = np.deg2rad(rng.uniform(-10, 10)), rng.random() < 0.5
    spare = np.array([width, height]) * scale - size          # negative: the image is smaller than the crop
    centre = size / 2 + np.minimum(spare, 0) + np.abs(spare) * rng.random(2)
    linear = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    shift = centre / scale - linear @ [size / 2, size / 2]
    if flip:
        linear[0], shift[0] = -linear[0], width - shift[0]
    return np.column_stack([linear, shift])


def draw_jitter(rng):
    """Factors of brightness, contrast and saturation in 0.6 to 1.4, hue shift in turns, -0.1 to 0.1: (4,)."""
    return np.array([*rng.uniform(0.6, 1.4, 3), rng.uniform(-0.1, 0.1)])


def color_jitter(image, jitter):
    """Brightness, contrast, saturation and hue, in this order, as one 3x3 matrix and one offset an image.

    image: (B, 3, H, W) in 0..1; jitter: (B, 4), see draw_jitter. Contrast and saturation as in torchvision; hue is
    a rotation of the colour plane of YIQ, which keeps luminance. Clipped to 0..1 once, at the end."""
    brightness, contrast, saturation, hue = jitter.unbind(1)                         # on the host: a 3x3 inverse makes a GPU wait
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    luma, turn = to_yiq[0], 2 * torch.pi * hue
    rotation = torch.eye(3).repeat(len(image), 1, 1)
    rotation[:, 1, 1] = rotation[:, 2, 2] = turn.cos()
    rotation[:, 2, 1], rotation[:, 1, 2] = turn.sin(), -turn.sin()
    desaturate = (1 - saturation)[:, None, None] * luma.expand(3, 3) + saturation[:, None, None] * torch.eye(3)
    matrix = torch.linalg.inv(to_yiq) @ rotation @ to_yiq @ desaturate * (contrast * brightness)[:, None, None]
    offset = ((1 - contrast) * brightness)[:, None] * luma                           # (B, 3), of the image's mean colour
    matrix, offset = (v.to(image.device, non_blocking=True) for v in (matrix, offset))
    grey = (image.mean((2, 3)) * offset).sum(1)                                      # (B,)
    return (torch.bmm(matrix, image.flatten(2)) + grey[:, None, None]).clamp(0, 1).view_as(image)


def normalize(image):
    """uint8 or 0..1 float (B, 3, H, W) -> normalised float32."""
    image = image.float() / 255 if image.dtype == torch.uint8 else image
    mean, std = (torch.tensor(v).view(3, 1, 1).to(image.device, non_blocking=True) for v in (MEAN, STD))
    return (image - mean) / std


# ---------------------------------------------------------------------------------------------- loaders
class Batch(NamedTuple):
    """A training batch; the last three fields scale the losses of a micro-batch and are set by the loop (see losses.py)."""
    image: torch.Tensor                      # (B, 3, S, S) uint8, after `to_device` normalised float32
    mask: torch.Tensor                       # (B, S, S) uint8 class indices, 255 = ignore; int64 on the device
    matrix: torch.Tensor                     # (B, 2, 3) float32: crop -> image coordinates
    jitter: torch.Tensor                     # (B, 4) float32
    pair: torch.Tensor                       # (B,) which pair of the split
    weight_sum: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    share: float = 1.0


def to_device(batch, device):
    """Moves a batch and does the photometric augmentation and the normalisation there."""
    move = functools.partial(torch.Tensor.to, device=device, non_blocking=True)
    image = color_jitter(move(batch.image).float() / 255, batch.jitter)
    return Batch(normalize(image), move(batch.mask).long(), move(batch.matrix), batch.jitter, batch.pair)


class Crops(Dataset):
    """Training samples by key (epoch, position in the epoch, pair): the same pixels for any number of workers."""

    def __init__(self, pairs, size, seed):
        self.pairs, self.size, self.seed = pairs, size, seed

    def __getitem__(self, key):
        epoch, position, n = key
        rng = np.random.default_rng([self.seed, epoch, position])
        matrix = draw_affine(rng, *self.pairs.sizes[n], self.size)
        jitter = draw_jitter(rng)
        try:
            image, mask = self.pairs.crop(n, self.size, matrix)
        except Fault as fault:
            return fault                                      # exceptions from workers arrive as tracebacks
        return image, mask, torch.from_numpy(matrix).float(), torch.from_numpy(jitter).float(), torch.tensor(n)


class WholeImages(Dataset):
    """Whole images as validation sees them, by number: (n, a uint8 (1, 3, h, w) for each of `sizes`, (H, W) class
    indices at the mask's stored size)."""

    def __init__(self, pairs, sizes):
        self.pairs, self.sizes = pairs, sizes

    def __getitem__(self, n):
        try:
            image, mask = self.pairs.read(n)
            return n, [whole_image(image, size) for size in self.sizes], torch.from_numpy(mask)
        except Fault as fault:
            return fault


class BatchSampler:
    """Which pairs make up which batch: lists of (epoch, position, pair) from step `start` to `stop`.

    Each epoch is a new permutation (or, with `odds` (N,), a draw with replacement) from (seed, epoch); the last
    partial batch is dropped. A step takes `accumulate` batches on each of `world` processes."""

    def __init__(self, n, batch, seed, start, stop, accumulate=1, rank=0, world=1, odds=None):
        self.n, self.batch, self.seed, self.start, self.stop = n, batch, seed, start, stop
        self.accumulate, self.rank, self.world, self.odds = accumulate, rank, world, odds
        self.steps_per_epoch = n // (batch * accumulate * world)

    def epoch(self, epoch):
        generator = torch.Generator().manual_seed(hash((self.seed, epoch)) & (2**63 - 1))
        if self.odds is None:
            return torch.randperm(self.n, generator=generator).tolist()
        return torch.multinomial(self.odds, self.n, replacement=True, generator=generator).tolist()

    def __iter__(self):
        order, current = [], -1
        for step in range(self.start, self.stop):
            epoch, at = divmod(step, self.steps_per_epoch)
            if epoch != current:
                order, current = self.epoch(epoch), epoch
            for micro in range(self.accumulate):
                first = ((at * self.accumulate + micro) * self.world + self.rank) * self.batch
                yield [(epoch, position, order[position]) for position in range(first, first + self.batch)]


def collate(samples):
    fault = next((s for s in samples if isinstance(s, Fault)), None)
    return fault or Batch(*map(torch.stack, zip(*samples, strict=True)))


def quiet_worker(_):
    """Ctrl-C and a scheduler's SIGTERM reach the whole process group; only the main process decides what they mean."""
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, signal.SIG_IGN)


def loader(dataset, workers, pin, order):
    """A DataLoader over `order`: a BatchSampler, or the numbers of single samples. Faults of workers are raised here."""
    how = {"batch_sampler": order, "collate_fn": collate} if isinstance(order, BatchSampler) else {"sampler": order, "batch_size": None}
    load = DataLoader(dataset, num_workers=workers, pin_memory=pin, worker_init_fn=quiet_worker,
                      generator=torch.Generator().manual_seed(0), **how)       # its own: workers' seeds come out of torch's otherwise
    try:
        for item in load:
            if isinstance(item, Fault):
                raise item
            yield item
    except RuntimeError as error:
        if "worker" not in str(error):
            raise
        raise Fault(f"a data worker died ({str(error).splitlines()[0][:100]}); memory is short as a rule, use fewer "
                    f"than --workers {workers}", status=1) from None


# ---------------------------------------------------------------------------------------------- class balance
def class_weights(counts, mode="median"):
    """(C,) weights for the hard loss from raw pixel counts (N, C).

    "median": median frequency / frequency over the classes that occur (frequency: share of all pixels), clipped to
    [0.1, 10] (after Eigen and Fergus 2015, section 6.3.2, whose shares are of the images that hold the class). "sqrt":
    square roots of these. "none": ones. A class without a pixel weighs 1."""
    totals = counts.sum(0).double()
    seen = totals > 0
    weights = torch.ones(len(totals), dtype=torch.float64)
    if mode != "none" and seen.any():
        weights[seen] = (totals[seen].quantile(0.5) / totals[seen]).clamp(0.1, 10)
    return (weights.sqrt() if mode == "sqrt" else weights).float()


def sampling_weights(counts):
    """(N,) odds of drawing each image: first a class with odds exp((1 - its share) / 0.1), then one of the images
    that hold it (rare class sampling, DAFormer, Hoyer et al. 2022, section 3.3; its temperature is a sharper 0.01)."""
    share = counts.sum(0).double() / counts.sum().clamp(min=1)
    holds = (counts > 0).double()                                                    # (N, C)
    odds = ((1 - share) / 0.1).softmax(0) * (holds.sum(0) > 0)
    return (holds / holds.sum(0).clamp(min=1)) @ odds + 1e-12


# ---------------------------------------------------------------------------------------------- images for people
def palette(classes):
    """(256, 3) uint8 colours by class index; black for everything else."""
    colors = np.zeros((256, 3), np.uint8)
    colors[:len(classes)] = [entry["color"] for entry in classes]
    return colors


def index_image(labels, classes):
    """(H, W) uint8 class indices -> a palette PNG image: a viewer shows colours, np.asarray gives the indices."""
    image = Image.fromarray(np.asarray(labels, np.uint8))
    image.putpalette(palette(classes).tobytes())
    return image


font = ImageFont.load_default                                 # font(size in pixels)


def percent(share):
    return f"{100 * share:.1f} %" if share >= 0.001 else "< 0.1 %"


def overlay(image, labels, classes, legend=True):
    """A PIL RGB image with its labels (H, W) laid over it, and a legend of the classes present with their shares,
    left out where it would hide more than it tells."""
    mixed = Image.blend(image, Image.fromarray(palette(classes)[np.asarray(labels)]), 0.5)
    if not legend or min(image.size) < 200:
        return mixed
    counts = np.bincount(np.asarray(labels).ravel(), minlength=256)[:len(classes)]
    present = [c for c in np.argsort(-counts, kind="stable") if counts[c]]
    line = max(9, min(image.height // 30, image.width // 24))
    draw = ImageDraw.Draw(mixed, "RGBA")
    rows = [(palette(classes)[c], f"{classes[c]['name']}  {percent(counts[c] / counts.sum())}") for c in present]
    fitting = int(image.height / (1.3 * line)) - 2
    if len(rows) > fitting:
        rows[fitting:] = [((0, 0, 0), f"{len(rows) - fitting} more")]
    width = max([draw.textlength(text, font(line)) for _, text in rows], default=0) + 3 * line
    draw.rectangle((0, 0, width, (len(rows) + 0.5) * 1.3 * line), fill=(0, 0, 0, 150))
    for n, (color, text) in enumerate(rows):
        top = (0.35 + 1.3 * n) * line
        draw.rectangle((0.5 * line, top, 1.5 * line, top + line), fill=tuple(map(int, color)))
        draw.text((2 * line, top), text, (255, 255, 255), font(line))
    return mixed


def augmented_sheet(pairs, size):
    """Random training crops, each beside its labels laid over it: a person sees whether labels fit."""
    rows, columns = 4, 6
    sheet, rng = Image.new("RGB", (columns * size, rows * size)), np.random.default_rng(0)
    for n in range(rows * columns // 2):
        pair = n * len(pairs) // (rows * columns // 2) % len(pairs)
        image, mask = pairs.crop(pair, size, draw_affine(rng, *pairs.sizes[pair], size))
        jittered = color_jitter(image[None].float() / 255, torch.from_numpy(draw_jitter(rng))[None].float())[0]
        shown = Image.fromarray((jittered * 255).byte().permute(1, 2, 0).numpy())
        x, y = 2 * n % columns * size, 2 * n // columns * size
        sheet.paste(shown, (x, y))
        sheet.paste(overlay(shown, mask.numpy(), pairs.classes, legend=False), (x + size, y))
    return sheet


# ---------------------------------------------------------------------------------------------- demo scenes
def draw_scene(seed, width=960, height=540):
    """A made-up desert scene with all ten classes: (PIL RGB, (H, W) uint16 raw ids of the desert table)."""
    rng = np.random.default_rng(seed)
    image, labels = Image.new("RGB", (width, height)), Image.new("L", (width, height), 9)
    pens = ImageDraw.Draw(image), ImageDraw.Draw(labels)
    unit = height / 540

    def color(rgb, spread=14):
        return tuple(int(v) for v in np.clip(np.array(rgb) + rng.normal(0, spread), 0, 255))

    def put(shape, index, box, rgb):
        getattr(pens[0], shape)(box, fill=color(rgb))
        getattr(pens[1], shape)(box, fill=index)

    def scatter(index, count, shape, rgb, size, flat=1.0, low=0.45):
        for y in np.sort(rng.uniform(low, 1.0, count)):       # far things first, and smaller
            x, s = rng.uniform(0, width), size * unit * (0.3 + 1.4 * (y - low)) * rng.uniform(0.6, 1.4)
            put(shape, index, (x - s, y * height - s * flat, x + s, y * height + s * flat), rgb)

    for y in range(height):                                   # sky, paler towards the horizon
        pens[0].line((0, y, width, y), fill=tuple(int(v) for v in (95 + 110 * y / height, 150 + 80 * y / height, 225)))
    horizon = height * rng.uniform(0.38, 0.48)
    ridge = horizon + 14 * unit * np.cumsum(rng.normal(0, 0.35, 33)).clip(-3, 1)
    ground = [(0, height), *zip(np.linspace(0, width, 33), ridge, strict=True), (width, height)]
    put("polygon", 8, ground, (190, 140, 98))
    for _ in range(6):                                        # dry grass in patches
        x, y, w, h = rng.uniform(0, width), rng.uniform(0.55, 1.0) * height, rng.uniform(80, 220) * unit, rng.uniform(18, 60) * unit
        put("ellipse", 2, (x - w, y - h, x + w, y + h), (216, 192, 110))
    scatter(4, 60, "rectangle", (118, 112, 78), 5, 0.5)       # clutter
    scatter(7, 8, "ellipse", (126, 126, 138), 18, 0.7)        # rocks
    scatter(3, 7, "ellipse", (140, 88, 44), 24, 0.8)          # dry bushes
    scatter(1, 8, "ellipse", (66, 176, 70), 28, 0.8)          # lush bushes
    scatter(6, 4, "rectangle", (84, 46, 22), 30, 0.22, 0.6)   # logs
    scatter(5, 40, "ellipse", (232, 84, 178), 5)              # flowers
    for _ in range(rng.integers(2, 5)):                       # trees
        x, y, s = rng.uniform(0, width), horizon + rng.uniform(10, 70) * unit, rng.uniform(35, 70) * unit
        put("rectangle", 0, (x - s / 9, y - s, x + s / 9, y), (78, 54, 32))
        put("ellipse", 0, (x - s * 0.6, y - 2 * s, x + s * 0.6, y - 0.7 * s), (30, 100, 38))
    noisy = np.asarray(image) + rng.normal(0, 9, (height, width, 3))
    ids = np.array([entry["id"] for entry in DESERT], np.uint16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), ids[np.asarray(labels)]


def write_scenes(root, train=32, val=8, width=960, height=540):
    """Writes drawn scenes to `root` in the layout of the real set, with 16-bit masks of raw ids."""
    for split, count, first in (("train", train, 0), ("val", val, 10_000)):
        for part in ("Color_Images", "Segmentation"):
            (Path(root) / split / part).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            image, mask = draw_scene(first + n, width, height)
            image.save(Path(root) / split / "Color_Images" / f"scene{n:04}.png")
            Image.fromarray(mask).save(Path(root) / split / "Segmentation" / f"scene{n:04}.png")


# ---------------------------------------------------------------------------------------------- command
@command
def main(argv=()):
    parser = Parser(__doc__.split("\n\n")[0], epilog="example: python data.py --data Offroad_Segmentation_Training_Dataset")
    group = add_data_flags(parser)
    group.add_argument("--size", type=side, default=256, help="side of a crop as drawn, pixels (256)")
    group.add_argument("--out", metavar="DIR", default="outputs", help="where augmented.png goes (outputs)")
    args = parser.parse_args(argv)
    classes, root = load_classes(args.classes), find_data(args.data)
    splits = [name for name in ("train", "val") if (root / name).is_dir()]
    if not splits:
        raise Fault(f"--data {root}: holds neither train/ nor val/; name the folder that does")
    for split in splits:
        pairs = Pairs(root, split, classes, args.masks, args.out)
        print(pairs.describe())
        print(f"  sizes: {', '.join(f'{w}x{h} ({pairs.sizes.count((w, h))})' for w, h in sorted(set(pairs.sizes)))}")
        share = pairs.counts.sum(0) / pairs.counts.sum()
        print(f"  {'index':>5}  {'class':20} {'id':>6} {'pixels':>9} {'in pairs':>9} {'weight':>7}")
        for c, (entry, weight) in enumerate(zip(classes, class_weights(pairs.counts), strict=True)):
            present = int((pairs.counts[:, c] > 0).sum())
            print(f"  {c:5}  {entry['name'][:20]:20} {entry['id']:6} {100 * share[c]:7.3f} % {present:9} {weight:7.2f}"
                  + ("" if present else "   no pixel of it: its score will be n/a"))
        if split == splits[0]:
            path = Path(args.out) / "augmented.png"
            save_image(path, augmented_sheet(pairs, args.size))
            print(f"  look at {path}: augmented crops beside their labels")


if __name__ == "__main__":
    main(sys.argv[1:])
