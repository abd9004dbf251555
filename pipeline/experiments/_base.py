"""What every experiment is: data sets and an encoder in, findings out."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from cache import EncoderRecord, open_bank
from cache.bank import is_bank
from cache.layout import Keep
from pipeline import parts
from pipeline.batches import memory_budget
from pipeline.checkpoint import load_model, weights_sha256
from pipeline.corpus import Corpus, load_corpus
from pipeline.device import pick_device, pick_precision, side_by_side
from pipeline.errors import PipelineError
from pipeline.experiments._content import bank_content, data_content
from pipeline.experiments._reading import Reading
from pipeline.extract import Extraction
from pipeline.findings import Findings, save
from pipeline.grid import Grid
from pipeline.job import HeadRates, Precision, Schedule
from pipeline.repeat import extract_once
from pipeline.results import RESULT
from pipeline.run import train_run
from pipeline.runner import Plan
from pipeline.sweep import sweep
from pipeline.train import Progress
from pipeline.tuning.run import Asked, TaskAsked, make_plan, plain_task, tune_run


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set, or a bank that was made of one, with the targets asked for on it."""

    path: str
    targets: tuple[str, ...]

    @property
    def name(self) -> str:
        """A short name for tables and folders: that of its folder or task."""
        return Path(self.path.rstrip("/")).name.replace(":", "-").replace("@", "-")

    @cached_property
    def is_bank(self) -> bool:
        """Whether its states are there already, in a bank of the user's."""
        return is_bank(self.path)

    @classmethod
    def parse(cls, text: str) -> "Data":
        """From ``DATA::TARGET`` or ``DATA::TARGET,TARGET``; DATA may be a bank.

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
    banks: Path | str  # a folder or a URL, shared by experiments that are given the same
    runs: Path | None = None  # single runs, shared likewise; below `out` by default
    encoder_revision: str | None = None
    trust_remote_code: bool = False
    reading: Reading = field(default_factory=Reading)
    device: str = "auto"
    precision: str = "auto"  # of the heads' products
    memory_bytes: int | None = None  # by the device
    note: Callable[[str], None] = field(default=lambda _: None)
    lost: list[str] = field(default_factory=list)  # what is to be told of heads that failed
    _contents: dict[tuple[str, str], str] = field(default_factory=dict, repr=False)

    def bank(self, data: Data, keep: Keep = "words", **choices: Any) -> str:
        """The bank of a data set, extracted where it is not there; a bank that was given is taken as it is.

        Args:
            data: whose bank.
            keep: which tokens are kept.
            choices: further arguments of `pipeline.extract.extract`.

        Returns:
            Its folder or URL.

        Raises:
            PipelineError: the data or the encoder cannot be read.
            CacheError: the bank cannot be written, or is of another making.
        """
        return data.path if data.is_bank else self.extract(data, keep, **choices).store

    def extract(self, data: Data, keep: Keep = "words", **choices: Any) -> Extraction:
        """What filling the bank of a data set took; takes and raises what `bank` does."""
        self.check_text(data)
        asked = {**self.reading.given, **choices}
        store = "-".join([f"{self.banks}/{data.name}", keep, *([digest(asked)] if asked else [])])
        opening = {
            "name": self.encoder, "revision": self.encoder_revision, "precision": "auto",
            "device": self.device, "trust_remote_code": self.trust_remote_code,
        }  # fmt: skip
        stored = {**self.reading.stored, **choices}
        made = extract_once(self._corpus(data), opening, store, keep=keep, **stored)
        if made.blocks_encoded:
            self.note(f"extracted {data.name}: {made.examples} examples in {made.seconds:.1f} s")
        return made

    def check_text(self, *data: Data, instead: str = "") -> None:
        """Refuses banks where the text itself is needed.

        Args:
            data: what is to be text.
            instead: what else the user may do.

        Raises:
            PipelineError: one is a bank.
        """
        for one in data:
            if one.is_bank:
                raise PipelineError(
                    f"{one.path} is a bank, and an extraction or a run through the encoder needs the text: "
                    f"give the data that it was made of{instead}"
                )

    def plan(self, store: str, schedule: Schedule, **choices: Any) -> Plan:
        """What the stacks of a sweep on a bank share."""
        return Plan(
            store=store, schedule=schedule, memory_bytes=self.memory_bytes,
            device=str(pick_device(self.device)), **choices,
        )  # fmt: skip

    def sweep(
        self,
        name: str,
        plan: Plan,
        grid: Grid,
        *,
        keep_heads: bool = True,
        progress: Progress = lambda *_: None,
    ) -> list[dict[str, Any]]:
        """The rows of a sweep's heads, those that failed left out and noted in `lost`.

        Finished stacks are kept below the experiment's folder.

        Raises:
            PipelineError: every head of a fusion on a target failed.
        """
        self.note(f"{name}: {plan.store}")
        rows = sweep(
            plan, grid, out=str(self.folder(name)), keep_heads=keep_heads, note=self.note, progress=progress
        )["rows"]
        whole = [row for row in rows if row["status"] == "ok"]
        alive = {(row["fusion"], row["target"]) for row in whole}
        for row in (row for row in rows if row["status"] != "ok"):
            said = f"{name}: {row['fusion']} on {row['target']}, lr {row['lr']:g}, seed {row['seed']}"
            if (row["fusion"], row["target"]) not in alive:
                raise PipelineError(f"{said} {row['status']}, as all its heads did: give a lower --set lr")
            self.lost.append(f"{said} {row['status']} and does not count")
        return whole

    def sweeps(self, asked: Mapping[str, tuple[Plan, Grid]]) -> dict[str, list[dict[str, Any]]]:
        """Several sweeps that do not wait for each other, by name; heads are not kept.

        On a CPU each is on a thread of its own, where there are enough of them: stacks that read different
        examples cannot step together, and products shared by threads wait for the slowest. They begin in
        the order given, so the dearest should come first.

        Raises:
            PipelineError: as for `sweep`.
        """
        device = pick_device(self.device)
        threads, failed = torch.get_num_threads(), list[BaseException]()

        def go_on(*_: Any) -> None:
            if failed:
                raise PipelineError("another sweep of the experiment ended early")

        def one(name: str, memory_bytes: int) -> list[dict[str, Any]]:
            go_on()
            plan, grid = asked[name]
            plan = replace(plan, memory_bytes=memory_bytes)
            try:
                return self.sweep(name, plan, grid, keep_heads=False, progress=go_on)
            except BaseException as error:
                failed.append(error)
                raise

        with side_by_side(device, len(asked)) as run:
            memory_bytes = memory_budget(device, self.memory_bytes) // (threads // torch.get_num_threads())
            try:
                return dict(
                    zip(asked, run([partial(one, name, memory_bytes) for name in asked]), strict=True)
                )
            except BaseException as error:
                failed.append(error)  # Ctrl-C is known here alone; the others end after their epoch
                raise failed[0] from None

    def folder(self, name: str) -> Path:
        """Where a sweep is kept."""
        return self.out / "sweeps" / name

    @cached_property
    def encoder_parameters(self) -> int:
        """Parameters of the encoder that its states depend on."""
        named = self._model().named_parameters()
        return sum(p.numel() for name, p in named if not name.startswith("pooler."))

    @cached_property
    def encoder_sha256(self) -> str:
        """Fingerprint of the encoder's weights."""
        return weights_sha256(self._model())

    def _model(self) -> Any:
        return load_model(self.encoder, self.encoder_revision, trust_remote_code=self.trust_remote_code)

    def _content(self, data: Data, target: str) -> str:
        """Fingerprint of rows and labels; the rows are read once."""
        key = data.path, target
        if key not in self._contents:
            self._contents[key] = data_content(self._corpus(data), target)
        return self._contents[key]

    def _corpus(self, data: Data) -> Corpus:
        return load_corpus(data.path, revision=self.reading.revision, **self.reading.columns)

    def train(self, name: str, store: str, target: str, *, schedule: Schedule, **choices: Any) -> Path:
        """A head trained alone, as its costs are measured; one that is there is used again.

        Args:
            name: begins the name of the run's folder; the rest tells what was asked.
            store: the bank.
            target: what to learn.
            schedule: epochs and batches.
            choices: fusion, decoder, options and lr.

        Returns:
            The run folder.

        Raises:
            PipelineError: a choice does not fit.
        """
        rates = HeadRates(lr=choices.pop("lr", HeadRates.lr))
        content = bank_content(store, target)
        out = self._run_folder(name, [target, asdict(schedule), asdict(rates), choices, content])
        if not (out / RESULT).is_file():
            self.note(f"{name}: train on {store}")
            train_run(
                store, target=target, out=str(out), schedule=schedule, rates=rates, overwrite=out.exists(),
                device=pick_device(self.device), memory_bytes=self.memory_bytes, **choices,
            )  # fmt: skip
        return out

    def tune(
        self,
        name: str,
        method: str,
        tasks: Sequence[tuple[Data, str]],
        *,
        plan: Mapping[str, Any],
        **choices: Any,
    ) -> Path:
        """A run through the encoder; one that is there is used again, one that was cut off goes on.

        Args:
            name: begins the name of the run's folder; the rest tells what was asked.
            method: of early fusion.
            tasks: data sets and their targets; the first is what the run is for.
            plan: epochs, seed and the like; what is None is the method's own.
            choices: further fields of `pipeline.tuning.run.Asked`, such as fusion, options, prompts; and
                `maskings` of masked text.

        Returns:
            The run folder.

        Raises:
            PipelineError: a choice does not fit.
        """
        self.check_text(*(data for data, _ in tasks))
        maskings = choices.pop("maskings", None)
        max_length = choices.pop("max_length", None) or self.reading.max_length
        read: dict[str, Any] = {"columns": self.reading.columns, "revision": self.reading.revision}
        tried = [TaskAsked(data=one.path, target=name, maskings=maskings, **read) for one, name in tasks]
        asked = Asked(
            tasks=tried, method=method, out="", encoder=self.encoder,
            encoder_revision=self.encoder_revision, trust_remote_code=self.trust_remote_code,
            max_length=max_length, **choices,
        )  # fmt: skip
        made = make_plan(method, **plan)
        # A folder of prompts has a name that tells what is in it; where it lies is no matter.
        of_prompts = asked.prompts and Path(asked.prompts).name
        named = {**asdict(replace(asked, prompts=of_prompts)), "tasks": [plain_task(one) for one in tried]}
        content = [self._content(data, target) for data, target in tasks]
        out = self._run_folder(name, [named, asdict(made), content, self.encoder_sha256])
        if not (out / RESULT).is_file():
            self.note(f"{name}: tune by {method}")
            tune_run(replace(asked, out=str(out)), made, device=pick_device(self.device))
        return out

    def _run_folder(self, name: str, asked: Any) -> Path:
        """A folder for one run, of another name wherever anything else is asked for or was read."""
        return (self.runs or self.out / "runs") / f"{name}-{digest(asked)}"

    @property
    def product_precision(self) -> Precision:
        """The precision of the heads' products on this device."""
        return pick_precision(self.precision, pick_device(self.device))


