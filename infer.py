"""Labels images, and exports a network for use elsewhere.

    python infer.py img.png                                   # -> outputs/predictions/img_mask.png, img_overlay.png
    python infer.py folder 'more/*.jpg' --checkpoint outputs/best_student.pth --raw
    python infer.py --export student_hf                       # a Hugging Face folder (SegFormer only)
    python infer.py --export student.onnx --shape 512x896     # uint8 NCHW images in, uint8 labels out
    python infer.py --export student.int8.onnx --calibrate DIR --data DIR

From a 960x540 file to labels at 512x896: 385 ms on two CPU cores in bf16, 2.6 times as fast as transformers' pipeline
in fp32 with the same weights; labels equal on 99.98 % of the pixels (README, "Speed").

A mask is a palette PNG: viewers show the class colours, np.asarray gives the class indices. Labels are those of
validation: the same reader, the same preprocessing, the same predict().
"""
import contextlib
import glob
import importlib
import io
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors import SafetensorError
from torch import nn

import data
from evaluate import add_model_flags, confusion, pick_device, print_columns, summary, time_interleaved
from models import amp_dtype, freeze, load_model, predict, upsampled_labels


# ---------------------------------------------------------------------------------------------- labelling files
def find_inputs(names):
    """Files, folders and glob patterns -> a list of image files; a Fault where nothing is found."""
    found = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in data.IMAGES | {".tif", ".tiff"} and not p.name.startswith("."))
            if not inside:
                raise data.Fault(f"{path}: a folder without images ({' '.join(sorted(data.IMAGES))} .tif .tiff)")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            matches = sorted(Path(p) for p in glob.glob(name, recursive=True) if Path(p).is_file())
            if not matches:
                raise data.Fault(f"{name}: no such file, folder or pattern")
            found += matches
    return list({path.absolute(): path for path in found}.values())


def output_names(inputs, out, endings):
    """A stem in `out` for each input: inputs of the same name get _2, _3, ...; no output may be an input."""
    taken, stems, originals = set(), [], {p.resolve() for p in inputs}
    for path in inputs:
        stem, count = path.stem, 1
        while stem in taken:
            count += 1
            stem = f"{path.stem}_{count}"
        taken.add(stem)
        stems.append(stem)
        clash = next((e for e in endings if (out / f"{stem}{e}").resolve() in originals), None)
        if clash:
            raise data.Fault(f"--out {out}: {stem}{clash} would overwrite an input; choose another folder")
    return stems


def label_files(args, model, meta, device, dtype):
    """Writes mask and overlay of every input; a Fault of status 1 at the end if any was skipped."""
    inputs, out, classes = find_inputs(args.inputs), Path(args.out), meta["classes"]
    stems = output_names(inputs, out, ["_mask.png", *["_overlay.png"] * (not args.no_overlay), *["_ids.png"] * args.raw])
    ids = np.array([c["id"] for c in classes], np.uint16)
    milliseconds, skipped = [], 0
    bar = data.progress(zip(inputs, stems, strict=True), "labelling", total=len(inputs))
    for path, stem in bar:
        start = time.perf_counter()
        try:
            image = data.read_image(path)
        except data.Fault as fault:
            bar.clear()                                       # tqdm's own write would draw the bar again
            print(f"error: {fault}; skipped", file=sys.stderr)
            skipped += 1
            continue
        labels = predict(model, data.whole_image(image, args.size or meta["size"]), image.size[::-1], dtype)[0].cpu().numpy()
        milliseconds.append(1000 * (time.perf_counter() - start))
        outputs = {"_mask.png": data.index_image(labels, classes)}
        if not args.no_overlay:
            outputs["_overlay.png"] = data.overlay(image, labels, classes)
        if args.raw:
            outputs["_ids.png"] = Image.fromarray(ids[labels])
        for ending, output in outputs.items():
            data.save_image(out / f"{stem}{ending}", output)
    if milliseconds:
        print(f"{len(milliseconds)} image(s) labelled in {out}, {np.median(milliseconds):.0f} ms an image "
              f"from file to labels ({device.type})")
    if skipped:
        raise data.Fault(f"{skipped} of {len(inputs)} files were skipped, named above", status=1)


# ---------------------------------------------------------------------------------------------- Hugging Face
def export_folder(model, meta, folder, height, width):
    """config.json with label names, weights in safetensors, preprocessor_config.json for a fixed height x width."""
    if folder.is_file() or (folder.suffix and not folder.is_dir()):
        raise data.Fault(f"--export {folder}: is a file or named like one; name a folder, FILE.onnx or FILE.int8.onnx")
    if meta["arch"] == "deeplab":
        raise data.Fault(f"--export {folder}: only SegFormer has a Hugging Face form; export a DeepLab to a .onnx file")
    stock = transformers.SegformerForSemanticSegmentation(model.config)
    stock.load_state_dict(model.state_dict())
    processor = transformers.SegformerImageProcessor(size={"height": height, "width": width}, do_reduce_labels=False,
                                                     image_mean=list(data.MEAN), image_std=list(data.STD))
    transformers.logging.disable_progress_bar()
    try:
        stock.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)           # written for the owner's eyes only
    except (OSError, SafetensorError) as error:
        raise data.Fault(f"--export {folder}: cannot be written ({data.brief(error)}); choose another folder", status=1) from None
    print(f"{folder}: loads with AutoModelForSemanticSegmentation.from_pretrained and in pipeline('image-segmentation'), "
          f"images as {height}x{width}")


