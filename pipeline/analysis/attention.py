"""Which layers a fusion looks at: its weights by task, class, language, place and kind of word."""

from typing import ClassVar

from pipeline.analysis._base import Answer, Question
from pipeline.analysis._material import Material, has_weights, weightless
from pipeline.analysis._shares import share_answer

DEPTH = "dwatt"
"""The fusion whose weights are over transformed layers, a question of its own."""


class Attention(Question):
    """Weights over layers of `attention`, `linear`, `mixture` heads (attention-fusion paper, Figure 2)."""

    paper: ClassVar[str] = "Attention Fusion, Figure 2"

    def lacks(self, material: Material) -> str:
        """Heads whose fusion has weights over layers."""
        others = [record for record in material.records if record.method != DEPTH]
        if any(has_weights(record.method) for record in others):
            return ""
        if material.records and not others:
            return f"{material.records[0].path} is of dwatt: give --what depth"
        return weightless(others) or "no run: name runs of attention, linear or mixture"

    def answer(self, material: Material) -> Answer:
        """Averages the weights of every decoded token."""
        runs = [run for run in material.runs if run.spec.fusion != DEPTH]
        return share_answer(material, runs, name="attention", title="Attention over layers")


QUESTION = Attention
