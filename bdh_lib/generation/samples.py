"""What a model writes in the course of its training: samples, and answers to held-out records."""

import mlx.core as mx

from bdh_lib.compute.state import State, fitting_window
from bdh_lib.data.formats import sample_prompts
from bdh_lib.data.questions import N_QUESTIONS, choose_questions
from bdh_lib.data.split import Split
from bdh_lib.generation.answers import answer_questions
from bdh_lib.generation.decoding import Decoding, complete_prompts
from bdh_lib.generation.sampling import Sampling
from bdh_lib.progress import heartbeat
from bdh_lib.settings import Settings
from bdh_mlx import BDH


def write_samples(s: Settings, step: int, model: BDH, val: Split, stop) -> dict:
    """Return `samples` after the prompts of the mode, and `answers` to records of `val`, if any.

    Each has up to SAMPLE_BYTES bytes. `stop`, a StopSignal, ends them early.
    """
    prompts = sample_prompts(s.TRAINING_MODE, val.field_names())
    if s.SAMPLE_BYTES > 1000:
        print(f"writing {len(prompts)} samples of {s.SAMPLE_BYTES:,} bytes")
    questions = choose_questions(val, N_QUESTIONS, s.BLOCK_SIZE, s.SAMPLE_BYTES)
    longest = max(map(len, [*prompts, *(question.prompt for question in questions)]))
    window = fitting_window(longest + s.SAMPLE_BYTES, s.BLOCK_SIZE)
    decoding = Decoding(
        model,
        Sampling(temperature=0.8, top_k=50),
        mx.random.key(s.SEED + step),
        max_new_tokens=s.SAMPLE_BYTES,
        start=State(window=window),
    )
    with heartbeat("writing samples"):
        samples = list(complete_prompts(decoding, prompts, stop))
        answers = answer_questions(model, questions, s.SAMPLE_BYTES, stop, window)
    return {"samples": samples} | ({"answers": answers} if answers else {})
