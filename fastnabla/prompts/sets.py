"""The built-in sets of prompts."""

from fastnabla.testbed.silhouettes import ANIMALS, PHRASINGS, caption

SIMPLE_ANIMALS = """
    cat dog horse donkey cow pig sheep goat rabbit mouse squirrel hedgehog fox wolf bear panda deer camel lion tiger
    elephant giraffe zebra monkey gorilla kangaroo otter seal dolphin whale shark frog turtle snake lizard crocodile
    eagle owl parrot penguin swan duck chicken butterfly bee
"""

# What text-to-image models get wrong: counts, colours, spatial relations, unusual combinations and text.
COMPOSITIONS = """
    three apples on a blue plate | two cats and one dog on a sofa | four red balloons over a lake | one green pear
    among five oranges | seven candles on a chocolate cake | two bicycles leaning against a yellow wall | six white
    eggs in a brown basket | a single sheep between two horses | five umbrellas hanging from a ceiling |
    a red car beside a white van | a purple carrot on a wooden board | a yellow cat with blue eyes | a black swan on
    pink water | an orange door in a grey brick house | a green dog asleep on a red carpet | a blue banana in a bowl
    of limes | a silver spoon in a copper cup | a white crow on a black fence |
    a lamp to the left of a book | a ball under a glass table | a bird standing on the head of a cow | a clock above
    a fireplace and a vase below it | a boat in front of a lighthouse | a spoon inside a jar | a tree growing behind
    a small church | a mouse on top of a sleeping cat | a chair upside down on a desk | a bridge under a rainbow |
    an elephant in a telephone box | a penguin crossing a desert | a whale above the clouds | a snail pulling a
    railway carriage | an astronaut planting tulips | a piano made of ice | a castle built from playing cards | a
    bear reading a newspaper in a bath | a fox in a suit at a bus stop | a giraffe looking out of a submarine |
    a shop sign that says "bread" | a chalkboard with the word "nabla" | a stamp that shows the number 7 | a neon
    sign reading "open" in the rain | a birthday card that says "to Ada" |
    a transparent teapot with a fish inside | a chessboard seen from above | the shadow of a hand in the shape of a
    dog | a mirror reflecting a different room | half an avocado next to a whole one | a small house in a large shoe
"""
SUBJECTS = """
    an old fisherman mending a net | a street market at dawn | a girl with a red kite | a mountain village in snow | a
    steam locomotive leaving a station | a bowl of figs and a jug of wine | a lighthouse in a storm | a violinist in
    an empty theatre | a fox at the edge of a wood | a harbour full of sailing boats | a desert road under stars | a
    potter at the wheel | a greenhouse full of ferns | two people playing chess in a park | an autumn river with
    mist | a tabby cat on a window sill | a stone bridge over a canal | a baker with a tray of loaves | a field of
    poppies at noon | a library with tall ladders
"""
MEDIA = (
    "a photo of {}, natural light",
    "a black and white photo of {}, film grain",
    "an oil painting of {}",
    "a watercolour of {}, loose brushwork",
)


def _split(text: str) -> tuple[str, ...]:
    """Split a text at its bars into prompts."""
    return tuple(" ".join(part.split()) for part in text.split("|"))


PROMPT_SETS = {
    "simple-animals": tuple(f"a photo of {caption(animal)}" for animal in SIMPLE_ANIMALS.split()),
    "compositions": _split(COMPOSITIONS),
    "photos-and-paintings": tuple(medium.format(subject) for medium in MEDIA for subject in _split(SUBJECTS)),
    "animals": tuple(caption(animal) for animal in ANIMALS),
    "animals-phrased": tuple(caption(animal, i) for animal in ANIMALS for i in range(len(PHRASINGS))),
}
"""Name → prompts. The last two sets are for the testbed."""
