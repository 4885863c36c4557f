"""Trains a teacher, or any of the networks alone; holds the only training loop of the project, fit().

    python train_teacher.py --arch deeplab                    # -> outputs/deep_lab.pth
    python train_teacher.py --arch segformer                  # -> outputs/best_model.pth
    torchrun --nproc-per-node=2 train_teacher.py --arch segformer

The same command again goes on where the run last saved: after Ctrl-C at the very next step, after a crash or the end of
a kernel's time some minutes back. Everything random is drawn from (seed, step), so a state holds weights, adapters,
optimizer, scaler, step and sums, and the resumed run ends with the bits of the uninterrupted one (CPU, same threads).

Measured on 203 real pairs at --size 128, from random weights, 60 epochs on one CPU core: DeepLabV3+ mIoU .380 in
37 minutes, SegFormer-B3 .351 in 36; after 100 more .411 and .394 (README, "Ablation").
"""
import contextlib
import copy
import itertools
import json
import math
import os
import platform
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torchvision
import transformers
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from evaluate import TEACHER_NAMES, add_model_flags, describe_device, draw_curves, evaluate, pick_device, summary
from losses import count_valid, hard_loss, sum_weights
from models import amp_dtype, autocast, build, freeze, memory_format, read_file, save_model

COUNTERS = ("logits_clamped", "soft_clamped")    # parts that are counts over an epoch, not means
CHECK_EVERY = 10                                        # steps between two looks at what lies on the device


# ---------------------------------------------------------------------------------------------- flags
def add_train_flags(parser):
    """The flags that train_teacher.py and distill.py share."""
    images = data.add_data_flags(parser)
    images.add_argument("--size", type=data.side, default=512, help="side of a crop, shorter side of a whole image, pixels (512)")
    images.add_argument("--workers", type=data.number(int, 0, 256), default=min(4, data.cores()),
                        help="processes that read files (up to 4)")
    images.add_argument("--rare-class-sampling", action="store_true", help="draw images that hold rare classes more often (DAFormer)")
    train = parser.add_argument_group("training")
    train.add_argument("--epochs", type=data.number(int, 1), default=50, help="passes over the training pairs (50)")
    train.add_argument("--steps", type=data.number(int, 1), metavar="N", help="steps in all, if fewer; the rate falls to 0 over them")
    train.add_argument("--batch-size", type=data.number(int, 1), default=8, help="images a process and forward (8)")
    train.add_argument("--accumulate", type=data.number(int, 1), default=1, metavar="N", help="forwards a step: for small GPUs (1)")
    train.add_argument("--lr", type=data.number(float, 0, 1, open_low=True), default=6e-5,
                       help="AdamW rate of the encoder, the head has ten times it (6e-5)")
    train.add_argument("--class-weights", choices=["median", "sqrt", "none"], default="median", help="of the hard loss (median frequency)")
    train.add_argument("--eval-every", type=data.number(int, 1), default=1, metavar="N", help="epochs between validations (1)")
    train.add_argument("--seed", type=data.number(int, 0, 2**31), default=0, help="of weights, order and augmentation (0)")
    run = parser.add_argument_group("run")
    run.add_argument("--out", metavar="DIR", default="outputs", help="checkpoints, log and curves (outputs)")
    run.add_argument("--save-minutes", type=data.number(float, 0), default=10, help="minutes between two states on disk (10)")
    run.add_argument("--overwrite", action="store_true", help="start afresh where a run exists")
    run.add_argument("--compile", action="store_true", help="torch.compile: minutes at the start, faster steps")


