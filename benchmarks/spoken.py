"""Text to speech, heard: held-out texts, digits and letters, beside natural speech and its mel made sound again.

    python benchmarks/spoken.py RUN [--vocoder RUN] [--takes 5] [--json FILE]

Word error rates of held-out texts are by the recogniser with its language model. Digits and letters are single words,
of which such a model knows nothing: there the recogniser has to choose among the ten digits, or the letters, and what
is counted is how often it is right. Each is said several times, with another seed each time; most of the natural ones
were among the training recordings, and all are named as such.
"""

from __future__ import annotations

import argparse
import json
import math
import string
from pathlib import Path
from typing import Any

import torch

import kuosan
from kuosan.progress import Progress
from kuosan.runs import TextToSpeechRun
from kuosan.speech.judge import Recogniser
from kuosan.speech.mel import Mel
from kuosan.speech.words import DIGITS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--vocoder", metavar="RUN")
    parser.add_argument("--takes", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = kuosan.load(options.run)
    assert isinstance(run, TextToSpeechRun), f"{options.run} is {run.kind}"
    held_out = run.quality(len(run.data.held_out), vocoder=options.vocoder)
    print("\n".join(run.medium.quality_in_words(held_out)), flush=True)
    result: dict[str, Any] = {"run": options.run, "step": run.step, "held_out": held_out}
    for name, words in (("digits", DIGITS), ("letters", tuple(string.ascii_lowercase))):
        result[name] = closed(run, name, words, options)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


def closed(run: TextToSpeechRun, name: str, words: tuple[str, ...], options: argparse.Namespace) -> dict[str, Any]:
    """How often single words are heard right, by a recogniser that knows no others."""
    recogniser, sampler = Recogniser(words), run.sampler(vocoder=options.vocoder)
    natural = [
        (text, wave)
        for part in (run.data.train, run.data.held_out)
        for text, wave in zip(part.texts or [], part.waves, strict=True)
        if text in words
    ]
    again = [(text, run.sound(sampler, Mel.of(wave, run.medium.analysis), 0)) for text, wave in natural]
    progress, ours = Progress(name), []
    for done, word in enumerate(words, 1):
        written = word.upper() if len(word) == 1 else word
        for wave in run.sample(seeds=range(options.takes), text=written, vocoder=options.vocoder):
            ours.append((word, wave))
        progress(done, len(words))
    found = {}
    for what, spoken in (("natural", natural), ("natural mel", again), ("ours", ours)):
        heard = [(word, recogniser(wave)) for word, wave in spoken]
        share = sum(word == said for word, said in heard) / len(heard)
        error = math.sqrt(share * (1 - share) / len(heard))
        found[what] = {"right": share, "error": error, "of": len(heard)}
        wrong = sorted({f"{word}->{said or '-'}" for word, said in heard if word != said})
        print(f"{name:8} {what:12} right {share:6.1%} ± {error:.1%} of {len(heard):3}  {' '.join(wrong)}", flush=True)
    return found


if __name__ == "__main__":
    main()
