"""Text for the language demo, and what else can foretell it: an n-gram model and a compressor."""

from __future__ import annotations

import lzma
import math
from collections import Counter, defaultdict

from unisono.demos._data import existing
from unisono.errors import DataError


def read_text(path: str | None) -> str:
    """*local*. The file's text, or Python's help on its topics with each paragraph once.

    Raises:
        DataError: The file is not UTF-8 text, or too short.
    """
    if path is None:
        from pydoc_data.topics import topics

        paragraphs = (part.strip("\n") for topic in sorted(topics) for part in topics[topic].strip().split("\n\n"))
        # Many paragraphs stand in several topics: the last tenth must not hold what the rest has said.
        return "\n\n".join({" ".join(paragraph.split()): paragraph for paragraph in paragraphs if paragraph}.values())
    try:
        text = existing(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if len(text) < 4000:
        raise DataError(f"{path} holds {len(text):,} characters: too few to learn from, give it 4,000 or more")
    return text


def n_gram(text: str, begin: int, order: int = 5) -> float:
    """*local*. Bits per character of an n-gram model (Witten and Bell, 1991) on ``text[begin:]``, taught by the rest."""
    counts: list[defaultdict[str, Counter[str]]] = [defaultdict(Counter) for _ in range(order)]
    for place in range(begin):
        for length in range(min(order, place + 1)):
            counts[length][text[place - length : place]][text[place]] += 1
    bits, anything = 0.0, 1 / len(set(text))
    for place in range(begin, len(text)):
        probability = anything
        for length in range(order):
            if seen := counts[length].get(text[place - length : place]):
                probability = (seen[text[place]] + len(seen) * probability) / (seen.total() + len(seen))
        bits -= math.log2(probability)
    return bits / (len(text) - begin)


def compressed(text: str) -> int:
    """*local*. Bits that ``xz -9`` makes of it."""
    return 8 * len(lzma.compress(text.encode(), preset=9))
