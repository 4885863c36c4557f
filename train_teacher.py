"""Trains a teacher, or any network alone; holds fit(), the project's only training loop.

    python train_teacher.py --arch deeplab                    # -> outputs/deep_lab.pth
    python train_teacher.py --arch segformer                  # -> outputs/best_model.pth
    torchrun --nproc-per-node=2 train_teacher.py --arch segformer

Rerun the same command to resume: after Ctrl-C at the next step, after a crash up to --save-minutes back.
Everything random is drawn from (seed, step), so the saved state needs no random state, and a resumed run ends
with the same bits as an uninterrupted one (on CPU, with as many threads).

Measured on 203 real pairs at --size 128 from random weights, 60 epochs on one CPU core in bf16: DeepLabV3+
mIoU .380 in 37 minutes, SegFormer-B3 .351 in 36; after 100 more .411 and .394 (.github/RESULTS.md).
"""
import contextlib
import copy
import csv
import io
import json
import math
import os
import platform
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torchvision
import transformers
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
from data import InputError, RunError
from evaluate import compute_scores, draw_curves, evaluate
from losses import hard_loss, hard_weights
from models import (TEACHER_NAMES, add_model_flags, amp_dtype, autocast, build, describe_device,
                    optimize_for_inference, pick_device, safe_load, save_model, translate)

COUNTERS = ("logits_clamped", "soft_clamped")    # parts of a loss that are added over an epoch, not averaged
CHECK_EVERY = 10                                 # steps between two looks at values on the device, which wait


