"""Distils a light student from the weighted ensemble of its teachers.

    python distill.py --T 2 --alpha 0.3:0.7      # outputs/{deep_lab,best_model}.pth -> best_student.pth
    python distill.py --cache-teachers           # the teachers see each image once, not each crop
    python distill.py --unlabelled DIR           # images without masks join in: the teachers label them
    python distill.py --demo                     # everything in miniature, on drawn images

    image --+--> DeepLabV3+ ----+--> weighted mean --> teacher logits --+
            +--> SegFormer-B3 --+                                       +--> KL at temperature T --- a ----+
            |                                                           |                              + loss
            +--> SegFormer-B1, the student ----------> student logits --+--> cross-entropy ------ 1 - a ---+
    mask --------------------------------------------> target ----------+    with class weights

    a goes from --alpha's start to its end over the run.

Measured on 203 real pairs at --size 256, 40 epochs from random weights: mIoU .353 for the student alone, .402
with --alpha 0:0 --init teacher, .345 with the KL of the original. With 51 labels and 152 images without: .170
alone, .278 with --unlabelled (.github/RESULTS.md).

In a notebook: student, history = distill.main("--T 2 --alpha 0.3:0.7".split())

Letters: B batch, C classes, S crop side, K teachers, h w = a map's sides at stride 4.
"""
import hashlib
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

import data
import evaluate
import train_teacher
from data import InputError, RunError
from losses import (attention_loss, balanced_weights, cwd_loss, feature_loss, hard_loss, hard_weights, ramp,
                    soft_loss, soft_weights)
from models import (TEACHER_NAMES, Ensemble, SegFormer, add_model_flags, amp_dtype, autocast, build,
                    compute_logits, ensemble_weights, load_model, old_key, optimize_for_inference,
                    parse_weights, predict, weights_file)
from train_teacher import State, as_json, fit, join_processes, open_data, unlabelled_of_batch

TEACHER_FILES = [f"{name}.pth" for name in TEACHER_NAMES.values()]


# ------------------------------------------------------------ targets and loss
def make_prepare(args, world, train, class_weight, ask_teachers=None):
    """prepare(batch) as fit() takes it; without `ask_teachers` the student is trained alone.

    An unlabelled image has the target 0 inside and 255 outside. Its soft weights come from that; then its
    target becomes 255 everywhere, so that no hard loss counts it."""
    def prepare(batch):
        batch = data.augment_on_device(batch, world.device)
        soft = soft_weights(batch.target)
        if train.unlabelled:
            unlabelled = (batch.indices >= len(train)).to(world.device, non_blocking=True)[:, None, None]
            batch = batch._replace(target=batch.target.masked_fill(unlabelled, data.IGNORE))
        weights = {"hard": hard_weights(batch.target, class_weight)}
        if ask_teachers is None:
            return batch._replace(weights=weights)
        weights["soft"] = soft
        teacher, stages = ask_teachers(batch)
        if args.soft_weights == "balanced":
            weights["soft"] = weights["soft"] * balanced_weights(teacher, class_weight)
        if train.unlabelled:
            weights["soft_unlabelled"] = weights["soft"] * unlabelled
        return batch._replace(weights=weights, teacher=teacher, teacher_stages=stages)
    return prepare


def make_loss(args, adapters=None):
    """loss_fn(network, batch, progress) as fit() takes it: the distillation loss of losses.py."""
    def loss_fn(network, batch, progress):
        alpha = ramp(*args.alpha, progress)
        z, stages = network(batch.image, features=True)
        hard = hard_loss(z, batch.target, batch.weights["hard"])
        loss = hard if args.hard_weight == "constant" else (1 - alpha) * hard
        parts = {"hard": hard, "alpha": alpha}
        if batch.teacher is None:
            return loss, parts
        if args.kl:
            soft, parts["logits_clamped"], parts["soft_clamped"] = soft_loss(
                z, batch.teacher, batch.weights["soft"], args.T)
            parts["soft"] = soft
            loss = loss + alpha * args.kl * soft
            if "soft_unlabelled" in batch.weights:            # of the unlabelled images alone, for the log
                with torch.no_grad():
                    parts["soft_unlabelled"], *_ = soft_loss(
                        z, batch.teacher, batch.weights["soft_unlabelled"], args.T)
        if args.cwd:
            parts["cwd"] = cwd_loss(z, batch.teacher, batch.weights["soft"])
            loss = loss + alpha * args.cwd * parts["cwd"]
        if args.feature:
            parts["feature"] = mean_over_stages(feature_loss, stages, batch.teacher_stages, adapters)
            loss = loss + args.feature * parts["feature"]
        if args.attention:
            parts["attention"] = mean_over_stages(attention_loss, stages, batch.teacher_stages)
            loss = loss + args.attention * parts["attention"]
        return loss, parts
    return loss_fn


