"""VQA accuracy (Antol et al., 2015): an answer is right as far as people gave it.

The normalisation is that of the challenge's server as TextVQA's scorer has it, with what is odd
there: periods go unless a digit follows, at most 32 of them, and "somebody'd" loses its apostrophe.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# Words whose apostrophe people leave out; of those with two, one at a time.
_CONTRACTED = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()
_CONTRACTIONS = {"somebody'd": "somebodyd"} | {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED
    for place, character in enumerate(word)
    if character == "'"
}
_NUMBERS = "zero one two three four five six seven eight nine ten".split()
_DIGITS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBERS)}
_ARTICLES = ("a", "an", "the")
_MARKS = ';/[]"{}()=+\\_->@`<!'  # commas and question marks are gone before
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32


def normalise(text: str) -> str:
    """Lower case; without punctuation, articles and number words; contractions with apostrophes."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    for mark in _MARKS:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_blank else " ")
    cleaned = _PERIOD.sub("", cleaned, count=_MOST_PERIODS)
    words = (_DIGITS.get(word, word) for word in cleaned.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """0 to 1: for each of ``people``, a third for each of the others who said the same as the
    answer, at most 1; the mean over them."""
    answer = normalise(answer)
    same = [normalise(other) == answer for other in people]
    agreeing = sum(same)
    return sum(min(1.0, (agreeing - own) / 3) for own in same) / len(people)
