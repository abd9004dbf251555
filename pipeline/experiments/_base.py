"""What every experiment is: data sets and an encoder in, findings out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from cache.layout import Keep
from pipeline import parts
from pipeline.checkpoint import load_model
from pipeline.corpus import load_corpus
from pipeline.device import pick_device, pick_precision
from pipeline.encoder import open_encoder
from pipeline.errors import PipelineError
from pipeline.extract import extract
from pipeline.findings import Findings, save
from pipeline.grid import Grid
from pipeline.job import Precision, Schedule
from pipeline.results import finite
from pipeline.runner import Plan
from pipeline.sweep import sweep


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set with the targets asked for on it."""

    path: str
    targets: tuple[str, ...]

    @property
    def name(self) -> str:
        """A short name for tables and folders: that of its folder or task."""
        return Path(self.path.rstrip("/")).name.replace(":", "-").replace("@", "-")

    @classmethod
    def parse(cls, text: str) -> "Data":
        """From ``DATA::TARGET`` or ``DATA::TARGET,TARGET``.

        Raises:
            PipelineError: there is no target.
        """
        path, colons, targets = text.rpartition("::")
        names = tuple(name.strip() for name in targets.split(",") if name.strip())
        if not (path and colons and names):
            raise PipelineError(f"{text}: give DATA::TARGET, or DATA::TARGET,TARGET")
        return cls(path=path, targets=names)


@dataclass(frozen=True, kw_only=True)
class Lab:
    """What an experiment works with. Banks and finished heads that are there are used again."""

    out: Path
    encoder: str
    data: tuple[Data, ...]
    banks: Path  # shared by experiments that are given the same folder
    encoder_revision: str | None = None
    device: str = "auto"
    precision: str = "auto"  # of the heads' products
    memory_bytes: int = 4 * 2**30
    note: Callable[[str], None] = field(default=lambda _: None)

    def bank(self, data: Data, keep: Keep = "words") -> str:
        """The bank of a data set, extracted where it is not there.

        Returns:
            Its folder.

        Raises:
            PipelineError: the data or the encoder cannot be read.
            CacheError: the bank cannot be written, or is of another making.
        """
        store = str(self.banks / f"{data.name}-{keep}")
        corpus = load_corpus(data.path)
        encoder = open_encoder(
            self.encoder, revision=self.encoder_revision, precision="auto", store=store,
            device=self.device, words=corpus.words is not None, trust_remote_code=False,
        )  # fmt: skip
        made = extract(corpus, encoder, store, keep=keep)
        if made.blocks_encoded:
            self.note(f"extracted {data.name}: {made.examples} examples in {made.seconds:.1f} s")
        return store

    def plan(self, store: str, schedule: Schedule, **choices: Any) -> Plan:
        """What the stacks of a sweep on a bank share."""
        return Plan(
            store=store, schedule=schedule, memory_bytes=self.memory_bytes,
            device=str(pick_device(self.device)), **choices,
        )  # fmt: skip

    def sweep(self, name: str, plan: Plan, grid: Grid, *, keep_heads: bool = True) -> list[dict[str, Any]]:
        """The rows of a sweep, whose finished stacks are kept below the experiment's folder."""
        self.note(f"{name}: {plan.store}")
        found = sweep(plan, grid, out=str(self.folder(name)), keep_heads=keep_heads, note=self.note)
        return list(found["rows"])

    def folder(self, name: str) -> Path:
        """Where a sweep is kept."""
        return self.out / "sweeps" / name

    @cached_property
    def encoder_parameters(self) -> int:
        """Parameters of the encoder that its states depend on."""
        model = load_model(self.encoder, self.encoder_revision, trust_remote_code=False)
        return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("pooler."))

    @property
    def product_precision(self) -> Precision:
        """The precision of the heads' products on this device."""
        return pick_precision(self.precision, pick_device(self.device))


class Experiment(ABC):
    """One experiment. The keyword-only arguments of its constructor are its options (``--set``)."""

    title: ClassVar[str]
    paper: ClassVar[str]
    """What it reproduces, by paper and table or figure; empty where it is new here."""

    @abstractmethod
    def run(self, lab: Lab) -> Findings:
        """Does all the work.

        Raises:
            PipelineError: the data do not fit the experiment.
        """


def perform(name: str, options: Mapping[str, Any], lab: Lab) -> dict[str, Any]:
    """Runs an experiment and writes its findings.

    Args:
        name: of its file, with - or _ between words; or a dotted path.
        options: its options, as text or of the right type.
        lab: what it works with.

    Returns:
        `out`, `name`, `title`, `seconds`, `notes`, `tables` (each with title, columns and rows), `files`.

    Raises:
        PipelineError: there is no such experiment or option, or the data do not fit it.
    """
    part = parts.load("experiment", name.replace("-", "_"))
    findings = part(**parts.options(part, options)).run(lab)
    files = save(findings, str(lab.out))
    return {
        "out": str(lab.out),
        "name": findings.name,
        "title": findings.title,
        "seconds": findings.seconds,
        "notes": list(findings.notes),
        "tables": [finite(asdict(table)) for table in findings.tables],
        "files": files,
    }
