"""Which layers depth-wise attention adds to the last one."""

from typing import ClassVar

from pipeline.analysis._base import Answer, Question
from pipeline.analysis._material import Material
from pipeline.analysis._shares import share_answer
from pipeline.analysis.attention import DEPTH


class Depth(Question):
    """DWAtt's softmax over depth: the weights of v_1..v_L, that join z_L (DWAtt paper, eq. 3-11)."""

    paper: ClassVar[str] = "DWAtt, eq. 3-11"

    def lacks(self, material: Material) -> str:
        """Heads of `dwatt`."""
        if any(record.method == DEPTH for record in material.records):
            return ""
        return "no run of dwatt: train one with --fusion dwatt"

    def answer(self, material: Material) -> Answer:
        """Averages the weights of every decoded token."""
        runs = [run for run in material.runs if run.spec.fusion == DEPTH]
        return share_answer(material, runs, name="depth", title="Depth-wise attention")


QUESTION = Depth
