"""Fingerprints of what training on banks reads: an unfinished run goes on only while they are the same."""

import hashlib
import inspect
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np
from numpy import ndarray

from cache import Bank, Target
from pipeline import parts
from pipeline.job import Job
from pipeline.versions import versions


def read_by(jobs: Iterable[tuple[Bank, Job]]) -> dict[str, Any]:
    """Of all that jobs read, by what it is.

    Args:
        jobs: each with the bank that it reads.
    """
    all_jobs = list(jobs)
    return {
        "states of the bank": [bank.fingerprint for bank, _ in all_jobs],
        "labels": [[target_content(job.target), _sha256(job.dev.gold)] for _, job in all_jobs],
        "runs that this one starts from": [
            {name: _sha256(value.numpy()) for name, value in job.spec.taken.items()} for _, job in all_jobs
        ],
        "code of fusion or decoder": [
            [_source("fusion", job.spec.fusion), _source("decoder", job.spec.decoder)]
            for _, job in all_jobs
        ],
        "version of layerbank": versions()["layerbank"],
    }


def _source(kind: str, name: str) -> str:
    """Of the module that a part is written in; of nothing where its source is not to be had."""
    module = sys.modules[parts.load(kind, name).__module__]
    with suppress(OSError, TypeError):
        return _sha256(start=inspect.getsource(module).encode())
    return _sha256()


def target_content(target: Target) -> str:
    """Of the labels of one split."""
    # Where an output layer lies is no matter: the bank's fingerprint has its encoder.
    settings = {name: value for name, value in target.settings.items() if name != "output_layer"}
    described = repr((target.kind, target.names, target.metric, settings))
    values = target.values, *(target.extra[key] for key in sorted(target.extra))
    return _sha256(*values, start=described.encode())


def _sha256(*arrays: ndarray, start: bytes = b"") -> str:
    digest = hashlib.sha256(start)
    for values in arrays:
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()
