"""What is measured: each case with its contestants, and the rows of the table with their goals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

# --- what a contestant does ---


@dataclass(frozen=True)
class Model:
    """Size of a transformer."""

    dim: int
    depth: int
    heads: int


TINY, SMALL = Model(192, 12, 3), Model(384, 12, 6)
BASE, LARGE = Model(768, 12, 12), Model(1024, 24, 16)
LIGHT_DECODER, PAPERS_DECODER = Model(128, 4, 4), Model(512, 8, 16)


@dataclass(frozen=True)
class Training:
    """A training step on one fixed batch; with a decoder that of a masked autoencoder."""

    unit: ClassVar[str] = "images/s"
    image: int  # pixels a side
    patch: int  # pixels a token, of a linear stem
    batch: int
    model: Model = TINY
    classes: int = 10
    stem: Literal["linear", "r26", "r50"] = "linear"
    decoder: Model | None = None


@dataclass(frozen=True)
class Input:
    """Batches of augmented, normalised float tensors from images in memory."""

    unit: ClassVar[str] = "images/s"
    policy: Literal["flip", "randaugment"]  # padded crop + flip, or resized crop + flip + policy
    batch: int = 128
    image: int = 32
    images: int = 50_000
    workers: int = 2


@dataclass(frozen=True)
class Whole:
    """A process that trains from scratch and says how often it is right on the test images."""

    unit: ClassVar[str] = "runs/s"
    data: Literal["fashion_mnist", "cifar10"]
    images: int = 5000
    epochs: int = 5


@dataclass(frozen=True)
class Command:
    """A process from its start to its end."""

    unit: ClassVar[str] = "runs/s"
    what: Literal["import", "help", "list", "report"]
    runs: int = 100  # that are reported


@dataclass(frozen=True)
class Product:
    """Large bf16 matrix products: the limit of the device."""

    unit: ClassVar[str] = "FLOP/s"


Job = Training | Input | Whole | Command | Product


# --- cases ---


@dataclass(frozen=True)
class Contestant:
    """A framework at a job, in a setting of `settings.py`."""

    framework: Literal["ours", "timm", "lightly", "transformers", "torchvision", "torch"]
    setting: Literal["best", "as it comes", "fp32", "products", "compiled"]
    job: Job

    @property
    def in_bf16(self) -> bool:
        """Whether it multiplies matrices in bf16, which some CPUs have no instructions for."""
        return self.setting != "fp32" and isinstance(self.job, Training | Whole | Product)


@dataclass(frozen=True)
class Row:
    """A row of the table.

    `kind` says what is made of the rates of the contestants `first` and `second` in each round:
    `ratio` first / second; `utilisation` the same of FLOPs a second; `share` FLOPs a second of
    first / second; `rate` of first; `seconds` of first; `seconds above` those of second.
    Goals are reached from above, those in seconds from below.
    """

    what: str
    against: str
    kind: Literal["ratio", "utilisation", "share", "rate", "seconds", "seconds above"]
    first: str
    second: str | None = None
    goal: float | None = None


@dataclass(frozen=True)
class Case:
    """Contestants that take turns, and what is read off them."""

    title: str
    contestants: dict[str, Contestant]
    rows: tuple[Row, ...]
    device: Literal["cpu", "cuda"] = "cpu"  # that its goals are meant for


PEAK = Contestant("torch", "as it comes", Product())
IN_WORDS = {
    "as it comes": "as it comes, bf16",
    "best": "at its best (attention as is fastest, fused AdamW, torch.compile), bf16",
    "fp32": "as it comes, fp32",
}

Goals = dict[tuple[str, str], float]  # ratios by the peer's framework and setting


def steps(
    title: str,
    job: Training,
    goals: Goals,
    *,
    share: float | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
) -> Case:
    """Our training step against the peers in `goals`, and as a share of the matrix peak; on a CPU
    also what the step would be if it took no time for anything but its products."""
    contestants = {"ours": Contestant("ours", "best", job)}
    rows = []
    for (framework, setting), goal in goals.items():
        name = framework if setting == "as it comes" else f"{framework} {setting}"
        contestants[name] = Contestant(framework, setting, job)  # type: ignore[arg-type]
        ours = "ours fp32" if setting == "fp32" else "ours"
        contestants.setdefault(ours, Contestant("ours", "fp32", job))
        against = f"{framework} {IN_WORDS[setting]}"
        what = f"{title}, fp32" if setting == "fp32" else title
        rows.append(Row(what, against, "ratio", ours, name, goal or None))
    if device == "cpu":
        first = rows[0]
        contestants["our products"] = Contestant("ours", "products", job)
        what = f"{title}, its matrix products and convolutions alone"
        rows.append(Row(what, first.against, "ratio", "our products", first.second))
    if share is not None:
        contestants["matrix product"] = PEAK
        against = "measured peak of a bf16 matrix product"
        rows.append(Row(title, against, "share", "ours", "matrix product", share or None))
    return Case(title, contestants, tuple(rows), device)


def timm_goals(comes: float, best: float, *, fp32: bool = False) -> Goals:
    """Ratios to timm; that of fp32 is shown without a goal."""
    goals = {("timm", "as it comes"): comes, ("timm", "best"): best}
    return goals | ({("timm", "fp32"): 0.0} if fp32 else {})


def mae_goals(comes: float, best: float, transformers: float, transformers_best: float) -> Goals:
    """Ratios to lightly and transformers; 0 for those without a goal."""
    return {
        ("lightly", "as it comes"): comes,
        ("lightly", "best"): best,
        ("transformers", "as it comes"): transformers,
        ("transformers", "best"): transformers_best,
    }


def utilisation(title: str, job: Training) -> Case:
    """Whether masked training uses the machine as well as supervised training does; also if
    products alone took time in both."""
    supervised = replace(job, decoder=None)
    contestants = {
        "ours": Contestant("ours", "best", job),
        "ours supervised": Contestant("ours", "best", supervised),
        "our products": Contestant("ours", "products", job),
        "our products supervised": Contestant("ours", "products", supervised),
    }
    against = "our supervised step, both as images/s x FLOPs an image"
    alone = f"{title}, matrix products and convolutions of both alone"
    rows = (
        Row(title, against, "utilisation", "ours", "ours supervised", 0.9),
        Row(alone, against, "utilisation", "our products", "our products supervised"),
    )
    return Case(title, contestants, rows)


def inputs(title: str, job: Input, peer: str, against: str, goal: float) -> Case:
    """Our resident input against a peer's loader."""
    contestants = {
        "ours": Contestant("ours", "best", job),
        peer: Contestant(peer, "as it comes", job),  # type: ignore[arg-type]
    }
    return Case(title, contestants, (Row(title, against, "ratio", "ours", peer, goal),))