# ------------------------------------------------------------ the training loop
def fit(model, state, prepare, loss_fn, train, val, class_weight, args, world, adapters=None):
    """Trains `model`; returns it with its last weights, in eval mode, and one record per epoch.

    state: where the run stands and what it writes
    prepare: batch of the loader -> the batch on the device, with targets and pixel weights
    loss_fn: (network, batch, progress) -> (0-d loss, {part: 0-d tensor or number}); progress goes 0 -> 1
    class_weight: (C,) of the hard loss, for the validation loss
    adapters: a module that is trained too but is no part of the checkpoint"""
    device, dtype, started = world.device, amp_dtype(args.amp, world.device), time.time()
    adapters = nn.ModuleList() if adapters is None else adapters
    # an epoch is one pass over the pairs; unlabelled images fill their share of each batch
    unlabelled, steps_per_epoch = unlabelled_of_batch(args), len(train) // pairs_per_step(args, world)
    total = min(args.epochs * steps_per_epoch, args.steps or math.inf)

    model, network = to_training(model, args, world, adapters)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.lr, adapters), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    header = describe_run(model, args, train, val, world, dtype, total, steps_per_epoch)
    state.start(model, optimizer, scaler, adapters, header)
    if state.done:
        world.print(f"{state.name}: finished already, {state.result()}; --overwrite starts again")
        return model.eval(), state.history

    odds = data.sampling_odds(train.counts) if args.rare_class_sampling else None
    order = data.BatchSampler(len(train), args.batch_size, args.seed, state.step, total, args.accumulate,
                              world.rank, world.size, odds, (unlabelled, train.unlabelled))
    dataset = data.TrainDataset(train, args.size, args.seed)
    loader = data.load(dataset, order, args.workers, device.type == "cuda")
    step_images = args.batch_size * args.accumulate * world.size
    clock, signals, saved_at = Clock(device, step_images), Signals(), time.monotonic()
    nonfinite_in_a_row = torch.zeros((), device=device)
    bar = data.progress_bar(None, state.name, total, initial=state.step, leave=True, delay=0,
                            disable=world.rank > 0)

    def epoch_ends():
        return state.step % steps_per_epoch == 0 or state.step == total

    def end_epoch():
        """Validates, records, and keeps the weights where they are the best so far."""
        record = {"epoch": math.ceil(state.step / steps_per_epoch), "step": state.step,
                  **epoch_means(state.sums, world), "lr": learning_rate(state.step - 1, total, args.lr),
                  **clock.read()}
        if record["loss"] is None and state.step == total:
            raise RunError(f"{state.name}: none of the {record['skipped']:.0f} gradients of the last epoch "
                           "was finite; lower --lr or the weights of the losses, or use --amp off or bf16, "
                           f"{state.way_on()}")
        scores = None
        if record["epoch"] % args.eval_every == 0 or state.step == total:
            with signals.raised_at_once(world.size == 1):     # several processes must stop at the same step
                scores = validate(model, val, args, world, dtype, class_weight)
        for key in ("loss", "miou", "miou_present", "pixel_accuracy", "iou"):
            record[f"val_{key}"] = scores[key] if scores else None
        names = [name for name in state.sums if name not in ("alpha", "loss", "steps", "skipped", *COUNTERS)]
        state.record(record)
        report(state, train.classes, names, bar)
        clock.restart()

    with signals, bar, out_of_memory_error(args, state):
        try:
            recorded = state.history[-1]["step"] if state.history else 0
            if epoch_ends() and state.step > recorded:
                end_epoch()                                   # the last command was stopped in its validation
            while state.step < total:
                rate = learning_rate(state.step, total, args.lr)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["lr_factor"]
                with clock.waiting():
                    raw_batches = [next(loader) for _ in range(args.accumulate)]
                # all targets first: what their weights are divided by is known only then
                batches = [prepare(batch) for batch in raw_batches]
                normalize_weights(batches, world)
                # kept, because a skipped step must leave no trace in BatchNorm either
                buffers = [buffer.clone() for buffer in model.buffers()]

                parts: dict = {}
                for micro, batch in enumerate(batches):
                    torch.manual_seed(data.seed_for("dropout", args.seed, state.step, micro, world.rank))
                    # DistributedDataParallel averages gradients over processes in the last backward only
                    local = world.size > 1 and micro < args.accumulate - 1
                    with network.no_sync() if local else contextlib.nullcontext():
                        with autocast(device, dtype):
                            loss, own_parts = loss_fn(network, batch, state.step / max(1, total - 1))
                        scaler.scale(loss / args.accumulate).backward()
                    add_parts(parts, {"loss": loss, **own_parts}, args.accumulate)

                scaler.unscale_(optimizer)
                finite = nn.utils.clip_grad_norm_(parameters, 1.0).isfinite()
                # fused AdamW reads `found_inf`, as GradScaler sets it: 1 skips the step. So the device
                # decides, and the CPU need not wait to know. MPS' AdamW ignores it, so there we wait
                optimizer.found_inf = (~finite).float()
                if device.type != "mps" or finite:
                    optimizer.step()
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                for buffer, before in zip(model.buffers(), buffers, strict=True):
                    buffer.copy_(buffer.where(finite, before))
                state.step += 1
                clock.steps += 1

                add_to_sums(state.sums, parts, finite)
                nonfinite_in_a_row = (nonfinite_in_a_row + 1).where(~finite, 0)
                bar.update()
                if state.step % CHECK_EVERY == 0:
                    bar.set_postfix(loss=f"{float(parts['loss']):.3f}", refresh=False)
                    if nonfinite_in_a_row >= CHECK_EVERY:
                        raise nonfinite_error(state, parts, raw_batches, train)
                stop, save = world.max(signals.number, time.monotonic() - saved_at > 60 * args.save_minutes)
                if stop:
                    raise Interrupt(stop)
                if epoch_ends():
                    end_epoch()
                if save:
                    state.save()
                    saved_at = time.monotonic()
        except Interrupt as interrupt:
            state.save()
            raise Stopped(f"{state.name}: stopped after step {state.step} of {total}, state saved in "
                          f"{state.last_path}. Rerun the same command to resume", interrupt.number) from None
        state.done = True
        state.save()
    world.print(f"{state.name}: {state.result()}, {(time.time() - started) / 60:.1f} minutes; "
                f"{state.best_path} holds the best weights, {state.last_path} the last")
    if signals.number:
        raise Stopped(f"{state.name}: stopped, after it had finished", signals.number)
    return model.eval(), state.history


