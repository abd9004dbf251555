"""What heads in training take of the memory, and which stacks fit it together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.errors import PipelineError
from pipeline.grid import Stack
from pipeline.head import Head
from pipeline.job import Goal


@dataclass(frozen=True, kw_only=True)
class Need:
    """The bytes that a stack takes."""

    stack: Stack
    weights: int  # as long as it trains
    vectors: float  # only while one of its groups of heads is computed


def weight_bytes(head: Head) -> int:
    """What a head in training keeps: weights, gradient, moments, the best epoch's copy, and buffers."""
    return 4 * (5 * head.n_parameters()[0] + sum(buffer.numel() for buffer in head.buffers()))


def vector_bytes(goal: Goal, tokens: float) -> float:
    """What a head's forward over some tokens keeps, and the gradients of that."""
    return 4 * 2 * tokens * ((len(goal.spec.layers) + 8) * goal.spec.width + goal.spec.n_classes)


def stack_size(goal: Goal, head: Head, tokens: float, memory_bytes: int) -> int:
    """How many heads of a shape fit the memory: what each keeps, and a batch's vectors.

    Args:
        goal: their shape.
        head: one of them.
        tokens: of a batch.
        memory_bytes: for heads.

    Raises:
        PipelineError: not even one fits.
    """
    each = int(weight_bytes(head) + vector_bytes(goal, tokens))
    if each > memory_bytes:
        raise PipelineError(
            f"--memory {2 * memory_bytes / 2**30:.2g}GiB: one head of {goal.spec.fusion} takes about "
            f"{each / 2**30:.2g}GiB of the half that is for heads, give more or lower --batch-size"
        )
    return memory_bytes // each


def waves(needs: Sequence[Need], memory_bytes: int, *, at_work: int) -> Iterator[list[Stack]]:
    """Stacks of one stream in groups that fit the memory: all weights, the vectors of those at work.

    Args:
        needs: of each stack.
        memory_bytes: for heads.
        at_work: stacks that are computed at once; the rest of a wave waits.
    """
    wave: list[Need] = []
    for need in needs:
        longer = [*wave, need]
        vectors = sorted(one.vectors for one in longer)[-at_work:]
        if wave and sum(one.weights for one in longer) + sum(vectors) > memory_bytes:
            yield [one.stack for one in wave]
            longer = [need]
        wave = longer
    if wave:
        yield [one.stack for one in wave]
