"""Distils a light student from the weighted ensemble of its teachers.

    python distill.py --T 2 --alpha 0.3:0.7                   # outputs/{deep_lab,best_model}.pth -> best_student.pth
    python distill.py --cache-teachers                        # the teachers' answers are computed once and kept
    python distill.py --demo                                  # everything in miniature, on drawn images
    python distill.py --bench                                 # what a step costs here, beside the usual notebook's

    L = a * (kl * KL + cwd * CWD) + (1 - a) * CE + feature * F + attention * A,   a from --alpha's start to its end

Measured on 203 real pairs at --size 128, 40 epochs from random weights, about 10 minutes on one CPU core: mIoU .346 for
the student alone, .389 with --init teacher, .320 with the KL of the original (README, "Ablation").

In a notebook: student, history = distill.main("--T 2 --alpha 0.3:0.7".split())

Letters: B batch, C classes, S crop side, K teachers, h w = a map's sides at stride 4.
"""
import hashlib
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from transformers import SegformerForSemanticSegmentation

import data
import evaluate
import train_teacher
from losses import attention_loss, cwd_loss, feature_loss, hard_loss, ramp, soft_loss
from models import Ensemble, SegFormer, amp_dtype, autocast, build, freeze, load_model, logits, old_key, predict
from train_teacher import fit, open_data, open_run, processes

TEACHERS = [f"{name}.pth" for name in evaluate.TEACHER_NAMES.values()]


# ---------------------------------------------------------------------------------------------- flags
def parse_alpha(value):
    """"0.3:0.7" -> (0.3, 0.7); "0.5" -> (0.5, 0.5)."""
    try:
        ends = [float(v) for v in value.split(":")]
    except ValueError:
        ends = []
    if len(ends) not in (1, 2) or not all(0 <= v <= 1 for v in ends):
        raise data.Fault(f"--alpha {value}: give START:END or one number, each in 0..1, such as 0.3:0.7")
    return ends[0], ends[-1]


def make_parser():
    parser = data.Parser(__doc__.split("\n\n")[0], epilog="example: python distill.py --data DIR --T 2 --alpha 0.3:0.7 --cache-teachers")
    group = evaluate.add_model_flags(parser, "segformer-b1")
    group.add_argument("--init", default="imagenet", metavar="imagenet|random|teacher|PATH", help="the student's first weights; teacher: "
                       "embeddings, norms and an even choice of a SegFormer teacher's blocks (imagenet)")
    group.add_argument("--teachers", nargs="+", metavar="CKPT", help="their checkpoints (deep_lab.pth and best_model.pth in --out)")
    kd = parser.add_argument_group("distillation")
    positive, weight = data.number(float, 0, 1000, open_low=True), data.number(float, 0, 1e6)
    kd.add_argument("--T", type=positive, default=2.0, help="temperature of the soft loss (2, Hinton et al. 2015)")
    kd.add_argument("--alpha", type=parse_alpha, default="0.3:0.7", metavar="START:END",
                    help="share of the soft losses over the run (0.3:0.7)")
    kd.add_argument("--teacher-weights", default="equal", metavar="A:B:..|auto", help="auto: by class, from validation IoU (equal)")
    kd.add_argument("--average", choices=["logits", "probs"], default="logits", help="what the ensemble averages (logits)")
    kd.add_argument("--kl", type=weight, default=1.0, help="weight of KL, the loss per pixel (1)")
    kd.add_argument("--cwd", type=weight, default=0.0, help="weight of the channel-wise loss, its temperature is 4 (0, Shu et al. 2021)")
    kd.add_argument("--feature", type=weight, default=0.0, help="weight of the loss between stages' features (0, Romero et al. 2015)")
    kd.add_argument("--attention", type=weight, default=0.0, help="weight of attention transfer (0, Zagoruyko and Komodakis 2017)")
    kd.add_argument("--cache-teachers", action="store_true",
                    help="teachers see each whole image once; their maps are warped like the crops")
    train_teacher.add_train_flags(parser)
    whole = parser.add_argument_group("instead of a run")
    whole.add_argument("--demo", action="store_true", help="draw scenes, train all three networks in miniature with settings of its own")
    whole.add_argument("--bench", action="store_true", help="time every piece of a step at --size, --batch-size, --amp, --compile")
    return parser