def whole(title: str, job: Whole) -> Case:
    """Our command line against a script on timm's factories; also if compiling cost nothing."""
    contestants = {
        "ours": Contestant("ours", "best", job),
        "timm": Contestant("timm", "as it comes", job),
        "ours compiled": Contestant("ours", "compiled", job),
    }
    against = "benchmarks/timm_train.py on timm's factories, bf16"
    rows = (
        Row(title, against, "ratio", "ours", "timm", 2.5),
        Row(f"{title}, all compiled beforehand", against, "ratio", "ours compiled", "timm"),
    )
    return Case(title, contestants, rows)


def start_up() -> Case:
    """How long commands take that train nothing."""
    contestants = {"import torch": Contestant("torch", "as it comes", Command("import"))}
    for what in ("help", "list", "report"):
        contestants[what] = Contestant("ours", "best", Command(what))
    rows = (
        Row("hybridvit --help", "", "seconds", "help", goal=0.3),
        Row(
            "hybridvit list", "a bare `import torch`", "seconds above", "list", "import torch", 0.7
        ),
        Row("hybridvit report of 100 runs", "", "seconds", "report", goal=2.0),
    )
    return Case("start-up", contestants, rows)


def resident(title: str, *policies: Literal["flip", "randaugment"]) -> Case:
    """How many images a second are augmented on the device."""
    words = {"flip": "crop + flip", "randaugment": "random resized crop + flip + RandAugment"}
    contestants = {
        words[p]: Contestant("ours", "best", Input(p, batch=8192, images=100_000)) for p in policies
    }
    rows = tuple(Row(f"{title}, {name}", "", "rate", name, goal=1e6) for name in contestants)
    return Case(title, contestants, rows, "cuda")


