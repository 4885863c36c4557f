"""Scores that can be compared: one confusion matrix for a whole split, at the masks' own resolution.

    python evaluate.py                                        # the teachers and the student in outputs/
    python evaluate.py CKPT ... --data DIR --split val --ensemble

Prints one table (parameters, GMACs, mIoU, speed measured side by side), IoU, precision and recall by class.
A class that no mask holds is n/a: it counts as 0 in the mIoU over all classes and is left out of the one over
the classes present; both are printed.

Measured: four networks and an ensemble on 33 pairs of 960x540, at --size 128 and with speed, 0.7 minutes on two CPU cores.

Letters: C classes, H W sides of a stored mask. Matrix rows are truth, columns predictions.
"""
import copy
import functools
import json
import math
import re
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
from models import ARCHS, Ensemble, amp_dtype, freeze, load_model, predict

TEACHER_NAMES = {"deeplab": "deep_lab", "segformer-b3": "best_model"}           # file names of the teachers, as users know them


# ---------------------------------------------------------------------------------------------- scores
def confusion(labels, target, num_classes):
    """(H, W) predicted and true indices -> (C, C) int64 pixel counts; pixels whose truth is 255 do not count."""
    keep = target != data.IGNORE
    counts = torch.bincount(target[keep].long() * num_classes + labels[keep].long(), minlength=num_classes**2)
    return counts.view(num_classes, num_classes)


def summary(matrix, classes):
    """(C, C) -> {"miou", "miou_present", "pixel_accuracy", "iou", "precision", "recall"}; by class name, None if absent."""
    m = matrix.cpu().double()                                 # in this order: MPS has no float64
    hit, truth, predicted = m.diag(), m.sum(1), m.sum(0)
    present = (truth > 0).tolist()
    iou, precision, recall = hit / (truth + predicted - hit), hit / predicted.clamp(min=1), hit / truth.clamp(min=1)
    table = {key: {entry["name"]: float(v) if here else None for entry, v, here in zip(classes, values, present, strict=True)}
             for key, values in (("iou", iou), ("precision", precision), ("recall", recall))}
    known = [v for v in table["iou"].values() if v is not None]
    return {"miou": sum(known) / len(classes), "miou_present": sum(known) / max(1, len(known)),
            "pixel_accuracy": float(hit.sum() / m.sum().clamp(min=1)), **table}


def label_split(networks, pairs, dtype=None, workers=0, numbers=None):
    """Yields (n, (H, W) truth, [(H, W) labels of each network]) of a split, on the networks' device.

    networks: [(frozen network, size of its images, whether to add the mirrored one)]. `numbers`: which pairs (all by default)."""
    device = next(networks[0][0].parameters()).device
    sizes = sorted({size for _, size, _ in networks})
    numbers = range(len(pairs)) if numbers is None else numbers
    for n, images, target in data.loader(data.WholeImages(pairs, sizes), workers, device.type == "cuda", numbers):
        yield n, target.to(device), [predict(model, images[sizes.index(size)], target.shape, dtype, flip)[0]
                                     for model, size, flip in networks]


def evaluate(model, pairs, size, dtype=None, workers=0, numbers=None):
    """The (C, C) confusion matrix of a frozen network over a split, summed over processes if there are several."""
    classes = len(pairs.classes)
    matrix = torch.zeros(classes, classes, dtype=torch.int64, device=next(model.parameters()).device)
    for _, target, (labels,) in label_split([(model, size, False)], pairs, dtype, workers, numbers):
        matrix += confusion(labels, target, classes)
    if dist.is_initialized():
        dist.all_reduce(matrix)
    return matrix