# ---------------------------------------------------------------------------------------------- ONNX
class Labeller(nn.Module):
    """A network with all that belongs to it inside: uint8 (B, 3, H, W) RGB images -> uint8 (B, H, W) class indices."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        return upsampled_labels(self.model(data.normalize(image)), image.shape[2:])


def needs(*modules):
    """Imports optional packages, or says in one line what to install."""
    try:
        return [importlib.import_module(module) for module in modules]
    except ImportError as error:
        raise data.Fault(f"--export: {error.name} is not installed; pip install onnx onnxscript onnxruntime") from None


def session_of(content):
    """An onnxruntime session of an ONNX file's bytes, with torch's number of threads."""
    onnxruntime, = needs("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")         # idle threads would slow what is timed in turn
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def export_onnx(model, path, shape, dynamic=False):
    """Writes `path`, once it gives torch's labels on noisy ramps. `shape`: (H, W); `dynamic`: sides are chosen at run time."""
    needs("onnx", "onnxscript", "onnxruntime")
    height, width = shape
    labeller, image = Labeller(model).eval(), torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
    sides = None if not dynamic else {"image": {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}}
    buffer = io.BytesIO()
    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(labeller, (image,), dynamo=True, dynamic_shapes=sides, input_names=["image"], output_names=["labels"],
                                    optimize=True, verbose=False)
        program.save(buffer)
    session = session_of(buffer.getvalue())
    for h, w in [shape, (480, 640), (320, 544)] if dynamic else [shape]:
        image = (torch.linspace(0, 255, w) + 40 * torch.randn(1, 3, h, w)).clamp(0, 255).to(torch.uint8)
        same = (torch.from_numpy(session.run(None, {"image": image.numpy()})[0]) == labeller(image)).float().mean().item()
        print(f"onnx fp32 at {h}x{w}: {100 * same:.3f} % of the labels equal torch's")
        if same < 0.999:
            raise data.Fault(f"{path}: differs from torch on {100 * (1 - same):.2f} % of the pixels and was not written; "
                             "try another torch or onnxruntime", status=1)
    data.write_atomic(path, lambda file: file.write(buffer.getvalue()))


def quantize(path, target, images):
    """Weights and activations of the ONNX file `path` in 8 bits, calibrated on `images`, uint8 (1, 3, H, W) arrays.

    Attention's products, softmax and norms stay in float: quantised they cost more than they save."""
    onnx, quantization, shape_inference = needs("onnx", "onnxruntime.quantization", "onnxruntime.quantization.shape_inference")

    class Reader(quantization.CalibrationDataReader):
        feeds = iter([{"image": image} for image in images])

        def get_next(self):
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as temporary:
        ready = Path(temporary) / "ready.onnx"
        shape_inference.quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
        floats = [node.name for node in onnx.load(ready).graph.node if node.op_type in ("MatMul", "Softmax", "LayerNormalization")]
        quantization.quantize_static(str(ready), str(target), Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
                                     activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
                                     nodes_to_exclude=floats)


def compare(pairs, rows, height, width):
    """mIoU on a split, milliseconds and size of each row {name: (labels of a uint8 image, file size)}."""
    classes = pairs.classes
    matrices = {name: torch.zeros(len(classes), len(classes), dtype=torch.int64) for name in rows}
    for n in range(len(pairs)):
        stored, mask = pairs.read(n)
        image, target = data.resized_image(stored, width, height), torch.from_numpy(mask)
        for name, (labels, _) in rows.items():
            full = F.interpolate(labels(image)[None], target.shape, mode="nearest-exact")[0, 0]
            matrices[name] += confusion(full, target, len(classes))
    times = time_interleaved([lambda labels=labels: labels(image) for labels, _ in rows.values()], torch.device("cpu"))
    print(f"{pairs.split} of {len(pairs)} pairs at {height}x{width}, {torch.get_num_threads()} threads, median of interleaved runs\n")
    print_columns([["network", "mIoU", "ms", "spread", "MB"]] + [
        [name, f"{summary(matrices[name], classes)['miou']:.4f}", f"{median:.1f}", f"{low:.1f}-{high:.1f}", f"{size / 1e6:.1f}"]
        for (name, (_, size)), (median, low, high) in zip(rows.items(), times, strict=True)])