def mean_over_stages(loss, stages, teachers, adapters=None):
    """The mean of loss(student's stage, teacher's stage) over all stages of all teachers."""
    values = []
    for k, teacher_stages in enumerate(teachers):
        for n, (own, theirs) in enumerate(zip(stages, teacher_stages, strict=True)):
            values.append(loss(own if adapters is None else adapters[k][n](own), theirs))
    return sum(values) / len(values)


# ------------------------------------------------------------ teachers
def load_teachers(args):
    """(digests of the files, [(network, meta)]) of --teachers, or of the two in --out."""
    paths = args.teachers or [Path(args.out) / name for name in TEACHER_FILES]
    classes = data.load_classes(args.classes)
    teachers = [load_model(path, classes=classes, flag="--teachers") for path in paths]
    digests = []
    for path in paths:
        with open(weights_file(path, "--teachers"), "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest()[:16])
    return digests, teachers


def make_ask_teachers(args, world, train, digests, teachers):
    """ask_teachers(batch) -> (the ensemble's logits (B, C, h, w), K lists of stages), frozen.

    With --cache-teachers this first fills the cache, and then reads from it."""
    dtype = amp_dtype(args.amp, world.device)
    weights = ensemble_weights(args.teacher_weights, [meta for _, meta in teachers])
    frozen = [optimize_for_inference(model.to(world.device), dtype) for model, _ in teachers]
    ensemble = Ensemble(frozen, weights, args.average).to(world.device)
    if args.cache_teachers:
        files = [f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in train.images]
        key = {"teachers": digests, "weights": weights.tolist(), "average": args.average, "size": args.size,
               "data": train.digest, "images": files, "precision": str(dtype)}
        cache = TeacherCache(args.out, key, train, args.size)
        cache.build(ensemble, world, dtype, args.workers)
        return lambda batch: (cache.crops(batch), [])
    network = torch.compile(ensemble) if args.compile else ensemble
    with_stages = args.feature or args.attention

    @torch.no_grad()
    def ask_teachers(batch):
        with autocast(world.device, dtype):
            return network(batch.image, features=True) if with_stages else (network(batch.image), [])
    return ask_teachers


def make_adapters(student, teachers):
    """For each teacher and stage a 1x1 convolution from the student's width to the teacher's, or nothing."""
    x = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        own_stages = student.eval()(x, features=True)[1]
        all_stages = [teacher.eval()(x, features=True)[1] for teacher in teachers]
    adapters = nn.ModuleList()
    for teacher_stages in all_stages:
        adapters.append(nn.ModuleList())
        for own, theirs in zip(own_stages, teacher_stages, strict=True):
            same = own.shape[1] == theirs.shape[1]
            adapters[-1].append(nn.Identity() if same else nn.Conv2d(own.shape[1], theirs.shape[1], 1))
    return adapters


def start_from_teacher(student, teachers):
    """Copies a SegFormer teacher's encoder into a student of the same widths: embeddings, norms, and for each
    block of the student one of the teacher's, evenly chosen (as DistilBERT, Sanh et al. 2019, section 3).

    The head starts anew: with the channels of the teacher's that its classifier weighs most, and with other
    choices of blocks, the score was the same (.github/RESULTS.md)."""
    def fits(teacher):
        return (isinstance(teacher, SegFormer) and isinstance(student, SegFormer)
                and teacher.config.hidden_sizes == student.config.hidden_sizes)

    teacher = next((teacher for teacher in teachers if fits(teacher)), None)
    if teacher is None:
        raise InputError("--init teacher: no teacher is a SegFormer with the student's widths; use imagenet, "
                         "random or a path")
    source = {old_key(key): value for key, value in teacher.state_dict().items()}
    state = student.state_dict()
    for key in state:
        parts = old_key(key).split(".")
        if parts[0] == "decode_head":
            continue
        if parts[2] == "block":                               # segformer.encoder.block.STAGE.BLOCK. ...
            stage, block = int(parts[3]), int(parts[4])
            own, theirs = student.config.depths[stage], teacher.config.depths[stage]
            parts[4] = str(round(block * (theirs - 1) / max(1, own - 1)))
        state[key] = source[".".join(parts)].clone()
    student.load_state_dict(state)


# ------------------------------------------------------------ the teacher cache
class TeacherCache:
    """The ensemble's logits of every whole training image, float16 at stride 4, in one memory-mapped file.

    `key` names all that the maps depend on; a cache with another key is replaced. Teachers see the whole
    clean image here, not the jittered crop."""

    def __init__(self, folder, key, split, size):
        self.folder, self.key, self.split = Path(folder), as_json(key), split
        self.size = size
        self.shapes = []
        for image_size in split.sizes:
            width, height = data.eval_size(*image_size, size)
            self.shapes.append((len(split.classes), height // 4, width // 4))
        self.starts = np.cumsum([0] + [int(np.prod(shape)) for shape in self.shapes])
        self.sizes = torch.tensor(split.sizes, dtype=torch.float32)                  # (N, 2) width, height

    def build(self, ensemble, world, dtype, workers):
        """Computes the missing maps, split over the processes; an interrupted build resumes here."""
        todo = self.open(world)
        mine = todo[world.rank::world.size]
        dataset = data.EvalDataset(self.split, [self.size])
        images = data.load(dataset, mine, workers, world.device.type == "cuda") if mine else ()
        start = 0.0
        for n, (index, (image,), _) in enumerate(data.progress_bar(images, "teachers", len(mine))):
            if n == 1:                                        # the first image also waits for the workers
                start = time.perf_counter()
            if n == 2:
                minutes = (time.perf_counter() - start) * len(mine) / 60
                world.print(f"teacher cache: {len(todo)} of {len(self.shapes)} images to compute, "
                            f"{2 * self.starts[-1] / 1e6:.0f} MB in {self.folder}, about {minutes:.1f} "
                            "minutes, once")
            z = compute_logits(ensemble, image, dtype)[0]
            z = z.clamp(-6e4, 6e4)                            # float16 ends at 65504
            self.values[self.starts[index]:self.starts[index + 1]] = z.cpu().half().numpy().ravel()
            self.done[index] = 1
        self.values.flush()
        world.barrier()                                       # every process has done its share

    def open(self, world):
        """Maps the files, new ones where the key has changed; returns the indices still to compute."""
        key_file, values, done = (self.folder / f"teacher_cache.{end}" for end in ("json", "f16", "done"))
        with world.rank_0_first():
            try:
                sizes = values.stat().st_size, done.stat().st_size
                valid = json.loads(key_file.read_text()) == self.key and \
                    sizes == (2 * self.starts[-1], len(self.shapes))
            except (OSError, ValueError):
                valid = False
            if not valid:
                self.create(key_file, values, done)
        self.values = np.memmap(values, np.float16, "r+")
        self.done = np.memmap(done, np.uint8, "r+")
        todo = np.flatnonzero(self.done == 0).tolist()
        world.barrier()                                       # before anyone shortens the list
        return todo

    def create(self, key_file, values, done):
        for path in (key_file, values):
            path.unlink(missing_ok=True)
        need, free = 2 * int(self.starts[-1]), shutil.disk_usage(self.folder).free
        if need > free:
            raise InputError(f"--cache-teachers: {values} needs {need / 1e6:.0f} MB, {free / 1e6:.0f} MB are "
                             "free; free some or use another --out")
        try:
            for path, length in ((values, need), (done, len(self.shapes))):
                with open(path, "wb") as file:
                    file.truncate(length)
        except OSError as error:
            raise RunError(f"{values}: cannot be written ({error.strerror}); free {need / 1e6:.0f} MB or use "
                           "another --out") from None
        data.write_atomic(key_file, json.dumps(self.key).encode())

    @torch.no_grad()
    def crops(self, batch):
        """The maps of a batch, warped by the samples' own affine maps: (B, C, S/4, S/4) float32.

        Cells outside the image repeat its border; their weight is 0."""
        device, index = batch.image.device, batch.indices.tolist()
        centres = (torch.arange(self.size // 4, device=device) + 0.5) * 4
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        cells = torch.stack([x, y, torch.ones_like(x)], -1)  # (h, w, 3) crop coordinates
        places = (batch.affine[:, None, None] * cells[..., None, :]).sum(-1)  # (B, h, w, 2) in the image
        sizes = self.sizes[index].to(device, non_blocking=True)
        grid = 2 * places / sizes[:, None, None] - 1          # -1..1, as grid_sample wants
        crops = []
        for n, own_grid in zip(index, grid, strict=True):
            values = self.values[self.starts[n]:self.starts[n + 1]].reshape(1, *self.shapes[n])
            z = torch.from_numpy(values).to(device, non_blocking=True).float()
            crops.append(F.grid_sample(z, own_grid[None], padding_mode="border", align_corners=False))
        return torch.cat(crops)


# ------------------------------------------------------------ the demo
def demo(args):
    """Scenes, both teachers, the student, the comparison and an overlay, offline and small."""
    out = Path("outputs/demo" if args.out == "outputs" else args.out)
    steps = args.steps or 60
    print(f"demo: draws 40 desert scenes, trains DeepLabV3+ and SegFormer-B3 for {steps} steps each at 96\n"
          "pixels, distils SegFormer-B1, compares the three and labels a scene: about three minutes on two\n"
          f"cores. Everything goes to {out}. Scores mean nothing here: the scenes are drawn, and the\n"
          "networks start from random weights.", flush=True)
    if not (out / "data").is_dir():
        write_scenes(out / "drawing", train=32, val=8, width=480, height=270)
        (out / "drawing").rename(out / "data")                # all scenes or none
    common = ["--data", str(out / "data"), "--out", str(out), "--device", args.device, "--amp", args.amp]
    training = [*common, "--init", "random", "--size", "96", "--lr", "1e-3", "--batch-size", "4",
                "--eval-every", "4", "--class-weights", "sqrt", "--steps", str(steps),
                "--seed", str(args.seed)]
    if args.overwrite:
        training.append("--overwrite")
    train_teacher.main(["--arch", "deeplab", *training])
    train_teacher.main(["--arch", "segformer", *training])
    alpha = f"{args.alpha[0]}:{args.alpha[1]}"
    student, history = main(["--T", str(args.T), "--alpha", alpha, *training])
    checkpoints = [str(out / name) for name in (*TEACHER_FILES, "best_student.pth")]
    evaluate.main([*checkpoints, *common, "--workers", "0"])
    image = data.read_image(min((out / "data" / "val" / "Color_Images").iterdir()))
    model, meta = load_model(checkpoints[-1])
    pred = predict(model, data.eval_image(image, meta["size"]), image.size[::-1])[0].numpy()
    data.save_image(out / "overlay.png", data.overlay(image, pred, meta["classes"]))
    print(f"\nlook at {out / 'overlay.png'} and {out / 'training_curves.png'}")
    return student, history


def draw_scene(seed, width=960, height=540):
    """A drawn desert scene with all ten classes: (PIL RGB, (H, W) uint16 raw ids of the desert table)."""
    rng = np.random.default_rng(seed)
    image, mask = Image.new("RGB", (width, height), (150, 190, 235)), Image.new("L", (width, height), 9)
    pens, unit = (ImageDraw.Draw(image), ImageDraw.Draw(mask)), height / 540

    def draw(shape, index, box):
        color = np.array(data.DESERT[index]["color"]) + rng.normal(0, 14, 3)
        getattr(pens[0], shape)(box, fill=tuple(int(v) for v in color.clip(0, 255)))
        getattr(pens[1], shape)(box, fill=index)

    horizon = height * rng.uniform(0.38, 0.48)
    draw("rectangle", 8, (0, horizon, width, height))         # ground
    # class, how many, shape, radius in pixels of a 540-pixel frame, height / width
    things = [(2, 6, "ellipse", 130, 0.25), (4, 60, "rectangle", 5, 0.5), (7, 8, "ellipse", 18, 0.7),
              (3, 7, "ellipse", 24, 0.8), (1, 8, "ellipse", 28, 0.8), (6, 4, "rectangle", 30, 0.25),
              (5, 40, "ellipse", 5, 1.0), (0, 4, "ellipse", 45, 1.6)]
    for index, count, shape, radius, flat in things:
        for depth in np.sort(rng.uniform(0, 1, count)):       # far things first, and smaller
            x, y = rng.uniform(0, width), horizon + depth * (height - horizon)
            s = radius * unit * (0.4 + 0.8 * depth) * rng.uniform(0.6, 1.4)
            draw(shape, index, (x - s, y - s * flat, x + s, y + s * flat))
    noisy = np.asarray(image) + rng.normal(0, 9, (height, width, 3))
    ids = np.array([entry["id"] for entry in data.DESERT], np.uint16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), ids[np.asarray(mask)]


def write_scenes(root, train=32, val=8, width=960, height=540):
    """Writes drawn scenes to `root` in the layout of the real set, with 16-bit masks of raw ids."""
    for split, count, first_seed in (("train", train, 0), ("val", val, 10_000)):
        for part in ("Color_Images", "Segmentation"):
            (Path(root) / split / part).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            image, mask = draw_scene(first_seed + n, width, height)
            image.save(Path(root) / split / "Color_Images" / f"scene{n:04}.png")
            Image.fromarray(mask).save(Path(root) / split / "Segmentation" / f"scene{n:04}.png")


# ------------------------------------------------------------ flags, checks, the command
def parse_alpha(value):
    """"0.3:0.7" -> (0.3, 0.7); "0.5" -> (0.5, 0.5)."""
    try:
        ends = [float(v) for v in value.split(":")]
    except ValueError:
        ends = []
    if len(ends) not in (1, 2) or not all(0 <= v <= 1 for v in ends):
        raise InputError(f"--alpha {value}: give START:END or one number, each in 0..1, such as 0.3:0.7")
    return ends[0], ends[-1]


def needs_teachers(args):
    """Whether any term of the loss asks the teachers; if none does, they are not even loaded."""
    return args.feature or args.attention or (max(args.alpha) > 0 and (args.kl or args.cwd))


def check_flags(args):
    """What argparse cannot see, before anything is read."""
    if args.teacher_weights not in ("equal", "auto"):
        parse_weights(args.teacher_weights, len(args.teachers or TEACHER_FILES))
    with_stages = args.feature or args.attention
    if args.cache_teachers and with_stages:
        raise InputError("--cache-teachers keeps the teachers' logits only; --feature and --attention need "
                         "the teachers themselves, leave it out")
    if args.unlabelled and not needs_teachers(args):
        raise InputError("--unlabelled: without a soft loss it does nothing; raise --alpha, or the loss's "
                         "weight")
    if args.unlabelled and not 0 < unlabelled_of_batch(args) < args.batch_size:
        raise InputError(f"--unlabelled-share {args.unlabelled_share}: of --batch-size {args.batch_size} "
                         "at least one image must have labels, and one none; change one of the two")
    if not args.demo:
        data.find_data(args.data)                             # what a beginner lacks first; it names --demo


def make_parser():
    number = data.number
    parser = data.Parser(__doc__, "python distill.py --data DIR --T 2 --alpha 0.3:0.7 --cache-teachers")
    group = add_model_flags(parser, "segformer-b1")
    group.add_argument("--init", default="imagenet", metavar="imagenet|random|teacher|PATH",
                       help="the student's first weights, as in train_teacher.py; teacher: embeddings, norms "
                       "and an even choice of a SegFormer teacher's blocks")
    group.add_argument("--teachers", nargs="+", metavar="CKPT",
                       help="checkpoints, or SegFormer folders or hub names; without it, deep_lab.pth and "
                       "best_model.pth in --out")
    group = parser.add_argument_group("distillation")
    group.add_argument("--T", type=number(float, 1e-3, 1000), default=2.0,
                       help="temperature of the soft loss (Hinton et al. 2015)")
    group.add_argument("--alpha", type=parse_alpha, default="0.3:0.7", metavar="START:END",
                       help="share of the soft losses over the run; 0:0 disables them")
    group.add_argument("--teacher-weights", default="equal", metavar="A:B:..|auto",
                       help="in the ensemble; auto: by class, from their validation IoU")
    group.add_argument("--average", choices=["logits", "probs"], default="logits",
                       help="what the ensemble averages")
    group.add_argument("--kl", type=number(float, 0, 1e6), default=1.0,
                       help="weight of KL, the loss per pixel")
    group.add_argument("--soft-weights", choices=["equal", "balanced"], default="equal",
                       help="of the pixels in KL; balanced: with the class balance of the hard loss")
    group.add_argument("--hard-weight", choices=["ramp", "constant"], default="ramp",
                       help="of the hard loss: 1 - alpha, or 1")
    group.add_argument("--cwd", type=number(float, 0, 1e6), default=0.0,
                       help="weight of the channel-wise loss, at temperature 4 (Shu et al. 2021)")
    group.add_argument("--feature", type=number(float, 0, 1e6), default=0.0,
                       help="weight of the loss between stage features (Romero et al. 2015)")
    group.add_argument("--attention", type=number(float, 0, 1e6), default=0.0,
                       help="weight of attention transfer (Zagoruyko and Komodakis 2017)")
    group.add_argument("--cache-teachers", action="store_true",
                       help="teachers see each whole image once; their maps are warped like the crops")
    train_teacher.add_train_flags(parser)
    group = parser.add_argument_group("images without labels")
    group.add_argument("--unlabelled", nargs="+", default=[], metavar="DIR",
                       help="folders of images without masks: the teachers label them")
    group.add_argument("--unlabelled-share", type=number(float, 0, 1), default=0.5, help="of each batch")
    group = parser.add_argument_group("instead of a run")
    group.add_argument("--demo", action="store_true",
                       help="draw scenes and train all three networks in miniature, with settings of its own")
    return parser


def main(argv=()):
    args = make_parser().parse_args(argv)
    check_flags(args)
    if args.demo:
        return demo(args)
    with join_processes(args.device) as world:
        digests, teachers = [], []
        if needs_teachers(args) or args.init == "teacher":
            digests, teachers = load_teachers(args)
        train, val, class_weight = open_data(args, world)
        name = "best_student" if args.arch == "segformer-b1" else f"student_{args.arch}"
        state = State(name, args, world, train, val, digests)                   # may refuse to go on
        torch.manual_seed(args.seed)
        init = "random" if state.saved else args.init         # saved weights replace the first ones
        first = "random" if init == "teacher" else init
        student = build(args.arch, train.classes, first, args.init_partial)
        if init == "teacher":
            start_from_teacher(student, [model for model, _ in teachers])
        if args.init == "random" and not args.unlabelled and needs_teachers(args):
            world.print("note: from random weights, with a label on every image, these losses made no "
                        "student better than alone; --init teacher does, and so does --unlabelled DIR")
        adapters = make_adapters(student, [model for model, _ in teachers]) if args.feature else None
        ask_teachers = None
        if needs_teachers(args) and not state.done:           # a finished run needs no cache
            ask_teachers = make_ask_teachers(args, world, train, digests, teachers)
        prepare = make_prepare(args, world, train, class_weight, ask_teachers)
        loss_fn = make_loss(args, adapters)
        return fit(student, state, prepare, loss_fn, train, val, class_weight, args, world, adapters)


if __name__ == "__main__":
    data.run_command(main)