# ---------------------------------------------------------------------------------------------- processes and signals
class World(NamedTuple):
    """This process among those that torchrun started."""
    rank: int
    size: int
    device: torch.device
    control: object = None                       # a gloo group for what the host decides, off the GPU's stream

    def say(self, *text):
        if self.rank == 0:
            print(*text, flush=True)

    def agree(self, *values):
        """The largest of each value over all processes."""
        if self.size == 1:
            return values
        shared = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.control)
        return shared.tolist()

    @contextlib.contextmanager
    def first(self):
        """The first process runs the block before the others do; where it fails, they end in silence."""
        if self.rank > 0 and self.agree(0)[0]:
            raise SystemExit(2)
        failed = True
        try:
            yield
            failed = False
        finally:
            if self.rank == 0:
                self.agree(failed)


@contextlib.contextmanager
def processes(device):
    """Joins the processes that torchrun started, nccl on GPUs and gloo elsewhere; yields this one's World."""
    device, size = pick_device(device), int(os.environ.get("WORLD_SIZE", "1"))
    torch.backends.cudnn.benchmark = True                     # crops have one size
    if size == 1:
        yield World(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), size, device, dist.new_group(backend="gloo"))
    finally:
        dist.destroy_process_group()


class Signals:
    """Remembers the first SIGINT or SIGTERM; a second one stops at once. Handlers only in the main thread."""

    def __init__(self):
        self.number, self.previous = 0, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for which in (signal.SIGINT, signal.SIGTERM):
                self.previous[which] = signal.signal(which, self.take)
        return self

    def take(self, which, frame):
        self.number = which
        os.write(2, b"\nstopping after this step; once more ends it at once, without saving\n")
        for each in self.previous:
            signal.signal(each, signal.SIG_DFL)

    def __exit__(self, *error):
        for which, handler in self.previous.items():
            signal.signal(which, handler)


