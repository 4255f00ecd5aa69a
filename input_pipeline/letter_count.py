"""Questions how often a letter stands in a word. `dataset_name: letter_count` is a set of them.

Rows are as those of oumi-ai/oumi-letter-count are stored; `known.letter_count` asks for a boxed number with them.
"""

import functools
from collections.abc import Sequence
from typing import Any

from input_pipeline.generated import Draw, Generated, positive

HELD_OUT = 8  # of so many words one is not in the split "train"
ABSENT = 10  # of so many questions one is about any letter, which the word may lack

QUESTIONS = (
    "How many times does the letter '{letter}' occur in '{word}'?",
    "How many '{letter}'s are there in '{word}'?",
    "Count the '{letter}'s in the word '{word}'.",
    "Please tell me how often '{letter}' stands in '{word}'.",
    "In the word '{word}', how many letters are '{letter}'?",
    "What is the number of '{letter}'s in '{word}'?",
    "Look at the word '{word}'. How many times is the letter '{letter}' used?",
    "'{word}': how many '{letter}'s does it have?",
)
WORDS = """
    acorn address afternoon alfalfa alphabet amaranth ambassador anemone apple apprentice apricot aqueduct
    arithmetic artichoke assembly assessment asparagus attention attic avocado baboon baker balcony balloon banana
    barley barnacle barrel basket bassoon bazaar beginner believe bellflower berry bicycle blackberry blossom
    bookkeeper bottle bran bread breakfast brewery broccoli broom bubble buckwheat buffalo bulgur bumblebee butter
    buttercup butterfly cabbage calendar callback cannon caramel caravan carrot cashew cassava cattle cauliflower
    celebration cellar cereal cheese cherry chestnut chimney chocolate cinnamon circle clover cobblestone coffee
    collar committee concurrence condition corn corridor cotton cracker cranberry cricket crossroads crust cucumber
    curriculum custard daffodil dandelion deed degree dessert difference dinner disappear discussion dizzy dough
    dressing drizzle drummer dumpling durum eagle ear eggplant eggshell einkorn element elephant eleven embassy
    emerald emmer endive engineer entrance essence evening excellence expression fallow farmer feather fennel
    festival fiddle field flannel flavour flour foggy fonio food forget freekeh fritter funnel furrow gallop garden
    garlic gazelle gentleman germ ginger giraffe glossary gluten goggles gooseberry grain granary granola grass
    grassland green griddle groats grocery hammer hammock happiness harness harvest hay hazelnut hedgehog herring
    hibiscus hill hippopotamus honey honeycomb hopscotch horizon hull hummingbird illness impossible independence
    indigo insect intelligence irrigation island ivory jacket jelly jewellery juggler juniper kamut kangaroo kernel
    kettle kitten knee knowledge ladder lagoon lantern lavender leaf legume lemon lentil lesson letter lettuce
    lightning lilac linseed little llama loaf lollipop luggage macaroni machinery malt mammal mango marigold
    marmalade marshmallow mathematics meadow melon merry message midsummer mill millet millstone minimum mirror
    mississippi missing moonlight mosquito muffin mushroom mustard narrative nettle noodle nuisance nutmeg oatmeal
    oats occasion occurrence octopus olive omelette onion opossum opposite orange orchard oregano otter oven paddle
    paddock pancake papaya parallel parrot parsley passenger pasta pattern peanut pebble pepper peppermint perennial
    philosophy pickle pigeon pillow pineapple pizza plough pollen pomegranate poppy porridge possession potato
    prairie pretzel professor pudding pumpkin puppet puzzle quarrel queen quinoa rabbit raccoon radish rainbow
    raspberry recommend referee refreshment rehearsal rhubarb ribbon rice ripple robin roller rosemary rotation
    rudder ruler rye saddle saffron salad sandwich scarecrow scissors seed seedling semolina sesame settlement sheaf
    sheep shepherd shutter sickle silo simmer snow soil sorghum sorrel sourdough soybean sparrow spelt spinach
    spring squirrel stalk stallion starling stem strawberry straw stubble substantial success suffix sugar summer
    sunflower sunrise supper sweetness syllable syrup tangerine tannin tarragon tassel tattoo teff terrace thistle
    thresh threshing thunder tillage toffee tomato tomorrow tractor tree triticale trillion turmeric turnip umbrella
    underneath unnecessary vacuum valley vanilla vegetable vermicelli vessel village vinegar violet waffle wagon
    walnut warehouse watermelon weather weevil wheat wheelbarrow whisper whole wildflower willow windmill winnow
    winter witness wooden woodpecker woollen yarrow yeast yellow yesterday yoghurt zebra zigzag zucchini
""".split()  # noqa: SIM905


def letter_count(
    size: int = 1000, *, seed: int = 0, split: str = "train", shortest_word: int = 3, longest_word: int = 14
) -> Generated:
    """`size` questions about words of so many letters. No word of the split "train" is in another one."""
    positive(size, "size")
    positive(shortest_word, "shortest_word")
    positive(longest_word, "longest_word", low=shortest_word)
    trained = split == "train"
    words = [
        word
        for number, word in enumerate(WORDS)
        if shortest_word <= len(word) <= longest_word and (number % HELD_OUT != 0) == trained
    ]
    if not words:
        raise ValueError(
            f"dataset_name letter_count has no word of {shortest_word} to {longest_word} letters for the split"
            f" {split!r}; widen dataset_kwargs.shortest_word and longest_word"
        )
    return Generated(functools.partial(_row, words), seed, split, size)


def _row(words: Sequence[str], draw: Draw) -> dict[str, Any]:
    word = words[draw(len(words))]
    letters = "abcdefghijklmnopqrstuvwxyz" if draw(ABSENT) == 0 else word
    letter = letters[draw(len(letters))]
    question = QUESTIONS[draw(len(QUESTIONS))].format(letter=letter, word=word)
    return {
        "messages": [{"role": "user", "content": question}],
        "metadata": {"letter": letter, "letter_count_integer": word.count(letter)},
    }