# ---------------------------------------------------------------------------------------------- speed
def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_interleaved(calls, device, seconds=1.5, least=5):
    """Milliseconds of each call, [(median, lowest, highest)]: run in turn after a warm-up, so that a machine that
    slows down slows all of them."""
    for call in calls:
        call()
    times: list = [[] for _ in calls]
    end = time.perf_counter() + seconds * len(calls)
    while len(times[0]) < least or (time.perf_counter() < end and len(times[0]) < 100):
        for call, own in zip(calls, times, strict=True):
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            own.append(1000 * (time.perf_counter() - start))
    return [(statistics.median(t), min(t), max(t)) for t in times]


@torch.no_grad()
def count_gmacs(model):
    """Multiply-adds of one forward at 512x512, in 1e9, as torch counts them (matrix products, convolutions, attention products)."""
    x = torch.zeros(1, 3, 512, 512, device=next(model.parameters()).device)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x)
    return counter.get_total_flops() / 2e9


# ---------------------------------------------------------------------------------------------- charts and sheets
INK, PAPER, GRID = (30, 30, 30), (255, 255, 255), (225, 225, 225)
LINE_COLORS = [(31, 119, 180), (214, 39, 40), (44, 160, 44), (255, 127, 14), (148, 103, 189),
               (140, 86, 75), (227, 119, 194), (23, 190, 207)]


def round_ticks(low, high):
    """Up to seven multiples of 1, 2 or 5 times a power of ten; the first is not above `low`, the last not below `high`."""
    power = 10 ** math.floor(math.log10((high - low) / 5))
    step = next(power * k for k in (1, 2, 5, 10) if (high - low) / (power * k) <= 5)
    return [n * step for n in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def draw_panel(draw, box, title, series, colors, last_epoch):
    """One line chart over epochs: series is {name: [(epoch, y)]}, y None where there is no value."""
    left, top, right, bottom = box[0] + 64, box[1] + 34, box[2] - 190, box[3] - 30
    points = [p for line in series.values() for p in line if p[1] is not None]
    draw.text((left, box[1] + 6), title, INK, data.font(18))
    if not points:
        return
    ys = [p[1] for p in points]
    ticks = round_ticks(min(0, *ys), max(*ys, 1e-9))

    def spot(x, y):
        return left + x / last_epoch * (right - left), bottom - (y - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - top)

    for tick in ticks:
        draw.line((left, spot(0, tick)[1], right, spot(0, tick)[1]), GRID)
        draw.text((left - 6, spot(0, tick)[1]), f"{tick:.3g}", INK, data.font(13), anchor="rm")
    for tick in round_ticks(0, last_epoch):
        if tick <= last_epoch and tick == int(tick):
            draw.text((spot(tick, 0)[0], bottom + 6), f"{tick:.0f}", INK, data.font(13), anchor="ma")
    draw.text((right + 30, bottom + 6), "epoch", INK, data.font(13))
    for n, (name, line) in enumerate(series.items()):
        spots = [spot(x, y) for x, y in line if y is not None]
        if len(spots) > 1:
            draw.line(spots, colors[n % len(colors)], 2)
        for x, y in spots if len(spots) < 60 else []:
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), colors[n % len(colors)])
        row = min(18, (bottom - top) / len(series))           # many classes stand closer
        y = top + row * n
        draw.rectangle((right + 12, y + 0.1 * row, right + 24, y + 0.7 * row), colors[n % len(colors)])
        last = next((f" {v:.3f}" for _, v in reversed(line) if v is not None), " n/a")
        draw.text((right + 30, y), name[:16] + last, INK, data.font(min(13, row)))