# ---------------------------------------------------------------------------------------------- pure schedules
def learning_rate(step, total, peak):
    """Linear warm-up over a twentieth of the run (at most 1500 steps), then polynomial decay of power 1 (SegFormer)."""
    warm = min(1500, max(1, total // 20))
    return peak * min(1.0, (step + 1) / warm) * (1 - step / total)


def parameter_groups(model, arch, lr, adapters=None):
    """AdamW groups: head (and adapters) at ten times the encoder's rate, no decay on norms and biases."""
    encoder = "backbone." if arch == "deeplab" else "segformer."
    groups = {(peak, decay): [] for peak in (lr, 10 * lr) for decay in (0.0, 0.01)}
    for name, parameter in (*model.named_parameters(), *(adapters.named_parameters() if adapters else ())):
        groups[lr if name.startswith(encoder) else 10 * lr, 0.01 if parameter.ndim > 1 else 0.0].append(parameter)
    return [{"params": params, "peak": peak, "weight_decay": decay} for (peak, decay), params in groups.items() if params]


# ---------------------------------------------------------------------------------------------- one step
class Job(NamedTuple):
    """What a training step works on."""
    model: torch.nn.Module
    forward: torch.nn.Module                     # the model, or it in DistributedDataParallel, or compiled
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loss: Callable                               # loss(forward, batch, progress) -> (0-d loss, {part: 0-d tensor or number})
    class_weight: torch.Tensor                   # (C,)
    world: World
    dtype: torch.dtype | None
    seed: int


def make_job(model, arch, loss, class_weight, world, dtype, lr, seed, adapters=None, compiled=False):
    """Puts a network and its adapters on the device, with their optimizer, as fit() and the bench use them."""
    model.to(world.device, memory_format=memory_format(arch)).train()
    if adapters is not None:
        adapters.to(world.device).train()
    forward = model
    if world.size > 1:
        gpu = world.device.type == "cuda"
        warnings.filterwarnings("ignore", "Grad strides do not match")               # of 1x1 convolutions, for which both orders are one
        warnings.filterwarnings("ignore", ".*broadcast_buffers")                     # renamed in torch 2.15, which older ones do not know
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) if gpu else model
        forward = DistributedDataParallel(model, [world.device.index] if gpu else None, broadcast_buffers=False)
        for parameter in adapters.parameters() if adapters is not None else ():
            parameter.register_hook(average_over_processes)
    optimizer = torch.optim.AdamW(parameter_groups(model, arch, lr, adapters), fused=True)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    return Job(model, torch.compile(forward) if compiled else forward, optimizer, scaler, loss, class_weight, world, dtype, seed)


def average_over_processes(gradient):
    gradient = gradient.clone()
    dist.all_reduce(gradient)
    return gradient / dist.get_world_size()


def backward(job, batches, step, progress):
    """Gradients of one step from its micro-batches; returns {"loss": ..., parts of the loss} as 0-d tensors on the device.

    What the losses are divided by is summed over micro-batches and processes first: two half batches, or two
    processes with half a batch each, give the gradient of the whole."""
    world = job.world
    batches = [data.to_device(batch, world.device) for batch in batches]
    norms = torch.stack([sum(sum_weights(b.mask, job.class_weight) for b in batches), sum(count_valid(b.mask) for b in batches).float()])
    if world.size > 1:
        dist.all_reduce(norms)
        norms /= world.size                                   # DistributedDataParallel takes the mean of gradients
    total: dict = {}
    for n, batch in enumerate(batches):
        batch = batch._replace(weight_sum=norms[0], valid=norms[1], share=1 / len(batches))
        torch.manual_seed(hash((job.seed, step, n, world.rank)) & (2**63 - 1))       # dropout: nothing to store
        last = world.size == 1 or n == len(batches) - 1
        with contextlib.nullcontext() if last else job.forward.no_sync():
            with autocast(world.device, job.dtype):
                loss, parts = job.loss(job.forward, batch, progress)
            job.scaler.scale(loss).backward()
        for name, part in {"loss": loss, **parts}.items():
            part = part.detach() if isinstance(part, torch.Tensor) else part / len(batches)
            total[name] = total.get(name, 0) + part
    return total


def update(job, buffers):
    """Clips, then one optimizer step that a gradient norm which is not finite suppresses, all on the device.

    `buffers`: copies of BatchNorm's from before the step, put back in that case. Returns whether it was finite."""
    optimizer = job.optimizer
    job.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    finite = norm.isfinite()
    optimizer.found_inf = (~finite).float()                   # read by the fused AdamW kernel
    optimizer.step()
    job.scaler.update()
    for buffer, old in zip(job.model.buffers(), buffers, strict=True):
        buffer.copy_(old.where(~finite, buffer))
    optimizer.zero_grad(set_to_none=True)
    return finite


def train_step(job, batches, step, total, sums):
    """One step, and its figures added to `sums` on the device. Returns (parts of the loss, whether it was finite)."""
    for group in job.optimizer.param_groups:
        group["lr"] = learning_rate(step, total, group["peak"])
    buffers = [buffer.clone() for buffer in job.model.buffers()]
    parts = backward(job, batches, step, step / max(1, total - 1))
    finite = update(job, buffers)
    exact = torch.float32 if job.world.device.type == "mps" else torch.float64
    values = torch.stack([v.to(exact) if isinstance(v, torch.Tensor) else torch.full((), v, dtype=exact, device=finite.device)
                          for v in parts.values()])
    values = torch.cat([values.where(finite, 0), torch.stack([finite, ~finite]).to(exact)])
    sums.update(names=[*parts, "steps", "skipped"], values=sums.get("values", 0) + values)
    return parts, finite


# ---------------------------------------------------------------------------------------------- a run and its state
class Run(NamedTuple):
    """Where a run writes, what tells it from other runs, and how far it had come."""
    name: str
    best: Path                                   # the checkpoint with the highest validation mIoU
    last: Path                                   # the last weights, with all that the run goes on from
    settings: dict
    state: dict | None                           # what `last` held when the command began

    @property
    def done(self):
        return self.state is not None and self.state["training"]["done"]


def open_run(name, args, world, train, val, teachers=()):
    """Finds out whether the command begins a run or goes on with one; a Fault if `last` is of a run with other settings."""
    best, last = Path(args.out) / f"{name}.pth", Path(args.out) / "checkpoints" / f"{name}.pth"
    settings = {key: value for key, value in vars(args).items()
                if key not in ("out", "overwrite", "save_minutes", "workers", "demo", "bench")}
    settings |= {"masks": train.form, "classes": train.classes, "data": (train.digest, val.digest), "teachers": teachers,
                 "device": world.device.type, "amp": str(amp_dtype(args.amp, world.device)), "processes": world.size,
                 "transformers": transformers.__version__.split(".")[0]}             # its major version orders the parameters
    return Run(name, best, last, settings, None if args.overwrite else find_state(last, best, settings))


def find_state(path, best, settings):
    """The state that an earlier run with the same settings left in `path`, or None; a Fault if its settings were others."""
    if not path.exists():
        if best.exists():
            raise data.Fault(f"{best}: exists, but no state of its run; --overwrite replaces it, --out DIR keeps it")
        return None
    try:
        state = read_file(path)
        old, new = as_json(state["training"]["settings"]), as_json(settings)
    except (data.Fault, KeyError, TypeError):
        raise data.Fault(f"{path}: is damaged or no state of a run; --overwrite starts afresh, --out DIR keeps it") from None
    other = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    if other:
        unsaid = {"data": "other pairs or labels", "classes": "another table", "teachers": "other weights"}
        names = ", ".join(("" if key in ("processes", "data", "transformers") else "--") + key.replace("_", "-") + " ("
                          + (unsaid.get(key) or f"was {str(old.get(key))[:40]}, now {str(new.get(key))[:40]}") + ")" for key in other)
        raise data.Fault(f"{path}: belongs to a run with other settings: {names}; --overwrite starts afresh, --out DIR keeps both")
    if state["training"]["done"] and not best.exists():
        raise data.Fault(f"{best}: is gone, though its run has finished; {path} holds the last weights, --overwrite trains again")
    return state


def restore(job, state, adapters):
    """Puts a state's weights, moments and scaler back; returns its sums, which only the first process holds."""
    training, world = state["training"], job.world
    job.model.load_state_dict(state["model_state_dict"])
    if not training["done"]:
        job.optimizer.load_state_dict(training["optimizer"])
        job.scaler.load_state_dict(training["scaler"])
        if adapters is not None:
            adapters.load_state_dict(training["adapters"])
    if not training["sums"]:
        return {}
    values = training["sums"]["values"].to(world.device)
    return {"names": training["sums"]["names"], "values": values if world.rank == 0 else torch.zeros_like(values)}


def as_json(value):
    """Tuples and paths as JSON has them, so that a stored value compares equal to a fresh one."""
    return json.loads(json.dumps(value, default=str))


# ---------------------------------------------------------------------------------------------- the loop
def fit(model, run, loss, train, val, args, world, class_weight, adapters=None):
    """Trains `model`; returns it with its last weights, in eval mode, and the epoch records.

    loss(forward, batch, progress): see Job; progress runs 0 -> 1. adapters: a module that trains along and is no part of
    the checkpoint."""
    name, device, started = run.name, world.device, time.time()
    dtype = amp_dtype(args.amp, device)
    global_batch = args.batch_size * args.accumulate * world.size
    per_epoch = len(train) // global_batch
    total = min(args.epochs * per_epoch, args.steps or math.inf)
    job = make_job(model, args.arch, loss, class_weight, world, dtype, args.lr, args.seed, adapters, args.compile)
    model = job.model

    step, history, best, sums = 0, [], -1.0, {}
    header = describe_run(name, args, model, train, val, world, dtype, total)
    if run.state:
        step, history, best, header = (run.state["training"][key] for key in ("step", "history", "best", "header"))
        sums = restore(job, run.state, adapters)
    write_log(run, world, header, history)
    if run.done:
        world.say(f"{name}: finished already, {score_line(history, best)}; --overwrite starts afresh")
        return model.eval(), history
    world.say(f"{name}: goes on after step {step} of {total}" if run.state else
              f"{name}: {total} steps, {per_epoch} an epoch, batch {args.batch_size} x {args.accumulate} accumulated x {world.size} process(es) = "
              f"{global_batch}, {header['run']['device']}")
    if args.compile:
        world.say(f"{name}: --compile, so the first step takes minutes (2 for SegFormer-B0 on one core)")

    def save_state(done=False):
        """Sums are added up over the processes; only the first one writes."""
        summed = over_processes(sums, world)
        if world.rank == 0:
            training = {"step": step, "history": history, "best": best, "header": header, "sums": summed,
                        "settings": run.settings, "done": done}
            if not done:
                training |= {"optimizer": job.optimizer.state_dict(), "scaler": job.scaler.state_dict(),
                             "adapters": adapters.state_dict() if adapters is not None else {}}
            save_model(run.last, model, args.arch, train.classes, **checkpoint_meta(), training=training)

    def checkpoint_meta():
        last = history[-1] if history else {}
        return {"size": args.size, "image_size": list(train.sizes[0]), "epoch": last.get("epoch", 0), "val_miou": last.get("val_miou"),
                "val_iou": last.get("val_iou") or {}, "args": as_json(vars(args))}

    def validate():
        """The scores of the present weights, or None if a signal came in between."""
        if world.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        alone = world.size == 1                               # several processes agree at the loop's head instead
        numbers = itertools.takewhile(lambda n: not (alone and signals.number), range(world.rank, len(val), world.size))
        matrix = evaluate(freeze(copy.deepcopy(model), args.arch, dtype), val, args.size, dtype, args.workers, numbers)
        return None if alone and signals.number else summary(matrix, val.classes)

    if not run.state:
        save_state()                                          # so that what is killed from here on can be resumed
    odds = data.sampling_weights(train.counts) if args.rare_class_sampling else None
    order = data.BatchSampler(len(train), args.batch_size, args.seed, step, total, args.accumulate, world.rank, world.size, odds)
    batches = data.loader(data.Crops(train, args.size, args.seed), args.workers, device.type == "cuda", order)
    bar = tqdm(total=total, initial=step, desc=name, disable=world.rank > 0, mininterval=0.5 if sys.stderr.isatty() else 60)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    nonfinite, saved = torch.zeros((), device=device), time.monotonic()
    waited, epoch_start, timed_from = 0.0, time.perf_counter(), step
    with Signals() as signals, bar, out_of_memory(args):
        while True:
            stop, save = world.agree(signals.number, time.monotonic() - saved > 60 * args.save_minutes)
            recorded = step == (history[-1]["step"] if history else 0)
            if not (stop or recorded) and (step % per_epoch == 0 or step == total):
                epoch = math.ceil(step / per_epoch)
                due = epoch % args.eval_every == 0 or step == total
                figures = means(sums, world)
                if step == total and figures["loss"] is None:
                    raise data.Fault(f"{name}: none of the {figures['skipped']:.0f} gradients of the last epoch was finite; lower --lr or "
                                     "the weights of the losses, or use --amp off or bf16; the last state is kept", status=1)
                speed = timings((step - timed_from) * global_batch, device, epoch_start, waited)
                scores = validate() if due else None
                if due and scores is None:
                    continue                                  # a signal came in between
                history.append({"epoch": epoch, "step": step, **figures, "lr": learning_rate(step - 1, total, args.lr), **speed,
                                **{f"val_{key}": scores and scores[key] for key in ("miou", "miou_present", "pixel_accuracy", "iou")}})
                if scores and scores["miou"] > best:
                    best = scores["miou"]
                    if world.rank == 0:
                        save_model(run.best, model, args.arch, train.classes, **checkpoint_meta())
                report(run, world, header, history, train.classes, bar)
                sums, waited, epoch_start, timed_from = {}, 0.0, time.perf_counter(), step
            if stop:
                save_state()
                raise data.Fault(f"{name}: stopped after step {step} of {total}, state in {run.last}; the same command goes on", 128 + stop)
            if step == total:
                break
            if save:
                save_state()
                saved = time.monotonic()

            clock = time.perf_counter()
            micro = [next(batches) for _ in range(args.accumulate)]
            waited += time.perf_counter() - clock
            parts, finite = train_step(job, micro, step, total, sums)
            nonfinite = (nonfinite + 1).where(~finite, 0)
            step += 1
            bar.update()
            if step % CHECK_EVERY == 0:
                bar.set_postfix(loss=f"{float(parts['loss']):.3f}", refresh=False)
                if nonfinite >= CHECK_EVERY:
                    raise nonfinite_fault(run, step, parts, micro, train)
        save_state(done=True)
    world.say(f"{name}: {score_line(history, best)}, {(time.time() - started) / 60:.1f} minutes; "
              f"{run.best} holds the best, {run.last} the last")
    if signals.number:
        raise data.Fault(f"{name}: stopped, after it had finished", 128 + signals.number)
    return model.eval(), history


# ---------------------------------------------------------------------------------------------- what can go wrong
def check_batch(args, pairs, world):
    if args.arch == "deeplab" and args.batch_size < 2:
        raise data.Fault("--batch-size 1: DeepLab's BatchNorm after global pooling needs at least 2 images a forward")
    images = args.batch_size * args.accumulate * world.size
    if images > pairs:
        raise data.Fault(f"--batch-size {args.batch_size}: a step takes {images} images "
                         f"(x --accumulate x processes), the training split holds {pairs}; lower it")


@contextlib.contextmanager
def out_of_memory(args):
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        raise data.Fault(f"out of memory with --batch-size {args.batch_size} --size {args.size}; lower them and raise --accumulate (now "
                         f"{args.accumulate}) to keep the batch, what was saved is kept", status=1) from None


def nonfinite_fault(run, step, parts, micro, train):
    values = ", ".join(f"{key} {float(value):.4g}" for key, value in parts.items())
    files = " ".join(train.pairs[n][0].name for batch in micro for n in batch.pair.tolist())
    return data.Fault(f"{run.name}: the last {CHECK_EVERY} gradients or more were not finite, stopped at step {step} ({values}; "
                      f"images {files}); lower --lr or use --amp off or bf16, the last good state is kept in {run.last}", status=1)


# ---------------------------------------------------------------------------------------------- records
def describe_run(name, args, model, train, val, world, dtype, total):
    return {"run": {"name": name, "args": as_json(vars(args)), "steps": total, "processes": world.size,
                    "versions": {"python": platform.python_version(), "torch": str(torch.__version__),
                                 "torchvision": str(torchvision.__version__), "transformers": transformers.__version__},
                    "device": describe_device(world.device, dtype), "machine": platform.machine(),
                    "parameters": sum(p.numel() for p in model.parameters()), "pairs": [len(train), len(val)],
                    "size": args.size, "image_size": list(train.sizes[0]), "classes": [c["name"] for c in train.classes]}}


def over_processes(sums, world):
    if world.size == 1 or not sums:
        return sums
    values = sums["values"].clone()
    dist.all_reduce(values)
    return {"names": sums["names"], "values": values}


def means(sums, world):
    """Sums over an epoch's steps -> means over those that were not suppressed; counters stay sums."""
    summed = over_processes(sums, world)
    values = dict(zip(summed["names"], summed["values"].tolist(), strict=True))
    steps = values.pop("steps")
    counts = {key: values.pop(key) for key in ("skipped", *COUNTERS) if key in values}
    counts["skipped"] /= world.size                           # every process skips the same steps
    return {"alpha": 0.0, **{key: value / steps if steps else None for key, value in values.items()}, **counts}


def timings(images, device, since, waited):
    """Of training since the epoch began or the run went on; the only figures that a resumed run may differ in. Images are
    counted over all processes, waiting for data and memory of this one."""
    seconds = time.perf_counter() - since
    return {"images_per_s": images / seconds if images else None, "wait_s": waited, "seconds": seconds, "peak_memory_mib": peak_memory(device)}


def peak_memory(device):
    """MiB: what torch took on a GPU at most, elsewhere what the whole process did."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def score_line(history, best):
    return f"last mIoU {history[-1]['val_miou']:.4f}, best {best:.4f}"


def write_log(run, world, header, history):
    """The whole log, each epoch once: what was torn or belongs to steps not kept is gone with the old file."""
    if world.rank == 0:
        lines = "".join(json.dumps(entry) + "\n" for entry in (header, *history))
        data.write_atomic(run.best.with_suffix(".jsonl"), lambda file: file.write(lines.encode()))


def report(run, world, header, history, classes, bar):
    write_log(run, world, header, history)
    if world.rank == 0:
        last = history[-1]
        parts = [key for key in ("hard", "soft", "cwd", "feature", "attention")
                 if key in last and last[key] != last["loss"]]       # one line would hide the other
        curves = "training_curves.png" if run.name == "best_student" else f"{run.name}_curves.png"
        data.save_image(run.best.with_name(curves), draw_curves(history, classes, parts))
        figures = [form.format(last[key]) for form, key in ((", loss {:.4f}", "loss"), (", mIoU {:.4f}", "val_miou"),
                                                            (", {:.1f} images/s", "images_per_s")) if last[key] is not None]
        bar.write(f"{run.name}: epoch {last['epoch']}, step {last['step']}{''.join(figures)}", file=sys.stdout)


# ---------------------------------------------------------------------------------------------- command
def open_data(args, world):
    """(training split, validation split, (C,) class weights); what masks hold is kept beside the outputs. Rank 0 reads first."""
    classes = data.load_classes(args.classes)
    root, out = data.find_data(args.data), Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise data.Fault(f"--out {args.out}: cannot be made ({error.strerror}); choose another folder") from None
    with world.first():
        splits = [data.Pairs(root, split, classes, args.masks, out) for split in ("train", "val")]
        check_batch(args, len(splits[0]), world)
    for split in splits:
        world.say(split.describe())
    empty = [c["name"] for c, n in zip(classes, splits[0].counts.sum(0), strict=True) if not n]
    if empty:
        world.say(f"train: no pixel of {', '.join(empty)}; these classes weigh 1 and cannot be learnt")
    return *splits, data.class_weights(splits[0].counts, args.class_weights).to(world.device)


@data.command
def main(argv=()):
    parser = data.Parser(__doc__.split("\n\n")[0],
                         epilog="example: python train_teacher.py --arch deeplab --data DIR --batch-size 4 --accumulate 2")
    group = add_model_flags(parser, "deeplab")
    group.add_argument("--init", default="imagenet", metavar="imagenet|random|PATH", help="first weights; PATH: a ResNet50 state "
                       "dict, a folder of mit-bN, or a checkpoint (imagenet)")
    add_train_flags(parser)
    args = parser.parse_args(argv)
    with processes(args.device) as world:
        train, val, class_weight = open_data(args, world)
        run = open_run(TEACHER_NAMES.get(args.arch, args.arch), args, world, train, val)
        torch.manual_seed(args.seed)
        model = build(args.arch, train.classes, args.init)

        def loss(forward, batch, progress):
            hard = hard_loss(forward(batch.image), batch.mask, class_weight, batch.weight_sum)
            return hard, {"hard": hard}

        return fit(model, run, loss, train, val, args, world, class_weight)


if __name__ == "__main__":
    main(sys.argv[1:])
