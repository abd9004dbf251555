"""Some rows of massive by chance, the same in every language, as data folders to try an experiment on."""

import json
import random
from pathlib import Path

from _common import parser, show
from early_fusion_table import rows_of

made = parser(__doc__)
made.add_argument("--languages", default="en-US,de-DE,es-ES,fr-FR,sw-KE,tr-TR")
made.add_argument("--rows", default="3000,1000,1000", help="of train, dev and test")
arguments = made.parse_args()


def write(language: str) -> Path:
    """A folder of a language; every intent of dev and test is one of train."""
    folder: Path = arguments.work / "parallel" / language
    folder.mkdir(parents=True, exist_ok=True)
    known: set[str] = set()
    for split, n_rows in zip(("train", "dev", "test"), arguments.rows.split(","), strict=True):
        rows = rows_of(arguments.data / "massive" / language / f"{split}.jsonl")
        drawn = random.Random(0).sample(sorted(rows, key=lambda row: int(row["id"])), int(n_rows))
        known = known or {row["intent"] for row in drawn}
        kept = [{name: row[name] for name in ("tokens", "intent")} for row in drawn]
        lines = [json.dumps(row) for row in kept if row["intent"] in known]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


show(folders=[str(write(language)) for language in arguments.languages.split(",")])