def draw_curves(history, classes, parts):
    """Epoch records -> an image of loss and parts, mIoU, IoU by class, and the balance alpha."""
    def line(values):
        return [(record["epoch"], value) for record, value in zip(history, values, strict=True)]

    def of(key):
        return line([record.get(key) for record in history])

    fastest = max(record["lr"] for record in history)
    image = Image.new("RGB", (1400, 900), PAPER)
    draw = ImageDraw.Draw(image)
    by_class = {name: line([(record.get("val_iou") or {}).get(name) for record in history]) for name in data.class_names(classes)}
    panels = [("loss and its parts", {key: of(key) for key in ("loss", *parts)}, LINE_COLORS),
              ("validation mIoU and pixel accuracy", {"mIoU": of("val_miou"), "pixel accuracy": of("val_pixel_accuracy")}, LINE_COLORS),
              ("validation IoU by class", by_class, [tuple(v * 3 // 4 for v in c["color"]) for c in classes]),
              ("alpha and learning rate",
               {"alpha": of("alpha"), f"lr / {fastest:.1e}": line([r["lr"] / fastest for r in history])}, LINE_COLORS)]
    for n, panel in enumerate(panels):
        x, y = n % 2 * 700, n // 2 * 450
        draw_panel(draw, (x, y, x + 700, y + 450), *panel, history[-1]["epoch"])
    return image


def draw_confusion(matrix, classes, name):
    """Shares of each true class (row) by predicted class (column) in percent, legible with 10 and with 30 classes."""
    share = matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)
    count, cell = len(classes), max(34, min(64, 1400 // len(classes)))
    size = cell // 3 + 2
    margin = int(max(data.font(15).getlength(c["name"][:24]) for c in classes)) + 24
    side_length, title = margin + count * cell + 12, f"{name}: row is truth, column prediction, in % of the row"
    image = Image.new("RGB", (max(side_length, int(data.font(14).getlength(title)) + 24), side_length + 24), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((8, 6), title, INK, data.font(14))
    for n, entry in enumerate(classes):
        at = margin + n * cell
        draw.text((margin - 8, at + 24 + cell / 2), entry["name"][:24], INK, data.font(15), anchor="rm")
        tall = Image.new("RGB", (margin, cell), PAPER)        # column names stand upright
        ImageDraw.Draw(tall).text((4, cell / 2), entry["name"][:24], INK, data.font(15), anchor="lm")
        image.paste(tall.rotate(90, expand=True), (at, 24))
        for m in range(count):
            value = float(share[n, m])
            x, y = margin + m * cell, at + 24
            shade = tuple(int(255 - value * (255 - v)) for v in (20, 90, 160))
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), shade)
            if value >= 0.005:
                draw.text((x + cell / 2, y + cell / 2), f"{100 * value:.0f}", PAPER if value > 0.6 else INK, data.font(size), anchor="mm")
        if not matrix[n].sum():
            draw.text((margin + 6, at + 24 + cell / 2), "n/a: in no mask", INK, data.font(14), anchor="lm")
    return image


def worst_sheet(pairs, n, labels):
    """image | truth | prediction | errors (red: wrong, grey: ignored)."""
    image, mask = pairs.read(n)
    target = torch.from_numpy(mask)
    wrong = torch.zeros(*target.shape, 3, dtype=torch.uint8)
    wrong[target == data.IGNORE] = 128
    wrong[(labels != target) & (target != data.IGNORE)] = torch.tensor([230, 30, 30], dtype=torch.uint8)
    parts = [image, data.overlay(image, mask, pairs.classes), data.overlay(image, labels, pairs.classes),
             Image.blend(image, Image.fromarray(wrong.numpy()), 0.7)]
    sheet = Image.new("RGB", (len(parts) * image.width, image.height))
    for k, part in enumerate(parts):
        sheet.paste(part, (k * image.width, 0))
    return sheet


# ---------------------------------------------------------------------------------------------- the table
def print_columns(lines):
    """Lists of cells: the first column to the left, the others to the right, each as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *cells in lines:
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))]).rstrip())
    print()


def print_table(rows, classes, sizes):
    """The table of rows (see `main`): size and scores, speed, then IoU, precision and recall by class."""
    forms = {"miou": ("mIoU", ".4f"), "miou_present": ("present", ".4f"), "pixel_accuracy": ("pixel acc", ".4f"),
             "to_ensemble": ("to ensemble", "+.4f"), "agreement": ("agreement", ".4f")}
    keys = [key for key in forms if key in rows[0]]
    print_columns([["model", "params M", "GMACs", "MB", *(forms[key][0] for key in keys)]] + [
        [row["name"], f"{row['params'] / 1e6:.1f}", f"{row['gmacs']:.1f}", f"{row['size'] / 1e6:.1f}",
         *(format(row[key], forms[key][1]) for key in keys)] for row in rows])
    print_columns([["speed", *(head for h, w in sizes for head in (f"{h}x{w}: ms", "spread", "FPS")), "both <50 ms"]] + [
        [row["name"],
         *(cell for s in row["speed"] for cell in (f"{s['ms']:.1f}", f"{s['lowest']:.1f}-{s['highest']:.1f}", f"{s['fps']:.1f}")),
         "yes" if all(s["ms"] < 50 for s in row["speed"]) else "no"] for row in rows])
    print_columns([["IoU / precision / recall", *(row["name"] for row in rows)]] + [
        [entry["name"], *("n/a" if row["iou"][entry["name"]] is None else
                          " / ".join(f"{row[key][entry['name']]:.3f}" for key in ("iou", "precision", "recall")) for row in rows)]
        for entry in classes])


def add_model_flags(parser, arch=None):
    """Flags of everything that runs a network; `arch`: the default of what is trained, None where checkpoints say it."""
    group = parser.add_argument_group("networks")
    group.add_argument("--arch", type=lambda name: {"segformer": "segformer-b3"}.get(name, name), choices=ARCHS, default=arch,
                       metavar="ARCH", help="deeplab, segformer (b3), segformer-b0 to -b5 "
                       f"({arch or 'what the checkpoint says; needed for bare state dicts'})")
    group.add_argument("--device", default="auto", metavar="auto|cuda|mps|cpu",
                       help="where to compute (auto: the first of cuda, mps, cpu)")
    group.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto",
                       help="precision (auto: what the device does natively)")
    return group


def pick_device(name):
    """torch.device of --device; auto takes cuda, then mps, then cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = name.split(":")[0]
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": name == "cpu"}.get(kind)
    if not usable or (kind == "cuda" and ":" in name and name[5:] not in map(str, range(torch.cuda.device_count()))):
        raise data.Fault(f"--device {name}: not to be had here; use auto, cuda, mps or cpu")
    if kind == "cuda":
        torch.set_float32_matmul_precision("high")            # here, so that every script computes alike
    return torch.device(name)


def describe_device(device, dtype):
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return f"{device.type}, {kind}, {str(dtype or torch.float32).removeprefix('torch.')}"


def parse_weights(value, count):
    """"0.5:0.5" -> (K,) tensor, normalised; a Fault for a wrong number of weights, negative ones or zeros only."""
    try:
        weights = torch.tensor([float(v) for v in value.split(":")], dtype=torch.float64)
    except ValueError:
        weights = torch.tensor([float("nan")])
    if len(weights) != count or not weights.sum().isfinite() or (weights < 0).any() or weights.sum() <= 0:
        raise data.Fault(f"--teacher-weights {value}: give {count} numbers such as {':'.join(['1'] * count)}, none negative, not all 0")
    return weights / weights.sum()


def ensemble_weights(value, metas):
    """(K,) or, for "auto", (K, C) weights: each teacher counts for a class by its validation IoU of it."""
    if value == "equal":
        return torch.full((len(metas),), 1 / len(metas))
    if value != "auto":
        return parse_weights(value, len(metas))
    if not all(meta["val_iou"] for meta in metas):
        raise data.Fault("--teacher-weights auto: a teacher's checkpoint holds no validation IoU; give numbers instead")
    iou = torch.tensor([[meta["val_iou"].get(name) or 0.0 for name in data.class_names(meta["classes"])] for meta in metas])    # (K, C)
    return iou.where(iou.sum(0) > 0, 1.0)


def make_parser():
    parser = data.Parser(__doc__.split("\n\n")[0], epilog="example: python evaluate.py outputs/*.pth --ensemble --json scores.json")
    parser.add_argument("checkpoints", nargs="*", help="(default: the teachers and the student in --out)")
    images = data.add_data_flags(parser)
    images.add_argument("--split", default="val", help="folder below --data, or . if --data itself holds Color_Images (val)")
    images.add_argument("--size", type=data.side, help="shorter side that the networks see, pixels (that of training)")
    images.add_argument("--workers", type=data.number(int, 0, 256), default=min(2, data.cores()),
                        help="processes that read files (up to 2)")
    group = add_model_flags(parser)
    group.add_argument("--ensemble", action="store_true",
                       help="add the ensemble of all but best_student*, student*, at the first one's size")
    group.add_argument("--teacher-weights", default="equal", metavar="A:B:..|auto", help="weights of the ensemble (equal)")
    group.add_argument("--tta", choices=["flip"], help="also score each network on the mean with the mirrored image")
    output = parser.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="also write the table there (sizes in bytes)")
    output.add_argument("--save-worst", type=data.number(int, 0), default=0, metavar="N", help="images of the N lowest scores (0)")
    output.add_argument("--out", metavar="DIR", default="outputs", help="where images go (outputs)")
    return parser


def open_inputs(args):
    """(paths, [(network, meta)], the split) of the command line; all of one class table."""
    usual = [Path(args.out) / f"{name}.pth" for name in (*TEACHER_NAMES.values(), "best_student")]
    paths = args.checkpoints or [path for path in usual if path.exists()]
    if not paths:
        raise data.Fault(f"no checkpoints: none named, and --out {args.out} holds none of {', '.join(path.name for path in usual)}")
    classes, loaded = data.load_classes(args.classes) if args.classes else None, []
    for path in paths:
        loaded.append(load_model(path, args.arch, classes))
        classes = loaded[0][1]["classes"]                     # that of the first holds for all
    return paths, loaded, data.Pairs(data.find_data(args.data), args.split, classes, args.masks, args.out)


@data.command
def main(argv=()):
    args = make_parser().parse_args(argv)
    device = pick_device(args.device)
    dtype = amp_dtype(args.amp, device)
    paths, loaded, pairs = open_inputs(args)
    print(pairs.describe())
    rows, networks = build_rows(args, paths, loaded, device, dtype)
    score_rows(args, rows, networks, pairs, dtype)
    print(f"speed: batch 1, {describe_device(device, dtype)}, median of interleaved runs\n", flush=True)
    sizes = measure_speed(rows, networks, pairs, device, dtype)
    print_table(rows, pairs.classes, sizes)
    print(f"images: {args.out}/confusion_NAME.png" + f", {args.out}/worst_NAME/" * bool(args.save_worst))
    if args.json:
        content = {"split": args.split, "pairs": len(pairs), "device": device.type, "models": rows}
        data.write_atomic(args.json, lambda file: file.write(json.dumps(content, indent=1).encode()))
    return rows


def build_rows(args, paths, loaded, device, dtype):
    """A row of the table, and (frozen network, size, mirrored too), for each checkpoint and the ensemble; the same with --tta."""
    rows, networks, stems = [], [], [Path(path).stem for path in paths]
    for path, stem, (model, meta) in zip(paths, stems, loaded, strict=True):
        rows.append({"name": stem if stems.count(stem) == 1 else str(path),
                     "params": sum(p.numel() for p in model.parameters()), "size": Path(path).stat().st_size,
                     "gmacs": count_gmacs(freeze(copy.deepcopy(model), meta["arch"]))})
        networks.append((freeze(model.to(device), meta["arch"], dtype), args.size or meta["size"], False))
    if args.ensemble:
        members = [n for n, stem in enumerate(stems) if not stem.startswith(("best_student", "student"))]
        if not members:
            raise data.Fault("--ensemble: all checkpoints are students; name the teachers too")
        weights = ensemble_weights(args.teacher_weights, [loaded[n][1] for n in members])
        networks.append((Ensemble([networks[n][0] for n in members], weights).to(device), networks[members[0]][1], False))
        rows.append({"name": "ensemble", **{key: sum(rows[n][key] for n in members) for key in ("params", "size", "gmacs")}})
    if args.tta:
        rows = [row for plain in rows for row in (plain, {**plain, "name": f"{plain['name']} + flip", "gmacs": 2 * plain["gmacs"]})]
        networks = [(model, size, flip) for model, size, _ in networks for flip in (False, True)]
    files = [file_name(row) for row in rows]
    if twice := next((name for name in files if files.count(name) > 1), None):
        raise data.Fault(f"two networks would write {args.out}/confusion_{twice}.png; name each once, or rename a checkpoint")
    return rows, networks


def file_name(row):
    """The part of a row's file names that is its own: "a + flip" -> "a_flip"."""
    return re.sub(r"[^\w-]+", "_", row["name"])


def score_rows(args, rows, networks, pairs, dtype):
    """One pass over the split for all rows; fills in the scores and writes the images."""
    classes = pairs.classes
    matrices, worst, agree, pixels = [0] * len(rows), [[] for _ in rows], [0] * len(rows), 0
    ensemble = len(rows) - (2 if args.tta else 1) if args.ensemble else None         # it comes last
    for n, target, labels in data.progress(label_split(networks, pairs, dtype, args.workers), "scoring", total=len(pairs)):
        pixels += target.numel()
        for k, mine in enumerate(labels):
            matrix = confusion(mine, target, len(classes))
            matrices[k] += matrix
            if args.save_worst and matrix.any():
                entry = summary(matrix, classes)["miou_present"], n, mine.cpu()
                worst[k] = sorted([*worst[k], entry], key=lambda e: e[:2])[:args.save_worst]
            agree[k] += int((mine == labels[ensemble]).sum()) if ensemble is not None else 0
    for k, row in enumerate(rows):
        row.update(summary(matrices[k], classes))
        chart = draw_confusion(matrices[k].cpu(), classes, f"{row['name']}, {pairs.split}")
        data.save_image(Path(args.out) / f"confusion_{file_name(row)}.png", chart)
        folder = Path(args.out) / f"worst_{file_name(row)}"
        for old in folder.glob("[01].[0-9][0-9][0-9]_*.png") if worst[k] else []:
            old.unlink()                                      # of an earlier evaluation
        for score, n, labels in worst[k]:
            sheet = folder / f"{score:.3f}_{pairs.pairs[n][0].stem}.png"
            data.save_image(sheet, worst_sheet(pairs, n, labels))
    for row, same in zip(rows, agree, strict=True) if ensemble is not None else []:
        row["to_ensemble"], row["agreement"] = row["miou"] - rows[ensemble]["miou"], same / pixels


def measure_speed(rows, networks, pairs, device, dtype):
    """Fills in ms and FPS of predict() at 512x512 and at what the first image becomes; returns both (h, w)."""
    width, height = data.whole_size(*pairs.sizes[0], networks[0][1])
    sizes = [(512, 512), (height, width)]
    for row in rows:
        row["speed"] = []
    for h, w in sizes:
        image = torch.zeros(1, 3, h, w, dtype=torch.uint8, device=device)
        calls = [functools.partial(predict, model, image, (h, w), dtype, flip) for model, _, flip in networks]
        for row, (median, low, high) in zip(rows, time_interleaved(calls, device), strict=True):
            row["speed"].append({"height": h, "width": w, "ms": median, "lowest": low, "highest": high, "fps": 1000 / median})
    for row in rows:
        row["ms"], row["fps"] = row["speed"][0]["ms"], row["speed"][0]["fps"]
    return sizes


if __name__ == "__main__":
    main(sys.argv[1:])