def parse_shape(value):
    """"512x896" -> (512, 896)."""
    parts = value.split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and 32 <= int(part) <= 8192 and int(part) % 32 == 0 for part in parts):
        raise data.Fault(f"--shape {value}: give HEIGHTxWIDTH in multiples of 32, such as 512x896, or dynamic")
    return int(parts[0]), int(parts[1])


def export(args, model, meta):
    width, height = data.whole_size(*meta["image_size"], args.size or meta["size"])
    target, dynamic = Path(args.export), args.shape == "dynamic"
    if args.shape and not dynamic:
        height, width = parse_shape(args.shape)
    if target.suffix != ".onnx":
        export_folder(model, meta, target, height, width)
        return
    frozen = freeze(model, meta["arch"])
    if not target.name.endswith(".int8.onnx"):
        export_onnx(frozen, target, (height, width), dynamic)
        print(f"{target}: takes uint8 images of (1, 3, {'H, W), H and W multiples of 32' if dynamic else f'{height}, {width})'}")
        return
    if not args.calibrate:
        raise data.Fault(f"--export {target}: 8 bits need --calibrate DIR, a folder of images like those to come")
    if dynamic:
        raise data.Fault(f"--shape dynamic: 8 bits need fixed sides, such as {height}x{width}")
    # everything is read before anything is written
    pairs = data.Pairs(data.find_data(args.data), args.split, meta["classes"], args.masks)
    files = find_inputs([args.calibrate])
    images = [data.resized_image(data.read_image(p), width, height).numpy() for p in files[::max(1, len(files) // 64)][:64]]
    rows = {"torch fp32": (Labeller(frozen).eval(), Path(args.checkpoint).stat().st_size)}
    with tempfile.TemporaryDirectory() as temporary:
        plain, small = Path(temporary) / "fp32.onnx", Path(temporary) / "int8.onnx"
        export_onnx(frozen, plain, (height, width))
        quantize(plain, small, images)
        data.write_atomic(target, lambda file: file.write(small.read_bytes()))
        for name, path in (("onnx fp32", plain), ("onnx int8", small)):
            session = session_of(path.read_bytes())
            rows[name] = (lambda image, s=session: torch.from_numpy(s.run(None, {"image": image.numpy()})[0]), path.stat().st_size)
    compare(pairs, rows, height, width)
    print(f"{target}: takes uint8 images of (1, 3, {height}, {width})")


# ---------------------------------------------------------------------------------------------- command
@data.command
@torch.no_grad()
def main(argv=()):
    parser = data.Parser(__doc__.split("\n\n")[0], epilog="example: python infer.py drive/*.png --out labels --raw")
    parser.add_argument("inputs", nargs="*", metavar="IMAGE", help="files, folders, patterns")
    group = add_model_flags(parser)
    group.add_argument("--checkpoint", default="outputs/best_student.pth", metavar="CKPT", help="the network (outputs/best_student.pth)")
    group.add_argument("--size", type=data.side, help="shorter side that the network sees, pixels (that of training)")
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="DIR", default="outputs/predictions", help="where labels go (outputs/predictions)")
    output.add_argument("--raw", action="store_true", help="also NAME_ids.png: 16-bit raw ids, as the challenge wants them")
    output.add_argument("--no-overlay", action="store_true", help="masks only")
    images = data.add_data_flags(parser)
    images.add_argument("--split", default="val", help="what an int8 export is compared on (val)")
    away = parser.add_argument_group("export")
    away.add_argument("--export", metavar="TARGET", help="a folder (Hugging Face), FILE.onnx, or FILE.int8.onnx")
    away.add_argument("--shape", metavar="HxW|dynamic",
                      help="sides of the exported input (of a whole image in training; 512x896 for 960x540 at 512)")
    away.add_argument("--calibrate", metavar="DIR", help="images for 8 bits, at most 64 of them are used")
    args = parser.parse_args(argv)
    if args.calibrate and not (args.export or "").endswith(".int8.onnx"):
        raise data.Fault(f"--calibrate {args.calibrate}: is for 8 bits; name --export FILE.int8.onnx")
    if args.shape and not args.export:
        raise data.Fault(f"--shape {args.shape}: is for an export; name --export TARGET, or say --size to label images")
    if not args.inputs and not args.export:
        raise data.Fault("nothing to do: name images, or --export TARGET")
    if args.inputs and args.export:
        raise data.Fault(f"--export {args.export}: labels no images ({args.inputs[0]}); do one after the other")
    device = pick_device("cpu" if args.export else args.device)
    model, meta = load_model(args.checkpoint, args.arch, data.load_classes(args.classes) if args.classes else None)
    if args.export:
        export(args, model, meta)
        return
    dtype = amp_dtype(args.amp, device)
    label_files(args, freeze(model.to(device), meta["arch"], dtype), meta, device, dtype)


if __name__ == "__main__":
    main(sys.argv[1:])
