"""The named sets of prompts."""

from fastnabla.testbed.silhouettes import ANIMALS, PHRASINGS, caption

SIMPLE_ANIMALS = """
    cat dog horse donkey cow pig sheep goat rabbit mouse squirrel hedgehog fox wolf bear panda deer camel lion tiger
    elephant giraffe zebra monkey gorilla kangaroo otter seal dolphin whale shark frog turtle snake lizard crocodile
    eagle owl parrot penguin swan duck chicken butterfly bee
"""

PROMPT_SETS = {
    "simple-animals": tuple(f"a photo of {caption(animal)}" for animal in SIMPLE_ANIMALS.split()),
    "animals": tuple(caption(animal) for animal in ANIMALS),
    "animals-phrased": tuple(caption(animal, i) for animal in ANIMALS for i in range(len(PHRASINGS))),
}
"""Name → prompts. The last two are the testbed's."""