# ---------------------------------------------------------------------------------------------- teachers
def needs_teachers(args):
    """Whether any term of the teachers' counts; where none does, they are not even loaded."""
    return bool(args.feature or args.attention) or (max(args.alpha) > 0 and bool(args.kl or args.cwd))


def file_digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def load_teachers(args):
    """(digests, [(network, meta)]) of --teachers, or of the two that train_teacher.py writes to --out."""
    paths, classes = args.teachers or [Path(args.out) / name for name in TEACHERS], data.load_classes(args.classes)
    loaded = [load_model(path, classes=classes, flag="--teachers") for path in paths]
    return [file_digest(path) for path in paths], loaded


def start_from_teacher(student, teachers):
    """Copies a SegFormer teacher's encoder into a student of the same widths: embeddings, norms, and for each of the
    student's blocks one of the teacher's, evenly chosen from first to last (as DistilBERT, Sanh et al. 2019, section 3)."""
    fitting = [t for t in teachers if isinstance(t, SegFormer) and isinstance(student, SegFormer)
               and t.config.hidden_sizes == student.config.hidden_sizes]
    if not fitting:
        raise data.Fault("--init teacher: no teacher is a SegFormer with the student's widths; use imagenet, random or a path")
    teacher = fitting[0]
    source = {old_key(key): value for key, value in teacher.state_dict().items()}
    state = student.state_dict()
    for key in state:
        parts = old_key(key).split(".")
        if parts[0] == "decode_head":
            continue
        if parts[2] == "block":                               # segformer.encoder.block.STAGE.BLOCK. ...
            stage, block = int(parts[3]), int(parts[4])
            mine, theirs = student.config.depths[stage], teacher.config.depths[stage]
            parts[4] = str(round(block * (theirs - 1) / max(1, mine - 1)))
        state[key] = source[".".join(parts)].clone()
    student.load_state_dict(state)


def make_adapters(student, teachers):
    """For each teacher and stage a 1x1 convolution from the student's width to the teacher's, or nothing if they agree."""
    x = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        mine, *theirs = [model.eval()(x, features=True)[1] for model in (student, *teachers)]
    return nn.ModuleList(nn.ModuleList(nn.Identity() if s.shape[1] == t.shape[1] else nn.Conv2d(s.shape[1], t.shape[1], 1)
                                       for s, t in zip(mine, stages, strict=True)) for stages in theirs)


# ---------------------------------------------------------------------------------------------- the loss
def make_loss(args, class_weight, teach=None, adapters=None):
    """The distillation loss as fit() takes it. teach(batch) -> (teachers' logits, K lists of their stages), or None."""
    def loss(forward, batch, progress):
        alpha = ramp(*args.alpha, progress)
        z, stages = forward(batch.image, features=True)
        hard = hard_loss(z, batch.mask, class_weight, batch.weight_sum)
        total, parts = (1 - alpha) * hard, {"hard": hard, "alpha": alpha}
        if teach is None:
            return total, parts
        z_t, teacher_stages = teach(batch)
        if args.kl:
            soft, parts["logits_clamped"], parts["soft_clamped"] = soft_loss(z, z_t, batch.mask, args.T, batch.valid)
            total, parts["soft"] = total + alpha * args.kl * soft, soft
        if args.cwd:
            parts["cwd"] = cwd_loss(z, z_t, batch.mask) * batch.share
            total = total + alpha * args.cwd * parts["cwd"]
        if args.feature:
            each = [feature_loss([adapt(s) for adapt, s in zip(adapter, stages, strict=True)], theirs)
                    for adapter, theirs in zip(adapters, teacher_stages, strict=True)]
            parts["feature"] = sum(each) / len(each) * batch.share
            total = total + args.feature * parts["feature"]
        if args.attention:
            parts["attention"] = sum(attention_loss(stages, theirs) for theirs in teacher_stages) / len(teacher_stages) * batch.share
            total = total + args.attention * parts["attention"]
        return total, parts
    return loss


