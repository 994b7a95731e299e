"""Answers of a model to questions with a true response, and how near they come to it.

An answer is the likeliest byte at each step, up to a stop string: the same in training, in a table
of many, and for the prompt alone.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from bdh_lib.compute.state import State
from bdh_lib.data.formats import END_OF_RESPONSE
from bdh_lib.data.questions import Question, cut_question, question_numbers
from bdh_lib.data.split import Split
from bdh_lib.files import parse_json
from bdh_lib.generation.decoding import Decoding, decode_text
from bdh_lib.generation.jobs import complete_jobs
from bdh_lib.generation.sampling import Sampling
from bdh_lib.tables import format_table

GREEDY = Sampling(temperature=0)
CHRF_ORDER, CHRF_BETA = 6, 2  # longest n-grams of characters; recall counts as beta times precision


class QuestionJob(NamedTuple):
    """An answer to generate, as jobs.Job is a text."""

    number: int  # of the record in its data set, from 1
    question: Question

    result_names = ("answer", "stopped", "chrf")

    @property
    def prompt(self) -> bytes:
        return self.question.prompt

    def result(self, text: str, stopped: bool, source: str) -> dict:
        """Return what is asked, the true response, and the answer with its chrF."""
        prompt, truth, structure = self.question
        result = {"record": self.number, "structure": structure, "by": source}
        result |= {"prompt": decode_text(prompt), "truth": truth}
        return result | {"answer": text, "stopped": stopped, "chrf": round(chrf(text, truth), 2)}


def question_jobs(records: Split, n: int) -> list[QuestionJob]:
    """Return up to `n` questions of the records, drawn by a fixed seed: the same for all models."""
    numbers = question_numbers(records)
    drawn = np.random.default_rng(0).permutation(len(numbers))[:n]
    return [QuestionJob(int(i) + 1, cut_question(records, i)) for i in numbers[np.sort(drawn)]]


def answer_questions(
    model, questions: Sequence[Question], max_new_tokens: int, stop, window: int | None = None
) -> list[dict]:
    """Return prompt, truth and answer of each question, as text.

    The model sees `window` bytes at most. `stop`, a StopSignal, ends it early.
    """
    stops = [text.encode() for text in END_OF_RESPONSE]
    start = State(window=window)
    decoding = Decoding(model, GREEDY, mx.random.key(0), stops, max_new_tokens, start)
    jobs = [QuestionJob(i, question) for i, question in enumerate(questions)]
    # one by one: a state each takes memory, and a CPU no less time
    texts = {job.number: text for job, text, _ in complete_jobs(jobs, decoding, 1, stop=stop)}
    model.decode_step = None  # free its copy of the weights: training will change them
    return [
        {"prompt": decode_text(question.prompt), "truth": question.truth, "answer": texts[i]}
        for i, question in enumerate(questions)
        if i in texts
    ]


# ------------------------------------------------------------------------------------------ scores


def chrf(answer: str, truth: str) -> float:
    """Return chrF2 of an answer, from 0 to 100 (Popovic 2015, 2016).

    It is the F-score of n-grams of characters without white space, n from 1 to 6, with recall
    weighted by 2. It equals `CHRF().sentence_score(answer, [truth])` of sacrebleu. These lines
    stand in its place, so that a figure does not depend on what is installed.
    """
    answer, truth = ("".join(text.split()) for text in (answer, truth))
    shares = []  # of the n-grams that match: of those of the answer, of those of the truth
    for n in range(1, CHRF_ORDER + 1):
        a, b = (Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in (answer, truth))
        if a and b:
            matching = (a & b).total()
            shares.append((matching / a.total(), matching / b.total()))
    if not any(map(sum, shares)):
        return 0.0
    precision, recall = np.mean(shares, 0).tolist()
    weight = CHRF_BETA**2
    return 100 * (1 + weight) * precision * recall / (weight * precision + recall)


def collect_rows(results: Iterator, rows: list[dict]) -> Iterator:
    """Yield the results of jobs, and append what each adds to a table."""
    for job, text, stopped in results:
        rows.append(job.result(text, stopped, ""))
        yield job, text, stopped


def read_results(out: Path | None) -> list[dict]:
    """Return the results in a file of them; none without one."""
    is_file = out and out.is_file()
    return [parse_json(line) for line in out.read_bytes().splitlines()] if is_file else []


def scores(rows: Sequence[dict]) -> tuple[float, float, float]:
    """Return the shares of answers that equal and that contain the truth, and the mean chrF."""
    pairs = [(row["answer"].strip(), row["truth"].strip()) for row in rows]
    equal, contain = zip(*((a == t, t in a) for a, t in pairs), strict=True)
    return float(np.mean(equal)), float(np.mean(contain)), float(np.mean([r["chrf"] for r in rows]))


def answers_table(rows: Sequence[dict]) -> str:
    """Return a table of the scores of results, by structure."""
    table = [("structure", "answers", "equal", "contain it", "chrF")]
    structures = Counter(row["structure"] for row in rows).most_common()
    for structure in (*(name for name, _ in structures), "whole"):
        chosen = [row for row in rows if structure in ("whole", row["structure"])]
        equal, contain, mean_chrf = scores(chosen)
        counts = (f"{len(chosen):,}", f"{equal:.1%}", f"{contain:.1%}", f"{mean_chrf:.1f}")
        table.append((structure, *counts))
    return format_table(table)
