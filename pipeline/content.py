"""Fingerprints of what training on banks reads: an unfinished run goes on only while they are the same."""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy import ndarray

from cache import Bank, Target
from pipeline.job import Job


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
    }


def target_content(target: Target) -> str:
    """Of the labels of one split."""
    described = repr((target.kind, target.names, target.metric, target.settings))
    values = target.values, *(target.extra[key] for key in sorted(target.extra))
    return _sha256(*values, start=described.encode())


def _sha256(*arrays: ndarray, start: bytes = b"") -> str:
    digest = hashlib.sha256(start)
    for values in arrays:
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()