_SMALL_STEP = Training(32, 4, 128)
_LARGE_STEP = Training(224, 16, 32, classes=1000)
_LARGE_MAE = replace(_LARGE_STEP, decoder=LIGHT_DECODER)
_SMALL_MAE = replace(_SMALL_STEP, decoder=LIGHT_DECODER)


def _on_gpu(title: str, job: Training, share: float) -> Case:
    goals = timm_goals(1.2, 1.05) if job.decoder is None else mae_goals(1.2, 1.05, 1.5, 1.05)
    return steps(title, job, goals, share=share, device="cuda")


CASES: dict[str, Case] = {
    "supervised-32-4": steps(
        "supervised step, 32/4", _SMALL_STEP, timm_goals(2.4, 1.15, fp32=True), share=0.20
    ),
    "supervised-224-16": steps(
        "supervised step, 224/16", _LARGE_STEP, timm_goals(1.7, 1.15, fp32=True), share=0.18
    ),
    "hybrid-224": steps(
        "hybrid step, R26 + small, 224",
        Training(224, 32, 16, SMALL, 1000, "r26"),
        timm_goals(1.3, 1.1),
    ),
    "mae-32-4": steps("MAE step, 32/4", _SMALL_MAE, mae_goals(2.4, 1.1, 0, 0)),
    "mae-224-16": steps("MAE step, 224/16", _LARGE_MAE, mae_goals(1.8, 1.1, 0, 0)),
    "mae-utilisation-32-4": utilisation("MAE step, 32/4", _SMALL_MAE),
    "mae-utilisation-224-16": utilisation("MAE step, 224/16", _LARGE_MAE),
    "input-flip": inputs(
        "input 32 px, crop + flip, resident",
        Input("flip"),
        "torchvision",
        "torchvision's transforms on PIL images, DataLoader, 2 workers",
        12,
    ),
    "input-randaugment": inputs(
        "input 32 px, random resized crop + flip + RandAugment, resident",
        Input("randaugment"),
        "timm",
        "timm's create_loader, 2 workers",
        10,
    ),
    "whole-fashion-mnist": whole(
        "5 epochs on 5,000 images of Fashion-MNIST, process start to metrics",
        Whole("fashion_mnist"),
    ),
    "whole-cifar10": whole(
        "5 epochs on 5,000 images of CIFAR-10, process start to metrics", Whole("cifar10")
    ),
    "start-up": start_up(),
    # For a GPU, in the order in which they matter.
    "b16": _on_gpu("supervised step, B/16, 224", Training(224, 16, 256, BASE, 1000), 0.5),
    "mae-b16": _on_gpu(
        "MAE step, B/16, 224", Training(224, 16, 512, BASE, decoder=PAPERS_DECODER), 0.45
    ),
    "r50-b16": _on_gpu(
        "hybrid step, R50 + B/16, 224", Training(224, 16, 128, BASE, 1000, "r50"), 0.0
    ),
    "tiny-32-4": _on_gpu("supervised step, tiny, 32/4", Training(32, 4, 2048, TINY), 0.0),
    "s16": _on_gpu("supervised step, S/16, 224", Training(224, 16, 512, SMALL, 1000), 0.0),
    "l16": _on_gpu("supervised step, L/16, 224", Training(224, 16, 128, LARGE, 1000), 0.5),
    "r26-s32": _on_gpu(
        "hybrid step, R26 + S/32, 224", Training(224, 32, 512, SMALL, 1000, "r26"), 0.0
    ),
    "mae-l16": _on_gpu(
        "MAE step, L/16, 224", Training(224, 16, 256, LARGE, decoder=PAPERS_DECODER), 0.45
    ),
    "small-32-4": _on_gpu("supervised step, small, 32/4", Training(32, 4, 1024, SMALL), 0.0),
    "augment-32": resident("resident input, 32 px", "flip", "randaugment"),
}
