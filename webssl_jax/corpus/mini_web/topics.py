"""The probe's label: one coarse topic for pictures of several sources, by their folders and
categories.

Every topic is drawn by at least two sources, so that a network must look at what is shown and not
at how it is drawn. A folder of mixed content, or one whose topic a colour histogram would guess,
has no topic: its pictures are for pretraining only.
"""

from __future__ import annotations

# The first prefix that fits gives the topic; None: no topic.
OPENCLIPART = (
    ("animals", "animals"),
    ("buildings/furniture", "furniture"),
    ("buildings", "buildings"),
    ("computer/hardware", "electronics"),
    ("electronics", "electronics"),
    ("food", "food"),
    ("geography/astronomy", "sky"),
    ("office/telephone", "electronics"),
    ("people/bodypart", "people"),
    ("people/clothing", "clothes"),
    ("people/smilies", "faces"),
    ("people/stickmen", None),
    ("people", "people"),
    ("plants", "plants"),
    ("recreation/music", "music"),
    ("recreation/sports", "sport"),
    ("science/astronomy", "sky"),
    ("signs_and_symbols/flags/semaphore", None),
    ("signs_and_symbols/flags", "flags"),
    ("signs_and_symbols/weather", "sky"),
    ("signs_and_symbols/clocks", None),
    ("signs_and_symbols/led", None),
    ("signs_and_symbols", "signs"),
    ("tools/toys", None),
    ("tools", "tools"),
    ("transportation/aiga-symbols", "signs"),
    ("transportation/roadsigns", "signs"),
    ("transportation", "vehicles"),
)
TUXPAINT = (
    ("animals", "animals"),
    ("clothes", "clothes"),
    ("food", "food"),
    ("hobbies/music", "music"),
    ("household/electronics", "electronics"),
    ("household/tools", "tools"),
    ("military/vehicles", "vehicles"),
    ("people", "people"),
    ("plants", "plants"),
    ("space", "sky"),
    ("sports", "sport"),
    ("symbols/faces", "faces"),
    ("symbols/music", "music"),
    ("town/flags", "flags"),
    ("town/roadsigns", "signs"),
    ("town", "buildings"),
    ("vehicles", "vehicles"),
)
PYSIOGAME = (
    ("actions", "people"),
    ("animals", "animals"),
    ("body", "people"),
    ("clothes_n_accessories", "clothes"),
    ("construction", "tools"),
    ("food", "food"),
    ("fruit_n_veg", "food"),
    ("jobs", "people"),
    ("people", "people"),
    ("sport", "sport"),
    ("transport", "vehicles"),
)
# category/subcategory of emoji.json, lower case
EMOJI = (
    ("activities/sport", "sport"),
    ("animals & nature/animal", "animals"),
    ("animals & nature/plant", "plants"),
    ("flags", "flags"),
    ("food & drink", "food"),
    ("objects/clothing", "clothes"),
    ("objects/computer", "electronics"),
    ("objects/light & video", "electronics"),
    ("objects/phone", "electronics"),
    ("objects/music", "music"),
    ("objects/musical-instrument", "music"),
    ("objects/tool", "tools"),
    ("people & body/person-sport", "sport"),
    ("people & body/family", None),
    ("people & body", "people"),
    ("smileys & emotion/face", "faces"),
    ("smileys & emotion/cat-face", "faces"),
    ("symbols/geometric", None),
    ("symbols", "signs"),
    ("travel & places/place-building", "buildings"),
    ("travel & places/place-religious", "buildings"),
    ("travel & places/sky & weather", "sky"),
    ("travel & places/transport", "vehicles"),
)
# Names of emoji whose subcategory holds other things too.
EMOJI_FURNITURE = (
    "door",
    "bed",
    "couch and lamp",
    "chair",
    "toilet",
    "shower",
    "bathtub",
    "window",
)
SWEETHOME = (
    ("Bathroom", "furniture"),
    ("Bedroom", "furniture"),
    ("Characters", "people"),
    ("Kitchen", "furniture"),
    ("Living room", "furniture"),
    ("Office", "furniture"),
    ("Vehicles", "vehicles"),
)


def topic(table: tuple[tuple[str, str | None], ...], folder: str) -> str | None:
    """The topic of ``folder`` by the first row of ``table`` whose prefix ends at a word's end or
    inside it."""
    return next((name for prefix, name in table if folder.startswith(prefix)), None)