def learning_rate(step, total, peak):
    """Linear warm-up over a twentieth of the run (at most 1500 steps), then linear decay to 0 (SegFormer)."""
    warmup = min(1500, max(1, total // 20))
    return peak * min(1.0, (step + 1) / warmup) * (1 - step / total)


def parameter_groups(model, lr, adapters):
    """AdamW groups: head and adapters at ten times the encoder's rate, no decay on norms and biases."""
    groups: dict = {}
    for name, parameter in (*model.named_parameters(), *adapters.named_parameters()):
        factor = 1 if name.startswith(model.encoder) else 10
        decay = 0.01 if parameter.ndim > 1 else 0.0
        groups.setdefault((factor, decay), []).append(parameter)
    return [{"params": group, "lr": lr * factor, "lr_factor": factor, "weight_decay": decay}
            for (factor, decay), group in groups.items()]


def to_training(model, args, world, adapters):
    """(model, network): the model on the device, in training mode, and what the loss calls, which is the
    model itself, or wrapped in DistributedDataParallel, or compiled."""
    model.to(world.device, memory_format=model.memory_format).train()
    adapters.to(world.device).train()
    network = model
    if world.size > 1:
        gpu = world.device.type == "cuda"
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if gpu else model
        devices = [world.device.index] if gpu else None
        network = DistributedDataParallel(model, devices, broadcast_buffers=False)
        # adapters are no part of the network that DistributedDataParallel wraps
        for parameter in adapters.parameters():
            parameter.register_hook(lambda gradient: world.sum(gradient) / world.size)
    if args.compile:
        world.print("--compile: the first step takes minutes (2 for SegFormer-B0 on one core)")
        network = torch.compile(network)
    return model, network


def normalize_weights(batches, world):
    """Scales each kind of the batches' pixel weights, so that over the micro-batches and processes of the
    step its sum is 1 on average.

    A loss that sums over weighted pixels is then a mean over the whole step, since fit() divides it by the
    micro-batches and DistributedDataParallel by the processes: two half batches, or two processes with half
    a batch each, give the gradient of the whole."""
    names = sorted(batches[0].weights)
    sums = world.sum(torch.stack([sum(batch.weights[name].sum() for batch in batches) for name in names]))
    mean_sums = (sums / (len(batches) * world.size)).clamp(min=1e-8)
    for batch in batches:
        for name, mean_sum in zip(names, mean_sums, strict=True):
            batch.weights[name] = batch.weights[name] / mean_sum


@torch.no_grad()
def validate(model, val, args, world, dtype, class_weight):
    """The scores of the present weights on the validation split, and their "loss": the hard loss as one
    weighted mean over all labelled pixels of the split, None where it is not finite or there are none."""
    if world.size > 1:                                        # BatchNorm's buffers differ on CPU
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    frozen = optimize_for_inference(copy.deepcopy(model), dtype)
    indices = range(world.rank, len(val), world.size)
    sums = torch.zeros(2, dtype=exact_dtype(world.device), device=world.device)      # loss, its weights

    def add_loss(z, target):
        weight = hard_weights(target, class_weight)
        sums.add_(torch.stack([hard_loss(z, target, weight), weight.sum()]))
    confusion = world.sum(evaluate(frozen, val, args.size, dtype, args.workers, indices, add_loss))
    sums = world.sum(sums)
    loss = float(sums[0] / sums[1])
    return {"loss": loss if math.isfinite(loss) else None, **compute_scores(confusion, val.classes)}


# ------------------------------------------------------------ figures of an epoch
def add_parts(parts, own, micro_batches):
    """Adds a micro-batch's loss and parts to those of the step: means, but for counters."""
    for name, value in own.items():
        value = value.detach() if isinstance(value, torch.Tensor) else value
        parts[name] = parts.get(name, 0) + (value if name in COUNTERS else value / micro_batches)


def add_to_sums(sums, parts, finite):
    """Adds a step, unless it was skipped, to the epoch's {name: 0-d tensor}, on the device."""
    exact = exact_dtype(finite.device)
    for name, value in parts.items():
        if not isinstance(value, torch.Tensor):
            value = torch.full((), value, device=finite.device)
        sums[name] = sums.get(name, 0) + value.to(exact).where(finite, 0)
    sums["steps"] = sums.get("steps", 0) + finite.to(exact)
    sums["skipped"] = sums.get("skipped", 0) + (~finite).to(exact)


def exact_dtype(device):
    """Of sums over many values; MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def epoch_means(sums, world):
    """{name: number} of an epoch: means over the steps that were not skipped; counters stay sums."""
    sums = {name: float(world.sum(value)) for name, value in sums.items()}
    steps, skipped = sums.pop("steps"), sums.pop("skipped") / world.size
    means: dict = {"alpha": 0.0}
    for name, value in sums.items():
        means[name] = value if name in COUNTERS else value / steps if steps else None
    return {**means, "skipped": skipped}


class Clock:
    """Times an epoch's training without its validation; a resumed run differs in these figures only."""

    def __init__(self, device, step_images):
        self.device, self.step_images = device, step_images
        self.restart()

    def restart(self):
        self.steps, self.waited, self.start = 0, 0.0, time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @contextlib.contextmanager
    def waiting(self):
        """Around the wait for the loader."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def read(self):
        seconds = time.perf_counter() - self.start
        return {"images_per_s": self.steps * self.step_images / seconds if self.steps else None,
                "wait_s": self.waited, "seconds": seconds, "peak_memory_mib": peak_memory(self.device)}


def peak_memory(device):
    """MiB: of torch on a GPU, of the process elsewhere; None where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ModuleNotFoundError:                               # Windows
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# ------------------------------------------------------------ the state of a run
class State:
    """How far a run has come, and the files it writes; start() gives it what is trained.

    best_path: checkpoint with the highest validation mIoU; last_path: checkpoint with the last weights and
    all that resuming needs; settings: everything that would change the result, equal in a resumed run."""

    def __init__(self, name, args, world, train, val, teachers=()):
        self.name, self.world = name, world
        self.best_path = Path(args.out) / f"{name}.pth"
        self.last_path = Path(args.out) / "checkpoints" / f"{name}.pth"
        irrelevant = ("out", "overwrite", "save_minutes", "workers", "demo")
        settings = {key: value for key, value in vars(args).items() if key not in irrelevant}
        settings.update(masks=train.label_format, classes=train.classes, data=(train.digest, val.digest),
                        teachers=teachers, device=world.device.type, processes=world.size,
                        amp=str(amp_dtype(args.amp, world.device)),
                        transformers=transformers.__version__.split(".")[0])  # it orders the parameters
        self.settings = as_json(settings)
        self.meta = {"arch": args.arch, "classes": train.classes, "size": args.size,
                     "image_size": list(train.sizes[0]), "args": as_json(vars(args))}
        self.step, self.best, self.done = 0, -1.0, False
        self.history: list[dict] = []                         # one record per epoch
        self.sums: dict = {}                                  # of the present epoch, see add_to_sums
        self.header: dict = {}                                # the first line of the log
        self.saved = None if args.overwrite else find_saved(self.last_path, self.best_path, self.settings)
        for key in ("step", "best", "done", "history", "sums", "header") if self.saved else ():
            setattr(self, key, self.saved["training"][key])

    def start(self, model, optimizer, scaler, adapters, header):
        """Takes what is trained, and puts the saved weights back into it."""
        self.model, self.optimizer, self.scaler, self.adapters = model, optimizer, scaler, adapters
        name, device = self.name, self.world.device
        if self.saved:
            training = self.saved["training"]
            model.load_state_dict(translate(self.saved["model_state_dict"], model))
            if not self.done:
                optimizer.load_state_dict(training["optimizer"])
                scaler.load_state_dict(training["scaler"])
                adapters.load_state_dict(training["adapters"])
                self.world.print(f"{name}: resumes after step {self.step} of {header['run']['steps']}")
            for key, value in self.sums.items():  # saved as sums over processes: rank 0 takes them
                self.sums[key] = (value if self.world.rank == 0 else torch.zeros_like(value)).to(device)
            self.saved = None
        else:
            self.header = header
            self.world.print(f"{name}: {header['run']['steps']} steps, {header['run']['batch']}, "
                             f"{header['run']['device']}")
            self.save()                                       # a run killed from here on can be resumed
        write_log(self)

    def record(self, record):
        """Ends an epoch; its weights are kept where their mIoU is the highest so far."""
        self.history.append(record)
        self.sums = {}
        if record["val_miou"] is not None and record["val_miou"] > self.best:
            self.best = record["val_miou"]
            if self.world.rank == 0:
                self.write(self.best_path)

    def save(self):
        """Writes `last_path`. Every process calls this, since the sums of all are added; rank 0 writes."""
        training = {"step": self.step, "best": self.best, "done": self.done, "history": self.history,
                    "sums": {name: self.world.sum(value) for name, value in self.sums.items()},
                    "header": self.header, "settings": self.settings}
        if not self.done:
            training["optimizer"], training["scaler"] = self.optimizer.state_dict(), self.scaler.state_dict()
            training["adapters"] = self.adapters.state_dict()
        if self.world.rank == 0:
            self.write(self.last_path, training=training)

    def write(self, path, **extra):
        last = self.history[-1] if self.history else {}
        save_model(path, self.model, **self.meta, epoch=last.get("epoch", 0), val_miou=last.get("val_miou"),
                   val_iou=last.get("val_iou") or {}, **extra)

    def way_on(self):
        """The end of a message that asks for other settings, which resuming would refuse."""
        return f"with --init {self.last_path}, the last saved state, and another --out"

    def result(self):
        return f"last mIoU {self.history[-1]['val_miou']:.4f}, best {self.best:.4f}"


def find_saved(last_path, best_path, settings):
    """The content of `last_path`, or None where no run has begun; InputError if it cannot be resumed."""
    if not last_path.exists():
        if best_path.exists():
            raise InputError(f"{best_path}: exists, but no state of its run; --overwrite replaces it, --out "
                             "DIR keeps it")
        return None
    try:
        saved = safe_load(last_path)
        old, done, step = (saved["training"][key] for key in ("settings", "done", "step"))
        changed = sorted(key for key in old.keys() | settings if old.get(key) != settings.get(key))
    except (InputError, KeyError, TypeError, AttributeError):
        raise InputError(f"{last_path}: is damaged or no state of a run; --overwrite starts again, --out DIR "
                         "keeps it") from None
    texts, unprintable = [], {"data": "other pairs or labels", "classes": "another table",
                              "teachers": "other weights"}
    for key in changed:
        flag = key if key in ("processes", "data", "transformers") else f"--{key.replace('_', '-')}"
        values = f"was {str(old.get(key))[:40]}, now {str(settings.get(key))[:40]}"
        texts.append(f"{flag} ({unprintable.get(key, values)})")
    if texts and step == 0:                                   # nothing was trained, so nothing is lost
        return None
    if texts:
        raise InputError(f"{last_path}: the saved run had other settings: {', '.join(texts)}; --overwrite "
                         "starts again, --out DIR keeps both")
    if done and not best_path.exists():
        raise InputError(f"{best_path}: is gone, though its run has finished; {last_path} holds the last "
                         "weights, --overwrite trains again")
    return saved


def as_json(value):
    """Tuples and paths as JSON has them, so that a stored value equals a fresh one."""
    return json.loads(json.dumps(value, default=str))


# ------------------------------------------------------------ the log
def describe_run(model, args, train, val, world, dtype, total, steps_per_epoch):
    versions = {"python": platform.python_version(), "torch": str(torch.__version__),
                "torchvision": str(torchvision.__version__), "transformers": transformers.__version__}
    images = args.batch_size * args.accumulate * world.size
    batch = (f"batch {args.batch_size} x {args.accumulate} accumulated x {world.size} process(es) = "
             f"{images}, {steps_per_epoch} steps per epoch")
    return {"run": {"args": as_json(vars(args)), "steps": total, "batch": batch, "processes": world.size,
                    "versions": versions, "device": describe_device(world.device, dtype),
                    "machine": platform.machine(), "parameters": sum(p.numel() for p in model.parameters()),
                    "pairs": [len(train), len(val)], "size": args.size, "image_size": list(train.sizes[0]),
                    "classes": data.class_names(train.classes)}}


def write_log(state):
    """Writes the whole log and its table, each epoch once: torn lines and epochs not kept disappear."""
    if state.world.rank == 0:
        lines = "".join(json.dumps(entry) + "\n" for entry in (state.header, *state.history))
        data.write_atomic(state.best_path.with_suffix(".jsonl"), lines.encode())
        data.write_atomic(state.best_path.with_suffix(".csv"), csv_table(state.history).encode())


def csv_table(history):
    """Epoch records as CSV: one row each, with those of val_iou as val_iou_NAME; None is empty. The columns
    are those of all epochs together."""
    rows, columns = [], {"epoch": None, "step": None}
    for record in history:
        row = {key: value for key, value in record.items() if key != "val_iou"}
        for name, value in (record["val_iou"] or {}).items():
            row[f"val_iou_{name}"] = value
        rows.append(row)
        columns.update(dict.fromkeys(row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def report(state, classes, parts, bar):
    """After an epoch: the log, the curves (of `parts` of the loss too), and a line on the screen."""
    write_log(state)
    if state.world.rank > 0:
        return
    last = state.history[-1]
    parts = [part for part in parts if last[part] != last["loss"]]                  # no line hides another
    name = "training_curves.png" if state.name == "best_student" else f"{state.name}_curves.png"
    data.save_image(state.best_path.with_name(name), draw_curves(state.history, classes, parts))
    text = f"{state.name}: epoch {last['epoch']}, step {last['step']}"
    for key, form in (("loss", ", loss {:.4f}"), ("val_miou", ", mIoU {:.4f}"),
                      ("images_per_s", ", {:.1f} images/s")):
        if last[key] is not None:
            text += form.format(last[key])
    bar.write(text, file=sys.stdout)


# ------------------------------------------------------------ processes and signals
class World(NamedTuple):
    """This process among those that torchrun started."""
    rank: int
    size: int
    device: torch.device
    host_group: object = None                    # a gloo group: what the CPUs agree on must not wait for GPUs

    def print(self, text):
        if self.rank == 0:
            print(text, flush=True)

    def sum(self, tensor):
        """The sum of a tensor over all processes."""
        tensor = tensor.clone()
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self):
        """Returns when all processes have come here."""
        self.max(0)

    def max(self, *values):
        """The largest of each whole number over all processes."""
        if self.size == 1:
            return values
        shared = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.host_group)
        return shared.tolist()

    @contextlib.contextmanager
    def rank_0_first(self):
        """Rank 0 runs the block before the others do. If it fails, the other ranks exit without a message."""
        # all meet in max(): the others at once, rank 0 after its block, with whether it failed
        if self.rank > 0 and self.max(0)[0]:
            raise SystemExit(2)
        failed = True
        try:
            yield
            failed = False
        finally:
            if self.rank == 0:
                self.max(failed)


@contextlib.contextmanager
def join_processes(device_flag):
    """Joins the processes that torchrun started (nccl on GPUs, else gloo); yields this one's World."""
    device, size = pick_device(device_flag), int(os.environ.get("WORLD_SIZE", "1"))
    torch.backends.cudnn.benchmark = True                     # all crops have one size
    if size == 1:
        yield World(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    with warnings.catch_warnings():
        # of 1x1 convolutions, whose two memory orders are one; of a flag renamed in torch 2.15
        warnings.filterwarnings("ignore", "Grad strides do not match|.*broadcast_buffers")
        try:
            yield World(dist.get_rank(), size, device, dist.new_group(backend="gloo"))
        finally:
            dist.destroy_process_group()


class Interrupt(BaseException):
    """A signal that arrived, at a moment when training can stop. No `except Exception` must catch it: it may
    arrive while a file is decoded."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number


class Stopped(data.CommandError):
    """A run that a signal ended, and that can be resumed; the exit status is the shell's, 130 or 143."""

    def __init__(self, message, number):
        super().__init__(message)
        self.status = 128 + number


class Signals:
    """Remembers the first SIGINT or SIGTERM in `number`; a second one ends the process at once."""

    def __init__(self):
        self.number, self.at_once, self.previous = 0, False, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():                    # Python allows no other
            for which in (signal.SIGINT, signal.SIGTERM):
                self.previous[which] = signal.signal(which, self.handle)
        return self

    def handle(self, number, frame):
        self.number = number
        os.write(2, b"\nstopping after this step; once more stops at once, without saving\n")
        for which in self.previous:
            signal.signal(which, signal.SIG_DFL)
        if self.at_once:
            raise Interrupt(number)

    @contextlib.contextmanager
    def raised_at_once(self, wanted):
        """Within this block a signal raises Interrupt instead of waiting for the end of a step."""
        if wanted and self.number:
            raise Interrupt(self.number)
        self.at_once = wanted
        yield
        self.at_once = False

    def __exit__(self, *error):
        for which, handler in self.previous.items():
            signal.signal(which, handler)


# ------------------------------------------------------------ checks, flags, the command
def nonfinite_error(state, parts, batches, train):
    values = ", ".join(f"{name} {float(value):.4g}" for name, value in parts.items())
    names = [train.images[n].name for batch in batches for n in batch.indices.tolist()]
    return RunError(f"{state.name}: the last {CHECK_EVERY} gradients or more were not finite, stopped at "
                    f"step {state.step} ({values}; images {' '.join(names)}); lower --lr or use --amp off or "
                    f"bf16, {state.way_on()}")


@contextlib.contextmanager
def out_of_memory_error(args, state):
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and "allocate memory" not in str(error):
            raise
        raise RunError(f"out of memory with --batch-size {args.batch_size} --size {args.size}; lower them, "
                       f"and raise --accumulate (now {args.accumulate}) to keep the batch, {state.way_on()}"
                       ) from None


def open_data(args, world):
    """(training split, validation split, (C,) class weights); rank 0 reads and checks all files first."""
    classes, root, out = data.load_classes(args.classes), data.find_data(args.data), Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {args.out}: cannot be made ({error.strerror}); choose another") from None
    with world.rank_0_first():
        train = data.Split(root, "train", classes, args.masks, out, args.unlabelled, args.val_share)
        val = data.Split(root, "val", classes, args.masks, out, val_share=args.val_share)
        check_batch(args, len(train), world)
    world.print(train.describe())
    world.print(val.describe())
    empty = [name for name, n in zip(data.class_names(classes), train.counts.sum(0), strict=True) if not n]
    if empty:
        world.print(f"train: no pixel of {', '.join(empty)}; these classes weigh 1 and cannot be learnt")
    return train, val, data.class_weights(train.counts, args.class_weights).to(world.device)


def unlabelled_of_batch(args):
    """How many images of each batch have no label."""
    return round(args.unlabelled_share * args.batch_size) if args.unlabelled else 0


def pairs_per_step(args, world):
    return (args.batch_size - unlabelled_of_batch(args)) * args.accumulate * world.size


def check_batch(args, pairs, world):
    if args.arch == "deeplab" and args.batch_size < 2:
        raise InputError("--batch-size 1: DeepLab's BatchNorm after global pooling needs at least 2 images")
    need = pairs_per_step(args, world)
    if need > pairs:
        raise InputError(f"--batch-size {args.batch_size}: a step takes {need} pairs (x --accumulate x "
                         f"processes), the training split holds {pairs}; lower it or --accumulate")


def add_train_flags(parser):
    """The flags that train_teacher.py and distill.py share."""
    number, group = data.number, data.add_data_flags(parser)
    group.add_argument("--size", type=data.image_side, default=512,
                       help="side of a crop and shorter side of a whole image, in pixels")
    group.add_argument("--workers", type=number(int, 0, 256), default=min(4, data.count_cores()),
                       help="processes that read files")
    group.add_argument("--rare-class-sampling", action="store_true",
                       help="draw images with rare classes more often (DAFormer)")
    group = parser.add_argument_group("training")
    group.add_argument("--init-partial", action="store_true",
                       help="--init takes a ResNet50 that lacks whole layers; these start at random")
    group.add_argument("--epochs", type=number(int, 1), default=50, help="passes over the training pairs")
    group.add_argument("--steps", type=number(int, 1), metavar="N", help="end after N steps")
    group.add_argument("--batch-size", type=number(int, 1), default=8, help="images per process and forward")
    group.add_argument("--accumulate", type=number(int, 1), default=1, metavar="N",
                       help="forwards per step: N times the batch in the same memory")
    group.add_argument("--lr", type=number(float, 1e-12, 1), default=6e-5,
                       help="AdamW's peak rate for the encoder; the head has ten times it")
    group.add_argument("--class-weights", choices=["median", "sqrt", "none"], default="median",
                       help="of the hard loss: median frequency, its square root, or none")
    group.add_argument("--eval-every", type=number(int, 1), default=1, metavar="N",
                       help="epochs between validations")
    group.add_argument("--seed", type=number(int, 0, 2**31), default=0,
                       help="of weights, order and augmentation")
    group = parser.add_argument_group("run")
    group.add_argument("--out", metavar="DIR", default="outputs", help="for checkpoints, log and curves")
    group.add_argument("--save-minutes", type=number(float, 0), default=10,
                       help="minutes between two saved states")
    group.add_argument("--overwrite", action="store_true", help="start again where a run exists")
    group.add_argument("--compile", action="store_true", help="torch.compile: slow start, faster steps")
    parser.set_defaults(unlabelled=[], unlabelled_share=0.0)  # flags of distill.py


def main(argv=()):
    parser = data.Parser(__doc__, "python train_teacher.py --arch deeplab --batch-size 4 --accumulate 2")
    group = add_model_flags(parser, "deeplab")
    group.add_argument("--init", default="imagenet", metavar="imagenet|random|PATH",
                       help="first weights; PATH: a ResNet50 or MobileNetV3-Large state dict, a "
                       "checkpoint, or a SegFormer's folder or name on the Hugging Face hub")
    add_train_flags(parser)
    args = parser.parse_args(argv)
    with join_processes(args.device) as world:
        train, val, class_weight = open_data(args, world)
        state = State(TEACHER_NAMES.get(args.arch, args.arch), args, world, train, val)
        torch.manual_seed(args.seed)
        init = "random" if state.saved else args.init         # saved weights replace the first ones
        model = build(args.arch, train.classes, init, args.init_partial)

        def prepare(batch):
            batch = data.augment_on_device(batch, world.device)
            return batch._replace(weights={"hard": hard_weights(batch.target, class_weight)})

        def loss_fn(network, batch, progress):
            loss = hard_loss(network(batch.image), batch.target, batch.weights["hard"])
            return loss, {"hard": loss}

        return fit(model, state, prepare, loss_fn, train, val, class_weight, args, world)


if __name__ == "__main__":
    data.run_command(main)
