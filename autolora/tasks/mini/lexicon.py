"""The words. Each split has its own content words: an open-class word of one entry is in no other split. No torch.

``train`` and ``dev`` speak of everyday life, ``dev_mismatched`` of legends. Closed-class words (quantifiers, negation,
prepositions, pronouns, numbers) are shared, since they carry the meaning that is to be learned.
"""

from __future__ import annotations

from dataclasses import dataclass


def words(text: str) -> tuple[str, ...]:
    """Words separated by blanks; an underscore stands for a blank inside a word."""
    return tuple(word.replace("_", " ") for word in text.split())


def pairs(text: str) -> tuple[tuple[str, str], ...]:
    """Pairs written ``first/second``, separated by blanks; an underscore stands for a blank."""
    halves = (word.split("/") for word in words(text))
    return tuple((first, second) for first, second in halves)


def _groups(text: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    lines = (line.split(":") for line in text.strip().splitlines())
    return tuple((head.strip(), words(members)) for head, members in lines)


@dataclass(frozen=True)
class Lexicon:
    """The open-class words of one split.

    Attributes:
        people: nouns for a person.
        women, men: first names.
        kinds: (hypernym, hyponyms) of countable things one can own.
        states: complementary pairs of adjectives for people.
        orders: pairs of inverse comparatives between people.
        acts: what one person does to another.
        deeds: what a person does alone (intransitive).
        dealings: what a person does with a thing.
        places: where something happens, without the preposition "in".
        looks: adjectives that narrow down a thing.
    """

    people: tuple[str, ...]
    women: tuple[str, ...]
    men: tuple[str, ...]
    kinds: tuple[tuple[str, tuple[str, ...]], ...]
    states: tuple[tuple[str, str], ...]
    orders: tuple[tuple[str, str], ...]
    acts: tuple[str, ...]
    deeds: tuple[str, ...]
    dealings: tuple[str, ...]
    places: tuple[str, ...]
    looks: tuple[str, ...]


_TRAIN = Lexicon(
    people=words(
        "chef pilot nurse farmer lawyer teacher doctor baker driver singer dancer painter writer banker judge student "
        "soldier plumber butcher tailor barber waiter gardener librarian carpenter cashier clerk manager mechanic "
        "photographer scientist secretary surgeon actor poet coach guard neighbor tourist drummer editor"
    ),
    women=words("Anna Maria Susan Laura Emma Julia Karen Linda Alice Helen Sarah Nancy Rachel Diana Grace Claire"),
    men=words("Peter John David Robert Thomas Daniel George Henry Frank Victor Martin Oscar Simon Paul James Kevin"),
    kinds=_groups(
        """
        animal: dog cat horse cow pig goat rabbit sheep donkey
        fruit: apple banana pear peach lemon cherry melon
        vehicle: car truck bus train bicycle tractor
        tool: hammer saw drill shovel wrench axe
        garment: shirt jacket sweater skirt scarf coat
        toy: doll puzzle kite balloon yo-yo
        vegetable: carrot onion potato cabbage turnip
        building: house barn church hotel castle
        """
    ),
    states=pairs(
        "awake/asleep present/absent guilty/innocent employed/unemployed sick/healthy drunk/sober married/single "
        "indoors/outdoors alive/dead lucky/unlucky seated/standing honest/dishonest calm/nervous clean/dirty "
        "right/wrong happy/unhappy polite/rude busy/idle brave/cowardly careful/careless"
    ),
    orders=pairs(
        "taller/shorter older/younger richer/poorer faster/slower heavier/lighter smarter/dumber happier/sadder "
        "busier/lazier kinder/meaner cleaner/dirtier"
    ),
    acts=words(
        "praise follow blame call push hug thank visit trust admire teach help attack insult invite greet chase hire "
        "kick warn question phone interrupt ignore kiss tease scare annoy"
    ),
    deeds=words("sleep sing dance laugh cry cough swim smile run leave shout arrive work pray cook vote complain"),
    dealings=words("buy sell steal paint clean find lose hide break carry borrow repair wash"),
    places=words("kitchen garden office school park hospital library station market hall"),
    looks=words("red green blue big small heavy old wooden striped dirty"),
)

_DEV = Lexicon(
    people=words(
        "astronaut dentist architect violinist detective sailor shepherd reporter florist miner priest politician "
        "cyclist janitor magician fisherman"
    ),
    women=words("Olivia Sophie Teresa Monica Amanda Ingrid Paula Irene"),
    men=words("Lucas Walter Gregory Philip Edward Hugo Bruno Arthur"),
    kinds=_groups(
        """
        bird: parrot owl sparrow pigeon eagle
        flower: rose tulip lily daisy orchid
        instrument: violin guitar flute piano trumpet
        piece of furniture: wardrobe sofa bed desk shelf
        boat: canoe ferry yacht raft
        """
    ),
    states=pairs(
        "visible/invisible wet/dry loyal/disloyal safe/unsafe rich/poor patient/impatient armed/unarmed early/late "
        "tidy/untidy upstairs/downstairs"
    ),
    orders=pairs("stronger/weaker bigger/smaller louder/quieter thinner/fatter"),
    acts=words("criticize rescue kidnap photograph congratulate fire arrest cheat bite defend tickle imitate"),
    deeds=words("sneeze whistle yawn faint retire jump stumble protest"),
    dealings=words("rent draw inherit throw damage collect"),
    places=words("museum theater cellar airport bakery"),
    looks=words("purple yellow tiny expensive cracked shiny"),
)

_MISMATCHED = Lexicon(
    people=words(
        "wizard knight queen dragon goblin witch pirate monk giant elf princess hunter blacksmith minstrel troll hermit"
    ),
    women=words("Guinevere Morgana Elaine Isolde Brunhild Ariadne"),
    men=words("Lancelot Merlin Arion Siegfried Tristan Hector"),
    kinds=_groups(
        """
        weapon: sword spear dagger bow
        jewel: ruby emerald diamond pearl
        insect: moth beetle spider wasp
        coin: penny florin ducat shilling
        """
    ),
    states=pairs(
        "mortal/immortal free/imprisoned friendly/hostile wild/tame famous/unknown wise/foolish merciful/merciless "
        "blessed/cursed"
    ),
    orders=pairs("bolder/more_timid wiser/more_foolish nobler/baser mightier/feebler"),
    acts=words("bewitch betray banish worship curse capture serve wound deceive crown"),
    deeds=words("weep kneel vanish feast rejoice awaken"),
    dealings=words("bury burn polish melt trade"),
    places=words("forest dungeon tower cave village"),
    looks=words("golden silver ancient magical"),
)

LEXICON: dict[str, Lexicon] = {"train": _TRAIN, "dev": _DEV, "dev_mismatched": _MISMATCHED}