def encoder_of(data: Sequence[Data]) -> EncoderRecord:
    """The encoder of the first bank among some data.

    Raises:
        PipelineError: there is no bank among them.
        CacheError: the bank is not complete.
    """
    banks = [one for one in data if one.is_bank]
    if not banks:
        raise PipelineError(
            f"no --encoder, and {data[0].path} is no bank, which would name its own: give a Hub id or a "
            "directory"
        )
    return open_bank(banks[0].path).recipe.encoder


def digest(asked: Any) -> str:
    """A short name for all that was asked."""
    text = json.dumps(asked, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


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


def _check_encoder(lab: Lab) -> None:
    """Refuses banks among the data that are of another encoder than the rest.

    Raises:
        PipelineError: one is.
    """
    made_by = {data.path: open_bank(data.path).recipe.encoder for data in lab.data if data.is_bank}
    first = next(iter(made_by.values()), None)
    for path, one in made_by.items():
        # The encoder itself is read only where it is asked for: a bank may have outlived its files.
        same = one == first if lab.encoder == one.name else one.weights_sha256 == lab.encoder_sha256
        if not same:
            raise PipelineError(
                f"{path} is of the encoder {one.name}, the experiment of {lab.encoder}: give data of one "
                "encoder"
            )


def perform(name: str, options: Mapping[str, Any], lab: Lab) -> dict[str, Any]:
    """Runs an experiment and writes its findings.

    Args:
        name: of its file, with - or _ between words; or a dotted path.
        options: its options, as text or of the right type.
        lab: what it works with.

    Returns:
        As `pipeline.findings.save`.

    Raises:
        PipelineError: there is no such experiment or option, or the data do not fit it.
    """
    _check_encoder(lab)
    if lab.reading.given and all(data.is_bank for data in lab.data):
        flag = next(iter(lab.reading.given)).replace("_", "-")
        raise PipelineError(f"--{flag}: all DATA are banks, which stay as they are: leave it out")
    part = parts.load("experiment", name.replace("-", "_"))
    findings = part(**parts.options(part, options)).run(lab)
    return save(replace(findings, notes=(*findings.notes, *lab.lost)), str(lab.out))