# ---------------------------------------------------------------------------------------------- the teacher cache
class Cache:
    """The ensemble's logits of every whole training image, float16 at stride 4, in one memory-mapped file.

    Built in one pass that goes on where it was cut off; `key` names all that the maps depend on, and a cache under another
    key is replaced. Teachers see the whole clean image here, not the jittered crop."""

    def __init__(self, folder, key, pairs, size):
        self.folder, self.key, self.pairs = Path(folder), train_teacher.as_json(key), pairs
        classes = len(pairs.classes)
        self.shapes = [(classes, h // 4, w // 4) for w, h in (data.whole_size(*s, size) for s in pairs.sizes)]
        self.starts = np.cumsum([0] + [int(np.prod(shape)) for shape in self.shapes])
        self.sizes = torch.tensor(pairs.sizes, dtype=torch.float32)                  # (N, 2) width, height
        self.size = size

    def open(self, world):
        """Maps the files; an old cache under another key is replaced. Returns which images are still to do."""
        key_file, values, done = (self.folder / f"teacher_cache.{end}" for end in ("json", "f16", "done"))
        with world.first():
            try:
                stale = json.loads(key_file.read_text()) != self.key or \
                    (values.stat().st_size, done.stat().st_size) != (2 * self.starts[-1], len(self.pairs))
            except (OSError, ValueError):
                stale = True
            if stale:
                self.create(key_file, values, done)
        self.values = np.memmap(values, np.float16, "r+")
        self.done = np.memmap(done, np.uint8, "r+")
        return np.flatnonzero(self.done == 0).tolist()

    def create(self, key_file, values, done):
        for path in (key_file, values):
            path.unlink(missing_ok=True)
        need, free = 2 * int(self.starts[-1]), shutil.disk_usage(self.folder).free
        if need > free:
            raise data.Fault(f"--cache-teachers: {values} needs {need / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; "
                             "free some or use another --out")
        try:
            for path, length in ((values, need), (done, len(self.pairs))):
                with open(path, "wb") as file:
                    file.truncate(length)
        except OSError as error:
            raise data.Fault(f"{values}: cannot be written ({error.strerror}); free {need / 1e6:.0f} MB or use another --out",
                             status=1) from None
        data.write_atomic(key_file, lambda file: file.write(json.dumps(self.key).encode()))

    def build(self, ensemble, world, dtype, workers):
        """Fills in what is missing, split over the processes; says beforehand what it takes."""
        todo = self.open(world)
        mine = todo[world.rank::world.size]
        if mine:
            images = data.loader(data.WholeImages(self.pairs, [self.size]), workers, world.device.type == "cuda", mine)
            for n, (n_pair, (image,), _) in enumerate(data.progress(images, "teachers", total=len(mine))):
                if n == 1:
                    start = time.perf_counter()               # the first image takes longer, and waits for the workers
                if n == 2:
                    world.say(f"teacher cache: {len(todo)} of {len(self.pairs)} images to compute, {2 * self.starts[-1] / 1e6:.0f} MB in "
                              f"{self.folder}, about {(time.perf_counter() - start) * len(mine) / 60:.1f} minutes, once")
                z = logits(ensemble, image, dtype)[0].clamp(-6e4, 6e4)
                self.values[self.starts[n_pair]:self.starts[n_pair + 1]] = z.cpu().half().numpy().ravel()
                self.done[n_pair] = 1
            self.values.flush()
        world.agree(0)                                        # until every process has filled in its share

    @torch.no_grad()
    def crops(self, batch):
        """The maps of a batch, warped by the samples' own matrices: (B, C, S/4, S/4) float32. Cells outside the image
        repeat its border; the mask ignores them."""
        device, index = batch.image.device, batch.pair.tolist()
        at = (torch.arange(self.size // 4, device=device) + 0.5) * 4
        y, x = torch.meshgrid(at, at, indexing="ij")
        centres = torch.stack([x, y, torch.ones_like(x)], -1)                        # crop coordinates of the cells
        places = (batch.matrix[:, None, None] * centres[..., None, :]).sum(-1)       # (B, h, w, 2) image coordinates
        grid = 2 * places / self.sizes[index].to(device)[:, None, None] - 1
        maps = [torch.from_numpy(self.values[self.starts[n]:self.starts[n + 1]].reshape(1, *self.shapes[n])) for n in index]
        return torch.cat([F.grid_sample(m.to(device, non_blocking=True).float(), g[None], padding_mode="border", align_corners=False)
                          for m, g in zip(maps, grid, strict=True)])


# ---------------------------------------------------------------------------------------------- the run
def make_teach(args, world, train, student, digests, loaded):
    """(teach as make_loss takes it, adapters or None) for loaded teachers."""
    dtype, stages = amp_dtype(args.amp, world.device), bool(args.feature or args.attention)
    weights = evaluate.ensemble_weights(args.teacher_weights, [meta for _, meta in loaded])
    adapters = make_adapters(student, [model for model, _ in loaded]) if args.feature else None
    frozen = [freeze(model.to(world.device), meta["arch"], dtype) for model, meta in loaded]
    ensemble = Ensemble(frozen, weights, args.average).to(world.device)
    if not args.cache_teachers:
        answer = torch.compile(ensemble) if args.compile else ensemble

        def teach(batch):
            return answer(batch.image, features=True) if stages else (answer(batch.image), [])
        return teach, adapters
    key = {"teachers": digests, "weights": weights.tolist(), "average": args.average, "data": train.digest,
           "size": args.size, "images": [f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p, _ in train.pairs],
           "precision": str(dtype), "format": 1}
    cache = Cache(args.out, key, train, args.size)
    cache.build(ensemble, world, dtype, args.workers)
    return lambda batch: (cache.crops(batch), []), adapters


def check_flags(args):
    """What argparse cannot see, before anything is read."""
    if args.teacher_weights not in ("equal", "auto"):
        evaluate.parse_weights(args.teacher_weights, len(args.teachers or TEACHERS))
    if args.cache_teachers and (args.feature or args.attention):
        raise data.Fault("--cache-teachers keeps the teachers' logits only; --feature and --attention need the teachers themselves, "
                         "leave it out")
    if args.bench and (args.feature or args.attention):
        raise data.Fault("--bench times the logit signals; leave --feature and --attention out")


@data.command
def main(argv=()):
    args = make_parser().parse_args(argv)
    check_flags(args)
    if args.demo:
        return demo(args)
    if args.bench:
        return bench(args)
    data.find_data(args.data)                                 # a beginner lacks this first, and the message knows --demo
    with processes(args.device) as world:
        digests, loaded = load_teachers(args) if needs_teachers(args) or args.init == "teacher" else ([], [])
        train, val, class_weight = open_data(args, world)
        name = "best_student" if args.arch == "segformer-b1" else f"student_{args.arch}"
        run = open_run(name, args, world, train, val, digests)                       # before the cache: a refused run changes nothing
        torch.manual_seed(args.seed)
        student = build(args.arch, train.classes, "random" if args.init == "teacher" else args.init)
        if args.init == "teacher":
            start_from_teacher(student, [model for model, _ in loaded])
        teach, adapters = (None, None) if run.done or not needs_teachers(args) else \
            make_teach(args, world, train, student, digests, loaded)
        return fit(student, run, make_loss(args, class_weight, teach, adapters), train, val, args, world, class_weight, adapters)


# ---------------------------------------------------------------------------------------------- the demo
def demo(args):
    """Scenes, both teachers, the student, the comparison and an overlay, offline and small."""
    out = Path("outputs/demo" if args.out == "outputs" else args.out)
    steps = args.steps or 60
    print(f"demo: draws 40 desert scenes, trains DeepLabV3+ and SegFormer-B3 for {steps} steps each at 96 pixels, distils SegFormer-B1,\n"
          f"compares the three and labels a scene; about three minutes on two cores, everything goes to {out}. Scores mean nothing here:\n"
          "the scenes are drawn and the networks start from random weights.", flush=True)
    if not (out / "data").is_dir():
        data.write_scenes(out / "drawing", train=32, val=8, width=480, height=270)
        (out / "drawing").rename(out / "data")                # whole or not at all
    where = ["--data", str(out / "data"), "--out", str(out), "--device", args.device, "--amp", args.amp]
    common = [*where, "--init", "random", "--size", "96", "--steps", str(steps), "--lr", "1e-3", "--batch-size", "4",
              "--eval-every", "4", "--class-weights", "sqrt", "--seed", str(args.seed), *["--overwrite"] * args.overwrite]
    train_teacher.main(["--arch", "deeplab", *common])
    train_teacher.main(["--arch", "segformer", *common])
    student, history = main(["--T", str(args.T), "--alpha", "{}:{}".format(*args.alpha), *common])
    checkpoints = [str(out / name) for name in (*TEACHERS, "best_student.pth")]
    evaluate.main([*checkpoints, *where, "--workers", "0"])
    path = min((out / "data" / "val" / "Color_Images").iterdir())
    image, (model, meta) = data.read_image(path), load_model(checkpoints[-1])
    labels = predict(model, data.whole_image(image, meta["size"]), image.size[::-1])[0].numpy()
    data.save_image(out / "overlay.png", data.overlay(image, labels, meta["classes"]))
    print(f"\nlook at {out / 'overlay.png'} and {out / 'training_curves.png'}")
    return student, history


# ---------------------------------------------------------------------------------------------- the bench
def original_step(device, dtype, batch, class_weight, classes):
    """The step of the notebook that this project replaces, as a function to time: torchvision's DeepLabV3 at output
    stride 8 and transformers' SegFormers as they come, fp32 off a GPU, every map of logits brought to full size."""
    deeplab = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=len(classes))
    teacher, student = (SegformerForSemanticSegmentation(build(arch, classes).config) for arch in ("segformer-b3", "segformer-b1"))
    deeplab, teacher, student = deeplab.to(device).eval(), teacher.to(device).eval(), student.to(device).train()
    optimizer = torch.optim.AdamW(student.parameters(), 6e-5)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    dtype = dtype if device.type == "cuda" else None

    def full(z):
        return F.interpolate(z.float(), batch.mask.shape[1:], mode="bilinear", align_corners=False)

    def step():
        with autocast(device, dtype):
            with torch.no_grad():
                z_t = 0.5 * full(deeplab(batch.image)["out"]) + 0.5 * full(teacher(batch.image).logits)
            z_s = full(student(batch.image).logits)
            soft = F.kl_div((z_s / 2).log_softmax(1), (z_t / 2).softmax(1), reduction="none").sum(1).mean() * 4
            loss = 0.5 * soft + 0.5 * F.cross_entropy(z_s, batch.mask, class_weight, ignore_index=255)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()
    return step


def bench_pieces(args, world, pairs, folder):
    """{piece of a training step: a call that does it once}, all on one batch; "bare" is a network with nothing around it."""
    device, classes, dtype = world.device, pairs.classes, amp_dtype(args.amp, world.device)
    crops = data.Crops(pairs, args.size, args.seed)
    batch: data.Batch = data.collate([crops[0, n, n] for n in range(args.batch_size)])
    ready, class_weight = data.to_device(batch, device), data.class_weights(pairs.counts).to(device)
    frozen = {arch: freeze(build(arch, classes).to(device), arch, dtype) for arch in ("deeplab", "segformer-b3")}
    teachers = Ensemble(list(frozen.values()), torch.ones(2), args.average).to(device)
    compiled = torch.compile if args.compile else lambda network: network
    answer, bare = compiled(teachers), {arch: compiled(network) for arch, network in frozen.items()}
    cache = Cache(folder, {"bench": 0}, pairs, args.size)
    cache.build(teachers, world, dtype, 0)

    def student(teach):
        return train_teacher.make_job(build("segformer-b1", classes), "segformer-b1", make_loss(args, class_weight, teach), class_weight,
                                      world, dtype, args.lr, args.seed, compiled=args.compile)

    def whole_step(teach):
        job, sums = student(teach), {}
        return lambda: train_teacher.train_step(job, [batch], 1, 100, sums)

    def bare_teacher(network):
        with torch.no_grad(), autocast(device, dtype):
            return network(ready.image)

    job, fixed = student(None), bare_teacher(teachers)

    def bare_student():
        with autocast(device, dtype):
            z = job.forward(ready.image)
            loss = 0.5 * soft_loss(z, fixed, ready.mask, 2.0)[0] + 0.5 * hard_loss(z, ready.mask, class_weight)
        job.scaler.scale(loss).backward()
        job.scaler.step(job.optimizer)
        job.scaler.update()
        job.optimizer.zero_grad(set_to_none=True)

    return {"step online": whole_step(lambda b: (answer(b.image), [])), "step cached": whole_step(lambda b: (cache.crops(b), [])),
            "student alone": whole_step(None), "bare student": bare_student,
            **{f"bare {arch}": lambda network=network: bare_teacher(network) for arch, network in bare.items()},
            "original step": original_step(device, dtype, ready, class_weight, classes)}


def bench(args):
    """Prints what each piece of a step costs on this device, interleaved, and the ratios that matter. Needs no data."""
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as folder, processes(args.device) as world:
        device = world.device
        data.write_scenes(folder, train=max(8, args.batch_size), val=1)
        pairs = data.Pairs(folder, "train", data.load_classes())
        calls, rng = bench_pieces(args, world, pairs, Path(folder)), np.random.default_rng(args.seed)
        files = {"decode a pair": lambda: (data.read_image(pairs.pairs[0][0]), data.read_mask(pairs.pairs[0][1])),
                 "loader, a pair": lambda: pairs.crop(0, args.size, data.draw_affine(rng, *pairs.sizes[0], args.size))}
        calls["step online"]()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        calls["step online"]()
        memory = train_teacher.peak_memory(device) / 1024
        times = evaluate.time_interleaved(list(calls.values()), device, seconds=8 if device.type == "cpu" else 3)
        times += evaluate.time_interleaved(list(files.values()), device, seconds=2)
    pieces = dict(zip((*calls, *files), times, strict=True))
    print(f"{evaluate.describe_device(device, amp_dtype(args.amp, device))}, {args.batch_size} crops of {args.size}x{args.size}"
          f"{', compiled' if args.compile else ''}, torch {torch.__version__}\n")
    evaluate.print_columns([["piece", "median ms", "lowest", "highest"],
                            *([piece, *(f"{v:.1f}" for v in row)] for piece, row in pieces.items())])
    ms = {piece: median for piece, (median, _, _) in pieces.items()}
    bare = sum(value for piece, value in ms.items() if piece.startswith("bare"))
    ratios = {"original / online": (ms["original step"] / ms["step online"], ">= 3.5"),
              "original / cached": (ms["original step"] / ms["step cached"], ">= 9"),
              "online / bare pieces": (ms["step online"] / bare, "<= 1.05"),
              "cached / student alone": (ms["step cached"] / ms["student alone"], "<= 1.25"),
              "augmentation, ms a pair": (ms["loader, a pair"] - ms["decode a pair"], "<= 8")}
    evaluate.print_columns([["ratio", "here", "aim"], *([what, f"{value:.2f}", aim] for what, (value, aim) in ratios.items())])
    whose = "the GPU (aim: 12 at 512x512, batch 8)" if device.type == "cuda" else "the process"
    print(f"peak memory until a step online: {memory:.2f} GiB of {whose}")
    return {**ms, **{what: value for what, (value, _) in ratios.items()}}


if __name__ == "__main__":
    main(sys.argv[1:])
