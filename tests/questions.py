"""Rows of questions for the tests: answers that are spans of a text, and options to choose from."""

import json

import numpy as np
import tiny

NOUNS, COLOURS = tiny.NOUNS, tiny.COLOURS


def question_rows(split, n):
    """Questions for the colour of a thing; the answer is the word before it, a span of the context."""
    random = np.random.default_rng([len(split), 5])
    rows = []
    for k in range(n):
        colours, nouns = random.permutation(COLOURS), random.permutation(NOUNS)
        context = f"The {colours[0]} {nouns[0]}, the {colours[1]} {nouns[1]}!"
        which = int(random.integers(2))
        rows.append(
            {
                "id": str(k),
                "question": str(nouns[which]),
                "context": context,
                "answers": {
                    "text": [str(colours[which])],
                    "answer_start": [context.index(str(colours[which]))],
                },
            }
        )
    return rows


def choice_rows(split, n):
    """Which option names the thing of the premise."""
    random = np.random.default_rng([len(split), 6])
    rows = []
    for _ in range(n):
        nouns = [str(noun) for noun in random.permutation(NOUNS)]
        n_options = int(random.integers(2, 5))
        right = int(random.integers(n_options))
        options = [f"the {COLOURS[k % 3]} {noun}" for k, noun in enumerate(nouns[:n_options])]
        rows.append({"text": f"open the {nouns[right]}", "options": options, "label": right})
    return rows


def write(folder, make, sizes):
    folder.mkdir(parents=True, exist_ok=True)
    for split, n in sizes.items():
        lines = "".join(json.dumps(row) + "\n" for row in make(split, n))
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return str(folder)
