"""What the images of the reading set say (reading.py), for those who do not draw."""

import string

# One letter apart or two, so that the outline of a word is not enough.
WORDS = tuple(
    "ball bell bill bull cake came cane cape card cart cast cat coat cold cord corn cot cut dog "
    "dot hand hard heat hint hot land lane last late lint list lost mast mint moon most noon post "
    "rain ruin".split()
)
# A folder of each.
KINDS: dict[str, tuple[str, ...]] = {
    "characters": tuple(string.digits + string.ascii_uppercase),
    "words": WORDS,
}
